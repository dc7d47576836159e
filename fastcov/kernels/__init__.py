"""Triton kernels and their launchers, nothing else; the only place that imports triton.

Importing this package imports no triton: the launchers do when they are first looked up, so that a
machine without a GPU never loads it.

===============  ====================================================================
covariance.py    launch_accumulate_: one update of one state (gram, block, reduce, shift)
job.py           launches of one update, decided by the layout of its rows
gather.py        launch_gather_, launch_cursor_gather_: sampled rows into a buffer
flush.py         launch_flush_: all full buffers into their states, one launch
layout, plan,    pure: strides, grids, tile shapes, rates of a GPU
config, gpus
launch.py        starting kernels; the GPU that a tensor lies on
launcher.py      the function in C that starts a kernel, behind Triton's Python
panels, tiles    device code that the kernels share
===============  ====================================================================
"""

from __future__ import annotations

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fastcov.kernels.config import Architecture as Architecture
    from fastcov.kernels.covariance import Accumulation as Accumulation
    from fastcov.kernels.covariance import launch_accumulate_ as launch_accumulate_
    from fastcov.kernels.covariance import workspace_bytes as workspace_bytes
    from fastcov.kernels.flush import BufferedLayer as BufferedLayer
    from fastcov.kernels.flush import FlushTable as FlushTable
    from fastcov.kernels.flush import launch_flush_ as launch_flush_
    from fastcov.kernels.gather import CURSOR_FIELDS as CURSOR_FIELDS
    from fastcov.kernels.gather import launch_cursor_gather_ as launch_cursor_gather_
    from fastcov.kernels.gather import launch_gather_ as launch_gather_
    from fastcov.kernels.launch import architecture_of as architecture_of

_HOMES = {
    "Accumulation": "covariance",
    "Architecture": "config",
    "BufferedLayer": "flush",
    "CURSOR_FIELDS": "gather",
    "FlushTable": "flush",
    "architecture_of": "launch",
    "launch_accumulate_": "covariance",
    "launch_cursor_gather_": "gather",
    "launch_flush_": "flush",
    "launch_gather_": "gather",
    "workspace_bytes": "covariance",
}
__all__ = ["unavailable_reason", *_HOMES]


def unavailable_reason() -> str | None:
    """Reason why the kernels cannot run here, or None; imports nothing and asks no GPU."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed; it comes with CUDA builds of torch"
    return None


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
