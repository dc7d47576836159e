"""Pins of constraints.txt: the needs of pyproject.toml, and theirs, as installed here."""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parent.parent
# What `make setup` builds with, beside what both distributions name.
BUILD_TOOLS = ["cmake", "ninja", "packaging"]
OWN = {"fastcov-torch", "fastcov-detection"}


def wanted() -> list[str]:
    """Requirements of both distributions: to build them, and of every extra."""
    requirements = list(BUILD_TOOLS)
    for file in (ROOT / "pyproject.toml", ROOT / "detection" / "pyproject.toml"):
        settings = tomllib.loads(file.read_text(encoding="utf-8"))
        project = settings["project"]
        requirements += settings["build-system"]["requires"] + project["dependencies"]
        for extra in project.get("optional-dependencies", {}).values():
            requirements += extra
    return requirements


def closure(requirements: list[str]) -> dict[str, str]:
    """Name and installed version of everything that the requirements reach."""
    pins: dict[str, str] = {}
    seen: set[tuple[str, str]] = set()
    queue = [Requirement(line) for line in requirements]
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        for extra in {"", *requirement.extras}:
            if (name, extra) in seen or name in OWN:
                continue
            seen.add((name, extra))
            try:
                package = distribution(name)
            except PackageNotFoundError:
                sys.exit(f"{name} is required but not installed: install it, then pin again")
            pins[name] = package.version
            for line in package.requires or []:
                needed = Requirement(line)
                if needed.marker is None or needed.marker.evaluate({"extra": extra}):
                    queue.append(needed)
    return pins


def main() -> None:
    """Command line: writes constraints.txt."""
    pins = closure(wanted())
    text = (
        "# The development environment (make setup): Python 3.11, x86-64 Linux.\n"
        "# Made by tools/pin_constraints.py. Users of the wheel need torch and numpy alone.\n"
    )
    text += "".join(f"{name}=={version}\n" for name, version in sorted(pins.items()))
    (ROOT / "constraints.txt").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
