"""Histories in memory and in folders say the same."""

import math
import time
from pathlib import Path

import pytest
import torch

import fastcov
from fastcov.spectra.history import History, Snapshot
from fastcov.spectra.spectrum import Spectrum

LAYERS = {"stem": 5, "layer1.0.conv1": 8, 'odd "name"\n<b>': 3}


def _spectrum(step: int, channels: int, name: str = "") -> Spectrum:
    eigenvalues = torch.arange(1, channels + 1, dtype=torch.float64) ** -(1 + 0.01 * step)
    return Spectrum(eigenvalues, 16 * channels + step, float(eigenvalues.sum()), name)


def _snapshot(step: int, layers: dict[str, int] | None = None) -> Snapshot:
    layers = LAYERS if layers is None else layers
    spectra = {name: _spectrum(step, channels, name) for name, channels in layers.items()}
    return Snapshot(step, 0.5 * step, spectra)


def _same(a: Snapshot, b: Snapshot) -> bool:
    return (a.step, a.wall_s, list(a.spectra)) == (b.step, b.wall_s, list(b.spectra)) and all(
        torch.equal(x.eigenvalues, y.eigenvalues)
        and (x.count, x.total, x.name) == (y.count, y.total, y.name)
        for x, y in zip(a.spectra.values(), b.spectra.values(), strict=True)
    )


@pytest.fixture(params=["memory", "folder"])
def history(request: pytest.FixtureRequest, tmp_path: Path) -> History:
    return History(tmp_path / "run" if request.param == "folder" else None)


def test_what_is_appended_is_read(history: History) -> None:
    assert len(history) == 0
    assert history.steps() == history.layers() == list(history) == []
    snapshots = [_snapshot(step) for step in (0, 10, 10, 25)]
    for snapshot in snapshots:
        history.append(snapshot)
    assert len(history) == 4
    assert history.steps() == [0, 10, 10, 25]
    assert history.layers() == list(LAYERS)
    assert all(_same(a, b) for a, b in zip(history, snapshots, strict=True))
    assert _same(history[-1], snapshots[3])
    assert _same(history[1], snapshots[1])
    assert "4 snapshots, steps 0 to 25" in repr(history)
    for index in (4, -5):
        with pytest.raises(IndexError, match=rf"snapshot {index} of a history of 4"):
            history[index]


def test_dims_over_training(history: History) -> None:
    history.append(_snapshot(0, {"a": 4}))
    history.append(_snapshot(7, {"a": 4, "b": 100}))
    history.append(_snapshot(9, {}))
    layers, steps, dims = history.dims(threshold=0.3)
    assert layers == ["a", "b"]
    assert steps == [0, 7, 9]
    assert dims[0].tolist()[:2] == [3.0, 3.0]  # 1, 1/2, 1/3, 1/4
    assert dims[1, 1] == _spectrum(7, 100).dim(0.3)
    assert dims[1, 0].isnan()
    assert dims[:, 2].isnan().all()
    assert history.dims(0.3, relative=False)[2][0, 0] == 3


def test_an_empty_snapshot_is_kept(history: History) -> None:
    history.append(Snapshot(3, 0.0, {}))
    assert history[0].spectra == {}
    assert history.dims()[2].shape == (0, 1)


def test_steps_must_not_go_back(history: History) -> None:
    history.append(_snapshot(10))
    with pytest.raises(ValueError, match=r"step 4 comes after one of step 10; call truncate\(4\)"):
        history.append(_snapshot(4))
    history.truncate(4)
    history.append(_snapshot(4))
    assert history.steps() == [4]


def test_truncate_drops_the_step_and_what_follows(history: History) -> None:
    for step in (0, 10, 20, 20, 30):
        history.append(_snapshot(step))
    history.truncate(31)
    assert len(history) == 5
    history.truncate(20)
    assert history.steps() == [0, 10]
    history.append(_snapshot(15, {"wider": 64}))
    assert _same(history[-1], _snapshot(15, {"wider": 64}))
    history.truncate(0)
    assert len(history) == 0


@pytest.mark.parametrize(
    ("step", "wall_s", "message"),
    [
        (-1, 0.0, "step .* -1"),
        (2.0, 0.0, "step .* 2.0"),
        (True, 0.0, "step .* True"),
        (1, math.nan, "wall_s .* nan"),
        (1, -2.0, "wall_s .* -2.0"),
    ],
)
def test_impossible_snapshots_are_refused(step: int, wall_s: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Snapshot(step, wall_s, {})


def test_history_is_what_track_writes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 6), torch.nn.ReLU(), torch.nn.Linear(6, 2))
    tracker = fastcov.track(model, rows="all", snapshot_every=2, out=tmp_path)
    for _ in range(5):
        model(torch.randn(32, 4))
    history = fastcov.load_history(tmp_path)
    assert history.steps() == [2, 4]
    assert history[-1].spectra["0"].count == 4 * 32
    assert time.time() - 3600 < history[-1].wall_s <= time.time()
    assert tracker.history.steps() == [2, 4]
