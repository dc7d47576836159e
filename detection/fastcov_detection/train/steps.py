"""Loop over steps that every training shares: rates, autocast, clipping, logs and

The learning rate is a pure function of the step: there is nothing to save and to restore.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer

import fastcov
from fastcov_detection.config import TrainConfig
from fastcov_detection.data.dataset import mix_seed, one_line
from fastcov_detection.detector.backbone import unusual_groups
from fastcov_detection.distributed import barrier, rank, world_size
from fastcov_detection.errors import ConfigError
from fastcov_detection.files import write_file
from fastcov_detection.progress import progress_bar
from fastcov_detection.train.folder import load_checkpoint, save_checkpoint
from fastcov_detection.train.logbook import Logbook, Speed, told


class Average:
    """Exponential moving average of the weights and buffers of a model.

    The decay grows from 0.1 to its value, as :math:`(1 + n) / (10 + n)` after n steps, so that the
    random start is soon forgotten.

    Args:
        model: Copied as it is.
        decay: In (0, 1).

    Raises:
        ValueError: If the decay is out of range.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        if not 0 < decay < 1:
            raise ValueError(f"ema is {decay}; give a decay between 0 and 1, for example 0.9998")
        self.decay = decay
        self.model = copy.deepcopy(model).requires_grad_(False)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Takes in the weights after a step, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        known = self.model.state_dict()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                known[name].lerp_(tensor, 1 - decay)
            else:
                known[name].copy_(tensor)


log = logging.getLogger("fastcov_detection")

_STEP_FACTOR = 0.1
_FEW_IMAGES = 4


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of one step: a linear warm-up, then steps down by ten or a cosine.

    Args:
        config: ``lr``, ``lr_batch``, ``batch_size``, ``warmup_steps``, ``schedule``,
            ``milestones``, ``final_lr``, ``steps``.
        step: Counted from 0.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps > 0 else 1.0
    peak = base_rate(config)
    if config.schedule == "step":
        passed = sum(step >= milestone * config.steps for milestone in config.milestones)
        return peak * warmup * _STEP_FACTOR**passed
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, max(0.0, (step - config.warmup_steps) / span))
    share = config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    return peak * warmup * share


def base_rate(config: TrainConfig) -> float:
    """Learning rate after warm-up: ``lr``, in proportion to the batch where ``lr_batch`` is given.

    Raises:
        ConfigError: If ``lr_batch`` is not positive.
    """
    if config.lr_batch is None:
        return config.lr
    if config.lr_batch < 1:
        raise ConfigError(f"lr_batch is {config.lr_batch}; give the images that lr is meant for")
    return config.lr * config.batch_size / config.lr_batch


def evaluation_steps(config: TrainConfig, images: int) -> int:
    """Steps between evaluations of so many training images; 0: at the run's end only."""
    if config.evaluate_every or config.evaluate_epochs <= 0:
        return config.evaluate_every
    return max(1, round(config.evaluate_epochs * images / config.batch_size))


def build_optimizer(model: nn.Module, config: TrainConfig) -> Optimizer:
    """SGD or AdamW over what is trained; norms and biases without weight decay where so configured.

    Raises:
        ConfigError: If a value is out of range or nothing is left to train.
    """
    if config.steps < 1 or config.lr <= 0 or config.weight_decay < 0:
        raise ConfigError(
            f"steps is {config.steps}, lr {config.lr}, weight_decay {config.weight_decay}; "
            "expected at least one step, a positive rate and no negative decay"
        )
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not trained:
        raise ConfigError("every parameter is frozen; raise model.trainable_layers")
    matrices = [p for p in trained if p.dim() > 1 or config.decay_vectors]
    vectors = [p for p in trained if p.dim() <= 1 and not config.decay_vectors]
    groups = [
        {"params": chosen, "weight_decay": decay}
        for chosen, decay in ((matrices, config.weight_decay), (vectors, 0.0))
        if chosen
    ]
    # One kernel for all parameters: 5 ms a step in place of 10 for 160 small tensors.
    if config.optimizer == "adamw":
        return AdamW(groups, lr=config.lr, fused=True)
    if config.optimizer != "sgd":
        raise ConfigError(f"optimizer is {config.optimizer!r}; choose sgd or adamw")
    return SGD(groups, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)


