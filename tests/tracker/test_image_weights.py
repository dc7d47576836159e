"""Rows that leave their buffer in the middle of a step get the weight that the step's end tells."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastcov

IMAGES, CHANNELS, STEPS = 3, 64, 4


class TwoCalls(nn.Module):
    """Calls one layer with few positions, then with fewer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.between: Callable[[], object] = lambda: None

    def forward(self, first: Tensor, second: Tensor) -> None:
        self.layer(first)
        self.between()
        self.layer(second)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_asked_between", [False, True])
def test_two_calls_of_a_step(dtype: torch.dtype, is_asked_between: bool) -> None:
    torch.manual_seed(0)
    model = TwoCalls()
    tracker = fastcov.track(model, include="layer", rows="all", weighting="image")
    if is_asked_between:
        model.between = lambda: tracker.count("layer")
    wanted = torch.zeros(CHANNELS, CHANNELS, dtype=torch.float64)
    for _ in range(STEPS):
        calls = torch.randn(IMAGES, 3, CHANNELS), 3 * torch.randn(IMAGES, 1, CHANNELS).to(dtype)
        model(*calls)
        for call in calls:
            rows = call.double().flatten(0, 1)
            wanted += rows.T @ rows / 4  # positions of an image
    wanted /= STEPS * IMAGES
    assert tracker.count("layer") == STEPS * IMAGES * 4
    error = (tracker.covariance("layer") - wanted).abs().max() / wanted.abs().max()
    assert float(error) < 1e-5


@pytest.mark.parametrize("channels", [8, 64])
def test_a_second_call_that_comes_in_some_steps(channels: int) -> None:
    torch.manual_seed(0)
    model = TwoCalls()
    tracker = fastcov.track(model, include="layer", rows="all", weighting="image")
    wanted = torch.zeros(channels, channels, dtype=torch.float64)
    weight = 0.0
    for step in range(6):
        positions = (30, 10) if step % 2 == 0 else (30, 0)
        calls = [torch.randn(IMAGES, each, channels) for each in positions]
        model(*calls)
        for call in calls:
            rows = call.double().flatten(0, 1) / sum(positions) ** 0.5
            wanted += rows.T @ rows
        weight += IMAGES
    error = (tracker.covariance("layer") - wanted / weight).abs().max() / wanted.abs().max()
    assert float(error) * weight < 1e-5
