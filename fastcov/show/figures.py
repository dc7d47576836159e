"""Figures of small multiples: every layer in a cell of its own, on common scales."""

from collections.abc import Mapping, Sequence

from fastcov.show.axes import (
    SECOND,
    Axes,
    Figure,
    curve_color,
    draw_relative,
    log_axes,
    short,
)
from fastcov.show.axes import free_axes as free_axes
from fastcov.show.axes import png as png
from fastcov.show.plot import find_view, plot_ridges
from fastcov.spectra.compare import Comparison
from fastcov.spectra.history import History
from fastcov.spectra.spectrum import Spectrum


def spectra_grid(spectra: Mapping[str, Spectrum], threshold: float = 1e-3) -> Figure:
    """Small multiples: every layer's spectrum relative to its largest eigenvalue, on one scale.

    Grey curves are of fewer than 16 rows a channel.

    Args:
        spectra: Name to spectrum.
        threshold: Threshold of the dimension in each title, and of the dashed line.

    Returns:
        A figure that pyplot does not hold.
    """
    figure, cells = _grid(len(spectra), "rank of the eigenvalue", "eigenvalue / largest")
    widest = max(spectrum.channels for spectrum in spectra.values())
    for ax, (name, spectrum) in zip(cells, spectra.items(), strict=True):
        draw_relative(ax, spectrum, color=curve_color(spectrum), linewidth=1.3)
        ax.axhline(threshold, color=SECOND, linestyle="--", linewidth=0.7)
        dim = spectrum.dim(threshold)
        log_axes(ax, widest, threshold / 100, 2.0)
        ax.set_title(f"{short(name, 26)}\n{dim} of {spectrum.channels}", fontsize=7, pad=3)
    return figure


def most_changed(history: History, most: int = 6) -> list[str]:
    """Layers whose share of used directions changed most over a training, in the model's order.

    Args:
        history: History of one training.
        most: Largest number of layers.

    Returns:
        Names of layers with a positive eigenvalue in two snapshots or more.
    """
    layers, _, dims = history.dims()
    changes: dict[str, float] = {}
    for name, row, width in zip(layers, dims, history.channels().values(), strict=True):
        known = row[row > 0]  # a NaN is not
        if len(known) > 1:
            changes[name] = float(known.max() - known.min()) / width
    chosen = sorted(changes, key=lambda name: -changes[name])[:most]
    return [name for name in layers if name in chosen]


def ridges_grid(history: History, layers: Sequence[str]) -> Figure:
    """Ridge plots of layers, two a row; see :func:`fastcov.show.plot.plot_ridges`.

    Args:
        history: History of one training.
        layers: Names of layers, at least one.

    Returns:
        A figure that pyplot does not hold.
    """
    rows = -(-len(layers) // 2)
    height = 1.4 + 0.22 * max(min(len(history), 24), 8)
    figure = Figure(figsize=(10.4, rows * height), layout="constrained")
    for place, name in enumerate(layers):
        ax = plot_ridges(history, name, figure.add_subplot(rows, 2, place + 1))
        ax.set_title(short(name), fontsize=10)
    return figure


def comparison_grid(comparison: Comparison, view: str = "dims") -> Figure:
    """Small multiples: every common layer in both trainings.

    Args:
        comparison: Comparison of two histories.
        view: "dims" over steps, "spectra" at the end, or "distance" over the common steps.

    Returns:
        A figure that pyplot does not hold.

    Raises:
        ValueError: If there is no such view.
    """
    found = find_view(view)
    figure, cells = _grid(
        len(comparison.layers),
        found.x_label,
        found.y_label,
        shares_y=found.shares_y,
        has_legend=found.has_two_curves,
    )
    for ax, layer in zip(cells, comparison.layers, strict=True):
        found.draw(ax, layer, comparison)
        found.scale(ax, comparison.layers, comparison)
        ax.set(xlabel="", ylabel="")
        ax.set_title(short(layer.name, 26), fontsize=7, pad=3)
    if found.has_two_curves:
        handles, labels = cells[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper left", ncols=2, fontsize=8, frameon=False)
    return figure


def _grid(
    count: int, x_label: str, y_label: str, *, shares_y: bool = True, has_legend: bool = False
) -> tuple[Figure, list[Axes]]:
    """Cells in rows of six. Spaces are fixed in inches: an automatic layout takes half a minute."""
    columns = min(6, count)
    rows = -(-count // columns)
    above = 0.6 if has_legend else 0.35
    width, height = 1.75 * columns + 0.7, 1.45 * rows + 0.3 + above
    figure = Figure(figsize=(width, height))
    cells: list[Axes] = []
    for place in range(count):
        ax = figure.add_subplot(rows, columns, place + 1)
        is_left, is_bottom = place % columns == 0, place + columns >= count
        ax.tick_params(
            labelsize=6, labelleft=is_left or not shares_y, labelbottom=is_bottom, length=2
        )
        cells.append(ax)
    figure.subplots_adjust(
        left=0.65 / width,
        right=1 - 0.1 / width,
        bottom=0.5 / height,
        top=1 - above / height,
        wspace=0.12 if shares_y else 0.3,
        hspace=0.5,
    )
    figure.supxlabel(x_label, fontsize=9, y=0.05 / height)
    figure.supylabel(y_label, fontsize=9, x=0.05 / width)
    return figure, cells
