"""Notes of a summary: pure functions of facts, and the facts that a tracker states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fastcov
from fastcov.show.status import LayerFacts, RunFacts, layer_status, why_empty

RUN = RunFacts(
    steps=10,
    steps_read=10,
    decay=None,
    train_only=True,
    refusal="",
    has_calls=True,
    has_calls_lately=True,
    is_compiled=True,
)
LAYER = LayerFacts(
    "conv1", channels=8, count=1000, weight=1000.0, has_calls=True, has_calls_lately=True
)
EMPTY = replace(LAYER, count=0, weight=0.0)
SKIPPED = "skipped: 8192 channels > max_channels=4096"


def _note(layer: LayerFacts, run: RunFacts = RUN) -> str:
    return layer_status(layer, run, None).note


@pytest.mark.parametrize(
    ("layer", "run", "note"),
    [
        ({}, {}, ""),
        ({"skipped": 3}, {}, "3 rows with NaN or inf skipped"),
        ({"reason": "read in part"}, {}, "read in part"),
        ({"has_calls_lately": False}, {}, "its module did not run in the last step: replaced"),
        ({"has_calls_lately": False}, {"has_calls_lately": False}, ""),
        ({"count": 127}, {}, "about 1 more steps until 16 rows a channel"),
        ({"count": 1}, {}, "about 1270 more steps until 16 rows a channel"),
        ({"count": 128}, {}, ""),
        ({}, {"decay": 0.5}, ""),  # a window of 300 rows
        ({"count": 400}, {"decay": 0.5}, "decay=0.5 is worth 120 rows, fewer than 16 a channel"),
        ({"count": 400, "skipped": 2}, {"decay": 0.5}, "2 rows with NaN or inf skipped; decay=0.5"),
        ({}, {"decay": 1.0}, ""),
    ],
)
def test_a_layer_with_rows(layer: dict, run: dict, note: str) -> None:
    said = _note(replace(LAYER, **layer), replace(RUN, **run))
    assert said.startswith(note)
    assert bool(said) == bool(note)


@pytest.mark.parametrize(
    ("layer", "run", "reason"),
    [
        ({"reason": SKIPPED}, {}, SKIPPED),
        ({"reason": SKIPPED}, {"steps": 0}, SKIPPED),
        ({}, {"steps": 0}, "no training-mode forward of the whole model has run"),
        ({}, {"steps": 0, "is_compiled": False}, "in train(), or track with train_only=False"),
        ({}, {"steps": 0, "is_compiled": True}, "was compiled before, torch.compiler.reset()"),
        (
            {},
            {"steps": 0, "is_compiled": True},
            "with train_only=False; if it was compiled before, ",
        ),
        ({}, {"steps": 0, "train_only": False}, "no forward of the whole model has run"),
        ({}, {"steps": 0, "refusal": "a replica ran"}, "(a replica ran; track the module that is"),
        ({}, {"has_calls": False}, "no hook ran: the model was compiled before it was tracked"),
        ({}, {"has_calls": False, "is_compiled": False}, "their parents may use the weights"),
        ({"has_calls": False}, {}, "its module was not called"),
        ({"skipped": 5}, {}, "every row held a NaN or an infinity"),
        ({}, {}, "the sampling has not reached it yet"),
    ],
)
def test_a_layer_without_rows(layer: dict, run: dict, reason: str) -> None:
    facts, of_run = replace(EMPTY, **layer), replace(RUN, **run)
    assert reason in why_empty(facts, of_run)
    assert reason in _note(facts, of_run)


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


def test_a_mean_far_from_the_shift_is_said() -> None:
    """As of rows of 16 bits on a GPU, which are read about 0."""
    layer = nn.Linear(4, 3)
    nn.init.constant_(layer.bias, 1000.0)
    tracker = fastcov.track(layer, rows="all")
    layer(torch.randn(200, 4, generator=torch.Generator().manual_seed(0)))
    assert not tracker.statuses()[0].note
    state = tracker.watcher.taps.layers[tracker.names()[0]].state
    state.translate_(torch.zeros(3, dtype=torch.float64))
    assert tracker.statuses()[0].note.startswith("the mean lies 1.7e+03 from where rows are read")
    state.translate_(state.mean())
    assert not tracker.statuses()[0].note


def test_rows_that_are_all_the_same_have_a_sound_mean() -> None:
    layer = nn.Linear(4, 3)
    tracker = fastcov.track(layer, rows="all")
    layer(torch.full((200, 4), 0.1))
    assert "mean" not in tracker.statuses()[0].note
