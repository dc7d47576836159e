"""Coverage of Spectrum.uncertainty by simulation: kinds of rows x rows a channel x spectra.

    python benchmarks/uncertainty_coverage.py [--draws 400] [--channels 12] [--out FILE.md]

A cell is the share of draws in which every eigenvalue lies within its bound at once. N is the
number of rows that the bound is told: where rows are not Gaussian or resemble each other, as many
are drawn as gaussian_rows takes for N. Correlated channels are no kind of their own: they are the
same rows in another basis, which changes no eigenvalue.
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from fastcov.spectra.uncertainty import error_bound, gaussian_rows

ROWS_PER_CHANNEL = (4, 16, 64)
_DRAWS_AT_ONCE = 50
_UNIT = 10**6  # rows
_FREEDOM = 5  # of Student's t
_NEIGHBOUR = 0.8  # share of a row that is the row before
_WHY_WIDE = (
    "The bound is too wide where single values have heavy tails: their kurtosis may also be that "
    "of rows with a scale each, whose covariances are off by more."
)

Draw = Callable[[tuple[int, int, int], torch.Generator], Tensor]


def spectra(channels: int) -> dict[str, Tensor]:
    """Eigenvalues by name, descending. [C] each"""
    ranks = torch.arange(1, channels + 1, dtype=torch.float64)
    return {
        "flat": torch.ones_like(ranks),
        "power law": ranks**-1,
        "steep": ranks**-2,
        "spikes": torch.where(ranks == 1, 100.0, torch.where(ranks == 2, 30.0, 1.0)).double(),
        "step": torch.where(ranks <= channels / 4, 1.0, 0.01).double(),
        "two levels": torch.where(ranks <= channels / 2, 2.0, 1.0).double(),
        "exponential": torch.exp(-4 * ranks / channels),
    }


def gaussian(size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Independent normal values. [draws, N, C]"""
    return torch.randn(size, generator=generator, dtype=torch.float64)


def students(shares_scale: bool) -> Draw:
    """Student's t of unit variance: one scale for each row, or one for each value."""

    def draw(size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
        width = (*size[:2], 1) if shares_scale else size
        squares = sum(gaussian(width, generator).square() for _ in range(_FREEDOM))
        return gaussian(size, generator) / (squares / (_FREEDOM - 2)).sqrt()

    return draw


def laplace(size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Values of Laplace's distribution, of unit variance. [draws, N, C]"""
    first, second = torch.rand((2, *size), generator=generator, dtype=torch.float64).log()
    return (first - second) / 2**0.5


def groups(size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Normal rows, each four times. [draws, N, C]"""
    draws, rows, channels = size
    few = gaussian((draws, -(-rows // 4), channels), generator)
    return few.repeat_interleave(4, 1)[:, :rows]


def neighbours(size: tuple[int, int, int], generator: torch.Generator) -> Tensor:
    """Normal rows, each a share of the row before and something new. [draws, N, C]"""
    rows = gaussian(size, generator)
    for row in range(1, size[1]):
        rows[:, row] = _NEIGHBOUR * rows[:, row - 1] + (1 - _NEIGHBOUR**2) ** 0.5 * rows[:, row]
    return rows


class Kind(NamedTuple):
    """Rows, and the arguments of gaussian_rows that tell of them.

    Attributes:
        draw: Function of (draws, N, C) and a generator that makes rows of unit variance.
        facts: Arguments; empty where the bound is to take the rows for Gaussian and independent.
        family: Name of the kinds that share a mean; None for rows that the bound is not told of.
    """

    draw: Draw
    facts: dict[str, float]
    family: str | None


_TAILS = {"excess_kurtosis": 6 / (_FREEDOM - 4)}
KINDS: dict[str, Kind] = {
    "Gaussian": Kind(gaussian, {}, "Gaussian"),
    "t, 5 degrees, a scale for each row": Kind(students(True), _TAILS, "heavy-tailed"),
    "t, 5 degrees, each value": Kind(students(False), _TAILS, "heavy-tailed"),
    "Laplace, each value": Kind(laplace, {"excess_kurtosis": 3.0}, "heavy-tailed"),
    "each row four times": Kind(groups, {"squared_correlations": 1.5}, "correlated"),
    "0.8 of the row before": Kind(
        neighbours, {"squared_correlations": _NEIGHBOUR**2 / (1 - _NEIGHBOUR**2)}, "correlated"
    ),
    "t, 5 degrees, each value, not told": Kind(students(False), {}, None),
    "each row four times, not told": Kind(groups, {}, None),
}


def coverage(spectrum: Tensor, count: int, kind: Kind, draws: int) -> float:
    """Share of draws in which all eigenvalues are within their bounds at once."""
    channels = len(spectrum)
    drawn = round(count * _UNIT / gaussian_rows(_UNIT, **kind.facts))
    generator = torch.Generator().manual_seed(11)
    covered = 0
    for first in range(0, draws, _DRAWS_AT_ONCE):
        size = (min(_DRAWS_AT_ONCE, draws - first), drawn, channels)
        rows = kind.draw(size, generator) * spectrum.sqrt()
        for sampled in torch.linalg.eigvalsh(rows.mT @ rows / drawn).flip(-1):
            covered += bool(((sampled - spectrum).abs() <= error_bound(sampled, count)).all())
    return covered / draws


def _percent(shares: list[float]) -> str:
    return f"{100 * sum(shares) / len(shares):.1f}"


def main() -> None:
    """Simulates, prints the table and writes it after every row."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--draws", type=int, default=400, help="draws of each cell")
    parser.add_argument("--channels", type=int, default=12, help="channels of a row")
    parser.add_argument("--out", type=Path, help="file for the table, in Markdown")
    options = parser.parse_args()
    torch.set_num_threads(1)
    named = spectra(options.channels)
    head = [
        "# Coverage of Spectrum.uncertainty",
        "",
        f"Promised: 95 %. {options.channels} channels, {options.draws} draws a cell, standard "
        f"error {100 * (0.05 * 0.95 / options.draws) ** 0.5:.1f}. Made by `python "
        "benchmarks/uncertainty_coverage.py`.",
    ]
    table = [
        f"| rows | N / C | {' | '.join(named)} | mean |",
        "| --- | --- |" + " --- |" * (len(named) + 1),
    ]
    by_family: dict[str, list[float]] = {}
    by_kind: dict[str, list[float]] = {}
    for name, kind in KINDS.items():
        for rows in ROWS_PER_CHANNEL:
            count = options.channels * rows
            shares = [coverage(s, count, kind, options.draws) for s in named.values()]
            if kind.family is not None:
                by_family.setdefault(kind.family, []).extend(shares)
                by_kind.setdefault(name, []).extend(shares)
            shares.append(sum(shares) / len(shares))
            cells = " | ".join(f"{100 * share:.1f}" for share in shares)
            table.append(f"| {name} | {rows} | {cells} |")
            means, kinds = (
                "; ".join(f"{one} {_percent(found)}" for one, found in some.items())
                for some in (by_family, by_kind)
            )
            told = [share for found in by_family.values() for share in found]
            summary = (
                f"Mean of the kinds of rows that the bound is told of: {means}. Of single spectra: "
                f"{100 * min(told):.1f} to {100 * max(told):.1f}.\n\nBy kind: {kinds}. {_WHY_WIDE}"
            )
            text = "\n".join([*head, "", summary, "", *table, ""])
            if options.out:
                options.out.write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
