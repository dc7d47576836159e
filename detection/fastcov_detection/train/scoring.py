"""COCO's twelve numbers and the average precision of every class, by pycocotools."""

from __future__ import annotations

import contextlib
import io
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

NUMBERS = (
    "ap",
    "ap50",
    "ap75",
    "ap_small",
    "ap_medium",
    "ap_large",
    "ar1",
    "ar10",
    "ar100",
    "ar_small",
    "ar_medium",
    "ar_large",
)
"""Names of COCO's twelve numbers, in the order of ``COCOeval.stats``."""

PREFIXES = {"bbox": "", "segm": "segm_"}
"""What stands before the names of the numbers of boxes and of masks."""

Detection = dict[str, Any]
"""One entry of COCO's results format: image_id, category_id, bbox, score, perhaps segmentation."""


class Score(NamedTuple):
    """Result of one comparison with the truth; None where COCO has no number (no such object)."""

    numbers: dict[str, float | None]
    """By the names of :data:`NUMBERS`, in 0-1."""
    classes: dict[int, float | None]
    """AP by category id, in 0-1."""


def score(
    truth: COCO, detections: Sequence[Detection], kind: str, image_ids: Sequence[Any]
) -> Score:
    """COCO's numbers for one kind of detections.

    Args:
        truth: Every object, as pycocotools holds it.
        detections: In COCO's results format.
        kind: ``bbox`` or ``segm``.
        image_ids: Images that count.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        scoring = COCOeval(truth, _results(truth, detections, kind), kind)
        scoring.params.imgIds = sorted(image_ids)
        scoring.evaluate()
        scoring.accumulate()
        scoring.summarize()
    numbers = {name: _known(value) for name, value in zip(NUMBERS, scoring.stats, strict=True)}
    # [thresholds, recalls, categories, areas, limits]: all areas, 100 detections an image.
    precision = scoring.eval["precision"][:, :, :, 0, -1]
    classes = {
        int(category): _mean(precision[:, :, place])
        for place, category in enumerate(scoring.params.catIds)
    }
    return Score(numbers, classes)


def of_kind(detections: Sequence[Detection], kind: str) -> list[Detection]:
    """The detections as a results file of boxes, or one of masks, holds them.

    pycocotools takes a detection's area from its box where there is one, even when it compares
    masks; so each file has one kind alone.
    """
    unused = "bbox" if kind == "segm" else "segmentation"
    return [{key: one[key] for key in one if key != unused} for one in detections]


def class_names(categories: Mapping[int, str]) -> dict[int, str]:
    """A name of its own for every category: names that occur twice get their id."""
    counts = Counter(categories.values())
    return {
        key: name if counts[name] == 1 else f"{name} ({key})" for key, name in categories.items()
    }


def _results(truth: COCO, detections: Sequence[Detection], kind: str) -> COCO:
    if detections:
        return truth.loadRes(of_kind(detections, kind))
    nothing = COCO()  # pycocotools itself cannot load an empty list
    nothing.dataset = {**truth.dataset, "annotations": []}
    nothing.createIndex()
    return nothing


def _known(value: float) -> float | None:
    """None for the -1 that stands where there is nothing to find."""
    return None if value < 0 else float(value)


def _mean(precision: np.ndarray[Any, Any]) -> float | None:
    known = precision[precision > -1]
    return float(known.mean()) if known.size else None
