"""Snapshots whose spectra come later: in order, none lost; on a GPU beside the training."""

from __future__ import annotations

import copy
import gc
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov.spectra.history import History
from fastcov.spectra.pending import PendingSpectra, SnapshotQueue
from fastcov.spectra.spectrum import Spectrum
from fastcov.stats.state import CovarianceState


class Later:
    """Spectra that are ready when the test says so."""

    def __init__(self, top: float) -> None:
        self.top = top
        self.ready = False
        self.waits = 0

    def is_ready(self) -> bool:
        return self.ready

    def get(self) -> dict[str, Spectrum]:
        self.waits += not self.ready
        return {"layer": Spectrum(torch.tensor([self.top, 0.5]), 8, self.top + 0.5, "layer")}


class Owner:
    pass


def test_snapshots_keep_their_order_and_wait_only_when_asked() -> None:
    owner, later = Owner(), [Later(1.0), Later(2.0)]
    queue = SnapshotQueue(History(), owner)
    for step, spectra in enumerate(later):
        queue.add(step, spectra)
    later[1].ready = True
    queue.poll()
    assert len(queue.history) == 0  # the first is not there yet
    later[0].ready = True
    queue.poll()
    assert queue.history.steps() == [0, 1]
    assert [snapshot.spectra["layer"].total for snapshot in queue.history] == [1.5, 2.5]
    assert later[0].waits == later[1].waits == 0


def test_few_copies_of_the_states_are_alive() -> None:
    owner, later = Owner(), [Later(float(top)) for top in range(1, 6)]
    queue = SnapshotQueue(History(), owner)
    for step, spectra in enumerate(later):
        queue.add(step, spectra)
        assert step + 1 - len(queue.history) <= 2
    assert [spectra.waits for spectra in later] == [1, 1, 1, 0, 0]


def test_the_time_is_that_of_the_step() -> None:
    owner, before = Owner(), time.time()
    queue = SnapshotQueue(History(), owner)
    queue.add(3, Later(1.0))
    after = time.time()
    time.sleep(0.02)
    queue.deliver()
    assert before <= queue.history[-1].wall_s <= after


@pytest.mark.parametrize("end", ["owner", "copy"])
def test_nothing_pending_is_lost(end: str) -> None:
    owner = Owner()
    queue = SnapshotQueue(History(), owner)
    queue.add(0, Later(1.0))
    if end == "owner":
        del owner
        gc.collect()
    else:
        queue = copy.deepcopy(queue)
    assert queue.history.steps() == [0]


def test_one_that_fails_is_a_warning_and_the_next_one_is_kept() -> None:
    owner, late = Owner(), Later(-1.0)  # its trace is negative: no spectrum
    queue = SnapshotQueue(History(), owner)
    queue.add(0, late)
    queue.add(1, Later(1.0))
    with pytest.warns(UserWarning, match="no snapshot at step 0, ValueError"):
        queue.deliver()
    assert queue.history.steps() == [1]


def small_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 40), nn.ReLU(), nn.Linear(40, 3))


def test_a_tracker_s_snapshots_may_come_later(monkeypatch) -> None:
    """Spectra are those of the step at which they were started, though read after further steps."""
    model = small_model()
    tracker = fastcov.track(model, rows="all", snapshot_every=2, decay=0.9)
    expected = []
    monkeypatch.setattr(PendingSpectra, "is_ready", lambda _: False)
    for step in range(1, 5):
        model(torch.randn(32, 6, generator=torch.Generator().manual_seed(step)))
        if step % 2 == 0:
            expected.append(tracker.spectra())
    assert len(tracker._snapshots.history) == 0
    assert tracker.history.steps() == [2, 4]
    for snapshot, spectra in zip(tracker.history, expected, strict=True):
        assert list(snapshot.spectra) == list(spectra) == ["0", "2"]
        for name, spectrum in spectra.items():
            assert torch.equal(snapshot.spectra[name].eigenvalues, spectrum.eigenvalues)
            assert snapshot.spectra[name].count == spectrum.count


def test_closing_completes_the_history(monkeypatch) -> None:
    model = small_model()
    with fastcov.track(model, rows="all", snapshot_every=1) as tracker:
        monkeypatch.setattr(PendingSpectra, "is_ready", lambda _: False)
        model(torch.randn(32, 6))
        assert len(tracker._snapshots.history) == 0
    assert len(tracker._snapshots.history) == 1


