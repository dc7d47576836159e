"""CUDA graphs of tracked steps, emulated: a capture records what is launched, a replay repeats it.

Run by test_graphs.py with TRITON_INTERPRET=1, so that the CPU stands for a GPU. As in a real
capture nothing runs that is recorded, and every argument but tensors is frozen.
"""

from __future__ import annotations

import gc
import itertools
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov import tracker
from fastcov.kernels.launch import Launch
from fastcov.ops import backend, library
from fastcov.ops.backend import HOST, Pretended
from fastcov.rows.layout import ActivationLayout
from fastcov.stats import buffering
from fastcov.stats.capture import DeviceCounters
from fastcov.stats.layer import Layer
from fastcov.watch import steps, watcher


class Graph:
    """Launches of a captured step of one tracker."""

    def __init__(self, tracked: fastcov.Tracker) -> None:
        self.tracked = tracked
        self.launches: list[Callable[[], Any]] = []

    @contextmanager
    def capture(self) -> Iterator[None]:
        before = self.tracked.watcher._counters and self.tracked.watcher._counters.step.clone()
        with ExitStack() as patches:
            for module in (steps, watcher, tracker):
                patches.enter_context(mock.patch.object(module, "is_capturing", return_value=True))
            start = Launch.start

            def record(launch: Launch, *tensors: Any) -> None:
                self.launches.append(partial(start, launch, *tensors))

            patches.enter_context(mock.patch.object(Launch, "start", record))
            for served in (library.ACCUMULATE, library.GATHER):
                recorded = {name: partial(self._record, real) for name, real in served.items()}
                patches.enter_context(mock.patch.dict(served, recorded))
            yield
        counters = self.tracked.watcher._counters
        if counters is not None and before is not None and not torch.equal(counters.step, before):
            counters.step.copy_(before)  # an addition like any other: recorded, not run
            self.launches.insert(0, partial(counters.step.add_, 1))

    def _record(self, operator: Callable[..., Any], *args: Any, **options: Any) -> None:
        self.launches.append(partial(operator, *args, **options))

    def replay(self) -> None:
        for launch in self.launches:
            launch()


class Levels(nn.Module):
    """A head that is called on a large and a small level; neck and head have vector rows."""

    def __init__(self) -> None:
        super().__init__()
        self.neck, self.head = nn.Linear(8, 12), nn.Linear(12, 24)

    def forward(self, x: Tensor) -> Tensor:
        level = self.neck(x)
        return self.head(level).sum() + self.head(level[:5]).sum()


