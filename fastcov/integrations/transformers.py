"""Hugging Face Trainer: callback that tracks the model, logs summaries, saves in checkpoints."""

import copy
import os
import sys
import warnings
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

import fastcov
from fastcov.integrations.runs import TrackedRun, check_every
from fastcov.show.status import Summary

try:
    from transformers import Trainer, TrainerCallback
    from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR
except ImportError as error:
    raise ImportError("needs transformers: pip install transformers") from error


class FastcovCallback(TrainerCallback):
    """Callback that tracks the model while ``train`` runs.

    With ``resume_from_checkpoint`` the statistics of the checkpoint are continued, in whatever
    folder the checkpoint lies; else they start from zero. Each trial of a hyperparameter search has
    its own statistics, and its own folder in ``out``. Summaries go to the reporting integrations of
    the Trainer (TensorBoard, Weights & Biases, ...), and to ``log``; the Trainer's log history
    stays as it is.

    Args:
        log: Function of a summary and its global step, called in process 0.
        log_every: Optimizer steps between summaries; None makes none. The spectra are computed
            beside the training, so that summaries arrive some steps later; without integrations,
            ``log`` and ``out``, none is computed.
        **options: Arguments of :func:`fastcov.track`. Only process 0 takes snapshots, of its own
            rows. With ``out`` and no ``snapshot_every``, summaries are stored as snapshots.

    Attributes:
        tracker: Tracker of the running or last training; None before the first.

    Raises:
        ValueError: If ``log_every`` or ``snapshot_every`` is no number of steps.
    """

    def __init__(
        self,
        log: Callable[..., None] | None = None,
        log_every: int | None = 100,
        **options: Any,
    ) -> None:
        check_every("log_every", log_every)
        check_every("snapshot_every", options.get("snapshot_every"))
        self.log, self.log_every, self.options = log, log_every, options
        self.tracker: fastcov.Tracker | None = None
        self._run: TrackedRun | None = None
        self._trainer: weakref.ref[Trainer] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Attributes to copy or send to another process: all but those of a running training."""
        return {**self.__dict__, "_run": None, "_trainer": None}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start of the tracking, after the hooks of an interrupted training are removed."""
        trainer, checkpoint = _training_now()
        self._trainer = None if trainer is None else weakref.ref(trainer)
        reporters = _reporters(trainer)

        def log(summary: Summary, step: int) -> None:
            if self.log is not None:
                self.log(dict(summary), step)
            # Reporters label values with the state's step, which has moved on since the copy.
            then = copy.copy(state)
            then.global_step = step
            for reporter in reporters:
                values = {f"fastcov/{key}": value for key, value in summary.items()}
                reporter.on_log(args, then, control, model=kwargs["model"], logs=values)

        if self._run is not None:
            self._run.leave()
        self._run = TrackedRun(
            kwargs["model"],
            {**self.options, **self._out(args)},
            is_first=state.is_world_process_zero,
            log_every=self.log_every,
            log=log if reporters or self.log is not None else None,
            saved=self._saved(checkpoint, state),
            before=self._run,
        )
        self._run.start(state.global_step)
        self.tracker = self._run.tracker

    def on_substep_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Snapshot that is due between two optimizer steps."""
        self.on_step_end(args, state, control)

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Copy of the statistics where a summary is due; delivery of finished summaries."""
        if self._run is not None:
            self._run.after_batch(state.global_step)

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **_: Any
    ) -> None:
        """Delivery of the last summaries with the Trainer's last log, before reporters close."""
        if self._run is not None and logs is not None and "train_loss" in logs:
            self._run.deliver()

    def on_push_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """File of the statistics, written before the checkpoint is sent to the hub."""
        # The Trainer calls this in process 0 alone, where a collective would wait forever.
        if not (dist.is_available() and dist.is_initialized()):
            self._store(args, state)

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """File of all processes' statistics in the checkpoint."""
        self._store(args, state)

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Removal of the hooks; the statistics stay readable."""
        if self._run is not None:
            self._run.end()

    def _store(self, args: Any, state: Any) -> None:
        if self._run is None or not self._run.is_open:
            return
        statistics = self._run.state_dict()
        if not args.should_save:
            return
        folder = self._run_folder(args) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
        stored = folder / self._file_name()
        temporary = stored.with_name(f"{stored.name}.tmp")
        try:
            if not folder.is_dir():
                raise FileNotFoundError("there is no such checkpoint")
            torch.save(statistics, temporary)
            temporary.replace(stored)
        except (OSError, RuntimeError) as error:  # RuntimeError: torch.save on a full disk
            temporary.unlink(missing_ok=True)
            warnings.warn(
                f"statistics of step {state.global_step} are not stored in {stored}: {error}; a "
                "training that resumes from it starts them from zero",
                stacklevel=2,
            )

    def _saved(self, checkpoint: Path | None, state: Any) -> Mapping[str, Any] | None:
        if not state.global_step:
            return None
        stored = None if checkpoint is None else checkpoint / self._file_name()
        if stored is None or not stored.is_file():
            where = "the checkpoint" if stored is None else str(stored)
            warnings.warn(
                f"training resumes at step {state.global_step}, but {where} holds no statistics "
                "(it was saved without FastcovCallback, or moved in parts): they start from zero",
                stacklevel=2,
            )
            return None
        try:
            saved: Mapping[str, Any] = torch.load(stored, map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(
                f"{stored} cannot be read ({type(error).__name__}: {error}): restore it, or delete "
                "it to start the statistics from zero"
            ) from error
        return saved

    def _run_folder(self, args: Any) -> Path:
        trainer = None if self._trainer is None else self._trainer()
        if trainer is None:
            return Path(args.output_dir)
        # Only this private method tells the folder of a trial in a hyperparameter search.
        return Path(trainer._get_output_dir(getattr(trainer, "_trial", None)))

    def _out(self, args: Any) -> dict[str, Path]:
        out = self.options.get("out")
        if out is None:
            return {}
        return {"out": Path(out) / os.path.relpath(self._run_folder(args), args.output_dir)}

    def _file_name(self) -> str:
        trainer = None if self._trainer is None else self._trainer()
        callbacks = [] if trainer is None else trainer.callback_handler.callbacks
        own = [each for each in callbacks if isinstance(each, FastcovCallback)]
        number = next((number for number, each in enumerate(own) if each is self), 0)
        return f"fastcov-{number}.pt" if number else "fastcov.pt"


def _training_now() -> tuple[Trainer | None, Path | None]:
    """Trainer whose ``train`` is running, and the checkpoint from which the training resumes.

    Callbacks get neither of the two from the Trainer: both are read from the call stack.
    """
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        trainer = frame.f_locals.get("self")
        if isinstance(trainer, Trainer) and "resume_from_checkpoint" in frame.f_locals:
            checkpoint = frame.f_locals["resume_from_checkpoint"]
            return trainer, None if checkpoint is None else Path(checkpoint)
    return None, None


def _reporters(trainer: Trainer | None) -> list[Any]:
    callbacks = [] if trainer is None else trainer.callback_handler.callbacks
    return [each for each in callbacks if isinstance(each, tuple(INTEGRATION_TO_CALLBACK.values()))]
