"""Selection of the watched tensors by include, exclude and where; canonical module names."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, is_dataclass, replace
from typing import Any, Literal

from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin

from fastcov.names import closest
from fastcov.rows.view import Layout
from fastcov.watch.layers import Position, inner_modules, kind_of

Selector = (
    str | type[nn.Module] | Callable[[str, nn.Module], bool] | Sequence[str | type[nn.Module]]
)

Of = Literal["activation", "gradient", "both"]
"""Type of the argument ``of`` of :func:`fastcov.track`."""

# Parts of module names that wrappers add: torch.compile, checkpointing, FSDP, Fabric.
_WRAPPERS = (
    "_orig_mod",
    "_checkpoint_wrapped_module",
    "_fsdp_wrapped_module",
    "_forward_module",
)


@dataclass(frozen=True)
class Tap:
    """One watched tensor of one module.

    Attributes:
        name: Canonical module name, with ``:in`` for an input, then ``:grad`` for a gradient; or
            the name that the user has given to a tensor.
        module_name: Canonical module name; empty for a tensor that the user names.
        position: Side of the module: "output" or "input"; "named" without a module.
        channels: Length of a row where the module declares it, else None.
        layout: Order of the tensor's dimensions.
        batched_rank: Rank of a batched tensor where unbatched ones are possible.
        macs_per_row: Multiply-accumulates of the module's forward for one row of this tap; 0 for
            the input where the output is watched too, and for the gradient where the activation
            is, so that a forward counts once.
        is_gradient: True if the gradient of the loss with respect to the tensor is watched.
    """

    name: str
    module_name: str
    position: Position | Literal["named"]
    channels: int | None
    layout: Layout
    batched_rank: int | None
    macs_per_row: int
    is_gradient: bool = False


def canonical_name(name: str) -> str:
    """Name of a module without the parts that wrappers (DDP, FSDP, torch.compile) add.

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
    of: Of = "activation",
) -> list[tuple[Tap, nn.Module]]:
    """Taps of the modules that the arguments of :func:`fastcov.track` select, and these modules.

    Raises:
        TypeError: If a selector is neither pattern, type nor predicate.
        ValueError: If a pattern matches no module (with the closest names), nothing is left, or a
            lazy module has no shape yet.
    """
    never_run = inner_modules(model)
    named = {canonical_name(name): module for name, module in model.named_modules()}
    chosen = {name: m for name, m in named.items() if id(m) not in never_run}
    if include is None:
        chosen = {name: m for name, m in chosen.items() if kind_of(m).is_default}
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
    positions: tuple[Position, ...] = ("output", "input") if where == "both" else (where,)
    activations = [
        (_make_tap(name, module, position, counts_macs=position == positions[0]), module)
        for name, module in chosen.items()
        for position in positions
    ]
    if of == "activation":
        return activations
    gradients = [
        (gradient_tap(tap, counts_macs=of == "gradient"), module) for tap, module in activations
    ]
    if of == "gradient":
        return gradients
    return [tap for pair in zip(activations, gradients, strict=True) for tap in pair]


def gradient_name(name: str) -> str:
    """Name of the gradient of a watched tensor.

    Example:
        >>> gradient_name("head:in")
        'head:in:grad'
    """
    return f"{name}:grad"


def named_tap(name: str) -> Tap:
    """Tap of a tensor that the user names, channels last."""
    return Tap(name, "", "named", None, Layout.CHANNELS_LAST, None, 0)


def gradient_tap(tap: Tap, counts_macs: bool) -> Tap:
    """Tap of the gradient with respect to the tensor that another tap watches."""
    return replace(
        tap,
        name=gradient_name(tap.name),
        macs_per_row=tap.macs_per_row if counts_macs else 0,
        is_gradient=True,
    )


def _make_tap(name: str, module: nn.Module, position: Position, counts_macs: bool) -> Tap:
    if isinstance(module, LazyModuleMixin) and module.has_uninitialized_params():
        raise ValueError(
            f"layer {name!r} is a {type(module).__name__} that has no shape yet: run one forward "
            "of the model before tracking it"
        )
    kind = kind_of(module)
    return Tap(
        name=name if position == "output" else f"{name}:in",
        module_name=name,
        position=position,
        channels=kind.channels(module, position),
        layout=kind.layout(module),
        batched_rank=kind.batched_rank(module),
        macs_per_row=kind.macs_per_row(module, position) if counts_macs else 0,
    )


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
            raise ValueError(f"{argument} pattern {one!r} matches no module{closest(one, named)}")


def first_tensor(value: Any) -> Tensor | None:
    """First floating-point tensor of an input or output, also inside tuples, dicts, dataclasses."""
    return _first(value, is_complex=False)


def first_complex(value: Any) -> Tensor | None:
    """First complex tensor of an input or output, also inside tuples, dicts, dataclasses."""
    return _first(value, is_complex=True)


def _first(value: Any, is_complex: bool) -> Tensor | None:
    if isinstance(value, Tensor):
        is_wanted = value.is_complex() if is_complex else value.is_floating_point()
        return value if is_wanted else None
    if isinstance(value, Mapping):
        value = tuple(value.values())
    elif is_dataclass(value):
        value = tuple(vars(value).values())
    if isinstance(value, (tuple, list)):
        for item in value:
            found = _first(item, is_complex)
            if found is not None:
                return found
    return None
