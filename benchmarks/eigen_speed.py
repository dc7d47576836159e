"""Speed of eigvalsh and eigh beside torch.linalg on a CPU: orders x batches x threads, as tables.

    python benchmarks/eigen_speed.py [--budget-s 900] [--least 0.95] [--out FILE.md]

Both take turns; a cell holds torch's time over ours, each the shortest of its samples, which a busy
machine spoils least. A sample holds as many calls as take a third of a millisecond. A third of the
time goes to the cells below 1 alone, whose shortest times may not have been found yet. Cells that
stay below 1 are bold; one below ``--least`` ends the command with status 1.
"""

import argparse
import datetime
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fastcov.bench import machine
from fastcov.bench.eigen import Problem, make_matrices
from fastcov.bench.eigen_families import FAMILIES
from fastcov.ops import eigh, eigvalsh

ORDERS = range(1, 65)
BATCHES = {
    "eigvalsh": (1, 2, 3, 4, 6, 8, 9, 10, 16, 17, 24, 32, 33, 40),
    "eigh": (1, 2, 3, 4, 8, 16, 17, 33, 40),
}
LARGE = ((96, 1), (96, 33), (128, 1), (128, 16), (128, 33), (200, 1), (256, 1), (256, 16))
LARGE += ((257, 16), (288, 16), (320, 16), (384, 1), (512, 1), (1024, 1))
_LARGEST = {"eigvalsh": 1024, "eigh": 256}  # orders: eigh is torch's own there
HARD = ("diagonal", "Wilkinson", "glued Wilkinson", "two values", "two signs", "five rows", "ones")
HARD_ORDERS = (32, 100, 250, 400, 600)
_SAMPLE_S = 3e-4
_SHARE_OF_ALL = 2 / 3  # of the time, for samples of all cells

Solver = Callable[[Tensor], object]
PAIRS: dict[str, tuple[Solver, Solver]] = {
    "eigvalsh": (eigvalsh, torch.linalg.eigvalsh),
    "eigh": (eigh, torch.linalg.eigh),
}


class Cell:
    """Shortest times of ours and torch's for one input."""

    def __init__(self, name: str, threads: int, matrices: Tensor) -> None:
        self.name = name
        self.threads = threads
        self.matrices = matrices
        self.solvers = PAIRS[name]
        self.repeats = 0
        self.samples = 0
        self.shortest = [float("inf"), float("inf")]

    def sample(self, first: int) -> None:
        """Sample of both times, that of index ``first`` before the other."""
        torch.set_num_threads(self.threads)
        if self.repeats == 0:
            # First calls are slow: of several, the shortest tells how many fill a sample.
            once = min(self._time(index, 1) for _ in range(3) for index in (0, 1))
            self.repeats = max(1, int(_SAMPLE_S / once))
        self.samples += 1
        for index in (first, 1 - first):
            self.shortest[index] = min(self.shortest[index], self._time(index, self.repeats))

    def _time(self, index: int, repeats: int) -> float:
        solve, matrices = self.solvers[index], self.matrices
        begin = time.perf_counter()
        for _ in range(repeats):
            solve(matrices)
        return (time.perf_counter() - begin) / repeats

    @property
    def ratio(self) -> float:
        """Torch's time over ours."""
        return self.shortest[1] / self.shortest[0]

    def __str__(self) -> str:
        shape = tuple(self.matrices.shape)
        return f"{self.name} of {shape}, {_threads(self.threads)}: {self.ratio:.3f}"


