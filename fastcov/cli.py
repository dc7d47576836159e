"""Command line: ``fastcov doctor | bench | report | compare``."""

import argparse
import importlib
import os
import platform
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import NoReturn

import torch

import fastcov
from fastcov.show.tables import comparison_legend, comparison_rows, text_table
from fastcov.spectra.compare import compare_histories

_OPTIONAL = (
    *("numpy", "triton", "torchvision", "matplotlib", "jinja2", "rich"),
    *("lightning", "transformers", "tensorboard", "wandb"),
)


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help shows the usage)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of the program: runs one command.

    Args:
        argv: Arguments after the program's name; None takes the process's.

    Returns:
        Exit code: 0, or 2 after one line about the error.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        if arguments[:1] == ["bench"]:
            return int(importlib.import_module("fastcov.bench").main(arguments[1:]))
        options = _parser().parse_args(arguments)
        options.run(options)
    except (ValueError, OSError, ImportError) as error:
        print(f"fastcov: {_one_line(error)}", file=sys.stderr)
        return 2
    return 0


def _one_line(error: Exception) -> str:
    # An OSError raised with a text of its own needs no "[Errno 28]" before it.
    if isinstance(error, OSError) and error.filename is None and error.strerror:
        return " ".join(error.strerror.split())
    return " ".join(str(error).split())


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(prog="fastcov", description="How many directions each layer uses.")
    parser.add_argument("--version", action="version", version=f"fastcov {fastcov.__version__}")
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="command", parser_class=_OneLineParser
    )
    doctor = commands.add_parser("doctor", help="versions, devices, active kernels and why")
    doctor.set_defaults(run=_doctor)
    commands.add_parser("bench", help="measure this machine (fastcov bench --help)")
    report = commands.add_parser("report", help="one HTML page about one training")
    report.set_defaults(run=_report)
    report.add_argument("folder", type=Path, help="folder that was out= of fastcov.track")
    report.add_argument("--out", type=Path, help="page to write (default: FOLDER/report.html)")
    report.add_argument("--title", help="heading (default: the folder)")
    compare = commands.add_parser("compare", help="how the spectra of two trainings differ")
    compare.set_defaults(run=_compare)
    compare.add_argument("folder_a", type=Path, help="folder that was out= of the one training")
    compare.add_argument("folder_b", type=Path, help="folder of the other, with the same layers")
    compare.add_argument(
        "--out", type=Path, default=Path("comparison.html"), help="page (default: %(default)s)"
    )
    compare.add_argument(
        "--threshold",
        type=float,
        default=1e-3,
        help="what dim counts, over the largest eigenvalue (default: %(default)s)",
    )
    return parser


def _doctor(_: argparse.Namespace) -> None:
    lines = [
        ("fastcov", fastcov.__version__),
        ("python", f"{platform.python_version()} on {platform.platform()}"),
        ("torch", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}"),
    ]
    for package in _OPTIONAL:
        try:
            lines.append((package, metadata.version(package)))
        except metadata.PackageNotFoundError:
            lines.append((package, "not installed"))
    threads = f"{torch.get_num_threads()} threads of {os.cpu_count()} cores"
    lines.append(("cpu", f"{torch.backends.cpu.get_cpu_capability()}, {threads}"))
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            device = torch.cuda.get_device_properties(index)
            lines.append(
                (
                    f"cuda:{index}",
                    f"{device.name}, sm_{device.major}{device.minor}, "
                    f"{device.total_memory / 2**30:.0f} GiB",
                )
            )
    else:
        lines.append(("gpu", "no CUDA device"))
    for name, backend in fastcov.backends().items():
        state = "active" if backend.active else "not active"
        lines.append((f"kernels: {name}", f"{state}: {backend.reason}"))
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"{name:<{width}}  {value}")


def _report(options: argparse.Namespace) -> None:
    from fastcov.show.page import last_statuses, write_report  # needs the extra plot

    history = fastcov.load_history(options.folder)
    page = write_report(
        options.out or options.folder / "report.html",
        last_statuses(history),
        options.title or f"fastcov: {options.folder}",
        history=history,
    )
    print(f"{len(history)} snapshots of {len(history.layers())} layers: {page}")


def _compare(options: argparse.Namespace) -> None:
    from fastcov.show.page import write_comparison  # needs the extra plot

    comparison = compare_histories(
        fastcov.load_history(options.folder_a),
        fastcov.load_history(options.folder_b),
        threshold=options.threshold,
    )
    headers, lines = comparison_rows(comparison)
    print(f"a: {comparison.label_a}\nb: {comparison.label_b}")
    print(text_table(headers, lines))
    print(comparison_legend(comparison))
    title = f"fastcov: {comparison.label_a} and {comparison.label_b}"
    print(f"figures: {write_comparison(options.out, comparison, title)}")


if __name__ == "__main__":
    sys.exit(main())
