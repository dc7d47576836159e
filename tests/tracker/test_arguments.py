"""Arguments that track and estimate refuse, with the argument's value and the remedy."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import fastcov


def model() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))


def estimate(**arguments: Any) -> object:
    return fastcov.estimate(model(), torch.zeros(2, 4), **arguments)


def track(**arguments: Any) -> object:
    return fastcov.track(model(), **arguments)


@pytest.mark.parametrize("ask", [track, estimate])
@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"rows": -3.0}, ValueError, r"rows=-3\.0: a float is a share"),
        ({"rows": 0}, ValueError, "rows=0: an int"),
        ({"rows": True}, TypeError, "rows=True"),
        ({"rows": "al"}, ValueError, "rows='al': choose one of 'auto', 'all'"),
        ({"where": "inputs"}, ValueError, "where='inputs': choose one of"),
        ({"weighting": "x"}, ValueError, "weighting='x': choose one of"),
        ({"max_channels": "x"}, TypeError, "max_channels='x': give an int"),
        ({"max_channels": 0}, ValueError, "max_channels=0"),
        ({"include": "layer9"}, ValueError, "'layer9' matches no module"),
    ],
)
def test_both_refuse(
    ask: Callable[..., object],
    arguments: dict[str, object],
    error: type[Exception],
    message: str,
) -> None:
    with pytest.raises(error, match=message):
        ask(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"decay": "x"}, TypeError, "decay='x': give a number"),
        ({"decay": 1.0}, ValueError, r"decay=1\.0: must be in"),
        ({"every": 1.5}, ValueError, r"every=1\.5: give a number of steps"),
        ({"snapshot_every": True}, ValueError, "snapshot_every=True"),
    ],
)
def test_track_refuses(arguments: dict[str, object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        track(**arguments)


@pytest.mark.parametrize(
    "ask", [fastcov.track, partial(fastcov.estimate, example=torch.zeros(2, 4))]
)
def test_what_is_no_module(ask: Callable[[Any], object]) -> None:
    with pytest.raises(TypeError, match=r"model is a int, expected a torch\.nn\.Module"):
        ask(3)


def test_merge_refuses_what_is_no_tracker() -> None:
    no_tracker: Any = 3
    with fastcov.track(model()) as tracker, pytest.raises(TypeError, match="other is a int"):
        tracker.merge(no_tracker)


def test_a_folder_that_cannot_be_made_is_refused_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for out, error, said in (
        (tmp_path / "file" / "run", OSError, "run' cannot be made: .*give a folder that this"),
        (tmp_path / "file", OSError, "file' is a file; give a folder"),
        (3, TypeError, "out is a int, expected the path of a folder"),
    ):
        with pytest.raises(error, match=said):
            fastcov.track(model(), out=out)
    fastcov.track(model(), out=tmp_path / "new" / "run").close()
    assert (tmp_path / "new" / "run").is_dir()
