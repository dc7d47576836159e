"""Benchmark cases of a GPU, each in a process of its own and within a fixed time.

An illegal access ends every later call of its process, and a compilation can take minutes: either
costs one case here, not the others' results.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from fastcov.bench.contest import Size
from fastcov.bench.results import load_results, now
from fastcov.bench.table import print_targets
from fastcov.bench.targets import judge

TOTAL_S = 510.0  # leaves half a minute of nine for a build
SHARES_S: Mapping[str, float] = {
    "hooks": 45.0,
    "covariance": 115.0,
    "eigen": 110.0,
    "training-resnet50": 65.0,
    "training-vit": 60.0,
    "training-faster_rcnn": 60.0,
    "snapshot": 55.0,
}
"""Seconds of each case, the start of its process included, in the order of running. Seconds that a
case leaves go to the next."""
_OTHERS_S = 170.0  # the three compiled training steps, together as long
_FULL_TIMES = 10
_START_S = 12.0  # of a process: torch, a CUDA context, the machine's rates
_GRACE_S = 20.0  # for a contest that began in time to end, and for its rows to be written


def shares(cases: Sequence[str], size: Size) -> dict[str, float]:
    """Seconds of each case, in the order that they run."""
    ordered = [name for name in SHARES_S if name in cases]
    ordered += [name for name in cases if name not in SHARES_S]
    factor = _FULL_TIMES if size == "full" else 1
    return {name: factor * SHARES_S.get(name, _OTHERS_S) for name in ordered}


def run_apart(cases: Sequence[str], size: Size, folder: Path | None) -> int:
    """Run of cases on the GPU, one process each, with the table of targets at its end.

    Args:
        cases: Names of cases.
        size: Size of the contests; "full" has ten times the seconds.
        folder: Folder for JSON files; None writes none, and no table of targets follows.

    Returns:
        0, or 1 if a case failed or was ended.
    """
    start, started = time.monotonic(), now()
    failed, planned_s = [], 0.0
    with _ended_by_sigterm():
        for case, seconds in shares(cases, size).items():
            planned_s += seconds
            left_s = max(_START_S, start + planned_s - time.monotonic())
            command = _command(case, size, folder, max(1.0, left_s - _START_S - _GRACE_S))
            status = _ended_within(left_s, command)
            if status != 0:
                failed.append(case)
                reason = f"ended after {left_s:.0f} s" if status is None else f"status {status}"
                print(f"fastcov bench: {case}: {reason}", file=sys.stderr, flush=True)
    if folder is not None and size != "tiny" and any(folder.glob("*.json")):
        results = load_results(folder)
        # Files of an earlier run may lie there: of a case that failed they would stand as today's.
        fresh = [case for case in cases if case in results and results[case].started >= started]
        rows = {case: results[case].rows for case in fresh}
        device = next((results[case].machine["device"] for case in fresh), "")
        print_targets(judge("cuda", rows, device), device)
    spent_s = time.monotonic() - start
    print(f"  {spent_s:.0f} s in all; failed: {', '.join(failed) or 'none'}", flush=True)
    return 1 if failed else 0


def _command(case: str, size: Size, folder: Path | None, seconds: float) -> list[str]:
    script = "import sys; from fastcov.bench import main; sys.exit(main())"
    command = [sys.executable, "-c", script, "--gpu", "--only", case, f"--seconds={seconds:.0f}"]
    if size != "default":
        command.append(f"--{size}")
    if folder is not None:
        command += ["--out", str(folder)]
    return command


@contextlib.contextmanager
def _ended_by_sigterm() -> Iterator[None]:
    # By itself SIGTERM, which `timeout` sends, ends Python without `finally`: a case would run on.
    before = signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _ended_within(seconds: float, command: Sequence[str]) -> int | None:
    """Status of a command; None if time was up: it is killed with all processes that it started."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait(timeout=seconds)
    except subprocess.TimeoutExpired:
        return None
    finally:
        # Also on Ctrl-C, and compile workers that outlive a case.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
