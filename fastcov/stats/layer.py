"""Layer: the running statistics of one tap, and the rows that wait to be added to them.

Where a call brings many rows, they are added at once, while the activation is in cache. Sampled
rows, and those of calls that bring few, are copied into a buffer first and added together: see
:mod:`fastcov.stats.buffering`. The buffer's counters are on the host, or on a GPU, where a CUDA
graph can replay the sampling.

Later calls of a known layout take a shorter way to the same result: a route of
:mod:`fastcov.stats.route`. :meth:`Layer.changed` makes every route decide anew.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from typing import Any, Literal, NamedTuple
from weakref import WeakMethod

import torch
from torch import Tensor

from fastcov.ops import library
from fastcov.ops.backend import Service, service_of
from fastcov.ops.covariance import Precision
from fastcov.rows.dtypes import ROW_DTYPES
from fastcov.rows.layout import ActivationLayout
from fastcov.rows.mask import weighted_parts
from fastcov.rows.sequence import WHOLE, fixed_point, rows_due
from fastcov.stats.buffering import (
    SKETCH_ROWS,
    buffer_rows,
    device_buffer_limit,
    device_buffer_rows,
    direct_rows,
)
from fastcov.stats.cursor import (
    CALLS,
    CARRY,
    FRACTION,
    OFFERED,
    PHASE,
    POSITIONS,
    SAMPLED,
    Counter,
    Cursor,
)
from fastcov.stats.device_buffer import DeviceBuffer
from fastcov.stats.host_buffer import HostBuffer
from fastcov.stats.state import CovarianceState
from fastcov.stats.weighted_buffer import WeightedBuffer

RowSource = Callable[..., bool]
"""Function of a state, ``row_scale`` and ``decay`` that adds a call's rows in a cheaper way, or
returns False where it cannot: see :meth:`fastcov.stats.affine.AffineMap.add_to`."""

_KEPT_SHARE = 1 / 64  # of a call's rows, kept until the first step has shown the fraction to read
# Moves of the counters to the device. Each waits for the device, so sizes or dtypes that alternate
# from step to step must not cause one in every step.
_MOST_MOVES = 4


@dataclass
class _EarlyRows:
    """Rows of the first step, kept until the fraction to read is known.

    Attributes:
        rows: All rows of one call, or a sample of them.
        offered: Rows that the call offered.
        is_whole: True if ``rows`` are all of them.
        weights: Weights of the rows, where they differ. [N]
    """

    rows: Tensor
    offered: int
    is_whole: bool
    weights: Tensor | None = None


class Draw(NamedTuple):
    """Rows of one call that are due: see :meth:`Layer.draw`.

    Attributes:
        rows: How many.
        offered: Rows of the call.
        first_sample: Number of the first of them in the sampling sequence.
        run_length: Neighbouring positions that are read together.
    """

    rows: int
    offered: int
    first_sample: int
    run_length: int = 1

    @property
    def is_whole(self) -> bool:
        """True if all rows of the call are due."""
        return self.rows == self.offered


class Layer:
    """Running statistics of one tap, or of several taps that see the same tensors.

    Args:
        name: Canonical name of the tap.
        phase: Start of the sampling sequence.
        fraction: Share of the rows to read, None until :meth:`plan` is called.
        weighting: "position": every row weighs 1. "image": every index of dim 0 weighs 1 a step,
            shared by its positions over all calls of the step.
        decay: Factor on everything read before, once a step; None keeps everything.
        first_fill: Share of the buffer that is filled before it is first emptied, from
            :func:`fastcov.rows.sequence.first_fill`.
        precision: Precision of the rows' products: see :func:`fastcov.ops.accumulate_`.
        sketch: Channels to which wider rows are projected; None keeps all.

    Attributes:
        cursor: Counters, in memory that Python and operators share.
        calls: Calls of the running step; after its end, of the last one.
        offered_rows: Rows that these calls offered.
        left_out_rows: Rows of weight 0 among those, counted while the fraction is not known.
        earlier_calls: Calls of the steps before.
        phase: See the argument.
        fraction: Share of the rows to read, as given or planned.
        state: Sums of the rows read; None before the first.
        buffer: Rows that wait, with counters on the host.
        device_buffer: Rows that wait, with counters on a GPU; None where the host counts.
        dtype: Dtype of the rows read last.
        service: Implementation that serves rows of this dtype on the state's device.
        step: Number of the running step.
        state_step: Step up to which decay has been applied to the state.
        why_on_host: Reason why the host counts for rows on a GPU; empty if none is known.
    """

    calls = Counter(CALLS)
    offered_rows = Counter(OFFERED)
    phase = Counter(PHASE)
    _positions = Counter(POSITIONS)
    _fixed_fraction = Counter(FRACTION)
    _carry = Counter(CARRY)
    _sampled = Counter(SAMPLED)

    def __init__(
        self,
        name: str,
        *,
        phase: int,
        fraction: float | None,
        weighting: Literal["position", "image"],
        decay: float | None,
        first_fill: float = 1.0,
        precision: Precision = "split",
        sketch: int | None = None,
    ) -> None:
        self.name = name
        self.sketch = sketch
        self.weighting = weighting
        self.decay = decay
        self.precision: Precision = precision
        self.cursor = Cursor()
        self.phase = phase
        self.state: CovarianceState | None = None
        self.device_buffer: DeviceBuffer | None = None
        self.dtype: torch.dtype | None = None
        self.service: Service | None = None
        self.step = 0
        self.state_step = 0
        self.earlier_calls = 0
        self.left_out_rows = 0
        self._weighted = WeightedBuffer(decay)
        self.buffer = HostBuffer(self.cursor, weighting == "image" or decay is not None, first_fill)
        self._listeners: list[WeakMethod[Callable[[], None]]] = []
        self._early_rows: list[_EarlyRows] = []
        self._device: torch.device | None = None  # of the state
        # The rest is for weighting="image": the weight of a row is known when its step ends.
        self._step_state: CovarianceState | None = None  # sums of the running step at weight 1
        # True if some step had several calls; None before the first step has ended.
        self._has_many_calls: bool | None = None
        # True while `state` itself holds the first step's rows, still at weight 1.
        self._is_unweighted = False
        self._forget_device()
        self.set_fraction(fraction)

    # listeners

    def listen(self, listener: Callable[[], None]) -> None:
        """Registers a method that :meth:`changed` calls; its object is not kept alive."""
        self._listeners.append(WeakMethod(listener))

    def changed(self) -> None:
        """Tells the listeners that state, buffer, fraction, dtype or device changed."""
        for listener in self._listeners:
            if (call := listener()) is not None:
                call()

    def set_fraction(self, fraction: float | None) -> None:
        """Sets the share of the rows to read; None leaves it open until :meth:`plan`."""
        self.fraction = fraction
        self._fixed_fraction = 0 if fraction is None else fixed_point(fraction)
        self.changed()

    @property
    def total_calls(self) -> int:
        """Calls of all steps."""
        return self.earlier_calls + self.calls

    # one step

    def begin_step(self, step: int) -> None:
        """Starts the counters of a step."""
        # Not by the attributes: they take 0.1 us each, of every layer in every step.
        numbers = self.cursor.numbers
        self.step = step
        self.earlier_calls += numbers[CALLS]
        numbers[CALLS] = numbers[OFFERED] = numbers[POSITIONS] = 0
        self.left_out_rows = 0
        if self.device_buffer is not None:
            self.device_buffer.step_rows = 0

    def read(
        self, activation: Tensor, layout: ActivationLayout, source: RowSource | None = None
    ) -> None:
        """Reads the rows of one call, or the sample that is due.

        Args:
            activation: The call's activation; a row view where the layout has no key. [B, ..., C]
            layout: Layout of the activation.
            source: Function that adds the same rows in a cheaper way, where it can.
        """
        offered = layout.rows
        if offered == 0:
            return
        numbers = self.cursor.numbers
        self._count(layout)
        buffer = self.device_buffer
        if buffer is not None and not self.adds_at_once(layout):
            if self.has_room(layout, numbers[CALLS]) or self._make_room(layout, numbers[CALLS]):
                buffer.step_rows += offered
                gather = buffer.prepare(activation, layout, numbers[FRACTION], numbers[PHASE])
                gather.launch_(activation)
                return
            # Another device or dtype, or more rows than one launch adds: the host counts again.
            self._leave_full_buffer(buffer, layout)
        self._expect(layout)
        fraction = numbers[FRACTION]
        if fraction == WHOLE:
            self._add(activation, layout, source)
        elif fraction:
            due, self._carry = rows_due(offered, fraction, self._carry)
            if due:
                self._sample(activation, layout, due)
        elif self.fraction is None:
            self._keep_early(activation, layout)

    def _count(self, layout: ActivationLayout) -> None:
        numbers = self.cursor.numbers
        numbers[CALLS] += 1
        numbers[OFFERED] += layout.rows
        numbers[POSITIONS] += layout.positions

    def _expect(self, layout: ActivationLayout) -> None:
        if self._device != layout.device:
            self.prepare(layout.channels, layout.device)
        if layout.dtype is not self.dtype:
            self._match_dtype(layout.dtype)

    def read_weighted(self, activation: Tensor, layout: ActivationLayout, weights: Tensor) -> None:
        """Reads the rows of one call, or the sample that is due, each with a weight of its own.

        Args:
            activation: See :meth:`read`.
            layout: Layout of the activation.
            weights: One weight a row; rows of weight 0 are not read. [B, ...]
        """
        if layout.rows == 0:
            return
        self.leave_device()
        self._expect(layout)
        draw = self.draw(layout)
        if self.fraction is None:
            self.left_out_rows += int((weights == 0).sum())  # waits for a GPU, in a first step
        if draw.is_whole and self.fraction is not None:
            self._add_weighted(layout.view(activation), weights)
        elif draw.rows:
            sizes = ActivationLayout(weights[..., None])
            sampled = self.drawn(draw, weights[..., None], sizes)
            self.add_drawn(draw, self.drawn(draw, activation, layout), sampled[:, 0])

    def draw(self, layout: ActivationLayout) -> Draw:
        """Counts a call, and tells which of its rows are due, with all counters on the host.

        The caller reads these rows (:meth:`drawn`) and passes them to :meth:`add_drawn`.

        Args:
            layout: Layout of the call, which has a row.
        """
        self._count(layout)
        self.leave_device()
        self._moves_left = 0
        fraction, offered = self._fixed_fraction, layout.rows
        due = offered
        if self.service is None:
            self.service = service_of(layout.dtype, layout.device)
        if self.fraction is None:
            due = self._early_limit(layout)
        elif fraction < WHOLE:
            due, self._carry = rows_due(offered, fraction, self._carry)
        draw = Draw(min(due, offered), offered, self._sampled, layout.run_length)
        if not draw.is_whole:
            self._sampled += draw.rows
        return draw

    def drawn(self, draw: Draw, activation: Tensor, layout: ActivationLayout) -> Tensor:
        """Copy of the rows that :meth:`draw` has told, of any activation of as many rows. [N, C]"""
        if draw.is_whole:
            return layout.view(activation).detach().reshape(-1, layout.channels).clone()
        rows = layout.new_rows(draw.rows)
        kernels = service_of(layout.dtype, layout.device).kernels
        library.GATHER[kernels](
            rows,
            layout.source(activation),
            0,
            draw.first_sample,
            draw.rows,
            draw.run_length,
            self.phase,
            layout.channel_dim,
        )
        return rows

    def add_drawn(self, draw: Draw, rows: Tensor, weights: Tensor | None = None) -> None:
        """Adds the rows of :meth:`draw`, or keeps them until the fraction to read is known.

        Args:
            draw: The draw.
            rows: The rows. [N, C]
            weights: Weights of the rows, where they differ. [N]
        """
        layout = ActivationLayout(rows)
        self._expect(layout)
        if self.fraction is None:
            self._early_rows.append(_EarlyRows(rows, draw.offered, draw.is_whole, weights))
        elif weights is None:
            self._add(rows, layout)
        else:
            self._add_weighted(rows, weights)

    def _add_weighted(self, rows: Tensor, weights: Tensor) -> None:
        flat = weights.reshape(-1)
        assert self.state is not None
        if len(flat) < self._direct_rows(self.state.channels):
            if self.weighting == "position" and not self._weighted.has_room(len(flat)):
                self._flush_weighted()
            capacity = self._buffer_rows(self.state.channels)
            self._weighted.add(rows.reshape(len(flat), -1), flat, self.step, capacity)
        elif self.weighting == "image":
            self._pool_weighted(rows, weights)
        else:
            self._accumulate_weighted(rows, weights, self.step)

    def _accumulate_weighted(self, rows: Tensor, weights: Tensor, step: int) -> None:
        assert self.state is not None
        if self.decay is not None:
            self._flush_full()  # rows of earlier steps must be in the state before: see _add
        for part in weighted_parts(rows, weights):
            self.state.update(
                part.rows,
                part.weights,
                row_scale=part.scale,
                decay=self._decay_until(step),
                precision=self.precision,
            )

    def _pool_weighted(self, rows: Tensor, weights: Tensor) -> None:
        for part in weighted_parts(rows, weights):
            self._pool(part.rows, part.weights, part.scale)

    def _flush_weighted(self) -> None:
        waiting = self._weighted
        if self.decay is not None:
            self._flush_full()  # moves the state to the last step of these rows
        if self.weighting == "image" and (held := waiting.take_unsettled()) is not None:
            self._pool_weighted(*held)
        waiting.move_to(self.state_step)
        if (taken := waiting.take()) is not None:
            self._accumulate_weighted(*taken, waiting.step)

    def end_step(self) -> None:
        """Settles the weights of the step's rows, whose number is known now."""
        if self.calls == 0:
            return
        # For good: a first call that is taken for the only one weighs too much in a step of two.
        self._has_many_calls = self._has_many_calls is True or self.calls > 1
        if self.weighting == "position":
            return
        self.buffer.weigh(self.step, self._row_weight())
        self._weighted.settle(self._row_weight())
        state = self.state
        if state is not None and self._weighted.fill >= self._buffer_rows(state.channels):
            self._flush_weighted()
        if self._is_unweighted and self.state is not None:
            self.state.scale_(self._row_weight())
            self._is_unweighted = False
        if self._step_state is not None and self.state is not None:
            self.state.scale_(self._decay_until(self.step))
            self.state.merge(self._step_state, scale=self._row_weight())
            if self._has_many_calls:
                self._step_state.reset()
            else:
                self._step_state = None

    def plan(self, fraction: float) -> None:
        """Sets the share of the rows to read, and reads this share of the first step's rows."""
        self.set_fraction(fraction)
        early, self._early_rows = self._early_rows, []
        for part in early:
            rows = part.rows
            layout = ActivationLayout(rows)
            weights = part.weights
            if layout.dtype is not self.dtype:
                self._match_dtype(layout.dtype)
            if self._fixed_fraction < WHOLE:
                due, self._carry = rows_due(part.offered, self._fixed_fraction, self._carry)
                if part.is_whole and 0 < due < part.offered and weights is not None:
                    draw = Draw(due, part.offered, self._sampled)
                    self._sampled += due
                    self._add_weighted(
                        self.drawn(draw, rows, layout),
                        self.drawn(draw, weights[:, None], ActivationLayout(weights[:, None])),
                    )
                    continue
                if part.is_whole and due and weights is None:
                    self._sample(rows, layout, due)
                    continue
                rows = rows[:due]
                layout = ActivationLayout(rows)
                weights = None if weights is None else weights[:due]
            if weights is not None:
                if len(rows):
                    self._add_weighted(rows, weights)
                continue
            # Later calls of this size will be added at once: a buffer made for this one would stay.
            is_large = part.offered >= self._direct_rows(layout.channels)
            self._add(rows, layout, at_once=self._fixed_fraction == WHOLE and is_large)

    def prepare(self, channels: int, device: torch.device) -> CovarianceState:
        """State of the layer, made or moved to a device where needed."""
        if self.state is None:
            is_wide = self.sketch is not None and channels > self.sketch
            self.state = CovarianceState(channels, device, sketch=self.sketch if is_wide else None)
            self._forget_device()
        elif self.state.moment.device != device:
            self.leave_device()
            self.flush()
            self.state.to(device)
            if self._step_state is not None:
                self._step_state.to(device)
            for part in self._early_rows:  # left by a first step that an exception has ended
                part.rows = part.rows.to(device)
                part.weights = None if part.weights is None else part.weights.to(device)
            self.buffer.release()
            self._weighted.release()
            self._forget_device()
        if self._device != device:
            self._device = device
            self.service = service_of(self.dtype or torch.float32, device)
            self.changed()
        return self.state

    # how rows are added

    @property
    def _is_for_kernels(self) -> bool:
        # False where rows are converted or projected before the kernels see them.
        is_sketched = self.state is not None and self.state.sketch is not None
        return self.precision == "split" and not is_sketched

    def _buffer_rows(self, channels: int) -> int:
        if self.state is not None and self.state.sketch is not None:
            return SKETCH_ROWS
        assert self.service is not None
        return buffer_rows(channels, self.service.is_host)

    def _direct_rows(self, channels: int) -> int:
        assert self.service is not None
        if self.state is not None and self.state.sketch is not None:
            return SKETCH_ROWS
        return direct_rows(channels, self.service.is_host)

    def adds_at_once(self, layout: ActivationLayout) -> bool:
        """True if the kernels add calls of a layout whole and at once, each row at weight 1."""
        return (
            self.cursor.numbers[FRACTION] == WHOLE
            and self.weighting == "position"
            and self.decay is None
            and self._is_for_kernels
            and self.service is not None
            and layout.rows >= self._direct_rows(layout.channels)
        )

    def _add(
        self,
        activation: Tensor,
        layout: ActivationLayout,
        source: RowSource | None = None,
        at_once: bool = False,
    ) -> None:
        # All rows of the call: at once where these are many, else through the buffer.
        count = layout.rows
        if at_once or count >= self._direct_rows(layout.channels):
            last = None if self.decay is None else self.buffer.last_step
            if last is not None and last < self.step:
                # Decay brings the state to this step: rows of earlier steps must be in it before.
                self._flush_full()
            if self.weighting == "position":
                rows = layout.source(activation)
                self._accumulate(rows, self.step, None, 1.0, layout.channel_dim, source)
            else:
                self._add_image_weighted(layout.view(activation), source)
        elif count:
            buffer = self._room(layout, count)
            fill = self.buffer.fill
            rows = layout.view(activation)
            buffer[fill : fill + count].view(rows.shape).copy_(rows)
            self.buffer.mark(count, self.step)

    def _add_image_weighted(self, rows: Tensor, source: RowSource | None) -> None:
        assert self.state is not None
        # Only if no further call follows in this step is the weight of a row known now: taken to be
        # so where the last step had one call.
        if self._has_many_calls is False and self.calls == 1:
            self._accumulate(rows, self.step, row_scale=self._row_weight(), source=source)
        elif self._has_many_calls is None and self.earlier_calls == 0:
            self._accumulate(rows, self.step)  # the state holds this step alone: scaled at its end
            self._is_unweighted = True
        else:
            self._pool(rows)

    def _pool(self, rows: Tensor, weights: Tensor | None = None, scale: float = 1.0) -> None:
        # Rows of the running step, whose weight its end will tell.
        assert self.state is not None
        if self._step_state is None:
            self._step_state = CovarianceState(
                self.state.channels, rows.device, sketch=self.state.sketch_width
            )
        self._step_state.update(rows, weights, row_scale=scale, precision=self.precision)

    def _accumulate(
        self,
        rows: Tensor,
        step: int,
        row_weight: Tensor | None = None,
        row_scale: float = 1.0,
        channel_dim: int = -1,
        source: RowSource | None = None,
    ) -> None:
        state, service = self.state, self.service
        assert state is not None
        assert service is not None
        accumulate_ = library.ACCUMULATE[service.kernels]
        decay = 1.0 if self.decay is None else self._decay_until(step)
        if not self._is_for_kernels:
            state.update(
                rows if channel_dim == -1 else rows.movedim(channel_dim, -1),
                row_weight,
                row_scale=row_scale,
                decay=decay,
                precision=self.precision,
            )
            return
        to = (state.moment, state.sum, state.shift, state.weight, state.count)
        if row_weight is None and row_scale == 1.0 and decay == 1.0:
            if source is None or not source(state):
                accumulate_(*to, rows, channel_dim)
            return
        with state.weighing(rows, row_weight, row_scale, decay):
            if source is None or not source(state, row_scale=row_scale, decay=decay):
                accumulate_(*to, rows, channel_dim, row_weight, row_scale, decay)

    def _sample(self, activation: Tensor, layout: ActivationLayout, due: int) -> None:
        if due >= layout.rows:
            self._add(activation, layout)
        elif due > self._buffer_rows(layout.channels):
            sample = layout.new_rows(due)
            self._gather(sample, 0, activation, layout, due)
            self._add(sample, ActivationLayout(sample))
        else:
            storage = self._room(layout, due)
            self._gather(storage, self.buffer.fill, activation, layout, due)
            self.buffer.mark(due, self.step)

    def _gather(
        self,
        buffer: Tensor,
        buffer_row: int,
        activation: Tensor,
        layout: ActivationLayout,
        due: int,
    ) -> None:
        assert self.service is not None
        library.GATHER[self.service.kernels](
            buffer,
            layout.source(activation),
            buffer_row,
            self._sampled,
            due,
            layout.run_length,
            self.phase,
            layout.channel_dim,
        )
        self._sampled += due

    def _keep_early(self, activation: Tensor, layout: ActivationLayout) -> None:
        offered, limit = layout.rows, self._early_limit(layout)
        kept: Tensor
        if offered <= limit:
            kept = layout.view(activation).clone(memory_format=torch.contiguous_format)
        else:
            # Every prefix of the sampling sequence is a fair sample: plan() reads the first rows.
            kept = layout.new_rows(limit)
            self._gather(kept, 0, activation, layout, limit)
        self._early_rows.append(_EarlyRows(kept, offered, is_whole=offered <= limit))

    def _early_limit(self, layout: ActivationLayout) -> int:
        kept_before = sum(part.rows.numel() for part in self._early_rows) // layout.channels
        return max(
            self._buffer_rows(layout.channels) - kept_before, ceil(layout.rows * _KEPT_SHARE)
        )

    def forget_early(self) -> None:
        """Drops the rows that were kept until the fraction is known: each has the weight 0."""
        self._early_rows = []

    def _decay_until(self, step: int) -> float:
        # Factor that brings the state to a step; the caller applies it.
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

    def _room(self, layout: ActivationLayout, wanted: int) -> Tensor:
        buffer = self.buffer
        storage = buffer.storage
        if storage is not None and buffer.fill + wanted <= buffer.limit:
            return storage
        if buffer.fill:
            # A step's weights are final at its end only: until then its rows may not leave.
            is_held = self.weighting == "image" and buffer.last_step == self.step
            if not is_held:
                self._flush_full()
        grown = buffer.room(layout, wanted, self._buffer_rows(layout.channels))
        if grown is not storage:
            self.changed()
        return grown

    def _match_dtype(self, dtype: torch.dtype) -> None:
        before = self.dtype
        if before is not None and self.state is not None:
            self.flush()
            self.buffer.release()
            self._weighted.release()
            if ROW_DTYPES[before].is_centred and not ROW_DTYPES[dtype].is_centred:
                # The shift has more digits than rows of 16 bits can subtract exactly.
                self.state.translate_(torch.zeros_like(self.state.shift))
        self.dtype = dtype
        self.service = service_of(dtype, self._device or torch.device("cpu"))
        self.changed()

    def flush(self) -> None:
        """Adds the rows that wait to the state."""
        if self.device_buffer is not None:
            self.device_buffer.flush(self.decay or 1.0)
        self._flush_full()
        if self.state is not None:
            self._flush_weighted()
        self.buffer.stagger()

    def _flush_full(self) -> None:
        if self.weighting == "image" and (held := self.buffer.take_unweighed()) is not None:
            self._pool(held)
        rows = self.buffer.rows
        if rows is None:
            return
        row_weight = self.buffer.row_weight(self.decay or 1.0, rows.device)
        last = self.buffer.last_step
        self._accumulate(rows, self.state_step if last is None else last, row_weight)
        self.buffer.clear()

    # counters on the device

    def _forget_device(self) -> None:
        # Experience with one device says nothing about another.
        self._moves_left = _MOST_MOVES
        self._largest_capacity = 0  # rows a step; never shrinks
        self.why_on_host = ""
        if not self._is_for_kernels:
            self._moves_left = 0
            self.why_on_host = (
                f'precision="{self.precision}" is the host\'s to add; take "split"'
                if self.precision != "split"
                else "is sketched by the host; give more memory, or watch fewer layers"
            )

    @property
    def wants_device_buffer(self) -> bool:
        """True if the last step's rows waited on the host's counters, and might on the device's."""
        return (
            self.device_buffer is None
            # Where all rows are read, only calls too small to be added at once use a buffer.
            and (self.buffer.storage is not None or self.cursor.numbers[FRACTION] < WHOLE)
            and self._moves_left > 0
            and self.cursor.numbers[CALLS] > 0
            and self.fraction is not None
            and self.dtype is not None
        )

    def use_device_buffer(self, step: Tensor) -> DeviceBuffer | None:
        """Moves the counters to the device, so that CUDA graphs can replay the sampling.

        Only where rows go through a buffer, every row weighs the same, and a step brings no more
        rows than :func:`fastcov.stats.buffering.device_buffer_limit`.

        Args:
            step: int64, number of the running step, kept up to date by the caller. []

        Returns:
            The buffer, or None where rows are added at once, or sampled by the host.
        """
        if self.device_buffer is not None:
            if self.device_buffer.step is not step:
                self.device_buffer.step = step
                self.changed()
            return self.device_buffer
        state, dtype = self.state, self.dtype
        if state is None or dtype is None or not self.wants_device_buffer:
            return None
        sizes = self._device_rows(state.channels)
        if not service_of(dtype, state.moment.device).counts_on_device:
            self.why_on_host = f"samples {dtype} on the host; cast to float32 or less"
        if sizes is None or self.why_on_host:
            self._moves_left = 0
            return None
        threshold, most_rows = sizes
        self._largest_capacity = max(self._largest_capacity, most_rows)
        self._moves_left -= 1
        self.flush()
        self.buffer.release()
        self.device_buffer = DeviceBuffer(
            state,
            dtype,
            step=step,
            threshold=threshold,
            first_threshold=ceil(threshold * self.buffer.first_fill),
            most_rows=self._largest_capacity,
            sampled=self._sampled,
            carry=self._carry,
            state_step=self.state_step,
        )
        self.changed()
        return self.device_buffer

    def _device_rows(self, channels: int) -> tuple[int, int] | None:
        if self.weighting != "position":
            return None
        rows: float = self.offered_rows
        if self.fraction is not None and self._fixed_fraction < WHOLE:
            rows *= self.fraction
        else:
            most_waiting = self.calls * (self._direct_rows(channels) - 1)
            if self.decay is not None and rows > most_waiting:
                return None  # some calls are added at once, with a decay that only the host knows
            rows = min(rows, most_waiting)
        sizes = device_buffer_rows(channels, rows, self.calls)
        if sizes is None:
            most = device_buffer_limit(channels)
            self.why_on_host = (
                f"samples {rows:.0f} rows a step on the host, the device {most} at most; set rows "
                'lower, or "all"'
            )
        return sizes

    def has_room(self, layout: ActivationLayout, calls: int) -> bool:
        """True if the device's buffer takes the rows of a call.

        Args:
            layout: Layout of the call.
            calls: Calls of the running step, this one among them: each may round up.
        """
        buffer = self.device_buffer
        if buffer is None:
            return False
        due = (buffer.step_rows + layout.rows) * self.cursor.numbers[FRACTION] >> 32
        return (
            buffer.dtype is layout.dtype
            and buffer.device == layout.device
            and due + calls <= buffer.most_rows
        )

    def _make_room(self, layout: ActivationLayout, calls: int) -> bool:
        """True if the device's buffer has grown for the rows of a call; waits for nothing."""
        buffer = self.device_buffer
        if (
            buffer is None
            or buffer.is_captured
            or buffer.dtype is not layout.dtype
            or buffer.device != layout.device
        ):
            return False
        rows = (buffer.step_rows + layout.rows) * self.cursor.numbers[FRACTION] / WHOLE
        sizes = device_buffer_rows(layout.channels, rows, calls)
        if sizes is None:
            return False
        buffer.grow(*sizes)
        self._largest_capacity = max(self._largest_capacity, buffer.most_rows)
        self.changed()
        return True

    def _leave_full_buffer(self, buffer: DeviceBuffer, layout: ActivationLayout) -> None:
        if buffer.is_captured:
            raise RuntimeError(
                f"{layout.rows} more rows of {layout.dtype} on {layout.device} do not fit the "
                f"buffer of a captured CUDA graph: {buffer.most_rows} rows a step of "
                f"{buffer.dtype} on {buffer.device}; run the largest step eagerly before the "
                "capture"
            )
        self.leave_device()

    def leave_device(self) -> None:
        """Moves the counters back to the host, waiting for the device."""
        if self.device_buffer is not None:
            self.flush()
            self._sampled, self._carry, self.state_step = self.device_buffer.counters()
            self.device_buffer = None
            self.changed()

    def _counters(self) -> tuple[int, int, int]:
        if self.device_buffer is not None:
            return self.device_buffer.counters()
        return self._sampled, self._carry, self.state_step

    # merging and saving

    def __getstate__(self) -> dict[str, Any]:
        # Listeners belong to routes, routes to hooks: a copy has none.
        return {**self.__dict__, "_listeners": []}

    def merge(self, other: Layer, step: int) -> None:
        """Adds the rows that another layer has read, with both decayed up to ``step``."""
        self.flush()
        other.flush()
        if other.state is None:
            return
        if self.state is None:
            self.sketch = other.state.sketch_width
        own = self.prepare(other.state.channels, other.state.moment.device)
        own.scale_(self._decay_until(step))
        behind = step - other._counters()[2]
        own.merge(other.state, scale=1.0 if self.decay is None else self.decay**behind)
        self.earlier_calls += other.total_calls

    def state_dict(self) -> dict[str, Any]:
        """Statistics and sampling position; rows that wait are added first."""
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
            "is_pooled": self._has_many_calls,
        }

    def load_state_dict(self, saved: dict[str, Any], with_rows: bool = True) -> None:
        """Continues from :meth:`state_dict`.

        Args:
            saved: Result of :meth:`state_dict`.
            with_rows: False takes the fraction and the sampling position alone.
        """
        self.reset()
        self.set_fraction(saved["fraction"])
        self.state_step = saved["state_step"]
        self.earlier_calls = saved["total_calls"]
        self._sampled = saved["sampled"]
        self._carry = saved["carry"]
        self._has_many_calls = saved["is_pooled"]
        if saved["state"] is not None:
            # As it was saved, whatever memory= says now: on every rank, with rows or without.
            sizes = saved["state"].get("sketch")
            self.sketch = None if sizes is None else int(sizes[1])
            if self.state is not None and self.state.sketch_width != self.sketch:
                self.state = self._step_state = self._device = None
                self.buffer.release()
        if saved["state"] is not None and with_rows:
            device = torch.device("cpu") if self.state is None else self.state.moment.device
            self.prepare(saved["channels"], device).load_state_dict(saved["state"])

    def reset(self) -> None:
        """Forgets every row; the fraction to read and the sampling position stay."""
        self.leave_device()
        self._forget_device()
        if self.state is not None:
            self.state.reset()
        if self._step_state is not None:
            self._step_state.reset()
        self.buffer.clear()
        self._weighted.release()
        self._early_rows = []
        self.earlier_calls = self.calls = self.offered_rows = 0
        self.state_step = 0
        self.changed()
