"""Parameters and MACs of a detector, counted on the built model by torch's flop counter."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from fastcov_detection.config import ModelConfig
from fastcov_detection.detector.backbone import NORMS
from fastcov_detection.detector.build import build_model, count_parameters

BOX_REGIONS = 1000
MASK_REGIONS = 100


@dataclass(frozen=True)
class Cost:
    """What a detector weighs and computes for one image."""

    params: int
    backbone_params: int
    """Of the ResNet alone, without the feature pyramid."""
    macs: int


def count_cost(model: GeneralizedRCNN, image_size: int | tuple[int, int]) -> Cost:
    """Counts parameters and multiply-accumulates.

    The backbone, the feature pyramid and the RPN head run on one image of a fixed size, the heads
    on a fixed number of regions: 1000 boxes and 100 masks, or as many as the configuration lets
    through. The layers run on the meta device, so nothing is computed.

    Args:
        model: On any device; left as it was.
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


def cost_of(
    config: ModelConfig, widths: Mapping[str, int] | None, image_size: int | tuple[int, int]
) -> Cost:
    """The cost of a detector that is not built: only its shapes are, on the meta device.

    Args:
        config: With its number of classes.
        widths: By group, as for :func:`fastcov_detection.detector.build.build_model`.
        image_size: As for :func:`count_cost`.
    """
    with torch.device("meta"):
        return count_cost(build_model(replace(config, init="random"), widths), image_size)


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
    """Puts every module into eval(), takes the norms out, and undoes both."""
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
