"""Launches the covariance kernels: the contract of accumulate_ on CUDA tensors.

One update is two launches (gram, reduce), three where a configuration has rectangles (a repair
that returns at once where all rows are finite) and one more for float32 rows (the shift, which
returns at once on a state that has seen a row). Nothing is read back: CUDA graphs capture it.
Partial results live in workspace from torch's caching allocator.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcov.kernels.block import block_kernel, mask_kernel
from fastcov.kernels.config import (
    SHIFT_ROWS,
    Architecture,
    Mode,
    chain_rows,
    gram_case,
    gram_config,
)
from fastcov.kernels.gram import gram_kernel
from fastcov.kernels.layout import RowLayout, row_layout
from fastcov.kernels.plan import Plan, block_plan, gram_plan
from fastcov.kernels.reduce import reduce_kernel
from fastcov.kernels.shift import shift_kernel
from fastcov.kernels.tiles import IS_INTERPRETED, MODES

_LOW_PRECISION = (torch.bfloat16, torch.float16)
_BLOCK_EDGE = 64
_REPAIR_STEP = 16
# The interpreter's time goes with the number of programs.
_SEGMENT = 4096 if IS_INTERPRETED else 128
_FOLD = 16


@lru_cache
def architecture_of(device: torch.device) -> Architecture:
    """Kind of GPU that a tensor lies on; the interpreter stands for an sm_90 of two."""
    if IS_INTERPRETED:
        return Architecture("sm_90", 2)
    properties = torch.cuda.get_device_properties(device)
    return Architecture.of((properties.major, properties.minor), properties.multi_processor_count)


def mode_of(dtype: torch.dtype, is_weighted: bool, precision: Mode = "split") -> Mode:
    """How rows are multiplied: exactly where they are low precision and unweighted."""
    if dtype in _LOW_PRECISION:
        return "split" if is_weighted else "direct"
    return precision


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
        precision: Of float32 rows: "split" in three bfloat16, "tf32", or "ieee" without tensor
            cores. Others are multiplied exactly.
        architecture: Overrides what is known of the device; for tests.
    """
    job = _job(rows, row_weight is not None, precision, architecture)
    if job is None:
        for tensor in (moment, sum, weight):
            tensor.mul_(decay)
        return
    with torch.cuda.device_of(rows):
        if job.is_centred:
            shift_kernel[job.shift_grid](
                rows, shift, count, *job.shift_numbers, **job.shift_options
            )
        chunk_weight = None
        if job.gram_grid is not None:
            partial, notes = _launch_gram(job, shift, count, rows)
        else:
            partial, notes, chunk_weight = _launch_blocks(job, shift, count, rows, row_weight)
        reduce_kernel[job.reduce_grid](
            partial,
            notes,
            chunk_weight,
            moment,
            sum,
            shift,
            weight,
            count,
            *job.reduce_numbers,
            row_scale,
            decay,
            **job.reduce_options,
        )


def workspace_bytes(
    rows: Tensor, *, is_weighted: bool = False, architecture: Architecture | None = None
) -> int:
    """Bytes that one call of :func:`launch_accumulate_` takes and gives back."""
    job = _job(rows, is_weighted, "split", architecture)
    if job is None:
        return 0
    weights = 8 * job.plan.chunks if is_weighted else 0
    return 4 * (job.partial_entries + job.notes_entries) + job.rows + weights


@dataclass(frozen=True)
class Job:
    """Everything about the launches of one update that its shape decides: made once a shape."""

    plan: Plan
    rows: int
    is_centred: bool
    partial_entries: int
    notes_entries: int
    matrix_block: tuple[int, int] | None
    is_aligned: bool
    shift_grid: tuple[int, ...]
    shift_numbers: tuple[int, ...]
    shift_options: dict[str, Any]
    gram_grid: tuple[int, ...] | None
    gram_numbers: tuple[int, ...]
    gram_options: dict[str, Any]
    block_grid: tuple[int, ...] | None
    block_numbers: tuple[int, ...]
    block_options: dict[str, Any]
    mask_options: dict[str, Any]
    reduce_grid: tuple[int, ...]
    reduce_numbers: tuple[int, ...]
    reduce_options: dict[str, Any]


