"""Width search on COCO, from folder to exported detector: ``python coco_search.py FOLDER``.

Without a folder a tiny one in COCO's layout is made, and a tiny detector is searched on it: that
shows that every command works, not what a search finds.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from fastcov_detection.cli import main

# A detector small enough for seconds; with COCO itself none of these is given.
TINY = {
    "batch_size": "4",
    "checkpoint_every": "2",
    "data.scale_jitter": "null",
    "data.workers": "0",
    "eval_batch_size": "4",
    "evaluate_epochs": "0",
    "log_every": "1",
    "model.box_head": "2fc",
    "model.box_head_width": "16",
    "model.fpn_channels": "16",
    "model.fpn_norm": "false",
    "model.head_norm": "false",
    "model.max_size": "64",
    "model.min_size": "64",
    "model.name": "fasterrcnn_resnet18_fpn",
    "model.norm": "batch",
    "model.roi_batch": "8",
    "model.rpn_post_nms_test": "10",
    "model.rpn_post_nms_train": "10",
    "model.rpn_pre_nms_test": "20",
    "model.rpn_pre_nms_train": "20",
    "model.train_sizes": "[]",
    "model.width_multiplier": "0.125",
    "precision": "float32",
    "snapshot_every": "2",
    "steps": "4",
    "warmup_steps": "2",
}


def make_tiny(folder: Path) -> Path:
    """Data set in COCO's layout: bright rectangles of two classes, 12 and 6 images of 64 pixels."""
    generator = np.random.default_rng(0)
    (folder / "annotations").mkdir(parents=True)
    for split, count in (("train", 12), ("val", 6)):
        images, annotations = [], []
        (folder / f"{split}2017").mkdir()
        for number in range(1, count + 1):
            name = f"{number:012}.jpg"
            pixels = generator.integers(0, 60, (64, 64, 3), dtype=np.uint8)
            for kind in (1, 3):  # COCO's category ids have gaps
                left, top = generator.integers(0, 40, 2).tolist()
                width, height = generator.integers(12, 24, 2).tolist()
                pixels[top : top + height, left : left + width, kind // 2] = 220
                annotations.append({
                    "id": len(annotations) + 1, "image_id": number, "category_id": kind,
                    "bbox": [left, top, width, height], "area": width * height, "iscrowd": 0,
                })  # fmt: skip
            Image.fromarray(pixels).save(folder / f"{split}2017" / name)
            images.append({"id": number, "file_name": name, "width": 64, "height": 64})
        content = {
            "images": images,
            "annotations": annotations,
            "categories": [{"id": 1, "name": "red"}, {"id": 3, "name": "green"}],
        }
        (folder / "annotations" / f"instances_{split}2017.json").write_text(json.dumps(content))
    return folder


def command(*words: str) -> None:
    """A command of fastcov-detection, printed as one would type it."""
    print("$ fastcov-detection", *words, flush=True)
    further = (
        [word for name, value in TINY.items() for word in ("--set", f"{name}={value}")]
        if is_tiny
        else []
    )
    code = main([*words, "--quiet", "true", *further] if words[0] == "search" else [*words])
    assert code == 0, f"fastcov-detection {words[0]} ended with {code}"


is_tiny = len(sys.argv) == 1
data = str(make_tiny(Path("coco")) if is_tiny else sys.argv[1])

command("check", "--data", data)
command(
    "search", "--data", data, "--preset", "coco-scratch", "--rules", "gradient",
    "--arms", "baseline,searched,uniform", "--out", "runs/search",
)  # fmt: skip
command("report", "runs/search")
command("export", "runs/search", "exported", "--arm", "searched")
command("evaluate", "exported", "--data", data, "--out", "runs/evaluate")

# Whoever gets the folder needs torch and torchvision alone.
subprocess.run([sys.executable, "exported/rebuild.py"], check=True)
widths = json.loads(Path("exported/widths.json").read_text())
state = torch.load("exported/model.pt", weights_only=True)
assert len(state["backbone.body.layer4.0.conv1.weight"]) == widths["layer4.0.inner1"]
