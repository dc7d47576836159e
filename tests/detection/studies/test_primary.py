"""The plan's comparisons, stopping rule and question on records made by hand."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from fastcov_detection.search.arms import check_arms
from fastcov_detection.studies.primary import (
    PLAN,
    answer,
    paired,
    primary_comparisons,
    seeds_wanted,
)

# Differences whose mean is 0.02 and whose standard error is 0.0040825.
SPREAD = (0.0, 0.01, -0.01, 0.0)


def _arm(aps: Mapping[int, float], backbone: int = 100, macs: int = 50) -> dict[str, Any]:
    runs = [{"seed": seed, "ap": ap} for seed, ap in aps.items()]
    return {"backbone_params": backbone, "macs": macs, "runs": runs}


def _result(lead: float, seeds: int = 4, saving: int = 30, spread: float = 1.0) -> dict[str, Any]:
    """Every arm of the plan; both searched ones lead the others by ``lead`` on average."""
    arms = {}
    for name in PLAN.arms():
        is_searched = name.startswith("searched")
        aps = {
            seed: 0.5 + (lead + spread * SPREAD[seed % 4] if is_searched else 0.0)
            for seed in range(seeds)
        }
        arms[name] = _arm(aps, 100 - saving if is_searched else 100)
    return {"arms": arms}


def test_the_plans_arms_are_arms_of_a_search() -> None:
    assert {arm.name for arm in check_arms(PLAN.arms())} == set(PLAN.arms())
    assert set(PLAN.rivals("gradient")) <= set(PLAN.arms())


def test_pairs_are_the_seeds_of_both_arms() -> None:
    result = {"arms": {"a": _arm({0: 0.5, 2: 0.75, 3: 0.1}), "b": _arm({2: 0.25, 0: 0.25, 1: 0})}}
    assert paired(result, "a", "b") == {0: 0.25, 2: 0.5}
    assert paired(result, "a", "missing") == {}


def test_five_comparisons_are_corrected_together() -> None:
    found = primary_comparisons(_result(0.02), None)
    assert [one.versus for one in found] == ["baseline", "uniform", "random", "power", "untrained"]
    # t = 0.02 / 0.0040825 = 4.899 with three degrees of freedom: p = 0.008139. Against the baseline
    # the margin of 0.01 makes t = 7.348, p = 0.002603, the smallest of five.
    assert found[1].p == pytest.approx(0.008139, abs=1e-6)
    assert found[0].p == pytest.approx(0.002603, abs=1e-6)
    assert found[0].p_holm == pytest.approx(5 * found[0].p)
    assert [one.p_holm for one in found[1:]] == pytest.approx([4 * found[1].p] * 4)
    assert [one.verdict for one in found] == ["no loss"] + ["better"] * 4


def test_one_comparison_alone_would_be_shown_and_is_not_among_five() -> None:
    # t = 0.011 / 0.0040825 = 2.69, p = 0.037: below 5 % alone, 4 * 0.037 among the four equal ones.
    found = primary_comparisons(_result(0.011), "gradient")
    assert found[1].p < 0.05 < found[1].p_holm
    assert [one.verdict for one in found] == ["no loss"] + ["not shown"] * 4
    assert {one.arm for one in found} == {"searched-gradient"}


def test_no_loss_names_a_saving_that_is_too_small() -> None:
    (first, *_) = primary_comparisons(_result(0.02, saving=17), None)
    assert first.verdict == "no loss, but at 17 % fewer backbone parameters"


def test_missing_runs_count_among_the_five() -> None:
    result = _result(0.02)
    for name in ("random", "power", "untrained"):
        result["arms"][name]["runs"] = []
    result["arms"]["uniform"]["runs"] = result["arms"]["uniform"]["runs"][:1]
    found = primary_comparisons(result, None)
    assert found[0].p_holm == pytest.approx(5 * found[0].p)
    assert [one.n for one in found] == [4, 1, 0, 0, 0]
    assert found[1].verdict == "one seed says nothing about the spread"
    assert found[2].verdict == "no runs yet"


@pytest.mark.parametrize(
    ("seeds", "spread", "wanted"),
    [
        (3, 1.0, 4),  # the first block is not finished
        (4, 1.0, 8),  # standard error 0.0041
        (4, 0.9, 4),  # 0.0037
        (7, 1.0, 8),
        (8, 1.0, 8),  # 0.0027
        (8, 9.0, 12),
        (16, 9.0, 16),
    ],
)
def test_seeds_come_in_blocks_until_the_error_is_small(
    seeds: int, spread: float, wanted: int
) -> None:
    assert seeds_wanted(_result(0.0, seeds, spread=spread)) == wanted
    assert seeds_wanted(None) == 4


def test_an_arm_that_lacks_seeds_holds_the_block_open() -> None:
    result = _result(0.02, seeds=8, spread=1.0)
    result["arms"]["untrained-gradient"]["runs"] = result["arms"]["untrained-gradient"]["runs"][:3]
    assert seeds_wanted(result) == 4


def test_the_question_asks_every_exponent_on_both_tasks_and_the_baseline_on_each() -> None:
    results = {"early": _result(0.04), "late": _result(0.0)}
    found = answer(results, None)
    names = [f"w^{p:g}, both tasks together" for p in PLAN.exponents]
    assert [part.name for part in found.tests] == [*names, "baseline on early", "baseline on late"]
    # Together the lead is the mean of 0.04 and 0; on late alone there is none.
    assert [part.mean for part in found.tests] == pytest.approx([0.02] * len(names) + [0.04, 0.0])
    assert found.tests[0].p == pytest.approx(0.008139, abs=1e-6)
    assert not found.is_shown
    assert answer({"early": _result(0.04), "late": _result(0.02)}, "gradient").is_shown
    del results["late"]["arms"]["exponent-0.75"]
    assert not answer(results | {"early": _result(0.4)}, None).is_shown
