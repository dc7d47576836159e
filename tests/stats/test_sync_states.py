"""sync_states: ranks together hold what one state that merged them all holds."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from fastcov.ops import triangle
from fastcov.stats.ranks import sync_states
from fastcov.stats.state import DECLARED, CovarianceState

CHANNELS = (4, 1, 3, 40)
SKETCHES = {40: 6}


class ThreadRanks:
    """Collectives between threads, each of which is one rank."""

    def __init__(self, ranks: int) -> None:
        self.ranks = ranks
        self._own = threading.local()
        self._sent: list[Tensor | None] = [None] * ranks
        self._barrier = threading.Barrier(ranks, timeout=30)
        self.collectives = 0

    def run(self, body: Any) -> list[Any]:
        def start(rank: int) -> Any:
            self._own.rank = rank
            return body(rank)

        with ThreadPoolExecutor(self.ranks) as pool:
            return list(pool.map(start, range(self.ranks)))

    def _exchange(self, tensor: Tensor) -> list[Tensor]:
        self._sent[self._own.rank] = tensor.clone()
        self._barrier.wait()
        sent = [part for part in self._sent if part is not None]
        self.collectives += self._own.rank == 0
        self._barrier.wait()
        return sent

    def all_gather(self, gathered: list[Tensor], local: Tensor, group: object = None) -> None:
        for to, part in zip(gathered, self._exchange(local), strict=True):
            to.copy_(part)

    def all_reduce(self, tensor: Tensor, group: object = None) -> None:
        tensor.copy_(torch.stack(self._exchange(tensor)).sum(0))


def states_of(rank: int) -> list[CovarianceState]:
    states = []
    for layer, channels in enumerate(CHANNELS):
        generator = torch.Generator().manual_seed(10 * rank + layer)
        state = CovarianceState(channels, sketch=SKETCHES.get(channels))
        if (rank, layer) != (0, 1):  # a rank that has seen no row of a layer
            rows = torch.randn(20 + rank, channels, generator=generator, dtype=torch.float64)
            weights = torch.rand(len(rows), generator=generator) + 0.1
            rows[0, 0] = torch.nan
            state.update(rows + 100 * rank, weights, decay=0.5)
        states.append(state)
    return states


def test_ranks_hold_what_one_merged_state_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    ranks = ThreadRanks(3)
    monkeypatch.setattr(dist, "all_gather", ranks.all_gather)
    monkeypatch.setattr(dist, "all_reduce", ranks.all_reduce)
    monkeypatch.setattr(dist, "get_world_size", lambda group=None: ranks.ranks)
    synced = ranks.run(lambda rank: sync_states(states_of(rank)))
    assert ranks.collectives == 2
    for layer, channels in enumerate(CHANNELS):
        expected = CovarianceState(channels, sketch=SKETCHES.get(channels))
        for rank in range(3):
            expected.merge(states_of(rank)[layer])
        for rank in range(3):
            found = synced[rank][layer]
            for name in DECLARED:
                own, other = getattr(found, name), getattr(expected, name)
                if name == "moment":
                    own, other = (triangle.unpack(each, len(found.sum)) for each in (own, other))
                torch.testing.assert_close(own, other, rtol=1e-12, atol=1e-9)


def test_no_state_needs_no_collective() -> None:
    assert sync_states([]) == []
