"""A trained detector for others: a plain state_dict, its widths, and a script that rebuilds it."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from fastcov_detection.config import ConfigError, ModelConfig
from fastcov_detection.detector.build import PYRAMID_LEVELS, parse_name, save_widths
from fastcov_detection.files import write_file, write_text
from fastcov_detection.search.results import finished_runs, read_result
from fastcov_detection.train.folder import load_run

_REBUILD = '''"""Rebuilds the detector beside this file with torch and torchvision alone."""

import json
import math
from pathlib import Path

import torch
from torch import nn
from torchvision.models.detection import FasterRCNN, MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import resnet_fpn_backbone
from torchvision.ops import FrozenBatchNorm2d, MultiScaleRoIAlign


def group_norm(width):
    return nn.GroupNorm(math.gcd(32, width), width)


NORMS = {"batch": nn.BatchNorm2d, "frozen": FrozenBatchNorm2d, "group": group_norm}


def rebuild(folder=Path(__file__).parent):
    spec = json.loads((folder / "model.json").read_text())
    state = torch.load(folder / "model.pt", map_location="cpu", weights_only=True)
    norm = NORMS[spec["norm"]]
    trunk = resnet_fpn_backbone(backbone_name=spec["resnet"], weights=None, norm_layer=norm)
    options = {**spec["options"], "rpn_anchor_generator": AnchorGenerator(**spec["anchors"])}
    for name, size in spec["pools"].items():
        options[name] = MultiScaleRoIAlign(output_size=size, **spec["roi_align"])
    model = (MaskRCNN if spec["masks"] else FasterRCNN)(trunk, **options)
    for name, layer in list(model.named_modules()):  # every layer gets the width of its weights
        weight = state.get(name + ".weight")
        if weight is None or weight.shape == layer.weight.shape:
            continue
        if isinstance(layer, nn.Linear):
            new = nn.Linear(weight.shape[1], weight.shape[0])
        elif isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            ins, outs = weight.shape[:2] if layer.transposed else weight.shape[1::-1]
            size = layer.kernel_size, layer.stride, layer.padding
            new = type(layer)(ins, outs, *size, bias=layer.bias is not None)
        else:
            new = norm(len(weight))
        model.set_submodule(name, new)
    model.load_state_dict(state)
    return model.eval()


if __name__ == "__main__":
    detector = rebuild()
    print(sum(p.numel() for p in detector.parameters()), "parameters")
    print({name: tensor.shape for name, tensor in detector([torch.rand(3, 96, 96)])[0].items()})
'''


def export_run(
    source: str | os.PathLike[str], out: str | os.PathLike[str], *, arm: str = "searched"
) -> Path:
    """Writes a detector so that it can be used without this package.

    Args:
        source: Folder of a training run, or of a search.
        out: Folder that gets ``model.pt`` (tensors by torchvision's names), ``widths.json``,
            ``model.json`` (what else must be known to build it, class names included) and
            ``rebuild.py``.
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
    write_file(folder / "model.pt", lambda file: torch.save(state, file))
    save_widths(model.widths, folder / "widths.json")
    described = describe(model.config, classes)
    write_text(folder / "model.json", json.dumps(described, indent=2) + "\n")
    write_text(folder / "rebuild.py", _REBUILD)
    return folder


def describe(config: ModelConfig, classes: list[str]) -> dict[str, Any]:
    """Arguments of torchvision's constructors for this detector, as JSON."""
    predicts_masks, depth = parse_name(config.name)
    norm = "batch" if config.norm == "sync" else config.norm
    return {
        "classes": ["background", *classes],
        "masks": predicts_masks,
        "resnet": f"resnet{depth}",
        "norm": norm,
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
