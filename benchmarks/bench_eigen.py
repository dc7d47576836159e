"""Eigenvalues: orders x batches, mixed sizes, and a network's set."""

from typing import Any

import pytest

from fastcov.bench import Work, works
from fastcov.bench.suite import run_work, setting_from_environment

SETTING = setting_from_environment()


@pytest.mark.parametrize("work", works("eigen", SETTING), ids=lambda work: work.name)
def test_eigenvalues(benchmark: Any, work: Work) -> None:
    """Every contender in turns; ours by pytest-benchmark."""
    run_work(benchmark, work, SETTING)
