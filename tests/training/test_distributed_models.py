"""Real models on two gloo ranks, under DDP, FSDP2 and tensor parallelism."""

from __future__ import annotations

import copy
import gc
import os
import socket
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor, parallel
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

import fastcov

pytestmark = [pytest.mark.dist, pytest.mark.slow]

STEPS = 2


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=16,
        )
    )  # fmt: skip


def mobilenet() -> nn.Module:
    from torchvision.models import mobilenet_v2

    torch.manual_seed(0)
    return mobilenet_v2(width_mult=0.25, num_classes=5, dropout=0.0)


def predict(model: nn.Module, seed: int) -> Tensor:
    tokens = torch.randint(40, (3, 8), generator=torch.Generator().manual_seed(seed))
    return model(input_ids=tokens, labels=tokens).loss


def classify(model: nn.Module, seed: int) -> Tensor:
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    return model(images).square().mean()


def collected(tracker: fastcov.Tracker) -> dict[str, Any]:
    return {
        "steps": tracker.steps,
        "counts": {name: tracker.count(name) for name in tracker.names()},
        "covariances": {n: tracker.covariance(n) for n in tracker.names() if tracker.count(n)},
        "notes": {status.name: status.note for status in tracker.statuses()},
    }


def collectives(run: Callable[[], Any]) -> Counter[str]:
    """Collectives that Python or C++ called, as the dispatcher saw them."""
    with profile(activities=[ProfilerActivity.CPU]) as profiler:
        run()
    return Counter(event.name for event in profiler.events() if event.name.startswith("c10d::"))


def train(model: nn.Module, loss: Callable[[nn.Module, int], Tensor], rank: int) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # so that one process can follow
    for step in range(STEPS):
        optimizer.zero_grad()
        loss(model, 2 * step + rank).backward()
        optimizer.step()


def run_ddp(rank: int) -> dict[str, Any]:
    model = DistributedDataParallel(mobilenet())
    tracker = fastcov.track(model, rows="all", where="both")
    train(model, classify, rank)
    result = collected(tracker.sync())
    model.eval()
    classify(model, 0)
    return result


def run_collectives(rank: int) -> dict[str, Any]:
    def fsdp() -> nn.Module:
        model = llama()
        fully_shard(model)
        return model

    asked = {}
    for name, build, loss in (
        ("ddp", lambda: DistributedDataParallel(mobilenet()), classify),
        ("fsdp", fsdp, predict),
    ):
        model = build()
        plain = collectives(lambda model=model, loss=loss: train(model, loss, rank))
        model = build()
        tracker = fastcov.track(model, snapshot_every=1, where="both", max_channels=200)
        tracked = collectives(lambda model=model, loss=loss: train(model, loss, rank))

        def read(tracker: fastcov.Tracker = tracker) -> None:
            tracker.summary()
            tracker.snapshot()
            other = copy.deepcopy(tracker)
            other.merge(tracker)
            other.load_state_dict(tracker.state_dict())

        asked[name] = (plain, tracked, collectives(read), collectives(tracker.sync))
    return asked


def run_compiled_ddp(rank: int) -> dict[str, Any]:
    dist._DEFAULT_FIRST_BUCKET_BYTES = 1  # so that DDP has several buckets to cut the graph at
    model = DistributedDataParallel(llama(), bucket_cap_mb=0.001)
    tracker = fastcov.track(model, rows="all")
    compiled = torch.compile(model, backend="aot_eager")
    train(compiled, predict, rank)
    return collected(tracker.sync())


def run_fsdp(rank: int) -> dict[str, Any]:
    model = llama()
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    tracker = fastcov.track(model, rows="all", where="both")
    train(model, predict, rank)
    return collected(tracker.sync())


def run_fsdp_tracked_first(rank: int) -> dict[str, Any]:
    model = llama()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    tracker = fastcov.track(model, rows="all", where="both")
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    train(model, predict, rank)
    return collected(tracker.sync())


def run_fsdp_half(rank: int) -> dict[str, Any]:
    model = llama()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16)
    fully_shard(model, mp_policy=policy)
    tracker = fastcov.track(model)
    train(model, predict, rank)
    return collected(tracker.sync())


def saved(model: nn.Module, rank: int) -> dict[str, Any]:
    tracker = fastcov.track(model, rows="all", where="both", decay=0.9)
    train(model, predict, rank)
    return tracker.sync().state_dict()


def run_saving(rank: int) -> dict[str, Any]:
    model = llama()
    fully_shard(model)
    return saved(model, rank)


