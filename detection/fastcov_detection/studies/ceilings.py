"""Structural ceilings: the most dimensions that a layer's output can have, whatever it learns."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from fastcov_detection.config import TrainConfig, load_config
from fastcov_detection.detector.build import build_model, load_widths


def layer_ceilings(run: Path) -> dict[str, int]:
    """Largest rank of the output of every convolution and linear layer of a run.

    A layer is linear, so its output has no more directions than it has outputs or inputs of a
    position (channels times kernel), and one more with a bias, which shifts every row alike.

    Args:
        run: Its folder; only its settings and widths are read.

    Returns:
        By the names under which the run was tracked; empty where the folder is no run.
    """
    if not (run / "config.json").exists():
        return {}
    config = load_config(TrainConfig, run / "config.json")
    with torch.device("meta"):
        widths = load_widths(run / "widths.json")
        classes = config.model.num_classes or 2
        model = build_model(replace(config.model, init="random"), widths, num_classes=classes)
    root = model if config.track == "model" else model.backbone
    return {
        name: min(len(module.weight), module.weight[0].numel() + (module.bias is not None))
        for name, module in root.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
