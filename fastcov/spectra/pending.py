"""Spectra on their way: started in one step, read when they are there, appended to a history.

The layers of a device share one eigenvalue call. On a GPU it runs on a stream of its own, on copies
of the states, so that the training never waits for it.
"""

from __future__ import annotations

import time
import warnings
import weakref
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from fastcov import ops
from fastcov.spectra.history import History
from fastcov.spectra.snapshot import Snapshot
from fastcov.spectra.spectrum import Spectrum

if TYPE_CHECKING:
    from fastcov.stats.state import CovarianceState

_MOST_PENDING_SNAPSHOTS = 2  # each holds a copy of all states on the GPU

_side_streams: dict[torch.device, torch.cuda.Stream] = {}


class PendingSpectra:
    """Spectra of states as they are now, computed without stopping the host.

    States on a GPU are copied on the current stream; their eigenvalues are computed on a stream
    beside it. States on the CPU are ready at once.

    Args:
        states: States by layer, on any devices.
        centered: True to subtract the means.
        in_float64: True solves in float64 on a GPU too, where float32 is the default.
    """

    @torch.no_grad()
    def __init__(
        self, states: Mapping[str, CovarianceState], centered: bool, in_float64: bool = False
    ) -> None:
        self._names = list(states)
        by_device: dict[torch.device, dict[str, CovarianceState]] = {}
        for name, state in states.items():
            by_device.setdefault(state.moment.device, {})[name] = state
        self._batches = [
            _start(batch, device, centered, in_float64) for device, batch in by_device.items()
        ]

    def is_ready(self) -> bool:
        """True where :meth:`get` returns without waiting."""
        return all(batch.done is None or batch.done.query() for batch in self._batches)

    def get(self) -> dict[str, Spectrum]:
        """Spectra of all layers that have seen a row; waits for the GPU where need be."""
        spectra: dict[str, Spectrum] = {}
        for batch in self._batches:
            spectra |= batch.spectra()
        return {name: spectra[name] for name in self._names if name in spectra}


class SnapshotQueue:
    """Snapshots in the order of their steps, appended to a history when their spectra are there.

    At the end of the owner, or of the process, everything pending is appended.
    """

    def __init__(self, history: History, owner: object) -> None:
        self.history = history
        self._pending: deque[tuple[int, float, PendingSpectra]] = deque()
        weakref.finalize(owner, self.deliver)

    def add(self, step: int, spectra: PendingSpectra) -> None:
        """Addition of a snapshot, at once in the history where its spectra are ready."""
        self._pending.append((step, time.time(), spectra))
        self.deliver(most_pending=_MOST_PENDING_SNAPSHOTS)

    def deliver(self, most_pending: int = 0) -> None:
        """Delivery of all that is ready; waits for the oldest while too many are pending."""
        while self._pending and (
            len(self._pending) > most_pending or self._pending[0][2].is_ready()
        ):
            step, wall_s, spectra = self._pending.popleft()
            try:
                self.history.append(Snapshot(step, wall_s, spectra.get()))
            except Exception as error:
                # A full disk must not end the training that happens to be at some later step.
                reason = f"{type(error).__name__}: {error}"
                warnings.warn(f"no snapshot at step {step}, {reason}", stacklevel=2)

    def poll(self) -> None:
        """Delivery of all that is ready; waits for nothing."""
        self.deliver(most_pending=len(self._pending))

    def __getstate__(self) -> dict[str, Any]:
        # A copy, or a file, holds no stream and no event.
        self.deliver()
        return self.__dict__


class _Scalars(NamedTuple):
    """Numbers of one layer that travel behind its eigenvalues, in this order."""

    trace: float
    weight: float
    rows: float
    effective_rows: float
    squares: float


@dataclass
class _Batch:
    """Layers of one device: their numbers end to end, and the event after which they are there.

    Attributes:
        channels: Width of each layer, and number of its eigenvalues, fewer where it is sketched.
        numbers: Eigenvalues and scalars of each layer.
        done: Event after which the numbers are there; None where they are.
    """

    channels: dict[str, tuple[int, int]]
    numbers: Tensor
    done: torch.cuda.Event | None

    def spectra(self) -> dict[str, Spectrum]:
        if self.done is not None:
            self.done.synchronize()
        spectra = {}
        behind = len(_Scalars._fields)
        sizes = [solved + behind for _, solved in self.channels.values()]
        parts = self.numbers.split(sizes)
        for (name, (channels, _)), part in zip(self.channels.items(), parts, strict=True):
            layer = _Scalars(*part[-behind:].tolist())
            if layer.weight > 0:
                # The uncertainty rests on fewer rows than were read where some weigh less.
                rows = min(int(layer.rows), round(layer.effective_rows))
                # A copy: the numbers of all layers would live as long as one of them.
                eigenvalues = part[:-behind].clone()
                spectra[name] = Spectrum.of(
                    eigenvalues,
                    count=rows,
                    total=layer.trace,
                    squares=layer.squares,
                    channels=channels,
                    name=name,
                )
        return spectra


def _start(
    states: dict[str, CovarianceState], device: torch.device, centered: bool, in_float64: bool
) -> _Batch:
    channels = {
        name: (state.channels, state.sketch_width or state.channels)
        for name, state in states.items()
    }
    if device.type != "cuda":
        return _Batch(channels, _numbers(list(states.values()), centered, in_float64).cpu(), None)
    here = torch.cuda.current_stream(device)
    side = _beside(here)
    # The training goes on changing its states, so copies are read, made in the training's order.
    twins = [state.copy() for state in states.values()]
    side.wait_stream(here)
    with torch.cuda.stream(side):
        numbers = _numbers(twins, centered, in_float64)
        fetched = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
        fetched.copy_(numbers, non_blocking=True)
        done = side.record_event()
    for twin in twins:
        for tensor in twin.tensors:
            tensor.record_stream(side)
    return _Batch(channels, fetched, done)


def _beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    # torch hands out its streams in turn: a new one may be the stream that the caller trains on.
    side = _side_streams.get(stream.device)
    while side is None or side == stream:
        # 0 is the lowest priority of CUDA's: a training on a stream of a higher one goes first.
        side = _side_streams[stream.device] = torch.cuda.Stream(stream.device, priority=0)
    return side


def _numbers(states: list[CovarianceState], centered: bool, in_float64: bool) -> Tensor:
    # float64 costs little on a CPU; a GPU's fast path is float32, at most 1e-5 of the largest.
    of_states = [state.spectral_parts(centered) for state in states]
    matrices = [parts.matrix for parts in of_states]
    eigenvalues = ops.eigvalsh(
        [m if in_float64 or m.device.type == "cpu" else m.float() for m in matrices]
    )
    parts = []
    for state, given, values in zip(states, of_states, eigenvalues, strict=True):
        scalars = {
            "trace": given.total,
            "squares": given.squares,
            "weight": state.weight,
            "rows": state.count[0].double(),
            "effective_rows": state.effective_count,
        }
        parts += [values.double(), torch.stack([scalars[field] for field in _Scalars._fields])]
    return torch.cat(parts)
