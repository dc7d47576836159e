"""Launchers of the covariance kernels: the contract of accumulate_ on CUDA tensors.

One update is two launches (gram, reduce), three where a configuration has rectangles (a repair
that returns at once where all rows are finite) and one more for float32 rows (the shift, which
returns at once on a state that has seen a row). Nothing is read back: CUDA graphs capture it.
Partial results live in workspace from torch's caching allocator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcov.kernels.config import Architecture, Mode
from fastcov.kernels.job import Job, job_of
from fastcov.kernels.launch import Starter, is_current, is_watched
from fastcov.kernels.layout import VECTOR_BYTES, is_address_aligned


def launch_accumulate_(
    moment: Tensor,
    sum: Tensor,
    shift: Tensor,
    weight: Tensor,
    count: Tensor,
    rows: Tensor,
    row_weight: Tensor | None = None,
    row_scale: float = 1.0,
    decay: float = 1.0,
    *,
    channel_dim: int = -1,
    precision: Mode = "split",
    architecture: Architecture | None = None,
) -> None:
    """Adds rows to a state: see :func:`fastcov.ops.reference.accumulate_reference_`.

    Args:
        moment: float64, contiguous; only the lower half is read and written. [C, C]
        sum: float64. [C]
        shift: float64. [C]
        weight: float64. []
        count: int64. [2]
        rows: bfloat16, float16 or float32, any strides. [..., C]
        row_weight: float32 or float64, contiguous. [N]
        row_scale: Factor on every row's weight.
        decay: Factor on the state before.
        channel_dim: Dimension of ``rows`` that holds the channels: a permuted view takes longer to
            make than all that is launched here to prepare.
        precision: Of float32 rows: "split" in three bfloat16, "tf32", or "ieee" without tensor
            cores. Others are multiplied exactly.
        architecture: Kind of GPU in place of the device's own; for tests.
    """
    state = (moment, sum, shift, weight, count)
    if rows.numel() > 0:
        accumulation = Accumulation(
            *state, channel_dim, row_scale, decay, precision=precision, architecture=architecture
        )
        accumulation.add(rows, row_weight)
    else:
        for tensor in (moment, sum, weight):
            tensor.mul_(decay)


class _Prepared:
    """Launches of one job for one state: first through Triton, then directly."""

    __slots__ = ("directly", "job", "like", "starters", "through_triton")

    def __init__(self, job: Job, like: Tensor, device: int) -> None:
        self.job = job
        self.like = like  # allocates the workspace
        self.starters = [
            None if launch is None else Starter(launch, device)
            for launch in (job.shift, job.gram, job.mask, job.block, job.reduce)
        ]
        self.through_triton = [starter and starter.through_triton for starter in self.starters]
        self.directly: list[Any] | None = None

    def keep_compiled(self) -> None:
        """Switch to direct launches, after a first launch, if all kernels allow it."""
        starts = [starter and starter.directly for starter in self.starters]
        if starts.count(None) == self.starters.count(None):
            self.directly = starts


class Accumulation:
    """Repeated addition of rows to one state, decided at the first calls: layouts stay the same.

    The tensors of the state must stay where they are: later calls know their addresses alone.

    Args:
        moment: Tensor of the state, as the next four: see :func:`launch_accumulate_`.
        sum: See there.
        shift: See there.
        weight: See there.
        count: See there.
        channel_dim: See there, as for all that follow.
        row_scale: See there.
        decay: See there.
        precision: See there.
        architecture: See there.
    """

    __slots__ = ("_addresses", "_decided_by", "_factors", "_prepared", "_state")

    def __init__(
        self,
        moment: Tensor,
        sum: Tensor,
        shift: Tensor,
        weight: Tensor,
        count: Tensor,
        channel_dim: int = -1,
        row_scale: float = 1.0,
        decay: float = 1.0,
        *,
        precision: Mode = "split",
        architecture: Architecture | None = None,
    ) -> None:
        self._state = (moment, sum, shift, weight, count)
        self._addresses = tuple(tensor.data_ptr() for tensor in self._state)
        self._factors = (row_scale, decay)
        self._decided_by = (precision, architecture, channel_dim)
        # For rows that begin anywhere, and for those that begin where a vector can.
        self._prepared: list[_Prepared | None] = [None, None]

    def _prepare(self, rows: Tensor, is_weighted: bool) -> _Prepared:
        job = job_of(rows, is_weighted, *self._decided_by)
        assert job is not None
        like = self._state[2].new_empty(0, dtype=torch.float32)
        prepared = _Prepared(job, like, rows.get_device())
        self._prepared[is_address_aligned(rows)] = prepared
        return prepared

    def add(self, rows: Tensor, row_weight: Tensor | None = None) -> None:
        """Launches the kernels that add rows.

        Args:
            rows: At least one row, laid out as in the calls before.
            row_weight: For each row its weight, given in all calls or in none.
        """
        index = rows.get_device()
        if not is_current(index):
            with torch.cuda.device(index):
                self.add(rows, row_weight)
            return
        address: Any = rows.data_ptr()
        prepared = self._prepared[address % VECTOR_BYTES == 0]
        if prepared is None:
            prepared = self._prepare(rows, row_weight is not None)
        job = prepared.job
        state: Any
        weight: Any
        chain_weight: Any
        workspace = partial = prepared.like.new_empty(job.workspace_entries)
        weights = chain_weights = None
        if row_weight is not None:
            weights = row_weight.double()
            chain_weights = weights.new_empty(job.plan.chains)
        starts = prepared.directly
        is_first = starts is None or is_watched()
        if is_first:
            starts, state, address = prepared.through_triton, self._state, rows
            weight, chain_weight = weights, chain_weights
        else:
            # Given a tensor, Triton's launcher would call it for its address, and then the driver.
            state, partial = self._addresses, workspace.data_ptr()
            weight = None if weights is None else weights.data_ptr()
            chain_weight = None if chain_weights is None else chain_weights.data_ptr()
        start_shift, start_gram, start_mask, start_block, start_reduce = starts
        _, _, shift, _, count = state
        if start_shift is not None:
            start_shift(address, shift, count)
        if start_gram is not None:
            start_gram(
                address,
                address if job.is_aligned else None,
                None if job.matrix is None else job.descriptor(rows),
                shift,
                partial,
                partial if job.adds_vectors else None,
                count,
            )
        elif start_mask is not None:
            start_mask(address, weight, partial, chain_weight, count)
        if start_block is not None:
            start_block(address, shift, weight, partial)
        start_reduce(partial, chain_weight, *state, *self._factors)
        if is_first:
            prepared.keep_compiled()


def workspace_bytes(
    rows: Tensor, *, is_weighted: bool = False, architecture: Architecture | None = None
) -> int:
    """Bytes that one call of :func:`launch_accumulate_` takes from torch's caching allocator.

    Transient: the call gives them back, and no state holds them. Most are slots of partial results,
    whose number follows the programs that run at the same time rather than the rows. A byte for
    each row's mask grows with the rows, and so do slots where all are full (plan.MAX_CHAINS).
    """
    job = job_of(rows, is_weighted, "split", architecture)
    if job is None:
        return 0
    weights = 8 * job.plan.chains if is_weighted else 0
    return 4 * job.workspace_entries + weights
