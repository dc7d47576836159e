r"""Anchors and heads of torchvision whose boxes stay in float32 under autocast.

torchvision decodes and encodes boxes in the type of what a head predicts, and makes anchors in the
type of the feature maps. In bfloat16 that moves a coordinate near 800 by up to 2 pixels: of
anchors, of proposals, of detections, and of the ground truth that box regression learns from.

torchvision's preparation of images, with a short way for batches that need no resizing.

RoIAlign as weighted sums of feature rows: torchvision's values, a faster gradient on CPUs.

With one row of C channels for every pixel of every level, each sample of a region is a sum of four
rows, weighted bilinearly, and a cell the mean of its samples:

.. math:: \text{out}_{c} = \sum_k a_{ck} F_{p_{ck}}

``embedding_bag`` computes it row by row. The gradient is the transposed sum, so that the same
kernel computes it from the samples sorted by their rows; torchvision's kernel for processors adds
the gradient number by number, that of ``embedding_bag`` sample by sample.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RPNHead
from torchvision.models.detection.transform import GeneralizedRCNNTransform
from torchvision.ops import MultiScaleRoIAlign


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


class BatchTransform(GeneralizedRCNNTransform):
    """Normalises, resizes and pads images as torchvision does, to the same bits.

    Images of one shape whose edges are those of the configuration, and multiples of 32, need
    neither resizing nor padding: they are stacked and normalised in one go, where torchvision
    interpolates and copies every image by itself.
    """

    def forward(
        self, images: list[Tensor], targets: list[dict[str, Any]] | None = None
    ) -> tuple[ImageList, list[dict[str, Any]] | None]:
        """Prepares a batch; see torchvision's ``GeneralizedRCNNTransform.forward``."""
        if not self._are_ready(images):
            prepared: tuple[ImageList, list[dict[str, Any]] | None] = super().forward(
                images, targets
            )
            return prepared
        if self.training:
            for _ in images:  # torchvision draws an edge for each: later draws stay the same
                self.torch_choice(self.min_size)
        height, width = images[0].shape[-2:]
        batch = self.normalize(torch.stack(images))
        copies = None if targets is None else [dict(target) for target in targets]
        return ImageList(batch, [(height, width)] * len(images)), copies

    def _are_ready(self, images: list[Tensor]) -> bool:
        shape = images[0].shape
        if len(shape) != 3 or len(self.min_size) != 1 or self.fixed_size is not None:
            return False
        edges = shape[-2:]
        return (
            min(edges) == self.min_size[0]
            and max(edges) <= self.max_size
            and all(edge % self.size_divisible == 0 for edge in edges)
            and all(image.shape == shape and image.is_floating_point() for image in images)
        )


