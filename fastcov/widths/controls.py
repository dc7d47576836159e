"""Controls of a width search: widths that no spectrum decides, found by the same solver."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

from fastcov.widths.plan import WidthPlan, solve_widths
from fastcov.widths.solver import CostFn, Solver, WidthGroup, cached

# Nearly equal widths, and widths that fall much faster than today's.
_SMALLEST_POWER, _LARGEST_POWER = 2.0**-10, 2.0
_MOST_TRIED_POWERS = 10
_CLOSE_ENOUGH = 0.02  # share of the wanted parameters; a plan farther off says so


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
    """Widths that are the current ones to a power, at the same MACs.

    Without ``power`` it is found: the exponent, at most 2, that brings ``param_fn`` nearest to
    ``params``; a note says where none comes near. All else is as in
    :func:`fastcov.widths.solve_widths`.
    """
    current = _current(groups)
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
    if params is None or plan.params is None or abs(plan.params / params - 1) <= _CLOSE_ENOUGH:
        return plan
    note = f"no power brings the parameters nearer to {params:,.0f} than {plan.params:,.0f}"
    return replace(plan, notes=(*plan.notes, note))


def random_widths(
    groups: Sequence[WidthGroup],
    mac_fn: CostFn,
    budget: float | None,
    seed: int,
    *,
    tolerance: float = 0.005,
) -> WidthPlan:
    """Widths that are the current ones times factors drawn log-uniformly from [1/2, 2].

    The same seed draws the same factors. All else is as in :func:`fastcov.widths.solve_widths`.
    """
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
    """Widths that are the current ones all times one factor, at given parameters.

    ``cost_fn`` counts parameters, so the plan's ``macs`` and ``budget`` are parameters too. All
    else is as in :func:`fastcov.widths.solve_widths`.
    """
    return solve_widths(
        groups, _current(groups), cost_fn, params, rule="uniform", tolerance=tolerance
    )


def _current(groups: Sequence[WidthGroup]) -> dict[str, float]:
    return {group.name: float(group.width) for group in groups}


def _matching_power(solver: Solver, param_fn: CostFn, params: float) -> float:
    count = cached(param_fn, solver.names)
    low, high = _SMALLEST_POWER, _LARGEST_POWER
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
    while len(excess) < _MOST_TRIED_POWERS and excess[low] < 0 < excess[high]:
        if min(map(abs, excess.values())) <= solver.tolerance * params:
            break
        share = excess[low] / (excess[low] - excess[high])
        middle = low + (high - low) * min(max(share, 0.1), 0.9)
        low, high = (middle, high) if measure(middle) < 0 else (low, middle)
    return min(excess, key=lambda power: abs(excess[power]))
