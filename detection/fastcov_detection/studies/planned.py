"""Runs of the plan in ``primary.py``, block by block, and the tuning runs that chose its tasks.

One command a task: it goes on from the committed records, trains what is missing, and ends where
the stopping rule says. Tuning runs answer, on other images, whether a preset asks the question:

- training has converged: twice the steps gain the baseline less than 0.02 AP (2 seeds)
- capacity matters: a uniform network of a quarter of the backbone's parameters loses at least 0.03
  AP, and its 95 % bound says that it loses (4 seeds)
- the two tasks have opposite needs: MACs moved forward (widths to the power 0.5) gain in ``early``
  and lose in ``late`` (4 seeds)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from fastcov_detection.config import SearchConfig, TrainConfig, preset
from fastcov_detection.search.arms import BASELINE, EXPONENT, QUARTER
from fastcov_detection.search.results import read_result
from fastcov_detection.search.run import run_search
from fastcov_detection.search.verdicts import CONFIDENCE, mean_and_error, t_quantile
from fastcov_detection.studies.primary import PLAN, paired, seeds_wanted

TUNING_SEED = 101
"""Of the images on which tasks were chosen; no figure that is reported comes from them."""
FORWARD = f"{EXPONENT}0.5"
TUNING, TWICE = "-tuning", "-tuning-twice"
_MOST_GAIN, _LEAST_LOSS = 0.02, 0.03
_TUNING_SEEDS, _TWICE_SEEDS = 4, 2


def run_planned(
    name: str, out: Path, results: Path, *, jobs: int = 2, progress: bool = True
) -> dict[str, Any]:
    """Search of one task of the plan, run until the stopping rule ends it.

    Args:
        name: One of the plan's searches, which is a preset too.
        out: Folder of all runs.
        results: Folder of the committed records of all searches.
        jobs: Training runs side by side.
        progress: Show bars.

    Returns:
        What result.json holds.
    """
    kept = results / name
    known = read_result(kept) if (kept / "result.json").exists() else None
    wanted, done = seeds_wanted(known), -1
    while wanted != done:
        done = wanted
        config = SearchConfig(
            train=_one_thread(preset(name)), arms=PLAN.arms(), seeds=wanted, jobs=jobs
        )
        known = run_search(config, out / name, results=kept, progress=progress)
        wanted = seeds_wanted(known)
    return known or {}


def run_tuning(
    name: str, out: Path, results: Path, *, jobs: int = 2, progress: bool = True
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tuning runs that choose a task, on images that no reported figure uses.

    Args:
        name: A preset of the ``mini`` data.
        out: Folder of all runs.
        results: Folder of the committed records of all searches.
        jobs: Training runs side by side.
        progress: Show bars.

    Returns:
        What result.json holds for the preset's steps and for twice as many.
    """
    train = tuning_config(name)
    once = SearchConfig(
        train=train, arms=(BASELINE, QUARTER, FORWARD), seeds=_TUNING_SEEDS, jobs=jobs
    )
    longer = replace(train, steps=2 * train.steps)
    twice = SearchConfig(train=longer, arms=(BASELINE,), seeds=_TWICE_SEEDS, jobs=jobs)
    first, second = (
        run_search(
            config, out / f"{name}{suffix}", results=results / f"{name}{suffix}", progress=progress
        )
        for config, suffix in ((once, TUNING), (twice, TWICE))
    )
    return first, second


def tuning_config(name: str) -> TrainConfig:
    """A preset's run on the tuning images."""
    train = _one_thread(preset(name))
    look = replace(train.data.mini, seed=TUNING_SEED)
    data = replace(train.data, mini=look, root=f"{train.data.root}{TUNING}")
    return replace(train, data=data)


def _one_thread(train: TrainConfig) -> TrainConfig:
    return replace(train, threads=1, track="none")


@dataclass(frozen=True)
class Criterion:
    """One thing that a task must show, with the numbers that decide.

    Attributes:
        asks: Claim about the task.
        mean: Mean of the paired differences of AP; None without runs.
        se: Its standard error; None for one seed.
        n: Seeds that both arms have.
        wanted: Seeds that decide.
        is_met: True if the task shows it, with as many seeds as are wanted.
    """

    asks: str
    mean: float | None
    se: float | None
    n: int
    wanted: int
    is_met: bool

    @property
    def verdict(self) -> str:
        """Verdict in words; open while seeds are missing."""
        if self.n < self.wanted:
            return f"open: {self.wanted} seeds decide"
        return "met" if self.is_met else "not met"


def criteria(
    name: str, once: Mapping[str, Any], twice: Mapping[str, Any] | None
) -> tuple[Criterion, ...]:
    """Criteria that tell if a task can answer the plan's question.

    Args:
        name: ``early``, where MACs moved forward must gain, or ``late``, where they must lose.
        once: result.json of the tuning runs.
        twice: result.json of those with twice the steps; None where there is none yet.
    """
    longer = paired({"arms": {**once["arms"], "twice": _baseline(twice)}}, "twice", BASELINE)
    quarter, forward = (paired(once, arm, BASELINE) for arm in (QUARTER, FORWARD))
    mean, se, n = _summary(longer)
    gain = Criterion(
        f"twice the steps gain less than {_MOST_GAIN} AP",
        mean,
        se,
        n,
        _TWICE_SEEDS,
        mean is not None and n >= _TWICE_SEEDS and mean < _MOST_GAIN,
    )
    mean, se, n = _summary(quarter)
    loss = Criterion(
        f"a quarter of the backbone's parameters loses {_LEAST_LOSS} AP or more, bound above 0",
        mean,
        se,
        n,
        _TUNING_SEEDS,
        mean is not None and n >= _TUNING_SEEDS and mean <= -_LEAST_LOSS and _is_below(mean, se, n),
    )
    mean, se, n = _summary(forward)
    gains = name == PLAN.searches[0]
    has_moved = mean is not None and (mean > 0 if gains else mean < 0)
    moved = Criterion(
        f"MACs moved forward (w^0.5) {'gain' if gains else 'lose'}",
        mean,
        se,
        n,
        _TUNING_SEEDS,
        n >= _TUNING_SEEDS and has_moved,
    )
    return gain, loss, moved


def _baseline(result: Mapping[str, Any] | None) -> Mapping[str, Any]:
    return {"runs": []} if result is None else result["arms"].get(BASELINE, {"runs": []})


def _summary(differences: Mapping[int, float]) -> tuple[float | None, float | None, int]:
    if not differences:
        return None, None, 0
    return *mean_and_error(list(differences.values())), len(differences)


def _is_below(mean: float, se: float | None, n: int) -> bool:
    return se is not None and mean + t_quantile(CONFIDENCE, n - 1) * se < 0
