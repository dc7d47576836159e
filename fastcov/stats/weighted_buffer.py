"""Buffer of rows of one layer that wait to be added together, each with a weight of its own."""

from __future__ import annotations

import torch
from torch import Tensor


class WeightedBuffer:
    """Buffer of rows and weights, filled from the front, with counters on the host.

    Args:
        decay: Factor on the weights of earlier rows, once a step.

    Attributes:
        fill: Number of rows that wait.
        step: Step as of which the weights hold.
    """

    def __init__(self, decay: float | None) -> None:
        self.fill = 0
        self.step = 0
        self._decay = decay
        self._rows: Tensor | None = None
        self._weights: Tensor | None = None
        self._settled = 0  # rows whose weight is final, for weighting="image"

    def has_room(self, rows: int) -> bool:
        """True if rows fit beside those that wait."""
        return self._rows is not None and self.fill + rows <= len(self._rows)

    def add(self, rows: Tensor, weights: Tensor, step: int, capacity: int) -> None:
        """Copy of rows [N, C] and weights [N] of a step, put behind those that wait.

        All are of one dtype and device until :meth:`take`. New storage has room for ``capacity``
        rows, or for more where more must wait.
        """
        end = self.fill + len(rows)
        if not self.has_room(len(rows)):
            self._grow(rows, max(capacity, end))
        assert self._rows is not None
        assert self._weights is not None
        self.move_to(step)
        self._rows[self.fill : end] = rows
        self._weights[self.fill : end] = weights
        self.fill = end

    def _grow(self, rows: Tensor, capacity: int) -> None:
        # Tensors made under inference_mode could not be written in training later.
        with torch.inference_mode(False):
            grown = torch.empty(capacity, rows.shape[1], dtype=rows.dtype, device=rows.device)
            weights = torch.empty(capacity, dtype=torch.float64, device=rows.device)
        if self._rows is not None and self._weights is not None:
            grown[: self.fill] = self._rows[: self.fill]
            weights[: self.fill] = self._weights[: self.fill]
        self._rows, self._weights = grown, weights

    def move_to(self, step: int) -> None:
        """Decay of the weights up to a later step."""
        if step > self.step:
            if self._decay is not None and self.fill and self._weights is not None:
                self._weights[: self.fill] *= self._decay ** (step - self.step)
            self.step = step

    def settle(self, scale: float) -> None:
        """Factor for the weights of the rows since the last call, which are final then."""
        if self._weights is not None and self._settled < self.fill:
            self._weights[self._settled : self.fill] *= scale
        self._settled = self.fill

    def take_unsettled(self) -> tuple[Tensor, Tensor] | None:
        """Removal of rows and weights that :meth:`settle` has not met; valid until more come."""
        if self._settled == self.fill or self._rows is None or self._weights is None:
            return None
        taken = slice(self._settled, self.fill)
        self.fill = self._settled
        return self._rows[taken], self._weights[taken]

    def take(self) -> tuple[Tensor, Tensor] | None:
        """Removal of all rows and weights, valid until more come; None without."""
        taken = slice(0, self.fill)
        self.fill = self._settled = 0
        if taken.stop == 0 or self._rows is None or self._weights is None:
            return None
        return self._rows[taken], self._weights[taken]

    def release(self) -> None:
        """Removal of rows and storage, for when the next rows have another dtype or device."""
        self._rows = self._weights = None
        self.fill = self._settled = 0
