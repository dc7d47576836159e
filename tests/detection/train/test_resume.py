"""Settings that a run may change when it is resumed, and refusals of all others."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fastcov_detection.cli import main
from fastcov_detection.config import DataConfig, SearchConfig, TrainConfig, save_config
from fastcov_detection.errors import CheckpointError, ConfigError, LossError
from fastcov_detection.search.folder import check_same_data, check_same_search
from fastcov_detection.train.folder import RunResult, load_run
from fastcov_detection.train.logbook import Logbook, read_log
from fastcov_detection.train.loop import Loop, train

BOX = {"image_id": 1, "category_id": 1, "bbox": [4, 6, 8, 10]}


@pytest.fixture
def config(coco_folder: Callable[..., Path], tiny_run: TrainConfig) -> TrainConfig:
    """Four steps on two images in a folder, with a checkpoint at every second."""
    root = coco_folder([{**BOX, "id": 1}, {**BOX, "id": 2, "image_id": 2}])
    return replace(
        tiny_run,
        data=DataConfig(name=str(root), hflip=0.0),
        steps=4,
        batch_size=2,
        checkpoint_every=2,
        track="none",
    )


def _train(config: TrainConfig, folder: Path) -> RunResult:
    return train(config, run_dir=folder, progress=False)


def _stopped(config: TrainConfig, folder: Path, steps: int) -> None:
    """Trains until Ctrl-C after ``steps``."""
    step = Loop._step

    def stop(self: Loop, batch: list[object], rate: float) -> None:
        if self.step == steps:
            raise KeyboardInterrupt
        step(self, batch, rate)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Loop, "_step", stop)
        with pytest.raises(KeyboardInterrupt):
            _train(config, folder)


def _rates(folder: Path) -> dict[int, float]:
    return {entry["step"]: entry["lr"] for entry in read_log(folder) if entry["kind"] == "train"}


def _moved(config: TrainConfig, target: Path) -> TrainConfig:
    shutil.move(config.data.name, target)
    return replace(config, data=replace(config.data, name=str(target)))


def test_a_moved_data_folder_resumes(config: TrainConfig, tmp_path: Path) -> None:
    _stopped(config, tmp_path / "run", 3)
    config = _moved(config, tmp_path / "elsewhere")
    assert _train(config, tmp_path / "run").steps == 4
    assert sorted(_rates(tmp_path / "run")) == [1, 2, 3, 4]
    config = _moved(config, tmp_path / "and elsewhere")
    assert _train(config, tmp_path / "run").steps == 4, "a finished run is found again"


@pytest.mark.parametrize("is_finished", [True, False])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("what", ["annotations", "images"])
def test_changed_data_is_said(
    config: TrainConfig, tmp_path: Path, is_finished: bool, split: str, what: str
) -> None:
    if is_finished:
        _train(config, tmp_path / "run")
    else:
        _stopped(config, tmp_path / "run", 3)
    root = Path(config.data.name)
    if what == "annotations":
        path = root / "annotations" / f"instances_{split}2017.json"
        content = json.loads(path.read_text())
        content["annotations"][0]["bbox"][0] += 1
        path.write_text(json.dumps(content))
    else:
        path = root / f"{split}2017" / "1.png"
        path.write_bytes(path.read_bytes() + b"\0" * 9)
    expected = rf"on other data: the {what} of {split} have changed since; .*--restart"
    with pytest.raises(CheckpointError, match=expected):
        _train(config, tmp_path / "run")


def test_a_run_from_before_data_was_recorded_goes_on(config: TrainConfig, tmp_path: Path) -> None:
    _train(config, tmp_path / "run")
    path = tmp_path / "run" / "run.json"
    content = json.loads(path.read_text())
    del content["data"]
    path.write_text(json.dumps(content))
    assert _train(config, tmp_path / "run").steps == 4
    other = replace(config, data=replace(config.data, name=str(tmp_path / "copy")))
    shutil.copytree(config.data.name, tmp_path / "copy")
    with pytest.raises(CheckpointError, match=r"config\.data\.name"):
        _train(other, tmp_path / "run")


def test_a_lower_rate_and_clipping_are_taken_on_resume(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = replace(config, schedule="step", warmup_steps=0)
    _stopped(config, tmp_path / "run", 3)
    calmer = replace(config, lr=config.lr / 4, clip_norm=1.0)
    result = _train(calmer, tmp_path / "run")
    assert result.steps == 4
    assert "goes on from step 2 with clip_norm 10.0 -> 1.0, lr 0.01 -> 0.0025" in caplog.text
    rates = _rates(tmp_path / "run")
    assert rates[2] / rates[3] == pytest.approx(4)
    kept = json.loads((tmp_path / "run" / "run.json").read_text())
    assert kept["changes"] == [{"step": 2, "clip_norm": [10.0, 1.0], "lr": [0.01, 0.0025]}]
    with pytest.raises(
        CheckpointError, match=r"config\.lr = 0\.0025, now it is 0\.01; .*--restart"
    ):
        _train(replace(calmer, lr=0.01), tmp_path / "run")


def test_a_finished_run_is_extended(
    config: TrainConfig, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    _train(config, folder)
    before = (folder / "model.pt").read_bytes()
    longer = replace(config, steps=6)
    _stopped(longer, folder, 5)
    assert _train(config, folder).steps == 4, "the old result stays until there is a new one"
    assert (folder / "model.pt").read_bytes() == before
    assert _train(longer, folder).steps == 6
    assert "goes on from step 4 with steps 4 -> 6" in caplog.text
    assert sorted(_rates(folder)) == [1, 2, 3, 4, 5, 6]
    assert (folder / "model.pt").read_bytes() != before
    _, loaded, result = load_run(folder)
    assert loaded.steps == 6
    assert result is not None
    assert result.steps == 6
    with pytest.raises(CheckpointError, match="has done 6 steps, more than the 4 asked for"):
        _train(config, folder)


def test_a_result_without_a_checkpoint_cannot_be_extended(
    config: TrainConfig, tmp_path: Path
) -> None:
    _train(config, tmp_path / "run")
    for path in (tmp_path / "run").glob("checkpoint*"):
        path.unlink()
    with pytest.raises(
        CheckpointError, match=r"result after 4 steps and no checkpoint .*--restart"
    ):
        _train(replace(config, steps=6), tmp_path / "run")


def test_the_advice_for_a_loss_that_is_not_finite_works(
    config: TrainConfig,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """A loss that explodes under the rate of the run, and not under the advised one."""
    step = Loop._step

    def explode(self: Loop, batch: list[object], rate: float) -> None:
        step(self, batch, rate)
        if self.step == 2 and self.config.lr > 0.005:
            self.logbook.window[-1]["loss"] = torch.tensor(float("nan"))

    monkeypatch.setattr(Loop, "_step", explode)
    save_config(config, tmp_path / "config.json")
    words = ["train", "--quiet", "--config", str(tmp_path / "config.json")]
    words += ["--out", str(tmp_path / "run")]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert "loss is nan at step 3; lower lr" in said
    assert "--restart" in said
    advice = said[said.index("--set") : said.index(" goes on")].split()
    assert advice == ["--set", "lr=0.0025", "--set", "clip_norm=5"]
    assert main([*words, *advice]) == 0
    assert sorted(_rates(tmp_path / "run")) == [1, 2, 3, 4]
    assert main([*words, "--restart", *advice]) == 0


def test_weights_that_are_not_finite_are_not_saved(
    config: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loss of a step is finite although the step itself breaks the weights."""
    step = Loop._step

    def break_weights(self: Loop, batch: list[object], rate: float) -> None:
        step(self, batch, rate)
        if self.step == 3 and self.config.lr > 0.005:
            next(self.model.parameters()).data.fill_(float("inf"))

    monkeypatch.setattr(Loop, "_step", break_weights)
    with pytest.raises(LossError, match=r"conv1\.weight is not finite after step 4; lower lr"):
        _train(config, tmp_path / "run")
    assert _train(replace(config, lr=0.0025), tmp_path / "run").steps == 4


def test_a_logbook_names_what_is_not_finite(tmp_path: Path) -> None:
    book = Logbook(None, 0, remedy="--set lr=1")
    book.refuse_weights({"a": torch.ones(2), "count": torch.tensor(3)}, 5)
    with pytest.raises(LossError, match=r"a is not finite after step 5; .*--set lr=1"):
        book.refuse_weights({"a": torch.tensor([1.0, float("nan")])}, 5)


def test_a_search_finds_its_data_by_content(config: TrainConfig, tmp_path: Path) -> None:
    search = SearchConfig(train=config)
    save_config(search, tmp_path / "config.json")
    elsewhere = replace(config, data=replace(config.data, name="elsewhere"))
    with pytest.raises(ConfigError, match=r"train\.data\.name"):
        check_same_search(tmp_path, replace(search, train=elsewhere))
    check_same_data(tmp_path, {"train_images": "a", "val_images": "b"})
    check_same_search(tmp_path, replace(search, train=elsewhere))
    check_same_data(tmp_path, {"train_images": "a", "val_images": "b"})
    with pytest.raises(ConfigError, match="on other data: val_images changed since"):
        check_same_data(tmp_path, {"train_images": "a", "val_images": "c"})
