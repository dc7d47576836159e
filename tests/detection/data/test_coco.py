"""A small file in COCO's exact format: crowds, RLE, category gaps, images without objects."""

from __future__ import annotations

import hashlib
import json
import logging
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as rle

from fastcov_detection.data import coco
from fastcov_detection.data.checks import Split, check_entries, refuse_faults
from fastcov_detection.data.coco import build_file, read_sheet
from fastcov_detection.data.dataset import CocoDataset
from fastcov_detection.errors import DataError

# A 4x4 square at (2, 3) in a 32x24 image, in each of the three ways that COCO writes masks.
SQUARE = np.zeros((24, 32), dtype=np.uint8)
SQUARE[3:7, 2:6] = 1
POLYGON = [[2.0, 3.0, 6.0, 3.0, 6.0, 7.0, 2.0, 7.0]]
_runs = np.flatnonzero(np.diff(np.r_[0, SQUARE.T.ravel(), 0])).tolist()
UNCOMPRESSED = {"size": [24, 32], "counts": np.diff([0, *_runs, 24 * 32]).tolist()}
_encoded = rle.encode(np.asfortranarray(SQUARE))
COMPRESSED = {"size": [24, 32], "counts": _encoded["counts"].decode("ascii")}

COCO_LIKE: list[dict[str, Any]] = [
    {
        "id": 0,
        "image_id": 1,
        "category_id": 5,
        "bbox": [2, 3, 4, 4],
        "area": 16.0,
        "iscrowd": 0,
        "segmentation": POLYGON,
    },
    {
        "id": 900100002299,
        "image_id": 1,
        "category_id": 90,
        "bbox": [2, 3, 4, 4],
        "area": 16,
        "iscrowd": 1,
        "segmentation": UNCOMPRESSED,
    },
    {
        "id": 7,
        "image_id": 3,
        "category_id": 1,
        "bbox": [2, 3, 4, 4],
        "iscrowd": 0,
        "segmentation": COMPRESSED,
    },
]
GAPS = [{"id": i, "name": n, "supercategory": "x"} for i, n in ((90, "last"), (1, "a"), (5, "b"))]

CocoFolder = Callable[..., Path]


def _open(root: Path, with_masks: bool = False) -> CocoDataset:
    return CocoDataset(
        root / "train2017",
        root / "annotations" / "instances_train2017.json",
        with_masks=with_masks,
    )


def _check(path: Path) -> None:
    refuse_faults(check_entries(Split("train", read_sheet(path), path.parent)))


def test_a_file_in_cocos_format_is_read_right(coco_folder: CocoFolder) -> None:
    dataset = _open(coco_folder(COCO_LIKE, images=3, categories=GAPS), with_masks=True)
    assert dataset.class_names == ("a", "b", "last")
    assert dataset.label_of == {1: 1, 5: 2, 90: 3}
    _, first = dataset[0]
    assert first["labels"].tolist() == [2]
    assert first["boxes"].tolist() == [[2, 3, 6, 7]]
    np.testing.assert_array_equal(first["masks"][0].numpy(), SQUARE)
    _, empty = dataset[1]
    assert empty["boxes"].shape == (0, 4)
    assert empty["masks"].shape == (0, 24, 32)
    _, third = dataset[2]
    np.testing.assert_array_equal(third["masks"][0].numpy(), SQUARE)
    dataset.drop_empty()
    assert [record.image_id for record in dataset.records] == [1, 3]


def test_ground_truth_keeps_crowds_and_fills_areas(coco_folder: CocoFolder) -> None:
    dataset = _open(coco_folder(COCO_LIKE, images=3, categories=GAPS))
    truth = dataset.file.ground_truth()
    annotations = truth.loadAnns(truth.getAnnIds())
    assert [a["id"] for a in annotations] == [1, 2, 3]
    assert [a["iscrowd"] for a in annotations] == [0, 1, 0]
    assert [a["area"] for a in annotations] == [16, 16, 16]
    for annotation in annotations:
        np.testing.assert_array_equal(truth.annToMask(annotation), SQUARE)


@pytest.mark.parametrize(
    ("extra", "area"),
    [({}, 24.0), ({"area": None}, 24.0), ({"segmentation": POLYGON}, 16.0), ({"area": 3}, 3.0)],
)
def test_a_missing_area_is_derived(
    coco_folder: CocoFolder, extra: dict[str, Any], area: float
) -> None:
    root = coco_folder([{"id": 1, "image_id": 1, "category_id": 1, "bbox": [2, 3, 4, 6], **extra}])
    (annotation,) = _open(root).records[0].annotations
    assert annotation.area == area
    assert not annotation.is_crowd


