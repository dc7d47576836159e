"""The ``mini`` data set: real handwritten digits on real photographs, built in seconds.

Digits are scikit-learn's, photographs those that the scikit-learn and scikit-image packages carry:
nothing is downloaded. Training and validation share neither a digit nor a photograph.

With ``pictures``, objects are pictures in place of digits: square pieces of the photographs, each a
class of its own, pasted at random size, angle, brightness and colour. Training and validation then
share the pictures, and neither the backgrounds nor the looks. With ``cells`` they are mosaics:
squares of random colours, which have no detail that a small part would tell.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pycocotools import mask as rle

from fastcov_detection.config import MiniConfig
from fastcov_detection.errors import DataError
from fastcov_detection.progress import Advance, progress_bar

RECIPE = "mini.json"
"""Holds the parameters of a built folder; it is written last."""
_FORMAT = 1
_VAL_SHARE = 1 / 3
_PLACING_TRIES = 20
_PICTURE_EDGE = 48
_LEAST_CONTRAST = 30.0
"""Standard deviation of a picture's grey values; plainer pieces of photographs are passed over."""
_SKIMAGE, _SKLEARN = ("skimage", "data"), ("sklearn", "datasets", "images")
# Photographs without writing or printed figures in them; of the stereo pair, one view.
_PHOTOGRAPHS = (
    *((name, _SKIMAGE) for name in ("astronaut.png", "brick.png", "camera.png", "chelsea.png")),
    *((name, _SKIMAGE) for name in ("coffee.png", "coins.png", "grass.png", "gravel.png")),
    *((name, _SKIMAGE) for name in ("hubble_deep_field.jpg", "ihc.png", "moon.png")),
    *((name, _SKIMAGE) for name in ("motorcycle_left.png", "retina.jpg", "rocket.jpg")),
    *((name, _SKLEARN) for name in ("china.jpg", "flower.jpg")),
)


@dataclass(frozen=True)
class _Sources:
    """Digits and photographs that one split may use."""

    glyphs: NDArray[np.float64]
    labels: NDArray[np.int64]
    photographs: list[Image.Image]
    pictures: list[Image.Image]


class _Object(NamedTuple):
    """Object to paste: values [H, W, 3] or [3], opacity in [0, 1] [H, W], and the class."""

    values: NDArray[np.float64]
    opacity: NDArray[np.float64]
    label: int


def make_mini(
    root: str | os.PathLike[str], config: MiniConfig | None = None, *, progress: bool = True
) -> Path:
    """Data set in COCO layout, built unless it is there with the same parameters.

    Args:
        root: Folder to build: ``train2017/``, ``val2017/`` and ``annotations/instances_*.json``. It
            appears whole or not at all.
        config: Sizes, seed and looks.
        progress: Show a bar.

    Returns:
        ``root`` as a path.

    Raises:
        DataError: If ``root`` holds something else, or a photograph is missing from the packages.
    """
    config = config or MiniConfig()
    _check(config)
    target = Path(root)
    if _holds(target, config):
        return target
    if target.exists() and any(target.iterdir()) and not (target / RECIPE).exists():
        raise DataError(
            f"{target} is not empty and was not built as mini data; choose another data.root"
        )
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}."))
    try:
        partial.chmod(0o755)
        _build(partial, config, progress)
        _replace_folder(partial, target, config)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return target


def _check(config: MiniConfig) -> None:
    if config.train < 1 or config.val < 1:
        raise DataError(f"mini needs images, got train={config.train}, val={config.val}")
    low, high = config.sizes
    # A rotated digit is up to 1.42 times as long, and must fit.
    if not 4 <= low <= high or high * 1.42 > config.canvas:
        raise DataError(
            f"digits of {low} to {high} pixels do not fit a canvas of {config.canvas}; "
            f"sizes must lie between 4 and {int(config.canvas / 1.42)}"
        )
    if config.pictures < 0:
        raise DataError(f"pictures is {config.pictures}; choose 0 (digits) or a number of classes")
    if not 0 <= config.cells <= _PICTURE_EDGE or (config.cells and not config.pictures):
        raise DataError(
            f"cells is {config.cells} with pictures={config.pictures}; choose 0, or 1 to "
            f"{_PICTURE_EDGE} cells an edge and a number of pictures"
        )
    fewest, most = config.digits
    if not 0 <= fewest <= most or most == 0:
        raise DataError(f"digits is {config.digits}; expected fewest and most, for example 1,5")


def _recipe(config: MiniConfig) -> dict[str, Any]:
    values: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(config)))
    return values | {"format": _FORMAT}


def _holds(target: Path, config: MiniConfig) -> bool:
    try:
        return bool(json.loads((target / RECIPE).read_text(encoding="utf-8")) == _recipe(config))
    except (OSError, ValueError):
        return False


def _replace_folder(partial: Path, target: Path, config: MiniConfig) -> None:
    """Move of the new folder to the old one's place; of two builders the first one wins."""
    if target.exists():
        retired = Path(tempfile.mkdtemp(dir=target.parent, prefix=f".{target.name}.old."))
        target.replace(retired)
        shutil.rmtree(retired)
    try:
        partial.replace(target)
    except OSError:
        if not _holds(target, config):
            raise


