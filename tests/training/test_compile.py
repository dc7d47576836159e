"""torch.compile: no added graph break, no recompilation after warm-up, exact counts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastcov

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Models that torch 2.11 traces whole when fed tensors.
WHOLE = ("resnet", "mobilenet", "vit", "gpt2", "llama")


def graphs_and_breaks() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def train(case: Any, model: nn.Module, seeds: range) -> None:
    for seed in seeds:
        case.loss(model, seed).backward()


def counts(tracker: fastcov.Tracker) -> dict[str, int]:
    return {name: tracker.count(name) for name in tracker.names()}


def expected(case: Any, steps: int, **options: Any) -> fastcov.Tracker:
    model = case.make()
    with fastcov.track(model, **options) as tracker:
        train(case, model, range(steps))
    return tracker


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "vit", "bert", "gpt2", "llama", "recurrent"])
@pytest.mark.parametrize("order", ["before", "after"])
def test_graphs_of_a_tracked_model(cases: Any, name: str, order: str) -> None:
    case = cases[name]
    train(case, torch.compile(case.make(), backend="eager"), range(3))
    plain = graphs_and_breaks()
    torch.compiler.reset()
    counters.clear()
    model = case.make()
    if order == "before":
        tracker = fastcov.track(model, rows=0.5)
        compiled = torch.compile(model, backend="eager", fullgraph=name in WHOLE)
    else:
        compiled = torch.compile(model, backend="eager", fullgraph=name in WHOLE)
        tracker = fastcov.track(compiled, rows=0.5)
    train(case, compiled, range(2))
    torch.compiler.set_stance("fail_on_recompile")
    train(case, compiled, range(2, 3))
    torch.compiler.set_stance("default")
    assert graphs_and_breaks() == plain
    assert tracker.steps == 3
    assert counts(tracker) == counts(expected(case, 3, rows=0.5))
