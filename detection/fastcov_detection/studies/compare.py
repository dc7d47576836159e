"""Two trainings side by side: the dimensions of every layer over training, and how far they part.

The question of Shinya, Simo-Serra and Suzuki (arXiv 1909.04021): do a detector from scratch and one
from pretrained weights converge to similar models? What is compared is what :func:`fastcov.track`
saw while each trained.
"""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image
from rich import box
from rich.console import Console
from rich.table import Table

from fastcov import History, load_history
from fastcov.show.figures import comparison_grid, free_axes, png
from fastcov.show.page import write_comparison
from fastcov.show.plot import plot_comparison
from fastcov.show.tables import comparison_legend, comparison_rows
from fastcov.spectra.compare import Comparison, compare_histories
from fastcov_detection.errors import DataError
from fastcov_detection.files import write_file, write_text
from fastcov_detection.studies.ceilings import layer_ceilings

_COLOURS = 64


def compare_runs(
    a: str | os.PathLike[str],
    b: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    threshold: float = 1e-3,
) -> Comparison:
    """Compares two runs and writes figures and numbers.

    Args:
        a: Folder of the first run; a folder of snapshots does as well.
        b: Folder of the second run.
        out: Gets ``comparison.json``, ``comparison.html``, ``dims.png``, ``spectra.png`` and
            ``distance.png``.
        threshold: Of a dimension, relative to the largest eigenvalue.

    Returns:
        The comparison, layer by layer.

    Raises:
        DataError: If a run has no snapshots, or the runs share no layer.
    """
    histories = _history(Path(a)), _history(Path(b))
    labels = _labels(Path(a), Path(b))
    try:
        comparison = compare_histories(
            *histories, threshold=threshold, label_a=labels[0], label_b=labels[1]
        )
    except ValueError as error:
        raise DataError(f"cannot compare {a} with {b}: {error}") from None
    folder = Path(out)
    ceilings = layer_ceilings(Path(a)), layer_ceilings(Path(b))
    content = numbers(comparison, *ceilings)
    write_text(folder / "comparison.json", json.dumps(content, indent=2) + "\n")
    for name in ("dims", "spectra"):
        figure = comparison_grid(comparison, name)
        if name == "dims":
            _draw_ceilings(figure, comparison, *ceilings)
        _write_png(folder / f"{name}.png", png(figure))
    distances = plot_comparison(comparison, free_axes(len(comparison.layers)))
    _write_png(folder / "distance.png", png(distances))
    write_comparison(
        folder / "comparison.html", comparison, f"{labels[0]} (a) against {labels[1]} (b)"
    )
    return comparison


def at_ceiling(
    comparison: Comparison, ceilings_a: Mapping[str, int], ceilings_b: Mapping[str, int]
) -> set[str]:
    """Layers that end at their structural ceiling in both runs: their dimension tells nothing."""
    return {
        layer.name
        for layer in comparison.layers
        if layer.dims_a[-1] >= ceilings_a.get(layer.name, layer.end_a.channels)
        and layer.dims_b[-1] >= ceilings_b.get(layer.name, layer.end_b.channels)
    }


def count_dims(
    comparison: Comparison, ceilings_a: Mapping[str, int], ceilings_b: Mapping[str, int]
) -> str:
    """Count of layers that end with the same dimension, those at their ceiling apart."""
    full = at_ceiling(comparison, ceilings_a, ceilings_b)
    told = [layer for layer in comparison.layers if layer.name not in full]
    same = sum(layer.dims_a[-1] == layer.dims_b[-1] for layer in told)
    return (
        f"{len(full)} of {len(comparison.layers)} layers (marked *) end at their structural "
        "ceiling in both runs, the smaller of a layer's inputs and outputs, which tells nothing "
        f"about training; of the other {len(told)}, {same} end with the same dimension."
    )


