"""Check of a whole data set before the first step: annotation files and image headers, once.

Each check is a function in one of the tables at :func:`_check`. A check judges one property, and
passes over faults that another check reports, so that one list holds every fault once. Findings are
kept by content: a data set is checked again only after a change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from fastcov_detection.data.coco import (
    Sheet,
    has_area_inside,
    image_size,
    is_id,
    is_number,
    run_lengths,
)
from fastcov_detection.data.layouts import ImageFinder, nearby
from fastcov_detection.data.pixels import (
    DECODER,
    MOST_OF_16_BITS,
    MOST_PIXELS,
    SWAPS,
    Header,
    UnreadableError,
    read_header,
)
from fastcov_detection.errors import DataError
from fastcov_detection.files import write_text
from fastcov_detection.progress import Advance, progress_bar

log = logging.getLogger("fastcov_detection")

SHOWN = 10
"""Faults of one kind and file that an error lists; the rest are counted."""
_EXAMPLES = 3
_VERSION = 2
"""Number of the checks' version: findings of another one are not used."""
_READERS = 8
_ROUND = 256
_MOST_MISSING = 10
_DARKEST_SHARE = 1 / 16

Entry = Mapping[str, Any]
Box = tuple[float, float, float, float]


class Problem(NamedTuple):
    """Problem that a check found."""

    text: str
    """Predicate with the value, to be read after the entry's name: ``has bbox [1, 2]``."""
    remedy: str
    is_fault: bool = True
    """False for a note: training goes on, and one line counts the entries that have it."""
    entry: str = ""
    """Name of the entry, such as ``annotation 7``; empty for the whole file."""


class Finding(NamedTuple):
    """A problem, the file it is in, and the check that found it, by which findings are counted."""

    file: str
    check: str
    text: str
    remedy: str
    is_fault: bool
    entry: str

    def __str__(self) -> str:
        where = f"{self.file}: {self.entry}" if self.entry else self.file
        return f"{where} {self.text}; {self.remedy}"


@dataclass(frozen=True)
class Split:
    """One half of a data set, before it is checked.

    Args:
        name: ``train`` or ``val``.
        sheet: Its annotation file.
        images_dir: Folder that the file names are relative to.
        with_masks: True if a detector of masks reads the data.
        turn: True if images are turned as their EXIF orientation asks.
    """

    name: str
    sheet: Sheet
    images_dir: Path
    with_masks: bool = False
    turn: bool = True


class ListedImage(NamedTuple):
    """An image of an annotation file, and its file."""

    entry: str
    image_id: Any
    file_name: str
    size: tuple[int, int] | None
    """Annotated size; None where the annotation is a fault."""
    path: Path | None
    """Relative to the folder; None where there is no such file."""
    bytes: int
    changed_ns: int


class Checked(NamedTuple):
    """Result of the check of one half."""

    findings: list[Finding]
    paths: dict[Any, Path]
    """Files by image id, relative to the folder."""
    images_digest: str
    """Digest of the names and byte counts of the images, wherever the folder lies."""


def refuse_faults(findings: Iterable[Finding], shown: int | None = SHOWN) -> None:
    """Refusal of a data set with faults, by one error that lists them; notes do not count.

    Args:
        findings: Findings about a data set.
        shown: Number of faults of one kind and file to list; None: all.

    Raises:
        DataError: If there is a fault.
    """
    faults = [finding for finding in findings if finding.is_fault]
    if len(faults) < 2:
        if faults:
            raise DataError(str(faults[0]))
        return
    lines = [f"{len(faults)} faults in the data:"]
    for group in _kinds(faults):
        lines += map(str, group[:shown])
        more = 0 if shown is None else len(group) - shown
        if more > 0:
            lines.append(
                f"{group[0].file}: {more} more of this kind; fastcov-detection check lists all"
            )
    raise DataError("\n  ".join(lines))


