"""Annotation files in COCO format, with crowds, RLE, gaps in the category ids or no areas.

Lists of a file are read entry by entry, and objects are kept in arrays, so that a file of
train2017's size takes a fraction of its size in memory.
"""

from __future__ import annotations

import codecs
import contextlib
import hashlib
import io
import json
import zlib
from array import array
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray
from pycocotools import mask as rle
from pycocotools.coco import COCO

from fastcov_detection.data.layouts import nearby
from fastcov_detection.errors import DataError

_CHUNK = 1 << 22
_SPACE = " \t\n\r"
_decode = json.JSONDecoder().raw_decode
# Edges of a box that are closer than this share of the image's longer edge, 8 units in the last
# place of float32, may fall together when images are resized or mirrored.
_THINNEST = 2.0**-20
_LARGEST = 1e15

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Annotation:
    """One object."""

    box: Box
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
    path: Path | None = None
    """Path of the file, relative to the folder of images; None: ``file_name``."""
    annotations: list[Annotation] = field(default_factory=list)
    """Objects, and crowds; crowds are not learned from."""
    unlearned: list[Annotation] = field(default_factory=list)
    """Objects whose box has no area in the image: left out of training, counted by evaluation."""

    def clipped_box(self, annotation: Annotation) -> Box:
        """The part of a box that lies in the image: left, top, right, bottom."""
        return _clipped(annotation.box, self.width, self.height)


