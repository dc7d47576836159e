"""One progress bar for everything that takes longer than a few seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 10.0
"""Seconds between lines where there is no terminal to draw on."""


class Advance(Protocol):
    """Reports that ``steps`` more are done; ``note`` is shown beside the bar."""

    def __call__(self, steps: int = 1, note: str = "") -> None: ...


@contextmanager
def progress_bar(
    label: str, total: int, *, done: int = 0, enabled: bool = True
) -> Iterator[Advance]:
    """A bar on a terminal, plain lines otherwise, nothing when not enabled.

    Args:
        label: What is going on.
        total: Steps in all.
        done: Steps that an earlier process did.
        enabled: False: silent.
    """
    console = Console(file=sys.stderr)
    if not enabled:
        yield lambda steps=1, note="": None
    elif console.is_terminal:
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=console) as bars:
            task = bars.add_task(label, total=total, completed=done, note="")

            def advance_bar(steps: int = 1, note: str = "") -> None:
                bars.update(task, advance=steps, **({"note": note} if note else {}))

            yield advance_bar
    else:
        yield _PlainLines(label, total, done)


class _PlainLines:
    """One line every ten seconds and one at the end."""

    def __init__(self, label: str, total: int, done: int) -> None:
        self.label, self.total, self.done = label, total, done
        self.next_line_s = time.monotonic() + PLAIN_EVERY_S

    def __call__(self, steps: int = 1, note: str = "") -> None:
        self.done += steps
        if time.monotonic() < self.next_line_s and self.done < self.total:
            return
        self.next_line_s = time.monotonic() + PLAIN_EVERY_S
        print(
            f"{self.label}: {self.done}/{self.total} {note}".rstrip(), file=sys.stderr, flush=True
        )
