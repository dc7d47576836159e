"""Figures of spectra: each function draws on the given axes and returns them.

Without ``ax`` a figure of fitting size is made with pyplot, so that notebooks show it. Names and
values stand outside the axes: a figure of several wants ``layout="constrained"``.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastcov.names import closest
from fastcov.rows.policy import ENOUGH_ROWS_PER_CHANNEL
from fastcov.show.axes import (
    DARK,
    FEW,
    GREY,
    LIGHT,
    SECOND,
    Axes,
    MaxNLocator,
    PowerNorm,
    annotate_right,
    color_row,
    curve_color,
    draw_relative,
    has_enough_rows,
    line_height,
    log_axes,
    name_lines,
    place_legend,
    positive,
    say,
    short,
    shown_axes,
    spread,
)
from fastcov.spectra.compare import Comparison, LayerComparison
from fastcov.spectra.history import History
from fastcov.spectra.spectrum import Spectrum

__all__ = [
    "DARK",
    "FEW",
    "plot_comparison",
    "plot_demand",
    "plot_dims",
    "plot_ridges",
    "plot_spectrum",
]

_MOST_LEGEND_LINES = 10
_SHARES = (0, 0.02, 0.1, 0.25, 0.5, 1)
_MOST_RIDGES = 24
_RIDGE_DECADES = 3  # shown below the threshold
_RIDGE_WIDTH = 0.1  # standard deviation of the smoothing, in decades
_RIDGE_OVERLAP = 2.5  # height of the highest ridge, in distances between ridges


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
        ax: Axes to draw into; None makes a figure.
        threshold: Relative height of the dashed line.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no spectrum to draw.
    """
    ax = shown_axes(5.6, 3.8) if ax is None else ax
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
        say(ax, "every eigenvalue is zero")
        return
    ranks, values = positive(spectrum.eigenvalues)
    lower, upper = (end[: len(ranks)] for end in spectrum.interval)
    if bool(upper.isfinite().all()):
        ax.fill_between(ranks, lower, upper, color=LIGHT, label="95 % (independent rows)")
    else:
        say(ax, f"{spectrum.count} rows bound no eigenvalue from above", y=0.06)
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
    least = threshold
    for color, (name, spectrum) in zip(color_row(len(drawn)), drawn.items(), strict=True):
        style = {"color": color, "linewidth": 1.3, "label": short(name)}
        least = min(least, draw_relative(ax, spectrum, **style))
    ax.axhline(threshold, color=GREY, linestyle="--", linewidth=1)
    ax.set_ylabel("eigenvalue / largest")
    log_axes(ax, max(s.channels for s in drawn.values()), least, 2.0)
    labels = [short(name) for name in drawn]
    if (count := len(labels)) > _MOST_LEGEND_LINES:
        last = _MOST_LEGEND_LINES - 1
        labels = [labels[round(i * (count - 1) / last)] for i in range(last + 1)]
        title = f"{count} layers, first (dark) to last; {_MOST_LEGEND_LINES} named"
        ax.set_title(title, fontsize=10)
    place_legend(ax, 7, labels)


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
        history: History of one training.
        ax: Axes to draw into; None makes a figure as high as the layers need.
        threshold: Threshold of the dimension, relative to the largest eigenvalue.

    Returns:
        The axes.

    Raises:
        ValueError: If the history has no spectrum.
    """
    layers, steps, dims = history.dims(threshold)
    if not layers:
        raise ValueError(f"{history!r} has no spectrum to draw; take a snapshot after some steps")
    widths = torch.tensor(list(history.channels().values()), dtype=torch.float64, device="cpu")
    ax = shown_axes(7.2, line_height(len(layers))) if ax is None else ax
    ax.set_facecolor("#c9c9c9")
    image = ax.imshow(
        (dims / widths[:, None]).numpy(),
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
        ax, [_of(_last_known(row), width) for row, width in zip(dims, widths.tolist(), strict=True)]
    )
    return ax


def plot_ridges(
    history: History,
    layer: str | None = None,
    ax: Axes | None = None,
    *,
    threshold: float = 1e-3,
) -> Axes:
    """Ridge plot of a layer's eigenspectrum over training: one ridge a snapshot, the last in front.

    A ridge is the density of the eigenvalues over the logarithm of their ratio to the largest; all
    ridges enclose the same area. Eigenvalues right of the dashed line count as dimensions: dark
    blue to yellow over the training, grey left of it. The dim and the width stand at the right. Of
    many snapshots, 24 at most are drawn, evenly spaced among them, the last one always.

    Args:
        history: History of one training.
        layer: Layer name; None takes the only one there is.
        ax: Axes to draw into; None makes a figure.
        threshold: Threshold of the dimension, relative to the largest eigenvalue, in (0, 1).

    Returns:
        The axes.

    Raises:
        ValueError: If ``layer`` is not in the history, or None while it has several; if the layer
            has no positive eigenvalue; or if ``threshold`` is not in (0, 1).
    """
    if not 0 < threshold < 1:
        raise ValueError(f"threshold must lie in (0, 1), got {threshold!r}; 1e-3 is usual")
    name = _layer_of(history, layer)
    drawn = [
        (snapshot.step, spectrum)
        for snapshot in history
        if (spectrum := snapshot.spectra.get(name)) is not None
        and bool(spectrum.eigenvalues[0] > 0)
    ]
    if not drawn:
        raise ValueError(f"layer {name!r} has no positive eigenvalue in any snapshot to draw")
    drawn = [drawn[place] for place in spread(len(drawn), _MOST_RIDGES)]
    ax = shown_axes(6.4, 1.6 + 0.22 * max(len(drawn), 8)) if ax is None else ax
    least = math.log10(threshold) - _RIDGE_DECADES
    decades = torch.linspace(least, 0.35, 600, dtype=torch.float64, device="cpu")
    densities = torch.stack([_density(spectrum, decades, least) for _, spectrum in drawn])
    heights = densities * (_RIDGE_OVERLAP / densities.max())
    ratios = (10**decades).numpy()
    counts = (10**decades >= threshold).numpy()
    for place, color in enumerate(color_row(len(drawn))):
        order: dict[str, Any] = {"zorder": 2 + place, "linewidth": 0}
        top = (heights[place] - place).numpy()
        ax.fill_between(ratios, top, -place, color="#dfe3e5", **order)
        ax.fill_between(ratios, top, -place, where=counts, color=color, **order)
        ax.plot(ratios, top, color="white", linewidth=1.1, zorder=2 + place)
    ax.axvline(threshold, color=SECOND, linestyle="--", linewidth=1, zorder=2 + len(drawn))
    ax.set_xscale("log")
    ax.minorticks_off()
    ax.set_xlim(ratios[0], ratios[-1])
    ax.set_ylim(0.15 - len(drawn), _RIDGE_OVERLAP + 0.1)
    ax.set_yticks([-float(n) for n in range(len(drawn))], [f"{step:,}" for step, _ in drawn])
    ax.tick_params(axis="y", length=0, labelsize=8)
    for place, (_, spectrum) in enumerate(drawn):
        ax.annotate(
            _of(spectrum.dim(threshold), spectrum.channels),
            (1, -place),
            xycoords=("axes fraction", "data"),
            xytext=(5, 0),
            textcoords="offset points",
            va="center",
            fontsize=8,
        )
    for side in ("left", "right", "top"):
        ax.spines[side].set_visible(False)
    ax.set_xlabel("eigenvalue / largest (smaller ones stand at the left end)")
    ax.set_ylabel("training step of the snapshot")
    ax.set_title(
        f"{short(name)}: eigenvalues over training\n"
        f"in colour: above {threshold:g} of the largest, their number at the right",
        fontsize=10,
    )
    return ax


def _layer_of(history: History, layer: str | None) -> str:
    """Name of a layer of the history; a ValueError names those there are."""
    names = history.layers()
    if not names:
        raise ValueError(f"{history!r} has no spectrum to draw; take a snapshot after some steps")
    if layer is None and len(names) == 1:
        return names[0]
    if layer not in names:
        if layer is None:
            raise ValueError(
                f"layer=None, and the history has {len(names)} layers: choose one, "
                f"such as {names[-1]!r}"
            )
        raise ValueError(
            f"no layer {layer!r} among the {len(names)} of the history{closest(layer, names)}"
        )
    return layer


def _density(spectrum: Spectrum, decades: Tensor, least: float) -> Tensor:
    """Smoothed share of the eigenvalues at each decade; smaller ones stand at the least."""
    ratios = (spectrum.eigenvalues / spectrum.eigenvalues[0]).cpu()
    places = ratios.clamp(min=10**least).log10()
    distances = (decades[:, None] - places) / _RIDGE_WIDTH
    return torch.exp(-0.5 * distances.square()).mean(1)


def plot_demand(
    spectra: Mapping[str, Spectrum],
    ax: Axes | None = None,
) -> Axes:
    """Bars of demand against width: degrees of freedom (lambda = 1e-3 of the largest) per channel.

    Grey bars are of fewer than 16 rows a channel: no more directions than rows can be seen.

    Args:
        spectra: Name to spectrum.
        ax: Axes to draw into; None makes a figure as high as the layers need.

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
    ax = shown_axes(7.2, line_height(len(widths))) if ax is None else ax
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
        title += (
            f"\ngrey: fewer than {ENOUGH_ROWS_PER_CHANNEL} rows a channel, the demand may be larger"
        )
    ax.set_title(title, fontsize=10)
    return ax


