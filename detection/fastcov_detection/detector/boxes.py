"""Anchors and heads of torchvision whose boxes stay in float32 under autocast.

torchvision decodes and encodes boxes in the type of what a head predicts, and makes anchors in the
type of the feature maps. In bfloat16 that moves a coordinate near 800 by up to 2 pixels: of
anchors, of proposals, of detections, and of the ground truth that box regression learns from.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead


class Float32Anchors(AnchorGenerator):
    """torchvision's anchors, in float32 whatever the type of the feature maps."""

    def forward(self, image_list: ImageList, feature_maps: list[Tensor]) -> list[Tensor]:
        """Anchors of every image. [A, 4] each"""
        # Only size, type and device of a map are read.
        shapes = [one.new_empty(one.shape[-2:], dtype=torch.float32) for one in feature_maps]
        anchors: list[Tensor] = super().forward(image_list, shapes)
        return anchors


class Float32RPNHead(RPNHead):
    """torchvision's RPN head; scores and box offsets leave it in float32."""

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Scores and box offsets of every level."""
        scores, offsets = super().forward(x)
        return [one.float() for one in scores], [one.float() for one in offsets]


class Float32BoxPredictor(FastRCNNPredictor):
    """torchvision's box predictor; class scores and box offsets leave it in float32."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Class scores [R, K] and box offsets [R, 4 K] of R regions."""
        scores, offsets = super().forward(x)
        return scores.float(), offsets.float()
