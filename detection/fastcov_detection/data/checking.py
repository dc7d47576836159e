"""Check of a whole data set before the first step: annotation files and image headers, once.

The checks themselves stand in :mod:`fastcov_detection.data.checks`. Findings are kept by content,
so a data set is checked again only after a change.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from fastcov_detection.data.checks import (
    ANNOTATION_CHECKS,
    CATEGORY_CHECKS,
    FILE_CHECKS,
    HEADER_CHECKS,
    HEADERS_CHECKS,
    IMAGE_CHECKS,
    MASK_CHECKS,
    PAIR_CHECKS,
    SPLIT_CHECKS,
    FileCheck,
    ListedImage,
    Split,
    dicts,
    entry_name,
)
from fastcov_detection.data.coco import Sheet, image_size, is_id
from fastcov_detection.data.findings import Finding, Problem, as_json, from_json, shorten
from fastcov_detection.data.layouts import Names, nearby
from fastcov_detection.data.pixels import DECODER, Header, read_header
from fastcov_detection.errors import DataError
from fastcov_detection.files import write_text
from fastcov_detection.progress import Advance, progress_bar

log = logging.getLogger("fastcov_detection")

_VERSION = 1
"""Number of the checks' version: findings of another one are not used."""
_READERS = 8
_ROUND = 256
_MOST_MISSING = 10


class Checked(NamedTuple):
    """Result of the check of one half."""

    findings: list[Finding]
    paths: dict[Any, Path]
    """Files by image id, relative to the folder."""
    images_digest: str
    """Of the names and byte counts of the images, wherever they lie."""


def check_entries(split: Split, advance: Advance | None = None) -> list[Finding]:
    """Findings of every check of the annotation file alone."""
    sheet = split.sheet
    parts = (
        ("image", sheet.images, IMAGE_CHECKS),
        ("category", sheet.categories, CATEGORY_CHECKS),
        ("annotation", sheet.annotations, ANNOTATION_CHECKS),
    )
    findings = []
    for kind, entries, checks in parts:
        for index, entry in enumerate(entries):
            if not isinstance(entry, dict):
                problem = Problem(f"is {shorten(entry)}", "expected a JSON object")
                findings.append(Finding(str(sheet.path), f"{kind} {index}", problem, "is_object"))
                continue
            for check in checks:
                found = check(entry, sheet)
                if found is not None:
                    name = entry_name(kind, entry, index)
                    findings.append(Finding(str(sheet.path), name, found, check.__name__))
            if advance is not None and kind == "annotation" and index % _ROUND == _ROUND - 1:
                advance(_ROUND)
    findings += _located(split, FILE_CHECKS + (MASK_CHECKS if split.with_masks else ()))
    if advance is not None:
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
    names = Names(split.images_dir)
    listed, missing, renamed = [], [], []
    for index, image in enumerate(split.sheet.images):
        if not isinstance(image, dict) or not isinstance(image.get("file_name"), str):
            continue
        entry, name = entry_name("image", image, index), image["file_name"]
        path = names.find(name) if name else None
        stat = None if path is None else (split.images_dir / path).stat()
        one = ListedImage(
            entry,
            image.get("id") if is_id(image.get("id")) else None,
            name,
            image_size(image),
            path,
            -1 if stat is None else stat.st_size,
            -1 if stat is None else stat.st_mtime_ns,
        )
        listed.append(one)
        if path is None:
            missing.append(one)
        elif str(path) != str(Path(name)):
            renamed.append(one)
    return listed, [*_missing(split, names, listed, missing), *_renamed(split, renamed)]


def check_split(split: Split, *, progress: bool = True) -> Checked:
    """Findings about one half: its annotation file, and the header of every image.

    What was found is kept in the user's cache folder by the content of the annotation file and the
    names, sizes and times of the images, and found again there.

    Args:
        split: The half.
        progress: Show a bar.

    Raises:
        DataError: If the folder of the images is missing.
    """
    listed, findings = list_images(split)
    paths = {one.image_id: one.path for one in listed if one.path is not None}
    names = [(one.file_name, one.bytes) for one in listed]
    digest = hashlib.sha256(json.dumps(names).encode()).hexdigest()
    cache = _cache_path(split, listed)
    known = _read_cache(cache)
    if known is None:
        total = len(split.sheet.annotations) + len(listed)
        with progress_bar(f"checking {split.name} data", total, enabled=progress) as advance:
            known = check_entries(split, advance)
            known += _check_headers(split, listed, advance)
            known += _located(split, SPLIT_CHECKS)
        _write_cache(cache, known)
    return Checked(findings + known, paths, digest)


