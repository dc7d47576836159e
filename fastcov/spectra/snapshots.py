"""Snapshots on their way to a history: taken now, appended when their spectra are there."""

from __future__ import annotations

import time
import warnings
import weakref
from collections import deque
from typing import Any, NamedTuple

from fastcov.spectra.history import History, Snapshot
from fastcov.spectra.pending import PendingSpectra

_MOST_PENDING = 2  # each holds a copy of all states on the GPU until its spectra are there


class _Pending(NamedTuple):
    step: int
    wall_s: float
    spectra: PendingSpectra


class SnapshotQueue:
    """Snapshots in the order in which they were taken; none is lost when the process ends.

    Args:
        history: Where they go.
        owner: At its end, or that of the process, what is pending is appended.
    """

    def __init__(self, history: History, owner: object) -> None:
        self.history = history
        self._pending: deque[_Pending] = deque()
        weakref.finalize(owner, self.deliver)

    def add(self, step: int, spectra: PendingSpectra) -> None:
        """Takes a snapshot; it is in the history at once where its spectra are ready."""
        self._pending.append(_Pending(step, time.time(), spectra))
        self.deliver(most_pending=_MOST_PENDING)

    def deliver(self, most_pending: int = 0) -> None:
        """Appends what is ready, and waits for the oldest while more than that many are pending."""
        while self._pending and (
            len(self._pending) > most_pending or self._pending[0].spectra.is_ready()
        ):
            pending = self._pending.popleft()
            try:
                snapshot = Snapshot(pending.step, pending.wall_s, pending.spectra.get())
                self.history.append(snapshot)
            except Exception as error:
                # A full disk must not end the training that happens to be at some later step.
                what = f"{type(error).__name__}: {error}"
                warnings.warn(f"no snapshot at step {pending.step}, {what}", stacklevel=2)

    def poll(self) -> None:
        """Appends what is ready; waits for nothing."""
        self.deliver(most_pending=len(self._pending))

    def __getstate__(self) -> dict[str, Any]:
        self.deliver()
        return self.__dict__
