"""Launchers of the covariance kernels: the contract of accumulate_ on CUDA tensors.

One update is two launches (gram, reduce), three where a configuration has rectangles (a repair
that returns at once where all rows are finite) and one more for float32 rows (the shift, which
returns at once on a state that has seen a row). Nothing is read back: CUDA graphs capture it.
Partial results live in workspace from torch's caching allocator.
"""

from __future__ import annotations

from collections.abc import Callable
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
    """Launches that add rows: see :func:`fastcov.ops.reference.accumulate_reference_`.

    Args:
        moment: float64, contiguous: see :mod:`fastcov.ops.triangle`. [tiles, 32, 32]
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
        precision: Precision of float32 rows: "split" in three bfloat16, "tf32", or "ieee" without
            tensor cores. Others are multiplied exactly.
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


_MOST_ADDRESSES = 64
"""Addresses of rows whose bulk-copy maps are kept: an allocator gives the same ones every step."""

_Update = Callable[[Tensor, int, Tensor | None], None]
"""Function of rows, their address and their weights that launches the kernels of one update."""


class _Prepared:
    """Launches of one job for one state: first through Triton, then directly.

    Attributes:
        directly: Function that starts the compiled kernels; None until two launches through Triton,
            and where Triton has to start them.
    """

    __slots__ = ("_factors", "_job", "_like", "_starters", "_state", "directly")

    def __init__(
        self, job: Job, state: tuple[Tensor, ...], factors: tuple[float, float], device: int
    ) -> None:
        self._job = job
        self._state = state
        self._factors = factors
        self._like = state[2].new_empty(0, dtype=torch.float32)  # allocates the workspace
        self._starters = [
            None if launch is None else Starter(launch, device)
            for launch in (job.shift, job.gram, job.mask, job.block, job.reduce)
        ]
        self.directly: _Update | None = None

    def through_triton(self, rows: Tensor, row_weight: Tensor | None) -> None:
        """Launches by Triton's own call, which keep the compiled kernels.

        Args:
            rows: Rows to add.
            row_weight: A weight for each, or None.
        """
        job, (_, _, shift, _, count) = self._job, self._state
        partial = self._like.new_empty(job.workspace_entries)
        weights = chain_weight = None
        if row_weight is not None:
            weights, chain_weight = self._weights(row_weight)
        for_shift, gram, mask, block, reduce = self._starters
        if for_shift is not None:
            for_shift.through_triton(rows, shift, count)
        if gram is not None:
            gram.through_triton(
                rows,
                rows if job.is_aligned else None,
                None if job.matrix is None else job.descriptor(rows),
                shift,
                partial,
                partial if job.adds_vectors else None,
                count,
            )
        elif mask is not None:
            mask.through_triton(rows, weights, partial, chain_weight, count)
        if block is not None:
            block.through_triton(rows, shift, weights, partial)
        assert reduce is not None
        reduce.through_triton(partial, chain_weight, *self._state, *self._factors)
        if self.directly is None:
            self.directly = self._direct_update()

    def _weights(self, row_weight: Tensor) -> tuple[Tensor, Tensor]:
        """Weights in float64, and room for their sums over chains."""
        weights = row_weight.double()
        return weights, weights.new_empty(self._job.plan.chains)

    def _bulk_copy_map(self, rows: Tensor) -> tuple[Any, ...]:
        gram = self._starters[1]
        assert gram is not None
        return gram.expand(self._job.descriptor(rows))

    def _direct_update(self) -> _Update | None:
        starts = [None if starter is None else starter.directly for starter in self._starters]
        start_shift, start_gram, start_mask, start_block, start_reduce = starts
        if start_reduce is None or starts.count(None) > self._starters.count(None):
            return None
        # A function over local variables: attributes would be looked up in every hook.
        job = self._job
        new_workspace, entries = self._like.new_empty, job.workspace_entries
        is_aligned, adds_vectors = job.is_aligned, job.adds_vectors
        # Given a tensor, Triton's launcher would call it for its address, and then the driver.
        state = tuple(tensor.data_ptr() for tensor in self._state)
        state_and_factors = (*state, *self._factors)
        _, _, shift, _, count = state
        no_matrix = (None,) if job.matrix is None else None
        matrices: dict[int, tuple[Any, ...]] = {}  # bulk-copy maps by the rows' address

        def update(rows: Tensor, address: int, row_weight: Tensor | None) -> None:
            workspace = new_workspace(entries)
            partial = workspace.data_ptr()
            weight = chain_weight = None
            if row_weight is not None:
                weights, chain_weights = self._weights(row_weight)
                weight, chain_weight = weights.data_ptr(), chain_weights.data_ptr()
            if start_shift is not None:
                start_shift(address, shift, count)
            if start_gram is not None:
                matrix = no_matrix or matrices.get(address)
                if matrix is None:
                    matrix = self._bulk_copy_map(rows)
                    if len(matrices) >= _MOST_ADDRESSES:
                        matrices.clear()
                    matrices[address] = matrix
                start_gram(
                    address,
                    address if is_aligned else None,
                    *matrix,
                    shift,
                    partial,
                    partial if adds_vectors else None,
                    count,
                )
            elif start_mask is not None:
                start_mask(address, weight, partial, chain_weight, count)
            if start_block is not None:
                start_block(address, shift, weight, partial)
            start_reduce(partial, chain_weight, *state_and_factors)

        return update


class Accumulation:
    """Repeated addition of rows to one state, decided at the first calls: layouts stay the same.

    Arguments are those of :func:`launch_accumulate_`. The tensors of the state must stay where they
    are: later calls know their addresses alone.
    """

    __slots__ = ("_decided_by", "_factors", "_prepared", "_state")

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
        self._factors = (row_scale, decay)
        self._decided_by = (precision, architecture, channel_dim)
        # One for rows at any address, one for rows at an address where a vector may begin.
        self._prepared: list[_Prepared | None] = [None, None]

    def _prepare(self, rows: Tensor, is_weighted: bool) -> _Prepared:
        job = job_of(rows, is_weighted, *self._decided_by)
        assert job is not None
        prepared = _Prepared(job, self._state, self._factors, rows.get_device())
        self._prepared[is_address_aligned(rows)] = prepared
        return prepared

    def add(self, rows: Tensor, row_weight: Tensor | None = None) -> None:
        """Launches that add rows [..., C], laid out as in the calls before.

        Weights of the rows [N] are given in all calls or in none.
        """
        index = rows.get_device()
        if not is_current(index):
            with torch.cuda.device(index):
                self.add(rows, row_weight)
            return
        address = rows.data_ptr()
        prepared = self._prepared[address % VECTOR_BYTES == 0]
        if prepared is None:
            prepared = self._prepare(rows, row_weight is not None)
        update = prepared.directly
        if update is None or is_watched():
            prepared.through_triton(rows, row_weight)
        else:
            update(rows, address, row_weight)


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
