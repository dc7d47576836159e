"""Defaults of a benchmark of updates that come once in many steps."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

import fastcov
from fastcov.bench import updates
from fastcov.bench.contest import Row, Setting
from fastcov.bench.updates import Updates

UNTRACKED = Row("step", "untracked", 40, 1.9, 2.0, 2.1, 1.9, 2.1, "untracked", 1.0, 1.0, 1.0)
OURS = replace(UNTRACKED, contender="fastcov, default", p50_s=2.1, ratio=1.05, ratio_high=1.1)


def tracked(rows: float | str) -> tuple[nn.Module, fastcov.Tracker]:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 16))
    tracker = fastcov.track(model, rows=rows)
    for _ in range(3):
        model(torch.randn(16, 4))
    return model, tracker


def test_each_step_bears_its_share(monkeypatch: pytest.MonkeyPatch) -> None:
    _, tracker = tracked(1 / 64)  # a quarter of a row a step: buffers of 16 and 32 rows
    monkeypatch.setattr(
        updates, "update_seconds", lambda widths, *_: {width: width / 8 for width in widths}
    )
    row = replace(OURS, notes={})
    Updates(tracker).add_to(row, UNTRACKED, torch.float32, Setting(torch.device("cpu"), "tiny"))
    share_s = 1.0 / 64 + 2.0 / 128
    assert row.notes["steps_between_updates"] == 64
    assert row.notes["updates_s"] == pytest.approx(share_s)
    assert row.notes["ratio_without_updates"] == 1.05
    assert row.p50_s == pytest.approx(2.1 + share_s)
    assert row.ratio == pytest.approx(1.05 + share_s / 2)
    assert row.ratio_high == pytest.approx(1.1 + share_s / 2)


def test_every_row_of_few_bears_its_share_too(monkeypatch: pytest.MonkeyPatch) -> None:
    model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 64))
    tracker = fastcov.track(model, rows="all")
    for _ in range(3):
        model(torch.randn(4, 4))  # half of 8 channels: added at once; 64 wait for 32 steps
    monkeypatch.setattr(updates, "update_seconds", lambda widths, *_: dict.fromkeys(widths, 0.32))
    row = replace(OURS, notes={})
    Updates(tracker).add_to(row, UNTRACKED, torch.float32, Setting(torch.device("cpu"), "tiny"))
    assert row.notes["steps_between_updates"] == 32
    assert row.notes["updates_s"] == pytest.approx(0.01)


def test_no_update_falls_into_a_timed_step(monkeypatch: pytest.MonkeyPatch) -> None:
    model, tracker = tracked(1 / 64)
    held = Updates(tracker)
    in_time = []
    for reader in tracker.watcher.taps.unique_layers:
        flush = reader._flush_full
        monkeypatch.setattr(
            reader, "_flush_full", lambda flush=flush: (in_time.append(is_timed), flush())
        )
    for _ in range(300):
        is_timed = False
        held.hold_back()
        is_timed = True
        model(torch.randn(16, 4))
    assert in_time
    assert not any(in_time)
    is_timed = False
    assert tracker.count("0") == tracker.count("1") == 303 // 4


@pytest.mark.parametrize("rows", ["all", 0.5])
def test_updates_of_nearly_every_step_stay_in_it(rows: float | str) -> None:
    _, tracker = tracked(rows)
    row = replace(OURS, notes={})
    Updates(tracker).add_to(row, UNTRACKED, torch.float32, Setting(torch.device("cpu"), "tiny"))
    assert row == replace(OURS, notes={})
