"""Tensors under autograd and the transforms of torch.func: whether they carry a derivative.

A tensor inside of a transform is a wrapper, and says nothing about the one that it wraps: inside
torch.vmap, ``requires_grad`` is False whatever is mapped.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

_functorch = torch._C._functorch


def is_wrapped(tensor: Tensor) -> bool:
    """True if a tensor stands for one inside of a transform, so that its values cannot be read."""
    # torch.compile traces plain tensors alone.
    return not torch.compiler.is_compiling() and _functorch.is_functorch_wrapped_tensor(tensor)


def is_transforming() -> bool:
    """True inside of a transform, where any tensor may be a wrapper."""
    return _functorch.peek_interpreter_stack() is not None


# The mark that torch.compiler.assume_constant_result sets, without importing the compiler: the
# answer is taken at the time of tracing. A compiled graph is guarded by the transforms that it
# was traced in.
vars(is_transforming)["_dynamo_marked_constant"] = True


def has_derivative(tensor: Tensor) -> bool:
    """True if a result of this tensor would be differentiated, in reverse or forward mode."""
    if torch.compiler.is_compiling():
        # Traced code has no tangents of its own. Which transform it is in cannot be traced.
        return (tensor.requires_grad and torch.is_grad_enabled()) or is_transforming()
    while _functorch.is_functorch_wrapped_tensor(tensor):
        if _functorch.is_gradtrackingtensor(tensor):
            return True
        tensor = _functorch.get_unwrapped(tensor)
    if tensor.requires_grad and torch.is_grad_enabled():
        return True
    # Tangents exist inside of a level alone, and asking for one takes a microsecond.
    return forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None
