"""The Lightning callback where fits follow each other, fail, are tuned or log often."""

from __future__ import annotations

import csv
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import BatchSizeFinder, LearningRateFinder
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.tuner import Tuner
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import fastcov
from fastcov.integrations.lightning import FastcovCallback

EXAMPLES, BATCH = 32, 4  # 8 steps an epoch


class Classifier(pl.LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 2))
        self.lr, self.batch_size = 0.01, BATCH
        self.on_batch: Callable[[int], None] | None = None

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.on_batch is not None:
            self.on_batch(index)
        return loss

    def validation_step(self, batch: list[Tensor], _: int) -> None:
        self.net(batch[0])

    test_step = validation_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        points = TensorDataset(torch.randn(EXAMPLES, 6), torch.arange(EXAMPLES) % 2)
        return DataLoader(points, self.batch_size)

    val_dataloader = test_dataloader = train_dataloader


def _trainer(folder: Path, *callbacks: pl.Callback, epochs: int = 2, **options: Any) -> pl.Trainer:
    torch.manual_seed(0)
    return pl.Trainer(
        accelerator="cpu",
        max_epochs=epochs,
        default_root_dir=folder,
        logger=CSVLogger(folder, name="logs", version=options.pop("version", 0)),
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        log_every_n_steps=1,
        num_sanity_val_steps=0,
        **options,
    )


def _callback(**options: Any) -> FastcovCallback:
    return FastcovCallback("net", **{"rows": "all", "log_every": None, **options})


def _counted(callback: FastcovCallback) -> tuple[int, int]:
    assert callback.tracker is not None
    return callback.tracker.steps, callback.tracker.count("2")


def _hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def _logged(folder: Path, version: int = 0) -> list[tuple[int, float]]:
    with (folder / "logs" / f"version_{version}" / "metrics.csv").open() as lines:
        rows = [row for row in csv.DictReader(lines) if row["2/rows"]]
    return [(int(row["step"]), float(row["2/rows"])) for row in rows]


def test_a_fresh_fit_starts_from_zero_whatever_the_object_did_before(tmp_path: Path) -> None:
    callback, model = _callback(log_every=8), Classifier()
    trainer = _trainer(tmp_path, callback)
    trainer.fit(model)
    trainer.save_checkpoint(path := tmp_path / "two.ckpt")
    resumed = _trainer(tmp_path, callback, epochs=3, version=1)
    resumed.fit(Classifier(), ckpt_path=path)
    assert _counted(callback) == (24, 3 * EXAMPLES)
    assert _logged(tmp_path, 1) == [(24, 3 * EXAMPLES)]
    for evaluate in (resumed.validate, resumed.test):  # which load callbacks, too
        evaluate(model, ckpt_path=path, verbose=False)
        assert _counted(callback) == (24, 3 * EXAMPLES)
    _trainer(tmp_path, callback, version=2).fit(Classifier())
    assert _counted(callback) == (16, 2 * EXAMPLES)
    # Also the first step that the last fit logged.
    assert _logged(tmp_path, 2) == [(8, EXAMPLES), (16, 2 * EXAMPLES)]


def test_a_second_fit_of_one_trainer_goes_on(tmp_path: Path) -> None:
    callback, model = _callback(snapshot_every=8, out=tmp_path / "spectra"), Classifier()
    trainer = _trainer(tmp_path, callback, epochs=1)
    trainer.fit(model)
    trainer.validate(model, verbose=False)
    trainer.test(model, verbose=False)
    trainer.fit_loop.max_epochs = 3
    trainer.fit(model)
    assert trainer.global_step == 24
    assert _counted(callback) == (24, 3 * EXAMPLES)
    trainer.fit(model)  # nothing is left to train
    assert _counted(callback) == (24, 3 * EXAMPLES)
    assert fastcov.load_history(tmp_path / "spectra").steps() == [8, 16, 24]
    assert not _hooks(model)


@pytest.mark.parametrize("error", [RuntimeError("broken"), KeyboardInterrupt()], ids=type)
def test_nothing_is_read_after_an_exception(tmp_path: Path, error: BaseException) -> None:
    callback, model = _callback(snapshot_every=1), Classifier()

    def on_batch(index: int) -> None:
        if index == 2:
            raise error

    model.on_batch = on_batch
    with pytest.raises((RuntimeError, SystemExit)):
        _trainer(tmp_path, callback).fit(model)
    assert not _hooks(model)
    model.train()
    model.net(torch.randn(4, 6))
    assert _counted(callback) == (3, 3 * BATCH)
    assert callback.tracker is not None
    assert callback.tracker.history.steps() == [1, 2]
    model.on_batch = None
    _trainer(tmp_path, callback).fit(model)
    assert _counted(callback) == (16, 2 * EXAMPLES)


