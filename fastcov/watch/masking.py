"""Mask of the rows of a step: where it comes from, and the route of a tap that may have one."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fastcov.names import closest
from fastcov.stats.route import Route, Routes

Mask = str | Callable[..., Tensor | None]
"""Type of the argument ``mask`` of :func:`fastcov.track`."""

_POSITIONAL = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)


class MaskSource:
    """Place where the mask of a step is found among the arguments of the root's forward.

    Args:
        mask: Name of an argument, or a function of all arguments.
        model: Root module.

    Attributes:
        name: Name of the argument or of the function.

    Raises:
        TypeError: If ``mask`` is neither a string nor a function.
        ValueError: If the forward has no argument of this name, or padding is where it is true.
    """

    def __init__(self, mask: Mask, model: nn.Module) -> None:
        if not (isinstance(mask, str) or callable(mask)):
            raise TypeError(
                f"mask={mask!r}: give the name of an argument of the model's forward, or a "
                "function of its arguments that returns a tensor"
            )
        if isinstance(mask, str) and mask.endswith("key_padding_mask"):
            raise ValueError(
                f"mask={mask!r} is true at padding, by torch's convention, where a mask is true at "
                f"rows to read; give a function of the forward's arguments that returns ~{mask}"
            )
        self.mask = mask
        self.name = mask if isinstance(mask, str) else getattr(mask, "__name__", "function")
        self._place: int | None = None
        if isinstance(mask, str):
            self._place = _place_of(mask, model)

    def find(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Mask of a forward with these arguments; None where it is given none."""
        if not isinstance(self.mask, str):
            return self.mask(*args, **kwargs)
        if self.mask in kwargs:
            return kwargs[self.mask]
        if self._place is not None and self._place < len(args):
            return args[self._place]
        return None


def _place_of(name: str, model: nn.Module) -> int | None:
    """Place among the positional arguments; None for a name that is a keyword only."""
    names: list[str] = []
    takes_any = False
    inside: nn.Module | None = model
    while isinstance(inside, nn.Module):
        parameters = list(inspect.signature(inside.forward).parameters.values())
        for place, parameter in enumerate(parameters):
            if parameter.kind is inspect.Parameter.VAR_KEYWORD:
                takes_any = True
            elif parameter.name == name:
                return place if parameter.kind in _POSITIONAL else None
        names += [parameter.name for parameter in parameters]
        # Wrappers (torch.compile, DistributedDataParallel) pass everything on.
        inside = getattr(inside, "_orig_mod", None) or getattr(inside, "module", None)
    if not takes_any:
        raise ValueError(
            f"mask={name!r}: the forward of {type(model).__name__} has no argument of this name"
            f"{closest(name, names)}; it takes {', '.join(names)}"
        )
    return None


class Masked(Route):
    """Route of a tap in a tracker with a mask: reads calls by their weights where the mask fits.

    Args:
        route: Route that reads the calls that the mask does not fit, and steps without one.
        routes: Routes of the tap.
        weights_of: Function of sizes (of a row view without its channels) and a device that gives
            the weights in the running step, or None.
    """

    __slots__ = ("_route", "_sizes", "_weights_of")

    def __init__(
        self,
        route: Route,
        routes: Routes,
        weights_of: Callable[[torch.Size, torch.device], Tensor | None],
    ) -> None:
        super().__init__(routes, route.layout)
        assert self.layout.key is not None
        assert self.layout.order is not None
        shape = self.layout.key[0]
        self._sizes = torch.Size([shape[dim] for dim in self.layout.order[:-1]])
        self._route = route
        self._weights_of = weights_of

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """Implementation of :meth:`Route.take`."""
        if not self.layout.fits(value):
            return False
        weights = self._weights_of(self._sizes, self.layout.device)
        if weights is None:
            return self._route.take(value, module, args)
        self.layer.read_weighted(value, self.layout, weights)
        return True
