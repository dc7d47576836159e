"""The settings of a serious run: its heads, norms, batch, average and what is told about them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn
from torchvision.models import ResNet50_Weights, resnet50
from torchvision.models.detection import fasterrcnn_resnet50_fpn

from fastcov_detection.config import ModelConfig, TrainConfig, preset, read_saved, to_dict
from fastcov_detection.data.mini import make_mini
from fastcov_detection.detector.build import build_model, count_cost, settle_norm
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.detector.modules import norm_groups
from fastcov_detection.detector.weights import load_start
from fastcov_detection.errors import ConfigError
from fastcov_detection.studies.detectors import (
    category_ids_by_label,
    evaluate_detector,
    export_run,
    open_detector,
)
from fastcov_detection.train.folder import load_run
from fastcov_detection.train.logbook import read_log
from fastcov_detection.train.loop import (
    WeightAverage,
    evaluation_steps,
    learning_rate,
    train,
    warn_of_recipe,
)


def test_the_scratch_preset_normalises_everything() -> None:
    config = replace(preset("coco-scratch").model, width_multiplier=0.25, fpn_channels=64)
    config = replace(config, box_head_width=64, box_conv_width=64, mask_head_width=64)
    model = build_model(replace(config, name="maskrcnn_resnet50_fpn"), num_classes=5)
    norms = {name for name, one in model.named_modules() if isinstance(one, nn.GroupNorm)}
    for part, count in (("backbone.body", 53), ("backbone.fpn", 8), ("roi_heads.box_head", 4)):
        assert sum(name.startswith(part) for name in norms) == count, part
    assert sum(name.startswith("roi_heads.mask_head") for name in norms) == 4
    assert not any(isinstance(one, nn.BatchNorm2d) for one in model.modules())
    assert all(one.requires_grad for one in model.parameters())
    assert count_cost(model, 64).macs > 0
    groups = width_groups(model, vary=("backbone", "fpn", "heads"))
    assert "box_convs" not in {group.name for group in groups}
    schedule = preset("coco-scratch")
    assert schedule.steps == 6 * preset("coco").steps
    assert not schedule.decay_vectors


@pytest.mark.parametrize(
    ("width", "groups"),
    [(64, 32), (256, 32), (2048, 32), (1000, 25), (104, 26), (48, 24), (16, 8), (41, 1), (1, 1)],
)
def test_groups_stay_near_32(width: int, groups: int) -> None:
    assert norm_groups(width) == groups
    assert width % groups == 0


def test_runs_of_before_keep_their_groups() -> None:
    """1000 channels had 8 groups then: weights mean something with those alone."""
    saved = to_dict(TrainConfig(model=ModelConfig(norm="group")))
    assert read_saved(saved).model.norm_groups == "nearest"
    del saved["model"]["norm_groups"]
    assert read_saved(saved).model.norm_groups == "common"
    assert norm_groups(1000, "common") == 8


def test_the_rate_follows_the_batch() -> None:
    config = preset("coco")
    for batch in (8, 16, 64):
        scaled = replace(config, batch_size=batch)
        assert learning_rate(scaled, 2000) == pytest.approx(0.02 * batch / 16)
    assert learning_rate(replace(config, lr_batch=None, batch_size=64), 2000) == 0.02
    with pytest.raises(ConfigError, match="lr_batch is 0"):
        learning_rate(replace(config, lr_batch=0), 0)


def test_evaluations_by_epochs() -> None:
    config = replace(TrainConfig(), batch_size=16)
    assert evaluation_steps(config, 118_287) == 0
    assert evaluation_steps(replace(config, evaluate_epochs=1.0), 118_287) == 7393
    assert evaluation_steps(replace(config, evaluate_epochs=1.0, evaluate_every=5), 100) == 5


COCO = replace(preset("coco"), model=settle_norm(preset("coco").model))


@pytest.mark.parametrize(
    ("config", "processes", "said"),
    [
        (COCO, 8, ["BatchNorm sees 2 images of a process at a time"]),
        (COCO, 1, []),
        (replace(COCO, accumulate=8), 1, ["BatchNorm sees 2 images"]),
        (replace(COCO, model=replace(COCO.model, init="imagenet")), 1, ["torchvision freezes it"]),
        (replace(preset("coco"), batch_size=64), 8, ["lr 0.02 is meant for 16 images a step; wit"]),
        (preset("coco-scratch"), 8, []),
    ],
)
def test_what_is_told_before_training(
    config: TrainConfig, processes: int, said: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    warn_of_recipe(config, nn.Linear(1, 1), processes)
    assert len(caplog.messages) == len(said)
    for line, expected in zip(caplog.messages, said, strict=True):
        assert expected in line


def test_unusual_groups_are_told(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_recipe(preset("coco-scratch"), nn.GroupNorm(norm_groups(1000), 1000), 8)
    assert "25 of 1000 channels" in caplog.text


def test_imagenet_freezes_as_torchvision_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """Which parameters of the detector are trained, norms included, from either start."""
    monkeypatch.setattr("fastcov_detection.detector.build.initialise_backbone", lambda *_: None)
    monkeypatch.setattr("torchvision._internally_replaced_utils.load_state_dict_from_url", dict)
    monkeypatch.setattr(ResNet50_Weights, "get_state_dict", lambda *_, **__: _resnet50())
    for init, weights in (("imagenet", ResNet50_Weights.DEFAULT), ("random", None)):
        config = replace(preset("coco").model, init=init)
        assert config.norm == "auto"
        model = build_model(config, num_classes=3)
        stock = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=weights, num_classes=3)
        expected = {name for name, one in stock.named_parameters() if one.requires_grad}
        assert {name for name, one in model.named_parameters() if one.requires_grad} == expected
        assert model.state_dict().keys() == stock.state_dict().keys()
    assert model.config.norm == "batch", "what auto stood for is kept"


def _resnet50() -> dict[str, torch.Tensor]:
    return resnet50(weights=None).state_dict()


def test_parts_of_a_batch_add_up_to_its_gradient(
    tiny_run: TrainConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two parts with the same two images, all of whose regions count: the mean is the same."""
    taken: list[list[torch.Tensor]] = []

    def keep(optimizer: torch.optim.Optimizer) -> None:
        parameters = [one for group in optimizer.param_groups for one in group["params"]]
        taken.append([one.grad.clone() for one in parameters])

    monkeypatch.setattr(torch.optim.SGD, "step", keep)
    look = replace(tiny_run.data.mini, train=2, val=2)
    root = make_mini(tmp_path / "two", look, progress=False)
    data = replace(tiny_run.data, mini=look, root=str(root))
    model = replace(tiny_run.model, norm="frozen", rpn_batch=10_000, roi_batch=10_000)
    config = replace(tiny_run, model=model, data=data, steps=1, track="none", clip_norm=None)
    for accumulate in (1, 2):
        folder = tmp_path / str(accumulate)
        train(replace(config, accumulate=accumulate), run_dir=folder, progress=False)
    whole, parts = taken
    largest = max(float(one.abs().max()) for one in whole)
    assert largest > 0
    for one, other in zip(whole, parts, strict=True):
        torch.testing.assert_close(other, one, rtol=0, atol=1e-6 * largest)
    with pytest.raises(ConfigError, match="batch_size is 4 and accumulate 3; choose a batch"):
        train(replace(tiny_run, accumulate=3), run_dir=tmp_path / "3", progress=False)


