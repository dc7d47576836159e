"""Training steps with and without tracking, and the host time of one hook."""

from typing import Any

import pytest

from fastcov.bench import CASES, Work, works
from fastcov.bench.suite import run_work, setting_from_environment
from fastcov.bench.training import COMPILED_NETWORKS

SETTING = setting_from_environment()
WORKS = [
    work
    for case in CASES
    if case == "hooks" or case.startswith("training-")
    # Tiny, one small network stands for all that are compiled.
    if not (SETTING.is_tiny and case.removeprefix("training-") in COMPILED_NETWORKS)
    for work in works(case, SETTING)
]


@pytest.mark.parametrize("work", WORKS, ids=lambda work: work.name)
def test_step(benchmark: Any, work: Work) -> None:
    """Every set of hooks in turns; the default's by pytest-benchmark."""
    run_work(benchmark, work, SETTING)
