"""Runs interpreted cases in a process whose triton interprets kernels on the CPU."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).parent


def run_interpreted(file: str) -> None:
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(FOLDER / file)],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        cwd=FOLDER.parents[1],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert run.returncode == 0, run.stdout[-6000:] + run.stderr[-2000:]


@pytest.mark.slow
def test_emulated_cuda_graphs_read_what_eager_steps_read() -> None:
    run_interpreted("interpreted_graphs.py")


@pytest.mark.slow
def test_one_launch_adds_the_full_buffers_of_all_layers() -> None:
    run_interpreted("interpreted_flushes.py")


@pytest.mark.slow
def test_a_detector_whose_sizes_change_never_waits_for_the_device() -> None:
    run_interpreted("interpreted_detector.py")
