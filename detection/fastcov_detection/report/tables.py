"""A search in words and one table."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from fastcov_detection.search.arms import BASELINE, SEARCHED
from fastcov_detection.search.results import verdict_of
from fastcov_detection.search.verdicts import LARGEST_LOSS, mean_and_error

COLUMNS = (
    "arm",
    "params,\nM",
    "backbone\nparams, M",
    "MACs,\nG",
    "AP",
    "AP50",
    "wall s\na run",
    "ms per\nimage",
    "seeds",
)


def rows(result: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of text for each arm; changes are from the baseline, spreads standard errors."""
    arms = result["arms"]
    baseline = arms.get(BASELINE)
    metrics = ("ap", "ap50", "segm_ap") if _has_masks(result) else ("ap", "ap50")
    table = []
    for name, arm in arms.items():
        share = "" if baseline in (None, arm) else _change(arm, baseline)
        row = [
            name,
            f"{arm['params'] / 1e6:.3f}",
            f"{arm['backbone_params'] / 1e6:.3f}{share}",
            f"{arm['macs'] / 1e9:.3f}",
        ]
        row += [_spread(arm["runs"], metric) for metric in metrics]
        seconds = [run["train_s"] for run in arm["runs"]]
        row.append(f"{sum(seconds) / len(seconds):.0f}")
        row.append("-" if arm["latency_ms"] is None else f"{arm['latency_ms']:.1f}")
        row.append(str(len(arm["runs"])))
        table.append(tuple(row))
    return table


def columns(result: Mapping[str, Any]) -> tuple[str, ...]:
    """Headings of :func:`rows`; masks bring one more."""
    return (*COLUMNS[:6], "mask AP", *COLUMNS[6:]) if _has_masks(result) else COLUMNS


def sentences(result: Mapping[str, Any]) -> list[str]:
    """Conclusions that the numbers of a search allow, and those that they do not."""
    found = []
    searched, baseline = result["arms"].get(SEARCHED), result["arms"].get(BASELINE)
    # An arm with one seed, a peer or one of a search that was stopped, silences no other.
    is_single = max(len(arm["runs"]) for arm in result["arms"].values()) < 2
    if searched and baseline:
        fewer = _words(searched["backbone_params"], baseline["backbone_params"])
        macs = 100 * searched["macs"] / baseline["macs"]
        text = (
            f"The searched network has {fewer} backbone parameters than the baseline "
            f"({searched['backbone_params'] / 1e6:.2f} against "
            f"{baseline['backbone_params'] / 1e6:.2f} million) at {macs:.1f} % of its MACs; its AP "
            f"is {_with_seeds(searched['runs'])}, the baseline's {_with_seeds(baseline['runs'])}"
        )
        found.append(f"{text}, from which nothing follows." if is_single else f"{text}.")
    if is_single:
        found.append(
            "One seed shows that every step works and the cost of each network; it cannot show "
            "which network is more accurate, because a second seed could turn any of these "
            "differences round. Several seeds (search --seeds N) give paired differences with "
            "standard errors."
        )
        return found
    for comparison in result["comparisons"]:
        spread = "" if comparison["se"] is None else f" ± {comparison['se']:.4f}"
        found.append(
            f"{comparison['arm']} against {comparison['versus']}, {comparison['metric']}: "
            f"{comparison['mean']:+.4f}{spread} (n = {comparison['n']}): {verdict_of(comparison)}."
        )
    found.append(
        'Differences are paired by seed, ± one standard error; "no loss" means that their '
        f'one-sided 95 % lower bound is above {LARGEST_LOSS}, "better" that it is above 0. '
        "There is no correction for the number of comparisons "
        f"({len(result['comparisons'])}): where nothing differs, one in twenty would be shown by "
        "chance."
    )
    return found


def coco_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """COCO's numbers of every arm, means over its seeds: headings and a row for each number."""
    headings, lines = _means(result, "number", lambda run: run.get("numbers"))
    lines.sort(key=lambda line: line[0].startswith("segm"))
    return headings, [line for line in lines if set(line[1:]) != {"-"}]


def class_rows(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """AP of every class for every arm, means over its seeds: headings and a row for each class."""
    return _means(result, "class", lambda run: (run.get("classes") or {}).get("ap"))


def _means(
    result: Mapping[str, Any], heading: str, read: Callable[[Mapping[str, Any]], Any]
) -> tuple[list[str], list[list[str]]]:
    """Means over the seeds of numbers that runs have by name; no line where no run has any."""
    arms = {
        name: [found for run in arm["runs"] if (found := read(run))]
        for name, arm in result["arms"].items()
    }
    arms = {name: runs for name, runs in arms.items() if runs}
    lines = []
    for name in next(iter(arms.values()), [{}])[0]:
        values = (
            [run[name] for run in runs if run.get(name) is not None] for runs in arms.values()
        )
        lines.append([name, *(f"{sum(v) / len(v):.3f}" if v else "-" for v in values)])
    return [heading, *arms], lines


def print_summary(result: Mapping[str, Any], console: Console | None = None) -> None:
    """Printed table and sentences."""
    # Where no terminal says otherwise, the width that the table with spreads needs.
    console = console or Console(width=None if sys.stdout.isatty() else 110)
    console.print(terminal_table(columns(result), rows(result)))
    for sentence in sentences(result):
        console.print(sentence, markup=False, highlight=False)


def terminal_table(headings: Sequence[str], lines: Iterable[Sequence[str]]) -> Table:
    """Table for a terminal: names in the first column, numbers at the right in the others."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="left" if index == 0 else "right", no_wrap=True)
    for line in lines:
        table.add_row(*line)
    return table


def _has_masks(result: Mapping[str, Any]) -> bool:
    return any(run["segm_ap"] is not None for arm in result["arms"].values() for run in arm["runs"])


def _change(arm: Mapping[str, Any], baseline: Mapping[str, Any]) -> str:
    return f" ({100 * (arm['backbone_params'] / baseline['backbone_params'] - 1):+.0f} %)"


def _words(value: float, reference: float) -> str:
    change = 100 * (value / reference - 1)
    return f"{abs(change):.1f} % {'fewer' if change < 0 else 'more'}"


def _spread(runs: list[dict[str, Any]], metric: str) -> str:
    values = [run[metric] for run in runs if run[metric] is not None]
    if not values:
        return "-"
    mean, error = mean_and_error(values)
    return f"{mean:.3f}" if error is None else f"{mean:.3f}±{error:.3f}"


def _with_seeds(runs: list[dict[str, Any]]) -> str:
    seeds = "one seed" if len(runs) == 1 else f"{len(runs)} seeds"
    return f"{_spread(runs, 'ap')} ({seeds})"
