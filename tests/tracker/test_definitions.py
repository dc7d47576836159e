"""Weighting, decay, sampling and pooled calls together, against their definition in float64.

The oracle hears every call through plain hooks, picks rows by ``sample_index_reference`` and sums
weighted outer products: no buffer, no shift, no state.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov.ops.reference import sample_index_reference
from fastcov.rows.layout import run_length
from fastcov.rows.sequence import WHOLE, fixed_point, rows_due, sequence_phase


class Net(nn.Module):
    """A strided stem, an in-place ReLU, a head called on two levels, a classifier of vectors."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 6, 3, stride=2, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(6, 5, 1)
        self.classify = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.act(self.stem(x))
        coarse = self.pool(fine)
        levels = self.head(fine).mean() + self.head(coarse).mean()
        return levels + self.classify(coarse.mean((2, 3))).sum()


@dataclass
class Heard:
    """Inputs of one tap: for every step its calls as rows. [B, ..., C]"""

    steps: list[list[Tensor]] = field(default_factory=list)
    runs: list[list[int]] = field(default_factory=list)

    def hear(self, activation: Tensor) -> None:
        view = activation.movedim(1, -1) if activation.dim() == 4 else activation
        self.steps[-1].append(view.detach().double().clone())
        self.runs[-1].append(run_length(view))


TAPS = ("stem", "head", "classify", "head:in", "classify:in")


def listen(model: nn.Module) -> dict[str, Heard]:
    heard = {name: Heard() for name in TAPS}

    def new_step(*_: Any) -> None:
        for each in heard.values():
            each.steps.append([])
            each.runs.append([])

    model.register_forward_pre_hook(new_step)
    for name, each in heard.items():
        module = model.get_submodule(name.removesuffix(":in"))
        if name.endswith(":in"):
            module.register_forward_pre_hook(lambda _m, args, each=each: each.hear(args[0]))
        else:
            module.register_forward_hook(lambda _m, _a, out, each=each: each.hear(out))
    return heard


@dataclass
class Expected:
    weight: float = 0.0
    count: int = 0
    sum: Any = 0.0
    moment: Any = 0.0


def expected_of(
    name: str, heard: Heard, weighting: str, decay: float | None, fraction: float, every: int
) -> Expected:
    """Section by section what the README promises, row by row."""
    phase, fixed = sequence_phase(name), fixed_point(fraction)
    sampled = carry = 0
    found = Expected()
    read_steps = range(0, len(heard.steps), every)
    for step in read_steps:
        positions = sum(call[0, ..., 0].numel() for call in heard.steps[step])
        row_weight = 1.0 if weighting == "position" else 1 / (positions * fraction)
        row_weight *= 1.0 if decay is None else decay ** (read_steps[-1] - step)
        for call, run in zip(heard.steps[step], heard.runs[step], strict=True):
            flat = call.reshape(-1, call.shape[-1])
            if fixed < WHOLE:
                due, carry = rows_due(len(flat), fixed, carry)
                in_image = call[0, ..., 0].numel()
                index = sample_index_reference(in_image, len(call), sampled, due, run, phase)
                flat = flat[torch.tensor(index, dtype=torch.long)]
                sampled += due
            found.count += len(flat)
            found.weight += row_weight * len(flat)
            found.sum = found.sum + row_weight * flat.sum(0)
            found.moment = found.moment + row_weight * flat.T @ flat
    return found


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("every", [1, 2])
@pytest.mark.parametrize("rows", ["all", 0.37])
@pytest.mark.parametrize("decay", [None, 0.7])
@pytest.mark.parametrize("weighting", ["position", "image"])
def test_every_combination(
    weighting: str, decay: float | None, rows: Any, every: int, memory_format: torch.memory_format
) -> None:
    torch.manual_seed(0)
    model = Net().to(memory_format=memory_format)
    heard = listen(model)
    tracker = fastcov.track(
        model, where="both", rows=rows, weighting=weighting, decay=decay, every=every
    )
    # Sizes and batches that change: weights differ from step to step.
    for batch, size in ((3, 16), (5, 8), (2, 24), (3, 16), (1, 12)):
        model(torch.randn(batch, 3, size, size).to(memory_format=memory_format))
    fraction = 1.0 if rows == "all" else rows
    statuses = {status.name: status for status in tracker.statuses()}
    for name in TAPS:
        truth = expected_of(name, heard[name], weighting, decay, fraction, every)
        assert tracker.count(name) == truth.count > 0, name
        assert statuses[name].weight == pytest.approx(truth.weight, rel=1e-12), name
        mean, second = truth.sum / truth.weight, truth.moment / truth.weight
        largest = float(second.abs().max())
        for centered, exact in ((False, second), (True, second - torch.outer(mean, mean))):
            error = (tracker.covariance(name, centered=centered) - exact).abs().max()
            assert float(error) <= 1e-6 * largest, (name, centered)
        assert float((tracker.mean(name) - mean).abs().max()) <= 1e-6 * largest**0.5


@pytest.mark.parametrize("weighting", ["position", "image"])
def test_mean_over_draws_of_pooled_calls_is_the_full_covariance(
    weighting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A head on two levels, sampled: levels, images and positions keep their share."""
    torch.manual_seed(0)
    model = Net()
    heard = listen(model)
    x = torch.randn(3, 3, 16, 16) * torch.tensor([1.0, 2.0, 4.0])[:, None, None, None]
    draws = []
    for draw in range(300):
        monkeypatch.setattr(
            "fastcov.watch.watcher.sequence_phase",
            lambda name, _rank, seed=draw: phase_of(name, seed),
        )
        with fastcov.track(model, include="head", rows=0.1, weighting=weighting) as tracker:
            for _ in range(2):
                model(x)
        draws.append(tracker.covariance("head"))
    full = expected_of("head", Heard(heard["head"].steps[:1], [[1, 1]]), weighting, None, 1.0, 1)
    stack = torch.stack(draws)
    error = (stack.mean(0) - full.moment / full.weight).abs()
    assert bool((error <= 4 * stack.std(0) / len(draws) ** 0.5 + 1e-7).all())


def phase_of(name: str, seed: int) -> int:
    return sequence_phase(name, seed)


def test_two_runs_read_the_same_rows() -> None:
    covariances = []
    for _ in range(2):
        torch.manual_seed(0)
        model = Net()
        with fastcov.track(model) as tracker:  # the default: planned from the first step's shapes
            for _ in range(30):
                model(torch.randn(4, 3, 32, 32))
        covariances.append([tracker.covariance(name) for name in tracker.names()])
    assert all(torch.equal(a, b) for a, b in zip(*covariances, strict=True))


def test_the_default_gives_every_layer_the_same_rows_per_channel() -> None:
    torch.manual_seed(0)
    widths = (16, 32, 24, 40)
    layers = [nn.Conv2d(a, b, 3, padding=1) for a, b in itertools.pairwise((3, *widths))]
    model = nn.Sequential(*layers)
    with fastcov.track(model) as tracker:
        model(torch.randn(4, 3, 24, 24))
        # The first step keeps less than is due where the budget, unknown then, is generous.
        first = [tracker.count(str(i)) for i in range(len(widths))]
        for _ in range(40):
            model(torch.randn(4, 3, 24, 24))
    shares = [
        (tracker.count(str(i)) - before) / width
        for i, (width, before) in enumerate(zip(widths, first, strict=True))
    ]
    assert min(shares) > 2
    # Each count is a whole number of rows, at most one off what is due.
    assert max(shares) - min(shares) <= 1 / min(widths) + 1e-3
