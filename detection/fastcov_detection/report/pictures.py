"""Figures of a search. Each function draws one of a width in inches, which pyplot does not hold."""

from __future__ import annotations

import textwrap
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastcov import Spectrum, WidthGroup
from fastcov_detection.report.page import FONT, WIDE
from fastcov_detection.search.arms import BASELINE, SEARCHED, Baseline, Searched, find_arm

_FURTHER = ("#a3416b", "#2f8f8f", "#70563f", "#6b6b6b")
_GRID = "#e4e4e4"
_LEAST_AP, _LEAST_SHARE = 0.1, 0.2
_LEAST_RELATIVE = 1e-7
_TRAINED, _BEFORE = "#1f78b4", "#e07b39"
_COLUMN = 2.7  # inches of a panel, or of an entry of a legend
_LETTERS = 13  # of a text, an inch
_LINE = 0.17  # inches of a line of text

Curves = tuple[str, Sequence[int], Sequence[Sequence[float]]]
"""Name of one side, its steps, and the values of each of its runs."""


def colour_of(name: str, names: Sequence[str]) -> str:
    """Colour of an arm, the same in every figure of these arms."""
    own = {arm: _own_colour(arm) for arm in names}
    further = [arm for arm in names if own[arm] is None]
    return own[name] or _FURTHER[further.index(name) % len(_FURTHER)]


def _own_colour(name: str) -> str | None:
    arm = find_arm(name)
    return arm.colour if arm.name == type(arm).stem else None


def draw_accuracy(result: Mapping[str, Any], metric: str = "ap", width: float = WIDE) -> Figure:
    """AP against backbone parameters: a dot for each run, a diamond at the mean of several.

    Names stand in a column at the right, highest AP first, each joined to its arm by a line: arms
    that lie on one another keep names that do not.
    """
    figure = Figure(figsize=(min(width, 6.6), 4.0), layout="constrained")
    ax = figure.add_subplot()
    arms = list(result["arms"])
    means: dict[str, tuple[float, float]] = {}
    for name, arm in result["arms"].items():
        values = [run[metric] for run in arm["runs"] if run[metric] is not None]
        if not values:
            continue
        colour, place = colour_of(name, arms), arm["backbone_params"] / 1e6
        means[name] = place, sum(values) / len(values)
        ax.plot([place] * len(values), values, "o", color=colour, alpha=0.5, markersize=5)
        if len(values) > 1:
            ax.plot(*means[name], "D", color=colour, markersize=7)
    ax.set_xlabel("backbone parameters, millions", fontsize=FONT)
    ax.set_ylabel({"ap": "AP", "segm_ap": "mask AP"}.get(metric, metric), fontsize=FONT)
    ax.margins(0.08, 0.1)
    _calm(ax)
    _widen(ax, result)
    low, high = ax.get_ylim()
    # A line of text needs a fifteenth of this figure's height.
    heights = [(mean - low) / (high - low) for _, mean in means.values()]
    for (name, point), slot in zip(means.items(), spread(heights, 1 / 15), strict=True):
        ax.annotate(
            name,
            point,
            (1.04, slot),
            textcoords="axes fraction",
            fontsize=FONT,
            va="center",
            color=colour_of(name, arms),
            arrowprops={
                "arrowstyle": "-",
                "color": colour_of(name, arms),
                "linewidth": 0.6,
                "alpha": 0.5,
                "shrinkB": 4,
            },
        )
    return figure


def _widen(ax: Axes, result: Mapping[str, Any]) -> None:
    """Ranges of at least 0.1 AP and a fifth of the largest network, in which noise looks small."""
    low, high = ax.get_ylim()
    missing = max(0.0, _LEAST_AP - (high - low)) / 2
    bottom = max(low - missing, -0.01)  # AP is never negative; a dot at 0 is whole
    ax.set_ylim(bottom, max(high + missing, bottom + _LEAST_AP))
    left, right = ax.get_xlim()
    largest = max(arm["backbone_params"] for arm in result["arms"].values()) / 1e6
    missing = max(0.0, _LEAST_SHARE * largest - (right - left)) / 2
    ax.set_xlim(left - missing, right + missing)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """The places, moved as little as keeps any two ``gap`` apart in the same order, within 0 to 1.

    Where they do not all fit, the gap shrinks.
    """
    order = sorted(range(len(places)), key=lambda index: places[index])
    gap = min(gap, 1 / max(1, len(places) - 1))
    # Groups that touch move as one. Each member would have the group begin where the member then
    # keeps its own place; the group begins at the mean of these.
    groups: list[tuple[float, list[int]]] = []
    for index in order:
        first, members = min(max(places[index], 0.0), 1.0), [index]
        while groups and groups[-1][0] + gap * len(groups[-1][1]) > first + 1e-12:
            before, others = groups.pop()
            wanted = [before] * len(others) + [first - gap * len(others)] * len(members)
            members = others + members
            first = sum(wanted) / len(wanted)
            first = min(max(first, 0.0), 1 - gap * (len(members) - 1))
        groups.append((first, members))
    found = [0.0] * len(places)
    for first, members in groups:
        for number, index in enumerate(members):
            found[index] = first + gap * number
    return found


