"""Figures of spectra: each function draws on the given axes and returns them.

Without ``ax`` a figure of fitting size is made with pyplot, so that notebooks show it. Names and
values stand outside the axes: a figure of several wants ``layout="constrained"``.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastcov.show.axes import (
    annotate_right,
    line_height,
    log_axes,
    name_lines,
    place_legend,
    positive,
    short,
    spread,
)
from fastcov.spectra.compare import Comparison, LayerComparison
from fastcov.spectra.history import History
from fastcov.spectra.spectrum import Spectrum

try:
    from matplotlib import colormaps, pyplot
    from matplotlib.axes import Axes as Axes
    from matplotlib.colors import PowerNorm
    from matplotlib.figure import Figure as Figure
    from matplotlib.ticker import MaxNLocator
except ImportError as error:
    raise ImportError(
        "figures need matplotlib, which is not installed: pip install 'fastcov-torch[plot]'"
    ) from error

DARK = "#17618c"
LIGHT = "#d5e3ec"
SECOND = "#c8501e"
FEW = "#8c979d"
ENOUGH_ROWS = 16  # a channel
_GREY = "#666666"
_MOST_LEGEND_LINES = 10
_SHARES = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)


def plot_spectrum(
    spectrum: Spectrum | Mapping[str, Spectrum],
    ax: Axes | None = None,
    *,
    threshold: float = 1e-3,
) -> Axes:
    """Eigenvalues against rank, both on log scales.

    One spectrum is drawn with its 95 % band (see ``Spectrum.interval``) and the line above which
    eigenvalues count as a dimension; several are drawn relative to their largest eigenvalue.

    Args:
        spectrum: One spectrum, or name to spectrum.
        ax: Where to draw; None makes a figure.
        threshold: Relative height of the dashed line.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no spectrum to draw.
    """
    ax = _new_axes(5.6, 3.8) if ax is None else ax
    if isinstance(spectrum, Spectrum):
        _draw_one(ax, spectrum, threshold)
    else:
        _draw_many(ax, spectrum, threshold)
    ax.set_xlabel("rank of the eigenvalue")
    ax.grid(True, which="major", color="#e4e4e4", linewidth=0.6)
    ax.set_axisbelow(True)
    return ax


def _draw_one(ax: Axes, spectrum: Spectrum, threshold: float) -> None:
    largest = float(spectrum.eigenvalues[0])
    ax.set_title(
        f"{short(spectrum.name or 'spectrum')}: dim {spectrum.dim(threshold)} of "
        f"{spectrum.channels}",
        fontsize=10,
    )
    ax.set_ylabel("eigenvalue (units of the feature, squared)")
    if largest == 0:
        _say(ax, "every eigenvalue is zero")
        return
    ranks, values = positive(spectrum.eigenvalues)
    lower, upper = (end[: len(ranks)] for end in spectrum.interval)
    if bool(upper.isfinite().all()):
        ax.fill_between(ranks, lower, upper, color=LIGHT, label="95 % (independent rows)")
    else:
        _say(ax, f"{spectrum.count} rows bound no eigenvalue from above", y=0.06)
    ax.plot(ranks, values, color=DARK, marker="." if len(ranks) < 40 else None, label="eigenvalue")
    ax.axhline(
        threshold * largest,
        color=SECOND,
        linestyle="--",
        linewidth=1,
        label=f"{threshold:g} of the largest",
    )
    log_axes(ax, spectrum.channels, min(values[-1].item(), threshold * largest), largest * 2)
    place_legend(ax, 8)


def _draw_many(ax: Axes, spectra: Mapping[str, Spectrum], threshold: float) -> None:
    drawn = {name: s for name, s in spectra.items() if bool(s.eigenvalues[0] > 0)}
    if not drawn:
        raise ValueError(f"none of the {len(spectra)} spectra has a positive eigenvalue to draw")
    colors = _colors(len(drawn))
    least = threshold
    for color, (name, spectrum) in zip(colors, drawn.items(), strict=True):
        ranks, values = positive(spectrum.eigenvalues / spectrum.eigenvalues[0])
        least = min(least, values[-1].item())
        ax.plot(ranks, values, color=color, linewidth=1.3, label=short(name))
    ax.axhline(threshold, color=_GREY, linestyle="--", linewidth=1)
    ax.set_ylabel("eigenvalue / largest")
    log_axes(ax, max(s.channels for s in drawn.values()), least, 2.0)
    handles, labels = ax.get_legend_handles_labels()
    if len(drawn) > _MOST_LEGEND_LINES:
        chosen = [
            round(i * (len(drawn) - 1) / (_MOST_LEGEND_LINES - 1))
            for i in range(_MOST_LEGEND_LINES)
        ]
        handles, labels = [handles[i] for i in chosen], [labels[i] for i in chosen]
        ax.set_title(
            f"{len(drawn)} layers, first (dark) to last; {_MOST_LEGEND_LINES} named", fontsize=10
        )
    place_legend(ax, 7, handles, labels)


def plot_dims(
    history: History,
    ax: Axes | None = None,
    *,
    threshold: float = 1e-3,
) -> Axes:
    """Heat map of intrinsic dimension over training: one line a layer, one column a snapshot.

    Colour is the share of the width that is used, dim / channels, on a square-root scale: it tells
    small shares apart. The last dim and the width stand at the right. Grey: no row had been read.

    Args:
        history: Of one training.
        ax: Where to draw; None makes a figure as high as the layers need.
        threshold: Of the dimension, relative to the largest eigenvalue.

    Returns:
        The axes.

    Raises:
        ValueError: If the history has no spectrum.
    """
    layers, steps, dims = history.dims(threshold)
    if not layers:
        raise ValueError(f"{history!r} has no spectrum to draw; take a snapshot after some steps")
    widths = _widths(history)
    width_of = torch.tensor([widths[name] for name in layers], dtype=torch.float64, device="cpu")
    ax = _new_axes(7.2, line_height(len(layers))) if ax is None else ax
    ax.set_facecolor("#c9c9c9")
    image = ax.imshow(
        (dims / width_of[:, None]).numpy(),
        aspect="auto",
        interpolation="nearest",
        cmap="viridis",
        norm=PowerNorm(0.5, 0, 1),
    )
    ticks = spread(len(steps), 7)
    ax.set_xticks(ticks, [f"{steps[i]:,}" for i in ticks])
    ax.set_xlabel("training step of the snapshot")
    ax.set_title(
        f"directions used: dim (eigenvalues > {threshold:g} of the largest) / width", fontsize=10
    )
    # Only a layout engine moves the bar clear of the axis; without one it needs room of its own.
    free = ax.figure.get_layout_engine() is None
    bar = ax.figure.colorbar(
        image, ax=ax, location="bottom", aspect=50, fraction=0.04, pad=0.2 if free else 0.01
    )
    bar.set_ticks(_SHARES, labels=[f"{share:.0%}".replace("%", " %") for share in _SHARES])
    bar.set_label("dim / width", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    # The bar takes its room from the axes: only now is it known how large a name may be.
    name_lines(ax, layers)
    annotate_right(
        ax,
        [_of(_last_known(row), width) for row, width in zip(dims, width_of.tolist(), strict=True)],
    )
    return ax


def plot_demand(
    spectra: Mapping[str, Spectrum],
    ax: Axes | None = None,
) -> Axes:
    """Bars of demand against width: degrees of freedom (lambda = 1e-3 of the largest) per channel.

    Grey bars are of fewer than 16 rows a channel: no more directions than rows can be seen.

    Args:
        spectra: Name to spectrum.
        ax: Where to draw; None makes a figure as high as the layers need.

    Returns:
        The axes.

    Raises:
        ValueError: If ``spectra`` is empty.
    """
    if not spectra:
        raise ValueError("no spectrum to draw; every layer is without rows")
    demands = [spectrum.dof() for spectrum in spectra.values()]
    widths = [spectrum.channels for spectrum in spectra.values()]
    places = range(len(widths))
    ax = _new_axes(7.2, line_height(len(widths))) if ax is None else ax
    ax.barh(places, [1.0] * len(widths), color=LIGHT, height=0.75)
    shares = [demand / width for demand, width in zip(demands, widths, strict=True)]
    ax.barh(places, shares, color=[curve_color(s) for s in spectra.values()], height=0.75)
    ax.set_ylim(len(widths) - 0.4, -0.6)
    ax.set_xlim(0, 1)
    ax.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"])
    ax.set_xlabel("share of the width")
    name_lines(ax, list(spectra))
    annotate_right(ax, [_of(d, w, ".1f") for d, w in zip(demands, widths, strict=True)])
    title = "demand (degrees of freedom, dark) against width (light)"
    if not all(map(has_enough_rows, spectra.values())):
        title += f"\ngrey: fewer than {ENOUGH_ROWS} rows a channel, the demand may be larger"
    ax.set_title(title, fontsize=10)
    return ax


def plot_comparison(
    comparison: Comparison,
    ax: Axes | None = None,
    *,
    layer: str | None = None,
    what: str = "distance",
) -> Axes:
    """Two trainings: distance of every layer's spectra, or one layer in both.

    Args:
        comparison: Of two histories.
        ax: Where to draw; None makes a figure.
        layer: None draws "distance" for all layers; a name is needed for the others.
        what: "distance" at the end (bars) or, with a layer, over the common steps; "dims" over
            steps; "spectra" at the end.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no such layer or kind of figure.
    """
    if what not in ("distance", "dims", "spectra"):
        raise ValueError(f'what={what!r}: choose "distance", "dims" or "spectra"')
    if layer is None:
        if what != "distance":
            raise ValueError(f"what={what!r} needs a layer: give layer=")
        return _draw_distances(comparison, ax)
    found = {entry.name: entry for entry in comparison.layers}
    if layer not in found:
        raise ValueError(f"no layer {layer!r} in both trainings; there are {', '.join(found)}")
    ax = _new_axes(5.6, 3.8) if ax is None else ax
    draw_layer(ax, found[layer], comparison, what)
    ax.set_title(short(layer), fontsize=10)
    if what != "distance":
        place_legend(ax, 8)
    return ax


def _draw_distances(comparison: Comparison, ax: Axes | None) -> Axes:
    count = len(comparison.layers)
    ax = _new_axes(7.2, line_height(count)) if ax is None else ax
    distances = [layer.distance for layer in comparison.layers]
    ax.barh(range(count), distances, color=DARK, height=0.75)
    ax.set_ylim(count - 0.4, -0.6)
    ax.set_xlim(0, max(0.05, *distances) * 1.05)
    name_lines(ax, [layer.name for layer in comparison.layers])
    annotate_right(ax, [f"{layer.dims_a[-1]} | {layer.dims_b[-1]}" for layer in comparison.layers])
    ax.set_xlabel("share of the variance that would have to change rank")
    ax.set_title("distance of the spectra; at the right the last dim, a | b", fontsize=10)
    return ax


def draw_layer(ax: Axes, layer: LayerComparison, comparison: Comparison, what: str) -> None:
    """Draws one layer of two trainings; ``what`` as in :func:`plot_comparison`."""
    ax.grid(True, color="#e4e4e4", linewidth=0.6)
    if what == "spectra":
        least = comparison.threshold
        for style, end in _sides(comparison, layer.end_a, layer.end_b):
            if bool(end.eigenvalues[0] > 0):
                ranks, values = positive(end.eigenvalues / end.eigenvalues[0])
                least = min(least, values[-1].item())
                ax.plot(ranks, values, **style)
        ax.axhline(comparison.threshold, color=_GREY, linestyle="--", linewidth=0.8)
        log_axes(ax, max(layer.end_a.channels, layer.end_b.channels), least, 2.0)
        ax.set_xlabel("rank of the eigenvalue")
        ax.set_ylabel("eigenvalue / largest")
        return
    ax.set_xlabel("training step")
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if what == "distance":
        ax.plot(layer.common_steps, layer.distances, color=DARK, marker=".", label="distance")
        ax.set_ylabel("distance of the spectra")
        ax.set_ylim(0, None)
        return
    sides = _sides(comparison, (layer.steps_a, layer.dims_a), (layer.steps_b, layer.dims_b))
    for style, (steps, dims) in sides:
        ax.plot(steps, dims, marker=".", **style)
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_ylabel("dim (directions)")
    ax.set_ylim(0, max(*layer.dims_a, *layer.dims_b, 1) * 1.08)


def has_enough_rows(spectrum: Spectrum) -> bool:
    """Whether a spectrum is of at least 16 rows a channel."""
    return spectrum.count >= ENOUGH_ROWS * spectrum.channels


def curve_color(spectrum: Spectrum) -> str:
    """Dark, or grey where too few rows were read to tell."""
    return DARK if has_enough_rows(spectrum) else FEW


def _new_axes(width: float, height: float) -> Axes:
    return pyplot.figure(figsize=(width, height), layout="constrained").add_subplot()


def _of(value: float, width: float, form: str = ".0f") -> str:
    return f"no row of {width:.0f}" if math.isnan(value) else f"{value:{form}} of {width:.0f}"


def _last_known(row: Tensor) -> float:
    known = row[~row.isnan()]
    return known[-1].item() if len(known) else math.nan


def _widths(history: History) -> dict[str, int]:
    """Width of every layer: from the last snapshot that has it."""
    missing = set(history.layers())
    widths: dict[str, int] = {}
    for index in range(len(history) - 1, -1, -1):
        if not missing:
            break
        for name, spectrum in history[index].spectra.items():
            if name in missing:
                widths[name] = spectrum.channels
                missing.discard(name)
    return widths


def _sides(comparison: Comparison, a: Any, b: Any) -> list[tuple[dict[str, Any], Any]]:
    """Line styles of both trainings; the second is dashed, so that equal curves show both."""
    labels = f"a: {short(comparison.label_a)}", f"b: {short(comparison.label_b)}"
    return [
        ({"color": DARK, "linewidth": 1.5, "label": labels[0]}, a),
        ({"color": SECOND, "linewidth": 1.3, "linestyle": (0, (3, 1.5)), "label": labels[1]}, b),
    ]


def _colors(count: int) -> list[Any]:
    return [colormaps["viridis"](0.9 * i / max(count - 1, 1)) for i in range(count)]


def _say(ax: Axes, text: str, y: float = 0.5) -> None:
    ax.text(0.5, y, text, transform=ax.transAxes, ha="center", fontsize=8, color=_GREY)
