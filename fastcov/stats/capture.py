"""Counters on the device: what lets a CUDA graph replay a tracked step with right counts."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from fastcov.stats.device_buffer import flush_full_, has_device_buffers, make_flush_table
from fastcov.stats.seen import Seen

if TYPE_CHECKING:
    from fastcov.stats.reader import Reader

_MOST_TOLD = 3  # layers of a reason, and reasons, in a warning
_held: list[Any] = []
"""What captured graphs write into. They cannot be asked whether they live, and would go on writing
where a closed tracker's memory has been given to others."""


class DeviceCounters:
    """Number of the running step, and the full buffers' one launch, without a host number.

    Args:
        readers: After a step that has shown dtypes, row counts and devices.
        step: Number of that step.

    Attributes:
        step: int64, number of the running step, or of the last one. []
        is_captured: Whether a graph holds a step: replays then move ``step`` on their own.
        is_warm: Whether an eager step has launched all this once: a kernel that is compiled and
            loaded while a graph is captured may break the capture.
        left_out: Readers that the last capture does not hold, and why.
    """

    def __init__(self, readers: Sequence[Reader], step: int) -> None:
        device = next(r.state.moment.device for r in readers if r.state is not None)
        with torch.inference_mode(False):
            self.step = torch.full((), step, dtype=torch.int64, device=device)
        self.is_captured = False
        self.is_warm = False
        self._is_open = False  # a step that is read has begun and not ended
        self.left_out: dict[Reader, str] = {}
        moved = [reader.use_device_buffer(self.step) for reader in readers]
        self._buffers = [buffer for buffer in moved if buffer is not None]
        self._table = make_flush_table(self._buffers) if self._buffers else None

    @staticmethod
    def serve(readers: Sequence[Reader]) -> bool:
        """Whether all readers that have seen a row are on one GPU that can do this."""
        states = (reader.state for reader in readers if reader.state is not None)
        if (first := next(states, None)) is None:
            return False
        device = first.moment.device
        # Asked at the end of every step: on a CPU the first state answers.
        return has_device_buffers(torch.float32, device) and all(
            state.moment.device == device for state in states
        )

    def renewed(self, readers: Sequence[Reader], step: int) -> DeviceCounters | None:
        """What serves from the next step on: itself, unless readers have come, moved or left.

        Args:
            readers: After a step.
            step: Number of that step.

        Returns:
            None where the host counts from now on.
        """
        if self.is_captured or not self._is_outdated(readers):
            return self
        if self.serve(readers):
            return DeviceCounters(readers, step)
        return self if any(reader.is_on_device for reader in readers) else None

    def _is_outdated(self, readers: Sequence[Reader]) -> bool:
        states = (reader.state for reader in readers if reader.state is not None)
        first = next(states, None)
        return (first is not None and first.moment.device != self.step.device) or any(
            reader.wants_device_buffer for reader in readers
        )

    def begin_step(self, number: int, is_read: bool, decay: float | None) -> None:
        """Moves to the next step.

        Args:
            number: Of that step, as the host counts.
            is_read: Whether its activations are read.
            decay: As for :meth:`end_step`.
        """
        if self._is_open:  # an exception ended the last one, whose rows need room too
            self.end_step(decay)
        self._is_open = is_read
        if self.is_captured:
            self.step += 1  # replays, which the host does not see, have moved it
        else:
            self.step.fill_(number)

    def begin_capture(self, readers: Sequence[Reader]) -> None:
        """A CUDA graph captures the step that is about to begin."""
        self.left_out = {}
        if not self.is_captured:
            self.is_captured = True
            _held.append((self.step, self._table, [reader.state for reader in readers]))
            for buffer in self._buffers:
                buffer.is_captured = True

    def leaves_out(self, reader: Reader, seen: Seen) -> bool:
        """Whether a graph must not hold a call, or has not held one of that reader before."""
        if reader in self.left_out:
            return True
        if not (reason := reader.why_not_replayed(seen)):
            return False
        if reader.calls:
            reason += " (some calls of its module are read)"
        self.left_out[reader] = reason
        return True

    def end_step(self, decay: float | None) -> None:
        """Adds the full buffers of all layers to their states: one launch."""
        if self._table is not None:
            flush_full_(self._table, self.step, decay or 1.0)
        self.is_warm = True
        self._is_open = False


def warn_left_out(reasons: Mapping[Reader, str]) -> None:
    """One warning about the readers that a graph does not hold, if there are any."""
    if not reasons:
        return
    layers: dict[str, list[str]] = {}
    for reader, reason in reasons.items():
        layers.setdefault(reason, []).append(repr(reader.name))
    parts = []
    for reason, names in list(layers.items())[:_MOST_TOLD]:
        more = f" and {len(names) - _MOST_TOLD} more" if len(names) > _MOST_TOLD else ""
        parts.append(f"{', '.join(names[:_MOST_TOLD])}{more}: {reason}")
    if len(layers) > _MOST_TOLD:
        parts.append("other layers: see summary()")
    what = "; ".join(parts)
    warnings.warn(f"replays of a captured CUDA graph do not read {what}", stacklevel=2)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured; starts no CUDA context."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
