"""Models that move after track(), and what only a GPU can show."""

from __future__ import annotations

import gc
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastcov

WIDTH = 24


def transformer(depth: int = 2) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=WIDTH, depth=depth, num_heads=2, num_classes=5
    )


def images(seed: int, batch: int = 3, device: str = "cpu") -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 3, 32, 32, generator=generator, device="cpu").to(device)


def eager_on_cpu(steps: int, **options: Any) -> fastcov.Tracker:
    model = transformer()
    with fastcov.track(model, **options) as tracker:
        for seed in range(steps):
            model(images(seed))
    return tracker


def assert_same(tracker: fastcov.Tracker, expected: fastcov.Tracker, tolerance: float) -> None:
    assert tracker.steps == expected.steps
    for name in expected.names():
        assert tracker.count(name) == expected.count(name) > 0, name
        covariance = expected.covariance(name)
        error = (tracker.covariance(name).cpu() - covariance).abs().max()
        assert float(error) <= tolerance * float(covariance.abs().max()), name


def test_model_goes_to_the_meta_device_and_comes_back() -> None:
    """As when its weights are offloaded: what was seen stays, what holds no values is not read."""
    model = transformer()
    weights = model.state_dict()
    tracker = fastcov.track(model, rows="all", weighting="image")
    model(images(0))
    covariance = tracker.covariance("head")
    model.to("meta")
    model(images(0).to("meta"))
    assert "on the meta device, which hold no values" in str(tracker.summary())
    torch.testing.assert_close(tracker.covariance("head"), covariance)
    model.to_empty(device="cpu").load_state_dict(weights)
    model(images(1))
    assert tracker.steps == 3
    assert tracker.count("head") == 6


def test_model_built_on_the_meta_device_and_filled_after_track() -> None:
    weights = transformer().state_dict()
    with torch.device("meta"):
        model = transformer()
        tracker = fastcov.track(model, rows="all")
    model.to_empty(device="cpu").load_state_dict(weights)
    for seed in range(2):
        model(images(seed))
    assert_same(tracker, eager_on_cpu(2, rows="all"), 1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options", [{"rows": "all"}, {"rows": 0.3}, {"rows": 0.3, "weighting": "image", "decay": 0.9}]
)
def test_model_moves_to_the_gpu_and_back(options: dict[str, Any]) -> None:
    model = transformer()
    tracker = fastcov.track(model, **options)
    devices = ["cpu", "cuda", "cuda", "cpu", "cuda"]
    for seed, device in enumerate(devices):
        model.to(device)(images(seed, device=device)).sum().backward()
    expected = eager_on_cpu(len(devices), **options)
    assert tracker.steps == expected.steps
    for name in expected.names():
        assert tracker.count(name) == expected.count(name)
    assert tracker.covariance("head").device.type == "cuda"
    if options["rows"] == "all":
        assert_same(tracker, expected, 1e-3)


@pytest.mark.gpu
def test_layers_on_two_devices() -> None:
    """A model whose parts live on the CPU and on the GPU."""

    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.near, self.far = nn.Linear(8, 8), nn.Linear(8, 8).cuda()

        def forward(self, x: Tensor) -> Tensor:
            return self.far(self.near(x).cuda())

    model = Split()
    tracker = fastcov.track(model, rows=0.5, where="both")
    for _ in range(4):
        model(torch.randn(30, 8)).sum().backward()
    assert {tracker.count(name) for name in tracker.names()} == {60}
    assert tracker.covariance("near").device.type == "cpu"
    assert tracker.covariance("far").device.type == "cuda"
    assert len(tracker.spectra()) == 4