class Sometimes(nn.Module):
    """Its second layer runs where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.always, self.rare = nn.Linear(8, 12), nn.Linear(8, 12)

    def forward(self, x: Tensor, all_layers: bool = False) -> Tensor:
        return self.always(x) + (self.rare(x) if all_layers else 0)


def batch(rows: int, seed: int = 0) -> Tensor:
    return torch.randn(rows, 8, generator=torch.Generator().manual_seed(seed))


def host_twin(model: nn.Module, x: Tensor, run: int, **options: Any) -> fastcov.Tracker:
    """The same steps, all of them eager, all counters on the host."""
    with (
        mock.patch.object(DeviceCounters, "serve", return_value=False),
        fastcov.track(model, **options) as twin,
    ):
        for _ in range(run):
            model(x)
    return twin


def assert_same(tracked: fastcov.Tracker, expected: fastcov.Tracker) -> None:
    assert tracked.steps == expected.steps
    for name in expected.names():
        assert tracked.count(name) == expected.count(name) > 0, name
        state, wanted = (
            tracked.watcher.taps.layers[name].state,
            expected.watcher.taps.layers[name].state,
        )
        assert state is not None
        assert wanted is not None
        torch.testing.assert_close(state.weight, wanted.weight)
        torch.testing.assert_close(
            state.covariance(), wanted.covariance(), rtol=1e-5, atol=1e-5, msg=name
        )


@pytest.mark.parametrize(
    ("rows", "options"),
    [
        (0.3, {}),
        (0.6, {}),
        ("all", {}),
        (7, {}),
        (0.3, {"decay": 0.9}),
        ("auto", {"where": "both"}),
    ],
    ids=str,
)
def test_replays_read_what_eager_steps_read(rows: Any, options: dict[str, Any]) -> None:
    model, x = Levels(), batch(90)
    with fastcov.track(model, rows=rows, **options) as tracked:
        graph = Graph(tracked)
        for _ in range(2):
            model(x)
        with graph.capture():
            model(x)
        assert not tracked.watcher.taps.notes
        for _ in range(4):
            graph.replay()
        tracked.summary()  # reading in between changes nothing
        model(x)
        graph.replay()
    assert_same(tracked, host_twin(model, x, 8, rows=rows, **options))


def test_more_rows_than_two_a_channel_move_through_the_activation() -> None:
    """They were read at the same positions by every replay."""
    model = nn.Sequential(nn.Conv2d(16, 32, 3, padding=1), nn.ReLU(), nn.Conv2d(32, 64, 1))
    x = torch.randn(8, 16, 24, 24)
    with fastcov.track(model, rows="auto") as tracked:
        graph = Graph(tracked)
        model(x)
        model(x)
        with graph.capture():
            model(x)
        for _ in range(3):
            graph.replay()
    assert_same(tracked, host_twin(model, x, 5, rows="auto"))
    # What test_a_cuda_graph_replays_with_right_counts compares: 196.3 and 392.5 rows a step, and of
    # the first step those that wait for the plan, 1/64 of its rows or 2C.
    twin = host_twin(model, x, 23, rows="auto")
    assert [twin.count(name) for name in twin.names()] == [4390, 8764]


@pytest.mark.parametrize(
    ("rows", "options", "layers", "remedy"),
    [
        ("auto", {"weighting": "image"}, ["neck", "head"], 'weighting="position"'),
        ("all", {"weighting": "image"}, ["neck", "head"], 'weighting="position"'),
        ("all", {"decay": 0.9}, ["neck", "head"], 'rows="auto"'),
        (0.5, {"every": 2}, ["neck", "head"], "every=1"),
    ],
    ids=str,
)
def test_what_the_host_must_do_is_left_out_with_a_warning(
    rows: Any, options: dict[str, Any], layers: list[str], remedy: str
) -> None:
    model, x = Levels(), batch(90)
    with fastcov.track(model, rows=rows, **options) as tracked:
        graph = Graph(tracked)
        for _ in range(3):
            model(x)
        counts = {name: tracked.count(name) for name in layers}
        moments = {name: tracked.covariance(name) for name in layers}
        with pytest.warns(UserWarning, match=f"captured CUDA graph.*{remedy}"), graph.capture():
            model(x)
        for _ in range(3):
            graph.replay()
        for name in layers:
            assert remedy in tracked.watcher.taps.notes[name]
            assert tracked.count(name) == counts[name]
            assert torch.equal(tracked.covariance(name), moments[name])
        assert remedy in str(tracked.summary())
        model(x)
        model(x)
        assert all(tracked.count(name) > counts[name] for name in layers)


@pytest.mark.parametrize("eager", [0, 1])
def test_a_capture_before_two_steps_is_left_out_with_a_warning(eager: int) -> None:
    """In the second the device's kernels run for the first time."""
    model, x = Levels(), batch(90)
    with fastcov.track(model, rows="all") as tracked:
        graph = Graph(tracked)
        for _ in range(eager):
            model(x)
        with pytest.warns(UserWarning, match="two ran eagerly before"), graph.capture():
            model(x)
        assert not graph.launches
        assert tracked.steps == eager
        assert all("CUDA graph" in tracked.watcher.taps.notes[name] for name in tracked.names())


def test_too_many_rows_for_one_launch_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffering, "MOST_DEVICE_ROWS", 50)
    model, x = Levels(), batch(90)
    with fastcov.track(model, rows=0.7) as tracked:
        graph = Graph(tracked)
        model(x)
        model(x)
        message = "'neck': samples 63 rows a step on the host"
        with pytest.warns(UserWarning, match=message), graph.capture():
            model(x)
        before = [tracked.count(name) for name in tracked.names()]
        graph.replay()
        assert [tracked.count(name) for name in tracked.names()] == before


