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

from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling

from fastcov.watch.isolation import is_exporting, is_recomputing, run_by_python
from fastcov.watch.select import first_tensor

NO_GRADIENT = "no gradient reaches it: the tensor does not require one"
_INPUT_IN_COMPILED_CODE = (
    "the gradient of an input is not read in compiled code, where other modules that are given the "
    "same tensor cannot be seen; watch the output of the module before"
)
_NESTED_IN_COMPILED_CODE = "gradients of nested outputs are not read in compiled code"


class GradientReader(Protocol):
    """Methods and attributes that hooks use of :class:`fastcov.watch.watcher.Watcher`."""

    clock: Tensor
    train_only: bool
    is_reading: bool

    @property
    def root(self) -> Any:
        """Reference to the root module."""

    def watch_gradient(self, tap: int, tensor: Tensor) -> None:
        """Reads the gradient of a tensor, once it comes."""


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
    """Forward hook of the tap of a gradient. A copy (deepcopy, pickle) does nothing.

    Args:
        watcher: Reads the gradients; None for a copy.
        tap: Number of the tap.
    """

    def __init__(self, watcher: GradientReader | None, tap: int) -> None:
        self.watcher = watcher
        self._tap = tap
        with torch.inference_mode(False):
            self._key = torch.tensor(tap, device="cpu")  # a tensor: see observe_ in ops/library.py

    def __reduce__(self) -> tuple[type[GradientHook], tuple[None, int]]:
        return GradientHook, (None, self._tap)

    def output(self, module: nn.Module, args: Any, output: Any) -> Any:
        """Watches the gradient of a module's output; in compiled code, of a copy that replaces it.

        Returns:
            The output to go on with; None, the same.
        """
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
            torch.ops.fastcov.refuse_(watcher.clock, self._key, NO_GRADIENT)
            return None
        return _WATCHED.apply(output, watcher.clock, self._key)

    def input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Watches the gradient of a module's first input, positional or by keyword."""
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
                watcher.watch_gradient(self._tap, tensor)

    @staticmethod
    def _is_step(watcher: GradientReader) -> bool:
        root = watcher.root()
        is_evaluated = watcher.train_only and root is not None and not root.training
        return not (is_evaluated or is_exporting())


run_by_python(GradientHook.output, GradientHook.input)
