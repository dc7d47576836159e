"""Launches of one update, decided by the layout of its rows: made once a layout.

Preparing a launch is Python that runs in every hook: all that depends on sizes, strides, dtype,
alignment and device alone is here, in tuples in the order of a kernel's arguments.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

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
from fastcov.kernels.launch import Launch, architecture_of
from fastcov.kernels.layout import RowLayout, is_address_aligned, row_layout_of
from fastcov.kernels.plan import Plan, block_plan, gram_plan
from fastcov.kernels.reduce import reduce_kernel
from fastcov.kernels.shift import shift_kernel
from fastcov.kernels.tiles import IS_INTERPRETED, MODES
from fastcov.rows.dtypes import ROW_DTYPES

_BLOCK_EDGE = 64
_REPAIR_STEP = 16
# Entries that a program of reduce_kernel adds up, and slots that it reads at once. Few entries have
# many slots: shorter segments make enough programs of them. The interpreter's time goes with the
# number of programs.
_SEGMENT, _FOLD = (4096 if IS_INTERPRETED else 128), 16
_NARROW_SEGMENT, _NARROW_FOLD = (4096 if IS_INTERPRETED else 32), 32
_NARROW_ENTRIES = 3 * 64**2  # 128 channels


@dataclass(frozen=True)
class Job:
    """Launches of one update; those that it does not need are None.

    Attributes:
        plan: How the rows are cut into chunks.
        workspace_entries: float32 numbers: partial results, notes, a byte a row.
        matrix: Shape, strides and shape of a block, of a descriptor of the rows.
        is_aligned: True if the gram's loads rely on the alignment of the rows' address.
        adds_vectors: True if the gram's additions rely on that of the partial results' address.
        shift: Shift of a new float32 state.
        gram: Second moments of aligned or unaligned rows.
        block: Repair of chunks that hold non-finite rows; all of the moments where gram is None.
        mask: Finite rows, where gram is None.
        reduce: Partial results into the state.
    """

    plan: Plan
    workspace_entries: int
    matrix: tuple[list[int], list[int], list[int]] | None
    is_aligned: bool
    adds_vectors: bool
    shift: Launch | None
    gram: Launch | None
    block: Launch | None
    mask: Launch | None
    reduce: Launch

    def descriptor(self, rows: Tensor) -> TensorDescriptor:
        """Descriptor that bulk copies of rows read, where the rows are a matrix."""
        # The constructor of a descriptor would check sizes and alignment in 1 us of every hook, but
        # a job is looked up by both. Fields with a default are attributes of the class.
        assert self.matrix is not None
        descriptor = object.__new__(TensorDescriptor)
        descriptor.base = rows
        descriptor.shape, descriptor.strides, descriptor.block_shape = self.matrix
        return descriptor


def mode_of(dtype: torch.dtype, is_weighted: bool, precision: Mode = "split") -> Mode:
    """Mode of multiplication: exact where the rows are low precision and unweighted."""
    if not ROW_DTYPES[dtype].is_centred:
        return "split" if is_weighted else "direct"
    return precision


def job_of(
    rows: Tensor,
    is_weighted: bool,
    precision: Mode,
    architecture: Architecture | None = None,
    channel_dim: int = -1,
) -> Job | None:
    """Launches that add rows: None where there is no row.

    Args:
        rows: Up to four dimensions beside the channels, any strides.
        is_weighted: True if each row has a weight.
        precision: Precision of float32 rows.
        architecture: None asks the device.
        channel_dim: Dimension of the channels.
    """
    return cached_job(
        rows.shape,
        rows.stride(),
        rows.dtype,
        is_address_aligned(rows),
        channel_dim,
        is_weighted,
        precision,
        architecture or architecture_of(rows.device),
    )


@lru_cache(maxsize=4096)
def cached_job(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    dtype: torch.dtype,
    is_aligned: bool,
    channel_dim: int,
    is_weighted: bool,
    precision: Mode,
    architecture: Architecture,
) -> Job | None:
    """Memory of :func:`job_of`: activations come with the same strides every step."""
    layout = row_layout_of(shape, strides, dtype.itemsize, is_aligned, channel_dim)
    if layout.rows == 0 or layout.channels == 0:
        return None
    mode = mode_of(dtype, is_weighted, precision)
    is_centred = ROW_DTYPES[dtype].is_centred
    is_deep = layout.kind == "strided"
    case = None if is_weighted else gram_case(architecture, layout, mode)
    most_rows = chain_rows(architecture, mode, dtype)
    overlaps = architecture.overlaps_launches and not IS_INTERPRETED
    waits = {"launch_pdl": True} if overlaps else {}
    gram = matrix = None
    has_blocks = True
    if case is not None:
        config = gram_config(case, layout.channels)
        plan = gram_plan(config, layout, dtype.itemsize, architecture, most_rows)
        step = config.step
        sizes = _sizes(plan)
        gram = Launch.of(
            gram_kernel,
            (plan.programs,),
            (
                *sizes,
                plan.steps,
                plan.steps_per_chunk,
                plan.steps_per_chain,
                triton.cdiv(layout.positions, step),
                layout.channels,
                layout.positions,
                layout.stride_2,
                layout.stride_position,
                layout.stride_channel,
            ),
            {
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
                "ONE_CHAIN": plan.steps_per_chunk == plan.steps_per_chain,
                "HOISTS": config.hoists,
                "STAGES": config.stages,
                "OVERLAPS": overlaps,
                "IS_INTERPRETED": IS_INTERPRETED,
            },
            num_warps=config.warps,
            num_stages=config.stages,
        )
        if case.kind == "matrix":
            matrix = _matrix(layout, dtype, [step, config.panel])
        # gram_kernel repairs by itself only where no rectangles exist, even if one triangle happens
        # to cover these channels.
        has_blocks = bool(config.left)
        block_step, warps, stages = _REPAIR_STEP, 4, 1
    else:
        # Rows of one step, as many as fit into registers beside the parts of float32 operands.
        step = block_step = 16 if mode in ("split", "ieee") else 32
        # Triton 3.6 rounds exact products of 64 rows to TF32 on sm_100 without a word.
        edge = 32 if mode == "ieee" else _BLOCK_EDGE
        plan = block_plan(edge, step, layout, architecture, most_rows)
        sizes = _sizes(plan)
        # Element-wise loads cannot be pipelined.
        warps, stages = (4, 1) if mode == "ieee" else (8, 1 if is_deep else 2)
    shorter = step // block_step
    is_narrow = plan.blocks * plan.edge**2 <= _NARROW_ENTRIES
    segment = min(_NARROW_SEGMENT if is_narrow else _SEGMENT, plan.edge**2)
    segments = plan.blocks * plan.edge**2 // segment
    block_numbers = (
        plan.steps * shorter,
        plan.steps_per_chunk * shorter,
        plan.steps_per_chain * shorter,
        *layout.geometry(triton.cdiv(layout.positions, step) * shorter),
    )
    block = mask = None
    if has_blocks:
        block = Launch.of(
            block_kernel,
            (plan.blocks, plan.chunks),
            (plan.triangles, *sizes, *block_numbers),
            {
                "STEP": block_step,
                "EDGE": plan.edge,
                "MODE": MODES[mode],
                "IS_CENTRED": is_centred,
                "IS_DEEP": is_deep,
                "ONLY_BROKEN": gram is not None,
                "STAGES": stages,
                "OVERLAPS": overlaps,
                "IS_INTERPRETED": IS_INTERPRETED,
            },
            num_warps=warps,
            **waits,
        )
    if gram is None:
        mask = Launch.of(
            mask_kernel,
            (plan.chains,),
            (*sizes, *block_numbers),
            {"STEP": step, "EDGE": _BLOCK_EDGE, "IS_DEEP": is_deep},
            num_warps=4,
        )
    return Job(
        plan=plan,
        workspace_entries=sum(sizes) + triton.cdiv(layout.rows, 4),
        matrix=matrix,
        is_aligned=case is not None and case.kind != "unaligned",
        adds_vectors=case is not None and case.adds_vectors,
        shift=_shift(layout) if is_centred else None,
        gram=gram,
        block=block,
        mask=mask,
        reduce=Launch.of(
            reduce_kernel,
            (segments + triton.cdiv(layout.channels, segment) + 1,),
            (
                sizes[0],
                layout.rows,
                plan.chunks,
                plan.chains,
                plan.triangles,
                layout.channels,
            ),
            {
                "EDGE": plan.edge,
                "SEGMENT": segment,
                "FOLD": _NARROW_FOLD if is_narrow and not is_weighted else _FOLD,
                "IS_CENTRED": is_centred,
                "OVERLAPS": overlaps,
            },
            num_warps=4,
            **waits,
        ),
    )


def _sizes(plan: Plan) -> tuple[int, int]:
    """Entries of the partial results and of the notes behind them."""
    return plan.chunks * plan.slot, plan.chains * plan.triangles + 3


def _shift(layout: RowLayout) -> Launch:
    steps_per_image = triton.cdiv(layout.positions, SHIFT_ROWS)
    return Launch.of(
        shift_kernel,
        (triton.cdiv(layout.channels, _BLOCK_EDGE),),
        (layout.images * steps_per_image, *layout.geometry(steps_per_image)),
        {
            "SHIFT_ROWS": SHIFT_ROWS,
            "STEP": SHIFT_ROWS,
            "EDGE": _BLOCK_EDGE,
            "IS_DEEP": layout.kind == "strided",
        },
        num_warps=8,
    )


def _matrix(
    layout: RowLayout, dtype: torch.dtype, block: list[int]
) -> tuple[list[int], list[int], list[int]]:
    sizes, strides = [layout.positions, layout.channels], [layout.stride_position, 1]
    # The descriptor's constructor checks sizes and strides.
    TensorDescriptor(torch.empty(0, dtype=dtype, device="cpu"), sizes, strides, block)
    return sizes, strides, block
