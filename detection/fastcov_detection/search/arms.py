"""Arms of a search: each kind is one class here, and nothing else knows an arm by its name.

A new control is one more class, entered in :data:`KINDS`: its name, the plan of widths that it
proposes, the weights that a run starts from, the question of a comparison with it, and its colour
in figures. A rule of :data:`fastcov.widths.RULES` brings its own arms (``searched-RULE`` and the
controls of that search) without a line here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol

from fastcov import Spectrum, WidthGroup
from fastcov.widths import (
    RULES,
    WidthPlan,
    power_widths,
    random_widths,
    suggest_widths,
    uniform_widths,
)
from fastcov_detection.config import SearchConfig, TrainConfig
from fastcov_detection.detector.build import Costs
from fastcov_detection.errors import ConfigError, closest
from fastcov_detection.search.folder import load_plan, plan_path, run_dir, start_path
from fastcov_detection.search.pruning import WIDER, check_peer
from fastcov_detection.search.verdicts import Question


@dataclass(frozen=True)
class Prepared:
    """An arm that can be trained: its folder, and its plan of widths for each seed."""

    arm: Arm
    folder: str
    plans: Mapping[int, tuple[str, WidthPlan]]
    """Name of the plan's file, and the plan, by seed."""

    @property
    def first_plan(self) -> WidthPlan:
        """Plan of the first seed."""
        return next(iter(self.plans.values()))[1]


class Search(Protocol):
    """A search at work, as its arms see it."""

    config: SearchConfig
    folder: Path
    groups: Sequence[WidthGroup]
    costs: Costs
    budget: float
    """Multiply-accumulates of the searched detector."""
    seeds: Sequence[int]

    def plan(self, name: str, propose: Callable[[], WidthPlan]) -> WidthPlan:
        """The plan of a name, proposed once and read from its file afterwards."""

    def prepared(self, arm: Arm) -> Prepared:
        """An arm that was prepared before this one."""

    def spectra(self, prepared: Prepared, rule: str) -> Mapping[str, Spectrum]:
        """Spectra that a rule reads of an arm's first run, which is trained if need be."""

    def untrained_spectra(self, rule: str) -> Mapping[str, Spectrum]:
        """Spectra that a rule reads of the baseline before it is trained."""

    def train(self, arms: Sequence[Prepared], seeds: Sequence[int]) -> None:
        """Training of the runs of arms that others are derived from."""

    def prune(self, wider: Prepared, names: Mapping[int, str]) -> None:
        """Pruning of a trained wider detector: plan and weights of the pruned one."""


def given_plan(
    search: Search, widths: Mapping[str, int], rule: str = "given", alpha: float = 1.0
) -> WidthPlan:
    """A plan of widths that no spectrum asked for."""
    cost = search.costs(widths)
    demand = {name: float(width) for name, width in widths.items()}
    params = float(cost.params)
    return WidthPlan(dict(widths), demand, cost.macs, search.budget, alpha, rule, params=params)


@dataclass(frozen=True)
class Arm(ABC):
    """One kind of network that a search trains at every seed; base class of all."""

    colour: ClassVar[str | None] = None
    """Colour in figures; None: one that no other arm of the figure has."""
    settings: ClassVar[str] = "train.json"
    """File of the search that holds the settings of the arm's runs."""
    turn: ClassVar[int] = 0
    """Arms of a lower turn come first within a seed."""
    is_searched: ClassVar[bool] = False
    """True if the widths follow from the spectra of the trained baseline: the search's answer."""
    reads_spectra: ClassVar[bool] = False
    names_its_maker: ClassVar[bool] = False
    """True if the record carries another program's name and version, which is the plan's rule."""

    stem: ClassVar[str]
    """Name of the arm, or the first part of the name where the arm has a parameter."""

    @property
    def name(self) -> str:
        """Word by which users choose the arm."""
        return self.stem

    @property
    def needs(self) -> Arm | None:
        """Arm that this one is matched to."""
        return None

    @classmethod
    def find(cls, name: str) -> Arm | None:
        """The arm of this name, where this kind has one."""
        return next((arm for arm in cls.every() if arm.name == name), None)

    @classmethod
    def every(cls) -> tuple[Arm, ...]:
        """Arms of this kind that have fixed names."""
        return (cls(),)

    @classmethod
    def train_config(cls, config: SearchConfig) -> TrainConfig:
        """Settings of each of the arm's runs."""
        return config.train

    @classmethod
    def check(cls, config: SearchConfig) -> None:
        """Refusal of a search in which this arm is impossible; most arms are always possible."""
        return

    @abstractmethod
    def prepare(self, search: Search) -> Prepared:
        """Plans of widths for every seed, after the trainings that they follow from."""

    def _one_plan(self, search: Search, folder: str, propose: Callable[[], WidthPlan]) -> Prepared:
        plan = search.plan(folder, propose)
        return Prepared(self, folder, dict.fromkeys(search.seeds, (folder, plan)))

    def start(self, folder: Path, plan: str) -> Path | None:
        """File of the weights that a run of a plan starts from; None: random ones."""
        return None

    def question(self, versus: Arm) -> Question | None:
        """Question of the comparison with another arm; None if the two are not compared."""
        return "no loss" if isinstance(versus, Baseline) else None

    def is_control_of(self, searched: Arm) -> bool:
        """True if a searched arm has to be better than this one."""
        return not self.is_searched

    def run_folder(self, folder: Path, widths: Mapping[str, int]) -> str:
        """Name of the folder that holds the runs which became the arm with these widths."""
        return self.name


