"""Errors of the detection package that belong to no single module."""

from __future__ import annotations


class DataError(ValueError):
    """Images or annotations that cannot be used as they are."""


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be read, or that belongs to another run."""