@dataclass(frozen=True)
class Sheet:
    """An annotation file before its check: lists of JSON values of any content.

    A loop over a list may read the file again: loops should be few.
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
        images = (i for i in self.images if isinstance(i, dict) and is_id(i.get("id")))
        return {image["id"]: image_size(image) for image in images}

    @cached_property
    def category_ids(self) -> set[Any]:
        """Ids of the categories."""
        entries = (c.get("id") for c in self.categories if isinstance(c, dict))
        return {key for key in entries if is_id(key)}


def read_sheet(path: Path) -> Sheet:
    """An annotation file, read and not yet checked.

    Raises:
        DataError: If it is missing or is not in COCO instances format.
    """
    used: set[Any] = set()

    def see(name: str, entry: Any) -> None:
        key = entry.get("category_id") if isinstance(entry, dict) else None
        if name == "annotations" and is_id(key):
            used.add(key)

    names = ("images", "annotations", "categories")
    try:
        lists, digest = read_lists(path, names, see)
    except FileNotFoundError:
        near = nearby(path)
        raise DataError(f"annotation file {path} is missing; check the path{near}") from None
    except OSError as error:
        raise DataError(
            f"cannot read annotation file {path} ({error.strerror}); check the path"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON ({error}); download or export it again") from None
    for key in names:
        if key not in lists:
            raise DataError(f"{path} has no list named {key!r}; it is not in COCO instances format")
    categories = list(lists["categories"])
    parts = lists["images"], categories, lists["annotations"]
    return Sheet(path, *parts, digest, frozenset(used))


class Records(Sequence[ImageRecord]):
    """Images with their objects, held in arrays; records are made on access.

    Processes that are forked from this one share the arrays: 860,000 objects of 118,000 images take
    0.1 GB, and 0.2 GB more with masks, which are packed JSON.

    Args:
        sheet: Annotation file in which no fault was found.
        with_masks: Keep segmentations.
    """

    def __init__(self, sheet: Sheet, with_masks: bool) -> None:
        self._ids: list[Any] = []
        self._names: list[str] = []
        self._paths: dict[int, Path] = {}
        """Files by the image's place, where they differ from the name."""
        sizes = array("q")
        for value in sheet.images:
            self._ids.append(value["id"])
            self._names.append(value["file_name"])
            sizes.extend(image_size(value) or (0, 0))
        self._sizes = np.array(sizes, dtype=np.int64).reshape(-1, 2)
        place_of = {key: place for place, key in enumerate(self._ids)}
        places, numbers, boxes, areas = array("q"), array("q"), array("d"), array("d")
        crowds, learned = bytearray(), bytearray()
        self._text, ends = bytearray(), array("q", [0])
        for value in sheet.annotations:
            place = place_of[value["image_id"]]
            size = int(self._sizes[place, 0]), int(self._sizes[place, 1])
            left, top, width, height = map(float, value["bbox"])
            segmentation = _without_short(value.get("segmentation"))
            places.append(place)
            numbers.append(int(value["category_id"]))
            boxes.extend((left, top, width, height))
            areas.append(_area(value, segmentation, *size))
            crowds.append(bool(value.get("iscrowd")))
            learned.append(has_area_inside((left, top, width, height), *size))
            if with_masks and segmentation is not None:
                text = json.dumps(segmentation, separators=(",", ":"))
                self._text += zlib.compress(text.encode(), 1)
            ends.append(len(self._text))
        self._at = np.array(places, dtype=np.int64)
        self._order = np.argsort(self._at, kind="stable").astype(np.int32)
        self._start = np.searchsorted(self._at[self._order], np.arange(len(self._ids) + 1))
        self._categories = np.array(numbers, dtype=np.int64)
        self._boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
        self._areas = np.array(areas, dtype=np.float64)
        self._crowds = np.frombuffer(crowds, dtype=np.bool_)
        self._learned = np.frombuffer(learned, dtype=np.bool_)
        self._ends = np.array(ends, dtype=np.int64)
        self._chosen = np.arange(len(self._ids))

    def __len__(self) -> int:
        return len(self._chosen)

    def __getitem__(self, index: Any) -> Any:
        """One image and its objects."""
        place = int(self._chosen[index])
        width, height = self._sizes[place].tolist()
        name = self._names[place]
        record = ImageRecord(self._ids[place], name, width, height, self._paths.get(place))
        for row in self._order[self._start[place] : self._start[place + 1]].tolist():
            annotation = Annotation(
                box=tuple(self._boxes[row].tolist()),
                category_id=int(self._categories[row]),
                area=float(self._areas[row]),
                is_crowd=bool(self._crowds[row]),
                segmentation=self._segmentation(row),
            )
            (record.annotations if self._learned[row] else record.unlearned).append(annotation)
        return record

    def _segmentation(self, row: int) -> Any:
        start, end = self._ends[row], self._ends[row + 1]
        return json.loads(zlib.decompress(self._text[start:end])) if end > start else None

    def sizes(self) -> NDArray[np.int64]:
        """Width and height of every image. [I, 2]"""
        return self._sizes[self._chosen]

    def counts(self) -> NDArray[np.int64]:
        """Objects of every image that are learned from: crowds are not. [I]"""
        rows = self._at[self._learned & ~self._crowds]
        return np.bincount(rows, minlength=len(self._ids))[self._chosen]

    def image_ids(self) -> list[int | str]:
        """Ids of the images, as annotated."""
        return [self._ids[place] for place in self._chosen.tolist()]

    def drop_empty(self) -> None:
        """Removal of the images that have no object to learn from."""
        self._chosen = self._chosen[self.counts() > 0]

    def set_paths(self, paths: Mapping[Any, Path]) -> None:
        """Setter of the file of every image, kept where it differs from the name.

        Args:
            paths: Paths relative to the folder of images, by image id.
        """
        for place, key in enumerate(self._ids):
            path = paths.get(key)
            if path is not None and str(path) != self._names[place]:
                self._paths[place] = path


