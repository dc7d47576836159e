"""Axes that all figures share: scales, one name a line, values at the right, legends, pictures.

The only file that imports matplotlib, which the extra ``plot`` brings.
"""

import io
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fastcov.rows.policy import ENOUGH_ROWS_PER_CHANNEL
from fastcov.spectra.spectrum import Spectrum

try:
    from matplotlib import colormaps, pyplot
    from matplotlib.axes import Axes as Axes
    from matplotlib.colors import PowerNorm as PowerNorm
    from matplotlib.figure import Figure as Figure
    from matplotlib.ticker import MaxNLocator as MaxNLocator
except ImportError as error:
    raise ImportError(
        "figures need matplotlib, which is not installed: pip install matplotlib"
    ) from error

DARK = "#17618c"
LIGHT = "#d5e3ec"
SECOND = "#c8501e"
FEW = "#8c979d"
GREY = "#666666"
_ROW_INCHES = 0.17
_LEAST_RELATIVE = 1e-9  # of the largest eigenvalue; smaller ones are rounding


def shown_axes(width: float, height: float) -> Axes:
    """Axes of a new figure that pyplot holds, so that notebooks show it; sizes in inches."""
    return pyplot.figure(figsize=(width, height), layout="constrained").add_subplot()


def free_axes(lines: int) -> Axes:
    """Axes of a new figure that pyplot does not hold, high enough for some lines, one a layer."""
    return Figure(figsize=(7.2, line_height(lines)), layout="constrained").add_subplot()


def png(drawing: Figure | Axes) -> bytes:
    """PNG file of a figure, or of the figure of some axes, at 144 dots an inch."""
    picture = io.BytesIO()
    figure = drawing.get_figure() if isinstance(drawing, Axes) else drawing
    if not isinstance(figure, Figure):
        raise ValueError(f"a picture is made of a whole figure, got {type(figure).__name__}")
    figure.savefig(picture, format="png", dpi=144, facecolor="white")
    return picture.getvalue()


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
    """Ranks and values that a log axis can show."""
    shown = descending[descending > _LEAST_RELATIVE * descending[0]]
    return torch.arange(1, len(shown) + 1, device=shown.device), shown


def draw_relative(ax: Axes, spectrum: Spectrum, **style: Any) -> float:
    """Curve of a spectrum over its largest eigenvalue, none where that is zero.

    Returns the smallest value drawn; infinity where none is.
    """
    if not bool(spectrum.eigenvalues[0] > 0):
        return math.inf
    ranks, values = positive(spectrum.eigenvalues / spectrum.eigenvalues[0])
    ax.plot(ranks, values, **style)
    return values[-1].item()


def place_legend(ax: Axes, size: float, labels: Sequence[str] | None = None) -> None:
    """Legend of all labels or of some, where the fewest points are, and readable above them."""
    handles = dict(zip(*reversed(ax.get_legend_handles_labels()), strict=True))
    chosen = list(handles) if labels is None else labels
    ax.legend(
        [handles[label] for label in chosen],
        chosen,
        fontsize=size,
        loc="best",
        framealpha=0.85,
        edgecolor="none",
    )


def name_lines(ax: Axes, names: Sequence[str]) -> None:
    """Labels, one a line, in the largest type that fits the axes; every k-th where none fits."""
    points_a_line = 72 * ax.get_window_extent().height / ax.figure.dpi / len(names)
    every = max(1, math.ceil(6 / points_a_line))
    size = min(8.5, 0.75 * points_a_line * every)
    shown = range(0, len(names), every)
    ax.set_yticks(list(shown), [short(names[i], 48) for i in shown], fontsize=size)
    ax.tick_params(axis="y", length=0)


def annotate_right(ax: Axes, texts: Sequence[str]) -> None:
    """Texts right of the axes, one a named line."""
    size = ax.get_yticklabels()[0].get_fontsize()
    for place in map(round, ax.get_yticks()):
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


def say(ax: Axes, text: str, y: float = 0.5) -> None:
    """Sentence in the middle of the axes, or at another height from 0 to 1."""
    ax.text(0.5, y, text, transform=ax.transAxes, ha="center", fontsize=8, color=GREY)


def spread(count: int, most: int) -> list[int]:
    """Places among ``count``, at most so many, evenly spaced, the last among them.

    Example:
        >>> spread(8, 7)
        [1, 3, 5, 7]
    """
    stride = max(1, math.ceil(count / most))
    return list(range((count - 1) % stride, count, stride))


def short(name: str, most: int = 40) -> str:
    """End of a long name, which tells layers apart; a dollar sign would start mathematics."""
    kept = name if len(name) <= most else "…" + name[1 - most :]
    return kept.replace("$", r"\$")


def has_enough_rows(spectrum: Spectrum) -> bool:
    """True for a spectrum of at least 16 rows a channel."""
    return spectrum.count >= ENOUGH_ROWS_PER_CHANNEL * spectrum.channels


def curve_color(spectrum: Spectrum) -> str:
    """Dark colour, or grey where too few rows were read to tell."""
    return DARK if has_enough_rows(spectrum) else FEW


def color_row(count: int) -> list[tuple[float, ...]]:
    """Colours of so many curves, from dark to light."""
    return [colormaps["viridis"](0.9 * i / max(count - 1, 1)) for i in range(count)]
