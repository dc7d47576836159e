"""A trained detector for others: a plain state_dict, its widths, and a script that rebuilds it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from fastcov_detection.config import ConfigError, ModelConfig
from fastcov_detection.detector.backbone import unusual_groups
from fastcov_detection.detector.build import PYRAMID_LEVELS, parse_name, save_widths
from fastcov_detection.files import write_file, write_text
from fastcov_detection.search.results import finished_runs, read_result
from fastcov_detection.studies import rebuild
from fastcov_detection.train.folder import category_ids, load_run


def export_run(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, arm: str = "searched"
) -> Path:
    """Writes a detector so that it can be used without this package.

    Args:
        source: Folder of a training run, or of a search.
        out: Folder that gets ``model.pt`` (tensors by torchvision's names), ``widths.json``,
            ``model.json`` (what else must be known to build it, class names and category ids
            included) and ``rebuild.py``.
        arm: Of a search: whose first seed is exported.

    Returns:
        The folder.

    Raises:
        ConfigError: If there is no finished run.
    """
    run = _find_run(Path(source), arm)
    model, _, _ = load_run(run)
    folder = Path(out)
    state = {name: tensor.cpu().contiguous() for name, tensor in model.state_dict().items()}
    classes = json.loads((run / "classes.json").read_text(encoding="utf-8"))
    ids = category_ids(run)
    write_file(folder / "model.pt", lambda file: torch.save(state, file))
    save_widths(model.widths, folder / "widths.json")
    described = describe(model.config, classes, ids) | {"groups": unusual_groups(model)}
    write_text(folder / "model.json", json.dumps(described, indent=2) + "\n")
    write_text(folder / "rebuild.py", Path(rebuild.__file__).read_text(encoding="utf-8"))
    return folder


def describe(
    config: ModelConfig, classes: list[str], category_ids: list[int] | None = None
) -> dict[str, Any]:
    """Arguments of torchvision's constructors for this detector, as JSON.

    Args:
        config: Of the detector.
        classes: Names of labels 1 to K.
        category_ids: Ids of the same classes in the annotation files; None where a run of an
            earlier version did not keep them.
    """
    predicts_masks, depth = parse_name(config.name)
    norm = "batch" if config.norm == "sync" else config.norm
    return {
        "classes": ["background", *classes],
        "category_ids": None if category_ids is None else [None, *category_ids],
        "masks": predicts_masks,
        "resnet": f"resnet{depth}",
        "norm": norm,
        "fpn_norm": config.fpn_norm,
        "head_norm": config.head_norm,
        "box_head": config.box_head,
        "options": {
            "num_classes": len(classes) + 1,
            "min_size": config.min_size,
            "max_size": config.max_size,
            "rpn_pre_nms_top_n_train": config.rpn_pre_nms_train,
            "rpn_pre_nms_top_n_test": config.rpn_pre_nms_test,
            "rpn_post_nms_top_n_train": config.rpn_post_nms_train,
            "rpn_post_nms_top_n_test": config.rpn_post_nms_test,
            "rpn_batch_size_per_image": config.rpn_batch,
            "box_score_thresh": config.score_threshold,
            "box_detections_per_img": config.detections_per_image,
            "box_batch_size_per_image": config.roi_batch,
        },
        "anchors": {
            "sizes": [[size] for size in config.anchor_sizes],
            "aspect_ratios": [list(config.anchor_ratios)] * len(config.anchor_sizes),
        },
        "roi_align": {
            "featmap_names": list(PYRAMID_LEVELS),
            "sampling_ratio": config.roi_sampling_ratio,
            "canonical_scale": config.roi_canonical_scale,
            "canonical_level": config.roi_canonical_level,
        },
        "pools": {"box_roi_pool": 7} | ({"mask_roi_pool": 14} if predicts_masks else {}),
    }


def _find_run(source: Path, arm: str) -> Path:
    if (source / "result.json").exists():
        runs = finished_runs(source, read_result(source), arm)
        if not runs:
            raise ConfigError(f"no run of arm {arm!r} in {source} is finished; search again first")
        return runs[0]
    if not (source / "run.json").exists():
        raise ConfigError(
            f"{source} is neither a finished run (run.json) nor a search (result.json); "
            "give the folder that was --out"
        )
    return source
