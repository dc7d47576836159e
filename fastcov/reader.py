"""Reads the activations of one tap into its CovarianceState: at once, or through a buffer.

Where a call brings many rows, they are added at once, while the activation is in cache. Sampled
rows, and calls that bring few, are copied into a buffer of about 2C rows first and added together:
updating a float64 state costs more than the gram itself when it brings fewer rows than that.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from fastcov.buffer import RowBuffer, buffer_rows
from fastcov.ops.buffered import DeviceBuffer, has_device_buffers
from fastcov.rows import run_length
from fastcov.sampling import BUFFER_ROWS_PER_CHANNEL, WHOLE, fixed_point, rows_due
from fastcov.state import CovarianceState

_HALF = (torch.bfloat16, torch.float16)
_WAITING_SHARE = 1 / 64  # of a call's rows, kept until the first step has shown the budget


@dataclass
class _Waiting:
    """Rows of the first step, kept until the fraction to read is known."""

    rows: Tensor
    offered: int
    is_whole: bool


class Reader:
    """Running statistics of one tap.

    Args:
        name: Canonical name of the tap.
        weighting: "position": every row weighs 1. "image": every index of dim 0 weighs 1 a step,
            shared by its positions over all calls of the step.
        decay: Factor on everything seen before, once a step; None keeps everything.
        phase: Start of the sampling sequence.
        fraction: Share of the rows to read, None until :meth:`plan` is called.
    """

    def __init__(
        self,
        name: str,
        *,
        weighting: Literal["position", "image"],
        decay: float | None,
        phase: int,
        fraction: float | None,
    ) -> None:
        self.name = name
        self.weighting = weighting
        self.decay = decay
        self.phase = phase
        self.fraction = fraction
        self.state: CovarianceState | None = None
        self.offered_rows = 0  # of the running step, then of the last one
        self.calls = 0  # likewise
        self.total_calls = 0
        self.state_step = 0  # the step up to which decay has been applied
        self._pooled: CovarianceState | None = None
        self._is_pooled: bool | None = None  # unknown before the first step has ended
        self._is_unweighted = False  # the state, during that step
        self._positions = 0  # of one image, over the calls of the running step
        self._buffer = RowBuffer(is_marked=weighting == "image" or decay is not None)
        self._sampled = 0
        self._carry = 0
        self._waiting: list[_Waiting] = []
        self._step = 0
        self._device_buffer: DeviceBuffer | None = None
        self._device_step: Tensor | None = None
        self._dtype: torch.dtype | None = None  # of the rows read last

    def begin_step(self, step: int) -> None:
        """Forgets the sizes of the step before."""
        self._step = step
        self.calls = 0
        self.offered_rows = 0
        self._positions = 0

    def prepare(self, channels: int, device: torch.device) -> CovarianceState:
        """The state, made or moved where needed."""
        if self.state is None:
            self.state = CovarianceState(channels, device)
        elif self.state.moment.device != device:
            self.leave_device()
            self.flush()
            self.state.to(device)
            self._buffer.release()
        return self.state

    def read(self, rows: Tensor) -> None:
        """Takes what this call contributes. rows: a row view [B, ..., C]."""
        shape = rows.shape
        offered = rows.numel() // shape[-1]
        if offered == 0:
            return
        self.total_calls += 1
        self.calls += 1
        self.offered_rows += offered
        self._positions += offered // shape[0]
        if self._device_buffer is not None and self._fits(self._device_buffer, rows):
            assert self._device_step is not None
            self._device_buffer.gather(
                rows, self._device_step, self._fixed_fraction, run_length(rows), self.phase
            )
        elif self.fraction is None:
            self.prepare(shape[-1], rows.device)
            self._wait(rows, offered)
        elif self._fixed_fraction >= WHOLE:
            self.prepare(shape[-1], rows.device)
            self._add(rows)
        else:
            due, self._carry = rows_due(offered, self._fixed_fraction, self._carry)
            if due:
                self.prepare(shape[-1], rows.device)
                self._sample(rows, offered, due)

    def _wait(self, rows: Tensor, offered: int) -> None:
        self._match_dtype(rows)
        kept_before = sum(part.rows.numel() for part in self._waiting) // rows.shape[-1]
        limit = max(buffer_rows(rows) - kept_before, ceil(offered * _WAITING_SHARE))
        kept: Tensor
        if offered <= limit:
            kept = rows.clone(memory_format=torch.contiguous_format)
        else:
            # Any prefix of the sampling sequence is a fair sample: the plan keeps what is due.
            kept = rows.new_empty(limit, rows.shape[-1])
            self._gather(kept, 0, rows, limit)
        self._waiting.append(_Waiting(kept, offered, offered <= limit))

    def plan(self, fraction: float) -> None:
        """Sets the share of rows to read and takes it from what has waited."""
        self.fraction = fraction
        waiting, self._waiting = self._waiting, []
        for part in waiting:
            if self._fixed_fraction >= WHOLE:
                self._add(part.rows)
                continue
            due, self._carry = rows_due(part.offered, self._fixed_fraction, self._carry)
            if part.is_whole and due:
                self._sample(part.rows, part.offered, due)
            else:
                self._add(part.rows[:due])

    @property
    def fraction(self) -> float | None:
        """Share of the rows to read; None until it is planned."""
        return self._fraction

    @fraction.setter
    def fraction(self, fraction: float | None) -> None:
        self._fraction = fraction
        self._fixed_fraction = 0 if fraction is None else fixed_point(fraction)

    def _sample(self, rows: Tensor, offered: int, due: int) -> None:
        if due >= offered:
            self._add(rows)
        elif due > buffer_rows(rows):
            sample = rows.new_empty(due, rows.shape[-1])
            self._gather(sample, 0, rows, due)
            self._add(sample)
        else:
            buffer = self._room(rows, due)
            self._gather(buffer, self._buffer.fill, rows, due)
            self._buffer.mark(due, self._step)

    def _gather(self, buffer: Tensor, buffer_row: int, rows: Tensor, samples: int) -> None:
        torch.ops.fastcov.gather_(
            buffer, rows, buffer_row, self._sampled, samples, run_length(rows), self.phase
        )
        self._sampled += samples

    def _add(self, rows: Tensor) -> None:
        # Every row of a view: at once where it brings many, else through the buffer.
        count = rows.numel() // rows.shape[-1]
        if count == 0:
            return
        if count >= buffer_rows(rows):
            self._add_at_once(rows)
        else:
            buffer = self._room(rows, count)
            fill = self._buffer.fill
            buffer[fill : fill + count].view(rows.shape).copy_(rows)
            self._buffer.mark(count, self._step)

    def _add_at_once(self, rows: Tensor) -> None:
        assert self.state is not None
        self._match_dtype(rows)
        if self.weighting == "image":
            # The weight of a row is known when the step's last call has been seen.
            if self._is_pooled is False and self.calls == 1:
                self._accumulate(rows, self._step, row_scale=self._row_weight())
                return
            if self._is_pooled is None and self.total_calls == self.calls:
                self._accumulate(rows, self._step)  # all that the state holds is of this step
                self._is_unweighted = True
                return
            if self._pooled is None:
                self._pooled = CovarianceState(self.state.channels, rows.device)
            self._pooled.update(rows)
            return
        self._accumulate(rows, self._step)

    def _accumulate(
        self, rows: Tensor, step: int, row_weight: Tensor | None = None, row_scale: float = 1.0
    ) -> None:
        state = self.state
        assert state is not None
        torch.ops.fastcov.accumulate_(
            state.moment,
            state.sum,
            state.shift,
            state.weight,
            state.count,
            rows,
            row_weight,
            row_scale,
            self._decay_until(step),
        )

    def _decay_until(self, step: int) -> float:
        steps, self.state_step = step - self.state_step, max(step, self.state_step)
        return 1.0 if self.decay is None else self.decay ** max(steps, 0)

    def _row_weight(self) -> float:
        # Horvitz-Thompson: a row read with probability `fraction` stands for 1 / fraction rows.
        if self.weighting == "position":
            return 1.0
        assert self.fraction is not None
        return 1.0 / (self._positions * min(self.fraction, 1.0))

    # the buffer

    def _room(self, rows: Tensor, wanted: int) -> Tensor:
        self._match_dtype(rows)
        # A step's weights are final at its end only: until then its rows may not leave the buffer.
        is_held = self.weighting == "image" and self._buffer.last_step == self._step
        if not is_held and not self._buffer.has_room(wanted):
            self.flush()
        return self._buffer.room(rows, wanted)

    def _match_dtype(self, rows: Tensor) -> None:
        before, self._dtype = self._dtype, rows.dtype
        if before is None or before is rows.dtype or self.state is None:
            return
        self.flush()
        self._buffer.release()
        if rows.dtype in _HALF and before not in _HALF:
            # Half-precision rows have no exact form about a shift.
            self.state.translate_(torch.zeros_like(self.state.shift))

    def use_device_buffer(self, step: Tensor) -> DeviceBuffer | None:
        """Moves the counters to the device, so that CUDA graphs can replay the sampling.

        Only where rows go through the buffer and every row weighs the same.

        Args:
            step: int64, number of the running step, kept up to date by the caller. []

        Returns:
            The buffer, or None where rows are added at once.
        """
        state, dtype = self.state, self._dtype
        if state is None or dtype is None or self.fraction is None or not self.calls:
            return None
        threshold = BUFFER_ROWS_PER_CHANNEL * state.channels
        most_rows = ceil(self.offered_rows * self.fraction) + self.calls
        if self.weighting != "position" or most_rows > threshold:
            return None
        if not has_device_buffers(dtype, state.moment.device):
            return None
        self.flush()
        self._buffer.release()
        self._device_step = step
        self._device_buffer = DeviceBuffer(
            state,
            dtype,
            threshold=threshold,
            most_rows=most_rows,
            sampled=self._sampled,
            carry=self._carry,
            state_step=self.state_step,
        )
        return self._device_buffer

    def _fits(self, buffer: DeviceBuffer, rows: Tensor) -> bool:
        due = self.offered_rows * self._fixed_fraction >> 32
        if buffer.dtype == rows.dtype and due + self.calls <= buffer.most_rows:
            return True
        # Another precision, or larger batches than planned: back to counters on the host.
        self.leave_device()
        return False

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
        rows = self._buffer.rows
        if rows is None:
            return
        row_weight = self._buffer.row_weight(self.decay or 1.0)
        last = self._buffer.last_step
        self._accumulate(
            rows,
            self.state_step if last is None else last,
            None if row_weight is None else row_weight.to(rows.device),
        )
        self._buffer.clear()

    def end_step(self) -> None:
        """Settles the weights of the step: all its calls have been seen."""
        if self.calls == 0:
            return
        self._is_pooled = self.calls > 1
        if self.weighting == "position":
            return
        self._buffer.weigh(self._step, self._row_weight())
        if self._is_unweighted and self.state is not None:
            self.state.scale_(self._row_weight())
            self._is_unweighted = False
        if self._pooled is not None and self.state is not None:
            self.state.scale_(self._decay_until(self._step))
            self.state.merge(self._pooled, scale=self._row_weight())
            if self._is_pooled:
                self._pooled.reset()
            else:
                self._pooled = None

    # keeping

    def merge(self, other: Reader, step: int) -> None:
        """Adds what another reader has seen; decay, if any, is brought to ``step`` first."""
        self.flush()
        other.flush()
        if other.state is None:
            return
        own = self.prepare(other.state.channels, other.state.moment.device)
        own.scale_(self._decay_until(step))
        behind = step - other._counters()[2]
        own.merge(other.state, scale=1.0 if self.decay is None else self.decay**behind)
        self.total_calls += other.total_calls

    def state_dict(self) -> dict[str, Any]:
        """Statistics and sampling position; buffered rows are added first."""
        self.flush()
        sampled, carry, state_step = self._counters()
        return {
            "state": None if self.state is None else self.state.state_dict(),
            "channels": 0 if self.state is None else self.state.channels,
            "fraction": self.fraction,
            "state_step": state_step,
            "sampled": sampled,
            "carry": carry,
            "total_calls": self.total_calls,
            "is_pooled": self._is_pooled,
        }

    def load_state_dict(self, saved: dict[str, Any], with_rows: bool = True) -> None:
        """Continues from :meth:`state_dict`; without rows only the plan is taken."""
        self.reset()
        self.fraction = saved["fraction"]
        self.state_step = saved["state_step"]
        self.total_calls = saved["total_calls"]
        self._sampled = saved["sampled"]
        self._carry = saved["carry"]
        self._is_pooled = saved["is_pooled"]
        if saved["state"] is not None and with_rows:
            device = torch.device("cpu") if self.state is None else self.state.moment.device
            self.prepare(saved["channels"], device).load_state_dict(saved["state"])

    def reset(self) -> None:
        """Forgets every row; the fraction to read and the sampling position stay."""
        self.leave_device()
        if self.state is not None:
            self.state.reset()
        if self._pooled is not None:
            self._pooled.reset()
        self._buffer.clear()
        self._waiting = []
        self.total_calls = self.calls = self.offered_rows = 0
        self.state_step = 0