class OnePlan(Arm):
    """Arms with the same widths at every seed."""

    @abstractmethod
    def propose(self, search: Search) -> WidthPlan:
        """The plan of every seed, after the trainings that it follows from."""

    def prepare(self, search: Search) -> Prepared:
        """The one plan, proposed or read from the search's folder."""
        return self._one_plan(search, self.name, partial(self.propose, search))


class Baseline(OnePlan):
    """The configuration's own widths."""

    stem = "baseline"
    colour = "#2b2f33"

    def propose(self, search: Search) -> WidthPlan:
        """Plan of the groups' own widths."""
        return given_plan(search, {group.name: group.width for group in search.groups})


@dataclass(frozen=True)
class Ruled(Arm):
    """Arms of one rule of demand: of the search's main rule, or of a further one."""

    rule: str | None = None
    """None: the search's main rule."""

    @property
    def name(self) -> str:
        """The stem, and the rule where it is not the main one."""
        return rule_arm(self.stem, self.rule)

    @property
    def turn(self) -> int:
        """Place in the order of arms: those of the main rule come before those of further ones."""
        return 0 if self.rule is None else 1

    @classmethod
    def every(cls) -> tuple[Arm, ...]:
        """One arm for the main rule, and one for every rule that fastcov knows."""
        return (cls(), *(cls(rule) for rule in RULES))

    def rule_in(self, search: Search) -> str:
        """The rule's name."""
        return self.rule or search.config.rule

    def from_spectra(self, search: Search, spectra: Mapping[str, Spectrum]) -> WidthPlan:
        """Widths that follow spectra at no more MACs than the budget."""
        return suggest_widths(
            spectra,
            search.groups,
            search.costs.macs,
            search.budget,
            rule=self.rule_in(search),
            power=search.config.power,
            max_params=search.config.max_params,
            param_fn=search.costs.params,
        )


class Searched(Ruled):
    """Widths that follow from the spectra of the trained baseline."""

    stem = "searched"
    colour = "#1f78b4"
    is_searched = True
    reads_spectra = True

    def prepare(self, search: Search) -> Prepared:
        """One round of a further rule; of the main one, rounds until widths stand still."""
        before = search.prepared(Baseline())
        if self.rule is not None:
            return self._round(search, before, self.name)
        found = self._round(search, before, f"{self.name}-round1")
        for number in range(2, search.config.rounds + 1):
            search.train([found], search.seeds[:1])
            following = self._round(search, found, f"{self.name}-round{number}")
            if has_settled(search.groups, found.first_plan, following.first_plan):
                break
            found = following
        return found

    def _round(self, search: Search, before: Prepared, name: str) -> Prepared:
        spectra = search.spectra(before, self.rule_in(search))
        return self._one_plan(search, name, partial(self.from_spectra, search, spectra))

    def question(self, versus: Arm) -> Question | None:
        """No loss against the baseline, a gain over its controls."""
        if isinstance(versus, Baseline):
            return "no loss"
        return "better" if versus.is_control_of(self) else None

    def run_folder(self, folder: Path, widths: Mapping[str, int]) -> str:
        """Name of the last round whose plan has these widths."""
        if self.rule is not None:
            return self.name
        plans = plan_path(folder, f"{self.name}-round*")
        for path in sorted(plans.parent.glob(plans.name), reverse=True):
            if load_plan(path).widths.items() <= widths.items():
                return path.stem
        raise ConfigError(
            f"no plan in {plans.parent} has the searched widths of result.json; "
            "run the search again, finished runs are kept"
        )


class _Matched(Ruled, OnePlan):
    """Controls with the parameters of the network that a rule searched."""

    @property
    def needs(self) -> Arm:
        """The searched arm of the same rule."""
        return Searched(self.rule)

    def is_control_of(self, searched: Arm) -> bool:
        """True for the arm that this one is matched to; controls of the main rule serve all."""
        return searched.is_searched and (self.rule is None or searched == self.needs)


