"""Consumers of one tensor share one layer.

Two modules see the same tensor if they are given the same object in the same version: an in-place
operation between them keeps the object and raises its version. Inference tensors have no version,
and compiled code writes to tensors without raising it: there nothing is shared. Nor is it where the
two hold their channels in different dimensions: one tensor is then other rows to each.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from typing import Any, Literal
from weakref import ref

from torch import Tensor, nn

from fastcov.stats.route import Route

Order = tuple[int, ...] | None
"""Dimensions of a tensor in the order of its row view, from fastcov.rows.view.row_order."""


class _Sighting:
    """A tensor as a tap has seen it, without keeping the tensor alive."""

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
    """Which input taps see the same tensors, call by call.

    The first tap that sees a tensor leads: its layer takes the rows. A tap that sees the same
    tensor in the same step, and has no rows yet, follows. A tap whose first step is over leads no
    further taps: they would show rows of steps in which they did not run. Sharing ends where the
    two see different tensors: a branch that runs at times, a module called once more than the
    other. Others may have seen some of the tensors before both: the heads of a detector share all
    levels, though the last one also feeds a coarser level.

    Attributes:
        owner: The leading tap, by following tap.
    """

    def __init__(self) -> None:
        self.owner: dict[int, int] = {}
        # Of the running step: sightings of each tap, and the taps in the order of all calls.
        self._sightings: defaultdict[int, list[_Sighting]] = defaultdict(list)
        self._order: list[int] = []
        self._apart: set[int] = set()  # split once: they never share again
        self._settled: set[int] = set()  # their first step is over

    def end_step(self) -> list[int]:
        """Forgets the tensors of a step.

        Returns:
            Taps whose first step it was.
        """
        new = [tap for tap, seen in self._sightings.items() if seen and tap not in self._settled]
        self._settled.update(new)
        self.forget_step()
        return new

    def settle(self, tap: int) -> None:
        """Notes that the first step of a tap was in an earlier run."""
        self._settled.add(tap)

    def forget_step(self) -> None:
        """Forgets the tensors of a step that may not have ended."""
        for sightings in self._sightings.values():
            sightings.clear()
        self._order.clear()

    def is_noted(self, tap: int) -> bool:
        """True if other taps may ask which tensors a tap has seen."""
        return tap not in self._settled or tap in self.owner.values()

    def note(self, tap: int, tensor: Tensor, order: Order) -> None:
        """Keeps the tensor that a tap has just seen."""
        self._sightings[tap].append(_Sighting(tensor, order))
        self._order.append(tap)

    def see(
        self, tap: int, tensor: Tensor, order: Order, has_rows: bool
    ) -> Literal["reads", "shares", "splits"]:
        """Role of a tap in one call.

        Args:
            tap: The tap.
            tensor: Input of its module.
            order: Where the tap takes the tensor's channels to be; None shares with nobody.
            has_rows: True if the tap has read rows of its own.

        Returns:
            "reads" for itself, "shares" the rows of ``owner[tap]``, or "splits" from its owner
            and reads for itself from now on.
        """
        owner = self.owner.get(tap)
        if owner is None:
            first = None if has_rows or tap in self._apart else self._first(tensor, order)
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
        """True if a tap has seen the same rows in this step: see the module's description."""
        version = _version_of(tensor)
        return any(sighting.is_of(tensor, version, order) for sighting in self._sightings[tap])

    def _first(self, tensor: Tensor, order: Order) -> int | None:
        version = _version_of(tensor)
        calls = {tap: iter(sightings) for tap, sightings in self._sightings.items()}
        for tap in self._order:
            if next(calls[tap]).is_of(tensor, version, order) and tap not in self._settled:
                return tap
        return None

    def split(self, tap: int) -> None:
        """Ends a tap's sharing, for good."""
        self.owner.pop(tap, None)
        self._apart.add(tap)

    def diverged(self) -> list[int]:
        """Taps that were called more or less often than their owner in this step; they split."""
        taps = [
            tap
            for tap, owner in self.owner.items()
            if len(self._sightings[tap]) != len(self._sightings[owner])
        ]
        for tap in taps:
            self.split(tap)
        return taps


class Leading(Route):
    """Route of a tap whose tensors others may share: they are told of each.

    Args:
        route: How the calls are read.
        note: Function that keeps a tensor and its order: :meth:`SharedInputs.note` of the tap.
        order: Order of the route's layout.
    """

    __slots__ = ("_note", "_order", "_route")

    def __init__(self, route: Route, note: Callable[[Tensor, Order], None], order: Order) -> None:
        self._route = route
        self._note = note
        self._order = order

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """See :meth:`fastcov.stats.route.Route.take`."""
        if not self._route.take(value, module, args):
            return False
        self._note(value, self._order)
        return True


class Following(Route):
    """Route of a tap that shares: nothing is read where the leader has seen the tensor.

    Args:
        inputs: All sightings.
        tap: The following tap.
        leader: The tap that reads.
        order: Order of the following tap, for tensors of as many dimensions.
    """

    __slots__ = ("_inputs", "_leader", "_order", "_tap")

    def __init__(self, inputs: SharedInputs, tap: int, leader: int, order: tuple[int, ...]) -> None:
        self._inputs = inputs
        self._tap = tap
        self._leader = leader
        self._order = order

    def take(self, value: Tensor, module: nn.Module, args: Any) -> bool:
        """See :meth:`fastcov.stats.route.Route.take`."""
        del module, args
        inputs = self._inputs
        if value.dim() != len(self._order):
            return False
        if not inputs.is_seen_by(self._leader, value, self._order):
            return False
        inputs.note(self._tap, value, self._order)
        return True
