"""Launches the covariance kernels: the contract of accumulate_ on CUDA tensors.

One update is two launches (gram, reduce), three where a configuration has rectangles (a repair
that returns at once where all rows are finite) and one more for float32 rows (the shift, which
returns at once on a state that has seen a row). Nothing is read back: CUDA graphs capture it.
Partial results live in workspace from torch's caching allocator.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastcov.kernels.block import block_kernel, mask_kernel
from fastcov.kernels.config import Architecture, Mode
from fastcov.kernels.device import is_current
from fastcov.kernels.gram import gram_kernel
from fastcov.kernels.job import Job, job_of
from fastcov.kernels.layout import is_address_aligned
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
    job = job_of(rows, row_weight is not None, precision, architecture, channel_dim)
    if job is None:
        for tensor in (moment, sum, weight):
            tensor.mul_(decay)
    else:
        _launch_(job, moment, sum, shift, weight, count, rows, row_weight, row_scale, decay)


class Accumulation:
    """Adds rows of weight 1 that are always laid out the same: all is decided at the first call.

    Args:
        channel_dim: Dimension of the rows that holds the channels.
    """

    __slots__ = ("_channel_dim", "_jobs")

    def __init__(self, channel_dim: int = -1) -> None:
        self._channel_dim = channel_dim
        self._jobs: list[Job | None] = [None, None]  # where rows begin anywhere, and at a vector

    def __call__(
        self,
        moment: Tensor,
        sum: Tensor,
        shift: Tensor,
        weight: Tensor,
        count: Tensor,
        rows: Tensor,
    ) -> None:
        """As :func:`launch_accumulate_`, of at least one row."""
        is_aligned = is_address_aligned(rows)
        job = self._jobs[is_aligned]
        if job is None:
            job = job_of(rows, False, "split", channel_dim=self._channel_dim)
            assert job is not None
            self._jobs[is_aligned] = job
        _launch_(job, moment, sum, shift, weight, count, rows)


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
    return 4 * (job.partial_entries + job.notes_entries) + job.rows + weights


def _launch_(
    job: Job,
    moment: Tensor,
    sum: Tensor,
    shift: Tensor,
    weight: Tensor,
    count: Tensor,
    rows: Tensor,
    row_weight: Tensor | None = None,
    row_scale: float = 1.0,
    decay: float = 1.0,
) -> None:
    index = rows.get_device()
    if not is_current(index):
        with torch.cuda.device(index):
            state = (moment, sum, shift, weight, count)
            _launch_(job, *state, rows, row_weight, row_scale, decay)
        return
    device = rows.device
    partial = torch.empty(job.partial_entries, dtype=torch.float32, device=device)
    notes = torch.empty(job.notes_entries, dtype=torch.int32, device=device)
    is_row_finite = torch.empty(job.rows, dtype=torch.uint8, device=device)
    chain_weight = None
    if row_weight is not None:
        row_weight = row_weight.double()
        chain_weight = torch.empty(job.plan.chains, dtype=torch.float64, device=device)
    if (launch := job.shift) is not None:
        shift_kernel[launch.grid](rows, shift, count, *launch.arguments, **launch.options)
    if (launch := job.gram) is not None:
        gram_kernel[launch.grid](
            rows,
            rows if job.is_aligned else None,
            job.descriptor(rows) if job.matrix is not None else None,
            shift,
            is_row_finite,
            partial,
            partial if job.adds_vectors else None,
            notes,
            count,
            *launch.arguments,
            **launch.options,
        )
    elif (launch := job.mask) is not None:
        mask_kernel[launch.grid](
            rows,
            row_weight,
            is_row_finite,
            notes,
            chain_weight,
            count,
            *launch.arguments,
            **launch.options,
        )
    if (launch := job.block) is not None:
        block_kernel[launch.grid](
            rows,
            shift,
            row_weight,
            is_row_finite,
            partial,
            notes,
            *launch.arguments,
            **launch.options,
        )
    launch = job.reduce
    reduce_kernel[launch.grid](
        partial,
        notes,
        chain_weight,
        moment,
        sum,
        shift,
        weight,
        count,
        *job.reduce_numbers,
        row_scale,
        decay,
        *launch.arguments,
        **launch.options,
    )
