"""Adds rows to one CovarianceState: at once, or through a buffer.

Where a call brings many rows, they are added at once, while the activation is in cache. Sampled
rows, and calls that bring few, are copied into a buffer of about 2C rows first and added together:
updating a float64 state costs more than the gram itself when it brings few rows. How many are few
depends on the machine: :func:`fastcov.rows.sequence.direct_rows`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from fastcov.ops import library
from fastcov.rows.sequence import fixed_point
from fastcov.stats.cursor import CALLS, FRACTION, POSITIONS, Counter, Cursor
from fastcov.stats.host_buffer import RowBuffer
from fastcov.stats.seen import Seen
from fastcov.stats.state import CovarianceState

RowSource = Callable[..., bool]
"""Adds the rows of a call to a state by a cheaper way if it can, else returns False: takes the
state, ``row_scale`` and ``decay`` (:meth:`fastcov.stats.affine.AffineMap.add_to`)."""

_HALF = (torch.bfloat16, torch.float16)


class Adder:
    """State and buffer of one tap, and the weights of its rows.

    Args:
        weighting: "position": every row weighs 1. "image": every index of dim 0 weighs 1 a step,
            shared by its positions over all calls of the step.
        decay: Factor on everything seen before, once a step; None keeps everything.
        fraction: Share of the rows that are read, None until it is planned.
        first_fill: See :func:`fastcov.rows.sequence.first_fill`.

    Attributes:
        calls: Of the running step, then of the last one.
    """

    calls = Counter(CALLS)
    _positions = Counter(POSITIONS)
    _fixed_fraction = Counter(FRACTION)

    def __init__(
        self,
        *,
        weighting: Literal["position", "image"],
        decay: float | None,
        fraction: float | None,
        first_fill: float,
    ) -> None:
        self.weighting = weighting
        self.decay = decay
        self.cursor = Cursor()
        self.set_fraction(fraction)
        self.state: CovarianceState | None = None
        self.earlier_calls = 0  # of the steps before
        self.state_step = 0  # the step up to which decay has been applied
        self._pooled: CovarianceState | None = None
        self._is_pooled: bool | None = None  # unknown before the first step has ended
        self._is_unweighted = False  # the state, during that step
        is_marked = weighting == "image" or decay is not None
        self._buffer = RowBuffer(self.cursor, is_marked, first_fill)
        self._step = 0
        self._dtype: torch.dtype | None = None  # of the rows read last

    def set_fraction(self, fraction: float | None) -> None:
        """Sets the share of the rows to read; None until it is planned."""
        self.fraction = fraction
        self._fixed_fraction = 0 if fraction is None else fixed_point(fraction)

    @property
    def total_calls(self) -> int:
        """Calls of all steps."""
        return self.earlier_calls + self.calls

    def _add(self, activation: Tensor, seen: Seen, source: RowSource | None = None) -> None:
        # Every row: at once where the call brings many, else through the buffer.
        count = seen.rows
        if count >= seen.direct_rows:
            if seen.dtype is not self._dtype:
                self._match_dtype(seen.dtype)
            last = None if self.decay is None else self._buffer.last_step
            if last is not None and last < self._step:
                # The state moves to this step: rows of earlier ones would miss their decay.
                self._flush_full()
            if self.weighting == "position":
                rows = seen.source(activation)
                self._accumulate(rows, self._step, None, 1.0, seen.channel_dim, source)
            else:
                self._add_image_weighted(seen.view(activation), source)
        elif count:
            buffer = self._room(seen, count)
            fill = self._buffer.fill
            rows = seen.view(activation)
            buffer[fill : fill + count].view(rows.shape).copy_(rows)
            self._buffer.mark(count, self._step)

    def _add_image_weighted(self, rows: Tensor, source: RowSource | None) -> None:
        assert self.state is not None
        # The weight of a row is known when the step's last call has been seen.
        if self._is_pooled is False and self.calls == 1:
            self._accumulate(rows, self._step, row_scale=self._row_weight(), source=source)
        elif self._is_pooled is None and self.earlier_calls == 0:
            self._accumulate(rows, self._step)  # all that the state holds is of this step
            self._is_unweighted = True
        else:
            if self._pooled is None:
                self._pooled = CovarianceState(self.state.channels, rows.device)
            self._pooled.update(rows)

    def _accumulate(
        self,
        rows: Tensor,
        step: int,
        row_weight: Tensor | None = None,
        row_scale: float = 1.0,
        channel_dim: int = -1,
        source: RowSource | None = None,
    ) -> None:
        state = self.state
        assert state is not None
        decay = 1.0 if self.decay is None else self._decay_until(step)
        to = (state.moment, state.sum, state.shift, state.weight, state.count)
        if row_weight is None and row_scale == 1.0 and decay == 1.0:
            if source is not None and source(state):
                return
            library.accumulate_(*to, rows, channel_dim)
            return
        with state.weighing(rows, row_weight, row_scale, decay):
            if source is None or not source(state, row_scale=row_scale, decay=decay):
                library.accumulate_(*to, rows, channel_dim, row_weight, row_scale, decay)

    def _decay_until(self, step: int) -> float:
        steps = step - self.state_step
        if steps <= 0:
            return 1.0
        self.state_step = step
        return 1.0 if self.decay is None else self.decay**steps

    def _row_weight(self) -> float:
        # Horvitz-Thompson: a row read with probability `fraction` stands for 1 / fraction rows.
        if self.weighting == "position":
            return 1.0
        assert self.fraction is not None
        return 1.0 / (self._positions * min(self.fraction, 1.0))

    def _room(self, seen: Seen, wanted: int) -> Tensor:
        if seen.dtype is not self._dtype:
            self._match_dtype(seen.dtype)
        buffer = self._buffer
        if buffer.storage is not None and buffer.fill + wanted <= buffer.limit:
            return buffer.storage
        if buffer.fill:
            # A step's weights are final at its end only: until then its rows may not leave.
            is_held = self.weighting == "image" and buffer.last_step == self._step
            if not is_held:
                self._flush_full()
        return buffer.room(seen, wanted)

    def _match_dtype(self, dtype: torch.dtype) -> None:
        before, self._dtype = self._dtype, dtype
        if before is None or before is dtype or self.state is None:
            return
        self.flush()
        self._buffer.release()
        if dtype in _HALF and before not in _HALF:
            # Half-precision rows have no exact form about a shift.
            self.state.translate_(torch.zeros_like(self.state.shift))

    def flush(self) -> None:
        """Adds the buffered rows to the state."""
        self._flush_full()
        self._buffer.stagger()

    def _flush_full(self) -> None:
        rows = self._buffer.rows
        if rows is None:
            return
        row_weight = self._buffer.row_weight(self.decay or 1.0, rows.device)
        last = self._buffer.last_step
        self._accumulate(rows, self.state_step if last is None else last, row_weight)
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