def check_parts(config: TrainConfig, processes: int) -> None:
    """Refuses a batch that cannot be cut into equal parts.

    Raises:
        ConfigError: If ``batch_size`` is no multiple of ``accumulate`` times the processes.
    """
    if config.accumulate < 1 or config.batch_size % (config.accumulate * processes):
        raise ConfigError(
            f"batch_size is {config.batch_size} and accumulate {config.accumulate}; choose a batch "
            f"that is a multiple of {max(1, config.accumulate) * processes}: accumulate times "
            f"{processes} processes"
        )


def tell_recipe(config: TrainConfig, model: nn.Module, processes: int) -> None:
    """Notes about settings that are not what their names may promise.

    Args:
        config: Of the run.
        model: Built.
        processes: That share a batch.
    """
    if config.lr_batch is not None and config.lr_batch != config.batch_size:
        log.warning(
            "lr %g is meant for %d images a step; with %d it is %g after warm-up",
            config.lr,
            config.lr_batch,
            config.batch_size,
            base_rate(config),
        )
    together = config.batch_size // (processes * max(1, config.accumulate))
    if config.model.norm == "batch" and together < _FEW_IMAGES:
        log.warning(
            "BatchNorm sees %d images of a process at a time, too few for its statistics: set "
            "model.norm=sync (one norm over all processes), model.norm=frozen with ImageNet "
            "weights (as torchvision does), or --preset coco-scratch (GroupNorm)",
            together,
        )
    groups = unusual_groups(model)
    if groups:
        told = ", ".join(f"{count} of {width} channels" for width, count in sorted(groups.items()))
        log.warning("GroupNorm has other than 32 groups where 32 do not fit: %s", told)


def calmer_settings(config: TrainConfig) -> str:
    """Options for the command line under which a run that left the finite numbers may go on."""
    clip = 10.0 if config.clip_norm is None else config.clip_norm / 2
    return f"--set lr={config.lr / 4:g} --set clip_norm={clip:g}"


PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

Losses = Callable[[nn.Module, list[Any]], dict[str, Tensor]]
"""Losses of a part of a step's samples by name, computed through the module that is given."""


