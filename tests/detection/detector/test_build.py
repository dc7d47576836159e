from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from urllib.error import URLError

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._api import WeightsEnum
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.ops.misc import FrozenBatchNorm2d

from fastcov_detection.config import ModelConfig
from fastcov_detection.detector.build import (
    build_model,
    check_widths,
    default_widths,
    load_widths,
    save_widths,
)
from fastcov_detection.detector.modules import build_resnet, norm_layer, stock_widths
from fastcov_detection.errors import ConfigError, WidthsError


def _randomise_norms(module: nn.Module) -> None:
    """Norms that do something, and differ from channel to channel."""
    for norm in module.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.1)
            norm.running_mean.normal_(std=0.1)
            norm.running_var.uniform_(0.5, 1.5)


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn"])
def test_stock_widths_give_torchvisions_output_bitwise(kind: str) -> None:
    torch.manual_seed(0)
    name = f"{kind}_resnet50_fpn"
    stock = getattr(torchvision.models.detection, name)(
        weights=None, weights_backbone=None, num_classes=5
    )
    _randomise_norms(stock)
    ours = build_model(ModelConfig(name=name, num_classes=5))
    ours.load_state_dict(stock.state_dict())
    for model in (stock, ours):
        model.eval()
        model.transform.min_size, model.transform.max_size = (96,), 128
    images = [torch.rand(3, 50, 60), torch.rand(3, 64, 40)]
    with torch.no_grad():
        expected, found = stock(images), ours(images)
    assert sum(len(one["boxes"]) for one in expected) > 0
    for one, other in zip(expected, found, strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_stock_losses_are_torchvisions_bitwise() -> None:
    torch.manual_seed(0)
    stock = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None, num_classes=3
    )
    ours = build_model(ModelConfig(num_classes=3))
    ours.load_state_dict(stock.state_dict())
    images = [torch.rand(3, 64, 64)]
    targets = [{"boxes": torch.tensor([[8.0, 8, 40, 48]]), "labels": torch.tensor([1])}]
    losses = []
    for model in (stock, ours):
        model.transform.min_size = (64,)
        torch.manual_seed(1)
        losses.append(model(images, targets))
    assert losses[0].keys() == losses[1].keys()
    assert all(torch.equal(losses[0][key], losses[1][key]) for key in losses[0])


@pytest.mark.parametrize("depth", [18, 34, 50, 101, 152])
def test_every_depth_is_torchvisions_resnet(depth: int) -> None:
    torch.manual_seed(0)
    stock = getattr(torchvision.models, f"resnet{depth}")(weights=None)
    _randomise_norms(stock)
    stock.avgpool, stock.fc = nn.Identity(), nn.Identity()
    ours = build_resnet(depth, stock_widths(depth), norm_layer("batch"))
    ours.load_state_dict(stock.state_dict())
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(stock.eval()(image), ours.eval()(image).flatten(1))


def test_initial_weights_have_torchvisions_spread() -> None:
    torch.manual_seed(0)
    ours = build_resnet(18, stock_widths(18), norm_layer("batch"))
    weight = ours.layer3[0].conv2.weight
    assert weight.std().item() == pytest.approx(math.sqrt(2 / (256 * 9)), rel=0.02)


@pytest.mark.parametrize("depth", [18, 50])
def test_any_widths_run_and_have_the_asked_shapes(depth: int) -> None:
    draw = torch.Generator().manual_seed(depth)
    widths = {name: int(torch.randint(3, 20, (1,), generator=draw)) for name in stock_widths(depth)}
    resnet = build_resnet(depth, widths, norm_layer("group"))
    features = torch.randn(2, 3, 64, 64)
    for name, child in resnet.named_children():
        features = child(features)
        if name in widths:
            assert features.shape[1] == widths[name]
    first = resnet.layer2[0]
    assert first.conv1.out_channels == widths["layer2.0.inner1"]
    if depth == 50:
        assert first.conv2.out_channels == widths["layer2.0.inner2"]


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("batch", nn.BatchNorm2d),
        ("sync", nn.SyncBatchNorm),
        ("group", nn.GroupNorm),
        ("frozen", FrozenBatchNorm2d),
    ],
)
def test_norms(tiny_model: ModelConfig, kind: str, expected: type[nn.Module]) -> None:
    model = build_model(replace(tiny_model, norm=kind), {"layer2": 12}, num_classes=3)
    norms = [module for module in model.modules() if isinstance(module, expected)]
    assert len(norms) == 20
    if kind == "group":
        block = model.backbone.body.layer2[0]
        assert block.bn2.num_groups == 6, "two channels a group"
    losses = model.train()(
        [torch.rand(3, 64, 64)],
        [{"boxes": torch.tensor([[8.0, 8, 40, 48]]), "labels": torch.tensor([1])}],
    )
    sum(losses.values()).backward()
    trained = [n for n, p in model.named_parameters() if p.grad is not None and "bn1" in n]
    assert bool(trained) == (kind != "frozen")
    with pytest.raises(ValueError, match="unknown norm 'layer'"):
        norm_layer("layer")


