"""Benchmarks that run from the installed wheel: ``fastcov bench``.

Every number is taken beside its peers in one interleaved run, after its result was compared with
the float64 oracle, and stands beside what the machine itself can do.
"""

from fastcov.bench.command import CASES, main, run_case, works
from fastcov.bench.contest import Contest, Row, Setting, Work, WrongResultError, measure

__all__ = [
    "CASES",
    "Contest",
    "Row",
    "Setting",
    "Work",
    "WrongResultError",
    "main",
    "measure",
    "run_case",
    "works",
]
