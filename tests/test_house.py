"""The house: who imports whom, public names, private names, and the picture of both."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import fastcov

ROOT = Path(__file__).parent.parent
MOST_FLOORS = 10
MOST_PUBLIC_NAMES = 14


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


def test_no_file_reads_a_private_name_of_another(house: ModuleType) -> None:
    found = []
    for name, path in house.modules().items():
        tree = ast.parse(path.read_text())
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastcov"):
                found += [f"{name}: {a.name}" for a in node.names if re.match(r"_[a-z]", a.name)]
    assert not found
