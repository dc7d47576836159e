r"""Verdicts as statistics: paired differences between two arms that share seeds.

A difference is taken seed by seed, so that the effect of a seed on both arms (data order, initial
state) cancels. The mean has the standard error :math:`s / \sqrt n`, and the one-sided 95 % lower
bound

.. math:: \bar d - t_{0.95,\,n-1} \, s / \sqrt n

"no loss" needs a bound above -0.01, "better" a bound above 0; everything else is "not shown".
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

from scipy.stats import sem
from scipy.stats import t as student

CONFIDENCE = 0.95
LARGEST_LOSS = -0.01
_MOST_SEEDS = 100_000

Question = Literal["no loss", "better"]


@dataclass(frozen=True)
class Comparison:
    """One arm against another over the seeds that both have.

    ``seeds_to_show`` is how many seeds would answer ``question`` if mean and spread stay as they
    are: ``n`` itself where it is answered, None where no number would, or where fewer than two
    seeds say nothing about the spread.
    """

    arm: str
    versus: str
    metric: str
    mean: float
    se: float | None
    n: int
    lower: float | None
    question: Question
    verdict: str
    seeds_to_show: int | None

    def as_dict(self) -> dict[str, object]:
        """The comparison as result.json holds it."""
        keys = ("arm", "versus", "metric", "mean", "se", "n", "verdict")
        return {key: getattr(self, key) for key in keys}


def compare_paired(
    arm: str,
    versus: str,
    metric: str,
    values: Mapping[int, float],
    others: Mapping[int, float],
    question: Question,
) -> Comparison | None:
    """Comparison of two arms by the seeds they share.

    Args:
        arm: Name of the first arm.
        versus: Name of the arm it is compared with.
        metric: Name of the values, for the record.
        values: The first arm's value by seed.
        others: The other arm's value by seed.
        question: Claim to be shown, ``"no loss"`` or ``"better"``.

    Returns:
        The comparison, or None where no seed is shared.

    Raises:
        ValueError: If a value is not finite.
    """
    shared = sorted(set(values) & set(others))
    if not shared:
        return None
    differences = [values[seed] - others[seed] for seed in shared]
    for seed, difference in zip(shared, differences, strict=True):
        if not math.isfinite(difference):
            raise ValueError(
                f"{metric} of seed {seed}: {arm} has {values[seed]}, {versus} has {others[seed]}; "
                "run that seed again"
            )
    n = len(shared)
    mean, se = mean_and_error(differences)
    lower = None if se is None else mean - t_quantile(CONFIDENCE, n - 1) * se
    needed = seeds_to_show(mean, se, n, question)
    verdict = _verdict(mean, lower, question, needed)
    return Comparison(arm, versus, metric, mean, se, n, lower, question, verdict, needed)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for a single value, which has no spread."""
    if not values:
        raise ValueError("no values given; a mean needs at least one")
    return math.fsum(values) / len(values), float(sem(values)) if len(values) > 1 else None


def seeds_to_show(mean: float, se: float | None, n: int, question: Question) -> int | None:
    """The fewest seeds whose bound would pass, if mean and spread stay as they are.

    Never less than ``n`` where ``n`` seeds do not show it; None where no number does.
    """
    margin = mean - _least(question)
    if se is None or margin <= 0:
        return None
    deviation = se * math.sqrt(n)

    def is_shown(count: int) -> bool:
        return margin > t_quantile(CONFIDENCE, count - 1) * deviation / math.sqrt(count)

    counts = range(n, _MOST_SEEDS + 1)
    place = bisect.bisect_left(counts, True, key=is_shown)
    return counts[place] if place < len(counts) else None


def _least(question: Question) -> float:
    return LARGEST_LOSS if question == "no loss" else 0.0


def _verdict(mean: float, lower: float | None, question: Question, needed: int | None) -> str:
    if lower is None:
        return "not shown: one seed says nothing about the spread"
    if lower > 0:
        return "better"
    if lower > LARGEST_LOSS and question == "no loss":
        return "no loss"
    if mean <= _least(question):
        wanted = "a loss below 0.01" if question == "no loss" else "a gain"
        return f"not shown: the mean itself is not {wanted}"
    if needed is None:
        return f"not shown: more than {_MOST_SEEDS:,} seeds would be needed"
    shown = "no loss" if question == "no loss" else "a gain"
    return f"not shown: about {needed} seeds would show {shown}"


@cache
def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability is {probability}; give a number between 0 and 1")
    if freedom < 1:
        raise ValueError(f"degrees of freedom are {freedom}; a spread needs at least two seeds")
    return float(student.ppf(probability, freedom))


def p_value(mean: float, se: float | None, n: int, least: float = 0.0) -> float:
    """Chance of a mean this high or higher where the true mean is ``least``: one-sided t test.

    Args:
        mean: Mean of ``n`` paired differences.
        se: Standard error of the mean; None for a single difference, which shows nothing.
        n: Number of differences.
        least: Value that the mean must exceed.

    Returns:
        In [0, 1]; 1 where there is no spread to judge by.
    """
    if se is None or n < 2:
        return 1.0
    if se == 0:
        return 0.0 if mean > least else 1.0
    return float(student.sf((mean - least) / se, n - 1))


def holm(p_values: Sequence[float]) -> list[float]:
    r"""P values corrected for their number by Holm's step-down procedure.

    With the values in ascending order,

    .. math:: \tilde p_{(i)} = \min(1, \max_{j \le i} (m - j + 1) \, p_{(j)})

    Args:
        p_values: One for each of the m comparisons.

    Returns:
        The corrected values in the order given; those of at most 0.05 are all shown at once, with
        a chance of 5 % at most that any of them is wrong.

    Raises:
        ValueError: If a value is outside [0, 1].

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    for value in p_values:
        if not 0 <= value <= 1:
            raise ValueError(f"p value is {value}; give numbers from 0 to 1")
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    corrected, largest = [0.0] * len(p_values), 0.0
    for place, index in enumerate(order):
        largest = max(largest, min(1.0, (len(p_values) - place) * p_values[index]))
        corrected[index] = largest
    return corrected
