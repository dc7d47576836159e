"""Tables and the figure of three pages, from result files: none of their numbers is typed by hand.

    python benchmarks/plot.py                     rewrites what stands between the markers
    python benchmarks/plot.py --check             fails when something differs
    python benchmarks/plot.py --readme README.md  one page alone

Markers are ``<!-- table:DEVICE/NAME -->`` and ``<!-- /table -->``; the figure stands between
``<!-- figure:DEVICE/NAME -->`` and ``<!-- /figure -->``. DEVICE is a folder of benchmarks/results;
without ``DEVICE/`` it is the only CPU there. NAME is one of training, memory, kernels, covariance,
eigen, snapshot, hooks, targets.
"""

import argparse
import os
import re
import sys
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path

from fastcov.bench.contest import Row
from fastcov.bench.hooks import CPU_PATH, GPU_PATH, HEADS_PATH
from fastcov.bench.results import Result, load_results
from fastcov.bench.table import TARGET_HEADERS, seconds, target_cells
from fastcov.bench.targets import judge

RESULTS = Path("benchmarks/results")
PAGES = [Path("README.md"), Path("benchmarks/README.md"), Path("docs/reference/benchmarks.md")]
UNMEASURED = "Not measured yet: `make bench` writes the file that this table is made from."
_MARKER = re.compile(
    r"<!-- (?P<kind>table|figure):(?:(?P<device>[^/ ]+)/)?(?P<name>[a-z0-9_-]+) -->\n"
    r"(?P<body>.*?)<!-- /(?P=kind) -->",
    re.DOTALL,
)
_NETWORKS = {
    "training-resnet50": "ResNet-50",
    "training-resnet50-compiled": "ResNet-50, torch.compile",
    "training-vit": "ViT",
    "training-vit-compiled": "ViT, torch.compile",
    "training-faster_rcnn": "Faster R-CNN",
    "training-faster_rcnn-compiled": "Faster R-CNN, backbone by torch.compile",
}
_KERNELS = {
    "covariance": "one activation, or all 53 of ResNet-50, added to a running covariance",
    "eigen": "eigenvalues of a batch, 1,024 of order 8 to one of order 2,048",
}
EVERY_ROW = "fastcov, every row"
_TRACKED = ("fastcov, default", EVERY_ROW, "naive hooks", "delve")

Results = dict[str, Result]


