"""Whose rows a saved tracker holds: one process that believes that it is one of several ranks."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastcov


@pytest.fixture
def ranks(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, int], None]:
    """Makes this process believe that it is one of several."""

    def be(rank: int, ranks: int) -> None:
        monkeypatch.setattr(dist, "is_initialized", lambda: ranks > 0)
        monkeypatch.setattr(dist, "get_rank", lambda group=None: rank)
        monkeypatch.setattr(dist, "get_world_size", lambda group=None: ranks)

    return be


def test_rows_of_one_rank_are_loaded_by_no_other(ranks: Callable[[int, int], None]) -> None:
    model = nn.Linear(3, 3)
    ranks(1, 2)
    with fastcov.track(model, rows="all") as tracker:
        model(torch.randn(8, 3))
        own = tracker.state_dict()
    # One process, more ranks, and rank 0 of as many, as where all load one file.
    for number, says in ((0, "0 of 1"), (3, "0 of 3"), (2, "0 of 2")):
        ranks(0, number)
        with fastcov.track(model) as other:
            with pytest.raises(ValueError, match=rf"rank 1 of 2 alone, but rank {says}.*sync\(\)"):
                other.load_state_dict(own)
            assert other.steps == 0
            synced = {**own, "is_synced": True}
            other.load_state_dict(synced)
            assert other.count("") == 8
            older = {key: own[key] for key in own if key not in ("rank", "world_size")}
            other.load_state_dict(older)
    ranks(1, 2)
    with fastcov.track(model) as other:
        other.load_state_dict(own)
        assert other.count("") == 8


def test_rows_of_one_process_are_loaded_on_rank_0(ranks: Callable[[int, int], None]) -> None:
    model = nn.Linear(3, 3)
    with fastcov.track(model, rows="all") as tracker:
        model(torch.randn(8, 3))
        alone = tracker.state_dict()
    for rank, rows in ((0, 8), (1, 0)):
        ranks(rank, 2)
        with fastcov.track(model) as other:
            other.load_state_dict(alone)
            assert other.count("") == rows
