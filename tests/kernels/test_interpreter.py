"""Runs interpreted.py in a process whose triton interprets kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the kernels need triton")

CASES = Path(__file__).with_name("interpreted.py")


@pytest.mark.slow
@pytest.mark.parametrize("group", ["TestAccumulate", "TestGather or TestFlush or test_runs"])
def test_kernels_match_the_reference(group):
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(CASES), "-k", group],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=CASES.parents[2],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
