"""The picture of CONTRIBUTING.md, drawn from the imports: rooms of fastcov/ and who imports whom.

python tools/house.py            # writes the picture
python tools/house.py --check    # exit status 1 where it is not up to date
"""

from __future__ import annotations

import argparse
import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "CONTRIBUTING.md"
BEGIN, END = "<!-- house -->\n", "<!-- /house -->"


def modules() -> dict[str, Path]:
    """Files of the package by module name."""
    found = {}
    for path in sorted((ROOT / "fastcov").rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imports_of(module: str, path: Path, known: dict[str, Path]) -> set[str]:
    """Modules of the package that a file imports, those for type checkers left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    skipped: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            skipped.update(id(inner) for each in node.body for inner in ast.walk(each))
    found = set()
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and node.module in known:
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in known else node.module)
    return found - {module}


def graph() -> dict[str, set[str]]:
    """Imports of every module of the package."""
    known = modules()
    return {name: imports_of(name, path, known) for name, path in known.items()}


def room_of(module: str) -> str:
    """Folder of a module, or the module itself at the root."""
    return module.split(".")[1] if "." in module else module


def rooms() -> dict[str, set[str]]:
    """Imports of every room, rooms of helpers at the root and the root itself left out."""
    known = modules()
    left_out = {"fastcov", "__main__", "files", "names", "version", "arguments"}
    found: dict[str, set[str]] = {}
    for module, imported in graph().items():
        room = room_of(module)
        if room in left_out:
            continue
        found.setdefault(room, set()).update(
            other for name in imported if (other := room_of(name)) not in {room, *left_out}
        )
    assert all(room in found for each in found.values() for room in each), known
    return found


def floors(edges: dict[str, set[str]]) -> dict[str, int]:
    """Floor of each node: one above the highest that it imports; 1 where it imports none.

    Raises:
        ValueError: If nodes import each other in a circle.
    """
    found: dict[str, int] = {}

    def floor(node: str, path: tuple[str, ...]) -> int:
        if node in path:
            raise ValueError(f"imports run in a circle: {' -> '.join((*path, node))}")
        if node not in found:
            below = [floor(each, (*path, node)) for each in edges[node]]
            found[node] = 1 + max(below, default=0)
        return found[node]

    for node in edges:
        floor(node, ())
    return found


def direct(edges: dict[str, set[str]]) -> dict[str, set[str]]:
    """The edges that no longer path repeats: what is left tells the rest."""

    def reaches(start: str, goal: str) -> bool:
        return any(each == goal or reaches(each, goal) for each in edges[start])

    return {
        node: {goal for goal in goals if not any(reaches(other, goal) for other in goals - {goal})}
        for node, goals in edges.items()
    }


def picture() -> str:
    """Mermaid source of the rooms, the upper floors first."""
    edges = rooms()
    height = floors(edges)
    lines = ["```mermaid", "flowchart TD"]
    for room in sorted(edges, key=lambda each: (-height[each], each)):
        goals = sorted(direct(edges)[room], key=lambda each: (-height[each], each))
        lines += [f"    {room} --> {goal}" for goal in goals]
    return "\n".join([*lines, "```", ""])


def main() -> int:
    """Command line: writes or checks the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing")
    arguments = parser.parse_args()
    page = PAGE.read_text(encoding="utf-8")
    head, rest = page.split(BEGIN)
    drawn = head + BEGIN + picture() + END + rest.split(END, 1)[1]
    if arguments.check:
        return int(drawn != page)
    PAGE.write_text(drawn, encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
