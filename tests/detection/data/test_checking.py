"""Faults of people's data sets, each in a file of at most three images."""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcov_detection.cli import main
from fastcov_detection.config import DataConfig, TrainConfig
from fastcov_detection.data import checks
from fastcov_detection.data.dataset import LoadedData, load_data
from fastcov_detection.errors import DataError
from fastcov_detection.train.loop import train

BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 6, 8, 10]}
POLYGON = [4, 6, 12, 6, 12, 16, 4, 16]


@dataclass
class Data:
    """A data set of two images in a Roboflow-like folder, whose parts a test changes."""

    root: Path

    def __post_init__(self) -> None:
        for split in ("train", "val"):
            (self.root / split).mkdir(parents=True)
            for number in (1, 2):
                pixels = np.full((24, 32, 3), 40 * number, dtype=np.uint8)
                Image.fromarray(pixels).save(self.root / split / f"{number}.png")
            self.write(split, self.content(split))

    def content(self, split: str) -> dict[str, Any]:
        return {
            "info": split,
            "images": [
                {"id": i, "file_name": f"{i}.png", "width": 32, "height": 24} for i in (1, 2)
            ],
            "annotations": [dict(BOX), {**BOX, "id": 2, "image_id": 2}],
            "categories": [{"id": 1, "name": "one"}, {"id": 5, "name": "five"}],
        }

    def path(self, split: str = "train") -> Path:
        return self.root / split / "_annotations.coco.json"

    def write(self, split: str, content: dict[str, Any]) -> None:
        self.path(split).write_text(json.dumps(content))

    def change(self, edit: Callable[[dict[str, Any]], Any], split: str = "train") -> None:
        content = json.loads(self.path(split).read_text())
        edit(content)
        self.write(split, content)

    def load(self, *, with_masks: bool = False, **settings: Any) -> LoadedData:
        config = DataConfig(name=str(self.root), **settings)
        return load_data(config, with_masks=with_masks, progress=False)


@pytest.fixture
def data(tmp_path: Path) -> Data:
    return Data(tmp_path / "data")


SQUARE_RLE = {"size": [24, 32], "counts": [100, 4, 24 * 32 - 104]}
HUGE = 208_543_216.0
SEGMENTATIONS = [
    ([[]], r"has segmentation \[\[\]\], no polygon of three points; give at least three"),
    ([[4, 6, 12, 16]], r"\[\[4, 6, 12, 16\]\], no polygon of three points"),
    (POLYGON, r"has segmentation \[4, 6, .*write a list of polygons: \[\[x1"),
    ("4,6,12,6,12,16", r"has segmentation '4,6,12,6,12,16'; write a list of polygons"),
    ([["4", "6", "12", "6", "12", "16"]], "a polygon is one flat list of numbers"),
    ([[4, 6], [12, 6], [12, 16]], "no polygon of three points"),
    ([[4, 6, 12, 6, 12, 16, 4]], "two numbers for each point"),
    ([[4, 6, 12, float("nan"), 12, 16]], "points far outside of its image"),
    ([[-164.1, -221.8, HUGE, 352_186_880, 226, 237]], "points far outside of its image of 32x24"),
    ({}, r"has an RLE of size None; the image is 24 high"),
    ({**SQUARE_RLE, "size": [32, 24]}, r"an RLE of size \[32, 24\]; the image is 24 high and 32"),
    ({**SQUARE_RLE, "counts": [100, 4]}, "has RLE counts of 104 pixels in all, its image has 768"),
    ({**SQUARE_RLE, "counts": [100, -4, 672]}, "runs that are no lengths"),
    ({**SQUARE_RLE, "counts": None}, "has RLE counts None"),
    ({**SQUARE_RLE, "counts": "hello world"}, "has RLE counts 'hello world'"),
    ({**SQUARE_RLE, "counts": "P~"}, "has RLE counts 'P~'"),
    (True, "has segmentation True"),
]


