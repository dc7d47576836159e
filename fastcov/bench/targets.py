"""Targets of speed, and the verdict of a machine's results on each."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any, Literal

from fastcov.bench import hooks
from fastcov.bench.contest import DEFAULT, EVERY_ROW, OURS, Row, find_row

Kind = Literal["cpu", "cuda"]
Measure = Literal[
    "share of floor", "times faster", "seconds", "seconds per hook", "times untracked"
]
Outcome = Literal["met", "missed", "not measured", "another device"]
AT_LEAST: frozenset[Measure] = frozenset({"share of floor", "times faster"})
# Targets in seconds hold for these GPUs, whose arithmetic rates and latencies are alike.
_GPUS_OF_SECONDS = ("H100", "H200", "GH200", "B200")
_TILE = 128  # channels

_GRAM = "channels_last bfloat16 C={} K=262144"
_NETWORK = "ResNet-50 convs, batch {}, bfloat16"
_SPECTRUM = "ResNet-50: 53 matrices of 64 to 2048, float32"
_NETWORKS = ("resnet50", "vit", "faster_rcnn")


@dataclass(frozen=True)
class Target:
    """Target of speed.

    Attributes:
        kind: Kind of device that the target holds for. Shares and ratios hold for every GPU,
            seconds for an H100 and newer.
        case: Case that measures the target.
        work: Piece of work of the measured row.
        contender: Contender of the measured row.
        measure: Number of the row that counts. "share of floor" and "times faster" (a peer's time
            over ours) must be at least the bound, the others at most.
        bound: Promised value, in the unit of ``measure``.
        ceiling: Best value that the tiling allows, given if it is close to the bound.
    """

    kind: Kind
    case: str
    work: str
    contender: str
    measure: Measure
    bound: float
    ceiling: float | None = None


def _steps(kind: Kind, cases: Iterable[str], default: float, every_row: float) -> list[Target]:
    bounds = {DEFAULT: default, EVERY_ROW: every_row}
    return [
        Target(kind, f"training-{case}", f"{case} training step", name, "times untracked", bound)
        for case in cases
        for name, bound in bounds.items()
    ]


def _hooks(kind: Kind, work: str, default: float, every_row: float) -> list[Target]:
    bounds = {DEFAULT: default, EVERY_ROW: every_row, hooks.INPUTS: default}
    return [
        Target(kind, "hooks", work, name, "seconds per hook", bound)
        for name, bound in bounds.items()
    ]


def _gpu(
    case: str,
    work: str,
    contender: str,
    measure: Measure,
    bound: float,
    ceiling: float | None = None,
) -> Target:
    return Target("cuda", case, work, contender, measure, bound, ceiling)


def tiles_saved(channels: int) -> float:
    """Work of the full product over that of the triangle's tiles: the largest possible speed-up.

    Example:
        >>> round(tiles_saved(1024), 2), round(tiles_saved(2048), 2)
        (1.78, 1.88)
    """
    tiles = -(-channels // _TILE)
    return tiles**2 / (tiles * (tiles + 1) / 2)


TARGETS: tuple[Target, ...] = (
    *(
        _gpu("covariance", _GRAM.format(channels), OURS, "share of floor", share)
        for channels, share in ((64, 0.85), (128, 0.85), (256, 0.85), (512, 0.75))
    ),
    *(
        _gpu(
            "covariance",
            _GRAM.format(channels),
            "torch.mm",
            "times faster",
            1.6,
            tiles_saved(channels),
        )
        for channels in (1024, 2048)
    ),
    # 3.3 and 0.6 ms on an H100.
    _gpu("covariance", _NETWORK.format("256 at 224"), OURS, "share of floor", 0.70),
    _gpu("covariance", _NETWORK.format("2 at 800x1344"), OURS, "share of floor", 0.68),
    _gpu("eigen", "n=128 B=1024, float32", OURS, "seconds", 0.4e-3),
    _gpu("eigen", "n=512 B=64, float32", OURS, "seconds", 2e-3),
    _gpu("eigen", _SPECTRUM, OURS, "seconds", 20e-3),
    _gpu("eigen", _SPECTRUM, "torch.linalg", "times faster", 20.0),
    *_steps("cuda", [*_NETWORKS, *(f"{name}-compiled" for name in _NETWORKS)], 1.01, 1.05),
    *_hooks("cuda", hooks.GPU_PATH, 6e-6, 12e-6),
    *_hooks("cuda", hooks.HEADS_PATH, 6e-6, 12e-6),
    *_steps("cpu", _NETWORKS, 1.02, 1.15),
    *_hooks("cpu", hooks.CPU_PATH, 10e-6, 10e-6),
    *_hooks("cpu", hooks.GPU_PATH, 6e-6, 12e-6),
    *_hooks("cpu", hooks.HEADS_PATH, 6e-6, 12e-6),
)
"""Every target, in the order of the printed table."""


@dataclass(frozen=True)
class Verdict:
    """A target beside its measurement.

    Attributes:
        target: Target that is judged.
        value: Measured value, in the unit of the target's measure; None if not measured.
        low: Lower 95 % bound of ``value``.
        high: Upper 95 % bound of ``value``.
        measured_s: Median time of the row.
        floor_s: Least time on the machine; None if unknown.
        is_elsewhere: True if the row was measured on a device that the target does not hold for.
    """

    target: Target
    value: float | None = None
    low: float | None = None
    high: float | None = None
    measured_s: float | None = None
    floor_s: float | None = None
    is_elsewhere: bool = False

    @property
    def outcome(self) -> Outcome:
        """Outcome by ``value`` alone; the interval is printed beside it."""
        if self.value is None:
            return "not measured"
        if self.is_elsewhere:
            return "another device"
        if self.target.measure in AT_LEAST:
            return "met" if self.value >= self.target.bound else "missed"
        return "met" if self.value <= self.target.bound else "missed"

    def as_dict(self) -> dict[str, Any]:
        """Fields of the target and the verdict, for a JSON file."""
        ratio = None
        if self.measured_s is not None and self.floor_s:
            ratio = self.measured_s / self.floor_s
        own = {k: v for k, v in asdict(self).items() if k not in ("target", "is_elsewhere")}
        return {**asdict(self.target), **own, "floor_ratio": ratio, "outcome": self.outcome}


def judge(kind: str, rows: Mapping[str, Sequence[Row]], device: str) -> list[Verdict]:
    """Verdicts of results on the targets of their kind of device.

    Args:
        kind: "cpu" or "cuda"; other kinds have no targets.
        rows: Rows by case. Targets of an absent case are "not measured".
        device: Name of the device. A GPU older than an H100 neither meets nor misses targets in
            seconds.

    Returns:
        One verdict for each target.
    """
    is_slower = kind == "cuda" and not any(name in device for name in _GPUS_OF_SECONDS)
    verdicts = [_judged(one, rows.get(one.case, ())) for one in TARGETS if one.kind == kind]
    return [
        replace(verdict, is_elsewhere=is_slower and verdict.target.measure == "seconds")
        for verdict in verdicts
    ]


def _judged(target: Target, rows: Sequence[Row]) -> Verdict:
    find = partial(find_row, rows, target.work)
    row = find(target.contender)
    if row is None:
        return Verdict(target)
    if target.measure == "seconds per hook":
        return _per_hook(target, row, find(row.versus))
    value, low, high = _values(target.measure, row)
    floor_s = row.floor_s
    if target.measure == "times untracked":
        bare = find(row.versus)
        floor_s = bare.p50_s if bare is not None else None
    if floor_s is None and target.measure == "share of floor":
        return Verdict(target, measured_s=row.p50_s)
    ours = find(OURS) if target.measure == "times faster" else row
    measured_s = (ours or row).p50_s
    return Verdict(target, value, low, high, measured_s, floor_s)


def _per_hook(target: Target, row: Row, bare: Row | None) -> Verdict:
    value = row.notes.get("per_hook_s")
    if not value or bare is None:
        return Verdict(target)
    hooks = round((row.p50_s - bare.p50_s) / value)
    low, high = ((bound_s - bare.p50_s) / hooks for bound_s in (row.low_s, row.high_s))
    return Verdict(target, value, low, high, measured_s=value)


def _values(measure: Measure, row: Row) -> tuple[float | None, float | None, float | None]:
    if measure == "seconds":
        return row.p50_s, row.low_s, row.high_s
    if measure == "share of floor":
        floor = row.floor_s
        return (
            (None, None, None)
            if not floor
            else (floor / row.p50_s, floor / row.high_s, floor / row.low_s)
        )
    return row.ratio, row.ratio_low, row.ratio_high
