"""Verdict statistics against closed forms, scipy's numbers and simulation."""

import math
import random

import pytest

from fastcov_detection.search.verdicts import (
    compare_paired,
    holm,
    mean_and_error,
    p_value,
    seeds_to_show,
    t_quantile,
)

# scipy.stats.t.ppf of scipy 1.17.1.
SCIPY_QUANTILES = [
    (0.95, 3, 2.3533634348018233),
    (0.95, 7, 1.8945786050900062),
    (0.95, 15, 1.753050355692572),
    (0.975, 15, 2.131449545559776),
    (0.95, 30, 1.697260886593957),
    (0.975, 3, 3.1824463052837078),
]


@pytest.mark.parametrize(("probability", "freedom", "expected"), SCIPY_QUANTILES)
def test_t_quantile_agrees_with_scipy(probability, freedom, expected):
    assert t_quantile(probability, freedom) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("probability", [0.51, 0.6, 0.9, 0.95, 0.975, 0.999])
def test_t_quantile_has_its_closed_forms(probability):
    # One degree of freedom is the Cauchy distribution; two have an algebraic quantile.
    cauchy = math.tan(math.pi * (probability - 0.5))
    two = (2 * probability - 1) / math.sqrt(2 * probability * (1 - probability))
    assert t_quantile(probability, 1) == pytest.approx(cauchy, rel=1e-11)
    assert t_quantile(probability, 2) == pytest.approx(two, rel=1e-11)
    assert t_quantile(1 - probability, 2) == pytest.approx(-two, rel=1e-9)


def test_mean_and_error_of_known_numbers():
    # Mean 3, squared deviations 4 + 1 + 0 + 1 + 4 = 10, variance 10 / 4, error sqrt(2.5 / 5).
    assert mean_and_error([1.0, 2.0, 3.0, 4.0, 5.0]) == (3.0, math.sqrt(0.5))
    assert mean_and_error([0.25]) == (0.25, None)
    with pytest.raises(ValueError, match="no values"):
        mean_and_error([])


def test_pairing_cancels_what_a_seed_brings_to_both_arms():
    # Differences 0.02, 0.03, 0.01, 0.02: mean 0.02, error sqrt(2e-4 / 3 / 4) = 0.0040825,
    # bound 0.02 - 2.3533634 * 0.0040825 = 0.0103924. The seeds themselves differ by 0.3.
    base = {0: 0.40, 1: 0.70, 2: 0.55, 3: 0.48}
    found = {0: 0.42, 1: 0.73, 2: 0.56, 3: 0.50}
    comparison = compare_paired("searched", "uniform", "ap", found, base, "better")
    assert comparison.mean == pytest.approx(0.02)
    assert comparison.se == pytest.approx(0.00408248290463863)
    assert comparison.lower == pytest.approx(0.010392434, abs=1e-8)
    assert comparison.verdict == "better"
    assert comparison.as_dict() == {
        "arm": "searched",
        "versus": "uniform",
        "metric": "ap",
        "mean": comparison.mean,
        "se": comparison.se,
        "n": 4,
        "verdict": "better",
    }


def _against_zero(question, *differences):
    values = dict(enumerate(differences))
    return compare_paired("a", "b", "ap", values, dict.fromkeys(values, 0.0), question)


def test_verdicts_follow_the_bound():
    # Mean 0, error sqrt(4e-6 / 3 / 4) = 5.7735e-4, bound -0.0013587.
    even = _against_zero("no loss", 0.001, -0.001, 0.001, -0.001)
    assert even.lower == pytest.approx(-0.001358715, abs=1e-8)
    assert even.verdict == "no loss"
    assert _against_zero("better", 0.001, -0.001, 0.001, -0.001).verdict.startswith("not shown")
    # A hundred times the spread: the bound is -0.136.
    loose = _against_zero("no loss", 0.1, -0.1, 0.1, -0.1)
    assert loose.verdict.startswith("not shown: about")
    # A gain answers the question about a loss as well.
    assert _against_zero("no loss", 0.02, 0.03, 0.01, 0.02).verdict == "better"
    assert "a loss below 0.01" in _against_zero("no loss", -0.05, -0.02, -0.03).verdict
    assert "not a gain" in _against_zero("better", -0.01, 0.005, -0.002).verdict