class FindsMidFit(LearningRateFinder):
    """Searches once more when the second epoch begins, as Lightning's own guide shows."""

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.current_epoch == 1:
            self.lr_find(trainer, pl_module)


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
@pytest.mark.parametrize(
    "finder",
    [
        lambda: LearningRateFinder(num_training_steps=5),
        lambda: FindsMidFit(num_training_steps=5),
        lambda: BatchSizeFinder(steps_per_trial=1, init_val=BATCH, max_trials=1),
    ],
    ids=["rate", "mid-fit", "size"],
)
def test_batches_of_a_tuner_do_not_count(
    tmp_path: Path, finder: Callable[[], pl.Callback], is_first: bool
) -> None:
    callback = _callback(snapshot_every=4, out=tmp_path / "spectra")
    callbacks = [finder(), callback] if is_first else [callback, finder()]
    trainer = _trainer(tmp_path, *callbacks)
    trainer.fit(Classifier())
    assert _counted(callback) == (trainer.global_step, 2 * EXAMPLES)
    steps = fastcov.load_history(tmp_path / "spectra").steps()
    assert steps == list(range(4, trainer.global_step + 1, 4))


@pytest.mark.parametrize("is_first", [True, False], ids=["first", "last"])
def test_a_tuned_fit_that_resumes_keeps_its_statistics(tmp_path: Path, is_first: bool) -> None:
    trainer = _trainer(tmp_path, _callback(), LearningRateFinder(num_training_steps=5), epochs=1)
    trainer.fit(Classifier())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    callback, finder = _callback(), LearningRateFinder(num_training_steps=5)
    callbacks = [finder, callback] if is_first else [callback, finder]
    trainer = _trainer(tmp_path, *callbacks)
    trainer.fit(Classifier(), ckpt_path=tmp_path / "one.ckpt")
    # After a search Lightning itself goes on with the checkpoint's weights, but from step 0.
    assert trainer.global_step == 16
    assert _counted(callback) == (8 + 16, 3 * EXAMPLES)


def test_a_tuner_of_its_own_leaves_no_trace(tmp_path: Path) -> None:
    callback, model = _callback(), Classifier()
    _trainer(tmp_path, callback, epochs=1).fit(model)  # whose statistics are not the next fit's
    trainer = _trainer(tmp_path, callback)
    Tuner(trainer).lr_find(model, num_training=5)
    assert not _hooks(model)
    trainer.fit(model)
    assert _counted(callback) == (16, 2 * EXAMPLES)


def test_a_checkpoint_without_statistics_is_said(tmp_path: Path) -> None:
    trainer = _trainer(tmp_path, epochs=1)
    trainer.fit(Classifier())
    trainer.save_checkpoint(path := tmp_path / "one.ckpt")
    callback = _callback()
    with pytest.warns(UserWarning, match="holds no statistics .* start from zero"):
        _trainer(tmp_path, callback).fit(Classifier(), ckpt_path=path)
    assert _counted(callback) == (8, EXAMPLES)


def test_the_training_waits_for_no_spectrum(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free, solve = threading.Event(), fastcov.ops.eigvalsh

    def eigvalsh(matrices: Any) -> Any:
        assert free.wait(120), "the training waits for the spectra"
        return solve(matrices)

    class AtTheEnd(pl.Callback):
        def on_train_epoch_end(self, *_: Any) -> None:
            free.set()

    monkeypatch.setattr(fastcov.ops, "eigvalsh", eigvalsh)
    callback = _callback(log_every=2, snapshot_every=4)
    _trainer(tmp_path, callback, AtTheEnd(), epochs=1).fit(Classifier())
    assert _logged(tmp_path) == [(step, step * BATCH) for step in (2, 4, 6, 8)]
    assert callback.tracker is not None
    assert callback.tracker.history.steps() == [4, 8]


def test_two_callbacks_of_one_trainer_keep_apart(tmp_path: Path) -> None:
    def callbacks() -> list[FastcovCallback]:
        return [_callback(include="2", where=where) for where in ("output", "input")]

    trainer = _trainer(tmp_path, *callbacks(), epochs=1)
    trainer.fit(Classifier())
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    resumed = callbacks()
    _trainer(tmp_path, *resumed).fit(Classifier(), ckpt_path=tmp_path / "one.ckpt")
    trackers = [each.tracker for each in resumed]
    assert [t.count(t.names()[0]) for t in trackers if t is not None] == [2 * EXAMPLES] * 2


def test_a_module_in_evaluation_mode_is_named(tmp_path: Path) -> None:
    model = Classifier()
    model.net.eval()
    with pytest.raises(ValueError, match=r"'net' is in evaluation mode.*train_only=False"):
        _trainer(tmp_path, _callback()).fit(model)
    assert not _hooks(model)
