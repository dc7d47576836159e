"""Run: one training under a tracker, in the training loop of another framework.

The spectra of wide layers take seconds, so the training's thread only takes marks, copies of the
statistics. A worker thread of the lowest priority computes the spectra of the marks. At the end of
a later batch the finished ones are delivered: summaries to the loggers, snapshots to the history.

A run ends with its training (:meth:`TrackedRun.end`), or is left when an exception ends the
training (:meth:`TrackedRun.leave`). A new run leaves an earlier one of the same callback.
"""

from __future__ import annotations

import contextlib
import os
import sys
import threading
import time
import warnings
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import nn

import fastcov
from fastcov.show.status import LayerStatus, Summary
from fastcov.spectra.history import History
from fastcov.spectra.pending import PendingSpectra
from fastcov.spectra.snapshot import Snapshot
from fastcov.stats.ranks import rank_and_ranks

ROOM_BYTES = 64 * 2**20
"""Bytes of waiting marks from which on no further mark is taken; one may wait whatever its size."""

_LOWEST_PRIORITY = 19


class _Result(NamedTuple):
    """Spectra of a mark by layer, and the summary made of them."""

    spectra: dict[str, fastcov.Spectrum]
    summary: Summary


@dataclass(frozen=True, eq=False)
class _Mark:
    """Copy of all statistics at one step.

    Attributes:
        step: Optimizer steps, the label for loggers.
        tracked_step: Steps of the tracker, the label in the history.
        wall_s: Time of the copy, in seconds since 1970.
        layers: Layers of ``Tracker.state_dict()`` by name of the tap; shared taps have one object.
        copied: Events that end the copies, by GPU.
        in_float64: True if eigenvalues are computed in float64 on a GPU too.
        is_logged: True if the summary goes to the loggers.
        is_stored: True if the spectra go to the history.
    """

    step: int
    tracked_step: int
    wall_s: float
    layers: dict[str, dict[str, Any]]
    copied: dict[torch.device, torch.cuda.Event]
    in_float64: bool
    is_logged: bool
    is_stored: bool

    @property
    def bytes(self) -> int:
        unique = {id(layer): layer["state"] for layer in self.layers.values()}
        return sum(saved["moment"].nbytes for saved in unique.values() if saved is not None)


def _mark(tracker: fastcov.Tracker, step: int, is_logged: bool, is_stored: bool) -> _Mark:
    saved = tracker.state_dict()
    layers = {name: saved["layers"][saved["shared"].get(name, name)] for name in tracker.names()}
    states = [layer["state"] for layer in layers.values() if layer["state"] is not None]
    devices = {state["moment"].device for state in states}
    copied = {d: torch.cuda.current_stream(d).record_event() for d in devices if d.type == "cuda"}
    return _Mark(
        step,
        tracker.steps,
        time.time(),
        layers,
        copied,
        in_float64=tracker.watcher.precision == "float64",
        is_logged=is_logged,
        is_stored=is_stored,
    )


@torch.no_grad()
def _solve(mark: _Mark) -> _Result:
    # Taps that share a layer have one object: it is solved once, under the first tap's name.
    first = {id(layer): name for name, layer in reversed(mark.layers.items())}
    with contextlib.ExitStack() as streams:
        for device, copied in mark.copied.items():
            streams.enter_context(_beside_the_training(device, copied))
        states = {
            name: _restored(mark.layers[name])
            for name in first.values()
            if mark.layers[name]["state"] is not None
        }
        solved = PendingSpectra(states, centered=False, in_float64=mark.in_float64).get()
    spectra, statuses = {}, []
    for name, layer in mark.layers.items():
        if (spectrum := solved.get(first[id(layer)])) is not None:
            spectra[name] = replace(spectrum, name=name)
        read, skipped = (0, 0) if layer["state"] is None else layer["state"]["count"].tolist()
        weight = 0.0 if layer["state"] is None else float(layer["state"]["weight"])
        status = LayerStatus(name, layer["channels"], read, skipped, weight, spectra.get(name))
        statuses.append(status)
    return _Result(spectra, Summary(statuses))


def _restored(layer: Mapping[str, Any]) -> fastcov.CovarianceState:
    saved = layer["state"]
    sketch = int(saved["sketch"][1]) if "sketch" in saved else None
    state = fastcov.CovarianceState(layer["channels"], saved["moment"].device, sketch=sketch)
    state.load_state_dict(saved)
    return state


@contextlib.contextmanager
def _beside_the_training(device: torch.device, copied: torch.cuda.Event) -> Iterator[None]:
    """Context whose GPU work runs on a stream of its own, after the copies are made."""
    side = torch.cuda.Stream(device)
    side.wait_event(copied)
    with torch.cuda.stream(side):
        yield
    side.synchronize()


