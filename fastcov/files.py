"""Whole files: one that is written here is complete under its name, or not there at all."""

import contextlib
import os
import uuid
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def replacing(
    path: Path, *, temporary: Path | None = None, durable: bool = False
) -> Iterator[Path]:
    """Temporary path to write to, renamed to ``path`` when the block ends without an error.

    After an error nothing is left of the temporary file, and an older file at ``path`` is intact.

    Args:
        path: Final name; its folder is made as needed.
        temporary: Path in the same folder; None takes a name that no other process uses, be
            it on another machine that shares the folder.
        durable: True for a file that must outlive a power cut once the block has ended.

    Yields:
        The temporary path.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder) / "new" / "page.txt") as temporary:
        ...         _ = temporary.write_text("whole")
        ...     print((Path(folder) / "new" / "page.txt").read_text())
        whole
    """
    if temporary is None:
        temporary = path.with_name(f"{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            flush_to_disk(temporary)
        os.replace(temporary, path)
        if durable:
            flush_to_disk(path.parent)
    except BaseException:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def flush_to_disk(path: Path) -> None:
    """Flush of a file's content, or of a folder's names, through all caches to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
