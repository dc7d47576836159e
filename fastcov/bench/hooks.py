"""Contests of the host time of one hook, with nothing launched: the cost of Python and dispatch.

The CPU's path calls its operators with no row to read. The GPU's path runs each launch as far as
the driver's call, so Triton's Python and its launcher in C are timed; it also runs on a CPU, on
tensors that stand for a GPU's.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from math import gcd

import torch
from torch import Tensor, nn

import fastcov
from fastcov.bench.contest import (
    DEFAULT,
    EVERY_ROW,
    Contest,
    Row,
    Setting,
    Work,
    WrongResultError,
)
from fastcov.bench.floors import resnet50_maps
from fastcov.bench.models import HookTurns
from fastcov.bench.stubs import KernelStubs, OperatorStubs, Stubs
from fastcov.stats.cursor import FRACTION
from fastcov.stats.layer import Layer

NO_HOOK = "no hook"
EMPTY = "torch, an empty hook"
INPUTS = "fastcov, default, inputs"
_WARM_STEPS = 20
_NO_ROW = 1  # share of the rows, in units of 2**-32
_APART = 64  # values
_BATCH = 256
_MAPS = resnet50_maps(_BATCH, 224, 224)
CPU_PATH = "53 hooks of ResNet-50, launch stubbed"
GPU_PATH = "53 hooks of ResNet-50, GPU path, driver's call left out"
HEADS_PATH = "40 hooks of heads on 5 levels, GPU path, driver's call left out"
_LAYERS, _WIDTH = 8, 256  # of a RetinaNet: four for classes, four for boxes
_LEVELS = [(2, _WIDTH, -(-800 // s), -(-1344 // s)) for s in (8, 16, 32, 64, 128)]


class Replayed(nn.Conv2d):
    """1 x 1 convolution that computes nothing and returns a given output."""

    def __init__(self, before: int, output: Tensor, groups: int) -> None:
        super().__init__(before, output.shape[1], 1, groups=groups, device="meta")
        self.given = output

    def forward(self, _input: Tensor) -> Tensor:
        """The given output."""
        return self.given


class Replay(nn.Sequential):
    """Sequence of modules that return ResNet-50's 53 convolution outputs."""

    @classmethod
    def of(cls, maps: Sequence[tuple[int, int, int, int]], like: Tensor) -> Replay:
        """Convolutions whose outputs have the shapes ``maps``, on the device of ``like``.

        They are grouped convolutions, so that the default reads few rows a step, as it does with
        small batches: a hook copies rows into its buffer, which is hardly ever full. A grouped
        convolution's output is also never derived from its input's covariance.
        """
        # Nothing reads the values: one position serves for all, with adjacent channels as in
        # channels_last.
        outputs = [like.new_zeros(1, c, 1, 1).expand(b, c, h, w) for b, c, h, w in maps]
        befores = cls._befores(outputs)
        groups = [
            gcd(before, output.shape[1]) for before, output in zip(befores, outputs, strict=True)
        ]
        return cls(*map(Replayed, befores, outputs, groups)).train()

    @classmethod
    def laid_out(cls, maps: Sequence[tuple[int, int, int, int]], like: Tensor) -> Replay:
        """Convolutions whose outputs have the strides of channels_last, on which launches depend.

        They are 1 x 1 convolutions without groups, as most of ResNet-50's are.
        """
        # All share one memory, which is never written; each map begins at its own aligned address.
        most = max(b * c * h * w for b, c, h, w in maps)
        memory = like.new_empty(most + _APART * len(maps))
        outputs = [
            memory.as_strided((b, c, h, w), (c * h * w, 1, w * c, c), _APART * number)
            for number, (b, c, h, w) in enumerate(maps)
        ]
        return cls(*map(Replayed, cls._befores(outputs), outputs, [1] * len(outputs))).train()

    @staticmethod
    def _befores(outputs: Sequence[Tensor]) -> list[int]:
        return [3, *(output.shape[1] for output in outputs[:-1])]


class HeadLayer(nn.Conv2d):
    """1 x 1 convolution that computes nothing and returns the output given for a height."""

    def __init__(self, outputs: Sequence[Tensor]) -> None:
        super().__init__(_WIDTH, _WIDTH, 1, device="meta")
        self.given = {output.shape[2]: output for output in outputs}

    def forward(self, level: Tensor) -> Tensor:
        """The given output."""
        return self.given[level.shape[2]]


class Heads(nn.Sequential):
    """Layers of a detector's heads, each called for five levels of one image pyramid.

    Args:
        like: Tensor of the levels' device and dtype.
    """

    def __init__(self, like: Tensor) -> None:
        def levels() -> list[Tensor]:
            empty = partial(
                torch.empty,
                dtype=like.dtype,
                device=like.device,
                memory_format=torch.channels_last,
            )
            return [empty(shape) for shape in _LEVELS]

        super().__init__(*(HeadLayer(levels()) for _ in range(_LAYERS)))
        self.levels = levels()
        self.train()

    def forward(self, _given: Tensor) -> None:
        """Calls of all layers for one level after the other."""
        for given in self.levels:
            level = given
            for layer in self:
                level = layer(level)


