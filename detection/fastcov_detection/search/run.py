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

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from fastcov import Spectrum
from fastcov.widths import WidthPlan
from fastcov_detection.config import (
    SearchConfig,
    TrainConfig,
    save_config,
    to_dict,
)
from fastcov_detection.data.dataset import LoadedData, load_data
from fastcov_detection.detector.build import build_model, parse_name, save_widths
from fastcov_detection.detector.groups import width_groups
from fastcov_detection.distributed import pick_device
from fastcov_detection.files import write_file, write_text
from fastcov_detection.progress import progress_bar
from fastcov_detection.search.folder import (
    plan_path,
    run_dir,
    searched_folder,
    start_path,
)
from fastcov_detection.search.keeping import keep, restore
from fastcov_detection.search.latency import measure_latency
from fastcov_detection.search.measurements import Measurements
from fastcov_detection.search.opening import (
    check_same_data,
    check_same_search,
    checked,
    recorded_latency,
)
from fastcov_detection.search.proposals import (
    BASELINE,
    PEER,
    PEER_SCRATCH,
    PEERS,
    QUARTER,
    RANDOM,
    SEARCHED,
    UNTRAINED,
    Costs,
    Proposer,
    exponent_of,
    has_settled,
    load_plan,
    rule_arm,
    save_plan,
)
from fastcov_detection.search.pruning import WIDER, peer_version, prune_to_budget
from fastcov_detection.search.results import ArmRecord, compare_arms, macs_input, write_result
from fastcov_detection.search.runner import Job, locked, run_jobs
from fastcov_detection.train.folder import RunResult, has_weights, load_run, read_run_result

# Below 8 input channels, the gradient of a strided 1x1 convolution in channels_last writes outside
# its memory on some CPUs (torch 2.11 with oneDNN); one channel more or less matters little there.
_LEAST_WIDTH = 8
WIDER_ARM = f"{PEER}-from"
_PEER_RUNS = "train-peer.json"


@dataclass
class Arm:
    """An arm that is to be trained: its folder, and its plan for each seed."""

    name: str
    folder: str
    plans: dict[int, tuple[str, WidthPlan]] = field(default_factory=dict)
    """By seed: the name of the plan's file and the plan."""