@dataclass(frozen=True)
class CocoFile:
    """A whole annotation file; labels run from 1 to K whatever the category ids are."""

    path: Path
    images: Records
    categories: dict[int, str]
    """Names by category id, ids ascending."""

    def ground_truth(self, *, with_masks: bool = False) -> COCO:
        """Every object of the file in pycocotools' form: numbered from 1, with areas.

        Objects that training leaves out, and images without objects, are included, so that the
        score is the official one. ``with_masks``, objects without a segmentation get an empty one.
        """
        images, annotations = [], []
        for image in self.images:
            size = [image.height, image.width]
            images.append({"id": image.image_id, "width": image.width, "height": image.height})
            nothing = {"size": size, "counts": [image.height * image.width]}
            for annotation in (*image.annotations, *image.unlearned):
                entry = {
                    # pycocotools takes annotation 0 for "no match".
                    "id": len(annotations) + 1,
                    "image_id": image.image_id,
                    "category_id": annotation.category_id,
                    "bbox": list(annotation.box),
                    "area": annotation.area,
                    "iscrowd": int(annotation.is_crowd),
                }
                if annotation.segmentation is not None or with_masks:
                    entry["segmentation"] = annotation.segmentation or nothing
                annotations.append(entry)
        truth = COCO()
        truth.dataset = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": i, "name": name} for i, name in self.categories.items()],
        }
        with contextlib.redirect_stdout(io.StringIO()):
            truth.createIndex()
        return truth


def build_file(
    sheet: Sheet, left_out: Collection[int] = (), *, with_masks: bool = True
) -> CocoFile:
    """The objects of an annotation file in which no fault was found.

    Missing areas are derived from the segmentation, or else from the box.

    Args:
        sheet: Annotation file in which no fault was found.
        left_out: Ids of categories that stand for no class of objects.
        with_masks: Keep segmentations.
    """
    kept = (category for category in sheet.categories if category["id"] not in left_out)
    names = {int(category["id"]): str(category.get("name", category["id"])) for category in kept}
    return CocoFile(sheet.path, Records(sheet, with_masks), dict(sorted(names.items())))


def is_id(value: Any) -> bool:
    """True if a value can be an id: an integer or a text."""
    return isinstance(value, int | str) and not isinstance(value, bool)


def is_number(value: Any) -> bool:
    """True if a value is a finite number of a size that float32 sums can hold."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return False
    return -_LARGEST < value < _LARGEST


def image_size(image: Mapping[str, Any]) -> tuple[int, int] | None:
    """Width and height of an image's entry; None unless both are whole numbers of at least 1."""
    sides: list[Any] = [image.get(key) for key in ("width", "height")]
    if not all(is_number(side) and side == int(side) and side >= 1 for side in sides):
        return None
    return int(sides[0]), int(sides[1])


def has_area_inside(box: Box, width: int, height: int) -> bool:
    """True if a box has an area inside its image that float32 can tell from zero."""
    left, top, right, bottom = _clipped(box, width, height)
    thinnest = _THINNEST * max(width, height)
    return right - left > thinnest and bottom - top > thinnest


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
    from the run two before it. pycocotools reads beyond a text that ends within a number.

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


def _clipped(box: Box, width: int, height: int) -> Box:
    left, top, box_width, box_height = box
    return (
        min(max(left, 0.0), width),
        min(max(top, 0.0), height),
        min(max(left + box_width, 0.0), width),
        min(max(top + box_height, 0.0), height),
    )


def _without_short(segmentation: Any) -> Any:
    """A segmentation without its polygons of fewer than three points; None for an empty one."""
    if isinstance(segmentation, list):
        segmentation = [polygon for polygon in segmentation if len(polygon) >= 6]
    return segmentation or None


def _area(value: Mapping[str, Any], segmentation: Any, width: int, height: int) -> float:
    area = value.get("area")
    if area is not None:
        return float(area)
    if segmentation is None:
        return float(value["bbox"][2] * value["bbox"][3])
    return float(rle.area(to_rle(segmentation, height, width)))


class _Entries(Collection[Any]):
    """A list of a JSON file, read anew in every loop from its first byte."""

    def __init__(self, path: Path, place: int, count: int) -> None:
        self.path, self.place, self.count = path, place, count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Any]:
        with self.path.open("rb") as file:
            file.seek(self.place)
            yield from _Reader(file, self.place).entries()

    def __contains__(self, entry: object) -> bool:
        return any(entry == other for other in self)


