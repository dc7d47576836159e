"""The width search: train, read the spectra, propose widths, train again from scratch, compare.

A search lives in one folder and goes on from whatever is finished there:

- ``config.json``, ``train.json``: its settings, and those of every run; ``train-peer.json``: those
  of the torch-pruning arm's two trainings
- ``arms/NAME/seedN/``: one training run each; the searched arm is named by the round that made it
- ``starts/*.pt``: weights that the torch-pruning arm's runs start from
- ``spectra/*.npz``: measuring passes; ``widths/*.json``: plans of widths with their demands
- ``result.json``, ``widths.json`` (the searched widths), ``report.html``
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torchvision.models.detection.generalized_rcnn import GeneralizedRCNN

from fastcov import Spectrum
from fastcov.widths import RULES, WidthPlan, find_rule
from fastcov_detection.config import SearchConfig, save_config
from fastcov_detection.data.dataset import load_data
from fastcov_detection.detector.build import Costs, build_model, parse_name, save_widths
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.distributed import pick_device
from fastcov_detection.errors import ConfigError, closest
from fastcov_detection.files import write_file
from fastcov_detection.progress import progress_bar
from fastcov_detection.search.arms import (
    KINDS,
    Arm,
    Baseline,
    Prepared,
    Searched,
    Untrained,
    check_arms,
    find_arm,
    given_plan,
)
from fastcov_detection.search.engines import (
    Engine,
    Job,
    LocalEngine,
    locked,
    run_jobs,
    threads_per_run,
)
from fastcov_detection.search.folder import (
    check_same_data,
    check_same_search,
    keep,
    load_plan,
    load_spectra,
    measured_path,
    plan_path,
    restore,
    run_dir,
    save_plan,
    save_spectra,
    start_path,
)
from fastcov_detection.search.measure import measure_latency, measure_spectra
from fastcov_detection.search.pruning import peer_version, prune_to_budget
from fastcov_detection.search.results import (
    ArmRecord,
    compare_arms,
    macs_input,
    read_result,
    write_result,
)
from fastcov_detection.train.folder import RunResult, has_weights, load_run, read_run_result
from fastcov_detection.train.loop import initial_model

# Below 8 input channels, the gradient of a strided 1x1 convolution in channels_last writes outside
# its memory on some CPUs (torch 2.11 with oneDNN); one channel more or less matters little there.
_LEAST_WIDTH = 8


def run_search(
    config: SearchConfig,
    folder: str | Path,
    *,
    results: str | Path | None = None,
    engine: Engine | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Width search, from its start or from where it was left, to its end.

    Args:
        config: The search.
        folder: Its folder.
        results: Folder that gets files small enough for version control (results, plans of widths
            and spectra, no weights) as each run ends. Runs in it are not run again, so a search
            goes on in a fresh clone.
        engine: Where runs are trained; None: on this machine, ``config.jobs`` at a time.
        progress: Show bars.

    Returns:
        Content of result.json.

    Raises:
        ConfigError: If settings are impossible, or the folder holds another search.
        RunError: If a training run fails or the folder is in use.
    """
    folder, kept = Path(folder), None if results is None else Path(results)
    config = _checked(config)
    with locked(folder) as lock:
        for known in (folder, kept):
            if known is not None:
                check_same_search(known, config)
        if kept is not None:
            restore(kept, folder)
        save_config(config, folder / "config.json")
        for kind in KINDS:
            save_config(kind.train_config(config), folder / kind.settings)
        engine = engine or LocalEngine(config.jobs, lock)
        return _Search(config, folder, engine, kept, progress).run()


def _checked(config: SearchConfig) -> SearchConfig:
    """The configuration with its arms in order; impossible settings are refused."""
    for name in ("seeds", "rounds", "jobs", "measure_images", "latency_runs", "peer_seeds"):
        if getattr(config, name) < 1:
            raise ConfigError(f"{name} is {getattr(config, name)}; give at least 1")
    if config.train.model.init != "random":
        raise ConfigError(
            f"model.init is {config.train.model.init!r}: pretrained weights fit one set of widths, "
            "and a search trains every set; use random"
        )
    if config.rule not in RULES:
        raise ConfigError(f"rule is {config.rule!r}{closest(config.rule, RULES)}")
    arms = check_arms(config.arms)
    for arm in arms:
        arm.check(config)
    return replace(config, arms=tuple(arm.name for arm in arms))


