"""Checks of a data set, each a function in one of the tables; a further one is one more.

Every check judges its own thing alone and passes over what another one reports, so that one list
holds all faults.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
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
from fastcov_detection.data.findings import Finding, Problem, about_file, shorten
from fastcov_detection.data.pixels import MOST_OF_16_BITS, MOST_PIXELS, SWAPS, Header

_DARKEST_SHARE = 1 / 16

Entry = Mapping[str, Any]


@dataclass(frozen=True)
class Split:
    """One half of a data set, before it is checked.

    Args:
        name: ``train`` or ``val``.
        sheet: Its annotation file.
        images_dir: Folder that the file names are relative to.
        with_masks: A detector of masks reads it.
        turn: Images are turned as their EXIF orientation asks.
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
    """As annotated; None where that is a fault."""
    path: Path | None
    """Relative to the folder; None where there is no such file."""
    bytes: int
    changed_ns: int


def _image_has_id(image: Entry, sheet: Sheet) -> Problem | None:
    if "id" not in image:
        return Problem("has no 'id'", "add it")
    if not is_id(image["id"]):
        return Problem(f"has id {shorten(image['id'])}", "write an integer")
    return None


def _image_has_name(image: Entry, sheet: Sheet) -> Problem | None:
    name = image.get("file_name")
    if "file_name" not in image:
        return Problem("has no 'file_name'", "add it")
    if not isinstance(name, str) or not name:
        return Problem(f"has file_name {shorten(name)}", "write the name of its file")
    return None


def _image_has_size(image: Entry, sheet: Sheet) -> Problem | None:
    for key in ("width", "height"):
        if key not in image:
            return Problem(f"has no {key!r}", "add it")
    size = image_size(image)
    if size is None:
        return Problem(
            f"has width {shorten(image['width'])} and height {shorten(image['height'])}",
            "write the size of the image in pixels",
        )
    if size[0] * size[1] > MOST_PIXELS:
        return Problem(
            f"is annotated as {size[0]}x{size[1]}, more than {MOST_PIXELS:,} pixels",
            "write its true size, or cut it into tiles",
        )
    return None


def _category_has_id(category: Entry, sheet: Sheet) -> Problem | None:
    if "id" not in category:
        return Problem("has no 'id'", "add it")
    if isinstance(category["id"], bool) or not isinstance(category["id"], int):
        return Problem(f"has id {shorten(category['id'])}", "write an integer")
    return None


def _category_has_name(category: Entry, sheet: Sheet) -> Problem | None:
    if "name" in category and not isinstance(category["name"], str):
        return Problem(f"has name {shorten(category['name'])}", "write a text")
    return None


def _annotation_has_listed_image(annotation: Entry, sheet: Sheet) -> Problem | None:
    if "image_id" not in annotation:
        return Problem("has no 'image_id'", "add it")
    key = annotation["image_id"]
    if is_id(key) and key in sheet.image_sizes:
        return None
    remedy = "list the image or take the annotation out"
    twin = _twin(key)
    if twin is not None and twin in sheet.image_sizes:
        remedy = f"the list of images has {twin!r}: write it the same way"
    return Problem(f"is of image {shorten(key)}, which is not listed", remedy)


def _annotation_has_listed_category(annotation: Entry, sheet: Sheet) -> Problem | None:
    if "category_id" not in annotation:
        return Problem("has no 'category_id'", "add it")
    key = annotation["category_id"]
    if isinstance(key, int) and not isinstance(key, bool) and key in sheet.category_ids:
        return None
    twin = _twin(key)
    named = [
        category.get("id")
        for category in sheet.categories
        if isinstance(category, dict) and category.get("name") == key
    ]
    remedy = "list the category or take the annotation out"
    if twin is not None and twin in sheet.category_ids:
        remedy = f"the list of categories has {twin!r}: write it the same way, as an integer"
    elif named:
        remedy = f"that is a category's name: write its id, {named[0]!r}"
    return Problem(f"has category {shorten(key)}, which is not listed", remedy)


def _annotation_has_box(annotation: Entry, sheet: Sheet) -> Problem | None:
    if "bbox" not in annotation:
        return Problem("has no 'bbox'", "add it")
    if _box(annotation) is None:
        return Problem(
            f"has bbox {shorten(annotation['bbox'])}",
            "expected four numbers: left, top, width, height",
        )
    return None


