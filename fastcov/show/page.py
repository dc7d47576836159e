"""What a tracker knows, as a table, as a flat dict of floats, and as a self-contained HTML page."""

import base64
import contextlib
import datetime
import html
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from fastcov.spectra.compare import Comparison
from fastcov.spectra.history import History
from fastcov.spectra.spectrum import Spectrum


@dataclass(frozen=True, eq=False)
class LayerStatus:
    """What is known of one layer.

    Args:
        name: Layer name.
        channels: Width C, 0 where no forward has shown it.
        count: Rows read.
        skipped: Rows left out because they held NaN or inf.
        weight: Normaliser of the covariance; the count unless rows are weighted or decay.
        rows_wanted: Rows for a trustworthy spectrum, 16 C.
        spectrum: None where no row was read.
        note: Why something is missing; empty where nothing is.
    """

    name: str
    channels: int
    count: int
    skipped: int
    weight: float
    rows_wanted: int
    spectrum: Spectrum | None
    note: str = ""


_MEASURES: dict[str, Callable[[Spectrum], float]] = {
    "dim": lambda spectrum: spectrum.dim(),
    "rank_at_99": lambda spectrum: spectrum.rank_at(0.99),
    "dof": lambda spectrum: spectrum.dof(),
    "participation_ratio": lambda spectrum: spectrum.participation_ratio(),
    "effective_rank": lambda spectrum: spectrum.effective_rank(),
    "stable_rank": lambda spectrum: spectrum.stable_rank(),
}
_HEADERS = ("layer", "channels", "rows", "dim", "rank 99 %", "dof", "part. ratio", "note")
_LEGEND = {
    "dim": "eigenvalues above 1e-3 of the largest",
    "rank 99 %": "fewest directions that hold 99 % of the variance",
    "dof": "degrees of freedom, the sum of l / (l + 1e-3 of the largest) over all eigenvalues l",
    "part. ratio": "participation ratio, squared trace over squared Frobenius norm",
}

_DEMAND_CAPTION = "Dark: degrees of freedom (dof below), the number at the right; light: width."
_GRID_CAPTION = (
    "Eigenvalues over the largest, against rank; both scales are logarithmic. Under each name: "
    "dim, the eigenvalues above the dashed line (1e-3), of the width. Grey: fewer than 16 rows a "
    "channel, too few to tell."
)


class Summary(dict[str, float]):
    """Flat dict of floats for any logger; printed, a table with one line a layer.

    Keys are ``layer/measure``: channels, rows and skipped always; dim (relative, 1e-3), rank_at_99,
    dof, participation_ratio, effective_rank and stable_rank where the layer has a spectrum.

    Args:
        statuses: One a layer, in the order of the table.

    Example:
        >>> spectrum = Spectrum(torch.tensor([3.0, 1.0, 0.0]), count=64, total=4.0)
        >>> summary = Summary([LayerStatus("conv1", 3, 64, 0, 64.0, 48, spectrum)])
        >>> summary["conv1/dim"], round(summary["conv1/participation_ratio"], 6)
        (2.0, 1.6)
        >>> print(summary)
        layer  channels  rows  dim  rank 99 %  dof  part. ratio  note
        -----  --------  ----  ---  ---------  ---  -----------  ----
        conv1         3    64    2          2  2.0          1.6
    """

    def __init__(self, statuses: Sequence[LayerStatus]) -> None:
        super().__init__()
        self.statuses = tuple(statuses)
        for status in self.statuses:
            self[f"{status.name}/channels"] = float(status.channels)
            self[f"{status.name}/rows"] = float(status.count)
            self[f"{status.name}/skipped"] = float(status.skipped)
            if status.spectrum is not None:
                for measure, read in _MEASURES.items():
                    self[f"{status.name}/{measure}"] = float(read(status.spectrum))

    def __str__(self) -> str:
        return text_table(_HEADERS, self.rows())

    def rows(self) -> list[tuple[str, ...]]:
        """Cells of the table, one line a layer."""
        lines: list[tuple[str, ...]] = []
        for status in self.statuses:
            measured: tuple[str, ...] = ("", "", "", "")
            if status.spectrum is not None:
                measured = (
                    f"{self[f'{status.name}/dim']:.0f}",
                    f"{self[f'{status.name}/rank_at_99']:.0f}",
                    f"{self[f'{status.name}/dof']:.1f}",
                    f"{self[f'{status.name}/participation_ratio']:.1f}",
                )
            width = str(status.channels) if status.channels else ""
            lines.append((status.name, width, str(status.count), *measured, _note(status)))
        return lines


def _note(status: LayerStatus) -> str:
    if status.note:
        return status.note
    if status.count == 0:
        return "no row"
    if status.count < status.rows_wanted:
        return f"only {status.count} of {status.rows_wanted} rows: eigenvalues are uncertain"
    return ""


