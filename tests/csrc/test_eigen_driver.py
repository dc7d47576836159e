"""The GPU's driver of eigenvalues, run on the host: torch.linalg for large orders, and streams."""

from __future__ import annotations

import ctypes
import subprocess
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"
CURRENT = 1  # the caller's stream
WORK, RECORD, WAIT = range(3)
MOST_BRANCHES = 4

Notes = list[tuple[int, int, int]]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    library = tmp_path_factory.mktemp("driver") / "driver.so"
    torch_folder = Path(torch.__file__).parent
    common = [
        "g++",
        "-std=c++20",
        "-O1",
        "-fPIC",
        "-pthread",
        "-fno-extern-tls-init",
        "-fopenmp-simd",
    ]
    common += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi", "-Wno-attributes"]
    common += [
        "-DTORCH_TARGET_VERSION=0x020a000000000000",
        "-isystem",
        str(torch_folder / "include"),
    ]
    common += [f"-I{HERE / 'emulated'}", f"-I{HERE}", f"-I{CSRC}"]
    common += [f'-DFASTCOV_KERNEL_FILE="{CSRC / "eigen_library.cu"}"']
    sources = [str(HERE / "emulated" / "runtime.cpp")]
    sources += [str(HERE / f"emulated_{name}.cpp") for name in ("kernels", "driver")]
    command = [*common, "-shared", *sources, "-o", str(library)]
    command += [f"-L{torch_folder / 'lib'}", "-ltorch", "-ltorch_cpu", "-lc10"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "warning:" not in run.stderr, run.stderr[-4000:]
    torch.ops.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.take_notes.restype = ctypes.c_int64
    return loaded


@pytest.fixture
def notes(driver: ctypes.CDLL) -> Callable[[], Notes]:
    """Work, records and waits since the last call: what, stream, event."""

    def take() -> Notes:
        memory = (ctypes.c_int64 * 3000)()
        count = driver.take_notes(memory, ctypes.c_int64(len(memory)))
        assert count >= 0
        return list(zip(memory[0:count:3], memory[1:count:3], memory[2:count:3], strict=True))

    take()
    return take


def symmetric(n: int, dtype: torch.dtype, count: int = 1, scale: float = 1.0) -> Tensor:
    x = torch.randn(count, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return ((x + x.mT) * scale).to(dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_orders_that_no_kernel_takes_go_through_torch(
    driver: ctypes.CDLL, notes: Callable[[], Notes], dtype: torch.dtype
) -> None:
    """Scaled, so that products neither overflow nor vanish; what is not finite stays alone."""
    driver.set_largest_members(300)
    large = symmetric(301, dtype, 3)
    large[1, 200, 100] = float("nan")
    huge = symmetric(310, dtype, 1, 1e30 if dtype == torch.float32 else 1e300)[0]
    small = symmetric(20, dtype)
    upper = torch.full_like(large, 7.0).triu(1)
    values = torch.ops.fastcov_emulated.eigvalsh([large.tril() + upper, small, huge])
    assert [tuple(each.shape) for each in values] == [(3, 301), (1, 20), (310,)]
    assert bool(values[0][1].isnan().all())
    for found, matrix in ((values[0][0], large[0]), (values[0][2], large[2]), (values[2], huge)):
        exact = torch.linalg.eigvalsh(matrix.double() / matrix.double().abs().max())
        found = found.double() / matrix.double().abs().max()
        bound = 1e-5 if dtype == torch.float32 else 1e-12
        torch.testing.assert_close(found, exact, rtol=0, atol=bound * float(exact.abs().max()))
    # One launch of a kernel, for the small matrix; the kernels around torch.linalg make no notes.
    assert [note for note in notes() if note[0] == WORK] == [(WORK, CURRENT, 0)]
    driver.set_largest_members(2048)


def test_the_first_order_above_the_kernels(driver: ctypes.CDLL) -> None:
    driver.set_largest_members(2048)
    matrix = symmetric(2049, torch.float32)[0]
    (values,) = torch.ops.fastcov_emulated.eigvalsh([matrix])
    exact = torch.linalg.eigvalsh(matrix.double())
    assert float((values - exact).abs().max()) <= 1e-5 * float(exact.abs().max())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_eigenvectors_that_no_kernel_takes_go_through_torch(
    driver: ctypes.CDLL, dtype: torch.dtype
) -> None:
    matrices = symmetric(129, dtype, 2, 1e-30)
    matrices[1, 5, 5] = float("inf")
    ((values,), (vectors,)) = torch.ops.fastcov_emulated.eigh([matrices])
    assert bool(values[1].isnan().all())
    assert bool(vectors[1].isnan().all())
    assert bool(vectors[0].isfinite().all())
    matrix, found = matrices[0].double() * 1e30, values[0].double() * 1e30
    vectors = vectors[0].double()
    bound = (1e-5 if dtype == torch.float32 else 1e-12) * float(found.abs().max())
    assert float((matrix @ vectors - vectors * found).abs().max()) <= bound
    assert float((vectors.mT @ vectors - torch.eye(129)).abs().max()) <= 1e-5


def test_counts_that_no_kernel_takes_come_from_eigenvalues(driver: ctypes.CDLL) -> None:
    driver.set_largest_members(300)
    matrices = symmetric(301, torch.float64, 2)
    matrices[1, 3, 2] = float("nan")
    taus = torch.tensor([-3.0, 0.0, 1.0, 1e9], dtype=torch.float64)
    (counts,) = torch.ops.fastcov_emulated.count_above([matrices], [taus.expand(2, 4)])
    exact = torch.linalg.eigvalsh(matrices[0])
    expected = [int((exact > tau).sum()) for tau in taus]
    assert counts[0].tolist() == [[number, number] for number in expected]
    assert counts[1].tolist() == [[0, 301]] * 4
    driver.set_largest_members(2048)


def run_in_order(notes: Notes) -> dict[int, set[int]]:
    """Numbers of the work that each stream has done or waited for when its last note is done."""
    known: dict[int, set[int]] = defaultdict(set)
    recorded: dict[int, set[int]] = {}
    for number, (what, stream, event) in enumerate(notes):
        if what == WORK:
            known[stream].add(number)
        elif what == RECORD:
            recorded[event] = set(known[stream])
        else:
            known[stream] |= recorded[event]
    return known


@pytest.mark.parametrize(
    "orders",
    [
        (8, 16, 32, 64, 128, 150, 180, 224, 256, 300, 512, 1024, 2048),
        (8, 16, 32, 64, 128, 150, 180, 256),
        (64, 128, 256, 2048),
        (2048, 1024),
        (64,),
    ],
)
def test_at_most_four_branches_and_all_are_waited_for(
    driver: ctypes.CDLL, notes: Callable[[], Notes], orders: tuple[int, ...]
) -> None:
    matrices = [torch.eye(order) for order in orders]
    for _ in range(3):
        torch.ops.fastcov_emulated.eigvalsh(matrices)
        made = notes()
        work = {number for number, (what, _, _) in enumerate(made) if what == WORK}
        assert len(work) == len(orders)
        assert run_in_order(made)[CURRENT] == work
        streams = [stream for what, stream, _ in made if what == WORK]
        classes = len(orders) - max(0, sum(order > 256 for order in orders) - 1)
        assert len({*streams}) == min(classes, MOST_BRANCHES)
        # A branch waits for the current stream before it begins.
        for branch in {*streams} - {CURRENT}:
            mine = [what for what, stream, _ in made if stream == branch]
            assert mine[0] == WAIT
        # Cooperative grids follow one another, and nothing shares their stream.
        if sum(order > 256 for order in orders) and len({*streams}) > 1:
            large = sum(order > 256 for order in orders)
            assert len({*streams[:large]}) == 1
            assert streams[0] not in streams[large:]
    # The same few streams serve every call of a process.
    assert max(streams) <= 1 + MOST_BRANCHES
