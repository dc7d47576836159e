"""accumulate_ on the CPU works on as many threads as torch.set_num_threads allows."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastcov
from fastcov.ops import native

pytestmark = [
    pytest.mark.skipif(
        "native" not in native.allowed_backends(),
        reason="the library is excluded by FASTCOV_BACKEND",
    ),
    pytest.mark.skipif(not Path("/proc/self/task").is_dir(), reason="threads' times are Linux's"),
]

SCRIPT = """
import os, sys, time
import torch
import fastcov

channels, dtype, *counts = sys.argv[1:]
shape = 50_000_000 // int(channels) ** 2, int(channels)
rows = torch.randn(shape, dtype=torch.float32).to(getattr(torch, dtype))
state = fastcov.CovarianceState(int(channels))

def seconds():
    # A thread's own CPU time: the clock that Linux numbers after it.
    tasks = os.listdir("/proc/self/task")
    return {task: time.clock_gettime((~int(task) << 3) | 6) for task in tasks}

for count in map(int, counts):
    torch.set_num_threads(count)
    fastcov.ops.accumulate_(state, rows)
    before = seconds()
    while sum(seconds().values()) - sum(before.values()) < 0.3:
        fastcov.ops.accumulate_(state, rows)
    after = seconds()
    spent = {task: used - before.get(task, 0) for task, used in after.items()}
    print(*sorted((share / sum(spent.values()) for share in spent.values()), reverse=True))
"""


def shares(channels: int, dtype: str, counts: list[int]) -> list[list[float]]:
    """Each thread's share of the CPU time, largest first, for every number of threads in turn."""
    arguments = [str(channels), dtype, *map(str, counts)]
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        # A thread that waits for others sleeps: what a thread spends is its work.
        env={
            **os.environ,
            "OMP_WAIT_POLICY": "passive",
            "PYTHONPATH": str(Path(fastcov.__file__).parents[1]),
        },
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [[float(share) for share in line.split()] for line in done.stdout.splitlines()]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("channels", [128, 520])  # rows are split, and tiles
def test_threads_are_those_that_torch_has(channels: int, dtype: str) -> None:
    alone, both, alone_again, three = shares(channels, dtype, [1, 2, 1, 3])
    # One thread does all the work; of several, each has its part, whatever else the machine does.
    assert alone[0] > 0.9
    assert sum(share > 0.25 for share in both) == 2
    assert alone_again[0] > 0.9
    assert sum(share > 0.15 for share in three) == 3
