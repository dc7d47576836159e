"""Training of a detector, and the loop over steps that every training shares.

The learning rate is a pure function of the step: there is nothing to save and to restore.
"""

from __future__ import annotations

import copy
import json
import logging
import math
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import SGD, AdamW, Optimizer
from torch.utils.data import DataLoader
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

import fastcov
from fastcov_detection.config import ModelConfig, TrainConfig, save_config, to_dict
from fastcov_detection.data.augment import training_transform
from fastcov_detection.data.dataset import (
    AugmentedView,
    BatchPlan,
    LoadedData,
    Target,
    load_on_ranks,
    mix_seed,
    to_device,
    to_float,
    with_short_errors,
)
from fastcov_detection.detector.build import (
    build_model,
    count_cost,
    parse_name,
    save_widths,
    settle_norm,
)
from fastcov_detection.detector.modules import unusual_groups
from fastcov_detection.detector.weights import load_start
from fastcov_detection.distributed import barrier, pick_device, process_group, rank, world_size
from fastcov_detection.errors import ConfigError
from fastcov_detection.files import write_file, write_text
from fastcov_detection.progress import progress_bar
from fastcov_detection.train.drawing import draw_pictures, in_grid
from fastcov_detection.train.evaluate import (
    Evaluation,
    evaluate,
    warn_of_limits,
    write_predictions,
)
from fastcov_detection.train.folder import (
    BEST,
    LAST,
    RunResult,
    load_checkpoint,
    open_folder,
    save_checkpoint,
    write_result,
)
from fastcov_detection.train.logbook import Logbook, Speed, progress_note

log = logging.getLogger("fastcov_detection")

PRECISIONS = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_STEP_FACTOR = 0.1
_FEW_IMAGES = 4
_DRAWN_IMAGES = 4

Losses = Callable[[nn.Module, list[Any]], dict[str, Tensor]]
"""Losses of a part of a step's samples by name, computed through the module that is given."""


def train(
    config: TrainConfig,
    widths: Mapping[str, int] | None = None,
    *,
    run_dir: str | os.PathLike[str],
    seed: int = 0,
    start: str | os.PathLike[str] | None = None,
    resume: bool = True,
    progress: bool = True,
) -> RunResult:
    """Training of a detector to its end, with its evaluation.

    The package's README lists the files in the folder. Order of images, their random changes and
    the sampling of regions follow from the seed, the step and the rank alone, so a run that was
    killed goes on to the same losses.

    Args:
        config: The run.
        widths: Channels by width group; None: the configuration's.
        run_dir: Folder of the run.
        seed: Seed of everything random.
        start: File of a state_dict of the whole detector, of these widths, to start from; the run
            remembers its digest. None: as ``config.model.init`` says.
        resume: Go on from an earlier process's checkpoint; rate, clipping and number of steps may
            be new. A finished run is returned at once, or goes on to more steps. False: start over.
        progress: Show bars.

    Raises:
        DataError: If the data cannot be used.
        CheckpointError: If the folder holds a run with other settings, or no checkpoint can be
            read.
        LossError: If a loss is not finite.
    """
    folder = Path(run_dir)
    device = pick_device(config.device)
    with process_group(device), run_settings(config, device):
        is_main = rank() == 0
        predicts_masks, _ = parse_name(config.model.name)
        data = load_on_ranks(config.data, with_masks=predicts_masks, progress=progress and is_main)
        classes = len(data.class_names) + 1
        config = replace(config, model=replace(settle_norm(config.model), num_classes=classes))
        model = initial_model(config.model, widths, seed)
        identity: dict[str, Any] = {
            "seed": seed,
            "config": to_dict(config),
            "widths": dict(model.widths),
            "start": None if start is None else load_start(model, Path(start), data.class_names),
            "data": data.content,
        }
        finished = open_folder(folder, identity, RunResult, resume=resume)
        if finished is not None:
            return finished
        if is_main:
            save_config(config, folder / "config.json")
            save_widths(model.widths, folder / "widths.json")
            warn_of_limits(data.val, config.model.detections_per_image)
            write_text(folder / "classes.json", json.dumps(list(data.class_names)) + "\n")
            ids = list(data.train.category_of.values())
            write_text(folder / "category_ids.json", json.dumps(ids) + "\n")
            warn_of_recipe(config, model, world_size())
        return _Run(config, model, data, folder, identity, device, progress).run()


def initial_model(
    config: ModelConfig, widths: Mapping[str, int] | None, seed: int
) -> GeneralizedRCNN:
    """The network that a run of a seed starts from; seeds torch."""
    torch.manual_seed(mix_seed(seed, 2))
    return build_model(config, widths)


