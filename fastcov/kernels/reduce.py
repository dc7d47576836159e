"""Reduction of all chunks' partial results into a state, in float64 and in a fixed order."""

import triton
import triton.language as tl

from fastcov.kernels.tiles import (
    has_broken,
    kernel,
    slot_size,
    triangle_row,
    triangle_size,
    wait_for_previous,
)
from fastcov.kernels.triangle import triangle_entry


@triton.jit
def fold(values, stride, offset, chunks, FOLD: tl.constexpr, SEGMENT: tl.constexpr):
    """Sum over chunks of values[chunk * stride + offset]. [SEGMENT] float64

    Each thread adds up its own chunks, and warps exchange their sums once at the end: in the loop,
    an exchange would hold back the loads that follow it.
    """
    total = tl.zeros([FOLD, SEGMENT], tl.float64)
    for first in range(0, chunks, FOLD):
        chunk = first + tl.arange(0, FOLD)
        address = chunk[:, None].to(tl.int64) * stride + offset[None, :]
        part = tl.load(values + address, mask=(chunk < chunks)[:, None], other=0.0)
        total += part.to(tl.float64)
    return tl.sum(total, axis=0)


@triton.jit
def fold_weights(chain_weight, chains, FOLD: tl.constexpr):
    """Sum of all chains' weights."""
    total = tl.zeros([FOLD], tl.float64)
    for first in range(0, chains, FOLD):
        chain = first + tl.arange(0, FOLD)
        total += tl.load(chain_weight + chain, mask=chain < chains, other=0.0)
    return tl.sum(total)


@triton.jit
def rows_skipped(notes, chains, flags, FOLD: tl.constexpr):
    """Non-finite rows. Programs that saw none among their channels noted 0: take the largest."""
    total = tl.zeros([FOLD], tl.int64)
    if has_broken(notes + chains * flags):
        for first in range(0, chains, FOLD):
            chain = first + tl.arange(0, FOLD)
            number = tl.zeros([FOLD], tl.int32)
            for flag in range(flags):
                noted = tl.load(notes + chain * flags + flag, mask=chain < chains, other=0)
                number = tl.maximum(number, noted)
            total += number.to(tl.int64)
    return tl.sum(total)


@triton.jit
def shift_left(shift, column, channels, is_first, IS_CENTRED: tl.constexpr):
    """Shift that remains to be subtracted from rows: none, unless kinds of rows are mixed.

    float32 rows came with the shift rounded to float32 subtracted, others with nothing; a state
    without rows gets shift 0 from those others.
    """
    whole = tl.load(shift + column, mask=column < channels, other=0.0)
    if IS_CENTRED:
        remaining = whole - whole.to(tl.float32).to(tl.float64)
    else:
        remaining = tl.where(is_first != 0, 0.0, whole)
    return remaining


@kernel("partial")
def reduce_kernel(
    partial,  # float32 [chunks, slot_size], then notes, int32 [chains * flags + 3]
    chain_weight,  # float64 [chains] where rows are weighted, else None
    moment,
    sum,
    shift,
    weight,
    count,
    row_scale: tl.float64,
    decay: tl.float64,
    partial_entries: tl.int64,
    row_count: tl.int64,
    chunks: tl.int32,
    chains: tl.int32,
    flags: tl.int32,
    channels: tl.int32,
    EDGE: tl.constexpr,
    SEGMENT: tl.constexpr,
    FOLD: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    OVERLAPS: tl.constexpr,  # with the launch before
):
    """First programs: SEGMENT entries of the moment each; then of the sum; the last: counters."""
    segments = triangle_size(channels, EDGE) // SEGMENT
    columns = tl.cdiv(channels, SEGMENT)
    stride = slot_size(channels, EDGE)
    column_sums = partial + triangle_size(channels, EDGE)
    notes = (partial + partial_entries).to(tl.pointer_type(tl.int32))
    wait_for_previous(OVERLAPS)
    is_first = tl.load(notes + chains * flags)
    program = tl.program_id(0)
    if program < segments:
        entry = program * SEGMENT + tl.arange(0, SEGMENT)
        block = program * SEGMENT // (EDGE * EDGE)
        block_row = triangle_row(block)
        block_column = block - block_row * (block_row + 1) // 2
        row = block_row * EDGE + entry % (EDGE * EDGE) // EDGE
        column = block_column * EDGE + entry % EDGE
        total = fold(partial, stride, entry, chunks, FOLD, SEGMENT)
        row_shift = shift_left(shift, row, channels, is_first, IS_CENTRED)
        column_shift = shift_left(shift, column, channels, is_first, IS_CENTRED)
        if tl.max(tl.abs(row_shift)) + tl.max(tl.abs(column_shift)) > 0:
            row_sum = fold(column_sums, stride, row, chunks, FOLD, SEGMENT)
            column_sum = fold(column_sums, stride, column, chunks, FOLD, SEGMENT)
            if chain_weight is not None:
                rows_weight = fold_weights(chain_weight, chains, FOLD)
            else:
                skipped = rows_skipped(notes, chains, flags, FOLD)
                rows_weight = (row_count - skipped).to(tl.float64)
            total += row_shift * column_shift * rows_weight
            total -= row_shift * column_sum + row_sum * column_shift
        is_kept = (column <= row) & (row < channels)
        entry = triangle_entry(row, column)
        before = tl.load(moment + entry, mask=is_kept, other=0.0)
        tl.store(moment + entry, before * decay + total * row_scale, mask=is_kept)
        return
    skipped = rows_skipped(notes, chains, flags, FOLD)
    if chain_weight is not None:
        rows_weight = fold_weights(chain_weight, chains, FOLD)
    else:
        rows_weight = (row_count - skipped).to(tl.float64)
    if program < segments + columns:
        column = (program - segments) * SEGMENT + tl.arange(0, SEGMENT)
        padded = tl.minimum(column, tl.cdiv(channels, EDGE) * EDGE - 1)
        total = fold(column_sums, stride, padded, chunks, FOLD, SEGMENT)
        total -= rows_weight * shift_left(shift, column, channels, is_first, IS_CENTRED)
        is_kept = column < channels
        before = tl.load(sum + column, mask=is_kept, other=0.0)
        tl.store(sum + column, before * decay + total * row_scale, mask=is_kept)
        if not IS_CENTRED:
            tl.store(
                shift + column, tl.zeros([SEGMENT], tl.float64), mask=is_kept & (is_first != 0)
            )
    else:
        tl.store(weight, tl.load(weight) * decay + rows_weight * row_scale)
        tl.store(count, tl.load(count) + row_count - skipped)
        tl.store(count + 1, tl.load(count + 1) + skipped)
