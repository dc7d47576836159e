from __future__ import annotations

import json
import os
import signal
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from fastcov_detection.config import DataConfig
from fastcov_detection.data.augment import training_transform
from fastcov_detection.data.dataset import (
    AugmentedView,
    BatchPlan,
    CocoDataset,
    load_data,
    mix_seed,
    with_short_errors,
)
from fastcov_detection.errors import DataError

BOX = {"id": 1, "image_id": 1, "category_id": 1, "bbox": [4, 6, 8, 10], "area": 80, "iscrowd": 0}
CocoFolder = Callable[..., Path]


@pytest.mark.parametrize(
    "layout",
    [
        ("{split}2017", "annotations/instances_{split}2017.json"),
        ("{split}", "annotations/instances_{split}.json"),
        ("images/{split}2017", "annotations/instances_{split}2017.json"),
        ("images/{split}", "annotations/instances_{split}.json"),
        ("{split}", "{split}/_annotations.coco.json"),
        ("{split}", "annotations/{split}.json"),
        ("{split}2014", "annotations/instances_{split}2014.json"),
        ("{split}/images", "{split}/annotations/instances_default.json"),
        ("{split}/images/default", "{split}/annotations/instances_default.json"),
        ("{split}/images", "{split}/result.json"),
        ("{split}/data", "{split}/labels.json"),
    ],
)
def test_documented_layouts_are_found(coco_folder: CocoFolder, layout: tuple[str, str]) -> None:
    root = coco_folder([BOX], layout=layout)
    data = load_data(DataConfig(name=str(root)))
    assert data.class_names == ("one", "five")
    assert len(data.train) == len(data.val) == 2
    image, target = data.train[0]
    assert image.dtype == torch.uint8
    assert image.shape == (3, 24, 32)
    assert target["boxes"].tolist() == [[4, 6, 12, 16]]
    assert type(target["boxes"]) is torch.Tensor


def test_explicit_paths_override_the_layout(coco_folder: CocoFolder) -> None:
    root = coco_folder([BOX], layout=("pictures_{split}", "{split}.json"))
    with pytest.raises(DataError, match="no train split"):
        load_data(DataConfig(name=str(root)))
    config = DataConfig(
        name="other",
        train_images=str(root / "pictures_train"),
        train_annotations=str(root / "train.json"),
        val_images=str(root / "pictures_val"),
        val_annotations=str(root / "val.json"),
    )
    assert len(load_data(config).val) == 2


def test_mini_is_built_on_first_use(tiny_root: Path, tmp_path: Path) -> None:
    recipe = json.loads((tiny_root / "mini.json").read_text())
    assert recipe["train"] == 12
    config = DataConfig(root=str(tmp_path / "new"))
    config = replace(config, mini=replace(config.mini, train=2, val=1))
    assert len(load_data(config, with_masks=True, progress=False).train) == 2


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent is missing; give mini or a folder"):
        load_data(DataConfig(name=str(tmp_path / "absent")))
    (tmp_path / "a.json").write_text(
        '{"images": [{"id": 1, "file_name": "a", "width": 1, "height": 1}],'
        ' "annotations": [], "categories": [{"id": 1}]}'
    )
    with pytest.raises(DataError, match=r"image folder .*absent is missing"):
        CocoDataset(tmp_path / "absent", tmp_path / "a.json")


def test_missing_images_are_found_before_training(coco_folder: CocoFolder) -> None:
    root = coco_folder([BOX])
    (root / "train2017" / "2.png").unlink()
    with pytest.raises(DataError, match=r"image 2 \(2\.png\) is not in .*train2017, .*1\.png"):
        load_data(DataConfig(name=str(root)))


@pytest.mark.parametrize("workers", [0, 1])
def test_an_image_that_goes_bad_after_the_check_is_one_line(
    coco_folder: CocoFolder, workers: int
) -> None:
    root = coco_folder([BOX])
    dataset = load_data(DataConfig(name=str(root)), progress=False).train
    (root / "train2017" / "1.png").write_bytes(b"not an image")
    with pytest.raises(DataError, match=r"^image .*train2017/1\.png cannot be read \(") as raised:
        list(with_short_errors(DataLoader(dataset, num_workers=workers, collate_fn=list)))
    assert len(str(raised.value).splitlines()) == 1