def _job(
    rows: Tensor, is_weighted: bool, precision: Mode, architecture: Architecture | None
) -> Job | None:
    return _cached_job(
        row_layout(rows),
        rows.dtype,
        is_weighted,
        precision,
        architecture or architecture_of(rows.device),
    )


@lru_cache(maxsize=4096)
def _cached_job(
    layout: RowLayout,
    dtype: torch.dtype,
    is_weighted: bool,
    precision: Mode,
    architecture: Architecture,
) -> Job | None:
    if layout.rows == 0 or layout.channels == 0:
        return None
    mode = mode_of(dtype, is_weighted, precision)
    is_centred = dtype not in _LOW_PRECISION
    is_deep = layout.kind == "strided"
    case = None if is_weighted else gram_case(architecture, layout, mode)
    most_rows = chain_rows(architecture, mode, dtype)
    gram_grid = block_grid = matrix_block = None
    gram_numbers: tuple[int, ...] = ()
    gram_options: dict[str, Any] = {}
    if case is not None:
        config = gram_config(case, layout.channels)
        plan = gram_plan(config, layout, dtype.itemsize, architecture, most_rows)
        step = config.step
        gram_grid = (plan.programs,)
        gram_numbers = (
            plan.chunks,
            plan.steps,
            plan.steps_per_chunk,
            triton.cdiv(layout.positions, step),
            layout.channels,
            layout.positions,
            layout.stride_2,
            layout.stride_position,
            layout.stride_channel,
        )
        gram_options = {
            "STEP": step,
            "PANEL": config.panel,
            "PANELS": config.panels,
            "LEFT": config.left,
            "RIGHT": config.right,
            "EDGE": config.edge,
            "VECTOR": 1 if case.kind == "unaligned" else 16 // dtype.itemsize,
            "MODE": MODES[mode],
            "IS_PLANES": layout.kind == "planes",
            "LOADS_TWICE": case.loads_twice,
            "STAGES": config.stages,
            "IS_INTERPRETED": IS_INTERPRETED,
            "num_warps": config.warps,
            "num_stages": config.stages,
        }
        if case.kind == "matrix":
            matrix_block = (step, config.panel)
        if config.left:
            # gram_kernel repairs by itself only where no rectangles exist, even if one triangle
            # happens to cover these channels.
            block_grid = (plan.blocks, plan.chunks)
        block_step, warps, stages = _REPAIR_STEP, 4, 1
    else:
        # Rows of one step: what fits into registers beside the two parts of float32 operands.
        step = block_step = 16 if mode in ("split", "ieee") else 32
        # Triton 3.6 rounds exact products of 64 rows to TF32 on sm_100 without a word.
        edge = 32 if mode == "ieee" else _BLOCK_EDGE
        plan = block_plan(edge, step, layout, architecture, most_rows)
        block_grid = (plan.blocks, plan.chunks)
        # Element-wise loads cannot be pipelined.
        warps, stages = 8, 1 if is_deep else 2
    shorter = step // block_step
    segment = min(_SEGMENT, plan.edge**2)
    segments = plan.blocks * plan.edge**2 // segment
    return Job(
        plan=plan,
        rows=layout.rows,
        is_centred=is_centred,
        partial_entries=plan.chunks * plan.slot,
        notes_entries=plan.chunks * plan.triangles + 1,
        matrix_block=matrix_block,
        is_aligned=case is not None and case.kind != "unaligned",
        shift_grid=(triton.cdiv(layout.channels, _BLOCK_EDGE),),
        shift_numbers=(
            layout.images * triton.cdiv(layout.positions, SHIFT_ROWS),
            triton.cdiv(layout.positions, SHIFT_ROWS),
            *_geometry(layout),
        ),
        shift_options={
            "SHIFT_ROWS": SHIFT_ROWS,
            "STEP": SHIFT_ROWS,
            "EDGE": _BLOCK_EDGE,
            "IS_DEEP": is_deep,
            "num_warps": 8,
        },
        gram_grid=gram_grid,
        gram_numbers=gram_numbers,
        gram_options=gram_options,
        block_grid=block_grid,
        block_numbers=(
            plan.steps * shorter,
            plan.steps_per_chunk * shorter,
            triton.cdiv(layout.positions, step) * shorter,
            *_geometry(layout),
        ),
        block_options={
            "STEP": block_step,
            "EDGE": plan.edge,
            "MODE": MODES[mode],
            "IS_CENTRED": is_centred,
            "IS_DEEP": is_deep,
            "ONLY_BROKEN": gram_grid is not None,
            "STAGES": stages,
            "IS_INTERPRETED": IS_INTERPRETED,
            "num_warps": warps,
        },
        mask_options={"STEP": step, "EDGE": _BLOCK_EDGE, "IS_DEEP": is_deep, "num_warps": 4},
        reduce_grid=(segments + triton.cdiv(layout.channels, segment) + 1,),
        reduce_numbers=(layout.rows, plan.chunks, plan.triangles, layout.channels),
        reduce_options={
            "EDGE": plan.edge,
            "SEGMENT": segment,
            "FOLD": _FOLD,
            "IS_CENTRED": is_centred,
            "num_warps": 4,
        },
    )


