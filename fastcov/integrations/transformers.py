"""Hugging Face Trainer: a callback that tracks the model, logs summaries, rides in checkpoints."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import fastcov

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError(
        "transformers is missing: pip install 'fastcov-torch[integrations]'"
    ) from error

Log = Callable[[Mapping[str, float], int], None]


class FastcovCallback(TrainerCallback):
    """Tracks the model from the start of ``train``.

    Args:
        log: Called with each summary and the global step; None appends it to the log history.
        **options: Of :func:`fastcov.track`. Only process 0 takes snapshots (of its own rows).
    """

    def __init__(self, log: Log | None = None, **options: Any) -> None:
        self.log, self.options = log, options
        self.tracker: fastcov.Tracker | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hooks the model; a resumed training continues from its checkpoint's statistics."""
        alone = {} if state.is_world_process_zero else {"out": None, "snapshot_every": None}
        self.tracker = fastcov.track(kwargs["model"], **self.options | alone)
        stored = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "fastcov.pt"
        if state.global_step and stored.is_file():
            self.tracker.load_state_dict(torch.load(stored, map_location="cpu", weights_only=True))
            self.tracker.history.truncate(self.tracker.steps + 1)

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reports the summary of all processes."""
        if self.tracker is not None:
            summary = self.tracker.sync().summary()
            if self.log is not None:
                self.log(summary, state.global_step)
            else:
                state.log_history.append({**summary, "step": state.global_step})

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stores all processes' statistics beside the checkpoint."""
        if self.tracker is not None:
            stored = Path(args.output_dir) / f"checkpoint-{state.global_step}" / "fastcov.pt"
            statistics = self.tracker.sync().state_dict()
            if state.is_world_process_zero:
                torch.save(statistics, stored.with_suffix(".tmp"))
                os.replace(stored.with_suffix(".tmp"), stored)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Removes the hooks; the statistics stay readable."""
        if self.tracker is not None:
            self.tracker.close()