@pytest.mark.parametrize(("segmentation", "message"), SEGMENTATIONS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_segmentations_that_are_none(
    data: Data, segmentation: Any, message: str, split: str
) -> None:
    data.change(lambda c: c["annotations"][0].update(segmentation=segmentation), split)
    with pytest.raises(DataError, match=message) as raised:
        data.load()
    assert f"{data.path(split)}: annotation 1 has" in str(raised.value)


@pytest.mark.parametrize(
    "segmentation", [[POLYGON], SQUARE_RLE, [[4, 6, 12, 16], POLYGON], [POLYGON, [4, 6, 12, 16]]]
)
def test_segmentations_that_are_read(data: Data, segmentation: Any) -> None:
    for split in ("train", "val"):
        for index in (0, 1):
            data.change(
                lambda c, i=index: c["annotations"][i].update(segmentation=segmentation), split
            )
    loaded = data.load(with_masks=True)
    mask = loaded.train[0][1]["masks"][0]
    assert mask.sum() == (4 if isinstance(segmentation, dict) else 80)
    truth = loaded.val.file.ground_truth(with_masks=True)
    np.testing.assert_array_equal(truth.annToMask(truth.anns[1]), mask)


ENTRIES: list[tuple[str, int, dict[str, Any], str]] = [
    ("annotations", 0, {"iscrowd": "0"}, r"annotation 1 has iscrowd '0'; write 0 or 1"),
    ("annotations", 0, {"iscrowd": 2}, "annotation 1 has iscrowd 2"),
    ("annotations", 0, {"area": -1}, r"annotation 1 has area -1; write the number of pixels"),
    ("annotations", 0, {"area": "80"}, "annotation 1 has area '80'"),
    ("annotations", 0, {"area": float("nan")}, "annotation 1 has area nan"),
    ("annotations", 0, {"category_id": "1"}, r"category '1', which is not listed; .* has 1: write"),
    ("annotations", 0, {"category_id": "five"}, r"that is a category's name: write its id, 5"),
    ("annotations", 0, {"category_id": 1.0}, r"category 1\.0, which is not listed; .* has 1: wri"),
    ("annotations", 0, {"category_id": [1]}, r"has category \[1\], which is not listed"),
    ("annotations", 0, {"image_id": "1"}, r"of image '1', which is not listed; .* has 1: write"),
    ("annotations", 0, {"image_id": None}, r"of image None, which is not listed"),
    ("annotations", 0, {"bbox": ["4", "6", "8", "10"]}, r"has bbox \['4', '6', '8', '10'\]; exp"),
    ("annotations", 0, {"bbox": [True, 6, 8, 10]}, r"has bbox \[True, 6, 8, 10\]"),
    ("annotations", 0, {"bbox": [4, 6, 10**400, 8]}, r"annotation 1 has bbox \[4, 6, 1000"),
    ("annotations", 0, {"bbox": [4, 6, 1e308, 8]}, r"annotation 1 has bbox \[4, 6, 1e\+308"),
    ("annotations", 0, {"bbox": {"x": 1}}, r"has bbox \{'x': 1\}"),
    ("images", 1, {"width": None}, r"image 2 \(2\.png\) has width None and height 24; write the"),
    ("images", 1, {"height": 0}, r"image 2 \(2\.png\) has width 32 and height 0"),
    ("images", 1, {"width": "32"}, r"image 2 \(2\.png\) has width '32'"),
    ("images", 1, {"width": 32.5}, r"image 2 \(2\.png\) has width 32\.5"),
    (
        "images",
        1,
        {"width": 10**6, "height": 10**6},
        r"annotated as 1000000x1000000, more than 178",
    ),
    ("images", 1, {"width": 24, "height": 32}, r"2\.png\) is 32x24, annotated as 24x32; its boxes"),
    ("images", 1, {"id": 1}, r"image 1 \(2\.png\) has id 1 as image number 1 has; every image"),
    ("images", 1, {"id": [1]}, r"image number 2 \(2\.png\) has id \[1\]; write an integer"),
    ("images", 1, {"id": "2"}, "has image ids that are integers and others that are texts"),
    ("images", 1, {"file_name": "1.png"}, r"image 2 \(1\.png\) has file_name '1\.png' as image 1"),
    ("images", 1, {"file_name": None}, r"image 2 has file_name None; write the name"),
    ("categories", 1, {"id": 1}, r"category 1 has id 1 as category number 1 has; every category"),
    ("categories", 1, {"id": "5"}, r"category 5 has id '5'; write an integer"),
    ("categories", 1, {"name": 3}, r"category 5 has name 3; write a text"),
]


@pytest.mark.parametrize(("part", "index", "change", "message"), ENTRIES)
def test_entries_that_are_wrong(
    data: Data, part: str, index: int, change: dict[str, Any], message: str
) -> None:
    for split in ("train", "val"):
        data.change(lambda c: c[part][index].update(change), split)
    with pytest.raises(DataError, match=message) as raised:
        data.load()
    assert str(data.path("train")) in str(raised.value)
    assert str(data.path("val")) in str(raised.value), "faults of both halves are in one list"


@pytest.mark.parametrize("part", ["images", "annotations", "categories"])
def test_entries_that_are_no_objects(data: Data, part: str) -> None:
    data.change(lambda c: c[part].append("what"))
    with pytest.raises(DataError, match=r" 2 is 'what'; expected a JSON object"):
        data.load()


def test_all_faults_are_in_one_list(data: Data) -> None:
    data.change(lambda c: c["annotations"][0].update(iscrowd="0", area=-1))
    data.change(lambda c: c["annotations"][1].update(segmentation=[[]]), "val")
    (data.root / "train" / "2.png").write_bytes(b"nothing")
    Image.new("RGB", (24, 32)).save(data.root / "val" / "1.png")
    with pytest.raises(DataError) as raised:
        data.load()
    first, *lines = str(raised.value).splitlines()
    assert first == "5 faults in the data:"
    expected = [
        "train: annotation 1 has iscrowd '0'",
        "train: annotation 1 has area -1",
        "train: image 2 (2.png) cannot be read",
        "val: annotation 2 has segmentation [[]]",
        "val: image 1 (1.png) is 24x32, annotated as 32x24",
    ]
    for line, text in zip(lines, expected, strict=True):
        split, _, said = text.partition(": ")
        assert line.strip().startswith(f"{data.path(split)}: {said}")
        assert "; " in line, "each has its remedy"


def test_the_list_is_bounded_and_the_command_shows_all(
    data: Data, capsys: pytest.CaptureFixture[str]
) -> None:
    data.change(lambda c: c["annotations"].extend({**BOX, "id": 9, "area": -1} for _ in range(99)))
    data.change(lambda c: c["annotations"][0].update(iscrowd="0"))
    with pytest.raises(DataError) as raised:
        data.load()
    lines = str(raised.value).splitlines()
    assert lines[0] == "100 faults in the data:"
    assert "has iscrowd '0'" in lines[1], "each kind is seen"
    assert len(lines) == 1 + 1 + 10 + 1
    assert "89 more of this kind; fastcov-detection check lists all" in lines[-1]
    words = ["check", "--quiet", "--data", str(data.root)]
    assert main(words) == 2
    assert capsys.readouterr().err.count("has area -1") == 99
    data.write("train", data.content("train"))
    assert main(words) == 0
    assert "no fault found" in capsys.readouterr().out


CROWDS = [{**BOX, "iscrowd": 1}]
NO_OBJECTS: list[tuple[list[dict[str, Any]], str]] = [
    ([], "has no object whose box has an area"),
    (CROWDS, r"1 of 1 annotations have iscrowd 1, which marks groups; .*CVAT writes 1 for masks"),
    ([{**BOX, "bbox": [4, 6, 0, 0]}], "has no object whose box has an area"),
]


@pytest.mark.parametrize(("annotations", "message"), NO_OBJECTS)
@pytest.mark.parametrize("split", ["train", "val"])
def test_a_half_without_an_object_is_refused_before_training(
    data: Data,
    tiny_run: TrainConfig,
    annotations: list[dict[str, Any]],
    message: str,
    split: str,
    tmp_path: Path,
) -> None:
    data.change(lambda c: c.update(annotations=annotations), split)
    config = replace(tiny_run, data=DataConfig(name=str(data.root)))
    with pytest.raises(DataError, match=message) as raised:
        train(config, run_dir=tmp_path / "run", progress=False)
    use = "there is nothing to learn" if split == "train" else "average precision is undefined"
    assert use in str(raised.value)
    assert not (tmp_path / "run").exists()


def test_boxes_as_shares_of_the_image_are_refused(data: Data) -> None:
    for index in (0, 1):
        data.change(lambda c, i=index: c["annotations"][i].update(bbox=[0.1, 0.2, 0.25, 0.5]))
    with pytest.raises(DataError, match="seem to be shares of the image; multiply them"):
        data.load()


@pytest.mark.parametrize("damage", ["empty", "text", "cut header", "cut pixels", "cut end"])
@pytest.mark.parametrize("ending", ["png", "jpg", "bmp", "tif", "webp"])
def test_images_that_are_not_whole(data: Data, damage: str, ending: str) -> None:
    path = data.root / "train" / f"1.{ending}"
    noise = np.random.default_rng(0).integers(0, 256, (24, 32, 3), dtype=np.uint8)
    Image.fromarray(noise).save(path)
    content = path.read_bytes()
    kept = {"cut header": 20, "cut pixels": len(content) // 2, "cut end": len(content) - 40}
    damaged = {"empty": b"", "text": b"<html>404</html>"}
    path.write_bytes(damaged.get(damage, content[: kept.get(damage, 0)]))
    data.change(lambda c: c["images"][0].update(file_name=path.name))
    with pytest.raises(DataError, match=rf"image 1 \(1\.{ending}\) cannot be read \("):
        data.load()


def test_pixels_of_unknown_range_are_refused(data: Data) -> None:
    grey = np.linspace(0, 1, 24 * 32, dtype=np.float32).reshape(24, 32)
    Image.fromarray(grey).save(data.root / "train" / "1.tif")
    data.change(lambda c: c["images"][0].update(file_name="1.tif"))
    with pytest.raises(DataError, match=r"has pixels of mode 'F', whose range is unknown; save it"):
        data.load()


def test_dark_images_of_16_bits_are_told(data: Data, caplog: pytest.LogCaptureFixture) -> None:
    Image.fromarray(np.full((24, 32), 4095, np.uint16)).save(data.root / "train" / "1.png")
    Image.fromarray(np.full((24, 32), 3000, np.uint16)).save(data.root / "train" / "2.png")
    data.load()
    assert "2 images of 16 bits whose brightest value is 4095; they are nearly black" in caplog.text
    caplog.clear()
    Image.fromarray(np.full((24, 32), 60000, np.uint16)).save(data.root / "train" / "2.png")
    assert data.load().train[1][0].unique().tolist() == [233]
    assert "nearly black" not in caplog.text


def test_transparent_images_are_told(data: Data, caplog: pytest.LogCaptureFixture) -> None:
    pixels = np.full((24, 32, 4), 255, np.uint8)
    Image.fromarray(pixels).save(data.root / "train" / "1.png")
    data.load()
    assert not caplog.messages, "an alpha channel that hides nothing is no news"
    pixels[3, 4, 3] = 200
    Image.fromarray(pixels).save(data.root / "train" / "1.png")
    data.load()
    assert "image 1 (1.png) has transparent pixels, whose hidden colours are read" in caplog.text


def _turned(path: Path, orientation: int) -> None:
    """Stores a picture with a white top left quarter so that a viewer shows it upright."""
    shown = np.zeros((24, 32, 3), dtype=np.uint8)
    shown[:12, :16] = 255
    back = {
        1: shown,
        2: shown[:, ::-1],
        3: shown[::-1, ::-1],
        4: shown[::-1],
        5: shown.transpose(1, 0, 2),
        6: np.rot90(shown),
        7: np.rot90(shown, 2).transpose(1, 0, 2),
        8: np.rot90(shown, -1),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(back)).save(path, exif=exif)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("ending", ["png", "tif", "webp"])
def test_images_are_read_as_viewers_show_them(
    data: Data, orientation: int, ending: str, caplog: pytest.LogCaptureFixture
) -> None:
    _turned(data.root / "train" / f"1.{ending}", orientation)
    data.change(lambda c: c["images"][0].update(file_name=f"1.{ending}"))
    image, target = data.load().train[0]
    assert image[:, :11, :15].min() > 0.9
    assert image[:, 13:].max() < 0.1
    assert image[:, :, 17:].max() < 0.1
    assert target["boxes"].tolist() == [[4, 6, 12, 16]]
    is_told = orientation != 1 and ending != "tif"  # nobody reads a TIFF unturned
    assert (f"EXIF orientation {orientation}; it is turned" in caplog.text) == is_told


def test_boxes_on_unturned_pixels_need_a_word(data: Data) -> None:
    path = data.root / "train" / "1.png"
    _turned(path, 6)
    data.change(lambda c: c["images"][0].update(width=24, height=32))
    expected = r"as 24x32; viewers turn it to 32x24 \(EXIF orientation 6\); .* data\.exif=ignore"
    with pytest.raises(DataError, match=expected):
        data.load()
    image, _ = data.load(exif="ignore").train[0]
    assert image.shape == (3, 32, 24)
    data.change(lambda c: c["images"][0].update(width=32, height=24))
    with pytest.raises(DataError, match=r"as 32x24; viewers turn it to 32x24 .*data\.exif=turn"):
        data.load(exif="ignore")


def test_a_broken_exif_block_is_no_fault(data: Data) -> None:
    path = data.root / "train" / "1.jpg"
    Image.new("RGB", (32, 24)).save(path, exif=b"Exif\0\0MM\0*\0\0\0\x08\xff\xff\x01\x12")
    data.change(lambda c: c["images"][0].update(file_name="1.jpg"))
    assert data.load().train[0][0].shape == (3, 24, 32)


@pytest.mark.parametrize("sliver", [[4, 6, 1e-9, 8], [31.5, 6, 1e-6, 8], [4, 6, -8, 10]])
def test_slivers_are_skipped_counted_and_named(
    data: Data,
    tiny_run: TrainConfig,
    sliver: list[float],
    caplog: pytest.LogCaptureFixture,
    tmp_path: Path,
) -> None:
    data.change(lambda c: c["annotations"].append({**BOX, "id": 77, "bbox": sliver}))
    with caplog.at_level(logging.WARNING):
        loaded = data.load()
    assert f"annotation 77 has bbox {sliver}, a box that has no area" in caplog.text
    assert loaded.train[0][1]["boxes"].tolist() == [[4, 6, 12, 16]]
    assert len(loaded.train.file.ground_truth().anns) == 3
    config = replace(tiny_run, data=DataConfig(name=str(data.root)), steps=2, track="none")
    train(config, run_dir=tmp_path / "run", progress=False)


NOTES: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (
        lambda c: c["annotations"][0].update(bbox=[20, 6, 28, 16]),
        r"annotation 1 has bbox \[20, 6, 28, 16\], which reaches beyond its image of 32x24; .* if "
        "these are corners",
    ),
    (
        lambda c: c["annotations"].append({**BOX, "id": 3}),
        r"annotation 3 repeats an object, bbox \[4, 6, 8, 10\]; the score counts it twice",
    ),
    (
        lambda c: c["annotations"][0].update(attributes={"occluded": False, "rotation": 30.0}),
        r"annotation 1 has attributes\.rotation 30\.0; its bbox is read as it is",
    ),
    (
        lambda c: c["annotations"][0].update(segmentation=[[0, 18, 2, 18, 2, 20]]),
        r"has bbox \[4, 6, 8, 10\], and its segmentation lies outside of it; write both in pixels",
    ),
    (
        lambda c: c["categories"].append({"id": 6, "name": "five"}),
        "category 6 has name 'five' as category 5 has; they are trained as different classes",
    ),
]


@pytest.mark.parametrize(("edit", "message"), NOTES)
def test_what_is_told_and_gone_on_with(
    data: Data,
    edit: Callable[[dict[str, Any]], Any],
    message: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    data.load()
    assert not caplog.messages
    for split in ("train", "val"):
        data.change(edit, split)
    data.load()
    assert any(re.search(message, line) for line in caplog.messages), caplog.messages


def test_halves_that_share_images_are_told(data: Data, caplog: pytest.LogCaptureFixture) -> None:
    data.write("val", data.content("train"))
    data.load()
    assert "holds the same 2 images for training and validation; the score will be" in caplog.text
    caplog.clear()
    data.write("val", data.content("val"))
    data.load(val_images=str(data.root / "train"))
    assert "shares 2 of 2 images with" in caplog.text


def test_a_class_that_only_validation_has_is_told(
    data: Data, caplog: pytest.LogCaptureFixture
) -> None:
    data.change(lambda c: c["annotations"][0].update(category_id=5), "val")
    data.load()
    assert "has no object of five, which" in caplog.text


def test_image_ids_may_be_texts(data: Data, tiny_run: TrainConfig, tmp_path: Path) -> None:
    def rename(content: dict[str, Any]) -> None:
        for image in content["images"]:
            image["id"] = f"frame-{image['id']}"
        for annotation in content["annotations"]:
            annotation["image_id"] = f"frame-{annotation['image_id']}"

    for split in ("train", "val"):
        data.change(rename, split)
    config = replace(tiny_run, data=DataConfig(name=str(data.root)), steps=1, track="none")
    train(config, run_dir=tmp_path / "run", progress=False)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_files_that_windows_wrote(data: Data, encoding: str) -> None:
    content = data.content("train")
    content["categories"][0]["name"] = "grün"
    for split in ("train", "val"):
        data.path(split).write_text(json.dumps(content, ensure_ascii=False), encoding=encoding)
    assert data.load().class_names == ("grün", "five")


def test_a_checked_data_set_is_not_checked_again(
    data: Data, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    data.change(lambda c: c["annotations"].append({**BOX, "id": 77, "bbox": [4, 6, 0, 0]}))
    data.load()
    assert "annotation 77" in caplog.text
    caplog.clear()
    read = checks.read_header
    seen: list[str] = []

    def watched(path: Path) -> Any:
        seen.append(path.name)
        return read(path)

    monkeypatch.setattr(checks, "read_header", watched)
    data.load()
    assert not seen
    assert "annotation 77" in caplog.text, "notes are told each time"
    (data.root / "train" / "2.png").write_bytes(b"nothing")
    for _ in range(2):
        with pytest.raises(DataError, match=r"image 2 \(2\.png\) cannot be read"):
            data.load()
    assert sorted(seen) == ["1.png", "2.png"], "only the half that changed, and once"


def test_a_cache_that_cannot_be_written_is_no_fault(
    data: Data, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(data.load().train) == 2
