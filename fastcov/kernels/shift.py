"""The shift of a new float32 state: the mean of the first finite rows, found on the device."""

import triton.language as tl

from fastcov.kernels.layout import Geometry
from fastcov.kernels.tiles import is_finite, kernel, load_tile, locate


@kernel()
def shift_kernel(
    rows,
    shift,
    count,
    steps: tl.int32,
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
    SHIFT_ROWS: tl.constexpr,
    STEP: tl.constexpr,
    EDGE: tl.constexpr,
    IS_DEEP: tl.constexpr,
):
    """EDGE channels a program; does nothing once the state has seen a row.

    Rows are searched in order until SHIFT_ROWS finite ones are found: normally the first step.
    """
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
    if tl.load(count) == 0:
        first_channel = tl.program_id(0) * EDGE
        row = tl.arange(0, STEP)
        total = tl.zeros([EDGE], tl.float64)
        found = 0
        step = 0
        while (step < steps) & (found < SHIFT_ROWS):
            origin, _image, position = locate(rows, step, geometry, STEP, IS_DEEP)
            broken = tl.zeros([STEP], tl.int32)
            channel = 0
            # Where every row is broken already, the other channels need not be read.
            while (channel < channels) & (tl.min(broken) == 0):
                tile = load_tile(origin, position, channel, geometry, None, STEP, EDGE, False)
                broken = tl.maximum(broken, tl.max(1 - is_finite(tile).to(tl.int32), axis=1))
                channel += EDGE
            usable = ((broken == 0) & (position + row < positions)).to(tl.int32)
            is_used = (usable != 0) & (found + tl.cumsum(usable, 0) <= SHIFT_ROWS)
            tile = load_tile(origin, position, first_channel, geometry, is_used, STEP, EDGE, False)
            total += tl.sum(tile.to(tl.float64), axis=0)
            found += tl.sum(is_used.to(tl.int32))
            step += 1
        # Finite float32 values have a mean that float32 can hold. Without any it is 0.
        mean = (total / tl.maximum(found, 1)).to(tl.float32).to(tl.float64)
        column = first_channel + tl.arange(0, EDGE)
        tl.store(shift + column, mean, mask=column < channels)
