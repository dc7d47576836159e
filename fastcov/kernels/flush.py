"""One launch that adds the full buffers of all layers to their states.

A table on the device, written once, holds addresses and sizes; the counters that change live in
cursors (gather.py). So the launch has the same arguments every step: a CUDA graph replays it, and
layers whose buffers are not full cost one read per program.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastcov.kernels.config import FLUSH_CHAIN_ROWS, SHIFT_ROWS
from fastcov.kernels.gather import CURSOR_FIELDS, FILL, FLUSHED, IS_APART, STATE_STEP
from fastcov.kernels.launch import Launch, Starter, is_watched
from fastcov.kernels.tiles import (
    DIRECT,
    IS_INTERPRETED,
    MODES,
    kernel,
    multiply_tiles,
    triangle_row,
)
from fastcov.kernels.triangle import triangle_entry
from fastcov.rows.dtypes import ROW_DTYPES

FIELDS = 14
"""int64 fields of one layer in the table, in this order; addresses are bytes."""
BUFFER = tl.constexpr(0)
ROW_STEP = tl.constexpr(1)
MOMENT = tl.constexpr(2)
SUM = tl.constexpr(3)
SHIFT = tl.constexpr(4)
WEIGHT = tl.constexpr(5)
COUNT = tl.constexpr(6)
EXCESS = tl.constexpr(7)
CURSOR = tl.constexpr(8)
CHANNELS = tl.constexpr(9)
THRESHOLD = tl.constexpr(10)
ROW_SCALE = tl.constexpr(11)  # the bits of a float64
BLOCKS = tl.constexpr(12)  # programs of the layer
FIRST_THRESHOLD = tl.constexpr(13)

_VALUES = {
    row.dtype: getattr(tl, row.triton_name) for row in ROW_DTYPES.values() if row.triton_name
}


@triton.jit
def first_mean(
    buffer,
    row_step,
    fill,
    channel,
    channels,
    EDGE: tl.constexpr,
    STEP: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,
):
    """Mean of the first SHIFT_ROWS finite rows, rounded to float32. [EDGE] float64"""
    column = channel + tl.arange(0, EDGE)
    row = tl.arange(0, STEP)
    total = tl.zeros([EDGE], tl.float64)
    found = 0
    first = 0
    while (first < fill) & (found < SHIFT_ROWS):
        is_inside = first + row < fill
        usable = tl.load(row_step + first + row, mask=is_inside, other=-1) >= 0
        number = found + tl.cumsum(usable.to(tl.int32), 0)
        is_used = usable & (number <= SHIFT_ROWS)
        where = (first + row).to(tl.int64) * channels
        tile = tl.load(
            buffer + where[:, None] + column[None, :],
            mask=is_used[:, None] & (column < channels)[None, :],
            other=0.0,
        )
        total += tl.sum(tile.to(tl.float64), axis=0)
        found += tl.sum(is_used.to(tl.int32))
        first += STEP
    return (total / tl.maximum(found, 1)).to(tl.float32).to(tl.float64)


@kernel("table", "programs")
def flush_kernel(
    table,  # int64 [L, FIELDS]
    programs,  # int32 [P, 2]: layer, block of its packed triangle
    step,  # int64 []
    force: tl.int32,  # whether buffers that are not full are flushed too
    log_decay: tl.float64,
    VALUES: tl.constexpr,  # dtype of all buffers
    VECTOR: tl.constexpr,  # channels are multiples of it, and buffers aligned
    EDGE: tl.constexpr,
    STEP: tl.constexpr,
    CHAIN_ROWS: tl.constexpr,
    SHIFT_ROWS: tl.constexpr,
    FIELDS: tl.constexpr,
    MODE: tl.constexpr,
    IS_CENTRED: tl.constexpr,
    HAS_DECAY: tl.constexpr,
    STAGES: tl.constexpr,
    IS_INTERPRETED: tl.constexpr,
):
    """Block of one layer's triangle, one a program; the layer's last program moves its counters."""
    program = tl.program_id(0)
    layer = table + tl.load(programs + 2 * program) * FIELDS
    block = tl.load(programs + 2 * program + 1)
    cursor = tl.load(layer + CURSOR).to(tl.pointer_type(tl.int64))
    fill = tl.load(cursor + FILL).to(tl.int32)
    threshold = tl.load(layer + THRESHOLD)
    if tl.load(cursor + IS_APART) == 0:
        threshold = tl.load(layer + FIRST_THRESHOLD)
    if fill < tl.where(force != 0, 1, threshold.to(tl.int32)):
        return
    buffer = tl.load(layer + BUFFER).to(tl.pointer_type(VALUES))
    if VECTOR > 1:
        buffer = tl.multiple_of(buffer, 16)
    row_step = tl.load(layer + ROW_STEP).to(tl.pointer_type(tl.int32))
    moment = tl.load(layer + MOMENT).to(tl.pointer_type(tl.float64))
    sum = tl.load(layer + SUM).to(tl.pointer_type(tl.float64))
    shift = tl.load(layer + SHIFT).to(tl.pointer_type(tl.float64))
    weight = tl.load(layer + WEIGHT).to(tl.pointer_type(tl.float64))
    count = tl.load(layer + COUNT).to(tl.pointer_type(tl.int64))
    excess = tl.load(layer + EXCESS).to(tl.pointer_type(tl.float64))
    channels = tl.load(layer + CHANNELS).to(tl.int32) // VECTOR * VECTOR
    row_scale = tl.load(layer + ROW_SCALE).to(tl.float64, bitcast=True)
    blocks = tl.load(layer + BLOCKS)
    rows_before = tl.load(count)
    now = tl.load(step)
    block_row = triangle_row(block)
    block_column = block - block_row * (block_row + 1) // 2
    edge = tl.arange(0, EDGE)
    left_channel = block_row * EDGE + edge
    right_channel = block_column * EDGE + edge
    is_left = left_channel < channels
    is_right = right_channel < channels
    # The shift is stored by the programs of the diagonal; until the last program moves the count,
    # everyone finds the same.
    if rows_before == 0:
        if IS_CENTRED:
            left_shift = first_mean(
                buffer, row_step, fill, block_row * EDGE, channels, EDGE, STEP, SHIFT_ROWS
            )
            right_shift = first_mean(
                buffer, row_step, fill, block_column * EDGE, channels, EDGE, STEP, SHIFT_ROWS
            )
        else:
            left_shift = tl.zeros([EDGE], tl.float64)
            right_shift = tl.zeros([EDGE], tl.float64)
    else:
        left_shift = tl.load(shift + left_channel, mask=is_left, other=0.0)
        right_shift = tl.load(shift + right_channel, mask=is_right, other=0.0)
    if IS_CENTRED:
        left_used = left_shift.to(tl.float32)
        right_used = right_shift.to(tl.float32)
    moments = tl.zeros([EDGE, EDGE], tl.float32)
    left_sums = tl.zeros([EDGE], tl.float32)
    right_sums = tl.zeros([EDGE], tl.float32)
    weights = tl.zeros([STEP], tl.float64)
    squares = tl.zeros([STEP], tl.float64)  # of the weights; the same where all weigh 1
    finite = tl.zeros([STEP], tl.int32)
    row = tl.arange(0, STEP)
    for chain in range(0, fill, CHAIN_ROWS):
        chain_moments = tl.zeros([EDGE, EDGE], tl.float32)
        for first in tl.range(chain, tl.minimum(fill, chain + CHAIN_ROWS), STEP, num_stages=STAGES):
            mark = tl.load(row_step + first + row, mask=first + row < fill, other=-1)
            is_read = mark >= 0
            where = (first + row).to(tl.int64) * channels
            left = tl.load(
                buffer + where[None, :] + left_channel[:, None],
                mask=is_left[:, None] & is_read[None, :],
                other=0.0,
            )
            right = tl.load(
                buffer + where[:, None] + right_channel[None, :],
                mask=is_read[:, None] & is_right[None, :],
                other=0.0,
            )
            if MODE != DIRECT:
                left = left.to(tl.float32)
                right = right.to(tl.float32)
            if IS_CENTRED:
                left = tl.where(is_read[None, :], left - left_used[:, None], 0.0)
                right = tl.where(is_read[:, None], right - right_used[None, :], 0.0)
            weighted_right = right.to(tl.float32)
            if HAS_DECAY:
                age = (now - mark).to(tl.float64)
                row_weight = tl.where(is_read, tl.exp(log_decay * age), 0.0)
                weights += row_weight
                squares += row_weight * row_weight
                row_weight = row_weight.to(tl.float32)
                left = left * row_weight[None, :]
                weighted_right = weighted_right * row_weight[:, None]
            else:
                weights += is_read.to(tl.float64)
            finite += is_read.to(tl.int32)
            chain_moments = multiply_tiles(left, right, chain_moments, MODE, IS_INTERPRETED)
            left_sums += tl.sum(left.to(tl.float32), axis=1)
            right_sums += tl.sum(weighted_right, axis=0)
        moments += chain_moments
    total_weight = tl.sum(weights)
    total = moments.to(tl.float64)
    left_total = left_sums.to(tl.float64)
    right_total = right_sums.to(tl.float64)
    if IS_CENTRED:
        left_shift_left = left_shift - left_used.to(tl.float64)
        right_shift_left = right_shift - right_used.to(tl.float64)
    else:
        left_shift_left = left_shift
        right_shift_left = right_shift
    total += total_weight * left_shift_left[:, None] * right_shift_left[None, :]
    total -= left_shift_left[:, None] * right_total[None, :]
    total -= left_total[:, None] * right_shift_left[None, :]
    factor = tl.full([], 1.0, tl.float64)
    if HAS_DECAY:
        factor = tl.exp(log_decay * (now - tl.load(cursor + STATE_STEP)).to(tl.float64))
    is_kept = (
        is_left[:, None] & is_right[None, :] & (left_channel[:, None] >= right_channel[None, :])
    )
    entry = triangle_entry(left_channel[:, None], right_channel[None, :])
    before = tl.load(moment + entry, mask=is_kept, other=0.0)
    tl.store(moment + entry, before * factor + total * row_scale, mask=is_kept)
    if block_row == block_column:
        sum_before = tl.load(sum + left_channel, mask=is_left, other=0.0)
        added = left_total - total_weight * left_shift_left
        tl.store(sum + left_channel, sum_before * factor + added * row_scale, mask=is_left)
        if rows_before == 0:
            tl.store(shift + left_channel, left_shift, mask=is_left)
    tl.debug_barrier()
    if tl.atomic_add(cursor + FLUSHED, 1, sem="acq_rel") == blocks - 1:
        read = tl.sum(finite)
        total_square = total_weight
        if HAS_DECAY:
            total_square = tl.sum(squares)
        # Squared weights of all rows: those that it does not count have weighed 1 since.
        plain_before = rows_before.to(tl.float64) - tl.load(excess + 1)
        squares_before = (tl.load(excess) + plain_before) * factor * factor
        tl.store(excess, squares_before + total_square * row_scale * row_scale)
        tl.store(excess + 1, (rows_before + read).to(tl.float64))
        tl.store(weight, tl.load(weight) * factor + total_weight * row_scale)
        tl.store(count, rows_before + read)
        tl.store(count + 1, tl.load(count + 1) + fill - read)
        tl.store(cursor + STATE_STEP, now)
        tl.store(cursor + FILL, tl.zeros([], tl.int64))
        tl.store(cursor + IS_APART, (force == 0).to(tl.int64))  # forced: all layers at one moment
        tl.store(cursor + FLUSHED, tl.zeros([], tl.int64))


@dataclass(frozen=True)
class BufferedLayer:
    """One layer of a flush: state, buffer, and when the buffer counts as full.

    Attributes:
        moment: float64: see :mod:`fastcov.ops.triangle`. [tiles, 32, 32]
        sum: float64. [C]
        shift: float64. [C]
        weight: float64. []
        count: int64. [2]
        excess: Sum of squared weights of rows not simply added with weight 1, and their number,
            float64. [2]
        buffer: Contiguous rows. [capacity, C]
        row_step: int32, see :func:`fastcov.kernels.gather.launch_cursor_gather_`. [capacity]
        cursor: int64. [CURSOR_FIELDS]
        threshold: Rows from which the buffer is flushed; capacity less the most that one step
            brings.
        row_scale: Weight of a row.
        first_threshold: Rows from which it is flushed for the first time, and for the first time
            after a forced flush: another share of ``threshold`` in every layer, or one step pays
            for all. None is ``threshold``.
    """

    moment: Tensor
    sum: Tensor
    shift: Tensor
    weight: Tensor
    count: Tensor
    excess: Tensor
    buffer: Tensor
    row_step: Tensor
    cursor: Tensor
    threshold: int
    row_scale: float = 1.0
    first_threshold: int | None = None


class _Group(NamedTuple):
    """Layers that one launch flushes: device tables and how the launch is started."""

    fields: Tensor
    programs: Tensor
    starter: Starter


class FlushTable:
    """Device tables for :func:`launch_flush_`: one launch per dtype and alignment of buffers.

    The tensors of the layers must stay where they are as long as the table is used: it keeps them
    alive. The first launch with a decay, and the first without, each make their tables, which must
    not happen while a graph is captured.

    Args:
        layers: At least one, all on one device.
    """

    def __init__(self, layers: Sequence[BufferedLayer]) -> None:
        self.layers = tuple(layers)
        for layer in self.layers:
            if layer.cursor.numel() != CURSOR_FIELDS:
                raise ValueError(
                    f"cursor has {layer.cursor.numel()} fields, expected {CURSOR_FIELDS}: make it "
                    "with torch.zeros(CURSOR_FIELDS, dtype=torch.int64)"
                )
        self._groups: dict[bool, list[_Group]] = {}

    def groups(self, has_decay: bool) -> list[_Group]:
        """Launches that together flush all layers.

        Args:
            has_decay: True if rows of different steps weigh differently.
        """
        if (found := self._groups.get(has_decay)) is None:
            alike: dict[tuple[torch.dtype, int], list[BufferedLayer]] = {}
            for layer in self.layers:
                vector = 16 // layer.buffer.element_size()
                width, address = layer.buffer.shape[1], layer.buffer.data_ptr()
                is_aligned = width % vector == 0 and address % 16 == 0
                alike.setdefault((layer.buffer.dtype, vector if is_aligned else 1), []).append(
                    layer
                )
            found = self._groups[has_decay] = [
                _group(dtype, vector, has_decay, layers)
                for (dtype, vector), layers in alike.items()
            ]
        return found


def _group(
    dtype: torch.dtype, vector: int, has_decay: bool, layers: Sequence[BufferedLayer]
) -> _Group:
    is_centred = ROW_DTYPES[dtype].is_centred
    is_direct = not is_centred and not has_decay
    # Smaller blocks where operands are split or read one by one: registers.
    edge = 64 if is_direct and vector > 1 else 32
    fields, programs = _tables(layers, edge)
    launch = Launch.of(
        flush_kernel,
        (len(programs),),
        (),
        {
            "VALUES": _VALUES[dtype],
            "VECTOR": vector,
            "EDGE": edge,
            "STEP": 32 if vector > 1 else 16,
            "CHAIN_ROWS": FLUSH_CHAIN_ROWS,
            "SHIFT_ROWS": SHIFT_ROWS,
            "FIELDS": FIELDS,
            "MODE": MODES["direct" if is_direct else "split"],
            "IS_CENTRED": is_centred,
            "HAS_DECAY": has_decay,
            "STAGES": 2 if vector > 1 else 1,
            "IS_INTERPRETED": IS_INTERPRETED,
        },
        num_warps=8 if edge == 64 or vector == 1 else 4,
    )
    return _Group(fields, programs, Starter(launch, fields.get_device()))


def _tables(layers: Sequence[BufferedLayer], edge: int) -> tuple[Tensor, Tensor]:
    device = layers[0].buffer.device
    rows = []
    programs = []
    for index, layer in enumerate(layers):
        channels = layer.buffer.shape[1]
        edges = triton.cdiv(channels, edge)
        blocks = edges * (edges + 1) // 2
        tensors = (
            layer.buffer,
            layer.row_step,
            layer.moment,
            layer.sum,
            layer.shift,
            layer.weight,
            layer.count,
            layer.excess,
            layer.cursor,
        )
        scale_bits = struct.unpack("<q", struct.pack("<d", layer.row_scale))[0]
        first = layer.threshold if layer.first_threshold is None else layer.first_threshold
        numbers = (channels, layer.threshold, scale_bits, blocks, first)
        rows.append([*(t.data_ptr() for t in tensors), *numbers])
        programs += [[index, block] for block in range(blocks)]
    return _on_device(rows, torch.int64, device), _on_device(programs, torch.int32, device)


def _on_device(values: list[list[int]], dtype: torch.dtype, device: torch.device) -> Tensor:
    host = torch.tensor(values, dtype=dtype, device="cpu")
    # A copy from memory that can be swapped out would wait for the device.
    return host.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else host


def launch_flush_(
    table: FlushTable, step: Tensor, *, decay: float = 1.0, force: bool = False
) -> None:
    """Launches that add every full buffer to its state and empty it.

    Row r of a buffer weighs ``row_scale * decay ** (step - row_step[r])``; the state before is
    multiplied by ``decay ** (step - its last step)``. Rows marked -1 are counted as skipped.

    Args:
        table: Layers.
        step: int64, number of the running step. []
        decay: Factor of one step, in (0, 1].
        force: True if buffers that are not full are flushed too.
    """
    numbers = (int(force), math.log(decay))
    groups = table.groups(decay != 1.0)
    with torch.cuda.device_of(groups[0].fields):
        for fields, programs, starter in groups:
            if (start := starter.directly) is not None and not is_watched():
                start(fields.data_ptr(), programs.data_ptr(), step.data_ptr(), *numbers)
            else:
                starter.through_triton(fields, programs, step, *numbers)