def _box_has_area(annotation: Entry, sheet: Sheet) -> Problem | None:
    box, size = _box(annotation), _size_of(annotation, sheet)
    if box is None or size is None or has_area_inside(box, *size):
        return None
    return Problem(
        f"has bbox {shorten(annotation['bbox'])}, a box that has no area inside its image of "
        f"{size[0]}x{size[1]}",
        "training skips it, the score counts it as an object",
        is_fault=False,
    )


def _box_is_inside(annotation: Entry, sheet: Sheet) -> Problem | None:
    box, size = _box(annotation), _size_of(annotation, sheet)
    if box is None or size is None or not has_area_inside(box, *size):
        return None
    left, top, width, height = box
    # Exporters round; a box that ends a pixel outside is no sign of anything.
    if left >= -1 and top >= -1 and left + width <= size[0] + 1 and top + height <= size[1] + 1:
        return None
    return Problem(
        f"has bbox {shorten(annotation['bbox'])}, which reaches beyond its image of "
        f"{size[0]}x{size[1]}",
        "training cuts it at the edge; if these are corners, write left, top, width, height",
        is_fault=False,
    )


def _box_is_upright(annotation: Entry, sheet: Sheet) -> Problem | None:
    attributes = annotation.get("attributes")
    rotation = attributes.get("rotation") if isinstance(attributes, dict) else None
    if not is_number(rotation) or rotation % 360 == 0:
        return None
    return Problem(
        f"has attributes.rotation {rotation}",
        "its bbox is read as it is, and does not frame a rotated object; write the upright box",
        is_fault=False,
    )


def _annotation_has_crowd_flag(annotation: Entry, sheet: Sheet) -> Problem | None:
    value = annotation.get("iscrowd")
    if value is None or (isinstance(value, int | float) and value in (0, 1)):
        return None
    return Problem(f"has iscrowd {shorten(value)}", "write 0 or 1")


def _annotation_has_area(annotation: Entry, sheet: Sheet) -> Problem | None:
    value = annotation.get("area")
    if value is None or (is_number(value) and value >= 0):
        return None
    return Problem(
        f"has area {shorten(value)}",
        "write the number of pixels, or leave it out to have it derived",
    )


def _annotation_has_segmentation(annotation: Entry, sheet: Sheet) -> Problem | None:
    value = annotation.get("segmentation")
    if value is None or value == []:
        return None
    size = _size_of(annotation, sheet)
    if isinstance(value, list):
        return _polygons(value, size)
    if isinstance(value, dict):
        return _encoded(value, size)
    return Problem(
        f"has segmentation {shorten(value)}", "write a list of polygons, or an RLE with its size"
    )


def _segmentation_meets_box(annotation: Entry, sheet: Sheet) -> Problem | None:
    """Check of polygons alone, whose extent is cheap: an RLE would have to be decoded."""
    box, polygons = _box(annotation), annotation.get("segmentation")
    if box is None or not isinstance(polygons, list) or not polygons:
        return None
    left, top, width, height = box
    for start, low, length in ((0, left, width), (1, top, height)):
        try:
            highest = max(max(polygon[start::2]) for polygon in polygons)
            lowest = min(min(polygon[start::2]) for polygon in polygons)
            is_apart = highest < low or lowest > low + length
        except (TypeError, ValueError):  # no polygons, which another check reports
            return None
        if is_apart:
            return Problem(
                f"has bbox {shorten(annotation['bbox'])}, and its segmentation lies outside of it",
                "write both in pixels, x before y",
                is_fault=False,
            )
    return None


