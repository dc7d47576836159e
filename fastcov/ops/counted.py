"""A gather with all counters on the device as one compiled operator: csrc/gather_counted.h.

Triton's kernel does the same where no library serves (fastcov/kernels/gather.py), and takes the
host twice as long to start.
"""

from __future__ import annotations

from array import array
from typing import NamedTuple

import torch
from torch import Tensor

from fastcov.kernels.layout import VECTOR_BYTES, row_layout
from fastcov.ops import library
from fastcov.rows.view import MOST_DIMS

_BLOCK_ROWS = 8  # kGatherRows in csrc/gather_counted.h
_BLOCK_TILE = 32  # kGatherTile
_CALL_FIELDS = 2 + 4 + 2 * MOST_DIMS  # two addresses and a CallLayout of csrc/cursor.h


def blocks_of(most_rows: int, is_contiguous: bool) -> int:
    """Blocks of a launch that copies so many rows at most, each of which may lie in one piece."""
    return -(-most_rows // (_BLOCK_ROWS if is_contiguous else _BLOCK_TILE))


def _exponent_bits(dtype: torch.dtype) -> int:
    """Bits that are all set where a value is infinite or NaN: those of infinity."""
    infinity = torch.tensor(float("inf"), dtype=dtype, device="cpu")
    return int(infinity.view(torch.int16 if dtype.itemsize == 2 else torch.int32))


class CallCounters(NamedTuple):
    """Counters on the host of calls that one operator counts and copies from.

    Attributes:
        layer: Counters of the layer: see fastcov/stats/cursor.py. int64 [FIELDS]
        room: Rows that the calls of the running step have offered to the buffer, and the most that
            may be copied in one step. int64 [2]
        layout: Layout of the calls, as :func:`fastcov.rows.layout.layout_numbers` gives it.
    """

    layer: Tensor
    room: Tensor
    layout: array[int]


class CountedGather:
    """Repeated copy of the rows that are due, with all counters on the device.

    Arguments but ``counters`` are those of :class:`fastcov.kernels.gather.CursorGather`.

    Args:
        buffer: Contiguous, the rows' dtype. [capacity, C]
        row_step: int32, receives for each buffered row its step, or -1 where a value is not
            finite. [capacity]
        cursor: int64, counters. [CURSOR_FIELDS]
        step: int64, number of the running step. []
        rows: Laid out as those to come; dim 0 holds the images. [B, ..., C]
        fraction: Share of the rows to read in units of 2**-32; 2**32 reads all, in order.
        run_length: Neighbouring positions read together.
        phase: Start of the sequence, 64 bits as a signed integer.
        counters: Counters on the host, for calls that go to :attr:`prepared` at once; None where
            the caller counts them, for :meth:`launch_`.

    Attributes:
        prepared: Argument of the operator gather_counted_: the fields of PreparedGather in
            csrc/gather.h, int64.
    """

    __slots__ = ("_alive", "prepared")

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
        counters: CallCounters | None = None,
    ) -> None:
        layout = row_layout(rows)
        item = rows.element_size()
        most = (layout.rows * fraction + 2**32 - 1) >> 32
        geometry = layout.geometry(0)[1:]
        strides = (layout.channels, *geometry[4:8])
        alignment = buffer.data_ptr() | VECTOR_BYTES
        for stride in strides:
            alignment |= stride * item
        copied = (buffer, row_step, cursor, step)
        self._alive = (*copied, counters)  # as long as their addresses are known
        calls = (0,) * _CALL_FIELDS
        if counters is not None:
            calls = (counters.layer.data_ptr(), counters.room.data_ptr(), *counters.layout)
        numbers = array(
            "q",
            (
                *(tensor.data_ptr() for tensor in copied),
                rows.get_device(),
                blocks_of(most, layout.stride_channel == 1),
                item,
                _exponent_bits(rows.dtype),
                alignment,
                buffer.shape[0],
                fraction,
                run_length,
                phase,
                layout.rows,
                layout.rows // rows.shape[0] if rows.dim() > 1 else layout.rows,
                *geometry,
                *calls,
            ),
        )
        with torch.inference_mode(False):
            self.prepared = torch.frombuffer(numbers, dtype=torch.int64)

    def launch_(self, rows: Tensor) -> None:
        """Copy of the rows that are due, from a row view or from its activation.

        Raises:
            ValueError: If it has another size, dtype or device than the rows prepared for.
        """
        if not library.gather_counted_(self.prepared, rows):
            raise ValueError(
                f"rows of shape {tuple(rows.shape)}, {rows.dtype} on {rows.device}, are not laid "
                "out as those that the gather was prepared for: prepare another"
            )
