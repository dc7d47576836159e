"""Operators in plain torch: where no compiled path serves. Those for GPUs wait for none.

Used on GPUs older than sm_80, for float64 rows on a GPU, and where the compiled library is
missing. Same results as ops/reference.py within float32 rounding; grams run in chains of at most
4096 rows and are added in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastcov.ops.reference import GOLDEN_RATIO_64, SHIFT_ROWS
from fastcov.rows.dtypes import ROW_DTYPES

CHAIN_ROWS = 4096
# As in csrc/covariance_affine.cpp: times that a map's largest variance may be larger, about its
# inputs' shift and were they not correlated, and squares that float32 sums without loss.
_CANCELLATION, _LEAST_CANCELLATION = 4, 1.5
_FEW_INPUTS = 64  # above, the first falls with the root of their number to the second
_SMALLEST, _LARGEST = 1e-20, 1e30
_SHIFT_WINDOW = 1024  # rows inspected for a shift; finding none there leaves 0, which is right too


def _initial_shift(flat: Tensor) -> Tensor:
    if not ROW_DTYPES[flat.dtype].is_centred:
        return torch.zeros(flat.shape[1], dtype=torch.float64, device=flat.device)
    head = flat[:_SHIFT_WINDOW]
    finite = torch.isfinite(head).all(1)
    chosen = finite & (finite.cumsum(0) <= SHIFT_ROWS)
    total = torch.where(chosen[:, None], head, 0).double().sum(0)
    shift = (total / chosen.sum().clamp(min=1)).to(flat.dtype).double()
    return torch.where(torch.isfinite(shift).all(), shift, 0.0)


def channels_to_end(rows: Tensor, channel_dim: int) -> Tensor:
    """What an operator was given as rows, with the channels last. [..., C]"""
    return rows if channel_dim == -1 else rows.detach().movedim(channel_dim, -1)


def accumulate_(
    moment: Tensor,
    sum: Tensor,
    shift: Tensor,
    weight: Tensor,
    count: Tensor,
    rows: Tensor,
    channel_dim: int = -1,
    row_weight: Tensor | None = None,
    row_scale: float = 1.0,
    decay: float = 1.0,
) -> None:
    """See :func:`fastcov.ops.reference.accumulate_reference_`."""
    rows = channels_to_end(rows, channel_dim)
    flat = rows.reshape(-1, rows.shape[-1])
    if len(flat) == 0:
        for tensor in (moment, sum, weight):
            tensor.mul_(decay)
        return
    shift.copy_(torch.where(count[0] == 0, _initial_shift(flat), shift))
    work = torch.float64 if flat.dtype == torch.float64 else torch.float32
    for tensor in (moment, sum, weight):
        tensor.mul_(decay)
    with _full_precision(rows.device.type):
        for start in range(0, len(flat), CHAIN_ROWS):
            chain = flat[start : start + CHAIN_ROWS]
            finite = torch.isfinite(chain).all(1)
            centred = torch.where(finite[:, None], chain.to(work) - shift.to(work), 0)
            weights = finite * row_scale
            if row_weight is not None:
                weights = weights * row_weight[start : start + CHAIN_ROWS]
            weighted = centred * weights.to(work)[:, None]
            moment.add_(weighted.T @ centred)
            sum.add_(weighted.sum(0, dtype=torch.float64))
            weight.add_(weights.sum(dtype=torch.float64))
            count.add_(torch.stack([finite.sum(), (~finite).sum()]))


def accumulate_affine_(
    moment: Tensor,
    sum: Tensor,
    shift: Tensor,
    weight: Tensor,
    count: Tensor,
    input_moment: Tensor,
    input_sum: Tensor,
    input_shift: Tensor,
    rows: int,
    matrix: Tensor,
    bias: Tensor | None,
    row_scale: float,
    decay: float,
) -> Tensor:
    """Adds the rows that a map makes of others, from the second moment of those.

    Args:
        moment: Of the state. [C, C]
        sum: Likewise. [C]
        shift: Likewise. [C]
        weight: Likewise. []
        count: Likewise. [2]
        input_moment: As a state's, the lower triangle, of ``rows`` rows that weigh 1. [I, I]
        input_sum: Likewise. [I]
        input_shift: Likewise. [I]
        rows: How many.
        matrix: float32. [C, I]
        bias: float32, if any. [C]
        row_scale: Factor on every row's weight.
        decay: Factor on what the state holds.

    Returns:
        False, with the state untouched, where float32 cannot hold the result, or may lose more of
        it than 2e-6 of its largest entry. []
    """
    if rows == 0 or matrix.numel() == 0:
        return torch.tensor(False, device="cpu")
    mean = matrix.double() @ (input_shift + input_sum / rows) - shift
    if bias is not None:
        mean += bias
    scatter = (input_moment - torch.outer(input_sum, input_sum / rows)).tril()
    about_shift = input_moment.diagonal()
    unit = 2.0 ** math.frexp(float(about_shift.max()))[1]  # a power of two above both
    about_shift, many = (about_shift / unit).float(), max(1.0, matrix.shape[1] / _FEW_INPUTS)
    cancellation = max(_LEAST_CANCELLATION, _CANCELLATION / many**0.5)
    scatter = ((scatter + scatter.tril(-1).T) / unit).float()
    scaled_mean = (mean * (rows / unit) ** 0.5).float()[:, None]
    with _full_precision(matrix.device.type):
        product = torch.mm(matrix, scatter)
        variance = float((product * matrix).sum(1).max())
        uncorrelated = float((matrix.square() * about_shift).sum(1).max())
        mean_square = float(scaled_mean.square().max())
        if not (
            _SMALLEST < variance < _LARGEST
            and mean_square < _LARGEST
            and uncorrelated < cancellation * variance
            and (variance + mean_square) * unit < torch.finfo(torch.float32).max  # none overflowed
        ):
            return torch.tensor(False, device="cpu")
        left, right = torch.cat((product, scaled_mean), 1), torch.cat((matrix, scaled_mean), 1)
        moment.mul_(decay).add_(torch.mm(left, right.T), alpha=unit * row_scale)
    sum.mul_(decay).add_(mean, alpha=rows * row_scale)
    weight.mul_(decay).add_(rows * row_scale)
    count[0] += rows
    return torch.tensor(True, device="cpu")


@contextmanager
def _full_precision(device_type: str) -> Iterator[None]:
    # Neither an enclosing autocast nor a global switch (TF32 on GPUs, bfloat16 by oneDNN on CPUs)
    # may reach a product.
    switch: tuple[Any, str, Any] = (torch.backends.mkldnn, "enabled", False)
    if device_type == "cuda":
        switch = (torch.backends.cuda.matmul, "fp32_precision", "ieee")
    owner, name, full = switch
    before = getattr(owner, name)
    setattr(owner, name, full)
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        setattr(owner, name, before)


def _multiply_high(value: Tensor, factor: int) -> Tensor:
    # Upper 64 bits of value * factor for unsigned 64-bit values held in int64, factor < 2**31.
    low = (value & 0xFFFFFFFF) * factor
    high = ((value >> 32) & 0xFFFFFFFF) * factor
    return (high + ((low >> 32) & 0xFFFFFFFF)) >> 32


def gather_(
    buffer: Tensor,
    rows: Tensor,
    buffer_row: int,
    first_sample: int,
    samples: int,
    run_length: int,
    phase: int,
    channel_dim: int = -1,
) -> None:
    """See :func:`fastcov.ops.reference.gather_reference_`."""
    rows = channels_to_end(rows, channel_dim)
    channels = rows.shape[-1]
    images = rows.shape[0] if rows.dim() > 1 else 1
    total = rows.numel() // channels
    positions = total // images
    sample = torch.arange(first_sample, first_sample + samples, device=rows.device)
    run = torch.div(sample, run_length, rounding_mode="floor")
    golden = GOLDEN_RATIO_64 - (1 << 64)  # the same 64 bits, signed; int64 products wrap
    start = _multiply_high(run * golden + phase, total)
    image = torch.div(start, positions, rounding_mode="floor")
    position = (start + sample % run_length) % positions
    # One index a dimension, so that no strided activation is copied whole.
    index: list[Tensor] = []
    for size in reversed(rows.shape[1:-1]):
        index.insert(0, position % size)
        position = torch.div(position, size, rounding_mode="floor")
    location = (image, *index)
    buffer[buffer_row : buffer_row + samples] = rows[location]
