"""Moves a layer's sampling to the device, where a CUDA graph can replay it with right counts.

A graph repeats launches with the arguments that they had: host counters would read the same rows
at every replay. What it can hold is a gather whose counters are on the device, and the addition of
every row at once, which counts nothing.
"""

from __future__ import annotations

from math import ceil

from torch import Tensor

from fastcov.rows.sequence import (
    BUFFER_ROWS_PER_CHANNEL,
    MOST_DEVICE_ROWS,
    WHOLE,
    device_buffer_rows,
    direct_rows,
)
from fastcov.stats.adder import Adder
from fastcov.stats.cursor import CALLS, CARRY, FRACTION, OFFERED, SAMPLED, Counter
from fastcov.stats.device_buffer import DeviceBuffer, has_device_buffers
from fastcov.stats.seen import Seen

_MOST_MOVES = 4  # each waits for the device, and sizes or dtypes may alternate


class DeviceAdder(Adder):
    """An adder whose sampled rows may wait in a buffer with counters on the device."""

    offered_rows = Counter(OFFERED)
    _carry = Counter(CARRY)
    _sampled = Counter(SAMPLED)

    _again: Seen | None = None  # what an operator reads as the last call was read, on a CPU
    _device_buffer: DeviceBuffer | None = None
    _device_step: Tensor | None = None
    _moves_left = _MOST_MOVES
    _most_rows = 0  # that a device buffer had room for
    _why_on_host = ""

    def forget_moves(self) -> None:
        """Lets :meth:`use_device_buffer` decide anew: on another device."""
        self._moves_left = _MOST_MOVES
        self._most_rows = 0
        self._why_on_host = ""

    @property
    def is_on_device(self) -> bool:
        """Whether rows wait in a buffer with counters on the device."""
        return self._device_buffer is not None

    @property
    def wants_device_buffer(self) -> bool:
        """Whether the last step's rows waited in a buffer of the host's that might move."""
        return (
            self._device_buffer is None
            and self._moves_left > 0
            and self.calls > 0
            and self.fraction is not None
            and self._dtype is not None
            # Of every row those that are added at once count nothing.
            and (self._fixed_fraction < WHOLE or self._buffer.storage is not None)
        )

    def use_device_buffer(self, step: Tensor) -> DeviceBuffer | None:
        """Moves the counters to the device, so that CUDA graphs can replay the sampling.

        Only where rows go through a buffer, every row weighs the same, and a step brings no more
        of them than one launch adds in good time.

        Args:
            step: int64, number of the running step, kept up to date by the caller. []

        Returns:
            The buffer, or None where rows are added at once, or sampled by the host.
        """
        if self._device_buffer is not None:
            self._device_step = step
            return self._device_buffer
        state, dtype = self.state, self._dtype
        if state is None or dtype is None or not self.wants_device_buffer:
            return None
        sizes = self._device_rows(state.channels, state.moment.is_cpu)
        if not has_device_buffers(dtype, state.moment.device):
            self._why_on_host = f"samples {dtype} on the host; cast to float32 or less"
        if sizes is None or self._why_on_host:
            self._moves_left = 0
            return None
        threshold, most_rows = sizes
        self._most_rows = max(self._most_rows, most_rows)  # what fitted once fits again
        self._moves_left -= 1
        self.flush()
        self._buffer.release()
        self._again = None
        self._device_step = step
        self._device_buffer = DeviceBuffer(
            state,
            dtype,
            threshold=threshold,
            first_threshold=ceil(threshold * self._buffer.first_fill),
            most_rows=self._most_rows,
            sampled=self._sampled,
            carry=self._carry,
            state_step=self.state_step,
        )
        return self._device_buffer

    def _device_rows(self, channels: int, is_cpu: bool) -> tuple[int, int] | None:
        if self.weighting != "position":
            return None
        rows: float = self.offered_rows
        if self.fraction is not None and self._fixed_fraction < WHOLE:
            rows *= self.fraction
        else:
            most_waiting = self.calls * (direct_rows(channels, is_cpu) - 1)
            if self.decay is not None and rows > most_waiting:
                return None  # some are added at once, with a decay that the host knows
            rows = min(rows, most_waiting)
        sizes = device_buffer_rows(channels, rows, self.calls)
        if sizes is None:
            most = max(BUFFER_ROWS_PER_CHANNEL * channels, MOST_DEVICE_ROWS)
            self._why_on_host = (
                f"samples {rows:.0f} rows a step on the host, the device {most} at most; set rows "
                'lower, or "all"'
            )
        return sizes

    def _adds_at_once(self, seen: Seen) -> bool:
        # Whether nothing that changes from step to step is a number of the host's.
        return (
            self.cursor.numbers[FRACTION] == WHOLE
            and seen.rows >= seen.direct_rows
            and self.weighting == "position"
            and self.decay is None
        )

    def _fits(self, buffer: DeviceBuffer, seen: Seen) -> bool:
        # A call of the running step, counted already.
        if self._adds_at_once(seen):
            return False
        if self._has_room(buffer, seen, self.cursor.numbers[CALLS]):
            buffer.step_rows += seen.rows
            return True
        if buffer.is_captured:
            raise RuntimeError(
                f"{seen.rows} more rows of {seen.dtype} on {seen.device} do not fit the buffer of "
                f"a captured CUDA graph: {buffer.most_rows} rows a step of {buffer.dtype} on "
                f"{buffer.device}; run the largest step eagerly before the capture"
            )
        # Another device or precision, or larger batches than planned: to counters on the host.
        self.leave_device()
        return False

    def _has_room(self, buffer: DeviceBuffer, seen: Seen, calls: int) -> bool:
        due = (buffer.step_rows + seen.rows) * self.cursor.numbers[FRACTION] >> 32
        return (
            buffer.dtype is seen.dtype
            and buffer.device == seen.device
            and due + calls <= buffer.most_rows
        )

    def why_not_replayed(self, seen: Seen) -> str:
        """Why a CUDA graph must not hold the next call: it would read the wrong rows.

        Args:
            seen: Sizes of the call.

        Returns:
            The reason and a remedy; empty where its replays are counted right.
        """
        state, buffer = self.state, self._device_buffer
        if self.weighting == "image":
            return 'weighting="image" weighs rows on the host; take weighting="position"'
        if state is None or self.fraction is None or state.moment.device != seen.device:
            return f"has not run on {seen.device} before; run a step eagerly, then capture"
        if buffer is None and self._fixed_fraction == WHOLE and self.decay is not None:
            return f'decay={self.decay} with every row is applied by the host; take rows="auto"'
        if buffer is None and self._why_on_host:
            return self._why_on_host
        if self._adds_at_once(seen) and seen.dtype is self._dtype:
            # A module's smaller calls, if any, wait: all of them are replayed, or none.
            if buffer is not None or self._buffer.storage is None:
                return ""
        elif buffer is not None and self._has_room(buffer, seen, self.calls + 1):
            return ""
        return (
            f"reads {seen.rows} rows of {seen.dtype}, other sizes or another dtype than in the "
            "steps before; run one with these eagerly, then capture"
        )

    def leave_device(self) -> None:
        """Takes the counters back to the host: waits for the device."""
        if self._device_buffer is not None:
            self.flush()
            self._sampled, self._carry, self.state_step = self._counters()
            self._device_buffer = None

    def _counters(self) -> tuple[int, int, int]:
        if self._device_buffer is not None:
            return self._device_buffer.counters()
        return self._sampled, self._carry, self.state_step

    def flush(self) -> None:
        """Adds the buffered rows to the state."""
        if self._device_buffer is not None and self._device_step is not None:
            self._device_buffer.flush(self._device_step, self.decay or 1.0)
        super().flush()
