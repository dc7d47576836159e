"""A gather with all counters on the device as one compiled operator: csrc/gather_counted.h.

Triton's kernel does the same where no library serves (fastcov/kernels/gather.py), and takes the
host twice as long to start.
"""

from __future__ import annotations

from array import array

import torch
from torch import Tensor

from fastcov.kernels.layout import VECTOR_BYTES, row_layout
from fastcov.ops import library

_BLOCK_ROWS = 8  # kGatherRows in csrc/gather_counted.h
_BLOCK_TILE = 32  # kGatherTile


def blocks_of(most_rows: int, is_contiguous: bool) -> int:
    """Blocks of a launch that copies so many rows at most, each of which may lie in one piece."""
    return -(-most_rows // (_BLOCK_ROWS if is_contiguous else _BLOCK_TILE))


def _exponent_bits(dtype: torch.dtype) -> int:
    """Bits that are all set where a value is infinite or NaN: those of infinity."""
    infinity = torch.tensor(float("inf"), dtype=dtype, device="cpu")
    return int(infinity.view(torch.int16 if dtype.itemsize == 2 else torch.int32))


class CountedGather:
    """Repeated copy of the rows that are due, with all counters on the device.

    It takes the same arguments as :class:`fastcov.kernels.gather.CursorGather` and does the same.

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

    Attributes:
        prepared: Fields of CountedGather in csrc/gather_counted.h, int64.
    """

    __slots__ = ("_tensors", "prepared")

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
        item = rows.element_size()
        most = (layout.rows * fraction + 2**32 - 1) >> 32
        geometry = layout.geometry(0)[1:]
        strides = (layout.channels, *geometry[4:8])
        alignment = buffer.data_ptr() | VECTOR_BYTES
        for stride in strides:
            alignment |= stride * item
        self._tensors = (buffer, row_step, cursor, step)  # must live as long as their addresses
        numbers = array(
            "q",
            (
                *(tensor.data_ptr() for tensor in self._tensors),
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
            ),
        )
        with torch.inference_mode(False):
            self.prepared = torch.frombuffer(numbers, dtype=torch.int64)

    def launch_(self, rows: Tensor) -> None:
        """Copies the rows that are due from a row view, or from its activation.

        Raises:
            ValueError: If it has another size, dtype or device than the rows prepared for.
        """
        try:
            has_copied = library.gather_counted_(self.prepared, rows)
        except NotImplementedError:  # of torch: no library serves the rows' device
            has_copied = False
        if not has_copied:
            raise ValueError(
                f"rows of shape {tuple(rows.shape)}, {rows.dtype} on {rows.device}, are not laid "
                "out as those that the gather was prepared for: prepare another"
            )
