"""Figures of a search. Each function returns a figure that pyplot does not hold."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from fastcov import Spectrum, WidthGroup

COLOURS = {
    "baseline": "#2b2f33",
    "searched": "#1f78b4",
    "uniform": "#c8501e",
    "random": "#8a6fb0",
    "untrained": "#3f8f4f",
    "power": "#b08d1f",
}
_FURTHER = ("#a3416b", "#2f8f8f", "#70563f", "#6b6b6b")
_GRID = "#e4e4e4"
_LEAST_RELATIVE = 1e-7


def colour_of(arm: str, arms: Sequence[str]) -> str:
    """The arm's colour, the same in every figure."""
    if arm in COLOURS:
        return COLOURS[arm]
    further = [name for name in arms if name not in COLOURS]
    return _FURTHER[further.index(arm) % len(_FURTHER)]


def draw_accuracy(result: Mapping[str, Any], metric: str = "ap") -> Figure:
    """AP against backbone parameters: a dot for each run, a bar at each arm's mean."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    ax = figure.add_subplot()
    arms = list(result["arms"])
    for name, arm in result["arms"].items():
        values = [run[metric] for run in arm["runs"] if run[metric] is not None]
        if not values:
            continue
        colour, place = colour_of(name, arms), arm["backbone_params"] / 1e6
        mean = sum(values) / len(values)
        if len(values) > 1:
            ax.plot([place] * len(values), values, "o", color=colour, alpha=0.35, markersize=4)
        ax.plot(place, mean, "D", color=colour, markersize=7)
        ax.annotate(name, (place, mean), (8, 4), textcoords="offset points", fontsize=8.5)
    ax.set_xlabel("backbone parameters, millions")
    ax.set_ylabel({"ap": "AP", "segm_ap": "mask AP"}.get(metric, metric))
    ax.margins(0.2, 0.25)
    _calm(ax)
    return figure


def draw_losses(curves: Mapping[str, Sequence[tuple[int, float]]]) -> Figure:
    """Training loss over steps, one line for each arm's first seed."""
    figure = Figure(figsize=(5.6, 3.6), layout="constrained")
    ax = figure.add_subplot()
    for name, points in curves.items():
        if points:
            steps, losses = zip(*points, strict=True)
            ax.plot(steps, losses, color=colour_of(name, list(curves)), linewidth=1.4, label=name)
    ax.set_xlabel("training step")
    ax.set_ylabel("loss")
    ax.set_ylim(0, None)
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    _calm(ax)
    ax.legend(fontsize=8, frameon=False)
    return figure


def draw_widths(result: Mapping[str, Any], groups: Sequence[str]) -> Figure:
    """Widths of every arm relative to the baseline, one line for each group."""
    baseline = result["arms"]["baseline"]["widths"]
    others = [name for name in result["arms"] if name != "baseline"]
    figure = Figure(figsize=(7.6, 1.1 + 0.2 * len(groups)), layout="constrained")
    ax = figure.add_subplot()
    ax.axvline(1, color=COLOURS["baseline"], linewidth=1)
    for name in others:
        widths = result["arms"][name]["widths"]
        shares = [widths[group] / baseline[group] for group in groups]
        ax.plot(
            shares,
            range(len(groups)),
            "o" if name.startswith("searched") else "|",
            color=colour_of(name, list(result["arms"])),
            markersize=6 if name.startswith("searched") else 8,
            markeredgewidth=1.5,
            label=name,
        )
    _name_lines(ax, groups)
    shown = "searched" if "searched" in others else (others or ["baseline"])[0]
    found = result["arms"][shown]["widths"]
    _annotate(ax, [f"{baseline[group]} → {found[group]}" for group in groups])
    ax.set_xlabel("width / baseline's width")
    ax.set_xlim(0, None)
    ax.set_title(f"channels at the right: baseline → {shown}", fontsize=9, loc="right")
    ax.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=3)
    return figure


def draw_demand(
    groups: Sequence[WidthGroup],
    trained: Mapping[str, float],
    untrained: Mapping[str, float] | None,
    rule: str,
) -> Figure:
    """Demand of every group as a share of its width, before and after training."""
    figure = Figure(figsize=(7.6, 1.1 + 0.2 * len(groups)), layout="constrained")
    ax = figure.add_subplot()
    lines = range(len(groups))
    shares = [trained[group.name] / group.width for group in groups]
    ax.barh(lines, [1.0] * len(groups), color="#eef2f4", height=0.75)
    ax.barh(lines, shares, color=COLOURS["searched"], height=0.75, label="trained baseline")
    if untrained is not None:
        before = [untrained[group.name] / group.width for group in groups]
        ax.plot(before, lines, "|", color="#e07b39", markeredgewidth=2, label="before training")
    _name_lines(ax, [group.name for group in groups])
    _annotate(ax, [f"{trained[group.name]:.1f} of {group.width}" for group in groups])
    ax.set_xlim(0, 1)
    ax.xaxis.set_major_formatter(FuncFormatter(lambda share, _: f"{100 * share:.0f} %"))
    ax.set_xlabel(f"demand ({rule}) as a share of the width")
    ax.legend(fontsize=8, frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    return figure


def draw_stage_spectra(
    groups: Sequence[WidthGroup],
    trained: Mapping[str, Spectrum],
    untrained: Mapping[str, Spectrum] | None,
) -> Figure:
    """Spectra of the stages' outputs, trained and before training, on one scale."""
    stages = [group for group in groups if "." not in group.name]
    figure = Figure(figsize=(10.4, 2.9), layout="constrained")
    cells = figure.subplots(1, len(stages), sharey=True, squeeze=False)[0]
    widest = max(group.width for group in stages)
    for ax, group in zip(cells, stages, strict=True):
        for spectra, style in (
            (trained, {"color": COLOURS["searched"], "label": "trained"}),
            (untrained, {"color": "#e07b39", "label": "before training"}),
        ):
            if spectra is not None:
                _draw_spectrum(ax, spectra[group.members[0]], style)
        ax.axhline(1e-3, color="#8a8a8a", linestyle="--", linewidth=0.8)
        ax.set_xlim(0.9, 1.1 * widest)
        ax.set_ylim(_LEAST_RELATIVE, 2)
        ax.set_title(f"{group.name}, {group.width} channels", fontsize=9)
        ax.set_xlabel("rank", fontsize=9)
        _calm(ax)
    cells[0].set_ylabel("eigenvalue / largest")
    cells[0].legend(fontsize=8, frameon=False, loc="lower left")
    return figure


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


def _name_lines(ax: Axes, names: Sequence[str]) -> None:
    ax.set_yticks(range(len(names)), names, fontsize=7.5)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.grid(True, axis="x", color=_GRID, linewidth=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)


def _annotate(ax: Axes, texts: Sequence[str]) -> None:
    for line, text in enumerate(texts):
        ax.annotate(
            text,
            (1.01, line),
            xycoords=("axes fraction", "data"),
            fontsize=7.5,
            va="center",
            color="#5b6770",
        )
