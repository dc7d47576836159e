"""A training run on disk: checkpoints that survive a kill, its result, and its detector."""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from fastcov_detection.config import (
    DATA_PLACES,
    TrainConfig,
    comparable_settings,
    read_saved,
    read_values,
    to_dict,
)
from fastcov_detection.detector.build import build_model, load_widths
from fastcov_detection.detector.weights import read_state
from fastcov_detection.distributed import barrier, rank
from fastcov_detection.errors import CheckpointError, ConfigError
from fastcov_detection.files import made_by, write_file, write_text

log = logging.getLogger("fastcov_detection")

BEST, LAST, RESULT = "best.pt", "model.pt", "run.json"
"""Weights of the best evaluation so far, weights of a run that has ended, and its result."""
NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
_FRESH = f"{NEWEST}.new"
_FORMAT = 2
_KEYS = ("step", "seed", "config", "widths", "model", "optimizer", "train_s", "cpu_s")
_START_OVER = (
    "choose another run folder, or start over with --restart (in Python, with resume=False)"
)
# Settings that may change in the middle of a run, and after its end.
_ALWAYS_FREE = {
    "config.device",
    "config.threads",
    "config.data.workers",
    "config.data.root",
    "config.eval_batch_size",
    "config.log_every",
    "config.checkpoint_every",
    "config.evaluate_every",
    "config.evaluate_epochs",
}
_PLACES = {f"config.{place}" for place in DATA_PLACES}
# Settings that may change while steps are left: they steer the steps to come.
_FREE_BEFORE_THE_END = {
    "config.lr",
    "config.lr_batch",
    "config.clip_norm",
    "config.warmup_steps",
    "config.schedule",
    "config.milestones",
    "config.final_lr",
}

Result = TypeVar("Result")


@dataclass(frozen=True)
class RunResult:
    """Result of a finished run; AP in 0-1."""

    ap: float
    ap50: float
    segm_ap: float | None
    train_s: float
    """Seconds of training steps, without evaluation, over all processes that the run took."""
    params: int
    backbone_params: int
    macs: int
    """Multiply-accumulates of a square image of the configured ``min_size``."""
    steps: int
    seed: int
    run_dir: str
    cpu_s: float | None = None
    """CPU seconds of the main process during the training steps, over all its threads. On one
    thread with a core to itself they equal ``train_s``."""
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
    """Detector of a run in eval(), configuration, and result if the run has ended.

    Args:
        run_dir: Folder of the run.
        best: Take the weights of the best evaluation instead of the last ones.

    Raises:
        ConfigError: If a file is missing or cannot be read.
        CheckpointError: If the run has neither weights nor a checkpoint.
    """
    folder = Path(run_dir)
    if not best and (folder / RESULT).exists() and not has_weights(folder):
        raise CheckpointError(
            f"{folder} holds the result of a run whose weights are not here; "
            f"delete {folder / RESULT} and run it again to have them"
        )
    config = read_saved(read_values(folder / "config.json"))
    model = build_model(replace(config.model, init="random"), load_widths(folder / "widths.json"))
    weights = folder / (BEST if best else LAST)
    saved = None if best or weights.exists() else load_checkpoint(folder)
    if weights.exists():
        model.load_state_dict(read_state(weights))
    elif saved is not None:
        model.load_state_dict(saved["model"])
    elif best:
        raise CheckpointError(
            f"{folder} has no {BEST}; set evaluate_epochs or evaluate_every to have the best "
            "weights kept while training runs"
        )
    else:
        raise CheckpointError(f"{folder} has neither {LAST} nor a checkpoint; train it first")
    return model.eval(), config, read_result(folder, RunResult)


def read_run_result(folder: Path) -> RunResult | None:
    """The result of a run, or None where it has not ended.

    Raises:
        ConfigError: If its run.json cannot be read.
    """
    return read_result(folder, RunResult)


def has_weights(run_dir: Path) -> bool:
    """True if the folder holds the weights of a finished run; a kept copy of results has none."""
    return (run_dir / LAST).exists()


def category_ids(run_dir: Path) -> list[int] | None:
    """Category ids of labels 1 to K; None for a run of an earlier version."""
    path = run_dir / "category_ids.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def read_result(folder: Path, kind: Callable[..., Result], name: str = RESULT) -> Result | None:
    """Result that a training left in its folder; None where the training has not ended.

    Raises:
        ConfigError: If the file cannot be read.
    """
    path = folder / name
    if not path.exists():
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))["result"]
        return kind(**{**values, "run_dir": str(folder)})
    except (ValueError, KeyError, TypeError) as error:
        raise ConfigError(
            f"{path} is not a run's result ({error}); delete it to finish the run again"
        ) from None


def write_result(
    folder: Path, result: Any, identity: Mapping[str, Any], name: str = RESULT
) -> None:
    """File of a result, a dataclass, with the run's identity and the versions that made it."""
    kept = {key: value for key, value in asdict(result).items() if key != "run_dir"}
    content = {**identity, "result": kept, "made_by": made_by()}
    write_text(folder / name, json.dumps(content, indent=2) + "\n")


