"""Results of random changes: the same object in pixels, boxes and masks."""

from __future__ import annotations

import colorsys
import json
import runpy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools import mask as rle

from fastcov_detection.config import DataConfig
from fastcov_detection.data.augment import Augmentation, training_transform, whole_frame
from fastcov_detection.errors import ConfigError

WIDTH, HEIGHT = 64, 48
POLYGONS = [[10.0, 8.0, 40.0, 8.0, 40.0, 30.0, 10.0, 30.0]]
BOX = torch.tensor([[10.0, 8.0, 40.0, 30.0]])


def _scene() -> Image.Image:
    pixels = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    pixels[8:30, 10:40] = 255
    return Image.fromarray(pixels)


@pytest.mark.parametrize("zoom", [(1.0, 1.0), (1.0, 2.5), (0.3, 0.9)])
@pytest.mark.parametrize("coded", [False, True])
def test_pixels_boxes_and_masks_stay_together(zoom: tuple[float, float], coded: bool) -> None:
    augmentation = Augmentation(hflip=0.5, zoom=zoom, photometric=0.0)
    draws = torch.Generator().manual_seed(1)
    outline = rle.frPyObjects(POLYGONS, HEIGHT, WIDTH)[0] if coded else POLYGONS
    mirrored, shapes = set(), set()
    for _ in range(40):
        frame = augmentation.frame(WIDTH, HEIGHT, draws)
        image = np.asarray(frame.pixels(_scene()))
        (mask,) = frame.masks([outline], HEIGHT, WIDTH)
        (left, top, right, bottom) = frame.boxes(BOX)[0].tolist()
        assert image.shape[:2] == mask.shape == frame.canvas[::-1]
        mirrored.add(frame.is_mirrored)
        shapes.add(frame.canvas)
        if right - left < 3 or bottom - top < 3:
            continue
        # The filling of a canvas is grey, the object white; edges are between the two.
        white = image[..., 0] > 160
        assert (white & (mask == 1)).sum() >= 0.8 * max(int(white.sum()), int(mask.sum()))
        rows, columns = np.nonzero(mask)
        found = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
        np.testing.assert_allclose(found, (left, top, right, bottom), atol=1.01)
    assert mirrored == {True, False}
    assert (len(shapes) > 5) == (zoom[1] > 1), "a crop is not resized here"


def test_what_is_not_changed_keeps_every_bit() -> None:
    frame = whole_frame(WIDTH, HEIGHT)
    assert frame.pixels(_scene()).tobytes() == _scene().tobytes()
    assert torch.equal(frame.boxes(BOX), BOX)
    expected = rle.decode(rle.merge(rle.frPyObjects(POLYGONS, HEIGHT, WIDTH)))
    np.testing.assert_array_equal(frame.masks([POLYGONS], HEIGHT, WIDTH)[0], expected)
    assert frame.masks([], HEIGHT, WIDTH).shape == (0, HEIGHT, WIDTH)


def test_colours_change_as_they_should() -> None:
    """Over many draws: grey stays grey but for the order of channels, and red turns a little."""
    augmentation = Augmentation(hflip=0.0, zoom=None, photometric=0.5)
    draws = torch.Generator().manual_seed(0)
    grey, red = Image.new("RGB", (16, 16), (100,) * 3), Image.new("RGB", (16, 16), (150, 90, 90))
    levels, hues = set(), set()
    for _ in range(200):
        values = np.asarray(augmentation.colours(grey, draws))[0, 0]
        assert np.ptp(values.astype(int)) <= 1
        levels.add(int(values[0]))
        colour = np.asarray(augmentation.colours(red, draws))[0, 0] / 255
        hues.add(round(360 * colorsys.rgb_to_hsv(*colour)[0]))
    # Contrast leaves a uniform grey alone, brightness moves it by half at most.
    assert 49 <= min(levels) < 70
    assert 130 < max(levels) <= 151
    shifts = {min((hue - home) % 360 for home in (0, 120, 240)) for hue in hues}
    turns = {min(shift, 120 - shift) for shift in shifts}
    assert 10 <= max(turns) <= 30


def test_no_colours_without_a_chance() -> None:
    image = _scene()
    assert Augmentation(0.5, None, 0.0).colours(image, torch.Generator()) is image


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"scale_jitter": (0.0, 1.0)}, r"data\.scale_jitter is \(0\.0, 1\.0\); give the smallest"),
        ({"scale_jitter": (2.0, 1.0)}, r"data\.scale_jitter"),
        ({"hflip": 1.5}, r"data\.hflip is 1\.5; give a chance"),
        ({"photometric": -0.1}, r"data\.photometric is -0\.1"),
    ],
)
def test_impossible_changes(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        training_transform(DataConfig(**settings))


def test_readme_has_the_table_of_the_loaders_record() -> None:
    detection = Path(__file__).parents[3] / "detection"
    script = runpy.run_path(str(detection / "benchmarks" / "loader.py"))
    rows = json.loads((detection / "results" / "loader.json").read_text())["images_per_cpu_s"]
    assert rows.keys() == script["ROWS"].keys()
    text = (detection / "README.md").read_text(encoding="utf-8")
    part = text.partition(script["BEGIN"])[2].partition(script["END"])[0]
    assert part == f"\n{script['table'](rows)}\n"