def test_one_seed_shows_nothing():
    for difference in (-0.3, 0.0, 0.3):
        comparison = _against_zero("better", difference)
        assert comparison.se is None
        assert comparison.seeds_to_show is None
        assert comparison.verdict == "not shown: one seed says nothing about the spread"


def test_only_shared_seeds_count():
    comparison = compare_paired(
        "a", "b", "ap", {0: 0.5, 1: 0.6, 2: 0.9}, {1: 0.5, 0: 0.5}, "better"
    )
    assert comparison.n == 2
    assert comparison.mean == pytest.approx(0.05)
    assert compare_paired("a", "b", "ap", {0: 0.5}, {1: 0.5}, "better") is None


@pytest.mark.parametrize(("mean", "deviation"), [(0.02, 0.05), (0.05, 0.05), (0.003, 0.02)])
def test_seeds_to_show_is_the_first_number_that_passes(mean, deviation):
    n = 3
    needed = seeds_to_show(mean, deviation / math.sqrt(n), n, "better")

    def bound(count):
        return mean - t_quantile(0.95, count - 1) * deviation / math.sqrt(count)

    assert bound(needed) > 0
    assert needed == n or bound(needed - 1) <= 0


def test_no_number_of_seeds_shows_what_the_mean_contradicts():
    assert seeds_to_show(-0.02, 0.001, 8, "no loss") is None
    assert seeds_to_show(0.0, 0.001, 8, "better") is None
    assert seeds_to_show(0.0, 0.001, 8, "no loss") == 8


def test_bound_covers_the_truth_in_95_of_100_cases():
    draws = random.Random(7)
    trials, truth, below = 4000, 0.01, 0
    for _ in range(trials):
        differences = [draws.gauss(truth, 0.05) for _ in range(5)]
        below += _against_zero("better", *differences).lower < truth
    # Standard deviation of the share is sqrt(0.95 * 0.05 / 4000) = 0.0034: four of them.
    assert below / trials == pytest.approx(0.95, abs=0.014)


def test_bad_values_are_named():
    with pytest.raises(ValueError, match=r"seed 3: a has nan, b has 0\.5"):
        compare_paired("a", "b", "ap", {3: float("nan")}, {3: 0.5}, "better")
    with pytest.raises(ValueError, match="probability is 1"):
        t_quantile(1.0, 3)
    with pytest.raises(ValueError, match="degrees of freedom are 0"):
        t_quantile(0.9, 0)


def test_p_value_is_the_other_side_of_the_bound():
    # The bound of the paired example above lies at the margin exactly where p is 5 %.
    se, n = 0.00408248290463863, 4
    bound = 0.02 - 2.3533634348018233 * se
    assert p_value(0.02, se, n, bound) == pytest.approx(0.05, rel=1e-9)
    assert p_value(0.02, se, n) < 0.05 < p_value(0.02, se, n, 0.011)
    # One degree of freedom is the Cauchy distribution: mean over error 1 leaves a quarter above.
    assert p_value(0.3, 0.3, 2) == pytest.approx(0.25)
    assert p_value(0.3, None, 1) == 1.0
    assert p_value(0.1, 0.0, 3) == 0.0
    assert p_value(0.0, 0.0, 3) == 1.0


def test_holm_of_known_values():
    # Sorted 0.01, 0.02, 0.03, 0.04 times 4, 3, 2, 1: 0.04, 0.06, 0.06, 0.04 raised to 0.06.
    assert holm([0.04, 0.01, 0.03, 0.02]) == pytest.approx([0.06, 0.04, 0.06, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([0.02]) == [0.02]
    assert holm([]) == []
    with pytest.raises(ValueError, match=r"1\.5"):
        holm([0.1, 1.5])


def test_holm_keeps_the_chance_of_any_error():
    """Five true null hypotheses: at least one is called shown in at most 5 % of 4000 draws."""
    draw = random.Random(7)
    wrong = sum(min(holm([draw.random() for _ in range(5)])) <= 0.05 for _ in range(4000))
    # Binomial with p = 0.05 at most: mean 200, four standard deviations 55.
    assert wrong <= 255