def plot_comparison(
    comparison: Comparison,
    ax: Axes | None = None,
    *,
    layer: str | None = None,
    view: str = "distance",
) -> Axes:
    """Two trainings: distance of every layer's spectra, or one layer in both.

    Args:
        comparison: Comparison of two histories.
        ax: Axes to draw into; None makes a figure.
        layer: None draws "distance" for all layers; a name is needed for the other views.
        view: "distance" at the end (bars) or, with a layer, over the common steps; "dims" over
            steps; "spectra" at the end.

    Returns:
        The axes.

    Raises:
        ValueError: If there is no such layer or view.
    """
    found = find_view(view)
    if layer is None:
        if found is not VIEWS["distance"]:
            raise ValueError(f"view={view!r} needs a layer: give layer=")
        return _draw_distances(comparison, ax)
    entries = {entry.name: entry for entry in comparison.layers}
    if layer not in entries:
        raise ValueError(f"no layer {layer!r} in both trainings; there are {', '.join(entries)}")
    ax = shown_axes(5.6, 3.8) if ax is None else ax
    found.draw(ax, entries[layer], comparison)
    found.scale(ax, [entries[layer]], comparison)
    ax.set_xlabel(found.x_label)
    ax.set_ylabel(found.y_label)
    ax.set_title(short(layer), fontsize=10)
    if found.has_two_curves:
        place_legend(ax, 8)
    return ax


