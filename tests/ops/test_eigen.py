"""eigvalsh, eigh and count_above against LAPACK in float64, on families that break solvers."""

from __future__ import annotations

import math
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import Tensor

from fastcov.bench.eigen_families import FAMILIES as HARD_FAMILIES
from fastcov.bench.eigen_families import cluster
from fastcov.ops import aten_eigen, count_above, eigh, eigvalsh, native
from fastcov.ops.eigen import CountInterval
from fastcov.ops.reference import (
    count_above_reference,
    count_tolerance,
    eigenvalue_tolerance,
    eigvalsh_reference,
)

DTYPES = [torch.float32, torch.float64]
IS_NATIVE = "native" in native.allowed_backends()  # a library that does not load is a failure
without_lapack = pytest.mark.skipif(
    not IS_NATIVE, reason="FASTCOV_BACKEND asks for LAPACK, whose bits depend on its threads"
)


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


def aten_count_above(matrices: Tensor, taus: Tensor) -> CountInterval:
    """As count_above without a compiled library."""
    counts = aten_eigen.count_above([matrices.double()], [taus.expand(*matrices.shape[:-2], -1)])
    return CountInterval(*counts[0].unbind(-1))


def check(values: Tensor, matrix: Tensor) -> None:
    exact = eigvalsh_reference(matrix)
    error = (values.double() - exact).abs().max()
    bound = eigenvalue_tolerance(matrix.shape[-1], matrix.dtype)
    if not IS_NATIVE and matrix.dtype == torch.float32:
        bound = 1e-4  # LAPACK's
    assert float(error) <= bound * float(exact.abs().max())
    assert bool((values.diff() >= 0).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [1, 2, 3, 8, 31, 33, 64, 65, 128, 129])
def test_families(family: str, n: int, dtype: torch.dtype) -> None:
    matrix = FAMILIES[family](n).to(dtype)
    check(eigvalsh(matrix), matrix)
    check(eigvalsh(matrix.expand(3, n, n))[1], matrix)
    check(eigvalsh(matrix.expand(20, n, n))[19], matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["random", "rank one", "clustered", "wilkinson", "mixed"])
def test_every_order_up_to_130_in_one_call(family: str, dtype: torch.dtype) -> None:
    names = list(FAMILIES) if family == "mixed" else [family]
    matrices = [FAMILIES[names[n % len(names)]](n).to(dtype) for n in range(1, 131)]
    for values, matrix in zip(eigvalsh(matrices), matrices, strict=True):
        check(values, matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(6))
def test_random_spectra(seed: int, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = int(torch.randint(2, 200, (), generator=generator))
    spread = torch.randn(n, generator=generator, dtype=torch.float64)
    for eigenvalues in (spread, torch.exp(4 * spread), spread.round(), (spread > 0).double()):
        matrix = rotated(eigenvalues, seed).to(dtype)
        check(eigvalsh(matrix), matrix)
        check(eigvalsh(matrix.expand(9, n, n))[4], matrix)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", ["random", "clustered"])
@pytest.mark.parametrize("n", [255, 256, 257, 511, 512, 513, 1024, 1025])
def test_around_the_boundaries_of_size_classes(n: int, family: str, dtype: torch.dtype) -> None:
    matrix = FAMILIES[family](n).to(dtype)
    check(eigvalsh(matrix), matrix)
    if n <= 512:
        check(eigvalsh(matrix.expand(5, n, n))[4], matrix)


def slow_decay(n: int) -> Tensor:
    index = torch.arange(n, dtype=torch.float64)
    return 1 / (index[:, None] + index + 1) ** 0.5


# In these a sweep along the band may have nothing to do but pass on the bulges of the one before.
@pytest.mark.parametrize(
    ("family", "n", "dtype"),
    [
        *((hilbert, n, torch.float32) for n in (265, 268, 291, 307, 319)),
        *((slow_decay, n, torch.float64) for n in (530, 590)),
    ],
    ids=lambda value: getattr(value, "__name__", str(value)),
)
def test_low_rank_in_two_stages(family, n: int, dtype: torch.dtype) -> None:
    matrix = family(n).to(dtype)
    check(eigvalsh(matrix), matrix)


# float32 is reduced in two stages from order 256 on, float64 from 512.
@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [300, 530, 800])
def test_families_of_large_matrices(family: str, n: int, dtype: torch.dtype) -> None:
    matrix = FAMILIES[family](n).to(dtype)
    check(eigvalsh(matrix), matrix)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [1537, 2048])
