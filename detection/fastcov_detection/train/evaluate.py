"""COCO's own measure of a detector, by pycocotools, and pictures of what it finds."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from pycocotools import mask as rle
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN
from torchvision.utils import draw_bounding_boxes, draw_segmentation_masks, make_grid

from fastcov_detection.data.dataset import CocoDataset, DataError, Target, one_line
from fastcov_detection.distributed import all_gather, rank, world_size
from fastcov_detection.files import write_file
from fastcov_detection.progress import progress_bar

log = logging.getLogger("fastcov_detection")

_MOST_SCORED = 100
_TRUTH_COLOUR, _FOUND_COLOUR = (255, 255, 255), (255, 80, 0)


def evaluate(
    model: GeneralizedRCNN,
    dataset: CocoDataset,
    *,
    batch_size: int = 1,
    workers: int = 0,
    progress: bool = False,
) -> dict[str, float | None]:
    """Average precision on a data set, as the COCO challenge defines it.

    Args:
        model: A detector; its mode is as before afterwards.
        dataset: With the annotations to compare with.
        batch_size: Images of one forward pass; padding to one size can change results slightly.
        workers: Processes that read images.
        progress: Show a bar.

    Returns:
        ``ap`` (mean over IoU 0.50 to 0.95), ``ap50``, ``segm_ap`` and ``segm_ap50`` (None without
        masks), all in 0-1, and ``seconds``. With several processes each sees a share of the images,
        and all get the same result.

    Raises:
        DataError: If the data set has no object to find.
    """
    if not any(not a.is_crowd for record in dataset.records for a in record.annotations):
        raise DataError(f"{dataset.file.path} has no object; average precision is undefined on it")
    start_s = time.monotonic()
    mine = range(rank(), len(dataset), world_size())
    detections: list[dict[str, Any]] = []
    with progress_bar("evaluating", len(mine), enabled=progress and rank() == 0) as advance:
        for indices, outputs in _detect(model, dataset, mine, batch_size, workers):
            for index, output in zip(indices, outputs, strict=True):
                detections += _to_coco(dataset, index, output)
            advance(len(indices))
    everything = [found for part in all_gather(detections) for found in part]
    ap, ap50 = _average_precision(dataset, everything, "bbox")
    segm_ap, segm_ap50 = None, None
    if model.roi_heads.has_mask():
        segm_ap, segm_ap50 = _average_precision(dataset, everything, "segm")
    return {
        "ap": ap,
        "ap50": ap50,
        "segm_ap": segm_ap,
        "segm_ap50": segm_ap50,
        "seconds": time.monotonic() - start_s,
    }


def tell_limits(dataset: CocoDataset, detections_per_image: int) -> None:
    """Warnings about images with more objects than can be found in them.

    Args:
        dataset: Of validation.
        detections_per_image: What the detector returns at most.
    """
    counts = [sum(not a.is_crowd for a in record.annotations) for record in dataset.records]
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
    classes = [
        (Counter(a.category_id for a in record.annotations if not a.is_crowd), record.file_name)
        for record in dataset.records
    ]
    crowded = [
        (count, name) for found, name in classes for count in found.values() if count > _MOST_SCORED
    ]
    if crowded:
        most, name = max(crowded)
        log.warning(
            "%s: image %s has %d objects of one class; AP as COCO defines it counts %d detections "
            "of a class and image",
            dataset.file.path,
            name,
            most,
            _MOST_SCORED,
        )


def draw_detections(
    model: GeneralizedRCNN,
    dataset: CocoDataset,
    path: str | os.PathLike[str],
    *,
    count: int = 4,
    score: float = 0.5,
    columns: int = 2,
) -> Path:
    """Draws what the detector finds: truth in white, detections in colour with label and score.

    Args:
        model: A detector; its mode is as before afterwards.
        dataset: The first ``count`` images with objects are drawn, evenly spread.
        path: PNG to write.
        count: Number of images.
        score: Detections below it are left out.
        columns: Images side by side.

    Returns:
        ``path``.
    """
    with_objects = [i for i, record in enumerate(dataset.records) if record.annotations]
    chosen = [
        with_objects[k * len(with_objects) // count] for k in range(min(count, len(with_objects)))
    ]
    pictures: list[Tensor] = []
    for indices, outputs in _detect(model, dataset, chosen, 1, 0):
        image, target = dataset.read(indices[0])
        kept = outputs[0]["scores"] >= score
        found = {name: tensor[kept] for name, tensor in outputs[0].items()}
        pictures.append(_draw(image.as_subclass(Tensor), target, found, dataset.class_names))
    height, width = (max(p.shape[side] for p in pictures) for side in (1, 2))
    padded = [
        nn.functional.pad(p, (0, width - p.shape[2], 0, height - p.shape[1])) for p in pictures
    ]
    grid = make_grid(padded, nrow=columns, padding=4).permute(1, 2, 0).numpy()
    write_file(path, lambda file: Image.fromarray(grid).save(file, format="PNG"))
    return Path(path)


@torch.no_grad()
def _detect(
    model: GeneralizedRCNN,
    dataset: CocoDataset,
    indices: Sequence[int],
    batch_size: int,
    workers: int,
) -> Iterator[tuple[list[int], list[dict[str, Tensor]]]]:
    """Detections of the given images, on the CPU, batch by batch."""
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loader = DataLoader(
        Subset(dataset, list(indices)), batch_size, num_workers=workers, collate_fn=list
    )
    done = 0
    try:
        for batch in one_line(loader):
            outputs = model([image.to(device) for image, _ in batch])
            now = list(indices[done : done + len(batch)])
            done += len(batch)
            yield now, [{name: tensor.cpu() for name, tensor in o.items()} for o in outputs]
    finally:
        model.train(was_training)


def _to_coco(dataset: CocoDataset, index: int, output: dict[str, Tensor]) -> list[dict[str, Any]]:
    corners = output["boxes"].double()
    boxes = torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()
    found = [
        {
            "image_id": dataset.records[index].image_id,
            "category_id": dataset.category_of[label],
            "bbox": box,
            "score": value,
        }
        for box, label, value in zip(
            boxes, output["labels"].tolist(), output["scores"].tolist(), strict=True
        )
    ]
    if "masks" in output:
        for one, mask in zip(found, output["masks"][:, 0] >= 0.5, strict=True):
            encoded = rle.encode(np.asfortranarray(mask.numpy().astype(np.uint8)))
            one["segmentation"] = {
                "size": encoded["size"],
                "counts": encoded["counts"].decode("ascii"),
            }
    return found


def _average_precision(
    dataset: CocoDataset, detections: list[dict[str, Any]], kind: str
) -> tuple[float, float]:
    """AP and AP50; no detection at all is an AP of zero."""
    if not detections:
        return 0.0, 0.0
    truth = dataset.file.ground_truth(with_masks=kind == "segm")
    # pycocotools takes a detection's area from its box where there is one, even when it compares
    # masks.
    unused = "bbox" if kind == "segm" else "segmentation"
    with contextlib.redirect_stdout(io.StringIO()):
        results = truth.loadRes([{key: d[key] for key in d if key != unused} for d in detections])
        scoring = COCOeval(truth, results, kind)
        scoring.params.imgIds = sorted(record.image_id for record in dataset.records)
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    return float(scoring.stats[0]), float(scoring.stats[1])


def _draw(
    image: Tensor, target: Target, found: dict[str, Tensor], class_names: Sequence[str]
) -> Tensor:
    # Small images are enlarged, so that labels can be read.
    zoom = max(1, round(320 / max(image.shape[1:])))
    picture = image.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
    if "masks" in found and len(found["masks"]):
        masks = (found["masks"][:, 0] >= 0.5).repeat_interleave(zoom, 1).repeat_interleave(zoom, 2)
        picture = draw_segmentation_masks(picture, masks, alpha=0.45)
    if len(target["boxes"]):
        picture = draw_bounding_boxes(
            picture, target["boxes"].as_subclass(Tensor) * zoom, colors=_TRUTH_COLOUR
        )
    if len(found["boxes"]):
        labels = [
            f"{class_names[label - 1]} {value:.2f}"
            for label, value in zip(found["labels"].tolist(), found["scores"].tolist(), strict=True)
        ]
        picture = draw_bounding_boxes(
            picture,
            found["boxes"] * zoom,
            labels,
            colors=_FOUND_COLOUR,
            width=2,
            label_colors="black",
            label_background_colors=_FOUND_COLOUR,
            fill_labels=True,
        )
    return picture
