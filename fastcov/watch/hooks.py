"""Forward hooks: each passes its module's tensor to the tap's route, eagerly and compiled."""

from __future__ import annotations

import sys
from collections.abc import Callable
from threading import get_ident
from types import FrameType
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.modules import module as module_hooks

from fastcov.ops.library import Observer
from fastcov.rows.view import unreadable_type
from fastcov.stats.route import Routes
from fastcov.watch.isolation import (
    is_exporting,
    is_recomputing,
    is_undisturbed,
    run_by_python,
)
from fastcov.watch.masking import MaskSource
from fastcov.watch.select import first_complex, first_tensor
from fastcov.watch.steps import Steps
from fastcov.watch.taps import Taps

REPLICA = "runs as a replica of nn.DataParallel, which is not read: use DistributedDataParallel"


class Reader(Observer, Protocol):
    """Methods and attributes that hooks use of :class:`fastcov.watch.watcher.Watcher`."""

    root: Callable[[], nn.Module | None]
    clock: Tensor
    train_only: bool
    mask: MaskSource | None
    is_reading: bool
    is_skipping: bool
    steps: Steps
    taps: Taps

    def observe(
        self,
        tap: int,
        activation: Tensor,
        batch_dims: int = 0,
        *,
        module: nn.Module | None = None,
        args: Any = (),
    ) -> None:
        """Reading of the activation of a call that no route has taken."""

    def fail(self, tap: int, error: Exception) -> None:
        """End of the reading of a tap's layer, after an error."""

    def begin_step(self, counts: bool = True, is_nested: bool = False) -> None:
        """Start of a forward of the root."""

    def fail_all(self, error: Exception) -> None:
        """End of the reading of all layers."""

    def close(self) -> None:
        """Removal of the hooks."""


class Gate:
    """Switch that opens the fast path (the routes) for all hooks of a tracker.

    Attributes:
        thread: Identity of the one thread whose calls take their routes. 0 closes the fast path:
            while nothing is read, and while a CUDA graph captures, whose calls are all checked.
    """

    __slots__ = ("thread",)

    def __init__(self) -> None:
        self.thread = 0


_CLOSED = Gate()


class Hook:
    """Forward hook of one tap. A copy (deepcopy, pickle: EMA, checkpoints) does nothing.

    torch.compile traces the hook into an operator only where the forward is a step: with
    ``train_only``, a model in evaluation mode compiles to the graph that it has without a tracker.
    torch.export leaves no trace of the hook.

    Args:
        watcher: Reads the activations that no route takes; None for a copy.
        tap: Number of the tap.
        gate: Switch that all hooks of the tracker share.

    Attributes:
        routes: Routes of the tap, set by the watcher.
    """

    routes: Routes

    def __init__(self, watcher: Reader | None, tap: int, gate: Gate = _CLOSED) -> None:
        self.watcher = watcher
        self._tap = tap
        self._gate = gate
        with torch.inference_mode(False):
            self._key = torch.tensor(tap, device="cpu")  # a tensor: see observe_ in ops/library.py

    def __reduce__(self) -> tuple[type[Hook], tuple[None, int]]:
        return Hook, (None, self._tap)

    def output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Forward hook that reads a module's output."""
        # Cheaper than is_compiling(). Safe: values under torch.export are no plain tensors.
        if is_dynamo_compiling() or type(output) is not Tensor:
            self._pass_to_watcher(module, args, output)
            return
        try:
            if get_ident() == self._gate.thread and is_undisturbed():
                routes = self.routes
                known = routes.last.follower
                if known.route.take(output, module, args):
                    routes.last = known
                    return
            self._pass_to_watcher(module, args, output)
        except Exception as error:
            self._fail(error)

    def input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Forward hook that reads a module's first input, positional or by keyword."""
        if is_dynamo_compiling() or not args or type(args[0]) is not Tensor:
            self._pass_to_watcher(module, args, (args, kwargs))
            return
        try:
            if get_ident() == self._gate.thread and is_undisturbed():
                routes = self.routes
                known = routes.last.follower
                if known.route.take(args[0], module, args):
                    routes.last = known
                    return
            self._pass_to_watcher(module, args, (args, kwargs))
        except Exception as error:
            self._fail(error)

    def _fail(self, error: Exception) -> None:
        if self.watcher is not None:
            self.watcher.fail(self._tap, error)

    def _pass_to_watcher(self, module: nn.Module, args: Any, value: Any) -> None:
        watcher = self.watcher
        if watcher is None:
            return
        if is_compiling():
            self._trace(watcher, first_tensor(value))
        elif "_is_replica" in module.__dict__:
            watcher.refuse(self._tap, REPLICA)
        elif not watcher.is_skipping:
            activation = first_tensor(value)
            if activation is not None:
                watcher.observe(self._tap, activation, module=module, args=args)
            elif watcher.is_reading and (kind := first_complex(value)) is not None:
                watcher.refuse(self._tap, f"gives {kind.dtype} tensors: not read")

    def _trace(self, watcher: Reader, activation: Tensor | None) -> None:
        root = watcher.root()
        is_evaluated = watcher.train_only and root is not None and not root.training
        if activation is None or is_evaluated or is_exporting():
            return
        kind = type(activation)
        if kind is not Tensor and (reason := unreadable_type(kind)):
            torch.ops.fastcov.refuse_(watcher.clock, self._key, reason)
        else:
            torch.ops.fastcov.observe_(watcher.clock, self._key, activation)

    def is_first(self, module: nn.Module) -> bool:
        """True if no forward hook but fastcov's may have changed the module's output before."""
        if module_hooks._global_forward_hooks:
            return False
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if owner is self:
                return True
            if not isinstance(owner, Hook):
                break
        return False


