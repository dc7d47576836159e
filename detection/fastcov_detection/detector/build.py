"""Faster and Mask R-CNN on ResNet-FPN backbones of any widths, from torchvision's own modules.

Also parameters and MACs of a detector, counted on the built model by torch's flop counter.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models._utils import IntermediateLayerGetter
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNConvFCHead, TwoMLPHead
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from fastcov_detection.config import ModelConfig, trained_parts
from fastcov_detection.detector.modules import (
    NORMS,
    STAGE_BLOCKS,
    BatchTransform,
    Float32Anchors,
    Float32BoxPredictor,
    Float32RPNHead,
    NormLayer,
    RowRoIAlign,
    build_resnet,
    norm_layer,
    stock_widths,
)
from fastcov_detection.detector.weights import initialise_backbone
from fastcov_detection.errors import ConfigError, WidthsError, closest
from fastcov_detection.files import write_text

PYRAMID_LEVELS = ["0", "1", "2", "3"]
BOX_REGIONS, MASK_REGIONS = 1000, 100
"""Regions on which the heads' multiply-accumulates are counted."""


def parse_name(name: str) -> tuple[bool, int]:
    """Facts in a detector's name.

    Returns:
        True if the detector predicts masks, and the depth of its ResNet.

    Raises:
        ConfigError: If the name is not of the form ``fasterrcnn_resnet50_fpn``.
    """
    match = re.fullmatch(r"(faster|mask)rcnn_resnet(\d+)_fpn", name)
    if match is None or int(match[2]) not in STAGE_BLOCKS:
        known = [
            f"{kind}rcnn_resnet{depth}_fpn" for kind in ("faster", "mask") for depth in STAGE_BLOCKS
        ]
        raise ConfigError(f"unknown detector {name!r}{closest(name, known)}")
    return match[1] == "mask", int(match[2])


def default_widths(config: ModelConfig) -> dict[str, int]:
    """Width of every group of the configured detector, in forward order."""
    predicts_masks, depth = parse_name(config.name)
    widths = stock_widths(depth, config.width_multiplier)
    widths |= {"fpn": config.fpn_channels, "box_head": config.box_head_width}
    return widths | ({"mask_head": config.mask_head_width} if predicts_masks else {})


def check_widths(config: ModelConfig, widths: Mapping[str, int] | None) -> dict[str, int]:
    """Widths of every group: those given, the others from the configuration.

    Raises:
        WidthsError: If a group does not exist in this detector or a width is not a positive
            integer.
    """
    complete = default_widths(config)
    for name, width in (widths or {}).items():
        if name not in complete:
            raise WidthsError(
                f"{config.name} has no width group {name!r}{closest(name, complete)}; "
                "these widths belong to another detector"
            )
        if isinstance(width, bool) or not isinstance(width, int) or width < 1:
            raise WidthsError(f"width of {name} is {width!r}; expected a positive integer")
        complete[name] = width
    return complete


def settle_norm(config: ModelConfig) -> ModelConfig:
    """The configuration with the norm that ``auto`` stands for."""
    if config.norm != "auto":
        return config
    return replace(config, norm="frozen" if config.init == "imagenet" else "batch")


def build_model(
    config: ModelConfig,
    widths: Mapping[str, int] | None = None,
    *,
    num_classes: int | None = None,
) -> FasterRCNN:
    """Detector of a configuration.

    Args:
        config: Everything but the widths.
        widths: Channels by width group (see
            :func:`fastcov_detection.detector.groups.width_groups`); groups that are not named keep
            the configuration's width.
        num_classes: Classes with the background, where the configuration leaves it open.

    Returns:
        torchvision's ``FasterRCNN`` or ``MaskRCNN`` with two attributes more: ``config``, the
        configuration with its number of classes, and ``widths``, the width of every group.

    Raises:
        ConfigError: If the name or the number of classes is missing or unknown.
        WidthsError: If the widths are for another detector.
    """
    config = settle_norm(config)
    predicts_masks, depth = parse_name(config.name)
    num_classes = num_classes or config.num_classes
    if num_classes is None or num_classes < 2:
        raise ConfigError(
            f"num_classes is {num_classes}; give at least 2, the background and one class"
        )
    complete = check_widths(config, widths)
    channels = complete["fpn"]
    backbone = _build_backbone(config, depth, complete)
    initialise_backbone(backbone.body, config, depth)
    _freeze(backbone.body, config)
    options: dict[str, Any] = {}
    norm = norm_layer(config.norm, config.norm_groups)
    head_norm = norm if config.head_norm else None
    if predicts_masks:
        mask_width = complete["mask_head"]
        options = {
            "mask_roi_pool": _roi_align(config, 14),
            "mask_head": MaskRCNNHeads(channels, (mask_width,) * 4, 1, norm_layer=head_norm),
            "mask_predictor": MaskRCNNPredictor(mask_width, mask_width, num_classes),
        }
    model = (MaskRCNN if predicts_masks else FasterRCNN)(
        backbone,
        min_size=(*config.train_sizes, config.min_size),
        rpn_anchor_generator=Float32Anchors(**anchor_options(config)),
        box_roi_pool=_roi_align(config, 7),
        box_head=_box_head(config, channels, complete["box_head"], head_norm),
        box_predictor=Float32BoxPredictor(complete["box_head"], num_classes),
        rpn_head=Float32RPNHead(channels, len(config.anchor_ratios)),
        **sampling_options(config),
        **options,
    )
    stock = model.transform
    model.transform = BatchTransform(
        stock.min_size, stock.max_size, stock.image_mean, stock.image_std
    )
    model.config = replace(config, num_classes=num_classes)
    model.widths = complete
    return model


