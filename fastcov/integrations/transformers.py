"""Hugging Face Trainer: a callback that tracks the model, logs summaries, rides in checkpoints."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fastcov

try:
    from transformers import TrainerCallback
except ImportError as error:
    raise ImportError("needs transformers: pip install 'fastcov-torch[integrations]'") from error


class FastcovCallback(TrainerCallback):
    """Tracks the model; ``options`` are those of :func:`fastcov.track`.

    Args:
        log: Called with each summary and the global step; the log history has it in any case.
        **options: Snapshots are taken by process 0 alone, of its own rows.
    """

    def __init__(self, log: Callable[..., None] | None = None, **options: Any) -> None:
        self.log, self.options = log, options
        self.tracker: fastcov.Tracker | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Hooks the model; a resumed training continues from its checkpoint's statistics."""
        alone = {} if state.is_world_process_zero else {"out": None, "snapshot_every": None}
        self.tracker = fastcov.track(kwargs["model"], **self.options | alone)
        if state.global_step and (stored := _beside(args, state)).is_file():
            self.tracker.load_state_dict(torch.load(stored, map_location="cpu", weights_only=True))

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Reports the summary of all processes."""
        if self.tracker is not None:
            summary = self.tracker.sync().summary()
            state.log_history.append({**summary, "step": state.global_step})
            if self.log is not None:
                self.log(summary, state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stores all processes' statistics beside the checkpoint."""
        if self.tracker is not None:
            stored, statistics = _beside(args, state), self.tracker.sync().state_dict()
            if state.is_world_process_zero:
                torch.save(statistics, f"{stored}.tmp")
                Path(f"{stored}.tmp").replace(stored)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Removes the hooks; the statistics stay readable."""
        if self.tracker is not None:
            self.tracker.close()


def _beside(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}" / "fastcov.pt"
