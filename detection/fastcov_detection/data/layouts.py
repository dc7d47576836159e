"""Layouts of data folders that annotation tools write, and the search for annotated image files.

An annotation file is looked for first, then the folder of its images.
"""

from __future__ import annotations

import difflib
import os
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path
from urllib.parse import unquote

from fastcov_detection.errors import DataError

SPLITS = {
    "train": ("train", "Train", "training"),
    "val": ("val", "Val", "valid", "validation", "Validation"),
}
"""Names of a split's folder."""

# {split} is each name of SPLITS in turn; the first file that exists is taken.
_ANNOTATIONS = (
    "annotations/instances_{split}2017.json",
    "annotations/instances_{split}.json",
    "annotations/instances_{split}2014.json",
    "{split}/_annotations.coco.json",  # Roboflow
    "annotations/{split}.json",
    "{split}/annotations/instances_default.json",  # CVAT, a task for each split
    "{split}/result.json",  # Label Studio, an export for each split
    "{split}/labels.json",  # FiftyOne
    "{split}/annotations.json",
)
# One file for a whole folder, without splits.
_UNSPLIT = ("annotations/instances_default.json", "result.json", "_annotations.coco.json")
_IMAGES = (
    "{split}2017",
    "{split}2014",
    "images/{split}2017",
    "images/{split}2014",
    "images/{split}",
    "{split}/images/default",
    "{split}/images",
    "{split}/data",
    "{split}",
)
_UNSPLIT_IMAGES = ("images/default", "images", "train", ".")
_IMAGE_ENDINGS = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".gif")
_DEPTH = 3
_SHOWN = 8


def find_annotations(folder: Path, split: str) -> tuple[Path, str | None]:
    """The annotation file of a split.

    Returns:
        The file and the split's name in this folder; None where one file serves both splits.

    Raises:
        DataError: If there is none, with the files and folders that there are.
    """
    if not folder.is_dir():
        raise DataError(
            f"data folder {folder} is missing; give mini or a folder in COCO layout{nearby(folder)}"
        )
    for pattern in _ANNOTATIONS:
        for name in SPLITS[split]:
            path = folder / pattern.format(split=name)
            if path.is_file():
                return path, name
    for pattern in _UNSPLIT:
        if (folder / pattern).is_file() and not _has_split(folder):
            return folder / pattern, None
    raise DataError(
        f"no {split} split in {folder}: no annotation file where COCO, Roboflow, CVAT, Label "
        f"Studio or FiftyOne write one; {folder_contents(folder)}; "
        f"set data.{split}_images and data.{split}_annotations"
    )


def find_images(folder: Path, name: str | None, annotations: Path, files: Sequence[str]) -> Path:
    """The folder of a split's images: the first one that holds the first listed image.

    Args:
        folder: Folder of the data set.
        name: Name of the split in this folder; None where there are no splits.
        annotations: Annotation file of the split.
        files: Names of the split's images.

    Raises:
        DataError: If no known folder exists.
    """
    patterns = _UNSPLIT_IMAGES if name is None else _IMAGES
    places = [folder / pattern.format(split=name) for pattern in patterns]
    places.append(annotations.parent)
    present = [place for place in places if place.is_dir()]
    for place in present:
        if files and _exact(place, files[0]) is not None:
            return place
    # An exporter may have changed the names. The annotation file's own folder then comes last.
    for place in present:
        if files and ImageFinder(place).find(files[0]) is not None:
            return place
    if not present:
        raise DataError(
            f"no folder of images for {annotations}; {folder_contents(folder)}; "
            f"set data.{name or 'train'}_images"
        )
    return present[0]


def _has_split(folder: Path) -> bool:
    return any(
        (folder / pattern.format(split=name)).is_file()
        for pattern in _ANNOTATIONS
        for names in SPLITS.values()
        for name in names
    )