class _Run:
    """One process's part of a run."""

    def __init__(
        self,
        config: TrainConfig,
        model: GeneralizedRCNN,
        data: LoadedData,
        folder: Path,
        identity: dict[str, Any],
        device: torch.device,
        progress: bool,
    ) -> None:
        self.config, self.data, self.folder, self.device = config, data, folder, device
        self.model, self.identity = model, identity
        self.evaluate_steps = evaluation_steps(config, len(data.train))
        self.loop = Loop(
            config,
            model,
            folder,
            identity,
            device,
            self._losses,
            track=self._track,
            progress=progress,
        )

    def run(self) -> RunResult:
        """Training of the steps that are left, then the evaluation and the result."""
        loop = self.loop
        try:
            check_parts(self.config, world_size())
            loop.run(
                f"training {self.folder.name}",
                self._loader(),
                self.config.batch_size,
                pause=self._evaluate,
                pause_steps=self.evaluate_steps,
            )
            final = self._evaluate()
        finally:
            loop.close()
        cost = vars(count_cost(self.model, self.config.model.min_size))
        result = RunResult(
            ap=final.ap,
            ap50=final.numbers["ap50"] or 0.0,
            segm_ap=final.numbers["segm_ap"],
            train_s=loop.train_s,
            **cost,
            steps=loop.step,
            seed=loop.seed,
            run_dir=str(self.folder),
            cpu_s=loop.cpu_s,
            numbers=final.numbers,
            classes=final.classes,
            best=loop.best,
        )
        if loop.is_main:
            write_predictions(final, self.folder)
            loop.write_weights(LAST)
            write_result(self.folder, result, self.identity)
        barrier()
        return result

    def _loader(self) -> DataLoader[Any]:
        config = self.config
        plan = BatchPlan(
            self.data.train.aspect_ratios(),
            config.batch_size,
            seed=self.loop.seed,
            steps=config.steps,
            first_step=self.loop.step,
            rank=rank(),
            world_size=world_size(),
        )
        view = AugmentedView(
            self.data.train, training_transform(config.data), cache=config.data.cache
        )
        return DataLoader(
            view,
            batch_sampler=plan,
            num_workers=config.data.workers,
            collate_fn=list,
            pin_memory=self.device.type == "cuda",
            persistent_workers=False,
        )

    def _losses(self, model: nn.Module, part: list[tuple[Tensor, Target]]) -> dict[str, Tensor]:
        images = [to_float(image.to(self.device, non_blocking=True)) for image, _ in part]
        targets = [to_device(target, self.device) for _, target in part]
        losses: dict[str, Tensor] = model(images, targets)
        return losses

    def _evaluate(self) -> Evaluation:
        """Score of the present weights, which are kept if they are the best so far."""
        loop = self.loop
        found = evaluate(
            loop.result_model(),
            self.data.val,
            batch_size=self.config.eval_batch_size,
            workers=self.config.data.workers,
            precision=loop.dtype,
            progress=loop.progress,
        )
        values = {**found.numbers, "seconds": found.seconds, "classes": found.classes}
        loop.logbook.write("eval", loop.step, values)
        if loop.is_main:
            pictures = draw_pictures(loop.result_model(), self.data.val, count=_DRAWN_IMAGES)
            loop.logbook.picture("eval/detections", loop.step, in_grid(pictures, 2))
        if self.evaluate_steps and (loop.best is None or found.ap > loop.best["ap"]):
            loop.best = {"step": loop.step, "ap": found.ap}
            if loop.is_main:
                loop.write_weights(BEST)
        return found

    def _track(self) -> fastcov.Tracker | None:
        root = self.model if self.config.track == "model" else self.model.backbone
        return watch(root, self.config, self.folder)


def watch(root: nn.Module, config: TrainConfig, folder: Path) -> fastcov.Tracker | None:
    """Tracker of a training, as its configuration asks; None where nothing is to be watched.

    Args:
        root: Module whose layers are watched.
        config: Settings of the training.
        folder: Folder of the run, where ``spectra`` gets snapshots.
    """
    if config.track == "none":
        return None
    is_main = rank() == 0
    # Snapshots come from inside a step, where ranks must not wait for each other: rank 0 takes its
    # own.
    return fastcov.track(
        root,
        where=config.track_where,
        rows="auto" if config.track_rows is None else config.track_rows,
        decay=config.track_decay,
        snapshot_every=config.snapshot_every if is_main else None,
        out=folder / "spectra" if is_main else None,
    )


