"""The command ``fastcov bench``: choice of cases, and files of their results."""

from __future__ import annotations

import argparse
import fnmatch
import gc
import math
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import torch

from fastcov.bench import apart, covariance, eigen, hooks, machine, snapshot, training
from fastcov.bench.compare import compare_results
from fastcov.bench.contest import Setting, Size, Work, WrongResultError, measure
from fastcov.bench.models import load_model
from fastcov.bench.peers import MissingPeerError
from fastcov.bench.results import Result
from fastcov.bench.table import print_changes, print_result, print_targets
from fastcov.bench.targets import judge

CASES: dict[str, Callable[[Setting], list[Work]]] = {
    "covariance": covariance.works,
    "eigen": eigen.works,
    "hooks": hooks.works,
    "snapshot": snapshot.works,
    **{
        f"training-{network}": partial(training.works, network=network)
        for network in (*training.NETWORKS, *training.COMPILED_NETWORKS)
    },
}
"""Every case by name: each can run alone with ``--only``."""
_BY_NAME_ONLY = {
    "cpu": {f"training-{network}" for network in training.COMPILED_NETWORKS},
    # Compilation takes minutes: these three are a part of their own.
    "cuda": {name for name in CASES if name.endswith("-compiled")},
}

_USAGE = """\
examples:
  fastcov bench                          this machine's CPU, at most 25 minutes on 2 cores
  fastcov bench --gpu                    this machine's GPU, at most 9 minutes
  fastcov bench --gpu --only eigen       one part of it
  fastcov bench --gpu --only '*-compiled'  compiled training steps, 9 minutes more
  fastcov bench --model my_module:build  what tracking costs on this machine for your model;
                                         build() returns (model, inputs) or (model, step)
  fastcov bench --compare A B            what moved beyond noise between two results
"""


