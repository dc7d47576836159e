"""Pictures of detections: right, wrong and missed objects in different colours."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor, nn
from torchvision.ops import box_iou

from fastcov_detection.data.dataset import CocoDataset
from fastcov_detection.train.evaluate import detect

RIGHT, WRONG, MISSED = (0, 200, 140), (255, 90, 30), (255, 225, 60)
LEGEND = (
    "Green: found, with class and score (IoU of at least 0.5 with an object of that class). "
    "Orange: wrong, no such object there. Yellow: missed objects."
)
_EDGE = 340
"""Pixels of a picture's longer edge, the width at which a page shows it."""
_FONT_SIZE = 13
_IOU = 0.5

Picture = NDArray[np.uint8]


def draw_pictures(
    model: nn.Module,
    dataset: CocoDataset,
    *,
    count: int = 4,
    score: float = 0.5,
    category_names: Sequence[str] | None = None,
) -> list[Picture]:
    """Pictures of some images with their detections, evenly spread over the images with objects.

    Args:
        model: Detector; its mode is restored.
        dataset: Images, and their annotated objects.
        count: Number of images.
        score: Least score of a detection that is drawn.
        category_names: Names of labels 1 to K; None: the data set's.

    Returns:
        Pixels in RGB. [H, W, 3] each
    """
    with_objects = np.flatnonzero(dataset.records.counts()).tolist()
    number = min(count, len(with_objects))
    chosen = [with_objects[place * len(with_objects) // number] for place in range(number)]
    names = dataset.class_names if category_names is None else category_names
    pictures = []
    for indices, outputs in detect(model, dataset, chosen, 1, 0):
        image, target = dataset.read(indices[0])
        kept = outputs[0]["scores"] >= score
        found = {name: tensor[kept] for name, tensor in outputs[0].items()}
        pictures.append(_draw(image, target, found, names))
    return pictures


def in_grid(pictures: Sequence[Picture], columns: int) -> Picture:
    """Pictures side by side, padded to one size. [H, W, 3]"""
    height, width = (max(picture.shape[side] for picture in pictures) + 4 for side in (0, 1))
    lines = -(-len(pictures) // columns)
    grid = np.full((lines * height, columns * width, 3), 255, dtype=np.uint8)
    for place, picture in enumerate(pictures):
        top, left = place // columns * height, place % columns * width
        grid[top : top + picture.shape[0], left : left + picture.shape[1]] = picture
    return grid


def are_right(found: dict[str, Tensor], target: dict[str, Any]) -> tuple[list[bool], list[bool]]:
    """Truth values: of each detection, if it finds an object; of each object, if it is found.

    Counted as by COCO at an IoU of 0.5: the best scores choose first, each the free object of its
    class with the largest overlap.

    Args:
        found: Boxes, labels and scores of the detections.
        target: Boxes and labels of the objects.
    """
    right = [False] * len(found["boxes"])
    seen = [False] * len(target["boxes"])
    if not right or not seen:
        return right, seen
    overlap = box_iou(found["boxes"], target["boxes"])
    overlap[found["labels"][:, None] != target["labels"][None, :]] = 0
    for place in found["scores"].argsort(descending=True).tolist():
        free = overlap[place] * (~torch.tensor(seen)).float()
        best = int(free.argmax())
        if free[best] >= _IOU:
            right[place] = seen[best] = True
    return right, seen


def _draw(
    image: Tensor, target: dict[str, Any], found: dict[str, Tensor], class_names: Sequence[str]
) -> Picture:
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().numpy())
    zoom = _EDGE / max(picture.size)
    size = tuple(max(1, round(edge * zoom)) for edge in picture.size)
    smooth = Image.Resampling.BILINEAR if zoom < 2 else Image.Resampling.NEAREST
    picture = picture.resize(size, smooth)
    right, seen = are_right(found, target)
    colours = [RIGHT if is_right else WRONG for is_right in right]
    for mask, colour in zip(found.get("masks", ()), colours, strict="masks" in found):
        alpha = Image.fromarray(mask.numpy().astype(np.uint8) * 90).resize(size)
        picture.paste(Image.new("RGB", size, colour), mask=alpha)
    pen, font = ImageDraw.Draw(picture), ImageFont.load_default(_FONT_SIZE)
    boxes = [
        (box, MISSED, f"{class_names[label - 1]}")
        for box, label, is_seen in zip(
            target["boxes"].tolist(), target["labels"].tolist(), seen, strict=True
        )
        if not is_seen
    ]
    boxes += [
        (box, colour, f"{class_names[label - 1]} {value:.2f}")
        for box, colour, label, value in zip(
            found["boxes"].tolist(),
            colours,
            found["labels"].tolist(),
            found["scores"].tolist(),
            strict=True,
        )
    ]
    # Labels last: no box runs through a text.
    edges = [[round(edge * zoom) for edge in box] for box, _, _ in boxes]
    for edge, (_, colour, _) in zip(edges, boxes, strict=True):
        # Around a detection that lies on it, a missed object is still seen.
        wider = 2 if colour == MISSED else 0
        frame = (*(low - wider for low in edge[:2]), *(high + wider for high in edge[2:]))
        pen.rectangle(frame, outline=colour, width=2)
    for edge, (_, colour, text) in zip(edges, boxes, strict=True):
        _label(pen, font, edge, colour, text, size)
    return np.asarray(picture)


def _label(
    pen: ImageDraw.ImageDraw,
    font: Any,
    box: Sequence[int],
    colour: tuple[int, int, int],
    text: str,
    size: tuple[int, ...],
) -> None:
    """A text on the box's colour, above the box where there is room, always inside the picture."""
    left, top, right, bottom = pen.textbbox((0, 0), text, font=font)
    width, height = right - left + 4, bottom - top + 4
    x = max(0, min(box[0], size[0] - width))
    y = box[1] - height if box[1] >= height else min(box[1], size[1] - height)
    pen.rectangle((x, y, x + width, y + height), fill=colour)
    pen.text((x + 2 - left, y + 2 - top), text, fill=(0, 0, 0), font=font)
