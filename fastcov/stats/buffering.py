"""Sizes that decide whether rows are added at once or wait in a buffer, and the buffer's size.

Where a call brings few rows, reading and writing the float64 state costs more than the gram itself:
such rows wait until they are many. The limit depends on the machine.
"""

from __future__ import annotations

import math

BUFFER_ROWS_PER_CHANNEL = 2
"""Rows per channel gathered before a state is updated once: with fewer, state traffic dominates."""

MOST_DEVICE_ROWS = 4096
"""Rows a step up to which a GPU's narrow layers are sampled into a buffer. One program adds all of
them to a block: 128 turns of its loop, as many as the 2C rows of 2048 channels take."""

# More rows than a step has brought: the heads of a detector see another number in every step.
_HEADROOM = 1.25

# Rows of one call, per channel, from which on a CPU's caches hide the state traffic.
_HOST_ROWS_PER_CHANNEL = 1 / 3


def buffer_rows(channels: int) -> int:
    """Rows that a buffer with counters on the host holds before it is emptied."""
    return BUFFER_ROWS_PER_CHANNEL * channels


def direct_rows(channels: int, is_host: bool) -> int:
    """Rows of one call from which on they are added at once, where every row is read.

    Args:
        channels: Length of a row.
        is_host: True for a CPU: see :class:`fastcov.ops.backend.Service`.

    Example:
        >>> direct_rows(1536, is_host=True), direct_rows(1536, is_host=False)
        (512, 3072)
    """
    per_channel = _HOST_ROWS_PER_CHANNEL if is_host else BUFFER_ROWS_PER_CHANNEL
    return math.ceil(per_channel * channels)


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
