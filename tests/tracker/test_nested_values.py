"""Tensors inside tuples and keywords are read as plain ones are: what is known of them holds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov.rows import layout
from fastcov.rows.layout import ActivationLayout


class Pair(nn.Module):
    """Returns a tensor first in a tuple."""

    def forward(self, hidden: Tensor) -> tuple[Tensor, int]:
        return hidden, 1


class Network(nn.Module):
    """Gives its layer a keyword alone."""

    def __init__(self) -> None:
        super().__init__()
        self.pair = Pair()

    def forward(self, x: Tensor) -> Tensor:
        return self.pair(hidden=x)[0]


@pytest.mark.parametrize("where", ["output", "input"])
@pytest.mark.parametrize("rows", ["all", 5])
def test_a_known_layout_is_not_decided_about_again(
    where: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked_at = []

    def counted(*args: Any) -> ActivationLayout:
        looked_at.append(args)
        return ActivationLayout(*args)

    monkeypatch.setattr(layout, "ActivationLayout", counted)
    model = Network()
    tracker = fastcov.track(model, include="pair", where=where, rows=rows)
    sizes = (32, 64)
    for size in sizes * 4:
        model(torch.randn(size, 6))
    assert len(looked_at) == len(sizes)
    wanted = 4 * sum(sizes) if rows == "all" else None
    assert wanted in (None, tracker.count(tracker.names()[0]))