def main() -> int:
    """Command line: times, prints the tables and writes them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--budget-s", type=float, default=900.0, help="seconds for all samples")
    parser.add_argument("--least", type=float, default=0.95, help="ratio that cells must reach")
    parser.add_argument("--largest", type=int, default=1024, help="largest order")
    parser.add_argument("--out", type=Path, help="file for the tables, in Markdown")
    options = parser.parse_args()
    tables = {
        **{
            (f"{name}, {_kind(dtype)}, {_threads(threads)}", "n", "B"): {
                (n, batch): Cell(name, threads, _covariances(n, batch, dtype))
                for n in ORDERS
                if n <= options.largest
                for batch in BATCHES[name]
            }
            for name in PAIRS
            for threads in (1, 2)
            for dtype in (torch.float32,)
        },
        **{
            (f"{name}, {_kind(dtype)}, larger orders", "n x B", "threads"): {
                (f"{n} x {batch}", threads): Cell(name, threads, _covariances(n, batch, dtype))
                for n, batch in LARGE
                if n <= min(_LARGEST[name], options.largest)
                for threads in (1, 2)
            }
            for name in PAIRS
            for dtype in (torch.float32, torch.float64)
        },
        **{
            (f"eigvalsh, {_kind(dtype)}, one matrix, one thread", "family", "n"): {
                (family, n): Cell("eigvalsh", 1, FAMILIES[family](n).to(dtype))
                for family in HARD
                for n in HARD_ORDERS
                if n <= options.largest
            }
            for dtype in (torch.float32, torch.float64)
        },
    }
    tables = {key: table for key, table in tables.items() if table}
    cells = [cell for table in tables.values() for cell in table.values()]
    begins_at = time.monotonic()
    rounds = 0
    while rounds == 0 or time.monotonic() < begins_at + options.budget_s:
        is_late = time.monotonic() > begins_at + options.budget_s * _SHARE_OF_ALL
        sampled = [cell for cell in cells if not is_late or cell.ratio < 1]
        if not sampled:
            break
        for cell in sampled:
            if rounds > 0 and time.monotonic() > begins_at + options.budget_s:
                break
            cell.sample(rounds % 2)
        rounds += 1
        text = "\n".join([_head(cells), *[_table(*key, table) for key, table in tables.items()]])
        if options.out:
            options.out.write_text(text + "\n", encoding="utf-8")
    print(text)
    slow = [cell for cell in cells if cell.ratio < options.least]
    for cell in slow:
        print(f"below {options.least}: {cell}", file=sys.stderr)
    return 1 if slow else 0


def _kind(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _threads(count: int) -> str:
    return "one thread" if count == 1 else f"{count} threads"


def _covariances(n: int, batch: int, dtype: torch.dtype) -> Tensor:
    problem = Problem("", dtype, ((n, batch),))
    matrices = make_matrices(problem, torch.device("cpu"), seed=0)[0]
    return matrices if batch > 1 else matrices[0]


def _head(cells: list[Cell]) -> str:
    fewest = min(cell.samples for cell in cells)
    described = machine.describe(torch.device("cpu"))
    return (
        "# Speed of eigenvalues and eigenvectors beside torch.linalg\n\n"
        "torch.linalg's time over ours: above 1 ours is faster. Made by `python "
        f"benchmarks/eigen_speed.py`; the shortest of at least {fewest} samples of each. "
        f"{described.get('device')}, torch {torch.__version__}, "
        f"{datetime.datetime.now(datetime.timezone.utc).date()}.\n"
    )


def _table(title: str, row: str, column: str, cells: dict[tuple[object, object], Cell]) -> str:
    rows = list(dict.fromkeys(key[0] for key in cells))
    columns = list(dict.fromkeys(key[1] for key in cells))
    ratios = sorted(cell.ratio for cell in cells.values())
    slower = sum(ratio < 1 for ratio in ratios)
    lines = [
        f"\n## {title}\n",
        f"{len(ratios)} cells: smallest {ratios[0]:.2f}, median {ratios[len(ratios) // 2]:.2f}, "
        f"{slower} below 1.\n",
        f"| {row} \\ {column} | " + " | ".join(map(str, columns)) + " |",
        "| --- |" + " --- |" * len(columns),
    ]
    for r in rows:
        shown = [_shown(cells[r, c].ratio) for c in columns]
        lines.append(f"| {r} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def _shown(ratio: float) -> str:
    return f"**{ratio:.2f}**" if ratio < 1 else f"{ratio:.2f}"


if __name__ == "__main__":
    sys.exit(main())
