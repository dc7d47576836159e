"""Steps of the training, counted from the forwards of the root module."""

from __future__ import annotations

import sys
import threading
from typing import Protocol

import torch

from fastcov.rows.layout import ActivationLayout
from fastcov.rows.mask import RowMask
from fastcov.stats.capture import is_capturing
from fastcov.stats.layer import Layer
from fastcov.watch.isolation import is_recomputing

OVERLAP = (
    "forwards of the tracked model overlapped in several threads: the first to begin was read, the "
    "others were not; run them one after the other, or track a copy of the model in each thread"
)


class Steps:
    """Counter of steps. A step is one forward of the root module that ends without an exception.

    The caller tells by the root's mode which forwards may count. Special cases:

    ===================================================  ==========================================
    Forward                                              Steps
    ===================================================  ==========================================
    of a root that calls itself                          one
    ended by an exception                                none
    run by torch.jit.trace                               none
    run again by a backward pass (checkpointing)         none
    captured by a CUDA graph                             none; each replay is one, which the device
                                                         counts (:mod:`fastcov.stats.capture`)
    overlapping others in several threads                one for the first to begin
    ===================================================  ==========================================

    Attributes:
        done: Steps so far; replays are added by :attr:`fastcov.watch.watcher.Watcher.step`.
        is_running: True if a step has begun and not ended.
        is_captured: True if a CUDA graph captures the forward that began last.
        has_overlapped: True if forwards have overlapped in several threads.
        not_counted: Reason why the last forward that might have been a step was none.
        thread: Identity of the thread of the forward that began last.
        is_on_stack: True if that thread's Python stack shows the forward: it runs in no compiled
            code.
    """

    def __init__(self) -> None:
        self.done = 0
        self.is_running = False
        self.is_captured = False
        self.has_overlapped = False
        self.not_counted = ""
        self.thread = 0
        self.is_on_stack = False
        self._has_new_refusal = False
        self._has_new_overlap = False
        self._depth = 0
        # An exception that the caller was handling already when the forward began. Another one at
        # the forward's end says that the forward itself failed.
        self._exception_before: BaseException | None = None

    @property
    def is_inside(self) -> bool:
        """True if a forward of the root, a step or not, has begun and not ended."""
        return self._depth > 0

    def begin(self, counts: bool, is_nested: bool, can_replay: bool = False) -> bool:
        """Start of a forward.

        Args:
            counts: True if the root's mode makes the forward a step.
            is_nested: True if the root calls itself. If not, a forward that has not ended was
                interrupted: by Ctrl-C, or by an error in compiled code.
            can_replay: True if a CUDA graph may hold the forward: the device counts the replays.

        Returns:
            True if a step begins.
        """
        if is_recomputing():
            return False
        thread = threading.get_ident()
        if self._depth and thread != self.thread and _is_alive(self.thread):
            self._has_new_overlap = not self.has_overlapped
            self.has_overlapped = True
            return False
        if self._depth and is_nested:
            self._depth += 1
            return False
        self.thread = thread
        self.is_on_stack = False
        self._depth = 1
        self._exception_before = sys.exc_info()[1]
        self.is_running = counts
        self.is_captured = is_capturing()
        if counts and (reason := self._why_not_counted(can_replay)):
            self.is_running, self.not_counted = False, reason
        return self.is_running

    @property
    def is_outermost(self) -> bool:
        """True inside a forward of the root that runs in no other one."""
        return self._depth == 1

    def abandon(self) -> None:
        """Removal of a forward that was interrupted, in whatever thread."""
        self._depth = 0
        self.is_running = False
        self._exception_before = None

    def take_refusal(self) -> str:
        """Reason why a CUDA graph must not hold the forward that began; told once, else empty."""
        is_new, self._has_new_refusal = self._has_new_refusal, False
        return self.not_counted if is_new else ""

    def take_overlap(self) -> bool:
        """True the first time after forwards have overlapped in several threads."""
        is_new, self._has_new_overlap = self._has_new_overlap, False
        return is_new

    def end(self) -> bool:
        """End of a forward, after an exception too; True if a step is done."""
        if self._depth == 0 or threading.get_ident() != self.thread or is_recomputing():
            return False
        self._depth -= 1
        if self._depth:
            return False
        was_running, self.is_running = self.is_running, False
        is_complete = sys.exc_info()[1] is self._exception_before
        self._exception_before = None
        if not (was_running and is_complete):
            return False
        self.done += not self.is_captured
        return True

    def _why_not_counted(self, can_replay: bool) -> str:
        if torch._C._get_tracing_state() is not None:
            return "forwards under torch.jit.trace are not read"
        if self.is_captured and not can_replay:
            self._has_new_refusal = True
            return (
                "a CUDA graph can replay a tracked step if every=1, two ran eagerly before, no "
                "mask is given, and all layers are on one GPU that runs Triton kernels (sm_80 or "
                "newer)"
            )
        return ""


class RunningStep(Protocol):
    """Step that is read: attributes of :class:`fastcov.watch.watcher.Watcher` that tell about it.

    Attributes:
        steps: Counter of the steps.
        row_mask: Mask of the rows; None where every row is read.
    """

    steps: Steps
    row_mask: RowMask | None

    @property
    def step(self) -> int:
        """Number of the step; waits for the device where replays are counted there."""

    def leave_out(self, layer: Layer, layout: ActivationLayout) -> bool:
        """Note of a call that the captured CUDA graph must not hold; True if it is left out."""

    def end_layers(self, layers: list[Layer]) -> None:
        """End of the step of layers."""


def _is_alive(thread: int) -> bool:
    return any(each.ident == thread for each in threading.enumerate())
