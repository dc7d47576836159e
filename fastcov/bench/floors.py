"""Floors: least times of work on a machine, from its measured rates (the roofline model).

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
# Reciprocals that a multiprocessor starts in a cycle, on all of these GPUs; a Sturm step takes one,
# and three flops.
_RECIPROCALS_A_CYCLE = 16
_STURM_FLOPS = 3
_SIGNIFICANT_BITS = {torch.float32: 24, torch.float64: 53}
# float32 rows are split into three bf16 parts on a GPU: six products of nine are kept.
_SPLIT_PRODUCTS = 6


class Floor(NamedTuple):
    """Least time, and the resource that sets it."""

    seconds: float
    of: str


class GramLoad(NamedTuple):
    """One update of a second moment: rows, channels, and the rows' dtype."""

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
        rates: Measured rates of the machine.

    Returns:
        Sum of the updates' floors, named after the resource that binds most of it.
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

    On a GPU also the time of bisection: a Sturm count of n dependent steps for every eigenvalue and
    bit, less the bits that counts at n evenly spaced points settle at once. A step needs a
    reciprocal, of which a multiprocessor starts few; and the largest matrix has a latency, of n
    steps of tridiagonalisation with two reductions each and of those counts. Waits of several
    blocks of one matrix for each other come on top.

    Args:
        sizes: Pairs of matrix order and number of matrices.
        dtype: float32 or float64.
        rates: Measured rates of the machine.

    Returns:
        Largest of the four bounds.
    """
    flops = byte_count = sturm_steps = 0.0
    largest = 0
    for order, matrices in sizes:
        flops += matrices * 4 / 3 * order**3
        byte_count += matrices * dtype.itemsize * order * (order + 1) / 2
        sturm_steps += matrices * order**2 * _sturm_counts(order, dtype)
        largest = max(largest, order)
    if rates.clock_hz:
        flops += _STURM_FLOPS * sturm_steps
    bounds = {
        "arithmetic": flops / rates.matmul_flop_s(dtype),
        "bandwidth": byte_count / rates.copy_bytes_s,
    }
    if rates.clock_hz:
        # A Sturm step depends on the one before through a reciprocal and a fused multiply-add.
        cycles = _DEPENDENT_CYCLES * (2 * _TREE_LEVELS + 2 * _sturm_counts(largest, dtype))
        bounds["latency"] = largest * cycles / rates.clock_hz
        if rates.multiprocessors:
            rate = _RECIPROCALS_A_CYCLE * rates.multiprocessors * rates.clock_hz
            bounds["reciprocals"] = sturm_steps / rate
    binding = max(bounds, key=bounds.__getitem__)
    return Floor(bounds[binding], binding)


def _sturm_counts(order: int, dtype: torch.dtype) -> int:
    return _SIGNIFICANT_BITS[dtype] + 1 - max(0, order - 1).bit_length()


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