def _draw_distances(comparison: Comparison, ax: Axes | None) -> Axes:
    count = len(comparison.layers)
    ax = shown_axes(7.2, line_height(count)) if ax is None else ax
    distances = [layer.distance for layer in comparison.layers]
    ax.barh(range(count), distances, color=DARK, height=0.75)
    ax.set_ylim(count - 0.4, -0.6)
    ax.set_xlim(0, max(0.05, *distances) * 1.05)
    name_lines(ax, [layer.name for layer in comparison.layers])
    annotate_right(ax, [f"{layer.dims_a[-1]} | {layer.dims_b[-1]}" for layer in comparison.layers])
    ax.set_xlabel("share of the variance that would have to change rank")
    ax.set_title("distance of the spectra; at the right the last dim, a | b", fontsize=10)
    return ax


class View(NamedTuple):
    """View of layers in two trainings: labels, a drawing of one layer, scales for several."""

    x_label: str
    y_label: str
    draw: Callable[[Axes, LayerComparison, Comparison], None]
    scale: Callable[[Axes, Sequence[LayerComparison], Comparison], None]
    has_two_curves: bool = True  # one a training, told apart by a legend
    shares_y: bool = True  # layers side by side have one vertical scale


def find_view(name: str) -> View:
    """View by its name; a ValueError names all where there is none."""
    if name not in VIEWS:
        raise ValueError(f"view={name!r}: choose one of {', '.join(map(repr, VIEWS))}")
    return VIEWS[name]


