"""Annotation files in COCO format, as they are found: crowds, RLE, category gaps, no areas."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from pycocotools.coco import COCO

from fastcov_detection.data.layouts import nearby
from fastcov_detection.errors import DataError

# Edges of a box closer than this share of the image's longer edge may become one in float32, when
# images are resized or mirrored: 8 units in the last place.
_THINNEST = 2.0**-20
_LARGEST = 1e15


@dataclass(frozen=True)
class Annotation:
    """One object."""

    annotation_id: Any
    """As in the file; None where it has none."""
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

    image_id: int | str
    file_name: str
    width: int
    height: int
    annotations: list[Annotation] = field(default_factory=list)
    """Objects, and crowds; crowds are not learned from."""
    unlearned: list[Annotation] = field(default_factory=list)
    """Objects whose box has no area in the image: left out of training, counted by evaluation."""
    path: Path | None = None
    """Of the file, relative to the folder of images; None: as ``file_name`` says."""

    def clipped_box(self, annotation: Annotation) -> tuple[float, float, float, float]:
        """The part of a box that lies in the image: left, top, right, bottom."""
        return _clipped(annotation.box, self.width, self.height)

    def mask(self, annotation: Annotation) -> NDArray[np.uint8]:
        """The pixels of an object. [height, width]"""
        encoded = to_rle(annotation.segmentation, self.height, self.width)
        decoded: NDArray[np.uint8] = rle.decode(encoded)
        return decoded


@dataclass(frozen=True)
class CocoFile:
    """A whole annotation file; labels run from 1 to K whatever the category ids are."""

    path: Path
    images: list[ImageRecord]
    categories: dict[int, str]
    """Names by category id, ids ascending."""

    def ground_truth(self, *, with_masks: bool = False) -> COCO:
        """Every object of the file, as pycocotools wants them: numbered from 1, with areas.

        Objects that training leaves out are in it, so that the score is the official one.

        Args:
            with_masks: Give objects without a segmentation an empty one.
        """
        annotations = [
            {
                "image_id": image.image_id,
                "category_id": annotation.category_id,
                "bbox": list(annotation.box),
                "area": annotation.area,
                "iscrowd": int(annotation.is_crowd),
            }
            | _segmentation(annotation, image, with_masks)
            for image in self.images
            for annotation in (*image.annotations, *image.unlearned)
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


@dataclass(frozen=True)
class Sheet:
    """An annotation file as it was read: lists of JSON objects, whatever they hold."""

    path: Path
    images: list[Any]
    categories: list[Any]
    annotations: list[Any]
    digest: str
    """SHA-256 of the file."""

    @cached_property
    def image_sizes(self) -> dict[Any, tuple[int, int] | None]:
        """Width and height by image id; None where the file has no usable size."""
        return {
            image["id"]: image_size(image)
            for image in self.images
            if isinstance(image, dict) and is_id(image.get("id"))
        }

    @cached_property
    def category_ids(self) -> set[Any]:
        """Ids of the categories."""
        return {
            category["id"]
            for category in self.categories
            if isinstance(category, dict) and is_id(category.get("id"))
        }


def read_sheet(path: Path) -> Sheet:
    """An annotation file, read and not yet checked.

    Raises:
        DataError: If it is missing or is not in COCO instances format.
    """
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        near = nearby(path)
        raise DataError(f"annotation file {path} is missing; check the path{near}") from None
    except OSError as error:
        raise DataError(
            f"cannot read annotation file {path} ({error.strerror}); check the path"
        ) from None
    try:
        content = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); download or export it again") from None
    for key in ("images", "annotations", "categories"):
        if not isinstance(content, dict) or not isinstance(content.get(key), list):
            raise DataError(f"{path} has no list named {key!r}; it is not in COCO instances format")
    digest = hashlib.sha256(raw).hexdigest()
    return Sheet(path, content["images"], content["categories"], content["annotations"], digest)


def build_file(sheet: Sheet, left_out: frozenset[int] = frozenset()) -> CocoFile:
    """The objects of an annotation file in which no fault was found.

    Missing areas are derived from the segmentation, or else from the box.

    Args:
        sheet: Checked.
        left_out: Ids of categories that stand for no class of objects.
    """
    images: dict[Any, ImageRecord] = {}
    for value in sheet.images:
        size = image_size(value) or (0, 0)
        images[value["id"]] = ImageRecord(value["id"], value["file_name"], *size)
    for value in sheet.annotations:
        image = images[value["image_id"]]
        segmentation = clean_segmentation(value.get("segmentation"))
        left, top, width, height = map(float, value["bbox"])
        annotation = Annotation(
            annotation_id=value.get("id"),
            box=(left, top, width, height),
            category_id=int(value["category_id"]),
            area=_area(value, segmentation, image),
            is_crowd=bool(value.get("iscrowd")),
            segmentation=segmentation,
        )
        has_area = has_area_inside(annotation.box, image.width, image.height)
        (image.annotations if has_area else image.unlearned).append(annotation)
    categories = {
        int(category["id"]): str(category.get("name", category["id"]))
        for category in sheet.categories
        if category["id"] not in left_out
    }
    return CocoFile(sheet.path, list(images.values()), dict(sorted(categories.items())))


def is_id(value: Any) -> bool:
    """True if a value can be an id: an integer or a text."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def image_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height of an image's entry; None unless both are whole numbers of at least 1."""
    sides: list[Any] = [image.get(key) for key in ("width", "height")]
    if not all(is_number(side) and side == int(side) and side >= 1 for side in sides):
        return None
    return int(sides[0]), int(sides[1])


