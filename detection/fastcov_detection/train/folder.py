"""A training run on disk: its result, and the detector that it left."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field, replace
from pathlib import Path

from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from fastcov_detection.config import ConfigError, TrainConfig, load_config, read_saved
from fastcov_detection.detector.build import build_model, load_widths
from fastcov_detection.detector.weights import read_state
from fastcov_detection.errors import CheckpointError
from fastcov_detection.train import checkpoint as checkpoints

BEST = "best.pt"
"""Weights of the best evaluation so far."""


@dataclass(frozen=True)
class RunResult:
    """What a finished run came to; AP in 0-1."""

    ap: float
    ap50: float
    segm_ap: float | None
    train_s: float
    """Seconds of training steps, without evaluation, over all processes that the run took."""
    params: int
    backbone_params: int
    macs: int
    """On a square image of the configured ``min_size``."""
    steps: int
    seed: int
    run_dir: str
    cpu_s: float | None = None
    """CPU seconds of the main process during the training steps, over all its threads: what
    ``train_s`` would be on a thread that has a core to itself."""
    numbers: dict[str, float | None] = field(default_factory=dict)
    """COCO's twelve numbers of boxes, and of masks after ``segm_``; empty in older runs."""
    classes: dict[str, dict[str, float | None]] = field(default_factory=dict)
    """AP of every class by name, under ``ap`` and ``segm_ap``; empty in older runs."""
    best: dict[str, float] | None = None
    """Step and AP of the best evaluation, whose weights ``best.pt`` holds; None where the run was
    evaluated at its end alone."""


def load_run(
    run_dir: str | os.PathLike[str], *, best: bool = False
) -> tuple[GeneralizedRCNN, TrainConfig, RunResult | None]:
    """A run's detector with its weights, in eval(), its configuration, and its result if it has
    ended.

    Args:
        run_dir: Folder of the run.
        best: Take the weights of the best evaluation instead of the last ones.

    Raises:
        ConfigError: If a file is missing or cannot be read.
        CheckpointError: If the run has neither weights nor a checkpoint.
    """
    folder = Path(run_dir)
    if not best and (folder / "run.json").exists() and not has_weights(folder):
        raise CheckpointError(
            f"{folder} holds the result of a run whose weights are not here; "
            f"delete {folder / 'run.json'} and run it again to have them"
        )
    load_config(TrainConfig, folder / "config.json")
    config = read_saved(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    model = build_model(replace(config.model, init="random"), load_widths(folder / "widths.json"))
    if best:
        if not (folder / BEST).exists():
            raise CheckpointError(
                f"{folder} has no {BEST}; set evaluate_epochs or evaluate_every to have the best "
                "weights kept while training runs"
            )
        state = read_state(folder / BEST)
    elif (folder / "model.pt").exists():
        state = read_state(folder / "model.pt")
    else:
        saved = checkpoints.load_checkpoint(folder)
        if saved is None:
            raise CheckpointError(f"{folder} has neither model.pt nor a checkpoint; train it first")
        state = saved["model"]
    model.load_state_dict(state)
    return model.eval(), config, read_run_result(folder)


def category_ids(run_dir: Path) -> list[int] | None:
    """Category ids of labels 1 to K; None for a run of an earlier version."""
    path = run_dir / "category_ids.json"
    if not path.exists():
        return None
    ids: list[int] = json.loads(path.read_text(encoding="utf-8"))
    return ids


def has_weights(run_dir: Path) -> bool:
    """Whether the folder holds the weights of a finished run, which a copy of its result lacks."""
    return (run_dir / "model.pt").exists()


def read_run_result(folder: Path) -> RunResult | None:
    """The result of a run, or None where it has not ended.

    Raises:
        ConfigError: If its run.json cannot be read.
    """
    path = folder / "run.json"
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["result"]
        return RunResult(**{**values, "run_dir": str(folder)})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a run's result ({error}); delete it to finish the run again"
        ) from None
