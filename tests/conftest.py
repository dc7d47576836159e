"""Shared by all tests: order of files, a browser, and one line about tests without a GPU."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterator

import pytest
import torch

_BROWSERS = ("chromium", "chromium-browser", "google-chrome")
_LEFT_OUT = pytest.StashKey[dict[str, int]]()


def _find_browser() -> str | None:
    return next(filter(None, map(shutil.which, _BROWSERS)), None)


def _is_long(item: pytest.Item) -> bool:
    return any(item.get_closest_marker(name) for name in ("slow", "wheel", "dist"))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    has_gpu, has_browser = torch.cuda.is_available(), _find_browser() is not None
    left_out = {"gpu": 0, "browser": 0}
    kept = []
    for item in items:
        if not has_gpu and item.get_closest_marker("gpu"):
            left_out["gpu"] += 1
        elif not has_browser and "browser" in getattr(item, "fixturenames", ()):
            left_out["browser"] += 1
        else:
            kept.append(item)
    # Files with long tests begin first, so that workers end together. A file stays on one worker
    # (`--dist loadfile`), because its tests share compiled or trained things.
    long_files = {item.path for item in kept if _is_long(item)}
    kept.sort(key=lambda item: item.path not in long_files)
    items[:] = kept
    config.stash[_LEFT_OUT] = left_out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    left_out = terminalreporter.config.stash.get(_LEFT_OUT, {})
    reasons = {
        "gpu": "this machine has no GPU",
        "browser": f"none of {', '.join(_BROWSERS)} is on PATH",
    }
    for kind, count in left_out.items():
        if count:
            terminalreporter.write_line(f"{count} {kind} tests were left out: {reasons[kind]}")


@pytest.fixture(autouse=True)
def own_accelerator_state() -> Iterator[None]:
    """accelerate's settings, of each test alone: a Trainer leaves its own in the process."""
    yield
    if "accelerate.state" in sys.modules:
        sys.modules["accelerate.state"].AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def browser() -> str:
    """Headless Chromium, which .ci/run installs; pages are checked as text without it too."""
    found = _find_browser()
    assert found is not None, "tests that ask for it were left out"
    return found


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """Nothing compiled before, nothing left behind."""
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.set_stance("default")
    torch.compiler.reset()
