"""Files that appear whole or not at all, and the versions of code and torch for records."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

import torch

from fastcov.files import replacing
from fastcov_detection import __version__


def write_file(path: str | os.PathLike[str], write: Callable[[IO[bytes]], Any]) -> None:
    """File filled under a temporary name by a function, then renamed.

    Raises:
        OSError: If the folder cannot be written or the disk is full; ``path`` is as it was.
    """
    try:
        with replacing(Path(path), durable=True) as partial, partial.open("wb") as file:
            write(file)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {path} ({error.strerror}); free space or choose a folder"
        ) from error


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Text file in UTF-8; see :func:`write_file`."""
    write_file(path, lambda file: file.write(text.encode("utf-8")))


def made_by() -> dict[str, str]:
    """Commit of this code and version of torch."""
    return {"commit": commit(), "torch": torch.__version__}


def commit() -> str:
    """Commit of this code where it runs from a checkout, otherwise the installed version."""
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
