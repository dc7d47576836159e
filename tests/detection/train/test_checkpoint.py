"""Files of an interrupted run, and the checkpoint from which the next process goes on."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import fastcov
from fastcov_detection.config import TrainConfig
from fastcov_detection.errors import CheckpointError
from fastcov_detection.train import folder as checkpoint
from fastcov_detection.train.logbook import read_log
from fastcov_detection.train.loop import Loop, train


def _stop_after(monkeypatch: pytest.MonkeyPatch, steps: int) -> None:
    step = Loop._step

    def stop(self: Loop, batch: list[object], rate: float) -> None:
        if self.step == steps:
            raise KeyboardInterrupt
        step(self, batch, rate)

    monkeypatch.setattr(Loop, "_step", stop)


def _steps(folder: Path) -> list[int]:
    return [entry["step"] for entry in read_log(folder) if entry["kind"] == "train"]


def test_truncated_checkpoints(
    tiny_run: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    config = replace(tiny_run, checkpoint_every=2, track="none")
    with monkeypatch.context() as patch:
        _stop_after(patch, 5)
        with pytest.raises(KeyboardInterrupt):
            train(config, run_dir=tmp_path, progress=False)
    newest, previous = tmp_path / checkpoint.NEWEST, tmp_path / checkpoint.PREVIOUS
    content = newest.read_bytes()
    newest.write_bytes(content[: len(content) // 2])
    saved = checkpoint.load_checkpoint(tmp_path)
    assert saved is not None
    assert saved["step"] == 2
    assert "cannot read" in caplog.text
    assert "going on from checkpoint.previous.pt, step 2" in caplog.text
    before = previous.read_bytes()
    previous.write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"cannot read .*checkpoint\.pt .*delete the file"):
        train(config, run_dir=tmp_path, progress=False)
    previous.write_bytes(before)
    assert train(config, run_dir=tmp_path, progress=False).steps == 6
    assert _steps(tmp_path) == [1, 2, 3, 4, 5, 6]


def test_starting_over_forgets_the_old_run(
    tiny_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = replace(tiny_run, steps=4)
    with monkeypatch.context() as patch:
        _stop_after(patch, 3)
        with pytest.raises(KeyboardInterrupt):
            train(config, run_dir=tmp_path, progress=False)
    result = train(replace(config, lr=0.02), run_dir=tmp_path, resume=False, progress=False)
    assert result.steps == 4
    assert _steps(tmp_path) == [1, 2, 3, 4]
    assert fastcov.load_history(tmp_path / "spectra").steps() == [2, 4]


def test_a_checkpoint_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    content = dict.fromkeys(checkpoint._KEYS, 0) | {"step": 1}
    checkpoint.save_checkpoint(tmp_path, content)

    def full_disk(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match=r"cannot write .*checkpoint\.pt\.new .*free space"):
        checkpoint.save_checkpoint(tmp_path, content | {"step": 2})
    assert [path.name for path in tmp_path.iterdir()] == [checkpoint.NEWEST]
    saved = checkpoint.load_checkpoint(tmp_path)
    assert saved is not None
    assert saved["step"] == 1


@pytest.mark.parametrize("content", [[1, 2], {"format": 1}, {"format": 2, "step": 3}])
def test_a_checkpoint_of_something_else_is_refused(tmp_path: Path, content: object) -> None:
    torch.save(content, tmp_path / checkpoint.NEWEST)
    with pytest.raises(CheckpointError, match=r"checkpoint\.pt"):
        checkpoint.load_checkpoint(tmp_path)
