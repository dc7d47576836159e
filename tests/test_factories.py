"""No tensor lands on the device that torch.set_default_device has chosen for the user's own."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from torch.utils._device import _device_constructors

import fastcov

FOLDER = Path(fastcov.__file__).parent
FACTORIES = {factory.__name__ for factory in _device_constructors()}


def without_device(source: str) -> list[str]:
    """Factory calls of torch that name no device, with their lines."""
    return [
        f"line {call.lineno}: torch.{call.func.attr}"
        for call in ast.walk(ast.parse(source))
        if isinstance(call, ast.Call)
        and isinstance(call.func, ast.Attribute)
        and isinstance(call.func.value, ast.Name)
        and call.func.value.id == "torch"
        and call.func.attr in FACTORIES
        and not any(argument.arg in ("device", None) for argument in call.keywords)
    ]


@pytest.mark.parametrize(
    "path",
    [path for path in sorted(FOLDER.rglob("*.py")) if "bench" not in path.parts],
    ids=lambda path: str(path.relative_to(FOLDER)),
)
def test_every_factory_call_names_a_device(path: Path) -> None:
    assert without_device(path.read_text(encoding="utf-8")) == []


def test_a_call_without_a_device_is_found() -> None:
    source = "import torch\ntorch.empty(2, device='cpu')\ntorch.empty(2, pin_memory=True)\n"
    assert without_device(source) == ["line 3: torch.empty"]
