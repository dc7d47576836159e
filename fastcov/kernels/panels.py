"""Panels: tiles of rows that stay on chip while all their products are added up, in chains.

Each chain of matrix instructions is added to the program's own slot with rounding. The slot lies in
the workspace, and L2 does the addition: a second set of sums would not fit into the registers
beside the widest tiles, and nobody waits for an addition whose sum is not read back. No other
program touches the slot, so its additions keep their order. A chunk of one chain is stored.
"""

import triton
import triton.language as tl

from fastcov.kernels.tiles import (
    DIRECT,
    SPLIT,
    is_finite,
    keep,
    load_tile,
    locate,
    multiply,
    multiply_parts,
    split,
    triangle_size,
)

ONES = tl.constexpr(16)  # fewest rows of a matrix operand


@triton.jit
def load_panels(
    matrix,
    origin,
    position,
    channel,
    shift,
    geometry,
    COUNT: tl.constexpr,
    STEP: tl.constexpr,
    PANEL: tl.constexpr,
    MODE: tl.constexpr,
    IS_TRANSPOSED: tl.constexpr,
):
    """COUNT neighbouring panels as loaded, shifted where MODE splits them."""
    panels = tl.tuple(())
    for index in tl.static_range(COUNT):
        first = channel + index * PANEL
        if matrix is not None:
            panel = matrix.load([position, first])
        else:
            panel = load_tile(origin, position, first, geometry, None, STEP, PANEL, IS_TRANSPOSED)
        if MODE == SPLIT:
            # Rows outside the image stay zero: the shift must not turn them into rows.
            row = position + tl.arange(0, STEP)
            column = first + tl.arange(0, PANEL)
            used = tl.load(shift + column, mask=column < geometry.channels, other=0.0).to(
                tl.float32
            )
            if IS_TRANSPOSED:
                panel = tl.where((row < geometry.positions)[None, :], panel - used[:, None], 0.0)
            else:
                panel = tl.where((row < geometry.positions)[:, None], panel - used[None, :], 0.0)
        panels += (panel,)
    return panels


@triton.jit
def transposed(panels, COUNT: tl.constexpr):
    """Each panel transposed: no copy, the multiplier reads either order."""
    result = tl.tuple(())
    for index in tl.static_range(COUNT):
        result += (tl.trans(panels[index]),)
    return result


