"""Operators under torch.vmap: each example on its own, or a clear refusal."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastcov import CovarianceState
from fastcov.ops import accumulate_, covariance
from fastcov.ops.covariance import Moments


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_covariances_of_examples(dtype: torch.dtype, in_dim: int) -> None:
    x = torch.randn(6, 30, 4).to(dtype)
    batch = x.movedim(0, in_dim)
    found = torch.vmap(covariance, in_dims=in_dim)(batch)
    assert torch.equal(found, torch.stack([covariance(one) for one in x]))
    centred = torch.vmap(lambda one: covariance(one, centered=True, precision="ieee"), in_dim)(
        batch
    )
    assert torch.equal(centred, torch.stack([covariance(one, centered=True) for one in x]))


def test_nested_maps() -> None:
    x = torch.randn(2, 3, 20, 4)
    found = torch.vmap(torch.vmap(covariance))(x)
    assert torch.equal(found, torch.stack([torch.stack([covariance(o) for o in b]) for b in x]))


def test_a_state_for_each_example() -> None:
    x, weights = torch.randn(5, 30, 4), torch.rand(5, 30)
    states = [torch.stack([value] * 5) for value in vars(Moments(4)).values()]

    def add(rows: Tensor, weight: Tensor, *state: Tensor) -> Tensor:
        torch.ops.fastcov.accumulate_(*state, rows, -1, weight, 0.5, 0.9)
        return state[0].sum()

    torch.vmap(add)(x, weights, *states)
    for index in range(5):
        expected = Moments(4)
        accumulate_(expected, x[index], weights[index], row_scale=0.5, decay=0.9)
        for found, value in zip(states, vars(expected).values(), strict=True):
            assert torch.equal(found[index], value)


@pytest.mark.parametrize("centered", [False, True])
def test_derivatives_of_a_covariance_in_both_modes(centered: bool) -> None:
    from torch.func import jacfwd, jacrev, vmap

    x = torch.randn(5, 30, 4, dtype=torch.float64)

    def find(rows: Tensor) -> Tensor:
        return covariance(rows, centered=centered)

    def reference(rows: Tensor) -> Tensor:
        rows = rows - rows.mean(0) if centered else rows
        return rows.T @ rows / len(rows)

    for transform in (
        lambda f: jacrev(vmap(f)),
        lambda f: jacfwd(vmap(f)),
        lambda f: vmap(jacrev(f)),
        lambda f: vmap(jacfwd(f)),
    ):
        torch.testing.assert_close(transform(find)(x), transform(reference)(x))
    leaf = x[0].clone().requires_grad_()
    assert torch.autograd.gradcheck(find, (leaf,), check_forward_ad=True)
    with torch.no_grad():
        assert not find(leaf).requires_grad
    broken = torch.cat([x[0], torch.full((1, 4), float("nan"))]).requires_grad_()
    find(broken).sum().backward()
    find(leaf).sum().backward()
    torch.testing.assert_close(broken.grad[:-1], leaf.grad)
    assert not broken.grad[-1].any()


@pytest.mark.parametrize("sketch", [None, 2])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"decay": 0.5},
        {"row_scale": 2.0},
        {"row_weight": torch.linspace(0.1, 1, 30)},
        {"row_weight": torch.linspace(0.1, 1, 30), "precision": "float64"},
    ],
    ids=["rows", "decay", "scale", "weights", "float64"],
)
def test_a_state_is_updated_inside_of_derivatives(
    options: dict[str, Any], sketch: int | None
) -> None:
    from torch.func import grad, jvp

    x = torch.randn(30, 4)
    expected = CovarianceState(4, sketch=sketch)
    expected.update(x, **options)
    for transform in (
        lambda f: grad(f)(x),
        lambda f: jvp(f, (x,), (x,)),
        lambda f: grad(lambda y: grad(f)(y).sum())(x),
    ):
        state = CovarianceState(4, sketch=sketch)

        def loss(rows: Tensor, state: CovarianceState = state) -> Tensor:
            state.update(rows, **options)
            return rows.square().sum()

        transform(loss)
        for found, value in zip(state.tensors, expected.tensors, strict=True):
            torch.testing.assert_close(found, value)


def test_a_shared_state_is_refused_untouched() -> None:
    state = CovarianceState(4)
    with pytest.raises(RuntimeError, match="the state is shared by all 5 examples; add the whole"):
        torch.vmap(lambda rows: state.update(rows))(torch.randn(5, 30, 4))
    assert not any(tensor.any() for tensor in state.tensors)
    buffer = torch.zeros(9, 4)
    with pytest.raises(RuntimeError, match="the buffer is shared"):
        torch.vmap(lambda rows: torch.ops.fastcov.gather_(buffer, rows, 0, 0, 9, 1, 0))(
            torch.randn(5, 30, 4)
        )


def test_samples_of_each_example() -> None:
    x, buffers = torch.randn(5, 30, 4), torch.zeros(5, 9, 4)
    torch.vmap(lambda b, rows: torch.ops.fastcov.gather_(b, rows, 0, 3, 9, 1, 77) or b.sum())(
        buffers, x
    )
    for buffer, rows in zip(buffers, x, strict=True):
        expected = torch.zeros(9, 4)
        torch.ops.fastcov.gather_(expected, rows, 0, 3, 9, 1, 77)
        assert torch.equal(buffer, expected)
