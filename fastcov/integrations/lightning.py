"""Lightning: a callback that tracks the model, logs summaries and rides in checkpoints."""

from collections.abc import Mapping
from typing import Any

import fastcov

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("lightning is missing: pip install 'fastcov-torch[integrations]'") from error


class FastcovCallback(Callback):
    """Tracks a module from the start of ``fit``.

    Args:
        module: Submodule whose forward is a step; "": ``training_step`` calls ``self(x)``.
        log_every: Optimizer steps between summaries sent to the loggers; None sends none.
        **options: Of :func:`fastcov.track`. Only rank 0 takes snapshots (of its own rows).
    """

    def __init__(self, module: str = "", log_every: int | None = 100, **options: Any) -> None:
        self.module, self.log_every, self.options, self._logged_step = module, log_every, options, 0
        self.tracker: fastcov.Tracker | None = None
        self._resumed: Mapping[str, Any] | None = None

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hooks the module; a resumed fit continues where its checkpoint stood."""
        alone = {} if trainer.is_global_zero else {"out": None, "snapshot_every": None}
        self.tracker = fastcov.track(pl_module.get_submodule(self.module), **self.options | alone)
        if self._resumed is not None:
            self.tracker.load_state_dict(dict(self._resumed))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        """Sends the summary of all ranks to every logger."""
        if self.tracker is None or self.log_every is None:
            return
        if self.tracker.steps == 0:
            names = ", ".join(name for name, _ in pl_module.named_children())
            raise ValueError(f"{self.module or 'forward'!r} was not called; give module= ({names})")
        step = trainer.global_step  # stays for several batches where gradients accumulate
        if step != self._logged_step and step % self.log_every == 0:
            self._logged_step, summary = step, self.tracker.sync().summary()
            for logger in trainer.loggers:
                logger.log_metrics(summary, step=step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Stores all ranks' statistics; every rank saves, so the collective is safe."""
        if self.tracker is not None:
            checkpoint["fastcov"] = self.tracker.sync().state_dict()

    def on_load_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Keeps the statistics until the model is ready."""
        self._resumed = checkpoint.get("fastcov")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Removes the hooks; the statistics stay readable."""
        if self.tracker is not None:
            self.tracker.close()
