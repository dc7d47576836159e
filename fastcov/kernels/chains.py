"""Chains of matrix instructions, each added to the program's own slot with rounding.

The slot lies in the workspace, and L2 does the addition: a second set of sums would not fit into
the registers beside the widest tiles, and nobody waits for what is not read back. No other program
touches the slot, so its additions keep their order. A chunk of one chain is stored.
"""

import triton
import triton.language as tl

from fastcov.kernels.panels import ONES, add_step, zeros
from fastcov.kernels.tiles import is_finite, keep, triangle_size


@triton.jit
def no_sums(
    LEFT: tl.constexpr, RIGHT: tl.constexpr, IS_TRIANGLE: tl.constexpr, PANEL: tl.constexpr
):
    """Accumulators of a chain before its first step."""
    if IS_TRIANGLE:
        moments = zeros(LEFT * (LEFT + 1) // 2, PANEL, PANEL)
        sums = zeros(LEFT, ONES, PANEL)
    else:
        moments = zeros(LEFT * RIGHT, PANEL, PANEL)
        sums = ()
    return moments, sums


@triton.jit
def sum_panels(
    rows,
    matrix,
    shift,
    partial,
    notes,  # of the triangle, one every `flags`
    flags,
    left_channel,
    right_channel,
    first_step,
    last_step,
    steps_per_chain,
    geometry,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    IS_TRIANGLE: tl.constexpr,
    STEP: tl.constexpr,
    PANEL: tl.constexpr,
    EDGE: tl.constexpr,
    MODE: tl.constexpr,
    IS_PLANES: tl.constexpr,
    LOADS_TWICE: tl.constexpr,
    ONE_CHAIN: tl.constexpr,
    HOISTS: tl.constexpr,
    STAGES: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Moments of left with right panels, and for a triangle the column sums, into a slot."""
    # A loop even around a single chain: without one, ptxas makes wgmma instructions wait for each
    # other (C7515).
    for first in tl.range(
        first_step, last_step, steps_per_chain, num_stages=1, disable_licm=not HOISTS
    ):
        moments, sums = no_sums(LEFT, RIGHT, IS_TRIANGLE, PANEL)
        for step in tl.range(
            first, tl.minimum(first + steps_per_chain, last_step), num_stages=STAGES
        ):
            moments, sums = add_step(
                moments,
                sums,
                rows,
                matrix,
                shift,
                left_channel,
                right_channel,
                step,
                geometry,
                LEFT,
                RIGHT,
                IS_TRIANGLE,
                STEP,
                PANEL,
                MODE,
                IS_PLANES,
                LOADS_TWICE,
                IS_INTERPRETED,
            )
        # Depends on the chain, which keeps the addresses out of registers meanwhile.
        apart = tl.minimum(first, 0) * PANEL
        keep_chain(
            partial,
            notes + first // steps_per_chain * flags,
            moments,
            sums,
            left_channel + apart,
            right_channel + apart,
            geometry[1],
            LEFT,
            RIGHT,
            IS_TRIANGLE,
            PANEL,
            EDGE,
            not ONE_CHAIN,
        )


@triton.jit
def keep_chain(
    partial,
    note,
    moments,
    sums,
    left_channel,
    right_channel,
    channels,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    IS_TRIANGLE: tl.constexpr,
    PANEL: tl.constexpr,
    EDGE: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Accumulators into one chunk's slot; notes columns that are not finite."""
    edges = tl.cdiv(channels, EDGE)
    keep_panels(
        partial,
        moments,
        left_channel,
        right_channel,
        edges,
        LEFT,
        RIGHT,
        IS_TRIANGLE,
        PANEL,
        EDGE,
        ADDS,
    )
    if IS_TRIANGLE:
        column_sums = partial + triangle_size(channels, EDGE)
        for index in tl.static_range(RIGHT):
            # All ONES rows are the same.
            total = tl.max(sums[index], axis=0)
            column = right_channel + index * PANEL + tl.arange(0, PANEL)
            keep(column_sums + column, total, column < edges * EDGE, ADDS)
            tl.store(note + tl.zeros([PANEL], tl.int32), 1, mask=is_finite(total) == 0)


@triton.jit
def clear_slot(
    partial,
    left_channel,
    right_channel,
    channels,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    IS_TRIANGLE: tl.constexpr,
    PANEL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Zeros where keep_chain will add."""
    edges = tl.cdiv(channels, EDGE)
    keep_panels(
        partial,
        None,
        left_channel,
        right_channel,
        edges,
        LEFT,
        RIGHT,
        IS_TRIANGLE,
        PANEL,
        EDGE,
        False,
    )
    if IS_TRIANGLE:
        column_sums = partial + triangle_size(channels, EDGE)
        for index in tl.static_range(RIGHT):
            column = right_channel + index * PANEL + tl.arange(0, PANEL)
            nothing = tl.zeros([PANEL], tl.float32)
            tl.store(column_sums + column, nothing, mask=column < edges * EDGE)


@triton.jit
def keep_panels(
    partial,
    moments,  # or None: zeros
    left_channel,
    right_channel,
    edges,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    IS_TRIANGLE: tl.constexpr,
    PANEL: tl.constexpr,
    EDGE: tl.constexpr,
    ADDS: tl.constexpr,
):
    """Accumulators into one chunk's packed triangle of blocks."""
    # Blocks first, then places inside one that are constant but for the thread: few addresses.
    place = tl.arange(0, PANEL) % EDGE
    block = tl.arange(0, PANEL) // EDGE
    inside = place[:, None] * EDGE + place[None, :]
    for i in tl.static_range(LEFT):
        for j in tl.static_range(RIGHT):
            if (not IS_TRIANGLE) or j <= i:
                block_row = ((left_channel + i * PANEL) // EDGE + block)[:, None]
                block_column = ((right_channel + j * PANEL) // EDGE + block)[None, :]
                is_kept = (block_row >= block_column) & (block_row < edges)
                is_kept = tl.broadcast_to(is_kept, (PANEL, PANEL))
                number = block_row * (block_row + 1) // 2 + block_column
                address = partial + number * (EDGE * EDGE) + inside
                if moments is None:
                    keep(address, tl.zeros([PANEL, PANEL], tl.float32), is_kept, ADDS)
                else:
                    values = moments[(i * (i + 1) // 2 + j) if IS_TRIANGLE else (i * RIGHT + j)]
                    keep(address, values, is_kept, ADDS)
