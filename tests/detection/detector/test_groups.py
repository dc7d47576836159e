from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from fastcov_detection.config import ModelConfig
from fastcov_detection.detector.build import build_model, default_widths
from fastcov_detection.detector.groups import part_of, width_groups

NARROW = {"fpn_channels": 8, "box_head_width": 8, "mask_head_width": 8, "width_multiplier": 0.125}


def _model(depth: int = 18, kind: str = "faster", **settings: object) -> nn.Module:
    name = f"{kind}rcnn_resnet{depth}_fpn"
    return build_model(ModelConfig(name=name, **(NARROW | settings)), num_classes=3)


@pytest.mark.parametrize(
    ("depth", "norm"),
    [
        (18, "batch"),
        (18, "group"),
        (34, "batch"),
        (50, "frozen"),
        (50, "sync"),
        (101, "batch"),
        (152, "batch"),
    ],
)
def test_the_trace_finds_exactly_the_widths_that_can_be_set(depth: int, norm: str) -> None:
    model = _model(depth, "mask", norm=norm)
    groups = width_groups(model, vary=("backbone", "fpn", "heads"))
    assert {group.name: group.width for group in groups} == model.widths
    assert set(model.widths) == set(default_widths(model.config))


@pytest.mark.parametrize("depth", [18, 50])
def test_a_group_is_what_must_change_together(depth: int) -> None:
    """Another width of one group changes exactly that group, and the detector still runs."""
    base = _model(depth)
    images = [torch.rand(3, 64, 64)]
    groups = width_groups(base, vary=("backbone", "fpn", "heads"))
    for group in groups if depth == 18 else groups[::5]:
        changed = build_model(base.config, {group.name: group.width + 3})
        widths = {g.name: g.width for g in width_groups(changed, vary=("backbone", "fpn", "heads"))}
        assert widths == base.widths | {group.name: group.width + 3}
        changed.transform.min_size = (64,)
        changed.eval()(images)


def test_members_are_the_feature_maps_that_layers_read() -> None:
    groups = {g.name: g.members for g in width_groups(_model(50))}
    body = "backbone.body"
    assert groups["stem"] == (f"{body}.layer1.0.conv1:in",)
    assert groups["layer1.0.inner1"] == (f"{body}.layer1.0.conv2:in",)
    assert groups["layer1.0.inner2"] == (f"{body}.layer1.0.conv3:in",)
    assert groups["layer2"] == (
        *(f"{body}.layer2.{block}.conv1:in" for block in (1, 2, 3)),
        f"{body}.layer3.0.conv1:in",
    )
    assert groups["layer4"][-1] == "backbone.fpn.inner_blocks.3.0:in"
    assert len(groups) == 1 + 4 + 2 * 16


def test_a_members_width_is_its_groups() -> None:
    model = _model(18, "mask")
    layers = dict(model.named_modules())
    for group in width_groups(model, vary=("backbone", "fpn", "heads")):
        for member in group.members:
            layer = layers[member.removesuffix(":in")]
            entry = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
            assert entry == group.width


def test_a_basic_stem_belongs_to_the_first_stage() -> None:
    groups = {g.name: g for g in width_groups(_model(18))}
    assert "stem" not in groups
    assert groups["layer1"].members[0] == "backbone.body.layer1.0.conv1:in"


def test_parts_rounding_and_floors() -> None:
    model = _model(18, "mask")
    assert [g.name for g in width_groups(model, vary=("fpn",))] == ["fpn"]
    assert [g.name for g in width_groups(model, vary=("heads",))] == ["box_head", "mask_head"]
    assert {g.multiple for g in width_groups(model)} == {1}
    stock = build_model(replace(model.config, width_multiplier=1.0))
    assert {(g.multiple, g.floor) for g in width_groups(stock)} == {(8, 8)}
    assert {(g.multiple, g.floor) for g in width_groups(stock, multiple=4, floor=16)} == {(4, 16)}
    assert [part_of(name) for name in ("stem", "layer1.0.inner1", "fpn", "mask_head")] == [
        "backbone",
        "backbone",
        "fpn",
        "heads",
    ]
    del model.config
    assert {g.multiple for g in width_groups(model)} == {8}
    with pytest.raises(ValueError, match="unknown part 'neck'"):
        width_groups(model, vary=("neck",))
