"""Worst errors of the eigenvalue operators on a CPU: families x paths x orders, as one table.

    python benchmarks/eigen_accuracy.py [--largest 2048] [--out FILE.md]

Truth is LAPACK in float64 of the same rounded matrix. An error is relative to the largest
eigenvalue; of eigenvectors it is the largest entry of A V - V L, so relative, or of V^T V - I. An
interval of count_above that excludes the truth ends the command with status 1.
"""

import argparse
import datetime
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastcov.bench import machine
from fastcov.bench.eigen_families import FAMILIES
from fastcov.ops import aten_eigen, count_above, eigh, eigvalsh
from fastcov.ops.reference import count_tolerance, eigenvalue_tolerance, eigvalsh_reference

# Each band first, so that a run that is cut short has seen all of them.
ORDERS = (2, 8, 17, 32, 33, 64, 128, 255, 256, 320, 512, 1024)
ORDERS += (1, 3, 4, 5, 6, 7, 12, 16, 24, 48, 65, 100, 129, 180, 200, 2048, 257, 288, 321, 400, 511)
ORDERS += (307, 513, 700)
BANDS = ((1, 32), (33, 64), (65, 128), (129, 256), (257, 511), (512, 1024), (1025, 2048))
BATCH = 20  # matrices side by side in vectors, and some left
FEWER = ("cluster", "two clusters", "exchange", "flip", "reflector", "ones", "random", "covariance")
FEWER += (
    "dlatms mode 3",
    "Wilkinson",
    "glued Wilkinson",
    "Hilbert",
)  # above order 256, where a truth takes long

Worst = dict[tuple[str, int], tuple[float, str]]


