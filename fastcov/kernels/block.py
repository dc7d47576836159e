"""One block of the packed triangle over one chunk of rows: any layout, weights, non-finite rows.

The careful path takes weighted rows, arbitrary strides and the float32 modes other than the
default, and repairs a chunk in which the fast path (gram.py) met a non-finite value. It reads rows
through a mask that :func:`mask_rows` has written.
"""

import triton
import triton.language as tl

from fastcov.kernels.layout import Geometry
from fastcov.kernels.tiles import (
    DIRECT,
    begin_update,
    has_broken,
    is_finite,
    kernel,
    load_tile,
    locate,
    multiply_tiles,
    note_broken,
    slot_size,
    triangle_row,
    triangle_size,
    wait_for_previous,
    workspace,
)


@triton.jit
def mask_rows(
    rows,
    is_row_finite,  # uint8 [N], written for the rows of these steps
    first_step,
    last_step,
    geometry,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
    IS_DEEP: tl.constexpr,
):
    """Number of rows that hold a non-finite value; writes the mask of the others."""
    skipped = tl.zeros([STEP], tl.int32)
    row = tl.arange(0, STEP)
    for step in tl.range(first_step, last_step, num_stages=1):
        origin, image, position = locate(rows, step, geometry, STEP, IS_DEEP)
        broken = tl.zeros([STEP], tl.int32)
        for channel in range(0, geometry.channels, EDGE):
            tile = load_tile(origin, position, channel, geometry, None, STEP, EDGE, False)
            broken = tl.maximum(broken, tl.max(1 - is_finite(tile).to(tl.int32), axis=1))
        index = image.to(tl.int64) * geometry.positions + position + row
        is_inside = position + row < geometry.positions
        tl.store(is_row_finite + index, (1 - broken).to(tl.uint8), mask=is_inside)
        # Rows outside the image were loaded as zeros and are not broken.
        skipped += broken
    return tl.sum(skipped)


@triton.jit
def rows_noted(notes, chain, flags):
    """Sum of the non-finite rows that the programs of one chain noted: 0 only if all are finite."""
    number = 0
    for flag in range(flags):
        number += tl.load(notes + chain * flags + flag)
    return number


