"""Shared by all tests: one line about what a missing GPU leaves out."""

from __future__ import annotations

import pytest
import torch


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    kept, left_out = [], []
    for item in items:
        (left_out if item.get_closest_marker("gpu") else kept).append(item)
    items[:] = kept
    config.stash[_LEFT_OUT] = len(left_out)


_LEFT_OUT = pytest.StashKey[int]()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    count = terminalreporter.config.stash.get(_LEFT_OUT, 0)
    if count:
        terminalreporter.write_line(f"{count} gpu tests were left out: this machine has no GPU")
