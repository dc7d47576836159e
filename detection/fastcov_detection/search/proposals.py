"""Widths of every arm of a search: what the spectra ask for, and what they are held against."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from fastcov import Spectrum, WidthGroup
from fastcov.widths import (
    RULES,
    WidthPlan,
    power_widths,
    random_widths,
    suggest_widths,
    uniform_widths,
)
from fastcov_detection.config import ConfigError, ModelConfig, SearchConfig, closest
from fastcov_detection.detector.cost import Cost, cost_of
from fastcov_detection.files import write_text

BASELINE = "baseline"
SEARCHED = "searched"
PEER = "torch-pruning"
PEER_SCRATCH = f"{PEER}-scratch"
PEERS = (PEER, PEER_SCRATCH)
UNTRAINED = "untrained"
UNIFORM, RANDOM, POWER = "uniform", "random", "power"
CONTROLS = (UNIFORM, RANDOM, UNTRAINED, POWER)
MATCHED = (UNIFORM, POWER)
"""Controls with the parameters of the network that a rule searched."""
QUARTER = "quarter"
"""The baseline scaled to a quarter of its backbone's parameters, whatever the rules say."""
EXPONENT = "exponent-"
"""Begins the name of an arm whose widths are the baseline's to a fixed power, at the same MACs."""


def arm_names() -> tuple[str, ...]:
    """Every arm with a fixed name; ``searched-share`` follows another rule than the main one.

    Its controls are ``uniform-share``, ``power-share`` and ``untrained-share``. Arms ``exponent-P``
    for any positive number P come on top.
    """
    further = [f"{name}-{rule}" for name in (SEARCHED, *MATCHED, UNTRAINED) for rule in RULES]
    return (BASELINE, SEARCHED, *CONTROLS, *further, QUARTER, *PEERS)


def rule_arm(arm: str, rule: str | None) -> str:
    """Name of a rule's own arm; None: of the search's main rule."""
    return arm if rule is None else f"{arm}-{rule}"


def exponent_of(arm: str) -> float | None:
    """The power of an arm ``exponent-P``; None for other arms.

    Raises:
        ConfigError: If P is not a positive number.
    """
    if not arm.startswith(EXPONENT):
        return None
    text = arm.removeprefix(EXPONENT)
    try:
        exponent = float(text)
    except ValueError:
        exponent = math.nan
    if not 0 < exponent <= 2 or arm != f"{EXPONENT}{exponent:g}":
        raise ConfigError(
            f"arm {arm!r}: the exponent is {text!r}; write a number above 0 and up to 2 in its "
            f"shortest form, for example {EXPONENT}0.5"
        )
    return exponent


def check_arms(arms: Sequence[str]) -> tuple[str, ...]:
    """The arms in a fixed order, with the baseline that every other arm is derived from.

    Raises:
        ConfigError: If an arm is unknown, or uniform or power have no searched arm to match.
    """
    known = arm_names()
    exponents = {arm: exponent_of(arm) for arm in arms}
    for arm, exponent in exponents.items():
        if arm not in known and exponent is None:
            raise ConfigError(f"unknown arm {arm!r}{closest(arm, known)}")
    wanted = {BASELINE, *arms}
    for arm in wanted:
        control, _, rule = arm.partition("-")
        matched_to = rule_arm(SEARCHED, rule or None)
        if control in MATCHED and matched_to not in wanted:
            raise ConfigError(
                f"arm {arm!r} has the parameters of the searched network; "
                f"add {matched_to!r} to the arms"
            )
    fixed = sorted((power, arm) for arm, power in exponents.items() if power is not None)
    return (*(arm for arm in known if arm in wanted), *(arm for _, arm in fixed))


class Costs:
    """Parameters and MACs of widths, each counted once on the built model."""

    def __init__(self, model: ModelConfig, image_size: int) -> None:
        self.model = model
        self.image_size = image_size
        self._known: dict[tuple[tuple[str, int], ...], Cost] = {}

    def __call__(self, widths: Mapping[str, int] | None) -> Cost:
        """The cost of a detector with these widths; None: the configuration's own."""
        key = tuple(sorted((widths or {}).items()))
        if key not in self._known:
            self._known[key] = cost_of(self.model, widths, self.image_size)
        return self._known[key]

    def macs(self, widths: Mapping[str, int]) -> int:
        """Multiply-accumulates of one image."""
        return self(widths).macs

    def params(self, widths: Mapping[str, int]) -> int:
        """Parameters of the whole detector."""
        return self(widths).params