def numbers(
    comparison: Comparison,
    ceilings_a: Mapping[str, int] | None = None,
    ceilings_b: Mapping[str, int] | None = None,
) -> dict[str, Any]:
    """Everything that the figures show, for programs.

    Args:
        comparison: Of two runs.
        ceilings_a: Of the first run, see :func:`layer_ceilings`.
        ceilings_b: Of the second run.
    """
    ceilings = ceilings_a or {}, ceilings_b or {}
    layers = {
        layer.name: {
            "steps_a": layer.steps_a,
            "dims_a": layer.dims_a,
            "width_a": layer.end_a.channels,
            "ceiling_a": ceilings[0].get(layer.name, layer.end_a.channels),
            "dof_a": layer.end_a.dof(),
            "steps_b": layer.steps_b,
            "dims_b": layer.dims_b,
            "width_b": layer.end_b.channels,
            "ceiling_b": ceilings[1].get(layer.name, layer.end_b.channels),
            "dof_b": layer.end_b.dof(),
            "distance": layer.distance,
            "common_steps": layer.common_steps,
            "distances": layer.distances,
        }
        for layer in comparison.layers
    }
    return {
        "a": comparison.label_a,
        "b": comparison.label_b,
        "threshold": comparison.threshold,
        "layers": layers,
        "at_ceiling": sorted(at_ceiling(comparison, *ceilings)),
        "only_a": list(comparison.only_a),
        "only_b": list(comparison.only_b),
    }


def print_comparison(
    comparison: Comparison,
    console: Console | None = None,
    *,
    ceilings: tuple[Mapping[str, int], Mapping[str, int]] = ({}, {}),
) -> None:
    """Prints a line for each layer: dimensions and demands at the end, and the distance.

    Args:
        comparison: Of two runs.
        console: Where to; None: standard output.
        ceilings: Of both runs, see :func:`layer_ceilings`; layers that end there are marked.
    """
    full = at_ceiling(comparison, *ceilings)
    console = console or Console(width=None if sys.stdout.isatty() else 110)
    headings, lines = comparison_rows(comparison)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(f"{line[0]} *" if line[0] in full else line[0], *line[1:])
    console.print(f"a: {comparison.label_a}", f"b: {comparison.label_b}", sep="\n", markup=False)
    console.print(table)
    console.print(comparison_legend(comparison), markup=False, highlight=False)
    console.print(count_dims(comparison, *ceilings), markup=False, highlight=False)


def _draw_ceilings(
    figure: Figure,
    comparison: Comparison,
    ceilings_a: Mapping[str, int],
    ceilings_b: Mapping[str, int],
) -> None:
    """A grey line at the ceiling of every layer, and a star behind those that end there."""
    full = at_ceiling(comparison, ceilings_a, ceilings_b)
    for axes, layer in zip(figure.axes, comparison.layers, strict=False):
        for ceilings, end in ((ceilings_a, layer.end_a), (ceilings_b, layer.end_b)):
            axes.axhline(ceilings.get(layer.name, end.channels), color="0.7", linewidth=0.6)
        if layer.name in full:
            axes.set_title(f"{axes.get_title()} *", fontsize=axes.title.get_fontsize())


def _history(run: Path) -> History:
    """The snapshots of a run, or of the folder that was given as ``out=`` to fastcov.track."""
    for folder in (run / "spectra", run):
        if (folder / "history.jsonl").is_file():
            return load_history(folder)
    raise DataError(
        f"no snapshots in {run} (looked for history.jsonl there and in spectra/); train with "
        "--set track=backbone and snapshot_every below the number of steps"
    )


def _labels(a: Path, b: Path) -> tuple[str, str]:
    """The shortest ends of the paths that tell the runs apart."""
    parts = [path.resolve().parts for path in (a, b)]
    for length in range(1, max(map(len, parts)) + 1):
        ends = ["/".join(part[-length:]) for part in parts]
        if ends[0] != ends[1]:
            return ends[0], ends[1]
    return f"{a} (a)", f"{b} (b)"


def _write_png(path: Path, content: bytes) -> None:
    """A line drawing needs no more than a palette: a third of the size, for version control."""
    with Image.open(io.BytesIO(content)) as picture:
        small = picture.convert("RGB").quantize(_COLOURS, Image.Quantize.MEDIANCUT)
    write_file(path, lambda file: small.save(file, format="PNG", optimize=True))
