"""Event files of TensorBoard, read back by TensorBoard."""

from pathlib import Path

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from torch.utils.tensorboard import SummaryWriter

import fastcov
from fastcov.integrations.tensorboard import write_tensorboard


@pytest.fixture
def tracker() -> fastcov.Tracker:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    tracker = fastcov.track(model, rows="all")
    model(torch.randn(400, 5))
    return tracker


def test_scalars_and_figures_are_readable(tmp_path: Path, tracker: fastcov.Tracker) -> None:
    with SummaryWriter(tmp_path) as writer:
        write_tensorboard(writer, tracker, step=7, figures=True)
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    summary = tracker.summary()
    assert len(events.Tags()["scalars"]) == len(summary)
    (dim,) = events.Scalars("fastcov dim/0")
    assert (dim.step, dim.value) == (7, summary["0/dim"]) == (7, 6.0)  # five inputs and the bias
    for tag in ("fastcov/demand", "fastcov/spectra"):
        (image,) = events.Images(tag)
        assert image.width > 200
        assert image.height > 100


def test_figures_are_of_the_spectra_that_the_scalars_tell(
    tmp_path: Path, tracker: fastcov.Tracker, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, solve = [], type(tracker).spectra
    monkeypatch.setattr(type(tracker), "spectra", lambda *a: calls.append(a) or solve(*a))
    with SummaryWriter(tmp_path) as writer:
        write_tensorboard(writer, tracker, step=7, figures=True)
    assert len(calls) == 1
