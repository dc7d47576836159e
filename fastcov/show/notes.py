"""What the summary says about a layer beside its numbers, and about one that has none."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from fastcov.rows.policy import ENOUGH_ROWS_PER_CHANNEL

if TYPE_CHECKING:
    from fastcov.stats.layer import Layer
    from fastcov.watch.select import Tap
    from fastcov.watch.watcher import Watcher


def note_of(watcher: Watcher, tap: Tap, layer: Layer, count: int, skipped: int) -> str:
    """What a reader of the summary must know about a layer; empty where all is well."""
    notes = []
    if skipped:
        notes.append(f"{skipped} rows with NaN or inf skipped")
    if tap.name in watcher.notes:
        notes.append(watcher.notes[tap.name])
    if count == 0:
        if tap.name not in watcher.notes:
            notes.append(why_empty(watcher, layer))
        return "; ".join(notes)
    if layer.calls == 0 and any(each.calls for each in watcher.unique_layers()):
        notes.append("its module did not run in the last step: replaced since, or optional")
    if layer.state is not None:
        wanted = ENOUGH_ROWS_PER_CHANNEL * layer.state.channels
        if (most := most_independent_rows(watcher.decay, watcher.steps_read, count)) < wanted:
            notes.append(
                f"decay={watcher.decay} is worth {most} rows, fewer than 16 a channel: raise rows "
                "or decay"
            )
        elif count < wanted:
            steps = -(-(wanted - count) * max(1, watcher.step) // count)
            notes.append(f"about {steps} more steps until 16 rows a channel")
    return "; ".join(notes)


def why_empty(watcher: Watcher, layer: Layer) -> str:
    """Why a layer has seen no row."""
    if layer.name in watcher.notes:
        return watcher.notes[layer.name]
    if watcher.step == 0:
        mode = "training-mode " if watcher.train_only else ""
        why = watcher.steps.not_counted
        hint = f" ({why}; track the module that is called)" if why else ""
        return f"no {mode}forward of the whole model has run{hint}"
    if not any(each.total_calls for each in watcher.unique_layers()):
        return (
            "steps were made, but no hook ran: the model was compiled before it was tracked; "
            "call track() before the first compiled forward, or torch.compiler.reset()"
        )
    if layer.total_calls == 0:
        return (
            "its module was not called (its parent may use its weights itself), or gave no "
            "floating-point tensor with a row"
        )
    if layer.state is not None and int(layer.state.count[1]):
        return "every row held a NaN or an infinity"
    return "the sampling has not reached it yet"


def most_independent_rows(decay: float | None, steps_read: int, count: int) -> float:
    """Rows that the decay's window is worth, however long it is read; infinite without decay."""
    # With decay d a step weighs d times the next: about (1 + d) / (1 - d) steps count.
    if decay is None or decay == 1.0:
        return math.inf
    return round(count / steps_read * (1 + decay) / (1 - decay))
