"""Memory goes when the last name of it goes, without a search of Python's for cycles."""

from __future__ import annotations

import copy
import gc
import weakref
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import fastcov


@pytest.fixture(autouse=True)
def _no_search_for_cycles() -> Iterator[None]:
    gc.disable()
    try:
        yield
    finally:
        gc.enable()


def _states(tracker: fastcov.Tracker) -> list[weakref.ref[Any]]:
    return [weakref.ref(layer.state) for layer in tracker.watcher.taps.unique_layers]


def _run(model: nn.Module) -> None:
    for rows in (64, 16, 64, 7):  # several layouts: their entries follow each other
        model(torch.randn(rows, 8))


@pytest.mark.parametrize("ending", ["close", "drop", "copy"])
@pytest.mark.parametrize("where", ["output", "input"])
@pytest.mark.parametrize("rows", ["all", 5])
def test_states_go_with_their_tracker(ending: str, where: Any, rows: Any) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))
    tracker = fastcov.track(model, rows=rows, where=where)
    _run(model)
    states = _states(tracker)
    if ending == "close":
        tracker.close()
    elif ending == "copy":
        states = _states(copied := copy.deepcopy(tracker))
        del copied
        assert not any(state() for state in states)
        return
    else:
        del model
    assert all(state() for state in states)
    assert tracker.count(tracker.names()[0]) > 0
    del tracker
    assert not any(state() for state in states)


def test_a_tracker_that_nobody_names_lives_with_its_model_and_goes_with_it() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    tracker = fastcov.track(model, rows="all", snapshot_every=1)
    alive = weakref.ref(tracker)
    del tracker
    _run(model)
    kept = alive()
    assert kept is not None
    assert len(kept.history) == 4
    del kept, model
    assert alive() is None


def test_layouts_beyond_the_limit_keep_no_layer() -> None:
    model = nn.Sequential(nn.Linear(8, 4))
    tracker = fastcov.track(model, rows="all")
    for rows in range(1, 200):
        model(torch.randn(rows, 8))
    states = _states(tracker)
    del tracker, model
    assert not any(state() for state in states)
