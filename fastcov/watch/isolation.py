"""Keeps what the tracker runs inside a user's forward apart from the modes active there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._C._dynamo.eval_frame import _debug_get_cache_entry_list
from torch._functorch.pyfunctorch import temporarily_clear_interpreter_stack
from torch.utils._python_dispatch import _disable_current_modes

# Bound once: they are asked in every hook.
_dispatch_modes = torch._C._len_torch_dispatch_stack
_function_modes = torch._C._len_torch_function_stack
_transform_level = torch._C._functorch.maybe_current_level
_graph_task = torch._C._current_graph_task_id


def is_undisturbed() -> bool:
    """Whether neither :func:`has_modes` nor :func:`is_recomputing` is true: one call, 0.3 us."""
    return (
        _graph_task() == -1
        and _dispatch_modes() == 0
        and _function_modes() == 0
        and _transform_level() is None
    )


def is_recomputing() -> bool:
    """Whether this code runs inside a backward pass."""
    return _graph_task() != -1


def is_transformed() -> bool:
    """Whether a transform of torch.func (grad, vmap, jvp) is running."""
    return _transform_level() is not None


def has_modes() -> bool:
    """Whether some mode or transform would see the operators called here."""
    return _dispatch_modes() > 0 or _function_modes() > 0 or _transform_level() is not None


def is_compiled(model: nn.Module | None) -> bool:
    """True if torch.compile has compiled a module of a model, or the forward of one."""
    return model is not None and any(
        module._compiled_call_impl is not None or _has_compiled_code(type(module).forward)
        for module in model.modules()
    )


def _has_compiled_code(forward: Any) -> bool:
    code = getattr(forward, "__code__", None)
    return code is not None and bool(_debug_get_cache_entry_list(code))


@contextmanager
def isolated() -> Iterator[None]:
    """Runs operators outside every mode and transform.

    A transform refuses writes to tensors that it did not make. Selective checkpointing pairs the
    operators of a forward with those of its recomputation: ours would shift the pairs and corrupt
    gradients. Flop counters would count them, make_fx would record them.
    """
    with (
        temporarily_clear_interpreter_stack(),
        _disable_current_modes(),
        torch._C.DisableTorchFunction(),
    ):
        yield