def test_the_largest_orders(n: int, family: str) -> None:
    matrix = FAMILIES[family](n)
    for dtype in DTYPES:
        rounded = matrix.to(dtype)
        check(eigvalsh(rounded), rounded)


@pytest.mark.slow
@without_lapack
@pytest.mark.parametrize(("n", "dtype"), [(600, torch.float32), (800, torch.float64)], ids=str)
def test_large_matrices_have_the_same_bits_on_any_number_of_threads(
    n: int, dtype: torch.dtype
) -> None:
    matrices = [random(order).to(dtype) for order in (n, 40, n + 33, n - 1)]
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            results.append(torch.cat(eigvalsh(matrices)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert torch.equal(result, results[0])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_large_matrices_are_read_like_small_ones(dtype: torch.dtype) -> None:
    n = 790
    matrix = random(n).to(dtype)
    spoiled = torch.where(torch.ones_like(matrix).tril().bool(), matrix, math.nan)
    for layout in (spoiled, spoiled.T.contiguous().T, spoiled.repeat_interleave(2, 1)[:, ::2]):
        check(eigvalsh(layout), matrix)
    spoiled[n - 1, 3] = math.inf
    broken, whole = eigvalsh([spoiled, matrix])
    assert bool(broken.isnan().all())
    check(whole, matrix)


@pytest.mark.slow
@pytest.mark.parametrize("level", ["baseline", "avx2"])
def test_lower_instruction_sets_keep_the_bounds(level: str) -> None:
    chosen = "every_order or random_spectra or native_vectors or in_one_batch or counts_fall"
    chosen += " or read_like_small"
    options = ["-q", "-x", "-p", "no:cacheprovider", "--import-mode=importlib", "-k", chosen]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", *options, __file__],
        env={**os.environ, "FASTCOV_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]


@without_lapack
def test_the_compiled_library_serves_the_operators() -> None:
    for operator in ("eigvalsh", "eigh", "count_above"):
        registered = torch._C._dispatch_dump(f"fastcov::{operator}")
        cpu = next(line for line in registered.splitlines() if line.startswith("CPU:"))
        assert "eigen_cpu.cpp" in cpu


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
@pytest.mark.parametrize("n", [17, 24, 25, 32, 33])
def test_eigenvectors_of_every_family_in_one_batch(n: int, dtype: torch.dtype) -> None:
    batch = torch.stack([make(n) for make in FAMILIES.values()] * 2).to(dtype)
    values, vectors = eigh(batch)
    scale = values.double().abs().amax(-1).clamp_min(1e-37)[:, None, None]
    basis = vectors.double()
    residual = batch.double() / scale @ basis - basis * (values.double()[:, None] / scale)
    bar = 1e-5 if dtype == torch.float32 else 1e-12
    assert float(residual.abs().max()) <= bar
    assert float((basis.mT @ basis - torch.eye(n)).abs().max()) <= bar


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 9, 16, 17, 40])
def test_native_vectors_of_batches_read_one_triangle_through_any_strides(
    n: int, dtype: torch.dtype
) -> None:
    batch = torch.stack([rotated(torch.arange(n) - 3.0 * seed, seed) for seed in range(11)])
    batch = batch.to(dtype)
    strided = torch.full((11, 2 * n, 3 * n), math.nan, dtype=dtype)[:, ::2, ::3]
    strided.copy_(batch.tril() + torch.full_like(batch, math.nan).triu(1).nan_to_num(0))
    strided[3, n - 1, 0] = math.inf
    values, vectors = eigh(strided)
    assert bool(values[3].isnan().all() & vectors[3].isnan().all())
    bar = 1e-5 if dtype == torch.float32 else 1e-12
    for index in (0, 2, 4, 10):
        check(values[index], batch[index])
        basis = vectors[index].double()
        residual = batch[index].double() @ basis - basis * values[index].double()
        assert float(residual.abs().max()) <= bar * max(1.0, float(values[index].abs().max()))
        assert float((basis.T @ basis - torch.eye(n)).abs().max()) <= bar


def test_vectors_of_a_mixed_list_belong_to_their_matrices() -> None:
    matrices = [random(n).float() for n in (5, 40, 1)]
    matrices.append(torch.stack([random(8).float()] * 12))
    for system, matrix in zip(eigh(matrices), matrices, strict=True):
        assert bool((system.eigenvalues.diff() >= 0).all())
        rebuilt = system.eigenvectors * system.eigenvalues[..., None, :]
        torch.testing.assert_close(
            rebuilt @ system.eigenvectors.mT, matrix, rtol=0, atol=2e-5 * float(matrix.abs().max())
        )


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
    on_it = count_above(matrix, float(eigvalsh_reference(matrix)[0]))
    assert int(on_it.low) <= n - 1
    assert int(on_it.high) == n


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("n", [2, 33, 90])
def test_counts_fall_with_the_threshold_and_agree_with_eigenvalues(
    n: int, family: str, dtype: torch.dtype
) -> None:
    matrix = FAMILIES[family](n).to(dtype)
    exact = eigvalsh_reference(matrix)
    size = float(exact.abs().max())
    taus = (torch.linspace(-1.1, 1.1, 37, dtype=torch.float64) * size).to(dtype)
    low, high = count_above(matrix, taus)
    truth = count_above_reference(matrix, taus)
    assert bool((low <= truth).all() & (truth <= high).all())
    assert bool((low.diff() <= 0).all() & (high.diff() <= 0).all())
    # An interval opens only where an eigenvalue is within the error bound of tau.
    near = (exact[None] - taus[:, None].double()).abs().amin(-1)
    norm = float(torch.linalg.vector_norm(exact / size)) * size if size > 0 else 0.0
    clear = near > 1.01 * count_tolerance(n) * norm + 1e-300
    assert torch.equal(low[clear], high[clear])
    positive = count_above(matrix, 1.05 * size + 1e-35)
    assert (int(positive.low), int(positive.high)) == (0, 0)
    negative = count_above(matrix, -1.05 * size - 1e-35)
    assert (int(negative.low), int(negative.high)) == (n, n)


def check_counts(matrix: Tensor, taus: Tensor, counts: CountInterval) -> None:
    exact = eigvalsh_reference(matrix)
    # The oracle is right within this.
    doubt = 1e-14 * len(exact) ** 0.5 * float(exact.abs().max())
    surely = (exact > taus[:, None].double() + doubt).sum(-1)
    possibly = (exact > taus[:, None].double() - doubt).sum(-1)
    assert bool((counts.low <= possibly).all() & (surely <= counts.high).all())


@pytest.mark.parametrize("function", [count_above, aten_count_above], ids=["native", "torch"])
@pytest.mark.parametrize("coupling", [0.01, 1.0, 0.0003])
@pytest.mark.parametrize("n", [32, 64, 156, 255, 256, 400])
def test_counts_beside_one_large_cluster_are_exact(n: int, coupling: float, function) -> None:
    matrix = cluster(n, 1.001, coupling).float()
    # Exactly d on the diagonal and e off it: d - e, n - 1 times, and d + (n - 1) e.
    d, e = float(matrix[0, 0]), float(matrix[0, -1])
    for center, above in ((d - e, n), (d + (n - 1) * e, 1)):
        taus = torch.tensor([center - 2e-8, center + 2e-8], dtype=torch.float64)
        expected = torch.tensor([above, 1 if above == n else 0])
        # 33 in vectors, and one left; LAPACK takes them one by one.
        batch = matrix.expand(33 if function is count_above else 2, n, n)
        for counts in (function(matrix, taus), function(batch, taus)):
            assert bool((counts.low == expected).all())
            assert bool((counts.high == expected).all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", HARD_FAMILIES)
@pytest.mark.parametrize("n", [1, 17, 64, 130])
def test_counts_of_hard_families_hold_the_truth(n: int, family: str, dtype: torch.dtype) -> None:
    matrix = HARD_FAMILIES[family](n).to(dtype)
    exact = eigvalsh_reference(matrix)
    size = float(exact.abs().max())
    some = exact[:: max(1, n // 16)]
    steps = torch.tensor([0.0, 1e-13, 1e-10, 1e-6, -1e-13, -1e-10, -1e-6], dtype=torch.float64)
    taus = (some[:, None] + steps * size).flatten()
    check_counts(matrix, taus, count_above(matrix, taus))
    low, high = count_above(matrix.expand(17, n, n), taus)
    check_counts(matrix, taus, CountInterval(low[3], high[3]))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", HARD_FAMILIES)
@pytest.mark.parametrize("n", [5, 33, 130])
def test_hard_families(n: int, family: str, dtype: torch.dtype) -> None:
    matrix = HARD_FAMILIES[family](n).to(dtype)
    check(eigvalsh(matrix), matrix)
    check(eigvalsh(matrix.expand(20, n, n))[7], matrix)


def test_counts_of_large_wilkinson_matrices_enclose_the_truth() -> None:
    matrix = wilkinson(1025).float()
    taus = torch.linspace(-1.0, 513.0, 41)
    low, high = count_above(matrix, taus)
    truth = count_above_reference(matrix, taus)
    assert bool((low <= truth).all() & (truth <= high).all())


def test_counts_of_a_mixed_list_and_of_thresholds_for_each_matrix() -> None:
    batch = torch.stack([torch.diag(torch.tensor([-2.0, 0.0, float(k)])) for k in range(1, 5)])
    low, high = count_above(
        batch, torch.tensor([[-1.0, 0.5], [-1.0, 2.5], [-3.0, 9.0], [0.5, 3.5]])
    )
    assert low.tolist() == high.tolist() == [[2, 1], [2, 0], [3, 0], [1, 1]]
    one, several = count_above([torch.eye(4), batch], [0.5, torch.tensor([-1.0, 0.5])])
    assert int(one.low) == int(one.high) == 4
    assert several.low.tolist() == [[2, 1]] * 4


def test_one_graph_under_compile() -> None:
    def solve(matrices: list[Tensor]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        values = eigvalsh(matrices)
        system = eigh(matrices[0])
        low, _ = count_above(matrices[1], 0.5)
        return values[0] * 2, system.eigenvalues, system.eigenvectors, low

    matrices = [random(6).float(), torch.stack([random(5).float()] * 3)]
    compiled = torch.compile(solve, backend="aot_eager", fullgraph=True)
    for ours, eager in zip(compiled(matrices), solve(matrices), strict=True):
        assert torch.equal(ours, eager)


@pytest.mark.parametrize("function", [eigvalsh, eigh, lambda A: count_above(A, 0.5)])
@pytest.mark.parametrize(
    ("matrix", "error", "message"),
    [
        (torch.zeros(3, 4), ValueError, r"\(3, 4\)"),
        (torch.zeros(3), ValueError, r"\(3,\)"),
        (torch.zeros(0, 0), ValueError, "at least one row"),
        (torch.zeros(2, 2, dtype=torch.complex64), TypeError, "complex64"),
        (torch.zeros(2, 2, dtype=torch.int32), TypeError, "int32"),
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


@pytest.mark.parametrize("tau", [np.float32(0.5), np.int64(0), np.float64(1e300), 1e300, 10**30])
def test_thresholds_are_numbers_of_any_kind_and_size(tau: object) -> None:
    expected = int(sum(value > float(tau) for value in (1.0, 2.0)))
    interval = count_above(torch.diag(torch.tensor([1.0, 2.0])), tau)
    assert (int(interval.low), int(interval.high)) == (expected, expected)


@pytest.mark.parametrize(
    ("tau", "error", "message"),
    [
        (10**400, ValueError, "beyond float64"),
        (np.array(0.5), TypeError, "ndarray"),
        (np.float32("nan"), ValueError, "NaN"),
        ("0.5", TypeError, "str"),
        (torch.tensor([0.5]).to_sparse(), TypeError, "layout torch.sparse_coo"),
        (torch.quantize_per_tensor(torch.tensor([0.5]), 0.1, 0, torch.qint8), TypeError, "qint8"),
        (torch.tensor([True]), TypeError, "torch.bool"),
    ],
)
def test_bad_thresholds_are_named(tau: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        count_above(torch.eye(2), tau)


def test_ten_dimensions() -> None:
    matrices = random(3).expand(1, 2, 1, 1, 1, 1, 3, 1, 3, 3)
    assert eigvalsh(matrices).shape == matrices.shape[:-1]
    assert eigh(matrices).eigenvectors.shape == matrices.shape
    taus = torch.zeros(*matrices.shape[:-2], 4)
    assert count_above(matrices, taus).low.shape == taus.shape


def test_a_call_without_memory_says_so() -> None:
    program = """
import resource, torch, fastcov
matrix = torch.zeros(1).expand(40000, 40000)
used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (2 << 30),) * 2)
try:
    fastcov.ops.eigvalsh(matrix)
except MemoryError as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    )
    if IS_NATIVE:
        assert "(40000, 40000) torch.float32 on cpu" in result.stdout


def test_derivatives_in_both_modes_are_those_of_hellmann_and_feynman() -> None:
    matrix, tangent = random(6), random(6) * 0.1
    _, vectors = torch.linalg.eigh(matrix)
    expected = torch.einsum("ik,ij,jk->k", vectors, tangent, vectors)
    for solve in (eigvalsh, lambda A: eigh(A).eigenvalues, lambda A: eigvalsh([A])[0]):
        values, derivative = torch.func.jvp(solve, (matrix,), (tangent,))
        torch.testing.assert_close(derivative, expected)
        torch.testing.assert_close(values, eigvalsh(matrix))
        leaf = matrix.clone().requires_grad_()
        solve(leaf)[2].backward()
        torch.testing.assert_close(leaf.grad, torch.outer(vectors[:, 2], vectors[:, 2]))
    leaf = matrix.clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda A: eigh(A + A.T).eigenvectors.square(), (leaf,), check_forward_ad=True
    )
    assert not count_above(leaf, 0.0).low.requires_grad


def test_vmap_is_a_batch() -> None:
    batch = torch.stack([random(5).float() * (k + 1) for k in range(6)])
    pairs = batch.reshape(2, 3, 5, 5)
    taus = torch.arange(6.0)
    expected = eigvalsh(batch)
    torch.testing.assert_close(torch.vmap(eigvalsh)(batch), expected)
    moved = torch.vmap(eigvalsh, in_dims=1, out_dims=1)(pairs)
    torch.testing.assert_close(moved, expected.reshape(2, 3, 5))
    torch.testing.assert_close(torch.vmap(torch.vmap(eigvalsh))(pairs), expected.reshape(2, 3, 5))
    torch.testing.assert_close(torch.vmap(lambda A: eigh(A).eigenvalues)(batch), expected)
    torch.testing.assert_close(
        torch.vmap(lambda A: eigh(A.expand(20, 5, 5)).eigenvalues)(batch)[:, 7], expected
    )
    many, one = torch.vmap(lambda A: tuple(eigvalsh([A, batch[0]])))(batch)
    torch.testing.assert_close(many, expected)
    torch.testing.assert_close(one, expected[:1].expand(6, 5))
    each = count_above(batch, taus[:, None])
    both = torch.vmap(lambda A, tau: tuple(count_above(A, tau)))(batch, taus)
    assert torch.equal(torch.stack(both), torch.stack([each.low[:, 0], each.high[:, 0]]))
    low, _ = torch.vmap(lambda tau: tuple(count_above(batch[0], tau)))(taus)
    assert torch.equal(low, count_above(batch[0], taus).low)


def _vectors(A: Tensor) -> Tensor:
    return eigh(A).eigenvectors.square()


def _vectors_of_torch(A: Tensor) -> Tensor:
    return torch.linalg.eigh(A).eigenvectors.square()


@pytest.mark.parametrize("n", [3, 20])
@pytest.mark.parametrize(
    ("solve", "reference"),
    [
        (eigvalsh, torch.linalg.eigvalsh),
        (lambda A: eigvalsh([A, -A])[0], torch.linalg.eigvalsh),
        (_vectors, _vectors_of_torch),
    ],
    ids=["eigvalsh", "eigvalsh of a list", "eigh"],
)
def test_derivatives_inside_and_outside_of_maps(n: int, solve, reference) -> None:
    from torch.func import grad, jacfwd, jacrev, jvp, vmap

    batch = torch.stack([random(n) * (k + 1) for k in range(3)])
    for transform in (
        lambda f: vmap(jacrev(f)),
        lambda f: vmap(jacfwd(f)),
        lambda f: jacrev(vmap(f)),
        lambda f: jacfwd(vmap(f)),
        lambda f: vmap(grad(lambda A: f(A)[0].sum())),
        lambda f: lambda A: jvp(vmap(f), (A,), (A.mT @ A,))[1],
        lambda f: lambda A: vmap(vmap(grad(lambda A: f(A)[-1].sum())))(A[None])[0],
    ):
        torch.testing.assert_close(transform(solve)(batch), transform(reference)(batch))
    expected = jacrev(vmap(reference))(batch).sum(tuple(range(1 + reference(batch[0]).dim())))
    leaf = batch.clone().requires_grad_()
    vmap(solve)(leaf).sum().backward()
    torch.testing.assert_close(leaf.grad, expected)
    tangent = jvp(vmap(reference), (batch,), (batch.mT @ batch,))[1]
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(batch, batch.mT @ batch)
        found = torch.autograd.forward_ad.unpack_dual(vmap(solve)(dual)).tangent
        torch.testing.assert_close(found, tangent)


@pytest.mark.parametrize(
    ("solve", "reference"),
    [(eigvalsh, torch.linalg.eigvalsh), (_vectors, _vectors_of_torch)],
    ids=["eigvalsh", "eigh"],
)
def test_derivatives_in_compiled_code(solve, reference) -> None:
    from torch.func import jacrev, jvp, vmap

    batch = torch.stack([random(4) * (k + 1) for k in range(3)])

    def of_leaf(f, batch: Tensor) -> Tensor:
        leaf = batch.clone().requires_grad_()
        f(leaf).sum().backward()
        return leaf.grad

    def compiled(f):
        return torch.compile(f, backend="aot_eager", fullgraph=True)

    def mapped(f):
        return lambda A: vmap(f)(A)

    def along(f):
        return lambda A: jvp(f, (A,), (A @ A,))[1]

    for transform in (jacrev, along):
        found, expected = compiled(transform(solve)), transform(reference)
        torch.testing.assert_close(found(batch[0]), expected(batch[0]))
    found, expected = of_leaf(compiled(mapped(solve)), batch), of_leaf(mapped(reference), batch)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("n", [3, 20])
def test_a_matrix_that_is_not_finite_spoils_no_derivative_but_its_own(n: int, bad: float) -> None:
    batch = torch.stack([random(n) * (k + 1) for k in range(3)])
    batch[1, n - 1, 0] = bad
    whole = batch[[0, 2]].clone().requires_grad_()
    torch.linalg.eigvalsh(whole)[:, -1].sum().backward()
    for solve in (eigvalsh, lambda A: eigh(A).eigenvalues, lambda A: eigvalsh([A])[0]):
        leaf = batch.clone().requires_grad_()
        values = solve(leaf)
        assert bool(values[1].isnan().all() & values[[0, 2]].isfinite().all())
        values[[0, 2], -1].sum().backward()
        torch.testing.assert_close(leaf.grad[[0, 2]], whole.grad)
        assert bool(torch.vmap(solve)(leaf)[1].isnan().all())
    vectors = eigh(batch.clone().requires_grad_()).eigenvectors
    assert bool(vectors[1].isnan().all() & vectors[[0, 2]].isfinite().all())


@pytest.mark.slow
@without_lapack
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_deterministic_algorithms_give_each_matrix_its_own_bits(dtype: torch.dtype) -> None:
    before = torch.get_num_threads()
    torch.use_deterministic_algorithms(True)
    try:
        for n in (1, 3, 16, 33, 130, 257, 520):
            batch = torch.stack([random(n + k)[:n, :n] for k in range(7)]).to(dtype)
            torch.set_num_threads(1)
            alone = torch.stack([eigvalsh(matrix) for matrix in batch])
            taus = torch.tensor([0.0, 0.5, float(alone[0, -1])], dtype=torch.float64)
            counts = [count_above(matrix, taus) for matrix in batch]
            vectors = torch.stack([eigh(matrix).eigenvectors for matrix in batch])
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                assert torch.equal(eigvalsh(batch), alone)
                assert torch.equal(torch.stack(eigvalsh(list(batch))), alone)
                mixed = eigvalsh([random(5).to(dtype), batch[1:], batch[0]])
                assert torch.equal(torch.cat([mixed[2][None], mixed[1]]), alone)
                low, high = count_above(batch, taus)
                assert torch.equal(low, torch.stack([count.low for count in counts]))
                assert torch.equal(high, torch.stack([count.high for count in counts]))
                assert torch.equal(eigh(batch).eigenvectors, vectors)
                both = eigh([batch[2:], random(7).to(dtype), batch[0]])
                assert torch.equal(both[0].eigenvectors, vectors[2:])
                assert torch.equal(both[2].eigenvectors, vectors[0])
                assert torch.get_num_threads() == threads
    finally:
        torch.use_deterministic_algorithms(False)
        torch.set_num_threads(before)


@pytest.mark.parametrize("place", [(0, 0), (4, 0), (4, 4), (2, 1)])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", [5, 30, 100])
def test_vectors_of_a_matrix_that_is_not_finite_are_nan(
    n: int, bad: float, place: tuple[int, int]
) -> None:
    batch = torch.stack([random(n).float()] * 3)
    batch[1][place] = bad
    for matrices in (batch, batch.double()):
        values, vectors = eigh(matrices)
        assert bool(values[1].isnan().all() & vectors[1].isnan().all())
        assert bool(values[[0, 2]].isfinite().all() & vectors[[0, 2]].isfinite().all())
        alone = eigh(matrices[1])
        assert bool(alone.eigenvalues.isnan().all() & alone.eigenvectors.isnan().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("family", HARD_FAMILIES)
@pytest.mark.parametrize("n", [1, 2, 3, 9, 16, 32, 47])
def test_vectors_of_hard_families(n: int, family: str, dtype: torch.dtype) -> None:
    """One by one and side by side, where off-diagonals vanish and squares underflow."""
    matrix = HARD_FAMILIES[family](n).to(dtype)
    exact = eigvalsh_reference(matrix)
    size = max(float(exact.abs().max()), 1e-300)
    bar = 3e-6 if dtype == torch.float32 else 2e-14
    for values, vectors in (eigh(matrix), (part[6] for part in eigh(matrix.expand(18, n, n)))):
        basis, scaled = vectors.double(), values.double() / size
        assert float((scaled - exact / size).abs().max()) <= bar
        assert float((matrix.double() / size @ basis - basis * scaled).abs().max()) <= bar
        assert float((basis.T @ basis - torch.eye(n)).abs().max()) <= bar


@pytest.mark.parametrize("is_deterministic", [False, True])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_vectors_of_the_smallest_matrices_that_are_not_finite_are_nan(
    n: int, is_deterministic: bool
) -> None:
    """LAPACK gives finite eigenvalues for some of order 2."""
    torch.use_deterministic_algorithms(is_deterministic)
    try:
        for place in torch.ones(n, n).tril().nonzero().tolist():
            for bad in (math.nan, math.inf):
                matrix = random(n)
                matrix[tuple(place)] = bad
                for dtype in DTYPES:
                    values, vectors = eigh(matrix.to(dtype))
                    assert bool(values.isnan().all() & vectors.isnan().all())
    finally:
        torch.use_deterministic_algorithms(False)


def test_opcheck() -> None:
    batch = [random(4).float(), random(3).float().expand(2, 3, 3)]
    torch.library.opcheck(torch.ops.fastcov.eigvalsh, (batch,))
    torch.library.opcheck(torch.ops.fastcov.eigh, (batch,))
    taus = [torch.zeros(1).double(), torch.zeros(2, 1).double()]
    doubles = [matrix.double() for matrix in batch]
    torch.library.opcheck(torch.ops.fastcov.count_above, (doubles, taus))


def test_a_list_of_orders_takes_the_memory_of_the_neediest() -> None:
    """Groups of a middle order need more scratch than a single large matrix."""
    program = """
import torch, fastcov
torch.set_num_threads(1)
rows = [torch.randn(2 * n, n, dtype=torch.float64) for n in (*[512] * 4, *[256] * 7)]
matrices = [x.T @ x for x in rows]
for matrix, values in zip(matrices, fastcov.ops.eigvalsh(matrices)):
    assert abs(float(values.sum() / matrix.trace()) - 1) < 1e-9
print("done")
"""
    checking = {"LD_PRELOAD": "libc_malloc_debug.so.0", "MALLOC_CHECK_": "3"}
    result = subprocess.run(
        [sys.executable, "-c", program],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **checking},
    )
    assert result.stdout == "done\n", result.stderr[-500:]
