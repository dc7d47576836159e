"""Errors that a user can meet: each is one line with its remedy."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A setting that does not exist or has an impossible value."""


class DataError(ValueError):
    """Images or annotations that cannot be used as they are."""


class WidthsError(ValueError):
    """Widths that do not fit the detector they are meant for."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or that belongs to another run."""


class LossError(RuntimeError):
    """Training whose loss is no longer a finite number."""


class RunError(RuntimeError):
    """A training run that ended without a result."""


def closest(name: str, known: Iterable[str]) -> str:
    """End of an error about an unknown name: the closest known names, otherwise all of them."""
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    if near:
        return f"; did you mean {' or '.join(map(repr, near))}?"
    return f"; known are {', '.join(sorted(known))}"
