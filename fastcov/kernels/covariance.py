"""Launches the covariance kernels: the contract of accumulate_ on CUDA tensors.

One update is two launches for up to 256 channels (gram, reduce), three above (a repair that returns
at once where all rows are finite) and one more for float32 rows (the shift, which returns at once
on a state that has seen a row). Nothing is read back: CUDA graphs capture it. Partial results live
in workspace from torch's caching allocator.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastcov.kernels.block import block_kernel, mask_kernel
from fastcov.kernels.config import (
    SHIFT_ROWS,
    Architecture,
    GramCase,
    GramConfig,
    Mode,
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
_MASK_STEP = 64
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
        precision: Of float32 rows: "split" in two bfloat16, "tf32", or "ieee" without tensor
            cores. Others are multiplied exactly.
        architecture: Overrides what is known of the device; for tests.
    """
    layout = row_layout(rows)
    if layout.rows == 0 or layout.channels == 0:
        for tensor in (moment, sum, weight):
            tensor.mul_(decay)
        return
    architecture = architecture or architecture_of(rows.device)
    mode = mode_of(rows.dtype, row_weight is not None, precision)
    is_centred = rows.dtype not in _LOW_PRECISION
    if is_centred:
        _launch_shift(shift, count, rows, layout)
    case = None if row_weight is not None else gram_case(architecture, layout, mode)
    if case is not None:
        config = gram_config(case, layout.channels)
        plan = gram_plan(config, layout, rows.element_size(), architecture)
        partial, notes = _launch_gram(case, config, plan, shift, count, rows, layout)
        chunk_weight = None
    else:
        plan = block_plan(_BLOCK_EDGE, _block_step(mode), layout, architecture)
        partial, notes, chunk_weight = _launch_blocks(
            plan, mode, is_centred, shift, count, rows, row_weight, layout
        )
    segments = plan.blocks * plan.edge**2 // _segment(plan.edge)
    columns = triton.cdiv(layout.channels, _segment(plan.edge))
    reduce_kernel[(segments + columns + 1,)](
        partial,
        notes,
        chunk_weight,
        moment,
        sum,
        shift,
        weight,
        count,
        layout.rows,
        plan.chunks,
        plan.triangles,
        layout.channels,
        row_scale,
        decay,
        EDGE=plan.edge,
        SEGMENT=_segment(plan.edge),
        FOLD=_FOLD,
        IS_CENTRED=is_centred,
        num_warps=4,
    )


def workspace_bytes(
    rows: Tensor, *, is_weighted: bool = False, architecture: Architecture | None = None
) -> int:
    """Bytes that one call of :func:`launch_accumulate_` takes and gives back."""
    layout = row_layout(rows)
    architecture = architecture or architecture_of(rows.device)
    mode = mode_of(rows.dtype, is_weighted)
    case = None if is_weighted else gram_case(architecture, layout, mode)
    if case is not None:
        config = gram_config(case, layout.channels)
        plan = gram_plan(config, layout, rows.element_size(), architecture)
    else:
        plan = block_plan(_BLOCK_EDGE, _block_step(mode), layout, architecture)
    return 4 * plan.chunks * (plan.slot + plan.triangles) + layout.rows


def _segment(edge: int) -> int:
    return min(_SEGMENT, edge * edge)


def _block_step(mode: Mode) -> int:
    # Rows of one step: what fits into registers beside the two parts of float32 operands.
    return 16 if mode in ("split", "ieee") else 32


