"""Arms of a search: each kind is one class here, and nothing else knows an arm by its name.

A new control is one more class, entered in :data:`KINDS`: its name, the plan of widths for every
seed, the weights that a run starts from, what is asked of it, and its colour in figures. A rule of
:data:`fastcov.widths.RULES` brings its own arms (``searched-RULE`` and the controls of that search)
without a line here.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import ClassVar, Protocol

from fastcov import Spectrum
from fastcov.widths import RULES, WidthPlan
from fastcov_detection.config import ConfigError, SearchConfig, TrainConfig, closest
from fastcov_detection.search.folder import plan_path, run_dir, start_path
from fastcov_detection.search.proposals import Proposer, has_settled, load_plan
from fastcov_detection.search.pruning import WIDER, check_peer
from fastcov_detection.search.verdicts import Question


@dataclass(frozen=True)
class Prepared:
    """An arm that can be trained: its folder, and its plan of widths for each seed."""

    arm: Arm
    folder: str
    plans: Mapping[int, tuple[str, WidthPlan]]
    """By seed: the name of the plan's file and the plan."""

    @property
    def first_plan(self) -> WidthPlan:
        """Plan of the first seed."""
        return next(iter(self.plans.values()))[1]


class Search(Protocol):
    """A search at work, as its arms see it."""

    config: SearchConfig
    folder: Path
    proposer: Proposer
    seeds: Sequence[int]

    def plan(self, name: str, propose: Callable[[], WidthPlan]) -> WidthPlan:
        """The plan of a name, proposed once and read from its file afterwards."""

    def prepared(self, arm: Arm) -> Prepared:
        """An arm that was prepared before this one."""

    def spectra(self, name: str, prepared: Prepared, rule: str) -> Mapping[str, Spectrum]:
        """Spectra that a rule reads of an arm's first run, which is trained if need be."""

    def untrained_spectra(self, rule: str) -> Mapping[str, Spectrum]:
        """Spectra that a rule reads of the baseline before it is trained."""

    def train(self, arms: Sequence[Prepared], seeds: Sequence[int]) -> None:
        """Trains runs of arms that others are derived from."""

    def prune(self, wider: Prepared, names: Mapping[int, str]) -> None:
        """Trains a wider detector, and leaves plan and weights of what pruning makes of it."""


@dataclass(frozen=True)
class Arm(ABC):
    """One kind of network that a search trains at every seed; base class of all."""

    colour: ClassVar[str | None] = None
    """In figures; None: one that no other arm of the figure has."""
    settings: ClassVar[str] = "train.json"
    """File of the search that holds the settings of the arm's runs."""
    turn: ClassVar[int] = 0
    """Arms of a lower turn come first within a seed."""
    is_searched: ClassVar[bool] = False
    """Its widths follow from the spectra of the trained baseline: the search's own answer."""
    reads_spectra: ClassVar[bool] = False
    names_its_maker: ClassVar[bool] = False
    """The record carries another program's name and version, which is the plan's rule."""

    stem: ClassVar[str]
    """Name of the arm, where it has no parameter."""

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
        """Refuses a search in which this arm is impossible, before anything is trained."""
        return  # most arms are possible in every search

    @abstractmethod
    def prepare(self, search: Search) -> Prepared:
        """Plans of widths for every seed, after the trainings that they follow from."""

    def start(self, folder: Path, plan: str) -> Path | None:
        """File of the weights that a run of a plan starts from; None: random ones."""
        return None

    def question(self, versus: Arm) -> Question | None:
        """Question of the comparison with another arm; None if the two are not compared."""
        return "no loss" if isinstance(versus, Baseline) else None

    def is_control_of(self, searched: Arm) -> bool:
        """Whether a searched arm has to be better than this one."""
        return not self.is_searched

    def run_folder(self, folder: Path, widths: Mapping[str, int]) -> str:
        """Name of the folder that holds the runs which became the arm with these widths."""
        return self.name