@triton.jit
def sum_block(
    rows,
    shift,  # float64 [C], read if IS_CENTRED
    row_weight,  # float32 or float64 [N] or None
    is_row_finite,
    notes,  # int32 [chains, flags], rows skipped; read if ONLY_BROKEN
    flags,
    partial,  # float32, one chunk's packed triangle
    column_sums,  # float32 [C padded to EDGE], sums of one chunk
    block,
    first_step,
    last_step,
    steps_per_chain,
    geometry,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
    MODE: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    IS_DEEP: tl.constexpr,
    ONLY_BROKEN: tl.constexpr,  # only chains that hold non-finite rows have a mask
    STAGES: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Second moments of one EDGE x EDGE block, and column sums where it lies on the diagonal."""
    block_row = triangle_row(block)
    block_column = block - block_row * (block_row + 1) // 2
    edge = tl.arange(0, EDGE)
    left_channel = block_row * EDGE + edge
    right_channel = block_column * EDGE + edge
    row = tl.arange(0, STEP)
    inside = edge[:, None] * EDGE + edge[None, :]
    partial += block * (EDGE * EDGE)
    tl.store(partial + inside, tl.zeros([EDGE, EDGE], tl.float32))
    if block_row == block_column:
        tl.store(column_sums + left_channel, tl.zeros([EDGE], tl.float32))
    # Other threads may add to an entry than those that cleared it.
    tl.debug_barrier()
    if IS_CENTRED:
        left_shift = tl.load(shift + left_channel, mask=left_channel < geometry.channels, other=0.0)
        right_shift = tl.load(
            shift + right_channel, mask=right_channel < geometry.channels, other=0.0
        )
        left_shift = left_shift.to(tl.float32)
        right_shift = right_shift.to(tl.float32)
    for first in tl.range(first_step, last_step, steps_per_chain, num_stages=1):
        has_mask = 1
        if ONLY_BROKEN:
            has_mask = rows_noted(notes, first // steps_per_chain, flags)
        moments = tl.zeros([EDGE, EDGE], tl.float32)
        sums = tl.zeros([EDGE], tl.float32)
        last = tl.minimum(first + steps_per_chain, last_step)
        for step in tl.range(first, last, num_stages=STAGES):
            origin, image, position = locate(rows, step, geometry, STEP, IS_DEEP)
            index = image.to(tl.int64) * geometry.positions + position + row
            is_inside = position + row < geometry.positions
            if ONLY_BROKEN:
                is_masked = is_inside & (has_mask > 0)
                is_read = is_inside & (tl.load(is_row_finite + index, mask=is_masked, other=1) != 0)
            else:
                is_read = tl.load(is_row_finite + index, mask=is_inside, other=0) != 0
            left = load_tile(
                origin, position, block_row * EDGE, geometry, is_read, STEP, EDGE, True
            )
            right = load_tile(
                origin, position, block_column * EDGE, geometry, is_read, STEP, EDGE, False
            )
            if MODE != DIRECT:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            if IS_CENTRED:
                left = tl.where(is_read[None, :], left - left_shift[:, None], 0.0)
                right = tl.where(is_read[:, None], right - right_shift[None, :], 0.0)
            if row_weight is not None:
                weight = tl.load(row_weight + index, mask=is_read, other=0.0).to(tl.float32)
                left = left * weight[None, :]
            moments = multiply_tiles(left, right, moments, MODE, IS_INTERPRETED)
            if block_row == block_column:
                sums += tl.sum(left.to(tl.float32), axis=1)
        # This addition rounds to nearest, and needs no registers for a second set of sums: see
        # panels.py.
        tl.atomic_add(partial + inside, moments, sem="relaxed")
        if block_row == block_column:
            tl.atomic_add(column_sums + left_channel, sums, sem="relaxed")


@kernel("partial", "chain_weight")
def mask_kernel(
    rows,
    row_weight,
    partial,  # float32; behind it are written:
    #   notes, int32 [chains + 3]: rows skipped; behind them see begin_update
    #   is_row_finite, uint8 [N]
    chain_weight,  # float64 [chains], written where rows are weighted
    count,
    partial_entries: tl.int64,
    notes_entries: tl.int32,
    steps: tl.int32,
    steps_per_chunk: tl.int32,  # not read: the arguments are those of block_kernel
    steps_per_chain: tl.int32,
    steps_per_image: tl.int32,
    channels: tl.int32,
    positions: tl.int32,
    size_1: tl.int32,
    size_2: tl.int32,
    stride_0: tl.int64,
    stride_1: tl.int64,
    stride_2: tl.int64,
    stride_position: tl.int64,
    stride_channel: tl.int64,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
    IS_DEEP: tl.constexpr,
):
    """Mask, notes and weight of one chain a program, for :func:`block_kernel` behind it."""
    geometry = Geometry(
        steps_per_image,
        channels,
        positions,
        size_1,
        size_2,
        stride_0,
        stride_1,
        stride_2,
        stride_position,
        stride_channel,
    )
    notes, is_row_finite = workspace(partial, partial_entries, notes_entries)
    chain = tl.program_id(0)
    first_step = chain * steps_per_chain
    last_step = tl.minimum(first_step + steps_per_chain, steps)
    number = mask_rows(rows, is_row_finite, first_step, last_step, geometry, STEP, EDGE, IS_DEEP)
    tl.store(notes + chain, number)
    ends = notes + tl.num_programs(0)
    if number > 0:
        note_broken(ends, count)
    if chain == 0:
        begin_update(ends, count)
    if row_weight is not None:
        # The mask is read back by other threads than those that wrote it.
        tl.debug_barrier()
        total = tl.zeros([STEP], tl.float64)
        row = tl.arange(0, STEP)
        for step in range(first_step, last_step):
            image = step // steps_per_image
            position = (step % steps_per_image) * STEP
            index = image.to(tl.int64) * positions + position + row
            is_inside = position + row < positions
            is_read = tl.load(is_row_finite + index, mask=is_inside, other=0) != 0
            total += tl.load(row_weight + index, mask=is_read, other=0.0).to(tl.float64)
        tl.store(chain_weight + chain, tl.sum(total))


@kernel("partial")
def block_kernel(
    rows,
    shift,
    row_weight,
    partial,  # float32 [chunks, slot_size], written; behind lie
    #   notes, int32 [chains, flags], rows skipped, and the update's: read if ONLY_BROKEN
    #   is_row_finite, uint8 [N]
    flags: tl.int32,
    partial_entries: tl.int64,
    notes_entries: tl.int32,
    steps: tl.int32,
    steps_per_chunk: tl.int32,  # a multiple of steps_per_chain
    steps_per_chain: tl.int32,
    steps_per_image: tl.int32,
    channels: tl.int32,
    positions: tl.int32,
    size_1: tl.int32,
    size_2: tl.int32,
    stride_0: tl.int64,
    stride_1: tl.int64,
    stride_2: tl.int64,
    stride_position: tl.int64,
    stride_channel: tl.int64,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
    MODE: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    IS_DEEP: tl.constexpr,
    ONLY_BROKEN: tl.constexpr,
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,  # true if programs start before the launch before has ended
    IS_INTERPRETED: tl.constexpr,
):
    """One block and chunk a program. ONLY_BROKEN: repairs chunks that hold non-finite rows."""
    geometry = Geometry(
        steps_per_image,
        channels,
        positions,
        size_1,
        size_2,
        stride_0,
        stride_1,
        stride_2,
        stride_position,
        stride_channel,
    )
    notes, is_row_finite = workspace(partial, partial_entries, notes_entries)
    block = tl.program_id(0)
    chunk = tl.program_id(1)
    first_step = chunk * steps_per_chunk
    last_step = tl.minimum(first_step + steps_per_chunk, steps)
    wait_for_previous(OVERLAPS)
    if ONLY_BROKEN:
        if not has_broken(notes + tl.cdiv(steps, steps_per_chain) * flags):
            return
        number = 0
        for first in range(first_step, last_step, steps_per_chain):
            number += rows_noted(notes, first // steps_per_chain, flags)
        if number == 0:
            return
    partial += chunk.to(tl.int64) * slot_size(channels, EDGE)
    sum_block(
        rows,
        shift,
        row_weight,
        is_row_finite,
        notes,
        flags,
        partial,
        partial + triangle_size(channels, EDGE),
        block,
        first_step,
        last_step,
        steps_per_chain,
        geometry,
        STEP,
        EDGE,
        MODE,
        IS_CENTRED,
        IS_DEEP,
        ONLY_BROKEN,
        STAGES,
        IS_INTERPRETED,
    )
