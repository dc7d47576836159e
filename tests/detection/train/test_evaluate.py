from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval
from torch import Tensor, nn

from fastcov_detection.config import ModelConfig
from fastcov_detection.data.dataset import CocoDataset
from fastcov_detection.detector.build import build_model
from fastcov_detection.errors import DataError
from fastcov_detection.train.evaluate import (
    NUMBERS,
    class_names,
    evaluate,
    warn_of_limits,
    write_predictions,
)

_SEED = torch.Generator().manual_seed(0)


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
    found = evaluate(_Oracle(_truth(val)), val, batch_size=4)
    scores = found.numbers
    assert scores["ap"] == scores["ap50"] == pytest.approx(1.0)
    assert scores["segm_ap"] == scores["segm_ap50"] == pytest.approx(1.0)
    assert found.seconds > 0


def test_finding_nothing_scores_zero(val: CocoDataset) -> None:
    nothing = [
        {"boxes": torch.zeros(0, 4), "labels": torch.zeros(0).long(), "scores": torch.zeros(0)}
        for _ in range(len(val))
    ]
    scores = evaluate(_Oracle(nothing), val).numbers
    assert scores["ap"] == scores["ap50"] == 0.0
    assert scores["segm_ap"] is None


def test_wrong_labels_score_zero(val: CocoDataset) -> None:
    wrong = [{**one, "labels": one["labels"] % 10 + 1} for one in _truth(val)]
    present = torch.cat([one["labels"] for one in _truth(val)])
    assert evaluate(_Oracle(wrong), val).ap < 0.5 or len(present.unique()) == 10


def test_shifted_boxes_lose_the_strict_thresholds(val: CocoDataset) -> None:
    """A shift that leaves IoU between 0.5 and 0.75 keeps AP50 and loses at least half of AP."""
    shifted = []
    for one in _truth(val):
        boxes = one["boxes"].clone()
        boxes[:, [0, 2]] += 0.25 * (boxes[:, 2] - boxes[:, 0])[:, None]
        shifted.append({**one, "boxes": boxes})
    scores = evaluate(_Oracle(shifted), val).numbers
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
    assert evaluate(_Oracle([found, nothing]), dataset).ap == pytest.approx(1.0)


UNLEARNED = [
    *([2 + i, 3, 0, 0] for i in range(4)),
    *([40 + i, 3, 5, 5] for i in range(3)),
    [4, 6, 1e-9, 8],
    [4, 6, -3, 8],
    [31.99999999, 2, 5, 5],
]


@pytest.mark.parametrize("with_masks", [False, True])
def test_objects_that_training_skips_stay_in_the_official_score(
    coco_folder: Callable[..., Path], tmp_path: Path, with_masks: bool
) -> None:
    """The same as pycocotools alone finds on the same file, with ten such boxes in it."""
    draw = np.random.default_rng(3)
    annotations: list[dict[str, Any]] = []
    for _ in range(18):
        left, top = draw.integers(0, 20), draw.integers(0, 12)
        annotations.append({"bbox": [int(left), int(top), 8, 9], "area": 72.0})
    annotations += [{"bbox": box, "area": 20.0} for box in UNLEARNED]
    for number, annotation in enumerate(annotations, 1):
        x, y, w, h = annotation["bbox"]
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotation |= {"segmentation": [polygon]} if number <= 18 else {"segmentation": []}
        annotation |= {"id": number, "image_id": number % 2 + 1, "iscrowd": int(number == 5)}
        annotation["category_id"] = 5 if number % 3 else 1
    root = coco_folder(annotations)
    path = root / "annotations" / "instances_val2017.json"
    dataset = CocoDataset(root / "val2017", path, with_masks=with_masks)
    assert sum(len(record.unlearned) for record in dataset.records) == 10
    found = _truth(dataset)
    for one in found:
        one["boxes"] = one["boxes"] + torch.rand(one["boxes"].shape, generator=_SEED)
        one["scores"] = torch.rand(len(one["boxes"]), generator=_SEED)
    scores = evaluate(_Oracle(found), dataset).numbers
    results = [
        {
            "image_id": dataset.records[index].image_id,
            "category_id": dataset.category_of[int(label)],
            "bbox": [float(v) for v in (x, y, right - x, bottom - y)],
            "score": float(score),
        }
        for index, one in enumerate(found)
        for (x, y, right, bottom), label, score in zip(
            one["boxes"].double().numpy(), one["labels"], one["scores"], strict=True
        )
    ]
    official = COCO(str(path))
    scoring = COCOeval(official, official.loadRes(results), "bbox")
    scoring.evaluate()
    scoring.accumulate()
    scoring.summarize()
    expected = [None if value < 0 else value for value in scoring.stats]
    assert [scores[name] for name in NUMBERS] == expected
    assert 0.1 < scoring.stats[0] < 0.9
    if with_masks:
        assert scores["segm_ap"] is not None
        assert scores["segm_ap50"] < 18 / 27, "what cannot be found is missed"


def _alone(truth: Path, found: Path, kind: str, category: int | None = None) -> list[float]:
    """The twelve numbers by pycocotools alone, from files."""
    official = COCO(str(truth))
    scoring = COCOeval(official, official.loadRes(str(found)), kind)
    if category is not None:
        scoring.params.catIds = [category]
    scoring.evaluate()
    scoring.accumulate()
    scoring.summarize()
    return [None if value < 0 else float(value) for value in scoring.stats]


