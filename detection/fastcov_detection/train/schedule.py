"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import logging
import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fastcov_detection.config import ConfigError, TrainConfig
from fastcov_detection.detector.backbone import unusual_groups

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
    """Steps between evaluations; 0 where a run is evaluated at its end only.

    Args:
        config: ``evaluate_every``, or else ``evaluate_epochs`` and ``batch_size``.
        images: Of training.
    """
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
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    filled = [group for group in groups if group["params"]]
    # One kernel for all parameters: 5 ms a step in place of 10 for 160 small tensors.
    if config.optimizer == "adamw":
        return AdamW(filled, lr=config.lr, fused=True)
    if config.optimizer != "sgd":
        raise ConfigError(f"optimizer is {config.optimizer!r}; choose sgd or adamw")
    return SGD(filled, lr=config.lr, momentum=config.momentum, nesterov=config.nesterov, fused=True)


def set_learning_rate(optimizer: Optimizer, rate: float) -> None:
    """Gives every parameter group the same rate."""
    for group in optimizer.param_groups:
        group["lr"] = rate


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
