"""Sizes that decide whether rows are added at once or wait in a buffer, and memory of layers.

Where a call brings few rows, reading and writing the float64 state costs more than the gram itself:
such rows wait until they are many. The limit depends on the machine.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from fastcov.ops import triangle

BUFFER_ROWS_PER_CHANNEL = 2
"""Rows per channel gathered before a state is updated once: with fewer, state traffic dominates."""

SKETCH_ROWS = 64
"""Rows of a sketched layer that are projected together. More would save little time, and their
buffer is larger than the state: 3.5 MiB for 14,336 channels of float32."""

MOST_DEVICE_ROWS = 4096
"""Rows a step up to which a GPU's narrow layers are sampled into a buffer. One program adds all of
them to a block: 128 turns of its loop, as many as the 2C rows of 2048 channels take."""

# More rows than a step has brought: the heads of a detector see another number in every step.
_HEADROOM = 1.25

# Buffers of a CPU. An update passes once over the state: of N rows each pays about 25 / N of the
# time of its products, whatever the width (benchmarks/results/buffers.md). With so much memory for
# all buffers of a model, rows in proportion to the channels cost the least in sum. In narrow layers
# a call costs as much as the products of a few rows.
_HOST_BUFFER_PER_CHANNEL = 1 / 6
_LEAST_HOST_ROWS = 192

# Rows of one call, per channel, from which on a CPU's caches hide the state traffic.
_HOST_ROWS_PER_CHANNEL = 1 / 3


def buffer_rows(channels: int, is_host: bool = False) -> int:
    """Rows that a buffer holds before it is emptied.

    Args:
        channels: Length of a row.
        is_host: True for a CPU, whose buffers are smaller.

    Example:
        >>> buffer_rows(64, is_host=True), buffer_rows(2048, is_host=True), buffer_rows(2048)
        (128, 342, 4096)
    """
    rows = BUFFER_ROWS_PER_CHANNEL * channels
    if not is_host:
        return rows
    return min(rows, max(_LEAST_HOST_ROWS, math.ceil(_HOST_BUFFER_PER_CHANNEL * channels)))


def direct_rows(channels: int, is_host: bool) -> int:
    """Rows of one call from which on they are added at once, where every row is read.

    Args:
        channels: Length of a row.
        is_host: True for a CPU: see :class:`fastcov.ops.backend.Service`.

    Example:
        >>> direct_rows(300, is_host=True), direct_rows(300, is_host=False)
        (100, 600)
    """
    if not is_host:
        return buffer_rows(channels)
    # Rows that fill a buffer on their own gain nothing by a copy into it.
    return min(math.ceil(_HOST_ROWS_PER_CHANNEL * channels), buffer_rows(channels, is_host=True))


def device_buffer_limit(channels: int) -> int:
    """Largest number of rows that one step may bring to a buffer with counters on the device."""
    return max(buffer_rows(channels), MOST_DEVICE_ROWS)


def device_buffer_rows(channels: int, rows: float, calls: int) -> tuple[int, int] | None:
    """Sizes of a buffer with counters on the device.

    Args:
        channels: Length of a row.
        rows: Rows that a step brings to the buffer.
        calls: Calls that bring them: each may round up.

    Returns:
        Rows from which the buffer counts as full, and the largest number of a step, a quarter more
        than this one brings; the capacity is their sum. None where the step brings more rows than
        :func:`device_buffer_limit`.

    Example:
        >>> device_buffer_rows(64, 90.5, calls=1), device_buffer_rows(64, 400, calls=2)
        ((128, 115), (1, 502))
    """
    threshold, limit = buffer_rows(channels), device_buffer_limit(channels)
    if math.ceil(rows) + calls > limit:
        return None
    most_rows = min(math.ceil(_HEADROOM * rows) + calls, limit)
    # A buffer that one step fills is emptied in every step: no room for two of them.
    return threshold if most_rows <= threshold else 1, most_rows


def state_bytes(channels: int) -> int:
    """Memory of a state of so many channels."""
    return 8 * (triangle.values_of(channels) + 2 * channels + 5)


def layer_bytes(channels: int, sketch: int | None, row_bytes: int, is_host: bool) -> int:
    """Memory of a layer: its state, and its buffer of rows, at most.

    Args:
        channels: Length of a row.
        sketch: Channels of the sketch; wider rows are projected. None keeps all.
        row_bytes: Bytes of one number of a row.
        is_host: True for a CPU. A GPU's counters need room for the rows of one more step.
    """
    if sketch is not None and channels > sketch:
        return state_bytes(sketch + 1) + SKETCH_ROWS * channels * row_bytes
    rows = buffer_rows(channels, is_host)
    rows += 0 if is_host else device_buffer_limit(channels)
    return state_bytes(channels) + rows * (channels * row_bytes + 4 * (not is_host))


def projection_bytes(channels: Sequence[int], sketch: int) -> int:
    """Memory of the signs that project rows: one byte each, shared by layers of one width."""
    return sum(width * sketch for width in {width for width in channels if width > sketch})


_LEAST_SKETCH = 16


def sketch_for(
    channels: Sequence[int | None],
    memory: int,
    row_bytes: int,
    is_host: bool,
    whole: Sequence[int] = (),
) -> int | None:
    """Largest sketch with which layers fit into an amount of memory.

    One number for all layers: narrower ones keep all channels.

    Args:
        channels: Widths of the layers; None where it is not known yet: taken for the widest.
        memory: Bytes for states, buffers and signs.
        row_bytes: Bytes of one number of a row.
        is_host: True for a CPU.
        whole: Widths of layers that keep all channels whatever they take.

    Returns:
        Channels of the sketch, or None where all layers fit whole.

    Raises:
        ValueError: If not even sketches of 16 channels fit.

    Example:
        >>> sketch_for([64, 4096, 4096], memory=64 << 20, row_bytes=4, is_host=True)
        2559
    """
    widest = max((width for width in channels if width is not None), default=1)
    widths = [widest if width is None else width for width in channels]
    kept = sum(layer_bytes(width, None, row_bytes, is_host) for width in whole)

    def needed(sketch: int) -> int:
        layers = sum(layer_bytes(width, sketch, row_bytes, is_host) for width in widths)
        return kept + layers + projection_bytes(widths, sketch)

    if needed(widest) <= memory:
        return None
    if needed(_LEAST_SKETCH) > memory:
        raise ValueError(
            f"memory={memory} bytes is too little: {len(widths)} layers of up to {widest} channels "
            f"need {needed(_LEAST_SKETCH)} sketched to {_LEAST_SKETCH} channels each"
            + (f", {kept} of it for pairs, which are not sketched" if kept else "")
            + "; give more, or watch fewer layers (include=)"
        )
    low, high = _LEAST_SKETCH, widest
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if needed(middle) <= memory else (low, middle)
    return low
