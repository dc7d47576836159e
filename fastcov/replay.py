"""Counters on the device: what lets a CUDA graph replay a tracked step with right counts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from fastcov.ops.buffered import flush_full_, has_device_buffers, make_flush_table

if TYPE_CHECKING:
    from fastcov.reader import Reader


class DeviceCounters:
    """Number of the running step, and the full buffers' one launch, without a host number.

    Args:
        readers: After a step that has shown dtypes, row counts and devices.
        step: Number of that step.

    Attributes:
        step: int64, number of the running step, or of the last one. []
        is_captured: Whether a graph holds a step: replays then move ``step`` on their own.
    """

    def __init__(self, readers: Sequence[Reader], step: int) -> None:
        device = next(r.state.moment.device for r in readers if r.state is not None)
        with torch.inference_mode(False):
            self.step = torch.full((), step, dtype=torch.int64, device=device)
        self.is_captured = False
        moved = [reader.use_device_buffer(self.step) for reader in readers]
        buffers = [buffer for buffer in moved if buffer is not None]
        self._table = make_flush_table(buffers) if buffers else None

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

    def begin_step(self) -> None:
        """Moves to the next step."""
        self.step += 1
        self.is_captured = self.is_captured or is_capturing()

    def end_step(self, decay: float | None) -> None:
        """Adds the full buffers of all layers to their states: one launch."""
        if self._table is not None:
            flush_full_(self._table, self.step, decay or 1.0)


def is_capturing() -> bool:
    """Whether a CUDA graph is being captured; starts no CUDA context."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
