r"""From spectra to widths: the demand of every width group, and widths that meet a budget.

A width group is a set of modules that must share one channel count (the outputs of a residual
stage, the inner convolution of a bottleneck). Its demand :math:`d` is a measure of the spectrum of
its feature maps, averaged over its members, and its width is

.. math:: w = \operatorname{round}_m(\alpha \, d^{\,p})

where :math:`\alpha` is found by bisection, without limits, so that the cost (multiply-accumulates)
meets the budget, :math:`m` is the group's rounding multiple, and :math:`p` is 1 unless a cap on the
parameters flattens it. Rounding alone moves the cost by several per cent, so the widths are then
adjusted group by group until the cost is within the tolerance below the budget. It is never above.

What holds for every plan:

- ``cost(widths) <= budget``, and within the tolerance of it unless no single step of any group
  fits;
- of two groups with one multiple and one floor, the one with the larger demand is never narrower,
  and groups of equal demand get equal widths unless only a difference of one multiple meets the
  budget;
- the widths depend on ratios of demands alone.

A spectrum of features alone says how many directions a map has, not whether anything reads them: a
map that a norm has just scaled to unit variance is full, whatever the next layer makes of it. The
rule ``"gradient"`` is for spectra of :math:`S^{1/2} G S^{1/2}`, where :math:`S` is a map's
covariance and :math:`G` that of the loss's gradient with respect to the map. An eigenvalue is then
what the loss would feel, to first order, if its direction went (squared), a unit that all maps
share, so that one threshold holds for the whole network.

GroupNorm is left ``gcd(32, width)`` groups: at least eight where widths are multiples of 8.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, Protocol, get_args

from torch import Tensor

from fastcov.widths.solver import CostFn, Solver, WidthGroup, Widths, cached, closest

__all__ = [
    "Rule",
    "SpectrumLike",
    "WidthGroup",
    "WidthPlan",
    "demand",
    "power_widths",
    "random_widths",
    "solve_widths",
    "suggest_widths",
    "uniform_widths",
]

_LARGEST_POWER = 2.0
_MOST_POWERS = 10
_CLOSE = 0.02
# Of the network's largest eigenvalue, under the rule "gradient".
_GRADIENT_SHARE = 1e-3

Rule = Literal["dof", "share", "relative", "absolute", "gradient"]


class SpectrumLike(Protocol):
    """The part of :class:`fastcov.Spectrum` that a demand reads."""

    @property
    def eigenvalues(self) -> Tensor: ...

    def dim(self, threshold: float = ..., relative: bool = ...) -> int: ...

    def rank_at(self, share: float = ...) -> int: ...

    def dof(self, lam: float | None = ...) -> float: ...


@dataclass(frozen=True)
class WidthPlan:
    """Widths that meet a budget, and how they came about.

    ``demand`` is what the widths follow, ``alpha`` and ``power`` are the formula's, ``params`` is
    None without a ``param_fn``, and ``notes`` says what bent the formula: floors, a cap, a rest.
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
    spectra: Mapping[str, SpectrumLike],
    groups: Sequence[WidthGroup],
    rule: Rule | Callable[[SpectrumLike], float] = "dof",
) -> dict[str, float]:
    """Demand of every group: a measure of each member's spectrum, averaged over the members.

    Args:
        spectra: Spectrum of every feature map, by name.
        groups: Width groups; every member must have a spectrum.
        rule: ``"dof"`` (degrees of freedom at 1e-3 of the largest eigenvalue), ``"share"`` (rank
            that holds 99 % of the variance), ``"relative"`` or ``"absolute"`` (eigenvalues above
            1e-3 of the largest, or above 1e-3 itself), ``"gradient"`` (degrees of freedom at 1e-3
            of the largest eigenvalue of all groups, for spectra that share one unit; see the
            module's page), or a function of one spectrum.

    Returns:
        Channels that each group asks for, by group name: positive numbers, not yet rounded.

    Raises:
        ValueError: If a rule or a member is unknown, or a demand is negative or not finite.
    """
    for group in groups:
        _check_members(group, spectra)
    read = {member: spectra[member] for group in groups for member in group.members}
    measure = rule if callable(rule) else _measure(rule, read.values())
    demands: dict[str, float] = {}
    for group in groups:
        values = [float(measure(spectra[member])) for member in group.members]
        mean = math.fsum(values) / len(values)
        if not math.isfinite(mean) or mean < 0:
            raise ValueError(
                f"width group {group.name!r}: its demand is {mean}; check the spectra of "
                f"{', '.join(group.members)} for NaN"
            )
        demands[group.name] = mean
    return demands


