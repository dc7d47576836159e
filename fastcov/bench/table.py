"""Results as tables: with rich in a terminal where it is installed, else as plain text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from fastcov.bench.compare import Changes
from fastcov.bench.contest import Row
from fastcov.bench.results import Result
from fastcov.bench.targets import AT_LEAST, Measure, Outcome, Verdict
from fastcov.show.tables import text_table

try:
    from rich import box
    from rich.console import Console
    from rich.table import Table
except ImportError:
    HAS_RICH = False
else:
    HAS_RICH = True

HEADERS = ("work", "contender", "p50", "p20", "p80", "ratio", "95 %", "over floor", "error")


def seconds(value: float) -> str:
    """A time in the unit that fits.

    Example:
        >>> seconds(0.0000123), seconds(0.004), seconds(2.5)
        ('12.3 us', '4.00 ms', '2.50 s')
    """
    for unit, size in (("s", 1.0), ("ms", 1e-3)):
        if value >= size:
            return (
                f"{value / size:.3g} {unit}" if value >= 10 * size else f"{value / size:.2f} {unit}"
            )
    return f"{value / 1e-6:.3g} us"


def cells(row: Row) -> tuple[str, ...]:
    """One line of the result table."""
    is_reference = row.contender == row.versus
    floor = row.floor_ratio
    return (
        row.work,
        row.contender,
        seconds(row.p50_s),
        seconds(row.p20_s),
        seconds(row.p80_s),
        "1" if is_reference else f"{row.ratio:.3f}",
        "" if is_reference else f"{row.ratio_low:.3f} to {row.ratio_high:.3f}",
        "" if floor is None else f"{floor:.2f} ({row.floor_of})",
        "" if row.error is None else f"{row.error:.0e}",
    )


def note_lines(rows: Sequence[Row]) -> list[str]:
    """Facts that rows carry beyond their times, as sentences."""
    lines = []
    for row in rows:
        for key, value in row.notes.items():
            if key.endswith("_bytes"):
                text = f"{value / 2**20:.1f} MiB"
            elif key.endswith("_s"):
                text = seconds(value) if value > 0 else f"{value:.3g} s"
            else:
                text = f"{value:.5g}" if isinstance(value, float) else str(value)
            lines.append(f"{row.contender}: {key.removesuffix('_bytes').removesuffix('_s')} {text}")
    return lines


def print_result(result: Result) -> None:
    """Printed case: its rows, the machine's rates, and the reasons of missing contenders."""
    title = f"{result.case} on {result.machine['device']}"
    if result.rows:
        print_table(title, HEADERS, list(map(cells, result.rows)))
    else:
        print(f"\n{title}: nothing was measured")
    for line in note_lines(result.rows):
        print(f"  {line}")
    rates = result.rates
    matmul = ", ".join(f"{k} {v:.3g}" for k, v in rates["matmul_tflop_s"].items())
    print(f"  this machine: copy {rates['copy_gb_s']:.3g} GB/s, matmul {matmul} TFLOP/s")
    for name, reason in result.missing.items():
        print(f"  left out: {name}: {reason}")
    for name, reason in result.failures.items():
        print(f"  NOT MEASURED: {name}: {reason}")


TARGET_HEADERS = ("target", "measured", "floor", "over floor", "value", "95 %", "promised", "")


def target_cells(verdict: Verdict) -> tuple[str, ...]:
    """One line of the table of targets; a training step's floor is the untracked step."""
    target = verdict.target
    name = f"{target.work}: {target.contender}"
    if target.measure == "times faster":
        name = f"{target.work}: than {target.contender}"
    sign = "at least" if target.measure in AT_LEAST else "at most"
    promised = f"{sign} {_in_unit(target.measure, target.bound)}"
    if target.ceiling is not None:
        promised += f" ({target.ceiling:.2f}x at best)"
    measured = "" if verdict.measured_s is None else seconds(verdict.measured_s)
    floor = over = ""
    if verdict.floor_s:
        floor = seconds(verdict.floor_s)
        over = "" if verdict.measured_s is None else f"{verdict.measured_s / verdict.floor_s:.2f}"
    value = interval = ""
    if verdict.value is not None and verdict.low is not None and verdict.high is not None:
        value = _in_unit(target.measure, verdict.value)
        low, high = (_in_unit(target.measure, bound) for bound in (verdict.low, verdict.high))
        interval = f"{low} to {high}"
    return name, measured, floor, over, value, interval, promised, verdict.outcome


def _in_unit(measure: Measure, value: float) -> str:
    if measure.startswith("seconds"):
        return seconds(value)
    if measure == "share of floor":
        return f"{value:.0%} of the floor's rate"
    return f"{value:.3f}x" if measure == "times untracked" else f"{value:.2f}x faster"


def print_targets(verdicts: Sequence[Verdict], device: str) -> None:
    """Printed targets beside the measured values; nothing where a device kind has none."""
    if not verdicts:
        return
    title = f"targets on {device or 'no device'}"
    print_table(title, TARGET_HEADERS, list(map(target_cells, verdicts)))
    outcomes = [verdict.outcome for verdict in verdicts]
    print("  " + ", ".join(f"{outcomes.count(one)} {one}" for one in get_args(Outcome)))


def print_changes(changes: Changes) -> None:
    """Printed comparison: rows that moved beyond noise first."""
    headers = ("case", "work", "contender", "A", "B", "B / A", "verdict")
    lines = [
        (
            change.case,
            change.work,
            change.contender,
            seconds(change.before_s),
            seconds(change.after_s),
            f"{change.ratio:.3f}",
            change.verdict,
        )
        for change in sorted(changes.rows, key=lambda change: change.verdict == "same")
    ]
    print_table("what moved", headers, lines)
    source = (
        f"as {changes.drift_from} peers' rows moved"
        if changes.drift_from
        else "assumed: fewer than 5 peers in common"
    )
    print(f"  the machine itself drifts by {changes.drift:.1%} ({source})")
    for warning in changes.warnings:
        print(f"  not the same machine or software: {warning}")
    for name, missing in (("B", changes.only_a), ("A", changes.only_b)):
        for row in missing:
            print(f"  not in {name}: {row}")


def print_table(title: str, headers: Sequence[str], lines: Sequence[Sequence[str]]) -> None:
    """A table on the standard output."""
    if not HAS_RICH:
        print(f"\n{title}\n{text_table(headers, lines)}")
        return
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for position, header in enumerate(headers):
        is_name = position < 2 or header in ("contender", "verdict", "promised", "")
        table.add_column(header, justify="left" if is_name else "right", overflow="fold")
    for line in lines:
        table.add_row(*line)
    console = Console()
    if not console.is_terminal:
        console = Console(width=160)
    console.print(table)
