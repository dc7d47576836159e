"""Contest: one piece of work and its contenders, compared with the oracle before they are timed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import torch

from fastcov.bench.floors import Floor
from fastcov.bench.machine import Rates, read_rates
from fastcov.bench.timing import (
    Call,
    Clock,
    interleave,
    mean_interval,
    quantiles,
    ratios,
    without_nan,
)

Size = Literal["tiny", "default", "full"]
Statistic = Literal["median", "mean"]
OURS = "fastcov"
DEFAULT, EVERY_ROW = "fastcov, default", "fastcov, every row"
"""Contenders: a tracker with default arguments, and one with ``rows="all"``."""


class WrongResultError(AssertionError):
    """Error of a result of fastcov that differs from the oracle: its time is never taken."""


@dataclass
class Setting:
    """Device and size of benchmarks, and the time at which they end.

    Attributes:
        device: CPU, or one GPU.
        size: "tiny" runs everything once, "full" the whole grid.
        missing: Reasons by peer, of peers that cannot run here; filled while contests are built.
        ends_at: Value of time.monotonic() after which no contest begins; a running contest's
            budget ends there too.
    """

    device: torch.device
    size: Size = "default"
    missing: dict[str, str] = field(default_factory=dict)
    ends_at: float = math.inf
    _rates: Rates | None = None

    @property
    def is_tiny(self) -> bool:
        """True if everything runs once only."""
        return self.size == "tiny"

    @property
    def rates(self) -> Rates:
        """Bandwidth and matmul rates of this machine, measured on first use."""
        if self._rates is None:
            self._rates = read_rates(self.device, is_quick=self.is_tiny)
        return self._rates

    def rounds(self, default: int, full: int | None = None) -> int:
        """Rounds of an interleaved run at this size."""
        if self.is_tiny:
            return 2
        return default if self.size == "default" else full or 2 * default


@dataclass
class Contest:
    """One piece of work and its contenders, ready to be timed.

    Attributes:
        contenders: Calls by name, the reference among them.
        reference: Name of the contender whose times divide the others', round by round.
        errors: Largest error of each contender that was compared with the oracle, relative to the
            oracle's largest entry.
        floor: Least time of this machine; None if unknown.
        rounds: Largest number of rounds.
        budget_s: Seconds after which the contest stops, once ``fewest_rounds`` are done.
        fewest_rounds: Smallest number of rounds, whatever they take.
        statistic: Summary of the ratios. "mean" if a contender's cost lies in a few of the rounds,
            which a median would hide.
        clock: See :func:`fastcov.bench.timing.interleave`.
        prepare: Function that is called before each sample, outside the time.
        periods: Rounds per sample, of contenders that need fewer samples; see
            :func:`fastcov.bench.timing.interleave`.
        notes: Further numbers of a contender's row, by contender.
        after: Function of the measured rows, to which it may add notes.
    """

    contenders: Mapping[str, Call]
    reference: str
    rounds: int
    errors: Mapping[str, float] = field(default_factory=dict)
    floor: Floor | None = None
    budget_s: float = math.inf
    fewest_rounds: int = 6
    statistic: Statistic = "median"
    clock: Clock = "wall"
    prepare: Callable[[str, int], None] | None = None
    periods: Mapping[str, int] = field(default_factory=dict)
    notes: dict[str, dict[str, Any]] = field(default_factory=dict)
    after: Callable[[Sequence[Row]], None] | None = None


class Work(NamedTuple):
    """Contest that is not built yet: large inputs are made when its turn comes."""

    name: str
    build: Callable[[Setting], Contest]


@dataclass
class Row:
    """One contender's result on one piece of work.

    Attributes:
        work: Name of the piece of work.
        contender: Name of the contender.
        versus: Name of the contest's reference.
        ratio: This contender's time over the reference's: median over the rounds, or mean.
        ratio_low: Lower 95 % bound of ``ratio``.
        ratio_high: Upper 95 % bound of ``ratio``.
        statistic: Summary that ``ratio`` is: median or mean.
        floor_s: Least time on this machine at its measured rates.
        floor_of: Resource that sets the floor: "bandwidth", "arithmetic", "latency" or
            "reciprocals".
        error: Error against the float64 oracle, checked before the time was taken.
    """

    work: str
    contender: str
    samples: int
    p20_s: float
    p50_s: float
    p80_s: float
    low_s: float
    high_s: float
    versus: str
    ratio: float
    ratio_low: float
    ratio_high: float
    floor_s: float | None = None
    floor_of: str | None = None
    error: float | None = None
    notes: dict[str, Any] = field(default_factory=dict)
    statistic: Statistic = "median"

    @property
    def floor_ratio(self) -> float | None:
        """Measured time divided by the floor; 1 is perfect."""
        return None if not self.floor_s else self.p50_s / self.floor_s

    def as_dict(self) -> dict[str, Any]:
        """Fields and ``floor_ratio``, for a JSON file."""
        return {**asdict(self), "floor_ratio": self.floor_ratio}


def find_row(rows: Iterable[Row], work: str, contender: str) -> Row | None:
    """Row of one contender on one piece of work; None if there is none."""
    return next((r for r in rows if (r.work, r.contender) == (work, contender)), None)


def measure(work: str, contest: Contest, setting: Setting) -> list[Row]:
    """Times of a contest's contenders in one interleaved run.

    Args:
        work: Name of the piece of work.
        contest: Contest that was built and checked.
        setting: Setting in which the contest was built.

    Returns:
        One row for each contender, that of fastcov first.
    """
    samples = interleave(
        contest.contenders,
        setting.device,
        rounds=contest.rounds,
        budget_s=min(contest.budget_s, setting.ends_at - time.monotonic()),
        fewest_rounds=contest.fewest_rounds,
        clock=contest.clock,
        prepare=contest.prepare,
        periods=contest.periods,
        reference=contest.reference,
    )
    rows = []
    for name, seconds in samples.items():
        spread = quantiles(without_nan(seconds))
        paired = ratios(seconds, samples[contest.reference])
        if contest.statistic == "mean":
            ratio, low, high = mean_interval(paired)
        else:
            middle = quantiles(paired)
            ratio, low, high = middle.p50, middle.low, middle.high
        rows.append(
            Row(
                work=work,
                contender=name,
                samples=spread.samples,
                p20_s=spread.p20,
                p50_s=spread.p50,
                p80_s=spread.p80,
                low_s=spread.low,
                high_s=spread.high,
                versus=contest.reference,
                ratio=ratio,
                ratio_low=low,
                ratio_high=high,
                floor_s=contest.floor.seconds if contest.floor else None,
                floor_of=contest.floor.of if contest.floor else None,
                error=contest.errors.get(name),
                notes=dict(contest.notes.get(name, {})),
                statistic=contest.statistic,
            )
        )
    if contest.after is not None:
        contest.after(rows)
    return rows


def check(work: str, error: float, bar: float) -> float:
    """Check that a result of fastcov is right enough to be timed.

    Returns:
        ``error``.

    Raises:
        WrongResultError: If ``error`` is above ``bar``, or NaN.
    """
    if not error <= bar:
        raise WrongResultError(
            f"{work}: the result of fastcov is off by {error:.2e} of the oracle's largest entry, "
            f"the bar is {bar:.0e}; nothing was timed. Report this with the output of "
            "'fastcov doctor'."
        )
    return error


def relative_error(result: torch.Tensor, truth: torch.Tensor) -> float:
    """Largest difference over the truth's largest entry, in float64; absolute if that is 0."""
    scale = float(truth.double().abs().max())
    difference = float((result.double() - truth.double()).abs().max())
    return difference / scale if scale else difference
