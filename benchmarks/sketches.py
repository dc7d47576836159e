"""Errors of spectra that were estimated from sketches: kinds of sketch x spectra x widths.

    python benchmarks/sketches.py [--channels 1024] [--trials 24] [--out FILE.md]

Covariances have power-law spectra along random directions, without and with three sinks: channels
whose variance is 10, 3 and 1 times the trace of the rest. Every kind of sketch is given as many
numbers, r x r (Nystroem's, which keeps C x k, has k = r^2 / C). The kind that the package uses is
the first; an eigenvalue outside of its interval ends the command with status 1.
"""

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastcov.spectra.sketched import estimated_eigenvalues, squared_norm
from fastcov.spectra.spectrum import Spectrum
from fastcov.stats.sketch import Sketch

EXPONENTS = (0.5, 1.0, 1.5, 2.0)
SINKS = (10.0, 3.0, 1.0)  # times the trace of the rest
WIDTHS = (64, 256)
LARGEST = 8  # eigenvalues whose mean error is told


def covariance(exponent: float, has_sinks: bool, channels: int) -> Tensor:
    """Covariance of a power law along random directions. [C, C]"""
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(channels, channels, generator=generator, dtype=torch.float64)
    directions = torch.linalg.qr(normal).Q
    values = torch.arange(1, channels + 1, dtype=torch.float64) ** -exponent
    matrix = (directions * values) @ directions.T
    if has_sinks:
        places = torch.randperm(channels, generator=generator)[: len(SINKS)]
        matrix[places, places] += values.sum() * torch.tensor(SINKS, dtype=torch.float64)
    return matrix


def signs(channels: int, width: int, generator: torch.Generator) -> Tensor:
    """Random signs over the root of r."""
    bits = torch.randint(0, 2, (channels, width), generator=generator)
    return (2.0 * bits.double() - 1) / math.sqrt(width)


def gaussian(channels: int, width: int, generator: torch.Generator) -> Tensor:
    """Independent normal entries."""
    normal = torch.randn(channels, width, generator=generator, dtype=torch.float64)
    return normal / math.sqrt(width)


def orthonormal(channels: int, width: int, generator: torch.Generator) -> Tensor:
    """A random subspace, scaled to keep the trace."""
    basis = torch.linalg.qr(gaussian(channels, width, generator)).Q
    return basis * math.sqrt(channels / width)


def sparse(channels: int, width: int, generator: torch.Generator, entries: int = 4) -> Tensor:
    """Few signs a row, one in each block of columns; as many rows a column."""
    matrix = torch.zeros(channels, width, dtype=torch.float64)
    block = width // entries
    for number in range(entries):
        columns = number * block + torch.randperm(channels, generator=generator) % block
        bits = torch.randint(0, 2, (channels,), generator=generator)
        matrix[torch.arange(channels), columns] = (2.0 * bits.double() - 1) / math.sqrt(entries)
    return matrix


def count(channels: int, width: int, generator: torch.Generator) -> Tensor:
    """One sign a row: CountSketch."""
    return sparse(channels, width, generator, entries=1)


PROJECTIONS: dict[str, Callable[[int, int, torch.Generator], Tensor]] = {
    "signs": signs,
    "Gaussian": gaussian,
    "orthonormal": orthonormal,
    "4 signs a row": sparse,
    "CountSketch": count,
}


def projected_spectrum(matrix: Tensor, projection: Tensor) -> Spectrum:
    """Spectrum estimated from a projection, by the package's own functions."""
    sketch = projection.T @ matrix @ projection
    total = float(matrix.trace())
    squares = float(squared_norm(sketch))
    values, facts = estimated_eigenvalues(
        torch.linalg.eigvalsh(sketch), squares, len(matrix), total
    )
    return Spectrum(values, count=0, total=total, sketch=facts)


