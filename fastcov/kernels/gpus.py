"""Rates of GPUs, by device name and as their driver tells.

A plan (plan.py) needs their ratios alone, on a multiprocessor and a clock; a floor
(benchmarks/roofline.py, fastcov bench) the rates that a copy and a large product reach.
"""

from __future__ import annotations

from typing import Any, NamedTuple

# Shares of the data sheet that a large copy and a large product reach, on an H100 and an H200.
_COPY_SHARE, _MATMUL_SHARE = 0.9, 0.8
# Share of the last-level cache that rows which pass through leave to partial results.
_CACHE_SHARE = 0.64


class Pace(NamedTuple):
    """Rates of one multiprocessor in a clock.

    Attributes:
        macs: Products of bfloat16 with float32 sums.
        load_bytes: Share of one multiprocessor of what memory delivers.
        cached_load_bytes: Share of one multiprocessor of what the last-level cache delivers.
        cache_bytes: Part of the whole cache that partial results may take.
    """

    macs: int
    load_bytes: float
    cached_load_bytes: float
    cache_bytes: int


class Gpu(NamedTuple):
    """One kind of GPU, from its data sheet.

    Attributes:
        multiprocessors: Number of them.
        clock_hz: At which the data sheet counts its products.
        bandwidth: Bytes that memory delivers in a second.
        cache_bytes: Last-level cache.
        macs: Products of bfloat16 with float32 sums, of one multiprocessor in a clock.
    """

    multiprocessors: int
    clock_hz: float
    bandwidth: float
    cache_bytes: int
    macs: int

    @property
    def copy_bytes_s(self) -> float:
        """Bytes a second of a large copy, reads and writes counted."""
        return _COPY_SHARE * self.bandwidth

    @property
    def matmul_flop_s(self) -> float:
        """Flops a second of a large bfloat16 product."""
        return _MATMUL_SHARE * 2 * self.macs * self.multiprocessors * self.clock_hz

    @property
    def pace(self) -> Pace:
        """Rates of one multiprocessor in a clock."""
        clocks = self.multiprocessors * self.clock_hz
        # Measured on an H100; the others' caches are about as much faster than their memory.
        cached = max(24.0, 1.2 * self.bandwidth / clocks)
        return Pace(
            self.macs, self.bandwidth / clocks, cached, int(_CACHE_SHARE * self.cache_bytes)
        )


_MIB = 1 << 20
GPUS: dict[str, Gpu] = {
    "H100": Gpu(132, 1.83e9, 3.35e12, 50 * _MIB, 2048),
    "H100 PCIe": Gpu(114, 1.62e9, 2.04e12, 50 * _MIB, 2048),
    "H100 NVL": Gpu(132, 1.54e9, 3.94e12, 50 * _MIB, 2048),
    "H200": Gpu(132, 1.83e9, 4.8e12, 60 * _MIB, 2048),
    "H200 NVL": Gpu(132, 1.54e9, 4.8e12, 60 * _MIB, 2048),
    "GH200": Gpu(132, 1.83e9, 4.0e12, 50 * _MIB, 2048),
    "B200": Gpu(148, 1.86e9, 8.0e12, 126 * _MIB, 4096),
    "A100": Gpu(108, 1.41e9, 1.56e12, 40 * _MIB, 1024),
    "A100 80GB": Gpu(108, 1.41e9, 2.04e12, 40 * _MIB, 1024),
    "A100-SXM4-80GB": Gpu(108, 1.41e9, 2.04e12, 40 * _MIB, 1024),
    "A10": Gpu(72, 1.70e9, 0.6e12, 6 * _MIB, 512),
    "A40": Gpu(84, 1.74e9, 0.7e12, 6 * _MIB, 512),
    "L4": Gpu(60, 2.04e9, 0.3e12, 48 * _MIB, 512),
    "L40": Gpu(142, 2.49e9, 0.86e12, 96 * _MIB, 256),
    "L40S": Gpu(142, 2.52e9, 0.86e12, 96 * _MIB, 512),
    "RTX 3090": Gpu(82, 1.70e9, 0.94e12, 6 * _MIB, 256),
    "RTX 4090": Gpu(128, 2.52e9, 1.01e12, 72 * _MIB, 256),
    "RTX 5090": Gpu(170, 2.41e9, 1.79e12, 96 * _MIB, 256),
    "RTX PRO 6000": Gpu(188, 2.60e9, 1.79e12, 128 * _MIB, 512),
}
"""Data sheets by a part of the driver's name; H100 and H200 are the SXM modules."""


def gpu_named(name: str) -> Gpu | None:
    """Data sheet of a GPU; None where its name holds none of the table's.

    Args:
        name: Name that the driver gives the GPU.

    Example:
        >>> gpu_named("NVIDIA H100 PCIe").multiprocessors, gpu_named("Tesla T4")
        (114, None)
    """
    words = f" {name.replace('-', ' ')} "
    found = [key for key in GPUS if f" {key.replace('-', ' ')} " in words]
    return GPUS[max(found, key=len)] if found else None


def gpu_told(properties: Any) -> Gpu:
    """Rates that ``torch.cuda.get_device_properties`` tells, completed from the table."""
    macs_by_major = {8: 256, 9: 2048, 10: 4096, 12: 256}
    known = gpu_named(properties.name)
    guess = known or GPUS["H100"]
    # The driver counts clocks in kHz and a bus in bits; a clock moves two of them.
    clock_hz = 1e3 * getattr(properties, "clock_rate", 0)
    memory_hz = 1e3 * getattr(properties, "memory_clock_rate", 0)
    bandwidth = memory_hz * 2 * getattr(properties, "memory_bus_width", 0) / 8
    return Gpu(
        properties.multi_processor_count,
        guess.clock_hz if known or not clock_hz else clock_hz,
        bandwidth or guess.bandwidth,
        getattr(properties, "L2_cache_size", 0) or guess.cache_bytes,
        known.macs if known else macs_by_major.get(properties.major, 256),
    )
