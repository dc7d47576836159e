"""Images and targets for training and evaluation, from any data set in COCO format."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastcov_detection.coco import CocoFile, ImageRecord, read_coco
from fastcov_detection.config import DataConfig
from fastcov_detection.errors import DataError
from fastcov_detection.mini import make_mini

Target = dict[str, Any]
Transform = Callable[[Any, Target], tuple[Any, Target]]

__all__ = ["CocoDataset", "DataError", "LoadedData", "Target", "load_data", "training_transform"]

# Where images and annotations of a split lie in a data set's folder; the first pair that exists is
# taken.
_LAYOUTS = (
    ("{split}2017", "annotations/instances_{split}2017.json"),
    ("{split}", "annotations/instances_{split}.json"),
    ("images/{split}2017", "annotations/instances_{split}2017.json"),
    ("images/{split}", "annotations/instances_{split}.json"),
    ("{split}", "{split}/_annotations.coco.json"),
    ("{split}", "annotations/{split}.json"),
)


class CocoDataset(Dataset[tuple[Tensor, Target]]):
    """Images of a folder with the objects of a COCO annotation file.

    Crowds are left out of the targets (evaluation knows them), boxes end at the image's edge, and
    labels run from 1 to K in the order of the category ids.

    Args:
        images_dir: Folder that the file names are relative to.
        annotation_file: COCO instances JSON.
        transforms: Called with (image, target) of tv_tensors; None: only scale pixels to [0, 1].
        with_masks: Put the objects' masks into the targets.

    Raises:
        DataError: If a file is missing or the annotations cannot be used; it names the thing.
    """

    def __init__(
        self,
        images_dir: str | os.PathLike[str],
        annotation_file: str | os.PathLike[str],
        transforms: Transform | None = None,
        *,
        with_masks: bool = False,
    ) -> None:
        self.images_dir = Path(images_dir)
        self.file: CocoFile = read_coco(Path(annotation_file))
        self.transforms = transforms
        self.with_masks = with_masks
        self.records: list[ImageRecord] = self.file.images
        self.class_names: tuple[str, ...] = tuple(self.file.categories.values())
        self.label_of = {category: label for label, category in enumerate(self.file.categories, 1)}
        self.category_of = {label: category for category, label in self.label_of.items()}
        self._check_files()
        if with_masks:
            self._check_masks()

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: int) -> tuple[Tensor, Target]:
        image, target = self.read(index)
        if self.transforms is not None:
            return self.transforms(image, target)
        return plain_transform(image, target)

    def read(self, index: int) -> tuple[tv_tensors.Image, Target]:
        """One image and its target before any transform.

        Raises:
            DataError: If the image cannot be decoded or has another size than annotated.
        """
        record = self.records[index]
        pixels = self._decode(record)
        objects = [a for a in record.annotations if not a.is_crowd]
        boxes = torch.tensor([record.clipped_box(a) for a in objects], dtype=torch.float32)
        size = (record.height, record.width)
        target: Target = {
            "boxes": tv_tensors.BoundingBoxes(
                boxes.reshape(-1, 4), format="XYXY", canvas_size=size
            ),
            "labels": torch.tensor(
                [self.label_of[a.category_id] for a in objects], dtype=torch.int64
            ),
            "image_id": record.image_id,
        }
        if self.with_masks:
            masks = [record.mask(a) for a in objects]
            stacked = np.stack(masks) if masks else np.zeros((0, *size), dtype=np.uint8)
            target["masks"] = tv_tensors.Mask(torch.from_numpy(stacked))
        return pixels, target

    def aspect_ratios(self) -> list[float]:
        """Width by height of every image, as annotated."""
        return [record.width / record.height for record in self.records]

    def drop_empty(self) -> None:
        """Leaves out images without a single object to learn from."""
        self.records = [r for r in self.records if any(not a.is_crowd for a in r.annotations)]
        if not self.records:
            raise DataError(f"{self.file.path} has no object that is not a crowd; nothing to learn")

    def _decode(self, record: ImageRecord) -> tv_tensors.Image:
        path = self.images_dir / record.file_name
        try:
            with Image.open(path) as image:
                pixels = np.array(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError) as error:
            raise DataError(
                f"cannot read image {path} ({error}); replace it or take it out of {self.file.path}"
            ) from None
        if pixels.shape[:2] != (record.height, record.width):
            raise DataError(
                f"image {path} is {pixels.shape[1]}x{pixels.shape[0]}, annotated as "
                f"{record.width}x{record.height}; its boxes would be wrong"
            )
        return tv_tensors.Image(torch.from_numpy(pixels).permute(2, 0, 1))

    def _check_files(self) -> None:
        """Finds missing images before any work is lost."""
        if not self.images_dir.is_dir():
            raise DataError(f"image folder {self.images_dir} is missing; check the path")
        present = set(os.listdir(self.images_dir))
        missing = [
            record.file_name
            for record in self.records
            if record.file_name not in present
            and not ("/" in record.file_name and (self.images_dir / record.file_name).exists())
        ]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self.records)} images of {self.file.path} are not in "
                f"{self.images_dir}, the first is {missing[0]}; download them again"
            )

    def _check_masks(self) -> None:
        for record in self.records:
            for annotation in record.annotations:
                if annotation.segmentation is None:
                    raise DataError(
                        f"{self.file.path}: an object of image {record.file_name} has no "
                        "segmentation, which a Mask R-CNN learns from; use a fasterrcnn model"
                    )


class LoadedData(NamedTuple):
    """A data set's two halves, without augmentation, and the names of labels 1 to K."""

    train: CocoDataset
    val: CocoDataset
    class_names: tuple[str, ...]


