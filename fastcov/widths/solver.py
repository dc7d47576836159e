"""Solver for whole widths under a budget: one unknown scale by bisection, then group by group.

It knows demands and a cost, nothing of spectra or networks.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import SupportsFloat, cast

from fastcov.names import closest

Widths = dict[str, int]
CostFn = Callable[[Widths], float]
Unit = tuple["WidthGroup", ...]

# Bisection ends at this relative width of its bracket: far below any step of a width, far above the
# rounding error of the products it compares, so that equal demands always jump together.
_BRACKET = 1e-9
_MOST_DOUBLINGS = 64
_MOST_SWAPS = 24
_MOST_SWAP_TRIALS = 32
# Share of the formula's width by which the adjustment may leave it, where that is more than a step.
_MOST_STRAY = 0.05


@dataclass(frozen=True)
class WidthGroup:
    """Modules that must have one channel count.

    Args:
        name: Name of the group, as in a width file.
        members: Names of the feature maps (as in the spectra) whose demand is averaged.
        width: Channel count in the network that was measured.
        multiple: Widths are rounded to multiples of this.
        floor: No width goes below this (rounded up to the multiple).
    """

    name: str
    members: tuple[str, ...]
    width: int
    multiple: int = 8
    floor: int = 8

    def __post_init__(self) -> None:
        members: object = self.members
        if isinstance(members, str):
            raise TypeError(
                f"width group {self.name!r}: members is the text {members!r}; give a tuple, "
                f"({members!r},)"
            )
        for field in ("width", "multiple", "floor"):
            value = getattr(self, field)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(
                    f"width group {self.name!r}: {field} is {value!r}; give a whole number of at "
                    "least 1"
                )

    @property
    def least(self) -> int:
        """Floor, rounded up to the multiple."""
        return -(-self.floor // self.multiple) * self.multiple

    def nearest(self, target: float) -> int:
        """Allowed width nearest to ``target`` (halves go up)."""
        return max(self.least, math.floor(target / self.multiple + 0.5) * self.multiple)


class Solver:
    """Bisection of alpha and the group-by-group adjustment, over one cached cost.

    Args:
        groups: Width groups.
        demands: Channels that each group asks for, by group name.
        cost_fn: Cost of widths ``{group name: channels}``, which must not fall as they grow.
        budget: The most that widths may cost; None = the current widths' cost.
        tolerance: Fraction of the budget that may be left.

    Attributes:
        extra_limit: Further condition on widths; True for all unless it is set.

    Raises:
        ValueError: If the groups, demands or budget are unusable, or the floors cost too much.
    """

    def __init__(
        self,
        groups: Sequence[WidthGroup],
        demands: Mapping[str, float],
        cost_fn: CostFn,
        budget: float | None,
        tolerance: float,
    ) -> None:
        self.groups = _checked(groups)
        self.names = tuple(group.name for group in self.groups)
        self.demands = _checked_demands(self.groups, demands)
        self.scale = max(self.demands.values())
        self.cost = cached(cost_fn, self.names)
        self.tolerance = tolerance
        self.extra_limit: Callable[[Widths], bool] = lambda widths: True
        current = {group.name: group.width for group in self.groups}
        self.budget = self.cost(current) if budget is None else number("budget", budget)
        if not math.isfinite(self.budget) or self.budget <= 0:
            raise ValueError(f"budget is {self.budget}; give a positive number")
        least = self.cost(self.floors())
        if least > self.budget:
            raise ValueError(
                f"no plan can exist: the floors alone cost {shown(least)}, above the budget of "
                f"{shown(self.budget)}; lower the floors or raise the budget"
            )

    def floors(self) -> Widths:
        """Smallest allowed widths."""
        return {group.name: group.least for group in self.groups}

    def target(self, group: WidthGroup, alpha: float, power: float) -> float:
        """Width that the formula gives a group, before rounding."""
        share = self.demands[group.name] / self.scale
        return alpha * (share**power if share > 0 else 0.0)

    def widths(self, alpha: float, power: float) -> Widths:
        """Widths that the formula gives all groups, rounded."""
        return {g.name: g.nearest(self.target(g, alpha, power)) for g in self.groups}

    def bisect(self, power: float) -> tuple[float, Widths]:
        """Largest alpha whose rounded widths cost no more than the budget, and these widths."""
        # The largest demand gets alpha itself, so today's largest width is a close first guess.
        low, high = 0.0, float(max(group.width for group in self.groups))
        for _ in range(_MOST_DOUBLINGS):
            if self.cost(self.widths(high, power)) > self.budget:
                break
            low, high = high, 2 * high
        else:
            raise ValueError(
                f"no plan can exist: the cost stays below the budget of {shown(self.budget)} "
                "at any width; check that the cost function reads the widths it is given"
            )
        while high - low > _BRACKET * high:
            middle = (low + high) / 2
            if self.cost(self.widths(middle, power)) > self.budget:
                high = middle
            else:
                low = middle
        return low, self.widths(low, power)

    def adjust(self, widths: Widths, alpha: float, power: float) -> Widths:
        """Widths that spend the rest that rounding left; equal demands move together first."""
        targets = {g.name: max(self.target(g, alpha, power), 1e-12) for g in self.groups}
        ties: dict[tuple[float, int, int], list[WidthGroup]] = {}
        for group in self.groups:
            ties.setdefault((self.demands[group.name], group.multiple, group.least), []).append(
                group
            )
        together = [tuple(members) for members in ties.values()]
        for units in (together, [(group,) for group in self.groups]):
            widths = self._fill(widths, units, targets)
            for _ in range(_MOST_SWAPS):
                if self._is_spent(widths):
                    return widths
                swapped = self._swap(widths, units, targets)
                if swapped is None:
                    break
                widths = self._fill(swapped, units, targets)
        return widths

    def _is_spent(self, widths: Widths) -> bool:
        return self.cost(widths) >= (1 - self.tolerance) * self.budget

    def _fits(self, widths: Widths) -> bool:
        return self.cost(widths) <= self.budget and self.extra_limit(widths)

    def _fill(self, widths: Widths, units: Sequence[Unit], targets: Mapping[str, float]) -> Widths:
        """Widths after steps up, one at a time, the most underserved unit first, while one fits."""
        while not self._is_spent(widths):
            raised = (
                _step(widths, unit, +1)
                for unit in sorted(units, key=lambda unit: _strain(widths, unit, +1, targets))
            )
            found = next((w for w in raised if self._is_fair(w, targets) and self._fits(w)), None)
            if found is None:
                break
            widths = found
        return widths

    def _swap(
        self, widths: Widths, units: Sequence[Unit], targets: Mapping[str, float]
    ) -> Widths | None:
        """Widths with one unit up and another down, nearer to the budget; None without such."""
        here = self.cost(widths)
        gap = self.budget - here
        can_fall = [u for u in units if all(widths[g.name] - g.multiple >= g.least for g in u)]
        gain = {u: self.cost(_step(widths, u, +1)) - here for u in units}
        saving = {u: here - self.cost(_step(widths, u, -1)) for u in can_fall}
        pairs = [(u, v) for u in units for v in can_fall if u is not v and gain[u] > saving[v]]

        # Sums of single steps predict a swap up to the product of two steps: good for an order.
        def rank(pair: tuple[Unit, Unit]) -> tuple[bool, float]:
            up, down = pair
            left = gap - (gain[up] - saving[down])
            strain = _strain(widths, up, +1, targets) - _strain(widths, down, 0, targets)
            return not 0 <= left <= self.tolerance * self.budget, strain

        best: Widths | None = None
        for up, down in sorted(pairs, key=rank)[:_MOST_SWAP_TRIALS]:
            swapped = _step(_step(widths, up, +1), down, -1)
            if not self._is_fair(swapped, targets) or not self._fits(swapped):
                continue
            if self._is_spent(swapped):
                return swapped
            if self.cost(swapped) > (here if best is None else self.cost(best)):
                best = swapped
        return best

    def _is_fair(self, widths: Widths, targets: Mapping[str, float]) -> bool:
        """True if no width is far from its target, and the order of demands is kept.

        Without the first, a group whose floor or multiple is its own could be traded away.
        """
        for group in self.groups:
            target = targets[group.name]
            stray = abs(widths[group.name] - group.nearest(target))
            if stray > max(group.multiple, _MOST_STRAY * target):
                return False
        return self._is_ordered(widths)

    def _is_ordered(self, widths: Widths) -> bool:
        """True if no larger demand is narrower, and equal demands stay within one step."""
        kinds: dict[tuple[int, int], list[WidthGroup]] = {}
        for group in self.groups:
            kinds.setdefault((group.multiple, group.least), []).append(group)
        for (multiple, _), members in kinds.items():
            members.sort(key=lambda group: (self.demands[group.name], widths[group.name]))
            for below, above in itertools.pairwise(members):
                if widths[above.name] < widths[below.name]:
                    return False
            lowest: dict[float, int] = {}
            for group in members:
                least = lowest.setdefault(self.demands[group.name], widths[group.name])
                if widths[group.name] - least > multiple:
                    return False
        return True


def _step(widths: Widths, unit: Unit, steps: int) -> Widths:
    return widths | {group.name: widths[group.name] + steps * group.multiple for group in unit}


def _strain(widths: Widths, unit: Unit, steps: int, targets: Mapping[str, float]) -> float:
    """Logarithm of a unit's width after the steps over its target, the largest in the unit."""
    moved = _step(widths, unit, steps)
    return max(math.log(moved[group.name] / targets[group.name]) for group in unit)


