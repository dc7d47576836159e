"""Width groups of a detector, found by tracing its module graph.

Two convolutions must have one output width when their outputs are added. The trace follows every
tensor's channel axis from the convolution that makes the tensor, through norms, activations, pools
and resizing, and merges axes at additions. The axes that are left are the groups.

Names of groups:

- ``stem`` and ``layer1.0.inner1``: made by one convolution, the first one or one inside a block
- ``layer1``: the sum of a stage's blocks (and the stem's output, where no layer projects it)
- ``fpn``, ``box_head``, ``mask_head``: torchvision's constructors give these one width each

A group's members are the feature maps that a layer reads, each named by the first layer that reads
it: ``backbone.body.layer1.1.conv1:in`` is the name of the tap in :func:`fastcov.track` with
``where="input"``.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.ops.misc import FrozenBatchNorm2d

from fastcov import WidthGroup

PARTS = ("backbone", "fpn", "heads")
_BODY = "backbone.body."
# The four blocks of torchvision's FastRCNNConvFCHead come before its linear layer.
_BOX_CONVS = tuple(f"roi_heads.box_head.{block}.0" for block in range(4))
_MAKES_WIDTH = (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)
_ADDITIONS = (operator.add, operator.iadd, torch.add)
_KEEPS_CHANNELS = (nn.functional.interpolate, nn.functional.max_pool2d, nn.functional.relu)
# torchvision's feature pyramid and heads take one width argument for all of their layers.
_ONE_ARGUMENT = {
    "backbone.fpn": "fpn",
    "rpn.head": "fpn",
    "roi_heads.box_head": "box_head",
    "roi_heads.mask_head": "mask_head",
    "roi_heads.mask_predictor": "mask_head",
}


@dataclass
class _Axis:
    """A channel axis: the layers that make it and the feature maps in which layers read it."""

    makers: list[str]
    width: int
    readers: list[str] = field(default_factory=list)


class _Skeleton(nn.Module):
    """The layers of a detector in forward order, without proposals and pooling of regions."""

    def __init__(self, detector: GeneralizedRCNN) -> None:
        super().__init__()
        self.backbone = detector.backbone
        self.rpn = detector.rpn
        self.roi_heads = detector.roi_heads

    def forward(self, images: Tensor, box_regions: Tensor, mask_regions: Tensor) -> list[Any]:
        outputs = [self.rpn.head(list(self.backbone(images).values()))]
        outputs.append(self.roi_heads.box_predictor(self.roi_heads.box_head(box_regions)))
        if self.roi_heads.has_mask():
            features = self.roi_heads.mask_head(mask_regions)
            outputs.append(self.roi_heads.mask_predictor(features))
        return outputs


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, qualified_name: str) -> bool:
        # FrozenBatchNorm2d is arithmetic on buffers, and the predictor branches on its input's
        # shape.
        if isinstance(module, FrozenBatchNorm2d | FastRCNNPredictor):
            return True
        return super().is_leaf_module(module, qualified_name)


def width_groups(
    model: GeneralizedRCNN,
    *,
    vary: Sequence[str] = ("backbone",),
    multiple: int | None = None,
    floor: int | None = None,
) -> list[WidthGroup]:
    """Convolutions that must share one width, found by tracing the model.

    Args:
        model: A detector with a ResNet-FPN backbone.
        vary: Parts whose groups are wanted: ``backbone``, ``fpn``, ``heads``.
        multiple: Step of rounded widths; None: 8, scaled with the model's width multiplier.
        floor: Smallest width; None: ``multiple``.

    Returns:
        Groups in forward order; see the module's page for their names.

    Raises:
        ValueError: If a part is unknown, or the graph holds an operation the trace cannot follow.
    """
    unknown = [part for part in vary if part not in PARTS]
    if unknown:
        raise ValueError(f"unknown part {unknown[0]!r}; choose from {', '.join(PARTS)}")
    if multiple is None:
        config = getattr(model, "config", None)
        multiple = 8 if config is None else max(1, int(8 * min(1.0, config.width_multiplier)))
    floor = multiple if floor is None else floor
    merged: dict[str, _Axis] = {}
    for axis in _trace_axes(model):
        # An output that no layer reads is a prediction: its width is not free.
        if not axis.readers:
            continue
        known = merged.setdefault(_group_name(axis), axis)
        if known is not axis:
            known.makers += axis.makers
            known.readers += axis.readers
    return [
        WidthGroup(
            name=name,
            members=tuple(dict.fromkeys(f"{reader}:in" for reader in axis.readers)),
            width=axis.width,
            multiple=multiple,
            floor=floor,
        )
        for name, axis in merged.items()
        if part_of(name) in vary
    ]


def part_of(group: str) -> str:
    """The part of the detector that a group belongs to: ``backbone``, ``fpn`` or ``heads``.

    The convolutions of a 4conv1fc box head are ``fixed``: a linear layer reads their flattened map,
    whose spectrum is not that of channels.
    """
    if group == "fpn":
        return "fpn"
    if group == "box_convs":
        return "fixed"
    return "heads" if group in ("box_head", "mask_head") else "backbone"


def _group_name(axis: _Axis) -> str:
    last = axis.makers[-1]
    if last.startswith(_BOX_CONVS):
        return "box_convs"
    for prefix, name in _ONE_ARGUMENT.items():
        if last.startswith(prefix + "."):
            return name
    layer = last.removeprefix(_BODY)
    if len(axis.makers) > 1:
        return layer.split(".")[0]
    return "stem" if layer == "conv1" else layer.replace("conv", "inner")


def _trace_axes(model: GeneralizedRCNN) -> list[_Axis]:
    """Every channel axis of the detector, in forward order."""
    skeleton = _Skeleton(model)
    graph = _Tracer().trace(skeleton)
    layers = dict(skeleton.named_modules())
    axes: dict[fx.Node, _Axis] = {}
    first_reader: dict[fx.Node, str] = {}
    for node in graph.nodes:
        source = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        if node.op == "call_module":
            layer = layers[str(node.target)]
            is_reader = isinstance(layer, (*_MAKES_WIDTH, FastRCNNPredictor))
            if is_reader and source in axes and source not in first_reader:
                first_reader[source] = _tap(str(node.target), layer)
                axes[source].readers.append(first_reader[source])
            if isinstance(layer, _MAKES_WIDTH):
                axes[node] = _Axis([str(node.target)], _made_width(layer))
            elif source in axes:
                axes[node] = axes[source]
        elif node.op == "call_function" and node.target in _ADDITIONS:
            terms = [term for term in node.args if term in axes]
            if len(terms) != 2:
                raise ValueError(f"addition {node} does not join two feature maps of known width")
            axes[node] = _merge(axes, axes[terms[0]], axes[terms[1]])
        elif node.op == "call_function" and node.target in _KEEPS_CHANNELS and source in axes:
            axes[node] = axes[source]
    return list({id(axis): axis for axis in axes.values()}.values())


def _tap(name: str, layer: nn.Module) -> str:
    """Name of the layer whose input is tapped; a predictor's two layers read one tensor."""
    return f"{name}.cls_score" if isinstance(layer, FastRCNNPredictor) else name


def _made_width(layer: nn.Module) -> int:
    return int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)


def _merge(axes: dict[fx.Node, _Axis], kept: _Axis, other: _Axis) -> _Axis:
    """Union of two axes, under the one that appeared first."""
    if kept is other:
        return kept
    if next(axis for axis in axes.values() if axis is kept or axis is other) is other:
        kept, other = other, kept
    if kept.width != other.width:
        raise ValueError(
            f"{kept.makers[-1]} has width {kept.width} and {other.makers[-1]} has {other.width}, "
            "but their outputs are added"
        )
    kept.makers += other.makers
    kept.readers += other.readers
    for node, axis in axes.items():
        if axis is other:
            axes[node] = kept
    return kept
