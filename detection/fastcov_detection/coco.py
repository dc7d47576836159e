"""Annotation files in COCO format, as they are found: crowds, RLE, category gaps, no areas."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from pycocotools.coco import COCO

from fastcov_detection.errors import DataError

log = logging.getLogger("fastcov_detection")


@dataclass(frozen=True)
class Annotation:
    """One object."""

    box: tuple[float, float, float, float]
    """Left, top, width, height, as annotated."""
    category_id: int
    area: float
    is_crowd: bool
    segmentation: Any
    """Polygons, RLE, or None."""


@dataclass
class ImageRecord:
    """One image and its objects."""

    image_id: int
    file_name: str
    width: int
    height: int
    annotations: list[Annotation] = field(default_factory=list)

    def clipped_box(self, annotation: Annotation) -> tuple[float, float, float, float]:
        """The part of a box that lies in the image: left, top, right, bottom."""
        left, top, width, height = annotation.box
        return (
            min(max(left, 0.0), self.width),
            min(max(top, 0.0), self.height),
            min(max(left + width, 0.0), self.width),
            min(max(top + height, 0.0), self.height),
        )

    def mask(self, annotation: Annotation) -> NDArray[np.uint8]:
        """The pixels of an object. [height, width]"""
        encoded = _to_rle(annotation.segmentation, self.height, self.width)
        decoded: NDArray[np.uint8] = rle.decode(encoded)
        return decoded


@dataclass(frozen=True)
class CocoFile:
    """A whole annotation file; labels run from 1 to K whatever the category ids are."""

    path: Path
    images: list[ImageRecord]
    categories: dict[int, str]
    """Names by category id, ids ascending."""
    skipped: int
    """Annotations whose box has no area."""

    def ground_truth(self) -> COCO:
        """The objects as pycocotools wants them: numbered from 1, every area filled in."""
        annotations = [
            {
                "image_id": image.image_id,
                "category_id": annotation.category_id,
                "bbox": list(annotation.box),
                "area": annotation.area,
                "iscrowd": int(annotation.is_crowd),
            }
            | ({"segmentation": annotation.segmentation} if annotation.segmentation else {})
            for image in self.images
            for annotation in image.annotations
        ]
        # pycocotools takes annotation 0 for "no match", so files that count from 0 are renumbered.
        for number, annotation in enumerate(annotations, 1):
            annotation["id"] = number
        truth = COCO()
        truth.dataset = {
            "images": [
                {"id": image.image_id, "width": image.width, "height": image.height}
                for image in self.images
            ],
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in self.categories.items()],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
        return truth


def read_coco(path: Path) -> CocoFile:
    """Reads an annotation file and checks everything that training relies on.

    Boxes without area are skipped and counted in one warning line; missing areas are derived from
    the segmentation, or else from the box.

    Raises:
        DataError: If the file is missing, is not COCO JSON, or refers to images or categories that
            it lacks.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"annotation file {path} is missing; check the path") from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); download or export it again") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path} has no list named {key!r}; it is not in COCO instances format")
    images = _read_images(path, content["images"])
    categories = {
        int(_required(path, "category", category, "id")): str(category.get("name", category["id"]))
        for category in content["categories"]
    }
    if not categories:
        raise DataError(f"{path} lists no category; there is nothing to detect")
    skipped = sum(
        not _add_annotation(path, value, images, categories) for value in content["annotations"]
    )
    if skipped:
        log.warning("%s: skipped %d annotations whose box has no area", path, skipped)
    return CocoFile(path, list(images.values()), dict(sorted(categories.items())), skipped)


def _read_images(path: Path, values: list[dict[str, Any]]) -> dict[int, ImageRecord]:
    images: dict[int, ImageRecord] = {}
    for value in values:
        image_id, name, width, height = (
            _required(path, "image", value, key) for key in ("id", "file_name", "width", "height")
        )
        if image_id in images:
            raise DataError(f"{path} lists image id {image_id} twice; every image needs its own id")
        images[image_id] = ImageRecord(image_id, str(name), int(width), int(height))
    if not images:
        raise DataError(f"{path} lists no image")
    return images


def _required(path: Path, kind: str, value: Mapping[str, Any], key: str) -> Any:
    if key not in value:
        which = value.get("id", value.get("file_name", "?"))
        raise DataError(f"{path}: {kind} {which} has no {key!r}; add it")
    return value[key]


def _add_annotation(
    path: Path,
    value: Mapping[str, Any],
    images: Mapping[int, ImageRecord],
    categories: Mapping[int, str],
) -> bool:
    """Adds one annotation to its image; False where its box has no area inside the image."""
    number = value.get("id", "?")
    image_id, category_id, box = (
        _required(path, "annotation", value, key) for key in ("image_id", "category_id", "bbox")
    )
    if image_id not in images:
        raise DataError(f"{path}: annotation {number} is of image {image_id}, which is not listed")
    if category_id not in categories:
        raise DataError(
            f"{path}: annotation {number} has category {category_id}, which is not listed"
        )
    is_box = isinstance(box, list) and len(box) == 4
    if not is_box or not all(isinstance(v, int | float) and math.isfinite(v) for v in box):
        raise DataError(
            f"{path}: annotation {number} has bbox {box}; expected left, top, width, height"
        )
    image = images[image_id]
    annotation = Annotation(
        box=(float(box[0]), float(box[1]), float(box[2]), float(box[3])),
        category_id=category_id,
        area=_area(path, value, image),
        is_crowd=bool(value.get("iscrowd", 0)),
        segmentation=value.get("segmentation") or None,
    )
    left, top, right, bottom = image.clipped_box(annotation)
    if right <= left or bottom <= top:
        return False
    image.annotations.append(annotation)
    return True


def _area(path: Path, value: Mapping[str, Any], image: ImageRecord) -> float:
    area = value.get("area")
    if isinstance(area, int | float) and math.isfinite(area):
        return float(area)
    segmentation = value.get("segmentation")
    if not segmentation:
        return float(value["bbox"][2] * value["bbox"][3])
    try:
        return float(rle.area(_to_rle(segmentation, image.height, image.width)))
    except (TypeError, ValueError, KeyError) as error:
        raise DataError(
            f"{path}: annotation {value.get('id', '?')} has neither an area nor a readable "
            f"segmentation ({error})"
        ) from None


def _to_rle(segmentation: Any, height: int, width: int) -> Any:
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation
