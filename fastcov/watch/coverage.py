"""Share of the parameters in watched modules, and notes on modules that were replaced since."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fastcov.watch.select import canonical_name

_MOST_NAMED = 3  # unwatched modules that the line names


def coverage(model: nn.Module, watched: Iterable[nn.Module]) -> str:
    """Sentence on the share of the parameters that watched modules hold, and the largest others.

    A watched module counts with all modules inside it. A parameter that several modules share
    counts as watched if one of these modules is.

    Args:
        model: Root module.
        watched: Modules whose input or output is read.

    Returns:
        The sentence; empty for a model without parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> coverage(model, [model[0]])
        'watched modules hold 20 of 28 parameters (71 %); largest that are not: 1 (8)'
    """
    inside = {id(each) for module in watched for each in module.modules()}
    # By identity of the parameter; its holder is the name of the first module that has it.
    sizes: dict[int, int] = {}
    is_watched: dict[int, bool] = {}
    holder: dict[int, str] = {}
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            key = id(parameter)
            sizes[key] = parameter.numel()
            is_watched[key] = is_watched.get(key, False) or id(module) in inside
            holder.setdefault(key, canonical_name(name) or type(module).__name__)
    total = sum(sizes.values())
    if not total:
        return ""
    unwatched: dict[str, int] = {}
    for key, size in sizes.items():
        if not is_watched[key]:
            unwatched[holder[key]] = unwatched.get(holder[key], 0) + size
    held = total - sum(unwatched.values())
    share = 100 * held // total  # rounded down: 100 % only where nothing is left out
    line = f"watched modules hold {_short(held)} of {_short(total)} parameters ({share} %)"
    largest = sorted(unwatched.items(), key=lambda item: -item[1])[:_MOST_NAMED]
    if largest:
        line += "; largest that are not: " + ", ".join(f"{n} ({_short(s)})" for n, s in largest)
    return line


def module_note(model: nn.Module | None, name: str, module: nn.Module | None) -> str:
    """Warning, with the remedy, that a module does not compute the tensor that its name stands for.

    Empty where all is well. None stands for a root or a watched module that is gone.
    """
    if model is not None:
        named = {canonical_name(each): found for each, found in model.named_modules()}
        if name in named and named[name] is not module:
            kind = type(named[name]).__name__
            return f"replaced by a {kind} since track(), which is not read: call track() again"
    if name.split(".")[-1] == "base_layer":
        wrapper = name.removesuffix("base_layer").rstrip(".")
        return f"base layer without its adapter's part: include {wrapper!r} for the sum"
    return ""


def _short(count: int) -> str:
    """Text of a number: from 10,000 on, three significant digits and a unit."""
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**4)):
        if count >= size:
            return f"{count / (10**3 if unit == 'k' else size):.3g}{unit}"
    return str(count)