def _build(root: Path, config: MiniConfig, progress: bool) -> None:
    train, val = _split_sources(config.seed, config.pictures, config.cells)
    (root / "annotations").mkdir()
    with progress_bar("building mini", config.train + config.val, enabled=progress) as advance:
        for code, (split, count, sources) in enumerate(
            (("train", config.train, train), ("val", config.val, val))
        ):
            coco = _build_split(root / f"{split}2017", count, sources, config, code, advance)
            path = root / "annotations" / f"instances_{split}2017.json"
            path.write_text(json.dumps(coco), encoding="utf-8")
    (root / RECIPE).write_text(json.dumps(_recipe(config)), encoding="utf-8")


def _build_split(
    folder: Path, count: int, sources: _Sources, config: MiniConfig, code: int, advance: Advance
) -> dict[str, Any]:
    folder.mkdir()
    images: list[dict[str, Any]] = []
    annotations: list[dict[str, Any]] = []
    for index in range(count):
        # Each image has a stream of its own: more images leave the first ones as they were.
        draw = np.random.default_rng([config.seed, code, index])
        pixels, objects = _compose(sources, config, draw)
        name = f"{index + 1:012d}.png"
        Image.fromarray(pixels).save(folder / name, compress_level=1)
        edge = config.canvas
        images.append({"id": index + 1, "file_name": name, "width": edge, "height": edge})
        for label, mask in objects:
            annotations.append(_annotation(len(annotations) + 1, index + 1, label, mask))
        advance(1)
    names = [f"picture {k}" for k in range(config.pictures)] or [str(k) for k in range(10)]
    categories = [{"id": k + 1, "name": name} for k, name in enumerate(names)]
    return {"images": images, "annotations": annotations, "categories": categories}


