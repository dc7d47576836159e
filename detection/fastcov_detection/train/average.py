"""A moving average of a model's weights."""

from __future__ import annotations

import copy

import torch
from torch import nn


class Average:
    """Exponential moving average of the weights and buffers of a model.

    The decay grows from 0.1 to its value, as :math:`(1 + n) / (10 + n)` after n steps, so that the
    random start is soon forgotten.

    Args:
        model: Copied as it is.
        decay: In (0, 1).

    Raises:
        ValueError: If the decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema is {decay}; give a decay between 0 and 1, for example 0.9998")
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after a step, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        known = self.model.state_dict()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                known[name].lerp_(tensor, 1 - decay)
            else:
                known[name].copy_(tensor)
