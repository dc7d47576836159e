"""COCO's own measure of a detector, by pycocotools."""

from __future__ import annotations

import contextlib
import io
import json
import logging
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

from fastcov_detection.data.dataset import (
    CocoDataset,
    aspect_buckets,
    to_float,
    with_short_errors,
)
from fastcov_detection.distributed import from_first, gather_to_first, rank, world_size
from fastcov_detection.errors import DataError
from fastcov_detection.files import write_text
from fastcov_detection.progress import progress_bar

log = logging.getLogger("fastcov_detection")

_SIZES = ("_small", "_medium", "_large")
NUMBERS = (
    *("ap", "ap50", "ap75", *(f"ap{size}" for size in _SIZES)),
    *("ar1", "ar10", "ar100", *(f"ar{size}" for size in _SIZES)),
)
"""Names of COCO's twelve numbers, in the order of ``COCOeval.stats``."""

PREFIXES = {"bbox": "", "segm": "segm_"}
"""Prefixes of the names of numbers, by pycocotools' name of boxes and of masks."""

Detection = dict[str, Any]
"""One entry of COCO's results format: image_id, category_id, bbox, score, perhaps segmentation."""

_MOST_SCORED = 100


@dataclass(frozen=True)
class Evaluation:
    """Result of one evaluation; numbers are in 0-1, None where COCO has none (no such object)."""

    numbers: dict[str, float | None]
    """COCO's twelve numbers of boxes, ``ap`` to ``ar_large``, and those of masks, ``segm_ap`` to
    ``segm_ar_large``, None without masks."""
    classes: dict[str, dict[str, float | None]]
    """AP of every class by its name, under ``ap``, and under ``segm_ap`` with masks."""
    seconds: float
    images: int
    detections: list[Detection]
    """Everything that was found, in COCO's results format; on the first process alone."""

    @property
    def ap(self) -> float:
        """AP of boxes; 0 where nothing was found."""
        return self.numbers["ap"] or 0.0


def evaluate(
    model: nn.Module,
    dataset: CocoDataset,
    *,
    batch_size: int = 1,
    workers: int = 0,
    precision: torch.dtype = torch.float32,
    category_of: Mapping[int, int] | None = None,
    progress: bool = False,
) -> Evaluation:
    """COCO's numbers of a detector on a data set.

    With several processes each looks at a share of the images; the first compares all detections
    with the truth, once, and every process gets the numbers. Images of similar shape share a batch.

    Args:
        model: Detector with torchvision's interface; its mode is restored.
        dataset: Images, and the annotations to compare with.
        batch_size: Images of one forward pass; padding to one size can change results slightly.
        workers: Processes that read images.
        precision: Autocast to this type; boxes are decoded in float32 by detectors of this package.
        category_of: Category ids by label, where the labels are not those of the data set;
            detections with any other label are left out.
        progress: Show a bar.

    Raises:
        DataError: If the data set has no object to find.
    """
    if not dataset.has_objects():
        raise DataError(f"{dataset.file.path} has no object; average precision is undefined on it")
    start_s = time.monotonic()
    # Images of one shape need no padding.
    ratios = aspect_buckets(dataset.aspect_ratios())
    order = sorted(range(len(dataset)), key=ratios.__getitem__)
    mine = order[rank() :: world_size()]
    labels = dataset.category_of if category_of is None else category_of
    detections: list[Detection] = []
    with progress_bar("evaluating", len(mine), enabled=progress and rank() == 0) as advance:
        for indices, outputs in detect(model, dataset, mine, batch_size, workers, precision):
            for index, output in zip(indices, outputs, strict=True):
                detections += _to_coco(dataset.records[index].image_id, labels, output)
            advance(len(indices))
    parts = gather_to_first(detections)
    everything = [] if parts is None else [found for part in parts for found in part]
    scores = None if parts is None else _scores(dataset, everything, has_masks(model))
    numbers, classes = from_first(scores)
    seconds = time.monotonic() - start_s
    return Evaluation(numbers, classes, seconds, len(dataset), everything)


def write_predictions(evaluation: Evaluation, folder: Path) -> list[Path]:
    """File of the detections in COCO's results format, which every COCO tool reads.

    Returns:
        ``predictions.bbox.json``, and ``predictions.segm.json`` with masks.
    """
    kinds = [kind for kind, prefix in PREFIXES.items() if f"{prefix}ap" in evaluation.classes]
    paths = [folder / f"predictions.{kind}.json" for kind in kinds]
    for path, kind in zip(paths, kinds, strict=True):
        write_text(path, json.dumps(_of_kind(evaluation.detections, kind)) + "\n")
    return paths


def has_masks(model: nn.Module) -> bool:
    """True if a detector predicts masks."""
    heads = getattr(model, "roi_heads", None)
    return heads is not None and bool(heads.has_mask())


