"""Contests of whole training steps: time and memory that tracking costs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

import fastcov
from fastcov.bench import models, peers
from fastcov.bench.contest import (
    DEFAULT,
    EVERY_ROW,
    Contest,
    Row,
    Setting,
    Work,
    WrongResultError,
    check,
    relative_error,
)
from fastcov.bench.covariance import ERROR_BAR
from fastcov.bench.floors import GramLoad, gram_floor
from fastcov.bench.memory import peak_bytes
from fastcov.bench.models import HookTurns, Training
from fastcov.bench.timing import Call
from fastcov.bench.updates import Updates
from fastcov.estimate import estimate
from fastcov.ops.reference import accumulate_reference_
from fastcov.rows.view import row_view
from fastcov.stats.state import CovarianceState
from fastcov.watch.select import Tap, find_taps, first_tensor

UNTRACKED = "untracked"
NAIVE = "naive hooks"
DELVE = "delve"
NETWORKS = ("resnet50", "vit", "faster_rcnn", "resnet50-compiled")
COMPILED_NETWORKS = ("vit-compiled", "faster_rcnn-compiled")
"""Networks whose compilation takes minutes: timed only if they are named."""
_BUDGET_S = {"cpu": 240.0, "cuda": 25.0}
# A shared CPU's speed changes by more than the default may cost: most pairs are the default's.
# Every row gets 40 pairs; peers, whose cost is far from every target, get ten.
_FEWEST_ROUNDS = {"cpu": 80, "cuda": 24}
_PERIODS = {"cpu": {EVERY_ROW: 2, NAIVE: 8, DELVE: 8}, "cuda": {}}
_WARM_STEPS = 3  # the first plans the sampling, the second is the first that follows the plan


def works(setting: Setting, network: str) -> list[Work]:
    """Contest of one of :data:`NETWORKS` or :data:`COMPILED_NETWORKS`."""
    device, is_tiny = setting.device, setting.is_tiny
    is_compiled = network.endswith("-compiled")
    builders: dict[str, Callable[[], Training]] = {
        "resnet50": lambda: models.resnet50(device, is_tiny),
        "vit": lambda: models.vit(device, is_tiny),
        "faster_rcnn": lambda: models.faster_rcnn(device, is_tiny),
    }
    build = builders[network.removesuffix("-compiled")]
    if is_compiled and is_tiny:
        build = partial(models.small_convnet, device)
    name = f"{network} training step" + (", tiny stand-in" if is_tiny else "")
    return [Work(name, lambda setting: contest(build(), setting, is_compiled=is_compiled))]


def contest(training: Training, setting: Setting, *, is_compiled: bool = False) -> Contest:
    """Contest of a model's step without hooks, with fastcov's, and with those of its peers.

    Args:
        training: Model and its step.
        setting: Setting that it runs in.
        is_compiled: Compile the forward, once for every set of hooks.

    Returns:
        Contest of which every set of hooks has run and been checked.
    """
    model, turns = training.model, HookTurns(training.model)
    error = _check_exactness(training, turns)
    memory = {} if is_compiled else _added_memory(training, turns, setting)
    trackers = {
        DEFAULT: turns.add(DEFAULT, partial(fastcov.track, model)),
        EVERY_ROW: turns.add(EVERY_ROW, partial(fastcov.track, model, rows="all")),
    }
    sets = [UNTRACKED, DEFAULT, EVERY_ROW]
    if is_compiled:
        setting.missing[f"{NAIVE}, {DELVE}"] = "measured in eager mode, where people use them"
    else:
        kept = set(trackers[EVERY_ROW].names())
        taps = [pair for pair in find_taps(model, None, None, "output") if pair[0].name in kept]
        turns.add(NAIVE, partial(peers.hook_naively, taps))
        sets.append(NAIVE)
        turns.add(DELVE, partial(_add_delve, training, setting, sets))

    def call(name: str) -> Call:
        forward = training.compile_forward(model) if is_compiled else model
        return lambda index: training.step(forward, index)

    updates = {name: Updates(tracker) for name, tracker in trackers.items()}

    def prepare(name: str, round_number: int) -> None:
        turns.install(name)
        if name in updates:
            updates[name].hold_back()
        torch.manual_seed(round_number)  # detectors draw proposals: the same ones in a round

    contenders = {name: call(name) for name in sets}
    for name, run in contenders.items():
        prepare(name, 0)
        for index in range(_WARM_STEPS):
            if is_compiled and name == UNTRACKED:
                _try_compiled(run, index)
            else:
                run(index)
    _check_counts(trackers)
    return Contest(
        contenders,
        reference=UNTRACKED,
        rounds=setting.rounds(160),
        fewest_rounds=1 if setting.is_tiny else _FEWEST_ROUNDS[setting.device.type],
        # Full buffers are added within the timed steps of a GPU, all in the same few of them.
        statistic="mean" if setting.device.type == "cuda" else "median",
        errors={EVERY_ROW: error},
        budget_s=_BUDGET_S[setting.device.type],
        prepare=prepare,
        periods=_PERIODS[setting.device.type],
        notes={name: dict(note) for name, note in memory.items()},
        after=partial(_finish, training, turns, updates, setting),
    )


def _add_delve(training: Training, setting: Setting, sets: list[str]) -> None:
    def attach() -> bool:
        peers.hook_delve(training.model, setting.device)
        training.step(training.model, 0)
        return True

    if peers.find(setting, DELVE, attach):
        sets.append(DELVE)


def _try_compiled(run: Call, index: int) -> None:
    try:
        run(index)
    except Exception as error:  # no C++ compiler, a model that does not compile: both are said
        reason = (str(error).strip().splitlines() or [""])[0]
        raise peers.MissingPeerError(
            f"torch.compile fails on the untracked model: {type(error).__name__}: {reason[:200]}"
        ) from error


def _check_exactness(training: Training, turns: HookTurns) -> float:
    """Largest error of every row of two eager steps against the oracle, on the same activations.

    Two, because the first step fixes the shifts and only the second is read as all later ones are.
    """
    model = training.model
    truths: dict[str, CovarianceState] = {}
    running: list[nn.Module] = []  # the root, during its forward: a recomputation is no step

    def attach() -> fastcov.Tracker:
        tracker = fastcov.track(model, rows="all")
        kept = set(tracker.names())
        for tap, module in find_taps(model, None, None, "output"):
            if tap.name in kept:
                module.register_forward_hook(partial(add, tap, tracker.watcher.taps.max_channels))
        model.register_forward_pre_hook(lambda module, _args: running.append(module))
        model.register_forward_hook(lambda _module, _args, _output: running.clear())
        return tracker

    def add(tap: Tap, widest: int, _module: nn.Module, _args: Any, output: Any) -> None:
        activation = first_tensor(output)
        if activation is None or activation.numel() == 0 or not running:
            return
        rows = row_view(activation.detach(), tap.layout, tap.batched_rank)
        if rows.shape[-1] > widest:
            return
        state = truths.setdefault(tap.name, CovarianceState(rows.shape[-1], rows.device))
        accumulate_reference_(state.moment, state.sum, state.shift, state.weight, state.count, rows)

    tracker: fastcov.Tracker = turns.add("oracle", attach)
    turns.install("oracle")
    for index in range(2):
        training.step(model, index)
    turns.install(UNTRACKED)
    worst = 0.0
    for name, truth in truths.items():
        if truth.count[0] > 0:
            error = relative_error(tracker.covariance(name), truth.covariance())
            worst = max(worst, check(f"layer {name}", error, ERROR_BAR))
    tracker.close()
    turns.forget("oracle")
    return worst


def _check_counts(trackers: dict[str, fastcov.Tracker]) -> None:
    # Hooks that are not installed, or a compiled step traced without them, would cost nothing.
    for name, tracker in trackers.items():
        if tracker.steps != _WARM_STEPS:
            raise WrongResultError(f"{name}: {tracker.steps} steps counted, {_WARM_STEPS} were run")
    if not any(trackers[EVERY_ROW].count(name) for name in trackers[EVERY_ROW].names()):
        raise WrongResultError(f"{EVERY_ROW}: no row was read in {_WARM_STEPS} steps")


def _added_memory(
    training: Training, turns: HookTurns, setting: Setting
) -> dict[str, dict[str, float]]:
    """Peak of live bytes with tracking, less the peak without, by contender."""
    model = training.model

    def steps() -> None:
        for index in range(_WARM_STEPS):
            training.step(model, index)

    def tracked(**options: Any) -> None:
        with turns.add("memory", partial(fastcov.track, model, **options)):
            turns.install("memory")
            steps()

    def peak(call: Callable[[], object]) -> int:
        # Gradients left over by one measurement would be freed, and subtracted, in the next.
        model.zero_grad(set_to_none=True)
        return peak_bytes(setting.device, call)

    training.step(model, 0)
    bare = peak(steps)
    notes: dict[str, dict[str, float]] = {}
    for name, options in ((DEFAULT, {}), (EVERY_ROW, {"rows": "all"})):
        added = peak(partial(tracked, **options)) - bare
        turns.install(UNTRACKED)
        turns.forget("memory")
        notes[name] = {"added_peak_bytes": added, "untracked_peak_bytes": bare}
    return notes


def _finish(
    training: Training,
    turns: HookTurns,
    updates: dict[str, Updates],
    setting: Setting,
    rows: Sequence[Row],
) -> None:
    """Notes added to the rows: time of rare updates, memory by estimate(), floor of the gram."""
    turns.install(UNTRACKED)
    by_name = {row.contender: row for row in rows}
    for name, held in updates.items():
        held.add_to(by_name[name], by_name[UNTRACKED], training.dtype, setting)
    if training.example is None:
        return
    # In the dtype of the steps: rows wait, and are multiplied, in it.
    autocast = None if training.dtype == torch.float32 else training.dtype
    with torch.autocast(setting.device.type, dtype=autocast, enabled=autocast is not None):
        every_row = estimate(training.model, training.example, rows="all", training=True)
        default = estimate(training.model, training.example, training=True)
    by_name[EVERY_ROW].notes["estimate_bytes"] = every_row.memory_bytes
    by_name[DEFAULT].notes["estimate_bytes"] = default.memory_bytes
    loads = [
        GramLoad(layer.rows_offered, layer.channels, training.dtype) for layer in every_row.layers
    ]
    by_name[EVERY_ROW].notes["gram_floor_s"] = gram_floor(loads, setting.rates).seconds