def test_sizes_and_layers_that_no_eager_step_had_are_left_out_until_one_has() -> None:
    model = Sometimes()
    with fastcov.track(model, rows=0.4) as tracked:
        model(batch(40))
        model(batch(40))
        # Both wait: one has no state, the other too small a buffer.
        first = Graph(tracked)
        message = "'always': reads 90 rows.*'rare': has not run on cpu"
        with pytest.warns(UserWarning, match=message), first.capture():
            model(batch(90), all_layers=True)
        assert tracked.watcher.taps.layers["rare"].state is None
    with fastcov.track(model, rows=0.4) as tracked:
        model(batch(40))
        model(batch(90), all_layers=True)
        model(batch(90), all_layers=True)
        graph = Graph(tracked)
        with graph.capture():
            model(batch(90), all_layers=True)
        assert not tracked.watcher.taps.notes
        graph.replay()
        assert [tracked.count(name) for name in tracked.names()] == [16 + 3 * 36, 3 * 36]


def test_a_larger_eager_step_after_the_capture_leaves_the_graph_alone() -> None:
    model = nn.Linear(8, 12)
    with fastcov.track(model, rows=0.5) as tracked:
        model(batch(20))
        model(batch(20))
        graph = Graph(tracked)
        with graph.capture():
            model(batch(20))
        with pytest.warns(UserWarning, match=r"do not fit the buffer of a captured CUDA graph"):
            model(batch(60))
        graph.replay()
        graph.replay()
        assert tracked.count("") == 40


def test_a_graph_keeps_alive_what_it_writes_into() -> None:
    model, x = Levels(), batch(90)
    tracked = fastcov.track(model, rows="all")
    model(x)
    model(x)
    graph = Graph(tracked)
    with graph.capture():
        model(x)
    state = tracked.watcher.taps.layers["neck"].state
    assert state is not None
    tensors = [weakref.ref(tensor) for tensor in (state.moment, tracked.watcher._counters.step)]
    tracked.close()
    graph.launches.clear()
    graph.tracked = None
    del tracked, state
    gc.collect()
    assert all(tensor() is not None for tensor in tensors)


@pytest.mark.parametrize(
    ("rows", "count"), [*itertools.product((0.1, 0.5, "all", "auto"), (10, 60, 90, 2000))]
)
def test_the_estimate_is_what_device_buffers_take(rows: Any, count: int) -> None:
    model, x = Levels(), batch(count)
    layers = {layer.name: layer for layer in fastcov.estimate(model, x, rows=rows).layers}
    with fastcov.track(model, rows=rows) as tracked:
        model(x)
    for name, reader in tracked.watcher.taps.layers.items():
        buffer = reader.on_device.buffer
        taken = 0 if buffer is None else buffer._buffer.nbytes + buffer._row_step.nbytes
        assert taken == layers[name].buffer_bytes, name
    # Nothing waits where every row is added at once.
    neck = tracked.watcher.taps.layers["neck"]
    assert (neck.on_device.buffer is not None) == (neck.fraction != 1)


@pytest.mark.parametrize("fraction", [0.3, 1.0])
def test_a_buffer_is_not_used_for_rows_of_another_device(fraction: float) -> None:
    reader = Layer("layer", weighting="position", decay=None, phase=0, fraction=fraction)
    step = torch.zeros((), dtype=torch.int64)
    reader.begin_step(0)
    reader.read(batch(2), ActivationLayout(batch(2)))  # fewer rows than are added at once
    reader.read(batch(30), ActivationLayout(batch(30)))
    assert reader.use_device_buffer(step) is not None
    step.fill_(1)
    reader.begin_step(1)
    reader.read(
        batch(2).to("meta"), ActivationLayout(batch(2).to("meta"))
    )  # its state goes there too: what a GPU's is to a CPU's
    assert reader.on_device.buffer is None
    assert reader.state is not None
    assert reader.state.moment.is_meta
    assert reader.calls == 1


