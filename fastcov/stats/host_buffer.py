"""Buffer of rows of one layer that wait to be added together, with their steps and weights."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from math import ceil
from typing import Any

import torch
from torch import Tensor

from fastcov.rows.layout import ActivationLayout
from fastcov.stats.cursor import FILL, LIMIT, Counter, Cursor

# Views kept. A layer of constant rows a step empties its buffer at two or three different fills.
_MOST_VIEWS = 8


@dataclass
class _Span:
    """Neighbouring rows of one step, which weigh the same."""

    rows: int
    step: int
    weight: float
    is_weighed: bool = False


class HostBuffer:
    """Buffer in the rows' dtype, filled from the front, with counters on the host.

    Rows that differ in weight are marked by their steps and weights. The first fill may be a share
    of the capacity.

    Attributes:
        storage: Memory of the buffer, None before the first rows. [capacity, C]
        fill: Number of rows that wait, in the layer's cursor.
        limit: Most rows that the buffer takes before it is emptied, in the layer's cursor.
    """

    fill = Counter(FILL)
    limit = Counter(LIMIT)

    def __init__(self, cursor: Cursor, is_marked: bool, first_fill: float = 1.0) -> None:
        self.cursor = cursor
        self.is_marked = is_marked
        self.first_fill = first_fill
        self.storage: Tensor | None = None
        # The first rows of the storage, by their number: kept, as taking a slice costs 1.6 us.
        self._views: dict[int, Tensor] = {}
        self._capacity = 0
        self._spans: list[_Span] = []

    def __getstate__(self) -> dict[str, Any]:
        # torch saves a view with the whole storage: each view would be another copy of it.
        return {**self.__dict__, "_views": {}}

    @property
    def rows(self) -> Tensor | None:
        """Rows that wait; None without. [fill, C]"""
        if self.storage is None or self.fill == 0:
            return None
        view = self._views.get(self.fill)
        if view is None:
            if len(self._views) == _MOST_VIEWS:
                self._views.clear()
            view = self._views[self.fill] = self.storage[: self.fill]
        return view

    @property
    def last_step(self) -> int | None:
        """Step of the last rows; None without rows, or where steps are not kept."""
        return self._spans[-1].step if self._spans else None

    def room(self, layout: ActivationLayout, wanted: int, capacity: int) -> Tensor:
        """Storage [capacity, C] for the next rows, from ``fill`` on; made or grown where needed."""
        if self.storage is None or self.fill + wanted > self._capacity:
            # Tensors made under inference_mode could not be written in training later.
            with torch.inference_mode(False):
                self._capacity = max(capacity, self.fill + wanted)
                grown = layout.new_rows(self._capacity)
            if self.storage is None:
                self.stagger()
            else:
                grown[: self.fill] = self.storage[: self.fill]
                self.limit = self._capacity
            self.storage = grown
            self._views.clear()
        return self.storage

    def mark(self, rows: int, step: int) -> None:
        """Count and step of rows that were written into the storage."""
        self.fill += rows
        self.mark_step(rows, step)

    def mark_step(self, rows: int, step: int) -> None:
        """Step of rows that an operator has counted already."""
        if not self.is_marked:
            return
        if self._spans and self._spans[-1].step == step:
            self._spans[-1].rows += rows
        else:
            self._spans.append(_Span(rows, step, 1.0))

    def weigh(self, step: int, weight: float) -> None:
        """Setter of the weight of a step's rows, if the last rows are of that step."""
        if self._spans and self._spans[-1].step == step:
            self._spans[-1].weight = weight
            self._spans[-1].is_weighed = True

    def take_unweighed(self) -> Tensor | None:
        """Removal of the rows of the last step, if :meth:`weigh` has not been called for them."""
        if not self._spans or self._spans[-1].is_weighed or self.storage is None:
            return None
        end = self.fill
        self.fill -= self._spans.pop().rows
        return self.storage[self.fill : end]

    def row_weight(self, decay: float, device: torch.device) -> Tensor | None:
        """Weights of all rows as of the last step; None where all weigh 1. [fill]"""
        if not self._spans:
            return None
        last = self._spans[-1].step
        weights = [span.weight * decay ** (last - span.step) for span in self._spans]
        return _filled(weights, [span.rows for span in self._spans], device)

    def clear(self) -> None:
        """Removal of the rows; the storage stays, and the next fill uses all of it."""
        self.fill = 0
        self._spans = []
        self.limit = self._capacity

    def stagger(self) -> None:
        """Limit of ``first_fill`` for the next fill, when all buffers are emptied at one moment.

        Buffers that fill at one rate would else be full in the same step again.
        """
        self.limit = ceil(self._capacity * self.first_fill)

    def release(self) -> None:
        """Removal of rows and storage, for when the next rows have another dtype or device."""
        self.storage = None
        self._views.clear()
        self._capacity = 0
        self.clear()


def _filled(weights: list[float], rows: list[int], device: torch.device) -> Tensor:
    # torch.repeat_interleave, without its wait for a GPU to copy two tensors from the host: the
    # number that fills a slice is an argument of the kernel.
    filled = torch.empty(sum(rows), dtype=torch.float64, device=device)
    first = 0
    for weight, spans in itertools.groupby(zip(weights, rows, strict=True), lambda span: span[0]):
        last = first + sum(count for _, count in spans)
        filled[first:last].fill_(weight)
        first = last
    return filled