def test_an_average_follows_the_weights() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    average = WeightAverage(model, 0.5)
    expected = model[0].weight.detach().clone()
    for step in range(12):
        with torch.no_grad():
            model[0].weight += 1
        model(torch.rand(4, 2))
        average.update(model, step)
        decay = min(0.5, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * model[0].weight.detach()
    torch.testing.assert_close(average.model[0].weight, expected)
    assert average.model[1].num_batches_tracked == 12
    with pytest.raises(ValueError, match="ema is 1"):
        WeightAverage(model, 1.0)


@pytest.fixture(scope="module")
def scratch_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("scratch") / "run"


@pytest.fixture
def scratch(scratch_run: Path, tiny_mask_run: TrainConfig) -> Path:
    """A finished Mask R-CNN of the scratch recipe, averaged, evaluated on the way."""
    if not scratch_run.exists():
        model = replace(
            tiny_mask_run.model,
            norm="group",
            fpn_norm=True,
            head_norm=True,
            box_head="4conv1fc",
            box_conv_width=12,
        )
        config = replace(
            tiny_mask_run, model=model, ema=0.9, evaluate_every=2, track="none", accumulate=2
        )
        train(config, {"layer3": 20}, run_dir=scratch_run, progress=False)
    return scratch_run


def test_the_best_weights_and_all_numbers_are_kept(scratch: Path) -> None:
    model, _, result = load_run(scratch)
    assert result is not None
    assert len(result.numbers) == 24
    assert result.numbers["ap"] == pytest.approx(result.ap)
    assert set(result.classes) == {"ap", "segm_ap"}
    assert list(result.classes["segm_ap"]) == [str(digit) for digit in range(10)]
    scores = {e["step"]: e["ap"] for e in read_log(scratch) if e["kind"] == "eval"}
    assert list(scores) == [2, 4, 6]
    assert result.best is not None
    assert result.best["ap"] == max(scores.values()) == scores[result.best["step"]]
    best, _, _ = load_run(scratch, best=True)
    assert best.state_dict().keys() == model.state_dict().keys()
    assert (scratch / "predictions.segm.json").exists()
    assert not any("masks" in one for one in json.loads((scratch / "run.json").read_text()))


def test_an_export_of_the_scratch_recipe_finds_the_same(scratch: Path, tmp_path: Path) -> None:
    folder = export_run(scratch, tmp_path / "out")
    spec = json.loads((folder / "model.json").read_text())
    assert spec["category_ids"] == [None, *range(10)] or spec["category_ids"][0] is None
    assert len(spec["category_ids"]) == len(spec["classes"]) == 11
    model, config, result = load_run(scratch)
    rebuilt = open_detector(str(folder)).model
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        expected, found = model([image])[0], rebuilt([image])[0]
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor)
    _, (scripted, *_) = torch.jit.script(rebuilt)([image])
    for name, tensor in expected.items():
        torch.testing.assert_close(scripted[name], tensor)
    again = evaluate_detector(
        str(folder), tmp_path / "scores", data=config.data, batch_size=3, progress=False
    )
    assert result is not None
    assert again.numbers["segm_ap"] == pytest.approx(result.segm_ap)
    content = json.loads((tmp_path / "scores" / "evaluation.json").read_text())
    assert content["numbers"] == again.numbers


