"""Memory: what tracking adds to the peak of a training step is what estimate() said."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastcov

STEPS = 3


def peak_and_live_bytes(run: Callable[[], Any]) -> tuple[int, int]:
    """Highest sum of allocations while it runs, and what is left, by torch's own allocator."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        kept = run()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    del kept
    return peak, live


def added_bytes(
    build: Callable[[], nn.Module], loss: Callable[[nn.Module, int], Tensor], **options: Any
) -> tuple[int, int, int]:
    """Peak added, bytes that stay, peak without tracking."""

    def run(track: bool) -> tuple[int, int]:
        model = build()

        def steps() -> fastcov.Tracker | None:
            tracker = fastcov.track(model, **options) if track else None
            for seed in range(STEPS):
                loss(model, seed).backward()
                model.zero_grad(set_to_none=True)
            return tracker

        return peak_and_live_bytes(steps)

    plain, tracked = run(track=False), run(track=True)
    return tracked[0] - plain[0], tracked[1] - plain[1], plain[0]


class Pyramid(nn.Module):
    """Many positions of few channels; a head that is called on every level."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.head = nn.Conv2d(32, 64, 1)

    def forward(self, x: Tensor) -> Tensor:
        level, total = self.stem(x).relu_(), x.new_zeros(())
        for _ in range(4):
            total = total + self.head(level).square().mean()
            level = nn.functional.max_pool2d(level, 2)
        return total


def vision_transformer() -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=48, patch_size=8, embed_dim=96, depth=2, num_heads=3, num_classes=5
    )


def mean_square(size: int, batch: int) -> Callable[[nn.Module, int], Tensor]:
    return lambda model, seed: model(torch.randn(batch, 3, size, size)).square().mean()


MODELS = {
    "transformer": (vision_transformer, mean_square(48, 4), torch.zeros(4, 3, 48, 48)),
    "pyramid": (Pyramid, mean_square(64, 6), torch.zeros(6, 3, 64, 64)),
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"where": "input"},
        {"rows": "all", "where": "both"},
        {"rows": 0.3, "weighting": "image"},
        {"rows": "all", "weighting": "image"},
    ],
    ids=["default", "inputs", "all", "image", "all-image"],
)
def test_peak_is_the_estimate(name: str, options: dict[str, Any]) -> None:
    build, loss, example = MODELS[name]
    estimated = fastcov.estimate(build(), example, **options).memory_bytes
    added, kept, plain = added_bytes(build, loss, **options)
    assert kept == pytest.approx(estimated, rel=0.02, abs=512)
    assert added <= 1.02 * estimated + 0.02 * plain
    assert added >= 0.98 * estimated - 0.02 * plain


@pytest.mark.parametrize(("rows", "waits"), [(19, True), (20, False)])
def test_rows_of_a_third_of_the_width_wait_in_no_buffer_on_a_cpu(rows: int, waits: bool) -> None:
    example = torch.randn(rows, 8)
    model = nn.Linear(8, 60)
    layer = fastcov.estimate(model, example, rows="all").layers[0]
    assert (layer.buffer_bytes > 0) == waits
    added, _, _ = added_bytes(
        lambda: model, lambda model, _seed: model(example).square().mean(), rows="all"
    )
    assert (added > layer.state_bytes + 4096) == waits


def test_memory_is_constant_in_the_number_of_steps() -> None:
    model = Pyramid()
    tracker = fastcov.track(model, where="both", weighting="image", decay=0.9)
    loss = mean_square(32, 2)
    for seed in range(5):
        loss(model, seed)

    def many() -> None:
        for seed in range(40):
            loss(model, seed)

    assert abs(peak_and_live_bytes(many)[1]) <= 1024
    assert tracker.steps == 45


class Regions(nn.Module):
    """Gives its head fewer rows in training, as a detector does, and draws which."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 30)

    def forward(self, x: Tensor) -> Tensor:
        rows = x[torch.randperm(len(x))[:6]] if self.training else x
        return self.head(self.norm(rows))


