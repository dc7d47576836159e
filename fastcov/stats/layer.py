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
from fastcov.stats.device_sampling import DeviceSampling
from fastcov.stats.early_rows import EarlyCall, EarlyRows
from fastcov.stats.host_buffer import HostBuffer
from fastcov.stats.image_weights import ImageWeights
from fastcov.stats.placement import Placement
from fastcov.stats.state import CovarianceState
from fastcov.stats.weighted_buffer import WeightedBuffer

RowSource = Callable[..., bool]
"""Function of a state, ``row_scale`` and ``decay`` that adds a call's rows in a cheaper way, or
returns False where it cannot: see :meth:`fastcov.stats.affine.AffineMap.add_to`."""


class Draw(NamedTuple):
    """Rows of one call that are due: see :meth:`Layer.draw`.

    Attributes:
        rows: Number of rows that are due.
        offered: Number of rows of the call.
        first_sample: Number of the first due row in the sampling sequence.
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
        earlier_calls: Calls of the steps before.
        fraction: Share of the rows to read, as given or planned.
        state: Sums of the rows read; None before the first.
        buffer: Rows that wait, with counters on the host.
        on_device: Sampling with counters on a GPU.
        early: Rows that wait until the fraction is known.
        dtype: Dtype of the rows read last.
        service: Implementation that serves rows of this dtype on the state's device.
        step: Number of the running step.
        state_step: Step up to which decay has been applied to the state.
        placement: Answers to which rows wait; None before the first rows.
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
        self.dtype: torch.dtype | None = None
        self.service: Service | None = None
        self.step = 0
        self.state_step = 0
        self.earlier_calls = 0
        self.early = EarlyRows()
        self.on_device = DeviceSampling()
        self.placement: Placement | None = None
        self._image = ImageWeights(precision) if weighting == "image" else None
        self._weighted = WeightedBuffer(decay)
        self.buffer = HostBuffer(self.cursor, weighting == "image" or decay is not None, first_fill)
        self._listeners: list[WeakMethod[Callable[[], None]]] = []
        self._device: torch.device | None = None  # of the state
        self._forget_device()
        self.set_fraction(fraction)

    def listen(self, listener: Callable[[], None]) -> None:
        """Registration of a method that :meth:`changed` calls; its object is not kept alive."""
        self._listeners.append(WeakMethod(listener))

    def changed(self) -> None:
        """Message to the listeners: state, buffer, fraction, dtype or device changed."""
        for listener in self._listeners:
            if (call := listener()) is not None:
                call()

    def set_fraction(self, fraction: float | None) -> None:
        """Setter of the share of rows to read; None leaves it open until :meth:`plan`."""
        self.fraction = fraction
        self._fixed_fraction = 0 if fraction is None else fixed_point(fraction)
        self.changed()

    @property
    def total_calls(self) -> int:
        """Calls of all steps."""
        return self.earlier_calls + self.calls

    def begin_step(self, step: int) -> None:
        """Start of a step's counters."""
        # Not by the attributes: they take 0.1 us each, of every layer in every step.
        numbers = self.cursor.numbers
        self.step = step
        self.earlier_calls += numbers[CALLS]
        numbers[CALLS] = numbers[OFFERED] = numbers[POSITIONS] = 0
        self.early.left_out = 0
        if self.on_device.buffer is not None:
            self.on_device.buffer.step_rows = 0

    def read(
        self, activation: Tensor, layout: ActivationLayout, source: RowSource | None = None
    ) -> None:
        """Reading of the rows of one call, or of the sample that is due.

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
        device, buffer = self.on_device, self.on_device.buffer
        if buffer is not None and not self.adds_at_once(layout):
            fraction, calls = numbers[FRACTION], numbers[CALLS]
            has_room = device.has_room(layout, fraction, calls)
            if not has_room and device.make_room(layout, fraction, calls):
                has_room = True
                self.changed()
            if has_room:
                buffer.step_rows += offered
                buffer.prepare(activation, layout, fraction, numbers[PHASE]).launch_(activation)
                return
            # Another device or dtype, or more rows than one launch adds: the host counts again.
            device.check_not_captured(layout)
            self.leave_device()
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
        if layout.dtype is not self.dtype:
            self._leave_dtype(layout.dtype)
            if self._device == layout.device:
                self._serve()
        if self._device != layout.device:
            self.prepare(layout.channels, layout.device)

    def read_weighted(self, activation: Tensor, layout: ActivationLayout, weights: Tensor) -> None:
        """Reading of one call's rows, or of the sample due, each with a weight. [B, ...]

        Rows of weight 0 are not read.
        """
        if layout.rows == 0:
            return
        self.leave_device()
        self._expect(layout)
        draw = self.draw(layout)
        if self.fraction is None:
            self.early.leave_out(weights)
        if draw.is_whole and self.fraction is not None:
            self._add_weighted(layout.view(activation), weights)
        elif draw.rows:
            rows = self.drawn(draw, activation, layout)
            self.add_drawn(draw, rows, self.drawn_weights(draw, weights))

    def draw(self, layout: ActivationLayout) -> Draw:
        """Draw of a call: its rows that are due, with all counters on the host.

        The caller reads these rows (:meth:`drawn`) and passes them to :meth:`add_drawn`.
        """
        self._count(layout)
        self.leave_device()
        self.on_device.stay_on_host()
        fraction, offered = self._fixed_fraction, layout.rows
        due = offered
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

    def drawn_weights(self, draw: Draw, weights: Tensor) -> Tensor:
        """Weights [B, ...] of a call's rows, for the rows that :meth:`draw` has told. [N]"""
        column = weights[..., None]
        return self.drawn(draw, column, ActivationLayout(column))[:, 0]

    def add_drawn(self, draw: Draw, rows: Tensor, weights: Tensor | None = None) -> None:
        """Addition of a draw's rows [N, C], kept until the fraction to read is known."""
        layout = ActivationLayout(rows)
        self._expect(layout)
        if self.fraction is None:
            self.early.calls.append(EarlyCall(rows, draw.offered, draw.is_whole, weights))
        elif weights is None:
            self._add(rows, layout)
        else:
            self._add_weighted(rows, weights)

    def _add_weighted(self, rows: Tensor, weights: Tensor) -> None:
        flat = weights.reshape(-1)
        placement = self._placement()
        if len(flat) < placement.direct:
            if self._image is None and not self._weighted.has_room(len(flat)):
                self._flush_weighted()
            self._weighted.add(rows.reshape(len(flat), -1), flat, self.step, placement.capacity)
        elif self._image is not None:
            self._pool_weighted(self._image, rows, weights)
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

    def _pool_weighted(self, image: ImageWeights, rows: Tensor, weights: Tensor) -> None:
        assert self.state is not None
        for part in weighted_parts(rows, weights):
            image.pool(self.state, part.rows, part.weights, part.scale)

    def _flush_weighted(self) -> None:
        waiting, image = self._weighted, self._image
        if self.decay is not None:
            self._flush_full()  # moves the state to the last step of these rows
        if image is not None and (held := waiting.take_unsettled()) is not None:
            self._pool_weighted(image, *held)
        waiting.move_to(self.state_step)
        if (taken := waiting.take()) is not None:
            self._accumulate_weighted(*taken, waiting.step)

    def end_step(self) -> None:
        """End of a step: its number of rows is known now, so their weights are settled."""
        image = self._image
        if image is None or self.calls == 0 or self.fraction is None:
            return
        image.count_calls(self.calls)
        row_weight = self._row_weight()
        self.buffer.weigh(self.step, row_weight)
        self._weighted.settle(row_weight)
        if self.state is not None:
            if self._weighted.fill >= self._placement().capacity:
                self._flush_weighted()
            decay = 1.0 if image.sums is None else self._decay_until(self.step)
            image.end_step(self.state, row_weight, decay)

    def plan(self, fraction: float) -> None:
        """Choice of the share of rows to read; reads this share of the first step's rows."""
        self.set_fraction(fraction)
        for call in self.early.take():
            self._read_early(call)

    def _read_early(self, call: EarlyCall) -> None:
        rows, weights, due = call.rows, call.weights, call.offered
        layout = ActivationLayout(rows)
        self._expect(layout)
        is_whole = self._fixed_fraction == WHOLE
        if not is_whole:
            due, self._carry = rows_due(call.offered, self._fixed_fraction, self._carry)
            if due == 0:
                return
            if call.is_whole and due < call.offered:
                if weights is None:
                    self._sample(rows, layout, due)
                    return
                draw = Draw(due, call.offered, self._sampled)
                self._sampled += due
                rows, weights = self.drawn(draw, rows, layout), self.drawn_weights(draw, weights)
            elif not call.is_whole:
                rows, weights = rows[:due], None if weights is None else weights[:due]
        if weights is not None:
            self._add_weighted(rows, weights)
        else:
            # Later calls of this size will be added at once: a buffer for this one would stay.
            is_large = call.offered >= self._placement().direct
            self._add(rows, ActivationLayout(rows), at_once=is_whole and is_large)

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
            if self._image is not None:
                self._image.to(device)
            self.early.to(device)
            self.buffer.release()
            self._weighted.release()
            self._forget_device()
        if self._device != device:
            self._device = device
            self._serve()
        return self.state

    @property
    def _is_for_kernels(self) -> bool:
        """False where rows are converted or projected before the kernels see them."""
        is_sketched = self.state is not None and self.state.sketch is not None
        return self.precision == "split" and not is_sketched

    def _serve(self) -> None:
        # Another dtype or device, hence another implementation, and other sizes of buffers.
        assert self.state is not None
        device = self.state.moment.device
        self.service = service_of(self.dtype or torch.float32, device)
        self.placement = Placement(
            self.state.channels,
            self.service.is_host,
            is_sketched=self.state.sketch is not None,
            is_by_image=self._image is not None,
            decays=self.decay is not None,
        )
        self.changed()

    def _placement(self) -> Placement:
        assert self.placement is not None
        return self.placement

    def adds_at_once(self, layout: ActivationLayout) -> bool:
        """True if the kernels add calls of a layout whole and at once, each row at weight 1."""
        return (
            self.cursor.numbers[FRACTION] == WHOLE
            and self._image is None
            and self.decay is None
            and self._is_for_kernels
            and self.placement is not None
            and layout.rows >= self.placement.direct
        )

    def _add(
        self,
        activation: Tensor,
        layout: ActivationLayout,
        source: RowSource | None = None,
        at_once: bool = False,
    ) -> None:
        """Reading of all rows of a call: at once where these are many, else through the buffer."""
        count = layout.rows
        if at_once or count >= self._placement().direct:
            last = None if self.decay is None else self.buffer.last_step
            if last is not None and last < self.step:
                # Decay brings the state to this step: rows of earlier steps must be in it before.
                self._flush_full()
            if self._image is None:
                rows = layout.source(activation)
                self._accumulate(rows, self.step, None, 1.0, layout.channel_dim, source)
            else:
                self._add_image_weighted(self._image, layout.view(activation), source)
        elif count:
            buffer = self._room(layout, count)
            fill = self.buffer.fill
            rows = layout.view(activation)
            buffer[fill : fill + count].view(rows.shape).copy_(rows)
            self.buffer.mark(count, self.step)

    def _add_image_weighted(
        self, image: ImageWeights, rows: Tensor, source: RowSource | None
    ) -> None:
        if image.knows_weight(self.calls):
            self._accumulate(rows, self.step, row_scale=self._row_weight(), source=source)
        elif image.is_first_step(self.earlier_calls):
            self._accumulate(rows, self.step)
            image.is_in_state = True
        else:
            assert self.state is not None
            image.pool(self.state, rows)

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
        elif not self._placement().waits(due, is_whole=False):
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
        self.early.calls.append(EarlyCall(kept, offered, is_whole=offered <= limit))

    def _early_limit(self, layout: ActivationLayout) -> int:
        placement = self.placement
        if placement is None:  # one side of a pair, drawn before the state of both is made
            service = service_of(layout.dtype, layout.device)
            placement = Placement(layout.channels, service.is_host)
        return self.early.limit(layout.rows, layout.channels, placement.capacity)

    def _decay_until(self, step: int) -> float:
        """Factor that brings the state to a step; the caller applies it."""
        steps = step - self.state_step
        if steps <= 0:
            return 1.0
        self.state_step = step
        return 1.0 if self.decay is None else self.decay**steps

    def _row_weight(self) -> float:
        # Horvitz-Thompson: a row read with probability `fraction` stands for 1 / fraction rows.
        assert self.fraction is not None
        return 1.0 / (self._positions * min(self.fraction, 1.0))

    def _room(self, layout: ActivationLayout, wanted: int) -> Tensor:
        buffer = self.buffer
        storage = buffer.storage
        if storage is not None and buffer.fill + wanted <= buffer.limit:
            return storage
        if buffer.fill:
            # A step's weights are final at its end only: until then its rows may not leave.
            is_held = self._image is not None and buffer.last_step == self.step
            if not is_held:
                self._flush_full()
        grown = buffer.room(layout, wanted, self._placement().capacity)
        if grown is not storage:
            self.changed()
        return grown

    def _leave_dtype(self, dtype: torch.dtype) -> None:
        before = self.dtype
        if before is not None and self.state is not None:
            self.flush()
            self.buffer.release()
            self._weighted.release()
            if ROW_DTYPES[before].is_centred and not ROW_DTYPES[dtype].is_centred:
                # The shift has more digits than rows of 16 bits can subtract exactly.
                self.state.translate_(torch.zeros_like(self.state.shift))
        self.dtype = dtype

    def flush(self) -> None:
        """Addition of the rows that wait to the state."""
        if self.on_device.buffer is not None:
            self.on_device.buffer.flush(self.decay or 1.0)
        self._flush_full()
        if self.state is not None:
            self._flush_weighted()
        self.buffer.stagger()

    def _flush_full(self) -> None:
        if self._image is not None and (held := self.buffer.take_unweighed()) is not None:
            assert self.state is not None
            self._image.pool(self.state, held)
        rows = self.buffer.rows
        if rows is None:
            return
        row_weight = self.buffer.row_weight(self.decay or 1.0, rows.device)
        last = self.buffer.last_step
        self._accumulate(rows, self.state_step if last is None else last, row_weight)
        self.buffer.clear()

    def _forget_device(self) -> None:
        why_on_host = ""
        if self.precision != "split":
            why_on_host = f'precision="{self.precision}" is the host\'s to add; take "split"'
        elif not self._is_for_kernels:
            why_on_host = "is sketched by the host; give more memory, or watch fewer layers"
        self.on_device.forget(why_on_host)

    @property
    def wants_device_buffer(self) -> bool:
        """True if the last step's rows waited on the host's counters, and might on the device's."""
        return (
            self.on_device.may_move
            # Where all rows are read, only calls too small to be added at once use a buffer.
            and (self.buffer.storage is not None or self.cursor.numbers[FRACTION] < WHOLE)
            and self.cursor.numbers[CALLS] > 0
            and self.fraction is not None
            and self.dtype is not None
        )

    def use_device_buffer(self, step: Tensor) -> DeviceBuffer | None:
        """Move of the counters to the device, so that CUDA graphs can replay the sampling.

        Only where rows go through a buffer, every row weighs the same, and a step brings no more
        rows than :func:`fastcov.stats.buffering.device_buffer_limit`; else None. The caller keeps
        the number of the running step up to date, int64 [].
        """
        device, state, dtype = self.on_device, self.state, self.dtype
        if device.use_step(step):
            self.changed()
        if state is None or dtype is None or not self.wants_device_buffer:
            return device.buffer
        sizes, offered = None, self.offered_rows
        rows = self._placement().rows_on_device(offered, self.calls, self.fraction or 0.0)
        if rows is not None:
            sizes = device.sizes(state.channels, rows, self.calls)
        if not service_of(dtype, state.moment.device).counts_on_device:
            device.why_on_host = f"samples {dtype} on the host; cast to float32 or less"
        if sizes is None or device.why_on_host:
            device.stay_on_host()
            return None
        threshold, most_rows = sizes
        self.flush()
        self.buffer.release()
        device.buffer = DeviceBuffer(
            state,
            dtype,
            step=step,
            threshold=threshold,
            first_threshold=ceil(threshold * self.buffer.first_fill),
            most_rows=device.begin_move(most_rows),
            sampled=self._sampled,
            carry=self._carry,
            state_step=self.state_step,
        )
        self.changed()
        return device.buffer

    def leave_device(self) -> None:
        """Move of the counters back to the host, waiting for the device."""
        if self.on_device.buffer is not None:
            self.flush()
            self._sampled, self._carry, self.state_step = self.on_device.buffer.counters()
            self.on_device.buffer = None
            self.changed()

    def _counters(self) -> tuple[int, int, int]:
        if self.on_device.buffer is not None:
            return self.on_device.buffer.counters()
        return self._sampled, self._carry, self.state_step

    def __getstate__(self) -> dict[str, Any]:
        # Listeners belong to routes, routes to hooks: a copy has none.
        return {**self.__dict__, "_listeners": []}

    def merge(self, other: Layer, step: int) -> None:
        """Addition of the rows that another layer has read, both decayed up to ``step``."""
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
            "is_pooled": None if self._image is None else self._image.has_many_calls,
        }

    def load_state_dict(self, saved: dict[str, Any], with_rows: bool = True) -> None:
        """Return to a :meth:`state_dict`; without rows, to fraction and sampling position alone."""
        self.reset()
        self.set_fraction(saved["fraction"])
        self.state_step = saved["state_step"]
        self.earlier_calls = saved["total_calls"]
        self._sampled = saved["sampled"]
        self._carry = saved["carry"]
        if self._image is not None:
            self._image.has_many_calls = saved["is_pooled"]
        if saved["state"] is not None:
            # Every rank sketches as the saved layer did, whatever its own memory= asks for.
            sizes = saved["state"].get("sketch")
            self.sketch = None if sizes is None else int(sizes[1])
            if self.state is not None and self.state.sketch_width != self.sketch:
                self.state = self._device = None
                if self._image is not None:
                    self._image.sums = None
                self.buffer.release()
        if saved["state"] is not None and with_rows:
            device = torch.device("cpu") if self.state is None else self.state.moment.device
            self.prepare(saved["channels"], device).load_state_dict(saved["state"])

    def reset(self) -> None:
        """Removal of every row; the fraction to read and the sampling position stay."""
        self.leave_device()
        self._forget_device()
        if self.state is not None:
            self.state.reset()
        if self._image is not None:
            self._image.reset()
        self.buffer.clear()
        self._weighted.release()
        self.early = EarlyRows()
        self.earlier_calls = self.calls = self.offered_rows = 0
        self.state_step = 0
        self.changed()
