"""Spectra of many layers in one eigenvalue call; on a GPU the training never waits for them.

A stream of its own does the work, on copies of the states.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fastcov import ops
from fastcov.spectra.spectrum import Spectrum
from fastcov.stats.state import CovarianceState

_NUMBERS = 4  # of a layer beside its eigenvalues: trace, weight, count, effective count
_side_streams: dict[torch.device, torch.cuda.Stream] = {}


@dataclass
class _Batch:
    """The layers of one device: their numbers, end to end, and when the CPU may read them."""

    channels: dict[str, int]
    numbers: Tensor
    done: torch.cuda.Event | None


class PendingSpectra:
    """Spectra of states as they are now, which may still be on their way.

    States on a GPU are copied on the current stream; their eigenvalues are computed on a stream
    beside it and fetched without stopping the host. States on the CPU are ready at once.

    Args:
        states: By layer, on any devices.
        centered: Whether the means are subtracted.
    """

    @torch.no_grad()
    def __init__(
        self,
        states: Mapping[str, CovarianceState],
        centered: bool,
    ) -> None:
        self._names = list(states)
        by_device: dict[torch.device, dict[str, CovarianceState]] = {}
        for name, state in states.items():
            by_device.setdefault(state.moment.device, {})[name] = state
        self._batches = [_start(batch, device, centered) for device, batch in by_device.items()]

    def is_ready(self) -> bool:
        """Whether :meth:`get` returns without waiting."""
        return all(batch.done is None or batch.done.query() for batch in self._batches)

    def get(self) -> dict[str, Spectrum]:
        """The spectra of all layers that have seen a row; waits for the GPU where need be."""
        spectra = {}
        for batch in self._batches:
            if batch.done is not None:
                batch.done.synchronize()
            sizes = [channels + _NUMBERS for channels in batch.channels.values()]
            for name, part in zip(batch.channels, batch.numbers.split(sizes), strict=True):
                trace, weight, count, effective = part[-_NUMBERS:].tolist()
                if weight > 0:
                    # What its uncertainty rests on: fewer than were read, where some weigh less.
                    rows = min(int(count), round(effective))
                    # A copy: the numbers of all layers would live as long as one of them.
                    values = part[:-_NUMBERS].clone()
                    spectra[name] = Spectrum(values, rows, max(0.0, trace), name)
        return {name: spectra[name] for name in self._names if name in spectra}


def _start(states: dict[str, CovarianceState], device: torch.device, centered: bool) -> _Batch:
    channels = {name: state.channels for name, state in states.items()}
    if device.type != "cuda":
        return _Batch(channels, _numbers(list(states.values()), centered).cpu(), None)
    here = torch.cuda.current_stream(device)
    side = _beside(here)
    # The training goes on changing its states: what is read is a copy, made in its own order.
    twins = [state.copy() for state in states.values()]
    side.wait_stream(here)
    with torch.cuda.stream(side):
        numbers = _numbers(twins, centered)
        fetched = torch.empty(numbers.shape, dtype=numbers.dtype, device="cpu", pin_memory=True)
        fetched.copy_(numbers, non_blocking=True)
        done = side.record_event()
    for twin in twins:
        for tensor in twin.tensors:
            tensor.record_stream(side)
    return _Batch(channels, fetched, done)


def _beside(stream: torch.cuda.Stream) -> torch.cuda.Stream:
    # torch hands out its streams in turn: one of them may be what the caller trains on.
    side = _side_streams.get(stream.device)
    while side is None or side == stream:
        side = _side_streams[stream.device] = torch.cuda.Stream(stream.device)
    return side


def _numbers(states: list[CovarianceState], centered: bool) -> Tensor:
    # float64 costs little on a CPU; a GPU's fast path is float32, 2e-6 of the largest.
    matrices = [state.covariance(centered) for state in states]
    eigenvalues = ops.eigvalsh([m if m.device.type == "cpu" else m.float() for m in matrices])
    parts = []
    for state, matrix, values in zip(states, matrices, eigenvalues, strict=True):
        counts = state.count[0].double(), state.effective_count
        numbers = torch.stack([matrix.trace(), state.weight, *counts])
        parts += [values.double(), numbers]
    return torch.cat(parts)