def _start_worker() -> ThreadPoolExecutor:
    """Worker thread on one core, which runs while the training leaves the core idle."""
    threads = torch.get_num_threads()
    worker = ThreadPoolExecutor(1, thread_name_prefix="fastcov")
    worker.submit(_lower_own_priority).result()
    # The worker has set torch's number of threads to 1. Threads that have read the number once keep
    # their own; threads to come would take the worker's.
    torch.set_num_threads(threads)
    return worker


def _lower_own_priority() -> None:
    if sys.platform == "linux":  # elsewhere priorities belong to processes, not threads
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _LOWEST_PRIORITY)
    torch.get_num_threads()  # makes the number this thread's own: see _start_worker
    # With more, this thread's team and the training's would wait for each other on the same cores.
    torch.set_num_threads(1)


_Waiting = deque[tuple[_Mark, "Future[_Result]"]]


def _store(history: History, mark: _Mark, result: Future[_Result]) -> Summary | None:
    """Summary of a mark, after waiting for its spectra and storing them if the mark says so.

    None where computing the spectra failed.
    """
    try:
        spectra, summary = result.result()
    except Exception as error:
        _warn_of(mark, error)
        return None
    if mark.is_stored:
        try:
            history.append(Snapshot(mark.tracked_step, mark.wall_s, spectra))
        except Exception as error:  # a full disk must not end a training
            _warn_of(mark, error)
    return summary


def _warn_of(mark: _Mark, error: Exception) -> None:
    message = f"{type(error).__name__}: {error}"
    warnings.warn(f"no snapshot at step {mark.tracked_step}, {message}", stacklevel=2)


def _store_rest(history: History, waiting: _Waiting) -> None:
    while waiting:
        mark, result = waiting.popleft()
        if mark.is_stored or not result.cancel():
            _store(history, mark, result)


class _Marks:
    """Queue of marks, in the order in which they were taken, until they are delivered.

    Args:
        history: History that gets all snapshots, even where the tracker or the process ends.
        log: Function of a summary and its optimizer step; None where nobody listens.
        tracker: Tracker of the marks.
    """

    def __init__(
        self, history: History, log: Callable[[Summary, int], None] | None, tracker: fastcov.Tracker
    ) -> None:
        self._history = history
        self._log = log
        self._waiting: _Waiting = deque()
        self._worker: ThreadPoolExecutor | None = None
        self._has_dropped = False
        weakref.finalize(tracker, _store_rest, history, self._waiting)

    def take(self, tracker: fastcov.Tracker, step: int, is_logged: bool, is_stored: bool) -> None:
        """New mark: a copy of the statistics, whose spectra the worker computes.

        While earlier marks fill ``ROOM_BYTES``, a mark that is only logged is dropped, and one that
        is stored waits.
        """
        while sum(mark.bytes for mark, _ in self._waiting) >= ROOM_BYTES:
            if not is_stored:
                self._warn_of_dropped(step)
                return
            self._deliver_first()
        if self._worker is None:
            self._worker = _start_worker()
        mark = _mark(tracker, step, is_logged, is_stored)
        self._waiting.append((mark, self._worker.submit(_solve, mark)))

    def deliver(self, waits: bool = False) -> None:
        """Delivery of the finished marks; of all marks if ``waits``."""
        while self._waiting and (waits or self._waiting[0][1].done()):
            self._deliver_first()

    def close(self) -> None:
        """End of the worker, with all snapshots stored; loggers get nothing any more."""
        _store_rest(self._history, self._waiting)
        if self._worker is not None:
            self._worker.shutdown(wait=False)
            self._worker = None

    def _deliver_first(self) -> None:
        mark, result = self._waiting.popleft()
        summary = _store(self._history, mark, result)
        if mark.is_logged and summary is not None and self._log is not None:
            self._log(summary, mark.step)

    def _warn_of_dropped(self, step: int) -> None:
        if not self._has_dropped:
            self._has_dropped = True
            warnings.warn(
                f"no summary of step {step}: the spectra of earlier ones are still being computed; "
                "raise log_every (said once: later ones may be left out too)",
                stacklevel=2,
            )


def check_every(name: str, value: int | None) -> None:
    """Check, before any training, that an argument is None or a number of steps.

    Raises:
        ValueError: If ``value`` is neither None nor an integer of at least 1.
    """
    is_count = isinstance(value, int) and not isinstance(value, bool) and value >= 1
    if value is not None and not is_count:
        raise ValueError(f"{name} must be a number of steps, at least 1, or None, got {value!r}")


