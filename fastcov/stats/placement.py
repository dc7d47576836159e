"""Placement of rows: which calls of a layer are added at once, and which wait, where.

Layers place their rows by these answers, and :func:`fastcov.estimate` counts memory by them.
"""

from __future__ import annotations

from fastcov.stats.buffering import SKETCH_ROWS, buffer_rows, direct_rows


class Placement:
    """Destination of the rows of a layer's calls.

    Args:
        channels: Length of a row.
        is_host: True for rows on a CPU: see :class:`fastcov.ops.backend.Service`.
        is_sketched: True if rows are projected to fewer channels.
        is_by_image: True if rows weigh by their image, which the end of a step tells.
        decays: True if rows of earlier steps weigh less.

    Attributes:
        capacity: Rows that a buffer on the host's counters has room for.
        direct: Rows of one call from which on they are added at once, where every row is read.
    """

    def __init__(
        self,
        channels: int,
        is_host: bool,
        *,
        is_sketched: bool = False,
        is_by_image: bool = False,
        decays: bool = False,
    ) -> None:
        self.capacity = SKETCH_ROWS if is_sketched else buffer_rows(channels, is_host)
        self.direct = SKETCH_ROWS if is_sketched else direct_rows(channels, is_host)
        self._is_for_device = not (is_sketched or is_by_image)
        self._decays = decays

    def waits(self, due: float, is_whole: bool) -> bool:
        """True if the rows that are due of a call, all or some, wait in a buffer."""
        return due < self.direct or (not is_whole and due <= self.capacity)

    def rows_on_device(self, offered: int, calls: int, fraction: float) -> float | None:
        """Most rows a step that wait in a buffer with counters on a GPU; None for none."""
        if not self._is_for_device:
            return None
        if fraction < 1:
            return fraction * offered
        most_waiting = calls * (self.direct - 1)
        if self._decays and offered > most_waiting:
            return None  # some calls are added at once, with a decay that only the host knows
        return min(offered, most_waiting)