def sampling_options(config: ModelConfig) -> dict[str, Any]:
    """Numbers of pixels, proposals, regions and detections, as torchvision's arguments."""
    return {
        "max_size": config.max_size,
        "rpn_pre_nms_top_n_train": config.rpn_pre_nms_train,
        "rpn_pre_nms_top_n_test": config.rpn_pre_nms_test,
        "rpn_post_nms_top_n_train": config.rpn_post_nms_train,
        "rpn_post_nms_top_n_test": config.rpn_post_nms_test,
        "rpn_batch_size_per_image": config.rpn_batch,
        "box_score_thresh": config.score_threshold,
        "box_detections_per_img": config.detections_per_image,
        "box_batch_size_per_image": config.roi_batch,
    }


def anchor_options(config: ModelConfig) -> dict[str, Any]:
    """Arguments of torchvision's anchor generator: one size a level, all ratios on each."""
    return {
        "sizes": [[size] for size in config.anchor_sizes],
        "aspect_ratios": [list(config.anchor_ratios)] * len(config.anchor_sizes),
    }


def roi_align_options(config: ModelConfig) -> dict[str, Any]:
    """Arguments of torchvision's RoIAlign on a pyramid, without the output's size."""
    return {
        "featmap_names": list(PYRAMID_LEVELS),
        "sampling_ratio": config.roi_sampling_ratio,
        "canonical_scale": config.roi_canonical_scale,
        "canonical_level": config.roi_canonical_level,
    }


def _build_backbone(config: ModelConfig, depth: int, widths: Mapping[str, int]) -> BackboneWithFPN:
    norm = norm_layer(config.norm, config.norm_groups)
    resnet = build_resnet(depth, widths, norm, config.zero_init_last_norm)
    return BackboneWithFPN(
        resnet,
        {f"layer{stage}": level for stage, level in enumerate(PYRAMID_LEVELS, 1)},
        [widths[f"layer{stage}"] for stage in range(1, 5)],
        widths["fpn"],
        norm_layer=norm if config.fpn_norm else None,
    )


def _box_head(config: ModelConfig, channels: int, width: int, norm: NormLayer | None) -> nn.Module:
    if config.box_head == "2fc":
        return TwoMLPHead(channels * 7 * 7, width)
    if config.box_head != "4conv1fc":
        raise ConfigError(f"unknown model.box_head {config.box_head!r}; choose 2fc, 4conv1fc")
    return FastRCNNConvFCHead((channels, 7, 7), [config.box_conv_width] * 4, [width], norm)


def _roi_align(config: ModelConfig, output_size: int) -> nn.Module:
    kinds = {"torchvision": MultiScaleRoIAlign, "rows": RowRoIAlign}
    if config.roi_align not in kinds:
        raise ConfigError(
            f"unknown model.roi_align {config.roi_align!r}; choose {', '.join(kinds)}"
        )
    return kinds[config.roi_align](output_size=output_size, **roi_align_options(config))


def _freeze(body: IntermediateLayerGetter, config: ModelConfig) -> None:
    trainable_layers = config.trainable_layers
    if trainable_layers is None:
        trainable_layers = trained_parts(config.init)
    if not 0 <= trainable_layers <= 5:
        raise ConfigError(f"trainable_layers is {trainable_layers}; choose 0 to 5")
    trained = ["layer4", "layer3", "layer2", "layer1", "conv1"][:trainable_layers]
    # As in torchvision, the first norm is trained only together with everything else.
    trained += ["bn1"] if trainable_layers == 5 else []
    for name, child in body.named_children():
        if name not in trained:
            for parameter in child.parameters():
                parameter.requires_grad_(False)


def save_widths(widths: Mapping[str, int], path: str | os.PathLike[str]) -> None:
    """JSON file of widths, one group a line."""
    write_text(path, json.dumps(dict(widths), indent=2) + "\n")


