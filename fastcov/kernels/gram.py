"""Second moments of a chunk of rows, read once: the fast path.

A program holds the whole lower triangle of PANELS x PANEL channels, or a rectangle below such
triangles, over one chain of rows. It trusts the rows to be finite: a non-finite value is told
afterwards by its column's sum, which costs nothing per row, and the chunk is then done again
through a mask. Column sums come from one more product, with a 16-row operand of ones in registers:
no other way reads the panel without a reduction across warps.
"""

import triton
import triton.language as tl

from fastcov.kernels.block import mask_rows, sum_block
from fastcov.kernels.panels import store_panels, sum_panels
from fastcov.kernels.tiles import (
    SPLIT,
    UNSPECIALIZED,
    is_finite,
    slot_size,
    triangle_row,
    triangle_size,
)

_REPAIR = tl.constexpr(16)  # rows of one step of the repair


@triton.jit(
    do_not_specialize=[*UNSPECIALIZED, "chunks"],
    do_not_specialize_on_alignment=["rows", "shift", "count"],
)
def gram_kernel(
    rows,
    aligned_rows,  # the same where VECTOR > 1: its address picks a compilation; else None
    matrix,  # descriptor of the rows with blocks [STEP, PANEL], or None
    shift,  # float64 [C], read where MODE splits
    is_row_finite,  # uint8 [N], written for chunks that hold non-finite rows
    partial,  # float32 [chunks, slot_size], written
    notes,  # int32 [chunks * triangles + 1], written: rows skipped; whether the state had seen none
    count,
    chunks: tl.int32,
    steps: tl.int32,
    steps_per_chunk: tl.int32,
    steps_per_image: tl.int32,
    channels: tl.int32,
    positions: tl.int32,
    stride_2: tl.int64,
    stride_position: tl.int64,
    stride_channel: tl.int64,
    STEP: tl.constexpr,
    PANEL: tl.constexpr,
    PANELS: tl.constexpr,  # of a triangle
    LEFT: tl.constexpr,  # panels of a rectangle, 0 where one triangle covers all channels
    RIGHT: tl.constexpr,
    EDGE: tl.constexpr,
    VECTOR: tl.constexpr,  # extents and strides are multiples of it
    MODE: tl.constexpr,
    IS_PLANES: tl.constexpr,
    LOADS_TWICE: tl.constexpr,
    STAGES: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """One triangle or rectangle and chunk a program; a chunk's triangles come first."""
    if aligned_rows is not None:
        rows = aligned_rows
        # Tells the compiler what the launcher has checked.
        stride_2 = stride_2 // VECTOR * VECTOR
        if IS_PLANES:
            stride_channel = stride_channel // VECTOR * VECTOR
            positions = positions // VECTOR * VECTOR
        else:
            stride_position = stride_position // VECTOR * VECTOR
            channels = channels // VECTOR * VECTOR
    if IS_PLANES:
        near_position = 1
        near_channel = stride_channel.to(tl.int32)
    else:
        near_position = stride_position.to(tl.int32)
        near_channel = 1
    geometry = (
        steps_per_image,
        channels,
        positions,
        1,
        1,
        stride_2,
        stride_2,
        stride_2,
        near_position,
        near_channel,
    )
    WIDTH: tl.constexpr = PANELS * PANEL
    edges = tl.cdiv(channels, EDGE)
    triangles = tl.cdiv(channels, WIDTH)
    if LEFT > 0:
        ROWS_PER_PAIR: tl.constexpr = PANELS // LEFT
        COLUMNS_PER_PAIR: tl.constexpr = PANELS // RIGHT
        tiles = triangles * (triangles - 1) // 2 * (ROWS_PER_PAIR * COLUMNS_PER_PAIR)
    else:
        tiles = 0
    # All programs of one chunk run at the same time: its rows come from memory once, then from L2.
    chunk = tl.program_id(0) // (triangles + tiles)
    triangle = tl.program_id(0) % (triangles + tiles)
    if triangle < triangles:
        first_step = chunk * steps_per_chunk
        last_step = tl.minimum(first_step + steps_per_chunk, steps)
        partial += chunk.to(tl.int64) * slot_size(channels, EDGE)
        column_sums = partial + triangle_size(channels, EDGE)
        moments, sums = sum_panels(
            rows,
            matrix,
            shift,
            triangle * WIDTH,
            triangle * WIDTH,
            first_step,
            last_step,
            geometry,
            PANELS,
            PANELS,
            True,
            STEP,
            PANEL,
            MODE,
            IS_PLANES,
            LOADS_TWICE,
            STAGES,
            IS_INTERPRETED,
        )
        store_panels(
            partial,
            moments,
            triangle * WIDTH,
            triangle * WIDTH,
            edges,
            PANELS,
            PANELS,
            True,
            PANEL,
            EDGE,
        )
        broken_columns = 0
        for index in tl.static_range(PANELS):
            # All _ONES rows are the same.
            total = tl.max(sums[index], axis=0)
            column = triangle * WIDTH + index * PANEL + tl.arange(0, PANEL)
            tl.store(column_sums + column, total, mask=column < edges * EDGE)
            broken_columns += tl.sum(1 - is_finite(total).to(tl.int32))
        number = 0
        if broken_columns > 0:
            # In short steps: the repair must not take registers from the loop above.
            geometry = (
                steps_per_image * (STEP // _REPAIR),
                channels,
                positions,
                1,
                1,
                stride_2,
                stride_2,
                stride_2,
                near_position,
                near_channel,
            )
            first_step *= STEP // _REPAIR
            last_step *= STEP // _REPAIR
            number = mask_rows(
                rows, is_row_finite, first_step, last_step, geometry, _REPAIR, EDGE, False
            )
            if LEFT == 0:
                # All channels are here: repair at once. Wider rows wait for block_kernel.
                tl.debug_barrier()
                for block in tl.range(edges * (edges + 1) // 2, num_stages=1):
                    sum_block(
                        rows,
                        shift,
                        None,
                        is_row_finite,
                        partial,
                        column_sums,
                        block,
                        first_step,
                        last_step,
                        geometry,
                        _REPAIR,
                        EDGE,
                        MODE,
                        MODE == SPLIT,
                        False,
                        1,
                        IS_INTERPRETED,
                    )
        tl.store(notes + chunk * triangles + triangle, number)
        if tl.program_id(0) == 0:
            tl.store(notes + triangles * chunks, (tl.load(count) == 0).to(tl.int32))
    elif LEFT > 0:
        tile = triangle - triangles
        pair = tile // (ROWS_PER_PAIR * COLUMNS_PER_PAIR)
        inside = tile % (ROWS_PER_PAIR * COLUMNS_PER_PAIR)
        # Pairs of different triangles (upper, lower) with upper < lower, by lower.
        lower = triangle_row(pair) + 1
        upper = pair - lower * (lower - 1) // 2
        left_channel = lower * WIDTH + (inside // COLUMNS_PER_PAIR) * (LEFT * PANEL)
        right_channel = upper * WIDTH + (inside % COLUMNS_PER_PAIR) * (RIGHT * PANEL)
        if left_channel < channels:
            first_step = chunk * steps_per_chunk
            last_step = tl.minimum(first_step + steps_per_chunk, steps)
            partial += chunk.to(tl.int64) * slot_size(channels, EDGE)
            moments, sums = sum_panels(
                rows,
                matrix,
                shift,
                left_channel,
                right_channel,
                first_step,
                last_step,
                geometry,
                LEFT,
                RIGHT,
                False,
                STEP,
                PANEL,
                MODE,
                IS_PLANES,
                LOADS_TWICE,
                STAGES,
                IS_INTERPRETED,
            )
            store_panels(
                partial,
                moments,
                left_channel,
                right_channel,
                edges,
                LEFT,
                RIGHT,
                False,
                PANEL,
                EDGE,
            )
