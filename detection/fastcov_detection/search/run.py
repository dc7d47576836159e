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

from fastcov import Spectrum
from fastcov.widths import RULES, WidthPlan
from fastcov_detection.config import SearchConfig, save_config
from fastcov_detection.data.dataset import LoadedData, load_data
from fastcov_detection.detector.build import build_model, parse_name, save_widths
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.distributed import pick_device
from fastcov_detection.files import write_file
from fastcov_detection.progress import progress_bar
from fastcov_detection.search.arms import KINDS, Arm, Baseline, Prepared, Searched, find_arm
from fastcov_detection.search.engines import (
    Engine,
    Job,
    LocalEngine,
    locked,
    run_jobs,
)
from fastcov_detection.search.folder import plan_path, run_dir, start_path
from fastcov_detection.search.keeping import keep, restore
from fastcov_detection.search.latency import measure_latency
from fastcov_detection.search.measurements import Measurements
from fastcov_detection.search.opening import (
    check_same_data,
    check_same_search,
    checked,
    recorded_latency,
)
from fastcov_detection.search.proposals import Costs, Proposer, load_plan, save_plan
from fastcov_detection.search.pruning import peer_version, prune_to_budget
from fastcov_detection.search.results import ArmRecord, compare_arms, macs_input, write_result
from fastcov_detection.train.folder import RunResult, has_weights, load_run, read_run_result

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
    """Runs a width search to its end, or goes on with one.

    Args:
        config: The search.
        folder: Its folder.
        results: Folder that keeps what is small enough for version control (results, plans of
            widths and spectra, no weights) as each run ends. What it holds already is not run
            again, so a search goes on in a fresh clone.
        engine: Where runs are trained; None: on this machine, ``config.jobs`` at a time.
        progress: Show bars.

    Returns:
        What result.json holds.

    Raises:
        ConfigError: If settings are impossible, or the folder holds another search.
        RunError: If a training run fails or the folder is in use.
    """
    folder, kept = Path(folder), None if results is None else Path(results)
    config = checked(config)
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
        self.data: LoadedData = load_data(
            config.train.data, with_masks=predicts_masks, progress=progress
        )
        check_same_data(folder, self.data.content)
        classes = len(self.data.class_names) + 1
        self.model_config = replace(config.train.model, num_classes=classes)
        self.image_size = config.image_size or self.model_config.min_size
        with torch.device("meta"):
            baseline = build_model(replace(self.model_config, init="random"))
        self.groups = [
            replace(group, floor=max(group.floor, min(_LEAST_WIDTH, group.width)))
            for group in width_groups(baseline, vary=config.vary)
        ]
        self.proposer = Proposer(config, self.groups, Costs(self.model_config, self.image_size))
        self.seeds = [config.first_seed + index for index in range(config.seeds)]
        self.device = pick_device(config.train.device)
        self.measurements = Measurements(
            config, folder, self.model_config, self.data.train, self.device, progress=progress
        )
        self.arms: dict[Arm, Prepared] = {}
        self.latency = recorded_latency(folder)

    def run(self) -> dict[str, Any]:
        """Every step of the search; what an earlier process finished is read, not repeated."""
        arms = [find_arm(name) for name in self.config.arms]
        baseline = self.arms[Baseline()] = Baseline().prepare(self)
        # One run is what the widths follow from; others keep cores busy meanwhile. After that,
        # seed by seed: whenever a search is stopped, what it has finished can be compared.
        self.train([baseline], self.seeds[: self.config.jobs])
        if any(arm.reads_spectra for arm in arms):
            # The report shows spectra of features whatever the rule reads.
            features = next(name for name, rule in RULES.items() if rule.reads == "features")
            for rule in dict.fromkeys((features, self.config.rule)):
                self.spectra(baseline.folder, baseline, rule)
                self.untrained_spectra(rule)
        for arm in arms:
            if arm not in self.arms:
                self.arms[arm] = arm.prepare(self)
        if Searched() in self.arms:
            save_widths(self._all_widths(self.arms[Searched()]), self.folder / "widths.json")
        # What is known already, from here or kept elsewhere, is recorded before anything is added.
        self._record()
        self.train(list(self.arms.values()), self.seeds)
        self.latency = self._latency() or self.latency
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

    def spectra(self, name: str, prepared: Prepared, rule: str) -> Mapping[str, Spectrum]:
        """Spectra that a rule reads of an arm's first run."""

        def find() -> Path:
            # Weights may be missing where an earlier process ended before it measured spectra.
            self._train_for_weights(prepared, self.seeds[:1])
            return self._run_dir(prepared, self.seeds[0])

        return self.measurements.trained(name, rule, find)

    def untrained_spectra(self, rule: str) -> Mapping[str, Spectrum]:
        """Spectra that a rule reads of the baseline before it is trained."""
        return self.measurements.untrained(rule, self.seeds[0])

    def prune(self, wider: Prepared, names: Mapping[int, str]) -> None:
        """Trains the wider detector at some seeds, and leaves what pruning makes of each.

        It takes longer than any arm, so that the arms before it are trained first.
        """
        self.train(list(self.arms.values()), self.seeds)
        self._train_for_weights(wider, list(names))
        for seed, name in names.items():
            self._prune(self._run_dir(wider, seed), name)

    def _prune(self, wider: Path, name: str) -> None:
        model, _, _ = load_run(wider)
        label = f"pruning for {name}"
        with progress_bar(label, 1, enabled=self.progress) as advance:
            costs = self.proposer.costs
            pruned = prune_to_budget(model, self.groups, costs.macs, self.proposer.budget)
            advance(1)
        plan = self.proposer.pruned(pruned.widths, peer_version(), pruned.ratio)
        save_plan(plan, plan_path(self.folder, name))
        weights = start_path(self.folder, name)
        write_file(weights, lambda file: torch.save(pruned.state, file))

    def _all_widths(self, prepared: Prepared) -> dict[str, int]:
        """The arm's widths, those of the groups that do not vary included."""
        with torch.device("meta"):
            model = build_model(
                replace(self.model_config, init="random"), prepared.first_plan.widths
            )
        return dict(model.widths)

    def _run_dir(self, prepared: Prepared, seed: int) -> Path:
        return run_dir(self.folder, prepared.folder, seed)

    def _train_for_weights(self, prepared: Prepared, seeds: Sequence[int]) -> None:
        """Trains runs whose weights are needed: results alone, kept elsewhere, do not do."""
        for seed in seeds:
            run = self._run_dir(prepared, seed)
            if not has_weights(run):
                (run / "run.json").unlink(missing_ok=True)
        self.train([prepared], seeds)

    def train(self, arms: Sequence[Prepared], seeds: Sequence[int]) -> None:
        """Trains what is not finished of these arms, seed by seed."""
        run_jobs(
            [self._job(one, seed) for seed in seeds for one in arms if seed in one.plans],
            engine=self.engine,
            # A long search can be read, and stopped, after every run.
            on_finish=self._record,
            progress=self.progress,
        )

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

    def _record(self) -> dict[str, Any]:
        """Writes result.json from the runs that are finished."""
        records = []
        for arm, prepared in self.arms.items():
            runs = [self._result(prepared, seed) for seed in prepared.plans]
            record = ArmRecord(arm.name, self._all_widths(prepared), [run for run in runs if run])
            record.made_with = prepared.first_plan.rule if arm.names_its_maker else None
            record.latency_ms = self.latency.get(arm.name)
            records.append(record)
        counted_on = macs_input(self.model_config, self.image_size)
        comparisons = compare_arms(records)
        result = write_result(self.folder / "result.json", records, comparisons, counted_on)
        if self.kept is not None:
            keep(self.folder, self.kept)
        return result

    def _result(self, prepared: Prepared, seed: int) -> RunResult | None:
        result = read_run_result(self._run_dir(prepared, seed))
        if result is None:
            return None
        _, plan = prepared.plans[seed]
        cost = self.proposer.costs(plan.widths)
        return replace(
            result,
            params=cost.params,
            backbone_params=cost.backbone_params,
            macs=cost.macs,
        )

    def _latency(self) -> dict[str, float]:
        """Latency of every arm, or of none: times of different machines do not compare."""
        runs = {
            arm.name: self._run_dir(prepared, next(iter(prepared.plans)))
            for arm, prepared in self.arms.items()
        }
        if not all(has_weights(run) for run in runs.values()):
            return {}
        models = {name: load_run(run)[0] for name, run in runs.items()}
        image, _ = self.data.val[0]
        return measure_latency(
            models, image, self.config.latency_runs, self.device, progress=self.progress
        )
