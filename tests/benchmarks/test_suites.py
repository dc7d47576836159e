"""Every benchmark of benchmarks/ runs once, at tiny size, so that none rots."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from fastcov.bench import CASES, Setting, works
from fastcov.bench.training import COMPILED_NETWORKS

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
SUITES = sorted(path.name for path in BENCHMARKS.glob("bench_*.py"))


@pytest.mark.slow
def test_suites_run(tmp_path: Path) -> None:
    # One process for all: torch's compiler takes longer to start than what it compiles here.
    command = [
        *(sys.executable, "-m", "pytest", *(str(BENCHMARKS / suite) for suite in SUITES)),
        # The project's options skip benchmarks; what is skipped here would not be run at all.
        *("--override-ini", "addopts=--import-mode=importlib", "--benchmark-only", "-q"),
        f"--benchmark-json={tmp_path / 'out.json'}",
    ]
    # pytest-benchmark does nothing in what takes itself for a worker of pytest-xdist.
    own = {name: each for name, each in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment = {**own, "FASTCOV_BENCH_SIZE": "tiny", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        command, cwd=BENCHMARKS.parent, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout
    ran = json.loads((tmp_path / "out.json").read_text())["benchmarks"]
    assert all(one["extra_info"]["rows"] for one in ran)
    setting = Setting(torch.device("cpu"), "tiny")
    cases = [case for case in CASES if case.removeprefix("training-") not in COMPILED_NETWORKS]
    assert sorted(one["group"] for one in ran) == sorted(
        work.name for case in cases for work in works(case, setting)
    )


def test_all_four_suites_are_there() -> None:
    assert SUITES == [
        "bench_covariance.py",
        "bench_eigen.py",
        "bench_snapshot.py",
        "bench_training.py",
    ]


@pytest.mark.slow
def test_the_table_of_worst_errors_is_made(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "eigen_accuracy.py"), "--largest", "3"]
    command += ["--out", str(tmp_path / "accuracy.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "accuracy.md").read_text(encoding="utf-8")
    assert "Orders: 1, 2, 3." in table
    assert "| float32: eigvalsh, one matrix |" in table


@pytest.mark.slow
@pytest.mark.parametrize(("least", "status"), [("0.001", 0), ("1000", 1)])
def test_the_table_of_eigenvalue_speed_is_made(tmp_path: Path, least: str, status: int) -> None:
    command = [sys.executable, str(BENCHMARKS / "eigen_speed.py"), "--largest", "2"]
    command += ["--budget-s", "0.3", "--least", least, "--out", str(tmp_path / "speed.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == status, done.stderr[-3000:]
    assert ("below 1000.0: eigh of (2, 2), 2 threads" in done.stderr) == (status == 1)
    table = (tmp_path / "speed.md").read_text(encoding="utf-8")
    assert "## eigh, float32, 2 threads" in table
    assert table.count("| n \\ B | 1 | 2 |") == 4


def test_the_table_of_coverage_is_made(tmp_path: Path) -> None:
    command = [sys.executable, str(BENCHMARKS / "uncertainty_coverage.py"), "--draws", "2"]
    command += ["--channels", "4", "--out", str(tmp_path / "coverage.md")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    table = (tmp_path / "coverage.md").read_text(encoding="utf-8")
    assert "| Gaussian | 16 | " in table
    assert "two levels" in table
