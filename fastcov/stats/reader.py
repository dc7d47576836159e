"""Reads the activations of one tap: which of their rows, on the host's counters or the device's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal

import torch
from torch import Tensor

from fastcov.ops import library
from fastcov.rows.sequence import WHOLE, rows_due
from fastcov.stats.adder import RowSource
from fastcov.stats.cursor import CALLS, FRACTION, OFFERED, PHASE, POSITIONS, Counter
from fastcov.stats.device_adder import DeviceAdder
from fastcov.stats.seen import MOST_LAYOUTS, Seen
from fastcov.stats.state import CovarianceState

_WAITING_SHARE = 1 / 64  # of a call's rows, kept until the first step has shown the budget


@dataclass
class _Waiting:
    """Rows of the first step, kept until the fraction to read is known."""

    rows: Tensor
    offered: int
    is_whole: bool


class Reader(DeviceAdder):
    """Running statistics of one tap.

    Args:
        name: Canonical name of the tap.
        phase: Start of the sampling sequence.
        fraction: Share of the rows to read, None until :meth:`plan` is called.
        weighting: See :class:`fastcov.stats.adder.Adder`.
        decay: Likewise.
        first_fill: Likewise.

    Attributes:
        offered_rows: Of the running step, then of the last one.
    """

    phase = Counter(PHASE)

    def __init__(
        self,
        name: str,
        *,
        phase: int,
        fraction: float | None,
        weighting: Literal["position", "image"],
        decay: float | None,
        first_fill: float = 1.0,
    ) -> None:
        super().__init__(weighting=weighting, decay=decay, fraction=fraction, first_fill=first_fill)
        self.name = name
        self.phase = phase
        self._adds_again = False  # whether that is every row
        # What adds every row of calls of a layout, on a GPU.
        self._accumulations: dict[Seen, Callable[[Tensor], None]] = {}
        self._waiting: list[_Waiting] = []
        self._device: torch.device | None = None  # of the state

    def begin_step(self, step: int) -> None:
        """Forgets the sizes of the step before."""
        self._step = step
        self.earlier_calls += self.calls
        self.calls = 0
        self.offered_rows = 0
        self._positions = 0
        if self._device_buffer is not None:
            self._device_buffer.step_rows = 0

    def prepare(self, channels: int, device: torch.device) -> CovarianceState:
        """The state, made or moved where needed."""
        if self.state is None:
            self.state = CovarianceState(channels, device)
        elif self.state.moment.device != device:
            self.leave_device()
            self.flush()
            self.state.to(device)
            if self._pooled is not None:
                self._pooled.to(device)
            for part in self._waiting:  # of a first step that an exception has ended
                part.rows = part.rows.to(device)
            self._buffer.release()
            self._again = None
            self._accumulations.clear()
            self.forget_moves()
        self._device = device
        return self.state

    def read(
        self, activation: Tensor, seen: Seen | None = None, source: RowSource | None = None
    ) -> None:
        """Takes what this call contributes.

        Args:
            activation: One that ``seen`` fits, or a row view. [B, ..., C]
            seen: Its sizes; None looks for them.
            source: Adds the same rows for less, where it can.
        """
        if seen is None:
            seen = Seen(activation)
        offered = seen.rows
        if offered == 0:
            return
        numbers = self.cursor.numbers
        numbers[CALLS] += 1
        numbers[OFFERED] += offered
        numbers[POSITIONS] += seen.positions
        if self._device_buffer is not None and self._fits(self._device_buffer, seen):
            assert self._device_step is not None
            self._device_buffer.gather(
                activation, seen, self._device_step, numbers[FRACTION], numbers[PHASE]
            )
            return
        if self._device is not seen.device:
            self.prepare(seen.channels, seen.device)
        fraction = numbers[FRACTION]
        if fraction == WHOLE:
            self._add(activation, seen, source)
            if offered >= seen.direct_rows and self.weighting == "position" and self.decay is None:
                self._remember(activation, seen, adds=True)
        elif fraction:
            due, self._carry = rows_due(offered, fraction, self._carry)
            if due:
                self._sample(activation, seen, due)
        elif self.fraction is None:
            self._wait(activation, seen)

    def _wait(self, activation: Tensor, seen: Seen) -> None:
        offered = seen.rows
        self._match_dtype(seen.dtype)
        kept_before = sum(part.rows.numel() for part in self._waiting) // seen.channels
        limit = max(seen.buffer_rows - kept_before, ceil(offered * _WAITING_SHARE))
        kept: Tensor
        if offered <= limit:
            kept = seen.view(activation).clone(memory_format=torch.contiguous_format)
        else:
            # Any prefix of the sampling sequence is a fair sample: the plan keeps what is due.
            kept = seen.new_rows(limit)
            self._gather(kept, 0, activation, seen, limit)
        self._waiting.append(_Waiting(kept, offered, offered <= limit))

    def plan(self, fraction: float) -> None:
        """Sets the share of rows to read and takes it from what has waited."""
        self.set_fraction(fraction)
        waiting, self._waiting = self._waiting, []
        for part in waiting:
            rows = part.rows
            if self._fixed_fraction < WHOLE:
                due, self._carry = rows_due(part.offered, self._fixed_fraction, self._carry)
                if part.is_whole and due:
                    self._sample(rows, Seen(rows), due)
                    continue
                rows = rows[:due]
            seen = Seen(rows)
            if self._fixed_fraction == WHOLE and part.offered >= seen.direct_rows:
                seen.direct_rows = 0  # kept in part: the layer's calls need no buffer
            self._add(rows, seen)

    def _sample(self, activation: Tensor, seen: Seen, due: int) -> None:
        if due >= seen.rows:
            self._add(activation, seen)
        elif due > seen.buffer_rows:
            sample = seen.new_rows(due)
            self._gather(sample, 0, activation, seen, due)
            self._add(sample, Seen(sample))
        else:
            storage = self._room(seen, due)
            self._gather(storage, self._buffer.fill, activation, seen, due)
            self._buffer.mark(due, self._step)
            self._remember(activation, seen, adds=False)

    def _remember(self, activation: Tensor, seen: Seen, adds: bool) -> None:
        if library.has_again and seen.layout is not None:
            self.cursor.remember(seen.layout)
            self._again, self._adds_again = seen, adds
        elif adds and seen.is_repeatable:
            assert self.state is not None
            accumulation = library.accumulation_of(self.state, activation, seen.channel_dim)
            if accumulation is not None:
                if len(self._accumulations) >= MOST_LAYOUTS:
                    self._accumulations.clear()
                self._accumulations[seen] = accumulation

    def read_again(self, value: Tensor, seen: Seen, source: RowSource | None = None) -> bool:
        """Takes what a call contributes that may be like the last one.

        Args:
            value: What the module returned or was given.
            seen: What ``value`` may fit.
            source: See :meth:`read`.

        Returns:
            False, with nothing done, where ``seen`` does not fit.
        """
        if seen is self._again:
            if source is None and self._repeat(value, seen):
                return True
        elif (accumulation := self._accumulations.get(seen)) is not None:
            if not seen.fits(value):
                return False
            numbers = self.cursor.numbers
            if numbers[FRACTION] == WHOLE and seen.dtype is self._dtype:
                numbers[CALLS] += 1
                numbers[OFFERED] += seen.rows
                numbers[POSITIONS] += seen.positions
                # Seen.source, without a call in every hook.
                accumulation(value if seen.channel_dim > 0 else seen.view(value))
                return True
        if not seen.fits(value):
            return False
        self.read(value, seen, source)
        return True

    def _repeat(self, value: Tensor, seen: Seen) -> bool:
        # All that `read` does where rows are added at once, or where the buffer has room for them.
        state, storage, cursor = self.state, self._buffer.storage, self.cursor.tensor
        if state is None or seen.dtype is not self._dtype:
            return False
        if self._adds_again:
            to = (state.moment, state.sum, state.shift, state.weight, state.count)
            return library.accumulate_again_(cursor, *to, value) >= 0
        if storage is None:
            return False
        due = library.gather_again_(cursor, storage, value)
        if due > 0:
            self._buffer.mark_step(due, self._step)
        return due >= 0

    def _gather(
        self, buffer: Tensor, buffer_row: int, activation: Tensor, seen: Seen, samples: int
    ) -> None:
        library.gather_(
            buffer,
            seen.source(activation),
            buffer_row,
            self._sampled,
            samples,
            seen.run_length,
            self.phase,
            seen.channel_dim,
        )
        self._sampled += samples

    # keeping

    def __getstate__(self) -> dict[str, Any]:
        # Of what is known of layouts nothing: it names kernels, which a copy's reader may lack.
        return {**self.__dict__, "_again": None, "_accumulations": {}}

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
        self.earlier_calls += other.total_calls

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
        self.set_fraction(saved["fraction"])
        self.state_step = saved["state_step"]
        self.earlier_calls = saved["total_calls"]
        self._sampled = saved["sampled"]
        self._carry = saved["carry"]
        self._is_pooled = saved["is_pooled"]
        if saved["state"] is not None and with_rows:
            device = torch.device("cpu") if self.state is None else self.state.moment.device
            self.prepare(saved["channels"], device).load_state_dict(saved["state"])

    def reset(self) -> None:
        """Forgets every row; the fraction to read and the sampling position stay."""
        self.leave_device()
        self.forget_moves()
        if self.state is not None:
            self.state.reset()
        if self._pooled is not None:
            self._pooled.reset()
        self._buffer.clear()
        self._waiting = []
        self.earlier_calls = self.calls = self.offered_rows = 0
        self.state_step = 0
