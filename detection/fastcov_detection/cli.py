"""``fastcov-detection``: train, check, pretrain, search, demo, compare, report and more.

A command is one function below: its arguments are the options, and its docstring is their help. A
command that takes ``settings`` has every setting of a run as an option too, by dotted name.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_origin, get_type_hints

from jsonargparse import ArgumentParser

from fastcov_detection.config import (
    DataConfig,
    SearchConfig,
    TrainConfig,
    as_text,
    leaves,
    load_config,
    naming_values,
    preset,
)
from fastcov_detection.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    LossError,
    RunError,
    WidthsError,
    closest,
)

_EXPECTED = (
    *(ConfigError, DataError, WidthsError, CheckpointError, LossError, RunError),
    *(OSError, ArgumentError),
)
ARMS_OF_DEMO = ("baseline", "searched", "uniform")
_SHORT = {"data": "data.name", "model": "model.name", "init": "model.init"}
"""Options that stand for a setting."""
_ABOUT = "Detectors of any widths, and the search that sets the widths."
_ABOUT_SETTINGS = (
    "--data, --model and --init stand for --data.name, --model.name and --model.init; "
    "--set NAME=VALUE for --NAME VALUE; a list is a,b,c."
)


def train(
    settings: TrainConfig,
    out: str = "runs/train",
    widths: str | None = None,
    start: str | None = None,
    seed: int = 0,
    restart: bool = False,
    quiet: bool = False,
) -> None:
    """Training of one detector.

    Args:
        settings: Settings of the run.
        out: Folder of the run.
        widths: File widths.json of a search, or a plan of its folder widths/.
        start: State_dict of a whole detector to start from.
        seed: Seed of everything random.
        restart: Start over instead of resuming.
        quiet: No progress bars.
    """
    from fastcov_detection.detector.build import load_widths
    from fastcov_detection.studies.detectors import print_scores
    from fastcov_detection.train.loop import train as train_detector

    result = train_detector(
        settings,
        None if widths is None else load_widths(widths),
        run_dir=out,
        seed=seed,
        start=start,
        resume=not restart,
        progress=not quiet,
    )
    if os.environ.get("RANK", "0") != "0":  # torchrun: one process speaks for all
        return
    masks = "" if result.segm_ap is None else f", mask AP {result.segm_ap:.3f}"
    print(
        f"AP {result.ap:.3f}, AP50 {result.ap50:.3f}{masks} after {result.steps} steps in "
        f"{result.train_s:.0f} s; {result.params:,} parameters, {result.macs:,} MACs; "
        f"files in {result.run_dir}"
    )
    print_scores(result.numbers, result.classes)


def evaluate(
    model: str,
    data: str | None = None,
    out: str = "runs/evaluate",
    weights: str | None = None,
    best: bool = False,
    batch: int = 1,
    workers: int = 0,
    precision: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    quiet: bool = False,
) -> None:
    """Scores of a detector: COCO's twelve numbers, every class, and predictions as COCO JSON.

    Args:
        model: Run folder, exported folder, or the name of one of torchvision's detectors.
        data: Folder in COCO layout; null: the data of the run.
        out: Folder to write.
        weights: State_dict of torchvision's detector; null: torchvision's own, downloaded.
        best: Take the weights of a run's best evaluation.
        batch: Images of one forward pass.
        workers: Processes that read images.
        precision: Autocast to this type.
        device: Device of the detector: auto, cpu, cuda or cuda:N.
        quiet: No progress bars.
    """
    from fastcov_detection.studies.detectors import evaluate_detector, print_scores

    found = evaluate_detector(
        model,
        out,
        data=None if data is None else DataConfig(name=data, workers=workers),
        weights=weights,
        best=best,
        batch_size=batch,
        precision=precision,
        device=device,
        progress=not quiet,
    )
    if os.environ.get("RANK", "0") != "0":
        return
    print_scores(found.numbers, found.classes)
    print(f"{found.images} images in {found.seconds:.0f} s; files in {out}")


def check(settings: TrainConfig, quiet: bool = False) -> None:
    """List of everything that is wrong with a data set.

    Args:
        settings: Settings of a run, of which those of the data are used.
        quiet: No progress bars.
    """
    from fastcov_detection.data.checks import log_notes, refuse_faults
    from fastcov_detection.data.dataset import check_data

    findings = check_data(
        settings.data, with_masks="mask" in settings.model.name, progress=not quiet
    )
    log_notes(findings)
    refuse_faults(findings, shown=None)
    print(f"{settings.data.name}: no fault found")


def pretrain(
    settings: TrainConfig,
    out: str = "runs/pretrain",
    widths: str | None = None,
    objects: int = 64,
    crop: int = 64,
    seed: int = 0,
    restart: bool = False,
    quiet: bool = False,
) -> None:
    """Training of a backbone on the data's objects as classes.

    Args:
        settings: Settings of the run.
        out: Folder of the run.
        widths: File widths.json of a search.
        objects: Crops of one step.
        crop: Edge of a crop in pixels.
        seed: Seed of everything random.
        restart: Start over instead of resuming.
        quiet: No progress bars.
    """
    from fastcov_detection.detector.build import load_widths
    from fastcov_detection.studies.pretrain import PretrainConfig
    from fastcov_detection.studies.pretrain import pretrain as pretrain_backbone

    result = pretrain_backbone(
        PretrainConfig(train=settings, objects=objects, crop=crop),
        None if widths is None else load_widths(widths),
        run_dir=out,
        seed=seed,
        resume=not restart,
        progress=not quiet,
    )
    print(
        f"accuracy {result.accuracy:.3f} on {result.val_objects} objects after {result.steps} "
        f"steps in {result.train_s:.0f} s; files in {result.run_dir}; "
        f"go on with: fastcov-detection train --init {result.run_dir}"
    )


def search(
    settings: SearchConfig,
    out: str = "runs/search",
    rules: tuple[str, ...] = (),
    results: str | None = None,
    engine: Literal["local", "ray"] = "local",
    address: str | None = None,
    gpus_per_run: int | None = None,
    quiet: bool = False,
) -> None:
    """Search of widths, and comparison of the arms.

    Args:
        settings: Settings of the search.
        out: Folder of the search.
        rules: Rules of demand, the main one first, for example dof,share: further ones add arms.
        results: Folder for version control: keeps all but weights, and is gone on from.
        engine: Where runs are trained: processes of this machine, or tasks of a Ray cluster.
        address: Address of the Ray cluster, auto or HOST:PORT; null: one of this machine alone.
        gpus_per_run: GPUs of each run on the Ray cluster; null: one if the cluster has any.
        quiet: No progress bars.
    """
    _refuse_torchrun()
    from fastcov_detection.search.arms import Searched

    if rules:
        first, *further = rules
        own = (Searched(rule).name for rule in further)
        settings = replace(settings, rule=first, arms=(*settings.arms, *own))
    if engine == "local" and (address, gpus_per_run) != (None, None):
        raise ConfigError("--address and --gpus-per-run are of --engine ray; give that too")
    cluster = None
    if engine == "ray":
        from fastcov_detection.search.engines import RayEngine

        cluster = RayEngine(address, gpus_per_run, settings.train.threads or 1)
    try:
        _run_search(settings, out, results, quiet, cluster)
    finally:
        if cluster is not None:
            cluster.close()


def planned(
    task: Literal["early", "late"],
    tuning: bool = False,
    out: str = "runs",
    results: str = "detection/results",
    jobs: int = 2,
    quiet: bool = False,
) -> None:
    """Planned comparison of one task, or its tuning.

    Args:
        task: Task of the plan.
        tuning: The runs that chose the task, on other images.
        out: Folder of all searches.
        results: Committed records, gone on from.
        jobs: Runs side by side.
        quiet: No progress bars.
    """
    _refuse_torchrun()
    from fastcov_detection.report.tables import print_summary
    from fastcov_detection.studies.planned import criteria, run_planned, run_tuning

    places = Path(out), Path(results)
    if not tuning:
        print_summary(run_planned(task, *places, jobs=jobs, progress=not quiet))
        return
    once, twice = run_tuning(task, *places, jobs=jobs, progress=not quiet)
    print_summary(once)
    for criterion in criteria(task, once, twice):
        numbers = (
            "no runs" if criterion.mean is None else f"{criterion.mean:+.3f}, n = {criterion.n}"
        )
        print(f"{criterion.verdict}: {criterion.asks} ({numbers})")


def demo(settings: TrainConfig, out: str = "runs/demo", jobs: int = 2, quiet: bool = False) -> None:
    """Whole search on two CPU cores, in minutes.

    Args:
        settings: Settings of every training run.
        out: Folder of the search.
        jobs: Training runs side by side.
        quiet: No progress bars.
    """
    _refuse_torchrun()
    config = SearchConfig(train=settings, arms=ARMS_OF_DEMO, seeds=1, jobs=jobs)
    _run_search(config, out, None, quiet)


def _refuse_torchrun() -> None:
    """Refusal of a search that torchrun started: each process would be a search of its own."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "torchrun starts one search for each process; start one alone, which starts its own "
            "trainings: fastcov-detection search --jobs N on one machine, a GPU for each training, "
            "or fastcov-detection search --engine ray --address auto --gpus-per-run N on a cluster"
        )


