"""The Lightning callback in real fits: exact counts, loggers, checkpoint and resume."""

import csv
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastcov
from fastcov.integrations.lightning import FastcovCallback


class Classifier(pl.LightningModule):
    """Calls its network directly, as many LightningModules do."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Flatten(), nn.Linear(216, 4))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.net(batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class CallsItself(Classifier):
    """Calls ``self(x)``."""

    def forward(self, images: Tensor) -> Tensor:
        return self.net(images)

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        return nn.functional.cross_entropy(self(batch[0]), batch[1])


def _fit(folder: Path, callback: FastcovCallback, epochs: int = 1, **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    batches = DataLoader(TensorDataset(torch.randn(40, 3, 8, 8), torch.arange(40) % 4), 10)
    trainer = pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=CSVLogger(folder, name="logs", version=0),
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=1,
        accumulate_grad_batches=options.pop("accumulate_grad_batches", 1),
    )
    model = options.pop("model", None) or Classifier()
    trainer.fit(model, batches, batches, **options)
    return trainer


def test_counts_every_training_row_and_no_validation_row(tmp_path: Path) -> None:
    callback = FastcovCallback(module="net", rows="all", log_every=2, snapshot_every=2)
    trainer = _fit(tmp_path, callback)
    tracker = callback.tracker
    assert tracker is not None
    assert tracker.steps == trainer.global_step == 4
    assert tracker.count("0") == 40 * 36
    assert tracker.history.steps() == [2, 4]
    assert not any(module._forward_hooks for module in trainer.lightning_module.modules())
    logged = (tmp_path / "logs" / "version_0" / "metrics.csv").read_text()
    assert "0/dim" in logged.splitlines()[0]
    assert f"{float(40 * 36)}" in logged


def test_the_module_itself(tmp_path: Path) -> None:
    callback = FastcovCallback(rows="all")
    _fit(tmp_path, callback, model=CallsItself())
    assert callback.tracker is not None
    assert callback.tracker.count("net.3") == 40


def test_a_module_that_is_never_called_is_named_after_the_first_batch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"'forward' was not called; give module= \(net\)"):
        _fit(tmp_path, FastcovCallback())


def test_accumulated_gradients_are_logged_once_an_optimizer_step(tmp_path: Path) -> None:
    callback = FastcovCallback("net", rows="all", log_every=1)
    trainer = _fit(tmp_path, callback, epochs=2, accumulate_grad_batches=2)
    assert callback.tracker is not None
    assert callback.tracker.steps == 8  # each micro-batch is a step
    assert trainer.global_step == 4
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as lines:
        logged = [row for row in csv.DictReader(lines) if row["0/rows"]]
    assert [int(row["step"]) for row in logged] == [1, 2, 3, 4]
    assert [float(row["0/rows"]) for row in logged] == [n * 20 * 36 for n in (1, 2, 3, 4)]


def test_a_resumed_fit_continues_statistics_and_history(tmp_path: Path) -> None:
    def callback(folder: str) -> FastcovCallback:
        return FastcovCallback("net", rows="all", snapshot_every=1, out=tmp_path / folder)

    straight = callback("straight")
    _fit(tmp_path / "s", straight, epochs=3)
    first = callback("resumed")
    trainer = _fit(tmp_path / "r", first, epochs=2)
    trainer.save_checkpoint(tmp_path / "two.ckpt")
    checkpoint = tmp_path / "two.ckpt"
    _fit(tmp_path / "r", callback("resumed"), epochs=4, ckpt_path=checkpoint)  # goes on, then dies
    assert fastcov.load_history(tmp_path / "resumed").steps() == list(range(1, 17))
    resumed = callback("resumed")
    _fit(tmp_path / "r", resumed, epochs=3, ckpt_path=checkpoint)
    assert resumed.tracker is not None
    assert straight.tracker is not None
    assert resumed.tracker.steps == straight.tracker.steps == 12
    assert resumed.tracker.count("3") == straight.tracker.count("3") == 120
    history = fastcov.load_history(tmp_path / "resumed")
    assert history.steps() == list(range(1, 13))
    torch.testing.assert_close(
        resumed.tracker.covariance("0"), straight.tracker.covariance("0"), rtol=1e-9, atol=1e-12
    )


@pytest.mark.dist
def test_two_ranks_log_the_rows_of_both(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    script.write_text(TWO_RANKS.format(folder=str(tmp_path), here=str(Path(__file__).parent)))
    done = subprocess.run(
        [sys.executable, str(script)],
        env={**os.environ, "PYTHONPATH": str(Path(fastcov.__file__).parents[1])},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    with (tmp_path / "logs" / "version_0" / "metrics.csv").open() as lines:
        logged = [row for row in csv.DictReader(lines) if row["0/rows"]]
    assert [float(row["0/rows"]) for row in logged] == [2 * 10 * 36, 4 * 10 * 36]
    assert fastcov.load_history(tmp_path / "run").steps() == [1, 2]
    checkpoint = torch.load(tmp_path / "end.ckpt", weights_only=True)
    count = checkpoint["fastcov"]["layers"]["0"]["state"]["count"]
    assert count.tolist() == [4 * 10 * 36, 0]


TWO_RANKS = """
import sys
sys.path.insert(0, {here!r})
from test_lightning import Classifier, DataLoader, TensorDataset, CSVLogger, pl, torch
from fastcov.integrations.lightning import FastcovCallback

if __name__ == "__main__":
    batches = DataLoader(TensorDataset(torch.randn(40, 3, 8, 8), torch.arange(40) % 4), 10)
    callback = FastcovCallback(
        "net", log_every=1, rows="all", snapshot_every=1, out={folder!r} + "/run"
    )
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        default_root_dir={folder!r},
        logger=CSVLogger({folder!r}, name="logs", version=0),
        callbacks=[callback],
        enable_progress_bar=False,
        log_every_n_steps=1,
    )
    trainer.fit(Classifier(), batches)
    trainer.save_checkpoint({folder!r} + "/end.ckpt")
"""
