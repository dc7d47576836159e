"""The GPU's counted gather, run on the host, against the same on a CPU."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastcov.ops import library
from fastcov.ops.counted import CountedGather

HERE = Path(__file__).resolve().parent
CSRC = HERE.parents[1] / "csrc"

pytestmark = pytest.mark.skipif(
    not library.has_kernel("gather_counted_", "CPU"), reason="needs the compiled CPU library"
)


@pytest.fixture(scope="module")
def emulated(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    folder = tmp_path_factory.mktemp("gather")
    sources = ("emulated/runtime.cpp", "emulated_kernels.cpp", "emulated_gather.cpp")
    command = ["g++", "-std=c++20", "-O1", "-shared", "-fPIC", "-pthread", "-fno-extern-tls-init"]
    command += ["-Wall", "-Wextra", "-Wno-unknown-pragmas", "-Wno-psabi"]
    command += [f"-I{HERE / 'emulated'}", f"-I{CSRC}"]
    command += [f'-DFASTCOV_KERNEL_FILE="{CSRC / "gather_counted.cu"}"']
    library_path = folder / "gather.so"
    command += [*(str(HERE / source) for source in sources), "-o", str(library_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr[-4000:]
    assert "warning:" not in run.stderr, run.stderr[-4000:]
    return ctypes.CDLL(str(library_path))


def rows_of(layout: str, channels: int, dtype: torch.dtype) -> Tensor:
    generator = torch.Generator().manual_seed(channels)
    x = torch.randn(3, channels + 1, 6, 7, generator=generator).to(dtype)[:, :channels]
    x[:, -1, 2] = float("inf")
    x[1, 0, 4, 4] = float("nan")
    if layout == "planes":
        return x.contiguous().permute(0, 2, 3, 1)
    if layout == "part of a row":
        return x.permute(0, 2, 3, 1).contiguous().flatten(1, 2)[..., 1:]
    if layout == "deep":
        return x.permute(0, 2, 3, 1).contiguous()[:, ::2, ::2]
    assert layout == "rows"
    return x.permute(0, 2, 3, 1).contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [2, 12, 33, 64])
@pytest.mark.parametrize("layout", ["rows", "planes", "part of a row", "deep"])
@pytest.mark.parametrize("fraction", [0.4, 1.0])
def test_a_gpu_copies_and_counts_as_a_cpu(
    emulated: ctypes.CDLL, layout: str, channels: int, dtype: torch.dtype, fraction: float
) -> None:
    rows = rows_of(layout, channels, dtype)
    results = []
    for is_emulated in (False, True):
        buffer = torch.full((150, rows.shape[-1]), 7.0, dtype=dtype)
        marks = torch.full((150,), -9, dtype=torch.int32)
        cursor = torch.zeros(8, dtype=torch.int64)
        step = torch.full((), 5, dtype=torch.int64)
        gather = CountedGather(
            buffer, marks, cursor, step, rows, int(fraction * 2**32), run_length=4, phase=99
        )
        for _ in range(3):
            if is_emulated:
                prepared = ctypes.c_void_p(gather.prepared.data_ptr())
                assert emulated.gather_counted(prepared, ctypes.c_void_p(rows.data_ptr())) == 0
            else:
                gather.launch_(rows)
            step += 1
        results.append((buffer.view(torch.uint8), marks, cursor))
    for one, other in zip(*results, strict=True):
        assert torch.equal(one, other)
    assert results[1][2][0] == min(150, int(3 * fraction * rows.shape[:-1].numel()))
    assert (results[1][1] == -1).any()


def test_no_block_is_no_launch(emulated: ctypes.CDLL) -> None:
    rows, buffer = torch.ones(40, 8), torch.zeros(40, 8)
    cursor, step = torch.zeros(8, dtype=torch.int64), torch.zeros((), dtype=torch.int64)
    marks = torch.zeros(40, dtype=torch.int32)
    gather = CountedGather(buffer, marks, cursor, step, rows, 0)
    prepared = ctypes.c_void_p(gather.prepared.data_ptr())
    assert emulated.gather_counted(prepared, ctypes.c_void_p(rows.data_ptr())) == 0
    assert not buffer.any()
    assert not cursor.any()
    assert sys.byteorder == "little"  # bits of a value are read as they lie
