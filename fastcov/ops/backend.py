"""The one answer to "what serves this tensor".

Operators, layers and estimates ask :func:`service_of`. A test or a benchmark that pretends another
machine sets :data:`active`.
"""

from __future__ import annotations

import os
from functools import cache
from typing import Literal, NamedTuple

import torch

from fastcov.ops import native
from fastcov.ops.native import Backend
from fastcov.rows.dtypes import ROW_DTYPES


class Service(NamedTuple):
    """How rows of one dtype on one device are served.

    Attributes:
        kernels: "native" for the compiled library, "triton", or "torch" for plain torch.
        repeats_calls: True if one operator does all of a call that is laid out like the last one,
            on counters of the host.
        counts_on_device: True if sampled rows can wait in a buffer whose counters are on their
            device, so that a CUDA graph replays the sampling.
        has_compiled_gather: True if such a buffer is filled by one compiled operator.
        is_host: True if adding a few rows to a state is cheap: a CPU's caches hide the traffic.
    """

    kernels: Literal["native", "triton", "torch"]
    repeats_calls: bool
    counts_on_device: bool
    has_compiled_gather: bool
    is_host: bool


class Machine:
    """Services of the machine as it is."""

    def service(self, dtype: torch.dtype, device: torch.device) -> Service:
        """How rows of a dtype on a device are served."""
        if device.type == "cpu":
            is_native = native.status()["cpu"].active
            # Triton's interpreter stands for a GPU, of which it runs the kernels with counters.
            is_interpreted = os.environ.get("TRITON_INTERPRET") == "1"
            return Service(
                "native" if is_native else "torch",
                repeats_calls=is_native,
                counts_on_device=is_interpreted and _takes_triton(dtype),
                has_compiled_gather=False,
                is_host=True,
            )
        is_served = _takes_triton(dtype) and device.type == "cuda" and _runs_triton(device)
        return Service(
            "triton" if is_served else "torch",
            repeats_calls=False,
            counts_on_device=is_served,
            has_compiled_gather=is_served and native.status()["cuda"].active,
            is_host=False,
        )


class Pretended(Machine):
    """One service for every tensor, wherever it lies: for tests and benchmarks.

    Args:
        service: The service to answer with.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    def service(self, dtype: torch.dtype, device: torch.device) -> Service:
        """The service that was given."""
        del dtype, device
        return self._service


GPU = Service("triton", False, counts_on_device=True, has_compiled_gather=False, is_host=False)
"""Service of a GPU that runs Triton's kernels."""

HOST = Service("torch", False, counts_on_device=False, has_compiled_gather=False, is_host=True)
"""Service of a CPU whose operators repeat no call."""

active: Machine = Machine()
"""The machine that :func:`service_of` answers for; settable."""


def service_of(dtype: torch.dtype, device: torch.device) -> Service:
    """How rows of a dtype on a device are served."""
    return active.service(dtype, device)


def backends() -> dict[str, Backend]:
    """What is active and why: the compiled libraries and Triton.

    Returns:
        ``cpu`` and ``cuda`` for the compiled libraries, ``triton`` for the GPU kernels; each with
        ``active`` and a ``reason``. Plain torch takes the place of those that are not active.

    Example:
        >>> sorted(backends())
        ['cpu', 'cuda', 'triton']
    """
    return {**native.status(), "triton": _triton()}


def _takes_triton(dtype: torch.dtype) -> bool:
    return dtype in ROW_DTYPES and ROW_DTYPES[dtype].triton_name is not None


@cache
def _triton() -> Backend:
    if not torch.cuda.is_available():
        return Backend(False, "no CUDA device")
    if "triton" not in native.allowed_backends():
        return Backend(False, "excluded by FASTCOV_BACKEND")
    from fastcov import kernels

    reason = kernels.unavailable_reason()
    return Backend(reason is None, reason or "compiled on first use for this GPU")


@cache
def _runs_triton(device: torch.device) -> bool:
    return _triton().active and torch.cuda.get_device_capability(device) >= (8, 0)
