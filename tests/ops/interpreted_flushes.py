"""Launches at the end of a step, counted: run by test_graphs.py as interpreted_graphs.py is."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov.kernels import flush
from fastcov.kernels.launch import Launch
from fastcov.ops import library


class Mixed(nn.Module):
    """Three groups of buffers: whose rows take vector loads, whose do not, and of half precision.

    All layers get as many rows, more than two for each of their channels.
    """

    groups = ({"a", "b", "c"}, {"odd"}, {"half_a", "half_b"})

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 24), nn.Linear(24, 8)
        self.odd = nn.Linear(8, 10)
        self.half_a = nn.Linear(8, 16, dtype=torch.bfloat16)
        self.half_b = nn.Linear(16, 8, dtype=torch.bfloat16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(self.a(x)))
        return self.odd(x).sum() + self.half_b(self.half_a(x.bfloat16())).sum()


@contextmanager
def counted() -> Iterator[list[int]]:
    """Lists the launches of a flush, each by the number of layers that its programs work on."""
    launches: list[int] = []
    start = Launch.start

    def counted_start(launch: Launch, *tensors: Any) -> None:
        if launch.kernel is flush.flush_kernel:
            programs = tensors[1]
            assert launch.grid == (len(programs), 1, 1)
            launches.append(len(programs[:, 0].unique()))
        start(launch, *tensors)

    with mock.patch.object(Launch, "start", counted_start):
        yield launches


def batch(seed: int) -> Tensor:
    return torch.randn(90, 8, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("decay", [None, 0.9])
def test_one_launch_a_group_empties_all_full_buffers(decay: float | None) -> None:
    model = Mixed()
    with fastcov.track(model, rows=0.6, decay=decay) as tracker:
        model(batch(0))
        model(batch(1))
        for number in range(2, 4):
            layers = tracker.watcher.taps.layers
            before = {name: layers[name].state.count.clone() for name in tracker.names()}
            host = mock.Mock()
            with counted() as launches, mock.patch.dict(library.ACCUMULATE, native=host):
                model(batch(number))
            assert sorted(launches) == sorted(len(group) for group in Mixed.groups)
            host.assert_not_called()
            # All of them were full: no launch was needed for another, later.
            for name, count in before.items():
                added = layers[name].state.count - count
                assert added.tolist() == [54, 0], name


def test_launches_are_as_many_whatever_is_full() -> None:
    """The host does not know: so that a graph may hold them."""
    model = Mixed()
    with fastcov.track(model, rows=0.02):
        for number in range(3):
            model(batch(number))
        with counted() as launches:
            model(batch(3))
        assert len(launches) == len(Mixed.groups)


def test_rows_that_are_weighted_by_image_are_added_by_the_host_layer_by_layer() -> None:
    """A row's weight is a number of the host's, and known at the end of its step: no one launch."""
    model = Mixed()
    with fastcov.track(model, rows=0.6, weighting="image") as tracker:
        model(batch(0))
        model(batch(1))
        host = mock.Mock(side_effect=library.accumulate_)
        with counted() as launches, mock.patch.dict(library.ACCUMULATE, native=host):
            model(batch(2))
        assert not launches
        assert host.call_count == len(tracker.names()) == 6
