"""The eigenvalue kernels on a GPU: accuracy, same bits, graphs, streams, no synchronisation."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from torch import Tensor

import fastcov
from fastcov.ops import count_above, eigh, eigvalsh
from fastcov.ops.reference import eigenvalue_tolerance, eigvalsh_reference

pytestmark = pytest.mark.gpu

DTYPES = [torch.float32, torch.float64]
# Around every class: parts of a warp, blocks, triangle, several blocks, torch.linalg.
BOUNDARIES = [1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 63, 64, 65, 100, 127, 128, 129, 160, 225, 255, 256]
LARGE = [257, 300, 511, 512, 513, 777, 1024, 2047, 2048, 2049]
EVERY_CLASS = [5, 12, 30, 50, 100, 150, 250, 300, 512, 600]


@pytest.fixture(autouse=True)
def needs_the_library() -> None:
    backend = fastcov.backends()["cuda"]
    assert backend.active, f"the CUDA library is not in use: {backend.reason}"


@pytest.fixture(scope="module")
def families() -> dict[str, Callable[[int], Tensor]]:
    spec = importlib.util.spec_from_file_location(
        "eigen_families", Path(__file__).with_name("test_eigen.py")
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.FAMILIES


def symmetric(*size: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    """Random matrices of eigenvalues of about 1. [*size, size[-1]]"""
    generator = torch.Generator().manual_seed(seed)
    square = torch.randn(*size, size[-1], generator=generator, dtype=torch.float64)
    return ((square + square.mT) / (2 * size[-1]) ** 0.5).to("cuda", dtype)


def bar(n: int, dtype: torch.dtype) -> float:
    """Error of an eigenvalue relative to the largest that section 7 of the design allows."""
    if dtype == torch.float64:
        return 1e-13 * n**0.5
    return 2e-6 if n <= 256 else eigenvalue_tolerance(n, dtype)


def check(values: Tensor, matrices: Tensor) -> None:
    exact = eigvalsh_reference(matrices.cpu())
    error = (values.double().cpu() - exact).abs().amax(-1)
    limit = bar(matrices.shape[-1], matrices.dtype) * exact.abs().amax(-1)
    assert bool((error <= limit).all()), f"{(error / limit).tolist()} of the bar"
    assert bool((values.diff() >= 0).all())


@contextmanager
def no_synchronisation() -> Iterator[None]:
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", BOUNDARIES)
def test_families(families, n: int, dtype: torch.dtype) -> None:
    matrices = torch.stack([make(n) for make in families.values()]).to("cuda", dtype)
    check(eigvalsh(matrices), matrices)
    check(eigvalsh(matrices[0]), matrices[0])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", LARGE)
def test_large_orders(families, n: int, dtype: torch.dtype) -> None:
    some = list(families) if n <= 777 else ["random", "clustered", "graded", "wilkinson"]
    for names in (some, some[:1]):  # several blocks for each of many matrices, and of one
        matrices = torch.stack([families[name](n) for name in names]).to("cuda", dtype)
        check(eigvalsh(matrices), matrices)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_mixed_sizes_in_one_call(dtype: torch.dtype) -> None:
    sizes = [*range(1, 131), *EVERY_CLASS, 2048]
    matrices = [symmetric(n, dtype=dtype, seed=n) for n in sizes]
    matrices.append(symmetric(300, 7, dtype=dtype))
    for values, matrix in zip(eigvalsh(matrices), matrices, strict=True):
        check(values, matrix)


def test_many_and_none() -> None:
    many = symmetric(65536, 4)
    check(eigvalsh(many), many)
    assert eigvalsh(many[:0]).shape == (0, 4)
    assert eigvalsh(many[:6].reshape(2, 3, 4, 4)).shape == (2, 3, 4)


@pytest.mark.parametrize("n", EVERY_CLASS)
def test_only_the_lower_triangle_through_any_strides(n: int) -> None:
    matrix = symmetric(n)
    upper = torch.ones_like(matrix).triu(1).bool()
    expected = eigvalsh(matrix)
    strided = torch.zeros(2 * n, 3 * n, device="cuda")[::2, ::3]
    strided.copy_(matrix)
    strided[upper] = math.nan
    column_major = strided.mT.contiguous().mT
    assert torch.equal(eigvalsh(strided), expected)
    assert torch.equal(eigvalsh(column_major), expected)
    values = eigvalsh(matrix.expand(3, n, n))
    check(values, matrix.expand(3, n, n))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("n", EVERY_CLASS)
def test_non_finite_matrices_stay_alone(n: int, bad: float) -> None:
    batch = symmetric(5, n)
    batch[2, n - 1, 0] = bad
    values = eigvalsh(batch)
    assert bool(values[2].isnan().all())
    check(values[[0, 1, 3, 4]], batch[[0, 1, 3, 4]])
    low, high = count_above(batch, 0.1)
    assert (int(low[2]), int(high[2])) == (0, n)
    if n <= 128:
        vectors = eigh(batch).eigenvectors
        assert bool(vectors[2].isnan().all())
        assert bool(vectors[[0, 1, 3, 4]].isfinite().all())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_same_input_same_bits(dtype: torch.dtype) -> None:
    matrices = [symmetric(3, n, dtype=dtype, seed=n) for n in [*EVERY_CLASS, 1024]]
    small = [matrix for matrix in matrices if matrix.shape[-1] <= 128]
    expected, systems = eigvalsh(matrices), eigh(small)
    for _ in range(10):
        for values, first in zip(eigvalsh(matrices), expected, strict=True):
            assert torch.equal(values, first)
        for system, first in zip(eigh(small), systems, strict=True):
            assert torch.equal(system.eigenvectors, first.eigenvectors)


def calls(matrices: list[Tensor], tau: Tensor) -> list[Tensor]:
    small = [matrix for matrix in matrices if matrix.shape[-1] <= 128]
    results = eigvalsh(matrices)
    results += [tensor for system in eigh(small) for tensor in system]
    # Counts are taken in float64, whose vectors of order 2048 not every GPU has room for.
    counted = [matrix for matrix in matrices if matrix.shape[-1] <= 1024]
    return results + [tensor for counts in count_above(counted, tau) for tensor in counts]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_synchronises_and_the_host_runs_ahead(dtype: torch.dtype) -> None:
    orders = [*EVERY_CLASS, 1024, 2048]
    matrices = [symmetric(2, n, dtype=dtype, seed=n) for n in orders]
    if dtype == torch.float64:
        # Vectors of 2048 float64 do not fit the shared memory of every GPU; torch.linalg waits.
        matrices = matrices[:-1]
    tau = torch.tensor([0.0, 0.3], device="cuda", dtype=dtype)
    expected = calls(matrices, tau)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # a second of a GPU at 2 GHz
    with no_synchronisation():
        results = calls(matrices, tau)
        done = torch.cuda.current_stream().record_event()
    assert not done.query(), "the call has waited for the GPU"
    for result, first in zip(results, expected, strict=True):
        assert torch.equal(result, first)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_graph_capture_and_replay(dtype: torch.dtype) -> None:
    sizes = [*EVERY_CLASS, 1024]
    inputs = [symmetric(2, n, dtype=dtype, seed=n) for n in sizes]
    tau = torch.tensor([0.0, 0.3], device="cuda", dtype=dtype)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        calls(inputs, tau)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = calls(inputs, tau)
    for seed in (1, 2):
        for matrix, n in zip(inputs, sizes, strict=True):
            matrix.copy_(symmetric(2, n, dtype=dtype, seed=1000 * seed + n))
        graph.replay()
        replayed = [result.clone() for result in results]
        for result, eager in zip(replayed, calls(inputs, tau), strict=True):
            assert torch.equal(result, eager)


def test_a_capture_leaves_other_streams_alone() -> None:
    inputs = [symmetric(2, n, seed=n) for n in EVERY_CLASS]
    expected = eigvalsh(inputs)
    torch.cuda.synchronize()
    graph, other = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        captured = eigvalsh(inputs)
        with ThreadPoolExecutor(1) as pool:
            uncaptured = pool.submit(on_stream, other, inputs).result()
    graph.replay()
    torch.cuda.synchronize()
    for results in (captured, uncaptured):
        for values, first in zip(results, expected, strict=True):
            assert torch.equal(values, first)


def on_stream(stream: torch.cuda.Stream, inputs: list[Tensor]) -> list[Tensor]:
    with torch.cuda.stream(stream):
        return eigvalsh(inputs)


def test_results_belong_to_the_current_stream() -> None:
    sizes = [*EVERY_CLASS, 1024]
    sources = [symmetric(2, n, seed=n) for n in sizes]
    expected = eigvalsh(sources)
    stream = torch.cuda.Stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        inputs = [torch.zeros_like(source) for source in sources]
        for _ in range(20):
            for matrix in inputs:
                matrix.zero_()
            torch.cuda._sleep(1_000_000)
            for matrix, source in zip(inputs, sources, strict=True):
                matrix.copy_(source)
            results = eigvalsh(inputs)
            copies = [values.clone() for values in results]
            # Memory of the call's workspaces, and of its inputs, may be anyone's from here on.
            for matrix in inputs:
                matrix.fill_(math.nan)
            junk = [torch.full((1 << k,), math.nan, device="cuda") for k in range(8, 24)]
            for values, first in zip(copies, expected, strict=True):
                assert torch.equal(values, first)
            del junk


def test_threads_at_the_same_time() -> None:
    """Limits of shared memory belong to a kernel: one thread must not take another's away."""
    sizes = [[140, 30, 260], [250, 60, 400], [190, 100, 700], [130, 5, 300]]
    inputs = [[symmetric(4, n, seed=n) for n in some] for some in sizes]
    expected = [eigvalsh(some) for some in inputs]
    streams = [torch.cuda.Stream() for _ in inputs]
    torch.cuda.synchronize()

    def repeat(number: int) -> list[list[Tensor]]:
        return [on_stream(streams[number], inputs[number]) for _ in range(50)]

    with ThreadPoolExecutor(len(inputs)) as pool:
        results = list(pool.map(repeat, range(len(inputs))))
    torch.cuda.synchronize()
    for runs, first in zip(results, expected, strict=True):
        for run in runs:
            assert all(torch.equal(a, b) for a, b in zip(run, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 9, 31, 32, 33, 64, 100, 127, 128, 129, 200])
