"""Parameters that the watched modules hold, and modules that are no longer what they were."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn

from fastcov.watch.select import canonical_name

_MOST_NAMED = 3  # modules of the line that are not watched


def coverage(model: nn.Module, watched: Iterable[nn.Module]) -> str:
    """One line on the parameters in modules that are watched, and the largest that are not.

    A module that is watched counts with all modules inside. A parameter that several modules share
    is watched if one of them is.

    Args:
        model: Root module.
        watched: Modules whose input or output is read.

    Returns:
        A sentence; empty for a model without parameters.

    Example:
        >>> model = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))
        >>> coverage(model, [model[0]])
        'watched modules hold 20 of 28 parameters (71 %); largest that are not: 1 (8)'
    """
    inside = {id(each) for module in watched for each in module.modules()}
    sizes: dict[int, int] = {}  # of each parameter
    is_watched: dict[int, bool] = {}
    holder: dict[int, str] = {}  # the first module that has it
    for name, module in model.named_modules():
        for parameter in module.parameters(recurse=False):
            key = id(parameter)
            sizes[key] = parameter.numel()
            is_watched[key] = is_watched.get(key, False) or id(module) in inside
            holder.setdefault(key, canonical_name(name) or type(module).__name__)
    total = sum(sizes.values())
    if not total:
        return ""
    left: dict[str, int] = {}
    for key, size in sizes.items():
        if not is_watched[key]:
            left[holder[key]] = left.get(holder[key], 0) + size
    read = total - sum(left.values())
    share = 100 * read // total  # rounded down: 100 % only where nothing is left out
    line = f"watched modules hold {_short(read)} of {_short(total)} parameters ({share} %)"
    largest = sorted(left.items(), key=lambda item: -item[1])[:_MOST_NAMED]
    if largest:
        line += "; largest that are not: " + ", ".join(f"{n} ({_short(s)})" for n, s in largest)
    return line


def module_note(model: nn.Module | None, name: str, module: nn.Module | None) -> str:
    """Reason why a module's rows are not what its name says; empty where they are.

    Args:
        model: Root module, if it is alive.
        name: Canonical name of a watched module.
        module: The module that is watched, if it is alive.
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
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**4)):
        if count >= size:
            return f"{count / (10**3 if unit == 'k' else size):.3g}{unit}"
    return str(count)
