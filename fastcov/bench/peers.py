"""Peers: other libraries that can do this work, which no other file imports.

A peer that cannot run is named with its reason, never silently left out.
"""

from __future__ import annotations

import importlib
import logging
import os
import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from importlib import metadata
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from fastcov.bench.contest import Setting
from fastcov.rows.view import Layout
from fastcov.watch.select import Tap

DELVE_VERSION = "0.1.50"

Result = TypeVar("Result")


class MissingPeerError(Exception):
    """Error of a peer that cannot run here; its message is the reason."""


@cache
def _module(name: str, package: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(name)
    except ImportError as error:
        raise MissingPeerError(f"not installed (pip install {package}): {error}") from error


def find(setting: Setting, name: str, make: Callable[[], Result]) -> Result | None:
    """Result of ``make()``; None if it fails, with the reason noted in ``setting.missing``."""
    try:
        return make()
    except MissingPeerError as missing:
        _note(setting, name, str(missing))
    except Exception as error:  # a peer that breaks must not end the benchmark, nor vanish
        reason = (str(error).strip().splitlines() or ["no message"])[0]
        _note(setting, name, f"failed: {type(error).__name__}: {reason[:200]}")
    return None


def _note(setting: Setting, name: str, reason: str) -> None:
    known = setting.missing.get(name)
    if known is None or reason not in known:
        setting.missing[name] = reason if known is None else f"{known}; {reason}"


# Second moments. Each peer is a function of the device that returns a maker of running moments, so
# that compiled code and imports are shared by all states of a contest.


class Moment(NamedTuple):
    """A running second moment.

    Attributes:
        update: Addition of rows, given as a view. [..., C]
        gram: Unnormalised second moment so far. [C, C]
    """

    update: Callable[[Tensor], object]
    gram: Callable[[], Tensor]


MomentMaker = Callable[[int], Moment]


def mm_moment(device: torch.device) -> MomentMaker:
    """torch.mm of the full square with a float32 result: the shortest code that is right."""

    def make(channels: int) -> Moment:
        gram = torch.zeros(channels, channels, device=device)

        def update(rows: Tensor) -> None:
            flat = rows.reshape(-1, channels)
            if flat.dtype == torch.float32:
                gram.add_(torch.mm(flat.T, flat))
            elif device.type == "cuda":
                gram.add_(torch.mm(flat.T, flat, out_dtype=torch.float32))
            else:
                raise MissingPeerError("torch.mm gives no float32 from half precision on a CPU")

        return Moment(update, lambda: gram)

    return make


def cast_moment(device: torch.device) -> MomentMaker:
    """Float32 copy and addmm, as a careful user writes it."""

    def make(channels: int) -> Moment:
        gram = torch.zeros(channels, channels, device=device)

        def update(rows: Tensor) -> None:
            flat = rows.reshape(-1, channels).float()
            gram.addmm_(flat.T, flat)

        return Moment(update, lambda: gram)

    return make


def compiled_moment(device: torch.device) -> MomentMaker:
    """Float32 copy and matmul, under torch.compile."""

    def naive(gram: Tensor, rows: Tensor) -> None:
        flat = rows.reshape(-1, rows.shape[-1]).float()
        gram.add_(flat.T @ flat)

    function = compiled(naive)

    def make(channels: int) -> Moment:
        gram = torch.zeros(channels, channels, device=device)
        return Moment(lambda rows: function(gram, rows), lambda: gram)

    return make


def torchmetrics_moment(device: torch.device) -> MomentMaker:
    """FrechetInceptionDistance.update over given features: a float64 copy and matmul."""
    fid = _module("torchmetrics.image.fid", "torchmetrics")

    def make(channels: int) -> Moment:
        class Features(nn.Module):
            num_features = channels

            def forward(self, rows: Tensor) -> Tensor:
                return rows.reshape(-1, channels)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            metric = fid.FrechetInceptionDistance(feature=Features()).to(device)
        return Moment(
            lambda rows: metric.update(rows, real=True), lambda: metric.real_features_cov_sum
        )

    return make


def delve_moment(device: torch.device) -> MomentMaker:
    """TorchCovarianceMatrix.update of delve: a float64 copy and matmul."""
    package = _delve()

    def make(channels: int) -> Moment:
        moment = package.torch_utils.TorchCovarianceMatrix(device=str(device))
        return Moment(
            lambda rows: moment.update(rows.reshape(-1, channels), False), lambda: moment._cov_mtx
        )

    return make


MOMENT_PEERS: dict[str, Callable[[torch.device], MomentMaker]] = {
    "torch.mm": mm_moment,
    "cast + addmm": cast_moment,
    "torchmetrics": torchmetrics_moment,
    "delve": delve_moment,
}
"""Peers of second moments in every run."""

COMPILED_MOMENT_PEERS: dict[str, Callable[[torch.device], MomentMaker]] = {
    "torch.compile": compiled_moment,
}
"""Peers of second moments in full runs alone: each new shape is compiled for seconds."""


def compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """torch.compile without a shared code cache: no contender runs code compiled for another."""
    inductor = _module("torch._inductor.compile_fx", "torch")

    def backend(graph: Any, inputs: Any) -> Any:
        return inductor.compile_fx(graph, inputs)

    result: Callable[..., Any] = torch.compile(function, backend=backend)
    return result


def _delve() -> Any:
    package = _module("delve", f"delve=={DELVE_VERSION}")
    logging.getLogger("delve.logger").setLevel(logging.WARNING)  # it announces every layer
    version = metadata.version("delve")
    if version != DELVE_VERSION:
        raise MissingPeerError(f"found {version}, comparisons are with {DELVE_VERSION}")
    return package


def hook_naively(taps: Sequence[tuple[Tap, nn.Module]]) -> dict[str, Tensor]:
    """Full-gram hooks as people write them: a float32 addmm of every position.

    Args:
        taps: Outputs to watch, with their modules.

    Returns:
        Running second moments by name, filled as forwards run. [C, C]
    """
    grams: dict[str, Tensor] = {}

    def hook(tap: Tap) -> Callable[..., None]:
        is_first = tap.layout is Layout.CHANNELS_FIRST

        def add(_module: nn.Module, _args: Any, output: Any) -> None:
            features = (output[0] if isinstance(output, tuple) else output).detach()
            if is_first:
                features = features.movedim(1, -1)
            rows = features.reshape(-1, features.shape[-1]).float()
            if tap.name not in grams:
                width = rows.shape[1]
                grams[tap.name] = torch.zeros(width, width, device=rows.device)
            with torch.autocast(rows.device.type, enabled=False):
                grams[tap.name].addmm_(rows.T, rows)

        return add

    for tap, module in taps:
        module.register_forward_hook(hook(tap))
    return grams


def hook_delve(model: nn.Module, device: torch.device) -> Any:
    """SaturationTracker of delve on a model: every position of every convolution and Linear."""
    package = _delve()
    return package.SaturationTracker(
        tempfile.mkdtemp(prefix="fastcov-bench-"),
        save_to="csv",
        modules=model,
        stats=["lsat"],
        device=str(device),
        timeseries_method="last_timestep",
    )


# Eigenvalues. Each peer is a function of a list of matrices.


def linalg_loop(matrices: Sequence[Tensor]) -> list[Tensor]:
    """torch.linalg.eigvalsh, one call for each entry: a batch, or one matrix."""
    return [torch.linalg.eigvalsh(matrix) for matrix in matrices]


def jax_eigvalsh(device: torch.device) -> Callable[[Sequence[Tensor]], Callable[[], Any]]:
    """JAX's jitted jax.numpy.linalg.eigvalsh.

    Returns:
        Function that puts matrices on JAX's device and returns a call that waits for the
        eigenvalues.
    """
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    jax = _module("jax", "jax")
    platform = "gpu" if device.type == "cuda" else "cpu"
    try:
        target = jax.devices(platform)[0]
    except RuntimeError as error:
        raise MissingPeerError(f"jax has no {platform} device here") from error
    jax.config.update("jax_enable_x64", True)
    eigenvalues = jax.jit(jax.numpy.linalg.eigvalsh)

    def prepare(matrices: Sequence[Tensor]) -> Callable[[], Any]:
        arrays = [jax.device_put(matrix.cpu().numpy(), target) for matrix in matrices]
        return lambda: jax.block_until_ready([eigenvalues(array) for array in arrays])

    return prepare


def cupy_eigvalsh(device: torch.device) -> Callable[[Sequence[Tensor]], Callable[[], Any]]:
    """CuPy's cupy.linalg.eigvalsh, which has a batched solver."""
    if device.type != "cuda":
        raise MissingPeerError("needs a GPU")
    cupy = _module("cupy", "cupy-cuda13x")

    def prepare(matrices: Sequence[Tensor]) -> Callable[[], Any]:
        arrays = [cupy.from_dlpack(matrix.contiguous()) for matrix in matrices]

        def solve() -> Any:
            with cupy.cuda.ExternalStream(torch.cuda.current_stream().cuda_stream):
                return [cupy.linalg.eigvalsh(array) for array in arrays]

        return solve

    return prepare


EigenvalueSolver = Callable[[Sequence[Tensor]], Callable[[], Any]]

EIGENVALUE_PEERS: dict[str, Callable[[torch.device], EigenvalueSolver]] = {
    "jax": jax_eigvalsh,
    "cupy": cupy_eigvalsh,
}
