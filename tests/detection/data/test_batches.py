"""Images kept in memory."""

from __future__ import annotations

from typing import Any

import torch

from fastcov_detection.config import DataConfig, TrainConfig
from fastcov_detection.data.augment import training_transform
from fastcov_detection.data.dataset import AugmentedView, BatchPlan, load_data


def test_kept_images_are_those_of_the_files_and_are_read_once(tiny_run: TrainConfig) -> None:
    config = DataConfig(hflip=0.5, scale_jitter=(0.8, 1.2), photometric=0.5)
    transform = training_transform(config)
    plan = [draw for batch in BatchPlan([1.0] * 12, 4, seed=0, steps=9) for draw in batch]
    dataset = load_data(tiny_run.data, progress=False).train
    expected = [AugmentedView(dataset, transform)[draw] for draw in plan]
    reads: list[int] = []
    decode = dataset.decode

    def counted(index: int) -> Any:
        reads.append(index)
        return decode(index)

    dataset.decode = counted
    view = AugmentedView(dataset, transform, cache=True)
    for draw, (image, target) in zip(plan, expected, strict=True):
        found_image, found_target = view[draw]
        assert torch.equal(found_image, image)
        assert torch.equal(found_target["boxes"], target["boxes"])
        assert torch.equal(found_target["labels"], target["labels"])
    assert sorted(reads) == list(range(12))