@contextmanager
def run_settings(config: TrainConfig, device: torch.device) -> Iterator[None]:
    """Context with a run's threads, determinism and random state, which it restores."""
    threads = torch.get_num_threads()
    was_deterministic = torch.are_deterministic_algorithms_enabled()
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=forked):
        try:
            if config.threads is not None:
                torch.set_num_threads(config.threads)
            # On the CPU every kernel in use is deterministic; on a GPU RoIAlign's gradient warns
            # that it is not.
            if config.deterministic and device.type == "cuda":
                torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            torch.set_num_threads(threads)
            torch.use_deterministic_algorithms(was_deterministic)


class WeightAverage:
    """Exponential moving average of the weights and buffers of a model.

    The decay grows from 0.1 to its value, as :math:`(1 + n) / (10 + n)` after n steps, so that the
    random start is soon forgotten.

    Args:
        model: Model that is copied.
        decay: Factor on earlier weights, in (0, 1).

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
        """Update with the weights after a step, counted from 0."""
        decay = min(self.decay, (1 + step) / (10 + step))
        known = self.model.state_dict()
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                known[name].lerp_(tensor, 1 - decay)
            else:
                known[name].copy_(tensor)


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
    """SGD or AdamW of the trained parameters; norms and biases without weight decay if configured.

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
    """Refusal of a batch that cannot be cut into equal parts.

    Raises:
        ConfigError: If ``batch_size`` is no multiple of ``accumulate`` times the processes.
    """
    if config.accumulate < 1 or config.batch_size % (config.accumulate * processes):
        raise ConfigError(
            f"batch_size is {config.batch_size} and accumulate {config.accumulate}; choose a batch "
            f"that is a multiple of {max(1, config.accumulate) * processes}: accumulate times "
            f"{processes} processes"
        )


def warn_of_recipe(config: TrainConfig, model: nn.Module, processes: int) -> None:
    """Warnings of settings whose effect may surprise.

    Args:
        config: Settings of the run.
        model: Detector of the run.
        processes: Number of processes that share a batch.
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
    if config.model.norm in ("batch", "sync") and config.model.init == "imagenet":
        log.warning(
            "BatchNorm is trained from ImageNet weights; torchvision freezes it with the first two "
            "stages: model.norm=auto does so too"
        )
    groups = unusual_groups(model)
    if groups:
        listed = ", ".join(f"{n} of {width} channels" for width, n in sorted(groups.items()))
        log.warning("GroupNorm has other than 32 groups where 32 do not fit: %s", listed)


def calmer_settings(config: TrainConfig) -> str:
    """Options for the command line under which a run that left the finite numbers may go on."""
    clip = 10.0 if config.clip_norm is None else config.clip_norm / 2
    return f"--set lr={config.lr / 4:g} --set clip_norm={clip:g}"


class Loop:
    """Training at work in one process: goes on from the folder's checkpoint, step by step.

    Args:
        config: Optimizer, schedule, precision, and the steps between log lines and checkpoints.
        model: Model, which is moved to the device.
        folder: Folder of the run.
        identity: Seed, settings, widths and data of the run, which checkpoints carry.
        device: Device of the training.
        losses: Function that gives the losses.
        track: Function that makes the tracker of the model, or gives None.
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
        self.average = None if config.ema is None else WeightAverage(self.model, config.ema)
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
        """Run of every step that is left.

        Args:
            label: Label of the bar.
            batches: Samples of each step.
            samples: Number of samples of a step over all processes, for the speed.
            pause: Function that is called between steps; its time is not counted.
            pause_steps: Steps between two such calls; 0: none.
        """
        config = self.config
        self.model.train()
        bar = progress_bar(label, config.steps, done=self.step, enabled=self.progress)
        start_s, before_s = time.monotonic(), self.train_s
        start_cpu_s, before_cpu_s = time.process_time(), self.cpu_s
        speed = Speed(samples, self.device)
        with bar as advance:
            for batch in speed.watch(with_short_errors(batches)):
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
                    note = progress_note(losses, rate, figures)
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
        """File of the plain state_dict, in the run's folder."""
        state = {
            key: tensor.cpu().contiguous()
            for key, tensor in self.result_model().state_dict().items()
        }
        write_file(self.folder / name, lambda file: torch.save(state, file))

    def autocast(self) -> torch.autocast:
        """Context of every forward pass."""
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def close(self) -> None:
        """End of the log and the tracking."""
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
        """Part's share of a step's mean losses, by name; their gradients are added.

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