def _draw_spectra(ax: Axes, layer: LayerComparison, comparison: Comparison) -> None:
    ax.grid(True, color="#e4e4e4", linewidth=0.6)
    for style, end in _sides(comparison, layer.end_a, layer.end_b):
        draw_relative(ax, end, **style)
    ax.axhline(comparison.threshold, color=GREY, linestyle="--", linewidth=0.8)


def _scale_spectra(ax: Axes, layers: Sequence[LayerComparison], comparison: Comparison) -> None:
    widest = max(max(layer.end_a.channels, layer.end_b.channels) for layer in layers)
    log_axes(ax, widest, comparison.threshold / 100, 2.0)


def _draw_dims(ax: Axes, layer: LayerComparison, comparison: Comparison) -> None:
    ax.grid(True, color="#e4e4e4", linewidth=0.6)
    sides = _sides(comparison, (layer.steps_a, layer.dims_a), (layer.steps_b, layer.dims_b))
    for style, (steps, dims) in sides:
        ax.plot(steps, dims, marker=".", **style)
    ax.yaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_ylim(0, max(*layer.dims_a, *layer.dims_b, 1) * 1.08)


def _draw_distance(ax: Axes, layer: LayerComparison, _: Comparison) -> None:
    ax.grid(True, color="#e4e4e4", linewidth=0.6)
    ax.plot(layer.common_steps, layer.distances, color=DARK, marker=".", label="distance")


def _scale_distance(ax: Axes, layers: Sequence[LayerComparison], comparison: Comparison) -> None:
    _scale_steps(ax, layers, comparison)
    ax.set_ylim(0, 1.05 * max(0.05, *(max(layer.distances, default=0.0) for layer in layers)))


def _scale_steps(ax: Axes, layers: Sequence[LayerComparison], _: Comparison) -> None:
    steps = [step for layer in layers for step in (*layer.steps_a, *layer.steps_b)]
    margin = 0.04 * max(max(steps) - min(steps), 1)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    ax.set_xlim(min(steps) - margin, max(steps) + margin)


VIEWS = {
    "dims": View("training step", "dim (directions)", _draw_dims, _scale_steps, shares_y=False),
    "spectra": View(
        "rank of the eigenvalue", "eigenvalue / largest", _draw_spectra, _scale_spectra
    ),
    "distance": View(
        "training step",
        "distance of the spectra",
        _draw_distance,
        _scale_distance,
        has_two_curves=False,
    ),
}
"""Views of a comparison by their names."""


def _sides(comparison: Comparison, a: Any, b: Any) -> list[tuple[dict[str, Any], Any]]:
    """Line styles of both trainings; the second is dashed, so that equal curves show both."""
    labels = f"a: {short(comparison.label_a)}", f"b: {short(comparison.label_b)}"
    return [
        ({"color": DARK, "linewidth": 1.5, "label": labels[0]}, a),
        ({"color": SECOND, "linewidth": 1.3, "linestyle": (0, (3, 1.5)), "label": labels[1]}, b),
    ]


def _of(value: float, width: float, form: str = ".0f") -> str:
    return f"no row of {width:.0f}" if math.isnan(value) else f"{value:{form}} of {width:.0f}"


def _last_known(row: Tensor) -> float:
    known = row[~row.isnan()]
    return known[-1].item() if len(known) else math.nan
