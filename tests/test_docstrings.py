"""Examples in docstrings run and print what they say."""

from __future__ import annotations

import doctest
import importlib
import importlib.util
import pkgutil
from types import ModuleType

import pytest
import torch

import fastcov

# A module that imports a package which is not needed is left out where that package is absent.
PACKAGES = (
    "lightning",
    "matplotlib",
    "tensorboard",
    "torchvision",
    "transformers",
    "triton",
    "wandb",
)
MODULES = [
    found.name
    for found in pkgutil.walk_packages(fastcov.__path__, "fastcov.")
    if not found.name.startswith("fastcov.lib")
]


def load(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        if error.name is None or error.name.split(".")[0] not in PACKAGES:
            raise
        pytest.skip(f"{error.name} is not installed")


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    module = load(name)
    assert doctest.testmod(module, extraglobs={"torch": torch}).failed == 0


def test_there_are_examples() -> None:
    finder = doctest.DocTestFinder(exclude_empty=True)
    examples = [
        example
        for name in ("fastcov.tracker", "fastcov.widths", "fastcov.spectrum", "fastcov.ops.eigen")
        for found in finder.find(load(name))
        for example in found.examples
    ]
    assert len(examples) > 25
