"""Second moments of a chunk of rows, read once: the fast path.

A program holds the whole lower triangle of PANELS x PANEL channels, or a rectangle below such
triangles, over at most 4096 rows. It trusts the rows to be finite: a non-finite value is told
afterwards by its column's sum, which costs nothing per row, and the chunk is then done again
through a mask. Column sums come from one more product, with a 16-row operand of ones in registers:
no other way reads the panel without a reduction across warps.
"""

import triton
import triton.language as tl

from fastcov.kernels.block import mask_rows, sum_block
from fastcov.kernels.tiles import (
    DIRECT,
    SPLIT,
    UNSPECIALIZED,
    is_finite,
    load_tile,
    locate,
    multiply,
    packed_offset,
    slot_size,
    split,
    triangle_row,
    triangle_size,
)

_ONES = tl.constexpr(16)  # fewest rows of a matrix operand
_REPAIR = tl.constexpr(16)  # rows of one step of the repair


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
    """COUNT neighbouring panels, shifted where MODE splits them, as loaded: see operands()."""
    panels = ()
    for index in tl.static_range(COUNT):
        first = channel + index * PANEL
        if matrix is not None:
            panel = matrix.load([position, first])
        else:
            panel = load_tile(
                origin, position, first, geometry, None, STEP, PANEL, IS_TRANSPOSED
            )
        if MODE == SPLIT:
            # Rows outside the image stay zero: the shift must not turn them into rows.
            row = position + tl.arange(0, STEP)
            column = first + tl.arange(0, PANEL)
            used = tl.load(shift + column, mask=column < geometry[1], other=0.0).to(tl.float32)
            if IS_TRANSPOSED:
                panel = tl.where((row < geometry[2])[None, :], panel - used[:, None], 0.0)
            else:
                panel = tl.where((row < geometry[2])[:, None], panel - used[None, :], 0.0)
        panels = panels + (panel,)
    return panels


@triton.jit
def transposed(panels, COUNT: tl.constexpr):
    """Each panel transposed: no copy, the multiplier reads either order."""
    result = ()
    for index in tl.static_range(COUNT):
        result = result + (tl.trans(panels[index]),)
    return result