def _polygons(polygons: list[Any], size: tuple[int, int] | None) -> Problem | None:
    def problem(text: str, remedy: str, *, is_fault: bool = True) -> Problem:
        return Problem(f"has segmentation {shorten(polygons)}{text}", remedy, is_fault)

    if all(is_number(value) for value in polygons):
        return problem("", "write a list of polygons: [[x1, y1, x2, y2, ...]]")
    for polygon in polygons:
        if not isinstance(polygon, list) or not all(type(v) in (int, float) for v in polygon):
            return problem("", "a polygon is one flat list of numbers: [x1, y1, x2, y2, ...]")
        if len(polygon) % 2:
            return problem("", "a polygon has two numbers for each point")
    usable = [polygon for polygon in polygons if len(polygon) >= 6]
    if not usable:
        return problem(
            ", no polygon of three points",
            "give at least three points, or [] for an object without mask",
        )
    if size is not None and not all(_is_near(polygon, size) for polygon in usable):
        return problem(
            f" with points far outside of its image of {size[0]}x{size[1]}",
            "write coordinates in pixels",
        )
    if len(usable) < len(polygons):
        return problem(
            " with a polygon of fewer than three points",
            "those polygons are left out, the others stay",
            is_fault=False,
        )
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
            f"has an RLE of size {shorten(value.get('size'))}",
            f"the image is {size[1]} high and {size[0]} wide: write [{size[1]}, {size[0]}] and "
            "the runs of that size",
        )
    try:
        if not isinstance(counts, list | str):
            raise ValueError("neither a list nor a text")
        runs = run_lengths(counts) if isinstance(counts, str) else counts
        if not all(type(run) is int and run >= 0 for run in runs):
            raise ValueError("runs that are no lengths")
    except ValueError as error:
        return Problem(
            f"has RLE counts {shorten(counts)} ({error})", "export the segmentation again"
        )
    if size is not None and sum(runs) != size[0] * size[1]:
        return Problem(
            f"has RLE counts of {sum(runs)} pixels in all, its image has {size[0] * size[1]}",
            "export the segmentation again",
        )
    return None


EntryCheck = Callable[[Entry, Sheet], Problem | None]
IMAGE_CHECKS: tuple[EntryCheck, ...] = (_image_has_id, _image_has_name, _image_has_size)
CATEGORY_CHECKS: tuple[EntryCheck, ...] = (_category_has_id, _category_has_name)
ANNOTATION_CHECKS: tuple[EntryCheck, ...] = (
    _annotation_has_listed_image,
    _annotation_has_listed_category,
    _annotation_has_box,
    _box_has_area,
    _box_is_inside,
    _box_is_upright,
    _annotation_has_crowd_flag,
    _annotation_has_area,
    _annotation_has_segmentation,
    _segmentation_meets_box,
)


Located = tuple[str, Problem]
"""Name of an entry, empty for the whole file, and its problem."""


def _something_is_listed(split: Split) -> Iterator[Located]:
    if not split.sheet.images:
        yield "", Problem("lists no image", "export it again")
    if not split.sheet.categories:
        yield "", Problem("lists no category; there is nothing to detect", "list the classes")


def _image_ids_are_unique(split: Split) -> Iterator[Located]:
    yield from _repeated("image", split.sheet.images, "id", "every image needs its own id")
    kinds = {type(key) for key in split.sheet.image_sizes}
    if len(kinds) > 1:
        yield (
            "",
            Problem("has image ids that are integers and others that are texts", "write one kind"),
        )


def _image_files_are_unique(split: Split) -> Iterator[Located]:
    remedy = "list it once, with all its objects: each entry is trained on without the other's"
    yield from _repeated("image", split.sheet.images, "file_name", remedy)


def _category_ids_are_unique(split: Split) -> Iterator[Located]:
    remedy = "every category needs its own id"
    yield from _repeated("category", split.sheet.categories, "id", remedy)


def _category_names_are_unique(split: Split) -> Iterator[Located]:
    remedy = "they are trained as different classes"
    for entry, problem in _repeated("category", split.sheet.categories, "name", remedy):
        yield entry, problem._replace(is_fault=False)


def _annotations_are_unique(split: Split) -> Iterator[Located]:
    """Objects that are listed twice: a detector cannot find them twice, which limits its score."""
    # Numbers in place of the objects: 64 bits collide once in 10^7 files of train2017's size.
    known: set[int] = set()
    for index, annotation in enumerate(split.sheet.annotations):
        box = _box(annotation) if isinstance(annotation, dict) else None
        if box is None or annotation.get("iscrowd"):
            continue
        key = hash((repr(annotation.get("image_id")), repr(annotation.get("category_id")), box))
        if key in known:
            yield (
                entry_name("annotation", annotation, index),
                Problem(
                    f"repeats an object, bbox {shorten(annotation['bbox'])}",
                    "the score counts it twice; take one out",
                    is_fault=False,
                ),
            )
        known.add(key)