def markdown(headers: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    ruled = [headers, ["---"] * len(headers), *lines]
    return "".join("| " + " | ".join(line) + " |\n" for line in ruled)


def by_contender(result: Result) -> dict[str, dict[str, Row]]:
    """Rows by work, then by contender."""
    table: dict[str, dict[str, Row]] = {}
    for row in result.rows:
        table.setdefault(row.work, {})[row.contender] = row
    return table


def training_table(results: Results) -> str:
    """Step time over the untracked step's, and what the arithmetic of every row alone would add."""
    lines = []
    for case, rows in _networks(results):
        untracked_s = rows["untracked"].p50_s
        default, every_row, *others = (_ratio(rows.get(name)) for name in _TRACKED)
        gram_s = rows[EVERY_ROW].notes.get("gram_floor_s") if EVERY_ROW in rows else None
        arithmetic = "" if gram_s is None else f"{1 + gram_s / untracked_s:.3f}x"
        ours = (default, every_row, arithmetic)
        lines.append([_NETWORKS[case], seconds(untracked_s), *ours, *others])
    headers = ("training step", "untracked", *_TRACKED[:2])
    return markdown((*headers, "arithmetic of every row", *_TRACKED[2:]), lines)


def memory_table(results: Results) -> str:
    """Peak memory that tracking adds, beside what fastcov.estimate says."""
    lines = []
    for case, rows in _networks(results):
        for name in _TRACKED[:2]:
            notes = rows[name].notes
            if "added_peak_bytes" in notes:
                sizes = ("added_peak_bytes", "estimate_bytes", "untracked_peak_bytes")
                lines.append([_NETWORKS[case], name, *(_mebibytes(notes.get(s)) for s in sizes)])
    headers = ("training step", "contender", "added at the peak", "estimate()", "untracked peak")
    return markdown(headers, lines)


def versus_table(case: str, results: Results) -> str:
    """Ours in seconds and over the floor, everyone else as a multiple of ours."""
    table = by_contender(results[case])
    names = list(dict.fromkeys(name for rows in table.values() for name in rows))
    reference = next(iter(results[case].rows)).versus
    others = [name for name in names if name != reference]
    lines = []
    for work, rows in table.items():
        ours = rows[reference]
        floor = "" if ours.floor_ratio is None else f"{ours.floor_ratio:.2f} ({ours.floor_of})"
        lines.append([work, seconds(ours.p50_s), floor, *(_ratio(rows.get(n)) for n in others)])
    return markdown(("work", reference, "over the floor", *others), lines)


def kernels_table(results: Results) -> str:
    """The three tables of kernels in a line each: ours, and how much longer others take."""
    table = by_contender(results["hooks"])
    hooks = table.get(CPU_PATH) or table[GPU_PATH]  # a GPU has the second only
    ours, empty = (
        max(0.0, hooks[name].notes["per_hook_s"]) for name in (_TRACKED[0], "torch, an empty hook")
    )
    lines = [["one hook, nothing launched", seconds(ours), f"torch's empty hook: {seconds(empty)}"]]
    for case, peer in (("covariance", "torch.mm"), ("eigen", "torch.linalg")):
        table = by_contender(results[case])
        name = next(iter(results[case].rows)).versus
        times = [rows[name].p50_s for rows in table.values() if peer in rows]
        ratios = [rows[peer].ratio for rows in table.values() if peer in rows]
        took = f"{seconds(min(times))} to {seconds(max(times))}"
        lines.append([_KERNELS[case], took, f"{peer}: {min(ratios):.2f}x to {max(ratios):.2f}x"])
    return markdown(("work", "fastcov", "beside"), lines)


def snapshot_table(results: Results) -> str:
    """Latency of a snapshot, and of steps with one among them."""
    lines = [
        [row.work, row.contender, seconds(row.p50_s), seconds(row.p20_s), seconds(row.p80_s)]
        for row in results["snapshot"].rows
    ]
    return markdown(("work", "contender", "p50", "p20", "p80"), lines)


def hooks_table(results: Results) -> str:
    """Host time of one hook, by the path that its rows take."""
    lines = []
    for row in results["hooks"].rows:
        hooks = {
            CPU_PATH: "53 hooks",
            GPU_PATH: "53 hooks, GPU path",
            HEADS_PATH: "40 hooks of heads, GPU path",
        }[row.work]
        one = seconds(max(0.0, row.notes["per_hook_s"]))
        lines.append([hooks, row.contender, seconds(row.p50_s), one])
    return markdown(("hooks", "contender", "all", "one hook"), lines)


def targets_table(results: Results) -> str:
    """Targets beside measured times; a training step's floor is the untracked step."""
    machine = next(iter(results.values())).machine
    rows = {case: result.rows for case, result in results.items()}
    verdicts = judge(machine["kind"], rows, machine["device"])
    headers = [*TARGET_HEADERS[:-1], "outcome"]
    return markdown(headers, [target_cells(verdict) for verdict in verdicts])


TABLES: dict[str, tuple[str, Callable[[Results], str]]] = {
    "training": ("training-resnet50", training_table),
    "memory": ("training-resnet50", memory_table),
    "kernels": ("covariance", kernels_table),
    "covariance": ("covariance", lambda results: versus_table("covariance", results)),
    "eigen": ("eigen", lambda results: versus_table("eigen", results)),
    "snapshot": ("snapshot", snapshot_table),
    "hooks": ("hooks", hooks_table),
    "targets": ("training-resnet50", targets_table),
}


def conditions(result: Result, link: str, said: set[str]) -> str:
    """Place and method of a measurement, without the words that ``said`` already holds."""
    machine, rates = result.machine, result.rates
    versions = machine["versions"]
    peers = ", ".join(
        f"{name} {versions[name]}" for name in ("delve", "torchmetrics", "jax") if name in versions
    )
    level = re.search(r"with (\w+) kernels", machine.get("backends", {}).get("cpu", ""))
    code = f"{level[1]} kernels" if level else machine["cpu_capability"]
    where = f"{machine['device']}, {code}, {machine['threads']} threads"
    if machine["kind"] == "cuda":
        where = f"{machine['device']}, driver {machine['driver']}"
    matmul = rates["matmul_tflop_s"]["bfloat16" if machine["kind"] == "cuda" else "float32"]
    about = "; ".join([where, f"torch {versions['torch']}", *([peers] if peers else [])])
    parts = [
        "The same machine" if about in said else about,
        f"measured in the same run: copy {rates['copy_gb_s']:.3g} GB/s, matmul {matmul:.3g} "
        "TFLOP/s",
        result.started[:10],
        f"[file]({link})",
    ]
    meaning = "Medians; in brackets the 95 % interval of the median ratio."
    if any(row.statistic == "mean" for row in result.rows):
        meaning = "Median times, mean ratios; in brackets the mean's 95 % interval."
    addition = "" if meaning in said else f" {meaning}"
    said.update((about, meaning))
    return "; ".join(parts) + f".{addition}"


def overhead_svg(results: Results) -> str:
    """Bars of the step time over the untracked step's, with intervals: one group a network."""
    colours = ("#0b7285", "#66b3c2", "#adb5bd", "#868e96")
    bar, gap, left, width = 15, 16, 190, 430
    groups = [(name, rows) for name, rows in _networks(results)]
    most = max(row.ratio_high for _, rows in groups for name in _TRACKED if (row := rows.get(name)))
    scale = width / (max(1.1, most) - 1)
    parts, y = [], 34
    for case, rows in groups:
        present = [(i, name, rows[name]) for i, name in enumerate(_TRACKED) if name in rows]
        middle = y + bar * len(present) / 2 + 4
        parts.append(_text(8, middle, _NETWORKS[case], "start", "bold"))
        for i, _name, row in present:
            length = max(1.0, (row.ratio - 1) * scale)
            low, high = (left + max(0.0, (v - 1) * scale) for v in (row.ratio_low, row.ratio_high))
            centre = y + bar / 2
            parts.append(
                f'<rect x="{left}" y="{y + 2:.1f}" width="{length:.1f}" height="{bar - 4}" '
                f'fill="{colours[i]}"/>'
                f'<path d="M{low:.1f} {centre:.1f}H{high:.1f}" stroke="#212529"/>'
            )
            label = f"{100 * (row.ratio - 1):+.1f} %"
            parts.append(_text(max(high, left + length) + 6, y + bar - 3, label, "start", "normal"))
            y += bar
        y += gap
    x = left
    for i, name in enumerate(_TRACKED):
        parts.append(f'<rect x="{x}" y="10" width="10" height="10" fill="{colours[i]}"/>')
        parts.append(_text(x + 14, 19, name, "start", "normal"))
        x += 26 + 7 * len(name)
    parts.append(f'<path d="M{left} 28V{y - gap + 4}" stroke="#212529"/>')
    parts.append(_text(left, y + 2, "time added to a training step", "start", "normal"))
    height = y + 12
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {left + width + 80} {height}" '
        'font-family="sans-serif" font-size="12">\n'
        f'<rect width="100%" height="100%" fill="white"/>\n' + "\n".join(parts) + "\n</svg>\n"
    )


