"""Pretraining a backbone on single objects, and starting a detector from it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torchvision
from torch import Tensor, nn

from fastcov_detection import cli
from fastcov_detection.config import TrainConfig, save_config
from fastcov_detection.data.dataset import CocoDataset, Draw, mix_seed
from fastcov_detection.detector.build import build_model, default_widths
from fastcov_detection.detector.weights import read_state
from fastcov_detection.errors import CheckpointError, ConfigError, DataError
from fastcov_detection.studies import pretrain
from fastcov_detection.studies.pretrain import ObjectCrops, PretrainConfig, build_classifier
from fastcov_detection.train.logbook import read_log
from fastcov_detection.train.loop import Loop, train

MEAN = torch.tensor([0.485, 0.456, 0.406])
STD = torch.tensor([0.229, 0.224, 0.225])


@pytest.fixture
def config(tiny_run: TrainConfig) -> PretrainConfig:
    """Six steps of eight crops."""
    return PretrainConfig(train=tiny_run, objects=8, crop=32)


@pytest.fixture
def one_object(coco_folder: Callable[..., Path]) -> CocoDataset:
    """The second image's grey pixels with a white object of 8 x 4 pixels, and a crowd."""
    box, crowd = [10, 12, 8, 4], [0, 0, 20, 20]
    root = coco_folder(
        [
            {"id": 1, "image_id": 2, "category_id": 5, "bbox": box, "area": 32, "iscrowd": 0},
            {"id": 2, "image_id": 2, "category_id": 1, "bbox": crowd, "area": 400, "iscrowd": 1},
        ]
    )
    dataset = CocoDataset(
        root / "train2017", root / "annotations" / "instances_train2017.json", with_masks=False
    )
    read = dataset.read

    def painted(index: int) -> tuple[Tensor, dict[str, object]]:
        image, target = read(index)
        image[:, 12:16, 10:18] = 255
        return image, target

    dataset.read = painted
    return dataset


def _pixels(crop: Tensor) -> Tensor:
    """A crop's values in [0, 1]."""
    return crop * STD[:, None, None] + MEAN[:, None, None]


def test_a_validation_crop_holds_its_object_in_the_middle(one_object: CocoDataset) -> None:
    crops = ObjectCrops(one_object, 32, (1.0, 3.0), varies=False)
    assert len(crops) == 1, "the crowd is not an object"
    crop, label = crops[0]
    assert label == 1, "the second category, counted from 0"
    # 8 x 4 pixels of 16 x 16, in the middle of 32 x 32.
    is_white = _pixels(crop)[0] > 0.5
    assert is_white.sum() == 16 * 8
    assert is_white[12:20, 8:24].all()


def test_a_training_crop_holds_its_whole_object_wherever_it_lies(one_object: CocoDataset) -> None:
    crops = ObjectCrops(one_object, 64, (1.5, 1.5))
    drawn = [_pixels(crops[Draw(0, mix_seed(7, k))][0]) for k in range(40)]
    # 8 x 4 of 12 x 12 pixels at 64 x 64; resampling blurs the edges.
    areas = torch.tensor([float((one[0] > 0.5).sum()) for one in drawn])
    assert ((areas / 64**2 - 32 / 144).abs() < 0.02).all()
    centres = [(one[0] > 0.5).nonzero().float().mean(dim=0) for one in drawn]
    spread = torch.stack(centres).std(dim=0)
    assert (spread > 3).all(), "the object lies anywhere inside"
    assert torch.equal(crops[Draw(0, 9)][0], crops[Draw(0, 9)][0])


def test_mirrored_crops(one_object: CocoDataset) -> None:
    plain = ObjectCrops(one_object, 32, (2.0, 2.0))
    mirrored = ObjectCrops(one_object, 32, (2.0, 2.0), hflip=1.0)
    for seed in range(5):
        torch.testing.assert_close(
            mirrored[Draw(0, seed)][0], plain[Draw(0, seed)][0].flip(2), rtol=0, atol=0
        )


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_the_classifier_of_stock_widths_is_torchvisions_resnet(
    tiny_run: TrainConfig, norm: str
) -> None:
    model = replace(tiny_run.model, width_multiplier=1.0, norm=norm)
    ours = build_classifier(replace(tiny_run, model=model), default_widths(model), 10)
    layer = None if norm == "batch" else lambda width: nn.GroupNorm(32, width)
    stock = torchvision.models.resnet18(weights=None, num_classes=10, norm_layer=layer)
    stock.load_state_dict(ours.state_dict())
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(ours.eval()(images), stock.eval()(images))


