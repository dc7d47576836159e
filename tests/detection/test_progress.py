from __future__ import annotations

import io

import pytest

from fastcov_detection import progress
from fastcov_detection.progress import progress_bar


def test_plain_lines_where_there_is_no_terminal(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress_bar("training", 30, done=10) as advance:
        for step in range(20):
            now[0] += 2.0
            advance(1, note=f"loss {step}")
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 15/30 loss 4",
        "training: 20/30 loss 9",
        "training: 25/30 loss 14",
        "training: 30/30 loss 19",
    ]


def test_silence_on_demand(capsys: pytest.CaptureFixture[str]) -> None:
    with progress_bar("training", 2, enabled=False) as advance:
        advance()
        advance(1, note="loss 1")
    captured = capsys.readouterr()
    assert captured.err == captured.out == ""


def test_a_bar_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    screen = io.StringIO()
    screen.isatty = lambda: True
    monkeypatch.setattr(progress.sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    with progress_bar("training", 3, done=1) as advance:
        advance(1)
        advance(1, note="loss 0.5")
    assert "training" in screen.getvalue()
    assert "3/3" in screen.getvalue()
    assert "loss 0.5" in screen.getvalue()
