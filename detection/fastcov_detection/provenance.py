"""Which code and which torch made a result."""

from __future__ import annotations

import subprocess
from pathlib import Path

import torch

from fastcov_detection import __version__


def made_by() -> dict[str, str]:
    """The commit of this code and the version of torch."""
    return {"commit": commit(), "torch": torch.__version__}


def commit() -> str:
    """The commit of this code where it runs from a checkout, otherwise the installed version."""
    here = Path(__file__).resolve()
    # A package inside an environment inside someone's repository is not part of that repository.
    tracked = _git(here.parent, "ls-files", "--error-unmatch", here.name)
    found = _git(here.parent, "rev-parse", "HEAD") if tracked else None
    return found or f"fastcov-detection {__version__}"


def _git(folder: Path, *words: str) -> str | None:
    try:
        ran = subprocess.run(
            ["git", "-C", str(folder), *words], capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return ran.stdout.strip() if ran.returncode == 0 else None