def test_a_detector_of_91_classes_starts_one_of_80(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    torch.manual_seed(0)
    stock = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None, num_classes=91)
    torch.save(stock.state_dict(), tmp_path / "stock.pth")
    names = ["zebra", "person", "dragon"]
    model = build_model(ModelConfig(), num_classes=4)
    fresh = model.roi_heads.box_predictor.bbox_pred.weight.detach().clone()
    load_start(model, tmp_path / "stock.pth", names)
    heads, theirs = model.roi_heads.box_predictor, stock.roi_heads.box_predictor
    for ours, source in ((0, 0), (1, 24), (2, 1)):  # background, zebra, person
        assert torch.equal(heads.cls_score.weight[ours], theirs.cls_score.weight[source])
        rows, wanted = slice(4 * ours, 4 * ours + 4), slice(4 * source, 4 * source + 4)
        assert torch.equal(heads.bbox_pred.weight[rows], theirs.bbox_pred.weight[wanted])
    assert torch.equal(heads.bbox_pred.weight[12:], fresh[12:])
    assert (
        "heads of 91 classes, this detector of 4: 2 of 3 classes are taken by name" in caplog.text
    )
    body = model.backbone.body
    assert torch.equal(body.layer1[0].conv1.weight, stock.backbone.body.layer1[0].conv1.weight)
    load_start(build_model(ModelConfig(), num_classes=3), tmp_path / "stock.pth", ["a", "b"])
    assert "the class heads start anew" in caplog.text


def test_labels_are_matched_by_name(caplog: pytest.LogCaptureFixture) -> None:
    labels = {1: "person", 17: "cat", 3: "N/A"}
    assert category_ids_by_label(labels, {5: "cat", 9: "unicorn"}) == {17: 5}
    assert "does not know 1 of 2 classes, which score 0: unicorn" in caplog.text
    with pytest.raises(ValueError, match="no class has the same name"):
        category_ids_by_label(labels, {1: "unicorn"})


def test_a_detector_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"did you mean 'fasterrcnn_resnet50_fpn'"):
        open_detector("fasterrcnn_resnet50_fnp")


def test_a_detector_of_torchvision_is_scored(tiny_root: Path, tmp_path: Path) -> None:
    """No class of digits has a name of COCO's, which is said before any image is read."""
    name = "fasterrcnn_mobilenet_v3_large_320_fpn"
    from torchvision.models import get_model

    torch.manual_seed(0)
    model = get_model(name, weights=None, weights_backbone=None)
    torch.save(model.state_dict(), tmp_path / "a.pth")
    annotations = json.loads((tiny_root / "annotations/instances_val2017.json").read_text())
    annotations["categories"][3]["name"] = "zebra"
    (tmp_path / "val.json").write_text(json.dumps(annotations))
    from fastcov_detection.config import DataConfig

    data = DataConfig(
        name="digits",
        train_images=str(tiny_root / "val2017"),
        train_annotations=str(tmp_path / "val.json"),
        val_images=str(tiny_root / "val2017"),
        val_annotations=str(tmp_path / "val.json"),
    )
    found = evaluate_detector(
        name, tmp_path / "out", data=data, weights=tmp_path / "a.pth", progress=False
    )
    assert found.ap < 0.2
    ids = {one["category_id"] for one in found.detections}
    assert ids <= {annotations["categories"][3]["id"]}
