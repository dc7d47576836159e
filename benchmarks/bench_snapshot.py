"""Reading all spectra: latency, and whether training waits."""

from typing import Any

import pytest

from fastcov.bench import Work, works
from fastcov.bench.suite import run_work, setting_from_environment

SETTING = setting_from_environment()


@pytest.mark.parametrize("work", works("snapshot", SETTING), ids=lambda work: work.name)
def test_snapshot(benchmark: Any, work: Work) -> None:
    """Every contender in turns; ours by pytest-benchmark."""
    run_work(benchmark, work, SETTING)