def log_notes(findings: Iterable[Finding]) -> None:
    """Warnings of the notes, one line for each kind and file."""
    for group in _kinds(finding for finding in findings if not finding.is_fault):
        first, others = group[0], ", ".join(finding.entry for finding in group[1 : 1 + _EXAMPLES])
        more = len(group) - 1 - _EXAMPLES
        tail = f" and {more} more" if more > 0 else ""
        text = f"{first.file}: {len(group)} times: {first.entry} {first.text}, so {others}{tail}"
        log.warning("%s", first if len(group) == 1 else f"{text}; {first.remedy}")


def _kinds(findings: Iterable[Finding]) -> list[list[Finding]]:
    """Findings of one check in one file, together."""
    kinds: dict[tuple[str, str], list[Finding]] = defaultdict(list)
    for finding in findings:
        kinds[finding.file, finding.check].append(finding)
    return list(kinds.values())


def check_entries(split: Split, advance: Advance = lambda steps=1, note="": None) -> list[Finding]:
    """Findings of every check of the annotation file alone."""
    sheet, findings = split.sheet, []
    lists = {
        "image": sheet.images,
        "category": sheet.categories,
        "annotation": sheet.annotations,
    }
    for kind, entries in lists.items():
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                problem = Problem(f"is {_shorten(entry)}", "expected a JSON object")
                findings.append(_about(split, problem, "is_object", f"{kind} {index}"))
                continue
            for check in _CHECKS[kind]:
                found = check(entry, sheet)
                if found is not None:
                    name = _entry_name(kind, entry, index)
                    findings.append(_about(split, found, check.__name__, name))
            if kind == "annotation" and index % _ROUND == _ROUND - 1:
                advance(_ROUND)
    findings += _found(split, "file")
    if split.with_masks:
        findings += _found(split, "masks")
    advance(len(sheet.annotations) % _ROUND)
    return findings


def list_images(split: Split) -> tuple[list[ListedImage], list[Finding]]:
    """The images of an annotation file with their files, and findings about missing ones.

    Raises:
        DataError: If the folder is missing.
    """
    if not split.images_dir.is_dir():
        near = nearby(split.images_dir)
        raise DataError(f"image folder {split.images_dir} is missing; check the path{near}")
    finder = ImageFinder(split.images_dir)
    listed = []
    for index, image in enumerate(split.sheet.images):
        name = image.get("file_name") if isinstance(image, dict) else None
        if not isinstance(name, str):
            continue
        path = finder.find(name) if name else None
        stat = None if path is None else (split.images_dir / path).stat()
        key = image.get("id") if is_id(image.get("id")) else None
        place = (-1, -1) if stat is None else (stat.st_size, stat.st_mtime_ns)
        entry = _entry_name("image", image, index)
        listed.append(ListedImage(entry, key, name, image_size(image), path, *place))
    return listed, [*_missing(split, finder, listed), *_renamed(split, listed)]


def check_split(split: Split, *, progress: bool = True) -> Checked:
    """Findings about one half: its annotation file, and the header of every image.

    Findings are kept in the user's cache folder, by the content of the annotation file and the
    names, sizes and times of the images, and taken from there the next time.

    Args:
        split: The half.
        progress: Show a bar.

    Raises:
        DataError: If the folder of the images is missing.
    """
    listed, findings = list_images(split)
    paths = {image.image_id: image.path for image in listed if image.path is not None}
    names = [(image.file_name, image.bytes) for image in listed]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    cache = _cache_path(split, listed)
    try:
        known = [Finding(*values) for values in json.loads(cache.read_text(encoding="utf-8"))]
    except (OSError, ValueError, TypeError):
        total = len(split.sheet.annotations) + len(listed)
        with progress_bar(f"checking {split.name} data", total, enabled=progress) as advance:
            known = check_entries(split, advance)
            known += _check_headers(split, listed, advance)
            known += _found(split, "split")
        try:
            write_text(cache, json.dumps(known))
        except OSError as error:
            log.info("findings are not kept: %s", error)
    return Checked(findings + known, paths, digest)


def check_pair(train: Split, val: Split) -> list[Finding]:
    """Findings about the two halves together."""
    return [
        _about(split, problem, check.__name__)
        for check in _CHECKS["pair"]
        for split, problem in check(train, val)
    ]