def run_resumed(rank: int, state: dict[str, Any]) -> dict[str, Any]:
    """Another number of ranks, another wrapper or none: one more step, on batches of its own."""
    model = DistributedDataParallel(llama()) if dist.is_initialized() else llama()
    tracker = fastcov.track(model, rows="all", where="both", decay=0.9)
    tracker.load_state_dict(state)
    predict(model, 2 * STEPS + rank)
    return collected(tracker.sync())


class Feedforward(nn.Module):
    """The usual tensor-parallel pair, a norm before it and a plain layer after."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = nn.LayerNorm(8)
        self.up, self.down = nn.Linear(8, 12), nn.Linear(12, 8)
        self.plain = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.down(self.up(self.norm(x)).relu()))


def run_tensor_parallel(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for order in ("before", "after"):
        model = Feedforward()
        options = {"rows": "all", "include": ["up", "down", "plain", "norm"], "where": "both"}
        if order == "before":
            tracker = fastcov.track(model, **options)
        plan = {"up": parallel.ColwiseParallel(), "down": parallel.RowwiseParallel()}
        model = parallel.parallelize_module(model, mesh, plan)
        if order == "after":
            tracker = fastcov.track(model, **options)
        for seed in range(STEPS):
            model(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed))).sum().backward()
        results[order] = collected(tracker)
    return results


def run_dtensor_outputs(rank: int) -> dict[str, Any]:
    mesh = init_device_mesh("cpu", (2,))
    results = {}
    for name, placement in (("replicated", Replicate()), ("sharded", Shard(0))):
        model = Feedforward()
        for module in (model.norm, model.up, model.down, model.plain):
            for key, parameter in list(module.named_parameters()):
                whole = distribute_tensor(parameter.detach(), mesh, [Replicate()])
                setattr(module, key, nn.Parameter(whole))
        tracker = fastcov.track(model, rows="all")
        x = distribute_tensor(torch.ones(4, 8), mesh, [placement])
        output = model(x)
        assert isinstance(output, DTensor)
        output.sum().backward()
        results[name] = collected(tracker)
    sequence = Feedforward()
    plan = {"norm": parallel.SequenceParallel(use_local_output=False)}
    parallel.parallelize_module(sequence, mesh, plan)
    tracker = fastcov.track(sequence, rows="all", include="norm")
    sequence.norm(torch.ones(2, 2, 8))
    results["steps"] = tracker.steps
    return results


RUNS = (
    run_ddp, run_collectives, run_compiled_ddp, run_fsdp, run_fsdp_tracked_first, run_fsdp_half,
    run_saving,
    run_tensor_parallel, run_dtensor_outputs,
)  # fmt: skip


def _start(rank: int, port: int, folder: Path, state: dict[str, Any]) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        found = {run.__name__: run(rank) for run in RUNS}
        found["run_resumed"] = run_resumed(rank, state)
        torch.save(found, folder / f"rank{rank}.pt")
    finally:
        # Models in reference cycles hold the group beyond its end: a thread of gloo that frees
        # their tensors while the interpreter ends would abort the process.
        gc.collect()
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Statistics of all runs, by rank. One pair of processes serves all tests."""
    folder = tmp_path_factory.mktemp("ranks")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (port, folder, saved(llama(), rank=0))
    with pytest.MonkeyPatch.context() as patch:
        # At the end: the processes find this file by its name, and the same fastcov as this one.
        patch.setattr(sys, "path", [*sys.path, str(Path(__file__).parents[2])])
        mp.start_processes(_start, args=arguments, nprocs=2, start_method="spawn")
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def one_process(
    build: Callable[[], nn.Module], loss: Callable[[nn.Module, int], Tensor], **options: Any
) -> dict[str, Any]:
    """The same batches one after the other, on one thread as in a rank: the same activations."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        model = build()
        tracker = fastcov.track(model, rows="all", **options)
        for seed in range(2 * STEPS):
            loss(model, seed)
        return collected(tracker)
    finally:
        torch.set_num_threads(threads)


def assert_same(result: dict[str, Any], expected: dict[str, Any], tolerance: float = 1e-5) -> None:
    assert result["steps"] == STEPS
    assert result["counts"] == expected["counts"]
    assert min(result["counts"].values()) > 0
    for name, covariance in expected["covariances"].items():
        error = (result["covariances"][name] - covariance).abs().max()
        assert float(error) <= tolerance * float(covariance.abs().max()), name


def test_ddp_synced_is_one_process(ranks: list[dict[str, Any]]) -> None:
    expected = one_process(mobilenet, classify, where="both")
    for rank in ranks:
        assert_same(rank["run_ddp"], expected)


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_sync_is_the_only_collective(ranks: list[dict[str, Any]], wrapper: str) -> None:
    for rank in ranks:
        plain, tracked, reading, sync = rank["run_collectives"][wrapper]
        assert tracked == plain
        assert plain.total() > 0
        assert reading.total() == 0
        # Names and widths (all_gather_object: sizes, then bytes), shifts, then all sums at once.
        assert sync == {"c10d::allgather_": 3, "c10d::allreduce_": 1}


def test_compiled_ddp_with_several_buckets(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        assert_same(rank["run_compiled_ddp"], one_process(llama, predict), 1e-3)


@pytest.mark.parametrize("run", ["run_fsdp", "run_fsdp_tracked_first"])
def test_fsdp2_synced_is_one_process(ranks: list[dict[str, Any]], run: str) -> None:
    expected = one_process(llama, predict, where="both")
    for rank in ranks:
        assert_same(rank[run], expected)


def test_fsdp2_in_half_precision_with_default_rows(ranks: list[dict[str, Any]]) -> None:
    single, double = (rank["run_fsdp_half"] for rank in ranks)
    assert single["steps"] == double["steps"] == STEPS
    assert single["counts"] == double["counts"]
    assert max(single["counts"].values()) > 0


def assert_decayed(resumed: list[dict[str, Any]], batches: list[list[int]]) -> None:
    """Against sums by hand over the batches of every step, which all ranks shared."""
    model = llama()
    seen: list[Tensor] = []
    layer = "model.layers.1.mlp.up_proj"
    model.get_submodule(layer).register_forward_hook(lambda _m, _a, output: seen.append(output))
    total, weight = torch.zeros(24, 24, dtype=torch.float64), 0.0
    for age, seeds in enumerate(reversed(batches)):
        for seed in seeds:
            predict(model, seed)
            rows = seen.pop().detach().double().flatten(0, 1)
            total += 0.9**age * rows.T @ rows
            weight += 0.9**age * len(rows)
    for rank in resumed:
        assert rank["steps"] == len(batches)
        assert rank["counts"][layer] == 24 * sum(map(len, batches))
        torch.testing.assert_close(rank["covariances"][layer], total / weight, rtol=1e-4, atol=1e-7)


def test_statistics_of_two_ranks_go_on_in_one_process(ranks: list[dict[str, Any]]) -> None:
    resumed = run_resumed(0, ranks[0]["run_saving"])
    assert_decayed([resumed], [[0, 1], [2, 3], [4]])


def test_statistics_of_one_process_go_on_in_two_ranks(ranks: list[dict[str, Any]]) -> None:
    """Were they loaded by both, sync() would count them twice."""
    assert_decayed([rank["run_resumed"] for rank in ranks], [[0], [2], [4, 5]])


@pytest.mark.parametrize("order", ["before", "after"])
def test_tensor_parallel_layers_are_right_or_refused(
    ranks: list[dict[str, Any]], order: str
) -> None:
    """Local channels must never pass for all channels."""
    model = Feedforward()
    with fastcov.track(model, rows="all", where="both", include="*", exclude="") as single:
        for seed in range(STEPS):
            model(torch.randn(5, 8, generator=torch.Generator().manual_seed(seed)))
    for rank in ranks:
        result = rank["run_tensor_parallel"][order]
        assert result["steps"] == STEPS
        for name, covariance in result["covariances"].items():
            torch.testing.assert_close(
                covariance, single.covariance(name), rtol=1e-4, atol=1e-5, msg=name
            )
        assert {"plain", "norm"} <= set(result["covariances"])
        refused = {name for name, count in result["counts"].items() if not count}
        assert refused
        for name in refused:
            note = result["notes"][name]
            assert "DTensors" in note or "6 of 12 channels on this rank" in note, (name, note)


def test_dtensor_outputs_are_refused_in_words(ranks: list[dict[str, Any]]) -> None:
    for rank in ranks:
        for placement in ("replicated", "sharded"):
            result = rank["run_dtensor_outputs"][placement]
            assert result["steps"] == 1
            assert set(result["counts"].values()) == {0}
            assert all("gives DTensors, whose rows or" in note for note in result["notes"].values())
        assert rank["run_dtensor_outputs"]["steps"] == 0