def _check_members(group: WidthGroup, spectra: Mapping[str, SpectrumLike]) -> None:
    if not group.members:
        raise ValueError(f"width group {group.name!r} has no members; nothing to measure")
    for member in group.members:
        if member not in spectra:
            raise ValueError(
                f"width group {group.name!r} needs the spectrum of {member!r}, which was not "
                f"measured{closest(member, spectra)}; measure it or leave the group out"
            )


def suggest_widths(
    spectra: Mapping[str, SpectrumLike],
    groups: Sequence[WidthGroup],
    mac_fn: CostFn,
    budget: float | None = None,
    *,
    rule: Rule | Callable[[SpectrumLike], float] = "dof",
    power: float = 1.0,
    max_params: float | None = None,
    param_fn: CostFn | None = None,
    tolerance: float = 0.005,
) -> WidthPlan:
    """Widths in proportion to what each group's spectrum uses, at no more MACs.

    Args:
        spectra: Spectrum of every member of every group, by name, as ``tracker.spectra()`` gives.
        groups: Width groups.
        mac_fn: Multiply-accumulates of the network with widths ``{group name: channels}``.
        budget: The most MACs; None = those of the groups' current widths.
        rule: Which measure of a spectrum counts; see :func:`demand`.
        power: Exponent of the demand.
        max_params: Cap on ``param_fn(widths)``; the power is lowered until it holds.
        param_fn: Parameters, likewise; needed for ``max_params``.
        tolerance: How far below the budget the MACs may stay, as a fraction.

    Returns:
        ``{group name: channels}`` in its ``widths``, whose MACs are never above the budget.

    Raises:
        ValueError: If the floors alone exceed the budget or the cap, or the demand is unusable.

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
        rule=rule if isinstance(rule, str) else getattr(rule, "__name__", "custom"),
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
    """:func:`suggest_widths` for demands that are already numbers, by group name."""
    if max_params is not None and param_fn is None:
        raise ValueError("max_params needs param_fn, which counts the parameters of given widths")
    if not 0 <= tolerance < 1:
        raise ValueError(f"tolerance is {tolerance}; give a fraction from 0 to below 1")
    solver = Solver(groups, demands, mac_fn, budget, tolerance)
    params = None if param_fn is None else cached(param_fn, solver.names)
    notes: list[str] = []
    used_power, alpha, start = power, *solver.bisect(power)
    if params is not None and max_params is not None:
        solver.also = _below(params, max_params)
    if params is not None and max_params is not None and params(start) > max_params:
        used_power, alpha, start = _flatten(solver, params, max_params, power)
        notes.append(
            f"the cap of {max_params:,.0f} parameters lowered the exponent from {power:g} to "
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
        alpha=alpha / solver.scale**used_power,
        rule=rule,
        power=used_power,
        params=None if params is None else params(widths),
        notes=tuple(notes),
    )


def _below(params: CostFn, max_params: float) -> Callable[[Widths], bool]:
    return lambda widths: params(widths) <= max_params


def _flatten(
    solver: Solver, params: CostFn, max_params: float, power: float
) -> tuple[float, float, Widths]:
    """The largest power in [0, power] at which the budget's widths keep the cap on parameters."""
    if params(solver.floors()) > max_params:
        raise ValueError(
            f"the floors alone need {params(solver.floors()):,.0f} parameters, above max_params = "
            f"{max_params:,.0f}; lower the floors or raise the cap"
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


def power_widths(
    groups: Sequence[WidthGroup],
    mac_fn: CostFn,
    budget: float | None,
    power: float | None = None,
    *,
    params: float | None = None,
    param_fn: CostFn | None = None,
    tolerance: float = 0.005,
) -> WidthPlan:
    """Control without any spectrum: current widths to a power, at the same MACs.

    Give the power, or ``params`` and ``param_fn``: then the power is found (between 0 and 2) that
    brings the parameters nearest to ``params``.
    """
    current = {group.name: float(group.width) for group in groups}
    if power is None:
        if params is None or param_fn is None:
            raise ValueError("power_widths needs a power, or params together with param_fn")
        power = _matching_power(
            Solver(groups, current, mac_fn, budget, tolerance), param_fn, params
        )
    plan = solve_widths(
        groups,
        current,
        mac_fn,
        budget,
        rule=f"width^{power:.3f}",
        power=power,
        param_fn=param_fn,
        tolerance=tolerance,
    )
    if params is None or plan.params is None or abs(plan.params / params - 1) <= _CLOSE:
        return plan
    note = f"no power brings the parameters nearer to {params:,.0f} than {plan.params:,.0f}"
    return replace(plan, notes=(*plan.notes, note))


def _matching_power(solver: Solver, param_fn: CostFn, params: float) -> float:
    count = cached(param_fn, solver.names)
    low, high = 0.0, _LARGEST_POWER
    excess: dict[float, float] = {}

    def measure(power: float) -> float:
        alpha, start = solver.bisect(power)
        excess[power] = count(solver.adjust(start, alpha, power)) - params
        return excess[power]

    # The current shape is the middle guess; then straight lines between the two sides, until
    # the grain of the rounding.
    side = measure(1.0)
    low, high = (low, 1.0) if side > 0 else (1.0, high)
    measure(low if side > 0 else high)
    while len(excess) < _MOST_POWERS and excess[low] < 0 < excess[high]:
        if min(map(abs, excess.values())) <= solver.tolerance * params:
            break
        share = excess[low] / (excess[low] - excess[high])
        middle = low + (high - low) * min(max(share, 0.1), 0.9)
        low, high = (middle, high) if measure(middle) < 0 else (low, middle)
    return min(excess, key=lambda power: abs(excess[power]))


def random_widths(
    groups: Sequence[WidthGroup],
    mac_fn: CostFn,
    budget: float | None,
    seed: int,
    *,
    tolerance: float = 0.005,
) -> WidthPlan:
    """Control by chance: every current width times a factor drawn log-uniformly from [1/2, 2]."""
    draws = random.Random(seed)
    drawn = {group.name: group.width * 2.0 ** draws.uniform(-1.0, 1.0) for group in groups}
    return solve_widths(
        groups, drawn, mac_fn, budget, rule=f"random (seed {seed})", tolerance=tolerance
    )


def uniform_widths(
    groups: Sequence[WidthGroup],
    cost_fn: CostFn,
    params: float | None,
    *,
    tolerance: float = 0.005,
) -> WidthPlan:
    """Control of the same shape: the current widths scaled alike, at the same parameters.

    ``cost_fn`` counts parameters here, so the plan's ``macs`` and ``budget`` are parameters too.
    """
    current = {group.name: float(group.width) for group in groups}
    return solve_widths(groups, current, cost_fn, params, rule="uniform", tolerance=tolerance)


def _measure(rule: str, spectra: Iterable[SpectrumLike]) -> Callable[[SpectrumLike], float]:
    measures: dict[str, Callable[[SpectrumLike], float]] = {
        "dof": lambda spectrum: spectrum.dof(),
        "share": lambda spectrum: spectrum.rank_at(0.99),
        "relative": lambda spectrum: spectrum.dim(1e-3, True),
        "absolute": lambda spectrum: spectrum.dim(1e-3, False),
    }
    if rule == "gradient":
        return _shared_dof(spectra)
    if rule not in measures:
        raise ValueError(
            f"unknown rule {rule!r}{closest(rule, [*measures, 'gradient'])}; choose from "
            f"{', '.join(get_args(Rule))}"
        )
    return measures[rule]


def _shared_dof(spectra: Iterable[SpectrumLike]) -> Callable[[SpectrumLike], float]:
    """Degrees of freedom at one threshold for all spectra."""
    largest = max((float(spectrum.eigenvalues.max()) for spectrum in spectra), default=0.0)
    if largest <= 0:
        return lambda spectrum: 0.0
    return lambda spectrum: spectrum.dof(_GRADIENT_SHARE * largest)
