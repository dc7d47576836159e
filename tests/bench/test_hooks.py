"""Scope of the hook benchmark: a whole hook without the work that the hook starts."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastcov
from fastcov.bench import hooks
from fastcov.bench.contest import DEFAULT, EVERY_ROW, Setting, WrongResultError
from fastcov.bench.peers import MissingPeerError
from fastcov.bench.stubs import KernelStubs
from fastcov.ops import library
from fastcov.watch.hooks import Hook

pytest.importorskip("triton", reason="the path of a GPU needs triton")

CPU = torch.device("cpu")
TINY = Setting(CPU, "tiny")


def counted(calls: Counter[str], name: str, run: Callable[..., Any]) -> Callable[..., Any]:
    """A function that counts its calls."""

    def spied(*arguments: Any) -> Any:
        calls[name] += 1
        return run(*arguments)

    return spied


def test_preparing_a_launch_is_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """A stub in place of a launcher would hide the Python that prepares launches."""
    from fastcov.kernels import covariance, gather
    from fastcov.ops import library

    prepared: Counter[str] = Counter()
    for owner, name, kind in (
        (covariance.Accumulation, "add", "add"),
        (gather.CursorGather, "launch_", "copy"),
        (library, "gather_counted_", "copy"),
    ):
        monkeypatch.setattr(owner, name, counted(prepared, kind, getattr(owner, name)))
    contest = hooks._gpu_path(TINY)
    for contender, expected in (
        (hooks.NO_HOOK, {}),
        (DEFAULT, {"copy": 53}),
        (EVERY_ROW, {"add": 53}),
        (hooks.INPUTS, {"copy": 53}),
    ):
        prepared.clear()
        assert contest.prepare is not None
        contest.prepare(contender, 0)
        contest.contenders[contender](0)
        assert prepared == expected, contender


def test_hooks_that_launch_nothing_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("output", "input"):
        monkeypatch.setattr(Hook, name, lambda *_: None)
    for path in (hooks._gpu_path, hooks._heads_path):
        with pytest.raises(WrongResultError, match="not one"):
            path(TINY)


def test_a_gpu_without_triton_is_missing_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingPeerError, match="no CUDA device"):
        KernelStubs(torch.device("cuda"))


def test_stubs_leave_a_class_as_it_was() -> None:
    from fastcov.kernels.launch import Launch

    stubs = KernelStubs(CPU)
    before = dict(vars(Launch))
    with stubs.counted():
        assert vars(Launch) != before
    assert vars(Launch) == before


def test_everything_on_the_host_is_timed_but_the_drivers_call(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Triton's launcher in C is called at every hook, for no program."""
    from fastcov.kernels import job
    from fastcov.kernels.launcher import LauncherCall

    called: list[tuple[Any, ...]] = []
    real = LauncherCall.__init__

    def spied(call: LauncherCall, *arguments: Any) -> None:
        real(call, *arguments)
        function = call.function

        def noted(*given: Any) -> None:
            called.append(given[:3])
            function(*given)

        call.function = noted

    monkeypatch.setattr(LauncherCall, "__init__", spied)
    monkeypatch.setattr(library, "has_kernel", lambda *_: False)  # Triton's gather
    contest = hooks._gpu_path(TINY)
    assert contest.prepare is not None
    for contender, launches in ((DEFAULT, 53), (EVERY_ROW, 53 * 2)):
        contest.prepare(contender, 0)
        called.clear()
        contest.contenders[contender](0)
        assert len(called) >= launches, contender
        assert {*called} == {(0, 1, 1)}
    assert job.cached_job.cache_info().currsize == 0  # nobody finds launches of no program


def test_maps_are_laid_out_as_those_of_a_network() -> None:
    maps = [(2, 8, 5, 7), (2, 16, 3, 4)]
    first, second = hooks.Replay.laid_out(maps, torch.zeros((), dtype=torch.bfloat16))
    for module, shape in ((first, maps[0]), (second, maps[1])):
        real = torch.empty(shape, dtype=torch.bfloat16, memory_format=torch.channels_last)
        assert module.given.stride() == real.stride()
        assert module.given.shape == shape
    assert (second.given.data_ptr() - first.given.data_ptr()) % 16 == 0


class Levels(nn.Module):
    """A head that is called on a large and a small level."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Conv2d(4, 8, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x).sum() + self.head(x[:1, :, :2, :3]).sum()


@pytest.mark.parametrize("model", [nn.Conv2d(4, 8, 3, padding=1), Levels()], ids=["one", "levels"])
def test_every_row_of_repeated_calls_is_launched_and_counted(model: nn.Module) -> None:
    x = torch.randn(3, 4, 20, 20, dtype=torch.bfloat16)
    model = model.to(torch.bfloat16)
    levels = 1 + isinstance(model, Levels)
    stubs = KernelStubs(CPU)
    with fastcov.track(model, rows="all") as tracker:
        for step in range(5):
            with stubs.counted() as calls:
                model(x)
            (reader,) = tracker.watcher.taps.unique_layers
            assert reader.calls == levels, step
            assert reader.offered_rows == 1200 + 6 * (levels - 1)
            assert calls.count("gram_kernel") >= 1
            gathers = calls.count("gather_counted_") + calls.count("cursor_gather_kernel")
            assert gathers == (levels == 2 and step > 0)
        if levels == 2:
            assert reader.on_device.buffer is not None
            assert reader.on_device.buffer.step_rows == 6  # of the running step alone


def test_python_that_prepares_a_launch_takes_its_time(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastcov.kernels.job import Job

    contest = hooks._gpu_path(TINY)

    descriptor = Job.descriptor

    def slow(job: Job, rows: torch.Tensor) -> Any:
        until = time.thread_time() + 2e-3
        while time.thread_time() < until:
            pass
        return descriptor(job, rows)

    monkeypatch.setattr(Job, "descriptor", slow)
    assert contest.prepare is not None
    contest.prepare(EVERY_ROW, 0)
    start = time.thread_time()
    contest.contenders[EVERY_ROW](0)
    assert time.thread_time() - start > 2e-3
