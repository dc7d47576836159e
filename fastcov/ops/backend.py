"""Backend: choice of the implementation (compiled library, Triton or plain torch) for a tensor.

Operators, layers and estimates all take :func:`service_of`. A test or a benchmark that pretends
another machine sets :data:`active`.
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
    """Implementation that serves rows of one dtype on one device, and its abilities.

    Attributes:
        kernels: "native" for the compiled library, "triton", or "torch" for plain torch.
        repeats_calls: True if one operator, with counters on the host, does all of a call that has
            the layout of the last one (:mod:`fastcov.stats.cursor`).
        counts_on_device: True if sampled rows can wait in a buffer whose counters are on the rows'
            device, so that a CUDA graph replays the sampling.
        has_compiled_gather: True if one compiled operator fills a buffer with counters on the
            device.
        is_host: True for a CPU, where adding a few rows to a state is cheap: caches hide the
            traffic.
    """

    kernels: Literal["native", "triton", "torch"]
    repeats_calls: bool
    counts_on_device: bool
    has_compiled_gather: bool
    is_host: bool


class Machine:
    """Machine as it is: finds the service of each dtype and device."""

    def service(self, dtype: torch.dtype, device: torch.device) -> Service:
        """Service of rows of a dtype on a device."""
        if device.type == "cpu":
            is_native = native.status()["cpu"].active
            # With Triton's interpreter the kernels that count on a GPU run on the CPU too.
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
    """Machine with one service for every tensor on any device: for tests and benchmarks.

    Args:
        service: The service.
    """

    def __init__(self, service: Service) -> None:
        self._service = service

    def service(self, dtype: torch.dtype, device: torch.device) -> Service:
        """Service of the constructor."""
        del dtype, device
        return self._service


GPU = Service("triton", False, counts_on_device=True, has_compiled_gather=False, is_host=False)
"""Service of a GPU that runs Triton's kernels."""

HOST = Service("torch", False, counts_on_device=False, has_compiled_gather=False, is_host=True)
"""Service of a CPU without the compiled library."""

active: Machine = Machine()
"""Machine whose services :func:`service_of` gives; settable."""


def service_of(dtype: torch.dtype, device: torch.device) -> Service:
    """Service of rows of a dtype on a device, by the :data:`active` machine."""
    return active.service(dtype, device)


def backends() -> dict[str, Backend]:
    """Backends by name, each with whether it is active and the reason.

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