class StepHook:
    """Pair of hooks on the root module: they begin and end a step with each of its forwards.

    A copy has no watcher and does nothing.
    """

    def __init__(self, watcher: Reader | None) -> None:
        self.watcher = watcher

    def __reduce__(self) -> tuple[type[StepHook], tuple[None]]:
        return StepHook, (None,)

    def begin(self, module: nn.Module, args: Any) -> None:
        """Start of a forward of the root, which is a step where its mode says so."""
        watcher = self.watcher
        if watcher is None or is_exporting():
            return
        is_step = module.training or not watcher.train_only
        if is_compiling():
            if is_step:
                torch.ops.fastcov.begin_step_(watcher.clock)
        elif "_is_replica" in module.__dict__:
            watcher.steps.not_counted = REPLICA
        else:
            steps, thread = watcher.steps, get_ident()
            is_nested = False
            if steps.is_inside and steps.thread == thread:
                is_nested = _runs_inside_itself(module)
            elif steps.is_inside and steps.is_on_stack and not _runs_a_module(steps.thread):
                steps.abandon()
            watcher.begin_step(is_step, is_nested)
            steps.is_on_stack = steps.is_on_stack or steps.thread == thread

    def begin_masked(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Start of a forward of the root whose arguments give the mask of its rows."""
        self.begin(module, args)
        watcher = self.watcher
        if watcher is None or watcher.mask is None or is_exporting():
            return
        if is_compiling():
            if module.training or not watcher.train_only:
                mask = watcher.mask.find(args, kwargs)
                if mask is not None:
                    torch.ops.fastcov.take_mask_(watcher.clock, mask)
        elif watcher.is_reading and watcher.steps.is_outermost and not is_recomputing():
            try:
                mask = watcher.mask.find(args, kwargs)
            except Exception as error:
                watcher.fail_all(error)
            else:
                watcher.take_mask(mask)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """End of the forward; torch calls this hook after an exception too."""
        watcher = self.watcher
        if watcher is None or is_exporting():
            return
        if is_compiling():
            if module.training or not watcher.train_only:
                torch.ops.fastcov.end_step_(watcher.clock)
        elif "_is_replica" not in module.__dict__:
            watcher.end_step()


def watchers_of(model: nn.Module) -> list[Reader]:
    """Watchers whose steps are the forwards of a module."""
    owners = (getattr(hook, "__self__", None) for hook in model._forward_pre_hooks.values())
    found = (owner.watcher for owner in owners if isinstance(owner, StepHook))
    return [watcher for watcher in found if watcher is not None]


run_by_python(Hook.output, Hook.input, StepHook.begin, StepHook.begin_masked, StepHook.end)

_CALL = nn.Module._call_impl.__code__


def _runs_inside_itself(module: nn.Module) -> bool:
    # A forward that did not end is either still on the stack (recursion), or was interrupted.
    frame: FrameType | None = sys._getframe()
    calls = 0
    while frame is not None:
        calls += frame.f_code is _CALL and frame.f_locals.get("self") is module
        frame = frame.f_back
    return calls > 1


def _runs_a_module(thread: int) -> bool:
    # Any module: the locals of a frame that another thread is running cannot be read safely.
    frame = sys._current_frames().get(thread)
    while frame is not None:
        if frame.f_code is _CALL:
            return True
        frame = frame.f_back
    return False