@pytest.mark.gpu
def test_training_on_the_gpu_is_the_same() -> None:
    """Bit for bit in eager mode; compiled, another graph may fuse and round float16 otherwise."""

    def run(track: bool, mode: str | None) -> list[Tensor]:
        torch.compiler.reset()
        torch.manual_seed(0)
        model = transformer().cuda()
        tracker = fastcov.track(model, where="both") if track else None
        forward = model if mode is None else torch.compile(model, fullgraph=True, mode=mode)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cuda")
        for seed in range(4):
            optimizer.zero_grad()
            with torch.autocast("cuda", torch.float16):
                loss = forward(images(seed, device="cuda")).float().square().mean()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
        assert tracker is None or tracker.steps == 4
        return [*model.state_dict().values(), torch.cuda.get_rng_state()]

    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        for mode in (None, "default"):
            for plain, tracked in zip(run(False, mode), run(True, mode), strict=True):
                if mode is None or not plain.is_floating_point():
                    assert torch.equal(plain, tracked), mode
                else:
                    # Four steps of 1e-3 on gradients that are off by float16's last bits.
                    torch.testing.assert_close(tracked, plain, rtol=1e-3, atol=1e-5)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("rows", ["all", 0.3])
def test_reduce_overhead_counts_exactly(rows: str | float) -> None:
    """CUDA graphs replay no host code: they are cut around the operators that read."""
    model = transformer().cuda()
    tracker = fastcov.track(model, rows=rows)
    compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
    steps = 8  # warm-up, recording and several replays
    for seed in range(steps):
        torch.compiler.cudagraph_mark_step_begin()
        compiled(images(seed, device="cuda")).sum().backward()
        model.zero_grad()
        if seed == 3:
            torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")
    assert counters["inductor"]["cudagraph_skips"] == 0
    assert_same(tracker, eager_on_cpu(steps, rows=rows), 1e-2)


@pytest.mark.gpu
@pytest.mark.usefixtures("fresh_compiler")
def test_reduce_overhead_in_evaluation_mode_is_one_uncut_graph() -> None:
    def partitions(track: bool) -> int:
        torch.compiler.reset()
        counters.clear()
        model = transformer().cuda().eval()
        tracker = fastcov.track(model, rows="all") if track else None
        compiled = torch.compile(model, fullgraph=True, mode="reduce-overhead")
        with torch.no_grad():
            for seed in range(4):
                compiled(images(seed, device="cuda"))
        assert tracker is None or tracker.steps == 0
        assert counters["inductor"]["cudagraph_skips"] == 0
        return counters["inductor"]["cudagraph_partitions"]

    assert partitions(track=True) == partitions(track=False)


@pytest.mark.gpu
def test_a_captured_training_step_counts_its_replays() -> None:
    """torch.cuda.graph around a whole step, after eager steps on a side stream."""
    model = transformer().cuda()
    tracker = fastcov.track(model, rows=0.3)
    static = images(0, device="cuda")

    def step() -> None:
        model.zero_grad(set_to_none=False)
        model(static).sum().backward()

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for seed in range(3):
            static.copy_(images(seed, device="cuda"))
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    for seed in range(3, 9):
        static.copy_(images(seed, device="cuda"))
        graph.replay()
    torch.cuda.synchronize()
    expected = eager_on_cpu(9, rows=0.3)
    assert tracker.steps == expected.steps == 9
    for name in expected.names():
        assert tracker.count(name) == expected.count(name), name


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [
        {"weighting": "image"},
        {"rows": "all", "weighting": "image"},
        {"rows": "all", "decay": 0.9},
        {"rows": 0.3, "every": 2},
    ],
)
def test_a_capture_leaves_out_what_only_the_host_can_do(options: dict[str, Any]) -> None:
    """The capture itself succeeds, and its replays compute what they would without a tracker."""
    model = transformer().cuda()
    tracker = fastcov.track(model, **options)
    static = images(0, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), torch.no_grad():
        for _ in range(3):
            model(static)
    torch.cuda.current_stream().wait_stream(side)
    # Layers with few rows for their width wait in buffers, which decay on the device.
    waiting = ("qkv", "fc1", "head") if "decay" in options else ()
    left_out = {name for name in tracker.names() if not name.endswith(waiting)}
    before = {name: tracker.count(name) for name in tracker.names()}
    graph = torch.cuda.CUDAGraph()
    is_told = pytest.warns(UserWarning, match="captured CUDA graph")
    with is_told, torch.cuda.graph(graph), torch.no_grad():
        output = model(static)
    for _ in range(4):
        graph.replay()
    for name in tracker.names():
        assert ("CUDA graph" in tracker.watcher.taps.notes.get(name, "")) == (name in left_out), (
            name
        )
        assert (tracker.count(name) == before[name]) == (name in left_out), name
    tracker.close()
    with torch.no_grad():
        torch.testing.assert_close(output, model(static))