class _Search:
    """One search at work."""

    def __init__(
        self,
        config: SearchConfig,
        folder: Path,
        engine: Engine,
        kept: Path | None,
        progress: bool,
    ) -> None:
        self.config, self.folder, self.engine, self.progress = config, folder, engine, progress
        self.kept = kept
        predicts_masks, _ = parse_name(config.train.model.name)
        self.data = load_data(config.train.data, with_masks=predicts_masks, progress=progress)
        check_same_data(folder, self.data.content)
        classes = len(self.data.class_names) + 1
        self.model = replace(config.train.model, num_classes=classes)
        self.costs = Costs(self.model, config.image_size or self.model.min_size)
        self.budget = float(self.costs(None).macs if config.budget is None else config.budget)
        with torch.device("meta"):
            baseline = build_model(self.model)
        self.groups = [
            replace(group, floor=max(group.floor, min(_LEAST_WIDTH, group.width)))
            for group in width_groups(baseline, vary=config.vary)
        ]
        self.seeds = [config.first_seed + index for index in range(config.seeds)]
        self.device = pick_device(config.train.device)
        self.arms: dict[Arm, Prepared] = {}
        self.latency: dict[str, float] = {}
        if (folder / "result.json").exists():  # latency of an earlier process
            recorded = read_result(folder)["arms"]
            self.latency = {n: a["latency_ms"] for n, a in recorded.items() if a["latency_ms"]}

    def run(self) -> dict[str, Any]:
        """Run of every step of the search that no earlier process finished."""
        arms = [find_arm(name) for name in self.config.arms]
        baseline = self.arms[Baseline()] = Baseline().prepare(self)
        # The widths follow from one run; others keep cores busy. After that, seed by seed:
        # whenever a search is stopped, its finished runs can be compared.
        self.train([baseline], self.seeds[: self.config.jobs])
        if any(arm.reads_spectra for arm in arms):
            # The report shows spectra of features whatever the rule reads.
            features = next(name for name, rule in RULES.items() if rule.reads == "features")
            for rule in dict.fromkeys((features, self.config.rule)):
                self.spectra(baseline, rule)
                self.untrained_spectra(rule)
        for arm in arms:
            if arm not in self.arms:
                self.arms[arm] = arm.prepare(self)
        if Searched() in self.arms:
            save_widths(self._all_widths(self.arms[Searched()]), self.folder / "widths.json")
        # Finished runs, of this folder or restored, are recorded before others are added.
        self._record()
        self.train(list(self.arms.values()), self.seeds)
        self.latency = self._measure_latency() or self.latency
        return self._record()

    def prepared(self, arm: Arm) -> Prepared:
        """An arm that was prepared before."""
        return self.arms[arm]

    def plan(self, name: str, propose: Callable[[], WidthPlan]) -> WidthPlan:
        """The plan of a name, proposed once and read from its file afterwards."""
        path = plan_path(self.folder, name)
        if not path.exists():
            with progress_bar(f"widths of {name}", 1, enabled=self.progress) as advance:
                save_plan(propose(), path)
                advance(1)
        return load_plan(path)

    def spectra(self, prepared: Prepared, rule: str) -> Mapping[str, Spectrum]:
        """Spectra that a rule reads of an arm's first run."""

        def make() -> GeneralizedRCNN:
            # Weights may be missing where an earlier process ended before it measured spectra.
            self._train_for_weights(prepared, self.seeds[:1])
            return load_run(self._run_dir(prepared, self.seeds[0]))[0]

        return self._measured(prepared.folder, rule, make)

    def untrained_spectra(self, rule: str) -> Mapping[str, Spectrum]:
        """Spectra that a rule reads of the baseline before it is trained."""

        def make() -> GeneralizedRCNN:
            with torch.random.fork_rng(devices=[]):
                return initial_model(self.model, None, self.seeds[0])

        return self._measured(Untrained.stem, rule, make)

    def _measured(
        self, name: str, rule: str, make: Callable[[], GeneralizedRCNN]
    ) -> Mapping[str, Spectrum]:
        """A measuring pass, made once and read from its file afterwards."""
        path = measured_path(self.folder, name, rule)
        if not path.exists():
            model = make().to(self.device)
            threads = torch.get_num_threads()
            # One small image at a time gains little from more threads, and waiting ones spin.
            torch.set_num_threads(min(threads, threads_per_run(self.config.jobs)))
            try:
                spectra = measure_spectra(
                    model,
                    self.data.train,
                    self.config.measure_images,
                    vary=self.config.vary,
                    reads=find_rule(rule).reads,
                    progress=self.progress,
                )
            finally:
                torch.set_num_threads(threads)
            save_spectra(spectra, path)
        return load_spectra(path)

    def prune(self, wider: Prepared, names: Mapping[int, str]) -> None:
        """Pruned detectors, one a seed, from trained wider ones: their plans and weights.

        The arms before are trained first: this takes longer than any of them.
        """
        self.train(list(self.arms.values()), self.seeds)
        self._train_for_weights(wider, list(names))
        for seed, name in names.items():
            model, _, _ = load_run(self._run_dir(wider, seed))
            with progress_bar(f"pruning for {name}", 1, enabled=self.progress) as advance:
                pruned = prune_to_budget(model, self.groups, self.costs.macs, self.budget)
                advance(1)
            peer = peer_version()
            asked = f"{100 * pruned.ratio:.1f} % of the channels asked for"
            plan = given_plan(self, pruned.widths, peer)
            plan = replace(plan, notes=(f"{peer} by group magnitude, {asked}",))
            save_plan(plan, plan_path(self.folder, name))
            state = pruned.state
            write_file(start_path(self.folder, name), lambda file, s=state: torch.save(s, file))

    def train(self, arms: Sequence[Prepared], seeds: Sequence[int]) -> None:
        """Training of the unfinished runs of these arms, seed by seed."""
        run_jobs(
            [self._job(arm, seed) for seed in seeds for arm in arms if seed in arm.plans],
            engine=self.engine,
            # A long search can be read, and stopped, after every run.
            on_finish=self._record,
            progress=self.progress,
        )

    def _train_for_weights(self, prepared: Prepared, seeds: Sequence[int]) -> None:
        """Training of runs whose weights are needed: results kept elsewhere do not do."""
        for seed in seeds:
            run = self._run_dir(prepared, seed)
            if not has_weights(run):
                (run / "run.json").unlink(missing_ok=True)
        self.train([prepared], seeds)

    def _run_dir(self, prepared: Prepared, seed: int) -> Path:
        return run_dir(self.folder, prepared.folder, seed)

    def _job(self, prepared: Prepared, seed: int) -> Job:
        arm, (plan_name, _) = prepared.arm, prepared.plans[seed]
        return Job(
            label=f"{arm.name}, seed {seed}",
            run_dir=self._run_dir(prepared, seed),
            config_file=self.folder / arm.settings,
            widths_file=plan_path(self.folder, plan_name),
            seed=seed,
            steps=arm.train_config(self.config).steps,
            start_file=arm.start(self.folder, plan_name),
        )

    def _all_widths(self, prepared: Prepared) -> dict[str, int]:
        """The arm's widths, those of the groups that do not vary included."""
        with torch.device("meta"):
            return dict(build_model(self.model, prepared.first_plan.widths).widths)

    def _record(self) -> dict[str, Any]:
        """File result.json, from the runs that are finished."""
        records = []
        for arm, prepared in self.arms.items():
            runs = [self._result(prepared, seed) for seed in prepared.plans]
            record = ArmRecord(arm.name, self._all_widths(prepared), [run for run in runs if run])
            record.made_with = prepared.first_plan.rule if arm.names_its_maker else None
            record.latency_ms = self.latency.get(arm.name)
            records.append(record)
        counted_on = macs_input(self.model, self.costs.image_size)
        comparisons = compare_arms(records)
        result = write_result(self.folder / "result.json", records, comparisons, counted_on)
        if self.kept is not None:
            keep(self.folder, self.kept)
        return result

    def _result(self, prepared: Prepared, seed: int) -> RunResult | None:
        result = read_run_result(self._run_dir(prepared, seed))
        if result is None:
            return None
        cost = self.costs(prepared.plans[seed][1].widths)
        return replace(result, **vars(cost))

    def _measure_latency(self) -> dict[str, float]:
        """Latency of every arm, or of none: times of different machines do not compare."""
        runs = {
            arm.name: self._run_dir(prepared, next(iter(prepared.plans)))
            for arm, prepared in self.arms.items()
        }
        if not all(has_weights(run) for run in runs.values()):
            return {}
        return measure_latency(
            {name: load_run(run)[0] for name, run in runs.items()},
            self.data.val[0][0],
            self.config.latency_runs,
            self.device,
            progress=self.progress,
        )
