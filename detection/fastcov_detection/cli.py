"""``fastcov-detection``: train, check, pretrain, search, demo, compare, report and more."""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from fastcov_detection.config import (
    ConfigError,
    SearchConfig,
    TrainConfig,
    closest,
    load_config,
    override,
    preset,
    presets,
)

ARMS_OF_DEMO = ("baseline", "searched", "uniform")


class _Parser(argparse.ArgumentParser):
    """A parser whose errors name what comes near."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: error: {message}", file=sys.stderr)
        print(f"see {self.prog} --help", file=sys.stderr)
        raise SystemExit(2)

    def parse_strictly(self, words: Sequence[str]) -> argparse.Namespace:
        """Parses everything; an unknown command or option is met with the closest names."""
        commands = _commands(self)
        first = next((word for word in words if not word.startswith("-")), None)
        if first is not None and first not in commands:
            self.error(f"unknown command {first!r}{closest(first, list(commands))}")
        if first is not None:
            known = [o for action in commands[first]._actions for o in action.option_strings]
            for word in words[words.index(first) + 1 :]:
                name = word.split("=")[0]
                if name.startswith("--") and name not in known:
                    commands[first].error(f"unknown option {name!r}{closest(name, known)}")
        return self.parse_args(words)


def main(words: Sequence[str] | None = None) -> int:
    """Runs one command; the process's exit status."""
    words = sys.argv[1:] if words is None else list(words)
    arguments = _parser().parse_strictly(words)
    try:
        with _stoppable():
            arguments.run(arguments)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError) as error:
        # One line for the person who typed the command; a defect of ours keeps its traceback.
        if not _is_expected(error):
            raise
        print(f"fastcov-detection: error: {error}", file=sys.stderr)
        return 2
    return 0


