"""Sampling with counters on the rows' device: its buffer, or the reason why the host counts."""

from __future__ import annotations

from torch import Tensor

from fastcov.rows.layout import ActivationLayout
from fastcov.rows.sequence import WHOLE
from fastcov.stats.buffering import device_buffer_limit, device_buffer_rows
from fastcov.stats.device_buffer import DeviceBuffer

# Moves of the counters to the device. Each waits for the device, so sizes or dtypes that alternate
# from step to step must not cause one in every step.
_MOST_MOVES = 4


class DeviceSampling:
    """Side of a layer that counts on a GPU, so that CUDA graphs can replay the sampling.

    Attributes:
        buffer: Rows that wait, with counters on the device; None where the host counts.
        why_on_host: Reason why the host counts for rows on a GPU; empty if none is known.
    """

    def __init__(self) -> None:
        self.buffer: DeviceBuffer | None = None
        self.forget()

    def forget(self, why_on_host: str = "") -> None:
        """Reset of the moves: experience with one device says nothing about another.

        A reason given has the host count on any device.
        """
        self.why_on_host = why_on_host
        self._moves_left = 0 if why_on_host else _MOST_MOVES
        self._largest_capacity = 0  # rows a step; never shrinks

    @property
    def may_move(self) -> bool:
        """True if the host counts, and the counters may move to the device."""
        return self.buffer is None and self._moves_left > 0

    def stay_on_host(self) -> None:
        """Return to the host's count, from now on."""
        self._moves_left = 0

    def sizes(self, channels: int, rows: float, calls: int) -> tuple[int, int] | None:
        """Threshold and most rows of a buffer for a step's rows.

        None where these are too many, which ``why_on_host`` says from then on.
        """
        sizes = device_buffer_rows(channels, rows, calls)
        if sizes is None:
            self.why_on_host = (
                f"samples {rows:.0f} rows a step on the host, the device "
                f'{device_buffer_limit(channels)} at most; set rows lower, or "all"'
            )
        return sizes

    def use_step(self, step: Tensor) -> bool:
        """True if the buffer has taken another tensor as the number of the running step."""
        if self.buffer is None or self.buffer.step is step:
            return False
        self.buffer.step = step
        return True

    def begin_move(self, wanted: int) -> int:
        """Start of a move to the device; returns the rows a step that its buffer must hold."""
        self._moves_left -= 1
        self._largest_capacity = max(self._largest_capacity, wanted)
        return self._largest_capacity

    def has_room(self, layout: ActivationLayout, fraction: int, calls: int) -> bool:
        """True if the buffer takes the rows of a call, one of some calls that may each round up."""
        if not self._takes(layout):
            return False
        assert self.buffer is not None
        due = (self.buffer.step_rows + layout.rows) * fraction >> 32
        return due + calls <= self.buffer.most_rows

    def make_room(self, layout: ActivationLayout, fraction: int, calls: int) -> bool:
        """True if the buffer has grown for the rows of a call; waits for nothing."""
        buffer = self.buffer
        if buffer is None or buffer.is_captured or not self._takes(layout):
            return False
        rows = (buffer.step_rows + layout.rows) * fraction / WHOLE
        sizes = device_buffer_rows(layout.channels, rows, calls)
        if sizes is None:
            return False
        buffer.grow(*sizes)
        self._largest_capacity = max(self._largest_capacity, buffer.most_rows)
        return True

    def check_not_captured(self, layout: ActivationLayout) -> None:
        """Refusal to leave a buffer that a CUDA graph writes into.

        Raises:
            RuntimeError: If a captured graph holds the buffer.
        """
        buffer = self.buffer
        if buffer is not None and buffer.is_captured:
            raise RuntimeError(
                f"{layout.rows} more rows of {layout.dtype} on {layout.device} do not fit the "
                f"buffer of a captured CUDA graph: {buffer.most_rows} rows a step of "
                f"{buffer.dtype} on {buffer.device}; run the largest step eagerly before the "
                "capture"
            )

    def _takes(self, layout: ActivationLayout) -> bool:
        buffer = self.buffer
        return (
            buffer is not None and buffer.dtype is layout.dtype and buffer.device == layout.device
        )