@triton.jit
def parts(panels, COUNT: tl.constexpr, IS_INTERPRETED: tl.constexpr):
    """High and low bfloat16 parts of float32 panels."""
    high = ()
    low = ()
    for index in tl.static_range(COUNT):
        panel_high, panel_low = split(panels[index], IS_INTERPRETED)
        high = high + (panel_high,)
        low = low + (panel_low,)
    return high, low


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
    result = ()
    for i in tl.static_range(LEFT):
        for j in tl.static_range(RIGHT):
            if IS_TRIANGLE:
                if j <= i:
                    result = result + (
                        multiply(
                            left[i], right[j], moments[i * (i + 1) // 2 + j], MODE, IS_INTERPRETED
                        ),
                    )
            else:
                result = result + (
                    multiply(left[i], right[j], moments[i * RIGHT + j], MODE, IS_INTERPRETED),
                )
    return result


@triton.jit
def add_sums(
    sums, right, COUNT: tl.constexpr, STEP: tl.constexpr, MODE: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Column sums of each panel, _ONES times over. [_ONES, PANEL]"""
    result = ()
    for index in tl.static_range(COUNT):
        ones = tl.full([_ONES, STEP], 1.0, tl.float32).to(right[index].dtype)
        result = result + (multiply(ones, right[index], sums[index], MODE, IS_INTERPRETED),)
    return result


@triton.jit
def zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """COUNT accumulators."""
    result = ()
    for _ in tl.static_range(COUNT):
        result = result + (tl.zeros([ROWS, COLUMNS], tl.float32),)
    return result


@triton.jit
def sum_panels(
    rows,
    matrix,
    shift,
    left_channel,
    right_channel,
    first_step,
    last_step,
    geometry,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    IS_TRIANGLE: tl.constexpr,
    STEP: tl.constexpr,
    PANEL: tl.constexpr,
    MODE: tl.constexpr,
    IS_PLANES: tl.constexpr,
    LOADS_TWICE: tl.constexpr,
    STAGES: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Moments of left with right panels, and for a triangle the column sums."""
    if IS_TRIANGLE:
        moments = zeros(LEFT * (LEFT + 1) // 2, PANEL, PANEL)
        sums = zeros(LEFT, _ONES, PANEL)
    else:
        moments = zeros(LEFT * RIGHT, PANEL, PANEL)
        sums = ()
    for step in tl.range(first_step, last_step, num_stages=STAGES):
        origin, image, position = locate(rows, step, geometry, STEP, False)
        if LOADS_TWICE:
            # Where one buffer cannot serve as left and right operand (sm_80's pipeline), the
            # second read comes from L2.
            right = load_panels(
                matrix, origin, position, right_channel, shift, geometry, RIGHT, STEP, PANEL, MODE,
                False,
            )
            left = load_panels(
                matrix, origin, position, left_channel, shift, geometry, LEFT, STEP, PANEL, MODE,
                True,
            )
        else:
            panels = load_panels(
                matrix, origin, position, right_channel, shift, geometry, RIGHT, STEP, PANEL, MODE,
                IS_PLANES,
            )
            if IS_TRIANGLE:
                others = panels
            else:
                others = load_panels(
                    matrix, origin, position, left_channel, shift, geometry, LEFT, STEP, PANEL,
                    MODE, IS_PLANES,
                )
            if MODE == DIRECT:
                if IS_PLANES:
                    left = others
                    right = transposed(panels, RIGHT)
                else:
                    left = transposed(others, LEFT)
                    right = panels
        if MODE == DIRECT:
            moments = add_products(
                moments, left, right, LEFT, RIGHT, IS_TRIANGLE, MODE, IS_INTERPRETED
            )
            if IS_TRIANGLE:
                sums = add_sums(sums, right, LEFT, STEP, MODE, IS_INTERPRETED)
        else:
            right_high, right_low = parts(panels, RIGHT, IS_INTERPRETED)
            left_high, left_low = parts(others, LEFT, IS_INTERPRETED)
            if IS_PLANES:
                right_high = transposed(right_high, RIGHT)
                right_low = transposed(right_low, RIGHT)
            else:
                left_high = transposed(left_high, LEFT)
                left_low = transposed(left_low, LEFT)
            moments = add_products(
                moments, left_low, right_high, LEFT, RIGHT, IS_TRIANGLE, MODE, IS_INTERPRETED
            )
            moments = add_products(
                moments, left_high, right_low, LEFT, RIGHT, IS_TRIANGLE, MODE, IS_INTERPRETED
            )
            moments = add_products(
                moments, left_high, right_high, LEFT, RIGHT, IS_TRIANGLE, MODE, IS_INTERPRETED
            )
            if IS_TRIANGLE:
                sums = add_sums(sums, right_low, LEFT, STEP, MODE, IS_INTERPRETED)
                sums = add_sums(sums, right_high, LEFT, STEP, MODE, IS_INTERPRETED)
    return moments, sums


@triton.jit
def store_panels(
    partial,
    moments,
    left_channel,
    right_channel,
    edges,
    LEFT: tl.constexpr,
    RIGHT: tl.constexpr,
    IS_TRIANGLE: tl.constexpr,
    PANEL: tl.constexpr,
    EDGE: tl.constexpr,
):
    """Writes accumulators into one chunk's packed triangle of blocks."""
    panel = tl.arange(0, PANEL)
    for i in tl.static_range(LEFT):
        for j in tl.static_range(RIGHT):
            row = left_channel + i * PANEL + panel[:, None]
            column = right_channel + j * PANEL + panel[None, :]
            is_kept = (row // EDGE >= column // EDGE) & (row // EDGE < edges)
            offset = packed_offset(row, column, EDGE)
            if IS_TRIANGLE:
                if j <= i:
                    tl.store(partial + offset, moments[i * (i + 1) // 2 + j], mask=is_kept)
            else:
                tl.store(partial + offset, moments[i * RIGHT + j], mask=is_kept)


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
            rows, matrix, shift, triangle * WIDTH, triangle * WIDTH, first_step, last_step,
            geometry, PANELS, PANELS, True, STEP, PANEL, MODE, IS_PLANES, LOADS_TWICE, STAGES,
            IS_INTERPRETED,
        )
        store_panels(
            partial, moments, triangle * WIDTH, triangle * WIDTH, edges, PANELS, PANELS, True,
            PANEL, EDGE,
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
                        rows, shift, None, is_row_finite, partial, column_sums, block, first_step,
                        last_step, geometry, _REPAIR, EDGE, MODE, MODE == SPLIT, False, 1,
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
                rows, matrix, shift, left_channel, right_channel, first_step, last_step, geometry,
                LEFT, RIGHT, False, STEP, PANEL, MODE, IS_PLANES, LOADS_TWICE, STAGES,
                IS_INTERPRETED,
            )
            store_panels(
                partial, moments, left_channel, right_channel, edges, LEFT, RIGHT, False, PANEL,
                EDGE,
            )
