from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torchvision
from torch import nn

from fastcov_detection.config import ModelConfig, preset
from fastcov_detection.detector.build import Cost, Costs, build_model, count_cost
from fastcov_detection.detector.groups import width_groups


def _counted_by_hooks(model: nn.Module, image_size: int, boxes: int, masks: int) -> int:
    """Another way to the same number: multiply-accumulates of every layer that really runs."""
    macs = 0

    def count(layer: nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        nonlocal macs
        if isinstance(layer, nn.Linear):
            macs += layer.in_features * output.numel()
        elif isinstance(layer, nn.ConvTranspose2d):
            macs += layer.weight[0].numel() * inputs[0].numel()
        else:
            macs += layer.weight[0].numel() * output.numel()

    layers = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
    hooks = [m.register_forward_hook(count) for m in model.modules() if isinstance(m, layers)]
    heads = model.roi_heads
    with torch.no_grad():
        features = list(model.backbone(torch.zeros(1, 3, image_size, image_size)).values())
        model.rpn.head(features)
        channels = features[0].shape[1]
        heads.box_predictor(heads.box_head(torch.zeros(boxes, channels, 7, 7)))
        if heads.has_mask():
            heads.mask_predictor(heads.mask_head(torch.zeros(masks, channels, 14, 14)))
    for hook in hooks:
        hook.remove()
    return macs


@pytest.mark.parametrize("kind", ["fasterrcnn", "maskrcnn"])
def test_macs_are_those_of_the_layers_that_run(tiny_model: ModelConfig, kind: str) -> None:
    config = replace(tiny_model, name=f"{kind}_resnet18_fpn", num_classes=4)
    model = build_model(config, {"layer2": 24, "layer3.1.inner1": 10})
    cost = count_cost(model, 64)
    assert cost.macs == _counted_by_hooks(model.eval(), 64, boxes=10, masks=5)
    assert cost.params == sum(p.numel() for p in model.parameters())
    assert cost.backbone_params == sum(p.numel() for p in model.backbone.body.parameters())


@pytest.mark.parametrize("norm", ["batch", "group", "frozen"])
def test_the_cost_is_known_without_building(tiny_model: ModelConfig, norm: str) -> None:
    config = replace(tiny_model, num_classes=4, norm=norm, init="imagenet")
    widths = {"layer3": 20}
    built = count_cost(build_model(replace(config, init="random"), widths), (64, 96))
    assert Costs(config, (64, 96))(widths) == built


def test_stock_figures() -> None:
    """ResNet-50 without classifier: 25 557 032 parameters less 2 049 000 of the classifier."""
    config = ModelConfig(num_classes=91)
    cost = Costs(config, 800)(None)
    assert cost.backbone_params == 23_508_032
    stock = torchvision.models.detection.fasterrcnn_resnet50_fpn(
        weights=None, weights_backbone=None
    )
    assert cost.params == sum(p.numel() for p in stock.parameters())
    fewer = Costs(replace(config, rpn_post_nms_test=100), 800)(None)
    head = (256 * 49 * 1024 + 1024 * 1024 + 1024 * 91 * 5) * 900
    assert cost.macs - fewer.macs == head
    more = Costs(replace(config, rpn_post_nms_test=2000), 800)(None)
    assert more == cost


def test_the_preset_is_the_network_that_was_measured() -> None:
    cost = Costs(replace(preset("mini").model, num_classes=11), 96)(None)
    assert cost == Cost(params=2_153_105, backbone_params=1_480_976, macs=133_689_728)


def test_wider_costs_more(tiny_model: ModelConfig) -> None:
    config = replace(tiny_model, num_classes=3)
    base = Costs(config, 64)(None)
    for group in width_groups(build_model(config), vary=("backbone", "fpn", "heads")):
        wider = Costs(config, 64)({group.name: group.width + 8})
        assert wider.macs > base.macs
        assert wider.params > base.params


def test_counting_leaves_the_model_as_it_was(tiny_model: ModelConfig) -> None:
    model = build_model(tiny_model, num_classes=3).train()
    model.backbone.body.bn1.eval()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    count_cost(model, 64)
    assert model.training
    assert not model.backbone.body.bn1.training
    assert all(torch.equal(before[name], t) for name, t in model.state_dict().items())
    assert {p.device.type for p in model.parameters()} == {"cpu"}


def test_images_are_padded_as_the_detector_pads_them(tiny_model: ModelConfig) -> None:
    config = replace(tiny_model, num_classes=3)
    assert Costs(config, (65, 96))(None) == Costs(config, 96)(None)