def _geometry(layout: RowLayout) -> tuple[int, ...]:
    return (
        layout.channels,
        layout.positions,
        layout.size_1,
        layout.size_2,
        layout.stride_0,
        layout.stride_1,
        layout.stride_2,
        layout.stride_position,
        layout.stride_channel,
    )


def _launch_gram(job: Job, shift: Tensor, count: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    partial, notes, is_row_finite = _workspace(job, rows)
    matrix = None
    if job.matrix_block is not None:
        _, _, _, _, channels, positions, _, stride_position, _ = job.gram_numbers
        matrix = TensorDescriptor(
            rows, [positions, channels], [stride_position, 1], list(job.matrix_block)
        )
    gram_kernel[job.gram_grid](
        rows,
        rows if job.is_aligned else None,
        matrix,
        shift,
        is_row_finite,
        partial,
        notes,
        count,
        *job.gram_numbers,
        **job.gram_options,
    )
    if job.block_grid is not None:
        block_kernel[job.block_grid](
            rows,
            shift,
            None,
            is_row_finite,
            partial,
            notes,
            job.plan.triangles,
            *job.block_numbers,
            **job.block_options,
        )
    return partial, notes


def _launch_blocks(
    job: Job, shift: Tensor, count: Tensor, rows: Tensor, row_weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None]:
    partial, notes, is_row_finite = _workspace(job, rows)
    chunk_weight = None
    if row_weight is not None:
        row_weight = row_weight.double()
        chunk_weight = torch.empty(job.plan.chunks, dtype=torch.float64, device=rows.device)
    mask_kernel[(job.plan.chunks,)](
        rows,
        row_weight,
        is_row_finite,
        notes,
        chunk_weight,
        count,
        *job.block_numbers,
        **job.mask_options,
    )
    block_kernel[job.block_grid](
        rows,
        shift,
        row_weight,
        is_row_finite,
        partial,
        notes,
        job.plan.triangles,
        *job.block_numbers,
        **job.block_options,
    )
    return partial, notes, chunk_weight


def _workspace(job: Job, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    device = rows.device
    partial = torch.empty(job.partial_entries, dtype=torch.float32, device=device)
    notes = torch.empty(job.notes_entries, dtype=torch.int32, device=device)
    is_row_finite = torch.empty(job.rows, dtype=torch.uint8, device=device)
    return partial, notes, is_row_finite
