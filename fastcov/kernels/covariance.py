"""Launches the covariance kernels: the contract of accumulate_ on CUDA tensors.

One update is two launches (gram, reduce), three where a configuration has rectangles (a repair
that returns at once where all rows are finite) and one more for float32 rows (the shift, which
returns at once on a state that has seen a row). Nothing is read back: CUDA graphs capture it.
Partial results live in workspace from torch's caching allocator.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fastcov.kernels.block import block_kernel, mask_kernel
from fastcov.kernels.config import Architecture, Mode
from fastcov.kernels.device import is_current
from fastcov.kernels.gram import gram_kernel
from fastcov.kernels.job import Job, job_of
from fastcov.kernels.layout import VECTOR_BYTES, is_address_aligned
from fastcov.kernels.reduce import reduce_kernel
from fastcov.kernels.shift import shift_kernel


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
        decay: Factor on what was there before.
        channel_dim: Dimension of ``rows`` that holds the channels: a permuted view takes longer to
            make than all that is launched here to prepare.
        precision: Of float32 rows: "split" in three bfloat16, "tf32", or "ieee" without tensor
            cores. Others are multiplied exactly.
        architecture: Overrides what is known of the device; for tests.
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


class Accumulation:
    """Adds rows to one state, always laid out the same: all is decided at the first calls.

    Args:
        moment: Of the state, as its other tensors: see :func:`launch_accumulate_`.
        sum: Likewise.
        shift: Likewise.
        weight: Likewise.
        count: Likewise.
        channel_dim: See there, as for all that follow.
        row_scale: Likewise.
        decay: Likewise.
        precision: Likewise.
        architecture: Likewise.
    """

    __slots__ = ("_count", "_decided_by", "_prepared", "_reduced_to", "_shift")

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
        self._reduced_to = ((moment, sum, shift, weight, count), (row_scale, decay))
        self._shift = shift
        self._count = count
        self._decided_by = (precision, architecture, channel_dim)
        # Where rows begin anywhere, and at a vector: launches, what makes their workspace, and what
        # the last of them takes behind it.
        self._prepared: list[tuple[Job, Tensor, tuple[Any, ...]] | None] = [None, None]

    def _prepare(self, rows: Tensor, is_weighted: bool) -> tuple[Job, Tensor, tuple[Any, ...]]:
        job = job_of(rows, is_weighted, *self._decided_by)
        assert job is not None
        state, factors = self._reduced_to
        like = self._shift.new_empty(0, dtype=torch.float32)
        prepared = (job, like, (*state, *job.reduce_numbers, *factors, *job.reduce.arguments))
        self._prepared[is_address_aligned(rows)] = prepared
        return prepared

    def add(self, rows: Tensor, row_weight: Tensor | None = None) -> None:
        """Launches what adds rows: at least one, with weights in all calls or in none."""
        index = rows.get_device()
        if not is_current(index):
            with torch.cuda.device(index):
                self.add(rows, row_weight)
            return
        prepared = self._prepared[rows.data_ptr() % VECTOR_BYTES == 0]
        job, like, reduce_arguments = prepared or self._prepare(rows, row_weight is not None)
        shift, count = self._shift, self._count
        partial = like.new_empty(job.workspace_entries)
        chain_weight = None
        if row_weight is not None:
            row_weight = row_weight.double()
            chain_weight = shift.new_empty(job.plan.chains, dtype=torch.float64)
        if (launch := job.shift) is not None:
            shift_kernel.run(rows, shift, count, *launch.arguments, **launch.options)
        if (launch := job.gram) is not None:
            gram_kernel.run(
                rows,
                rows if job.is_aligned else None,
                None if job.matrix is None else job.descriptor(rows),
                shift,
                partial,
                partial if job.adds_vectors else None,
                count,
                *launch.arguments,
                **launch.options,
            )
        elif (launch := job.mask) is not None:
            mask_kernel.run(
                rows,
                row_weight,
                partial,
                chain_weight,
                count,
                *launch.arguments,
                **launch.options,
            )
        if (launch := job.block) is not None:
            block_kernel.run(rows, shift, row_weight, partial, *launch.arguments, **launch.options)
        launch = job.reduce
        reduce_kernel.run(partial, chain_weight, *reduce_arguments, **launch.options)


def workspace_bytes(
    rows: Tensor, *, is_weighted: bool = False, architecture: Architecture | None = None
) -> int:
    """Bytes that one call of :func:`launch_accumulate_` takes from torch's caching allocator.

    Transient: the call gives them back, and no state holds them. Most are slots of partial results,
    whose number follows the programs that run at the same time rather than the rows; what grows
    with the rows is a byte each for the mask, and slots where all are full (plan.MAX_CHAINS).
    """
    job = job_of(rows, is_weighted, "split", architecture)
    if job is None:
        return 0
    weights = 8 * job.plan.chains if is_weighted else 0
    return 4 * job.workspace_entries + weights
