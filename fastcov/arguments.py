"""Checks of arguments that public functions have in common."""

from __future__ import annotations

import numbers
import os
import re
from collections.abc import Callable
from pathlib import Path

from torch import Tensor, nn


def check_model(model: object) -> None:
    """Check that ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}, expected a torch.nn.Module")


def check_of(of: object) -> None:
    """Check of the argument ``of``."""
    _check_choice("of", of, ("activation", "gradient", "both"))


def check_out(out: object) -> None:
    """Check that snapshots can be written to ``out``; its folder is made, before any step is lost.

    Raises:
        TypeError: If ``out`` is neither None nor a path.
        OSError: If the folder cannot be made or written to.
    """
    if out is None:
        return
    if not isinstance(out, (str, os.PathLike)):
        raise TypeError(f"out is a {type(out).__name__}, expected the path of a folder")
    folder = Path(out)
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"out={str(folder)!r} is a file; give a folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise OSError(
            error.errno,
            f"out={str(folder)!r} cannot be made: {error.strerror}; give a folder that this "
            "process may write to",
        ) from error
    if not os.access(folder, os.W_OK):
        raise PermissionError(
            f"out={str(folder)!r} cannot be written to; give a folder that this process may write"
        )


def check_observed(name: object, tensor: object, channel_dim: object) -> None:
    """Check of the arguments of :meth:`fastcov.Tracker.observe`."""
    if not isinstance(name, str) or not isinstance(tensor, Tensor):
        raise TypeError(
            f"observe({name!r}, {type(tensor).__name__}): give a name and a tensor, as "
            'tracker.observe("heads", x)'
        )
    if not name:
        raise ValueError("observe(''): give a name that is not empty")
    if not tensor.is_floating_point():
        raise TypeError(f"observe({name!r}): the tensor is {tensor.dtype}, expected floating point")
    is_int = isinstance(channel_dim, int) and not isinstance(channel_dim, bool)
    if not is_int or not -tensor.dim() <= int(str(channel_dim)) < tensor.dim():
        raise ValueError(
            f"observe({name!r}, channel_dim={channel_dim!r}): the tensor has shape "
            f"{list(tensor.shape)}; give one of its dimensions"
        )


def loss_scale_of(unscale: object) -> Callable[[], float] | None:
    """Function that gives the factor of the loss, from the argument ``unscale``."""
    if unscale is None:
        return None
    function = getattr(unscale, "get_scale", unscale)
    if not callable(function):
        raise TypeError(
            f"unscale={unscale!r}: give a torch.amp.GradScaler, or a function that returns the "
            "factor by which the loss is scaled"
        )
    return function


def check_reading(where: object, weighting: object, max_channels: object) -> None:
    """Check of the arguments ``where``, ``weighting`` and ``max_channels``."""
    _check_choice("where", where, ("output", "input", "both"))
    _check_choice("weighting", weighting, ("position", "image"))
    if isinstance(max_channels, bool) or not isinstance(max_channels, int):
        raise TypeError(f"max_channels={max_channels!r}: give an int")
    if max_channels < 1:
        raise ValueError(f"max_channels={max_channels}: must be at least 1")


def bytes_of(argument: str, value: object) -> int:
    """Number of bytes, from an int or a text such as "2GiB" or "500 MB".

    Raises:
        TypeError: If ``value`` is neither.
        ValueError: If it is no such text, or not above 0.

    Example:
        >>> bytes_of("memory", "1.5GiB"), bytes_of("memory", "2 kB")
        (1610612736, 2000)
    """
    if isinstance(value, bool) or not isinstance(value, (int, str)):
        raise TypeError(f'{argument}={value!r}: give a number of bytes, or a text such as "2GiB"')
    count: float = 0
    if isinstance(value, int):
        count = value
    elif found := re.fullmatch(r"\s*([0-9.]+)\s*([kmgt]?)(i?)b?\s*", value, re.IGNORECASE):
        digits, prefix, binary = found.groups()
        power = " KMGT".index(prefix.upper() or " ")
        try:
            count = float(digits) * (1024 if binary else 1000) ** power
        except ValueError:
            count = 0
    if count < 1:
        raise ValueError(
            f'{argument}={value!r}: give a number of bytes above 0, or a text such as "2GiB"'
        )
    return int(count)


def check_steps(argument: str, value: object) -> None:
    """Check that an argument is a number of steps, an int of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ValueError(f"{argument}={value!r}: give a number of steps of at least 1")


def whole_number(value: object) -> int | None:
    """Int of the same value: of an int or an integer of numpy; None of anything else, as of a bool.

    Example:
        >>> whole_number(8), whole_number(8.0), whole_number(True)
        (8, None, None)
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        return None
    return int(value)


def check_decay(decay: object) -> None:
    """Check that ``decay`` is None or a number in (0, 1)."""
    if decay is None:
        return
    if isinstance(decay, bool) or not isinstance(decay, (int, float)):
        raise TypeError(f"decay={decay!r}: give a number in (0, 1), or None to keep everything")
    if not 0 < decay < 1:
        raise ValueError(f"decay={decay!r}: must be in (0, 1), or None to keep everything")


def _check_choice(argument: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{argument}={value!r}: choose one of {', '.join(map(repr, choices))}")
