"""What a tap saw last: most steps bring the same shapes again, and nothing is decided twice."""

from __future__ import annotations

from array import array
from typing import Any

import torch
from torch import Tensor

from fastcov.rows.sequence import BUFFER_ROWS_PER_CHANNEL, direct_rows
from fastcov.rows.view import run_length
from fastcov.stats.cursor import layout_numbers

_STRIDED = torch.strided

MOST_LAYOUTS = 128
"""What is kept of one tap: heads see several sizes a step, a detector other ones in each."""


class Seen:
    """Sizes and layout of an activation that was read as rows.

    Args:
        rows: Its row view. [B, ..., C]
        activation: What the module gave, if others like it may come.
        order: Of its dimensions in the row view; None where that is no permutation.

    Attributes:
        rows: How many, N.
        positions: Of one image, P.
        channels: Of a row, C.
        run_length: Neighbouring positions read together.
        buffer_rows: Rows that a buffer for these holds before it is emptied.
        direct_rows: Rows of one call that need no buffer where every row is read.
        dtype: Of the rows.
        device: Of the rows.
        channel_dim: Of what :meth:`source` gives.
        follower: What the tap is likely to see next; itself, until it saw something else.
        layout: Of :func:`fastcov.stats.cursor.layout_numbers`, where operators can compare with it.
    """

    __slots__ = (
        "_is_cpu",
        "_of_tap",
        "_order",
        "_shape",
        "_stride",
        "buffer_rows",
        "channel_dim",
        "channels",
        "device",
        "direct_rows",
        "dtype",
        "follower",
        "layout",
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
        self.buffer_rows = BUFFER_ROWS_PER_CHANNEL * self.channels
        self.dtype = rows.dtype
        self.device = rows.device
        self.direct_rows = direct_rows(self.channels, rows.is_cpu)
        self.channel_dim = -1
        self._order: tuple[int, ...] | None = None
        self._shape: torch.Size | None = None
        self._is_cpu = rows.is_cpu
        self.layout: array[int] | None = None
        self._of_tap: dict[tuple[Any, ...], Seen] = {}
        if activation is not None and order is not None:
            self._order = order
            self._shape, self._stride = activation.shape, activation.stride()
            if order[:-1] == tuple(sorted(order[:-1])):  # operators can take it as it is
                self.channel_dim = order[-1]
                if self._is_cpu:
                    self.layout = layout_numbers(activation, self.run_length, self.channel_dim)

    @property
    def is_repeatable(self) -> bool:
        """Whether :meth:`fits` may hold for other activations."""
        return self._shape is not None

    def fits(self, value: Any) -> bool:
        """Whether a value is a tensor laid out the same: it is read the same way then."""
        return (
            type(value) is Tensor
            and value.layout is _STRIDED
            and not value.is_nested
            and value.dtype is self.dtype
            and value.shape == self._shape
            and value.stride() == self._stride
            and (value.is_cpu if self._is_cpu else value.device == self.device)
        )

    def join(self, last: Seen | None) -> Seen:
        """Follows what the same tap saw last; returns itself."""
        self.follower = self
        if last is not None:
            self._of_tap, last.follower = last._of_tap, self
        if len(self._of_tap) >= MOST_LAYOUTS:
            del self._of_tap[next(iter(self._of_tap))]
        self._of_tap[self._shape, self._stride, self.dtype] = self
        return self

    def recall(self, value: Tensor) -> bool:
        """Whether the tap saw a value's layout lately: that is its follower then.

        The heads of a detector see the levels of a pyramid in the same order in every step.
        """
        if value.layout is not _STRIDED or value.is_nested:
            return False
        known = self._of_tap.get((value.shape, value.stride(), value.dtype))
        if known is None or known is self.follower:  # which did not fit: on another device
            return False
        self.follower = known
        return True

    def new_rows(self, rows: int) -> Tensor:
        """Memory for rows of this width, dtype and device. [rows, C]"""
        return torch.empty(rows, self.channels, dtype=self.dtype, device=self.device)

    def source(self, activation: Tensor) -> Tensor:
        """What operators take together with ``channel_dim``, of an activation that fits."""
        return activation if self.channel_dim > 0 else self.view(activation)

    def view(self, activation: Tensor) -> Tensor:
        """Rows of an activation that fits; rows stay as they are. [B, ..., C]"""
        order = self._order
        return activation if order is None else activation.detach().permute(*order)
