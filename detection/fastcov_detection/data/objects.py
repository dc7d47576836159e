"""Single objects of a detection data set, cropped: what a classifier is pretrained on."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional

from fastcov_detection.config import ConfigError
from fastcov_detection.data.batches import Draw
from fastcov_detection.data.dataset import CocoDataset
from fastcov_detection.errors import DataError

# What torchvision's detectors normalise their images with.
_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ObjectCrops(Dataset[tuple[Tensor, int]]):
    """Square crops around the objects of a data set, each with its class.

    A crop reaches past its object by a factor drawn from ``context``, and the object lies anywhere
    inside; the factor and the place follow from the draw's seed alone. Crowds are left out. What
    lies outside the image is black.

    Args:
        dataset: Images with boxes.
        edge: Of a crop, in pixels; the network sees every object at a similar size.
        context: Smallest and largest edge of a crop by the longer edge of its object's box.
        hflip: Chance of a mirrored crop.
        varies: False: the object in the middle, the mean of ``context``, no mirror, whatever the
            draw; for validation.

    Raises:
        ConfigError: If an edge or a factor is impossible.
        DataError: If there is no object.
    """

    def __init__(
        self,
        dataset: CocoDataset,
        edge: int,
        context: tuple[float, float],
        *,
        hflip: float = 0.0,
        varies: bool = True,
    ) -> None:
        low, high = context
        if edge < 32 or not 1 <= low <= high:
            raise ConfigError(
                f"crops of {edge} pixels, {low} to {high} times their object; a ResNet needs "
                "at least 32 pixels, and a crop no less than its object"
            )
        self.dataset, self.edge, self.context = dataset, edge, context
        self.hflip, self.varies = hflip, varies
        self.places = [
            (index, number)
            for index, count in enumerate(dataset.records.counts().tolist())
            for number in range(count)
        ]
        if not self.places:
            raise DataError(f"{dataset.file.path} has no object that is not a crowd")

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, draw: Draw | int) -> tuple[Tensor, int]:
        """A crop and its class.

        Returns:
            Normalised pixels and the class, counted from 0. [3, edge, edge]
        """
        index, seed = (draw, 0) if isinstance(draw, int) else (draw.image, draw.seed)
        image, number = self.places[index]
        pixels, target = self.dataset.read(image)
        chance = torch.full((4,), 0.5)
        if self.varies:
            chance = torch.rand(4, generator=torch.Generator().manual_seed(seed))
        factor, right, down, mirrored = chance.tolist()
        left, top, x_max, y_max = target["boxes"][number].tolist()
        width, height = x_max - left, y_max - top
        low, high = self.context
        side = max(1, round(max(width, height) * (low + (high - low) * factor)))
        crop = functional.resized_crop(
            pixels,
            round(top - (side - height) * down),
            round(left - (side - width) * right),
            side,
            side,
            [self.edge, self.edge],
            antialias=True,
        )
        if self.varies and mirrored < self.hflip:
            crop = functional.horizontal_flip(crop)
        normalised = functional.normalize(crop.float() / 255, list(_MEAN), list(_STD))
        return normalised, int(target["labels"][number]) - 1
