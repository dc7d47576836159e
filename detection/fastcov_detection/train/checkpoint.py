"""Checkpoints that survive a kill at any moment: written whole, the one before it kept."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fastcov_detection.config import read_saved, to_dict
from fastcov_detection.errors import CheckpointError
from fastcov_detection.files import write_file

log = logging.getLogger("fastcov_detection")

NEWEST, PREVIOUS = "checkpoint.pt", "checkpoint.previous.pt"
_FORMAT = 2
_KEYS = ("step", "seed", "config", "widths", "model", "optimizer", "train_s", "cpu_s")


def save_checkpoint(run_dir: Path, content: Mapping[str, Any]) -> None:
    """Writes a checkpoint; the one before it stays as a second chance.

    Args:
        run_dir: Folder of the run.
        content: Tensors, numbers, strings, and dicts and lists of them.

    Raises:
        OSError: If the disk is full; earlier checkpoints are as they were.
    """
    newest, previous = run_dir / NEWEST, run_dir / PREVIOUS
    fresh = run_dir / f"{NEWEST}.new"
    write_file(fresh, lambda file: torch.save({**content, "format": _FORMAT}, file))
    if newest.exists():
        newest.replace(previous)
    fresh.replace(newest)


def load_checkpoint(run_dir: Path) -> dict[str, Any] | None:
    """The newest checkpoint that can be read, or None where there is none at all.

    Raises:
        CheckpointError: If there are files but none of them can be read.
    """
    failures = []
    for name in (f"{NEWEST}.new", NEWEST, PREVIOUS):
        path = run_dir / name
        if not path.exists():
            continue
        try:
            content = _read(path)
        except CheckpointError as error:
            failures.append(str(error))
            continue
        for failure in failures:
            log.warning("%s; going on from %s, step %d", failure, name, content["step"])
        return content
    if failures:
        raise CheckpointError(
            "; ".join(failures) + "; delete the file to start this run from its beginning"
        )
    return None


def remove_leftovers(run_dir: Path) -> None:
    """Removes what a kill in the middle of writing left."""
    for path in run_dir.glob(f".{NEWEST}.new.*"):
        path.unlink()


def remove_checkpoints(run_dir: Path) -> None:
    """Forgets everything that a run could be resumed from."""
    for name in (f"{NEWEST}.new", NEWEST, PREVIOUS):
        (run_dir / name).unlink(missing_ok=True)


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

    Where and how fast a run computes may change in its middle, and so may the place of its data:
    the content is compared. What the rest of a run follows, its rate, clipping and number of steps,
    may change as long as there is a rest.

    Args:
        saved: ``seed``, ``config``, ``widths`` and ``data`` of what is in the folder.
        wanted: The same of what is asked for.
        run_dir: Named in the error.
        reached: Steps that the run has done.
        is_finished: The run has come to its result.

    Returns:
        Settings that change from here on: what they were and what they are.

    Raises:
        CheckpointError: Naming the first setting that differs.
    """
    # A setting that came later had its default then.
    complete = to_dict(read_saved(saved["config"]))
    before, now = _flatten({**saved, "config": complete}), _flatten(wanted)
    steps = now.get("config.steps", 0)
    may_end = reached < steps if is_finished else reached <= steps
    knows_data = bool(saved.get("data") and wanted.get("data"))
    changes = {}
    for key in sorted(before.keys() | now.keys()):
        name = key.removeprefix("config.")
        old, new = before.get(key), now.get(key)
        if old == new or key in _FREE or (knows_data and key in _PLACES):
            continue
        if may_end if key == "config.steps" else (reached < steps and key in _OF_THE_REST):
            changes[name] = [old, new]
            continue
        if key.startswith("data."):
            # Runs of earlier versions did not record their data.
            if saved.get("data") is None:
                continue
            half, what = key.removeprefix("data.").split("_")
            raise CheckpointError(
                f"{run_dir} holds a run on other data: the {what} of {half} have changed since; "
                f"{_START_OVER}"
            )
        if key == "config.steps":
            raise CheckpointError(
                f"{run_dir} holds a run that has done {reached} steps, more than the {new} asked "
                f"for; {_START_OVER}"
            )
        raise CheckpointError(
            f"{run_dir} holds a run with {key} = {old!r}, now it is {new!r}; {_START_OVER}"
        )
    return changes


_START_OVER = (
    "choose another run folder, or start over with --restart (in Python, with resume=False)"
)
_FREE = {
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
_PLACES = {
    "config.data.name",
    "config.data.train_images",
    "config.data.train_annotations",
    "config.data.val_images",
    "config.data.val_annotations",
}
_OF_THE_REST = {
    "config.lr",
    "config.lr_batch",
    "config.clip_norm",
    "config.warmup_steps",
    "config.schedule",
    "config.milestones",
    "config.final_lr",
}


def resume_from(saved: dict[str, Any], identity: dict[str, Any], run_dir: Path) -> None:
    """Comparison of a checkpoint with what is asked for, with a note of what changes on the way.

    Args:
        saved: Its checkpoint.
        identity: What is asked for; gets ``changes``.
        run_dir: Named in errors and told.

    Raises:
        CheckpointError: If it is another run.
    """
    known = {key: saved.get(key) for key in identity}
    step = int(saved["step"])
    changes = check_same_run(known, identity, run_dir, reached=step)
    earlier = saved.get("changes") or []
    if changes:
        told = ", ".join(f"{name} {old!r} -> {new!r}" for name, (old, new) in changes.items())
        log.warning(
            "%s goes on from step %d with %s; the rate follows the schedule of these settings",
            run_dir,
            step,
            told,
        )
        earlier = [*earlier, {"step": step, **changes}]
    if earlier:
        identity["changes"] = earlier


def _flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= _flatten(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = list(value) if isinstance(value, tuple) else value
    return flat
