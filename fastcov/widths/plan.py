r"""Plans of widths: the demand of every width group, and widths that meet a budget.

A width group is a set of modules that must share one channel count (the outputs of a residual
stage, the inner convolution of a bottleneck). Its demand :math:`d` is a measure of the spectrum of
its feature maps, averaged over its members, and its width is

.. math:: w = \operatorname{round}_m(\alpha \, d^{\,p})

where :math:`\alpha` is found by bisection, without limits, so that the cost (multiply-accumulates)
meets the budget, :math:`m` is the group's rounding multiple, and :math:`p` is 1 unless a cap on the
parameters flattens it. Rounding alone moves the cost by several per cent, so the widths are then
adjusted group by group until the cost is within the tolerance below the budget. It is never above.

Laws of every plan:

- ``cost(widths) <= budget``, and within the tolerance of it unless no single step of any group
  fits;
- of two groups with one multiple and one floor, the one with the larger demand is never narrower,
  and groups of equal demand get equal widths unless only a difference of one multiple meets the
  budget;
- the widths depend on ratios of demands alone.

GroupNorm is left ``gcd(32, width)`` groups: at least eight where widths are multiples of 8.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from fastcov.names import closest
from fastcov.spectra.spectrum import Spectrum
from fastcov.widths.rules import Rule, find_rule
from fastcov.widths.solver import CostFn, Solver, Widths, cached, number, shown
from fastcov.widths.solver import WidthGroup as WidthGroup


@dataclass(frozen=True)
class WidthPlan:
    """Widths that meet a budget, and how they came about.

    Args:
        widths: Channels by group name.
        demand: Channels that each group asks for, by group name; the widths follow it.
        macs: Multiply-accumulates of the widths.
        budget: The most multiply-accumulates.
        alpha: Factor of the formula; 0 or infinite where a large power leaves float64.
        rule: Name of the measure behind ``demand``.
        power: Exponent of the formula.
        params: Parameters of the widths; None without a ``param_fn``.
        notes: Sentences on departures from the formula: floors, a cap, MACs left over.
    """

    widths: Widths
    demand: dict[str, float]
    macs: float
    budget: float
    alpha: float
    rule: str
    power: float = 1.0
    params: float | None = None
    notes: tuple[str, ...] = ()


def demand(
    spectra: Mapping[str, Spectrum],
    groups: Sequence[WidthGroup],
    rule: str | Rule | Callable[[Spectrum], float] = "dof",
) -> dict[str, float]:
    """Demand of every group: a measure of each member's spectrum, averaged over the members.

    Args:
        spectra: Spectrum of every feature map, by name.
        groups: Width groups; every member must have a spectrum.
        rule: ``"dof"`` (degrees of freedom at 1e-3 of the largest eigenvalue), ``"share"`` (rank
            that holds 99 % of the variance), ``"relative"`` or ``"absolute"`` (eigenvalues above
            1e-3 of the largest, or above 1e-3 itself), ``"gradient"`` (degrees of freedom at 1e-3
            of the largest eigenvalue of all groups, for spectra that share one unit; see
            :mod:`fastcov.widths.rules`), a :class:`Rule`, or a function of one spectrum.

    Returns:
        Channels that each group asks for, by group name: positive numbers, not yet rounded.

    Raises:
        TypeError: If ``spectra`` is no mapping, or one of ``groups`` is no :class:`WidthGroup`.
        ValueError: If a rule or a member is unknown, or a demand is negative or not finite.
    """
    if not isinstance(spectra, Mapping):
        raise TypeError(
            f"spectra is a {type(spectra).__name__}; give a mapping, as tracker.spectra() is"
        )
    for group in groups:
        if not isinstance(group, WidthGroup):
            raise TypeError(f"groups holds {group!r}; give a sequence of fastcov.WidthGroup")
        _check_members(group, spectra)
    found = find_rule(rule)
    members = {member for group in groups for member in group.members}
    largest = max((float(spectra[member].eigenvalues.max()) for member in members), default=0.0)
    demands: dict[str, float] = {}
    for group in groups:
        values = [
            number(f"the demand of {member!r}", found.demand(spectra[member], largest))
            for member in group.members
        ]
        mean = math.fsum(values) / len(values)
        if not math.isfinite(mean) or mean < 0:
            raise ValueError(
                f"width group {group.name!r}: its demand is {mean}; check the spectra of "
                f"{', '.join(group.members)} for NaN"
            )
        demands[group.name] = mean
    return demands


def _check_members(group: WidthGroup, spectra: Mapping[str, Spectrum]) -> None:
    if not group.members:
        raise ValueError(f"width group {group.name!r} has no members; nothing to measure")
    for member in group.members:
        if member not in spectra:
            raise ValueError(
                f"width group {group.name!r} needs the spectrum of {member!r}, which was not "
                f"measured{closest(member, spectra)}; measure it or leave the group out"
            )


def suggest_widths(
    spectra: Mapping[str, Spectrum],
    groups: Sequence[WidthGroup],
    mac_fn: CostFn,
    budget: float | None = None,
    *,
    rule: str | Rule | Callable[[Spectrum], float] = "dof",
    power: float = 1.0,
    max_params: float | None = None,
    param_fn: CostFn | None = None,
    tolerance: float = 0.005,
) -> WidthPlan:
    """Widths in proportion to the directions that each group's spectrum uses, at no more MACs.

    Args:
        spectra: Spectrum of every member of every group, by name, as ``tracker.spectra()`` gives.
        groups: Width groups.
        mac_fn: Multiply-accumulates of the network with widths ``{group name: channels}``.
        budget: The most MACs; None = those of the groups' current widths.
        rule: Measure of a spectrum that counts; see :func:`demand`.
        power: Exponent of the demand, positive and finite.
        max_params: Cap on ``param_fn(widths)``; the power is lowered until it holds.
        param_fn: Parameters of the network with widths ``{group name: channels}``; needed for
            ``max_params``.
        tolerance: Fraction of the budget that may be left.

    Returns:
        A plan whose MACs are never above the budget; ``plan.widths`` is ``{group name: channels}``.

    Raises:
        TypeError: If an argument that is to be a number, a cost or a demand is none.
        ValueError: If no plan can exist (the floors alone exceed the budget or the cap, or the
            cost never reaches the budget), the demand is unusable, or an argument is out of range.

    Example:
        >>> import torch
        >>> from fastcov import Spectrum, WidthGroup
        >>> full = Spectrum(torch.ones(64), count=4096, total=64.0)
        >>> half = Spectrum((torch.arange(64) < 32).float(), count=4096, total=32.0)
        >>> groups = [WidthGroup("a", ("conv1",), 64), WidthGroup("b", ("conv2",), 64)]
        >>> suggest_widths({"conv1": half, "conv2": full}, groups, lambda w: w["a"] * w["b"]).widths
        {'a': 40, 'b': 96}
    """
    return solve_widths(
        groups,
        demand(spectra, groups, rule),
        mac_fn,
        budget,
        rule=find_rule(rule).name,
        power=power,
        max_params=max_params,
        param_fn=param_fn,
        tolerance=tolerance,
    )


def solve_widths(
    groups: Sequence[WidthGroup],
    demands: Mapping[str, float],
    mac_fn: CostFn,
    budget: float | None = None,
    *,
    rule: str = "given",
    power: float = 1.0,
    max_params: float | None = None,
    param_fn: CostFn | None = None,
    tolerance: float = 0.005,
) -> WidthPlan:
    """Widths in proportion to demands that are already numbers.

    Args:
        groups: Width groups.
        demands: Channels that each group asks for, by group name.
        mac_fn: See :func:`suggest_widths`, which has the following arguments too.
        budget: The most MACs.
        rule: Name of the measure behind the demands, for the plan.
        power: Exponent of the demand.
        max_params: Cap on the parameters.
        param_fn: Parameters of widths.
        tolerance: Fraction of the budget that may be left.

    Returns:
        A plan whose MACs are never above the budget.

    Raises:
        ValueError: See :func:`suggest_widths`.
    """
    power, tolerance = number("power", power), number("tolerance", tolerance)
    max_params = None if max_params is None else number("max_params", max_params)
    if not (math.isfinite(power) and power > 0):
        raise ValueError(
            f"power is {power}; give a positive, finite exponent: 1 follows the demand, less "
            "flattens it"
        )
    if max_params is not None and not (math.isfinite(max_params) and max_params > 0):
        raise ValueError(f"max_params is {max_params}; give a positive, finite number, or None")
    if max_params is not None and param_fn is None:
        raise ValueError("max_params needs param_fn, which counts the parameters of given widths")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; give a fraction from 0 to below 1")
    solver = Solver(groups, demands, mac_fn, budget, tolerance)
    params = None if param_fn is None else cached(param_fn, solver.names)
    notes: list[str] = []
    used_power, alpha, start = power, *solver.bisect(power)
    if params is not None and max_params is not None:
        solver.extra_limit = _below(params, max_params)
    if params is not None and max_params is not None and params(start) > max_params:
        used_power, alpha, start = _flatten(solver, params, max_params, power)
        notes.append(
            f"the cap of {shown(max_params)} parameters lowered the exponent from {power:g} to "
            f"{used_power:.3f}"
        )
    widths = solver.adjust(start, alpha, used_power)
    held = [
        g.name for g in groups if solver.target(g, alpha, used_power) < g.least - g.multiple / 2
    ]
    if held:
        notes.append(f"held at their floor: {', '.join(held)}")
    macs = solver.cost(widths)
    if macs < (1 - tolerance) * solver.budget:
        notes.append(
            f"MACs stay {100 * (1 - macs / solver.budget):.1f} % below the budget: no single step "
            "of a group fits"
        )
    return WidthPlan(
        widths=widths,
        demand=dict(solver.demands),
        macs=macs,
        budget=solver.budget,
        alpha=_unscaled(alpha, solver.scale, used_power),
        rule=rule,
        power=used_power,
        params=None if params is None else params(widths),
        notes=tuple(notes),
    )


def _unscaled(alpha: float, scale: float, power: float) -> float:
    # alpha / scale**power, where a large power may leave float64.
    exponent = math.log(alpha) - power * math.log(scale) if alpha > 0 else -math.inf
    return math.exp(exponent) if exponent < math.log(sys.float_info.max) else math.inf


def _below(params: CostFn, max_params: float) -> Callable[[Widths], bool]:
    return lambda widths: params(widths) <= max_params


def _flatten(
    solver: Solver, params: CostFn, max_params: float, power: float
) -> tuple[float, float, Widths]:
    """Largest power in [0, power] at which the budget's widths keep the cap on parameters."""
    if (least := params(solver.floors())) > max_params:
        raise ValueError(
            f"no plan can exist: the floors alone need {shown(least)} parameters, above max_params "
            f"= {shown(max_params)}; lower the floors or raise the cap"
        )
    low, high = 0.0, power
    alpha, start = solver.bisect(low)
    if params(start) > max_params:
        # Even equal widths are too many: the cap binds alone and the MACs fall below the budget.
        capped = Solver(solver.groups, solver.demands, params, max_params, 0.0)
        return power, *capped.bisect(power)
    for _ in range(12):
        middle = (low + high) / 2
        tried_alpha, tried = solver.bisect(middle)
        if params(tried) <= max_params:
            low, alpha, start = middle, tried_alpha, tried
        else:
            high = middle
    return low, alpha, start
