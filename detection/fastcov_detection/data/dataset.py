"""Images and targets of any data set in COCO format, and the plan of the images of each step."""

from __future__ import annotations

import math
import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, Sampler

from fastcov_detection.config import DataConfig
from fastcov_detection.data.augment import Augmentation, large_enough, whole_frame
from fastcov_detection.data.checks import (
    Checked,
    Finding,
    Split,
    check_entries,
    check_pair,
    check_split,
    list_images,
    log_notes,
    refuse_faults,
    synthetic_roots,
)
from fastcov_detection.data.coco import CocoFile, ImageRecord, build_file, read_sheet
from fastcov_detection.data.layouts import find_annotations, find_images, nearby
from fastcov_detection.data.mini import make_mini
from fastcov_detection.data.pixels import read_pixels
from fastcov_detection.distributed import barrier, rank
from fastcov_detection.errors import DataError

Target = dict[str, Any]
Batch = TypeVar("Batch")

_MASK_63 = (1 << 63) - 1


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
        self.records = self.file.images
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
        generator: torch.Generator | None = None,
        pixels: NDArray[np.uint8] | None = None,
    ) -> tuple[Tensor, Target]:
        """One image and its target, with random changes or without.

        Args:
            index: Number of the image.
            augmentation: Random changes; None: none.
            generator: Source of the random numbers; needed with ``augmentation``.
            pixels: Decoded image, where it is known already. [H, W, 3]

        Returns:
            Pixels of eight bits [3, H, W], and a target: boxes, labels, image_id and, of a data set
            with masks, masks [N, H, W].

        Raises:
            DataError: If the image cannot be decoded or has another size than annotated.
        """
        record = self.records[index]
        pixels = self._decode(record) if pixels is None else pixels
        objects = [a for a in record.annotations if not a.is_crowd]
        boxes = torch.tensor([record.clipped_box(a) for a in objects], dtype=torch.float32)
        boxes, frame = boxes.reshape(-1, 4), whole_frame(record.width, record.height)
        if augmentation is not None and generator is not None:
            unchanged, frame = frame, augmentation.frame(record.width, record.height, generator)
            if augmentation.photometric > 0 or frame != unchanged:
                changed = augmentation.colours(frame.pixels(Image.fromarray(pixels)), generator)
                pixels = np.array(changed)
            boxes = frame.boxes(boxes)
            if augmentation.zoom is not None:
                kept = large_enough(boxes)
                boxes = boxes[kept]
                objects = [one for one, is_kept in zip(objects, kept, strict=True) if is_kept]
        labels = [self.label_of[a.category_id] for a in objects]
        target: Target = {
            "boxes": boxes,
            "labels": torch.tensor(labels, dtype=torch.int64),
            "image_id": record.image_id,
        }
        if self.with_masks:
            outlines = [annotation.segmentation for annotation in objects]
            masks = frame.masks(outlines, record.height, record.width)
            target["masks"] = torch.from_numpy(masks)
        return torch.from_numpy(pixels).permute(2, 0, 1), target

    def decode(self, index: int) -> NDArray[np.uint8]:
        """The pixels of one image; errors as of :meth:`read`. [H, W, 3]"""
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

    def has_objects(self) -> bool:
        """True if an image has an object that is not a crowd."""
        return bool((self.records.counts() > 0).any())

    def drop_empty(self) -> None:
        """Removal of the images without a single object to learn from."""
        self.records.drop_empty()
        if not len(self.records):
            raise DataError(f"{self.file.path} has no object that is not a crowd; nothing to learn")


class LoadedData(NamedTuple):
    """A data set's two halves, without augmentation, and the names of labels 1 to K."""

    train: CocoDataset
    val: CocoDataset
    class_names: tuple[str, ...]
    content: dict[str, str]
    """Digests of both annotation files and of both lists of images, not of their places; empty for
    ``mini``, which follows from its settings."""


def load_data(config: DataConfig, *, with_masks: bool = False, progress: bool = True) -> LoadedData:
    """Configured data set, checked whole; a ``mini`` that is missing is built first.

    :mod:`fastcov_detection.data.layouts` lists the places of annotations and images in a folder;
    paths in the configuration come before them.

    Raises:
        DataError: If there is no such data set, or with a list of its faults.
    """
    findings, splits, checked = _find_and_check(config, with_masks, progress)
    refuse_faults(findings)
    if rank() == 0:
        log_notes(findings)
    roots = synthetic_roots([split.sheet for split in splits.values()])
    halves = {}
    for name, split in splits.items():
        file = build_file(split.sheet, roots, with_masks=with_masks)
        file.images.set_paths(checked[name].paths)
        turn = config.exif == "turn"
        halves[name] = CocoDataset(split.images_dir, file, with_masks=with_masks, turn=turn)
    train, val = halves["train"], halves["val"]
    if not config.keep_empty:
        train.drop_empty()
    content = {}
    if config.name != "mini":
        content = {f"{name}_annotations": split.sheet.digest for name, split in splits.items()}
        content |= {f"{name}_images": half.images_digest for name, half in checked.items()}
    return LoadedData(train, val, train.class_names, content)


def load_on_ranks(config: DataConfig, *, with_masks: bool, progress: bool) -> LoadedData:
    """Data set of :func:`load_data` in every process; the first one builds and checks it."""
    loaded = None
    if rank() == 0:
        loaded = load_data(config, with_masks=with_masks, progress=progress)
    barrier()
    return loaded or load_data(config, with_masks=with_masks, progress=False)


