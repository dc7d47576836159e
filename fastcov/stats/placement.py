"""Placement of rows: which calls of a layer are added at once, and which wait, where.

Layers place their rows by these answers, and :func:`fastcov.estimate` counts memory by them.
"""

from __future__ import annotations

from typing import NamedTuple

from fastcov.stats.buffering import SKETCH_ROWS, buffer_rows, direct_rows


class Placement(NamedTuple):
    """Facts about a layer that decide where the rows of its calls go.

    Attributes:
        channels: Length of a row.
        is_host: True for rows on a CPU: see :class:`fastcov.ops.backend.Service`.
        is_sketched: True if rows are projected to fewer channels.
        is_by_image: True if rows weigh by their image, which the end of a step tells.
        decays: True if rows of earlier steps weigh less.
    """

    channels: int
    is_host: bool
    is_sketched: bool = False
    is_by_image: bool = False
    decays: bool = False

    @property
    def capacity(self) -> int:
        """Rows that a buffer on the host's counters has room for."""
        return SKETCH_ROWS if self.is_sketched else buffer_rows(self.channels, self.is_host)

    @property
    def direct(self) -> int:
        """Rows of one call from which on they are added at once, where every row is read."""
        return SKETCH_ROWS if self.is_sketched else direct_rows(self.channels, self.is_host)

    def waits(self, due: float, is_whole: bool) -> bool:
        """True if the rows of a call wait in a buffer.

        Args:
            due: Rows that are read.
            is_whole: True if these are all rows of the call.
        """
        return due < self.direct or (not is_whole and due <= self.capacity)

    def rows_on_device(self, offered: int, calls: int, fraction: float) -> float | None:
        """Most rows a step that wait in a buffer with counters on a GPU; None where none may.

        Args:
            offered: Rows that a step brings.
            calls: Calls that bring them.
            fraction: Share of the rows that is read.
        """
        if self.is_by_image or self.is_sketched:
            return None
        if fraction < 1:
            return fraction * offered
        most_waiting = calls * (self.direct - 1)
        if self.decays and offered > most_waiting:
            return None  # some calls are added at once, with a decay that only the host knows
        return min(offered, most_waiting)