def main() -> int:
    """Command line: measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--largest", type=int, default=2048, help="largest order")
    parser.add_argument("--out", type=Path, help="file for the table, in Markdown")
    options = parser.parse_args()
    worst: Worst = {}
    wrong: list[str] = []
    seen = []
    for n in (order for order in ORDERS if order <= options.largest):
        for name in FEWER if n > 256 else FAMILIES:
            for dtype in (torch.float32, torch.float64) if n <= 1024 else (torch.float32,):
                _measure(name, n, FAMILIES[name](n).to(dtype), worst, wrong)
        seen.append(n)
        text = _table(worst, wrong, sorted(seen))
        if options.out:
            options.out.write_text(text, encoding="utf-8")
    print(text)
    return 1 if wrong else 0


def _measure(name: str, n: int, matrix: Tensor, worst: Worst, wrong: list[str]) -> None:
    exact = eigvalsh_reference(matrix)
    size = max(float(exact.abs().max()), 1e-300)
    kind = str(matrix.dtype).removeprefix("torch.")
    band = next(index for index, (_, last) in enumerate(BANDS) if n <= last)

    def note(path: str, error: float) -> None:
        if error > worst.get((path, band), (-1.0, ""))[0]:
            worst[path, band] = error, f"{name}, {n}"

    def values(path: str, solve: Callable[[], Tensor]) -> None:
        note(f"{kind}: {path}", float((solve().double() - exact).abs().max()) / size)

    torch.set_num_threads(1)
    values("eigvalsh, one matrix", lambda: eigvalsh(matrix))
    if n <= 512:
        values(f"eigvalsh, batch of {BATCH}", lambda: eigvalsh(matrix.expand(BATCH, n, n))[4])
    if n >= 512:
        torch.set_num_threads(2)
        values("eigvalsh, one matrix on 2 threads", lambda: eigvalsh(matrix))
        torch.set_num_threads(1)
    values("FASTCOV_BACKEND=torch", lambda: aten_eigen.eigvalsh([matrix])[0])
    if matrix.dtype == torch.float32:  # in float64 it is the truth
        values("torch.linalg.eigvalsh", lambda: torch.linalg.eigvalsh(matrix))
    vectors = [("eigh, one matrix", matrix[None])]
    if n <= 32:
        vectors.append((f"eigh, batch of {BATCH}", matrix.expand(BATCH, n, n)))
    for path, batch in vectors if n <= 1024 else ():
        system = eigh(batch if len(batch) > 1 else batch[0])
        basis = system.eigenvectors.reshape(-1, n, n)[-1].double()
        scaled = system.eigenvalues.reshape(-1, n)[-1].double() / size
        residual = matrix.double() / size @ basis - basis * scaled
        gram = basis.T @ basis - torch.eye(n)
        note(f"{kind}: {path}, A V - V L", float(residual.abs().max()))
        note(f"{kind}: {path}, V^T V - I", float(gram.abs().max()))
    wrong += [f"{kind} {name} {n}: {text}" for text in _wrong_counts(matrix, exact, size)]


def _wrong_counts(matrix: Tensor, exact: Tensor, size: float) -> list[str]:
    # Thresholds beside every eigenvalue, from within the interval's width to a millionth.
    n = len(exact)
    some = exact if n <= 128 else exact[torch.linspace(0, n - 1, 33).long()]
    width = count_tolerance(n) * float((exact / size).square().sum().sqrt()) * size
    steps = torch.tensor([0.0, 0.5, 1.5, 1e3], dtype=torch.float64) * width
    steps = torch.cat([steps, torch.tensor([1e-6 * size], dtype=torch.float64)])
    taus = torch.cat([(some[:, None] + sign * steps).flatten() for sign in (-1, 1)])
    # The oracle is right within this.
    doubt = 1e-14 * n**0.5 * size
    surely = (exact > taus[:, None] + doubt).sum(-1)
    possibly = (exact > taus[:, None] - doubt).sum(-1)
    counts = [("one matrix", count_above(matrix, taus))]
    if n <= 512:
        low, high = count_above(matrix.expand(BATCH, n, n), taus)
        counts.append((f"batch of {BATCH}", type(counts[0][1])(low[4], high[4])))
    if n <= 1024:
        low, high = aten_eigen.count_above([matrix.double()], [taus])[0].unbind(-1)
        counts.append(("FASTCOV_BACKEND=torch", type(counts[0][1])(low, high)))
    return [
        f"count_above, {path}"
        for path, (low, high) in counts
        if not bool(((low <= possibly) & (surely <= high)).all())
    ]


def _table(worst: Worst, wrong: list[str], orders: list[int]) -> str:
    described = machine.describe(torch.device("cpu"))
    paths = sorted({path for path, _ in worst})
    lines = [
        "# Worst errors of eigenvalues and eigenvectors",
        "",
        f"{len(FAMILIES)} families of fastcov/bench/eigen_families.py ({len(FEWER)} above order "
        "256); made by `python benchmarks/eigen_accuracy.py`. Relative to the largest eigenvalue; "
        "family and order of each maximum in brackets.",
        "",
        f"Orders: {', '.join(map(str, orders))}.",
        "",
        f"{described.get('device')}, torch {torch.__version__}, "
        f"{datetime.datetime.now(datetime.timezone.utc).date()}. Intervals of count_above that "
        f"exclude the truth: {len(wrong)}.",
        "",
        "| path | " + " | ".join(f"n = {a} to {b}" for a, b in BANDS) + " |",
        "| --- |" + " --- |" * len(BANDS),
    ]
    for path in paths:
        cells = [
            f"{worst[path, band][0]:.1e} ({worst[path, band][1]})" if (path, band) in worst else ""
            for band in range(len(BANDS))
        ]
        lines.append(f"| {path} | " + " | ".join(cells) + " |")
    for kind in (torch.float32, torch.float64):
        name = str(kind).removeprefix("torch.")
        cells = [f"{eigenvalue_tolerance(last, kind):.1e}" for _, last in BANDS]
        lines.append(f"| {name}: stated of eigvalsh | " + " | ".join(cells) + " |")
    cells = [f"{count_tolerance(last):.1e}" for _, last in BANDS]
    lines.append("| interval of count_above, of the Frobenius norm | " + " | ".join(cells) + " |")
    return "\n".join([*lines, "", *wrong]).rstrip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
