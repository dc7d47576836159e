"""torch.func: a tracked model inside grad, vmap, jvp and their like, eager and compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacrev, jvp, vmap

import fastcov


def second_moment(rows: Tensor) -> Tensor:
    flat = rows.detach().double().reshape(-1, rows.shape[-1])
    return flat.T @ flat / len(flat)


class Net(nn.Module):
    """A convolution whose channels must be found, whatever vmap hides."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(2, 5, 3, padding=1)
        self.head = nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((-2, -1)))


MODEL = Net()
PARAMETERS = dict(MODEL.named_parameters())
IMAGES = torch.randn(6, 2, 4, 4)


def total(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
    return functional_call(MODEL, parameters, (x,)).sum()


def of_one_image(parameters: dict[str, Tensor], image: Tensor) -> Tensor:
    return total(parameters, image[None])


TRANSFORMS: dict[str, Callable[[], Any]] = {
    "functional_call": lambda: total(PARAMETERS, IMAGES),
    "grad": lambda: grad(total)(PARAMETERS, IMAGES),
    "grad_and_value": lambda: grad_and_value(total)(PARAMETERS, IMAGES),
    "jvp": lambda: jvp(lambda x: total(PARAMETERS, x), (IMAGES,), (IMAGES,)),
    "jacrev": lambda: jacrev(MODEL)(IMAGES),
    "hessian": lambda: hessian(lambda x: total(PARAMETERS, x))(IMAGES),
    "vmap": lambda: vmap(total, (None, 0))(PARAMETERS, IMAGES[:, None]),
    "vmap over another dimension": lambda: vmap(total, (None, 2))(
        PARAMETERS, IMAGES.movedim(0, 1)[None]
    ),
    "vmap twice": lambda: vmap(vmap(of_one_image, (None, 0)), (None, 0))(
        PARAMETERS, IMAGES.unflatten(0, (2, 3))
    ),
    "unbatched": lambda: vmap(total, (None, 0))(PARAMETERS, IMAGES),
    "gradients of each sample": lambda: vmap(grad(of_one_image), (None, 0))(PARAMETERS, IMAGES),
}


@pytest.mark.parametrize("name", TRANSFORMS)
@pytest.mark.parametrize("options", [{}, {"weighting": "image", "decay": 0.5}], ids=["", "image"])
def test_rows_under_a_transform(name: str, options: dict[str, Any]) -> None:
    expected = second_moment(MODEL.conv(IMAGES).movedim(1, -1))
    with fastcov.track(MODEL, rows="all", where="both", **options) as tracker:
        TRANSFORMS[name]()
        assert tracker.count("conv") == 6 * 16, tracker.summary()
    assert tracker.steps == 1
    torch.testing.assert_close(tracker.covariance("conv"), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(
        tracker.covariance("conv:in"), second_moment(IMAGES.movedim(1, -1)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("name", TRANSFORMS)
def test_results_are_the_same(name: str) -> None:
    plain = torch.utils._pytree.tree_leaves(TRANSFORMS[name]())
    with fastcov.track(MODEL, rows=0.5, where="both") as tracker:
        tracked = torch.utils._pytree.tree_leaves(TRANSFORMS[name]())
        TRANSFORMS[name]()
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked, strict=True))
    assert tracker.steps == 2
    assert tracker.count("conv") == 96


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("name", ["grad", "vmap", "vmap twice", "gradients of each sample"])
def test_compiled_transforms(name: str) -> None:
    expected = second_moment(MODEL.conv(IMAGES).movedim(1, -1))
    with fastcov.track(MODEL, rows="all") as tracker:
        torch.compile(TRANSFORMS[name], backend="aot_eager", fullgraph=True)()
    assert tracker.count("conv") == 96
    torch.testing.assert_close(tracker.covariance("conv"), expected, rtol=1e-5, atol=1e-6)


def test_forward_mode_dual_numbers(cases: Any) -> None:
    from torch.autograd import forward_ad

    model = cases["mobilenet"].make()
    x = torch.randn(2, 3, 32, 32)
    with fastcov.track(model, rows="all") as tracker, forward_ad.dual_level():
        model(forward_ad.make_dual(x, torch.ones_like(x)))
    assert tracker.count("classifier.1") == 2


def test_an_ensemble_by_vmap_of_stacked_parameters(cases: Any) -> None:
    """The models of an ensemble share one skeleton: its taps pool their rows."""
    models = [cases["vit"].make(seed).eval() for seed in range(3)]
    skeleton = cases["vit"].make()
    parameters, buffers = torch.func.stack_module_state(models)
    x = torch.randn(2, 3, 32, 32)
    skeleton.eval()
    with fastcov.track(skeleton, rows="all", train_only=False) as tracker:
        vmap(lambda p, b: functional_call(skeleton, (p, b), (x,)))(parameters, buffers)
    assert tracker.count("head") == 6
    outputs = torch.cat([model(x) for model in models])
    torch.testing.assert_close(
        tracker.covariance("head"), second_moment(outputs), rtol=1e-4, atol=1e-6
    )