def load_widths(path: str | os.PathLike[str]) -> dict[str, int]:
    """Widths from a file of :func:`save_widths` or of a search.

    Raises:
        WidthsError: If the file is missing or does not hold integers by group name.
    """
    try:
        values = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise WidthsError(f"no widths file at {path}; a search writes widths.json") from None
    except ValueError as error:
        raise WidthsError(f"{path} is not JSON ({error}); save the widths again") from None
    if isinstance(values, dict) and isinstance(values.get("widths"), dict):
        values = values["widths"]
    if not isinstance(values, dict) or not all(isinstance(width, int) for width in values.values()):
        raise WidthsError(f"{path} does not hold one integer for each width group")
    return values


def count_parameters(module: nn.Module) -> int:
    """Parameters of a module, trained or frozen."""
    return sum(parameter.numel() for parameter in module.parameters())


@dataclass(frozen=True)
class Cost:
    """Parameters of a detector, and its multiply-accumulates for one image."""

    params: int
    backbone_params: int
    """Parameters of the ResNet alone, without the feature pyramid."""
    macs: int


def count_cost(model: GeneralizedRCNN, image_size: int | tuple[int, int]) -> Cost:
    """Parameters and multiply-accumulates of a detector, counted on the built model.

    The backbone, the feature pyramid and the RPN head run on one image of a fixed size, the heads
    on a fixed number of regions: 1000 boxes and 100 masks, fewer where the configuration keeps
    fewer. The layers run on the meta device, so nothing is computed.

    Args:
        model: Detector on any device; stays as it is.
        image_size: Edge of a square input, or (height, width), rounded up to a multiple of 32 as
            the detector pads it.
    """
    height, width = (image_size, image_size) if isinstance(image_size, int) else image_size
    image = _meta(1, 3, -(-height // 32) * 32, -(-width // 32) * 32)
    heads = model.roi_heads
    with _counting(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        boxes = min(BOX_REGIONS, model.rpn.post_nms_top_n())
        masks = min(MASK_REGIONS, heads.detections_per_img)
        features = _run(model.backbone, image)
        _run(model.rpn.head, list(features.values()))
        channels = next(iter(features.values())).shape[1]
        boxes_in = _meta(boxes, channels, *heads.box_roi_pool.output_size)
        _run(heads.box_predictor, _run(heads.box_head, boxes_in))
        if heads.has_mask():
            masks_in = _meta(masks, channels, *heads.mask_roi_pool.output_size)
            _run(heads.mask_predictor, _run(heads.mask_head, masks_in))
    return Cost(
        params=count_parameters(model),
        backbone_params=count_parameters(model.backbone.body),
        macs=counter.get_total_flops() // 2,
    )


class Costs:
    """Cache of the costs of detectors by widths, counted on the meta device.

    Args:
        model: Everything but the widths, with the number of classes.
        image_size: Size of the input, see :func:`count_cost`.
    """

    def __init__(self, model: ModelConfig, image_size: int | tuple[int, int]) -> None:
        self.model, self.image_size = replace(model, init="random"), image_size
        self._known: dict[tuple[tuple[str, int], ...], Cost] = {}

    def __call__(self, widths: Mapping[str, int] | None) -> Cost:
        """The cost of a detector with these widths; None: the configuration's own."""
        key = tuple(sorted((widths or {}).items()))
        if key not in self._known:
            with torch.device("meta"):
                self._known[key] = count_cost(build_model(self.model, widths), self.image_size)
        return self._known[key]

    def macs(self, widths: Mapping[str, int]) -> int:
        """Multiply-accumulates of one image."""
        return self(widths).macs

    def params(self, widths: Mapping[str, int]) -> int:
        """Parameters of the whole detector."""
        return self(widths).params


def _meta(*shape: int) -> Tensor:
    return torch.empty(shape, device="meta")


def _run(module: nn.Module, inputs: Any) -> Any:
    if all(parameter.is_meta for parameter in module.parameters()):
        return module(inputs)
    state = {
        name: torch.empty_like(tensor, device="meta")
        for name, tensor in (*module.named_parameters(), *module.named_buffers())
    }
    return functional_call(module, state, (inputs,))


@contextmanager
def _counting(model: nn.Module) -> Iterator[None]:
    """Context in which every module is in eval() and the norms are left out."""
    modes = {module: module.training for module in model.modules()}
    norms = [module for module in modes if isinstance(module, NORMS)]
    model.eval()
    # A norm multiplies no matrices, but on the meta device it would take most of the time.
    for norm in norms:
        norm.forward = nn.Identity().forward
    try:
        yield
    finally:
        for norm in norms:
            del norm.forward
        for module, is_training in modes.items():
            module.training = is_training