class _WeightedRows(torch.autograd.Function):
    """Weighted sums of rows, with a gradient with respect to the rows alone.

    Rows [P, C], the rows that each cell reads [N, K] and their weights [N, K] give cells [N, C].
    """

    @staticmethod
    def forward(ctx: Any, rows: Tensor, index: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(index, weight)
        ctx.count = len(rows)
        return functional.embedding_bag(index, rows, mode="sum", per_sample_weights=weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        index, weight = ctx.saved_tensors
        read = index.flatten()
        # Sorted 32-bit numbers take half the time; the order of equal ones fixes that of the sums.
        order = torch.argsort(read.int(), stable=True)
        ends = torch.cumsum(torch.bincount(read, minlength=ctx.count), 0)
        gradient = functional.embedding_bag(
            torch.div(order, index.shape[1], rounding_mode="floor"),
            gradients[0].contiguous(),
            offsets=functional.pad(ends[:-1], (1, 0)),
            mode="sum",
            per_sample_weights=weight.flatten()[order],
        )
        return gradient, None, None


class RowRoIAlign(MultiScaleRoIAlign):
    """Pools regions from a feature pyramid: torchvision's arguments, and its values up to rounding.

    Raises:
        ValueError: If ``sampling_ratio`` is below 1.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        if self.sampling_ratio < 1:
            raise ValueError(
                f"roi_sampling_ratio is {self.sampling_ratio}; roi_align=rows needs a fixed number "
                "of samples, at least 1"
            )

    def forward(
        self, x: dict[str, Tensor], boxes: list[Tensor], image_shapes: list[tuple[int, int]]
    ) -> Tensor:
        """Pools regions.

        Args:
            x: Pyramid levels by name. [B, C, H, W]
            boxes: Corners of each image's regions, in pixels. [R, 4]
            image_shapes: Height and width of each image.

        Returns:
            Regions of all images in order. [R, C, output_size, output_size]
        """
        features = [x[name] for name in self.featmap_names]
        edge = max(max(shape) for shape in image_shapes)
        strides = [2 ** round(math.log2(edge / max(f.shape[-2:]))) for f in features]
        rows = torch.cat([f.permute(0, 2, 3, 1).flatten(0, 2) for f in features])
        corners = torch.cat(boxes).detach()
        image = torch.repeat_interleave(
            torch.arange(len(boxes), device=corners.device),
            torch.tensor([len(regions) for regions in boxes], device=corners.device),
        )
        level = self._levels(corners, strides)
        sizes = torch.tensor([f.shape[-2:] for f in features], device=corners.device)
        counts = sizes.prod(1) * len(boxes)
        starts = torch.cumsum(counts, 0) - counts
        height, width = sizes[level].unbind(1)
        scaled = corners / torch.tensor(strides, device=corners.device)[level, None]
        row, row_weight = self._axis(scaled[:, 1], scaled[:, 3], height)
        column, column_weight = self._axis(scaled[:, 0], scaled[:, 2], width)
        first = starts[level] + image * height * width
        # [R, i, j, samples of both axes, 2 rows, 2 columns]
        index = first[:, None, None, None] + (
            (row * width[:, None, None])[:, :, None, :, None] + column[:, None, :, None, :]
        ).flatten(3)
        weight = row_weight[:, :, None, :, None] * column_weight[:, None, :, None, :]
        cells = self.output_size[0]
        pooled = _WeightedRows.apply(
            rows, index.flatten(0, 2), weight.flatten(3).flatten(0, 2).to(rows.dtype)
        )
        return pooled.reshape(-1, cells, cells, rows.shape[1]).permute(0, 3, 1, 2)

    def _levels(self, corners: Tensor, strides: Sequence[int]) -> Tensor:
        """Index of the pyramid level of every region. [R]"""
        edges = corners[:, 2:] - corners[:, :2]
        scale = edges.prod(1).clamp_min(0).sqrt() / self.canonical_scale
        # torchvision's small number, for areas at the very border of two levels.
        level = torch.floor(self.canonical_level + torch.log2(scale) + 1e-6)
        first = int(math.log2(strides[0]))
        return level.clamp(first, first + len(strides) - 1).long() - first

    def _axis(self, low: Tensor, high: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        """Pixels that each cell reads along one axis, and their weights. [R, cells, 2 * samples]"""
        cells, samples = self.output_size[0], self.sampling_ratio
        offsets = (torch.arange(cells * samples, device=low.device) + 0.5) / (cells * samples)
        position = low[:, None] + (high - low).clamp_min(1)[:, None] * offsets
        last = (size - 1)[:, None]
        is_inside = (position >= -1) & (position <= size[:, None])
        position = position.clamp_min(0).minimum(last.to(position.dtype))
        pixel = position.floor().long()
        share = position - pixel
        pixels = torch.stack([pixel, (pixel + 1).minimum(last)], dim=-1)
        weights = torch.stack([1 - share, share], dim=-1) * is_inside[..., None] / samples
        shape = (len(low), cells, 2 * samples)
        return pixels.reshape(shape), weights.reshape(shape)