class Uniform(_Matched):
    """The baseline scaled to the searched parameters; its MACs come out lower."""

    stem = "uniform"
    colour = "#c8501e"

    def propose(self, search: Search) -> WidthPlan:
        """Plan with one scale for every width."""
        target = search.prepared(self.needs).first_plan.params
        plan = uniform_widths(search.groups, search.costs.params, target)
        cost = search.costs(plan.widths)
        return replace(plan, macs=cost.macs, budget=search.budget, params=cost.params)


class Random(Arm):
    """A draw of widths at the same MACs, another one for each seed."""

    stem = "random"
    colour = "#8a6fb0"

    def prepare(self, search: Search) -> Prepared:
        """A plan for every seed."""
        plans = {}
        for seed in search.seeds:
            name = f"{self.name}-seed{seed}"
            plans[seed] = name, search.plan(name, partial(self.draw, search, seed))
        return Prepared(self, self.name, plans)

    def draw(self, search: Search, seed: int) -> WidthPlan:
        """The plan of a seed."""
        plan = random_widths(search.groups, search.costs.macs, search.budget, seed)
        return replace(plan, params=search.costs.params(plan.widths))


class Untrained(Ruled, OnePlan):
    """The same rule on the spectra of the network before training."""

    stem = "untrained"
    colour = "#3f8f4f"
    reads_spectra = True

    def propose(self, search: Search) -> WidthPlan:
        """Plan from the network that the first seed's baseline starts from."""
        return self.from_spectra(search, search.untrained_spectra(self.rule_in(search)))


class Power(_Matched):
    """Baseline widths to the power that has the searched parameters at the same MACs."""

    stem = "power"
    colour = "#b08d1f"

    def propose(self, search: Search) -> WidthPlan:
        """Plan of the power that meets MACs and parameters."""
        params, costs = search.prepared(self.needs).first_plan.params, search.costs
        budget = costs.macs, search.budget
        return power_widths(search.groups, *budget, params=params, param_fn=costs.params)


class Quarter(OnePlan):
    """The baseline scaled to a quarter of its backbone's parameters, whatever the rules say."""

    stem = "quarter"
    turn = 2

    def propose(self, search: Search) -> WidthPlan:
        """Plan with one scale for every width."""
        costs = search.costs
        target = costs(None).backbone_params / 4
        plan = uniform_widths(search.groups, lambda w: costs(w).backbone_params, target)
        return given_plan(search, plan.widths, "uniform", plan.alpha)


