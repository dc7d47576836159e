"""Gather of sampled rows into a buffer: with counters on the host, or in a device cursor.

The rows are those of :func:`fastcov.ops.reference.sample_index_reference`. With a cursor nothing
that changes from step to step is an argument, so a CUDA graph replays the launch with right counts.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcov.kernels.launch import Launch, Starter, is_current, is_watched
from fastcov.kernels.layout import Geometry, RowLayout, row_layout
from fastcov.kernels.tiles import is_finite, kernel

CURSOR_FIELDS = 8
"""int64 fields of one layer's cursor; all start at 0."""
FILL = tl.constexpr(0)
"""Rows in the buffer."""
SAMPLED = tl.constexpr(1)
"""Rows gathered since the start: the number of the next sample."""
CARRY = tl.constexpr(2)
"""Fraction of a row due, carried to the next call, in units of 2**-32."""
GATHERED = tl.constexpr(3)
"""Programs of the running gather that are done; 0 between launches."""
FLUSHED = tl.constexpr(4)
"""Programs of the running flush that are done; 0 between launches."""
STATE_STEP = tl.constexpr(5)
"""Step up to which decay has been applied to the state."""
DROPPED = tl.constexpr(6)
"""Rows that were due and found no room in the buffer: 0 where buffers are sized right."""
IS_APART = tl.constexpr(7)
"""True if the buffer has been emptied at a moment of its own, see BufferedLayer.first_threshold."""

_GOLDEN_RATIO_64 = tl.constexpr(0x9E3779B97F4A7C15)
_ROWS = 16  # rows of one program
_COLUMNS = 128  # channels copied at a time


