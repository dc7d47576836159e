"""The house: who imports whom, public names, private names, and the picture of both."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from collections import Counter
from functools import partial
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import fastcov

ROOT = Path(__file__).parent.parent
MOST_FLOORS = 10
MOST_PUBLIC_NAMES = 14
MOST_RETURNS = 4


@pytest.fixture(scope="module")
def house() -> ModuleType:
    spec = importlib.util.spec_from_file_location("house", ROOT / "tools" / "house.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_rooms_stand_on_at_most_ten_floors(house: ModuleType) -> None:
    assert max(house.floors(house.rooms()).values()) <= MOST_FLOORS


def test_no_files_import_each_other(house: ModuleType) -> None:
    graph = house.graph()
    graph.pop("fastcov")  # imports everything, and is imported for its public names
    house.floors({name: imported & graph.keys() for name, imported in graph.items()})


def test_a_circle_is_found(house: ModuleType) -> None:
    with pytest.raises(ValueError, match="a -> b -> a"):
        house.floors({"a": {"b"}, "b": {"a"}})


def test_the_picture_is_drawn_from_the_imports(house: ModuleType) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text()
    assert house.BEGIN + house.picture() + house.END in page, "run python tools/house.py"


def test_public_names_are_few() -> None:
    assert len(fastcov.__all__) <= MOST_PUBLIC_NAMES


def test_importing_it_needs_torch_and_numpy_alone_and_starts_no_cuda() -> None:
    script = (
        "import sys, torch, fastcov\n"
        "others = ('matplotlib', 'jinja2', 'rich', 'scipy', 'triton', 'torchvision')\n"
        "loaded = [name for name in others if name in sys.modules]\n"
        "print(loaded, torch.cuda.is_initialized())"
    )
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert run.stdout == "[] False\n"
    assert run.stderr == ""


def private_names(tree: ast.Module) -> set[str]:
    """Private names that a file defines: functions, classes, variables, attributes and fields."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, ast.Name):
            names.add(node.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            names.add(node.attr)
    return {name for name in names if re.match(r"_[a-z]", name)}


def test_no_file_reads_a_private_name_of_another(house: ModuleType) -> None:
    trees = {name: ast.parse(path.read_text()) for name, path in house.modules().items()}
    own = {name: private_names(tree) for name, tree in trees.items()}
    everywhere = set().union(*own.values())
    found = []
    for name, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastcov"):
                found += [f"{name}: {a.name}" for a in node.names if re.match(r"_[a-z]", a.name)]
            elif isinstance(node, ast.Attribute) and node.attr in everywhere - own[name]:
                read = ast.unparse(node)
                found += [] if read.startswith("torch.") else [f"{name}: {read}"]
    assert not found


def facts() -> set[tuple[str, str]]:
    """Functions of one statement, by file and name: facts, counters; nothing is decided there."""
    found = set()
    for path in Path(fastcov.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                kept = [
                    each
                    for each in node.body
                    if not isinstance(each, (ast.Assert, ast.Delete))
                    and not (isinstance(each, ast.Expr) and isinstance(each.value, ast.Constant))
                ]
                if len(kept) <= 1:
                    found.add((str(path), node.name))
    return found


@pytest.mark.parametrize("where", ["output", "input"])
@pytest.mark.parametrize("rows", ["auto", "all", 0.5])
def test_a_first_call_returns_to_few_files(where: Any, rows: Any) -> None:
    """A file that is entered by a call again is one that the reader must turn back to."""
    skipped = facts()
    entries: Counter[str] = Counter()
    root = fastcov.__path__[0]

    def file_of(frame: FrameType | None) -> str | None:
        while frame is not None and not frame.f_code.co_filename.startswith(root):
            frame = frame.f_back
        return None if frame is None else frame.f_code.co_filename

    def note(frame: FrameType, event: str, _argument: Any) -> None:
        path, name = frame.f_code.co_filename, frame.f_code.co_name
        if event != "call" or not path.startswith(root) or name.startswith(("<", "__")):
            return
        entries[path] += (path, name) not in skipped and file_of(frame.f_back) != path

    def watched(hook: Any, *arguments: Any) -> Any:
        sys.setprofile(note)
        try:
            return hook(*arguments)
        finally:
            sys.setprofile(None)

    model = nn.Sequential(nn.Conv2d(3, 8, 3))
    with fastcov.track(model, rows=rows, where=where):
        for hooks in (model[0]._forward_hooks, model[0]._forward_pre_hooks):
            for key, hook in list(hooks.items()):
                hooks[key] = partial(watched, hook)
        model(torch.randn(16, 3, 30, 30))
    entries = +entries
    assert len(entries) > 6
    assert sum(entries.values()) - len(entries) <= MOST_RETURNS


def test_dtypes_are_named_in_three_files_at_most(house: ModuleType) -> None:
    """A file that names a dtype may have to change for a new one."""
    named = [
        name
        for name, path in house.modules().items()
        if not name.startswith(("fastcov.bench", "fastcov.ops.reference"))
        and re.search(r"torch\.(bfloat16|float16|half)\b", path.read_text())
    ]
    named.remove("fastcov.watch.gradients")  # a GradScaler is for float16 alone
    assert len(named) <= 3, named
