"""Isolation of the tracker's operators from the modes and transforms of a user's forward."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import (
    _debug_get_cache_entry_list,
    _FrameAction,
    _FrameExecStrategy,
    set_code_exec_strategy,
)
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

# Bound once, to save the attribute lookups: every hook calls all four.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform_level = torch._C._functorch.maybe_current_level
_graph_task = torch._C._current_graph_task_id


def is_undisturbed() -> bool:
    """True outside of modes, transforms and backward passes; all tests in one call, 0.3 us."""
    return (
        _graph_task() == -1
        and _dispatch_modes() == 0
        and _function_modes() == 0
        and _transform_level() is None
    )


def is_exporting() -> bool:
    """True under torch.export."""
    # Not torch.compiler.is_exporting(): inside torch.compile it is True as well (torch 2.11).
    return getattr(torch.compiler, "_is_exporting_flag", False)


def run_by_python(*hooks: Callable[..., Any]) -> None:
    """Mark on hooks that keeps Dynamo from compiling each by itself.

    torch.compile(module) compiles the module's forward, not its hooks. Dynamo would then meet the
    hooks one by one and compile each as a graph with guards of its own; told to skip them, it
    leaves them to Python. Inside the graph of a larger module, hooks are traced all the same.
    """
    skip = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    for hook in hooks:
        set_code_exec_strategy(hook.__code__, skip)


def is_recomputing() -> bool:
    """True inside a backward pass, where checkpointing runs forwards again."""
    return _graph_task() != -1


def is_transformed() -> bool:
    """True inside a transform of torch.func (grad, vmap, jvp)."""
    return _transform_level() is not None


def has_modes() -> bool:
    """True if some mode or transform would intercept the operators called here."""
    return _dispatch_modes() > 0 or _function_modes() > 0 or _transform_level() is not None


def is_compiled(model: nn.Module | None) -> bool:
    """True if torch.compile has compiled a module of a model, or the forward of one."""
    return model is not None and (
        any(
            module._compiled_call_impl is not None or _has_compiled_code(type(module).forward)
            for module in model.modules()
        )
        or (type(model).__module__.startswith("torch.nn.") and _has_compiled_torch_module())
    )


def _has_compiled_torch_module() -> bool:
    # torch.compile calls a root of a class of torch, as Sequential, through one function that all
    # such roots share. Nothing was compiled where its file was never imported.
    utils = sys.modules.get("torch._dynamo.external_utils")
    wrap = getattr(utils, "wrap_inline", None)
    return wrap is not None and _has_compiled_code(wrap(len))


def _has_compiled_code(forward: Any) -> bool:
    code = getattr(forward, "__code__", None)
    return code is not None and bool(_debug_get_cache_entry_list(code))


@contextmanager
def isolated() -> Iterator[None]:
    """Context in which operators run outside every mode and transform.

    A transform refuses writes to tensors that it did not make: the tracker's operators would fail.
    Selective checkpointing pairs the operators of a forward with those of its recomputation:
    more operators would shift the pairs and corrupt gradients. Flop counters would count the
    tracker's operators, make_fx would record them.
    """
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
    ):
        yield


@contextmanager
def outside_modes() -> Iterator[None]:
    """Context without gradients, :func:`isolated` where there is something to isolate from."""
    with torch.no_grad(), isolated() if has_modes() else nullcontext():
        yield
