"""Display of progress: bars on a terminal, lines of text elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

PLAIN_EVERY_S = 10.0
"""Seconds between lines where there is no terminal to draw on."""


class Advance(Protocol):
    """Function that reports further finished steps, with a note beside the bar."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


class Bar(Protocol):
    """Function that reports the number of finished steps; ``is_done`` with the last report."""

    def __call__(self, done: int, note: str = "", *, is_done: bool = False) -> None: ...


class Display(Protocol):
    """Function that adds a bar; its note is shown at once."""

    def __call__(self, label: str, total: int, done: int = 0, note: str = "") -> Bar: ...


@contextmanager
def display(enabled: bool = True) -> Iterator[Display]:
    """Context with a display: bars on a terminal, plain lines elsewhere, nothing if not enabled."""
    console = Console(file=sys.stderr)
    if enabled and not console.is_terminal:
        yield _lines
        return
    texts = TextColumn("{task.description}"), TextColumn("{task.fields[note]}")
    columns = texts[0], BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(), texts[1]
    with Progress(*columns, console=console, disable=not enabled) as bars:

        def add(label: str, total: int, done: int = 0, note: str = "") -> Bar:
            task = bars.add_task(label, total=total, completed=done, note=note)

            def show(done: int, note: str = "", *, is_done: bool = False) -> None:
                bars.update(task, completed=done, **({"note": note} if note else {}))

            return show

        yield add


@contextmanager
def progress_bar(
    label: str, total: int, *, done: int = 0, enabled: bool = True
) -> Iterator[Advance]:
    """Context with one bar of ``total`` steps, of which an earlier process did ``done``."""
    with display(enabled) as show:
        bar = show(label, total, done)
        reached = done

        def advance(steps: int = 1, note: str = "") -> None:
            nonlocal reached
            reached += steps
            bar(reached, note, is_done=reached >= total)

        yield advance


def _lines(label: str, total: int, done: int = 0, note: str = "") -> Bar:
    """Line of text every ten seconds, one at the end, and one at once where there is a note."""
    next_s = time.monotonic() + PLAIN_EVERY_S

    def show(done: int, note: str = "", *, is_done: bool = False) -> None:
        nonlocal next_s
        if time.monotonic() < next_s and not is_done:
            return
        next_s = time.monotonic() + PLAIN_EVERY_S
        print(f"{label}: {done}/{total} {note}".rstrip(), file=sys.stderr, flush=True)

    if note:
        print(f"{label}: {done}/{total} {note}", file=sys.stderr, flush=True)
    return show