def check_data(
    config: DataConfig, *, with_masks: bool = False, progress: bool = True
) -> list[Finding]:
    """Findings about a data set: faults, and notes that do not stop training.

    Raises:
        DataError: If an annotation file or a folder of images is missing.
    """
    return _find_and_check(config, with_masks, progress)[0]


def with_short_errors(batches: Iterable[Batch]) -> Iterator[Batch]:
    """Batches of a DataLoader, with one line in place of the traceback of a worker's error.

    Raises:
        DataError: If an image cannot be read, or a worker was killed.
    """
    try:
        yield from batches
    except DataError as error:
        # A worker's error arrives with its traceback as text; the last line is the error itself.
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
    log_notes(findings)
    file = build_file(split.sheet)
    file.images.set_paths(
        {image.image_id: image.path for image in listed if image.path is not None}
    )
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
    findings = [finding for half in checked.values() for finding in half.findings]
    findings += check_pair(*splits.values())
    findings += synthetic_roots([split.sheet for split in splits.values()]).values()
    if splits["train"].sheet.path == splits["val"].sheet.path:  # each finding once
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


class Draw(NamedTuple):
    """One image of one epoch, with the seed of its random changes."""

    image: int
    seed: int


def mix_seed(*parts: int) -> int:
    """One 63-bit seed out of several integers (splitmix64), the same on every machine."""
    state = 0
    for part in parts:
        state = (state ^ (part & 0xFFFFFFFFFFFFFFFF)) + 0x9E3779B97F4A7C15
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _MASK_63


def aspect_buckets(aspect_ratios: Sequence[float]) -> list[int]:
    """Bucket number of each image: a third of an octave of shapes. One shape saves padding."""
    return [max(-4, min(4, round(3 * math.log2(ratio)))) for ratio in aspect_ratios]


class BatchPlan(Sampler[list[Draw]]):
    """Batches of images of similar shape: a pure function of the seed, so a run starts at any step.

    Every epoch shuffles all images; an image waits until its bucket of aspect ratios has a whole
    batch, across epochs where need be, so none is dropped.

    Args:
        aspect_ratios: Width by height of every image.
        batch_size: Images of one step over all ranks.
        seed: Seed of the run.
        steps: Number of batches at which the plan ends.
        first_step: Number of the first batch; earlier ones are skipped.
        rank: Number of this process, which gets every ``world_size``-th image of a batch.
        world_size: Number of processes.

    Raises:
        ValueError: If the batch cannot be shared out evenly.
    """

    def __init__(
        self,
        aspect_ratios: Sequence[float],
        batch_size: int,
        *,
        seed: int,
        steps: int,
        first_step: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        if batch_size < 1 or batch_size % world_size:
            raise ValueError(
                f"batch_size is {batch_size}, the images of a step over all processes; "
                f"choose a multiple of {world_size}"
            )
        self.buckets = aspect_buckets(aspect_ratios)
        self.batch_size, self.seed = batch_size, seed
        self.steps, self.first_step = steps, first_step
        self.rank, self.world_size = rank, world_size

    def __len__(self) -> int:
        return max(0, self.steps - self.first_step)

    def __iter__(self) -> Iterator[list[Draw]]:
        waiting: dict[int, list[Draw]] = defaultdict(list)
        step, epoch = 0, 0
        while step < self.steps:
            for index in self._order(epoch):
                bucket = waiting[self.buckets[index]]
                bucket.append(Draw(index, mix_seed(self.seed, 1, epoch, index)))
                if len(bucket) < self.batch_size:
                    continue
                if step >= self.first_step:
                    yield bucket[self.rank :: self.world_size]
                bucket.clear()
                step += 1
                if step == self.steps:
                    return
            epoch += 1

    def _order(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(mix_seed(self.seed, 0, epoch))
        order: list[int] = torch.randperm(len(self.buckets), generator=generator).tolist()
        return order


class AugmentedView(Dataset[tuple[Tensor, Target]]):
    """A data set with random changes that depend on the draw alone, not on the process.

    Args:
        dataset: Images and targets by index.
        augmentation: Random changes.
        cache: Keep decoded images in memory.
    """

    def __init__(
        self, dataset: CocoDataset, augmentation: Augmentation, *, cache: bool = False
    ) -> None:
        self.dataset, self.augmentation = dataset, augmentation
        self._kept: dict[int, NDArray[np.uint8]] | None = {} if cache else None

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, draw: Draw) -> tuple[Tensor, Target]:
        generator, pixels = torch.Generator().manual_seed(draw.seed), None
        if self._kept is not None:
            if draw.image not in self._kept:
                self._kept[draw.image] = self.dataset.decode(draw.image)
            pixels = self._kept[draw.image]
        return self.dataset.read(draw.image, self.augmentation, generator, pixels)


def to_float(image: Tensor) -> Tensor:
    """An image with values in [0, 1]; eight-bit pixels, as loaders ship them, are scaled."""
    return image.float() / 255 if image.dtype == torch.uint8 else image


def to_device(target: dict[str, Any], device: torch.device) -> dict[str, Any]:
    """A target with its tensors on a device."""
    return {
        name: value.to(device, non_blocking=True) if isinstance(value, Tensor) else value
        for name, value in target.items()
    }
