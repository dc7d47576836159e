"""Sampling buffers whose counters live on the GPU: what a CUDA graph replays with right counts.

Nothing that changes from step to step is an argument of a launch: fill, sample number and carried
fraction are in a cursor, the step is a tensor, addresses and sizes are in a table written once.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from fastcov.ops import counted
from fastcov.ops.counted import CountedGather
from fastcov.ops.covariance import WeightedState
from fastcov.ops.library import backends
from fastcov.seen import MOST_LAYOUTS

if TYPE_CHECKING:
    from fastcov.kernels.flush import FlushTable
    from fastcov.kernels.gather import CursorGather
    from fastcov.seen import Seen


def has_device_buffers(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether such rows can be sampled with counters on their device.

    A GPU of sm_80 or newer with Triton; Triton's interpreter stands for one on the CPU.
    """
    if dtype == torch.float64:
        return False
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1"
    return (
        device.type == "cuda"
        and backends()["triton"].active
        and torch.cuda.get_device_capability(device) >= (8, 0)
    )


class DeviceBuffer:
    """Rows waiting to be added to one state, with all counters on the device.

    Args:
        state: Where the rows go; its tensors must stay where they are.
        dtype: Of the rows to come.
        threshold: Rows from which the buffer counts as full.
        first_threshold: Likewise, until it has been full once.
        most_rows: The most that come between two flushes.
        sampled: Number of the next sample.
        carry: Fraction of a row carried so far, in units of 2**-32.
        state_step: Step up to which decay has been applied to the state.

    Attributes:
        dtype: Of the rows that it takes.
        device: Likewise.
        step_rows: That the calls of the running step have offered it.
        is_captured: Whether a CUDA graph may hold its addresses.
    """

    def __init__(
        self,
        state: WeightedState,
        dtype: torch.dtype,
        *,
        threshold: int,
        first_threshold: int,
        most_rows: int,
        sampled: int,
        carry: int,
        state_step: int,
    ) -> None:
        from fastcov.kernels import flush, gather

        device, channels = state.moment.device, len(state.sum)
        self.most_rows = most_rows
        self.dtype = dtype
        self.device = device
        self.step_rows = 0
        self.is_captured = False
        with torch.inference_mode(False):
            capacity = threshold + most_rows
            self._buffer = torch.empty(capacity, channels, dtype=dtype, device=device)
            self._row_step = torch.empty(capacity, dtype=torch.int32, device=device)
            self._cursor = torch.zeros(gather.CURSOR_FIELDS, dtype=torch.int64, device=device)
        self._cursor[gather.SAMPLED.value] = sampled
        self._cursor[gather.CARRY.value] = carry
        self._cursor[gather.STATE_STEP.value] = state_step
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
            first_threshold=first_threshold,
        )
        self._table = flush.FlushTable([self.layer])
        self._prepared: dict[Seen, CountedGather | CursorGather] = {}  # for calls that are alike
        self._step: Tensor | None = None
        self._fraction = 0

    def gather(
        self, activation: Tensor, seen: Seen, step: Tensor, fraction: int, phase: int
    ) -> None:
        """Copies the rows that are due; see :class:`fastcov.ops.counted.CountedGather`.

        Args:
            activation: One that ``seen`` fits.
            seen: Its sizes.
            step: int64, number of the running step. []
            fraction: In units of 2**-32.
            phase: Start of the sampling sequence, the same in all calls.
        """
        if self._step is not step or self._fraction != fraction:
            self._prepared.clear()
            self._step, self._fraction = step, fraction
        prepared = self._prepared.get(seen)
        if prepared is None:
            prepared = self._prepare(seen.view(activation), seen, step, fraction, phase)
        prepared.launch_(activation)

    def _prepare(
        self, rows: Tensor, seen: Seen, step: Tensor, fraction: int, phase: int
    ) -> CountedGather | CursorGather:
        from fastcov.kernels.gather import CursorGather

        gather = CountedGather if counted.serves(self.device) else CursorGather
        prepared = gather(
            self._buffer, self._row_step, self._cursor, step, rows, fraction, seen.run_length, phase
        )
        if len(self._prepared) >= MOST_LAYOUTS:
            self._prepared.clear()
        self._prepared[seen] = prepared
        return prepared

    def flush(self, step: Tensor, decay: float) -> None:
        """Adds all its rows to the state, full or not."""
        from fastcov.kernels.flush import launch_flush_

        launch_flush_(self._table, step, decay=decay, force=True)

    def counters(self) -> tuple[int, int, int]:
        """Sample number, carried fraction, and step of the state: waits for the device."""
        from fastcov.kernels import gather

        values = self._cursor.tolist()
        return (
            values[gather.SAMPLED.value],
            values[gather.CARRY.value],
            values[gather.STATE_STEP.value],
        )


def make_flush_table(buffers: Sequence[DeviceBuffer]) -> FlushTable:
    """Addresses and sizes of many buffers, for :func:`flush_full_`: not while capturing a graph."""
    from fastcov.kernels.flush import FlushTable

    return FlushTable([buffer.layer for buffer in buffers])


def flush_full_(table: FlushTable, step: Tensor, decay: float) -> None:
    """Adds every full buffer to its state: one launch over all layers.

    Args:
        table: From :func:`make_flush_table`.
        step: int64, number of the running step. []
        decay: Factor of one step; 1 keeps everything.
    """
    from fastcov.kernels.flush import launch_flush_

    launch_flush_(table, step, decay=decay)