def _one_plan(
    arm: Arm, search: Search, propose: Callable[[], WidthPlan], folder: str | None = None
) -> Prepared:
    """An arm whose plan is the same at every seed."""
    folder = folder or arm.name
    plan = search.plan(folder, propose)
    return Prepared(arm, folder, dict.fromkeys(search.seeds, (folder, plan)))


class Baseline(Arm):
    """The configuration's own widths."""

    stem = "baseline"
    colour = "#2b2f33"

    def prepare(self, search: Search) -> Prepared:
        """One plan, the groups' own widths."""
        return _one_plan(self, search, search.proposer.baseline)


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
        """Arms of the main rule come before those of further ones."""
        return 0 if self.rule is None else 1

    @classmethod
    def every(cls) -> tuple[Arm, ...]:
        """One arm for the main rule, and one for every rule that fastcov knows."""
        return (cls(), *(cls(rule) for rule in RULES))


class Searched(Ruled):
    """Widths that follow from the spectra of the trained baseline."""

    stem = "searched"
    colour = "#1f78b4"
    is_searched = True
    reads_spectra = True

    def prepare(self, search: Search) -> Prepared:
        """One round of a further rule; of the main one, rounds until widths stand still."""
        baseline = search.prepared(Baseline())
        rule = self.rule or search.config.rule
        spectra = search.spectra(baseline.folder, baseline, rule)
        if self.rule is not None:
            return _one_plan(self, search, partial(search.proposer.from_spectra, spectra, rule))
        found = self._round(1, search, spectra)
        for number in range(2, search.config.rounds + 1):
            search.train([found], search.seeds[:1])
            spectra = search.spectra(found.folder, found, rule)
            following = self._round(number, search, spectra)
            if has_settled(search.proposer.groups, found.first_plan, following.first_plan):
                break
            found = following
        return found

    def _round(self, number: int, search: Search, spectra: Mapping[str, Spectrum]) -> Prepared:
        propose = partial(search.proposer.from_spectra, spectra)
        return _one_plan(self, search, propose, f"{self.name}-round{number}")

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


class _Matched(Ruled):
    """Controls with the parameters of the network that a rule searched."""

    @property
    def needs(self) -> Arm:
        """The searched arm of the same rule."""
        return Searched(self.rule)

    def is_control_of(self, searched: Arm) -> bool:
        """True for the arm that it is matched to; the main rule's stand for all."""
        return searched.is_searched and (self.rule is None or searched == self.needs)


class Uniform(_Matched):
    """The baseline scaled to the searched parameters; its MACs come out lower."""

    stem = "uniform"
    colour = "#c8501e"

    def prepare(self, search: Search) -> Prepared:
        """One plan, at the parameters of the searched one."""
        searched = search.prepared(self.needs).first_plan
        return _one_plan(self, search, partial(search.proposer.uniform, searched))


class Random(Arm):
    """A draw of widths at the same MACs, another one for each seed."""

    stem = "random"
    colour = "#8a6fb0"

    def prepare(self, search: Search) -> Prepared:
        """A plan for every seed."""
        plans = {}
        for seed in search.seeds:
            name = f"{self.name}-seed{seed}"
            plans[seed] = name, search.plan(name, partial(search.proposer.random, seed))
        return Prepared(self, self.name, plans)


class Untrained(Ruled):
    """The same rule on the spectra of the network before training."""

    stem = "untrained"
    colour = "#3f8f4f"
    reads_spectra = True

    def prepare(self, search: Search) -> Prepared:
        """One plan, from the network that the first seed's baseline starts from."""
        rule = self.rule or search.config.rule
        spectra = search.untrained_spectra(rule)
        return _one_plan(self, search, partial(search.proposer.from_spectra, spectra, rule))


class Power(_Matched):
    """Baseline widths to the power that has the searched parameters at the same MACs."""

    stem = "power"
    colour = "#b08d1f"

    def prepare(self, search: Search) -> Prepared:
        """One plan, at the parameters of the searched one."""
        searched = search.prepared(self.needs).first_plan
        return _one_plan(self, search, partial(search.proposer.power, searched))