def draw_losses(curves: Mapping[str, Sequence[tuple[int, float]]], width: float = WIDE) -> Figure:
    """Training loss over steps, one line for each arm's first seed."""
    figure = Figure(figsize=(min(width, 6.6), 4.0), layout="constrained")
    ax = figure.add_subplot()
    for name, points in curves.items():
        if points:
            steps, losses = zip(*points, strict=True)
            ax.plot(steps, losses, color=colour_of(name, list(curves)), linewidth=1.4, label=name)
    ax.set_xlabel("training step", fontsize=FONT)
    ax.set_ylabel("loss", fontsize=FONT)
    ax.set_ylim(0, None)
    ax.xaxis.set_major_locator(MaxNLocator(_columns(width) * 3, integer=True))
    _calm(ax)
    _legend_above(ax, width)
    return figure


def draw_widths(result: Mapping[str, Any], groups: Sequence[str], width: float = WIDE) -> Figure:
    """Widths of every arm relative to the baseline, one line for each group."""
    baseline = result["arms"][BASELINE]["widths"]
    others = [name for name in result["arms"] if name != BASELINE]
    height = 1.1 + 0.23 * len(groups) + 0.2 * -(-len(others) // _columns(width))
    figure = Figure(figsize=(width, height), layout="constrained")
    ax = figure.add_subplot()
    ax.axvline(1, color=Baseline.colour, linewidth=1)
    for name in others:
        widths = result["arms"][name]["widths"]
        shares = [widths[group] / baseline[group] for group in groups]
        ax.plot(
            shares,
            range(len(groups)),
            "o" if find_arm(name).is_searched else "|",
            color=colour_of(name, list(result["arms"])),
            markersize=6 if find_arm(name).is_searched else 8,
            markeredgewidth=1.5,
            label=name,
        )
    _name_lines(ax, groups)
    shown = SEARCHED if SEARCHED in others else (others or [BASELINE])[0]
    found = result["arms"][shown]["widths"]
    _annotate(ax, [f"{baseline[group]} → {found[group]}" for group in groups])
    ax.set_xlabel(f"width / baseline's width\nat the right: {BASELINE} → {shown}", fontsize=FONT)
    ax.set_xlim(0, None)
    _legend_above(ax, width)
    return figure


def draw_demand(
    groups: Sequence[WidthGroup],
    trained: Mapping[str, float],
    untrained: Mapping[str, float] | None,
    rule: str,
    width: float = WIDE,
) -> Figure:
    """Demand of every group as a share of its width, before and after training."""
    figure = Figure(figsize=(width, 1.5 + 0.23 * len(groups)), layout="constrained")
    ax = figure.add_subplot()
    lines = range(len(groups))
    shares = [trained[group.name] / group.width for group in groups]
    ax.barh(lines, [1.0] * len(groups), color="#eef2f4", height=0.75)
    ax.barh(lines, shares, color=Searched.colour, height=0.75, label="trained baseline")
    if untrained is not None:
        before = [untrained[group.name] / group.width for group in groups]
        ax.plot(before, lines, "|", color=_BEFORE, markeredgewidth=2, label="before training")
    _name_lines(ax, [group.name for group in groups])
    _annotate(ax, [f"{trained[group.name]:.1f} of {group.width}" for group in groups])
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_locator(MaxNLocator(_columns(width) * 2))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    ax.set_xlabel(f"demand ({rule}) / width", fontsize=FONT)
    _legend_above(ax, width)
    return figure


def draw_stage_spectra(
    groups: Sequence[WidthGroup],
    trained: Mapping[str, Spectrum],
    untrained: Mapping[str, Spectrum] | None,
    width: float = WIDE,
) -> Figure:
    """Spectra of the stages' outputs, trained and before training, on one scale."""
    sides = {"trained": trained} | ({} if untrained is None else {"before training": untrained})
    panels = {
        f"{group.name}: {group.width}": {
            label: spectra[group.members[0]] for label, spectra in sides.items()
        }
        for group in groups
        if "." not in group.name
    }
    return draw_spectra(panels, width, 2.4)


def draw_spectra(
    panels: Mapping[str, Mapping[str, Spectrum]], width: float = WIDE, height: float = 1.4
) -> Figure:
    """Spectra relative to their largest eigenvalue, in panels on one scale; dashed: 1e-3.

    Args:
        panels: Up to two spectra by label, by the panel's title.
        width: Inches of the figure.
        height: Inches of a panel.
    """
    figure, cells = _panels(len(panels), width, height)
    widest = max(spectrum.channels for spectra in panels.values() for spectrum in spectra.values())
    for ax, (title, spectra) in zip(cells, panels.items(), strict=True):
        for (label, spectrum), colour in zip(spectra.items(), (_TRAINED, _BEFORE), strict=False):
            _draw_spectrum(ax, spectrum, {"color": colour, "label": label})
        ax.axhline(1e-3, color="#8a8a8a", linestyle="--", linewidth=0.8)
        ax.set_xlim(0.9, 1.1 * widest)
        ax.set_ylim(_LEAST_RELATIVE, 2)
        ax.minorticks_off()  # half of the time that fifty panels take
        ax.set_title(title, fontsize=FONT)
        _calm(ax)
    _name_panels(figure, cells[0], "rank", "eigenvalue / largest")
    return figure


def draw_dims(
    layers: Mapping[str, Sequence[Curves]],
    ceilings: Mapping[str, int],
    titles: Mapping[str, str],
    note: str,
    width: float = WIDE,
) -> Figure:
    """Dimensions of every layer over two trainings; grey: the most that the layer can have.

    Args:
        layers: Curves of both sides by the layer's name. Of several runs, the mean and the range
            are drawn.
        ceilings: Largest dimension by layer.
        titles: Titles of the panels by layer.
        note: Sentence under the panels, about layers that are not drawn.
        width: Inches.
    """
    figure, cells = _panels(len(layers), width, 1.3)
    for ax, (name, sides) in zip(cells, layers.items(), strict=False):
        for (label, steps, runs), colour in zip(sides, (_TRAINED, _BEFORE), strict=True):
            low, high = (pick(zip(*runs, strict=True)) for pick in (_lowest, _highest))
            mean = [sum(values) / len(runs) for values in zip(*runs, strict=True)]
            ax.plot(steps, mean, color=colour, linewidth=1.3, label=label)
            ax.fill_between(steps, low, high, color=colour, alpha=0.25, linewidth=0)
        ax.axhline(ceilings[name], color="0.6", linewidth=1.2)
        # Weights that move may leave more directions than weights that stand still can have.
        ax.set_ylim(0, 1.1 * max(ceilings[name], ax.dataLim.y1))
        ax.set_title(titles[name], fontsize=FONT)
        ax.yaxis.set_major_locator(MaxNLocator(3, integer=True))
        ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
        _calm(ax)
    wrapped = "\n".join(textwrap.wrap(note, round(_LETTERS * width)))
    _name_panels(figure, cells[0], f"training step\n{wrapped}", "dimension")
    return figure


def _columns(width: float) -> int:
    return max(1, int(width // _COLUMN))


def _panels(count: int, width: float, height: float) -> tuple[Figure, Sequence[Axes]]:
    """Figure of panels of a height, as many a line as the width has room for."""
    columns = _columns(width)
    lines = max(1, -(-count // columns))
    figure = Figure(figsize=(width, height * lines + 1.0))
    cells = figure.subplots(lines, columns, squeeze=False).flatten().tolist()
    used = max(1, count)
    for ax in cells[used:]:
        ax.remove()
    return figure, cells[:used]


def _name_panels(figure: Figure, first: Axes, x_label: str, y_label: str) -> None:
    """Legend and labels around panels, spaced in inches: an automatic layout doubles the time."""
    width, height = figure.get_size_inches()
    grid = first.get_gridspec()
    lines, columns = grid.nrows, grid.ncols
    handles, labels = first.get_legend_handles_labels()
    style = {"fontsize": FONT, "frameon": False}
    figure.legend(handles, labels, loc="upper left", ncols=columns, **style)
    figure.supxlabel(x_label, fontsize=FONT, y=0.05 / height)
    figure.supylabel(y_label, fontsize=FONT, x=0.05 / width)
    left, between_columns, between_lines = 0.8, 0.6, 0.5
    top = 0.4 + _LINE * -(-len(labels) // columns)
    bottom = 0.4 + _LINE * (1 + x_label.count("\n"))
    panel_width = (width - left - 0.1 - between_columns * (columns - 1)) / columns
    panel_height = (height - top - bottom - between_lines * (lines - 1)) / lines
    figure.subplots_adjust(
        left=left / width,
        right=1 - 0.1 / width,
        top=1 - top / height,
        bottom=bottom / height,
        wspace=between_columns / panel_width,
        hspace=between_lines / panel_height,
    )


def _legend_above(ax: Axes, width: float) -> None:
    place = {"loc": "lower left", "bbox_to_anchor": (0, 1), "ncols": _columns(width)}
    ax.legend(fontsize=FONT, frameon=False, **place)


def _lowest(values: Iterable[Sequence[float]]) -> list[float]:
    return [min(step_values) for step_values in values]


def _highest(values: Iterable[Sequence[float]]) -> list[float]:
    return [max(step_values) for step_values in values]


def _draw_spectrum(ax: Axes, spectrum: Spectrum, style: Mapping[str, Any]) -> None:
    values = spectrum.eigenvalues
    if not bool(values[0] > 0):
        return
    shares = (values / values[0]).clamp_min(_LEAST_RELATIVE / 10)
    ax.loglog(range(1, len(shares) + 1), shares.numpy(), linewidth=1.5, **style)


def _calm(ax: Axes) -> None:
    ax.grid(True, color=_GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=FONT)


def _name_lines(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names, fontsize=FONT)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(True, axis="x", color=_GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=FONT)


def _annotate(ax: Axes, texts: Sequence[str]) -> None:
    for line, text in enumerate(texts):
        ax.annotate(
            text,
            (1.01, line),
            xycoords=("axes fraction", "data"),
            fontsize=FONT,
            va="center",
            color="#5b6770",
        )
