"""wandb in offline mode: what was logged is in the file that would be uploaded."""

import re
import time
from pathlib import Path

import pytest
import torch
import wandb
from torch import nn

import fastcov
from fastcov.integrations.wandb import log_wandb


def _stored_values(folder: Path, wanted: int) -> dict[str, float]:
    """Scalars of the run's file: key, protobuf tag, length, value as JSON."""
    (stored,) = folder.glob("wandb/offline-run-*/run-*.wandb")
    values: dict[str, float] = {}
    deadline = time.monotonic() + 60
    while len(values) < wanted and time.monotonic() < deadline:  # another process writes the file
        time.sleep(0.05)
        records = stored.read_bytes()
        for match in re.finditer(rb"(fastcov/\d/\w+)\x82\x01(.)", records, re.DOTALL):
            length = match[2][0]
            values[match[1].decode()] = float(records[match.end() : match.end() + length])
    return values


def test_scalars_and_figures_are_logged(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    tracker = fastcov.track(model, rows="all")
    model(torch.randn(400, 5))
    run = wandb.init(project="test", mode="offline", dir=tmp_path)
    try:
        log_wandb(run, tracker, step=3, figures=True)
    finally:
        run.finish()
    summary = tracker.summary()
    assert _stored_values(tmp_path, len(summary)) == {f"fastcov/{k}": v for k, v in summary.items()}
    assert summary["0/dim"] == 6.0
    pictures = list(tmp_path.glob("wandb/offline-run-*/files/**/*.png"))
    assert sorted(p.name.split("_")[0] for p in pictures) == ["demand", "spectra"]
    assert all(p.read_bytes().startswith(b"\x89PNG") for p in pictures)


def test_a_step_that_wandb_drops_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_SILENT", "true")
    model = nn.Sequential(nn.Linear(5, 8), nn.ReLU(), nn.Linear(8, 3))
    tracker = fastcov.track(model, rows="all")
    model(torch.randn(40, 5))
    calls, solve = [], type(tracker).spectra
    monkeypatch.setattr(type(tracker), "spectra", lambda *a: calls.append(a) or solve(*a))
    run = wandb.init(project="test", mode="offline", dir=tmp_path)
    try:
        log_wandb(run, tracker, step=5, figures=True)
        assert len(calls) == 1  # figures are of the spectra that the scalars tell
        with pytest.warns(UserWarning, match="drops the summary of step 3, it stands at step 5"):
            log_wandb(run, tracker, step=3)
    finally:
        run.finish()