def _geometry(layout: RowLayout, step: int) -> tuple[int, ...]:
    return (
        triton.cdiv(layout.positions, step),
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


def _is_deep(layout: RowLayout) -> bool:
    return layout.kind == "strided"


def _launch_shift(shift: Tensor, count: Tensor, rows: Tensor, layout: RowLayout) -> None:
    steps = layout.images * triton.cdiv(layout.positions, SHIFT_ROWS)
    shift_kernel[(triton.cdiv(layout.channels, _BLOCK_EDGE),)](
        rows,
        shift,
        count,
        steps,
        *_geometry(layout, SHIFT_ROWS),
        SHIFT_ROWS=SHIFT_ROWS,
        STEP=SHIFT_ROWS,
        EDGE=_BLOCK_EDGE,
        IS_DEEP=_is_deep(layout),
        num_warps=8,
    )


def _launch_gram(
    case: GramCase,
    config: GramConfig,
    plan: Plan,
    shift: Tensor,
    count: Tensor,
    rows: Tensor,
    layout: RowLayout,
) -> tuple[Tensor, Tensor]:
    partial, notes, is_row_finite = _workspace(plan, rows, layout)
    matrix = None
    if case.kind == "matrix":
        matrix = TensorDescriptor(
            rows,
            [layout.positions, layout.channels],
            [layout.stride_position, 1],
            [config.step, config.panel],
        )
    is_aligned = case.kind != "unaligned"
    gram_kernel[(plan.programs,)](
        rows,
        rows if is_aligned else None,
        matrix,
        shift,
        is_row_finite,
        partial,
        notes,
        count,
        plan.chunks,
        plan.steps,
        plan.steps_per_chunk,
        triton.cdiv(layout.positions, config.step),
        layout.channels,
        layout.positions,
        layout.stride_2,
        layout.stride_position,
        layout.stride_channel,
        STEP=config.step,
        PANEL=config.panel,
        PANELS=config.panels,
        LEFT=config.left,
        RIGHT=config.right,
        EDGE=config.edge,
        VECTOR=16 // rows.element_size() if is_aligned else 1,
        MODE=MODES[case.mode],
        IS_PLANES=layout.kind == "planes",
        LOADS_TWICE=case.loads_twice,
        STAGES=config.stages,
        IS_INTERPRETED=IS_INTERPRETED,
        num_warps=config.warps,
        num_stages=config.stages,
    )
    if plan.triangles > 1:
        shorter = config.step // _REPAIR_STEP
        steps_per_image, *extents = _geometry(layout, config.step)
        block_kernel[(plan.blocks, plan.chunks)](
            rows,
            shift,
            None,
            is_row_finite,
            partial,
            notes,
            plan.triangles,
            plan.steps * shorter,
            plan.steps_per_chunk * shorter,
            steps_per_image * shorter,
            *extents,
            STEP=_REPAIR_STEP,
            EDGE=config.edge,
            MODE=MODES[case.mode],
            IS_CENTRED=case.mode == "split",
            IS_DEEP=False,
            ONLY_BROKEN=True,
            STAGES=1,
            IS_INTERPRETED=IS_INTERPRETED,
            num_warps=4,
        )
    return partial, notes


def _launch_blocks(
    plan: Plan,
    mode: Mode,
    is_centred: bool,
    shift: Tensor,
    count: Tensor,
    rows: Tensor,
    row_weight: Tensor | None,
    layout: RowLayout,
) -> tuple[Tensor, Tensor, Tensor | None]:
    partial, notes, is_row_finite = _workspace(plan, rows, layout)
    chunk_weight = None
    if row_weight is not None:
        row_weight = row_weight.double()
        chunk_weight = torch.empty(plan.chunks, dtype=torch.float64, device=rows.device)
    step = _block_step(mode)
    geometry = (plan.steps, plan.steps_per_chunk, *_geometry(layout, step))
    mask_kernel[(plan.chunks,)](
        rows,
        row_weight,
        is_row_finite,
        notes,
        chunk_weight,
        count,
        *geometry,
        STEP=step,
        EDGE=_BLOCK_EDGE,
        IS_DEEP=_is_deep(layout),
        num_warps=4,
    )
    block_kernel[(plan.blocks, plan.chunks)](
        rows,
        shift,
        row_weight,
        is_row_finite,
        partial,
        notes,
        plan.triangles,
        *geometry,
        STEP=step,
        EDGE=_BLOCK_EDGE,
        MODE=MODES[mode],
        IS_CENTRED=is_centred,
        IS_DEEP=_is_deep(layout),
        ONLY_BROKEN=False,
        STAGES=2,
        IS_INTERPRETED=IS_INTERPRETED,
        num_warps=8,
    )
    return partial, notes, chunk_weight


def _workspace(plan: Plan, rows: Tensor, layout: RowLayout) -> tuple[Tensor, Tensor, Tensor]:
    device = rows.device
    partial = torch.empty(plan.chunks * plan.slot, dtype=torch.float32, device=device)
    notes = torch.empty(plan.chunks * plan.triangles + 1, dtype=torch.int32, device=device)
    is_row_finite = torch.empty(layout.rows, dtype=torch.uint8, device=device)
    return partial, notes, is_row_finite
