"""Figures that only a report shows: small multiples of every layer, as pictures in memory."""

import io
from collections.abc import Mapping

from fastcov.show.axes import line_height, log_axes, positive, short
from fastcov.show.plot import SECOND, Axes, Figure, curve_color, draw_layer
from fastcov.spectra.compare import Comparison
from fastcov.spectra.spectrum import Spectrum


def spectra_grid(spectra: Mapping[str, Spectrum], threshold: float = 1e-3) -> Figure:
    """Small multiples: every layer's spectrum relative to its largest eigenvalue, on one scale.

    Grey curves are of fewer than 16 rows a channel.

    Args:
        spectra: Name to spectrum.
        threshold: Of the dimension in each title, and of the dashed line.

    Returns:
        A figure that pyplot does not hold.
    """
    figure, cells = _grid(len(spectra), "rank of the eigenvalue", "eigenvalue / largest")
    widest = max(spectrum.channels for spectrum in spectra.values())
    for ax, (name, spectrum) in zip(cells, spectra.items(), strict=True):
        if bool(spectrum.eigenvalues[0] > 0):
            ranks, values = positive(spectrum.eigenvalues / spectrum.eigenvalues[0])
            ax.plot(ranks, values, color=curve_color(spectrum), linewidth=1.3)
        ax.axhline(threshold, color=SECOND, linestyle="--", linewidth=0.7)
        dim = spectrum.dim(threshold)
        log_axes(ax, widest, threshold / 100, 2.0)
        ax.set_title(f"{short(name, 26)}\n{dim} of {spectrum.channels}", fontsize=7, pad=3)
    return figure


def comparison_grid(comparison: Comparison, what: str = "dims") -> Figure:
    """Small multiples: every common layer in both trainings.

    Args:
        comparison: Of two histories.
        what: "dims" over steps, "spectra" at the end, or "distance" over the common steps.

    Returns:
        A figure that pyplot does not hold.
    """
    x, y = {
        "dims": ("training step", "dim (directions)"),
        "spectra": ("rank of the eigenvalue", "eigenvalue / largest"),
        "distance": ("training step", "distance of the spectra"),
    }[what]
    figure, cells = _grid(
        len(comparison.layers), x, y, shares_y=what != "dims", has_legend=what != "distance"
    )
    widest = max(max(e.end_a.channels, e.end_b.channels) for e in comparison.layers)
    farthest = max(0.05, *(max(e.distances, default=0.0) for e in comparison.layers))
    steps = [step for e in comparison.layers for step in (*e.steps_a, *e.steps_b)]
    margin = 0.04 * max(max(steps) - min(steps), 1)
    for ax, layer in zip(cells, comparison.layers, strict=True):
        draw_layer(ax, layer, comparison, what)
        if what == "spectra":
            log_axes(ax, widest, comparison.threshold / 100, 2.0)
        else:
            ax.set_xlim(min(steps) - margin, max(steps) + margin)
        if what == "distance":
            ax.set_ylim(0, 1.05 * farthest)
        ax.set(xlabel="", ylabel="")
        ax.set_title(short(layer.name, 26), fontsize=7, pad=3)
    if what != "distance":
        handles, labels = cells[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="upper left", ncols=2, fontsize=8, frameon=False)
    return figure


def free_axes(lines: int) -> Axes:
    """Axes high enough for so many layers, on a figure that pyplot does not hold.

    Args:
        lines: Layers, one a line.

    Returns:
        The axes of a new figure.
    """
    return Figure(figsize=(7.2, line_height(lines)), layout="constrained").add_subplot()


def png(drawing: Figure | Axes) -> bytes:
    """Picture of a figure, at 144 dots an inch.

    Args:
        drawing: A figure, or the axes of one.

    Returns:
        A PNG file.
    """
    picture = io.BytesIO()
    figure = drawing.get_figure() if isinstance(drawing, Axes) else drawing
    if not isinstance(figure, Figure):
        raise ValueError(f"a picture is made of a whole figure, got {type(figure).__name__}")
    figure.savefig(picture, format="png", dpi=144, facecolor="white")
    return picture.getvalue()


def _grid(
    count: int, x: str, y: str, *, shares_y: bool = True, has_legend: bool = False
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
    figure.supxlabel(x, fontsize=9, y=0.05 / height)
    figure.supylabel(y, fontsize=9, x=0.05 / width)
    return figure, cells
