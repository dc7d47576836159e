"""Random changes of training images: part, size, mirroring and colours.

Random numbers are drawn before any pixel is touched, so that pixels are touched once: a crop is cut
out of the decoded image first, all changes of colour are one matrix, and polygons are drawn at
their final place instead of being resized.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle
from torch import Tensor

from fastcov_detection.config import DataConfig
from fastcov_detection.data.coco import to_rle
from fastcov_detection.errors import ConfigError

# The mean colour of ImageNet, around images that were made smaller.
_FILL = (124, 116, 104)
_THINNEST = 2.0
# Weights of red, green and blue in grey, and an orthogonal pair of colour differences beside it.
_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.595716, -0.274453, -0.321263], [0.211456, -0.522591, 0.311135]]
)
_RGB = np.linalg.inv(_YIQ)
_STRENGTH, _HUE = 0.5, 0.05


class Frame(NamedTuple):
    """Part of an image that is cut out, made smaller, put on a canvas, and perhaps mirrored."""

    left: int
    top: int
    right: int
    bottom: int
    """Pixels of the image that are shown."""
    width: int
    height: int
    """Size of the part on the canvas."""
    x: int
    y: int
    """Place of the part on the canvas."""
    canvas: tuple[int, int]
    """Width and height of the resulting image."""
    is_mirrored: bool

    def boxes(self, boxes: Tensor) -> Tensor:
        """Boxes of the image as they lie on the canvas, cut at the part's edge. [N, 4]"""
        across, down = self._factors()
        moved = boxes - boxes.new_tensor([self.left, self.top, self.left, self.top])
        moved = moved * boxes.new_tensor([across, down, across, down])
        low, high = moved[:, :2].clamp_min(0), moved[:, 2:]
        high = torch.minimum(high, boxes.new_tensor([self.width, self.height]))
        low, high = low + low.new_tensor([self.x, self.y]), high + high.new_tensor([self.x, self.y])
        if self.is_mirrored:
            edge = self.canvas[0]
            left, right = edge - high[:, :1], edge - low[:, :1]
            return torch.cat([left, low[:, 1:], right, high[:, 1:]], dim=1)
        return torch.cat([low, high], dim=1)

    def pixels(self, image: Image.Image) -> Image.Image:
        """The part of an image in RGB, on its canvas."""
        if (self.left, self.top, self.right, self.bottom) != (0, 0, *image.size):
            image = image.crop((self.left, self.top, self.right, self.bottom))
        if image.size != (self.width, self.height):
            image = image.resize((self.width, self.height), Image.Resampling.BILINEAR)
        if self.canvas != image.size:
            canvas = Image.new("RGB", self.canvas, _FILL)
            canvas.paste(image, (self.x, self.y))
            image = canvas
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if self.is_mirrored else image

    def masks(self, segmentations: Sequence[Any], height: int, width: int) -> NDArray[np.uint8]:
        """The pixels of objects on the canvas, drawn or decoded in one go.

        Args:
            segmentations: Polygons or RLE of each object.
            height: Height of the image.
            width: Width of the image.

        Returns:
            [N, canvas height, canvas width], columns lying one after the other in memory.
        """
        across, down = self.canvas
        if not segmentations:
            return np.zeros((0, down, across), dtype=np.uint8)
        codes = [
            rle.merge(rle.frPyObjects(self._moved(segmentation), down, across))
            if isinstance(segmentation, list)
            else self._recoded(to_rle(segmentation, height, width))
            for segmentation in segmentations
        ]
        found: NDArray[np.uint8] = rle.decode(codes).transpose(2, 0, 1)
        if self.canvas != (self.width, self.height):
            # A polygon may reach beyond its image.
            x = across - self.x - self.width if self.is_mirrored else self.x
            found[:, : self.y] = found[:, self.y + self.height :] = 0
            found[:, :, :x] = found[:, :, x + self.width :] = 0
        return found

    def _moved(self, polygons: list[list[float]]) -> list[list[float]]:
        """Polygons as they lie on the canvas."""
        across, down = self._factors()
        start, factor = np.array([self.x, self.y], dtype=np.float64), np.array([across, down])
        if self.is_mirrored:
            start[0], factor[0] = self.canvas[0] - self.x, -across
        start -= factor * (self.left, self.top)
        if (start == 0).all() and (factor == 1).all():
            return polygons
        return [
            (np.reshape(polygon, (-1, 2)) * factor + start).ravel().tolist() for polygon in polygons
        ]

    def _recoded(self, code: Any) -> Any:
        """An RLE of the image as an RLE of the canvas."""
        if self == whole_frame(*self.canvas):
            return code
        part = rle.decode(code)[self.top : self.bottom, self.left : self.right]
        if part.shape != (self.height, self.width):
            size = self.width, self.height
            part = np.asarray(Image.fromarray(part).resize(size, Image.Resampling.NEAREST))
        canvas = np.zeros(self.canvas[::-1], dtype=np.uint8)
        canvas[self.y : self.y + self.height, self.x : self.x + self.width] = part
        return rle.encode(np.asfortranarray(canvas[:, ::-1] if self.is_mirrored else canvas))

    def _factors(self) -> tuple[float, float]:
        shown = self.right - self.left, self.bottom - self.top
        return self.width / shown[0], self.height / shown[1]


