"""Sums of rows that weigh by their image: a row's weight is known when its step has ended."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcov.ops.covariance import Precision
from fastcov.stats.state import CovarianceState


class ImageWeights:
    """Sums of the running step at weight 1, and the number of calls in earlier steps.

    Args:
        precision: Precision of the rows' products.

    Attributes:
        has_many_calls: True if some step had several calls; None before the first step has ended.
        sums: Sums of the running step at weight 1; None where no step has needed them.
        is_in_state: True while the state itself holds the first step's rows, still at weight 1.
    """

    def __init__(self, precision: Precision) -> None:
        self.has_many_calls: bool | None = None
        self.sums: CovarianceState | None = None
        self.is_in_state = False
        self._precision: Precision = precision

    def knows_weight(self, calls: int) -> bool:
        """True if no further call is expected in a step, so that the weight is known now."""
        return self.has_many_calls is False and calls == 1

    def is_first_step(self, earlier_calls: int) -> bool:
        """True if no step has ended: the state can take its rows, to be scaled at the end."""
        return self.has_many_calls is None and earlier_calls == 0

    def pool(
        self,
        state: CovarianceState,
        rows: Tensor,
        weights: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        """Update of the running step's sums with rows; they are made like those of a state."""
        if self.sums is None:
            sketch = state.sketch_width
            self.sums = CovarianceState(state.channels, rows.device, sketch=sketch)
        self.sums.update(rows, weights, row_scale=scale, precision=self._precision)

    def count_calls(self, calls: int) -> None:
        """Number of calls of a step that has ended.

        Several are noted for good: a first call that is taken for the only one weighs too much in a
        step of two.
        """
        self.has_many_calls = self.has_many_calls is True or calls > 1

    def end_step(self, state: CovarianceState, row_weight: float, decay: float) -> None:
        """Weight of the step's rows, given in a state that the decay brings to this step."""
        if self.is_in_state:
            state.scale_(row_weight)
            self.is_in_state = False
        if self.sums is not None:
            state.scale_(decay)
            state.merge(self.sums, scale=row_weight)
            if self.has_many_calls:
                self.sums.reset()
            else:
                self.sums = None

    def to(self, device: torch.device) -> None:
        """Move of the sums."""
        if self.sums is not None:
            self.sums.to(device)

    def reset(self) -> None:
        """Removal of the rows; the experience with calls stays."""
        if self.sums is not None:
            self.sums.reset()