def test_eigenvectors(families, n: int, dtype: torch.dtype) -> None:
    matrices = torch.stack([make(n) for make in families.values()]).to("cuda", dtype)
    values, vectors = eigh(matrices)
    check(values, matrices)
    size = matrices.double().abs().amax((-2, -1), keepdim=True).clamp_min(1e-300)
    scaled, basis = matrices.double() / size, vectors.double()
    spectrum = values.double()[:, None] / size
    norm = spectrum.abs().amax((-2, -1)).clamp_min(1.0)
    residual = (scaled @ basis - basis * spectrum).abs().amax((-2, -1)) / norm
    limit = 1e-5 if dtype == torch.float32 else 1e-13 * n**0.5
    assert float(residual.max()) <= limit
    identity = torch.eye(n, device="cuda", dtype=torch.float64)
    assert float((basis.mT @ basis - identity).abs().max()) <= limit


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [*EVERY_CLASS, 2100])
def test_counts(n: int, dtype: torch.dtype) -> None:
    matrices = symmetric(2, n, dtype=dtype, seed=n)
    taus = torch.tensor([-9.0, -0.5, 0.0, 0.7, 9.0, math.nan], device="cuda", dtype=dtype)
    low, high = count_above(matrices, taus)
    exact = eigvalsh_reference(matrices.cpu())[:, None]
    numbers = taus[:-1].double().cpu()[:, None]
    truth = (exact > numbers).sum(-1)
    assert bool((low[:, :-1].cpu() <= truth).all())
    assert bool((truth <= high[:, :-1].cpu()).all())
    error = 4 * eigenvalue_tolerance(n, dtype) * exact.abs().amax()
    is_far = (exact - numbers).abs().amin(-1) > error
    assert bool(is_far[:, [0, 4]].all())
    assert torch.equal(low[:, :-1].cpu()[is_far], high[:, :-1].cpu()[is_far])
    assert low[:, -1].tolist() == [0, 0]
    assert high[:, -1].tolist() == [n, n]


