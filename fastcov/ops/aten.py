"""Operators in plain torch, for tensors that neither the compiled library nor Triton serves.

Used on GPUs older than sm_80, for float64 rows on a GPU, and where the compiled library is
missing. Same results as ops/reference.py within float32 rounding; grams run in chains of at most
4096 rows and are added in float64. On a GPU, accumulate_ and gather_ never wait for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fastcov.ops import triangle
from fastcov.ops.reference import (
    GOLDEN_RATIO_64,
    LARGEST_FLOAT_SHIFT,
    LARGEST_SHIFT,
    SHIFT_ROWS,
)

CHAIN_ROWS = 4096
"""Rows whose gram is computed in float32 before it is added in float64."""
_CONVERTED_BYTES = 8 << 20  # of rows that are converted to float64 at once
_SHIFT_WINDOW = 1024  # rows inspected for a shift; finding none there leaves 0, which is right too
# Largest square of the distance from shift to mean, in variances, as in csrc/covariance_update.h.
_MOST_SQUARED_DEVIATIONS = 16
# Limits of accumulate_affine_, as in csrc/covariance_affine.cpp. Cancellation is the largest output
# variance that uncorrelated inputs would give, about their shift, over the largest true one. Its
# limit is the first value up to _FEW_INPUTS inputs, then falls with the root of their number to the
# second.
_CANCELLATION, _LEAST_CANCELLATION = 4, 1.5
_FEW_INPUTS = 64
_SMALLEST, _LARGEST = 1e-20, 1e30  # squares that float32 sums without loss


def _first_rows(flat: Tensor, row_weight: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Means and variances of the first finite rows of weight other than 0, and their number."""
    head = flat[:_SHIFT_WINDOW]
    is_used = torch.isfinite(head).all(1)
    if row_weight is not None:
        is_used &= row_weight[:_SHIFT_WINDOW] != 0
    is_chosen = is_used & (is_used.cumsum(0) <= SHIFT_ROWS)
    found = is_chosen.sum()
    share = is_chosen[:, None] / found.clamp(min=1)
    values = torch.where(is_chosen[:, None], head, 0).double()
    mean = (values * share).sum(0)
    return mean, ((values - mean).square() * share).sum(0), found


def _passes_power_of_two(count: Tensor, rows: int) -> bool:
    # Times at which a state without decay checks that its shift is still near the rows. Never on a
    # GPU, where reading the count would wait for the device.
    return count.is_cpu and int(count[0]).bit_length() < (int(count[0]) + rows).bit_length()


def _rounded_shift(mean: Tensor, dtype: torch.dtype) -> Tensor:
    # Mean in so few digits that rows of the dtype subtract it exactly; 0 where a row less the mean
    # might overflow.
    shift = mean.to(torch.bfloat16 if dtype.itemsize == 2 else dtype).double()
    limit = LARGEST_SHIFT.get(dtype, LARGEST_FLOAT_SHIFT)
    return torch.where(shift.abs() < limit, shift, 0.0)


