"""Contests of reading all spectra: how long a snapshot takes, and whether training waits."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

import fastcov
from fastcov.bench import models, peers
from fastcov.bench.contest import OURS, Contest, Row, Setting, Work, check
from fastcov.bench.floors import eigenvalue_floor
from fastcov.bench.models import Training
from fastcov.ops.reference import eigenvalue_tolerance, eigvalsh_reference

LINALG = "torch.linalg loop"
STEPS = "steps alone"
WITH_SNAPSHOT = "steps and a snapshot"
_STEPS = 4
_CHECKED = 12  # layers compared with the oracle


def works(setting: Setting) -> list[Work]:
    """Snapshot latency, and a few steps with and without one among them."""
    network, _, _ = _network(setting)
    return [
        Work(f"snapshot of {network}", _latency),
        Work(f"{_STEPS} steps of {network}", _wait),
    ]


def _network(setting: Setting) -> tuple[str, int, int]:
    if setting.is_tiny:
        return "resnet18", 2, 32
    if setting.device.type == "cuda":
        return "resnet50", 256, 224
    return ("resnet50" if setting.size == "full" else "resnet18"), 8, 112


def _tracked(setting: Setting) -> tuple[Training, fastcov.Tracker]:
    training = models.resnet(*_network(setting), setting.device)
    tracker = fastcov.track(training.model, rows=256, max_channels=64 if setting.is_tiny else 4096)
    for index in range(_STEPS):
        training.step(training.model, index)
    return training, tracker


def _latency(setting: Setting) -> Contest:
    _, tracker = _tracked(setting)
    names = list(tracker.spectra())

    # The dtype in which fastcov solves.
    dtype = torch.float64 if setting.device.type == "cpu" else torch.float32

    def linalg(_index: int) -> list[Tensor]:
        matrices = [tracker.covariance(name).to(dtype) for name in names]
        return [values.cpu() for values in peers.linalg_loop(matrices)]

    widths = [len(tracker.mean(name)) for name in names]
    return Contest(
        {OURS: lambda _index: tracker.snapshot(), LINALG: linalg},
        reference=OURS,
        rounds=setting.rounds(12),
        budget_s=25.0,
        fewest_rounds=3,
        errors={OURS: _worst_error(tracker, names)},
        floor=eigenvalue_floor([(width, 1) for width in widths], dtype, setting.rates),
    )


def _worst_error(tracker: fastcov.Tracker, names: Sequence[str]) -> float:
    spectra = tracker.spectra()
    worst = 0.0
    for name in names[:_CHECKED]:
        truth = eigvalsh_reference(tracker.covariance(name)).cpu().flip(0).clamp(min=0)
        difference = (spectra[name].eigenvalues - truth).abs().max() / truth.max()
        bar = eigenvalue_tolerance(len(truth), torch.float32)
        worst = max(worst, check(f"spectrum of {name}", float(difference), bar))
    return worst


def _wait(setting: Setting) -> Contest:
    training, tracker = _tracked(setting)

    def steps(index: int) -> None:
        for offset in range(_STEPS):
            training.step(training.model, index + offset)

    def steps_and_snapshot(index: int) -> None:
        training.step(training.model, index)
        tracker.snapshot()
        for offset in range(1, _STEPS):
            training.step(training.model, index + offset)

    return Contest(
        {STEPS: steps, WITH_SNAPSHOT: steps_and_snapshot},
        reference=STEPS,
        rounds=setting.rounds(8),
        budget_s=30.0,
        fewest_rounds=3,
        after=_finish,
    )


def _finish(rows: Sequence[Row]) -> None:
    alone, both = rows
    both.notes["added_s"] = both.p50_s - alone.p50_s
