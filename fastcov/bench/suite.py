"""One contest as a pytest-benchmark test, for benchmarks/bench_*.py."""

from __future__ import annotations

import os
from typing import Any

import torch

from fastcov.bench.contest import Row, Setting, Size, Work, measure
from fastcov.bench.peers import MissingPeerError

SIZE_SWITCH = "FASTCOV_BENCH_SIZE"


def setting_from_environment() -> Setting:
    """Setting on the GPU if there is one, else on the CPU; its size from FASTCOV_BENCH_SIZE.

    Raises:
        ValueError: If FASTCOV_BENCH_SIZE names no size.
    """
    size = os.environ.get(SIZE_SWITCH, "default")
    known: dict[str, Size] = {"tiny": "tiny", "default": "default", "full": "full"}
    if size not in known:
        raise ValueError(f"{SIZE_SWITCH}={size!r}: choose one of {', '.join(known)}")
    device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return Setting(device, known[size])


def run_work(benchmark: Any, work: Work, setting: Setting) -> list[Row]:
    """Rows of a contest: all contenders in turns, then fastcov once more by pytest-benchmark.

    Args:
        benchmark: pytest-benchmark's fixture; its ``extra_info`` gets peers, floor and errors.
        work: Contest to build.
        setting: Setting to run in.

    Returns:
        Rows of the interleaved run.
    """
    try:
        contest = work.build(setting)
    except MissingPeerError as missing:
        raise RuntimeError(f"{work.name}: {missing}") from missing
    rows = measure(work.name, contest, setting)
    ours = next(name for name in contest.contenders if name.startswith(("fastcov", "steps and")))
    benchmark.group = work.name
    benchmark.extra_info["rows"] = [row.as_dict() for row in rows]
    benchmark.extra_info["missing"] = setting.missing
    benchmark.extra_info["rates"] = setting.rates.as_dict()
    if contest.prepare is not None:
        contest.prepare(ours, 0)
    rounds = max(1, min(contest.rounds, rows[0].samples))
    benchmark.pedantic(contest.contenders[ours], args=(0,), rounds=rounds, iterations=1)
    return rows
