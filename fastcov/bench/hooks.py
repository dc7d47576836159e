"""Host time of one hook, with the kernel's launch stubbed: what Python and dispatch cost."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import fastcov
from fastcov.bench.contest import Contest, Row, Setting, Work, WrongResultError
from fastcov.bench.floors import resnet50_maps
from fastcov.bench.models import HookTurns
from fastcov.bench.timing import Call
from fastcov.ops import library
from fastcov.state import CovarianceState

NO_HOOK = "no hook"
DEFAULT = "fastcov, default"
ALL = "fastcov, every row"
_WARM_STEPS = 20


class Replayed(nn.Conv2d):
    """A convolution that computes nothing: its output is given."""

    def __init__(self, output: Tensor) -> None:
        super().__init__(3, output.shape[1], 1, device="meta")
        self.given = output

    def forward(self, _input: Tensor) -> Tensor:
        """The given output."""
        return self.given


class Replay(nn.Sequential):
    """ResNet-50's 53 convolution outputs, one after the other."""

    def forward(self, image: Tensor) -> None:
        """Calls every module with the same input."""
        for module in self:
            module(image)


def works(setting: Setting) -> list[Work]:
    """One contest: a step's worth of hooks of ResNet-50, nothing computed."""
    return [Work("53 hooks of ResNet-50, launch stubbed", _contest)]


def _contest(setting: Setting) -> Contest:
    device = setting.device
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    maps = resnet50_maps(256, 224, 224)
    # Nothing reads these maps: one position stands for all, channels adjacent as in channels_last.
    model = Replay(
        *(
            Replayed(torch.zeros(1, c, 1, 1, device=device, dtype=dtype).expand(b, c, h, w))
            for b, c, h, w in maps
        )
    ).train()
    image = torch.zeros(1, device=device)
    turns = HookTurns(model)
    turns.add(DEFAULT, partial(fastcov.track, model))
    turns.add(ALL, partial(fastcov.track, model, rows="all"))
    calls: Counter[str] = Counter()

    def stubbed(name: str) -> Call:
        def run(_index: int) -> None:
            with _stubs(device, calls):
                model(image)

        turns.install(name)
        before = calls.total()
        for index in range(_WARM_STEPS):  # allocates and plans
            run(index)
        if name != NO_HOOK and calls.total() == before:
            raise WrongResultError(f"{name}: no operator was called, there is nothing to time")
        return run

    contenders = {name: stubbed(name) for name in (NO_HOOK, DEFAULT, ALL)}
    return Contest(
        contenders,
        reference=NO_HOOK,
        rounds=setting.rounds(200),
        budget_s=10.0,
        clock="host",
        prepare=lambda name, _round: turns.install(name),
        after=partial(_finish, len(maps)),
    )


@contextmanager
def _stubs(device: torch.device, calls: Counter[str]) -> Iterator[None]:
    """Nothing is launched: on a CPU operators are still dispatched, with no row to read."""
    saved: list[tuple[Any, str, Any]] = []

    def put(owner: Any, name: str, stub: Callable[..., None]) -> None:
        saved.append((owner, name, getattr(owner, name)))
        setattr(owner, name, stub)

    def ignored(name: str) -> Callable[..., None]:
        return lambda *_args, **_options: calls.update((name,))

    try:
        if device.type == "cuda":
            if fastcov.backends()["triton"].active:
                from fastcov.kernels import flush, gather

                put(gather, "launch_cursor_gather_", ignored("gather"))
                put(flush, "launch_flush_", ignored("flush"))
            put(library, "gather_", ignored("gather"))
            put(library, "accumulate_", ignored("accumulate"))
        else:
            put(library, "gather_", _dispatched_gather(calls))
            put(library, "accumulate_", _dispatched_accumulate(calls))
        yield
    finally:
        for owner, name, original in reversed(saved):
            setattr(owner, name, original)


def _dispatched_gather(calls: Counter[str]) -> Callable[..., None]:
    real = library.gather_

    def stub(
        buffer: Tensor, rows: Tensor, row: int, first: int, _due: int, run: int, *others: int
    ) -> None:
        calls["gather"] += 1
        real(buffer, rows, row, first, 0, run, *others)

    return stub


def _dispatched_accumulate(calls: Counter[str]) -> Callable[..., None]:
    real = library.accumulate_
    state = CovarianceState(1)
    none = torch.zeros(0, 1)

    def stub(*_arguments: Any) -> None:
        calls["accumulate"] += 1
        real(state.moment, state.sum, state.shift, state.weight, state.count, none, None, 1.0, 1.0)

    return stub


def _finish(hooks: int, rows: Sequence[Row]) -> None:
    bare = next(row for row in rows if row.contender == NO_HOOK)
    for row in rows:
        row.notes["per_hook_s"] = (row.p50_s - bare.p50_s) / hooks
