"""Images a CPU second that one thread loads and varies, beside torchvision's transforms.

    python detection/benchmarks/loader.py                 # writes detection/results/loader.json
    python detection/benchmarks/loader.py --readme detection/README.md      # and the table there

Photographs of 640x480 with seven objects, whose outlines have 30 points. Both sides read the same
files through the same decoder and give eight-bit pixels, boxes, labels and masks where asked. They
take turns, so that whatever slows the machine down slows both.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torchvision
from PIL import Image
from sklearn.datasets import load_sample_images
from torchvision import tv_tensors
from torchvision.transforms import v2

from fastcov_detection.config import DataConfig
from fastcov_detection.data.augment import training_transform
from fastcov_detection.data.dataset import AugmentedView, CocoDataset, Draw
from fastcov_detection.files import made_by

SIZE, OBJECTS, POINTS, IMAGES, ROUNDS = (640, 480), 7, 30, 24, 5
BEGIN, END = "<!-- loader: generated -->", "<!-- loader: end -->"
JITTER = (0.8, 1.25)
ROWS: dict[str, tuple[DataConfig, bool, list[v2.Transform]]] = {
    "nothing": (DataConfig(hflip=0.0), False, []),
    "mirror": (DataConfig(hflip=0.5), False, [v2.RandomHorizontalFlip(0.5)]),
    "mirror and `photometric=0.5`": (
        DataConfig(hflip=0.5, photometric=0.5),
        False,
        [v2.RandomPhotometricDistort(p=0.5), v2.RandomHorizontalFlip(0.5)],
    ),
    "mirror and `scale_jitter=0.8,1.25`, with masks": (
        DataConfig(hflip=0.5, scale_jitter=JITTER),
        True,
        [
            v2.ScaleJitter(SIZE[::-1], JITTER, antialias=True),
            v2.RandomCrop(SIZE[::-1], pad_if_needed=True),
            v2.RandomHorizontalFlip(0.5),
            v2.SanitizeBoundingBoxes(),
        ],
    ),
}


def write_photographs(root: Path) -> None:
    """A data set in COCO format of photographs that scikit-learn carries."""
    draw = np.random.default_rng(0)
    photographs = [Image.fromarray(one).resize(SIZE) for one in load_sample_images().images]
    (root / "images").mkdir()
    images, annotations = [], []
    for number in range(1, IMAGES + 1):
        photograph = photographs[number % len(photographs)]
        photograph.save(root / "images" / f"{number}.jpg", quality=92)
        images.append({"id": number, "file_name": f"{number}.jpg", "width": 640, "height": 480})
        for _ in range(OBJECTS):
            radius = draw.uniform(20, 120, size=2)
            centre = [draw.uniform(r, edge - r) for r, edge in zip(radius, SIZE, strict=True)]
            turns = np.arange(POINTS) * 2 * math.pi / POINTS
            outline = np.stack([np.cos(turns), np.sin(turns)], axis=1) * radius + centre
            box = [*outline.min(axis=0), *(outline.max(axis=0) - outline.min(axis=0))]
            entry = {"id": len(annotations) + 1, "image_id": number, "category_id": 1}
            entry |= {"bbox": [round(v, 2) for v in box], "iscrowd": 0}
            annotations.append(entry | {"segmentation": [outline.round(2).ravel().tolist()]})
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1}]}
    (root / "annotations.json").write_text(json.dumps(content), encoding="utf-8")


def ours(dataset: CocoDataset, config: DataConfig) -> Callable[[int], object]:
    """One image, loaded as a training run does."""
    view = AugmentedView(dataset, training_transform(config))
    return lambda number: view[Draw(number % IMAGES, number)]


def theirs(dataset: CocoDataset, transforms: list[v2.Transform]) -> Callable[[int], object]:
    """One image, loaded and varied by torchvision's transforms."""
    transform = v2.Compose(transforms) if transforms else None

    def load(number: int) -> object:
        pixels, target = dataset.read(number % IMAGES)
        image = tv_tensors.Image(pixels)
        size = tuple(pixels.shape[-2:])
        boxes = tv_tensors.BoundingBoxes(target["boxes"], format="XYXY", canvas_size=size)
        target["boxes"] = boxes
        if "masks" in target:
            target["masks"] = tv_tensors.Mask(target["masks"])
        return (image, target) if transform is None else transform(image, target)

    return load


def images_a_second(load: Callable[[int], object], first: int) -> float:
    """Images a CPU second of one pass over all images: other work on the machine matters little."""
    start = time.process_time()
    for number in range(first, first + IMAGES):
        load(number)
    return IMAGES / (time.process_time() - start)


def measure() -> dict[str, dict[str, list[float]]]:
    """Images a CPU second of every row, both sides in turn."""
    found: dict[str, dict[str, list[float]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        write_photographs(root)
        for name, (config, with_masks, transforms) in ROWS.items():
            parts = root / "images", root / "annotations.json"
            dataset = CocoDataset(*parts, with_masks=with_masks)
            sides = {"torchvision": theirs(dataset, transforms), "here": ours(dataset, config)}
            found[name] = {side: [] for side in sides}
            for turn in range(ROUNDS + 1):
                for side, load in sides.items():
                    speed = images_a_second(load, turn * IMAGES)
                    if turn:  # the first round fills caches
                        found[name][side].append(round(speed, 1))
    return found


def table(rows: dict[str, dict[str, list[float]]]) -> str:
    """Markdown of the medians, lowest and highest round in brackets."""
    lines = ["| what is varied | torchvision v2 | here |", "| --- | --- | --- |"]
    for name, sides in rows.items():
        cells = [
            f"{statistics.median(one):.0f} ({min(one):.0f} to {max(one):.0f})"
            for one in (sides["torchvision"], sides["here"])
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Command line: measures, writes the record, and the table where a file is given for it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("detection/results/loader.json"))
    parser.add_argument("--readme", type=Path, help="file whose marked part is replaced")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure()
    made = {**made_by(), "torchvision": torchvision.__version__, "machine": platform.machine()}
    record = {"images_per_cpu_s": rows, "image": SIZE, "objects": OBJECTS, "made_by": made}
    chosen.out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    if chosen.readme is not None:
        before, _, rest = chosen.readme.read_text(encoding="utf-8").partition(BEGIN)
        after = rest.partition(END)[2]
        text = f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"
        chosen.readme.write_text(text, encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
