"""Every CUDA kernel compiles without a GPU, within its registers and shared memory, unspilled."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

CSRC = Path(__file__).resolve().parents[2] / "csrc"
NVCC = shutil.which("nvcc")
# The oldest and the newest that wheels hold, and the one that is tuned for; the others lie between.
ARCHS = (75, 90, 120)

# Most registers a thread and bytes of static shared memory a block, on any of these.
LIMITS = {
    "gather_contiguous_kernel": (40, 0),
    "gather_strided_kernel": (40, 8704),
}


def compile_report(source: Path, folder: Path) -> str:
    """What ptxas says of every kernel of one source, for all architectures."""
    torch_headers = Path(torch.__file__).parent / "include"
    command = [NVCC or "nvcc", "-c", source, "-o", folder / "kernels.o", "-std=c++20", "-O3"]
    command += [f"-gencode=arch=compute_{arch},code=sm_{arch}" for arch in ARCHS]
    command += ["-DUSE_CUDA", "-DTORCH_TARGET_VERSION=0x020a000000000000", "-isystem"]
    command += [torch_headers, "-Xcompiler", "-fPIC", "-Xptxas", "-v", "--threads", "2"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-4000:]
    return result.stdout + result.stderr


@pytest.mark.slow
@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine: the wheel has no CUDA library")
@pytest.mark.parametrize("source", [CSRC / "gather.cu"], ids=lambda path: path.name)
def test_registers_shared_memory_and_spills(source: Path, tmp_path: Path) -> None:
    report = compile_report(source, tmp_path)
    kernels = re.split(r"Compiling entry function '", report)[1:]
    assert len(kernels) >= len(ARCHS)
    for kernel in kernels:
        mangled, arch = re.match(r"(\w+)' for '(sm_\w+)'", kernel).groups()
        name = next((n for n in LIMITS if n in mangled), None)
        assert name, f"{mangled} ({source.name}) has no line in LIMITS: measure it and add one"
        most_registers, most_shared = LIMITS[name]
        spills = re.search(
            r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill", kernel
        )
        assert spills.groups() == ("0", "0", "0"), f"{mangled} {arch}: {spills.group(0)}"
        assert int(re.search(r"Used (\d+) registers", kernel).group(1)) <= most_registers
        shared = re.search(r"(\d+) bytes smem", kernel)
        assert int(shared.group(1) if shared else 0) <= most_shared
