"""Examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import pkgutil

import pytest
import torch

import fastcov

MODULES = [
    found.name
    for found in pkgutil.walk_packages(fastcov.__path__, "fastcov.")
    if not found.name.startswith("fastcov.lib")
]


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
