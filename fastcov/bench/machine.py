"""Description and measured rates of a machine, recorded beside every result."""

from __future__ import annotations

import os
import platform
import re
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

import fastcov
from fastcov.bench.timing import interleave

_PACKAGES = (
    "torch",
    "numpy",
    "triton",
    "torchvision",
    "delve",
    "torchmetrics",
    "jax",
    "cupy-cuda13x",
    "cupy-cuda12x",
)
_COPY_BYTES = 1 << 28  # beyond any last-level cache
_QUICK_COPY_BYTES = 1 << 22


@dataclass(frozen=True)
class Rates:
    """Measured rates of one device.

    Attributes:
        device: Device that was measured.
        copy_bytes_s: Bytes a second of a large copy, reads and writes counted.
        matmul: Flops a second of a large square torch.mm, by name of the dtype.
        clock_hz: Highest clock of a GPU's multiprocessors; None on a CPU.
        cache_bytes: Size of the last-level cache; inputs that rotate are larger together.
        multiprocessors: Number of a GPU's multiprocessors; 0 on a CPU.
    """

    device: torch.device
    copy_bytes_s: float
    matmul: dict[str, float] = field(default_factory=dict)
    clock_hz: float | None = None
    cache_bytes: int = 0
    multiprocessors: int = 0

    def matmul_flop_s(self, dtype: torch.dtype) -> float:
        """Flops a second in a dtype; those of float32 on a CPU that casts half precision to it."""
        rate = self.matmul.get(_short(dtype), 0.0)
        return max(rate, self.matmul["float32"]) if dtype.itemsize == 2 else rate

    def as_dict(self) -> dict[str, Any]:
        """Rates in the usual units (GB/s, TFLOP/s, GHz, MiB), for a JSON file."""
        return {
            "copy_gb_s": self.copy_bytes_s / 1e9,
            "matmul_tflop_s": {name: rate / 1e12 for name, rate in self.matmul.items()},
            "clock_ghz": None if self.clock_hz is None else self.clock_hz / 1e9,
            "cache_mib": self.cache_bytes / 2**20,
        }


def read_rates(device: torch.device, *, is_quick: bool = False) -> Rates:
    """Measured copy bandwidth and matmul rates.

    Args:
        device: Device to measure.
        is_quick: Use small sizes, whose rates say little: for a run that only shows that all works.

    Returns:
        Medians of interleaved calls.
    """
    is_cuda = device.type == "cuda"
    size = (_QUICK_COPY_BYTES if is_quick else _COPY_BYTES * (4 if is_cuda else 1)) // 4
    source = torch.rand(size, device=device)
    target = torch.rand(size, device=device)
    order = 128 if is_quick else (8192 if is_cuda else 1536)
    dtypes = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    contenders: dict[str, Callable[[int], object]] = {"copy": lambda _: target.copy_(source)}
    for dtype in dtypes:
        contenders[_short(dtype)] = _matmul(order, dtype, device)
    for call in contenders.values():
        call(0)
    samples = interleave(contenders, device, rounds=2 if is_quick else 9, clock="device")
    seconds = {name: float(np.median(times)) for name, times in samples.items()}
    return Rates(
        device=device,
        copy_bytes_s=2 * 4 * size / seconds.pop("copy"),
        matmul={name: 2 * order**3 / time for name, time in seconds.items()},
        clock_hz=_gpu_clock_hz(device) if is_cuda else None,
        cache_bytes=cache_bytes(device),
        multiprocessors=(
            torch.cuda.get_device_properties(device).multi_processor_count if is_cuda else 0
        ),
    )


def _matmul(order: int, dtype: torch.dtype, device: torch.device) -> Callable[[int], object]:
    left, right, product = (torch.rand(order, order, device=device).to(dtype) for _ in range(3))
    return lambda _: torch.mm(left, right, out=product)


