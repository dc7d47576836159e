"""Loader of the compiled libraries: opens those that fit the machine, and keeps the reasons.

The libraries use the LibTorch Stable ABI and hold no Python module: opening one registers its
operators. The schemas must be defined before (ops/library.py).
"""

from __future__ import annotations

import ctypes
import json
import os
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch

LIBRARY_FOLDER = Path(__file__).resolve().parent.parent / "lib"
# Name of the folder in reasons, which are published with results: no path of the machine.
_SHORT_FOLDER = "fastcov/lib"
BACKENDS = ("native", "triton", "torch")
BACKEND_SWITCH = "FASTCOV_BACKEND"
INTERFACE = 4
"""Version of the schemas and of stats/cursor.py, increased with each change. A library compiled for
another version is not opened."""


class Backend(NamedTuple):
    """State of a backend.

    Attributes:
        active: True if the backend is in use.
        reason: Reason why it is or is not.
    """

    active: bool
    reason: str


class UnavailableError(Exception):
    """Error that a compiled library cannot be used; its message is the reason."""


def allowed_backends() -> frozenset[str]:
    """Backends that ``FASTCOV_BACKEND`` allows: all of them unless it is set.

    Raises:
        ValueError: If the variable names a backend that does not exist.
    """
    value = os.environ.get(BACKEND_SWITCH, "").strip()
    if not value:
        return frozenset(BACKENDS)
    names = [name.strip() for name in value.split(",")]
    for name in names:
        if name not in BACKENDS:
            raise ValueError(
                f"{BACKEND_SWITCH}={value!r} names an unknown backend {name!r}; "
                f"use a comma-separated list of {', '.join(BACKENDS)}, or unset it for all"
            )
    return frozenset(names) | {"torch"}


