"""Folders and file names as Roboflow, CVAT, Label Studio and others write them."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fastcov_detection.config import DataConfig
from fastcov_detection.data.dataset import LoadedData, load_data
from fastcov_detection.errors import DataError

BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 6, 8, 10]}


def _write(
    root: Path,
    annotations: str,
    image: str,
    name: str = "1.png",
    **changes: Any,
) -> Path:
    """One image in a folder of ``root``, and an annotation file that calls it ``name``."""
    path = root / annotations
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "info": annotations,
        "images": [{"id": 1, "file_name": name, "width": 32, "height": 24}],
        "annotations": [BOX],
        "categories": [{"id": 1, "name": "one"}],
        **changes,
    }
    path.write_text(json.dumps(content))
    (root / image).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (32, 24)).save(root / image)
    return path


def _load(root: Path) -> LoadedData:
    return load_data(DataConfig(name=str(root)), progress=False)


def test_roboflow(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    categories = [
        {"id": 0, "name": "cells", "supercategory": "none"},
        {"id": 1, "name": "one", "supercategory": "cells"},
        {"id": 2, "name": "two", "supercategory": "cells"},
    ]
    for split in ("train", "valid", "test"):
        _write(tmp_path, f"{split}/_annotations.coco.json", f"{split}/1.png", categories=categories)
    data = _load(tmp_path)
    assert data.class_names == ("one", "two")
    assert data.val.file.categories == {1: "one", 2: "two"}
    assert data.val.images_dir.name == "valid"
    assert "category 0 is every other category's supercategory and has no object" in caplog.text


ROOTS: list[tuple[list[dict[str, Any]], tuple[str, ...]]] = [
    # A root that has objects is a class.
    (
        [
            {"id": 1, "name": "cells", "supercategory": "none"},
            {"id": 2, "name": "two", "supercategory": "cells"},
        ],
        ("cells", "two"),
    ),
    # COCO's own list: a supercategory of itself.
    (
        [
            {"id": 1, "name": "person", "supercategory": "person"},
            {"id": 2, "name": "car", "supercategory": "vehicle"},
        ],
        ("person", "car"),
    ),
    # One level of many is no root of the whole list.
    (
        [
            {"id": 1, "name": "one", "supercategory": "none"},
            {"id": 2, "name": "fruit", "supercategory": "none"},
            {"id": 3, "name": "apple", "supercategory": "fruit"},
        ],
        ("one", "fruit", "apple"),
    ),
    ([{"id": 1, "name": "one", "supercategory": "none"}], ("one",)),
]


@pytest.mark.parametrize(("categories", "names"), ROOTS)
def test_categories_that_are_classes_stay(
    tmp_path: Path, categories: list[dict[str, Any]], names: tuple[str, ...]
) -> None:
    for split in ("train", "valid"):
        _write(tmp_path, f"{split}/_annotations.coco.json", f"{split}/1.png", categories=categories)
    assert _load(tmp_path).class_names == names


@pytest.mark.parametrize(
    ("annotations", "image", "name"),
    [
        ("annotations/instances_{}.json", "images/{}/1.png", "1.png"),  # CVAT, a project
        ("{}/annotations/instances_default.json", "{}/images/1.png", "1.png"),
        ("{}/annotations/instances_default.json", "{}/images/default/1.png", "1.png"),
        ("{}/annotations/instances_default.json", "{}/images/a/b/1.png", "a/b/1.png"),
        ("{}/result.json", "{}/images/1.png", "images/1.png"),
        ("{}/result.json", "{}/images/1.png", "images\\1.png"),
        ("{}/result.json", "{}/images/1.png", "..\\..\\label-studio\\media\\upload\\4\\1.png"),
        ("{}/result.json", "{}/images/a b.png", "images/a%20b.png"),
        ("{}/result.json", "{}/images/a%20b.png", "images/a%20b.png"),
        ("{}/result.json", "{}/images/1.png", "/data/local-files/?d=project%5C1.png"),
        ("{}/labels.json", "{}/data/1.png", "1.png"),
        ("annotations/instances_{}.json", "{}/1.png", "/home/me/data/1.png"),
        ("annotations/instances_{}.json", "{}/1.png", "./1.png"),
        ("annotations/instances_{}.json", "{}/1.PNG", "1.png"),
        ("annotations/instances_{}.json", "{}/sub/1.png", "1.png"),
        (
            "annotations/instances_{}.json",
            "{}/" + unicodedata.normalize("NFD", "grün.png"),
            unicodedata.normalize("NFC", "grün.png"),
        ),
    ],
)
def test_names_as_exporters_write_them(
    tmp_path: Path, annotations: str, image: str, name: str
) -> None:
    for split in ("train", "val"):
        _write(tmp_path, annotations.format(split), image.format(split), name)
    data = _load(tmp_path)
    assert data.train[0][0].shape == (3, 24, 32)
    assert data.val.images_dir != data.train.images_dir


@pytest.mark.parametrize("split", ["val", "valid", "validation", "Validation"])
def test_a_validation_half_by_any_name(tmp_path: Path, split: str) -> None:
    _write(tmp_path, "annotations/instances_train.json", "images/train/1.png")
    _write(tmp_path, f"annotations/instances_{split}.json", f"images/{split}/1.png")
    assert _load(tmp_path).val.images_dir.name == split


@pytest.mark.parametrize(
    ("annotations", "image", "name"),
    [
        ("annotations/instances_default.json", "images/1.png", "1.png"),
        ("annotations/instances_default.json", "images/default/1.png", "1.png"),
        ("result.json", "images/1.png", "images/1.png"),
        ("result.json", "images/a b.png", "images\\a%20b.png"),
    ],
)
def test_an_export_without_halves_is_both_and_says_so(
    tmp_path: Path, annotations: str, image: str, name: str, caplog: pytest.LogCaptureFixture
) -> None:
    _write(tmp_path, annotations, image, name)
    data = _load(tmp_path)
    assert data.train.file.path == data.val.file.path == tmp_path / annotations
    assert data.train[0][0].shape == (3, 24, 32)
    assert "holds the same 1 images for training and validation" in caplog.text


def test_a_name_that_two_files_have_is_refused(tmp_path: Path) -> None:
    for split in ("train", "val"):
        for folder in "ab":
            _write(
                tmp_path, f"annotations/instances_{split}.json", f"images/{split}/{folder}/1.png"
            )
    with pytest.raises(DataError, match=r"2 files have that name: [ab]/1\.png, [ab]/1\.png"):
        _load(tmp_path)


def test_two_names_of_one_file_are_refused(tmp_path: Path) -> None:
    images = [
        {"id": number, "file_name": f"{folder}/1.png", "width": 32, "height": 24}
        for number, folder in enumerate(("a", "b"), 1)
    ]
    for split in ("train", "val"):
        _write(
            tmp_path, f"annotations/instances_{split}.json", f"images/{split}/1.png", images=images
        )
    with pytest.raises(DataError, match=r"is read from 1\.png, as another image is"):
        _load(tmp_path)


def test_what_is_near_a_missing_file_is_told(tmp_path: Path) -> None:
    _write(tmp_path / "coco", "annotations/instances_train.json", "train/1.png")
    with pytest.raises(DataError, match=r"data folder .*coca is missing.*near it in .*: coco"):
        _load(tmp_path / "coca")
    with pytest.raises(DataError) as raised:
        _load(tmp_path)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2, "both halves"
    assert "found there: coco/annotations/instances_train.json, coco/train/ (1 images)" in lines[0]
    root = tmp_path / "coco"
    with pytest.raises(DataError, match="no val split in") as raised:
        _load(root)
    assert len(str(raised.value).splitlines()) == 1
    config = DataConfig(
        name=str(root), val_annotations=str(root / "annotations/instances_val.json")
    )
    with pytest.raises(DataError, match=r"near it in .*annotations: instances_train\.json"):
        load_data(config, progress=False)
    path = _write(root, "annotations/instances_val.json", "val/image_01.png", "image_1.png")
    with pytest.raises(DataError, match=r"is not in .*val, near it are image_01\.png; download"):
        _load(root)
    (root / "val" / "image_01.png").unlink()
    with pytest.raises(DataError, match="the folder has no image at all"):
        _load(root)
    path.unlink()
    with pytest.raises(DataError, match=r"image folder .*vol is missing.*: val"):
        load_data(
            DataConfig(
                name=str(root),
                val_images=str(root / "vol"),
                val_annotations=str(root / "annotations/instances_train.json"),
            ),
            progress=False,
        )


def test_many_missing_images_are_one_line(tmp_path: Path) -> None:
    images = [
        {"id": number, "file_name": f"{number}.jpg", "width": 32, "height": 24}
        for number in range(1, 40)
    ]
    for split in ("train", "val"):
        _write(tmp_path, f"annotations/instances_{split}.json", f"{split}/a.png", images=images)
    with pytest.raises(DataError, match=r"39 of 39 images of .* are not in .*the first is 1\.jpg"):
        _load(tmp_path)