def run_search(
    config: SearchConfig,
    folder: str | Path,
    *,
    results: str | Path | None = None,
    progress: bool = True,
) -> dict[str, Any]:
    """Runs a width search to its end, or goes on with one.

    Args:
        config: The search.
        folder: Its folder.
        results: Folder that keeps what is small enough for version control (results, plans of
            widths and spectra, no weights) as each run ends. What it holds already is not run
            again, so a search goes on in a fresh clone.
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
        for name, train in (("train.json", config.train), (_PEER_RUNS, _peer_train(config))):
            write_text(folder / name, json.dumps(to_dict(train), indent=2) + "\n")
        return _Search(config, folder, lock, kept, progress).run()


def _peer_train(config: SearchConfig) -> TrainConfig:
    """Each of the two trainings of the torch-pruning arm."""
    if config.peer_steps == "each":
        return config.train
    return replace(config.train, steps=max(1, config.train.steps // 2))


class _Search:
    """One search at work."""

    def __init__(
        self, config: SearchConfig, folder: Path, lock: int, kept: Path | None, progress: bool
    ) -> None:
        self.config, self.folder, self.lock, self.progress = config, folder, lock, progress
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
        self.arms: dict[str, Arm] = {}
        self.latency = recorded_latency(folder)

    def run(self) -> dict[str, Any]:
        """Every step of the search; what an earlier process finished is read, not repeated."""
        baseline = self._arm(BASELINE, BASELINE, self.proposer.baseline)
        # One run is what the widths follow from; others keep cores busy meanwhile. After that,
        # seed by seed: whenever a search is stopped, what it has finished can be compared.
        self._train([baseline], seeds=self.seeds[: self.config.jobs])
        arms = [baseline]
        if any(name.startswith((SEARCHED, UNTRAINED)) for name in self.config.arms):
            # The report shows spectra of features whatever the rule reads.
            for rule in dict.fromkeys(("dof", self.config.rule)):
                self._measured(BASELINE, baseline, rule)
                self.measurements.untrained(rule, self.seeds[0])
        for name in self.config.arms:
            if name == BASELINE:
                continue
            if name == SEARCHED:
                searched = self._search_rounds(baseline)
                arms.append(searched)
                save_widths(self._all_widths(searched), self.folder / "widths.json")
            elif name == RANDOM:
                arms.append(self._random())
            elif name == PEER:
                arms.append(self._pruned(arms))
            elif name == PEER_SCRATCH:
                arms.append(self._pruned_from_scratch(arms))
            elif name.startswith((SEARCHED, UNTRAINED)):
                arms.append(self._by_rule(name, baseline))
            elif name == QUARTER:
                arms.append(self._arm(name, name, self.proposer.quarter))
            elif (power := exponent_of(name)) is not None:
                arms.append(self._arm(name, name, partial(self.proposer.exponent, power)))
            else:
                arms.append(self._matched(name, arms))
        # What is known already, from here or kept elsewhere, is recorded before anything is added.
        self._enter(arms)
        self._record()
        self._train(arms)
        self.latency = self._latency() or self.latency
        return self._record()

    def _by_rule(self, name: str, baseline: Arm) -> Arm:
        """``untrained``, or ``searched-RULE`` and ``untrained-RULE`` by a rule of their own."""
        source, _, own = name.partition("-")
        rule = own or self.config.rule
        if source == UNTRAINED:
            spectra = self.measurements.untrained(rule, self.seeds[0])
        else:
            spectra = self._measured(BASELINE, baseline, rule)
        return self._arm(name, name, partial(self.proposer.from_spectra, spectra, rule))

    def _matched(self, name: str, before: Sequence[Arm]) -> Arm:
        """``uniform`` or ``power`` at the parameters of what the same rule searched."""
        control, _, rule = name.partition("-")
        plans = {arm.name: self._first_plan(arm) for arm in before}
        searched = plans[rule_arm(SEARCHED, rule or None)]
        return self._arm(name, name, partial(getattr(self.proposer, control), searched))

    def _search_rounds(self, baseline: Arm) -> Arm:
        """Proposes and trains until widths stand still or the rounds are used up."""
        rule = self.config.rule
        arm = self._round_arm(1, self._measured(BASELINE, baseline, rule))
        for number in range(2, self.config.rounds + 1):
            self._train([arm], seeds=self.seeds[:1])
            spectra = self._measured(arm.folder, arm, rule)
            following = self._round_arm(number, spectra)
            if has_settled(self.groups, self._first_plan(arm), self._first_plan(following)):
                break
            arm = following
        return arm

    def _round_arm(self, number: int, spectra: Mapping[str, Spectrum]) -> Arm:
        propose = partial(self.proposer.from_spectra, spectra)
        return self._arm(SEARCHED, searched_folder(number), propose)

    def _random(self) -> Arm:
        arm = Arm("random", "random")
        for seed in self.seeds:
            name = f"random-seed{seed}"
            arm.plans[seed] = name, self._plan(name, partial(self.proposer.random, seed))
        return arm

    def _pruned(self, before: Sequence[Arm]) -> Arm:
        """What Torch-Pruning makes of a wider detector, for the seeds that are asked for."""
        arm = Arm(PEER, PEER)
        seeds = self.seeds[: self.config.peer_seeds]
        names = {seed: f"{PEER}-seed{seed}" for seed in seeds}
        # A run whose result was kept needs neither the wider detector nor its pruned weights.
        self._prune_wider(
            {
                seed: name
                for seed, name in names.items()
                if not (self._run_dir(arm, seed) / "run.json").exists()
                and not start_path(self.folder, name).exists()
            },
            before,
        )
        for seed in seeds:
            arm.plans[seed] = names[seed], load_plan(plan_path(self.folder, names[seed]))
        return arm

    def _pruned_from_scratch(self, before: Sequence[Arm]) -> Arm:
        """The widths of the first pruning at every seed, from random weights like every arm."""
        name = f"{PEER}-seed{self.seeds[0]}"
        if not plan_path(self.folder, name).exists():
            self._prune_wider({self.seeds[0]: name}, before)
        plan = load_plan(plan_path(self.folder, name))
        return Arm(PEER_SCRATCH, PEER_SCRATCH, dict.fromkeys(self.seeds, (name, plan)))

    def _prune_wider(self, names: Mapping[int, str], before: Sequence[Arm]) -> None:
        """Trains the wider detector at some seeds, and leaves what pruning makes of each.

        It takes longer than any arm, so that the arms before it are trained first.
        """
        if names:
            self._train(before)
        wider = self._arm(WIDER_ARM, WIDER_ARM, partial(self.proposer.wider, WIDER))
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

    def _arm(self, name: str, folder: str, propose: Callable[[], WidthPlan]) -> Arm:
        """An arm with one plan for all seeds."""
        plan = self._plan(folder, propose)
        return Arm(name, folder, dict.fromkeys(self.seeds, (folder, plan)))

    def _plan(self, name: str, propose: Callable[[], WidthPlan]) -> WidthPlan:
        path = plan_path(self.folder, name)
        if not path.exists():
            with progress_bar(f"widths of {name}", 1, enabled=self.progress) as advance:
                save_plan(propose(), path)
                advance(1)
        return load_plan(path)

    def _first_plan(self, arm: Arm) -> WidthPlan:
        return next(iter(arm.plans.values()))[1]

    def _all_widths(self, arm: Arm) -> dict[str, int]:
        """The arm's widths, those of the groups that do not vary included."""
        with torch.device("meta"):
            model = build_model(
                replace(self.model_config, init="random"), self._first_plan(arm).widths
            )
        return dict(model.widths)

    def _run_dir(self, arm: Arm, seed: int) -> Path:
        return run_dir(self.folder, arm.folder, seed)

    def _train_for_weights(self, arm: Arm, seeds: Sequence[int]) -> None:
        """Trains runs whose weights are needed: results alone, kept elsewhere, do not do."""
        for seed in seeds:
            run = self._run_dir(arm, seed)
            if not has_weights(run):
                (run / "run.json").unlink(missing_ok=True)
        self._train([arm], seeds)

    def _enter(self, arms: Sequence[Arm]) -> None:
        """Arms that the record holds from now on."""
        self.arms |= {arm.name: arm for arm in arms if arm.name != WIDER_ARM}

    def _train(self, arms: Sequence[Arm], seeds: Sequence[int] | None = None) -> None:
        self._enter(arms)
        jobs = []
        for seed in self.seeds if seeds is None else seeds:
            for arm in arms:
                if seed not in arm.plans:
                    continue
                plan_name, _ = arm.plans[seed]
                is_peer = arm.name in (PEER, WIDER_ARM)
                start = start_path(self.folder, plan_name)
                jobs.append(
                    Job(
                        label=f"{arm.name}, seed {seed}",
                        run_dir=self._run_dir(arm, seed),
                        config_file=self.folder / (_PEER_RUNS if is_peer else "train.json"),
                        widths_file=plan_path(self.folder, plan_name),
                        seed=seed,
                        steps=(_peer_train(self.config) if is_peer else self.config.train).steps,
                        start_file=start if arm.name == PEER else None,
                    )
                )
        run_jobs(
            jobs,
            at_once=self.config.jobs,
            lock=self.lock,
            # A long search can be read, and stopped, after every run.
            on_finish=self._record,
            progress=self.progress,
        )

    def _measured(self, name: str, arm: Arm, rule: str) -> dict[str, Spectrum]:
        """What a rule reads of the arm's first run."""

        def find() -> Path:
            # Weights may be missing where an earlier process ended before it measured spectra.
            self._train_for_weights(arm, self.seeds[:1])
            return self._run_dir(arm, self.seeds[0])

        return self.measurements.trained(name, rule, find)

    def _record(self) -> dict[str, Any]:
        """Writes result.json from the runs that are finished."""
        records = []
        for arm in self.arms.values():
            runs = [self._result(arm, seed) for seed in arm.plans]
            record = ArmRecord(arm.name, self._all_widths(arm), [run for run in runs if run])
            record.made_with = self._first_plan(arm).rule if arm.name in PEERS else None
            record.latency_ms = self.latency.get(arm.name)
            records.append(record)
        counted_on = macs_input(self.model_config, self.image_size)
        comparisons = compare_arms(records)
        result = write_result(self.folder / "result.json", records, comparisons, counted_on)
        if self.kept is not None:
            keep(self.folder, self.kept)
        return result

    def _result(self, arm: Arm, seed: int) -> RunResult | None:
        result = read_run_result(self._run_dir(arm, seed))
        if result is None:
            return None
        _, plan = arm.plans[seed]
        cost = self.proposer.costs(plan.widths)
        return replace(
            result,
            params=cost.params,
            backbone_params=cost.backbone_params,
            macs=cost.macs,
        )

    def _latency(self) -> dict[str, float]:
        """Latency of every arm, or of none: times of different machines do not compare."""
        runs = {n: self._run_dir(arm, next(iter(arm.plans))) for n, arm in self.arms.items()}
        if not all(has_weights(run) for run in runs.values()):
            return {}
        models = {name: load_run(run)[0] for name, run in runs.items()}
        image, _ = self.data.val[0]
        return measure_latency(
            models, image, self.config.latency_runs, self.device, progress=self.progress
        )
