"""Temporary GPU memory of one update of a state, computed from sizes alone."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcov.ops.backend import service_of
from fastcov.rows.dtypes import ROW_DTYPES


def update_workspace_bytes(rows: Tensor, device: torch.device, *, is_weighted: bool = False) -> int:
    """Most bytes that one call of :func:`fastcov.ops.accumulate_` takes from a GPU's allocator.

    Mostly partial results of Triton's kernels, whose number follows the GPU's multiprocessors.

    Args:
        rows: Rows of the call, on any device: only sizes, strides and dtype are read. [..., C]
        device: Device on which the rows would be added. The meta device stands for an H100, if
            triton is installed.
        is_weighted: True if each row has a weight of its own.

    Returns:
        0 on a CPU, whose scratch memory is not torch's, and where plain torch takes Triton's place,
        whose temporaries are not counted: float64 rows, GPUs older than sm_80.

    Example:
        >>> update_workspace_bytes(torch.zeros(100, 8), torch.device("cpu"))
        0
    """
    from fastcov import kernels

    if device.type == "cuda" and service_of(rows.dtype, device).kernels == "triton":
        architecture = kernels.architecture_of(device)
    elif (
        device.type == "meta"
        and ROW_DTYPES[rows.dtype].triton_name is not None
        and kernels.unavailable_reason() is None
    ):
        architecture = kernels.Architecture("sm_90", multiprocessors=132)
    else:
        return 0
    return kernels.workspace_bytes(rows, is_weighted=is_weighted, architecture=architecture)
