"""A GPU that is not there: Triton prepares and starts launches as on an H100, and nothing runs.

Everything on the host is Triton's own, the launcher in C included. Left out are compilations and
the calls of the driver, which a library in its place answers at once.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.driver import CudaDriver, CudaLauncher

# Called by the launchers of Triton 3.6 to 3.8 while they start a kernel.
_SOURCE = r"""
int cuCtxGetCurrent(void **context) { *context = (void *)1; return 0; }
int cuCtxGetDevice(int *device) { *device = 0; return 0; }
int cuGetErrorString(int code, const char **text) { (void)code; *text = "stand-in"; return 0; }
int cuPointerGetAttribute(void *found, int attribute, unsigned long long pointer)
{ (void)attribute; *(unsigned long long *)found = pointer; return 0; }
int cuPointerGetAttributes(unsigned n, int *attributes, void **found, unsigned long long pointer)
{ (void)attributes; for (unsigned i = 0; i < n; ++i) *(unsigned long long *)found[i] = pointer;
  return 0; }
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuLaunchKernelEx(void) { return 0; }
int cuTensorMapEncodeTiled(void) { return 0; }
"""
# Symbols that Triton's library needs to load, and that are never called.
_UNCALLED = [
    "cuCtxGetLimit",
    "cuCtxSetCurrent",
    "cuCtxSetLimit",
    "cuDeviceGet",
    "cuDeviceGetAttribute",
    "cuDevicePrimaryCtxRetain",
    "cuFuncGetAttribute",
    "cuFuncSetAttribute",
    "cuFuncSetCacheConfig",
    "cuModuleGetFunction",
    "cuModuleLoadData",
    "cuModuleUnload",
    "cuOccupancyMaxActiveClusters",
    "cuTensorMapEncodeIm2col",
]


class _Compiled:
    """Kernel that Triton takes for a compiled one: its launcher is real, its code is not."""

    def __init__(self, source: Any, options: Mapping[str, Any]) -> None:
        metadata = SimpleNamespace(
            num_ctas=1,
            global_scratch_size=0,
            global_scratch_align=1,
            profile_scratch_size=0,
            profile_scratch_align=1,
            launch_cooperative_grid=False,
            launch_pdl=options["launch_pdl"],
            tensordesc_meta=[
                _descriptor_metadata(kind)
                for kind in source.signature.values()
                if isinstance(kind, str) and kind.startswith("tensordesc")
            ],
        )
        self.run = CudaLauncher(source, metadata)
        self.name = source.fn.__name__
        self.function = 1
        self.packed_metadata = (options["num_warps"], 1, 0)

    def launch_metadata(self, *_: Any) -> SimpleNamespace:
        """Name of the kernel, as hooks of launches are given it."""
        return SimpleNamespace(get=lambda: {"name": self.name})


def _descriptor_metadata(kind: str) -> dict[str, Any]:
    """Descriptor of bfloat16 in 128-byte rows of shared memory, for sm_90's matrix instructions."""
    found = re.search(r"\[([\d, ]+)\]", kind)
    assert found is not None
    rows, _columns = map(int, found[1].split(","))
    return {
        "swizzle": 3,
        "elem_size": 2,
        "elem_type": 10,
        "block_size": [rows, 64],
        "fp4_padded": False,
    }


@cache
def _driver_folder() -> str:
    compiler = os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        raise RuntimeError("needs a C compiler, as Triton does: put gcc or clang on PATH")
    folder = tempfile.mkdtemp(prefix="fastcov-stand-in-")
    source = Path(folder, "driver.c")
    uncalled = "".join(f"int {name}(void) {{ return 999; }}\n" for name in _UNCALLED)
    source.write_text(_SOURCE + uncalled)
    library = Path(folder, "libcuda.so.1")
    options = ["-shared", "-fPIC", "-O2", "-Wl,-soname,libcuda.so.1"]
    subprocess.run([compiler, *options, str(source), "-o", str(library)], check=True)
    # Later requests for a library of this name get the one that is opened here.
    ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    return folder


@cache
def _driver() -> Any:
    """Properties of one H100, whose number is that of a CPU's tensors."""
    with mock.patch.object(knobs.nvidia, "libcuda_path", _driver_folder()):
        driver = CudaDriver()
    driver.get_current_device = lambda: -1
    driver.get_current_stream = lambda _device: 0
    driver.get_current_target = lambda: GPUTarget("cuda", 90, 32)
    return driver


def stand_in_gpu() -> list[tuple[Any, str, Any]]:
    """Attributes, by owner and name, with which Triton takes tensors of a CPU for an H100's.

    For a process that finds no GPU, and looks for none afterwards.

    Raises:
        RuntimeError: If there is a GPU, whose driver would be called, or no C compiler.
    """
    if torch.cuda.is_available():
        raise RuntimeError("stands for a GPU where there is none: here, take --gpu")

    def compiled(source: Any, options: Mapping[str, Any], **_: Any) -> _Compiled:
        return _Compiled(source, options)

    return [
        (triton.compiler, "compile", compiled),
        (triton.runtime.driver, "_active", _driver()),
    ]
