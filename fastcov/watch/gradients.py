"""Hooks that read the gradient of the loss with respect to watched tensors.

Eagerly a forward hook registers a hook on the tensor, which autograd calls with the tensor's whole
gradient, whatever consumes the tensor, also where an in-place operation has changed it since. The
activations of a checkpointed region that is run again by the backward pass (``use_reentrant=True``)
get their hooks then; where the first activations take part in the backward pass, the gradient never
reaches those of the second run. So each gradient is read once.

Compiled code has no hooks on tensors. There the module's output is replaced by a copy, which the
compiler merges with its neighbours, and the copy's backward passes the gradient to an operator.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock, get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastcov.rows.mask import RowMask
from fastcov.rows.view import plain_tensor
from fastcov.watch.isolation import (
    is_exporting,
    is_recomputing,
    is_transformed,
    outside_modes,
    run_by_python,
)
from fastcov.watch.select import first_tensor
from fastcov.watch.steps import RunningStep
from fastcov.watch.taps import NO_MODULE, Taps, WatchedTap

_NO_GRADIENT = "no gradient reaches it: the tensor does not require one"
_INPUT_IN_COMPILED_CODE = (
    "the gradient of an input is not read in compiled code, where other modules that are given the "
    "same tensor cannot be seen; watch the output of the module before"
)
_NESTED_IN_COMPILED_CODE = "gradients of nested outputs are not read in compiled code"


class Gradients:
    """Reader of the gradients of watched tensors, which come after their step's forward.

    The step of their layers ends when the next one begins, or when they are shown.

    Args:
        taps: The watched taps.
        unscale: Function that gives the factor by which the loss is scaled; None is 1.

    Attributes:
        is_reading: True if the last forward's gradients are read.
    """

    def __init__(self, taps: Taps, unscale: Callable[[], float] | None) -> None:
        self.is_reading = False
        self._taps = taps
        self._unscale = unscale
        self._loss_scale: float | None = None  # of the running step
        self._has_half = False
        self._is_settled = True
        self._is_closed = False
        self._lock = Lock()  # a backward pass has a thread for each device
        self._leaf_handles: list[Any] = []  # hooks on tensors that outlive the step

    def __getstate__(self) -> dict[str, Any]:
        # Left out, because they cannot be pickled: the user's function, the lock and the hooks.
        return {**self.__dict__, "_unscale": None, "_lock": None, "_leaf_handles": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = Lock()

    def begin_step(self, is_read: bool, running: RunningStep) -> None:
        """End of the step before, and start of the one whose forward begins."""
        self.settle(running)
        self.is_reading = is_read
        self._loss_scale = None
        for handle in self._leaf_handles:
            handle.remove()
        self._leaf_handles.clear()
        if is_read:
            for layer in self._taps.gradient_layers:
                layer.begin_step(running.steps.done)

    def settle(self, running: RunningStep) -> None:
        """End of the step of the gradients that have come, so that they can be shown."""
        if not self._is_settled:
            with self._lock, outside_modes():
                self._is_settled = True
                running.end_layers(self._taps.gradient_layers)

    def watch(
        self, tap: int, tensor: Tensor, running: RunningStep, channel_dim: int | None = None
    ) -> None:
        """Reading of the gradient of a tensor of the running step, once it comes.

        The channels' dimension is given for tensors that the user names; else the tap's layout
        tells.
        """
        watched, notes = self._taps[tap], self._taps.notes
        is_again = is_recomputing()
        if watched.is_given_up or (is_again and not self.is_reading):
            return
        if not is_again and get_ident() != running.steps.thread:
            return
        name = watched.tap.name
        if running.steps.is_captured:
            notes[name] = "not read by replays of a CUDA graph: gradients are read by the host"
        elif is_transformed():
            notes[name] = "gradients under torch.func are not read"
        elif tensor.requires_grad:
            hook = partial(self._take, watched, running, running.row_mask, channel_dim=channel_dim)
            handle = tensor.register_hook(hook)
            if tensor.grad_fn is None:
                self._leaf_handles.append(handle)
        elif not is_again:
            notes.setdefault(name, _NO_GRADIENT)

    def observe(self, tap: int, gradient: Tensor, running: RunningStep) -> None:
        """Reading of the gradient of a tensor of compiled code."""
        if self.is_reading:
            self._take(self._taps[tap], running, running.row_mask, gradient)

    def remark(self) -> str:
        """Remark on gradients that may be scaled; empty where all is well."""
        if not self._has_half or self._unscale is not None:
            return ""
        return (
            "gradients in float16 were read as they came: where a GradScaler scales the loss, "
            "pass track(..., unscale=scaler)"
        )

    def close(self) -> None:
        """End of the reading of gradients, those of the last forward among them."""
        self._is_closed = True

    def _take(
        self,
        watched: WatchedTap,
        running: RunningStep,
        mask: RowMask | None,
        gradient: Tensor,
        channel_dim: int | None = None,
    ) -> None:
        if self._is_closed or watched.is_given_up:
            return
        try:
            with self._lock, outside_modes():
                if channel_dim is not None:
                    gradient = gradient.movedim(channel_dim, -1)
                self._read(watched, mask, gradient)
        except Exception as error:
            self._taps.fail(watched.routes.layer, error, running.step)

    def _read(self, watched: WatchedTap, mask: RowMask | None, gradient: Tensor) -> None:
        taps, routes, name = self._taps, watched.routes, watched.tap.name
        if self._is_settled:
            self._is_settled = False
            for layer in taps.gradient_layers:
                layer.begin_step(layer.step)
        if taps.notes.get(name) == _NO_GRADIENT:
            del taps.notes[name]
        self._has_half |= gradient.dtype is torch.float16
        is_simple = mask is None and self._unscale is None and type(gradient) is Tensor
        if is_simple and routes.take_known(gradient, NO_MODULE, ()):
            return
        found = plain_tensor(gradient)
        if isinstance(found, str):
            taps.notes[name] = found
            return
        plain = found[0]
        if self._unscale is not None:
            if self._loss_scale is None:
                self._loss_scale = float(self._unscale())  # waits for a GPU, once a step
            plain = plain.to(torch.promote_types(plain.dtype, torch.float32)) / self._loss_scale
        taps.read_gradient(watched, plain, mask, is_kept=is_simple and plain is gradient)


class GradientReader(RunningStep, Protocol):
    """Methods and attributes that hooks use of :class:`fastcov.watch.watcher.Watcher`."""

    clock: Tensor
    train_only: bool
    is_reading: bool
    gradients: Gradients

    @property
    def root(self) -> Any:
        """Reference to the root module."""


class _Watched(torch.autograd.Function):
    # Copy of a tensor that passes its gradient to the watcher. A view would forbid the in-place
    # operators that often follow a layer.

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, clock: Tensor, key: Tensor) -> Tensor:
        ctx.clock, ctx.key = clock, key
        return tensor.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        torch.ops.fastcov.observe_gradient_(ctx.clock, ctx.key, gradients[0])
        return gradients[0], None, None


_WATCHED: Any = _Watched  # autograd's functions have no types


class GradientHook:
    """Forward hook of a gradient's tap. A copy (deepcopy, pickle) has no watcher, and is idle."""

    def __init__(self, watcher: GradientReader | None, tap: int) -> None:
        self.watcher = watcher
        self._tap = tap
        with torch.inference_mode(False):
            self._key = torch.tensor(tap, device="cpu")  # a tensor: see observe_ in ops/library.py

    def __reduce__(self) -> tuple[type[GradientHook], tuple[None, int]]:
        return GradientHook, (None, self._tap)

    def output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Hook on the gradient of a module's output; compiled code gets a copy in its place."""
        watcher = self.watcher
        if watcher is None:
            return None
        if not is_compiling():
            self._watch(watcher, output)
            return None
        if not self._is_step(watcher):
            return None
        if not isinstance(output, Tensor):
            torch.ops.fastcov.refuse_(watcher.clock, self._key, _NESTED_IN_COMPILED_CODE)
            return None
        if not output.requires_grad:
            torch.ops.fastcov.refuse_(watcher.clock, self._key, _NO_GRADIENT)
            return None
        return _WATCHED.apply(output, watcher.clock, self._key)

    def input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Hook on the gradient of a module's first input, positional or by keyword."""
        watcher = self.watcher
        if watcher is None:
            return
        if not is_compiling():
            self._watch(watcher, (args, kwargs))
        elif self._is_step(watcher):
            torch.ops.fastcov.refuse_(watcher.clock, self._key, _INPUT_IN_COMPILED_CODE)

    def _watch(self, watcher: GradientReader, value: Any) -> None:
        if watcher.is_reading or is_recomputing():
            tensor = first_tensor(value)
            if tensor is not None:
                watcher.gradients.watch(self._tap, tensor, watcher)

    @staticmethod
    def _is_step(watcher: GradientReader) -> bool:
        root = watcher.root()
        is_evaluated = watcher.train_only and root is not None and not root.training
        return not (is_evaluated or is_exporting())


run_by_python(GradientHook.output, GradientHook.input)