def works(setting: Setting) -> list[Work]:
    """Contests of one step's hooks: the path of the device, and on a CPU that of a GPU too."""
    gpu_path = [Work(GPU_PATH, _gpu_path), Work(HEADS_PATH, _heads_path)]
    return gpu_path if setting.device.type == "cuda" else [Work(CPU_PATH, _cpu_path), *gpu_path]


def _cpu_path(setting: Setting) -> Contest:
    stubs = OperatorStubs()
    model = Replay.of(_MAPS, torch.zeros(()))
    turns, trackers = _attached(model)
    image = torch.zeros(_BATCH, 3, 1, 1)
    for name, tracker in trackers.items():
        turns.install(name)
        with stubs.counted() as calls:
            model(image)  # allocates and plans
            if stubs.repeats_calls:
                _read_no_more(
                    each for each in tracker.watcher.taps.unique_layers if each.fraction == 1
                )
            for _ in range(_WARM_STEPS):
                calls.clear()
                model(image)
        if stubs.repeats_calls:
            _read_no_more(tracker.watcher.taps.unique_layers)
        if not calls or (
            stubs.repeats_calls and not {"gather_again_", "accumulate_again_"} & {*calls}
        ):
            raise WrongResultError(f"{name}: not the operators that hooks call, only {set(calls)}")
    return _contest(setting, turns, stubs, partial(model, image), len(_MAPS))


def _read_no_more(layers: Iterable[Layer]) -> None:
    # Keeps the routes that were chosen, but makes hardly a row due in any later call.
    for layer in layers:
        layer.cursor.numbers[FRACTION] = _NO_ROW


def _gpu_path(setting: Setting) -> Contest:
    like = torch.zeros((), device=setting.device, dtype=torch.bfloat16)
    image = like.new_zeros(_BATCH, 3, 1, 1)
    return _prepared(setting, Replay.laid_out(_MAPS, like), image, len(_MAPS))


def _heads_path(setting: Setting) -> Contest:
    like = torch.zeros((), device=setting.device, dtype=torch.bfloat16)
    return _prepared(setting, Heads(like), like, _LAYERS * len(_LEVELS))


def _prepared(setting: Setting, model: nn.Module, image: Tensor, hooks: int) -> Contest:
    stubs = KernelStubs(setting.device)
    turns, trackers = _attached(model)
    for name in trackers:
        turns.install(name)
        with stubs.counted() as calls:
            for _ in range(_WARM_STEPS):
                calls.clear()
                model(image)
        launched = Counter(calls)
        added = launched["gram_kernel"]
        copied = launched["gather_counted_"] + launched["cursor_gather_kernel"]
        # Every row is added at once, but for maps that are too small.
        is_right = added == launched["reduce_kernel"] and (added > 0) == (name == EVERY_ROW)
        if added + copied != hooks or not is_right:
            raise WrongResultError(f"{name}: not one kernel a hook, but {dict(launched)}")
    return _contest(setting, turns, stubs, partial(model, image), hooks)


def _attached(model: nn.Module) -> tuple[HookTurns, dict[str, fastcov.Tracker]]:
    turns = HookTurns(model)
    turns.add(EMPTY, partial(_hook_emptily, model))
    trackers = {
        DEFAULT: turns.add(DEFAULT, partial(fastcov.track, model)),
        EVERY_ROW: turns.add(EVERY_ROW, partial(fastcov.track, model, rows="all")),
        INPUTS: turns.add(INPUTS, partial(fastcov.track, model, where="input")),
    }
    return turns, trackers


def _hook_emptily(model: nn.Module) -> None:
    for module in model.children():
        module.register_forward_hook(lambda _module, _args, _output: None)


def _contest(
    setting: Setting, turns: HookTurns, stubs: Stubs, forward: Callable[[], object], hooks: int
) -> Contest:
    def run(_index: int) -> None:
        with stubs:
            forward()

    return Contest(
        dict.fromkeys((NO_HOOK, EMPTY, DEFAULT, EVERY_ROW, INPUTS), run),
        reference=NO_HOOK,
        rounds=setting.rounds(1000),
        budget_s=10.0,
        clock="host",
        prepare=lambda name, _round: turns.install(name),
        after=partial(_finish, hooks),
    )


def _finish(hooks: int, rows: Sequence[Row]) -> None:
    bare = next(row for row in rows if row.contender == NO_HOOK)
    for row in rows:
        row.notes["per_hook_s"] = (row.p50_s - bare.p50_s) / hooks
