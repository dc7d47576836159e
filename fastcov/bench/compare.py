"""Comparison of two results: changes beyond noise.

Noise has two parts. Within a run, the 95 % intervals of two medians must not overlap. Between runs
a machine drifts as a whole, by as much as its peers' rows changed: their code is the same in both.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from fastcov.bench.contest import Row, find_row
from fastcov.bench.results import Result, load_results

_LEAST_DRIFT = 0.02  # never call less than 2 % a change
_FEW_PEERS = 5  # fewer say little about the drift
_DRIFT_WITHOUT_PEERS = 0.10

Verdict = Literal["faster", "slower", "same"]


@dataclass(frozen=True)
class Change:
    """Change of one row that both results have.

    Attributes:
        ratio: Time in B over time in A.
        verdict: "same" unless the change is beyond noise.
    """

    case: str
    work: str
    contender: str
    before_s: float
    after_s: float
    ratio: float
    verdict: Verdict


@dataclass(frozen=True)
class Changes:
    """A comparison of two results.

    Attributes:
        rows: Common rows of ours, largest change first.
        drift: Relative change between the runs that the machine alone explains.
        drift_from: Number of peers' rows behind ``drift``; 0 if there were too few.
        warnings: Reasons why the two may not be comparable.
        only_a: Rows of ours that B lacks.
        only_b: Rows of ours that A lacks.
    """

    rows: list[Change]
    drift: float
    drift_from: int
    warnings: list[str]
    only_a: list[str]
    only_b: list[str]


def compare_results(path_a: Path, path_b: Path) -> Changes:
    """Changes from one file or folder of results to another.

    Raises:
        ValueError: If one holds no result, or they have no case in common.
    """
    results_a, results_b = load_results(path_a), load_results(path_b)
    common = [case for case in results_a if case in results_b]
    if not common:
        raise ValueError(
            f"{path_a} has {', '.join(results_a)} and {path_b} has {', '.join(results_b)}: "
            "no case in common"
        )
    pairs, only_a, only_b, warnings = [], [], [], []
    for case in common:
        a, b = results_a[case], results_b[case]
        warnings += _differences(case, a, b)
        for row in a.rows:
            other = find_row(b.rows, row.work, row.contender)
            if other is not None:
                pairs.append((case, row, other))
            elif is_ours(row):
                only_a.append(_label(case, row))
        only_b += [
            _label(case, row)
            for row in b.rows
            if is_ours(row) and find_row(a.rows, row.work, row.contender) is None
        ]
    moves = [abs(math.log(b.p50_s / a.p50_s)) for _, a, b in pairs if not is_ours(a)]
    if len(moves) >= _FEW_PEERS:
        drift = max(_LEAST_DRIFT, math.expm1(float(np.quantile(moves, 0.9))))
    else:
        drift, moves = _DRIFT_WITHOUT_PEERS, []
    changes = [_change(case, a, b, drift) for case, a, b in pairs if is_ours(a)]
    changes.sort(key=lambda change: -abs(math.log(change.ratio)))
    return Changes(changes, drift, len(moves), list(dict.fromkeys(warnings)), only_a, only_b)


def is_ours(row: Row) -> bool:
    """True if the row times fastcov, whose code alone differs between two commits."""
    return row.contender.startswith(("fastcov", "count_above", "steps and"))


def _change(case: str, a: Row, b: Row, drift: float) -> Change:
    ratio = b.p50_s / a.p50_s
    verdict: Verdict = "same"
    if b.low_s > a.high_s and ratio > 1 + drift:
        verdict = "slower"
    elif b.high_s < a.low_s and ratio < 1 / (1 + drift):
        verdict = "faster"
    return Change(case, a.work, a.contender, a.p50_s, b.p50_s, ratio, verdict)


def _label(case: str, row: Row) -> str:
    return f"{case}: {row.work}: {row.contender}"


def _differences(case: str, a: Result, b: Result) -> list[str]:
    found = []
    for key in ("device", "driver", "threads"):
        if a.machine.get(key) != b.machine.get(key):
            found.append(f"{key} differs: {a.machine.get(key)} and {b.machine.get(key)}")
    if a.size != b.size:
        found.append(f"{case}: size differs: {a.size} and {b.size}")
    versions_a, versions_b = a.machine["versions"], b.machine["versions"]
    for package in sorted({*versions_a, *versions_b} - {"fastcov"}):
        if versions_a.get(package) != versions_b.get(package):
            found.append(
                f"{package} differs: {versions_a.get(package, 'none')} and "
                f"{versions_b.get(package, 'none')}"
            )
    return found
