"""Second moments of a chunk of rows, read once: the fast path.

A program holds the whole lower triangle of PANELS x PANEL channels, or a rectangle below such
triangles, over one chunk of rows: several chains. Matrix instructions start at zero with each
chain, whose end adds their sums, rounded to nearest, to the program's own slot (panels.py): same
input, same bits. The program trusts the rows to be finite: a non-finite value is told afterwards by
its column's sum, which costs nothing per row, and the chunk is then done again through a mask.
Column sums come from one more product, with a 16-row operand of ones in registers: no other way
reads the panel without a reduction across warps.
"""

import triton.language as tl

from fastcov.kernels.block import mask_rows, sum_block
from fastcov.kernels.layout import Geometry
from fastcov.kernels.panels import clear_slot, sum_panels
from fastcov.kernels.tiles import (
    SPLIT,
    begin_update,
    kernel,
    note_broken,
    slot_size,
    start_next,
    triangle_row,
    triangle_size,
    workspace,
)

_REPAIR = tl.constexpr(16)  # rows of one step of the repair


@kernel("aligned_rows", "matrix", "aligned_partial")
def gram_kernel(
    rows,
    aligned_rows,  # rows where VECTOR > 1: an aligned address picks a compilation; else None
    matrix,  # descriptor of the rows with blocks [STEP, PANEL], or None
    shift,  # float64 [C], read where MODE splits
    partial,  # float32 [chunks, slot_size], written; workspace() says what lies behind:
    #   notes, int32 [chains * triangles + 3], written: rows skipped; behind them see begin_update
    #   is_row_finite, uint8 [N], written for chains that hold non-finite rows
    aligned_partial,  # partial, or None: then a thread adds single entries, not four at once
    count,
    partial_entries: tl.int64,
    notes_entries: tl.int32,
    steps: tl.int32,
    steps_per_chunk: tl.int32,  # a multiple of steps_per_chain
    steps_per_chain: tl.int32,
    steps_per_image: tl.int32,
    channels: tl.int32,
    positions: tl.int32,
    stride_2: tl.int64,
    stride_position: tl.int64,
    stride_channel: tl.int64,
    STEP: tl.constexpr,
    PANEL: tl.constexpr,
    PANELS: tl.constexpr,  # panels of a triangle
    LEFT: tl.constexpr,  # panels of a rectangle, 0 where one triangle covers all channels
    RIGHT: tl.constexpr,
    EDGE: tl.constexpr,
    VECTOR: tl.constexpr,  # number of which extents and strides are multiples
    MODE: tl.constexpr,
    IS_PLANES: tl.constexpr,
    LOADS_TWICE: tl.constexpr,
    ONE_CHAIN: tl.constexpr,  # steps_per_chunk is steps_per_chain
    HOISTS: tl.constexpr,  # true if the addresses for a chain's end are computed before the chain
    STAGES: tl.constexpr,
    OVERLAPS: tl.constexpr,  # true if the next launch may start before this one has ended
    IS_INTERPRETED: tl.constexpr,
):
    """One triangle or rectangle and chunk a program; a chunk's triangles come first."""
    start_next(OVERLAPS)
    if aligned_partial is not None:
        partial = aligned_partial
    notes, is_row_finite = workspace(partial, partial_entries, notes_entries)
    if aligned_rows is not None:
        rows = aligned_rows
        # The launcher has checked these multiples; the compiler is told of them here.
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
    geometry = Geometry(
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
    first_step = chunk * steps_per_chunk
    last_step = tl.minimum(first_step + steps_per_chunk, steps)
    if triangle < triangles:
        partial += chunk.to(tl.int64) * slot_size(channels, EDGE)
        if not ONE_CHAIN:
            clear_slot(
                partial,
                triangle * WIDTH,
                triangle * WIDTH,
                channels,
                PANELS,
                PANELS,
                True,
                PANEL,
                EDGE,
            )
        if tl.program_id(0) == 0:
            begin_update(notes + notes_entries - 3, count)
        notes += triangle
        for first in range(first_step, last_step, steps_per_chain):
            tl.store(notes + first // steps_per_chain * triangles, 0)
        # Other threads may add to an entry than those that cleared it.
        tl.debug_barrier()
        sum_panels(
            rows,
            matrix,
            shift,
            partial,
            notes,
            triangles,
            triangle * WIDTH,
            triangle * WIDTH,
            first_step,
            last_step,
            steps_per_chain,
            geometry,
            PANELS,
            PANELS,
            True,
            STEP,
            PANEL,
            EDGE,
            MODE,
            IS_PLANES,
            LOADS_TWICE,
            ONE_CHAIN,
            HOISTS,
            STAGES,
            IS_INTERPRETED,
        )
        # The repair has a loop of its own, in short steps: it must not take registers from the
        # products.
        tl.debug_barrier()
        broken = 0
        for first in range(first_step, last_step, steps_per_chain):
            broken += tl.load(notes + first // steps_per_chain * triangles)
        if broken > 0:
            # Computed again rather than kept in registers while rows are multiplied.
            note_broken(notes - triangle + notes_entries - 3, count)
            first_step *= STEP // _REPAIR
            last_step *= STEP // _REPAIR
            steps_per_chain *= STEP // _REPAIR
            geometry = Geometry(
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
            for first in tl.range(first_step, last_step, steps_per_chain, num_stages=1):
                note = notes + first // steps_per_chain * triangles
                if tl.load(note) > 0:
                    last = tl.minimum(first + steps_per_chain, last_step)
                    number = mask_rows(
                        rows, is_row_finite, first, last, geometry, _REPAIR, EDGE, False
                    )
                    tl.debug_barrier()  # all threads have read the note
                    tl.store(note, number)
            if LEFT == 0:
                # All channels are here: repair at once. Wider rows wait for block_kernel.
                tl.debug_barrier()
                for block in tl.range(edges * (edges + 1) // 2, num_stages=1):
                    sum_block(
                        rows,
                        shift,
                        None,
                        is_row_finite,
                        notes,
                        triangles,
                        partial,
                        partial + triangle_size(channels, EDGE),
                        block,
                        first_step,
                        last_step,
                        steps_per_chain,
                        geometry,
                        _REPAIR,
                        EDGE,
                        MODE,
                        MODE == SPLIT,
                        False,
                        True,
                        1,
                        IS_INTERPRETED,
                    )
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
            partial += chunk.to(tl.int64) * slot_size(channels, EDGE)
            if not ONE_CHAIN:
                clear_slot(
                    partial,
                    left_channel,
                    right_channel,
                    channels,
                    LEFT,
                    RIGHT,
                    False,
                    PANEL,
                    EDGE,
                )
                tl.debug_barrier()
            sum_panels(
                rows,
                matrix,
                shift,
                partial,
                notes,
                triangles,
                left_channel,
                right_channel,
                first_step,
                last_step,
                steps_per_chain,
                geometry,
                LEFT,
                RIGHT,
                False,
                STEP,
                PANEL,
                EDGE,
                MODE,
                IS_PLANES,
                LOADS_TWICE,
                ONE_CHAIN,
                HOISTS,
                STAGES,
                IS_INTERPRETED,
            )
