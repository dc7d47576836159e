"""Annotation files in COCO format, as they are found: crowds, RLE, category gaps, no areas."""

from __future__ import annotations

import contextlib
import io
import json
import zlib
from array import array
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, overload

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from pycocotools.coco import COCO

from fastcov_detection.data.layouts import nearby
from fastcov_detection.data.stream import read_lists
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


class Records(Sequence[ImageRecord]):
    """Images with their objects, held in arrays and made as they are asked for.

    Processes that are forked from this one share the arrays: 860,000 objects of 118,000 images take
    0.1 GB, and 0.2 GB more with masks.

    Args:
        table: Everything about the images and their objects.
        chosen: Places of the images in the table; None: all, in order.
    """

    def __init__(self, table: _Table, chosen: NDArray[np.int64] | None = None) -> None:
        self._table = table
        self._chosen = np.arange(len(table.image_ids)) if chosen is None else chosen

    def __len__(self) -> int:
        return len(self._chosen)

    @overload
    def __getitem__(self, index: int) -> ImageRecord: ...

    @overload
    def __getitem__(self, index: slice) -> Records: ...

    def __getitem__(self, index: int | slice) -> ImageRecord | Records:
        if isinstance(index, slice):
            return Records(self._table, self._chosen[index])
        return self._table.record(int(self._chosen[index]))

    def sizes(self) -> NDArray[np.int64]:
        """Width and height of every image. [I, 2]"""
        return self._table.sizes[self._chosen]

    def counts(self) -> NDArray[np.int64]:
        """Objects of every image that are learned from: crowds are not. [I]"""
        return self._table.learned_counts()[self._chosen]

    def image_ids(self) -> list[int | str]:
        """Ids of the images, as annotated."""
        return [self._table.image_ids[place] for place in self._chosen.tolist()]

    def with_objects(self) -> Records:
        """The images that have an object to learn from."""
        return Records(self._table, self._chosen[self.counts() > 0])

    def set_paths(self, paths: Mapping[Any, Path]) -> None:
        """Remembers the file of every image whose name does not say it.

        Args:
            paths: Relative to the folder of images, by image id.
        """
        table = self._table
        for place in self._chosen.tolist():
            path = paths.get(table.image_ids[place])
            if path is not None and str(path) != table.names[place]:
                table.paths[place] = path


@dataclass(frozen=True)
class CocoFile:
    """A whole annotation file; labels run from 1 to K whatever the category ids are."""

    path: Path
    images: Records
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
    """An annotation file as it was read: lists of JSON objects, whatever they hold.

    The lists may be read from the file anew in every loop: loop as seldom as can be.
    """

    path: Path
    images: Collection[Any]
    categories: Collection[Any]
    annotations: Collection[Any]
    digest: str
    """SHA-256 of the file."""
    used_categories: frozenset[Any]
    """Ids of the categories that have an annotation."""

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
    used: set[Any] = set()

    def see(annotation: Any) -> None:
        key = annotation.get("category_id") if isinstance(annotation, dict) else None
        if is_id(key):
            used.add(key)

    def pass_over(entry: Any) -> None:
        """Images and categories are read when they are needed."""

    watched = {"images": pass_over, "annotations": see, "categories": pass_over}
    try:
        lists, digest = read_lists(path, watched)
    except FileNotFoundError:
        near = nearby(path)
        raise DataError(f"annotation file {path} is missing; check the path{near}") from None
    except OSError as error:
        raise DataError(
            f"cannot read annotation file {path} ({error.strerror}); check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); download or export it again") from None
    for key in watched:
        if key not in lists:
            raise DataError(f"{path} has no list named {key!r}; it is not in COCO instances format")
    return Sheet(
        path,
        lists["images"],
        list(lists["categories"]),
        lists["annotations"],
        digest,
        frozenset(used),
    )


def build_file(
    sheet: Sheet, left_out: frozenset[int] = frozenset(), *, with_masks: bool = True
) -> CocoFile:
    """The objects of an annotation file in which no fault was found.

    Missing areas are derived from the segmentation, or else from the box.

    Args:
        sheet: Checked.
        left_out: Ids of categories that stand for no class of objects.
        with_masks: Keep segmentations.
    """
    categories = {
        int(category["id"]): str(category.get("name", category["id"]))
        for category in sheet.categories
        if category["id"] not in left_out
    }
    table = _Table(sheet, with_masks)
    return CocoFile(sheet.path, Records(table), dict(sorted(categories.items())))


