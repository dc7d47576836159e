r"""Verdicts as statistics: paired differences between two arms that share seeds.

A difference is taken seed by seed, so what a seed brings to both arms (data order, initial state)
cancels. Its mean has the standard error :math:`s / \sqrt n`, and its one-sided 95 % lower bound is

.. math:: \bar d - t_{0.95,\,n-1} \, s / \sqrt n

"no loss" needs a bound above -0.01, "better" a bound above 0; everything else is "not shown".
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Literal

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
    """Compares two arms by the seeds they share.

    Args:
        arm: Name of the first arm.
        versus: Name of the arm it is compared with.
        metric: What the values are, for the record.
        values: The first arm's value by seed.
        others: The other arm's value by seed.
        question: What is to be shown: ``"no loss"`` or ``"better"``.

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
    mean, se = mean_and_error(differences)
    lower = None if se is None else mean - t_quantile(CONFIDENCE, len(shared) - 1) * se
    needed = seeds_to_show(mean, se, len(shared), question)
    verdict = _verdict(mean, lower, len(shared), question, needed)
    return Comparison(arm, versus, metric, mean, se, len(shared), lower, question, verdict, needed)


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; None for a single value, which has no spread."""
    if not values:
        raise ValueError("no values given; a mean needs at least one")
    mean = math.fsum(values) / len(values)
    if len(values) == 1:
        return mean, None
    variance = math.fsum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return mean, math.sqrt(variance / len(values))


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

    if is_shown(n):
        return n
    low, high = n, n
    while not is_shown(high):
        low, high = high, 2 * high
        if high > _MOST_SEEDS:
            return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if is_shown(middle) else (middle, high)
    return high


def _least(question: Question) -> float:
    return LARGEST_LOSS if question == "no loss" else 0.0


def _verdict(
    mean: float, lower: float | None, n: int, question: Question, needed: int | None
) -> str:
    if lower is not None and lower > 0:
        return "better"
    if lower is not None and lower > LARGEST_LOSS and question == "no loss":
        return "no loss"
    if lower is None:
        return "not shown: one seed says nothing about the spread"
    if mean <= _least(question):
        wanted = "a loss below 0.01" if question == "no loss" else "a gain"
        return f"not shown: the mean itself is not {wanted}"
    if needed is None:
        return f"not shown: more than {_MOST_SEEDS:,} seeds would be needed"
    return f"not shown: about {needed} seeds would show it"


@cache
def t_quantile(probability: float, freedom: int) -> float:
    """Quantile of Student's t distribution.

    Args:
        probability: In (0, 1).
        freedom: Degrees of freedom, at least 1.

    Raises:
        ValueError: If an argument is out of range.
    """
    if not 0 < probability < 1:
        raise ValueError(f"probability is {probability}; give a number between 0 and 1")
    if freedom < 1:
        raise ValueError(f"degrees of freedom are {freedom}; a spread needs at least two seeds")
    if probability < 0.5:
        return -t_quantile(1 - probability, freedom)
    low, high = 0.0, 1.0
    while t_distribution(high, freedom) < probability:
        low, high = high, 2 * high
    # 80 halvings end below the spacing of doubles.
    for _ in range(80):
        middle = (low + high) / 2
        if t_distribution(middle, freedom) < probability:
            low = middle
        else:
            high = middle
    return (low + high) / 2


def t_distribution(value: float, freedom: int) -> float:
    r"""Cumulative distribution of Student's t.

    .. math:: F(t) = 1 - \tfrac12 I_{\nu / (\nu + t^2)}(\nu/2, 1/2) \quad (t \ge 0)
    """
    tail = 0.5 * _incomplete_beta(freedom / 2, 0.5, freedom / (freedom + value * value))
    return 1 - tail if value >= 0 else tail


def _incomplete_beta(a: float, b: float, x: float) -> float:
    """Regularised incomplete beta function by its continued fraction (modified Lentz)."""
    if x <= 0 or x >= 1:
        return 0.0 if x <= 0 else 1.0
    # The fraction converges fast only left of the mean; the rest follows by symmetry.
    if x > (a + 1) / (a + b + 2):
        return 1 - _incomplete_beta(b, a, 1 - x)
    log_front = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    log_front += a * math.log(x) + b * math.log1p(-x)
    smallest = 1e-300
    c, d = 1.0, 1 / _away_from_zero(1 - (a + b) * x / (a + 1), smallest)
    fraction = d
    for m in range(1, 10_000):
        even = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        odd = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        change = 1.0
        for term in (even, odd):
            d = 1 / _away_from_zero(1 + term * d, smallest)
            c = _away_from_zero(1 + term / c, smallest)
            change = c * d
            fraction *= change
        if abs(change - 1) < 1e-15:
            break
    return math.exp(log_front) * fraction / a


def _away_from_zero(value: float, smallest: float) -> float:
    return value if abs(value) > smallest else smallest