def number(name: str, value: object) -> float:
    """Float of an argument; infinite where it is beyond float64.

    Raises:
        TypeError: If it is no real number; names the argument.
    """
    try:
        if isinstance(value, (str, bytes, bool)):
            raise TypeError
        return float(cast(SupportsFloat, value))
    except OverflowError:
        return math.inf
    except (TypeError, ValueError):
        raise TypeError(f"{name} is {value!r}; give a real number") from None


def shown(count: float) -> str:
    """Text of a number of MACs or parameters."""
    return f"{count:,.0f}" if 1 <= count < 1e15 else f"{count:g}"


def cached(cost_fn: CostFn, names: tuple[str, ...]) -> CostFn:
    """Cost function that is called once for the same widths, and refuses impossible costs."""
    known: dict[tuple[int, ...], float] = {}

    def cost(widths: Widths) -> float:
        key = tuple(widths[name] for name in names)
        if key not in known:
            found = cost_fn(dict(zip(names, key, strict=True)))
            value = number(f"the cost of widths {widths}", found)
            if not math.isfinite(value) or value < 0:
                raise ValueError(f"the cost of widths {widths} is {value}; it must be finite")
            known[key] = value
        return known[key]

    return cost


def _checked(groups: Sequence[WidthGroup]) -> Unit:
    if not groups:
        raise ValueError("no width groups given; there is nothing to set")
    names = [group.name for group in groups]
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        raise ValueError(f"width groups named twice: {', '.join(twice)}; names must differ")
    return tuple(groups)


def _checked_demands(
    groups: Sequence[WidthGroup], demands: Mapping[str, float]
) -> dict[str, float]:
    checked: dict[str, float] = {}
    for group in groups:
        if group.name not in demands:
            raise ValueError(
                f"no demand for width group {group.name!r}{closest(group.name, demands)}"
            )
        value = number(f"the demand of width group {group.name!r}", demands[group.name])
        if not math.isfinite(value) or value < 0:
            raise ValueError(
                f"width group {group.name!r}: its demand is {value}; it must be finite"
            )
        checked[group.name] = value
    if max(checked.values()) <= 0:
        raise ValueError(
            "every width group has demand 0 (all feature maps are constant zero); train the "
            "network before reading its spectra"
        )
    return checked
