"""Triton kernels and their launchers, nothing else; the only place that imports triton.

Importing this package imports no triton: the launchers do when they are first looked up, so that a
machine without a GPU never loads it.

===============  ====================================================================
covariance.py    launch_accumulate_: one update of one state (gram, block, reduce, shift)
job.py           what the layout of its rows decides about these launches
gather.py        launch_gather_, launch_cursor_gather_: sampled rows into a buffer
flush.py         launch_flush_: all full buffers into their states, one launch
layout, plan,    pure: strides, grids, tile shapes
config
device.py        the GPU that a tensor lies on
chains, panels,  device code that the kernels share
tiles
===============  ====================================================================
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcov.kernels.config import Architecture
    from fastcov.kernels.covariance import Accumulation, launch_accumulate_, workspace_bytes
    from fastcov.kernels.device import architecture_of
    from fastcov.kernels.flush import BufferedLayer, FlushTable, launch_flush_
    from fastcov.kernels.gather import CURSOR_FIELDS, launch_cursor_gather_, launch_gather_

__all__ = [
    "CURSOR_FIELDS",
    "Accumulation",
    "Architecture",
    "BufferedLayer",
    "FlushTable",
    "architecture_of",
    "launch_accumulate_",
    "launch_cursor_gather_",
    "launch_flush_",
    "launch_gather_",
    "unavailable_reason",
    "workspace_bytes",
]

_HOMES = {
    "Accumulation": "covariance",
    "Architecture": "config",
    "CURSOR_FIELDS": "gather",
    "BufferedLayer": "flush",
    "FlushTable": "flush",
    "architecture_of": "device",
    "launch_accumulate_": "covariance",
    "launch_cursor_gather_": "gather",
    "launch_flush_": "flush",
    "launch_gather_": "gather",
    "workspace_bytes": "covariance",
}


def unavailable_reason() -> str | None:
    """Why the kernels cannot run here, or None; imports nothing and asks no GPU."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with CUDA builds of torch"
    return None


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
