"""Which tensor of which module is watched: selection and canonical names."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass
from math import prod
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.lazy import LazyModuleMixin

from fastcov.rows.view import Layout, batched_rank, layout_of

Selector = (
    str | type[nn.Module] | Callable[[str, nn.Module], bool] | Sequence[str | type[nn.Module]]
)

_DEFAULT_TYPES = (_ConvNd, nn.Linear, nn.MultiheadAttention)

# What torch's own wrappers put into module names: DataParallel and DDP, compile, checkpoint, FSDP.
_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@dataclass(frozen=True)
class Tap:
    """One watched tensor of one module.

    Attributes:
        name: Canonical module name, with ``:in`` for an input.
        module_name: Canonical module name.
        position: Which side of the module.
        channels: Length of a row where the module tells, else None until a row is seen.
        layout: Where the tensor holds its channels.
        batched_rank: Rank of a batched tensor where unbatched ones are possible.
        macs_per_row: Multiply-accumulates of the module's forward for one row of this tap.
    """

    name: str
    module_name: str
    position: Literal["output", "input"]
    channels: int | None
    layout: Layout
    batched_rank: int | None
    macs_per_row: int


def canonical_name(name: str) -> str:
    """A module's name without what wrappers add.

    Example:
        >>> canonical_name("module._orig_mod.layer1.0.conv1")
        'layer1.0.conv1'
    """
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(parts[1:] if parts[:1] == ["module"] and len(parts) > 1 else parts)


def find_taps(
    model: nn.Module,
    include: Selector | None,
    exclude: Selector | None,
    where: Literal["output", "input", "both"],
) -> list[tuple[Tap, nn.Module]]:
    """Taps of the selected modules, in the model's order.

    Raises:
        ValueError: If a pattern matches no module (with the closest names), or nothing is left.
    """
    attention_inner = {
        id(module.out_proj)
        for module in model.modules()
        if isinstance(module, nn.MultiheadAttention)
    }  # attention calls a function with its weights: the module itself never runs
    named = {canonical_name(name): module for name, module in model.named_modules()}
    chosen = {name: m for name, m in named.items() if id(m) not in attention_inner}
    if include is None:
        chosen = {name: m for name, m in chosen.items() if _is_watched_by_default(m)}
    else:
        chosen = {name: m for name, m in named.items() if _matches(include, name, m)}
        _check_patterns("include", include, named)
    if exclude is not None:
        chosen = {name: m for name, m in chosen.items() if not _matches(exclude, name, m)}
        _check_patterns("exclude", exclude, named)
    if not chosen:
        raise ValueError(
            f"nothing to track: include={include!r}, exclude={exclude!r} leave no module of "
            f"{type(model).__name__}; the default watches convolutions, Linear and "
            "MultiheadAttention"
        )
    positions: tuple[Literal["output", "input"], ...] = (
        ("output", "input") if where == "both" else (where,)
    )
    return [
        (_make_tap(name, module, position, counts_macs=position == positions[0]), module)
        for name, module in chosen.items()
        for position in positions
    ]


def _is_watched_by_default(module: nn.Module) -> bool:
    return isinstance(module, _DEFAULT_TYPES) or _is_transposed_linear(module)


def _is_transposed_linear(module: nn.Module) -> bool:
    # GPT-2 and its relatives in transformers: a Linear by another name, its weight transposed.
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf") and hasattr(module, "nx")


def _make_tap(
    name: str, module: nn.Module, position: Literal["output", "input"], counts_macs: bool
) -> Tap:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(
            f"layer {name!r} is a {type(module).__name__} that has no shape yet: run one forward "
            "of the model before tracking it"
        )
    return Tap(
        name=name if position == "output" else f"{name}:in",
        module_name=name,
        position=position,
        channels=_channels(module, position),
        layout=layout_of(module),
        batched_rank=batched_rank(module),
        macs_per_row=_macs_per_row(module, position) if counts_macs else 0,
    )


def _channels(module: nn.Module, position: Literal["output", "input"]) -> int | None:
    if isinstance(module, _ConvNd):
        return module.out_channels if position == "output" else module.in_channels
    if isinstance(module, nn.Linear):
        return module.out_features if position == "output" else module.in_features
    if isinstance(module, nn.MultiheadAttention):
        return int(module.embed_dim)
    if _is_transposed_linear(module):
        return int(getattr(module, "nf" if position == "output" else "nx"))
    return None


def _macs_per_row(module: nn.Module, position: Literal["output", "input"]) -> int:
    # From the shapes that a module declares: parametrised, sharded and flattened weights have
    # others. A matrix is applied once a row; a convolution's input rows are stride-times as many.
    if isinstance(module, nn.Embedding):
        return 0
    if isinstance(module, nn.Linear):
        return module.in_features * module.out_features
    if isinstance(module, _ConvNd):
        weights = module.in_channels * module.out_channels // module.groups
        macs = weights * prod(module.kernel_size)
        transposed = module.transposed
        return macs // prod(module.stride) if transposed == (position == "output") else macs
    return sum(weight.numel() for weight in module.parameters() if weight.dim() >= 2)


def _selectors(selector: Selector) -> Iterable[Any]:
    return selector if isinstance(selector, (list, tuple, set, frozenset)) else (selector,)


def _matches(selector: Selector, name: str, module: nn.Module) -> bool:
    for one in _selectors(selector):
        if isinstance(one, str):
            if fnmatch.fnmatchcase(name, one):
                return True
        elif isinstance(one, type):
            if isinstance(module, one):
                return True
        elif callable(one):
            if one(name, module):
                return True
        else:
            raise TypeError(
                f"{one!r} selects no module: give glob patterns on names, module types, or a "
                "predicate of (name, module)"
            )
    return False


def _check_patterns(argument: str, selector: Selector, named: Mapping[str, nn.Module]) -> None:
    for one in _selectors(selector):
        if isinstance(one, str) and not fnmatch.filter(named, one):
            close = difflib.get_close_matches(one, named, n=3, cutoff=0.3)
            raise ValueError(
                f"{argument} pattern {one!r} matches no module; closest names: "
                f"{', '.join(close) or 'none'}"
            )


def first_tensor(value: Any) -> Tensor | None:
    """The first floating-point tensor of an input or output: tuples, mappings, dataclasses too."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = tuple(value.values())
    elif is_dataclass(value):
        value = tuple(vars(value).values())
    if isinstance(value, (tuple, list)):
        for item in value:
            found = first_tensor(item)
            if found is not None:
                return found
    return None


def is_sharded(module: nn.Module | None) -> bool:
    """Whether a module holds a part of its weights, as tensor parallelism leaves it."""
    return module is not None and any(
        type(weight).__name__ == "DTensor" for weight in module.parameters()
    )