def test_memory_that_torch_fills_is_filled_before_it_is_used() -> None:
    matrices = [symmetric(2, n, seed=n) for n in (20, 90, 300, 600)]
    expected = fastcov.ops.eigvalsh(matrices)
    torch.use_deterministic_algorithms(True)  # new memory is filled, in the current stream
    try:
        torch.cuda._sleep(20_000_000)  # what is filled is filled late
        results = fastcov.ops.eigvalsh(matrices)
    finally:
        torch.use_deterministic_algorithms(False)
    for ours, before in zip(results, expected, strict=True):
        assert torch.equal(ours, before)


def test_every_class_once() -> None:
    """Small enough for compute-sanitizer (tools/sanitize_gpu.py), which runs this one."""
    for dtype in DTYPES:
        orders = (3, 13, 20, 50, 90, 140, 270, 300)
        matrices = [symmetric(2, n, dtype=dtype, seed=n) for n in orders]
        # A cooperative grid, and so many matrices that rows of each lie in global memory.
        matrices += [symmetric(2, 520, dtype=dtype), symmetric(70, 270, dtype=dtype)]
        tau = torch.tensor([0.0, 0.3], device="cuda", dtype=dtype)
        results = calls(matrices, tau)
        for values, matrix in zip(results, matrices, strict=False):
            check(values, matrix)