def warn_of_limits(dataset: CocoDataset, detections_per_image: int) -> None:
    """Warning of images with more objects than the detector returns or AP counts."""
    counts: list[int] = dataset.records.counts().tolist()
    most = max(counts, default=0)
    if most > detections_per_image:
        log.warning(
            "%s: image %s has %d objects, the detector returns at most %d: raise "
            "model.detections_per_image",
            dataset.file.path,
            dataset.records[counts.index(most)].file_name,
            most,
            detections_per_image,
        )
    # An image with few objects has no crowd of one class.
    records = (dataset.records[at] for at, count in enumerate(counts) if count > _MOST_SCORED)
    crowded = [
        (max(Counter(a.category_id for a in record.annotations if not a.is_crowd).values()), record)
        for record in records
    ]
    most, worst = max(crowded, key=lambda pair: pair[0], default=(0, None))
    if worst is not None and most > _MOST_SCORED:
        log.warning(
            "%s: image %s has %d objects of one class; AP as COCO defines it counts %d detections "
            "of a class and image",
            dataset.file.path,
            worst.file_name,
            most,
            _MOST_SCORED,
        )


@torch.no_grad()
def detect(
    model: nn.Module,
    dataset: CocoDataset,
    indices: Sequence[int],
    batch_size: int,
    workers: int,
    precision: torch.dtype = torch.float32,
) -> Iterator[tuple[list[int], list[dict[str, Tensor]]]]:
    """Detections of the given images, batch by batch, on the CPU; arguments of :func:`evaluate`."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loader = DataLoader(
        Subset(dataset, list(indices)), batch_size, num_workers=workers, collate_fn=list
    )
    done = 0
    try:
        for batch in with_short_errors(loader):
            with torch.autocast(device.type, precision, enabled=precision != torch.float32):
                outputs = model([to_float(image.to(device)) for image, _ in batch])
            now = list(indices[done : done + len(batch)])
            done += len(batch)
            yield now, [_on_cpu(output) for output in outputs]
    finally:
        model.train(was_training)


def _on_cpu(output: dict[str, Tensor]) -> dict[str, Tensor]:
    found = {name: output[name].float().cpu() for name in ("boxes", "scores")}
    found["labels"] = output["labels"].cpu()
    if "masks" in output:
        # One byte for each pixel crosses from the device, in place of four.
        found["masks"] = (output["masks"][:, 0] >= 0.5).cpu()
    return found


def _to_coco(
    image_id: Any, category_of: Mapping[int, int], output: dict[str, Tensor]
) -> list[Detection]:
    corners = output["boxes"].double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    labels, values = output["labels"].tolist(), output["scores"].tolist()
    kept = [place for place, label in enumerate(labels) if label in category_of]
    found: list[Detection] = [
        {
            "image_id": image_id,
            "category_id": category_of[labels[place]],
            "bbox": boxes[place],
            "score": values[place],
        }
        for place in kept
    ]
    if "masks" in output and kept:
        # pycocotools reads columns: [N, W, H] in memory.
        columns = output["masks"][kept].transpose(1, 2).contiguous().numpy().view(np.uint8)
        for one, encoded in zip(found, rle.encode(columns.transpose(2, 1, 0)), strict=True):
            one["segmentation"] = {
                "size": encoded["size"],
                "counts": encoded["counts"].decode("ascii"),
            }
    return found


def _scores(
    dataset: CocoDataset, detections: list[Detection], with_masks: bool
) -> tuple[dict[str, float | None], dict[str, dict[str, float | None]]]:
    """COCO's numbers and the AP of every class, for boxes and for masks."""
    names = class_names(dataset.file.categories)
    numbers: dict[str, float | None] = {}
    classes: dict[str, dict[str, float | None]] = {}
    for kind, prefix in PREFIXES.items():
        if kind == "segm" and not with_masks:
            numbers |= {f"{prefix}{name}": None for name in NUMBERS}
            continue
        truth = dataset.file.ground_truth(with_masks=kind == "segm")
        results = COCO()  # pycocotools itself cannot load an empty list
        results.dataset = {**truth.dataset, "annotations": []}
        with contextlib.redirect_stdout(io.StringIO()):
            if detections:
                results = truth.loadRes(_of_kind(detections, kind))
            else:
                results.createIndex()
            scoring = COCOeval(truth, results, kind)
            scoring.params.imgIds = sorted(dataset.records.image_ids())
            scoring.evaluate()
            scoring.accumulate()
            scoring.summarize()
        # -1 stands where there is nothing to find.
        stats = (None if value < 0 else float(value) for value in scoring.stats)
        numbers |= {f"{prefix}{name}": one for name, one in zip(NUMBERS, stats, strict=True)}
        # [thresholds, recalls, categories, areas, limits]: all areas, 100 detections an image.
        precision = scoring.eval["precision"][:, :, :, 0, -1]
        known = [precision[:, :, at][precision[:, :, at] > -1] for at in range(precision.shape[2])]
        classes[f"{prefix}ap"] = {
            names[int(key)]: float(one.mean()) if one.size else None
            for key, one in zip(scoring.params.catIds, known, strict=True)
        }
    return numbers, classes


def _of_kind(detections: Sequence[Detection], kind: str) -> list[Detection]:
    """The detections as a results file of boxes, or one of masks, holds them.

    pycocotools takes a detection's area from its box where there is one, even when it compares
    masks; so each file has one kind alone.
    """
    unused = "bbox" if kind == "segm" else "segmentation"
    return [{key: detection[key] for key in detection if key != unused} for detection in detections]


def class_names(categories: Mapping[int, str]) -> dict[int, str]:
    """Distinct names of the categories, by id: names that occur twice get their id."""
    counts = Counter(categories.values())
    return {
        key: name if counts[name] == 1 else f"{name} ({key})" for key, name in categories.items()
    }
