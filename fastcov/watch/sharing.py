"""Sharing of inputs: modules that consume one tensor share one layer, and its rows are read once.

Two modules see the same tensor if they are given the same object in the same version: an in-place
operation between the two keeps the object and raises its version. Nothing is shared where this
cannot be told: inference tensors have no version, and compiled code writes without raising it. Nor
do modules share that hold their channels in different dimensions: the same tensor then holds
different rows for each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal
from weakref import ref

from torch import Tensor, nn

from fastcov.stats.route import Route

Order = tuple[int, ...] | None
"""Dimensions of a tensor in the order of its row view: see :func:`fastcov.rows.view.row_order`."""


class _Sighting:
    """Record of a tensor that a tap saw: identity, version and order. Does not keep it alive."""

    __slots__ = ("_order", "_tensor", "_version")

    def __init__(self, tensor: Tensor, order: Order) -> None:
        self._tensor = ref(tensor)
        self._version = _version_of(tensor)
        self._order = order

    def is_of(self, tensor: Tensor, version: int | None, order: Order) -> bool:
        return (
            version is not None
            and order is not None
            and self._version == version
            and self._order == order
            and self._tensor() is tensor
        )


def _version_of(tensor: Tensor) -> int | None:
    return None if tensor.is_inference() else tensor._version


class SharedInputs:
    """Record of the tensors that input taps see, which finds the taps that see the same ones.

    The first tap that sees a tensor is the owner: its layer takes the rows. A tap that sees the
    same tensor in the same step, and has no rows yet, follows the owner. A tap whose first step is
    over gets no new followers: these would show rows of steps in which they did not run.

    A follower splits from its owner, for good, once the two see different tensors: as a branch
    that runs at times, or a module called once more than the other. Only these two are compared.
    Other taps may have seen some of the tensors first: the heads of a detector share all levels,
    though the convolution that makes a coarser level sees the last one before them.

    Attributes:
        owner: Number of the owning tap, by number of the following tap.
    """

    def __init__(self) -> None:
        self.owner: dict[int, int] = {}
        # Sightings in the running step: those of each tap, and the tap of each in order of calls.
        self._sightings: defaultdict[int, list[_Sighting]] = defaultdict(list)
        self._calling_taps: list[int] = []
        self._never_shares: set[int] = set()  # taps that split once
        self._past_first_step: set[int] = set()  # taps that get no new followers

    def end_step(self) -> list[int]:
        """Removal of a step's tensors; returns the taps whose first step this was."""
        new = [
            tap
            for tap, sightings in self._sightings.items()
            if sightings and tap not in self._past_first_step
        ]
        self._past_first_step.update(new)
        self.forget_step()
        return new

    def settle(self, tap: int) -> None:
        """Note that the first step of a tap was in an earlier run."""
        self._past_first_step.add(tap)

    def forget_step(self) -> None:
        """Removal of the tensors of a step that may not have ended."""
        for sightings in self._sightings.values():
            sightings.clear()
        self._calling_taps.clear()

    def is_noted(self, tap: int) -> bool:
        """True if a tap's tensors must be noted: it has followers, or may still get some."""
        return tap not in self._past_first_step or tap in self.owner.values()

    def note(self, tap: int, tensor: Tensor, order: Order) -> None:
        """Note that a tap has just seen a tensor."""
        self._sightings[tap].append(_Sighting(tensor, order))
        self._calling_taps.append(tap)

    def see(
        self, tap: int, tensor: Tensor, order: Order, has_rows: bool
    ) -> Literal["reads", "shares", "splits"]:
        """Role of a tap in one call; notes the tensor.

        Args:
            tap: Number of the tap.
            tensor: Input of the tap's module.
            order: The tap's order of the tensor's dimensions; None shares with nobody.
            has_rows: True if the tap has read rows of its own.

        Returns:
            "reads": the tap reads for itself. "shares": ``owner[tap]`` has read the rows already.
            "splits": the tap leaves its owner and reads for itself from now on.
        """
        owner = self.owner.get(tap)
        if owner is None:
            is_free = not has_rows and tap not in self._never_shares
            first = self._first_to_see(tensor, order) if is_free else None
            self.note(tap, tensor, order)
            if first is None or first == tap:
                return "reads"
            self.owner[tap] = first
            return "shares"
        is_shared = self.is_seen_by(owner, tensor, order)
        self.note(tap, tensor, order)
        if is_shared:
            return "shares"
        self.split(tap)
        return "splits"

    def is_seen_by(self, tap: int, tensor: Tensor, order: Order) -> bool:
        """True if a tap has seen a tensor's rows, in this order, in the running step."""
        version = _version_of(tensor)
        return any(sighting.is_of(tensor, version, order) for sighting in self._sightings[tap])

    def _first_to_see(self, tensor: Tensor, order: Order) -> int | None:
        version = _version_of(tensor)
        calls = {tap: iter(sightings) for tap, sightings in self._sightings.items()}
        for tap in self._calling_taps:
            is_same = next(calls[tap]).is_of(tensor, version, order)
            if is_same and tap not in self._past_first_step:
                return tap
        return None

    def split(self, tap: int) -> None:
        """End of a tap's sharing, for good."""
        self.owner.pop(tap, None)
        self._never_shares.add(tap)

    def split_diverged(self) -> list[int]:
        """End of the sharing of followers called more or less often than their owner."""
        taps = [
            tap
            for tap, owner in self.owner.items()
            if len(self._sightings[tap]) != len(self._sightings[owner])
        ]
        for tap in taps:
            self.split(tap)
        return taps


class Leading(Route):
    """Route of a tap that may have followers: notes each tensor that the route inside has read."""

    __slots__ = ("_note", "_order", "_route")

    def __init__(self, route: Route, note: Callable[[Tensor, Order], None], order: Order) -> None:
        self._route = route
        self._note = note
        self._order = order

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """Implementation of :meth:`fastcov.stats.route.Route.take`."""
        if not self._route.take(value, module, args):
            return False
        self._note(value, self._order)
        return True


class Following(Route):
    """Route of a tap that follows: takes the calls whose tensor the owner has read already.

    A tensor of more or fewer dimensions than the tap's order is not taken.
    """

    __slots__ = ("_inputs", "_order", "_owner", "_tap")

    def __init__(self, inputs: SharedInputs, tap: int, leader: int, order: tuple[int, ...]) -> None:
        self._inputs = inputs
        self._tap = tap
        self._owner = leader
        self._order = order

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """Implementation of :meth:`fastcov.stats.route.Route.take`."""
        del module, args
        inputs = self._inputs
        if value.dim() != len(self._order):
            return False
        if not inputs.is_seen_by(self._owner, value, self._order):
            return False
        inputs.note(self._tap, value, self._order)
        return True
