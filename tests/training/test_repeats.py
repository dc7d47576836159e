"""Calls that bring what the call before brought: read at once, and read the same."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov.ops import library
from fastcov.stats.layer import Layer
from fastcov.watch.sharing import SharedInputs
from fastcov.watch.taps import Taps


class Branches(nn.Module):
    """Two consumers of one tensor, of which the second may get another."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 1)
        self.left = nn.Conv2d(4, 5, 1)
        self.right = nn.Conv2d(4, 6, 1)
        self.is_apart = False

    def forward(self, image: Tensor) -> Tensor:
        stem = self.stem(image).relu()
        return self.left(stem).mean() + self.right(stem * 2 if self.is_apart else stem).mean()


def images(size: int = 4) -> Tensor:
    return torch.randn(2, 3, size, size)


@pytest.fixture
def model() -> Branches:
    torch.manual_seed(0)
    return Branches()


@pytest.mark.parametrize("where", ["output", "input", "both"])
@pytest.mark.parametrize("rows", ["all", 0.5])
def test_nothing_is_decided_twice(
    where: Literal["output", "input", "both"],
    rows: Literal["all"] | float,
    model: Branches,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with fastcov.track(model, where=where, rows=rows) as tracker:
        for _ in range(2):
            model(images())
        monkeypatch.setattr(Taps, "read", None)
        for _ in range(2):
            model(images())
        assert not tracker.watcher.taps.notes
        expected = 4 * 32 if rows == "all" else 4 * 16
        assert {tracker.count(name) for name in tracker.names()} == {expected}


@pytest.mark.parametrize("rows", ["all", 0.5])
def test_where_branches_part_only_what_fails_is_given_up(
    rows: Literal["all"] | float, model: Branches, monkeypatch: pytest.MonkeyPatch
) -> None:
    read = Layer.read

    def failing(self: Layer, *arguments: Any) -> None:
        if self.name == "right:in":
            raise ValueError("no rows today")
        read(self, *arguments)

    with fastcov.track(model, where="input", rows=rows) as tracker:
        for _ in range(3):
            model(images())
        monkeypatch.setattr(Layer, "read", failing)
        model.is_apart = True
        with pytest.warns(UserWarning, match="no longer reads layer 'right:in'"):
            model(images())
        model(images())
        assert "no rows today" in tracker.watcher.taps.notes["right:in"]
        assert "left:in" not in tracker.watcher.taps.notes
        assert tracker.count("left:in") == 5 * 32 * (1 if rows == "all" else rows)


def test_inputs_read_at_once_are_the_inputs(model: Branches) -> None:
    seen = []
    model.left.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with fastcov.track(model, where="input", rows="all") as tracker:
        for size in (4, 4, 4, 5, 4):
            model(images(size))
        rows = torch.cat([x.movedim(1, -1).reshape(-1, 4) for x in seen]).double()
        torch.testing.assert_close(
            tracker.covariance("left:in"), rows.T @ rows / len(rows), rtol=1e-6, atol=1e-7
        )
        assert len(tracker.watcher.taps.unique_layers) == 2


def test_the_first_input_that_holds_numbers_is_read() -> None:
    class Gather(nn.Module):
        def forward(self, index: Tensor, table: Tensor) -> Tensor:
            return table[index]

    model = Gather()
    with fastcov.track(model, include=Gather, where="input", rows="all") as tracker:
        for _ in range(3):
            model(torch.arange(2), torch.randn(6, 4))
        model(torch.arange(2), table=torch.randn(6, 4))
        assert tracker.count(":in") == 24


def test_sharing_ends_at_once_when_inputs_part(model: Branches) -> None:
    with fastcov.track(model, where="input", rows="all") as tracker:
        for _ in range(3):
            model(images())
        model.is_apart = True
        for _ in range(3):
            model(images())
        assert len(tracker.watcher.taps.unique_layers) == 3
        assert (tracker.count("left:in"), tracker.count("right:in")) == (6 * 32, 3 * 32)


def test_the_first_that_sees_a_tensor_reads_it() -> None:
    shared, early, late = SharedInputs(), torch.ones(1), torch.ones(1)
    assert shared.see(0, early, (0,), has_rows=False) == "reads"
    assert shared.see(1, late, (0,), has_rows=False) == "reads"
    assert shared.see(0, late, (0,), has_rows=True) == "reads"
    assert shared.see(2, late, (0,), has_rows=False) == "shares"
    assert shared.owner == {2: 1}


def test_layer_given_up_is_read_no_more(model: Branches, monkeypatch: pytest.MonkeyPatch) -> None:
    with fastcov.track(model, where="both", rows="all") as tracker:
        for _ in range(3):
            model(images())
        before = tracker.count("left")
        add = library.accumulate_again_

        def failing(cursor: Tensor, *tensors: Tensor) -> int:
            if tensors[-1].shape[1] == 5:
                raise ValueError("no rows today")
            return add(cursor, *tensors)

        monkeypatch.setattr(library, "accumulate_again_", failing)
        with pytest.warns(UserWarning, match="no longer reads layer 'left'"):
            model(images())
        monkeypatch.undo()
        for _ in range(2):
            model(images())
        assert tracker.count("left") == before
        assert tracker.count("left:in") == 6 * 32


# Made in the test: a nested tensor has no shape, for which another test asks all that live.
OTHERS: dict[str, Callable[[], Tensor]] = {
    "integers": lambda: torch.ones(6, 4, dtype=torch.int64),
    "complex": lambda: torch.ones(6, 4, dtype=torch.complex64),
    "sparse": lambda: torch.ones(6, 4).to_sparse(),
    "mkldnn": lambda: torch.ones(6, 4).to_mkldnn(),
    "nested": lambda: torch.nested.nested_tensor([torch.ones(2, 4), torch.ones(4, 4)]),
}


@pytest.mark.parametrize("rows", ["all", 0.5])
@pytest.mark.parametrize("kind", OTHERS)
def test_other_tensors_of_that_shape_are_no_rows(kind: str, rows: Literal["all"] | float) -> None:
    class Given(nn.Module):
        def forward(self, value: Tensor) -> Tensor:
            return value

    model = Given()
    with fastcov.track(model, include=Given, rows=rows) as tracker:
        for _ in range(3):
            model(torch.randn(6, 4))
        model(OTHERS[kind]())
        model(torch.randn(6, 4))
        assert tracker.count("") == 24 * (1 if rows == "all" else rows)


def test_what_is_stored_of_a_buffer_is_stored_once() -> None:
    # Views of it are kept, and pickle would store each with all the memory that it is a part of.
    model = nn.Linear(4, 256)
    with fastcov.track(model, rows="all") as tracker:
        for rows in (1, 2, 3, 4):
            model(torch.randn(rows, 4))
            tracker.count("")
            stored = len(pickle.dumps(tracker))
            if rows == 1:
                first = stored
        assert stored == pytest.approx(first, abs=4096)