def test_estimate_of_training_sees_its_shapes_and_changes_nothing() -> None:
    model = Regions().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    random_state = torch.get_rng_state()
    example = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    evaluated = fastcov.estimate(model, example, rows="all").layers[0]
    trained = fastcov.estimate(model, example, rows="all", training=True).layers[0]
    assert (evaluated.rows_offered, evaluated.buffer_bytes) == (100, 0)
    assert (trained.rows_offered, trained.buffer_bytes) == (6, 2 * 30 * 30 * 4)
    assert model.training
    assert model.norm.training
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_estimate_allocates_no_state_and_leaves_the_model_as_it_was(cases: Any) -> None:
    model = cases["resnet"].make()
    model.layer1.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    random_state = torch.get_rng_state()
    with fastcov.track(model, rows="all") as tracker:
        _, live = peak_and_live_bytes(
            lambda: fastcov.estimate(model, torch.zeros(2, 3, 32, 32), where="both")
        )
    assert live == 0
    assert tracker.steps == 0
    assert modes == [module.training for module in model.modules()]
    assert torch.equal(random_state, torch.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_estimate_of_every_model_matches_what_is_tracked(cases: Any) -> None:
    """Names, widths, sharing, rows on offer: of a forward in the mode of the estimate."""
    examples = {
        "resnet": torch.zeros(4, 3, 32, 32),
        "mobilenet": torch.zeros(4, 3, 32, 32),
        "vit": torch.zeros(4, 3, 32, 32),
        "bert": {"input_ids": torch.ones(3, 12, dtype=torch.long)},
        "gpt2": {"input_ids": torch.ones(3, 12, dtype=torch.long)},
        "llama": {"input_ids": torch.ones(3, 12, dtype=torch.long)},
        "recurrent": (torch.ones(3, 12, dtype=torch.long),),
    }
    for name, example in examples.items():
        model = cases[name].make().eval()
        report = fastcov.estimate(model, example, where="both", max_channels=300, rows="all")
        with (
            fastcov.track(
                model, where="both", max_channels=300, rows="all", train_only=False
            ) as tracker,
            torch.no_grad(),
        ):
            arguments = example if isinstance(example, tuple) else (example,)
            model(**example) if isinstance(example, dict) else model(*arguments)
        found = {
            reader.name: (reader.state.channels, reader.offered_rows)
            for reader in tracker.watcher.taps.unique_layers
            if reader.state is not None
        }
        assert {e.name: (e.channels, e.rows_offered) for e in report.layers} == found, name
        assert set(report.skipped) == set(tracker.watcher.taps.notes), name
        assert (name in ("resnet", "mobilenet")) == bool(report.skipped), name


def test_transformer_of_a_billion_parameters_on_the_meta_device() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32000, hidden_size=2048, intermediate_size=5504, num_hidden_layers=20,
        num_attention_heads=16, num_key_value_heads=16,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert parameters > 1e9
    example = {"input_ids": torch.zeros(8, 2048, dtype=torch.long, device="meta")}
    start = time.perf_counter()
    reports: list[Any] = []
    peak, _ = peak_and_live_bytes(lambda: reports.append(fastcov.estimate(model, example)))
    assert time.perf_counter() - start < 60  # a second or two on an idle machine
    assert peak < 1e6
    (report,) = reports
    assert report.skipped == {"lm_head": 32000} | {
        f"model.layers.{i}.mlp.{p}_proj": 5504 for i in range(20) for p in ("gate", "up")
    }
    assert len(report.layers) == 20 * 5
    tokens = 8 * 2048
    assert report.forward_flops == pytest.approx(2 * tokens * parameters, rel=0.2)
    assert report.flops_share <= 0.01
    assert report.memory_bytes == pytest.approx(100 * 2048 * 2048 * (8 + 2 * 4), rel=0.5)
    assert "100 layers" in str(report)


def test_transformer_of_a_hundred_layers_tracked_on_the_cpu() -> None:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    model = VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=100, num_heads=2, num_classes=5
    )
    tracker = fastcov.track(model, rows="all", where="both")
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.randn(2, 3, 32, 32)).square().mean().backward()
        optimizer.step()
    assert len(tracker.names()) == 2 * (100 * 4 + 2)
    rows = {tracker.count(f"blocks.{i}.{layer}") for i in range(100) for layer in ("attn.proj",)}
    assert rows == {2 * 2 * 17}
    spectra = tracker.spectra()
    assert len(spectra) == len(tracker.names())
    assert len(str(tracker.summary()).splitlines()) >= len(tracker.names())
