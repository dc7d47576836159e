"""Streaming second moments: layouts x dtypes x channels x rows, and whole networks."""

from typing import Any

import pytest

from fastcov.bench import Work, works
from fastcov.bench.suite import run_work, setting_from_environment

SETTING = setting_from_environment()


@pytest.mark.parametrize("work", works("covariance", SETTING), ids=lambda work: work.name)
def test_covariance(benchmark: Any, work: Work) -> None:
    """Every contender in turns; ours by pytest-benchmark."""
    run_work(benchmark, work, SETTING)
