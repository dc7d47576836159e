"""Contenders in turns, and the statistics of their times."""

from __future__ import annotations

import math
import random
import time

import numpy as np
import pytest
import torch

from fastcov.bench.timing import interleave, mean_interval, median_interval, ratios

CPU = torch.device("cpu")


@pytest.mark.parametrize("count", [6, 9, 40])
def test_interval_covers_the_median(count: int) -> None:
    draw = random.Random(count)
    trials = 3000
    covered = 0
    for _ in range(trials):
        low, high = median_interval([draw.expovariate(1.0) for _ in range(count)])
        covered += low <= math.log(2) <= high
    # At least 95 %, within three standard errors of the estimate; and no wider than the range.
    assert covered / trials >= 0.95 - 3 * math.sqrt(0.95 * 0.05 / trials)


@pytest.mark.parametrize("count", [3, 24])
def test_interval_covers_the_mean(count: int) -> None:
    draw = random.Random(count)
    trials = 3000
    covered = 0
    for _ in range(trials):
        mean, low, high = mean_interval([draw.gauss(5.0, 2.0) for _ in range(count)])
        assert low < mean < high
        covered += low <= 5.0 <= high
    # 95 %, and no more than 2 % above: an interval that is never wrong says nothing.
    assert -0.012 <= covered / trials - 0.95 <= 0.02
    assert mean_interval([3.0]) == (3.0, 3.0, 3.0)


def test_interval_is_the_narrowest_that_covers() -> None:
    # From tables of the sign test: 40 samples, ranks 14 and 27; 6 samples, the range.
    assert median_interval(range(1, 41)) == (14, 27)
    assert median_interval(range(1, 7)) == (1, 6)
    assert median_interval([3.0]) == (3.0, 3.0)


@pytest.mark.alone
def test_contenders_take_turns() -> None:
    order: list[str] = []
    prepared: list[str] = []

    def slow(_index: int) -> None:
        order.append("slow")
        time.sleep(0.004)

    def fast(_index: int) -> None:
        order.append("fast")
        time.sleep(0.001)

    samples = interleave(
        {"slow": slow, "fast": fast},
        CPU,
        rounds=8,
        prepare=lambda name, _round: prepared.append(name),
    )
    turns = order[-16:]
    assert all(set(turns[i : i + 2]) == {"slow", "fast"} for i in range(0, 16, 2))
    assert prepared[-16:] == turns
    assert np.median(ratios(samples["slow"], samples["fast"])) > 1.5


def test_short_calls_are_repeated_and_counted_up() -> None:
    seen: list[int] = []
    samples = interleave({"short": seen.append}, CPU, rounds=3)
    assert len(samples["short"]) == 3
    assert seen[2:] == list(range(2, len(seen)))
    assert len(seen) > 100


@pytest.mark.alone
def test_a_contender_may_sit_out_rounds() -> None:
    turns: list[str] = []
    sleeps = {"often": 0.003, "rare": 0.006}
    samples = interleave(
        {name: lambda _index, s=seconds: time.sleep(s) for name, seconds in sleeps.items()},
        CPU,
        rounds=9,
        prepare=lambda name, round_number: turns.append(f"{name} {round_number}"),
        periods={"rare": 4},
    )
    ran = [place for place, seconds in enumerate(samples["rare"]) if not math.isnan(seconds)]
    assert ran == [0, 4, 8]
    assert len(samples["often"]) == 9
    assert [turn for turn in turns if turn.startswith("rare")][1:] == ["rare 1", "rare 5", "rare 9"]
    paired = ratios(samples["rare"], samples["often"])
    assert len(paired) == 3
    assert min(paired) > 1.2


def test_the_reference_stands_in_the_middle_of_those_that_run() -> None:
    turns: list[str] = []
    names = ["reference", "a", "b", "rare", "rarer"]
    interleave(
        {name: lambda _index: time.sleep(0.003) for name in names},
        CPU,
        rounds=8,
        prepare=lambda name, round_number: turns.append(name) if round_number else None,
        periods={"rare": 4, "rarer": 8},
        reference="reference",
    )
    assert [turns[at] for at in (2, 6, 9, 12, 15, 19, 22, 25)] == ["reference"] * 8
    others = [turns[at : at + 3] for at in (5, 8, 11)]
    assert {*others[0]} == {*others[1]} == {*others[2]} == {"reference", "a", "b"}


@pytest.mark.alone
def test_budget_ends_a_run() -> None:
    samples = interleave(
        {"sleep": lambda _index: time.sleep(0.01)}, CPU, rounds=1000, budget_s=0.05, fewest_rounds=7
    )
    assert 7 <= len(samples["sleep"]) < 20
