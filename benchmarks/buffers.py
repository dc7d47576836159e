"""Time of adding buffered rows to a state, by the number of rows that are added at once.

Every update reads and writes the whole state: few rows at a time cost more each, many rows need a
larger buffer. stats/buffering.py chooses the sizes from this table:

    python benchmarks/buffers.py --out benchmarks/results/buffers.md
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch

from fastcov.bench.machine import device_name
from fastcov.ops.backend import service_of
from fastcov.ops.covariance import Moments
from fastcov.ops.library import ACCUMULATE

CHANNELS = (64, 128, 256, 384, 512, 768, 1024, 1536, 2048)
ROWS = (32, 64, 128, 192, 288, 384, 512, 768, 1024, 2048)
STATES_BYTES = 96 << 20  # in turn, so that each comes from memory, as in a model of many layers
LEAST_S = 0.02


def main() -> None:
    """Command line: measures, prints the table and writes it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=25)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    lines = [
        "# Microseconds a row, by the rows that are added to a state at once",
        "",
        f"{device_name(torch.device('cpu'))}, float32 rows, 20th percentile of "
        f"{arguments.rounds} interleaved rounds; made by `python benchmarks/buffers.py`.",
        "",
        "| channels | " + " | ".join(f"{rows} rows" for rows in ROWS) + " |",
        "|---" * (len(ROWS) + 1) + "|",
    ]
    for channels in CHANNELS:
        found = per_row(channels, arguments.rounds)
        cells = (f"{found[rows] * 1e6:.3g}" if rows in found else "" for rows in ROWS)
        lines.append(f"| {channels} | " + " | ".join(cells) + " |")
        print(lines[-1], flush=True)
    if arguments.out is not None:
        arguments.out.write_text("\n".join(lines) + "\n", encoding="utf-8")


def per_row(channels: int, rounds: int) -> dict[int, float]:
    """Seconds a row, by the number of rows at once."""
    count = max(2, min(64, STATES_BYTES // (4 * channels**2)))
    states = [tuple(vars(Moments(channels)).values()) for _ in range(count)]
    sizes = [rows for rows in ROWS if channels / 8 <= rows <= 2 * channels]
    buffer = torch.randn(max(sizes), channels)
    accumulate_ = ACCUMULATE[service_of(buffer.dtype, buffer.device).kernels]
    for state in states:
        accumulate_(*state, buffer, -1)
    found: dict[int, list[float]] = {rows: [] for rows in sizes}
    turn = 0
    for number in range(rounds):
        for rows in sizes if number % 2 else reversed(sizes):
            part, calls = buffer[:rows], 0
            start = time.perf_counter()
            while calls < 2 or time.perf_counter() - start < LEAST_S:
                accumulate_(*states[turn % count], part, -1)
                turn, calls = turn + 1, calls + 1
            found[rows].append((time.perf_counter() - start) / (calls * rows))
    # Other work on the machine makes times longer, never shorter.
    return {rows: statistics.quantiles(times, n=5)[0] for rows, times in found.items()}


if __name__ == "__main__":
    main()