def _boxes_are_in_pixels(split: Split) -> Iterator[Located]:
    largest, is_share = 0.0, False
    for annotation in dicts(split.sheet.annotations):
        for value in map(abs, _box(annotation) or ()):
            largest, is_share = max(largest, value), is_share or value not in (0, 1)
        if largest > 1:
            return
    if is_share:
        yield (
            "",
            Problem(
                "has boxes of at most one pixel, which seem to be shares of the image",
                "multiply them by its width and height",
            ),
        )


def _objects_are_there(split: Split) -> Iterator[Located]:
    use = "there is nothing to learn" if split.name == "train" else "average precision is undefined"
    crowds, count = 0, 0
    for annotation in dicts(split.sheet.annotations):
        if not annotation.get("iscrowd") and _has_area(annotation, split.sheet):
            return
        crowds, count = crowds + bool(annotation.get("iscrowd")), count + 1
    if crowds:
        yield (
            "",
            Problem(
                f"has no object to learn or to find: {crowds} of {count} annotations have "
                f"iscrowd 1, which marks groups; {use}",
                "write iscrowd 0 for single objects (CVAT writes 1 for masks)",
            ),
        )
    else:
        yield "", Problem(f"has no object whose box has an area; {use}", "annotate it")


def _objects_have_masks(split: Split) -> Iterator[Located]:
    """Check for detectors of masks."""
    remedy = "use a fasterrcnn model, or add it"
    bare, has_any = [], False
    for index, annotation in enumerate(dicts(split.sheet.annotations)):
        if annotation.get("segmentation"):
            has_any = True
        elif _has_area(annotation, split.sheet):
            bare.append(entry_name("annotation", annotation, index))
    if bare and not has_any:
        text = f"has {len(bare)} objects and no segmentation, which a Mask R-CNN learns from"
        yield "", Problem(text, remedy)
        return
    for name in bare:
        yield name, Problem("has no segmentation, which a Mask R-CNN learns from", remedy)


FileCheck = Callable[[Split], Iterator[Located]]
FILE_CHECKS: tuple[FileCheck, ...] = (
    _something_is_listed,
    _image_ids_are_unique,
    _image_files_are_unique,
    _category_ids_are_unique,
    _category_names_are_unique,
    _annotations_are_unique,
    _boxes_are_in_pixels,
)
MASK_CHECKS: tuple[FileCheck, ...] = (_objects_have_masks,)
SPLIT_CHECKS: tuple[FileCheck, ...] = (_objects_are_there,)


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


def _turn_is_told(image: ListedImage, header: Header, split: Split) -> Problem | None:
    if header.orientation == 1:
        return None
    told = "it is turned as viewers show it; if its boxes were drawn on the unturned pixels, set "
    return Problem(
        f"has EXIF orientation {header.orientation}",
        f"{told}data.exif=ignore"
        if split.turn
        else "it is read unturned, as data.exif=ignore asks",
        is_fault=False,
    )


def _nothing_is_transparent(image: ListedImage, header: Header, split: Split) -> Problem | None:
    if not header.is_transparent:
        return None
    return Problem(
        "has transparent pixels, whose hidden colours are read",
        "flatten it on the background that viewers show",
        is_fault=False,
    )


HeaderCheck = Callable[[ListedImage, Header, Split], Problem | None]
HEADER_CHECKS: tuple[HeaderCheck, ...] = (
    _size_is_annotated,
    _turn_is_told,
    _nothing_is_transparent,
)


def _range_is_used(headers: Sequence[Header], split: Split) -> Iterator[Located]:
    values = [header.brightest for header in headers if header.brightest is not None]
    if values and max(values) < _DARKEST_SHARE * MOST_OF_16_BITS:
        yield (
            "",
            Problem(
                f"has {len(values)} images of 16 bits whose brightest value is {max(values)}",
                f"they are nearly black at their range, 0 to {MOST_OF_16_BITS}; multiply them",
                is_fault=False,
            ),
        )


HeadersCheck = Callable[[Sequence[Header], Split], Iterator[Located]]
HEADERS_CHECKS: tuple[HeadersCheck, ...] = (_range_is_used,)


def _categories_agree(train: Split, val: Split) -> Iterator[Finding]:
    names = [_category_names(split.sheet) for split in (train, val)]
    different = [key for key in {**names[0], **names[1]} if names[0].get(key) != names[1].get(key)]
    if different:
        key = min(different, key=str)
        yield about_file(
            train.sheet.path,
            "categories_agree",
            f"and {val.sheet.path} list different categories: id {key} is "
            f"{names[0].get(key)!r} and {names[1].get(key)!r}",
            "export both with the same list",
        )