def cache_bytes(device: torch.device) -> int:
    """Size of the last-level cache; 32 MiB if a CPU does not report it."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).L2_cache_size)
    sizes = [0]
    for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        found = re.fullmatch(r"(\d+)([KM])", path.read_text().strip())
        if found:
            sizes.append(int(found[1]) << {"K": 10, "M": 20}[found[2]])
    return max(sizes) or 32 << 20


def slots(byte_count: float, cache: int, *, most: int = 64) -> int:
    """Number of copies of an input to rotate through, so that none is in cache at its next turn.

    Example:
        >>> slots(10e6, 32_000_000), slots(500e6, 32_000_000)
        (8, 2)
    """
    return max(2, min(most, round(2.5 * cache / max(byte_count, 1.0))))


def device_name(device: torch.device) -> str:
    """Name of the device as its maker gives it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    path = Path("/proc/cpuinfo")
    if path.is_file():
        found = re.search(r"^model name\s*:\s*(.+)$", path.read_text(), re.MULTILINE)
        if found:
            return found[1].strip()
    return platform.processor() or platform.machine()


def _capability() -> str:
    return torch.backends.cpu.get_cpu_capability()


def device_slug(device: torch.device) -> str:
    """Folder name of a device's results.

    Example:
        >>> device_slug(torch.device("cpu")).startswith("cpu-")
        True
    """
    name = device_name(device)
    if device.type == "cpu":
        # Hypervisors call different processors by one name.
        name = f"cpu {name} {_capability()} {torch.get_num_threads()} threads"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver, versions and commit."""
    versions = {"python": platform.python_version(), "fastcov": fastcov.__version__}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    versions["torch"] = torch.__version__
    versions["cuda"] = torch.version.cuda or "none"
    commit, is_dirty = _commit()
    return {
        "device": device_name(device),
        "kind": device.type,
        "system": f"{platform.system()} {platform.machine()}",
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": _capability(),
        "driver": _nvidia_smi("driver_version") if device.type == "cuda" else None,
        "versions": versions,
        "commit": commit,
        "has_uncommitted_changes": is_dirty,
        "backends": {
            name: f"{'active' if backend.active else 'off'}: {backend.reason}"
            for name, backend in fastcov.backends().items()
        },
    }


def clocks(device: torch.device) -> dict[str, Any]:
    """Clocks at this moment: MHz of a CPU's cores; clocks, power and temperature of a GPU."""
    if device.type == "cuda":
        fields = "clocks.sm,clocks.mem,clocks.max.sm,power.draw,temperature.gpu"
        values = (_nvidia_smi(fields) or "").split(",")
        return {name: value.strip() for name, value in zip(fields.split(","), values, strict=False)}
    path = Path("/proc/cpuinfo")
    text = path.read_text() if path.is_file() else ""
    cores = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*:\s*([\d.]+)$", text, re.MULTILINE)]
    return {"cpu_mhz": cores, "load_1_min": os.getloadavg()[0]}


def _gpu_clock_hz(device: torch.device) -> float | None:
    # torch before 2.11 has no clock_rate.
    told_khz = getattr(torch.cuda.get_device_properties(device), "clock_rate", 0)
    found = re.match(r"(\d+)", _nvidia_smi("clocks.max.sm") or "")
    if told_khz or found is None:
        return told_khz * 1e3 or None
    return float(found[1]) * 1e6


def _nvidia_smi(fields: str) -> str | None:
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    lines = answer.stdout.strip().splitlines()
    return lines[torch.cuda.current_device()] if lines else None


def checkout() -> Path | None:
    """Root of the source tree that is the working directory; None outside one."""
    here = Path.cwd()
    is_ours = (here / "benchmarks").is_dir() and (here / "fastcov" / "bench").is_dir()
    return here if is_ours else None


def _commit() -> tuple[str | None, bool | None]:
    folder = checkout()
    if folder is None:
        return None, None
    answers = []
    for command in (("rev-parse", "HEAD"), ("status", "--porcelain", "--untracked-files=no")):
        try:
            answer = subprocess.run(
                ["git", "-C", str(folder), *command],
                capture_output=True,
                text=True,
                timeout=20,
                check=True,
            )
        except (OSError, subprocess.SubprocessError):
            return None, None
        answers.append(answer.stdout.strip())
    return answers[0], bool(answers[1])


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
