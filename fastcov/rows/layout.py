"""Layout of one activation: shape, strides, dtype and device, and the sizes derived from them.

Most activations of a layer have the layout of an earlier one. All that follows from the layout is
derived once, and :meth:`ActivationLayout.fits` tells whether another activation has the layout.
"""

from __future__ import annotations

from array import array
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcov.rows.dtypes import ROW_DTYPES
from fastcov.rows.view import MOST_DIMS, Layout, row_order, row_view

_STRIDED = torch.strided

Key = tuple[torch.Size, tuple[int, ...], torch.dtype]
"""Shape, strides and dtype of an activation."""


class ActivationLayout:
    """Layout of an activation and of the rows that it holds.

    Args:
        rows: Row view of the activation. [B, ..., C]
        activation: Tensor that the module gave, if more of its layout may come; None for rows that
            are read once.
        order: Dimensions of the activation in the order of the row view; None where the view is no
            permutation of the activation.

    Attributes:
        rows: Number of rows, N.
        positions: Positions of one image, P.
        channels: Length of a row, C.
        run_length: Neighbouring positions that are read together.
        dtype: Dtype of the rows.
        device: Device of the rows.
        channel_dim: Dimension of :meth:`source` that holds the channels.
        numbers: Numbers that compiled operators compare, from :func:`layout_numbers`; None where
            the view changes the order of dimensions but for C.
        key: Shape, strides and dtype, which tell this layout from others on the same device; None
            where the layout never repeats.
    """

    __slots__ = (
        "_is_cpu",
        "_shape",
        "_stride",
        "channel_dim",
        "channels",
        "device",
        "dtype",
        "key",
        "numbers",
        "order",
        "positions",
        "rows",
        "run_length",
    )

    def __init__(
        self,
        rows: Tensor,
        activation: Tensor | None = None,
        order: tuple[int, ...] | None = None,
    ) -> None:
        shape = rows.shape
        self.channels = shape[-1]
        self.rows = rows.numel() // self.channels
        self.positions = self.rows // shape[0] if self.rows else 0
        self.run_length = run_length(rows) if self.rows else 1
        self.dtype = rows.dtype
        self.device = rows.device
        self.channel_dim = -1
        self.numbers: array[int] | None = None
        self.key: Key | None = None
        self._is_cpu = rows.is_cpu
        self.order: tuple[int, ...] | None = None
        if activation is not None and order is not None:
            self.order = order
            self._shape, self._stride = activation.shape, activation.stride()
            self.key = (self._shape, self._stride, self.dtype)
            # With all dimensions but C in order, operators take the activation without a view.
            if order[:-1] == tuple(sorted(order[:-1])):
                self.channel_dim = order[-1]
                self.numbers = layout_numbers(activation, self.run_length, self.channel_dim)

    def fits(self, value: Any) -> bool:
        """True if a value is a tensor of this layout, which must have a key."""
        return (
            type(value) is Tensor
            and value.layout is _STRIDED
            and not value.is_nested
            and value.dtype is self.dtype
            and value.shape == self._shape
            and value.stride() == self._stride
            and (value.is_cpu if self._is_cpu else value.device == self.device)
        )

    def new_rows(self, rows: int) -> Tensor:
        """Uninitialised tensor for rows of this width, dtype and device. [rows, C]"""
        return torch.empty(rows, self.channels, dtype=self.dtype, device=self.device)

    def source(self, activation: Tensor) -> Tensor:
        """Tensor for operators, with ``channel_dim``: a fitting activation, or its row view."""
        return activation if self.channel_dim > 0 else self.view(activation)

    def view(self, activation: Tensor) -> Tensor:
        """Row view of a fitting activation; without an ``order``, the tensor itself. [B, ..., C]"""
        order = self.order
        return activation if order is None else activation.detach().permute(*order)


class ViewedRows(NamedTuple):
    """Rows of one activation, as :meth:`fastcov.stats.layer.Layer.read` takes them.

    Attributes:
        tensor: The activation; where its layout has no key, the row view. [B, ..., C]
        layout: Layout of the activation.
        sizes: Sizes of the row view without its channels.
    """

    tensor: Tensor
    layout: ActivationLayout
    sizes: torch.Size


def view_rows(
    activation: Tensor, layout: Layout, rank: int | None, batch_dims: int = 0
) -> ViewedRows | None:
    """Rows of an activation; None where it has none. Arguments as of :func:`row_view`."""
    order = row_order(activation.dim(), layout, rank, batch_dims)
    if order is None:
        rows = row_view(activation.detach(), layout, rank, batch_dims)
    else:
        rows = activation.detach().permute(order)
    if rows.numel() == 0:
        return None
    found = ActivationLayout(rows, activation, order)
    return ViewedRows(rows if order is None else activation, found, rows.shape[:-1])


def run_length(rows: Tensor) -> int:
    """Number of neighbouring positions of a row view that are worth reading together.

    1 where channels are adjacent in memory: a row is one contiguous read. In NCHW memory every
    channel of a row is a read by itself, which brings 32 bytes of neighbouring positions.
    """
    if rows.dim() < 3 or rows.stride(-1) == 1:
        return 1
    positions = rows.numel() // (rows.shape[0] * rows.shape[-1])
    return min(32 // rows.element_size(), positions)


def key_of(value: Tensor) -> Key | None:
    """Key of the layout that a dense tensor has; None for sparse and nested ones."""
    return (
        (value.shape, value.stride(), value.dtype)
        if value.layout is _STRIDED and not value.is_nested
        else None
    )


def layout_numbers(activation: Tensor, run_length: int, channel_dim: int) -> array[int]:
    """Numbers by which compiled operators compare the layout of an activation.

    Run length, channel dimension, code of the dtype, number of dimensions, sizes and strides of at
    most 5: CallLayout in csrc/cursor.h.
    """
    unused = (0,) * (MOST_DIMS - activation.dim())
    head = (run_length, channel_dim, ROW_DTYPES[activation.dtype].code, activation.dim())
    return array("q", (*head, *activation.shape, *unused, *activation.stride(), *unused))
