"""Images and targets for training and evaluation, from any data set in COCO format."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from fastcov_detection.config import DataConfig
from fastcov_detection.data.augment import Augmentation, large_enough, whole
from fastcov_detection.data.checking import (
    Checked,
    check_entries,
    check_pair,
    check_split,
    list_images,
    synthetic_roots,
)
from fastcov_detection.data.checks import Split
from fastcov_detection.data.coco import CocoFile, ImageRecord, Records, build_file, read_sheet
from fastcov_detection.data.findings import Finding, Problem, refuse_faults, tell_notes
from fastcov_detection.data.layouts import find_annotations, find_images, nearby
from fastcov_detection.data.mini import make_mini
from fastcov_detection.data.pixels import read_pixels
from fastcov_detection.distributed import rank
from fastcov_detection.errors import DataError

Target = dict[str, Any]
Batch = TypeVar("Batch")

__all__ = [
    "CocoDataset",
    "DataError",
    "LoadedData",
    "Target",
    "check_data",
    "load_data",
]


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Images of a folder with the objects of a COCO annotation file.

    Crowds are left out of the targets (evaluation knows them), boxes end at the image's edge, and
    labels run from 1 to K in the order of the category ids.

    Args:
        images_dir: Folder that the file names are relative to.
        annotation_file: COCO instances JSON, which is checked, or one that was checked and built.
        with_masks: Put the objects' masks into the targets.
        turn: Turn images as their EXIF orientation asks.

    Raises:
        DataError: If a file is missing or the annotations cannot be used; it names the thing.
    """

    def __init__(
        self,
        images_dir: str | os.PathLike[str],
        annotation_file: str | os.PathLike[str] | CocoFile,
        *,
        with_masks: bool = False,
        turn: bool = True,
    ) -> None:
        self.images_dir = Path(images_dir)
        if not isinstance(annotation_file, CocoFile):
            annotation_file = _read_alone(self.images_dir, Path(annotation_file), with_masks)
        self.file: CocoFile = annotation_file
        self.with_masks, self.turn = with_masks, turn
        self.records: Records = self.file.images
        self.class_names: tuple[str, ...] = tuple(self.file.categories.values())
        self.label_of = {category: label for label, category in enumerate(self.file.categories, 1)}
        self.category_of = {label: category for category, label in self.label_of.items()}

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        """One image and its target, unchanged; see :meth:`read`."""
        return self.read(index)

    def read(
        self,
        index: int,
        augmentation: Augmentation | None = None,
        draws: torch.Generator | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> tuple[Tensor, Target]:
        """One image and its target, changed at random where that is asked for.

        Args:
            index: Of the image.
            augmentation: Random changes; None: none.
            draws: Where they come from; needed with ``augmentation``.
            pixels: Of the image, where they are known already.

        Returns:
            Pixels of eight bits [3, H, W], and boxes, labels, image_id and, where they are wanted,
            masks [N, H, W].

        Raises:
            DataError: If the image cannot be decoded or has another size than annotated.
        """
        record = self.records[index]
        pixels = self._decode(record) if pixels is None else pixels
        objects = [a for a in record.annotations if not a.is_crowd]
        boxes = torch.tensor([record.clipped_box(a) for a in objects], dtype=torch.float32)
        boxes = boxes.reshape(-1, 4)
        frame = None
        if augmentation is not None and draws is not None:
            frame = augmentation.frame(record.width, record.height, draws)
            if augmentation.photometric > 0 or frame != whole(record.width, record.height):
                changed = augmentation.colours(frame.pixels(Image.fromarray(pixels)), draws)
                pixels = np.array(changed)
            boxes = frame.boxes(boxes)
            if augmentation.zoom is not None:
                kept = large_enough(boxes)
                boxes = boxes[kept]
                objects = [
                    one for one, is_kept in zip(objects, kept.tolist(), strict=True) if is_kept
                ]
        frame = frame or whole(record.width, record.height)
        target: Target = {
            "boxes": boxes,
            "labels": torch.tensor(
                [self.label_of[a.category_id] for a in objects], dtype=torch.int64
            ),
            "image_id": record.image_id,
        }
        if self.with_masks:
            outlines = [one.segmentation for one in objects]
            masks = frame.masks(outlines, record.height, record.width)
            target["masks"] = torch.from_numpy(masks)
        return torch.from_numpy(pixels).permute(2, 0, 1), target

    def decode(self, index: int) -> NDArray[np.uint8]:
        """The pixels of one image. [H, W, 3]

        Raises:
            DataError: If the image cannot be decoded or has another size than annotated.
        """
        return self._decode(self.records[index])

    def _decode(self, record: ImageRecord) -> NDArray[np.uint8]:
        path = self.images_dir / (record.path or record.file_name)
        pixels = read_pixels(path, turn=self.turn)
        if pixels.shape[:2] != (record.height, record.width):
            raise DataError(
                f"image {path} is {pixels.shape[1]}x{pixels.shape[0]}, annotated as "
                f"{record.width}x{record.height}; its boxes would be wrong"
            )
        return pixels

    def aspect_ratios(self) -> list[float]:
        """Width by height of every image, as annotated."""
        sizes = self.records.sizes()
        ratios: list[float] = (sizes[:, 0] / sizes[:, 1]).tolist()
        return ratios

    def image_ids(self) -> list[int | str]:
        """Ids of the images, as annotated."""
        return self.records.image_ids()

    def has_objects(self) -> bool:
        """True if an image has an object that is not a crowd."""
        return bool((self.records.counts() > 0).any())

    def drop_empty(self) -> None:
        """Leaves out images without a single object to learn from."""
        self.records = self.records.with_objects()
        if not len(self.records):
            raise DataError(f"{self.file.path} has no object that is not a crowd; nothing to learn")


class LoadedData(NamedTuple):
    """A data set's two halves, without augmentation, and the names of labels 1 to K."""

    train: CocoDataset
    val: CocoDataset
    class_names: tuple[str, ...]
    content: dict[str, str]
    """Digests of both annotation files and of both lists of images, wherever they lie; empty for
    ``mini``, which its settings determine."""


def load_data(config: DataConfig, *, with_masks: bool = False, progress: bool = True) -> LoadedData:
    """Opens the configured data set and checks all of it; ``mini`` is built first where it is
    missing.

    Where a folder's annotations and images are looked for stands in
    :mod:`fastcov_detection.data.layouts`; paths in the configuration override what is found.

    Raises:
        DataError: If nothing of that kind is there, or with a list of everything that is bad.
    """
    findings, splits, checked = _find_and_check(config, with_masks, progress)
    refuse_faults(findings)
    if rank() == 0:
        tell_notes(findings)
    roots = synthetic_roots([split.sheet for split in splits.values()])
    halves = {}
    for name, split in splits.items():
        file = build_file(split.sheet, roots, with_masks=with_masks)
        file.images.set_paths(checked[name].paths)
        halves[name] = CocoDataset(
            split.images_dir, file, with_masks=with_masks, turn=config.exif == "turn"
        )
    train, val = halves["train"], halves["val"]
    if not config.keep_empty:
        train.drop_empty()
    content = {}
    if config.name != "mini":
        content = {f"{name}_annotations": split.sheet.digest for name, split in splits.items()}
        content |= {f"{name}_images": one.images_digest for name, one in checked.items()}
    return LoadedData(train, val, train.class_names, content)


def check_data(
    config: DataConfig, *, with_masks: bool = False, progress: bool = True
) -> list[Finding]:
    """Everything that is wrong with a data set, and all that training goes on with.

    Raises:
        DataError: If an annotation file or a folder of images is missing.
    """
    return _find_and_check(config, with_masks, progress)[0]


def one_line(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches of a DataLoader, whose workers' errors become the one line that they are.

    Raises:
        DataError: If an image cannot be read, or a worker was killed.
    """
    try:
        yield from batches
    except DataError as error:
        # A worker's error arrives with its traceback as text; the last line is what was raised.
        raise DataError(str(error).strip().splitlines()[-1].split("DataError: ")[-1]) from None
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise DataError(
            f"{str(error).splitlines()[0].rstrip('. ')}; it read images: free memory, or set "
            "data.workers lower"
        ) from None


def _read_alone(images_dir: Path, annotations: Path, with_masks: bool) -> CocoFile:
    """Objects of one annotation file, checked but for its images' headers."""
    split = Split("train", read_sheet(annotations), images_dir, with_masks=with_masks)
    listed, findings = list_images(split)
    findings = check_entries(split) + findings
    refuse_faults(findings)
    tell_notes(findings)
    file = build_file(split.sheet)
    file.images.set_paths({one.image_id: one.path for one in listed if one.path is not None})
    return file


def _find_and_check(
    config: DataConfig, with_masks: bool, progress: bool
) -> tuple[list[Finding], dict[str, Split], dict[str, Checked]]:
    """Both halves of a data set and every finding about them."""
    splits: dict[str, Split] = {}
    missing = []
    for name in ("train", "val"):
        try:
            splits[name] = _find_split(config, name, with_masks, progress)
        except DataError as error:
            missing.append(str(error))
    if missing:
        raise DataError("\n  ".join(dict.fromkeys(missing)))
    checked = {name: check_split(split, progress=progress) for name, split in splits.items()}
    findings = [finding for one in checked.values() for finding in one.findings]
    findings += check_pair(*splits.values())
    sheets = [split.sheet for split in splits.values()]
    for root in sorted(synthetic_roots(sheets)):
        text = "is every other category's supercategory and has no object"
        problem = Problem(text, "it is no class of its own", is_fault=False)
        findings.append(Finding(str(sheets[0].path), f"category {root}", problem, "root"))
    if sheets[0].path == sheets[1].path:  # one file for both: each finding once
        findings = list(dict.fromkeys(findings))
    return findings, splits, checked


def _find_split(config: DataConfig, name: str, with_masks: bool, progress: bool) -> Split:
    images = getattr(config, f"{name}_images")
    annotations = getattr(config, f"{name}_annotations")
    if config.name == "mini":
        folder = make_mini(config.root, config.mini, progress=progress)
    else:
        folder = Path(config.name)
    place: str | None = name
    if annotations is None:
        annotations, place = find_annotations(folder, name)
    sheet = read_sheet(Path(annotations))
    if images is None:
        listed = [i.get("file_name") for i in sheet.images if isinstance(i, dict)]
        files = [file for file in listed if isinstance(file, str)]
        images = find_images(folder, place, Path(annotations), files)
    if not Path(images).is_dir():
        raise DataError(f"image folder {images} is missing; check the path{nearby(Path(images))}")
    return Split(name, sheet, Path(images), with_masks=with_masks, turn=config.exif == "turn")