class Pruned(Arm):
    """A wider trained detector, pruned to the budget by Torch-Pruning and trained again."""

    stem = "torch-pruning"
    settings = "train-peer.json"
    turn = 2
    names_its_maker = True

    @classmethod
    def train_config(cls, config: SearchConfig) -> TrainConfig:
        """Each of the arm's two trainings: as long as every arm's, or half as long."""
        if config.peer_steps == "each":
            return config.train
        return replace(config.train, steps=max(1, config.train.steps // 2))

    @classmethod
    def check(cls, config: SearchConfig) -> None:
        """Refusal of a missing pruner, and of norms that it does not prune."""
        check_peer(config.train.model.norm)

    def prepare(self, search: Search) -> Prepared:
        """A plan for each of the first ``peer_seeds`` seeds, with its pruned weights."""
        names = {seed: f"{self.name}-seed{seed}" for seed in self.seeds(search)}
        missing = {seed: name for seed, name in names.items() if self.is_missing(search, seed)}
        if missing:
            search.prune(Wider().prepare(search), missing)
        plans = {seed: (n, load_plan(plan_path(search.folder, n))) for seed, n in names.items()}
        return Prepared(self, self.name, plans)

    def seeds(self, search: Search) -> Sequence[int]:
        """Seeds at which a wider detector is trained and pruned."""
        return search.seeds[: search.config.peer_seeds]

    def is_missing(self, search: Search, seed: int) -> bool:
        """True where neither the run's result nor its pruned weights are there."""
        result = run_dir(search.folder, self.name, seed) / "run.json"
        weights = start_path(search.folder, f"{self.name}-seed{seed}")
        return not result.exists() and not weights.exists()

    def start(self, folder: Path, plan: str) -> Path | None:
        """The weights that pruning left."""
        return start_path(folder, plan)


class PrunedFromScratch(Arm):
    """The widths of the first pruning at every seed, from random weights like every arm."""

    stem = "torch-pruning-scratch"
    turn = 2
    names_its_maker = True

    @classmethod
    def check(cls, config: SearchConfig) -> None:
        """Refusal of a missing pruner, and of norms that it does not prune."""
        Pruned.check(config)

    def prepare(self, search: Search) -> Prepared:
        """One plan, that of the pruning at the first seed."""
        name = f"{Pruned.stem}-seed{search.seeds[0]}"
        path = plan_path(search.folder, name)
        if not path.exists():
            search.prune(Wider().prepare(search), {search.seeds[0]: name})
        return Prepared(self, self.name, dict.fromkeys(search.seeds, (name, load_plan(path))))


class Wider(OnePlan):
    """The detector that is pruned; trained on the way, and never compared."""

    stem = "torch-pruning-from"
    settings = Pruned.settings

    @classmethod
    def train_config(cls, config: SearchConfig) -> TrainConfig:
        """The first of the pruned arm's two trainings."""
        return Pruned.train_config(config)

    def propose(self, search: Search) -> WidthPlan:
        """Plan of the baseline's widths times a factor, beyond the budget."""
        widths = {g.name: round(WIDER * g.width / g.multiple) * g.multiple for g in search.groups}
        return given_plan(search, widths, f"baseline x {WIDER:g}", WIDER)


@dataclass(frozen=True)
class Exponent(OnePlan):
    """Baseline widths to a fixed power, at the same MACs."""

    power: float = 1.0
    stem: ClassVar[str] = "exponent-"
    turn: ClassVar[int] = 2

    @property
    def name(self) -> str:
        """The stem and the power in its shortest form."""
        return f"{self.stem}{self.power:g}"

    @classmethod
    def every(cls) -> tuple[Arm, ...]:
        """No fixed name: any power is an arm."""
        return ()

    @classmethod
    def find(cls, name: str) -> Arm | None:
        """The arm of a power.

        Raises:
            ConfigError: If the power is not a number above 0 and up to 2 in its shortest form.
        """
        if not name.startswith(cls.stem):
            return None
        text = name.removeprefix(cls.stem)
        try:
            arm = cls(float(text))
        except ValueError:
            arm = cls(math.nan)
        if not 0 < arm.power <= 2 or arm.name != name:
            raise ConfigError(
                f"arm {name!r}: the exponent is {text!r}; write a number above 0 and up to 2 in "
                f"its shortest form, for example {cls(0.5).name}"
            )
        return arm

    def propose(self, search: Search) -> WidthPlan:
        """Plan at the budget, without any spectrum."""
        budget = search.costs.macs, search.budget, self.power
        return power_widths(search.groups, *budget, param_fn=search.costs.params)


KINDS: tuple[type[Arm], ...] = (
    Baseline,
    Searched,
    Uniform,
    Random,
    Untrained,
    Power,
    Quarter,
    Pruned,
    PrunedFromScratch,
    Exponent,
)
"""Every kind of arm, in the order in which a seed's runs are started."""


def find_arm(name: str) -> Arm:
    """The arm that a name chooses.

    Raises:
        ConfigError: If there is none, with the closest names.
    """
    for kind in KINDS:
        arm = kind.find(name)
        if arm is not None:
            return arm
    known = [arm.name for kind in KINDS for arm in kind.every()]
    raise ConfigError(f"unknown arm {name!r}{closest(name, known)}")


def check_arms(names: Sequence[str]) -> tuple[Arm, ...]:
    """The arms in the order of their turns, with the baseline that all others are derived from.

    Raises:
        ConfigError: If an arm is unknown, or lacks the one that it is matched to.
    """
    arms = {Baseline(), *map(find_arm, names)}
    for arm in arms:
        if arm.needs is not None and arm.needs not in arms:
            raise ConfigError(
                f"arm {arm.name!r} has the parameters of the searched network; "
                f"add {arm.needs.name!r} to the arms"
            )
    return tuple(sorted(arms, key=lambda arm: (arm.turn, KINDS.index(type(arm)), arm.name)))


def has_settled(groups: Sequence[WidthGroup], before: WidthPlan, after: WidthPlan) -> bool:
    """True if every width moved by less than its rounding."""
    moves = ((g.multiple, after.widths[g.name] - before.widths[g.name]) for g in groups)
    return all(abs(move) < multiple for multiple, move in moves)


BASELINE, SEARCHED, UNTRAINED = Baseline.stem, Searched.stem, Untrained.stem
UNIFORM, RANDOM, POWER = Uniform.stem, Random.stem, Power.stem
QUARTER, EXPONENT = Quarter.stem, Exponent.stem


def rule_arm(stem: str, rule: str | None) -> str:
    """Name of a rule's own arm; None: of the search's main rule."""
    return stem if rule is None else f"{stem}-{rule}"
