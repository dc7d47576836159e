"""Table of layer kinds: the dimension and number of a module's channels, and its arithmetic.

A new kind is one entry of :data:`KINDS`; the first entry that matches a module is its kind.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Literal, NamedTuple

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.instancenorm import _InstanceNorm

from fastcov.rows.view import Layout

Position = Literal["output", "input"]
"""Side of a module that a tap watches."""


def _no_channels(module: Any, position: Position) -> int | None:
    del module, position
    return None


def _matrix_macs(module: Any, position: Position) -> int:
    # Every matrix is applied once a row.
    del position
    return sum(weight.numel() for weight in module.parameters() if weight.dim() >= 2)


def _no_rank(module: Any) -> int | None:
    del module
    return None


class LayerKind(NamedTuple):
    """Facts about one kind of module.

    Attributes:
        matches: True for modules of this kind.
        layout: Order of dimensions of a module's inputs and outputs.
        channels: Length of a row at a position; None until a row is seen.
        macs_per_row: Multiply-accumulates of the forward for one row at a position. Taken from the
            sizes that the module declares where it can: parametrised, sharded and flattened weight
            tensors have other shapes.
        batched_rank: Rank of a batched activation where unbatched ones are possible, else None.
        is_default: True if :func:`fastcov.track` watches this kind without ``include``.
    """

    matches: Callable[[nn.Module], bool]
    layout: Callable[[Any], Layout]
    channels: Callable[[Any, Position], int | None] = _no_channels
    macs_per_row: Callable[[Any, Position], int] = _matrix_macs
    batched_rank: Callable[[Any], int | None] = _no_rank
    is_default: bool = False


def _is(*types: type[nn.Module]) -> Callable[[nn.Module], bool]:
    return lambda module: isinstance(module, types)


def _has(layout: Layout) -> Callable[[Any], Layout]:
    return lambda module: layout


def _sequence_layout(module: Any) -> Layout:
    return Layout.CHANNELS_LAST if module.batch_first else Layout.SEQUENCE_FIRST


def _attribute(of_output: str, of_input: str) -> Callable[[Any, Position], int]:
    """Channels, read from one of two attributes of the module."""
    return lambda module, side: int(getattr(module, of_output if side == "output" else of_input))


def _convolution_macs(module: Any, position: Position) -> int:
    # A convolution's input rows are stride-times as many as its output rows.
    macs = module.in_channels * module.out_channels // module.groups * prod(module.kernel_size)
    is_wider_side = module.transposed == (position == "output")
    return int(macs // prod(module.stride)) if is_wider_side else int(macs)


def _is_transposed_linear(module: nn.Module) -> bool:
    # GPT-2 and its relatives in transformers: a Linear by another name, its weight transposed.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def _is_norm_of_maps(module: nn.Module) -> bool:
    # LayerNorm2d of torchvision and timm: a LayerNorm that is given [B, C, H, W].
    return isinstance(module, (nn.LayerNorm, nn.RMSNorm)) and type(module).__name__.endswith("2d")


KINDS = (
    LayerKind(
        _is(_ConvNd),
        _has(Layout.CHANNELS_FIRST),
        _attribute("out_channels", "in_channels"),
        _convolution_macs,
        batched_rank=lambda module: len(module.kernel_size) + 2,
        is_default=True,
    ),
    LayerKind(
        _is(nn.Linear),
        _has(Layout.CHANNELS_LAST),
        _attribute("out_features", "in_features"),
        macs_per_row=lambda module, position: module.in_features * module.out_features,
        is_default=True,
    ),
    LayerKind(_is_transposed_linear, _has(Layout.BY_RANK), _attribute("nf", "nx"), is_default=True),
    LayerKind(
        _is(nn.MultiheadAttention),
        _sequence_layout,
        _attribute("embed_dim", "embed_dim"),
        batched_rank=lambda module: 3,
        is_default=True,
    ),
    LayerKind(_is(nn.RNNBase), _sequence_layout, batched_rank=lambda module: 3),
    LayerKind(
        _is(nn.Embedding, nn.EmbeddingBag),
        _has(Layout.CHANNELS_LAST),
        macs_per_row=lambda module, position: 0,
    ),
    LayerKind(_is_norm_of_maps, _has(Layout.CHANNELS_FIRST)),
    LayerKind(_is(nn.Bilinear, nn.LayerNorm, nn.RMSNorm), _has(Layout.CHANNELS_LAST)),
    LayerKind(_is(_BatchNorm, _InstanceNorm, nn.GroupNorm), _has(Layout.CHANNELS_FIRST)),
    LayerKind(lambda module: True, _has(Layout.BY_RANK)),
)
"""Kinds in the order in which they are tried; the last one matches every module."""


def kind_of(module: nn.Module) -> LayerKind:
    """Kind of a module: the first entry of :data:`KINDS` that matches."""
    return next(kind for kind in KINDS if kind.matches(module))


def inner_modules(model: nn.Module) -> set[int]:
    """Identities (``id``) of modules that never run: the parent uses their weights itself."""
    return {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }


def is_sharded(module: nn.Module | None) -> bool:
    """True if a module holds only this rank's part of its weights (tensor parallelism)."""
    return module is not None and any(
        type(weight).__name__ == "DTensor" for weight in module.parameters()
    )