def check_pair(train: Split, val: Split) -> list[Finding]:
    """Findings about the two halves together."""
    return [finding for check in PAIR_CHECKS for finding in check(train, val)]


def synthetic_roots(sheets: Sequence[Sheet]) -> frozenset[int]:
    """Ids of categories that stand for all others: Roboflow lists the data set itself as one.

    Such a category is every other one's supercategory, has none itself, and has no object in any
    of the files.
    """
    roots: set[int] = set()
    for category in dicts(sheets[0].categories):
        others = [c for c in dicts(sheets[0].categories) if c.get("id") != category.get("id")]
        above = category.get("supercategory")
        if (
            others
            and is_id(category.get("id"))
            and above in ("none", None, "")
            and all(other.get("supercategory") == category.get("name") for other in others)
        ):
            roots.add(category["id"])
    return frozenset(roots - {key for sheet in sheets for key in sheet.used_categories})


def _check_headers(split: Split, listed: Sequence[ListedImage], advance: Advance) -> list[Finding]:
    findings: list[Finding] = []
    headers: list[Header] = []
    present = [one for one in listed if one.path is not None]
    advance(len(listed) - len(present))
    places = [split.images_dir / (one.path or one.file_name) for one in present]
    with ThreadPoolExecutor(_READERS) as pool:
        for image, header in zip(present, pool.map(read_header, places), strict=True):
            advance(1)
            if isinstance(header, Problem):
                findings.append(_about(split, image.entry, header, "is_read"))
                continue
            headers.append(header)
            for check in HEADER_CHECKS:
                problem = check(image, header, split)
                if problem is not None:
                    findings.append(_about(split, image.entry, problem, check.__name__))
    for check_all in HEADERS_CHECKS:
        for entry, problem in check_all(headers, split):
            findings.append(_about(split, entry, problem, check_all.__name__))
    return findings


def _missing(
    split: Split, names: Names, listed: Sequence[ListedImage], missing: Sequence[ListedImage]
) -> Iterator[Finding]:
    if len(missing) > _MOST_MISSING:
        first = missing[0]
        text = (
            f"{len(missing)} of {len(listed)} images of {split.sheet.path} are not in "
            f"{split.images_dir}, the first is {first.file_name}{names.near(first.file_name)}"
        )
        problem = Problem(text, "give the folder that holds them, or download them again")
        yield Finding(str(split.images_dir), "", problem, "is_there")
        return
    for one in missing:
        text = f"is not in {split.images_dir}{names.near(one.file_name)}"
        problem = Problem(text, "download it again, or take it out of the annotations")
        yield _about(split, one.entry, problem, "is_there")


def _renamed(split: Split, renamed: Sequence[ListedImage]) -> Iterator[Finding]:
    for one in renamed:
        text = f"is read from {one.path}, the only file that its name can mean"
        problem = Problem(text, "write that name to be sure", is_fault=False)
        yield _about(split, one.entry, problem, "is_named")
    counts = Counter(one.path for one in renamed)
    for one in renamed:
        if counts[one.path] > 1:
            text = f"is read from {one.path}, as another image is"
            yield _about(split, one.entry, Problem(text, "write the true names"), "is_one_file")


def _located(split: Split, checks: Sequence[FileCheck]) -> list[Finding]:
    return [
        _about(split, entry, problem, check.__name__)
        for check in checks
        for entry, problem in check(split)
    ]


def _about(split: Split, entry: str, problem: Problem, check: str) -> Finding:
    return Finding(str(split.sheet.path), entry, problem, check)


def _cache_path(split: Split, listed: Sequence[ListedImage]) -> Path:
    images = [(str(one.path), one.bytes, one.changed_ns) for one in listed]
    parts = [_VERSION, DECODER, split.name, split.sheet.digest, str(split.sheet.path)]
    parts += [str(split.images_dir), split.with_masks, split.turn, images]
    key = hashlib.sha256(json.dumps(parts).encode()).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return Path(base) / "fastcov-detection" / "checked" / f"{key}.json"


def _read_cache(path: Path) -> list[Finding] | None:
    try:
        return from_json(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None


def _write_cache(path: Path, findings: Sequence[Finding]) -> None:
    try:
        write_text(path, json.dumps(as_json(findings)))
    except OSError as error:
        log.info("findings are not kept: %s", error)
