"""Runs the interpreted cases in a process whose triton interprets kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

triton = pytest.importorskip("triton", reason="the kernels need triton")

FOLDER = Path(__file__).parent


@pytest.mark.slow
@pytest.mark.parametrize(
    ("file", "group"),
    [
        ("interpreted.py", "TestAccumulate"),
        ("interpreted.py", "TestFlush or test_runs"),
        ("interpreted_flush.py", "test"),
        ("interpreted_gather.py", "Test or test_runs"),
        ("interpreted_chains.py", "test"),
    ],
)
def test_kernels_match_the_reference(file, group):
    cases = str(FOLDER / file)
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", cases, "-k", group],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]