class Proposer:
    """Proposes widths for the arms of one search.

    Args:
        config: The search.
        groups: Width groups of the baseline.
        costs: Counts a detector of the search's configuration.
    """

    def __init__(self, config: SearchConfig, groups: Sequence[WidthGroup], costs: Costs) -> None:
        self.config = config
        self.groups = tuple(groups)
        self.costs = costs
        self.budget = float(costs(None).macs if config.budget is None else config.budget)

    def baseline(self) -> WidthPlan:
        """The configuration's own widths, as a plan."""
        return self._given({group.name: group.width for group in self.groups}, "given", 1.0)

    def from_spectra(self, spectra: Mapping[str, Spectrum], rule: str | None = None) -> WidthPlan:
        """Widths that follow the spectra at no more MACs than the budget."""
        return suggest_widths(
            spectra,
            self.groups,
            self.costs.macs,
            self.budget,
            rule=rule or self.config.rule,
            power=self.config.power,
            max_params=self.config.max_params,
            param_fn=self.costs.params,
        )

    def uniform(self, searched: WidthPlan) -> WidthPlan:
        """The baseline scaled to the searched parameters; MACs come out lower."""
        plan = uniform_widths(self.groups, self.costs.params, searched.params)
        macs = self.costs.macs(plan.widths)
        return replace(plan, macs=macs, budget=self.budget, params=self.costs.params(plan.widths))

    def random(self, seed: int) -> WidthPlan:
        """A draw of widths at the same MACs."""
        plan = random_widths(self.groups, self.costs.macs, self.budget, seed)
        return replace(plan, params=self.costs.params(plan.widths))

    def wider(self, factor: float) -> WidthPlan:
        """The baseline's widths times a factor, beyond the budget: what a pruner starts from."""
        widths = {
            group.name: round(factor * group.width / group.multiple) * group.multiple
            for group in self.groups
        }
        return self._given(widths, f"baseline x {factor:g}", factor)

    def pruned(self, widths: Mapping[str, int], peer: str, ratio: float) -> WidthPlan:
        """Widths that a pruner left, as a plan that names it."""
        note = f"{peer} by group magnitude, {100 * ratio:.1f} % of the channels asked for"
        return replace(self._given(widths, peer, 1.0), notes=(note,))

    def _given(self, widths: Mapping[str, int], rule: str, alpha: float) -> WidthPlan:
        cost = self.costs(widths)
        demand = {name: float(width) for name, width in widths.items()}
        return WidthPlan(
            dict(widths),
            demand,
            cost.macs,
            self.budget,
            alpha,
            rule,
            params=float(cost.params),
        )

    def power(self, searched: WidthPlan) -> WidthPlan:
        """Baseline widths to the power that has the searched parameters at the same MACs."""
        return power_widths(
            self.groups,
            self.costs.macs,
            self.budget,
            params=searched.params,
            param_fn=self.costs.params,
        )

    def quarter(self) -> WidthPlan:
        """The baseline scaled to a quarter of its backbone's parameters."""
        target = self.costs(None).backbone_params / 4
        plan = uniform_widths(self.groups, lambda w: self.costs(w).backbone_params, target)
        return self._given(plan.widths, "uniform", plan.alpha)

    def exponent(self, power: float) -> WidthPlan:
        """Baseline widths to a given power at the same MACs."""
        return power_widths(
            self.groups, self.costs.macs, self.budget, power, param_fn=self.costs.params
        )


def has_settled(groups: Sequence[WidthGroup], before: WidthPlan, after: WidthPlan) -> bool:
    """Whether every width moved by less than its rounding."""
    return all(
        abs(after.widths[group.name] - before.widths[group.name]) < group.multiple
        for group in groups
    )


def save_plan(plan: WidthPlan, path: Path) -> None:
    """Writes a plan as JSON; ``--widths`` reads the file."""
    write_text(path, json.dumps(asdict(plan), indent=2) + "\n")


def load_plan(path: Path) -> WidthPlan:
    """Reads a plan that :func:`save_plan` wrote.

    Raises:
        ConfigError: If the file does not hold a plan.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return WidthPlan(**{**values, "notes": tuple(values["notes"])})
    except (ValueError, TypeError, KeyError) as error:
        raise ConfigError(
            f"{path} does not hold a plan of widths ({error}); delete it, the search makes it anew"
        ) from None