def follow_mean_(
    moment: Tensor,
    sum: Tensor,
    shift: Tensor,
    weight: Tensor,
    count: Tensor,
    flat: Tensor,
    row_weight: Tensor | None = None,
) -> None:
    """Move of a state's shift to the mean of rows to come, where the two are far apart.

    Sums about a shift that is far from the rows cancel. At least one row comes [N, C]; those of
    weight 0 are passed over. No host synchronisation.
    """
    stride = max(1, len(flat) // SHIFT_ROWS)  # rows from all over the call
    spread_weight = None if row_weight is None else row_weight[::stride]
    mean, variance, found = _first_rows(flat[::stride], spread_weight)
    own_mean = sum / weight.clamp(min=torch.finfo(torch.float64).tiny)
    own_square = triangle.diagonal(moment, len(sum)) / weight.clamp(
        min=torch.finfo(torch.float64).tiny
    )
    variance = variance + (own_square - own_mean.square()).clamp(min=0)
    has_left = (mean - shift).square() > _MOST_SQUARED_DEVIATIONS * variance
    has_left &= (found > 0) & (count[0] > 0) & (weight > 0)
    step = torch.where(has_left, shift - _rounded_shift(mean, flat.dtype), 0.0)
    moment.add_(triangle.translation(step, sum, weight))
    triangle.clamp_diagonal_(moment, len(sum))
    sum.add_(weight * step)
    shift.sub_(step)


def channels_to_end(rows: Tensor, channel_dim: int) -> Tensor:
    """Rows of an operator's argument, with the channels last. [..., C]"""
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
    """Plain-torch form of :func:`fastcov.ops.reference.accumulate_reference_`."""
    rows = channels_to_end(rows, channel_dim)
    flat = rows.reshape(-1, rows.shape[-1])
    if len(flat) == 0:
        for tensor in (moment, sum, weight):
            tensor.mul_(decay)
        return
    mean, variance, _ = _first_rows(flat, row_weight)
    first_shift = _rounded_shift(mean, flat.dtype)
    if flat.dtype.itemsize == 2:  # products of such rows are exact: no shift if means are small
        first_shift = torch.where(mean.square() <= variance, 0.0, first_shift)
    shift.copy_(torch.where(count[0] == 0, first_shift, shift))
    if decay != 1 or _passes_power_of_two(count, len(flat)):
        follow_mean_(moment, sum, shift, weight, count, flat, row_weight)
    work = torch.float64 if flat.dtype == torch.float64 else torch.float32
    for tensor in (moment, sum, weight):
        tensor.mul_(decay)
    with full_precision(rows.device.type):
        for start in range(0, len(flat), CHAIN_ROWS):
            chain = flat[start : start + CHAIN_ROWS]
            is_read = torch.isfinite(chain).all(1)
            is_skipped = ~is_read
            centred = chain.double() - shift
            weights = is_read.double()
            if row_weight is not None:
                given = row_weight[start : start + CHAIN_ROWS].double()
                is_read &= torch.isfinite(given) & (given > 0)
                is_skipped = ~is_read & (given != 0)
                weights = torch.where(is_read, given, 0.0)
            centred = torch.where(is_read[:, None], centred, 0.0)
            sum.add_(weights @ centred, alpha=row_scale)
            if row_weight is not None:
                centred *= weights.sqrt()[:, None]
            # Divided by a power of two above all, values and their squares stay within float32.
            unit = torch.ldexp(centred.new_ones(()), torch.frexp(centred.abs().amax()).exponent)
            scaled = (centred / unit).to(work)
            gram = triangle.pack(scaled.T @ scaled)
            moment.add_(gram.double() * (row_scale * unit) * unit)
            weight.add_(weights.sum(), alpha=row_scale)
            count.add_(torch.stack([is_read.sum(), is_skipped.sum()]))


def accumulate_in_float64_(
    accumulate_: Callable[..., None],
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
    """Addition of rows in float64, a few MiB at a time, by a given operator.

    Other arguments are those of the operator.
    """
    rows = rows.detach()
    state = (moment, sum, shift, weight, count)
    if rows.dtype == torch.float64 or rows.dim() == 1 or rows.numel() == 0:
        accumulate_(*state, rows.double(), channel_dim, row_weight, row_scale, decay)
        return
    entry_rows = rows[0].numel() // len(sum)
    entries = max(1, _CONVERTED_BYTES // max(1, 8 * rows[0].numel()))
    for start in range(0, len(rows), entries):
        part = rows[start : start + entries].double()
        first, last = start * entry_rows, (start + len(part)) * entry_rows
        part_weight = None if row_weight is None else row_weight[first:last]
        accumulate_(*state, part, channel_dim, part_weight, row_scale, decay if start == 0 else 1.0)


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
    """Addition of the rows that an affine map makes, from the inputs' second moment.

    Args:
        moment: Tensor of the state: see :class:`fastcov.ops.covariance.MomentState`.
            [tiles, 32, 32]
        sum: Tensor of the state. [C]
        shift: Tensor of the state. [C]
        weight: Tensor of the state. []
        count: Tensor of the state. [2]
        input_moment: Second moment of the input rows, each of weight 1. [tiles, 32, 32]
        input_sum: Sum of the input rows less their shift. [I]
        input_shift: Shift of the input rows. [I]
        rows: Number of input rows.
        matrix: Matrix of the map, float32. [C, I]
        bias: Added vector of the map, float32; None without. [C]
        row_scale: Factor on every row's weight.
        decay: Factor on the sums that the state holds.

    Returns:
        False, with the state untouched, where float32 cannot hold the result, or may be off by more
        than 2e-6 of the largest entry. []
    """
    if rows == 0 or matrix.numel() == 0:
        return torch.tensor(False, device="cpu")
    mean = matrix.double() @ (input_shift + input_sum / rows) - shift
    if bias is not None:
        mean += bias
    inputs = len(input_sum)
    scatter = triangle.unpack(input_moment - triangle.outer(input_sum, input_sum / rows), inputs)
    about_shift = triangle.diagonal(input_moment, inputs)
    # A power of two above all entries, of the scatter too: see accumulate_.
    unit = 2.0 ** math.frexp(float(about_shift.max()))[1]
    about_shift = (about_shift / unit).float()
    inputs_ratio = max(1.0, matrix.shape[1] / _FEW_INPUTS)
    most_cancellation = max(_LEAST_CANCELLATION, _CANCELLATION / inputs_ratio**0.5)
    scatter = (scatter / unit).float()
    scaled_mean = (mean * (rows / unit) ** 0.5).float()[:, None]
    with full_precision(matrix.device.type):
        product = torch.mm(matrix, scatter)
        variance = float((product * matrix).sum(1).max())
        uncorrelated = float((matrix.square() * about_shift).sum(1).max())
        mean_square = float(scaled_mean.square().max())
        if not (
            _SMALLEST < variance < _LARGEST
            and mean_square < _LARGEST
            and uncorrelated < most_cancellation * variance
            # The largest entry of the result: below it, no product has overflowed.
            and (variance + mean_square) * unit < torch.finfo(torch.float32).max
        ):
            return torch.tensor(False, device="cpu")
        left, right = torch.cat((product, scaled_mean), 1), torch.cat((matrix, scaled_mean), 1)
        product = triangle.pack(torch.mm(left, right.T))
        moment.mul_(decay).add_(product, alpha=unit * row_scale)
    sum.mul_(decay).add_(mean, alpha=rows * row_scale)
    weight.mul_(decay).add_(rows * row_scale)
    count[0] += rows
    return torch.tensor(True, device="cpu")


@contextmanager
def full_precision(device_type: str) -> Iterator[None]:
    """Context in which no enclosing autocast or global switch lowers the precision of products.

    Such switches are TF32 on GPUs, and bfloat16 by oneDNN on CPUs.
    """
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
    # Upper 64 bits of value * factor, for unsigned 64-bit values held in int64 and factor < 2**31.
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
    """Plain-torch form of :func:`fastcov.ops.reference.gather_reference_`."""
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
    # Indexed dimension by dimension: flattening would copy the whole of a strided activation.
    index: list[Tensor] = []
    for size in reversed(rows.shape[1:-1]):
        index.insert(0, position % size)
        position = torch.div(position, size, rounding_mode="floor")
    location = (image, *index)
    buffer[buffer_row : buffer_row + samples] = rows[location]