@triton.jit
def copy_rows(
    buffer,
    rows,
    row_step,  # int32 [capacity] or None
    step_number,
    sample,  # int64 [ROWS], numbers of samples
    buffer_row,  # int64 [ROWS]
    is_copied,
    row_count,
    image_rows,
    run_length,
    phase,
    geometry,
    IS_ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_DEEP: tl.constexpr,
):
    """Copy of one row a sample, marked with the step, or -1 where a value is not finite."""
    if IS_ORDERED:
        start = sample
        offset = sample * 0
    else:
        run = sample // run_length
        offset = sample - run * run_length
        fraction = phase.to(tl.int64).to(tl.uint64) + run.to(tl.uint64) * _GOLDEN_RATIO_64
        total = tl.zeros([ROWS], tl.uint64) + row_count.to(tl.uint64)
        start = tl.umulhi(fraction, total).to(tl.int64)
    # A run wraps inside its image.
    first_row = start // image_rows * image_rows
    row = first_row + (start - first_row + offset) % image_rows
    image = row // geometry.positions
    position = row % geometry.positions
    if IS_DEEP:
        where = image // (geometry.size_1 * geometry.size_2) * geometry.stride_0
        where += image // geometry.size_2 % geometry.size_1 * geometry.stride_1
        where += image % geometry.size_2 * geometry.stride_2
    else:
        where = image * geometry.stride_2
    source = rows + (where + position * geometry.stride_position)
    target = buffer + buffer_row * geometry.channels
    broken = tl.zeros([ROWS], tl.int32)
    for first in range(0, geometry.channels, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        is_inside = is_copied[:, None] & (column < geometry.channels)[None, :]
        values = tl.load(
            source[:, None] + column[None, :] * geometry.stride_channel, mask=is_inside, other=0.0
        )
        tl.store(target[:, None] + column[None, :], values, mask=is_inside)
        if row_step is not None:
            broken = tl.maximum(broken, tl.max(1 - is_finite(values).to(tl.int32), axis=1))
    if row_step is not None:
        mark = tl.where(broken == 0, step_number.to(tl.int32), -1)
        tl.store(row_step + buffer_row, mark, mask=is_copied)


@kernel()
def gather_kernel(
    buffer,
    rows,
    buffer_row: tl.int64,
    first_sample: tl.int64,
    samples: tl.int64,
    run_length: tl.int64,
    phase: tl.int64,
    row_count: tl.int64,
    image_rows: tl.int64,
    steps_per_image: tl.int32,
    channels: tl.int32,
    positions: tl.int64,
    size_1: tl.int64,
    size_2: tl.int64,
    stride_0: tl.int64,
    stride_1: tl.int64,
    stride_2: tl.int64,
    stride_position: tl.int64,
    stride_channel: tl.int64,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_DEEP: tl.constexpr,
):
    """Gather of ROWS samples a program, counters from the host."""
    geometry = Geometry(
        steps_per_image,
        channels,
        positions,
        size_1,
        size_2,
        stride_0,
        stride_1,
        stride_2,
        stride_position,
        stride_channel,
    )
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    copy_rows(
        buffer,
        rows,
        None,
        buffer_row,
        first_sample + index,
        buffer_row + index,
        index < samples,
        row_count,
        image_rows,
        run_length,
        phase,
        geometry,
        False,
        ROWS,
        COLUMNS,
        IS_DEEP,
    )


@kernel()
def cursor_gather_kernel(
    buffer,
    rows,
    row_step,
    cursor,  # int64 [CURSOR_FIELDS], read by every program, written by the last
    step,  # int64 []
    capacity: tl.int64,
    fraction: tl.int64,
    run_length: tl.int64,
    phase: tl.int64,
    row_count: tl.int64,
    image_rows: tl.int64,
    steps_per_image: tl.int32,
    channels: tl.int32,
    positions: tl.int64,
    size_1: tl.int64,
    size_2: tl.int64,
    stride_0: tl.int64,
    stride_1: tl.int64,
    stride_2: tl.int64,
    stride_position: tl.int64,
    stride_channel: tl.int64,
    IS_ORDERED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    IS_DEEP: tl.constexpr,
):
    """Gather of ROWS samples a program, counters on the device."""
    geometry = Geometry(
        steps_per_image,
        channels,
        positions,
        size_1,
        size_2,
        stride_0,
        stride_1,
        stride_2,
        stride_position,
        stride_channel,
    )
    fill = tl.load(cursor + FILL)
    sampled = tl.load(cursor + SAMPLED)
    due = row_count.to(tl.int64) * fraction.to(tl.int64) + tl.load(cursor + CARRY)
    wanted = due >> 32
    samples = tl.minimum(wanted, capacity - fill)
    index = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    first = index if IS_ORDERED else sampled + index
    copy_rows(
        buffer,
        rows,
        row_step,
        tl.load(step),
        first,
        fill + index,
        index < samples,
        row_count,
        image_rows,
        run_length,
        phase,
        geometry,
        IS_ORDERED,
        ROWS,
        COLUMNS,
        IS_DEEP,
    )
    # The last program knows that all others have read the counters, and moves them on. The order in
    # which programs arrive changes nothing that is stored.
    tl.debug_barrier()
    if tl.atomic_add(cursor + GATHERED, 1, sem="acq_rel") == tl.num_programs(0) - 1:
        tl.store(cursor + FILL, fill + samples)
        tl.store(cursor + SAMPLED, sampled + samples)
        tl.store(cursor + CARRY, due & 0xFFFFFFFF)
        tl.store(cursor + DROPPED, tl.load(cursor + DROPPED) + wanted - samples)
        tl.store(cursor + GATHERED, tl.zeros([], tl.int64))


def launch_gather_(
    buffer: Tensor,
    rows: Tensor,
    buffer_row: int,
    first_sample: int,
    samples: int,
    run_length: int = 1,
    phase: int = 0,
) -> None:
    """Launch that copies sampled rows: see :func:`fastcov.ops.reference.gather_reference_`.

    Args:
        buffer: Contiguous, the rows' dtype. [capacity, C]
        rows: Any strides; dim 0 holds the images. [B, ..., C]
        buffer_row: Row of the buffer for the first sample.
        first_sample: Number of the first sample, counted over the whole training.
        samples: How many rows to copy.
        run_length: Neighbouring positions read together.
        phase: Start of the sequence, 64 bits as a signed integer.
    """
    if samples == 0:
        return
    layout = row_layout(rows)
    launch = Launch.of(
        gather_kernel,
        (triton.cdiv(samples, _ROWS),),
        (
            buffer_row,
            first_sample,
            samples,
            run_length,
            phase,
            layout.rows,
            _image_rows(rows, layout),
            *layout.geometry(0),
        ),
        _constants(layout),
        num_warps=4,
    )
    with torch.cuda.device_of(rows):
        launch.start(buffer, rows)


def launch_cursor_gather_(
    buffer: Tensor,
    row_step: Tensor,
    cursor: Tensor,
    step: Tensor,
    rows: Tensor,
    fraction: int,
    run_length: int = 1,
    phase: int = 0,
) -> None:
    """Launch that copies due rows, with all counters on the device: see :class:`CursorGather`."""
    gather = CursorGather(buffer, row_step, cursor, step, rows, fraction, run_length, phase)
    gather.launch_(rows)


class CursorGather:
    """Repeated copy of the rows that are due, with all counters on the device.

    The number due is ``(carry + N * fraction) >> 32``, as in ``rows.sequence.rows_due``;
    the rest is carried. Rows that find no room are dropped and counted: a buffer must hold its
    flush threshold plus one step's rows.

    From one step to the next nothing changes but where the rows lie: all else is put in order once,
    and all tensors but the rows must stay where they are.

    Args:
        buffer: Contiguous, the rows' dtype. [capacity, C]
        row_step: int32, receives for each buffered row its step, or -1 where a value is not
            finite. [capacity]
        cursor: int64, see CURSOR_FIELDS. [CURSOR_FIELDS]
        step: int64, number of the running step. []
        rows: Laid out as those to come; dim 0 holds the images. [B, ..., C]
        fraction: Share of the rows to read in units of 2**-32; 2**32 reads all, in order.
        run_length: Neighbouring positions read together.
        phase: Start of the sequence, 64 bits as a signed integer.
    """

    __slots__ = ("_addresses", "_starter", "_tensors")

    def __init__(
        self,
        buffer: Tensor,
        row_step: Tensor,
        cursor: Tensor,
        step: Tensor,
        rows: Tensor,
        fraction: int,
        run_length: int = 1,
        phase: int = 0,
    ) -> None:
        layout = row_layout(rows)
        most = (layout.rows * fraction + 2**32 - 1) >> 32
        self._tensors = (buffer, row_step, cursor, step)
        self._addresses = tuple(tensor.data_ptr() for tensor in self._tensors)
        self._starter: Starter | None = None
        if most > 0:
            launch = Launch.of(
                cursor_gather_kernel,
                (triton.cdiv(most, _ROWS),),
                (
                    buffer.shape[0],
                    fraction,
                    run_length,
                    phase,
                    layout.rows,
                    _image_rows(rows, layout),
                    *layout.geometry(0),
                ),
                {"IS_ORDERED": fraction >= 2**32, **_constants(layout)},
                num_warps=4,
            )
            self._starter = Starter(launch, rows.get_device())

    def launch_(self, rows: Tensor) -> None:
        """Copy of the rows that are due, from a row view or from its activation."""
        starter = self._starter
        if starter is None:
            return
        if not is_current(rows.get_device()):
            with torch.cuda.device_of(rows):
                self.launch_(rows)
        elif (start := starter.directly) is not None and not is_watched():
            buffer, *others = self._addresses
            start(buffer, rows.data_ptr(), *others)
        else:
            tensor, *tensors = self._tensors
            starter.through_triton(tensor, rows, *tensors)


def _constants(layout: RowLayout) -> dict[str, Any]:
    return {"ROWS": _ROWS, "COLUMNS": _COLUMNS, "IS_DEEP": layout.kind == "strided"}


def _image_rows(rows: Tensor, layout: RowLayout) -> int:
    return layout.rows // rows.shape[0] if rows.dim() > 1 else layout.rows
