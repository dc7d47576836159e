"""Workers of `make test`: a file's tests stay together, and what they share is made once."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

MAKEFILE = (Path(__file__).parent.parent / "Makefile").read_text()
CASES = """
import os, pathlib, pytest

@pytest.fixture(scope="module")
def shared():
    with open(__file__ + ".made", "a") as file:
        file.write(os.environ["PYTEST_XDIST_WORKER"] + " ")

@pytest.mark.parametrize("case", range(8))
def test_one(shared, case):
    pass
"""


@pytest.mark.slow
def test_a_module_fixture_is_made_once(tmp_path: Path) -> None:
    """A group that a version of pytest-xdist no longer knows would be spread in silence."""
    for name in ("test_a.py", "test_b.py", "test_c.py"):
        (tmp_path / name).write_text(CASES)
    (options,) = re.findall(r"pytest -n \$\(WORKERS\) (.*)$", MAKEFILE, re.MULTILINE)
    command = [sys.executable, "-m", "pytest", "-q", "-n", "2", *shlex.split(options)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    made = [file.read_text().split() for file in sorted(tmp_path.glob("*.made"))]
    assert [len(workers) for workers in made] == [1, 1, 1]
    assert len({worker for workers in made for worker in workers}) == 2


def test_what_runs_alone_lies_where_it_is_collected() -> None:
    (folder,) = re.findall(r"pytest -m alone (\S+) ", MAKEFILE)
    tests = Path(__file__).parent
    marked = {path for path in tests.rglob("test_*.py") if f"mark.{'alone'}" in path.read_text()}
    assert marked
    assert all(tests.parent / folder in path.parents for path in marked)
