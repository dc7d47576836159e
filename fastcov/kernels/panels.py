"""Panels: tiles of rows that stay on chip while all their products are added up."""

import triton
import triton.language as tl

from fastcov.kernels.tiles import (
    DIRECT,
    SPLIT,
    load_tile,
    locate,
    multiply,
    multiply_parts,
    split,
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
    """COUNT neighbouring panels, shifted where MODE splits them, as loaded: see operands()."""
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
            used = tl.load(shift + column, mask=column < geometry[1], other=0.0).to(tl.float32)
            if IS_TRANSPOSED:
                panel = tl.where((row < geometry[2])[None, :], panel - used[:, None], 0.0)
            else:
                panel = tl.where((row < geometry[2])[:, None], panel - used[None, :], 0.0)
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
    """The same of panels in three parts."""
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
    """The same of panels in three parts, the small ones summed apart as in multiply_parts."""
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
    """Adds one step's moments of left with right panels, and for a triangle its column sums."""
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