class ImageFinder:
    """Search for the files that an annotation file names.

    Where no file has the name as it is written, changes of exporters are undone: backslashes,
    ``%20``, a folder of the exporting machine, another case or Unicode form of the letters. The
    name's last part must then belong to one file alone.

    Args:
        folder: Folder of the images.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._index: dict[str, list[Path]] | None = None

    def find(self, name: str) -> Path | None:
        """The file of a name, relative to the folder; None where there is none, or several."""
        for spelling in (name, *_spellings(name)):
            found = _exact(self.folder, spelling)
            if found is not None:
                return found
        places = self._files().get(_fold(_last_part(name)), [])
        return places[0] if len(places) == 1 else None

    def suggestions(self, name: str) -> str:
        """Files of the folder beside a missing one, as the end of a sentence."""
        wanted = _fold(_last_part(name))
        same = self._files().get(wanted, [])
        if len(same) > 1:
            return f", {len(same)} files have that name: {_listed(map(str, same))}"
        close = difflib.get_close_matches(wanted, list(self._files()), n=3, cutoff=0.6)
        if close:
            return f", near it are {_listed(str(self._files()[key][0]) for key in close)}"
        others = [str(paths[0]) for paths in self._files().values()]
        if not others:
            return ", the folder has no image at all"
        return f", the folder has {_listed(sorted(others))}"

    def _files(self) -> dict[str, list[Path]]:
        if self._index is None:
            self._index = {}
            for root, _, names in os.walk(self.folder):
                for name in names:
                    if name.lower().endswith(_IMAGE_ENDINGS):
                        path = Path(root, name).relative_to(self.folder)
                        self._index.setdefault(_fold(name), []).append(path)
        return self._index


def nearby(path: Path) -> str:
    """Similar names beside a missing path, as the end of a sentence; empty where there are none."""
    parent = path.parent
    if not parent.is_dir():
        return f" ({parent} is missing as well)"
    names = sorted(entry.name for entry in parent.iterdir() if not entry.name.startswith("."))
    close = difflib.get_close_matches(path.name, names, n=3, cutoff=0.5)
    if close:
        return f"; near it in {parent}: {_listed(close)}"
    return f"; {parent} has {_listed(names)}" if names else f"; {parent} is empty"


def folder_contents(folder: Path) -> str:
    """JSON files and folders of images in a folder, as a clause."""
    if not folder.is_dir():
        return f"{folder} is missing"
    files, folders = [], []
    for root, names, entries in os.walk(folder):
        here = Path(root).relative_to(folder)
        if len(here.parts) >= _DEPTH:
            names.clear()
        names[:] = sorted(name for name in names if not name.startswith("."))
        files += [str(here / name) for name in sorted(entries) if name.endswith(".json")]
        images = sum(name.lower().endswith(_IMAGE_ENDINGS) for name in entries)
        if images:
            folders.append(f"{here}/ ({images} images)")
    if not files and not folders:
        return f"it has {_listed(sorted(p.name for p in folder.iterdir())) or 'nothing in it'}"
    return f"found there: {_listed(files + folders)}"


def _listed(names: Iterable[str]) -> str:
    known = list(names)
    more = f" and {len(known) - _SHOWN} more" if len(known) > _SHOWN else ""
    return ", ".join(known[:_SHOWN]) + more


def _exact(folder: Path, name: str) -> Path | None:
    try:
        return Path(name) if name and (folder / name).is_file() else None
    except (OSError, ValueError):  # too long, or with a null byte
        return None


def _spellings(name: str) -> list[str]:
    """Spellings of a name with the changes of exporters undone."""
    plain = name.replace("\\", "/")
    # Label Studio serves local files as /data/local-files/?d=FOLDER/NAME.
    plain = plain.split("?d=")[-1]
    known = [plain, unquote(plain)]
    return [spelling for part in known for spelling in (part, part.lstrip("./"), _last_part(part))]


def _last_part(name: str) -> str:
    return unquote(name.replace("\\", "/")).rstrip("/").split("/")[-1]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", name).casefold()