def test_counters_come_back_with_a_model_that_was_elsewhere() -> None:
    """Not on the host for good: the next capture would leave every layer out."""
    model, x = Levels(), batch(90)
    with fastcov.track(model, rows=0.3) as tracked:
        model(x)
        model(x)
        assert all(
            reader.on_device.buffer is not None for reader in tracked.watcher.taps.unique_layers
        )
        host = HOST._replace(kernels="native", repeats_calls=True)
        with mock.patch.object(backend, "active", Pretended(host)):
            for reader in tracked.watcher.taps.unique_layers:
                reader.leave_device()  # as where a model moves
            model(x)
        assert tracked.watcher._counters is None
        model(x)
        assert all(
            reader.on_device.buffer is not None for reader in tracked.watcher.taps.unique_layers
        )
        assert tracked.watcher._counters is not None
        assert int(tracked.watcher._counters.step) == 3
    assert_same(tracked, host_twin(model, x, 4, rows=0.3))


class Failing(nn.Module):
    """Raises behind its first layer where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 12), nn.Linear(12, 8)

    def forward(self, x: Tensor, fails: bool = False) -> Tensor:
        hidden = self.first(x)
        if fails:
            raise ArithmeticError
        return self.second(hidden)


@pytest.mark.parametrize("decay", [None, 0.8])
def test_a_forward_that_fails_is_no_step_and_loses_no_row(decay: float | None) -> None:
    model, x = Failing(), batch(60)

    def run() -> fastcov.Tracker:
        with fastcov.track(model, rows=0.5, decay=decay) as tracked:
            for number in range(7):
                with suppress(ArithmeticError):
                    model(x, fails=number in (2, 3, 5))
        return tracked

    with mock.patch.object(DeviceCounters, "serve", return_value=False):
        expected = run()
    tracked = run()
    assert tracked.watcher.taps.layers["first"].on_device.buffer is not None
    assert tracked.watcher._counters is not None
    assert int(tracked.watcher._counters.step) == 3
    assert [tracked.count(name) for name in tracked.names()] == [7 * 30, 4 * 30]
    assert_same(tracked, expected)


def test_a_tracker_with_a_mask_is_left_out_with_a_warning() -> None:
    model, x = Levels(), batch(90)
    mask = torch.arange(90) < 60
    with fastcov.track(model, rows=0.4, mask=lambda _x: mask) as tracked:
        graph = Graph(tracked)
        for _ in range(3):
            model(x)
        with pytest.warns(UserWarning, match="no mask is given"), graph.capture():
            model(x)
        assert not graph.launches
        model(x)
    expected = host_twin(model, x, 4, rows=0.4, mask=lambda _x: mask)
    assert tracked.count("neck") == pytest.approx(4 * 60 * 0.4, abs=4)
    assert_same(tracked, expected)


def test_a_graph_holds_activations_and_neither_gradients_nor_pairs() -> None:
    model, x = Levels(), batch(90).requires_grad_()
    options: dict[str, Any] = {"rows": 0.4, "of": "both", "pairs": [("neck", "head")]}
    with fastcov.track(model, **options) as tracked:
        graph = Graph(tracked)
        for _ in range(3):
            model(x).backward()
        with graph.capture():
            model(x)
        graph.replay()
        assert "gradients are read by the host" in str(tracked.summary())
        assert "not read by replays of a CUDA graph" in tracked.watcher.pairs["neck", "head"].note
    expected = host_twin(model, x, 4, rows=0.4)
    for name in ("neck", "head"):
        assert tracked.count(name) == expected.count(name)
        assert tracked.count(f"{name}:grad") == expected.count(name) * 3 // 4
    joint = tracked.cross_covariance("neck", "head")
    assert joint.shape == (12, 24)


def test_layers_move_to_the_device_and_back_where_a_mask_fits_some_steps() -> None:
    model, x = Levels(), batch(90)
    masks = [None, None, None, torch.arange(90) < 30, None, torch.arange(90) < 60, None]

    def run(tracked: fastcov.Tracker) -> fastcov.Tracker:
        for each in masks:
            mask[0] = each
            model(x)
        return tracked

    mask: list[Tensor | None] = [None]
    options: dict[str, Any] = {"rows": 0.4, "mask": lambda _x: mask[0], "decay": 0.9}
    with fastcov.track(model, **options) as tracked:
        run(tracked)
    with (
        mock.patch.object(DeviceCounters, "serve", return_value=False),
        fastcov.track(model, **options) as expected,
    ):
        run(expected)
    assert_same(tracked, expected)