def _run_search(
    config: SearchConfig, out: str, results: str | None, quiet: bool, engine: Any = None
) -> None:
    from fastcov_detection.report.report import write_report
    from fastcov_detection.report.tables import print_summary
    from fastcov_detection.search.run import run_search

    result = run_search(config, out, results=results, engine=engine, progress=not quiet)
    page = write_report(out, progress=not quiet)
    print_summary(result)
    print(f"report: {page}; widths: {Path(out) / 'widths.json'}")


def compare(a: str, b: str, out: str | None = None) -> None:
    """Comparison of the spectra of two runs over their training.

    Args:
        a: Run folder.
        b: Run folder.
        out: Folder for figures and numbers; null: compare-A-B.
    """
    from fastcov_detection.studies.compare import compare_runs, print_comparison

    folder = out or f"compare-{Path(a).name}-{Path(b).name}"
    print_comparison(compare_runs(a, b, folder))
    print(f"figures and numbers: {folder}")


def redraw(dir: str) -> None:
    """Figures and page of a comparison, drawn again.

    Args:
        dir: Folder that a comparison was written to.
    """
    from fastcov_detection.studies.compare import print_comparison, redraw_comparison

    print_comparison(redraw_comparison(dir))


def families(*, a: list[Path], b: list[Path], out: Path = Path("families")) -> None:
    """Comparison of the spectra of two families of runs, beyond the effect of seeds.

    Args:
        a: Run folders.
        b: Run folders.
        out: Folder to write.
    """
    from fastcov_detection.studies.compare import compare_families, sentences

    for sentence in sentences(compare_families(a, b, out)):
        print(sentence)
    print(f"figures and numbers: {out}")