class TrackedRun:
    """One training of one model, from its first batch to its end or to an exception.

    Args:
        model: Module whose forward is a step of the tracker.
        options: Arguments of :func:`fastcov.track`. Only the first process takes snapshots, of its
            own rows; with ``out`` and no ``snapshot_every``, summaries are stored as snapshots.
        is_first: True in the first process.
        log_every: Optimizer steps between summaries; None makes none.
        log: Function of a summary and its step, called in the first process; None where nobody
            listens.
        saved: Result of :meth:`state_dict`; None starts from zero.
        before: Earlier run of the same callback, which is left if it has not ended.

    Attributes:
        tracker: Tracker of the run.
        is_open: True until the run has ended or was left.
        has_ended: True if the run has ended with its training.

    Raises:
        ValueError: If ``out`` holds the snapshots of another run, or ``saved`` does not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        options: Mapping[str, Any],
        *,
        is_first: bool,
        log_every: int | None,
        log: Callable[[Summary, int], None] | None,
        saved: Mapping[str, Any] | None = None,
        before: TrackedRun | None = None,
    ) -> None:
        if before is not None:
            before.leave()
        self._is_first = is_first
        self._snapshot_every = options.get("snapshot_every")
        self._stores_summaries = options.get("out") is not None and self._snapshot_every is None
        has_reader = log is not None or self._stores_summaries
        self._log_every = log_every if has_reader else None
        self.is_open = True
        self.has_ended = False
        own = {"snapshot_every": None} | ({} if is_first else {"out": None})
        self.tracker = fastcov.track(model, **{**options, **own})
        try:
            if saved is not None:
                self.tracker.load_state_dict(dict(saved))
            else:
                self._begin_history(before)
        except BaseException:
            self.tracker.close()
            raise
        self._marks = _Marks(self.tracker.history, log, self.tracker)
        self._step = 0
        self._tracked_step = self.tracker.steps

    def _begin_history(self, before: TrackedRun | None) -> None:
        history = self.tracker.history
        if not len(history):
            return
        last = history.steps()[-1]
        is_own = before is not None and before.tracker.history.folder == history.folder
        if before is None or before.has_ended or not is_own:
            raise ValueError(
                f"out={str(history.folder)!r} holds {len(history)} snapshots of another run, up to "
                f"step {last}: give this run a folder of its own, move that one away, or resume "
                "from a checkpoint of that run"
            )
        warnings.warn(
            f"training starts anew after a run that did not end: its {len(history)} snapshots, up "
            f"to step {last}, are dropped from {history.folder}",
            stacklevel=2,
        )
        history.truncate(0)

    def start(self, step: int) -> None:
        """Setter of the number of optimizer steps before the first batch of this run."""
        self._step = step

    def after_batch(self, step: int) -> None:
        """Marks due after so many optimizer steps, taken; the finished ones are delivered."""
        if not self.is_open:
            return
        self._marks.deliver()
        tracked = self.tracker.steps
        is_logged = _is_due(self._log_every, self._step, step)
        is_stored = _is_due(self._snapshot_every, self._tracked_step, tracked)
        self._step, self._tracked_step = step, tracked
        if is_stored and (rank_and_ranks()[1] > 1 or not is_logged):
            # A snapshot holds the first process's own rows, a summary all of them.
            self._take(step, is_logged=False, is_stored=True)
            is_stored = False
        if is_logged:
            self.tracker.sync()
            self._take(step, is_logged=True, is_stored=is_stored or self._stores_summaries)

    def _take(self, step: int, is_logged: bool, is_stored: bool) -> None:
        if self._is_first:
            self._marks.take(self.tracker, step, is_logged, is_stored)

    def deliver(self) -> None:
        """Delivery of all marks, after waiting for their spectra."""
        self._marks.deliver(waits=True)

    def state_dict(self) -> dict[str, Any]:
        """Statistics of all processes together: a collective, which every process must call."""
        return self.tracker.sync().state_dict()

    def load(self, saved: Mapping[str, Any]) -> None:
        """Return to saved statistics; later rows are forgotten."""
        self.tracker.load_state_dict(dict(saved))
        self._tracked_step = self.tracker.steps

    def end(self) -> None:
        """End of the run: all marks delivered, hooks removed; the statistics stay readable."""
        if self.is_open:
            self.has_ended = True
            try:
                self.deliver()
            finally:
                self._close()

    def leave(self) -> None:
        """Removal of the hooks of a run that an exception ended; its snapshots are kept."""
        if self.is_open:
            self._close()

    def _close(self) -> None:
        self.is_open = False
        self.tracker.close()
        self._marks.close()


def _is_due(every: int | None, before: int, now: int) -> bool:
    # Not `now % every == 0`: a batch may be several steps, and jump over the multiple.
    return every is not None and now // every > before // every