def whole_frame(width: int, height: int, *, is_mirrored: bool = False) -> Frame:
    """The frame of a whole image."""
    return Frame(0, 0, width, height, width, height, 0, 0, (width, height), is_mirrored)


@dataclass(frozen=True)
class Augmentation:
    """The random changes that a configuration asks for.

    Multi-scale is not among them: the detector's own resizing draws from ``model.train_sizes``.
    """

    hflip: float
    zoom: tuple[float, float] | None
    """Smallest and largest factor of the random zoom."""
    photometric: float

    def frame(self, width: int, height: int, generator: torch.Generator) -> Frame:
        """Random frame of an image.

        A zoom of 1 and more is a cut-out of that share, at a place where it fits, which is not
        resized here: the detector brings every image to its input size. A smaller zoom makes the
        image smaller and puts it somewhere on a canvas of the image's size.
        """
        chance = torch.rand(4, generator=generator).tolist()
        is_mirrored = chance[0] < self.hflip
        if self.zoom is None:
            return whole_frame(width, height, is_mirrored=is_mirrored)
        low, high = self.zoom
        factor = low + (high - low) * chance[1]
        is_cut = factor >= 1
        part_width, part_height = (
            max(1, round(size / factor if is_cut else size * factor)) for size in (width, height)
        )
        x = round(chance[2] * (width - part_width))
        y = round(chance[3] * (height - part_height))
        part = part_width, part_height
        if is_cut:
            return Frame(x, y, x + part_width, y + part_height, *part, 0, 0, part, is_mirrored)
        return Frame(0, 0, width, height, *part, x, y, (width, height), is_mirrored)

    def colours(self, image: Image.Image, generator: torch.Generator) -> Image.Image:
        """An image with other brightness, contrast, saturation, hue and order of channels.

        Each change has the chance ``photometric``. All are linear in red, green and blue (hue is a
        turn of the plane of colour differences), so together they are one matrix, and values are
        cut at 0 and 255 once.
        """
        if self.photometric <= 0:
            return image
        chance, size = torch.rand(2, 5, generator=generator).tolist()
        order = torch.randperm(3, generator=generator).tolist()
        is_on = [value < self.photometric for value in chance]
        if not any(is_on):
            return image
        bright, contrast, saturation = (
            1 + _STRENGTH * (2 * one - 1) if on else 1.0
            for one, on in zip(size[:3], is_on[:3], strict=True)
        )
        turn = 2 * math.pi * _HUE * (2 * size[3] - 1) if is_on[3] else 0.0
        cosine, sine = saturation * math.cos(turn), saturation * math.sin(turn)
        chroma = np.array([[1, 0, 0], [0, cosine, -sine], [0, sine, cosine]])
        matrix = bright * contrast * (_RGB @ chroma @ _YIQ)
        # Contrast turns about the mean grey, of which every eighth pixel is enough.
        small = np.asarray(image.reduce(8) if min(image.size) >= 8 else image)
        offset = bright * (1 - contrast) * float(small.reshape(-1, 3).mean(axis=0) @ _YIQ[0])
        if is_on[4]:
            matrix = matrix[order]
        rows = np.concatenate([matrix, np.full((3, 1), offset)], axis=1)
        return image.convert("RGB", tuple(rows.ravel().tolist()))


def training_transform(config: DataConfig) -> Augmentation:
    """The random changes of training images.

    Raises:
        ConfigError: If a range or a chance is impossible.
    """
    zoom = config.scale_jitter
    if zoom is not None and not 0 < zoom[0] <= zoom[1]:
        raise ConfigError(
            f"data.scale_jitter is {zoom}; give the smallest and the largest factor, above 0"
        )
    for name in ("hflip", "photometric"):
        if not 0 <= getattr(config, name) <= 1:
            raise ConfigError(f"data.{name} is {getattr(config, name)}; give a chance from 0 to 1")
    return Augmentation(config.hflip, zoom, config.photometric)


def large_enough(boxes: Tensor) -> Tensor:
    """True for boxes of at least two pixels along both edges; a crop may leave less. [N]"""
    return (boxes[:, 2:] - boxes[:, :2] >= _THINNEST).all(dim=1)