def read_lists(
    path: Path, names: Collection[str], see: Callable[[str, Any], None]
) -> tuple[dict[str, Collection[Any]], str]:
    """Lists of a JSON file. The file is read once, whole, to find where each list stands.

    Args:
        path: Path of the file, whose top level is an object.
        names: Names of the wanted lists at the top level.
        see: Function that is called with a list's name and each of its entries.

    Returns:
        The wanted lists that the file has, and the SHA-256 of the file.

    Raises:
        ValueError: If the file is not JSON.
        OSError: If it cannot be read.
    """
    lists: dict[str, Collection[Any]] = {}
    with path.open("rb") as file:
        encoding = json.detect_encoding(file.read(4))
        file.seek(0)
        if not encoding.startswith("utf-8"):  # UTF-16 and UTF-32 are read at once
            raw = file.read()
            content = json.loads(raw)
            found = content if isinstance(content, dict) else {}
            lists = {name: found[name] for name in names if isinstance(found.get(name), list)}
            for name, entries in lists.items():
                for entry in entries:
                    see(name, entry)
            return lists, hashlib.sha256(raw).hexdigest()
        digest = hashlib.sha256()
        mark = file.read(3 if encoding == "utf-8-sig" else 0)
        digest.update(mark)
        reader = _Reader(file, len(mark), digest.update)
        if reader.next() != "{":
            reader.value()
        else:
            reader.take("{")
            while reader.next() != "}":
                name = reader.value()
                if not isinstance(name, str):
                    raise reader.error("expected a name")
                reader.take(":")
                lists.pop(name, None)
                if name in names and reader.next() == "[":
                    reader.take("[")
                    place, count = reader.place(), 0
                    for entry in reader.entries():
                        see(name, entry)
                        count += 1
                    lists[name] = _Entries(path, place, count)
                else:
                    reader.value()
                if reader.next() != "}":
                    reader.take(",")
                    if reader.next() == "}":
                        raise reader.error("a comma before '}'")
            reader.take("}")
        if reader.next():
            raise reader.error("more text after the end")
    return lists, digest.hexdigest()


class _Reader:
    """JSON values of a file in UTF-8, one after the other."""

    def __init__(
        self, file: IO[bytes], place: int, watch: Callable[[bytes], Any] = lambda _: None
    ) -> None:
        self.file, self.watch = file, watch
        self.decoder = codecs.getincrementaldecoder("utf-8")()
        self.text, self.at, self.before, self.is_all = "", 0, place, False

    def place(self) -> int:
        """Bytes of the file before the next character."""
        return self.before + len(self.text[: self.at].encode())

    def next(self) -> str:
        """The next character that is no space, left where it is; empty at the end."""
        while True:
            while self.at < len(self.text) and self.text[self.at] in _SPACE:
                self.at += 1
            if self.at < len(self.text):
                return self.text[self.at]
            if not self._more():
                return ""

    def take(self, character: str) -> None:
        """Removal of the next character."""
        if self.next() != character:
            raise self.error(f"expected {character!r}")
        self.at += 1

    def value(self) -> Any:
        """The next value."""
        self.next()
        while True:
            try:
                found, end = _decode(self.text, self.at)
            except json.JSONDecodeError as error:
                if self._more():
                    continue
                raise self.error(error.msg) from None
            # A number at the end of the text may go on.
            if end == len(self.text) and self._more():
                continue
            self.at = end
            return found

    def entries(self) -> Iterator[Any]:
        """The entries of a list whose bracket was taken, to the bracket that closes it."""
        is_first = True
        while self.next() != "]":
            if not is_first:
                self.take(",")
            yield self.value()
            is_first = False
        self.at += 1

    def error(self, reason: str) -> ValueError:
        """A failure with its place."""
        return ValueError(f"{reason}, at byte {self.place()}")

    def _more(self) -> bool:
        """True if more text was read; text before the current place is dropped."""
        if self.is_all:
            return False
        self.before = self.place()
        rest = self.text[self.at :]
        chunk = self.file.read(max(_CHUNK, len(rest)))
        self.watch(chunk)
        self.is_all = not chunk
        self.text, self.at = rest + self.decoder.decode(chunk, final=not chunk), 0
        return True