def synthetic_roots(sheets: Sequence[Sheet]) -> dict[int, Finding]:
    """Categories that stand for all others, by id: Roboflow lists the data set itself as one.

    Such a category is every other one's supercategory, has none itself, and has no object in any
    of the files.
    """
    categories = list(_dicts(sheets[0].categories))
    used = {key for sheet in sheets for key in sheet.used_categories}
    roots = {}
    for category in categories:
        key, name, above = category.get("id"), category.get("name"), category.get("supercategory")
        others = [other for other in categories if other.get("id") != key]
        is_top = is_id(key) and key not in used and above in ("none", None, "")
        if is_top and others and all(other.get("supercategory") == name for other in others):
            text = "is every other category's supercategory and has no object"
            details = text, "it is no class of its own", False, f"category {key}"
            roots[key] = Finding(str(sheets[0].path), "root", *details)
    return roots


def _check_headers(split: Split, listed: Sequence[ListedImage], advance: Advance) -> list[Finding]:
    findings: list[Finding] = []
    headers: list[Header] = []
    present = [image for image in listed if image.path is not None]
    advance(len(listed) - len(present))
    places = [split.images_dir / (image.path or image.file_name) for image in present]
    with ThreadPoolExecutor(_READERS) as pool:
        for image, header in zip(present, pool.map(_read_or_refuse, places), strict=True):
            advance(1)
            if isinstance(header, UnreadableError):
                problem = Problem(header.text, header.remedy)
                findings.append(_about(split, problem, "is_read", image.entry))
                continue
            headers.append(header)
            for check in _CHECKS["header"]:
                problem = check(image, header, split)
                if problem is not None:
                    findings.append(_about(split, problem, check.__name__, image.entry))
    return findings + _found(split, "headers", headers)


def _read_or_refuse(path: Path) -> Header | UnreadableError:
    try:
        return read_header(path)
    except UnreadableError as error:
        return error


def _missing(split: Split, finder: ImageFinder, listed: Sequence[ListedImage]) -> Iterator[Finding]:
    missing = [image for image in listed if image.path is None]
    if len(missing) > _MOST_MISSING:
        first = missing[0].file_name
        text = (
            f"{len(missing)} of {len(listed)} images of {split.sheet.path} are not in "
            f"{split.images_dir}, the first is {first}{finder.suggestions(first)}"
        )
        remedy = "give the folder that holds them, or download them again"
        yield Finding(str(split.images_dir), "is_there", text, remedy, True, "")
        return
    for image in missing:
        text = f"is not in {split.images_dir}{finder.suggestions(image.file_name)}"
        problem = Problem(text, "download it again, or take it out of the annotations")
        yield _about(split, problem, "is_there", image.entry)


def _renamed(split: Split, listed: Sequence[ListedImage]) -> Iterator[Finding]:
    renamed = [
        image for image in listed if image.path and str(image.path) != str(Path(image.file_name))
    ]
    counts = Counter(image.path for image in renamed)
    for image in renamed:
        text = f"is read from {image.path}, the only file that its name can mean"
        yield _about(split, _note(text, "write that name to be sure"), "is_named", image.entry)
        if counts[image.path] > 1:
            problem = Problem(f"is read from {image.path}, as another image is", "write true names")
            yield _about(split, problem, "is_one_file", image.entry)


def _found(split: Split, kind: str, *arguments: Any) -> list[Finding]:
    return [
        _about(split, problem, check.__name__)
        for check in _CHECKS[kind]
        for problem in check(split, *arguments)
    ]


def _about(split: Split, problem: Problem, check: str, entry: str | None = None) -> Finding:
    found = problem if entry is None else problem._replace(entry=entry)
    return Finding(str(split.sheet.path), check, *found)


def _cache_path(split: Split, listed: Sequence[ListedImage]) -> Path:
    images = [(str(image.path), image.bytes, image.changed_ns) for image in listed]
    parts = [_VERSION, DECODER, split.name, split.sheet.digest, str(split.sheet.path)]
    parts += [str(split.images_dir), split.with_masks, split.turn, images]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fastcov-detection" / "checked" / f"{key}.json"


_CHECKS: dict[str, list[Callable[..., Any]]] = defaultdict(list)


