r"""The analysis that was fixed before its runs: primary comparisons, when to stop, one question.

Two searches share one plan: ``early`` and ``late``, tasks with opposite needs. For each of two
rules the searched network is held against five others over seeds that both have, and Holm's
procedure corrects the five p values of a rule on a task together. Seeds come in blocks until the
standard error of every one of these differences is small enough, or the last block is done: what
decides is the spread alone, never the sign of a difference.

The question then is one sentence: does a rule, unchanged, beat every fixed exponent of
:math:`w^p` on the two tasks taken together, and the baseline on each? Together means the mean over
seeds of half the sum of both tasks' differences. Every one of these has to be shown for the answer
yes, so each is tested at 5 % (an intersection-union test needs no correction).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fastcov_detection.search.arms import (
    BASELINE,
    EXPONENT,
    POWER,
    RANDOM,
    SEARCHED,
    UNIFORM,
    UNTRAINED,
    rule_arm,
)
from fastcov_detection.search.verdicts import LARGEST_LOSS, holm, mean_and_error, p_value

LEVEL = 0.05
MAIN_RULE = "dof"
"""The rule whose arms carry no suffix."""


@dataclass(frozen=True)
class Plan:
    """Plan of the searches that it names, fixed before their first run."""

    searches: tuple[str, str] = ("early", "late")
    rules: tuple[str | None, ...] = (None, "gradient")
    """Suffix of each rule's arms; None is the main rule of the search."""
    exponents: tuple[float, ...] = (0.5, 0.75, 1.25)
    """Of the arms without any spectrum; 1 is the baseline itself."""
    block: int = 4
    most_seeds: int = 16
    largest_se: float = 0.004
    least_saving: float = 0.27
    """Share of the backbone's parameters that "no loss" against the baseline is asked for."""

    def arms(self) -> tuple[str, ...]:
        """Arms of one search, the cheapest answers first within a seed."""
        ruled = [
            rule_arm(arm, rule)
            for rule in self.rules
            for arm in (SEARCHED, UNIFORM, POWER, UNTRAINED)
        ]
        return (BASELINE, *ruled, RANDOM, *(f"{EXPONENT}{p:g}" for p in self.exponents))

    def rivals(self, rule: str | None) -> tuple[str, ...]:
        """Arms that a rule's searched network is compared with."""
        matched = (rule_arm(arm, rule) for arm in (UNIFORM, POWER, UNTRAINED))
        uniform, power, untrained = matched
        return (BASELINE, uniform, RANDOM, power, untrained)


PLAN = Plan()


@dataclass(frozen=True)
class Primary:
    """One primary comparison: paired differences, and what Holm's procedure leaves of them."""

    arm: str
    versus: str
    mean: float
    se: float | None
    n: int
    p: float
    p_holm: float
    verdict: str


def primary_comparisons(
    result: Mapping[str, Any], rule: str | None, plan: Plan = PLAN
) -> list[Primary]:
    """The five comparisons of one rule on one task, corrected together.

    A comparison without runs counts among the five: its p value is 1.

    Args:
        result: A search's result.json.
        rule: Suffix of the rule's arms; None for the main rule.
        plan: What was fixed.
    """
    arm = rule_arm(SEARCHED, rule)
    rivals = plan.rivals(rule)
    differences = [paired(result, arm, rival) for rival in rivals]
    found = []
    for rival, values in zip(rivals, differences, strict=True):
        mean, se = mean_and_error(list(values.values())) if values else (0.0, None)
        least = LARGEST_LOSS if rival == BASELINE else 0.0
        found.append((rival, mean, se, len(values), p_value(mean, se, len(values), least)))
    corrected = holm([p for *_, p in found])
    return [
        Primary(arm, rival, mean, se, n, p, p_holm, _verdict(result, arm, rival, n, p_holm, plan))
        for (rival, mean, se, n, p), p_holm in zip(found, corrected, strict=True)
    ]


def _verdict(
    result: Mapping[str, Any], arm: str, rival: str, n: int, p_holm: float, plan: Plan
) -> str:
    if n < 2:
        return "no runs yet" if n == 0 else "one seed says nothing about the spread"
    if p_holm > LEVEL:
        return "not shown"
    if rival != BASELINE:
        return "better"
    saving = 1 - result["arms"][arm]["backbone_params"] / result["arms"][rival]["backbone_params"]
    has_less = result["arms"][arm]["macs"] <= result["arms"][rival]["macs"]
    if saving >= plan.least_saving and has_less:
        return "no loss"
    return f"no loss, but at {100 * saving:.0f} % fewer backbone parameters"


def paired(result: Mapping[str, Any], arm: str, rival: str) -> dict[int, float]:
    """Difference of AP by seed, where both arms have run."""
    by_seed = [
        {run["seed"]: run["ap"] for run in result["arms"].get(name, {"runs": []})["runs"]}
        for name in (arm, rival)
    ]
    first, second = by_seed
    return {seed: first[seed] - second[seed] for seed in sorted(first.keys() & second.keys())}


def seeds_wanted(result: Mapping[str, Any] | None, plan: Plan = PLAN) -> int:
    """Seeds that a search needs by the stopping rule, as far as its finished blocks tell.

    Args:
        result: A search's result.json; None before its first block.
        plan: What was fixed.

    Returns:
        A multiple of ``plan.block``. Where it is what the search has, the search is done.
    """
    if result is None:
        return plan.block
    compared = [one for rule in plan.rules for one in primary_comparisons(result, rule, plan)]
    done = min(one.n for one in compared) // plan.block * plan.block
    if done == 0:
        return plan.block
    errors = [
        mean_and_error(list(values.values())[:done])[1]
        for rule in plan.rules
        for rival in plan.rivals(rule)
        for values in [paired(result, rule_arm(SEARCHED, rule), rival)]
    ]
    is_enough = all(error is not None and error <= plan.largest_se for error in errors)
    return done if is_enough else min(plan.most_seeds, done + plan.block)


class Part(NamedTuple):
    """One thing that a rule must beat: mean difference, its standard error, seeds, p value."""

    name: str
    mean: float
    se: float | None
    n: int
    p: float


@dataclass(frozen=True)
class Answer:
    """Answer to the question if one rule does everything that was asked."""

    rule: str
    tests: tuple[Part, ...]

    @property
    def is_shown(self) -> bool:
        """True where every part is shown at 5 %."""
        return all(part.p <= LEVEL for part in self.tests)


def answer(results: Mapping[str, Mapping[str, Any]], rule: str | None, plan: Plan = PLAN) -> Answer:
    """Answer: a rule against every exponent on both tasks together, and the baseline on each.

    Args:
        results: result.json of both searches, by name.
        rule: Suffix of the rule's arms; None for the main rule.
        plan: What was fixed.
    """
    arm = rule_arm(SEARCHED, rule)
    tests = []
    for exponent in plan.exponents:
        rival = f"{EXPONENT}{exponent:g}"
        parts = [paired(results[name], arm, rival) for name in plan.searches]
        shared = sorted(set.intersection(*(set(part) for part in parts)))
        means = [sum(part[seed] for part in parts) / len(parts) for seed in shared]
        tests.append(_test(f"w^{exponent:g}, both tasks together", means))
    for name in plan.searches:
        values = list(paired(results[name], arm, BASELINE).values())
        tests.append(_test(f"baseline on {name}", values))
    return Answer(rule or MAIN_RULE, tuple(tests))


def _test(name: str, values: list[float]) -> Part:
    if not values:
        return Part(name, 0.0, None, 0, 1.0)
    mean, se = mean_and_error(values)
    return Part(name, mean, se, len(values), p_value(mean, se, len(values)))
