"""The GPU's eigenvalue kernels, run on the host: their indices, shuffles, barriers and plans."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastcov.bench.eigen_families import cluster
from fastcov.ops.reference import count_tolerance, eigenvalue_tolerance, eigvalsh_reference

DTYPES = ["float32", "float64"]
# Shared memory that a block may ask for.
SHARED = {"sm_75": 65536, "sm_86": 101376, "sm_80": 166912, "sm_90": 232448}
BROKEN = 2  # matrices at the end of a batch that are not finite

Families = dict[str, Callable[[int], Tensor]]


def matrices_of(families: Families, n: int, dtype: str) -> Tensor:
    """One matrix of every family, then one with an infinity and one with a NaN. [B, n, n]

    Above the diagonal stands NaN: nobody may read it.
    """
    batch = [make(n) for make in families.values()]
    for bad in (math.inf, math.nan):
        broken = families["random"](n)
        broken[n - 1, 0] = bad
        batch.append(broken)
    matrices = torch.stack(batch).to(getattr(torch, dtype))
    return torch.where(torch.ones_like(matrices).tril().bool(), matrices, math.nan)


def bar(n: int, dtype: str) -> float:
    """Largest error of an eigenvalue relative to the largest, up to n = 256."""
    return 2e-6 if dtype == "float32" else 1e-13 * n**0.5


def check_values(families: Families, values: Tensor, matrices: Tensor) -> None:
    n, dtype = matrices.shape[-1], str(matrices.dtype).removeprefix("torch.")
    assert bool(values[-BROKEN:].isnan().all())
    assert bool((values[:-BROKEN].diff() >= 0).all())
    exact = eigvalsh_reference(matrices[:-BROKEN])
    errors = (values[:-BROKEN] - exact).abs().amax(-1)
    limits = bar(n, dtype) * exact.abs().amax(-1)
    late = {
        name: f"{float(error):.2e} > {float(limit):.2e}"
        for name, error, limit in zip(families, errors, limits, strict=True)
        if not float(error) <= float(limit)
    }
    assert not late


class Solve:
    """Runs a kernel on all families and compares the eigenvalues."""

    def __init__(self, emulated, families: Families) -> None:
        self.emulated = emulated
        self.families = families
        self.words: dict[str, int] = {}

    def __call__(
        self,
        kernel: str,
        n: int,
        dtype: str,
        shared_bytes: int = SHARED["sm_90"],
        multiprocessors: int = 6,
        clusters: int = 0,
    ) -> tuple[Tensor, Tensor]:
        """Matrices, and what the program wrote after the eigenvalues."""
        matrices = matrices_of(self.families, n, dtype)
        count = len(matrices)
        gpu = (shared_bytes, multiprocessors, clusters)
        results, messages = self.emulated(kernel, dtype, n, count, *gpu, matrices=matrices)
        words = messages.split()
        self.words = dict(zip(words[::2], map(int, words[1::2]), strict=True))
        self.values = results[: count * n].reshape(count, n)
        if kernel not in ("counts", "library"):
            check_values(self.families, self.values, matrices)
        return matrices, results[count * n :]


@pytest.fixture
def solve(emulated, families) -> Solve:
    return Solve(emulated, families)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33, 63, 64])
def test_registers(solve: Solve, n: int, dtype: str) -> None:
    solve("registers", n, dtype)


@pytest.mark.parametrize("n", [8, 20, 50])
def test_counts_beside_a_cluster_are_exact(emulated, n: int) -> None:
    # n - 1 eigenvalues a millionth below the threshold 0.5, and one above.
    matrix = cluster(n, 0.5 - 1e-6).float()[None]
    results, _ = emulated("counts", "float64", n, 1, SHARED["sm_90"], 6, 0, matrices=matrix)
    assert results[n:].reshape(3, 2).tolist() == [[n, n], [n, n], [1, 1]]


@pytest.mark.parametrize("n", [65, 100, 127, 128])
def test_registers_of_a_wide_block(solve: Solve, n: int) -> None:
    solve("registers", n, "float32")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "dtype"),
    [(5, "float32"), (5, "float64"), (33, "float32"), (65, "float64"), (130, "float32")],
)
def test_triangle(solve: Solve, n: int, dtype: str) -> None:
    solve("triangle", n, dtype)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("n", "blocks", "clusters", "rows", "dtype"),
    [
        (23, 1, 0, "near", "float32"),
        (40, 1, 0, "far", "float64"),
        (34, 2, 0, "near", "float64"),
        (35, 2, 0, "far", "float32"),
        (33, 2, 1, "near", "float32"),
        (35, 2, 1, "far", "float64"),
    ],
)
def test_members(solve: Solve, n: int, blocks: int, clusters: int, rows: str, dtype: str) -> None:
    size = 4 if dtype == "float32" else 8
    # What the system, vectors and counts take, and room for a third of a member's rows.
    fixed = 2048 + 7 * size * (n + 3) + 4 * 512
    some = fixed + size * n * n // (3 * blocks)
    matrices = len(solve.families) + BROKEN
    shared_bytes = some if rows == "far" else SHARED["sm_90"]
    solve("members", n, dtype, shared_bytes, matrices * blocks, clusters)
    assert solve.words["members"] == blocks
    assert solve.words["cluster"] == clusters
    assert (solve.words["far"] > 0) == (rows == "far")
    assert solve.words["near"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(("gpu", "members"), [("sm_80", 7), ("sm_90", 4)])
def test_many_members(emulated, families, gpu: str, members: int) -> None:
    n = 100
    matrices = families["random"](n)[None].float()
    clusters = int(gpu == "sm_90")
    results, messages = emulated(
        "members", "float32", n, 1, SHARED[gpu], 132, clusters, matrices=matrices
    )
    assert messages.split()[:4] == ["members", str(members), "groups", "1"]
    exact = eigvalsh_reference(matrices)
    assert float((results - exact[0]).abs().max()) <= 2e-6 * float(exact.abs().max())


# Kernel, order, dtype, multiprocessors of a GPU with clusters, expected members, whether they are
# a cluster. Grids of few blocks: each CUDA thread is a fiber here (order 1025 on two: 23 s).
LARGE = [
    ("triangle", 255, "float32", 2, 0, False),
    ("triangle", 256, "float32", 2, 0, False),
    ("triangle", 224, "float64", 2, 0, False),
    ("members", 225, "float64", 2, 2, True),
    ("members", 257, "float32", 5, 4, True),
    ("members", 511, "float32", 2, 2, True),
    ("members", 512, "float32", 2, 2, True),
    ("members", 513, "float32", 2, 2, False),
    ("members", 512, "float64", 2, 2, True),
    ("members", 513, "float64", 2, 2, False),
    ("members", 1025, "float32", 1, 1, False),
]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kernel", "n", "dtype", "multiprocessors", "members", "is_cluster"), LARGE
)
def test_large_classes_at_their_boundaries(
    emulated,
    families: Families,
    kernel: str,
    n: int,
    dtype: str,
    multiprocessors: int,
    members: int,
    is_cluster: bool,
) -> None:
    matrix = families["random"](n)[None].to(getattr(torch, dtype))
    lower = torch.where(torch.ones_like(matrix).tril().bool(), matrix, math.nan)
    gpu = (SHARED["sm_90"], multiprocessors, 1)
    values, messages = emulated(kernel, dtype, n, 1, *gpu, matrices=lower)
    words = messages.split()
    plan = dict(zip(words[::2], map(int, words[1::2]), strict=True))
    assert plan.get("members", 0) == members
    assert bool(plan.get("cluster", 0)) == is_cluster
    exact = eigvalsh_reference(matrix)[0]
    limit = eigenvalue_tolerance(n, matrix.dtype) * float(exact.abs().max())
    assert float((values - exact).abs().max()) <= limit
    assert bool((values.diff() >= 0).all())


def test_the_largest_triangle_is_followed_by_members(emulated) -> None:
    for gpu, dtype, largest in (("sm_90", "float32", 256), ("sm_90", "float64", 224)):
        orders = emulated("plan", dtype, largest, 1, SHARED[gpu], 132, 1)[0]
        assert int(orders[0]) == largest


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("n", "shared_bytes"),
    [(1, 90000), (2, 90000), (17, 90000), (32, 90000), (35, 90000), (40, 9000), (64, 90000)],
)
def test_eigenvectors(solve: Solve, n: int, shared_bytes: int, dtype: str) -> None:
    shared_bytes *= 2 if dtype == "float64" else 1
    matrices, rest = solve("jacobi", n, dtype, shared_bytes)
    assert solve.words == {"near_vectors": n != 40}
    vectors = rest.reshape(matrices.shape)
    assert bool(vectors[-BROKEN:].isnan().all())
    lower = matrices[:-BROKEN].double().tril()
    symmetric = lower + lower.tril(-1).mT
    size = symmetric.abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)
    values, vectors = solve.values[:-BROKEN, None] / size, vectors[:-BROKEN]
    residual = (symmetric / size) @ vectors - vectors * values
    limit = 1e-5 if dtype == "float32" else 1e-13 * n**0.5
    norm = values.abs().amax((-2, -1)).clamp_min(1.0)
    assert float((residual.abs().amax((-2, -1)) / norm).max()) <= limit
    assert float((vectors.mT @ vectors - torch.eye(n)).abs().max()) <= limit


@pytest.mark.parametrize("n", [1, 8, 9, 40, 66])
def test_counts(solve: Solve, n: int) -> None:
    matrices, rest = solve("counts", n, "float64")
    counts = rest.reshape(len(matrices), 3, 2)
    low, high = counts[:-BROKEN].unbind(-1)
    taus = torch.tensor([-0.5, 0.0, 0.5], dtype=torch.float64)
    exact = eigvalsh_reference(matrices[:-BROKEN])
    # The oracle is right within this; rank one has zeros that it rounds.
    doubt = 1e-14 * n**0.5 * exact.abs().amax(-1)
    surely = (exact[:, None] > (taus + doubt[:, None])[..., None]).sum(-1)
    possibly = (exact[:, None] > (taus - doubt[:, None])[..., None]).sum(-1)
    assert bool((low <= possibly).all())
    assert bool((surely <= high).all())
    nearest = (exact[:, None] - taus[:, None]).abs().amin(-1)
    size = exact.abs().amax(-1).clamp_min(1e-300)
    norm = (exact / size[:, None]).square().sum(-1).sqrt() * size
    is_far = nearest > (1.01 * count_tolerance(n) * norm + 2 * doubt)[:, None]
    assert torch.equal(low[is_far], high[is_far])
    assert float(is_far.double().mean()) > 0.5
    assert counts[list(solve.families).index("zero"), 1].tolist() == [0, n]
    assert torch.equal(
        counts[-BROKEN:], torch.tensor([0.0, n], dtype=torch.float64).expand(BROKEN, 3, 2)
    )


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_around_the_library(solve: Solve, dtype: str) -> None:
    n = 70
    matrices, rest = solve("library", n, dtype)
    copies = rest.reshape(matrices.shape)
    # The eigenvalues of the test are the copies' diagonals: scaled and restored, they come back.
    expected = matrices.diagonal(dim1=-2, dim2=-1).double()
    torch.testing.assert_close(solve.values[:-BROKEN], expected[:-BROKEN], rtol=0, atol=0)
    assert bool(solve.values[-BROKEN:].isnan().all())
    assert bool(copies[-BROKEN:].isnan().all())
    assert float(copies[:-BROKEN].abs().max()) <= 1.0
    assert float(copies[:-BROKEN].triu(1).abs().max()) == 0.0


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("gpu", SHARED)
def test_every_order_has_a_plan_that_fits(emulated, gpu: str, dtype: str) -> None:
    has_clusters = int(gpu == "sm_90")
    for n in (65, 128, 129, 256, 257, 512, 513, 1000, 1024, 1025, 2047, 2048):
        for count in (1, 3, 17, 132, 500):
            plan, _ = emulated("plan", dtype, n, count, SHARED[gpu], 132, has_clusters)
            _, members, groups, near, far, shared, cluster, fits, _ = map(int, plan.tolist())
            if members == 0:
                # Seven vectors of 2048 float64 take 114 KB: torch.linalg does those.
                assert n * 7 * (4 if dtype == "float32" else 8) > SHARED[gpu] - 6000
                continue
            assert members * groups <= 132
            assert (near + far) * members >= n
            assert shared <= SHARED[gpu] - 1024
            assert bool(cluster) == (has_clusters and members > 1 and n <= 512)
            assert not cluster or members in (2, 4, 8)
            assert fits == (n <= 128 and (gpu != "sm_75" or dtype == "float32" or n < 126))


def test_targets_of_the_design_fit_an_h100(emulated) -> None:
    def plan(n: int, count: int) -> list[float]:
        return emulated("plan", "float32", n, count, SHARED["sm_90"], 132, 1)[0].tolist()

    largest, *_ = plan(256, 1)
    assert largest == 256
    _, members, groups, _, far, *_ = plan(2048, 1)
    assert (members, groups, far) == (128, 1, 0)
    _, members, groups, *_ = plan(512, 64)
    assert (members, groups) == (2, 64)