class _Table:
    """Images and objects of an annotation file as arrays; segmentations as packed JSON.

    Args:
        sheet: Checked.
        with_masks: Keep segmentations.
    """

    def __init__(self, sheet: Sheet, with_masks: bool) -> None:
        self.image_ids: list[Any] = []
        self.names: list[str] = []
        self.paths: dict[int, Path] = {}
        """Files by the image's place, where the name does not say it."""
        sizes = array("q")
        for value in sheet.images:
            self.image_ids.append(value["id"])
            self.names.append(value["file_name"])
            sizes.extend(image_size(value) or (0, 0))
        self.sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        place_of = {key: place for place, key in enumerate(self.image_ids)}
        places, numbers, boxes, areas = array("q"), array("q"), array("d"), array("d")
        crowds, learned = bytearray(), bytearray()
        self._text, ends = bytearray(), array("q", [0])
        own_ids = array("q")
        self._other_ids: dict[int, Any] = {}
        """Ids that are no integers of 64 bits, by the annotation's place in the file."""
        for value in sheet.annotations:
            place = place_of[value["image_id"]]
            size = int(self.sizes[place, 0]), int(self.sizes[place, 1])
            left, top, width, height = map(float, value["bbox"])
            segmentation = clean_segmentation(value.get("segmentation"))
            places.append(place)
            numbers.append(int(value["category_id"]))
            boxes.extend((left, top, width, height))
            areas.append(_area(value, segmentation, *size))
            crowds.append(bool(value.get("iscrowd")))
            learned.append(has_area_inside((left, top, width, height), *size))
            key = value.get("id")
            if type(key) is not int or abs(key) >= 2**63:
                self._other_ids[len(own_ids)], key = key, 0
            own_ids.append(key)
            if with_masks and segmentation is not None:
                self._text += _pack(segmentation)
            ends.append(len(self._text))
        at = np.array(places, dtype=np.int64)
        self._order = np.argsort(at, kind="stable").astype(np.int32)
        self._start = np.searchsorted(at[self._order], np.arange(len(self.image_ids) + 1))
        self._categories = np.array(numbers, dtype=np.int64)
        self._boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        self._areas = np.array(areas, dtype=np.float64)
        self._crowds = np.frombuffer(crowds, dtype=np.bool_)
        self._learned = np.frombuffer(learned, dtype=np.bool_)
        self._ends = np.array(ends, dtype=np.int64)
        self._own_ids = np.array(own_ids, dtype=np.int64)
        self._at = at

    def record(self, place: int) -> ImageRecord:
        """One image and its objects."""
        width, height = self.sizes[place].tolist()
        record = ImageRecord(
            self.image_ids[place], self.names[place], width, height, path=self.paths.get(place)
        )
        for row in self._order[self._start[place] : self._start[place + 1]].tolist():
            annotation = Annotation(
                annotation_id=self._other_ids.get(row, int(self._own_ids[row])),
                box=tuple(self._boxes[row].tolist()),
                category_id=int(self._categories[row]),
                area=float(self._areas[row]),
                is_crowd=bool(self._crowds[row]),
                segmentation=self._segmentation(row),
            )
            (record.annotations if self._learned[row] else record.unlearned).append(annotation)
        return record

    def learned_counts(self) -> NDArray[np.int64]:
        """Objects of every image that are learned from. [I]"""
        rows = self._at[self._learned & ~self._crowds]
        return np.bincount(rows, minlength=len(self.image_ids))

    def _segmentation(self, row: int) -> Any:
        start, end = self._ends[row], self._ends[row + 1]
        return json.loads(zlib.decompress(self._text[start:end])) if end > start else None


def _pack(segmentation: Any) -> bytes:
    """A segmentation as JSON, at half the size; numbers keep every digit."""
    return zlib.compress(json.dumps(segmentation, separators=(",", ":")).encode(), 1)


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


def _area(value: Mapping[str, Any], segmentation: Any, width: int, height: int) -> float:
    area = value.get("area")
    if area is not None:
        return float(area)
    if segmentation is None:
        return float(value["bbox"][2] * value["bbox"][3])
    return float(rle.area(to_rle(segmentation, height, width)))


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
