"""Which tensor of which module is watched: selection, canonical names, hooks."""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd

from fastcov.rows import Layout, batched_rank, layout_of

if TYPE_CHECKING:
    from fastcov.collector import Collector

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
        chosen = {name: m for name, m in chosen.items() if isinstance(m, _DEFAULT_TYPES)}
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


def _make_tap(
    name: str, module: nn.Module, position: Literal["output", "input"], counts_macs: bool
) -> Tap:
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
    return None


def _macs_per_row(module: nn.Module, position: Literal["output", "input"]) -> int:
    # A matrix is applied once a row; a convolution's input rows are stride-times as many.
    if isinstance(module, nn.Embedding):
        return 0
    macs = sum(p.numel() for p in module.parameters() if p.dim() >= 2)
    if isinstance(module, _ConvNd):
        transposed = module.transposed
        if transposed == (position == "output"):
            macs //= prod(module.stride)
    return macs


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
    """The first floating-point tensor of a module's input or output: tuples and mappings too."""
    if isinstance(value, Tensor):
        return value if value.is_floating_point() else None
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for item in value:
            found = first_tensor(item)
            if found is not None:
                return found
    return None


class Hook:
    """Forward hook of one tap. A copy of it (deepcopy, pickle: EMA, checkpoints) does nothing."""

    def __init__(self, tracker: Collector | None, tap: int) -> None:
        self.tracker = tracker
        self.tap = tap

    def __reduce__(self) -> tuple[type[Hook], tuple[None, int]]:
        return Hook, (None, self.tap)

    def output(self, module: nn.Module, args: Any, output: Any) -> None:
        """Reads a module's output."""
        self.read(output)

    def input(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        """Reads a module's first input, positional or by keyword."""
        self.read((args, kwargs))

    def read(self, value: Any) -> None:
        """Hands the first tensor to the tracker."""
        tracker = self.tracker
        if tracker is None:
            return
        activation = first_tensor(value)
        if activation is None:
            return
        if torch.compiler.is_compiling():
            torch.ops.fastcov.observe_(tracker.clock, activation, tracker.number, self.tap)
        else:
            tracker.observe(self.tap, activation)


class StepHook:
    """Root hooks: a step is one training-mode forward of the root module."""

    def __init__(self, tracker: Collector | None) -> None:
        self.tracker = tracker

    def __reduce__(self) -> tuple[type[StepHook], tuple[None]]:
        return StepHook, (None,)

    def begin(self, module: nn.Module, args: Any) -> None:
        """Starts a step."""
        tracker = self.tracker
        if tracker is None or (tracker.train_only and not module.training):
            return
        if torch.compiler.is_compiling():
            torch.ops.fastcov.begin_step_(tracker.clock, tracker.number)
        else:
            tracker.begin_step()

    def end(self, module: nn.Module, args: Any, output: Any) -> None:
        """Ends the step."""
        tracker = self.tracker
        if tracker is None or (tracker.train_only and not module.training):
            return
        if torch.compiler.is_compiling():
            torch.ops.fastcov.end_step_(tracker.clock, tracker.number)
        else:
            tracker.end_step()
