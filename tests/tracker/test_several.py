"""Several trackers, several runs in one folder, several threads."""

from __future__ import annotations

import copy
import threading
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import fastcov


def model_of(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 4))


def test_a_second_tracker_is_announced_and_can_replace_the_first() -> None:
    model = model_of()
    first = fastcov.track(model, rows="all")
    with pytest.warns(UserWarning, match="tracked already: 1 earlier tracker goes on reading them"):
        second = fastcov.track(model, rows="all")
    model(torch.randn(4, 8))
    assert first.count("0") == second.count("0") == 4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        third = fastcov.track(model, rows="all", replace=True)
    model(torch.randn(4, 8))
    assert (first.count("0"), second.count("0"), third.count("0")) == (4, 4, 4)
    third.close()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fastcov.track(model).close()


def test_a_closed_copy_leaves_the_compiled_steps_of_its_original_alone() -> None:
    model = model_of()
    tracker = fastcov.track(model, rows="all")
    compiled = torch.compile(lambda x: model(x) * 2, backend="eager", fullgraph=True)
    compiled(torch.randn(4, 8))
    with copy.deepcopy(tracker) as copied:
        assert copied.count("0") == 4
    compiled(torch.randn(4, 8))
    assert (tracker.count("0"), copied.count("0")) == (8, 4)


def test_snapshots_of_a_second_run_are_not_appended_to_the_first(tmp_path: Path) -> None:
    def run(steps: int) -> fastcov.Tracker:
        model = model_of()
        with fastcov.track(model, rows="all", snapshot_every=1, out=tmp_path) as tracker:
            for _ in range(steps):
                model(torch.randn(16, 8))
        return tracker

    run(3)
    with pytest.warns(UserWarning, match="earlier run were moved to .*earlier-1"):
        second = run(2)
    assert second.history.steps() == fastcov.load_history(tmp_path).steps() == [1, 2]
    assert fastcov.load_history(tmp_path / "earlier-1").steps() == [1, 2, 3]
    with pytest.warns(UserWarning, match="earlier-2"):
        run(1)
    assert fastcov.load_history(tmp_path / "earlier-2").steps() == [1, 2]


def test_a_run_that_is_continued_keeps_its_snapshots(tmp_path: Path) -> None:
    model = model_of()
    with fastcov.track(model, rows="all", snapshot_every=1, out=tmp_path) as tracker:
        for _ in range(3):
            model(torch.randn(16, 8))
        saved = tracker.state_dict()
    with fastcov.track(model, rows="all", snapshot_every=1, out=tmp_path) as tracker:
        tracker.load_state_dict(saved)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            model(torch.randn(16, 8))
    assert fastcov.load_history(tmp_path).steps() == [1, 2, 3, 4]


class Waiting(nn.Module):
    """A layer, then a wait in the middle of the forward where asked."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 4)
        self.is_inside, self.may_go_on = threading.Event(), threading.Event()

    def forward(self, x: torch.Tensor, waits: bool = False) -> torch.Tensor:
        hidden = self.first(x)
        if waits:
            self.is_inside.set()
            assert self.may_go_on.wait(30)
        return self.second(hidden)


def test_of_forwards_that_overlap_the_first_is_read_and_the_others_are_named() -> None:
    model, ones = Waiting(), torch.ones(4, 8)
    with fastcov.track(model, rows="all") as tracker:
        thread = threading.Thread(target=model, args=(2 * ones, True))
        thread.start()
        assert model.is_inside.wait(30)
        with pytest.warns(UserWarning, match="overlapped in several threads"):
            model(torch.full((64, 8), 1e6))
        model.may_go_on.set()
        thread.join()
        assert tracker.steps == 1
        assert [tracker.count(name) for name in tracker.names()] == [4, 4]
        expected = model.first(2 * ones).detach().double().mean(0)
        torch.testing.assert_close(tracker.mean("first"), expected)
        assert "overlapped in several threads" in str(tracker.summary())
        model(ones)  # alone again
        assert tracker.steps == 2
        assert tracker.count("second") == 8


def test_forwards_of_other_threads_one_after_the_other_are_all_read() -> None:
    model = model_of()
    with fastcov.track(model, rows="all") as tracker:
        for _ in range(5):
            thread = threading.Thread(target=model, args=(torch.randn(4, 8),))
            thread.start()
            thread.join()
        assert tracker.steps == 5
        assert tracker.count("2") == 20
        assert "overlapped" not in str(tracker.summary())


def test_many_threads_at_once_lose_no_row_of_the_steps_that_are_counted() -> None:
    model = model_of()
    with fastcov.track(model, rows="all") as tracker, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        threads = [
            threading.Thread(target=lambda: [model(torch.ones(64, 8)) for _ in range(50)])
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert tracker.count("0") == tracker.count("2") == 64 * tracker.steps > 0
        expected = model[0](torch.ones(1, 8)).detach().double()
        torch.testing.assert_close(tracker.mean("0"), expected[0])


def test_a_forward_that_was_interrupted_in_another_thread_does_not_overlap() -> None:
    model = model_of()
    tracker = fastcov.track(model, rows="all")

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    handle = model[2].register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(torch.randn(4, 8))
    handle.remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        thread = threading.Thread(target=lambda: [model(torch.randn(4, 8)) for _ in range(3)])
        thread.start()
        thread.join()
    assert tracker.steps == 3
    assert tracker.count("2") == 12
