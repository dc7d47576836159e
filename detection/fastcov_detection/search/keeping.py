"""What a search leaves for version control: everything but weights, checkpoints and logs.

The kept folder has the layout of the search's own folder, so that a search whose kept files are
copied into a fresh folder goes on without repeating a finished run. A run that came back this way
has a result but no weights: latency and pictures need runs that were trained in the folder itself.
"""

from __future__ import annotations

from pathlib import Path

from fastcov_detection.config import ConfigError
from fastcov_detection.files import write_file

_KEPT = (
    "config.json",
    "data.json",
    "widths/*.json",
    "spectra/*.npz",
    "arms/*/seed*/run.json",
    "widths.json",
    "result.json",
)
# What later runs are derived from: two searches that differ here must not be mixed.
_PLANS = "widths/*.json"


def restore(kept: Path, folder: Path) -> list[Path]:
    """Copies what an earlier search kept, and this folder lacks.

    Args:
        kept: Folder of kept files; may be empty or missing.
        folder: Of the search.

    Returns:
        What was copied, relative to the folder.

    Raises:
        ConfigError: If both hold a plan of widths and the two differ.
    """
    restored = []
    for path in _files(kept, _KEPT):
        target = folder / path
        if not target.exists():
            _copy(kept / path, target)
            restored.append(path)
        elif path.match(_PLANS) and target.read_bytes() != (kept / path).read_bytes():
            raise ConfigError(
                f"{target} and {kept / path} are different widths of the same arm; "
                "choose another folder for --out or for --results"
            )
    return restored


def keep(folder: Path, kept: Path) -> None:
    """Copies what is new or has changed since the last call; each file appears whole."""
    for path in _files(folder, _KEPT):
        target = kept / path
        if not target.exists() or target.read_bytes() != (folder / path).read_bytes():
            _copy(folder / path, target)


def _files(folder: Path, patterns: tuple[str, ...]) -> list[Path]:
    return [
        path.relative_to(folder) for pattern in patterns for path in sorted(folder.glob(pattern))
    ]


def _copy(source: Path, target: Path) -> None:
    content = source.read_bytes()
    write_file(target, lambda file: file.write(content))
