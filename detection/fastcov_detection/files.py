"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any


def write_file(path: str | os.PathLike[str], write: Callable[[IO[bytes]], Any]) -> None:
    """Lets ``write`` fill a temporary file beside ``path``, then renames it into place.

    Raises:
        OSError: If the folder cannot be written or the disk is full; ``path`` is as it was.
    """
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, partial = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(partial, 0o644)
        os.replace(partial, target)
    except OSError as error:
        raise OSError(
            error.errno, f"cannot write {target} ({error.strerror}); free space or choose a folder"
        ) from error
    finally:
        if os.path.exists(partial):
            os.unlink(partial)


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Writes UTF-8 text; see :func:`write_file`."""
    write_file(path, lambda file: file.write(text.encode("utf-8")))