@triton.jit
def parts(panels, COUNT: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    """High, middle and low bfloat16 parts of float32 panels."""
    high = tl.tuple(())
    middle = tl.tuple(())
    low = tl.tuple(())
    for index in tl.static_range(COUNT):
        panel_high, panel_middle, panel_low = split(panels[index], IS_INTERPRETED)
        high += (panel_high,)
        middle += (panel_middle,)
        low += (panel_low,)
    return high, middle, low


@triton.jit
def add_products(
    moments,
    left,  # panels [PANEL, STEP]
    right,  # panels [STEP, PANEL]
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    IS_TRIANGLE: tl.constexpr,
    MODE: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Every product of a left and a right panel, for a triangle those not above its diagonal."""
    result = tl.tuple(())
    for i in tl.static_range(LEFT):
        for j in tl.static_range(RIGHT):
            if IS_TRIANGLE:
                if j <= i:
                    result += (
                        multiply(
                            left[i], right[j], moments[i * (i + 1) // 2 + j], MODE, IS_INTERPRETED
                        ),
                    )
            else:
                result += (
                    multiply(left[i], right[j], moments[i * RIGHT + j], MODE, IS_INTERPRETED),
                )
    return result


@triton.jit
def add_split_products(
    moments,
    left_high,
    left_middle,
    left_low,
    right_high,
    right_middle,
    right_low,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    IS_TRIANGLE: tl.constexpr,
    MODE: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Every such product of panels in three parts."""
    result = tl.tuple(())
    for i in tl.static_range(LEFT):
        for j in tl.static_range(RIGHT):
            if (not IS_TRIANGLE) or j <= i:
                result += (
                    multiply_parts(
                        left_high[i],
                        left_middle[i],
                        left_low[i],
                        right_high[j],
                        right_middle[j],
                        right_low[j],
                        moments[(i * (i + 1) // 2 + j) if IS_TRIANGLE else (i * RIGHT + j)],
                        MODE,
                        IS_INTERPRETED,
                    ),
                )
    return result


@triton.jit
def add_sums(
    sums,
    right,
    COUNT: tl.constexpr,
    STEP: tl.constexpr,
    MODE: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Column sums of each panel, ONES times over. [ONES, PANEL]"""
    result = tl.tuple(())
    for index in tl.static_range(COUNT):
        ones = tl.full([ONES, STEP], 1.0, tl.float32).to(right[index].dtype)
        result += (multiply(ones, right[index], sums[index], MODE, IS_INTERPRETED),)
    return result


@triton.jit
def add_split_sums(
    sums,
    high,
    middle,
    low,
    COUNT: tl.constexpr,
    STEP: tl.constexpr,
    MODE: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Column sums of panels in three parts, the small ones summed apart as in multiply_parts."""
    result = tl.tuple(())
    for index in tl.static_range(COUNT):
        ones = tl.full([ONES, STEP], 1.0, tl.float32).to(high[index].dtype)
        small = tl.zeros(sums[index].shape, tl.float32)
        small = multiply(ones, low[index], small, MODE, IS_INTERPRETED)
        small = multiply(ones, middle[index], small, MODE, IS_INTERPRETED)
        result += (multiply(ones, high[index], sums[index], MODE, IS_INTERPRETED) + small,)
    return result


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """COUNT accumulators."""
    result = tl.tuple(())
    for _ in tl.static_range(COUNT):
        result += (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return result


@triton.jit
def add_step(
    moments,
    sums,
    rows,
    matrix,
    shift,
    left_channel,
    right_channel,
    step,
    geometry,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    IS_TRIANGLE: tl.constexpr,
    STEP: tl.constexpr,
    PANEL: tl.constexpr,
    MODE: tl.constexpr,
    IS_PLANES: tl.constexpr,
    LOADS_TWICE: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Addition of one step's moments of left with right panels; column sums in a triangle."""
    origin, _image, position = locate(rows, step, geometry, STEP, False)
    if LOADS_TWICE:
        # Where one buffer cannot serve as left and right operand (sm_80's pipeline), the
        # second read comes from L2.
        right = load_panels(
            matrix,
            origin,
            position,
            right_channel,
            shift,
            geometry,
            RIGHT,
            STEP,
            PANEL,
            MODE,
            False,
        )
        left = load_panels(
            matrix,
            origin,
            position,
            left_channel,
            shift,
            geometry,
            LEFT,
            STEP,
            PANEL,
            MODE,
            True,
        )
    else:
        panels = load_panels(
            matrix,
            origin,
            position,
            right_channel,
            shift,
            geometry,
            RIGHT,
            STEP,
            PANEL,
            MODE,
            IS_PLANES,
        )
        if IS_TRIANGLE:
            others = panels
        else:
            others = load_panels(
                matrix,
                origin,
                position,
                left_channel,
                shift,
                geometry,
                LEFT,
                STEP,
                PANEL,
                MODE,
                IS_PLANES,
            )
        if MODE == DIRECT:
            if IS_PLANES:
                left = others
                right = transposed(panels, RIGHT)
            else:
                left = transposed(others, LEFT)
                right = panels
    if MODE == DIRECT:
        moments = add_products(moments, left, right, LEFT, RIGHT, IS_TRIANGLE, MODE, IS_INTERPRETED)
        if IS_TRIANGLE:
            sums = add_sums(sums, right, LEFT, STEP, MODE, IS_INTERPRETED)
    else:
        right_high, right_middle, right_low = parts(panels, RIGHT, IS_INTERPRETED)
        left_high, left_middle, left_low = parts(others, LEFT, IS_INTERPRETED)
        if IS_PLANES:
            right_high = transposed(right_high, RIGHT)
            right_middle = transposed(right_middle, RIGHT)
            right_low = transposed(right_low, RIGHT)
        else:
            left_high = transposed(left_high, LEFT)
            left_middle = transposed(left_middle, LEFT)
            left_low = transposed(left_low, LEFT)
        moments = add_split_products(
            moments,
            left_high,
            left_middle,
            left_low,
            right_high,
            right_middle,
            right_low,
            LEFT,
            RIGHT,
            IS_TRIANGLE,
            MODE,
            IS_INTERPRETED,
        )
        if IS_TRIANGLE:
            sums = add_split_sums(
                sums, right_high, right_middle, right_low, LEFT, STEP, MODE, IS_INTERPRETED
            )
    return moments, sums


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
    notes,  # notes of the triangle, one every `flags` entries
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
        # The address depends on the chain, so that the compiler holds it in no register meanwhile.
        apart = tl.minimum(first, 0) * PANEL
        keep_chain(
            partial,
            notes + first // steps_per_chain * flags,
            moments,
            sums,
            left_channel + apart,
            right_channel + apart,
            geometry.channels,
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
    """Accumulators stored in, or added to, one chunk's slot; non-finite columns are noted."""
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
            # The ONES rows of the operand are all the same.
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
    """Accumulators stored in, or added to, one chunk's packed triangle of blocks."""
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
