"""Row views: activations of any layout as feature rows.

Glossary of dimensions, used in the whole package:

====  =======================================================================================
B     images (or sequences, or RoIs) of one activation: dimension 0 of a row view
P     positions of one image: pixels, tokens
N     rows, N = B * P: one row is the feature vector of one position
C     channels: the length of a row
K     rows of one update
L     layers
n     order of a symmetric matrix; B matrices in a batch, in ops/eigen.py
====  =======================================================================================

A row view is ``[B, ..., C]``: always a view, never a copy, so that its strides tell the layout. The
row view of NCHW memory is ``permute(0, 2, 3, 1)``.
"""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from functools import partial

import torch
from torch import Tensor

from fastcov.rows.dtypes import ROW_DTYPES

MOST_DIMS = 5
"""Most dimensions of a tensor that the kernels take."""
# Subclasses of Tensor that hold plain data inherit this method; wrappers of other tensors override
# it.
_DENSE = Tensor.__torch_dispatch__


class Layout(Enum):
    """Order of an activation's dimensions: its images, positions and channels."""

    CHANNELS_FIRST = "[B, C, ...]"
    CHANNELS_LAST = "[B, ..., C]"
    SEQUENCE_FIRST = "[T, B, C]"
    BY_RANK = "[B, C] and [B, T, C] channels last, [B, C, H, W] and above channels first"


def unreadable_type(kind: type[Tensor]) -> str:
    """Reason why tensors of a type hold no plain rows; empty where they do."""
    if kind.__torch_dispatch__ is _DENSE:
        return ""
    if kind.__name__ == "DTensor":
        return "gives DTensors, whose rows or channels lie on several ranks: not read"
    return f"gives tensors of type {kind.__name__}, which hold no plain rows: not read"


def plain_tensor(activation: Tensor, is_wrapped: bool = False) -> tuple[Tensor, int] | str:
    """Dense tensor of an activation, free of subclasses and of torch.func's wrappers.

    Args:
        activation: Tensor of any type.
        is_wrapped: True if transforms of torch.func may have wrapped the activation.

    Returns:
        The tensor and the number of vmapped dimensions, now in front; or a reason without either.

    Example:
        >>> plain_tensor(torch.zeros(2, 3, device="meta"))
        'gives tensors on the meta device, which hold no values: not read'
    """
    if type(activation) is not Tensor:
        if wait := getattr(activation, "trigger_wait", None):  # a collective still under way
            activation = wait()
        if reason := unreadable_type(type(activation)):
            return reason
        activation = activation.as_subclass(Tensor)
    batch_dims = 0
    if is_wrapped:
        activation, batch_dims = _unwrapped(activation)
        if type(activation) is not Tensor:
            return unreadable_type(type(activation)) or "is wrapped by torch.func: not read"
    if activation.is_nested:
        return (
            "gives nested tensors: not read; build nn.TransformerEncoder with "
            "enable_nested_tensor=False"
        )
    if activation.layout is not torch.strided:
        return f"gives {activation.layout} tensors: not read"
    if activation.dtype not in ROW_DTYPES:
        return f"gives {activation.dtype} tensors: not read"
    if activation.is_meta:
        return "gives tensors on the meta device, which hold no values: not read"
    if activation.dim() == batch_dims:
        return "gives single numbers, which have no channels: not read"
    return activation, batch_dims


def _unwrapped(activation: Tensor) -> tuple[Tensor, int]:
    # Each vmap hides one dimension of the tensor inside. All are moved to the front.
    functorch = torch._C._functorch
    hidden = []
    while functorch.is_functorch_wrapped_tensor(activation):
        if functorch.is_batchedtensor(activation):
            hidden.append(functorch.maybe_get_bdim(activation))
        activation = functorch.get_unwrapped(activation)
    visible = list(range(activation.dim()))
    front = [visible.pop(dim) for dim in reversed(hidden)]
    return activation.detach().permute(front + visible), len(front)


def row_order(
    dims: int, layout: Layout, rank: int | None = None, batch_dims: int = 0
) -> tuple[int, ...] | None:
    """Order of an activation's dimensions in its row view; arguments as of :func:`row_view`.

    None where the row view adds or merges dimensions.

    Example:
        >>> row_order(4, Layout.CHANNELS_FIRST)
        (0, 2, 3, 1)
    """
    if batch_dims or not 2 <= dims <= MOST_DIMS or (rank is not None and dims == rank - 1):
        return None
    return _order(dims, layout)


def _order(dims: int, layout: Layout) -> tuple[int, ...]:
    if layout is Layout.BY_RANK:
        layout = Layout.CHANNELS_FIRST if dims >= 4 else Layout.CHANNELS_LAST
    if layout is Layout.CHANNELS_FIRST:
        return (0, *range(2, dims), 1)
    if layout is Layout.SEQUENCE_FIRST and dims >= 3:
        return (1, 0, *range(2, dims))
    return tuple(range(dims))


def row_view(
    activation: Tensor, layout: Layout, rank: int | None = None, batch_dims: int = 0
) -> Tensor:
    """Row view of an activation.

    Args:
        activation: Tensor of at least one dimension.
        layout: Order of the activation's dimensions.
        rank: Number of dimensions of a batched activation; one fewer means a single image.
        batch_dims: Dimensions in front that torch.vmap hides from the module: more images.

    Returns:
        View with images first and channels last; at most 5 dimensions. [B, ..., C]

    Example:
        >>> row_view(torch.zeros(2, 8, 5, 7), Layout.CHANNELS_FIRST).shape
        torch.Size([2, 5, 7, 8])
    """
    if batch_dims:
        inner: Callable[[Tensor], Tensor] = partial(row_view, layout=layout, rank=rank)
        for _ in range(batch_dims):
            inner = torch.vmap(inner)
        rows = inner(activation).flatten(0, batch_dims)
        return rows if rows.dim() <= MOST_DIMS else rows.flatten(1, 1 - MOST_DIMS)
    dims = activation.dim()
    if (order := row_order(dims, layout, rank)) is not None:
        return activation.permute(*order)
    if dims == 1:
        return activation[None]
    if rank is not None and dims == rank - 1:
        # A single sequence [T, C] has its positions where a batch has them in its row view.
        is_sequence = layout is Layout.SEQUENCE_FIRST
        return activation[None] if is_sequence else row_view(activation[None], layout)
    return activation.permute(*_order(dims, layout)).flatten(1, 1 - MOST_DIMS)