def load_data(config: DataConfig, *, with_masks: bool = False, progress: bool = True) -> LoadedData:
    """Opens the configured data set; ``mini`` is built first where it is missing.

    A folder is searched, for split ``train`` and ``val``, for ``train2017/`` with
    ``annotations/instances_train2017.json``; ``train/`` with ``annotations/instances_train.json``;
    the same two under ``images/``; ``train/_annotations.coco.json``; ``annotations/train.json``.
    Paths in the configuration override what is found.

    Raises:
        DataError: If nothing of that kind is there, or a file is bad.
    """
    if config.name == "mini":
        folder = make_mini(config.root, config.mini, progress=progress)
    else:
        folder = Path(config.name)
    splits = []
    for split in ("train", "val"):
        images = getattr(config, f"{split}_images")
        annotations = getattr(config, f"{split}_annotations")
        if images is None or annotations is None:
            found_images, found_annotations = _find_split(folder, split)
            images, annotations = images or found_images, annotations or found_annotations
        splits.append(CocoDataset(images, annotations, with_masks=with_masks))
    train, val = splits
    if train.file.categories != val.file.categories:
        raise DataError(
            f"{train.file.path} and {val.file.path} list different categories: "
            f"{_difference(train.file.categories, val.file.categories)}"
        )
    if not config.keep_empty:
        train.drop_empty()
    return LoadedData(train, val, train.class_names)


def _difference(first: dict[int, str], second: dict[int, str]) -> str:
    keys = sorted(set(first) | set(second))
    key = next(key for key in keys if first.get(key) != second.get(key))
    return f"id {key} is {first.get(key)!r} and {second.get(key)!r}"


def _find_split(folder: Path, split: str) -> tuple[Path, Path]:
    if not folder.is_dir():
        raise DataError(f"data folder {folder} is missing; give mini or a folder in COCO layout")
    for images, labels in _LAYOUTS:
        pair = folder / images.format(split=split), folder / labels.format(split=split)
        if pair[0].is_dir() and pair[1].is_file():
            return pair
    tried = ", ".join(f"{i} with {a}".format(split=split) for i, a in _LAYOUTS)
    raise DataError(
        f"no {split} split in {folder}: tried {tried}; "
        f"set data.{split}_images and data.{split}_annotations"
    )


def plain_transform(image: tv_tensors.Image, target: Target) -> tuple[Tensor, Target]:
    """Pixels to [0, 1], everything to plain tensors."""
    plain = {k: v.as_subclass(Tensor) if isinstance(v, Tensor) else v for k, v in target.items()}
    return image.as_subclass(Tensor).float() / 255, plain


def training_transform(config: DataConfig) -> Transform:
    """The random changes of training images, of torchvision's v2 transforms.

    Multi-scale is not among them: the detector's own resizing draws from ``model.train_sizes``.
    """
    steps: list[Any] = []
    if config.photometric > 0:
        steps.append(v2.RandomPhotometricDistort(p=config.photometric))
    if config.scale_jitter is not None:
        # The mean colour of ImageNet around the image, no object there.
        fill: Any = {tv_tensors.Image: (124, 116, 104), "others": 0}
        steps.append(
            v2.RandomAffine(
                degrees=0,
                translate=(0.1, 0.1),
                scale=config.scale_jitter,
                interpolation=v2.InterpolationMode.BILINEAR,
                fill=fill,
            )
        )
        steps.append(v2.ClampBoundingBoxes())
        steps.append(v2.SanitizeBoundingBoxes(min_size=2))
    if config.hflip > 0:
        steps.append(v2.RandomHorizontalFlip(p=config.hflip))
    if not steps:
        return plain_transform
    varied = v2.Compose(steps)

    def transform(image: Any, target: Target) -> tuple[Any, Target]:
        return plain_transform(*varied(image, target))

    return transform
