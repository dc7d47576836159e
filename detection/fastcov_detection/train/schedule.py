"""The learning rate as a pure function of the step: nothing to save, nothing to restore."""

from __future__ import annotations

import math

from torch import nn
from torch.optim import SGD, AdamW, Optimizer

from fastcov_detection.config import ConfigError, TrainConfig

_STEP_FACTOR = 0.1


def learning_rate(config: TrainConfig, step: int) -> float:
    """Rate of one step: a linear warm-up, then steps down by ten or a cosine.

    Args:
        config: ``lr``, ``warmup_steps``, ``schedule``, ``milestones``, ``final_lr``, ``steps``.
        step: Counted from 0.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps > 0 else 1.0
    if config.schedule == "step":
        passed = sum(step >= milestone * config.steps for milestone in config.milestones)
        return config.lr * warmup * _STEP_FACTOR**passed
    span = max(1, config.steps - config.warmup_steps)
    progress = min(1.0, max(0.0, (step - config.warmup_steps) / span))
    share = config.final_lr + (1 - config.final_lr) * (1 + math.cos(math.pi * progress)) / 2
    return config.lr * warmup * share


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


def calmer_settings(config: TrainConfig) -> str:
    """Options for the command line under which a run that left the finite numbers may go on."""
    clip = 10.0 if config.clip_norm is None else config.clip_norm / 2
    return f"--set lr={config.lr / 4:g} --set clip_norm={clip:g}"
