"""The least time that work can take on a machine, from its measured rates: the roofline.

The floor of a second moment reads every activation once, reads and writes the lower half of a
float64 state, and multiplies half of the gram (Williams, Waterman, Patterson 2009: Roofline).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch

from fastcov.bench.machine import Rates

# Issue-to-use latency of one dependent float32 operation on every NVIDIA GPU since Volta.
_DEPENDENT_CYCLES = 4
_TREE_LEVELS = 5  # of a reduction over the 32 lanes of a warp
_SIGNIFICANT_BITS = {torch.float32: 24, torch.float64: 53}
# float32 rows are split into three bf16 parts on a GPU: six products of nine are kept.
_SPLIT_PRODUCTS = 6


class Floor(NamedTuple):
    """Least seconds, and what sets them."""

    seconds: float
    of: str


class GramLoad(NamedTuple):
    """One second-moment update: rows, channels, and the rows' dtype."""

    rows: int
    channels: int
    dtype: torch.dtype


def gram_flops(load: GramLoad) -> float:
    """Flops of the lower triangle, diagonal included.

    Example:
        >>> gram_flops(GramLoad(rows=10, channels=3, dtype=torch.float32))
        120.0
    """
    return float(load.rows) * load.channels * (load.channels + 1)


def gram_bytes(load: GramLoad) -> float:
    """Bytes of the activation, read once, and of the state's lower half, read and written."""
    state = 2 * 8 * load.channels * (load.channels + 1) / 2
    return load.rows * load.channels * load.dtype.itemsize + state


def gram_floor(loads: Iterable[GramLoad], rates: Rates) -> Floor:
    """Floor of a list of updates: each is bound by bandwidth or by arithmetic.

    Args:
        loads: Independent updates, one after the other.
        rates: Of the machine.

    Returns:
        The sum, named after what binds most of it.
    """
    total = {"bandwidth": 0.0, "arithmetic": 0.0}
    for load in loads:
        flops, dtype = gram_flops(load), load.dtype
        if rates.device.type == "cuda" and dtype == torch.float32:
            flops, dtype = flops * _SPLIT_PRODUCTS, torch.bfloat16
        arithmetic = flops / rates.matmul_flop_s(dtype)
        bandwidth = gram_bytes(load) / rates.copy_bytes_s
        total["arithmetic" if arithmetic > bandwidth else "bandwidth"] += max(arithmetic, bandwidth)
    return Floor(sum(total.values()), max(total, key=total.__getitem__))


def eigenvalue_floor(sizes: Iterable[tuple[int, int]], dtype: torch.dtype, rates: Rates) -> Floor:
    """Floor of eigenvalues without vectors: 4/3 n^3 flops each, half a matrix read.

    On a GPU also the latency of the largest matrix: n dependent steps of tridiagonalisation, each
    with two reductions, and one Sturm count of n dependent steps for every bit of an eigenvalue.

    Args:
        sizes: Matrix order and number of matrices.
        dtype: float32 or float64.
        rates: Of the machine.

    Returns:
        The largest of the three.
    """
    flops = byte_count = 0.0
    largest = 0
    for order, matrices in sizes:
        flops += matrices * 4 / 3 * order**3
        byte_count += matrices * dtype.itemsize * order * (order + 1) / 2
        largest = max(largest, order)
    bounds = {
        "arithmetic": flops / rates.matmul_flop_s(dtype),
        "bandwidth": byte_count / rates.copy_bytes_s,
    }
    if rates.clock_hz:
        steps = 2 * _TREE_LEVELS + 2 * _SIGNIFICANT_BITS[dtype]
        bounds["latency"] = largest * steps * _DEPENDENT_CYCLES / rates.clock_hz
    binding = max(bounds, key=bounds.__getitem__)
    return Floor(bounds[binding], binding)


def resnet50_maps(batch: int, height: int, width: int) -> list[tuple[int, int, int, int]]:
    """Outputs of ResNet-50's 53 convolutions, in order of execution (B, C, H, W).

    Example:
        >>> maps = resnet50_maps(1, 224, 224)
        >>> len(maps), maps[0], maps[-1]
        (53, (1, 64, 112, 112), (1, 2048, 7, 7))
    """

    def halved(size: int) -> int:
        return (size + 1) // 2

    height, width = halved(height), halved(width)
    maps = [(batch, 64, height, width)]
    height, width = halved(height), halved(width)  # the pool
    for stage, blocks in enumerate((3, 4, 6, 3)):
        inner = 64 << stage
        for block in range(blocks):
            maps.append((batch, inner, height, width))
            if stage > 0 and block == 0:
                height, width = halved(height), halved(width)
            maps.append((batch, inner, height, width))
            maps.append((batch, 4 * inner, height, width))
            if block == 0:
                maps.append((batch, 4 * inner, height, width))
    return maps
