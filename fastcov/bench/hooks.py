"""Host time of one hook, with the kernel's launch stubbed: what Python and dispatch cost."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from math import gcd
from typing import Any

import torch
from torch import Tensor, nn

import fastcov
from fastcov.bench.contest import Contest, Row, Setting, Work, WrongResultError
from fastcov.bench.floors import resnet50_maps
from fastcov.bench.models import HookTurns
from fastcov.ops import library
from fastcov.reader import Reader
from fastcov.state import CovarianceState

NO_HOOK = "no hook"
EMPTY = "torch, an empty hook"
DEFAULT = "fastcov, default"
ALL = "fastcov, every row"
INPUTS = "fastcov, default, inputs"
_WARM_STEPS = 20
_NO_ROW = 2.0**-32  # share of the rows


class Replayed(nn.Conv2d):
    """A convolution that computes nothing: its output is given."""

    def __init__(self, before: int, output: Tensor) -> None:
        width = output.shape[1]
        super().__init__(before, width, 1, groups=gcd(before, width), device="meta")
        self.given = output

    def forward(self, _input: Tensor) -> Tensor:
        """The given output."""
        return self.given


class Replay(nn.Sequential):
    """ResNet-50's 53 convolution outputs, one after the other.

    They are counted as grouped 1 x 1 convolutions, so that the default reads few rows a step, as it
    does with small batches: a hook copies rows into its buffer, which is hardly ever full.
    """

    @classmethod
    def of(cls, maps: Sequence[tuple[int, int, int, int]], like: Tensor) -> Replay:
        """Convolutions whose outputs have the shapes ``maps``, on the device of ``like``."""
        # Nothing reads these maps: one position stands for all, channels adjacent as in
        # channels_last.
        outputs = [like.new_zeros(1, c, 1, 1).expand(b, c, h, w) for b, c, h, w in maps]
        befores = [3, *(output.shape[1] for output in outputs)]
        pairs = zip(befores, outputs, strict=False)
        return cls(*(Replayed(before, output) for before, output in pairs)).train()


def works(setting: Setting) -> list[Work]:
    """One contest: a step's worth of hooks of ResNet-50, nothing computed."""
    return [Work("53 hooks of ResNet-50, launch stubbed", _contest)]


def _contest(setting: Setting) -> Contest:
    device = setting.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    maps = resnet50_maps(256, 224, 224)
    model = Replay.of(maps, torch.zeros((), device=device, dtype=dtype))
    image = torch.zeros(256, 3, 1, 1, device=device, dtype=dtype)
    turns = HookTurns(model)
    turns.add(EMPTY, partial(_hook_emptily, model))
    trackers = {
        DEFAULT: turns.add(DEFAULT, partial(fastcov.track, model)),
        ALL: turns.add(ALL, partial(fastcov.track, model, rows="all")),
        INPUTS: turns.add(INPUTS, partial(fastcov.track, model, where="input")),
    }
    stubs = _Stubs(device)

    def run(_index: int) -> None:
        with stubs:
            model(image)

    for name, tracker in trackers.items():
        turns.install(name)
        with stubs.counted() as calls:
            model(image)  # allocates and plans
            if stubs.has_again:
                _read_no_more(reader for reader in tracker.unique_readers() if reader.fraction == 1)
            for _ in range(_WARM_STEPS):
                calls.clear()
                model(image)
        if stubs.has_again:
            _read_no_more(tracker.unique_readers())
        if not calls or (stubs.has_again and not {"gather_again_", "accumulate_again_"} & {*calls}):
            raise WrongResultError(f"{name}: not the operators that hooks call, only {set(calls)}")
    return Contest(
        dict.fromkeys((NO_HOOK, EMPTY, DEFAULT, ALL, INPUTS), run),
        reference=NO_HOOK,
        rounds=setting.rounds(1000),
        budget_s=10.0,
        clock="host",
        prepare=lambda name, _round: turns.install(name),
        after=partial(_finish, len(maps)),
    )


def _read_no_more(readers: Iterable[Reader]) -> None:
    # These operators are no stubs. What they do beside copying and adding rows stays: hardly a row
    # is due in all calls.
    for reader in readers:
        reader.set_fraction(_NO_ROW)


def _hook_emptily(model: nn.Module) -> None:
    for module in model.children():
        module.register_forward_hook(lambda _module, _args, _output: None)


class _Stubs:
    """Nothing is launched: on a CPU operators are still called, with no row to read."""

    def __init__(self, device: torch.device) -> None:
        self._stubs: list[tuple[Any, str, Callable[..., Any]]] = []
        self._saved: list[tuple[Any, str, Any]] = []
        self.has_again = library.has_again and device.type == "cpu"
        if device.type == "cuda":
            if fastcov.backends()["triton"].active:
                from fastcov.kernels import flush, gather

                self._stubs.append((gather, "launch_cursor_gather_", _ignore))
                self._stubs.append((flush, "launch_flush_", _ignore))
            self._stubs.append((library, "gather_", _ignore))
            self._stubs.append((library, "accumulate_", _ignore))
        else:
            if self.has_again:
                self._stubs.append((library, "gather_again_", library.gather_again_))
                self._stubs.append((library, "accumulate_again_", _accumulate_again()))
            self._stubs.append((library, "gather_", _dispatched_gather()))
            self._stubs.append((library, "accumulate_", _dispatched_accumulate()))

    def __enter__(self) -> None:
        for owner, name, stub in self._stubs:
            self._saved.append((owner, name, getattr(owner, name)))
            setattr(owner, name, stub)

    def __exit__(self, *_error: object) -> None:
        while self._saved:
            setattr(*self._saved.pop())

    @contextmanager
    def counted(self) -> Iterator[list[str]]:
        """Likewise, and lists what is called: that takes time of its own."""
        calls: list[str] = []

        def counting(name: str, stub: Callable[..., Any]) -> Callable[..., Any]:
            def call(*arguments: Any, **options: Any) -> Any:
                calls.append(name)
                return stub(*arguments, **options)

            return call

        with self:
            for owner, name, stub in self._stubs:
                setattr(owner, name, counting(name, stub))
            yield calls


def _ignore(*_arguments: Any, **_options: Any) -> None:
    return None


def _accumulate_again() -> Callable[..., int]:
    # Asked for a part of the rows it compares the call with the last one, and declines.
    real = library.accumulate_again_
    return lambda *arguments: real(*arguments) and 0


def _dispatched_gather() -> Callable[..., None]:
    real = library.gather_

    def stub(
        buffer: Tensor, rows: Tensor, row: int, first: int, _due: int, run: int, phase: int, c: int
    ) -> None:
        real(buffer, rows, row, first, 0, run, phase, c)

    return stub


def _dispatched_accumulate() -> Callable[..., None]:
    real = library.accumulate_
    state, none = CovarianceState(1), torch.zeros(0, 1)
    moments = (state.moment, state.sum, state.shift, state.weight, state.count)
    return lambda *_arguments: real(*moments, none, -1)


def _finish(hooks: int, rows: Sequence[Row]) -> None:
    bare = next(row for row in rows if row.contender == NO_HOOK)
    for row in rows:
        row.notes["per_hook_s"] = (row.p50_s - bare.p50_s) / hooks
