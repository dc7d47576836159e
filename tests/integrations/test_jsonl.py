"""JSON lines: what a training leaves in its folder, and a log of summaries, read by json alone."""

from __future__ import annotations

import errno
import json
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models.resnet import BasicBlock, ResNet

import fastcov


def _resnet() -> nn.Module:
    torch.manual_seed(0)
    return ResNet(BasicBlock, [1, 1, 1, 1], num_classes=5)


def _train(model: nn.Module, steps: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    for seed in range(steps):
        optimizer.zero_grad()
        images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
        model(images).square().mean().backward()
        optimizer.step()


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_lines_of_a_training_hold_the_numbers_of_the_summary(tmp_path: Path) -> None:
    model = _resnet()
    tracker = fastcov.track(model, rows="all", snapshot_every=2, out=tmp_path)
    summaries = []
    for _ in range(2):
        _train(model, 2)
        summaries.append(tracker.summary())
    lines = _lines(tmp_path / "history.jsonl")
    assert [line["step"] for line in lines] == [2, 4]
    for line, summary in zip(lines, summaries, strict=True):
        assert {layer["name"] for layer in line["layers"]} == set(tracker.names())
        spectra = np.load(tmp_path / "spectra" / line["file"], allow_pickle=False)
        for layer in line["layers"]:
            name, end = layer["name"], layer["offset"] + layer["channels"]
            assert layer["count"] == summary[f"{name}/rows"]
            for measure in ("dim", "rank_at_99", "dof", "participation_ratio"):
                assert layer[measure] == pytest.approx(summary[f"{name}/{measure}"])
            # The file's eigenvalues are those: their sum is the trace.
            assert spectra[layer["offset"] : end].sum() == pytest.approx(layer["total"])


def test_a_summary_is_a_line_of_any_log(tmp_path: Path) -> None:
    model = _resnet()
    tracker = fastcov.track(model, rows="all")
    log = tmp_path / "log.jsonl"
    for step in range(2):
        _train(model, 1)
        with log.open("a") as lines:
            lines.write(json.dumps({"step": step, **tracker.summary()}, allow_nan=False) + "\n")
    first, last = _lines(log)
    assert last == {"step": 1, **tracker.summary()}
    assert last["layer4.0.conv2/rows"] == 2 * first["layer4.0.conv2/rows"] == 2 * 4


def test_a_full_disk_is_a_warning_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _resnet()
    tracker = fastcov.track(model, rows="all", snapshot_every=1, out=tmp_path)
    _train(model, 1)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.warns(UserWarning, match=r"no snapshot at step 2, .*No space left.*free space"):
            _train(model, 1)
        with pytest.raises(OSError, match="No space left"):
            tracker.snapshot()  # asked for, it is an error
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _train(model, 1)
    assert tracker.steps == 3
    assert tracker.count("fc") == 12
    assert fastcov.load_history(tmp_path).steps() == tracker.history.steps() == [1, 3]
