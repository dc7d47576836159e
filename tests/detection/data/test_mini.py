from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from pycocotools import mask as rle

from fastcov_detection.config import MiniConfig
from fastcov_detection.data import mini
from fastcov_detection.data.mini import make_mini
from fastcov_detection.errors import DataError

SMALL = MiniConfig(train=5, val=3, canvas=64, digits=(1, 3), sizes=(14, 36))


def _annotations(root: Path, split: str) -> dict[str, list[dict[str, object]]]:
    return json.loads((root / "annotations" / f"instances_{split}2017.json").read_text())


def test_boxes_are_the_tight_boxes_of_the_masks(tiny_root: Path) -> None:
    content = _annotations(tiny_root, "train")
    assert len(content["annotations"]) >= 12
    for annotation in content["annotations"]:
        mask = rle.decode(annotation["segmentation"])
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        left, top, width, height = annotation["bbox"]
        assert (columns[0], rows[0]) == (left, top)
        assert (columns[-1] - left + 1, rows[-1] - top + 1) == (width, height)
        assert mask.sum() == annotation["area"]


def test_masks_cover_what_was_pasted(tiny_root: Path) -> None:
    """Digits are brighter than the dimmed photographs, inside of their masks and only there."""
    content = _annotations(tiny_root, "train")
    brightest_outside, objects = 0.0, []
    for image in content["images"]:
        pixels = np.asarray(Image.open(tiny_root / "train2017" / image["file_name"])).astype(float)
        taken = np.zeros(pixels.shape[:2], dtype=bool)
        for annotation in content["annotations"]:
            if annotation["image_id"] != image["id"]:
                continue
            mask = rle.decode(annotation["segmentation"]).astype(bool)
            assert not (taken & mask).any()
            taken |= mask
            objects.append(pixels[mask].max())
        brightest_outside = max(brightest_outside, np.median(pixels[~taken]))
    assert min(objects) >= 150
    assert brightest_outside <= 127.5


def test_train_and_val_share_neither_digit_nor_photograph() -> None:
    train, val = mini._split_sources(seed=0)
    digits = [{glyph.tobytes() for glyph in split.glyphs} for split in (train, val)]
    photographs = [{p.tobytes() for p in split.photographs} for split in (train, val)]
    # Two of scikit-learn's 1797 digits may be equal by chance, but not many.
    assert len(digits[0] & digits[1]) <= 2
    assert not photographs[0] & photographs[1]
    assert len(train.glyphs) + len(val.glyphs) == 1797
    assert len(photographs[1]) == 5
    other, _ = mini._split_sources(seed=1)
    assert {p.tobytes() for p in other.photographs} != photographs[0]


def test_every_picture_is_a_class_that_both_halves_share(tmp_path: Path) -> None:
    look = replace(SMALL, train=12, pictures=7)
    root = make_mini(tmp_path / "pictures", look, progress=False)
    content = _annotations(root, "train")
    assert [one["name"] for one in content["categories"]] == [f"picture {k}" for k in range(7)]
    assert len({one["category_id"] for one in content["annotations"]}) > 4
    for annotation in content["annotations"]:
        width, height = annotation["bbox"][2:]
        assert width == height
        assert annotation["area"] == width * height
    train, val = mini._split_sources(0, 7)
    cut = [[picture.tobytes() for picture in split.pictures] for split in (train, val)]
    assert cut[0] == cut[1]
    assert len(set(cut[0])) == 7
    others = [picture.tobytes() for picture in mini._split_sources(1, 7)[0].pictures]
    assert not set(cut[0]) & set(others)


def test_a_picture_changes_its_light_and_keeps_its_class() -> None:
    sources, _ = mini._split_sources(0, 1)
    look = replace(SMALL, pictures=1)
    first, second = (mini._picture(sources, look, np.random.default_rng(seed)) for seed in (0, 1))
    assert first.label == second.label == 0
    assert first.values.mean(axis=(0, 1)) != pytest.approx(second.values.mean(axis=(0, 1)), rel=0.1)


def test_a_mosaic_has_its_cells_and_nothing_within_them() -> None:
    train, val = mini._split_sources(0, 5, 3)
    assert [one.tobytes() for one in train.pictures] == [one.tobytes() for one in val.pictures]
    values = np.asarray(train.pictures[0]).reshape(3, 16, 3, 16, 3)
    colours = values[:, 0, :, 0]
    assert (values == colours[:, None, :, None]).all()
    assert len({tuple(colour) for colour in colours.reshape(9, 3).tolist()}) == 9
    assert len({one.tobytes() for one in train.pictures}) == 5


def test_same_seed_same_bytes_and_more_images_keep_the_first(tmp_path: Path) -> None:
    first = make_mini(tmp_path / "a", SMALL, progress=False)
    second = make_mini(tmp_path / "b", replace(SMALL, train=7), progress=False)
    other = make_mini(tmp_path / "c", replace(SMALL, seed=1), progress=False)
    for index in range(1, 6):
        name = f"train2017/{index:012d}.png"
        assert (first / name).read_bytes() == (second / name).read_bytes()
        assert (first / name).read_bytes() != (other / name).read_bytes()
    assert len(list((second / "train2017").iterdir())) == 7


def test_rebuilt_only_when_parameters_change(tmp_path: Path) -> None:
    root = make_mini(tmp_path / "mini", SMALL, progress=False)
    before = (root / "mini.json").stat()
    assert make_mini(root, SMALL, progress=False) == root
    assert (root / "mini.json").stat().st_ino == before.st_ino
    make_mini(root, replace(SMALL, brightness=0.9), progress=False)
    assert (root / "mini.json").stat().st_ino != before.st_ino
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]


def test_a_build_that_fails_leaves_the_old_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = make_mini(tmp_path / "mini", SMALL, progress=False)

    def full_disk(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(mini, "_compose", full_disk)
    with pytest.raises(OSError, match="No space"):
        make_mini(root, replace(SMALL, seed=3), progress=False)
    assert [path.name for path in tmp_path.iterdir()] == ["mini"]
    assert make_mini(root, SMALL, progress=False) == root


def test_a_folder_of_something_else_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "letter.txt").write_text("dear")
    with pytest.raises(DataError, match=r"not empty.*another data\.root"):
        make_mini(tmp_path, SMALL, progress=False)
    assert (tmp_path / "letter.txt").read_text() == "dear"


def test_a_missing_photograph_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(DataError, match=r"mountain\.png is not in the installed package skimage"):
        mini._read_photograph("mountain.png", "skimage", "data")
    with pytest.raises(DataError, match="no_such_package"):
        mini._read_photograph("mountain.png", "no_such_package")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"sizes": (12, 60)}, "do not fit a canvas of 64"),
        ({"train": 0}, "needs images"),
        ({"digits": (4, 2)}, "fewest and most"),
        ({"pictures": -1}, "pictures is -1"),
        ({"pictures": 5, "cells": 49}, "cells is 49 with pictures=5"),
        ({"cells": 3}, "cells is 3 with pictures=0"),
    ],
)
def test_impossible_parameters(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(DataError, match=message):
        make_mini(tmp_path / "mini", replace(SMALL, **change), progress=False)
