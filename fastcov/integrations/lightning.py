"""Lightning: a callback that tracks the model, logs summaries and rides in checkpoints."""

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import fastcov
from fastcov.integrations.runs import TrackedRun, check_every
from fastcov.report import Summary

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as error:
    raise ImportError("lightning is missing: pip install 'fastcov-torch[integrations]'") from error


class FastcovCallback(Callback):
    """Tracks a module while ``fit`` trains.

    ``fit`` with ``ckpt_path`` continues the statistics of the checkpoint, and a second ``fit`` of
    the same trainer those of the first; any other starts from zero. Batches of a tuner (learning
    rate, batch size) are not counted. After an exception the hooks are gone.

    Args:
        module: Submodule whose forward is a step; "": ``training_step`` calls ``self(x)``.
        log_every: Optimizer steps between summaries sent to the loggers; None sends none. Their
            spectra are computed beside the training: loggers get them some batches later.
        **options: Of :func:`fastcov.track`. Only rank 0 takes snapshots (of its own rows). With
            ``out`` and no ``snapshot_every``, summaries are stored as snapshots.

    Raises:
        ValueError: If ``log_every`` or ``snapshot_every`` is no number of steps.
    """

    def __init__(self, module: str = "", log_every: int | None = 100, **options: Any) -> None:
        check_every("log_every", log_every)
        check_every("snapshot_every", options.get("snapshot_every"))
        self.module, self.log_every, self.options = module, log_every, options
        self.tracker: fastcov.Tracker | None = None
        self._run: TrackedRun | None = None
        self._trained: tuple[weakref.ref[Trainer], weakref.ref[LightningModule]] | None = None
        self._is_opening = False  # a fit has begun, and its model is not ready yet
        self._has_loaded = False  # a checkpoint, for the fit that opens
        self._loaded: Mapping[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """What a copy, or another process, gets: nothing of a running training."""
        return {**self.__dict__, "_run": None, "_trained": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Forgets what an earlier fit left; evaluation leaves everything as it is."""
        if stage == TrainerFn.FITTING:
            if self._run is not None:
                self._run.leave()
            self._is_opening, self._has_loaded, self._loaded = True, False, None

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Keeps the statistics until the model is ready; in a running fit, goes back to them.

        A tuner saves a checkpoint, trains, and loads it again.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        key = self._key(trainer)
        if key not in checkpoint:
            warnings.warn(
                "the checkpoint holds no statistics (it was saved without FastcovCallback): they "
                "start from zero at the step that training resumes from",
                stacklevel=2,
            )
        saved = checkpoint.get(key)
        if self._is_opening:
            self._has_loaded, self._loaded = True, saved
        elif self._run is not None and self._run.is_open and saved is not None:
            self._run.load(saved)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks the module."""
        saved = self._to_start_from(trainer, pl_module)
        self._is_opening, self._loaded = False, None

        def log(summary: Summary, step: int) -> None:
            for logger in trainer.loggers:
                logger.log_metrics(dict(summary), step=step)

        self._run = TrackedRun(
            pl_module.get_submodule(self.module),
            self.options,
            is_first=trainer.is_global_zero,
            log_every=self.log_every,
            log=log if trainer.loggers else None,
            saved=saved,
            before=self._run,
        )
        self.tracker = self._run.tracker
        self._trained = (weakref.ref(trainer), weakref.ref(pl_module))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Takes the step that a resumed training continues from."""
        if self._run is not None:
            self._run.start(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Marks what is due; sends what is ready to every logger."""
        if self._run is None:
            return
        if self._run.tracker.steps == 0:
            self._refuse(pl_module)
        self._run.after_batch(trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Stores all ranks' statistics; every rank saves, so the collective is safe."""
        if self._is_opening:  # a tuner runs before this callback's turn
            checkpoint[self._key(trainer)] = self._to_start_from(trainer, pl_module)
        elif self._run is not None:
            checkpoint[self._key(trainer)] = self._run.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Sends the rest to the loggers, which are closed after this."""
        if self._run is not None:
            self._run.deliver()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the hooks; the statistics stay readable."""
        if self._run is not None:
            self._run.end()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Removes the hooks; the statistics stay readable."""
        if self._run is not None:
            self._run.leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removes the hooks of a fit that was broken off."""
        if self._run is not None:
            self._run.leave()

    def _to_start_from(self, trainer: Trainer, pl_module: Any) -> Mapping[str, Any] | None:
        if self._has_loaded:
            return self._loaded
        if self._run is None or self._trained is None or trainer.global_step == 0:
            return None
        # Lightning goes on with the steps of a trainer whose fit is called again.
        is_same = self._trained[0]() is trainer and self._trained[1]() is pl_module
        return self._run.tracker.state_dict() if is_same else None

    def _key(self, trainer: Any) -> str:
        own = [each for each in trainer.callbacks if isinstance(each, FastcovCallback)]
        number = next((number for number, each in enumerate(own) if each is self), 0)
        return f"fastcov_{number}" if number else "fastcov"

    def _refuse(self, pl_module: LightningModule) -> None:
        name = repr(self.module or "forward")
        if not pl_module.get_submodule(self.module).training:
            raise ValueError(
                f"{name} is in evaluation mode, which counts no step: call its train(), or give "
                "train_only=False"
            )
        children = ", ".join(child for child, _ in pl_module.named_children())
        raise ValueError(f"{name} was not called; give module= ({children})")