def test_files_of_predictions_have_the_numbers_of_pycocotools(
    val: CocoDataset, tiny_root: Path, tmp_path: Path
) -> None:
    """Boxes, masks and every class: the files score by themselves what the evaluation says."""
    found = _truth(val)
    for one in found:
        count = len(one["boxes"])
        one["boxes"] = one["boxes"] + 4 * torch.rand(one["boxes"].shape, generator=_SEED)
        one["scores"] = torch.rand(count, generator=_SEED)
        one["masks"] = one["masks"].roll(1, dims=3)
    evaluation = evaluate(_Oracle(found), val, batch_size=4)
    paths = write_predictions(evaluation, tmp_path)
    assert [path.name for path in paths] == ["predictions.bbox.json", "predictions.segm.json"]
    truth = tiny_root / "annotations" / "instances_val2017.json"
    for path, kind, prefix in zip(paths, ("bbox", "segm"), ("", "segm_"), strict=True):
        expected = _alone(truth, path, kind)
        assert [evaluation.numbers[prefix + name] for name in NUMBERS] == expected
        assert 0.05 < expected[0] < 0.95
        classes = evaluation.classes[f"{prefix}ap"]
        assert list(classes) == list(val.class_names)
        for category, name in val.file.categories.items():
            assert classes[name] == pytest.approx(_alone(truth, path, kind, category)[0])
    known = [value for value in evaluation.classes["ap"].values() if value is not None]
    assert evaluation.ap == pytest.approx(sum(known) / len(known))


def test_images_of_one_shape_share_a_batch(coco_folder: Callable[..., Path]) -> None:
    """The order of the images changes, their detections stay with them."""
    box = {"category_id": 5, "bbox": [2, 3, 8, 9]}
    root = coco_folder([{**box, "id": i, "image_id": i} for i in (1, 2, 3, 4)], images=4)
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for number in (1, 3):
        content["images"][number - 1] |= {"width": 96, "height": 24}
        Image.new("RGB", (96, 24)).save(root / "val2017" / f"{number}.png")
    path.write_text(json.dumps(content))
    dataset = CocoDataset(root / "val2017", path)
    shapes: list[list[int]] = []

    class Looking(_Oracle):
        def forward(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
            shapes.append([image.shape[2] for image in images])
            return super().forward(images)

    assert evaluate(Looking(_truth(dataset)), dataset, batch_size=2).ap == pytest.approx(1.0)
    assert sorted(shapes) == [[32, 32], [96, 96]]


def test_labels_of_another_model_are_translated(val: CocoDataset) -> None:
    """Labels that the data set does not know are left out."""
    found = _truth(val)
    for one in found:
        one["labels"] = one["labels"] + 40
        one["labels"][-1:] = 7
    category_of = {label + 40: category for label, category in val.category_of.items()}
    evaluation = evaluate(_Oracle(found), val, category_of=category_of)
    assert 0.3 < evaluation.ap < 1
    assert len(evaluation.detections) == sum(len(one["labels"]) - 1 for one in found)


def test_categories_of_one_name_are_told_apart() -> None:
    assert class_names({1: "cat", 4: "dog", 9: "cat"}) == {1: "cat (1)", 4: "dog", 9: "cat (9)"}


def test_image_ids_that_are_texts_are_scored(coco_folder: Callable[..., Path]) -> None:
    box = {"category_id": 5, "bbox": [2, 3, 8, 9]}
    root = coco_folder([{**box, "id": i, "image_id": i} for i in (1, 2)])
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    for part, key in (("images", "id"), ("annotations", "image_id")):
        for entry in content[part]:
            entry[key] = f"frame {entry[key]}"
    path.write_text(json.dumps(content))
    dataset = CocoDataset(root / "val2017", path)
    assert evaluate(_Oracle(_truth(dataset)), dataset).ap == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("objects", "limit", "messages"),
    [
        (101, 100, ["101 objects, the detector returns at most 100", "101 objects of one class"]),
        (101, 300, ["101 objects of one class; AP as COCO defines it counts 100 detections"]),
        (30, 20, ["image 1.png has 30 objects, the detector returns at most 20: raise model.det"]),
        (100, 100, []),
    ],
)
def test_more_objects_than_can_be_found_are_told(
    coco_folder: Callable[..., Path],
    caplog: pytest.LogCaptureFixture,
    objects: int,
    limit: int,
    messages: list[str],
) -> None:
    box = {"image_id": 1, "category_id": 5, "area": 4}
    root = coco_folder([{**box, "id": i, "bbox": [i / 8, 2, 2, 2]} for i in range(objects)])
    dataset = CocoDataset(root / "val2017", root / "annotations" / "instances_val2017.json")
    warn_of_limits(dataset, limit)
    for line, expected in zip(caplog.messages, messages, strict=True):
        assert expected in line


def test_no_object_means_no_average_precision(coco_folder: Callable[..., Path]) -> None:
    root = coco_folder([])
    dataset = CocoDataset(root / "val2017", root / "annotations" / "instances_val2017.json")
    with pytest.raises(DataError, match="has no object; average precision is undefined"):
        evaluate(_Oracle([]), dataset)


def test_the_mode_of_the_model_is_kept(val: CocoDataset, tiny_model: ModelConfig) -> None:
    model = build_model(tiny_model, num_classes=11).train()
    evaluate(model, val, batch_size=3)
    assert model.training