def report(dir: str) -> None:
    """HTML page of a search, written again.

    Args:
        dir: Folder of a search.
    """
    from fastcov_detection.report.report import write_report
    from fastcov_detection.report.tables import print_summary
    from fastcov_detection.search.results import read_result

    print_summary(read_result(Path(dir)))
    print(f"report: {write_report(dir)}")


def evidence(results: str, readme: str) -> None:
    """Markdown tables of kept results.

    Args:
        results: Folder of kept results, for example detection/results.
        readme: File whose marked part is replaced.
    """
    from fastcov_detection.studies.evidence import write_evidence

    write_evidence(Path(results), Path(readme))
    print(f"{readme}: tables of {results}")


def export(run: str, out: str, arm: str = "searched") -> None:
    """Plain state_dict, widths and a rebuild script of a detector.

    Args:
        run: Run folder, or folder of a search.
        out: Folder to write.
        arm: Arm of a search.
    """
    from fastcov_detection.studies.detectors import export_run

    folder = export_run(run, out, arm=arm)
    print(f"{folder}: model.pt, widths.json, model.json, rebuild.py")


COMMANDS: dict[str, Callable[..., None]] = {
    command.__name__: command
    for command in (
        *(train, evaluate, check, pretrain, search, planned, demo),
        *(compare, redraw, families, report, evidence, export),
    )
}


def main(words: Sequence[str] | None = None) -> int:
    """Command line: runs one command; returns the process's exit status."""
    words = sys.argv[1:] if words is None else list(words)
    try:
        with _stoppable():
            run_command(words)
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, RuntimeError, OSError, ArgumentError) as error:
        # One line for the person who typed the command; a defect of the program keeps its
        # traceback. A plain ValueError is fastcov's own check of a setting that the person chose.
        if not isinstance(error, _EXPECTED) and type(error) is not ValueError:
            raise
        print(f"fastcov-detection: error: {error}", file=sys.stderr)
        return 2
    return 0


def run_command(words: Sequence[str]) -> None:
    """Run of the command that the words name.

    Raises:
        ConfigError: If a word is unknown, with the closest names, or a value is impossible.
    """
    command = words[0] if words and not words[0].startswith("-") else None
    if command is not None and command not in COMMANDS:
        raise ConfigError(
            f"unknown command {command!r}{closest(command, COMMANDS)} See fastcov-detection --help."
        )
    parser = command_parser(words, only=command)
    if command is not None:
        words = [command, *_plain_words(command, words[1:])]
    with naming_values():
        parsed = parser.parse_args(words)
        values = parser.instantiate(parsed)[parsed.command].as_dict()
    run, known = COMMANDS[parsed.command], get_type_hints(COMMANDS[parsed.command])
    own = {name: values[name] for name in known if name in values}
    if "settings" in known:
        own["settings"] = _settings(known["settings"], values)
    run(**own)