class Quarter(Arm):
    """The baseline scaled to a quarter of its backbone's parameters, whatever the rules say."""

    stem = "quarter"
    turn = 2

    def prepare(self, search: Search) -> Prepared:
        """One plan without any spectrum."""
        return _one_plan(self, search, search.proposer.quarter)


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
        """Refuses a missing pruner, and norms that it does not prune."""
        check_peer(config.train.model.norm)

    def prepare(self, search: Search) -> Prepared:
        """A plan for each of the first ``peer_seeds`` seeds, with its pruned weights."""
        seeds = search.seeds[: search.config.peer_seeds]
        names = {seed: self.plan_name(seed) for seed in seeds}
        # A run whose result was kept needs neither the wider detector nor its pruned weights.
        missing = {
            seed: name
            for seed, name in names.items()
            if not (run_dir(search.folder, self.name, seed) / "run.json").exists()
            and not start_path(search.folder, name).exists()
        }
        if missing:
            search.prune(Wider().prepare(search), missing)
        plans = {seed: (n, load_plan(plan_path(search.folder, n))) for seed, n in names.items()}
        return Prepared(self, self.name, plans)

    def plan_name(self, seed: int) -> str:
        """Name of the plan that pruning left at a seed."""
        return f"{self.name}-seed{seed}"

    def start(self, folder: Path, plan: str) -> Path:
        """The weights that pruning left."""
        return start_path(folder, plan)


class PrunedFromScratch(Arm):
    """The widths of the first pruning at every seed, from random weights like every arm."""

    stem = "torch-pruning-scratch"
    turn = 2
    names_its_maker = True

    @classmethod
    def check(cls, config: SearchConfig) -> None:
        """Refuses what cannot be pruned."""
        Pruned.check(config)

    def prepare(self, search: Search) -> Prepared:
        """One plan, that of the pruning at the first seed."""
        first = search.seeds[0]
        name = Pruned().plan_name(first)
        if not plan_path(search.folder, name).exists():
            search.prune(Wider().prepare(search), {first: name})
        plan = load_plan(plan_path(search.folder, name))
        return Prepared(self, self.name, dict.fromkeys(search.seeds, (name, plan)))


class Wider(Arm):
    """The detector that is pruned; trained on the way, and never compared."""

    stem = "torch-pruning-from"
    settings = Pruned.settings

    @classmethod
    def train_config(cls, config: SearchConfig) -> TrainConfig:
        """The first of the pruned arm's two trainings."""
        return Pruned.train_config(config)

    def prepare(self, search: Search) -> Prepared:
        """One plan beyond the budget."""
        return _one_plan(self, search, partial(search.proposer.wider, WIDER))


@dataclass(frozen=True)
class Exponent(Arm):
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
        """None: any power is an arm."""
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

    def prepare(self, search: Search) -> Prepared:
        """One plan without any spectrum."""
        return _one_plan(self, search, partial(search.proposer.exponent, self.power))


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


def arm_names() -> list[str]:
    """Names of all arms that have a fixed one."""
    return [arm.name for kind in KINDS for arm in kind.every()]


def find_arm(name: str) -> Arm:
    """The arm that a name chooses.

    Raises:
        ConfigError: If there is none, with the closest names.
    """
    for kind in KINDS:
        arm = kind.find(name)
        if arm is not None:
            return arm
    raise ConfigError(f"unknown arm {name!r}{closest(name, arm_names())}")


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


BASELINE, SEARCHED, UNTRAINED = Baseline.stem, Searched.stem, Untrained.stem
UNIFORM, RANDOM, POWER = Uniform.stem, Random.stem, Power.stem
QUARTER, EXPONENT = Quarter.stem, Exponent.stem


def rule_arm(stem: str, rule: str | None) -> str:
    """Name of a rule's own arm; None: of the search's main rule."""
    return stem if rule is None else f"{stem}-{rule}"