def test_boxes_without_area_are_skipped_and_counted(
    coco_folder: CocoFolder, caplog: pytest.LogCaptureFixture
) -> None:
    boxes = [[2, 3, 0, 0], [2, 3, 5, 0], [40, 3, 5, 5], [-5, -5, 7, 7], [30, 20, 50, 50]]
    root = coco_folder(
        [
            {"id": i, "image_id": 1, "category_id": 1, "bbox": box, "area": 1, "iscrowd": 0}
            for i, box in enumerate(boxes, 1)
        ]
    )
    with caplog.at_level(logging.WARNING):
        dataset = _open(root)
    (line,) = (line for line in caplog.messages if "no area" in line)
    assert "3 times: annotation 1 has bbox [2, 3, 0, 0]" in line
    assert "so annotation 2, annotation 3; training skips it" in line
    assert dataset[0][1]["boxes"].tolist() == [[0, 0, 2, 2], [30, 20, 32, 24]]
    assert len(dataset.file.ground_truth().anns) == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_id": 77}, "annotation 1 is of image 77, which is not listed"),
        ({"category_id": 3}, "annotation 1 has category 3, which is not listed"),
        ({"bbox": [1, 2, 3]}, r"annotation 1 has bbox \[1, 2, 3\]"),
        ({"bbox": [1, 2, 3, float("nan")]}, "annotation 1 has bbox"),
        ({"bbox": None}, "annotation 1 has bbox None"),
        ({"segmentation": {"size": [24, 32]}}, r"annotation 1 has RLE counts None"),
    ],
)
def test_a_bad_annotation_is_named(
    coco_folder: CocoFolder, change: dict[str, Any], message: str
) -> None:
    annotation = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4], **change}
    with pytest.raises(DataError, match=message):
        _open(coco_folder([annotation]))


@pytest.mark.parametrize("key", ["image_id", "category_id", "bbox"])
def test_a_missing_key_is_named(coco_folder: CocoFolder, key: str) -> None:
    annotation = {"id": 4, "image_id": 1, "category_id": 1, "bbox": [1, 1, 4, 4]}
    del annotation[key]
    with pytest.raises(DataError, match=f"annotation 4 has no '{key}'"):
        _open(coco_folder([annotation]))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "no list named 'images'"),
        ('{"images": [], "annotations": []}', "no list named 'categories'"),
        ('{"images": [], "annotations": [], "categories": [{"id": 1}]}', "lists no image"),
        (
            '{"images": [{"id": 1, "file_name": "a"}], "annotations": [], "categories": []}',
            r"image 1 \(a\) has no 'width'",
        ),
        (
            json.dumps(
                {
                    "images": [{"id": 1, "file_name": "a", "width": 1, "height": 1}] * 2,
                    "annotations": [],
                    "categories": [{"id": 1}],
                }
            ),
            r"image 1 \(a\) has id 1 as image number 1 has; every image needs its own",
        ),
        (
            '{"images": [{"id": 1, "file_name": "a", "width": 1, "height": 1}],'
            ' "annotations": [], "categories": []}',
            "lists no category",
        ),
    ],
)
def test_a_file_that_is_not_coco_is_refused(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(DataError, match=message):
        _check(tmp_path / "a.json")


def test_a_missing_annotation_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"annotation file .*a\.json is missing"):
        _check(tmp_path / "a.json")


def test_a_large_file_is_read_in_little_memory(tmp_path: Path) -> None:
    """20,000 objects of 5,000 images: no object of Python stays for each of them."""
    polygon = [round(0.37 * number % 31, 2) for number in range(44)]
    images = [
        {"id": i, "file_name": f"{i:012d}.jpg", "width": 32, "height": 24} for i in range(5000)
    ]
    annotations = [
        {
            "id": i,
            "image_id": i % 5000,
            "category_id": 1 + i % 2,
            "bbox": [i % 7, 2.25, 11.5, 9],
            "area": 80.5,
            "iscrowd": 0,
            "segmentation": [polygon],
        }
        for i in range(20_000)
    ]
    path = tmp_path / "large.json"
    content = {"images": images, "annotations": annotations}
    path.write_text(json.dumps({**content, "categories": [{"id": 1}, {"id": 2}]}))
    tracemalloc.start()
    file = build_file(read_sheet(path))
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    # Lists of Python objects took 2,900 bytes an object, and twice that on the way.
    assert kept < 400 * len(annotations)
    assert peak - kept < 5 * 2**20 + 4 * 2**22, "four times the part that is read at once"
    assert len(file.images) == 5000
    record = file.images[4999]
    assert len(record.annotations) == 4
    assert record.annotations[0].segmentation == [polygon]
    assert record.annotations[0].box == (4999 % 7, 2.25, 11.5, 9)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
@pytest.mark.parametrize("chunk", [1, 7, 1 << 22])
def test_a_file_is_read_in_parts_of_any_size(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, encoding: str, chunk: int
) -> None:
    monkeypatch.setattr(coco, "_CHUNK", chunk)
    content = {
        "info": {"by": "Zoë", "images": [1, {"a": "]"}]},
        "images": [{"id": 1, "name": "größe, ein [Bild]"}, 12345, None],
        "annotations": [],
        "more": -1.5e3,
    }
    path = tmp_path / "a.json"
    path.write_text(json.dumps(content, ensure_ascii=False, indent=1), encoding=encoding)
    seen: list[Any] = []
    lists, digest = coco.read_lists(path, ("images", "annotations"), lambda *one: seen.append(one))
    assert seen == [("images", entry) for entry in content["images"]]
    for _ in range(2):
        assert list(lists["images"]) == content["images"]
    assert list(lists["annotations"]) == []
    assert digest == hashlib.sha256(path.read_bytes()).hexdigest()


@pytest.mark.parametrize(
    "text", ['{"images": [1, 2', '{"images": [1,]}', '{"images": [] "a": 1}', "{} {}", '{"a": 1,}']
)
def test_broken_json_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ValueError, match=r"at byte \d+"):
        coco.read_lists(tmp_path / "a.json", ("images",), lambda *one: None)
