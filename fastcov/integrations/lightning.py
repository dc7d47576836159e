"""Lightning: callback that tracks the model, logs summaries and saves statistics in checkpoints."""

import warnings
import weakref
from collections.abc import Mapping
from typing import Any

import fastcov
from fastcov.integrations.runs import TrackedRun, check_every
from fastcov.show.status import Summary

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
    from lightning.pytorch.trainer.states import TrainerFn
except ImportError as error:
    raise ImportError("lightning is missing: pip install lightning") from error


class FastcovCallback(Callback):
    """Callback that tracks a module while ``fit`` trains.

    ``fit`` with ``ckpt_path`` continues the statistics of the checkpoint, and a second ``fit`` of
    the same trainer continues those of the first; any other ``fit`` starts from zero. Batches of a
    tuner (learning rate, batch size) are not counted. An exception removes the hooks.

    Args:
        module: Name of the submodule whose forward is a step; "" is the LightningModule itself,
            whose ``training_step`` must call ``self(x)``.
        log_every: Optimizer steps between summaries sent to the loggers; None sends none. The
            spectra are computed beside the training: loggers get summaries some batches later.
        **options: Arguments of :func:`fastcov.track`. Only rank 0 takes snapshots, of its own rows.
            With ``out`` and no ``snapshot_every``, summaries are stored as snapshots.

    Attributes:
        tracker: Tracker of the running or last ``fit``; None before the first.

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
        self._is_starting = False  # True from setup() until on_fit_start(): the model is not ready
        # Checkpoint that was loaded while fit started, and the statistics that it held, if any.
        self._has_checkpoint = False
        self._checkpoint_statistics: Mapping[str, Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        """Attributes to copy or send to another process: all but those of a running training."""
        return {**self.__dict__, "_run": None, "_trained": None}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Preparation of a fit; ends an earlier one. Evaluation and other stages change nothing."""
        if stage == TrainerFn.FITTING:
            if self._run is not None:
                self._run.leave()
            self._is_starting = True
            self._has_checkpoint, self._checkpoint_statistics = False, None

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: Any) -> None:
        """Statistics of a checkpoint, kept until the model is ready; a running fit loads them.

        A tuner makes a running fit load: it saves a checkpoint, trains, and loads the checkpoint.
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
        if self._is_starting:
            self._has_checkpoint, self._checkpoint_statistics = True, saved
        elif self._run is not None and self._run.is_open and saved is not None:
            self._run.load(saved)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start of the tracking: the model is ready."""
        saved = self._initial_statistics(trainer, pl_module)
        self._is_starting, self._checkpoint_statistics = False, None

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
        """Setter of the step that a resumed training continues from."""
        if self._run is not None:
            self._run.start(trainer.global_step)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Copy of the statistics where a summary is due; finished summaries go to the loggers."""
        if self._run is None:
            return
        if self._run.tracker.steps == 0:
            self._refuse(pl_module)
        self._run.after_batch(trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Checkpoint of all ranks' statistics; every rank saves, so the collective is safe."""
        if self._is_starting:  # a tuner's callback saves before on_fit_start() of this one
            checkpoint[self._key(trainer)] = self._initial_statistics(trainer, pl_module)
        elif self._run is not None:
            checkpoint[self._key(trainer)] = self._run.state_dict()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Delivery of the remaining summaries to the loggers, which are closed after this."""
        if self._run is not None:
            self._run.deliver()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removal of the hooks; the statistics stay readable."""
        if self._run is not None:
            self._run.end()

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        """Removal of the hooks; the statistics stay readable."""
        if self._run is not None:
            self._run.leave()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Removal of the hooks of a fit that ended without ``on_fit_end``."""
        if self._run is not None:
            self._run.leave()

    def _initial_statistics(self, trainer: Trainer, pl_module: Any) -> Mapping[str, Any] | None:
        if self._has_checkpoint:
            return self._checkpoint_statistics
        if self._run is None or self._trained is None or trainer.global_step == 0:
            return None
        # Called again, fit of the same trainer continues its step count: so do the statistics.
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
