"""A data set and a detector small enough to train in a second."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from fastcov_detection.config import DataConfig, MiniConfig, ModelConfig, TrainConfig
from fastcov_detection.data.mini import make_mini

TINY_MINI = MiniConfig(train=12, val=6, canvas=64, digits=(1, 3), sizes=(14, 36))


@pytest.fixture(scope="session")
def tiny_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The mini data set, with 12 and 6 images of 64 pixels."""
    return make_mini(tmp_path_factory.mktemp("mini") / "tiny", TINY_MINI, progress=False)


@pytest.fixture
def tiny_model() -> ModelConfig:
    """A ResNet-18 detector of few channels and few regions."""
    return ModelConfig(
        name="fasterrcnn_resnet18_fpn",
        width_multiplier=0.125,
        fpn_channels=16,
        box_head_width=16,
        mask_head_width=8,
        min_size=64,
        max_size=64,
        anchor_sizes=(12, 20, 32, 48, 64),
        anchor_ratios=(1.0,),
        rpn_batch=16,
        rpn_pre_nms_train=20,
        rpn_pre_nms_test=20,
        rpn_post_nms_train=10,
        rpn_post_nms_test=10,
        roi_batch=8,
        roi_sampling_ratio=1,
        roi_canonical_scale=64,
        detections_per_image=5,
    )


@pytest.fixture
def tiny_run(tiny_root: Path, tiny_model: ModelConfig) -> TrainConfig:
    """Six steps of four images."""
    return TrainConfig(
        model=tiny_model,
        data=DataConfig(root=str(tiny_root), mini=TINY_MINI, hflip=0.0),
        steps=6,
        batch_size=4,
        eval_batch_size=3,
        lr=0.01,
        warmup_steps=2,
        schedule="cosine",
        clip_norm=10.0,
        device="cpu",
        threads=1,
        snapshot_every=2,
        log_every=1,
        checkpoint_every=3,
    )


@pytest.fixture
def tiny_mask_run(tiny_run: TrainConfig) -> TrainConfig:
    """The same for a Mask R-CNN."""
    return replace(tiny_run, model=replace(tiny_run.model, name="maskrcnn_resnet18_fpn"))


CocoFolder = Callable[..., Path]


@pytest.fixture
def coco_folder(tmp_path: Path) -> CocoFolder:
    """Writes a data set by hand: images of 32x24 pixels, and whatever annotations a test needs."""

    def write(
        annotations: list[dict[str, Any]],
        images: int = 2,
        categories: list[dict[str, Any]] | None = None,
        layout: tuple[str, str] = ("{split}2017", "annotations/instances_{split}2017.json"),
    ) -> Path:
        root = tmp_path / "coco"
        content = {
            "images": [
                {"id": i + 1, "file_name": f"{i + 1}.png", "width": 32, "height": 24}
                for i in range(images)
            ],
            "annotations": annotations,
            "categories": categories or [{"id": 1, "name": "one"}, {"id": 5, "name": "five"}],
        }
        for split in ("train", "val"):
            folder = root / layout[0].format(split=split)
            folder.mkdir(parents=True)
            for i in range(images):
                pixels = np.full((24, 32, 3), 40 * i, dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{i + 1}.png")
            path = root / layout[1].format(split=split)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content))
        return root

    return write


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Findings of data sets are kept in a folder of the test run, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield
