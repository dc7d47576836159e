"""HTML pages about one training, or about two: self-contained, without scripts, every name escaped.

The pictures are in the page, and nothing outside is referred to. Needs the extra ``plot``.
"""

import base64
import datetime
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from fastcov.files import replacing
from fastcov.show.axes import free_axes, png
from fastcov.show.figures import comparison_grid, most_changed, ridges_grid, spectra_grid
from fastcov.show.plot import plot_comparison, plot_demand, plot_dims
from fastcov.show.status import HEADINGS, MEASURES, LayerStatus, Summary
from fastcov.show.tables import comparison_legend, comparison_rows, printable
from fastcov.spectra.compare import Comparison
from fastcov.spectra.history import History
from fastcov.version import __version__

try:
    import jinja2
except ImportError as error:
    raise ImportError("pages need jinja2, which is not installed: pip install jinja2") from error


@dataclass(frozen=True)
class Section:
    """Part of a page under a heading of its own; every part but the heading may be left out.

    Args:
        heading: Also the text that stands for the picture.
        caption: Sentences under the heading.
        picture: A PNG file.
        headings: Headings of the table.
        lines: Cells of the table, as many as headings.
        legend: Term to meaning.
    """

    heading: str
    caption: str = ""
    picture: bytes = b""
    headings: Sequence[str] = ()
    lines: Sequence[Sequence[str]] = ()
    legend: Mapping[str, str] = field(default_factory=dict)


def write_page(
    path: str | os.PathLike[str], title: str, introduction: str, sections: Sequence[Section]
) -> Path:
    """Page of any sections.

    Args:
        path: Path of the page, whose folders are made; written to a temporary name, then renamed.
        title: Heading.
        introduction: Sentences under it.
        sections: Sections in their order.

    Returns:
        The page's path.

    Raises:
        OSError: If the page cannot be written; an older page there stays as it was.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
    )
    environment.filters["printable"] = printable
    page = environment.get_template("page.html").render(
        title=title,
        introduction=introduction,
        sections=[
            {**vars(section), "picture": base64.b64encode(section.picture).decode()}
            for section in sections
        ],
        version=__version__,
        torch_version=torch.__version__,
        made=datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z"),
    )
    target = Path(path)
    try:
        with replacing(target) as temporary:
            temporary.write_text(page, encoding="utf-8", errors="replace")
    except OSError as error:
        raise OSError(
            error.errno,
            f"cannot write the page {target}: {error.strerror}; give another path, or free space",
        ) from error
    return target


def write_report(
    path: str | os.PathLike[str],
    statuses: Sequence[LayerStatus],
    title: str = "fastcov report",
    *,
    history: History | None = None,
) -> Path:
    """Page about one training: demand against width, dims over training, every spectrum, a table.

    Args:
        path: Path of the page; written to a temporary name, then renamed.
        statuses: Statuses of a tracker's layers, or those of :func:`last_statuses`.
        title: Heading.
        history: Snapshots for the pictures over training; None leaves them out.

    Returns:
        The page's path.

    Raises:
        ValueError: If there is no layer to report.
        OSError: If the page cannot be written; an older page there stays as it was.
    """
    if not statuses:
        raise ValueError(f"no layer to report on {title!r}; take a snapshot after some steps")
    summary = Summary(statuses)
    spectra = summary.spectra
    sections = []
    if spectra:
        sections.append(
            Section(
                "Demand against width",
                "Dark: degrees of freedom (dof below), the number at the right; light: width.",
                png(plot_demand(spectra, free_axes(len(spectra)))),
            )
        )
    if spectra and history is not None and len(history) > 1:
        axes = plot_dims(history, free_axes(len(history.layers())))
        sections.append(Section("Dimension over training", picture=png(axes)))
        if changed := most_changed(history):
            sections.append(
                Section(
                    "Spectra over training",
                    "Layers that changed most. Each ridge is the density of a snapshot's "
                    "eigenvalues over the largest; in colour: above 1e-3; their number at the "
                    "right.",
                    png(ridges_grid(history, changed)),
                )
            )
    if spectra:
        sections.append(
            Section(
                "Spectra",
                "Eigenvalues over the largest, against rank; both scales are logarithmic. Under "
                "each name: dim, the eigenvalues above the dashed line (1e-3), of the width. Grey: "
                "fewer than 16 rows a channel, too few to tell.",
                png(spectra_grid(spectra)),
            )
        )
    legend = {measure.heading: measure.meaning for measure in MEASURES if measure.heading}
    sections.append(Section("Layers", headings=HEADINGS, lines=summary.rows(), legend=legend))
    return write_page(path, title, _introduction(statuses, history), sections)


def write_comparison(
    path: str | os.PathLike[str], comparison: Comparison, title: str = "fastcov comparison"
) -> Path:
    """Page about two trainings: distances, and every layer in both.

    Args:
        path: Path of the page; written to a temporary name, then renamed.
        comparison: Comparison of two histories.
        title: Heading.

    Returns:
        The page's path.

    Raises:
        OSError: If the page cannot be written; an older page there stays as it was.
    """
    distances = plot_comparison(comparison, free_axes(len(comparison.layers)))
    grids = {
        "Dimension over training": "dims",
        "Spectra at the end": "spectra",
        "Distance over training": "distance",
    }
    headings, lines = comparison_rows(comparison)
    sections = [
        Section("Distance at the end", picture=png(distances)),
        *(
            Section(heading, picture=png(comparison_grid(comparison, kind)))
            for heading, kind in grids.items()
        ),
        Section("Layers", headings=headings, lines=lines),
    ]
    labels = f"a: {comparison.label_a}, b: {comparison.label_b}. {comparison_legend(comparison)}"
    return write_page(path, title, labels, sections)


def last_statuses(history: History) -> list[LayerStatus]:
    """Statuses of all layers of a history, with the spectra of its last snapshot."""
    last = history[-1].spectra if len(history) else {}
    statuses = []
    for name in history.layers():
        spectrum = last.get(name)
        count = 0 if spectrum is None else spectrum.count
        channels = 0 if spectrum is None else spectrum.channels
        note = "no row in the last snapshot" if spectrum is None else ""
        statuses.append(LayerStatus(name, channels, count, 0, float(count), spectrum, note))
    return statuses


def _introduction(statuses: Sequence[LayerStatus], history: History | None) -> str:
    # A spectrum's count, not the layer's: with decay, fewer rows than were read bear it.
    ready = sum(s.spectrum is not None and s.spectrum.count >= s.rows_wanted for s in statuses)
    text = f"{len(statuses)} layers, {ready} of them with at least 16 rows a channel."
    if history is not None and len(history):
        steps = history.steps()
        text += f" {len(steps)} snapshots, steps {steps[0]:,} to {steps[-1]:,}."
    return text
