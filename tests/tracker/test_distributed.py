"""Two gloo ranks: sync equals one process, ranks sample elsewhere, state_dict moves on."""

from __future__ import annotations

import gc
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastcov

pytestmark = pytest.mark.dist


def make_model() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 5)).double()


def batch(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 6, generator=generator, dtype=torch.float64) + seed


def _start(rank: int, port: int, body: Callable[[int, Path], None], folder: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        body(rank, folder)
    finally:
        # Models in reference cycles hold the group beyond its end: a thread of gloo that frees
        # their tensors while the interpreter ends would abort the process.
        gc.collect()
        dist.destroy_process_group()


def on_two_ranks(body: Callable[[int, Path], None], folder: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with pytest.MonkeyPatch.context() as patch:
        # At the end: the processes find this file by its name, and the same fastcov as this one.
        patch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
        mp.start_processes(_start, args=(port, body, folder), nprocs=2, start_method="spawn")


def _ddp(rank: int, folder: Path) -> None:
    model = DistributedDataParallel(make_model())
    tracker = fastcov.track(model, rows="all")
    assert tracker.names() == ["0", "2"]
    for step in range(3):
        model(batch(2 * step + rank)).sum().backward()
    local = tracker.count("0")
    tracker.sync()
    torch.save(
        {name: tracker.covariance(name) for name in tracker.names()}, folder / f"cov{rank}.pt"
    )
    assert tracker.count("0") == 96
    if rank == 0:
        torch.save(tracker.state_dict(), folder / "state.pt")
    # The next step goes on with this rank's rows: a second sync counts nothing twice.
    model(batch(6 + rank)).sum().backward()
    assert tracker.count("0") == local + 16
    tracker.sync()
    assert tracker.count("0") == 128
    dist.barrier()
    resumed = fastcov.track(model, rows="all")
    resumed.load_state_dict(torch.load(folder / "state.pt", weights_only=True))
    resumed.sync()
    assert resumed.count("0") == 96


def test_sync_is_one_process_and_counts_nothing_twice(tmp_path: Path) -> None:
    on_two_ranks(_ddp, tmp_path)
    model = make_model()
    with fastcov.track(model, rows="all") as single:
        for seed in range(6):
            model(batch(seed))
    for rank in range(2):
        synced = torch.load(tmp_path / f"cov{rank}.pt", weights_only=True)
        for name, covariance in synced.items():
            error = (covariance - single.covariance(name)).abs().max()
            assert float(error) <= 1e-12 * float(covariance.trace())
    alone = fastcov.track(model, rows="all")
    alone.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert alone.count("0") == 96


def _own_rows(rank: int, folder: Path) -> None:
    model = make_model()
    tracker = fastcov.track(model, rows="all")
    for _ in range(1 + rank):
        model(batch(rank))
    torch.save(tracker.state_dict(), folder / f"own{rank}.pt")
    resumed = fastcov.track(model, rows="all")
    resumed.load_state_dict(torch.load(folder / f"own{rank}.pt", weights_only=True))
    assert resumed.count("0") == 16 * (1 + rank)
    assert resumed.sync().count("0") == 48


def test_each_rank_resumes_its_own_rows_and_no_one_else(tmp_path: Path) -> None:
    on_two_ranks(_own_rows, tmp_path)
    alone = fastcov.track(make_model(), rows="all")
    for rank in range(2):
        own = torch.load(tmp_path / f"own{rank}.pt", weights_only=True)
        with pytest.raises(ValueError, match=rf"rank {rank} of 2 alone, but rank 0 of 1 loads"):
            alone.load_state_dict(own)


def _sampled(rank: int, folder: Path) -> None:
    model = make_model()
    tracker = fastcov.track(model, rows=0.25)
    model(batch(0))
    torch.save(tracker.mean("0"), folder / f"mean{rank}.pt")


def test_ranks_sample_different_positions(tmp_path: Path) -> None:
    on_two_ranks(_sampled, tmp_path)
    means = [torch.load(tmp_path / f"mean{rank}.pt", weights_only=True) for rank in range(2)]
    assert not torch.equal(*means)


def _one_rank_saw_nothing(rank: int, folder: Path) -> None:
    model = make_model()
    tracker = fastcov.track(model, rows="all")
    if rank == 1:
        model(batch(0))
    tracker.sync()
    assert tracker.count("0") == 16


def test_a_rank_without_rows_joins(tmp_path: Path) -> None:
    on_two_ranks(_one_rank_saw_nothing, tmp_path)


def _different_layers(rank: int, folder: Path) -> None:
    tracker = fastcov.track(make_model(), include=["0", "2"][rank])
    with pytest.raises(RuntimeError, match="other layers or widths"):
        tracker.sync()


def test_ranks_that_disagree_fail_together(tmp_path: Path) -> None:
    on_two_ranks(_different_layers, tmp_path)


class Observed(nn.Module):
    """Names its hidden rows and takes a mask of them."""

    def __init__(self) -> None:
        super().__init__()
        self.inside = make_model()
        self.tracker: fastcov.Tracker | None = None

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = self.inside[1](self.inside[0](x))
        assert self.tracker is not None
        self.tracker.observe("hidden", hidden)
        return self.inside[2](hidden)


def _taps(rank: int, folder: Path) -> None:
    def steps(model: nn.Module, ranks: list[int]) -> fastcov.Tracker:
        tracker = fastcov.track(
            model, rows="all", of="both", mask="mask", pairs=[("hidden", NAME)], include=f"*{NAME}"
        )
        (model.module if is_parallel else model).tracker = tracker
        for step in range(3):
            for part in ranks:
                mask = torch.arange(16) % (2 + step + part) > 0
                model(batch(2 * step + part), mask=mask).square().sum().backward()
        return tracker

    is_parallel = True
    both = steps(DistributedDataParallel(Observed()), [rank]).sync()
    is_parallel = False
    alone = steps(Observed(), [0, 1])
    for name in alone.names():
        assert both.count(name) == alone.count(name) > 0
        assert torch.allclose(both.covariance(name), alone.covariance(name), rtol=1e-9)
    wanted = alone.cross_covariance("hidden", NAME)
    assert torch.allclose(both.cross_covariance("hidden", NAME), wanted, rtol=1e-9)
    assert set(both.spectra()) == set(alone.names())


NAME = "inside.2"


def test_masks_gradients_named_tensors_and_pairs_of_two_ranks(tmp_path: Path) -> None:
    on_two_ranks(_taps, tmp_path)
