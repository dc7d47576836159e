"""Sampling buffers whose counters live on the GPU, so that replays of a CUDA graph count right.

Nothing that changes from step to step is an argument of a launch: fill, sample number and carried
fraction are in a cursor, the step is a tensor, addresses and sizes are in a table written once.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcov.ops.backend import service_of
from fastcov.ops.counted import CallCounters, CountedGather
from fastcov.ops.covariance import WeightedState
from fastcov.rows.layout import ActivationLayout

if TYPE_CHECKING:
    from fastcov.kernels.flush import FlushTable
    from fastcov.kernels.gather import CursorGather


class DeviceBuffer:
    """Buffer of rows that wait to be added to one state, with all counters on the device.

    Args:
        state: State that gets the rows; its tensors must stay at their addresses.
        dtype: Dtype of the rows to come.
        step: int64, number of the running step, kept up to date by the caller. []
        threshold: Rows from which the buffer counts as full.
        first_threshold: Threshold until the buffer has been full once.
        most_rows: Largest number of rows between two flushes.
        sampled: Number of the next sample.
        carry: Fraction of a row carried so far, in units of 2**-32.
        state_step: Step up to which decay has been applied to the state.

    Attributes:
        dtype: Dtype of the rows.
        device: Device of the rows.
        layer: State, memory and sizes as a flush takes them; another object after :meth:`grow`.
        is_captured: True if a CUDA graph may hold the addresses.
    """

    def __init__(
        self,
        state: WeightedState,
        dtype: torch.dtype,
        *,
        step: Tensor,
        threshold: int,
        first_threshold: int,
        most_rows: int,
        sampled: int,
        carry: int,
        state_step: int,
    ) -> None:
        from fastcov.kernels import gather

        device = state.moment.device
        self.step = step
        self.dtype = dtype
        self.device = device
        self._room = array("q", (0, most_rows))
        self.is_captured = False
        self._state = state
        self._first_threshold = first_threshold
        with torch.inference_mode(False):
            self._room_tensor = torch.frombuffer(self._room, dtype=torch.int64)
            self._cursor = torch.zeros(gather.CURSOR_FIELDS, dtype=torch.int64, device=device)
        self._cursor[gather.SAMPLED.value] = sampled
        self._cursor[gather.CARRY.value] = carry
        self._cursor[gather.STATE_STEP.value] = state_step
        self._make_room(threshold, threshold + most_rows)

    @property
    def step_rows(self) -> int:
        """Rows that the calls of the running step have offered."""
        return self._room[0]

    @step_rows.setter
    def step_rows(self, rows: int) -> None:
        self._room[0] = rows

    @property
    def most_rows(self) -> int:
        """Largest number of rows between two flushes."""
        return self._room[1]

    def _make_room(self, threshold: int, capacity: int) -> None:
        from fastcov.kernels import flush

        state, device, channels = self._state, self.device, len(self._state.sum)
        with torch.inference_mode(False):
            self._buffer = torch.empty(capacity, channels, dtype=self.dtype, device=device)
            self._row_step = torch.empty(capacity, dtype=torch.int32, device=device)
        self.layer = flush.BufferedLayer(
            state.moment,
            state.sum,
            state.shift,
            state.weight,
            state.count,
            state.excess,
            self._buffer,
            self._row_step,
            self._cursor,
            threshold,
            first_threshold=self._first_threshold,
        )
        self._table = flush.FlushTable([self.layer])

    def grow(self, threshold: int, most_rows: int) -> None:
        """Growth for larger steps; rows that wait stay, and nothing waits for the device.

        Sizes are those of the constructor, the second not less than before. Launches prepared
        before write into the old memory: they must be prepared anew, and so must tables of flushes.
        """
        rows, row_step = self._buffer, self._row_step
        # Besides those of the running step, as many rows may wait as the old threshold allowed.
        room = max(threshold, len(rows) - self.most_rows) + most_rows
        self._room[1] = most_rows
        self._first_threshold = min(self._first_threshold, threshold)
        self._make_room(threshold, room)
        self._buffer[: len(rows)].copy_(rows)
        self._row_step[: len(row_step)].copy_(row_step)

    def prepare(
        self, activation: Tensor, layout: ActivationLayout, fraction: int, phase: int
    ) -> CountedGather | CursorGather:
        """Prepared launch that copies the rows that are due from any activation of a layout.

        The fraction is in units of 2**-32; of the activation, no value is read.
        """
        from fastcov.kernels.gather import CursorGather

        service = service_of(self.dtype, self.device)
        gather = CountedGather if service.has_compiled_gather else CursorGather
        return gather(*self._sample(activation, layout, fraction, phase))

    def prepare_counted(
        self,
        activation: Tensor,
        layout: ActivationLayout,
        fraction: int,
        phase: int,
        counters: Tensor,
    ) -> CountedGather | None:
        """Prepared copy as of :meth:`prepare` by one operator, which counts the calls as well.

        None where no compiled operator compares the layout. The counters are those of the layer.
        """
        service = service_of(self.dtype, self.device)
        if not service.has_compiled_gather or layout.numbers is None:
            return None
        calls = CallCounters(counters, self._room_tensor, layout.numbers)
        return CountedGather(*self._sample(activation, layout, fraction, phase), calls)

    def _sample(
        self, activation: Tensor, layout: ActivationLayout, fraction: int, phase: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, int, int, int]:
        return (
            self._buffer,
            self._row_step,
            self._cursor,
            self.step,
            layout.view(activation),
            fraction,
            layout.run_length,
            phase,
        )

    def flush(self, decay: float) -> None:
        """Addition of all rows, be the buffer full or not, decayed by a factor a step."""
        from fastcov.kernels.flush import launch_flush_

        launch_flush_(self._table, self.step, decay=decay, force=True)

    def counters(self) -> tuple[int, int, int]:
        """Number of the next sample, carried fraction, step of the state; waits for the device."""
        from fastcov.kernels import gather

        values = self._cursor.tolist()
        return (
            values[gather.SAMPLED.value],
            values[gather.CARRY.value],
            values[gather.STATE_STEP.value],
        )


def make_flush_table(buffers: Sequence[DeviceBuffer]) -> FlushTable:
    """Table of buffers' addresses and sizes, for :func:`flush_full_`; made outside any capture."""
    from fastcov.kernels.flush import FlushTable

    return FlushTable([buffer.layer for buffer in buffers])


def is_table_of(table: FlushTable, buffers: Sequence[DeviceBuffer]) -> bool:
    """True if a table holds the present addresses of buffers, which may have grown since."""
    return all(layer is buffer.layer for layer, buffer in zip(table.layers, buffers, strict=True))


def flush_full_(table: FlushTable, step: Tensor, decay: float) -> None:
    """Addition of a table's full buffers to their states, with one factor of decay a step."""
    from fastcov.kernels.flush import launch_flush_

    launch_flush_(table, step, decay=decay)
