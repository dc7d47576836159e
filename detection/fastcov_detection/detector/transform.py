"""torchvision's preparation of images, with a short way for batches that need no resizing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.transform import GeneralizedRCNNTransform


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