def _text(x: float, y: float, words: str, anchor: str, weight: str) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-weight="{weight}">'
        f"{escape(words)}</text>"
    )


def _networks(results: Results) -> list[tuple[str, dict[str, Row]]]:
    found = []
    for case in _NETWORKS:
        if case in results and results[case].rows:
            found.append((case, {row.contender: row for row in results[case].rows}))
    return found


def _ratio(row: Row | None) -> str:
    if row is None:
        return "not run"
    return f"{row.ratio:.3f}x ({row.ratio_low:.3f} to {row.ratio_high:.3f})"


def _mebibytes(value: float | None) -> str:
    return "" if value is None else f"{value / 2**20:.0f} MiB"


def _only_cpu(folder: Path) -> str | None:
    names = sorted(path.name for path in folder.glob("cpu-*") if path.is_dir())
    if len(names) > 1:
        raise ValueError(
            f"{RESULTS} has several CPUs ({', '.join(names)}): name one, as in "
            f"<!-- table:{names[0]}/training -->"
        )
    return names[0] if names else None


def render(text: str, root: Path, folder: Path) -> tuple[str, dict[Path, str]]:
    """A page with every marked part made anew, and the pictures that belong to it.

    Args:
        text: The page.
        root: Folder that holds benchmarks/results.
        folder: Of the page, which links start from.

    Returns:
        The new text, and the content of each picture by its path under root.

    Raises:
        ValueError: If a marker asks for a table that is not known or was not measured.
    """
    pictures: dict[Path, str] = {}
    said: set[str] = set()

    def link(path: Path) -> str:
        return Path(os.path.relpath(root / path, folder)).as_posix()

    def fill(match: re.Match[str]) -> str:
        name, kind = match["name"], match["kind"]
        if name not in TABLES:
            raise ValueError(f"no table {name!r}; tables: {', '.join(TABLES)}")
        opening = match[0].split("\n", 1)[0]
        device = match["device"] or _only_cpu(root / RESULTS)
        if device is None:
            return f"{opening}\n{UNMEASURED}\n<!-- /{kind} -->"
        results = load_results(root / RESULTS / device)
        case, make = TABLES[name]
        if case not in results or not results[case].rows:
            raise ValueError(
                f"{device}/{name} needs {RESULTS / device / case}.json, which was not measured: "
                f"run 'fastcov bench --only {case}' on that machine"
            )
        if kind == "figure":
            path = RESULTS / device / f"{name}.svg"
            pictures[path] = overhead_svg(results)
            body = f"![Time that tracking adds to a training step]({link(path)})\n"
        else:
            body = "\n" + make(results) + "\n"
        origin = conditions(results[case], link(RESULTS / device / f"{case}.json"), said)
        return f"{opening}\n{body}{origin}\n<!-- /{kind} -->"

    return _MARKER.sub(fill, text), pictures


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: rewrites pages, or checks them.

    Returns:
        0; 1 if ``--check`` found a difference; 2 if a table cannot be made.
    """
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--readme", type=Path, nargs="+", default=PAGES, metavar="PAGE")
    parser.add_argument("--check", action="store_true", help="change nothing, fail on a difference")
    options = parser.parse_args(arguments)
    wanted: dict[Path, str] = {}
    for page in options.readme:
        folder = page.resolve().parent
        above = (folder, *folder.parents)
        root = next((one for one in above if (one / RESULTS).is_dir()), folder)
        try:
            wanted[page], pictures = render(page.read_text(encoding="utf-8"), root, folder)
        except (OSError, ValueError) as error:
            print(f"{page}: {error}", file=sys.stderr)
            return 2
        wanted |= {root / path: svg for path, svg in pictures.items()}
    differing = [
        path
        for path, content in wanted.items()
        if not path.is_file() or path.read_text(encoding="utf-8") != content
    ]
    if options.check:
        for path in differing:
            print(f"{path} differs from the result files: run 'make readme-tables'")
        return 1 if differing else 0
    for path in differing:
        path.write_text(wanted[path], encoding="utf-8")
        print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
