"""Every benchmark of benchmarks/ runs once, at tiny size, so that none rots."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SUITES = sorted(path.name for path in BENCHMARKS.glob("bench_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("suite", SUITES)
def test_suite_runs(suite: str, tmp_path: Path) -> None:
    command = [
        *(sys.executable, "-m", "pytest", str(BENCHMARKS / suite)),
        # The project's options skip benchmarks; what is skipped here would not be run at all.
        *("--override-ini", "addopts=--import-mode=importlib", "--benchmark-only", "-q"),
        f"--benchmark-json={tmp_path / 'out.json'}",
    ]
    environment = {**os.environ, "FASTCOV_BENCH_SIZE": "tiny", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
    assert (tmp_path / "out.json").stat().st_size > 1000


def test_all_four_suites_are_there() -> None:
    assert SUITES == [
        "bench_covariance.py",
        "bench_eigen.py",
        "bench_snapshot.py",
        "bench_training.py",
    ]