@contextmanager
def _stoppable() -> Iterator[None]:
    """Takes a polite kill like Ctrl-C, so that a search stops the runs it has started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _is_expected(error: Exception) -> bool:
    from fastcov_detection.detector.build import WidthsError
    from fastcov_detection.errors import CheckpointError, DataError
    from fastcov_detection.search.runner import RunError
    from fastcov_detection.train.logbook import LossError

    ours = (ConfigError, DataError, WidthsError, CheckpointError, LossError, RunError)
    if isinstance(error, (*ours, OSError)):
        return True
    # fastcov's own argument checks, raised by a setting that the person chose.
    return type(error) is ValueError


def _parser() -> _Parser:
    parser = _Parser(prog="fastcov-detection", description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="command", required=True, metavar="command")

    train = _command(commands, "train", "train one detector", _train)
    _add_run_options(train, "runs/train")
    train.add_argument("--widths", help="widths.json of a search, or a plan of its widths/ folder")
    train.add_argument("--start", help="state_dict of a whole detector to start from")
    train.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    train.add_argument("--restart", action="store_true", help="start over instead of resuming")

    check = _command(commands, "check", "list everything that is wrong with a data set", _check)
    _add_data_options(check)
    _add_set(check)
    check.add_argument("--quiet", action="store_true", help="no progress bars")

    pretrain = _command(
        commands, "pretrain", "train a backbone on the data's objects as classes", _pretrain
    )
    _add_run_options(pretrain, "runs/pretrain")
    pretrain.add_argument("--widths", help="widths.json of a search")
    pretrain.add_argument("--objects", type=int, help="crops of one step (default 64)")
    pretrain.add_argument("--crop", type=int, help="edge of a crop in pixels (default 64)")
    pretrain.add_argument("--seed", type=int, default=0, help="of everything random (default 0)")
    pretrain.add_argument("--restart", action="store_true", help="start over instead of resuming")

    search = _command(commands, "search", "search widths and compare the arms", _search)
    _add_run_options(search, "runs/search")
    search.add_argument("--rounds", type=int, help="train, measure, propose: at most this often")
    search.add_argument(
        "--rules",
        help="demand rules, the main one first, for example dof,share: further ones add arms",
    )
    search.add_argument("--arms", help="comma list of arms (default: all controls)")
    search.add_argument("--seeds", type=int, help="runs of each arm")
    search.add_argument("--peer-seeds", type=int, help="runs of arm torch-pruning (default 1)")
    search.add_argument(
        "--peer-steps",
        choices=("each", "shared"),
        help="steps of its two trainings: all of them each (default), or half of them each",
    )
    search.add_argument("--max-params", type=int, help="cap on the searched parameters")
    search.add_argument("--budget", type=float, help="MACs (default: the baseline's)")
    search.add_argument("--vary", help="comma list of backbone, fpn, heads (default backbone)")
    search.add_argument("--jobs", type=int, help="training runs side by side (default 1)")
    search.add_argument(
        "--results",
        help="folder for version control: keeps all but weights, and is gone on from",
    )

    planned = _command(
        commands, "planned", "the planned comparison of one task, or its tuning", _planned
    )
    planned.add_argument("task", metavar="TASK", choices=("early", "late"), help="early or late")
    planned.add_argument(
        "--tuning", action="store_true", help="the runs that chose the task, on other images"
    )
    planned.add_argument("--out", default="runs", help="folder of all searches (default runs)")
    planned.add_argument(
        "--results",
        default="detection/results",
        help="committed records, gone on from (default detection/results)",
    )
    planned.add_argument("--jobs", type=int, default=2, help="runs side by side (default 2)")
    planned.add_argument("--quiet", action="store_true", help="no progress bars")

    demo = _command(commands, "demo", "a whole search on two CPU cores in minutes", _demo)
    demo.add_argument("--out", default="runs/demo", help="folder (default runs/demo)")
    demo.add_argument("--jobs", type=int, default=2, help="training runs side by side (default 2)")
    _add_set(demo)
    demo.add_argument("--quiet", action="store_true", help="no progress bars")

    compare = _command(commands, "compare", "spectra of two runs over their training", _compare)
    compare.add_argument("a", metavar="A", help="run folder")
    compare.add_argument("b", metavar="B", help="run folder")
    compare.add_argument("--out", help="folder for figures and numbers (default compare-A-B)")

    families = _command(
        commands, "families", "spectra of two families of runs, against what seeds do", _families
    )
    families.add_argument("--a", nargs="+", required=True, metavar="RUN", help="run folders")
    families.add_argument("--b", nargs="+", required=True, metavar="RUN", help="run folders")
    families.add_argument("--out", default="families", help="folder to write (default families)")

    report = _command(commands, "report", "write a search's HTML page again", _report)
    report.add_argument("dir", metavar="DIR", help="folder of a search")

    evidence = _command(commands, "evidence", "tables of kept results in Markdown", _evidence)
    evidence.add_argument("results", metavar="RESULTS", help="for example detection/results")
    evidence.add_argument("readme", metavar="README", help="file whose marked part is replaced")

    export = _command(
        commands, "export", "a plain state_dict, widths and a rebuild script", _export
    )
    export.add_argument("source", metavar="RUN", help="run folder, or folder of a search")
    export.add_argument("out", metavar="OUT", help="folder to write")
    export.add_argument("--arm", default="searched", help="of a search (default searched)")
    return parser


def _command(commands: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(
        name, help=text, description=text, allow_abbrev=False
    )
    parser.set_defaults(run=run)
    return parser


def _commands(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            return dict(action.choices)
    return {}


def _add_data_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--data", help="mini, or a folder in COCO layout (default mini)")
    parser.add_argument("--model", help="for example maskrcnn_resnet50_fpn")


def _add_run_options(parser: argparse.ArgumentParser, out: str) -> None:
    _add_data_options(parser)
    parser.add_argument("--init", help="random, imagenet, a state_dict's file or a run folder")
    parser.add_argument(
        "--preset",
        help=f"settings to start from: {', '.join(presets())} (default mini for mini, else coco)",
    )
    parser.add_argument("--config", help="JSON file of settings instead of a preset")
    parser.add_argument("--out", default=out, help=f"folder of the run (default {out})")
    _add_set(parser)
    parser.add_argument("--quiet", action="store_true", help="no progress bars")


def _add_set(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one setting of a training run, for example steps=500 or model.norm=group; repeatable",
    )


def _settings(pairs: Sequence[str]) -> dict[str, str]:
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ConfigError(f"--set {pair!r} has no value; write NAME=VALUE")
        found[name.strip()] = value.strip()
    return found


def _train_config(arguments: argparse.Namespace) -> TrainConfig:
    """Settings of a run: a preset or a file, then the options, then --set."""
    if arguments.config is not None:
        config = load_config(TrainConfig, arguments.config)
    else:
        is_mini = arguments.data in (None, "mini")
        config = preset(arguments.preset or ("mini" if is_mini else "coco"))
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, name=arguments.data))
    changes = {"model.name": arguments.model, "model.init": arguments.init}
    chosen = {name: value for name, value in changes.items() if value is not None}
    return override(config, {**chosen, **_settings(arguments.set)})


def _train(arguments: argparse.Namespace) -> None:
    from fastcov_detection.detector.build import load_widths
    from fastcov_detection.train.loop import train

    result = train(
        _train_config(arguments),
        None if arguments.widths is None else load_widths(arguments.widths),
        run_dir=arguments.out,
        seed=arguments.seed,
        start=arguments.start,
        resume=not arguments.restart,
        progress=not arguments.quiet,
    )
    if os.environ.get("RANK", "0") != "0":  # torchrun: one process speaks for all
        return
    masks = "" if result.segm_ap is None else f", mask AP {result.segm_ap:.3f}"
    print(
        f"AP {result.ap:.3f}, AP50 {result.ap50:.3f}{masks} after {result.steps} steps in "
        f"{result.train_s:.0f} s; {result.params:,} parameters, {result.macs:,} MACs; "
        f"files in {result.run_dir}"
    )


def _check(arguments: argparse.Namespace) -> None:
    from fastcov_detection.data.dataset import check_data
    from fastcov_detection.data.findings import refuse_faults, tell_notes

    config = preset("mini" if arguments.data in (None, "mini") else "coco", arguments.model)
    if arguments.data is not None:
        config = replace(config, data=replace(config.data, name=arguments.data))
    config = override(config, _settings(arguments.set))
    findings = check_data(
        config.data, with_masks="mask" in config.model.name, progress=not arguments.quiet
    )
    tell_notes(findings)
    refuse_faults(findings, shown=None)
    print(f"{config.data.name}: no fault found")


def _pretrain(arguments: argparse.Namespace) -> None:
    from fastcov_detection.detector.build import load_widths
    from fastcov_detection.studies.pretrain import PretrainConfig, pretrain

    chosen = {name: getattr(arguments, name) for name in ("objects", "crop")}
    config = PretrainConfig(
        train=_train_config(arguments),
        **{name: value for name, value in chosen.items() if value is not None},
    )
    result = pretrain(
        config,
        None if arguments.widths is None else load_widths(arguments.widths),
        run_dir=arguments.out,
        seed=arguments.seed,
        resume=not arguments.restart,
        progress=not arguments.quiet,
    )
    print(
        f"accuracy {result.accuracy:.3f} on {result.val_objects} objects after {result.steps} "
        f"steps in {result.train_s:.0f} s; files in {result.run_dir}; "
        f"go on with: fastcov-detection train --init {result.run_dir}"
    )


def _search(arguments: argparse.Namespace) -> None:
    from fastcov_detection.search.arms import Searched

    config = SearchConfig(train=_train_config(arguments))
    for name in ("rounds", "seeds", "peer_seeds", "peer_steps", "max_params", "budget", "jobs"):
        if getattr(arguments, name) is not None:
            config = replace(config, **{name: getattr(arguments, name)})
    if arguments.vary is not None:
        config = replace(config, vary=tuple(_words(arguments.vary)))
    if arguments.arms is not None:
        config = replace(config, arms=tuple(_words(arguments.arms)))
    if arguments.rules is not None:
        first, *further = _words(arguments.rules) or [""]
        own = (Searched(rule).name for rule in further)
        config = replace(config, rule=first, arms=(*config.arms, *own))
    _run_search(config, arguments)


def _planned(arguments: argparse.Namespace) -> None:
    from fastcov_detection.report.tables import print_summary
    from fastcov_detection.studies.planned import criteria, run_planned, run_tuning

    places = Path(arguments.out), Path(arguments.results)
    options = {"jobs": arguments.jobs, "progress": not arguments.quiet}
    if not arguments.tuning:
        print_summary(run_planned(arguments.task, *places, **options))
        return
    once, twice = run_tuning(arguments.task, *places, **options)
    print_summary(once)
    for one in criteria(arguments.task, once, twice):
        numbers = "no runs" if one.mean is None else f"{one.mean:+.3f}, n = {one.n}"
        print(f"{'met' if one.is_met else 'NOT met'}: {one.asks} ({numbers})")


def _words(text: str) -> list[str]:
    return [word.strip() for word in text.split(",") if word.strip()]


def _demo(arguments: argparse.Namespace) -> None:
    train = override(preset("mini"), _settings(arguments.set))
    config = SearchConfig(train=train, arms=ARMS_OF_DEMO, seeds=1, jobs=arguments.jobs)
    _run_search(config, arguments)


def _run_search(config: SearchConfig, arguments: argparse.Namespace) -> None:
    from fastcov_detection.report.report import write_report
    from fastcov_detection.report.tables import print_summary
    from fastcov_detection.search.run import run_search

    result = run_search(
        config,
        arguments.out,
        results=getattr(arguments, "results", None),
        progress=not arguments.quiet,
    )
    page = write_report(arguments.out, progress=not arguments.quiet)
    print_summary(result)
    print(f"report: {page}; widths: {Path(arguments.out) / 'widths.json'}")


def _compare(arguments: argparse.Namespace) -> None:
    from fastcov_detection.studies.compare import compare_runs, print_comparison

    name = f"compare-{Path(arguments.a).name}-{Path(arguments.b).name}"
    comparison = compare_runs(arguments.a, arguments.b, arguments.out or name)
    print_comparison(comparison)
    print(f"figures and numbers: {arguments.out or name}")


def _families(arguments: argparse.Namespace) -> None:
    from fastcov_detection.studies.families import compare_families, sentences

    runs = [[Path(folder) for folder in side] for side in (arguments.a, arguments.b)]
    for sentence in sentences(compare_families(*runs, Path(arguments.out))):
        print(sentence)
    print(f"figures and numbers: {arguments.out}")


def _report(arguments: argparse.Namespace) -> None:
    from fastcov_detection.report.report import write_report
    from fastcov_detection.report.tables import print_summary
    from fastcov_detection.search.results import read_result

    print_summary(read_result(Path(arguments.dir)))
    print(f"report: {write_report(arguments.dir)}")


def _evidence(arguments: argparse.Namespace) -> None:
    from fastcov_detection.studies.evidence import write_evidence

    write_evidence(Path(arguments.results), Path(arguments.readme))
    print(f"{arguments.readme}: tables of {arguments.results}")


def _export(arguments: argparse.Namespace) -> None:
    from fastcov_detection.studies.export import export_run

    out = export_run(arguments.source, arguments.out, arm=arguments.arm)
    print(f"{out}: model.pt, widths.json, model.json, rebuild.py")


if __name__ == "__main__":
    sys.exit(main())
