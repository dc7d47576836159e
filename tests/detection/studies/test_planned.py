"""Criteria of a task on the tuning images, and runs of the plan, from its records."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from fastcov_detection.cli import main
from fastcov_detection.config import preset
from fastcov_detection.studies import planned
from fastcov_detection.studies.planned import criteria, run_planned, run_tuning, tuning_config
from fastcov_detection.studies.primary import PLAN


def _arm(*aps: float) -> dict[str, Any]:
    return {"runs": [{"seed": seed, "ap": ap} for seed, ap in enumerate(aps)]}


def _once(quarter: float, forward: float) -> dict[str, Any]:
    base = (0.50, 0.52, 0.51, 0.49)
    noise = (0.0, 0.01, -0.01, 0.0)
    return {
        "arms": {
            "baseline": _arm(*base),
            "quarter": _arm(*(b + quarter + n for b, n in zip(base, noise, strict=True))),
            "exponent-0.5": _arm(*(b + forward + n for b, n in zip(base, noise, strict=True))),
        }
    }


TWICE = {"arms": {"baseline": _arm(0.51, 0.53)}}


def test_a_task_that_asks_the_question() -> None:
    found = criteria("early", _once(-0.04, 0.02), TWICE)
    assert [one.is_met for one in found] == [True, True, True]
    assert [one.mean for one in found] == pytest.approx([0.01, -0.04, 0.02])
    assert [one.n for one in found] == [2, 4, 4]
    assert [one.is_met for one in criteria("late", _once(-0.04, 0.02), TWICE)] == [
        True,
        True,
        False,
    ]
    assert [one.is_met for one in criteria("late", _once(-0.04, -0.02), TWICE)] == [True] * 3


@pytest.mark.parametrize("quarter", [-0.02, 0.04])
def test_a_task_that_is_not_short_of_capacity(quarter: float) -> None:
    assert not criteria("early", _once(quarter, 0.02), TWICE)[1].is_met


def test_a_task_that_has_not_converged_or_has_not_been_run() -> None:
    assert not criteria("early", _once(-0.04, 0.02), {"arms": {"baseline": _arm(0.52, 0.55)}})[
        0
    ].is_met
    assert not criteria("early", _once(-0.04, 0.02), {"arms": {"baseline": _arm(0.50)}})[0].is_met
    gain, loss, _ = criteria("early", _once(-0.04, 0.02), None)
    assert (gain.is_met, gain.mean, gain.n) == (False, None, 0)
    assert (gain.verdict, loss.verdict) == ("open: 2 seeds decide", "met")
    lost, *_ = criteria("early", _once(-0.04, 0.02), {"arms": {"baseline": _arm(0.52, 0.55)}})
    assert lost.verdict == "not met"


@pytest.mark.parametrize("name", PLAN.searches)
def test_tuning_images_are_others_than_those_reported(name: str) -> None:
    reported, tuning = preset(name), tuning_config(name)
    assert tuning.data.mini.seed != reported.data.mini.seed
    assert tuning.data.root != reported.data.root
    same = replace(reported.data.mini, seed=tuning.data.mini.seed)
    assert tuning.data.mini == same
    assert replace(tuning, data=reported.data, threads=None, track=reported.track) == reported


class _Searches:
    """Stands for run_search: records what is asked for, with errors that shrink with the seeds."""

    def __init__(self, spread: float) -> None:
        self.spread = spread
        self.asked: list[tuple[str, int, int]] = []

    def __call__(self, config: Any, folder: Path, *, results: Path, progress: bool) -> Any:
        self.asked.append((folder.name, config.train.steps, config.seeds))
        aps = [0.5 + self.spread * (-1) ** seed for seed in range(config.seeds)]
        flat = [0.5] * config.seeds
        arms = {
            name: _arm(*(aps if name.startswith("searched") else flat))
            | {"backbone_params": 1, "macs": 1}
            for name in config.arms
        }
        assert results.name == folder.name
        return {"arms": arms}


@pytest.mark.parametrize(("spread", "seeds"), [(0.006, [4]), (0.01, [4, 8]), (1.0, [4, 8, 12, 16])])
def test_blocks_follow_until_the_rule_ends_them(
    spread: float, seeds: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    searches = _Searches(spread)
    monkeypatch.setattr(planned, "run_search", searches)
    run_planned("early", tmp_path / "runs", tmp_path / "results", progress=False)
    steps = preset("early").steps
    assert searches.asked == [("early", steps, count) for count in seeds]


def test_tuning_runs_twice_the_steps_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    searches = _Searches(0.0)
    monkeypatch.setattr(planned, "run_search", searches)
    run_tuning("late", tmp_path / "runs", tmp_path / "results", progress=False)
    steps = preset("late").steps
    assert searches.asked == [("late-tuning", steps, 4), ("late-tuning-twice", 2 * steps, 2)]


def test_the_command_says_which_criteria_are_met(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shown: list[Any] = []
    monkeypatch.setattr("fastcov_detection.report.tables.print_summary", shown.append)
    monkeypatch.setattr(planned, "run_search", _Searches(0.0))
    places = ["--out", str(tmp_path / "runs"), "--results", str(tmp_path / "results"), "--quiet"]
    assert main(["planned", "late", "--tuning", *places]) == 0
    said = capsys.readouterr().out
    assert "met: twice the steps gain less than 0.02 AP (+0.000, n = 2)" in said
    assert said.count("not met") == 2
    assert main(["planned", "early", *places]) == 0
    assert set(shown[-1]["arms"]) == set(PLAN.arms())
    assert len(shown) == 2
