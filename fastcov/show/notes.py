"""What the summary says about a layer beside its numbers, and about one that has none."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastcov.rows.sequence import ENOUGH_ROWS_PER_CHANNEL
from fastcov.stats.reader import Reader
from fastcov.watch.select import Tap

if TYPE_CHECKING:
    from fastcov.tracker import Tracker


def note_of(tracker: Tracker, tap: Tap, reader: Reader, count: int, skipped: int) -> str:
    """What a reader of the summary must know about a layer; empty where all is well."""
    notes = []
    if skipped:
        notes.append(f"{skipped} rows with NaN or inf skipped")
    if tap.name in tracker.notes:
        notes.append(tracker.notes[tap.name])
    if count == 0:
        if tap.name not in tracker.notes:
            notes.append(why_empty(tracker, reader))
        return "; ".join(notes)
    if reader.calls == 0 and any(each.calls for each in tracker.unique_readers()):
        notes.append("its module did not run in the last step: replaced since, or optional")
    if reader.state is not None:
        wanted = ENOUGH_ROWS_PER_CHANNEL * reader.state.channels
        if (most := most_independent_rows(tracker.decay, tracker.steps_read, count)) < wanted:
            notes.append(
                f"decay={tracker.decay} is worth {most} rows, fewer than 16 a channel: raise rows "
                "or decay"
            )
        elif count < wanted:
            steps = -(-(wanted - count) * max(1, tracker.steps) // count)
            notes.append(f"about {steps} more steps until 16 rows a channel")
    return "; ".join(notes)


def why_empty(tracker: Tracker, reader: Reader) -> str:
    """Why a layer has seen no row."""
    if reader.name in tracker.notes:
        return tracker.notes[reader.name]
    if tracker.steps == 0:
        mode = "training-mode " if tracker.train_only else ""
        why = tracker.step.not_counted
        hint = f" ({why}; track the module that is called)" if why else ""
        return f"no {mode}forward of the whole model has run{hint}"
    if not any(each.total_calls for each in tracker.unique_readers()):
        return (
            "steps were made, but no hook ran: the model was compiled before it was tracked; "
            "call track() before the first compiled forward, or torch.compiler.reset()"
        )
    if reader.total_calls == 0:
        return (
            "its module was not called (its parent may use its weights itself), or gave no "
            "floating-point tensor with a row"
        )
    if reader.state is not None and int(reader.state.count[1]):
        return "every row held a NaN or an infinity"
    return "the sampling has not reached it yet"


def most_independent_rows(decay: float | None, steps_read: int, count: int) -> float:
    """Rows that the decay's window is worth, however long it is read; infinite without decay."""
    # With decay d a step weighs d times the next: about (1 + d) / (1 - d) steps count.
    if decay is None or decay == 1.0:
        return math.inf
    return round(count / steps_read * (1 + decay) / (1 - decay))
