"""Docstrings begin with a noun, and their examples run and print what they say."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from pathlib import Path

import pytest
import torch

import fastcov

MODULES = [
    found.name
    for found in pkgutil.walk_packages(fastcov.__path__, "fastcov.")
    if not found.name.startswith("fastcov.lib")
]
ROOT = Path(__file__).parent.parent
FOLDERS = ("fastcov", "detection/fastcov_detection", "benchmarks", "tools")
NO_NOUN = re.compile(
    r"(Adds|Answers|Asks|Begins|Builds|Chooses|Closes|Collects|Compares|Completes|Computes|Continues|"
    r"Counts|Deletes|Delivers|Describes|Does|Drops|Empties|Ends|Finds|Follows|Forgets|Gives|Goes|Has|"
    r"How|Joins|Keeps|Leaves|Lets|Loads|Logs|Makes|Moves|Multiplies|Opens|Parses|Passes|Pools|"
    r"Prepares|Prints|Puts|Raises|Reads|Rebuilds|Refuses|Registers|Removes|Replaces|Restores|Rewrites|"
    r"Says|See|Sends|Sets|Settles|Shows|Starts|Stops|Stores|Takes|Tells|They|Trains|Waits|Warns|What|"
    r"Where|Whether|Which|Writes)\b"
)


def _docstrings(path: Path) -> dict[str, str]:
    """Docstrings of a file, by their places."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    nodes = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, documented)]
    texts = {f"{path.name}:{getattr(n, 'lineno', 1)}": ast.get_docstring(n) for n in nodes}
    return {place: text for place, text in texts.items() if text}


def test_docstrings_begin_with_a_noun() -> None:
    files = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    texts = {place: text for path in files for place, text in _docstrings(path).items()}
    assert len(texts) > 1000
    verbs = {place: text for place, text in texts.items() if NO_NOUN.match(text)}
    assert not verbs


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = importlib.import_module(name)
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [
        example
        for name in (
            "fastcov.tracker",
            "fastcov.widths.plan",
            "fastcov.spectra.spectrum",
            "fastcov.ops.eigen",
        )
        for found in finder.find(importlib.import_module(name))
        for example in found.examples
    ]
    assert len(examples) > 25