def comparison_rows(comparison: Comparison) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """Headers and cells of a comparison: dimensions at the end, and the distance of the spectra.

    Args:
        comparison: Of two histories.

    Returns:
        Headers, and one line a layer; layers that only one training has come last.
    """
    headers = ("layer", "width a", "width b", "dim a", "dim b", "dof a", "dof b", "distance")
    lines: list[tuple[str, ...]] = [
        (
            layer.name,
            str(layer.end_a.channels),
            str(layer.end_b.channels),
            str(layer.dims_a[-1]),
            str(layer.dims_b[-1]),
            f"{layer.end_a.dof():.1f}",
            f"{layer.end_b.dof():.1f}",
            f"{layer.distance:.3f}",
        )
        for layer in comparison.layers
    ]
    lines += [(name, *[""] * 6, "only in a") for name in comparison.only_a]
    lines += [(name, *[""] * 6, "only in b") for name in comparison.only_b]
    return headers, lines


def write_report(
    path: str | os.PathLike[str],
    history_or_statuses: History | Sequence[LayerStatus],
    title: str = "fastcov report",
    *,
    history: History | None = None,
) -> Path:
    """Writes one HTML page: table, demand against width, dims over training, every spectrum.

    The page holds its pictures, refers to nothing outside, runs no script and escapes every name.

    Args:
        path: Of the page; written to a temporary name, then renamed.
        history_or_statuses: A history, whose last snapshot fills the table, or what a tracker knows
            now.
        title: Heading.
        history: With statuses, the snapshots for the picture of dims over training.

    Returns:
        The page's path.

    Raises:
        ValueError: If there is no layer to report.
        ImportError: If matplotlib is missing.
        OSError: If the page cannot be written; an older page there stays as it was.
    """
    from fastcov.show import figures, plot

    if isinstance(history_or_statuses, History):
        history = history_or_statuses
        statuses = _last_statuses(history)
    else:
        statuses = list(history_or_statuses)
    if not statuses:
        raise ValueError(f"no layer to report on {title!r}; take a snapshot after some steps")
    summary = Summary(statuses)
    spectra = {s.name: s.spectrum for s in statuses if s.spectrum is not None}
    parts = [f"<p>{html.escape(_state_of(statuses, history))}</p>"]
    if spectra:
        ax = plot.plot_demand(spectra, figures.free_axes(len(spectra)))
        parts.append(
            _section("Demand against width", _picture(figures.png(ax), "demand"), _DEMAND_CAPTION)
        )
    if history is not None and len(history) > 1 and spectra:
        ax = plot.plot_dims(history, figures.free_axes(len(history.layers())))
        parts.append(_section("Dimension over training", _picture(figures.png(ax), "dims")))
    if spectra:
        grid = figures.spectra_grid(spectra)
        parts.append(_section("Spectra", _picture(figures.png(grid), "spectra"), _GRID_CAPTION))
    parts.append(_section("Layers", _html_table(_HEADERS, summary.rows()) + _legend()))
    return _write_page(path, title, parts)


def write_comparison(
    path: str | os.PathLike[str], comparison: Comparison, title: str = "fastcov comparison"
) -> Path:
    """Writes one HTML page about two trainings; see :func:`write_report` for what a page is.

    Args:
        path: Of the page.
        comparison: Of two histories.
        title: Heading.

    Returns:
        The page's path.

    Raises:
        ImportError: If matplotlib is missing.
        OSError: If the page cannot be written.
    """
    from fastcov.show import figures, plot

    ax = plot.plot_comparison(comparison, figures.free_axes(len(comparison.layers)))
    headers, lines = comparison_rows(comparison)
    who = f"a: {comparison.label_a}, b: {comparison.label_b}. {comparison_legend(comparison)}"
    parts = [
        f"<p>{html.escape(who)}</p>",
        _section("Distance at the end", _picture(figures.png(ax), "distance")),
    ]
    for heading, what in (
        ("Dimension over training", "dims"),
        ("Spectra at the end", "spectra"),
        ("Distance over training", "distance"),
    ):
        grid = figures.comparison_grid(comparison, what)
        parts.append(
            _section(
                heading, _picture(figures.png(grid), "distances" if what == "distance" else what)
            )
        )
    parts.append(_section("Layers", _html_table(headers, lines)))
    return _write_page(path, title, parts)


def comparison_legend(comparison: Comparison) -> str:
    """What the columns of :func:`comparison_rows` mean, in two sentences."""
    return (
        "Distance: half the sum of |p - q| over the trace-normalised eigenvalues in descending "
        "order, the share of the variance that would have to change rank (0 same shape, 1 at "
        f"most). Dim: eigenvalues above {comparison.threshold:g} of the largest."
    )


