"""Widths of every arm of a search: what the spectra ask for, and what they are held against."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from fastcov import Spectrum, WidthGroup
from fastcov.widths import (
    WidthPlan,
    power_widths,
    random_widths,
    suggest_widths,
    uniform_widths,
)
from fastcov_detection.config import ConfigError, ModelConfig, SearchConfig
from fastcov_detection.detector.cost import Cost, cost_of
from fastcov_detection.files import write_text


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
