"""Steps of a detector whose numbers of RoIs change, emulated: what waits for the device is counted.

Run by test_graphs.py with TRITON_INTERPRET=1, so that the CPU stands for a GPU.
"""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import AbstractContextManager, nullcontext
from functools import wraps
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov.kernels.launch import Launch
from fastcov.stats import buffering
from fastcov.stats.capture import DeviceCounters
from fastcov.stats.device_buffer import DeviceBuffer

PACKAGE = str(Path(fastcov.__file__).parent)
# Methods of a tensor that wait for its device where the result is the host's.
WAITING = (
    "item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__", "__index__",
)  # fmt: skip
LEVELS = (6, 3, 2)
# Boxes and masks of each step: a few more, many more, none, and fewer again.
ROIS = [(8, 3), (9, 2), (30, 0), (12, 9), (31, 1), (7, 12), (40, 0), (3, 2), (41, 12)]


class Detector(nn.Module):
    """Head on every level, layers on boxes and on masks."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, 8, 1)
        self.box = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 6))
        self.mask = nn.Conv2d(4, 8, 1)

    def forward(self, levels: list[Tensor], boxes: Tensor, masks: Tensor) -> None:
        for level in levels:
            self.head(level)
        self.box(boxes)
        self.mask(masks)


def step_of(number: int) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(number)
    boxes, masks = ROIS[number % len(ROIS)]

    def draw(*size: int) -> Tensor:
        return torch.randn(size, generator=generator)

    levels = [draw(2, 4, size, size) for size in LEVELS]
    return levels, draw(boxes, 12), draw(masks, 4, 3, 3)


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """Waits for the device, by the function of the package that waits."""
    found: Counter[str] = Counter()

    def counting(name: str) -> Any:
        real = getattr(Tensor, name)

        @wraps(real)
        def call(*arguments: Any, **options: Any) -> Any:
            caller = sys._getframe(1).f_code
            if caller.co_filename.startswith(PACKAGE):
                found[f"{Path(caller.co_filename).name}: {caller.co_name}: {name}"] += 1
            return real(*arguments, **options)

        return call

    for name in WAITING:
        monkeypatch.setattr(Tensor, name, counting(name))
    return found


def counters_on(device: bool) -> AbstractContextManager[object]:
    if device:
        return nullcontext()
    return mock.patch.object(DeviceCounters, "serve", return_value=False)


def run(steps: int, is_on_device: bool = True, **options: Any) -> fastcov.Tracker:
    torch.manual_seed(0)
    detector = Detector()
    with (
        counters_on(is_on_device),
        fastcov.track(detector, **options) as tracker,
        torch.no_grad(),
    ):
        for number in range(steps):
            detector(*step_of(number))
    return tracker


def assert_same(found: fastcov.Tracker, expected: fastcov.Tracker) -> None:
    assert found.names() == expected.names()
    for name in expected.names():
        assert found.count(name) == expected.count(name) > 0, name
        torch.testing.assert_close(
            found.covariance(name), expected.covariance(name), rtol=1e-5, atol=1e-5, msg=name
        )


OPTIONS: list[dict[str, Any]] = [
    {"rows": 0.3},
    {"rows": "all"},
    {"rows": 0.3, "decay": 0.9},
    {"rows": "all", "where": "input"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_other_numbers_of_rows_never_wait_for_the_device(
    waits: Counter[str], options: dict[str, Any]
) -> None:
    tracker = run(len(ROIS), **options)
    assert not waits
    buffers = [layer.on_device.buffer for layer in tracker.watcher.taps.unique_layers]
    assert any(buffer is not None for buffer in buffers)
    tracker.count(tracker.names()[0])
    assert waits  # they would have been seen
    assert_same(tracker, run(len(ROIS), is_on_device=False, **options))


def test_steps_that_are_no_larger_prepare_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Once the largest step has been seen: no memory, no table, no launch made anew."""
    torch.manual_seed(0)
    detector = Detector()
    grown, made = mock.Mock(), mock.Mock()
    with fastcov.track(detector, rows=0.3) as tracker, torch.no_grad():
        for number in range(2 * len(ROIS)):
            detector(*step_of(number))
        grow, of = DeviceBuffer.grow, Launch.of

        def noted_grow(*arguments: Any) -> None:
            grown()
            grow(*arguments)

        def noted_of(*arguments: Any, **options: Any) -> Launch:
            made()
            return of(*arguments, **options)

        monkeypatch.setattr(DeviceBuffer, "grow", noted_grow)
        monkeypatch.setattr(Launch, "of", noted_of)
        counters = tracker.watcher._counters
        assert counters is not None
        table = counters._table
        for number in range(len(ROIS)):
            detector(*step_of(number))
        assert tracker.watcher._counters is counters
        assert counters._table is table
    assert not grown.called
    assert not made.called


@pytest.mark.parametrize("decay", [None, 0.8])
def test_a_buffer_grows_within_a_step_and_loses_no_row(decay: float | None) -> None:
    """From one that waits for many steps to one that every step fills, with rows in it."""

    def track(is_on_device: bool) -> fastcov.Tracker:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 12))
        with (
            counters_on(is_on_device),
            fastcov.track(model, rows=0.5, decay=decay) as tracker,
            torch.no_grad(),
        ):
            for number, rows in enumerate((10, 10, 12, 18, 14, 60, 61, 10, 130, 20)):
                generator = torch.Generator().manual_seed(number)
                model(torch.randn(rows, 8, generator=generator))
        return tracker

    grown = track(is_on_device=True)
    (layer,) = grown.watcher.taps.unique_layers
    assert layer.on_device.buffer is not None
    assert layer.on_device.buffer.most_rows >= 66
    # Nothing was dropped: a captured graph could not tell.
    assert int(layer.on_device.buffer._cursor[6]) == 0
    assert_same(grown, track(is_on_device=False))


def test_more_rows_than_a_launch_adds_are_counted_by_the_host(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(buffering, "MOST_DEVICE_ROWS", 10)
    tracker = run(len(ROIS), rows=0.9)
    assert_same(tracker, run(len(ROIS), is_on_device=False, rows=0.9))
