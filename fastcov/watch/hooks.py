"""Forward hooks: from a module's call to the collector, in eager mode and in compiled code."""

from __future__ import annotations

import sys
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch._C._dynamo.eval_frame import (
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)
from torch.compiler import is_compiling, is_dynamo_compiling
from torch.nn.modules import module as module_hooks
from torch.utils.hooks import RemovableHandle

from fastcov.rows.view import unreadable_type
from fastcov.stats.affine import AffineMap, is_affine
from fastcov.watch.select import Tap, first_tensor

if TYPE_CHECKING:
    from fastcov.stats.adder import RowSource
    from fastcov.watch.watcher import Collector


def watch(
    tracker: Collector, number: int, tap: Tap, module: nn.Module, reads_all: bool
) -> RemovableHandle:
    """Installs the hook of one tap.

    Args:
        tracker: Whose :meth:`~fastcov.watch.watcher.Collector.observe` it calls.
        number: Of the tap.
        tap: What it watches.
        module: Whose input or output that is.
        reads_all: Whether every row is read.
    """
    if tap.position == "input":
        return module.register_forward_pre_hook(Hook(tracker, number).input, with_kwargs=True)
    kind = AffineHook if reads_all and is_affine(module) else Hook
    return module.register_forward_hook(kind(tracker, number).output)


def _is_exporting() -> bool:
    # Not torch.compiler.is_exporting(): inside torch.compile it is True as well (torch 2.11).
    return getattr(torch.compiler, "_is_exporting_flag", False)


class Hook:
    """Forward hook of one tap. A copy of it (deepcopy, pickle: EMA, checkpoints) does nothing.

    Compiled code keeps what is read only while training: a model in evaluation mode compiles to
    the graph that it has without a tracker. An exported model holds nothing of it.
    """

    def __init__(self, tracker: Collector | None, tap: int) -> None:
        self.tracker = tracker
        self.tap = tap
        with torch.inference_mode(False):
            self.key = torch.tensor(tap, device="cpu")  # a tensor: see observe_ in ops/library.py

    def __reduce__(self) -> tuple[type[Hook], tuple[None, int]]:
        return Hook, (None, self.tap)

    def output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Reads a module's output."""
        tracker = self.tracker
        # Half the time of is_compiling(): what torch.export hands over is never laid out the same.
        if (
            tracker is None
            or is_dynamo_compiling()
            or "_is_replica" in module.__dict__
            or not tracker.observe_again(self.tap, output)
        ):
            self.read(module, output)

    def input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Reads a module's first input, positional or by keyword."""
        tracker = self.tracker
        if (
            not args
            or tracker is None
            or is_dynamo_compiling()
            or "_is_replica" in module.__dict__
            or not tracker.observe_again(self.tap, args[0])
        ):
            self.read(module, (args, kwargs))

    def read(self, module: nn.Module, value: Any) -> None:
        """Hands the first tensor to the tracker."""
        tracker = self.tracker
        if tracker is None:
            return
        activation = first_tensor(value)
        if activation is None:
            return
        if is_compiling():
            root = tracker.root()
            is_evaluated = tracker.train_only and root is not None and not root.training
            if is_evaluated or _is_exporting():
                return
            kind = type(activation)
            if kind is not Tensor and (reason := unreadable_type(kind)):
                torch.ops.fastcov.refuse_(tracker.clock, self.key, reason)
            else:
                torch.ops.fastcov.observe_(tracker.clock, self.key, activation)
        elif "_is_replica" in module.__dict__:
            tracker.refuse(self.tap, REPLICA)
        else:
            tracker.observe(self.tap, activation)


class AffineHook(Hook):
    """Hook of an affine module's output, every row of which is read: see fastcov.stats.affine."""

    def __init__(self, tracker: Collector | None, tap: int) -> None:
        super().__init__(tracker, tap)
        self.map = AffineMap()

    def output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Reads a module's output, or its input where that says the same for less."""
        tracker = self.tracker  # as in Hook.output: a shared function is a call more in each hook
        if (
            tracker is None
            or is_dynamo_compiling()
            or "_is_replica" in module.__dict__
            or not tracker.observe_again(self.tap, output, self._source(module, args, output))
        ):
            self.read(module, output)

    def _source(self, module: nn.Module, args: Any, output: Any) -> RowSource | None:
        # On a GPU the rows themselves are read: no time is spent on more questions.
        if type(output) is Tensor and output.is_cpu and self._is_first(module):
            return partial(self.map.add_to, module, args, output)
        return None

    def _is_first(self, module: nn.Module) -> bool:
        # Another hook may have changed the output.
        if module_hooks._global_forward_hooks:
            return False
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if owner is self:
                return True
            if not isinstance(owner, Hook):
                break
        return False


REPLICA = "runs as a replica of nn.DataParallel, which is not read: use DistributedDataParallel"


class StepHook:
    """Root hooks: a step is one training-mode forward of the root module."""

    def __init__(self, tracker: Collector | None) -> None:
        self.tracker = tracker

    def __reduce__(self) -> tuple[type[StepHook], tuple[None]]:
        return StepHook, (None,)

    def begin(self, module: nn.Module, args: Any) -> None:
        """Starts a step."""
        tracker = self.tracker
        if tracker is None or _is_exporting():
            return
        is_step = module.training or not tracker.train_only
        if is_compiling():
            if is_step:
                torch.ops.fastcov.begin_step_(tracker.clock)
        elif "_is_replica" in module.__dict__:
            tracker.step.not_counted = REPLICA
        else:
            is_nested = tracker.step.is_inside and _runs_inside_itself(module)
            tracker.begin_step(is_step, is_nested)

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Ends the step; called after an exception too."""
        tracker = self.tracker
        if tracker is None or _is_exporting():
            return
        if is_compiling():
            if module.training or not tracker.train_only:
                torch.ops.fastcov.end_step_(tracker.clock)
        elif "_is_replica" not in module.__dict__:
            tracker.end_step()


def _run_by_python(*functions: Callable[..., None]) -> None:
    # torch.compile(module) starts below the module's own hooks: they would become graphs of their
    # own, with guards and a compilation each. Inside a larger graph hooks are traced as ever.
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    for function in functions:
        set_code_exec_strategy(function.__code__, skip)


_run_by_python(Hook.output, Hook.input, AffineHook.output, StepHook.begin, StepHook.end)

_CALL = nn.Module._call_impl.__code__


def _runs_inside_itself(module: nn.Module) -> bool:
    # A forward that did not end is either still on the stack (recursion), or was interrupted.
    calls = 0
    frame = sys._getframe()
    while frame.f_back is not None:
        frame = frame.f_back
        calls += frame.f_code is _CALL and frame.f_locals.get("self") is module
    return calls > 1