@pytest.mark.parametrize("depth", [18, 50])
def test_a_zero_last_norm_makes_blocks_the_identity(depth: int) -> None:
    widths = stock_widths(depth, 0.125)
    resnet = build_resnet(depth, widths, norm_layer("batch"), zero_init_last_norm=True)
    features = torch.rand(1, widths["layer1"], 8, 8)
    block = resnet.layer1[1].eval()
    assert torch.equal(block(features), features)
    plain = build_resnet(depth, widths, norm_layer("batch"))
    assert not torch.equal(plain.layer1[1].eval()(features), features)


def test_the_configuration_reaches_the_detector() -> None:
    config = ModelConfig(
        name="maskrcnn_resnet18_fpn",
        width_multiplier=0.25,
        train_sizes=(64, 80),
        min_size=96,
        rpn_batch=7,
        roi_batch=9,
        rpn_post_nms_test=11,
        roi_canonical_scale=64,
        detections_per_image=3,
        trainable_layers=2,
    )
    model = build_model(config, {"fpn": 24, "box_head": 40, "mask_head": 12}, num_classes=4)
    assert isinstance(model, MaskRCNN)
    assert model.transform.min_size == (64, 80, 96)
    assert model.rpn.fg_bg_sampler.batch_size_per_image == 7
    assert model.rpn._post_nms_top_n["testing"] == 11
    assert model.roi_heads.fg_bg_sampler.batch_size_per_image == 9
    assert model.roi_heads.box_roi_pool.canonical_scale == 64
    assert model.roi_heads.mask_predictor.mask_fcn_logits.out_channels == 4
    assert model.roi_heads.box_head.fc7.out_features == 40
    assert model.widths == default_widths(config) | {"fpn": 24, "box_head": 40, "mask_head": 12}
    assert model.config.num_classes == 4
    frozen = {n.split(".")[2] for n, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"conv1", "bn1", "layer1", "layer2"}
    assert not isinstance(
        build_model(ModelConfig(name="fasterrcnn_resnet18_fpn"), num_classes=2), MaskRCNN
    )


@pytest.mark.parametrize("trainable", [-1, 6])
def test_impossible_settings(tiny_model: ModelConfig, trainable: int) -> None:
    with pytest.raises(ConfigError, match=f"trainable_layers is {trainable}"):
        build_model(replace(tiny_model, trainable_layers=trainable), num_classes=3)
    with pytest.raises(ConfigError, match="num_classes is None"):
        build_model(tiny_model)
    with pytest.raises(ValueError, match="no ResNet of depth 51"):
        stock_widths(51)


def test_widths_of_another_detector_are_refused(tiny_model: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "widths.json"
    save_widths(default_widths(ModelConfig()), path)
    with pytest.raises(WidthsError, match=r"fasterrcnn_resnet18_fpn has no width group 'stem'"):
        build_model(tiny_model, load_widths(path), num_classes=3)
    with pytest.raises(WidthsError, match=r"'layer1\.0\.iner1'.*did you mean 'layer1\.0\.inner1'"):
        check_widths(tiny_model, {"layer1.0.iner1": 8})
    for width in (0, -8, 8.0, True):
        with pytest.raises(WidthsError, match="width of layer1 is"):
            check_widths(tiny_model, {"layer1": width})


@pytest.mark.parametrize("content", ["{", "[8]", '{"layer1": "wide"}'])
def test_a_bad_widths_file_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "w.json").write_text(content)
    with pytest.raises(WidthsError, match=r"w\.json"):
        load_widths(tmp_path / "w.json")
    with pytest.raises(WidthsError, match="no widths file at"):
        load_widths(tmp_path / "absent.json")


