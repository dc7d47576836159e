"""Layers that see several sizes: heads of a detector, batches padded to other ones in each step."""

from __future__ import annotations

import copy
import pickle
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov.bench.stubs import KernelStubs
from fastcov.stats.route import MOST_LAYOUTS, Routes
from fastcov.watch.taps import Taps, WatchedTap
from fastcov.watch.watcher import Watcher

SIZES = (40, 24, 9, 24, 40)


class Head(nn.Module):
    """Two layers on every level: their inputs are one tensor, which taps share."""

    def __init__(self) -> None:
        super().__init__()
        self.scores, self.boxes = nn.Conv2d(4, 8, 1), nn.Conv2d(4, 12, 3)

    def forward(self, levels: list[Tensor]) -> Tensor:
        return sum((self.scores(level).sum() + self.boxes(level).sum() for level in levels), 0)


def levels(step: int = 0, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(step)
    return [torch.randn(2, 4, size, size, generator=generator).to(dtype) for size in SIZES]


@pytest.fixture
def looked_at(monkeypatch: pytest.MonkeyPatch) -> Counter[int]:
    """Calls of each tap whose layout was decided about."""
    found: Counter[int] = Counter()
    read = Taps.read

    def spy(taps: Taps, watched: WatchedTap, *arguments: Any) -> None:
        found[watched.number] += 1
        read(taps, watched, *arguments)

    monkeypatch.setattr(Taps, "read", spy)
    return found


@pytest.mark.parametrize("where", ["output", "input"])
@pytest.mark.parametrize("rows", ["auto", "all", 0.1])
def test_each_size_is_decided_about_once(looked_at: Counter[int], where: Any, rows: Any) -> None:
    head = Head()
    with fastcov.track(head, rows=rows, where=where) as tracker:
        for step in range(4):
            head(levels(step))
        assert not tracker.watcher.taps.notes
    # The second layer shares the first one's inputs: its layouts need no decision.
    assert looked_at == {0: len(set(SIZES)), 1: 1 if where == "input" else len(set(SIZES))}


@pytest.mark.parametrize("where", ["output", "both"])
@pytest.mark.parametrize("rows", ["auto", "all", 0.1])
def test_rows_are_those_of_a_tracker_that_remembers_nothing(
    monkeypatch: pytest.MonkeyPatch, where: Any, rows: Any
) -> None:
    def states() -> dict[str, Any]:
        torch.manual_seed(0)
        head = Head()
        with fastcov.track(head, rows=rows, where=where) as tracker:
            for step in range(6):
                head(levels(step))
            return {
                name: reader.state_dict() for name, reader in tracker.watcher.taps.layers.items()
            }

    expected_from = states()
    monkeypatch.setattr(Routes, "take_known", lambda *_: False)
    for name, expected in states().items():
        found = expected_from[name]
        for key, value in expected.pop("state").items():
            assert torch.equal(found["state"][key], value), (name, key)
        found.pop("state")
        assert found == expected, name


def test_levels_in_the_order_of_the_last_step_are_expected(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    misses: Counter[int] = Counter()
    observe = Watcher.observe

    def spy(watcher: Watcher, tap: int, *arguments: Any, **options: Any) -> None:
        misses[tap] += 1
        observe(watcher, tap, *arguments, **options)

    monkeypatch.setattr(Watcher, "observe", spy)
    head = Head()
    with fastcov.track(head, rows="all") as tracker:
        for _ in range(3):
            head(levels()[:3])
        misses.clear()
        for step in range(4):
            head(levels(step)[:3])
        assert not misses
        head(levels()[2:0:-1])  # another order
        assert misses
        assert not tracker.watcher.taps.notes


def test_a_bounded_number_of_sizes_is_kept() -> None:
    layer = nn.Linear(4, 3)
    with fastcov.track(layer) as tracker:
        for rows in range(1, MOST_LAYOUTS + 40):
            layer(torch.randn(rows, 5, 4))
        assert tracker.watcher.taps.unique_layers[0].calls == 1
        (routes,) = (each.routes for each in tracker.watcher.taps)
        assert len(routes) == MOST_LAYOUTS
        layout = routes.last.layout
        assert layout is not None
        assert layout.rows == 5 * (MOST_LAYOUTS + 39)
        for other in (copy.deepcopy(tracker), pickle.loads(pickle.dumps(tracker))):
            assert other.steps == tracker.steps


def test_a_value_that_only_resembles_a_size_is_looked_at(looked_at: Counter[int]) -> None:
    """Another dtype, other strides, a sparse tensor of the same shape."""
    layer = nn.Identity()
    dense = torch.randn(6, 4)
    others = [dense.double(), dense.t().contiguous().t(), dense.to_sparse_csr(), dense.to_mkldnn()]
    with fastcov.track(layer, include="", rows="all") as tracker:
        for value in (dense, dense[:3], dense, *others[:2]):
            layer(value)
        assert looked_at == {0: 4}
        assert tracker.watcher.taps.unique_layers[0].state_dict()["total_calls"] == 5
        for value in others[2:]:
            layer(value)
        assert looked_at == {0: 6}


@pytest.mark.parametrize("rows", ["auto", "all"])
def test_launches_are_prepared_once_a_size_on_a_gpu(
    monkeypatch: pytest.MonkeyPatch, rows: Any
) -> None:
    pytest.importorskip("triton", reason="the path of a GPU needs triton")
    from fastcov.kernels import covariance, gather
    from fastcov.ops import counted

    prepared: Counter[str] = Counter()

    def counting(owner: type, name: str) -> None:
        real = getattr(owner, name)

        def spy(*arguments: Any, **options: Any) -> Any:
            prepared[owner.__name__] += 1
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, spy)

    counting(covariance.Accumulation, "_prepare")
    counting(gather.CursorGather, "__init__")
    counting(counted.CountedGather, "__init__")
    head = Head().bfloat16()
    with fastcov.track(head, rows=rows) as tracker, KernelStubs(torch.device("cpu")):
        for step in range(5):
            head(levels(step, torch.bfloat16))
        prepared.clear()
        for step in range(5, 9):
            head(levels(step, torch.bfloat16))
        assert not tracker.watcher.taps.notes
    assert not prepared