def open_folder(
    folder: Path,
    identity: dict[str, Any],
    kind: Callable[..., Result],
    *,
    resume: bool,
    name: str = RESULT,
) -> Result | None:
    """Preparation of a run's folder; the result where the run has ended already.

    Args:
        folder: Folder of the run.
        identity: Seed, settings, widths and data of the run; gets ``changes`` where a run goes on
            with other settings.
        kind: Dataclass of the result.
        resume: False: remove the files of an earlier process.
        name: Name of the result's file.

    Raises:
        CheckpointError: If the folder holds another run, or a result that cannot go on.
    """
    if rank() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{_FRESH}.*.tmp"):  # left by a kill while writing
            path.unlink()
        if not resume:
            for file_name in (_FRESH, NEWEST, PREVIOUS, name, LAST, BEST):
                (folder / file_name).unlink(missing_ok=True)
            for folder_name in ("spectra", "tensorboard"):
                shutil.rmtree(folder / folder_name, ignore_errors=True)
    barrier()
    finished: Any = read_result(folder, kind, name)
    if finished is not None:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
        before = {key: content.get(key) for key in identity}
        check_same_run(before, identity, folder, reached=finished.steps, is_finished=True)
        if finished.steps >= identity["config"]["steps"]:
            return finished
    saved = load_checkpoint(folder)
    if saved is not None:
        _resume_from(saved, identity, folder)
    elif finished is not None:
        raise CheckpointError(
            f"{folder} has a result after {finished.steps} steps and no checkpoint to go on from; "
            "start over with --restart, or choose another folder"
        )
    return None


def save_checkpoint(run_dir: Path, content: Mapping[str, Any]) -> None:
    """File of a checkpoint; the one before it stays as a second chance.

    Args:
        run_dir: Folder of the run.
        content: Tensors, numbers, strings, and dicts and lists of them.

    Raises:
        OSError: If the disk is full; earlier checkpoints are as they were.
    """
    newest, fresh = run_dir / NEWEST, run_dir / _FRESH
    write_file(fresh, lambda file: torch.save({**content, "format": _FORMAT}, file))
    if newest.exists():
        newest.replace(run_dir / PREVIOUS)
    fresh.replace(newest)


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None where there is none at all.

    Raises:
        CheckpointError: If there are files but none of them can be read.
    """
    failures = []
    for path in (run_dir / _FRESH, run_dir / NEWEST, run_dir / PREVIOUS):
        if path.exists():
            try:
                content = _read(path)
            except CheckpointError as error:
                failures.append(str(error))
                continue
            for failure in failures:
                log.warning("%s; going on from %s, step %d", failure, path.name, content["step"])
            return content
    if failures:
        raise CheckpointError(
            "; ".join(failures) + "; delete the file to start this run from its beginning"
        )
    return None


def _read(path: Path) -> dict[str, Any]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        size = path.stat().st_size
        raise CheckpointError(f"cannot read {path} ({size} bytes, {reason})") from None
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise CheckpointError(f"{path} is not a checkpoint of this version")
    missing = [key for key in _KEYS if key not in content]
    if missing:
        raise CheckpointError(f"{path} lacks {missing[0]!r}")
    return content


def check_same_run(
    saved: Mapping[str, Any],
    wanted: Mapping[str, Any],
    run_dir: Path,
    *,
    reached: int = 0,
    is_finished: bool = False,
) -> dict[str, list[Any]]:
    """Comparison of a run in a folder with the one that is asked for.

    Device, speed and the place of the data may change in the middle of a run: of data, the content
    is compared. Rate, clipping and number of steps may change while steps are left.

    Args:
        saved: ``seed``, ``config``, ``widths`` and ``data`` of the run in the folder.
        wanted: The same entries of the run that is asked for.
        run_dir: Folder, named in the error.
        reached: Steps that the run in the folder has done.
        is_finished: True if this run has a result.

    Returns:
        Old and new value of each setting that changes from here on.

    Raises:
        CheckpointError: Naming the first setting that differs.
    """
    # A setting that the saved run does not know is younger than the run: it had its default.
    complete = to_dict(read_saved(saved["config"]))
    before = comparable_settings({**saved, "config": complete})
    now = comparable_settings(wanted)
    steps = now.get("config.steps", 0)
    may_end = reached < steps if is_finished else reached <= steps
    knows_data = bool(saved.get("data") and wanted.get("data"))
    changes = {}
    for key in sorted(before.keys() | now.keys()):
        old, new = before.get(key), now.get(key)
        if old == new or key in _ALWAYS_FREE or (knows_data and key in _PLACES):
            continue
        is_before_end = reached < steps and key in _FREE_BEFORE_THE_END
        if may_end if key == "config.steps" else is_before_end:
            changes[key.removeprefix("config.")] = [old, new]
            continue
        if key.startswith("data.") and saved.get("data") is None:
            continue  # runs of earlier versions did not record their data
        if key.startswith("data."):
            half, what = key.removeprefix("data.").split("_")
            difference = f"on other data: the {what} of {half} have changed since"
        elif key == "config.steps":
            difference = f"that has done {reached} steps, more than the {new} asked for"
        else:
            difference = f"with {key} = {old!r}, now it is {new!r}"
        raise CheckpointError(f"{run_dir} holds a run {difference}; {_START_OVER}")
    return changes


def _resume_from(saved: dict[str, Any], identity: dict[str, Any], run_dir: Path) -> None:
    """Comparison of a checkpoint with the run asked for; settings that change are noted."""
    step = int(saved["step"])
    known = {key: saved.get(key) for key in identity}
    changes = check_same_run(known, identity, run_dir, reached=step)
    earlier = saved.get("changes") or []
    if changes:
        listed = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())
        text = "%s goes on from step %d with %s; the rate follows the schedule of these settings"
        log.warning(text, run_dir, step, listed)
        earlier = [*earlier, {"step": step, **changes}]
    if earlier:
        identity["changes"] = earlier