@pytest.mark.gpu
@pytest.mark.parametrize(
    "options",
    [{}, {"rows": 0.9}, {"rows": "all", "where": "both"}, {"weighting": "image"}],
)
def test_peak_memory_is_the_estimate(options: dict[str, Any]) -> None:
    def model() -> nn.Module:
        from timm.models.vision_transformer import VisionTransformer

        torch.manual_seed(0)
        return VisionTransformer(
            img_size=64, patch_size=8, embed_dim=384, depth=4, num_heads=6, num_classes=5
        ).cuda()

    def peak(track: bool) -> int:
        gc.collect()  # what earlier tests left in cycles would go at any moment
        torch.cuda.synchronize()
        network = model()
        torch.cuda.reset_peak_memory_stats()
        tracker = fastcov.track(network, **options) if track else None
        for _ in range(4):
            network(torch.randn(16, 3, 64, 64, device="cuda")).sum().backward()
            network.zero_grad()
        torch.cuda.synchronize()
        assert tracker is None or tracker.steps == 4
        # What was asked for: the allocator rounds up, to 512 bytes, or by as much as 1 MiB a tensor
        # of more than that.
        return torch.cuda.memory_stats()["requested_bytes.all.peak"]

    example = torch.zeros(16, 3, 64, 64, device="cuda")
    report = fastcov.estimate(model(), example, **options)
    plain = peak(track=False)
    added = peak(track=True) - plain
    slack = 0.02 * report.memory_bytes
    # The workspace counts where the update that takes it comes at the step's own peak.
    assert added <= report.memory_bytes + slack
    assert added >= report.memory_bytes - report.workspace_bytes - slack


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0.5, "all"])
def test_a_step_never_waits_for_the_gpu(rows: float | Literal["all"]) -> None:
    model = transformer().cuda()
    tracker = fastcov.track(model, rows=rows, where="both")
    for seed in range(3):
        model(images(seed, device="cuda")).sum().backward()
    batches = [images(seed, device="cuda") for seed in range(6)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            model(batch).sum().backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert tracker.steps == 9


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [0.3, "all"])
def test_other_numbers_of_rows_never_wait_for_the_gpu(rows: float | Literal["all"]) -> None:
    """As the heads of a detector see them: a few more, many more, none, and fewer again."""
    head = nn.Sequential(nn.Linear(64, 96), nn.ReLU(), nn.Linear(96, 32)).cuda()
    numbers = (100, 100, 120, 700, 0, 90, 900, 300, 40)
    tracker = fastcov.track(head, rows=rows)
    for number in numbers[:2]:  # the second compiles what counts on the device
        head(torch.randn(number, 64, device="cuda"))
    batches = [torch.randn(number, 64, device="cuda") for number in numbers[2:]]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for batch in batches:
            head(batch)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert not tracker.watcher.taps.notes
    expected = round((1.0 if rows == "all" else rows) * sum(numbers))
    assert abs(tracker.count("0") - expected) <= 1


@pytest.mark.gpu
def test_default_device_on_the_gpu() -> None:
    model = transformer().cuda()
    torch.set_default_device("cuda")
    try:
        tracker = fastcov.track(model, rows="all", decay=0.9, weighting="image")
        for seed in range(3):
            model(images(seed, device="cuda")).sum().backward()
        spectra = tracker.spectra()
    finally:
        torch.set_default_device(None)
    assert {spectrum.eigenvalues.device.type for spectrum in spectra.values()} == {"cpu"}


@pytest.mark.gpu
def test_data_parallel_on_one_gpu_is_the_model_itself() -> None:
    model = nn.DataParallel(transformer().cuda(), device_ids=[0])
    tracker = fastcov.track(model, rows="all")
    for seed in range(2):
        model(images(seed, device="cuda")).sum().backward()
    assert_same(tracker, eager_on_cpu(2, rows="all"), 1e-3)