def nystroem_spectrum(matrix: Tensor, width: int, generator: torch.Generator) -> Spectrum:
    """Spectrum of the best completion of S times a C x k matrix (Tropp et al. 2017)."""
    columns = max(2, width**2 // len(matrix))
    test = torch.linalg.qr(gaussian(len(matrix), columns, generator)).Q
    seen = matrix @ test
    seen = seen + 1e-12 * seen.norm() * test
    factor = torch.linalg.cholesky(test.T @ seen)
    half = torch.linalg.solve_triangular(factor, seen.T, upper=False)
    values = torch.linalg.svdvals(half).square()
    values = torch.cat([values, values.new_zeros(len(matrix) - columns)])
    return Spectrum(values, count=0, total=float(matrix.trace()))


def errors(found: Spectrum, truth: Spectrum) -> dict[str, float]:
    """Relative errors of the measures."""
    largest, true_largest = found.eigenvalues[:LARGEST], truth.eigenvalues[:LARGEST]
    head = (largest.clamp(min=1e-300) / true_largest).log().abs().mean().exp() - 1
    pairs = {
        "largest": (float(largest[0]), float(true_largest[0])),
        "part. ratio": (found.participation_ratio(), truth.participation_ratio()),
        "stable rank": (
            found.total / float(largest[0]),
            truth.total / float(true_largest[0]),
        ),
        "eff. rank": (found.effective_rank(), truth.effective_rank()),
        "dim": (found.dim(), truth.dim()),
    }
    return {"first 8": float(head)} | {name: a / b - 1 for name, (a, b) in pairs.items()}


MEASURES = ("largest", "first 8", "part. ratio", "stable rank", "eff. rank", "dim")


def cell(values: list[float], shows_bias: bool) -> str:
    """Root mean square error in per cent, with the mean error where that is told."""
    tensor = torch.tensor(values)
    rms = 100 * float(tensor.square().mean().sqrt())
    shown = "> 999" if rms > 999 else f"{rms:.1f}" if rms < 9.95 else f"{rms:.0f}"
    return f"{shown} ({100 * float(tensor.mean()):+.1f})" if shows_bias else shown


def main() -> int:
    """Command line: measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--channels", type=int, default=1024)
    parser.add_argument("--trials", type=int, default=24)
    parser.add_argument("--out", type=Path, help="file for the table, in Markdown")
    options = parser.parse_args()
    channels = options.channels
    lines = [
        f"Root mean square errors in per cent over {options.trials} sketches of {channels} "
        "channels, in parentheses the mean error. Made by `python benchmarks/sketches.py`.",
        "",
        "| exponent | sinks | r | sketch | " + " | ".join(MEASURES) + " | outside interval |",
        "|" + "---|" * (5 + len(MEASURES)),
    ]
    outside_of_signs = 0
    for exponent in EXPONENTS:
        for has_sinks in (False, True):
            matrix = covariance(exponent, has_sinks, channels)
            truth = Spectrum(torch.linalg.eigvalsh(matrix), count=0, total=float(matrix.trace()))
            for width in WIDTHS:
                for kind in (*PROJECTIONS, "Nystroem"):
                    found: dict[str, list[float]] = {name: [] for name in MEASURES}
                    outside = 0
                    for trial in range(options.trials):
                        generator = torch.Generator().manual_seed(trial)
                        if kind == "Nystroem":
                            spectrum = nystroem_spectrum(matrix, width, generator)
                        else:
                            projection = PROJECTIONS[kind](channels, width, generator)
                            spectrum = projected_spectrum(matrix, projection)
                            lower, upper = spectrum.interval
                            is_out = (truth.eigenvalues < lower * (1 - 1e-9)) | (
                                truth.eigenvalues > upper * (1 + 1e-9)
                            )
                            outside += bool(is_out.any())
                        for name, error in errors(spectrum, truth).items():
                            found[name].append(error)
                    outside_of_signs += outside if kind == "signs" else 0
                    cells = [cell(found[name], kind == "signs") for name in MEASURES]
                    share = "" if kind == "Nystroem" else f"{outside} of {options.trials}"
                    sinks = "3" if has_sinks else ""
                    lines.append(
                        f"| {exponent:g} | {sinks} | {width} | {kind} | {' | '.join(cells)} | "
                        f"{share} |"
                    )
                    print(lines[-1], flush=True)
    text = "\n".join([*lines, ""])
    if options.out:
        options.out.write_text(text, encoding="utf-8")
    shipped = Sketch(channels, WIDTHS[0])
    assert shipped.project(torch.eye(channels)).shape == (channels, WIDTHS[0] + 1)
    return 1 if outside_of_signs else 0


if __name__ == "__main__":
    sys.exit(main())
