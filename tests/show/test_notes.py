"""What the summary says beside a layer's numbers."""

from __future__ import annotations

import torch
from torch import nn

import fastcov


def test_a_decay_that_forgets_too_soon_is_said() -> None:
    """More steps never help where the window of the decay holds too few rows."""
    model = nn.Sequential(nn.Linear(3, 8))
    tracker = fastcov.track(model, rows="all", decay=0.5)
    for _ in range(50):
        model(torch.randn(20, 3))
    assert tracker.count("0") == 1000
    (status,) = tracker.statuses()
    assert status.note == (
        "decay=0.5 is worth 60 rows, fewer than 16 a channel: raise rows or decay"
    )
    assert tracker.spectrum("0").count == 60  # and its uncertainty rests on as many
    tracker = fastcov.track(model, rows="all", decay=0.9)
    model(torch.randn(20, 3))
    (status,) = tracker.statuses()
    assert status.note == "about 6 more steps until 16 rows a channel"
    for _ in range(6):
        model(torch.randn(20, 3))
    assert tracker.statuses()[0].note == ""