def has_area_inside(box: tuple[float, float, float, float], width: int, height: int) -> bool:
    """True if a box has an area inside its image that float32 can tell from zero."""
    left, top, right, bottom = _clipped(box, width, height)
    thinnest = _THINNEST * max(width, height)
    return right - left > thinnest and bottom - top > thinnest


def is_number(value: Any) -> bool:
    """True if a value is a finite number of a size that float32 sums can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_LARGEST < value < _LARGEST


def clean_segmentation(segmentation: Any) -> Any:
    """A segmentation without its polygons of fewer than three points; None for an empty one."""
    if not segmentation:
        return None
    if isinstance(segmentation, list):
        return [polygon for polygon in segmentation if len(polygon) >= 6]
    return segmentation


def to_rle(segmentation: Any, height: int, width: int) -> Any:
    """A segmentation as compressed RLE."""
    if isinstance(segmentation, list):
        return rle.merge(rle.frPyObjects(segmentation, height, width))
    if isinstance(segmentation["counts"], list):
        return rle.frPyObjects(segmentation, height, width)
    return segmentation


def run_lengths(counts: str) -> list[int]:
    """The runs of a compressed RLE: lengths of zeros and ones in turn.

    Each is a number of 5 bits a character, lowest first; from the fourth run on, the difference
    from the run two before it.

    Raises:
        ValueError: If the text ends within a number or has a character that is no RLE.
    """
    runs: list[int] = []
    value, shift = 0, 0
    for character in counts.encode("ascii"):
        bits = character - 48
        if not 0 <= bits < 64:
            raise ValueError(f"character {chr(character)!r}")
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value, shift = 0, 0
    if shift:
        raise ValueError("cut short")
    return runs


def _clipped(
    box: tuple[float, float, float, float], width: int, height: int
) -> tuple[float, float, float, float]:
    left, top, box_width, box_height = box
    return (
        min(max(left, 0.0), width),
        min(max(top, 0.0), height),
        min(max(left + box_width, 0.0), width),
        min(max(top + box_height, 0.0), height),
    )


def _area(value: Mapping[str, Any], segmentation: Any, image: ImageRecord) -> float:
    area = value.get("area")
    if area is not None:
        return float(area)
    if segmentation is None:
        return float(value["bbox"][2] * value["bbox"][3])
    return float(rle.area(to_rle(segmentation, image.height, image.width)))


def _segmentation(annotation: Annotation, image: ImageRecord, needed: bool) -> dict[str, Any]:
    if annotation.segmentation is not None:
        return {"segmentation": annotation.segmentation}
    if not needed:
        return {}
    return {
        "segmentation": {
            "size": [image.height, image.width],
            "counts": [image.height * image.width],
        }
    }
