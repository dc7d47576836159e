"""eigvalsh, eigh and count_above against LAPACK in float64, on families that break solvers."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from fastcov.ops import count_above, eigh, eigvalsh
from fastcov.ops.reference import (
    count_above_reference,
    eigenvalue_tolerance,
    eigvalsh_reference,
)

DTYPES = [torch.float32, torch.float64]


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    basis, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    return (basis * eigenvalues.double()) @ basis.T


def random(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    square = torch.randn(n, n, generator=generator, dtype=torch.float64)
    return square + square.T


def wilkinson(n: int) -> Tensor:
    middle = (torch.arange(n, dtype=torch.float64) - (n - 1) / 2).abs()
    ones = torch.ones(n - 1, dtype=torch.float64)
    return torch.diag(middle) + torch.diag(ones, 1) + torch.diag(ones, -1)


def hilbert(n: int) -> Tensor:
    index = torch.arange(n, dtype=torch.float64)
    return 1 / (index[:, None] + index[None, :] + 1)


FAMILIES = {
    "random": random,
    "rank one": lambda n: torch.ones(n, n, dtype=torch.float64),
    "zero": lambda n: torch.zeros(n, n, dtype=torch.float64),
    "identity": lambda n: torch.eye(n, dtype=torch.float64),
    "clustered": lambda n: rotated(1 + 1e-7 * torch.arange(n, dtype=torch.float64)),
    "graded": lambda n: rotated(torch.logspace(0, -12, n, dtype=torch.float64)),
    "wilkinson": wilkinson,
    "hilbert": hilbert,
    "tiny": lambda n: 1e-30 * random(n),
    "huge": lambda n: 1e30 * random(n),
}


def check(values: Tensor, matrix: Tensor) -> None:
    exact = eigvalsh_reference(matrix)
    error = (values.double() - exact).abs().max()
    bound = eigenvalue_tolerance(matrix.shape[-1], matrix.dtype)
    assert float(error) <= bound * float(exact.abs().max())
    assert bool((values.diff() >= 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 31, 33, 64, 65, 128, 129])
def test_families(family: str, n: int, dtype: torch.dtype) -> None:
    matrix = FAMILIES[family](n).to(dtype)
    check(eigvalsh(matrix), matrix)
    check(eigvalsh(matrix.expand(3, n, n))[1], matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_order_up_to_130_in_one_call(dtype: torch.dtype) -> None:
    matrices = [random(n).to(dtype) for n in range(1, 131)]
    for values, matrix in zip(eigvalsh(matrices), matrices, strict=True):
        check(values, matrix)


@pytest.mark.parametrize("n", [255, 257, 511, 513])
def test_large_orders(n: int) -> None:
    matrix = random(n).float()
    check(eigvalsh(matrix), matrix)


def test_batches_of_any_size() -> None:
    many = torch.randn(65536, 4, 4, generator=torch.Generator().manual_seed(1))
    many = many + many.mT
    exact = eigvalsh_reference(many)
    assert float((eigvalsh(many) - exact).abs().max()) < 1e-5
    assert eigvalsh(many[:0]).shape == (0, 4)
    grid = many[:6].reshape(2, 3, 4, 4)
    assert torch.equal(eigvalsh(grid).reshape(6, 4), eigvalsh(many[:6]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_only_the_lower_triangle_is_read_through_any_strides(dtype: torch.dtype) -> None:
    matrix = random(24).to(dtype)
    spoiled = matrix.tril() + torch.full_like(matrix, math.nan).triu(1)
    spoiled = torch.where(torch.ones_like(matrix).tril().bool(), matrix, spoiled)
    expected = eigvalsh(matrix)
    torch.testing.assert_close(eigvalsh(spoiled), expected)
    strided = torch.zeros(48, 72, dtype=dtype)[::2, ::3]
    strided.copy_(spoiled)
    torch.testing.assert_close(eigvalsh(strided), expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [5, 40, 200])
def test_non_finite_matrices_stay_alone(bad: float, n: int) -> None:
    batch = torch.stack([random(n).float()] * 3)
    batch[1, n - 1, 0] = bad
    values = eigvalsh(batch)
    assert bool(values[1].isnan().all())
    check(values[0], batch[0])
    check(values[2], batch[2])


def test_same_input_same_bits_and_rotation_changes_nothing() -> None:
    batch = torch.stack([random(50).float() for _ in range(9)])
    assert torch.equal(eigvalsh(batch), eigvalsh(batch))
    turned = rotated(torch.linspace(-1, 2, 50, dtype=torch.float64), seed=3)
    torch.testing.assert_close(
        eigvalsh(turned), torch.linspace(-1, 2, 50, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [1, 7, 64, 128])
def test_eigenvectors(family: str, n: int) -> None:
    matrix = FAMILIES[family](n).float()
    values, vectors = eigh(matrix)
    scale = max(float(values.abs().max()), 1e-37)
    symmetric, basis = matrix.double() / scale, vectors.double()
    residual = symmetric @ basis - basis * (values.double() / scale)
    assert float(residual.abs().max()) <= 1e-5
    assert float((basis.T @ basis - torch.eye(n)).abs().max()) <= 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 6, 33, 100])
def test_counts_enclose_the_truth_and_are_sharp_away_from_eigenvalues(
    n: int, dtype: torch.dtype
) -> None:
    eigenvalues = torch.linspace(-1, 1, n, dtype=torch.float64)
    matrix = rotated(eigenvalues).to(dtype)
    taus = torch.tensor([-2.0, -0.503, 0.0071, 0.497, 2.0], dtype=torch.float64)
    low, high = count_above(matrix, taus)
    exact = count_above_reference(matrix, taus)
    assert bool((low <= exact).all())
    assert bool((exact <= high).all())
    assert torch.equal(low, high)
    on_it = count_above(matrix, float(eigenvalues[0]))
    assert int(on_it.low) <= n - 1
    assert int(on_it.high) == n


@pytest.mark.parametrize("function", [eigvalsh, eigh, lambda A: count_above(A, 0.5)])
@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.zeros(3, 4), ValueError, r"\(3, 4\)"),
        (torch.zeros(3), ValueError, r"\(3,\)"),
        (torch.zeros(0, 0), ValueError, "at least one row"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(2, 2, dtype=torch.int32), TypeError, "int32"),
        (torch.eye(2, requires_grad=True), RuntimeError, "requires grad"),
        ([], ValueError, "empty sequence"),
        ([torch.eye(2), torch.eye(2).double()], ValueError, "float64"),
        ([torch.eye(2), torch.eye(2, device="meta")], ValueError, "meta"),
        (3, TypeError, "int"),
    ],
)
def test_bad_matrices_are_named(
    function: object, matrix: object, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        function(matrix)


@pytest.mark.parametrize("tau", [math.nan, torch.tensor([0.0, math.nan])])
def test_a_nan_threshold_is_named(tau: object) -> None:
    with pytest.raises(ValueError, match="NaN"):
        count_above(torch.eye(2), tau)


def test_opcheck() -> None:
    batch = [random(4).float(), random(3).float().expand(2, 3, 3)]
    torch.library.opcheck(torch.ops.fastcov.eigvalsh, (batch,))
    taus = [torch.zeros(1), torch.zeros(2, 1)]
    torch.library.opcheck(torch.ops.fastcov.count_above, (batch, taus))