def _check(kind: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Entry of a check into the table of its kind.

    ``image``, ``category`` and ``annotation`` take an entry and its sheet and return a problem or
    None, and so does ``header`` with an image, its header and its half. ``file``, ``masks`` (for
    detectors of masks), ``split`` and ``headers`` take a half, ``pair`` both halves, and yield
    problems.
    """

    def enter(check: Callable[..., Any]) -> Callable[..., Any]:
        _CHECKS[kind].append(check)
        return check

    return enter


_CHECKED_FIELDS: dict[str, dict[str, tuple[Callable[[Any], bool], str]]] = {
    "image": {
        "id": (is_id, "write an integer"),
        "file_name": (lambda v: isinstance(v, str) and v != "", "write the name of its file"),
    },
    "category": {
        "id": (lambda v: type(v) is int, "write an integer"),
        "name": (lambda v: isinstance(v, str), "write a text"),
    },
    "annotation": {
        "bbox": (
            lambda v: isinstance(v, list) and len(v) == 4 and all(map(is_number, v)),
            "expected four numbers: left, top, width, height",
        ),
        "iscrowd": (lambda v: isinstance(v, int | float) and v in (0, 1), "write 0 or 1"),
        "area": (
            lambda v: is_number(v) and v >= 0,
            "write the number of pixels, or leave it out to have it derived",
        ),
    },
}
"""Conditions on the values of fields, each with its remedy."""
_MAY_BE_MISSING = ("name", "iscrowd", "area")
_MAY_BE_NULL = ("iscrowd", "area")


def _field_check(key: str, is_fine: Callable[[Any], bool], remedy: str) -> Callable[..., Any]:
    def check(entry: Entry, sheet: Sheet) -> Problem | None:
        if key not in entry:
            return None if key in _MAY_BE_MISSING else _lacks(entry, key, remedy)
        value = entry[key]
        if is_fine(value) or (value is None and key in _MAY_BE_NULL):
            return None
        return _lacks(entry, key, remedy)

    check.__name__ = f"has_{key}"
    return check


for _kind, _fields in _CHECKED_FIELDS.items():
    _CHECKS[_kind] += [_field_check(key, *rest) for key, rest in _fields.items()]


@_check("image")
def _image_has_size(image: Entry, sheet: Sheet) -> Problem | None:
    for key in ("width", "height"):
        if key not in image:
            return _lacks(image, key, "")
    size = image_size(image)
    if size is None:
        text = f"has width {_shorten(image['width'])} and height {_shorten(image['height'])}"
        return Problem(text, "write the size of the image in pixels")
    if size[0] * size[1] > MOST_PIXELS:
        text = f"is annotated as {size[0]}x{size[1]}, more than {MOST_PIXELS:,} pixels"
        return Problem(text, "write its true size, or cut it into tiles")
    return None


@_check("annotation")
def _annotation_has_listed_image(annotation: Entry, sheet: Sheet) -> Problem | None:
    if "image_id" not in annotation:
        return _lacks(annotation, "image_id", "")
    key = annotation["image_id"]
    if is_id(key) and key in sheet.image_sizes:
        return None
    twin, remedy = _twin(key), "list the image or take the annotation out"
    if twin is not None and twin in sheet.image_sizes:
        remedy = f"the list of images has {twin!r}: write it the same way"
    return Problem(f"is of image {_shorten(key)}, which is not listed", remedy)


@_check("annotation")
def _annotation_has_listed_category(annotation: Entry, sheet: Sheet) -> Problem | None:
    if "category_id" not in annotation:
        return _lacks(annotation, "category_id", "")
    key = annotation["category_id"]
    if type(key) is int and key in sheet.category_ids:
        return None
    twin, remedy = _twin(key), "list the category or take the annotation out"
    named = [c.get("id") for c in _dicts(sheet.categories) if c.get("name") == key]
    if twin is not None and twin in sheet.category_ids:
        remedy = f"the list of categories has {twin!r}: write it the same way, as an integer"
    elif named:
        remedy = f"that is a category's name: write its id, {named[0]!r}"
    return Problem(f"has category {_shorten(key)}, which is not listed", remedy)


@_check("annotation")
def _box_has_area(annotation: Entry, sheet: Sheet) -> Problem | None:
    box, size = _box(annotation), _size_of(annotation, sheet)
    if box is None or size is None or has_area_inside(box, *size):
        return None
    return _note(
        f"has bbox {_shorten(annotation['bbox'])}, a box that has no area inside its image of "
        f"{size[0]}x{size[1]}",
        "training skips it, the score counts it as an object",
    )


@_check("annotation")
def _box_is_inside(annotation: Entry, sheet: Sheet) -> Problem | None:
    box, size = _box(annotation), _size_of(annotation, sheet)
    if box is None or size is None or not has_area_inside(box, *size):
        return None
    left, top, width, height = box
    # Exporters round; a box that ends a pixel outside is no sign of anything.
    if left >= -1 and top >= -1 and left + width <= size[0] + 1 and top + height <= size[1] + 1:
        return None
    return _note(
        f"has bbox {_shorten(annotation['bbox'])}, which reaches beyond its image of "
        f"{size[0]}x{size[1]}",
        "training cuts it at the edge; if these are corners, write left, top, width, height",
    )


@_check("annotation")
def _box_is_upright(annotation: Entry, sheet: Sheet) -> Problem | None:
    attributes = annotation.get("attributes")
    rotation = attributes.get("rotation") if isinstance(attributes, dict) else None
    if not is_number(rotation) or rotation % 360 == 0:
        return None
    return _note(
        f"has attributes.rotation {rotation}",
        "its bbox is read as it is, and does not frame a rotated object; write the upright box",
    )


@_check("annotation")
def _annotation_has_segmentation(annotation: Entry, sheet: Sheet) -> Problem | None:
    value = annotation.get("segmentation")
    if value is None or value == []:
        return None
    size = _size_of(annotation, sheet)
    if isinstance(value, list):
        return _polygons(value, size)
    if isinstance(value, dict):
        return _encoded(value, size)
    remedy = "write a list of polygons, or an RLE with its size"
    return Problem(f"has segmentation {_shorten(value)}", remedy)


@_check("annotation")
def _segmentation_meets_box(annotation: Entry, sheet: Sheet) -> Problem | None:
    """Check of polygons alone: the extent of an RLE is known only after decoding."""
    box, polygons = _box(annotation), annotation.get("segmentation")
    if box is None or not isinstance(polygons, list) or not polygons:
        return None
    for start in (0, 1):
        low, length = box[start], box[start + 2]
        try:
            highest = max(max(polygon[start::2]) for polygon in polygons)
            lowest = min(min(polygon[start::2]) for polygon in polygons)
            is_apart = highest < low or lowest > low + length
        except (TypeError, ValueError):  # no polygons, which another check reports
            return None
        if is_apart:
            return _note(
                f"has bbox {_shorten(annotation['bbox'])}, and its segmentation lies outside of it",
                "write both in pixels, x before y",
            )
    return None


def _polygons(polygons: list[Any], size: tuple[int, int] | None) -> Problem | None:
    def problem(text: str, remedy: str, *, is_fault: bool = True) -> Problem:
        return Problem(f"has segmentation {_shorten(polygons)}{text}", remedy, is_fault)

    if all(is_number(value) for value in polygons):
        return problem("", "write a list of polygons: [[x1, y1, x2, y2, ...]]")
    for polygon in polygons:
        if not isinstance(polygon, list) or not all(type(v) in (int, float) for v in polygon):
            return problem("", "a polygon is one flat list of numbers: [x1, y1, x2, y2, ...]")
        if len(polygon) % 2:
            return problem("", "a polygon has two numbers for each point")
    usable = [polygon for polygon in polygons if len(polygon) >= 6]
    if not usable:
        remedy = "give at least three points, or [] for an object without mask"
        return problem(", no polygon of three points", remedy)
    if size is not None and not all(_is_near(polygon, size) for polygon in usable):
        text = f" with points far outside of its image of {size[0]}x{size[1]}"
        return problem(text, "write coordinates in pixels")
    if len(usable) < len(polygons):
        text = " with a polygon of fewer than three points"
        return problem(text, "those polygons are left out, the others stay", is_fault=False)
    return None


def _is_near(polygon: list[float], size: tuple[int, int]) -> bool:
    """True if all points lie within one size of the image: others can crash pycocotools."""
    return all(
        -length <= min(values) and max(values) <= 2 * length and sum(values) == sum(values)
        for values, length in zip((polygon[::2], polygon[1::2]), size, strict=True)
    )


def _encoded(value: Entry, size: tuple[int, int] | None) -> Problem | None:
    counts = value.get("counts")
    if size is not None and value.get("size") != [size[1], size[0]]:
        return Problem(
            f"has an RLE of size {_shorten(value.get('size'))}",
            f"the image is {size[1]} high and {size[0]} wide: write [{size[1]}, {size[0]}] and "
            "the runs of that size",
        )
    remedy = "export the segmentation again"
    try:
        if not isinstance(counts, list | str):
            raise ValueError("neither a list nor a text")
        runs = run_lengths(counts) if isinstance(counts, str) else counts
        if not all(type(run) is int and run >= 0 for run in runs):
            raise ValueError("runs that are no lengths")
    except ValueError as error:
        return Problem(f"has RLE counts {_shorten(counts)} ({error})", remedy)
    if size is not None and sum(runs) != size[0] * size[1]:
        text = f"has RLE counts of {sum(runs)} pixels in all, its image has {size[0] * size[1]}"
        return Problem(text, remedy)
    return None


@_check("file")
def _something_is_listed(split: Split) -> Iterator[Problem]:
    if not split.sheet.images:
        yield Problem("lists no image", "export it again")
    if not split.sheet.categories:
        yield Problem("lists no category; there is nothing to detect", "list the classes")


@_check("file")
def _image_ids_are_unique(split: Split) -> Iterator[Problem]:
    yield from _repeated("image", split.sheet.images, "id", "every image needs its own id")
    if len({type(key) for key in split.sheet.image_sizes}) > 1:
        text = "has image ids that are integers and others that are texts"
        yield Problem(text, "write one kind")


@_check("file")
def _image_files_are_unique(split: Split) -> Iterator[Problem]:
    remedy = "list it once, with all its objects: each entry is trained on without the other's"
    yield from _repeated("image", split.sheet.images, "file_name", remedy)


@_check("file")
def _category_ids_are_unique(split: Split) -> Iterator[Problem]:
    remedy = "every category needs its own id"
    yield from _repeated("category", split.sheet.categories, "id", remedy)


@_check("file")
def _category_names_are_unique(split: Split) -> Iterator[Problem]:
    remedy = "they are trained as different classes"
    for problem in _repeated("category", split.sheet.categories, "name", remedy):
        yield problem._replace(is_fault=False)


@_check("file")
def _annotations_are_unique(split: Split) -> Iterator[Problem]:
    """Objects that are listed twice: a detector cannot find them twice, which limits its score."""
    # Numbers in place of the objects: 64 bits collide once in 10^7 files of train2017's size.
    known: set[int] = set()
    for index, annotation in enumerate(split.sheet.annotations):
        box = _box(annotation) if isinstance(annotation, dict) else None
        if box is None or annotation.get("iscrowd"):
            continue
        key = hash((repr(annotation.get("image_id")), repr(annotation.get("category_id")), box))
        if key in known:
            text = f"repeats an object, bbox {_shorten(annotation['bbox'])}"
            name = _entry_name("annotation", annotation, index)
            yield Problem(text, "the score counts it twice; take one out", False, name)
        known.add(key)


@_check("file")
def _boxes_are_in_pixels(split: Split) -> Iterator[Problem]:
    largest, is_share = 0.0, False
    for annotation in _dicts(split.sheet.annotations):
        for value in map(abs, _box(annotation) or ()):
            largest, is_share = max(largest, value), is_share or value not in (0, 1)
        if largest > 1:
            return
    if is_share:
        text = "has boxes of at most one pixel, which seem to be shares of the image"
        yield Problem(text, "multiply them by its width and height")


@_check("split")
def _objects_are_there(split: Split) -> Iterator[Problem]:
    use = "there is nothing to learn" if split.name == "train" else "average precision is undefined"
    crowds, count = 0, 0
    for annotation in _dicts(split.sheet.annotations):
        if not annotation.get("iscrowd") and _has_area(annotation, split.sheet):
            return
        crowds, count = crowds + bool(annotation.get("iscrowd")), count + 1
    if crowds:
        yield Problem(
            f"has no object to learn or to find: {crowds} of {count} annotations have iscrowd 1, "
            f"which marks groups; {use}",
            "write iscrowd 0 for single objects (CVAT writes 1 for masks)",
        )
    else:
        yield Problem(f"has no object whose box has an area; {use}", "annotate it")


@_check("masks")
def _objects_have_masks(split: Split) -> Iterator[Problem]:
    remedy = "use a fasterrcnn model, or add it"
    bare, has_any = [], False
    for index, annotation in enumerate(_dicts(split.sheet.annotations)):
        if annotation.get("segmentation"):
            has_any = True
        elif _has_area(annotation, split.sheet):
            bare.append(_entry_name("annotation", annotation, index))
    if bare and not has_any:
        text = f"has {len(bare)} objects and no segmentation, which a Mask R-CNN learns from"
        yield Problem(text, remedy)
        return
    for name in bare:
        text = "has no segmentation, which a Mask R-CNN learns from"
        yield Problem(text, remedy, entry=name)


@_check("header")
def _size_is_annotated(image: ListedImage, header: Header, split: Split) -> Problem | None:
    shown = header.shown_size(turn=split.turn)
    if image.size is None or shown == image.size:
        return None
    width, height = image.size
    if header.orientation in SWAPS and image.size == header.shown_size(turn=not split.turn):
        turned = header.shown_size()
        return Problem(
            f"is annotated as {width}x{height}; viewers turn it to {turned[0]}x{turned[1]} (EXIF "
            f"orientation {header.orientation})",
            "if its boxes were drawn on the unturned pixels, set data.exif=ignore, otherwise "
            f"data.exif=turn and write {turned[0]}x{turned[1]}",
        )
    return Problem(
        f"is {shown[0]}x{shown[1]}, annotated as {width}x{height}",
        "its boxes would be wrong: take the images that were annotated, or write that size",
    )


@_check("header")
def _turn_is_told(image: ListedImage, header: Header, split: Split) -> Problem | None:
    if header.orientation == 1:
        return None
    remedy = (
        "it is turned as viewers show it; if its boxes were drawn on the unturned pixels, set "
        "data.exif=ignore"
        if split.turn
        else "it is read unturned, as data.exif=ignore asks"
    )
    return _note(f"has EXIF orientation {header.orientation}", remedy)


@_check("header")
def _nothing_is_transparent(image: ListedImage, header: Header, split: Split) -> Problem | None:
    if not header.is_transparent:
        return None
    text = "has transparent pixels, whose hidden colours are read"
    return _note(text, "flatten it on the background that viewers show")


@_check("headers")
def _range_is_used(split: Split, headers: Sequence[Header]) -> Iterator[Problem]:
    values = [header.brightest for header in headers if header.brightest is not None]
    if values and max(values) < _DARKEST_SHARE * MOST_OF_16_BITS:
        yield _note(
            f"has {len(values)} images of 16 bits whose brightest value is {max(values)}",
            f"they are nearly black at their range, 0 to {MOST_OF_16_BITS}; multiply them",
        )


Located = Iterator[tuple[Split, Problem]]


@_check("pair")
def _categories_agree(train: Split, val: Split) -> Located:
    ours, theirs = (_category_names(split.sheet) for split in (train, val))
    different = [key for key in {**ours, **theirs} if ours.get(key) != theirs.get(key)]
    if different:
        key = min(different, key=str)
        text = (
            f"and {val.sheet.path} list different categories: id {key} is {ours.get(key)!r} and "
            f"{theirs.get(key)!r}"
        )
        yield train, Problem(text, "export both with the same list")


@_check("pair")
def _halves_differ(train: Split, val: Split) -> Located:
    if train.sheet.digest == val.sheet.digest:
        text = f"holds the same {len(val.sheet.images)} images for training and validation"
        remedy = "the score will be that of images that were learned; split them, or set "
        yield val, _note(text, f"{remedy}data.val_images and data.val_annotations")
        return
    if train.images_dir.resolve() != val.images_dir.resolve():
        return
    ours, theirs = (
        {i["file_name"] for i in _dicts(s.sheet.images) if isinstance(i.get("file_name"), str)}
        for s in (train, val)
    )
    shared = ours & theirs
    if shared:
        text = (
            f"shares {len(shared)} of {len(theirs)} images with {train.sheet.path}, the first is "
            f"{min(shared)}"
        )
        remedy = "the score will be partly that of images that were learned; take them out of one"
        yield val, _note(text, remedy)


@_check("pair")
def _classes_are_trained(train: Split, val: Split) -> Located:
    names = _category_names(train.sheet)
    unseen = val.sheet.used_categories - train.sheet.used_categories
    missing = [name for key, name in names.items() if key in unseen]
    if missing:
        text = f"has no object of {', '.join(missing[:5])}, which {val.sheet.path} has"
        yield train, _note(text, "such classes will score 0")


def _note(text: str, remedy: str) -> Problem:
    """Problem that does not stop training."""
    return Problem(text, remedy, is_fault=False)


def _lacks(entry: Entry, key: str, remedy: str) -> Problem:
    """Problem with a value that is missing or wrong."""
    if key not in entry:
        return Problem(f"has no {key!r}", "add it")
    return Problem(f"has {key} {_shorten(entry[key])}", remedy)


def _shorten(value: Any, length: int = 60) -> str:
    """A value as an error shows it, cut where it is long."""
    text = repr(value)
    return text if len(text) <= length else f"{text[: length - 3]}..."


def _entry_name(kind: str, entry: Entry, index: int) -> str:
    """Name of an entry in an error: its id, otherwise its place; an image with its file."""
    key = entry.get("id")
    name = f"{kind} {key}" if is_id(key) else f"{kind} number {index + 1}"
    if kind == "image" and isinstance(entry.get("file_name"), str):
        return f"{name} ({_shorten(entry['file_name'])[1:-1]})"
    return name


def _repeated(kind: str, entries: Iterable[Any], key: str, remedy: str) -> Iterator[Problem]:
    first: dict[Any, str] = {}
    for index, entry in enumerate(entries):
        value = entry.get(key) if isinstance(entry, dict) else None
        if not is_id(value):
            continue
        if value in first:
            text = f"has {key} {_shorten(value)} as {kind} {first[value]} has"
            yield Problem(text, remedy, entry=_entry_name(kind, entry, index))
        first.setdefault(value, f"number {index + 1}" if key == "id" else str(entry.get("id")))


def _dicts(entries: Iterable[Any]) -> Iterator[Entry]:
    """The entries that are JSON objects; others are a fault of their own."""
    return (entry for entry in entries if isinstance(entry, dict))


def _category_names(sheet: Sheet) -> dict[Any, str]:
    known = (category for category in _dicts(sheet.categories) if is_id(category.get("id")))
    return {category["id"]: str(category.get("name", category["id"])) for category in known}


def _box(annotation: Entry) -> Box | None:
    box = annotation.get("bbox")
    is_box = _CHECKED_FIELDS["annotation"]["bbox"][0]
    return (float(box[0]), float(box[1]), float(box[2]), float(box[3])) if is_box(box) else None


def _size_of(annotation: Entry, sheet: Sheet) -> tuple[int, int] | None:
    key = annotation.get("image_id")
    size = sheet.image_sizes.get(key) if is_id(key) else None
    # A mask of an absurd size is not decoded.
    return size if size is not None and size[0] * size[1] <= MOST_PIXELS else None


def _has_area(annotation: Entry, sheet: Sheet) -> bool:
    box, size = _box(annotation), _size_of(annotation, sheet)
    return box is not None and size is not None and has_area_inside(box, *size)


def _twin(value: Any) -> int | str | None:
    """Id with the same digits in the other type: an integer for a text, a text for an integer."""
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value) if isinstance(value, int) else None