class _Killed(torch.utils.data.Dataset[int]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        os.kill(os.getpid(), signal.SIGKILL)
        return index


def test_a_killed_worker_is_one_line() -> None:
    with pytest.raises(DataError, match=r"^DataLoader worker .*set data\.workers lower$"):
        list(with_short_errors(DataLoader(_Killed(), num_workers=1)))


def test_grey_images_become_rgb(coco_folder: CocoFolder) -> None:
    root = coco_folder([BOX])
    Image.fromarray(np.full((24, 32), 51, dtype=np.uint8)).save(root / "train2017" / "1.png")
    image, _ = load_data(DataConfig(name=str(root))).train[0]
    assert torch.equal(image, torch.full((3, 24, 32), 51, dtype=torch.uint8))


def test_masks_are_asked_for_and_missing(coco_folder: CocoFolder) -> None:
    with pytest.raises(DataError, match=r"has 1 objects and no segmentation.*use a fasterrcnn"):
        load_data(DataConfig(name=str(coco_folder([BOX]))), with_masks=True)


def test_a_missing_mask_is_asked_for(coco_folder: CocoFolder) -> None:
    polygon = [[4, 6, 12, 6, 12, 16, 4, 16]]
    root = coco_folder([{**BOX, "segmentation": polygon}, {**BOX, "id": 2}])
    with pytest.raises(DataError, match=r"annotation 2 has no segmentation.*use a fasterrcnn"):
        load_data(DataConfig(name=str(root)), with_masks=True)


def test_splits_of_different_categories_are_refused(coco_folder: CocoFolder) -> None:
    root = coco_folder([BOX])
    path = root / "annotations" / "instances_val2017.json"
    content = json.loads(path.read_text())
    content["categories"][1]["name"] = "six"
    path.write_text(json.dumps(content))
    with pytest.raises(DataError, match="id 5 is 'five' and 'six'"):
        load_data(DataConfig(name=str(root)))


def test_empty_images_are_left_out_on_demand(coco_folder: CocoFolder) -> None:
    root = coco_folder([BOX])
    assert len(load_data(DataConfig(name=str(root))).train) == 2
    data = load_data(DataConfig(name=str(root), keep_empty=False))
    assert len(data.train) == 1
    assert len(data.val) == 2


def test_a_data_set_without_objects_is_refused(coco_folder: CocoFolder) -> None:
    with pytest.raises(DataError, match="nothing to learn"):
        load_data(DataConfig(name=str(coco_folder([])), keep_empty=False))


def _views(root: Path, **augmentation: Any) -> AugmentedView:
    config = DataConfig(name=str(root), **augmentation)
    return AugmentedView(load_data(config).train, training_transform(config))


def test_a_mirrored_image_has_mirrored_boxes(coco_folder: CocoFolder) -> None:
    root = coco_folder([BOX])
    plan = BatchPlan([1.0, 1.0], 1, seed=0, steps=2)
    draw = next(d for batch in plan for d in batch if d.image == 0)
    _, target = _views(root, hflip=1.0)[draw]
    assert target["boxes"].tolist() == [[20, 6, 28, 16]]


def test_jittered_boxes_frame_their_object(coco_folder: CocoFolder) -> None:
    root = coco_folder([BOX])
    pixels = np.zeros((24, 32, 3), dtype=np.uint8)
    pixels[6:16, 4:12] = 255
    Image.fromarray(pixels).save(root / "train2017" / "1.png")
    view = _views(root, hflip=0.5, scale_jitter=(0.6, 1.4))
    sizes = set()
    for draw in (d for batch in BatchPlan([1.0] * 2, 1, seed=0, steps=40) for d in batch):
        image, target = view[draw]
        if draw.image == 1 or not len(target["boxes"]):
            continue
        assert image.shape[1] / image.shape[2] == pytest.approx(24 / 32, abs=0.05)
        left, top, right, bottom = target["boxes"][0].tolist()
        inside = image[0, int(top + 1) : int(bottom - 1), int(left + 1) : int(right - 1)]
        # Bilinear edges are grey; what lies a pixel inside of the box is the object.
        assert inside.numel() == 0 or inside.float().mean() > 0.85 * 255
        sizes.add(round(right - left, 3))
    assert len(sizes) > 5


@pytest.mark.parametrize("workers", [0, 2])
def test_random_changes_depend_on_the_draw_alone(coco_folder: CocoFolder, workers: int) -> None:
    view = _views(coco_folder([BOX], images=6), hflip=0.5, photometric=1.0)
    plan = BatchPlan([1.0] * 6, 2, seed=3, steps=6)
    torch.manual_seed(workers)
    loaded = list(DataLoader(view, batch_sampler=plan, num_workers=workers, collate_fn=list))
    for batch, draws in zip(loaded, plan, strict=True):
        for (image, _), draw in zip(batch, draws, strict=True):
            torch.testing.assert_close(image, view[draw][0], rtol=0, atol=0)


def test_a_plan_uses_every_image_once_an_epoch() -> None:
    plan = BatchPlan([1.0] * 10, 5, seed=1, steps=6)
    seen = Counter(draw.image for batch in plan for draw in batch)
    assert seen == Counter(dict.fromkeys(range(10), 3))
    assert len({draw.seed for batch in plan for draw in batch}) == 30


def test_a_plan_can_start_anywhere() -> None:
    ratios = [0.5, 0.5, 2.0, 2.0, 2.0, 1.0, 1.0]
    whole = list(BatchPlan(ratios, 3, seed=5, steps=20))
    assert len(whole) == 20
    for first in (0, 1, 7, 19, 20):
        assert list(BatchPlan(ratios, 3, seed=5, steps=20, first_step=first)) == whole[first:]
    assert list(BatchPlan(ratios, 3, seed=6, steps=20)) != whole


def test_batches_hold_similar_shapes() -> None:
    ratios = [0.5] * 7 + [1.5] * 9 + [2.1] * 5
    for batch in BatchPlan(ratios, 4, seed=0, steps=30):
        shapes = [ratios[draw.image] for draw in batch]
        assert max(shapes) / min(shapes) < 1.26


def test_ranks_share_a_batch() -> None:
    whole = list(BatchPlan([1.0] * 9, 4, seed=2, steps=5))
    parts = [list(BatchPlan([1.0] * 9, 4, seed=2, steps=5, rank=r, world_size=2)) for r in range(2)]
    for batch, first, second in zip(whole, *parts, strict=True):
        assert sorted(first + second) == sorted(batch)
    with pytest.raises(ValueError, match="batch_size is 5"):
        BatchPlan([1.0], 5, seed=0, steps=1, world_size=2)


def test_seeds_do_not_collide() -> None:
    seeds = {mix_seed(a, b, c) for a in range(20) for b in range(20) for c in range(20)}
    assert len(seeds) == 8000
    assert all(0 <= seed < 2**63 for seed in seeds)
