"""The GPU that a tensor lies on: its kind, and whether it is the current one."""

from __future__ import annotations

from functools import lru_cache

import torch

from fastcov.kernels.config import Architecture
from fastcov.kernels.tiles import IS_INTERPRETED


@lru_cache
def architecture_of(device: torch.device) -> Architecture:
    """Kind of GPU that a tensor lies on; the interpreter stands for an sm_90 of two."""
    if IS_INTERPRETED:
        return Architecture("sm_90", 2)
    properties = torch.cuda.get_device_properties(device)
    return Architecture.of((properties.major, properties.minor), properties.multi_processor_count)


def is_current(device: int) -> bool:
    """Whether kernels are launched on a device without more ado: a CPU's number is -1.

    It nearly always is: to make it the current one and change back takes 0.8 us of every hook.
    """
    return device < 0 or device == torch.cuda.current_device()
