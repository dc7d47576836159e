"""Check that a release's tag is the version: ``python tools/check_tag.py v0.1.0``."""

from __future__ import annotations

import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FILES = (
    "fastcov/version.py",
    "detection/fastcov_detection/__init__.py",
    "detection/pyproject.toml",
)


def main(arguments: list[str]) -> int:
    """Command line: compares the tag with the version in each file.

    Returns:
        0; 1 if a file states another version, which is printed with the remedy.
    """
    (tag,) = arguments
    differing = []
    for name in FILES:
        text = (ROOT / name).read_text(encoding="utf-8")
        found = re.search(r'^(?:__version__|version) = "(.*)"', text, re.MULTILINE)
        if found is None or f"v{found[1]}" != tag:
            differing.append(f"{name} has {found[1] if found else 'no version'}")
    if differing:
        print(
            f"tag {tag}: {', '.join(differing)}; set the version there, or tag v and that version"
        )
    return 1 if differing else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
