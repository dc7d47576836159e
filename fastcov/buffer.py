"""Rows of one layer that wait to be added together, each with its step and weight."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fastcov.sampling import BUFFER_ROWS_PER_CHANNEL


@dataclass
class _Span:
    rows: int
    step: int
    weight: float


def buffer_rows(rows: Tensor) -> int:
    """Rows that a buffer for these holds before it is emptied. rows: [..., C]"""
    return BUFFER_ROWS_PER_CHANNEL * rows.shape[-1]


class RowBuffer:
    """A buffer in the rows' dtype, filled from the front.

    Args:
        is_marked: Whether rows differ in weight: their steps and weights are kept.
    """

    def __init__(self, is_marked: bool) -> None:
        self.fill = 0
        self._is_marked = is_marked
        self._storage: Tensor | None = None
        self._spans: list[_Span] = []

    @property
    def rows(self) -> Tensor | None:
        """What waits, if anything. [fill, C]"""
        return None if self._storage is None or self.fill == 0 else self._storage[: self.fill]

    @property
    def last_step(self) -> int | None:
        """Step of the last rows, where steps are kept."""
        return self._spans[-1].step if self._spans else None

    def has_room(self, wanted: int) -> bool:
        """Whether so many rows fit behind those that wait."""
        return self._storage is None or self._storage.shape[0] - self.fill >= wanted

    def room(self, like: Tensor, wanted: int) -> Tensor:
        """Storage for the next rows, from :attr:`fill` on; made or grown where needed.

        Args:
            like: Rows of the dtype, device and width to come. [..., C]
            wanted: How many.

        Returns:
            The whole storage. [capacity, C]
        """
        if self._storage is None or not self.has_room(wanted):
            # Tensors made under inference_mode could not be written in training later.
            with torch.inference_mode(False):
                capacity = max(buffer_rows(like), self.fill + wanted)
                grown = like.new_empty(capacity, like.shape[-1])
            if self._storage is not None and self.fill:
                grown[: self.fill] = self._storage[: self.fill]
            self._storage = grown
        return self._storage

    def mark(self, rows: int, step: int) -> None:
        """Counts rows that were written behind the others."""
        self.fill += rows
        if not self._is_marked:
            return
        if self._spans and self._spans[-1].step == step:
            self._spans[-1].rows += rows
        else:
            self._spans.append(_Span(rows, step, 1.0))

    def weigh(self, step: int, weight: float) -> None:
        """Sets the weight of a step's rows, if the last ones are of that step."""
        if self._spans and self._spans[-1].step == step:
            self._spans[-1].weight = weight

    def row_weight(self, decay: float) -> Tensor | None:
        """Weights of all rows as of the last step; None where all weigh 1. [fill]"""
        if not self._spans:
            return None
        last = self._spans[-1].step
        weights = [span.weight * decay ** (last - span.step) for span in self._spans]
        return torch.repeat_interleave(
            torch.tensor(weights, dtype=torch.float64, device="cpu"),
            torch.tensor([span.rows for span in self._spans], device="cpu"),
        )

    def clear(self) -> None:
        """Drops the rows; the storage stays for the next."""
        self.fill = 0
        self._spans = []

    def release(self) -> None:
        """Drops the rows and the storage: the next have another dtype or device."""
        self.clear()
        self._storage = None