class Loop:
    """Training at work in one process: goes on from the folder's checkpoint, step by step.

    Args:
        config: Optimizer, schedule, precision and how often things are written.
        model: Moved to the device.
        folder: Of the run.
        identity: What makes the run this one; checkpoints carry it.
        device: Where the model is trained.
        losses: What is trained.
        track: Gives the tracker of the model, if it is to be watched.
        progress: Show bars.
    """

    def __init__(
        self,
        config: TrainConfig,
        model: nn.Module,
        folder: Path,
        identity: dict[str, Any],
        device: torch.device,
        losses: Losses,
        *,
        track: Callable[[], fastcov.Tracker | None] = lambda: None,
        progress: bool = True,
    ) -> None:
        self.config, self.folder, self.identity, self.device = config, folder, identity, device
        self.seed, self.losses = int(identity["seed"]), losses
        self.is_main = rank() == 0
        self.progress = progress and self.is_main
        self.memory_format = (
            torch.channels_last if config.channels_last else torch.contiguous_format
        )
        self.model = model.to(device=device, memory_format=self.memory_format)
        self.optimizer = build_optimizer(self.model, config)
        self.dtype = PRECISIONS[config.precision]
        self.scaler = torch.amp.GradScaler(device.type, enabled=config.precision == "float16")
        self.step, self.train_s, self.cpu_s = 0, 0.0, 0.0
        self.best: dict[str, float] | None = None
        # Before the tracker, whose hooks would be copied.
        self.average = None if config.ema is None else Average(self.model, config.ema)
        self.tracker = track()
        self._restore()
        self.logbook = Logbook(
            folder if self.is_main else None, self.step, remedy=calmer_settings(config)
        )
        self.replica: nn.Module = self.model
        if world_size() > 1:
            ids = [device.index] if device.type == "cuda" else None
            self.replica = DistributedDataParallel(self.model, device_ids=ids)

    def run(
        self,
        label: str,
        batches: Iterable[list[Any]],
        samples: int,
        *,
        pause: Callable[[], Any] = lambda: None,
        pause_steps: int = 0,
    ) -> None:
        """Takes every step that is left.

        Args:
            label: Of the bar.
            batches: Samples of each step.
            samples: How many these are over all processes, for the speed.
            pause: Called on the way, outside the clock.
            pause_steps: Steps between these calls; 0: none.
        """
        config = self.config
        self.model.train()
        bar = progress_bar(label, config.steps, done=self.step, enabled=self.progress)
        start_s, before_s = time.monotonic(), self.train_s
        start_cpu_s, before_cpu_s = time.process_time(), self.cpu_s
        speed = Speed(samples, self.device)
        with bar as advance:
            for batch in speed.watch(one_line(batches)):
                rate = learning_rate(config, self.step)
                self._step(batch, rate)
                self.step += 1
                self.train_s = before_s + time.monotonic() - start_s
                self.cpu_s = before_cpu_s + time.process_time() - start_cpu_s
                is_last = self.step == config.steps
                saves = self.step % config.checkpoint_every == 0 or is_last
                note = ""
                if self.step % config.log_every == 0 or saves:
                    figures = speed.since(config.steps - self.step)
                    losses = self.logbook.flush(self.step, rate, self.train_s, figures)
                    note = told(losses, rate, figures)
                if saves:
                    self._save()
                if pause_steps and self.step % pause_steps == 0 and not is_last:
                    pause_s, pause_cpu_s = time.monotonic(), time.process_time()
                    pause()
                    start_s += time.monotonic() - pause_s
                    speed.pause(time.monotonic() - pause_s)
                    start_cpu_s += time.process_time() - pause_cpu_s
                advance(1, note)
        if self.tracker is not None and world_size() > 1:
            self.tracker.sync()

    def result_model(self) -> nn.Module:
        """The model that is evaluated and kept."""
        return self.model if self.average is None else self.average.model

    def write_weights(self, name: str) -> None:
        """Writes a plain state_dict into the folder."""
        state = {
            key: tensor.cpu().contiguous()
            for key, tensor in self.result_model().state_dict().items()
        }
        write_file(self.folder / name, lambda file: torch.save(state, file))

    def autocast(self) -> torch.autocast:
        """Context of every forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def close(self) -> None:
        """Ends the log and the tracking."""
        self.logbook.close()
        if self.tracker is not None:
            self.tracker.close()

    def _step(self, batch: list[Any], rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        torch.manual_seed(mix_seed(self.seed, 3, self.step, rank()))
        size = len(batch) // self.config.accumulate
        values: dict[str, Tensor] = {}
        for start in range(0, len(batch), size):
            is_last = start + size == len(batch)
            for name, value in self._backward(batch[start : start + size], is_last).items():
                values[name] = values[name] + value if name in values else value
        if self.config.clip_norm is not None:
            self.scaler.unscale_(self.optimizer)
            parameters = [p for p in self.model.parameters() if p.grad is not None]
            norm = nn.utils.clip_grad_norm_(parameters, self.config.clip_norm)
            # A scaled gradient may overflow; the scaler then skips the step, and its norm means
            # nothing.
            if not self.scaler.is_enabled():
                values["grad_norm"] = norm
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        if self.average is not None:
            self.average.update(self.model, self.step)
        self.logbook.add(values)

    def _backward(self, part: list[Any], is_last: bool) -> dict[str, Tensor]:
        """Losses of a part of a step's samples, with their gradients added; its share of the mean.

        Processes exchange gradients after the last part alone.
        """
        waits = isinstance(self.replica, DistributedDataParallel) and not is_last
        with self.replica.no_sync() if waits else nullcontext():
            with self.autocast():
                losses = self.losses(self.replica, part)
                loss = torch.stack(list(losses.values())).sum()
            share = 1 / self.config.accumulate
            self.scaler.scale(loss * share).backward()
        return {name: value.detach() * share for name, value in {"loss": loss, **losses}.items()}

    def _save(self) -> None:
        self.logbook.refuse_weights(self.model.state_dict(), self.step)
        if self.tracker is not None and world_size() > 1:
            self.tracker.sync()
        if self.is_main:
            content = {
                **self.identity,
                "step": self.step,
                "train_s": self.train_s,
                "cpu_s": self.cpu_s,
                "best": self.best,
                "model": self.model.state_dict(),
                "average": None if self.average is None else self.average.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "tracker": None if self.tracker is None else self.tracker.state_dict(),
            }
            save_checkpoint(self.folder, content)
        barrier()

    def _restore(self) -> None:
        saved = load_checkpoint(self.folder)
        barrier()
        if saved is not None:
            self.step, self.train_s = saved["step"], saved["train_s"]
            self.cpu_s, self.best = saved["cpu_s"], saved.get("best")
            self.model.load_state_dict(saved["model"])
            if self.average is not None:
                self.average.model.load_state_dict(saved["average"])
            self.optimizer.load_state_dict(saved["optimizer"])
            self.scaler.load_state_dict(saved["scaler"])
            if self.tracker is not None and saved["tracker"] is not None:
                self.tracker.load_state_dict(saved["tracker"])
        if self.tracker is not None:
            self.tracker.history.truncate(self.step + 1 if self.step else 0)