def test_a_classifier_learns_and_a_detector_starts_from_it(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    longer = replace(config.train, steps=40, lr=0.05, log_every=5)
    save_config(longer, tmp_path / "asked.json")
    words = ["--quiet", "--config", str(tmp_path / "asked.json")]
    pre = tmp_path / "pre"
    asked = ["pretrain", *words, "--objects", "8", "--crop", "32", "--out", str(pre)]
    assert cli.main(asked) == 0
    said = capsys.readouterr().out
    assert f"train --init {pre}" in said
    losses = [entry["loss"] for entry in read_log(pre) if entry["kind"] == "train"]
    assert losses[-1] < 0.8 * losses[0]
    content = json.loads((pre / "pretrain.json").read_text())
    assert 0 <= content["result"]["accuracy"] <= 1
    assert content["result"]["train_objects"] > 12
    assert content["pretrain"] == {"objects": 8, "crop": 32, "context": [1.0, 2.0]}

    assert cli.main(asked) == 0, "a finished run is returned at once"
    assert capsys.readouterr().out == said

    state = read_state(pre / "model.pt")
    body = build_model(replace(longer.model, init=str(pre)), num_classes=11).backbone.body
    for name, tensor in body.state_dict().items():
        assert torch.equal(tensor, state[name]), name
    runs = [tmp_path / "scratch", tmp_path / "pretrained"]
    for run, init in zip(runs, ("random", str(pre)), strict=True):
        tuned = [*words, "--set", "steps=4", "--init", init, "--out", str(run)]
        assert cli.main(["train", *tuned]) == 0
    assert cli.main(["compare", *map(str, runs), "--out", str(tmp_path / "both")]) == 0
    found = json.loads((tmp_path / "both" / "comparison.json").read_text())
    assert (found["a"], found["b"]) == ("scratch", "pretrained")
    # Every convolution: 20 of the ResNet, two for each of four levels of the pyramid.
    assert len(found["layers"]) == 28
    assert all(layer["steps_a"] == [2, 4] for layer in found["layers"].values())
    # The classifier's own layers, all of the ResNet's, stand beside a detector's.
    assert cli.main(["compare", str(pre), str(runs[0]), "--out", str(tmp_path / "tasks")]) == 0
    shared = json.loads((tmp_path / "tasks" / "comparison.json").read_text())["layers"]
    assert len(shared) == 20
    assert shared["body.conv1"]["steps_a"][-1] == 40


def test_classifiers_and_detectors_are_families(
    config: PretrainConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    short = replace(config, train=replace(config.train, steps=2, snapshot_every=1))
    folders = [tmp_path / kind / f"seed{n}" for kind in ("classifier", "detector") for n in (0, 1)]
    for seed in (0, 1):
        pretrain.pretrain(short, run_dir=folders[seed], seed=seed, progress=False)
        train(short.train, run_dir=folders[2 + seed], seed=seed, progress=False)
    words = ["--a", *map(str, folders[:2]), "--b", *map(str, folders[2:])]
    assert cli.main(["families", *words, "--out", str(tmp_path / "found")]) == 0
    assert re.search(
        r"classifier: accuracy 0\.\d+ .*; detector: AP 0\.\d+", capsys.readouterr().out
    )
    layers = json.loads((tmp_path / "found" / "families.json").read_text())["layers"]
    assert len(layers) == 20
    assert next(one["ceiling"] for one in layers if one["name"] == "body.conv1") == 8


def test_a_stopped_pretraining_goes_on_to_the_same_losses(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = pretrain.pretrain(config, run_dir=tmp_path / "whole", seed=4, progress=False)
    step = Loop._step

    def interrupted(self: Loop, *batch: object) -> None:
        if self.step == 4:
            raise KeyboardInterrupt
        step(self, *batch)

    monkeypatch.setattr(Loop, "_step", interrupted)
    with pytest.raises(KeyboardInterrupt):
        pretrain.pretrain(config, run_dir=tmp_path / "parts", seed=4, progress=False)
    monkeypatch.undo()
    resumed = pretrain.pretrain(config, run_dir=tmp_path / "parts", seed=4, progress=False)
    one, two = (
        [(e["step"], e["loss"]) for e in read_log(tmp_path / name)] for name in ("whole", "parts")
    )
    assert one == two
    assert len(one) == 7
    assert (resumed.accuracy, resumed.loss) == (whole.accuracy, whole.loss)


def test_a_folder_of_something_else_is_refused(config: PretrainConfig, tmp_path: Path) -> None:
    run = tmp_path / "pre"
    short = replace(config, train=replace(config.train, steps=1))
    pretrain.pretrain(short, run_dir=run, progress=False)
    with pytest.raises(CheckpointError, match=r"with pretrain\.crop = 32, now it is 40"):
        pretrain.pretrain(replace(short, crop=40), run_dir=run, progress=False)
    with pytest.raises(CheckpointError, match="with seed = 0, now it is 1"):
        pretrain.pretrain(short, run_dir=run, seed=1, progress=False)
    (run / "pretrain.json").write_text("{}")
    with pytest.raises(ConfigError, match=r"pretrain\.json is not a run's result"):
        pretrain.pretrain(short, run_dir=run, progress=False)
    assert pretrain.pretrain(short, run_dir=run, resume=False, progress=False).steps == 1
    (run / "classes.json").write_text("[]")
    with pytest.raises(CheckpointError, match="holds a detector's training"):
        pretrain.pretrain(short, run_dir=run, progress=False)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"objects": 0}, "objects is 0; a step needs at least 1 crop"),
        ({"crop": 16}, "a ResNet needs at least 32 pixels"),
        ({"context": (0.5, 1.0)}, "a crop no less than its object"),
        ({"context": (2.0, 1.0)}, "2.0 to 1.0 times their object"),
    ],
)
def test_impossible_crops(
    config: PretrainConfig, tmp_path: Path, change: dict[str, object], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        pretrain.pretrain(replace(config, **change), run_dir=tmp_path / "run", progress=False)
    assert not (tmp_path / "run").exists()


def test_impossible_runs(
    config: PretrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    frozen = replace(config.train, model=replace(config.train.model, norm="frozen"))
    with pytest.raises(ConfigError, match=r"model\.norm is 'frozen'"):
        pretrain.pretrain(replace(config, train=frozen), run_dir=tmp_path, progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="start it without torchrun"):
        pretrain.pretrain(config, run_dir=tmp_path, progress=False)


def test_data_without_objects_is_refused(coco_folder: Callable[..., Path]) -> None:
    root = coco_folder([])
    dataset = CocoDataset(root / "val2017", root / "annotations" / "instances_val2017.json")
    with pytest.raises(DataError, match="no object that is not a crowd"):
        ObjectCrops(dataset, 32, (1.0, 2.0))