def test_a_backbone_starts_from_a_classifier_or_another_detector(
    tiny_model: ModelConfig, tmp_path: Path
) -> None:
    classifier = torchvision.models.resnet18(weights=None)
    torch.save(classifier.state_dict(), tmp_path / "resnet18.pth")
    wide = replace(tiny_model, width_multiplier=1.0, init=str(tmp_path / "resnet18.pth"))
    first = build_model(wide, num_classes=3)
    assert torch.equal(
        first.backbone.body.layer4[1].conv2.weight, classifier.layer4[1].conv2.weight
    )
    (tmp_path / "run").mkdir()
    torch.save(first.state_dict(), tmp_path / "run" / "model.pt")
    for norm in ("batch", "frozen"):
        again = build_model(replace(wide, init=str(tmp_path / "run"), norm=norm), num_classes=7)
        assert torch.equal(again.backbone.body.conv1.weight, classifier.conv1.weight)
    with pytest.raises(ConfigError, match="weights fit only a model of the same widths"):
        build_model(replace(wide, width_multiplier=0.5), num_classes=3)
    with pytest.raises(ConfigError, match=r"lacks 80 of 216 tensors.* depth and norm"):
        build_model(replace(wide, name="fasterrcnn_resnet34_fpn"), num_classes=3)


@pytest.mark.parametrize("norm", ["batch", "group"])
def test_weights_of_another_norm_or_depth_are_refused(
    tiny_model: ModelConfig, tmp_path: Path, norm: str
) -> None:
    """Nothing of a file is dropped without a word."""
    wide = replace(tiny_model, width_multiplier=1.0, norm=norm)
    torch.save(build_model(wide, num_classes=3).state_dict(), tmp_path / "own.pth")
    other = replace(wide, norm="group" if norm == "batch" else "batch")
    given = replace(other, init=str(tmp_path / "own.pth"))
    expected = {
        "batch": r"own\.pth has 40 tensors .*first is bn1\.running_mean; these are weights of",
        "group": r"own\.pth lacks 40 of 120 tensors, the first is bn1\.running_mean; depth",
    }
    with pytest.raises(ConfigError, match=expected[norm]):
        build_model(given, num_classes=3)
    deeper = torchvision.models.resnet34(
        weights=None, norm_layer=None if norm == "batch" else norm_layer("group")
    )
    torch.save(deeper.state_dict(), tmp_path / "deeper.pth")
    with pytest.raises(ConfigError, match=r"first is layer1\.2\.conv1\.weight; depth and norm"):
        build_model(replace(wide, init=str(tmp_path / "deeper.pth")), num_classes=3)


def test_imagenet_weights_for_a_group_norm_are_not_fetched(tiny_model: ModelConfig) -> None:
    config = replace(tiny_model, norm="group", init="imagenet")
    with pytest.raises(ConfigError, match=r"are of a BatchNorm, model\.norm is 'group'"):
        build_model(config, num_classes=3)


def test_weights_that_cannot_be_read_are_named(tiny_model: ModelConfig, tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    config = replace(tiny_model, init=str(path))
    with pytest.raises(ConfigError, match=r"no weights at .*weights\.pth"):
        build_model(config, num_classes=3)
    torch.save({"a": torch.ones(3)}, path)
    with pytest.raises(ConfigError, match=r"holds no ResNet"):
        build_model(config, num_classes=3)
    torch.save([1, 2], path)
    with pytest.raises(ConfigError, match="does not hold a state_dict"):
        build_model(config, num_classes=3)
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ConfigError, match="cannot read weights from"):
        build_model(config, num_classes=3)


def test_imagenet_weights_that_cannot_be_fetched(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(WeightsEnum, "get_state_dict", offline)
    with pytest.raises(ConfigError, match=r"torchvision's ResNet18_Weights.* as --init"):
        build_model(replace(tiny_model, init="imagenet"), num_classes=3)


def test_imagenet_weights_are_loaded_where_they_are(
    tiny_model: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stock = torchvision.models.resnet18(weights=None)
    monkeypatch.setattr(WeightsEnum, "get_state_dict", lambda *_, **__: stock.state_dict())
    config = replace(tiny_model, init="imagenet", width_multiplier=1.0)
    model = build_model(config, num_classes=3)
    assert torch.equal(model.backbone.body.conv1.weight, stock.conv1.weight)
    assert isinstance(model, FasterRCNN)
