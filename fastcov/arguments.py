"""Checks of what :func:`fastcov.track` and :func:`fastcov.estimate` are given alike."""

from __future__ import annotations

from torch import nn


def check_model(model: object) -> None:
    """Refuses what is no module.

    Raises:
        TypeError: With what it is.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")


def check_reading(where: object, weighting: object, max_channels: object) -> None:
    """Checks choices and limits of :func:`fastcov.track`.

    Raises:
        TypeError: If ``max_channels`` is of the wrong type.
        ValueError: If one is out of range, or not among the choices.
    """
    _check_choice("where", where, ("output", "input", "both"))
    _check_choice("weighting", weighting, ("position", "image"))
    if isinstance(max_channels, bool) or not isinstance(max_channels, int):
        raise TypeError(f"max_channels={max_channels!r}: give an int")
    if max_channels < 1:
        raise ValueError(f"max_channels={max_channels}: must be at least 1")


def check_steps(argument: str, value: object) -> None:
    """Refuses what is no number of steps.

    Raises:
        ValueError: With the argument and its value.
    """
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument}={value!r}: give a number of steps of at least 1")


def check_decay(decay: object) -> None:
    """Refuses what is no factor on the past.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is out of range.
    """
    if decay is None:
        return
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise TypeError(f"decay={decay!r}: give a number in (0, 1), or None to keep everything")
    if not 0 < decay < 1:
        raise ValueError(f"decay={decay!r}: must be in (0, 1), or None to keep everything")


def _check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument}={value!r}: choose one of {', '.join(map(repr, choices))}")
