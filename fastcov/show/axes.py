"""What the figures share: scales, one name a line, values at the right, legends out of the way."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_ROW_INCHES = 0.17
_LEAST_RELATIVE = 1e-9


def line_height(lines: int) -> float:
    """Inches that a figure with so many layers, one a line, needs."""
    return 1.3 + _ROW_INCHES * max(lines, 6)


def log_axes(ax: Axes, channels: int, least: float, most: float) -> None:
    """Log scales from rank 1 to C, and over the eigenvalues that are shown."""
    ax.set_xscale("log")
    ax.set_yscale("log")
    ax.minorticks_off()
    ax.set_xlim(0.9, max(channels, 2) * 1.15)
    ax.set_ylim(max(least * 0.5, most * _LEAST_RELATIVE), most)
    # Ranks are whole numbers; a narrow layer has no two powers of ten among them.
    steps = (1, 2, 5) if channels < 50 else (1,)
    ranks = [step * 10**power for power in range(6) for step in steps]
    ranks = [rank for rank in ranks if rank <= max(channels, 2)]
    ax.set_xticks(ranks, [str(rank) for rank in ranks])


def positive(descending: Tensor) -> tuple[Tensor, Tensor]:
    """Ranks and values that a log axis can show; below 1e-9 of the largest is rounding."""
    shown = descending[descending > _LEAST_RELATIVE * descending[0]]
    return torch.arange(1, len(shown) + 1, device=shown.device), shown


def place_legend(
    ax: Axes, size: float, handles: Sequence[Any] | None = None, labels: Sequence[str] | None = None
) -> None:
    """A legend where the fewest points are, readable where it must cover some."""
    if handles is None or labels is None:
        handles, labels = ax.get_legend_handles_labels()
    ax.legend(handles, labels, fontsize=size, loc="best", framealpha=0.85, edgecolor="none")


def name_lines(ax: Axes, names: Sequence[str]) -> None:
    """One label a line, in the largest type that fits the axes; every k-th where none fits."""
    points_a_line = 72 * ax.get_window_extent().height / ax.figure.dpi / len(names)
    every = max(1, math.ceil(6 / points_a_line))
    size = min(8.5, 0.75 * points_a_line * every)
    shown = range(0, len(names), every)
    ax.set_yticks(list(shown), [short(names[i], 48) for i in shown], fontsize=size)
    ax.tick_params(axis="y", length=0)


def annotate_right(ax: Axes, texts: Sequence[str]) -> None:
    """One text a named line, right of the axes."""
    size = ax.get_yticklabels()[0].get_fontsize()
    shown = [round(place) for place in ax.get_yticks()]
    for place in shown:
        ax.annotate(
            texts[place],
            (1, place),
            xycoords=("axes fraction", "data"),
            xytext=(4, 0),
            textcoords="offset points",
            va="center",
            fontsize=size,
            annotation_clip=False,
        )


def spread(count: int, most: int) -> list[int]:
    """At most so many of ``count`` places, evenly spaced, the last among them.

    Example:
        >>> spread(8, 7)
        [1, 3, 5, 7]
    """
    stride = max(1, math.ceil(count / most))
    return list(range((count - 1) % stride, count, stride))


def short(name: str, most: int = 40) -> str:
    """The end of a long name tells layers apart; a dollar sign would start mathematics."""
    kept = name if len(name) <= most else "…" + name[1 - most :]
    return kept.replace("$", r"\$")