class _OneLineParser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} ({self.prog} --help shows the usage)\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Command ``fastcov bench``.

    Args:
        argv: Arguments after ``bench``; None takes the process's.

    Returns:
        0; 1 if something could not be measured or was wrong; 2 after one line about bad arguments.
    """
    options = _parser().parse_args(sys.argv[1:] if argv is None else list(argv))
    try:
        if options.compare:
            print_changes(compare_results(*options.compare))
            return 0
        return _run(options)
    except (ValueError, OSError) as error:
        print(f"fastcov bench: {' '.join(str(error).split())}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = _OneLineParser(
        prog="fastcov bench",
        description="Measures this machine; every row beside its peers and the machine's rates.",
        epilog=_USAGE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--gpu", action="store_true", help="the first CUDA device, not the CPU")
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--full", action="store_true", help="the whole grid and more rounds")
    size.add_argument(
        "--tiny", action="store_true", help="run everything once, to see that it does"
    )
    parser.add_argument(
        "--only",
        action="append",
        metavar="NAME",
        help=f"a case or pattern, repeatable: {', '.join(CASES)}",
    )
    parser.add_argument("--model", metavar="MODULE:FUNCTION", help="your own model's training step")
    parser.add_argument(
        "--compare", nargs=2, type=Path, metavar=("A", "B"), help="result files or folders"
    )
    parser.add_argument("--seconds", type=float, help="begin no contest of a case after this")
    parser.add_argument(
        "--out",
        type=Path,
        help="folder of the JSON files (default: benchmarks/results/DEVICE in a checkout, else "
        "fastcov-bench/DEVICE; with --tiny or --model: none, or fastcov-bench/DEVICE)",
    )
    return parser


def _run(options: argparse.Namespace) -> int:
    device = _device(options.gpu)
    size: Size = "tiny" if options.tiny else ("full" if options.full else "default")
    folder = options.out or _default_folder(device, size, is_model=options.model is not None)
    sys.path.insert(0, str(Path.cwd()))  # for --model: the user's module lies there
    cases = _chosen(options, device)
    if device.type == "cuda" and len(cases) > 1:
        return apart.run_apart(list(cases), size, folder)
    seconds = math.inf if options.seconds is None else options.seconds
    done, failed = [], False
    for name, make_works in cases.items():
        result = run_case(name, make_works, device, size, folder=folder, seconds=seconds)
        print_result(result)
        if folder is not None:
            print(f"  written to {folder / name}.json")
        done.append(result)
        failed |= bool(result.failures)
        if not is_alive(device):
            print("fastcov bench: the GPU answers no more in this process", file=sys.stderr)
            break
    if size != "tiny" and options.model is None:
        rows = {result.case: result.rows for result in done}
        name = machine.device_name(device)
        verdicts = judge(device.type, rows, name)
        print_targets([v for v in verdicts if v.target.case in rows], name)
    return 1 if failed else 0


def _device(wants_gpu: bool) -> torch.device:
    if not wants_gpu:
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError("--gpu: torch finds no CUDA device here; 'fastcov doctor' says more")
    return torch.device("cuda", torch.cuda.current_device())


def _chosen(
    options: argparse.Namespace, device: torch.device
) -> dict[str, Callable[[Setting], list[Work]]]:
    if options.model is not None:
        if options.only:
            raise ValueError("--model runs one case of its own: leave out --only")
        loaded = load_model(options.model, device)
        work = Work(options.model, partial(training.contest, loaded))
        return {"model": lambda _setting: [work]}
    if options.only is None:
        return {
            name: case for name, case in CASES.items() if name not in _BY_NAME_ONLY[device.type]
        }
    chosen = {n: c for n, c in CASES.items() if any(fnmatch.fnmatch(n, p) for p in options.only)}
    for pattern in options.only:
        if not any(fnmatch.fnmatch(name, pattern) for name in CASES):
            raise ValueError(f"--only {pattern!r} names no case; cases: {', '.join(CASES)}")
    return chosen


def _default_folder(device: torch.device, size: Size, *, is_model: bool) -> Path | None:
    if size == "tiny":
        return None
    slug = machine.device_slug(device)
    source = machine.checkout()
    if source is None or is_model:
        return Path("fastcov-bench") / slug
    return source / "benchmarks" / "results" / slug


def works(case: str, setting: Setting) -> list[Work]:
    """The contests of a case, not built yet."""
    return CASES[case](setting)


def run_case(
    name: str,
    make_works: Callable[[Setting], list[Work]],
    device: torch.device,
    size: Size = "default",
    *,
    folder: Path | None = None,
    seconds: float = math.inf,
) -> Result:
    """Result of a case: every contest built, checked and timed.

    Args:
        name: Name of the case.
        make_works: One of :data:`CASES`.
        device: Device of the contests.
        size: Size of the contests.
        folder: Folder where the result is written anew after every contest, so that no
            measurement is lost; None writes nothing.
        seconds: Time after which no contest begins, counted from the first one.

    Returns:
        The result. A contest that failed, or for which time was up, is among its failures.
    """
    start = time.perf_counter()
    before = machine.clocks(device)
    setting = Setting(device, size)
    result = Result(name, size, machine.describe(device), {}, {}, setting.missing, [])
    result.rates = setting.rates.as_dict()  # before memory is full and the device hot
    setting.ends_at = time.monotonic() + seconds
    for work in make_works(setting):
        if time.monotonic() >= setting.ends_at:
            result.failures[work.name] = f"the case's {seconds:g} s were up"
            continue
        print(f"{name}: {work.name}", file=sys.stderr, flush=True)
        _run_work(work, setting, result)
        torch.compiler.reset()  # a function is compiled anew so many times, then runs in eager mode
        gc.collect()
        result.clocks = {"before": before, "after": machine.clocks(device)}
        result.wall_s = round(time.perf_counter() - start, 1)
        if folder is not None:
            result.save(folder)
        if not is_alive(device):
            result.failures["the rest"] = "the GPU answers no more in this process"
            if folder is not None:
                result.save(folder)
            break
        if device.type == "cuda":
            torch.cuda.empty_cache()
    if folder is not None:
        result.save(folder)
    return result


def _run_work(work: Work, setting: Setting, result: Result) -> None:
    try:
        result.rows += measure(work.name, work.build(setting), setting)
    except MissingPeerError as missing:
        setting.missing[work.name] = str(missing)
    except WrongResultError as error:
        _fail(result, work, str(error))
    except Exception as error:  # one contest's error must not lose the others' results
        traceback.print_exc()
        lines = str(error).strip().splitlines() or ["no message"]
        _fail(result, work, f"{type(error).__name__}: {lines[0][:300]}")


def _fail(result: Result, work: Work, reason: str) -> None:
    result.failures[work.name] = reason
    print(f"fastcov bench: {result.case}: {work.name}: {reason}", file=sys.stderr, flush=True)


def is_alive(device: torch.device) -> bool:
    """True if the device still answers: after an illegal access none of its calls does."""
    if device.type != "cuda":
        return True
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return False
    return True
