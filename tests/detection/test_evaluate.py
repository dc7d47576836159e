from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from fastcov_detection.config import ModelConfig
from fastcov_detection.data import CocoDataset
from fastcov_detection.errors import DataError
from fastcov_detection.evaluate import draw_detections, evaluate
from fastcov_detection.model import build_model


class _Oracle(nn.Module):
    """Finds what it is told, image by image in order."""

    def __init__(self, found: list[dict[str, Tensor]]) -> None:
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(1))
        self.found, self.next = found, 0
        has_mask = any("masks" in one for one in found)
        self.roi_heads = type("Heads", (), {"has_mask": staticmethod(lambda: has_mask)})

    def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        first, self.next = self.next, self.next + len(images)
        return self.found[first : self.next]


def _truth(dataset: CocoDataset, scores: float = 0.9) -> list[dict[str, Tensor]]:
    found = []
    for index in range(len(dataset)):
        _, target = dataset[index]
        one = {
            "boxes": target["boxes"],
            "labels": target["labels"],
            "scores": torch.full((len(target["labels"]),), scores),
        }
        if "masks" in target:
            one["masks"] = target["masks"][:, None].float()
        found.append(one)
    return found


@pytest.fixture
def val(tiny_root: Path) -> CocoDataset:
    return CocoDataset(
        tiny_root / "val2017",
        tiny_root / "annotations" / "instances_val2017.json",
        with_masks=True,
    )


def test_the_truth_scores_one(val: CocoDataset) -> None:
    scores = evaluate(_Oracle(_truth(val)), val, batch_size=4)
    assert scores["ap"] == scores["ap50"] == pytest.approx(1.0)
    assert scores["segm_ap"] == scores["segm_ap50"] == pytest.approx(1.0)
    assert scores["seconds"] > 0


def test_finding_nothing_scores_zero(val: CocoDataset) -> None:
    nothing = [
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
        for _ in range(len(val))
    ]
    scores = evaluate(_Oracle(nothing), val)
    assert scores["ap"] == scores["ap50"] == 0.0
    assert scores["segm_ap"] is None


def test_wrong_labels_score_zero(val: CocoDataset) -> None:
    wrong = [{**one, "labels": one["labels"] % 10 + 1} for one in _truth(val)]
    present = torch.cat([one["labels"] for one in _truth(val)])
    assert evaluate(_Oracle(wrong), val)["ap"] < 0.5 or len(present.unique()) == 10


def test_shifted_boxes_lose_the_strict_thresholds(val: CocoDataset) -> None:
    """A shift that leaves IoU between 0.5 and 0.75 keeps AP50 and loses at least half of AP."""
    shifted = []
    for one in _truth(val):
        boxes = one["boxes"].clone()
        boxes[:, [0, 2]] += 0.25 * (boxes[:, 2] - boxes[:, 0])[:, None]
        shifted.append({**one, "boxes": boxes})
    scores = evaluate(_Oracle(shifted), val)
    assert scores["ap50"] == pytest.approx(1.0)
    assert scores["ap"] == pytest.approx(0.3, abs=0.01)
    assert scores["segm_ap"] == pytest.approx(1.0)


def test_a_crowd_costs_nothing(coco_folder: Callable[..., Path]) -> None:
    box = {"image_id": 1, "category_id": 5, "area": 64, "iscrowd": 0}
    root = coco_folder(
        [
            {**box, "id": 0, "bbox": [2, 2, 8, 8]},
            {**box, "id": 1, "bbox": [16, 8, 8, 8], "iscrowd": 1},
        ]
    )
    dataset = CocoDataset(root / "val2017", root / "annotations" / "instances_val2017.json")
    nothing = {
        "boxes": torch.zeros(0, 4),
        "labels": torch.zeros(0).long(),
        "scores": torch.zeros(0),
    }
    found: dict[str, Any] = {
        "boxes": torch.tensor([[2.0, 2, 10, 10], [16.0, 8, 24, 16], [17.0, 9, 24, 16]]),
        "labels": torch.tensor([2, 2, 2]),
        "scores": torch.tensor([0.5, 0.9, 0.8]),
    }
    assert evaluate(_Oracle([found, nothing]), dataset)["ap"] == pytest.approx(1.0)


def test_no_object_means_no_average_precision(coco_folder: Callable[..., Path]) -> None:
    root = coco_folder([])
    dataset = CocoDataset(root / "val2017", root / "annotations" / "instances_val2017.json")
    with pytest.raises(DataError, match="has no object; average precision is undefined"):
        evaluate(_Oracle([]), dataset)


def test_the_mode_of_the_model_is_kept(val: CocoDataset, tiny_model: ModelConfig) -> None:
    model = build_model(tiny_model, num_classes=11).train()
    evaluate(model, val, batch_size=3)
    assert model.training


def test_pictures_show_truth_and_detections(val: CocoDataset, tmp_path: Path) -> None:
    path = draw_detections(_Oracle(_truth(val)), val, tmp_path / "a" / "found.png", count=2)
    picture = np.asarray(Image.open(path))
    assert picture.shape == (2 * 0 + 320 + 8, 2 * 320 + 12, 3)
    hidden = draw_detections(_Oracle(_truth(val, scores=0.4)), val, tmp_path / "truth.png", count=2)
    orange = (picture == (255, 80, 0)).all(axis=2)
    assert orange.sum() > 100
    assert not (np.asarray(Image.open(hidden)) == (255, 80, 0)).all(axis=2).any()
    assert (np.asarray(Image.open(hidden)) == (255, 255, 255)).all(axis=2).sum() > 100