def _last_statuses(history: History) -> list[LayerStatus]:
    if not len(history):
        return []
    last = history[-1].spectra
    return [
        LayerStatus(
            name,
            last[name].channels if name in last else 0,
            last[name].count if name in last else 0,
            0,
            float(last[name].count) if name in last else 0.0,
            16 * last[name].channels if name in last else 0,
            last.get(name),
            "" if name in last else "no row in the last snapshot",
        )
        for name in history.layers()
    ]


def _state_of(statuses: Sequence[LayerStatus], history: History | None) -> str:
    # Of the spectrum: with decay, fewer rows than were read bear it.
    ready = sum(s.spectrum is not None and s.spectrum.count >= s.rows_wanted for s in statuses)
    text = f"{len(statuses)} layers, {ready} of them with at least 16 rows a channel."
    if history is not None and len(history):
        steps = history.steps()
        text += f" {len(steps)} snapshots, steps {steps[0]:,} to {steps[-1]:,}."
    return text


_STYLE = """
body{font:15px/1.5 system-ui,sans-serif;color:#1d2429;max-width:1100px;margin:2rem auto}
body{padding:0 1rem}footer{color:#667;font-size:12px}
h1{font-size:1.5rem}
h2{font-size:1.1rem;margin-top:2rem}img{max-width:100%;height:auto;display:block}
div.wide{overflow-x:auto}table{border-collapse:collapse;font-size:13px;white-space:nowrap}
th,td{padding:2px 10px;text-align:right;border-bottom:1px solid #e3e8eb}
th:first-child,td:first-child,.note{text-align:left}td.note{white-space:normal;min-width:18rem}
dt{font-weight:600;float:left;clear:left;width:7rem}dd{margin:0 0 0 7.5rem}
"""


def _write_page(path: str | os.PathLike[str], title: str, parts: Sequence[str]) -> Path:
    from fastcov import __version__

    made = datetime.datetime.now().astimezone().strftime("%Y-%m-%d %H:%M %Z")
    page = "\n".join(
        [
            '<!doctype html><html lang="en"><head><meta charset="utf-8">',
            # Even a name that slipped through unescaped could load and run nothing.
            '<meta http-equiv="Content-Security-Policy" content="default-src \'none\'; '
            "img-src data:; style-src 'unsafe-inline'\">",
            '<meta name="viewport" content="width=device-width">',
            f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head><body>",
            f"<h1>{html.escape(title)}</h1>",
            *parts,
            f"<footer>fastcov {__version__}, torch {torch.__version__}, {html.escape(made)}"
            "</footer></body></html>",
        ]
    )
    target = Path(path)
    temporary = target.with_name(f"{target.name}.{os.getpid()}.tmp")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(page, encoding="utf-8", errors="replace")
        os.replace(temporary, target)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise OSError(
            error.errno,
            f"cannot write the page {target}: {error.strerror}; give another path, or free space",
        ) from error
    return target


def _section(heading: str, content: str, caption: str = "") -> str:
    told = f"<p>{html.escape(caption)}</p>" if caption else ""
    return f"<section><h2>{html.escape(heading)}</h2>{told}{content}</section>"


def _picture(picture: bytes, what: str) -> str:
    encoded = base64.b64encode(picture).decode()
    return f'<img alt="{html.escape(what)}" src="data:image/png;base64,{encoded}">'


def _legend() -> str:
    items = "".join(
        f"<dt>{html.escape(k)}</dt><dd>{html.escape(v)}</dd>" for k, v in _LEGEND.items()
    )
    return f"<dl>{items}</dl>"


def _html_table(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    marks = [' class="note"' if header == "note" else "" for header in headers]

    def line(tag: str, cells: Sequence[str]) -> str:
        return "".join(
            f"<{tag}{mark}>{html.escape(_printable(cell))}</{tag}>"
            for cell, mark in zip(cells, marks, strict=True)
        )

    body = "".join(f"<tr>{line('td', cells)}</tr>" for cells in lines)
    return (
        f'<div class="wide"><table><thead><tr>{line("th", headers)}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def text_table(headers: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    """Aligns cells under their headers: the first and a last "note" to the left, numbers right.

    Args:
        headers: One a column.
        lines: Cells, as many as headers.

    Returns:
        Lines without trailing spaces.
    """
    cells = [[_printable(cell) for cell in line] for line in lines]
    table = [list(headers), ["-" * len(header) for header in headers], *cells]
    widths = [max(len(line[column]) for line in table) for column in range(len(headers))]
    table[1] = ["-" * width for width in widths]
    is_left = [column == 0 or header == "note" for column, header in enumerate(headers)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if left else cell.rjust(width)
            for cell, width, left in zip(line, widths, is_left, strict=True)
        ).rstrip()
        for line in table
    )


def _printable(text: str) -> str:
    """Control characters in a name must not reach a terminal."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