def _halves_differ(train: Split, val: Split) -> Iterator[Finding]:
    if train.sheet.digest == val.sheet.digest:
        yield about_file(
            val.sheet.path,
            "halves_differ",
            f"holds the same {len(val.sheet.images)} images for training and validation",
            "the score will be that of images that were learned; split them, or set "
            "data.val_images and data.val_annotations",
            is_fault=False,
        )
        return
    if train.images_dir.resolve() != val.images_dir.resolve():
        return
    names = [
        {i["file_name"] for i in dicts(s.sheet.images) if isinstance(i.get("file_name"), str)}
        for s in (train, val)
    ]
    shared = names[0] & names[1]
    if shared:
        yield about_file(
            val.sheet.path,
            "halves_differ",
            f"shares {len(shared)} of {len(names[1])} images with {train.sheet.path}, the first "
            f"is {min(shared)}",
            "the score will be partly that of images that were learned; take them out of one",
            is_fault=False,
        )


def _classes_are_trained(train: Split, val: Split) -> Iterator[Finding]:
    used = [split.sheet.used_categories for split in (train, val)]
    names = _category_names(train.sheet)
    unseen = [names[key] for key in names if key in used[1] and key not in used[0]]
    if unseen:
        yield about_file(
            train.sheet.path,
            "classes_are_trained",
            f"has no object of {', '.join(unseen[:5])}, which {val.sheet.path} has",
            "such classes will score 0",
            is_fault=False,
        )


PairCheck = Callable[[Split, Split], Iterator[Finding]]
PAIR_CHECKS: tuple[PairCheck, ...] = (_categories_agree, _halves_differ, _classes_are_trained)


def entry_name(kind: str, entry: Entry, index: int) -> str:
    """Name of an entry in an error: its id, otherwise its place; an image with its file."""
    key = entry.get("id")
    name = f"{kind} {key}" if is_id(key) else f"{kind} number {index + 1}"
    if kind == "image" and isinstance(entry.get("file_name"), str):
        return f"{name} ({shorten(entry['file_name'])[1:-1]})"
    return name


def _repeated(kind: str, entries: Iterable[Any], key: str, remedy: str) -> Iterator[Located]:
    first: dict[Any, str] = {}
    for index, entry in enumerate(entries):
        value = entry.get(key) if isinstance(entry, dict) else None
        if not is_id(value):
            continue
        name = entry_name(kind, entry, index)
        if value in first:
            yield name, Problem(f"has {key} {shorten(value)} as {kind} {first[value]} has", remedy)
        first.setdefault(value, f"number {index + 1}" if key == "id" else str(entry.get("id")))


def dicts(entries: Iterable[Any]) -> Iterator[Entry]:
    """The entries that are JSON objects; others are a fault of their own."""
    return (entry for entry in entries if isinstance(entry, dict))


def _category_names(sheet: Sheet) -> dict[Any, str]:
    return {
        category["id"]: str(category.get("name", category["id"]))
        for category in dicts(sheet.categories)
        if is_id(category.get("id"))
    }


def _box(annotation: Entry) -> tuple[float, float, float, float] | None:
    box = annotation.get("bbox")
    if not isinstance(box, list) or len(box) != 4 or not all(map(is_number, box)):
        return None
    return (float(box[0]), float(box[1]), float(box[2]), float(box[3]))


def _size_of(annotation: Entry, sheet: Sheet) -> tuple[int, int] | None:
    key = annotation.get("image_id")
    size = sheet.image_sizes.get(key) if is_id(key) else None
    # A mask of an absurd size is not decoded.
    return size if size is not None and size[0] * size[1] <= MOST_PIXELS else None


def _has_area(annotation: Entry, sheet: Sheet) -> bool:
    box, size = _box(annotation), _size_of(annotation, sheet)
    return box is not None and size is not None and has_area_inside(box, *size)


def _twin(value: Any) -> int | str | None:
    """The same id as an integer instead of a text, or as a text instead of an integer."""
    if isinstance(value, str):
        return int(value) if value.strip().isdecimal() else None
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return str(value) if isinstance(value, int) else None