def command_parser(words: Sequence[str] = (), only: str | None = None) -> ArgumentParser:
    """The parser of one command, or of all.

    Args:
        words: Words of the command line; a preset or a file of settings among them gives the
            defaults.
        only: Name of the command; None: all, for help and completion.
    """
    parser = ArgumentParser(prog="fastcov-detection", description=_ABOUT, exit_on_error=False)
    commands = parser.add_subcommands(dest="command")
    for name in COMMANDS if only is None else (only,):
        run = COMMANDS[name]
        summary = (run.__doc__ or "").split("\n")[0]
        settings = get_type_hints(run).get("settings")
        about = summary if settings is None else f"{summary} {_ABOUT_SETTINGS}"
        own = ArgumentParser(description=about, exit_on_error=False)
        own.add_function_arguments(run, as_positional=True, skip={"settings"})
        if settings is not None:
            own.add_argument("--preset", help="Settings to start from; see README.")
            own.add_argument("--config", help="JSON or YAML file of settings to start from.")
            own.add_class_arguments(TrainConfig)
            if settings is not TrainConfig:
                own.add_class_arguments(settings, skip={"train"})
            own.set_defaults(_defaults(words))
        commands.add_subcommand(name, own, help=summary)
    return parser


def _defaults(words: Sequence[str]) -> dict[str, Any]:
    """Settings of the preset or the file that the words name, by dotted name."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for option in ("--preset", "--config", "--data"):
        first.add_argument(option)
    found, _ = first.parse_known_args(list(words))
    if found.config is not None:
        config = load_config(TrainConfig, found.config)
    else:
        config = preset(found.preset or ("mini" if found.data in (None, "mini") else "coco"))
    defaults = {}
    for name, _ in leaves(TrainConfig):
        value: Any = config
        for part in name.split("."):
            value = getattr(value, part)
        defaults[name] = value
    return defaults


def _settings(cls: type, values: dict[str, Any]) -> Any:
    """The dataclass of a command's settings, from the values of its options."""
    names = [field.name for field in fields(cls)]
    if cls is not TrainConfig:
        values = values | {"train": _settings(TrainConfig, values)}
    return cls(**{name: values[name] for name in names})


def _plain_words(command: str, words: Sequence[str]) -> list[str]:
    """A command's words in the form that jsonargparse reads.

    Names have underscores, a short name is its setting's, ``--set NAME=VALUE`` is ``--NAME=VALUE``,
    a switch needs no value, and ``a,b`` and ``a b`` are lists where a list is asked for.

    Raises:
        ConfigError: If an option does not exist, with the closest names.
    """
    hints = _option_types(command)
    plain, left = [], list(words)
    while left:
        word = left.pop(0)
        name, equals, value = word.removeprefix("--").partition("=")
        if not word.startswith("--") or name == "help":
            plain.append(word)
            continue
        short = name.replace("-", "_")
        if short == "set" and "settings" in get_type_hints(COMMANDS[command]):
            pair = value if equals else left.pop(0) if left else ""
            name, equals, value = pair.partition("=")
            if not equals:
                raise ConfigError(f"--set {pair!r} has no value; write NAME=VALUE")
            short = name = name.strip()
        elif short in _SHORT and _SHORT[short] in hints:
            short = _SHORT[short]
        if short not in hints:
            options = [f"--{known}" for known in hints]
            raise ConfigError(
                f"unknown option '--{name}'{closest(f'--{short}', options)} "
                f"See fastcov-detection {command} --help."
            )
        hint = hints[short]
        given = [value] if equals else []
        while left and not left[0].startswith("--") and (not given or get_origin(hint) is list):
            if hint is bool and left[0] not in ("true", "false"):
                break
            given.append(left.pop(0))
        if hint is bool and not given:
            given = ["true"]
        if not given:
            raise ConfigError(f"option --{name} has no value; write --{name} VALUE")
        text = f"[{','.join(given)}]" if get_origin(hint) is list else as_text(given[0], hint)
        plain.append(f"--{short}={text}")
    return plain


def _option_types(command: str) -> dict[str, Any]:
    """Types of a command's options by name."""
    hints = get_type_hints(COMMANDS[command])
    settings = hints.pop("settings", None)
    hints.pop("return", None)
    if settings is None:
        return hints
    found = {"preset": str, "config": str, **hints, **dict(leaves(TrainConfig))}
    if settings is not TrainConfig:
        own = dict(leaves(settings))
        found |= {name: own[name] for name in own if not name.startswith("train.")}
    return found


@contextmanager
def _stoppable() -> Iterator[None]:
    """Context in which SIGTERM acts as Ctrl-C, so that a search stops the runs it has started."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