def test_layers_without_rows_are_left_out() -> None:
    states = {name: CovarianceState(3) for name in ("b", "empty", "a")}
    for name in ("a", "b"):
        states[name].update(torch.randn(9, 3))
    states["a"].update(torch.randn(16, 3), row_scale=0.25)
    spectra = PendingSpectra(states, False).get()
    assert list(spectra) == ["b", "a"]
    assert spectra["b"].count == 9
    assert spectra["a"].count == 17  # (9 + 16 / 4)^2 / (9 + 16 / 16) = 16.9: what 25 rows say
    exact = torch.linalg.eigvalsh(states["a"].covariance()).flip(0)
    torch.testing.assert_close(spectra["a"].eigenvalues, exact)
    assert spectra["a"].total == pytest.approx(float(exact.sum()))


@pytest.fixture
def no_synchronisation() -> Iterator[None]:
    torch.cuda.set_sync_debug_mode("error")
    yield
    torch.cuda.set_sync_debug_mode("default")


def train(model: nn.Module, steps: range) -> None:
    for step in steps:
        generator = torch.Generator("cuda").manual_seed(step)
        model(torch.randn(256, 64, generator=generator, device="cuda"))


def wide_model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 200), nn.ReLU(), nn.Linear(200, 600), nn.ReLU()).cuda()


def assert_same(spectra: dict[str, Spectrum], expected: dict[str, Spectrum]) -> None:
    # Rows of three more steps would show in the second digit.
    assert list(spectra) == list(expected)
    for name, spectrum in expected.items():
        values: Tensor = spectra[name].eigenvalues
        limit = 1e-5 * float(spectrum.eigenvalues.max())
        torch.testing.assert_close(values, spectrum.eigenvalues, rtol=0, atol=limit)
        assert spectra[name].count == spectrum.count


def side_stream() -> torch.cuda.Stream:
    from fastcov.spectra.pending import _side_streams

    return _side_streams[torch.device("cuda", torch.cuda.current_device())]


@pytest.mark.gpu
@pytest.mark.parametrize("own_stream", [False, True])
def test_training_never_waits_for_a_snapshot(request, own_stream: bool) -> None:
    expected_model = wide_model()
    expected = fastcov.track(expected_model, rows="all")
    train(expected_model, range(1, 9))

    model = wide_model()
    tracker = fastcov.track(model, rows="all", snapshot_every=4)
    training = torch.cuda.Stream() if own_stream else torch.cuda.current_stream()
    torch.cuda.synchronize()
    with torch.cuda.stream(training):
        train(model, range(1, 5))
        assert tracker.history.steps() == [4]
        torch.cuda.synchronize()
        side = side_stream()
        assert side != training
        with torch.cuda.stream(side):
            torch.cuda._sleep(4_000_000_000)  # two seconds of a GPU at 2 GHz
        request.getfixturevalue("no_synchronisation")
        train(model, range(5, 12))
        done = training.record_event()
    done.synchronize()
    # Seven steps, a snapshot among them, are through while the side stream has not begun.
    assert not side.query()
    assert len(tracker._snapshots.history) == 1
    assert tracker.history.steps() == [4, 8]
    torch.cuda.set_sync_debug_mode("default")
    assert_same(tracker.history[-1].spectra, expected.spectra())


@pytest.mark.gpu
def test_memory_of_a_snapshot_is_not_used_again_too_early() -> None:
    model = wide_model()
    tracker = fastcov.track(model, rows="all", snapshot_every=3)
    train(model, range(1, 4))
    expected = tracker.spectra()
    del tracker
    model = wide_model()
    tracker = fastcov.track(model, rows="all", snapshot_every=3)
    train(model, range(1, 3))
    torch.cuda.synchronize()
    with torch.cuda.stream(side_stream()):
        torch.cuda._sleep(1_000_000_000)
    train(model, range(3, 4))
    # The copies of the states are free again for the allocator, whose blocks these would take.
    junk = [
        torch.full((size, size), 7.0, dtype=torch.float64, device="cuda") for size in (200, 600)
    ]
    for tensor in junk:
        tensor.add_(1)
    assert_same(tracker.history[-1].spectra, expected)