def _annotation(number: int, image_id: int, label: int, mask: NDArray[np.bool_]) -> dict[str, Any]:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    left, top = int(columns[0]), int(rows[0])
    encoded = rle.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {
        "id": number,
        "image_id": image_id,
        "category_id": label + 1,
        "bbox": [left, top, int(columns[-1]) - left + 1, int(rows[-1]) - top + 1],
        "area": int(mask.sum()),
        "iscrowd": 0,
        "segmentation": {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")},
    }


def _compose(
    sources: _Sources, config: MiniConfig, draw: np.random.Generator
) -> tuple[NDArray[np.uint8], list[tuple[int, NDArray[np.bool_]]]]:
    """One image and its objects: a crop of a photograph with digits or pictures apart."""
    photograph = sources.photographs[draw.integers(len(sources.photographs))]
    canvas = _crop(photograph, config.canvas, draw) * config.brightness
    taken = np.zeros(canvas.shape[:2], dtype=bool)
    objects = []
    for _ in range(draw.integers(config.digits[0], config.digits[1] + 1)):
        drawn = (_picture if config.pictures else _digit)(sources, config, draw)
        shape = drawn.opacity.shape
        place = _place(shape, taken, draw)
        if place is None:
            continue
        window = (
            slice(place[0], place[0] + shape[0]),
            slice(place[1], place[1] + shape[1]),
        )
        canvas[window] += drawn.opacity[..., None] * (drawn.values - canvas[window])
        taken[window] = True
        mask = np.zeros_like(taken)
        mask[window] = drawn.opacity >= 0.5
        objects.append((drawn.label, mask))
    return np.clip(np.rint(canvas), 0, 255).astype(np.uint8), objects


def _crop(photograph: Image.Image, edge: int, draw: np.random.Generator) -> NDArray[np.float64]:
    shorter = min(photograph.size)
    side = int(draw.integers(min(edge, shorter), shorter + 1))
    left = int(draw.integers(photograph.width - side + 1))
    top = int(draw.integers(photograph.height - side + 1))
    crop = photograph.resize(
        (edge, edge),
        Image.Resampling.BILINEAR,
        (left, top, left + side, top + side),
        reducing_gap=2.0,
    )
    return np.asarray(crop, dtype=np.float64)


def _digit(sources: _Sources, config: MiniConfig, draw: np.random.Generator) -> _Object:
    chosen = int(draw.integers(len(sources.glyphs)))
    opacity = _render(_ink(sources.glyphs[chosen]), config, draw)
    colour = draw.integers(config.colour_low, 256, size=3)
    return _Object(colour.astype(np.float64), opacity, int(sources.labels[chosen]))


def _picture(sources: _Sources, config: MiniConfig, draw: np.random.Generator) -> _Object:
    """A picture, turned behind its square window, in another light and with noise."""
    label = int(draw.integers(len(sources.pictures)))
    edge = int(draw.integers(config.sizes[0], config.sizes[1] + 1))
    angle = float(draw.uniform(-config.angle, config.angle))
    margin = _PICTURE_EDGE / 8  # more than a turn of 20 degrees leaves empty at the corners
    window = (margin, margin, _PICTURE_EDGE - margin, _PICTURE_EDGE - margin)
    turned = sources.pictures[label].rotate(angle, Image.Resampling.BILINEAR)
    shown = turned.resize((edge, edge), Image.Resampling.BILINEAR, window)
    light = draw.uniform(0.6, 1.2) * draw.uniform(0.7, 1.3, size=3)
    values = np.asarray(shown, dtype=np.float64) * light + draw.normal(0, 15, size=3)
    return _Object(np.clip(values, 0, 255), np.ones((edge, edge)), label)


def _cut_pictures(
    photographs: list[Image.Image], count: int, draw: np.random.Generator
) -> list[Image.Image]:
    pictures: list[Image.Image] = []
    while len(pictures) < count:
        photograph = photographs[draw.integers(len(photographs))]
        side = int(draw.integers(40, max(41, min(photograph.size) // 2)))
        left = int(draw.integers(photograph.width - side + 1))
        top = int(draw.integers(photograph.height - side + 1))
        box = (left, top, left + side, top + side)
        edges = (_PICTURE_EDGE, _PICTURE_EDGE)
        piece = photograph.resize(edges, Image.Resampling.BILINEAR, box, reducing_gap=2.0)
        if np.asarray(piece.convert("L"), dtype=np.float64).std() >= _LEAST_CONTRAST:
            pictures.append(piece)
    return pictures


def _make_mosaics(cells: int, count: int, draw: np.random.Generator) -> list[Image.Image]:
    """Squares of cells in random colours."""
    edges = (_PICTURE_EDGE, _PICTURE_EDGE)
    colours = draw.integers(0, 256, size=(count, cells, cells, 3), dtype=np.uint8)
    return [Image.fromarray(one).resize(edges, Image.Resampling.NEAREST) for one in colours]


def _ink(glyph: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ink of one digit in [0, 255], without the empty rows and columns around it."""
    rows, columns = np.flatnonzero(glyph.any(axis=1)), np.flatnonzero(glyph.any(axis=0))
    ink = glyph[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
    scaled: NDArray[np.float64] = ink * (255 / glyph.max())
    return scaled


def _render(
    ink: NDArray[np.float64], config: MiniConfig, draw: np.random.Generator
) -> NDArray[np.float64]:
    """Opacity in [0, 1] of one object at random size and angle."""
    size = int(draw.integers(config.sizes[0], config.sizes[1] + 1))
    angle = float(draw.uniform(-config.angle, config.angle))
    scale = size / max(ink.shape)
    drawn = Image.fromarray(np.pad(ink, 1).astype(np.uint8))
    edges = (round(drawn.width * scale), round(drawn.height * scale))
    drawn = drawn.resize(edges, Image.Resampling.BICUBIC)
    drawn = drawn.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    opacity = np.asarray(drawn, dtype=np.float64) / 255
    rows, columns = (
        np.flatnonzero((opacity > 0.05).any(axis=1)),
        np.flatnonzero((opacity > 0.05).any(axis=0)),
    )
    return opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]


def _place(
    shape: tuple[int, ...], taken: NDArray[np.bool_], draw: np.random.Generator
) -> tuple[int, int] | None:
    """Top-left corner of a free window, or None where there is no room."""
    for _ in range(_PLACING_TRIES):
        top = int(draw.integers(taken.shape[0] - shape[0] + 1))
        left = int(draw.integers(taken.shape[1] - shape[1] + 1))
        if not taken[top : top + shape[0], left : left + shape[1]].any():
            return top, left
    return None


def _split_sources(seed: int, count: int = 0, cells: int = 0) -> tuple[_Sources, _Sources]:
    """Digits and photographs for training and for validation, and pictures for both."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    photographs = [_read_photograph(name, *place) for name, place in _PHOTOGRAPHS]
    draw = np.random.default_rng([seed, 2])
    digit_order = draw.permutation(len(digits.images))
    photograph_order = draw.permutation(len(photographs))
    picture_draw = np.random.default_rng([seed, 3])
    if cells:
        pictures = _make_mosaics(cells, count, picture_draw)
    else:
        pictures = _cut_pictures(photographs, count, picture_draw)
    digit_cut, photograph_cut = (int(len(o) * _VAL_SHARE) for o in (digit_order, photograph_order))
    val, train = (
        _Sources(
            digits.images[digit_order[digit_part]],
            digits.target[digit_order[digit_part]],
            [photographs[index] for index in photograph_order[photograph_part]],
            pictures,
        )
        for digit_part, photograph_part in (
            (slice(None, digit_cut), slice(None, photograph_cut)),
            (slice(digit_cut, None), slice(photograph_cut, None)),
        )
    )
    return train, val


def _read_photograph(name: str, package: str, *folders: str) -> Image.Image:
    found = importlib.util.find_spec(package)
    places = list(found.submodule_search_locations or []) if found else []
    for place in places:
        path = Path(place, *folders, name)
        if path.exists():
            with Image.open(path) as photograph:
                return photograph.convert("RGB")
    raise DataError(
        f"photograph {name} is not in the installed package {package}; "
        "install scikit-image 0.26 and scikit-learn 1.9, which carry it"
    )