def _driver_cuda_version() -> int:
    """Newest CUDA that the driver runs, such as 13000; 0 without a driver. Starts no context."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return 0
    version = ctypes.c_int(0)
    # Documented to work before cuInit: it neither initialises the driver nor harms a later fork.
    return version.value if driver.cuDriverGetVersion(ctypes.byref(version)) == 0 else 0


def _compute_capabilities() -> list[int]:
    # Capabilities of the machine's GPUs, 90 for sm_90, from NVML, which starts no CUDA context.
    # Empty where NVML is missing.
    try:
        nvml = ctypes.CDLL("libnvidia-ml.so.1")
    except OSError:
        return []
    if nvml.nvmlInit_v2() != 0:
        return []
    count, found = ctypes.c_uint(0), []
    nvml.nvmlDeviceGetCount_v2(ctypes.byref(count))
    for index in range(count.value):
        device, major, minor = ctypes.c_void_p(), ctypes.c_int(0), ctypes.c_int(0)
        if nvml.nvmlDeviceGetHandleByIndex_v2(index, ctypes.byref(device)) == 0:
            nvml.nvmlDeviceGetCudaComputeCapability(
                device, ctypes.byref(major), ctypes.byref(minor)
            )
            found.append(10 * major.value + minor.value)
    nvml.nvmlShutdown()
    return found


def _has_code(archs: str, capability: int) -> bool:
    """True if code for some architectures, with PTX of the newest, runs on a GPU.

    Args:
        archs: Architectures of the code, as CMake lists them.
        capability: Compute capability of the GPU, 90 for sm_90.

    Example:
        >>> [_has_code("80;90", capability) for capability in (75, 80, 86, 90, 120)]
        [False, True, True, True, True]
    """
    compiled = [int(arch) for arch in archs.split(";")]
    same_major = any(a // 10 == capability // 10 and a <= capability for a in compiled)
    return same_major or max(compiled) <= capability


def _library_path(name: str) -> Path:
    if "native" not in allowed_backends():
        raise UnavailableError(f"excluded by {BACKEND_SWITCH}={os.environ[BACKEND_SWITCH]}")
    path = LIBRARY_FOLDER / f"libfastcov_{name}.so"
    if not path.is_file():
        built = "this build has no" if LIBRARY_FOLDER.is_dir() else "nothing is compiled, so no"
        record = LIBRARY_FOLDER / "build.json"
        if record.is_file() and _build_record().get("compiler") == "none":
            built = "no C++ compiler was found when fastcov was installed, so no"
        raise UnavailableError(f"{built} {path.name} in {_SHORT_FOLDER}")
    return path


def _build_record() -> dict[str, str]:
    path = LIBRARY_FOLDER / "build.json"
    if not path.is_file():
        raise UnavailableError(f"{path} is missing, so it is unknown what the libraries are for")
    record = json.loads(path.read_text(encoding="utf-8"))
    return {str(key): str(value) for key, value in record.items()}


def _open(path: Path) -> ctypes.CDLL:
    reason = ""
    # Checked before anything is registered: torch would notice another number of arguments, but not
    # another order.
    if (interface := _build_record().get("interface", "1")) != str(INTERFACE):
        reason = (
            f"{path.name} was compiled for other sources (interface {interface}, not {INTERFACE}): "
            "install fastcov again, or in a checkout run `make dev`"
        )
    else:
        try:
            torch.ops.load_library(str(path))
            return ctypes.CDLL(str(path))
        except OSError as error:
            reason = f"{path.name} does not load with torch {torch.__version__}: {error}"
    # A library that is there but does not open is a broken installation, not a choice: users must
    # know.
    warnings.warn(f"fastcov runs without its compiled code: {reason}", RuntimeWarning, stacklevel=2)
    raise UnavailableError(reason)


def load_cpu() -> str:
    """Name and instruction set of libfastcov_cpu.so, opened here.

    Raises:
        UnavailableError: If the library is missing, excluded, or does not load.
    """
    path = _library_path("cpu")
    instruction_set = _open(path).fastcov_cpu_instruction_set
    instruction_set.restype = ctypes.c_char_p
    return f"{path.name} with {instruction_set().decode()} kernels"


def load_cuda() -> str:
    """Name and CUDA version of libfastcov_cuda.so, opened here.

    Raises:
        UnavailableError: If the library is missing, excluded, does not load, or does not fit torch,
            the driver or the GPU.
    """
    path = _library_path("cuda")
    if torch.version.cuda is None:
        raise UnavailableError(f"torch {torch.__version__} is not a CUDA build")
    if sys.platform != "linux":
        raise UnavailableError(f"no CUDA library for {sys.platform}")
    driver = _driver_cuda_version()
    if driver == 0:
        raise UnavailableError("no GPU: no NVIDIA driver (libcuda.so.1) on this machine")
    record = _build_record()
    toolkit = record["cuda"]
    if driver // 1000 < int(toolkit.split(".")[0]):
        raise UnavailableError(
            f"{path.name} is built with CUDA {toolkit}, but the driver supports only "
            f"CUDA {driver // 1000}.{driver % 1000 // 10}; update the driver"
        )
    if torch.cuda.device_count() == 0:
        raise UnavailableError("no GPU: torch.cuda.device_count() is 0")
    found = _compute_capabilities()
    if found and not any(_has_code(record["cuda_archs"], capability) for capability in found):
        raise UnavailableError(
            f"{path.name} has code for sm_{record['cuda_archs'].replace(';', ', sm_')}, the GPU is "
            f"sm_{max(found)}: install a release wheel, or in a checkout run `make setup` here"
        )
    _open(path)
    return f"{path.name} built with CUDA {toolkit}"


@cache
def load() -> None:
    """Opening of all libraries that can be opened, once. Failures are left to :func:`status`."""
    for name, open_library in (("cpu", load_cpu), ("cuda", load_cuda)):
        try:
            _status[name] = Backend(True, open_library())
        except UnavailableError as closed:
            _status[name] = Backend(False, str(closed))


_status: dict[str, Backend] = {}


def status() -> dict[str, Backend]:
    """States of the compiled libraries, by name: ``cpu`` and ``cuda``."""
    load()
    return dict(_status)
