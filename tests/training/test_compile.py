"""torch.compile: no added graph break, no recompilation after warm-up, exact counts."""

from __future__ import annotations

from contextlib import nullcontext
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._dynamo.utils import counters

import fastcov

pytestmark = pytest.mark.usefixtures("fresh_compiler")

# Models that torch 2.11 traces whole.
WHOLE = ("resnet", "vit", "llama")


def graphs_and_breaks() -> tuple[int, int]:
    return counters["stats"]["unique_graphs"], sum(counters["graph_break"].values())


def train(case: Any, model: nn.Module, seeds: range) -> list[Tensor]:
    losses = []
    for seed in seeds:
        losses.append(case.loss(model, seed))
        losses[-1].backward()
    return [loss.detach() for loss in losses]


def counts(tracker: fastcov.Tracker) -> dict[str, int]:
    return {name: tracker.count(name) for name in tracker.names()}


@cache
def reference(case: Any, steps: int, **options: Any) -> fastcov.Tracker:
    """Statistics of an eager run of the same steps."""
    model = case.make()
    with fastcov.track(model, **options) as tracker:
        train(case, model, range(steps))
    return tracker


@cache
def untracked_graphs(case: Any) -> tuple[int, int]:
    train(case, torch.compile(case.make(), backend="eager"), range(3))
    found = graphs_and_breaks()
    torch.compiler.reset()
    counters.clear()
    return found


def assert_same_statistics(tracker: fastcov.Tracker, other: fastcov.Tracker) -> None:
    assert tracker.steps == other.steps
    assert counts(tracker) == counts(other)
    for name in tracker.names():
        covariance = other.covariance(name)
        error = (tracker.covariance(name) - covariance).abs().max()
        assert float(error) <= 1e-3 * float(covariance.abs().max()), name


@pytest.mark.parametrize(
    ("name", "order"),
    [
        *((name, "before") for name in ("resnet", "vit", "gpt2", "llama")),
        *((name, "after") for name in ("vit", "recurrent")),
    ],
)
def test_graphs_of_a_tracked_model(cases: Any, name: str, order: str) -> None:
    case = cases[name]
    plain = untracked_graphs(case)
    model = case.make()
    compiled = torch.compile(model, backend="eager", fullgraph=name in WHOLE)
    tracker = fastcov.track(model if order == "before" else compiled, rows=0.5)
    train(case, compiled, range(2))
    torch.compiler.set_stance("fail_on_recompile")
    train(case, compiled, range(2, 3))
    torch.compiler.set_stance("default")
    assert graphs_and_breaks() == plain
    assert_same_statistics(tracker, reference(case, 3, rows=0.5))


def test_detector(cases: Any) -> None:
    """Data-dependent control flow: the graph breaks are its own, no frame is given up."""
    case = cases["detector"]
    model = case.make()
    tracker = fastcov.track(model, rows="all", weighting="image")
    train(case, torch.compile(model, backend="eager"), range(1))
    assert not [reason for reason in counters["graph_break"] if "fastcov" in reason]
    model = case.make()
    with fastcov.track(model, rows="all", weighting="image") as eager:
        train(case, model, range(1))
    # Proposals differ by rounding between the two: compare what comes before them.
    before = [name for name in tracker.names() if name.startswith(("backbone", "rpn"))]
    assert {n: tracker.count(n) for n in before} == {n: eager.count(n) for n in before}
    assert len({tracker.count(name) for name in before}) > 3


def test_blocks_compiled_one_by_one_share_one_graph() -> None:
    """Regional compilation: a tap's number must not become a guard."""

    def graphs(track: bool) -> int:
        model = timm_transformer(depth=10)
        tracker = fastcov.track(model, rows="all") if track else None
        for block in model.blocks:
            block.compile(backend="aot_eager", fullgraph=True)
        for seed in range(2):
            model(images(seed)).sum().backward()
        if tracker is not None:
            assert {tracker.count(f"blocks.{i}.mlp.fc2") for i in range(10)} == {2 * 3 * 17}
        found = graphs_and_breaks()[0]
        torch.compiler.reset()
        counters.clear()
        return found

    assert graphs(track=True) == graphs(track=False) <= 2


def timm_transformer(depth: int) -> nn.Module:
    from timm.models.vision_transformer import VisionTransformer

    torch.manual_seed(0)
    return VisionTransformer(
        img_size=32, patch_size=8, embed_dim=24, depth=depth, num_heads=2, num_classes=5
    )


def images(seed: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def test_inductor_trains_the_same_and_counts_exactly() -> None:
    def run(track: bool) -> tuple[list[Tensor], fastcov.Tracker | None]:
        torch.compiler.reset()
        model = timm_transformer(depth=1)
        tracker = fastcov.track(model, rows=0.4, where="both") if track else None
        compiled = torch.compile(model, fullgraph=True)
        losses = [compiled(images(seed)).square().sum() for seed in range(3)]
        torch.stack(losses).sum().backward()
        return [*losses, *(p.grad for p in model.parameters())], tracker

    plain, _ = run(track=False)
    tracked, tracker = run(track=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked, strict=True))
    model = timm_transformer(depth=1)
    with fastcov.track(model, rows=0.4, where="both") as eager:
        for seed in range(3):
            model(images(seed))
    assert_same_statistics(tracker, eager)


def test_dynamic_shapes() -> None:
    model = timm_transformer(depth=1)
    tracker = fastcov.track(model, rows="all", every=2)
    compiled = torch.compile(model, fullgraph=True, dynamic=True, backend="aot_eager")
    batches = [4, 3, 5, 7, 2]
    for step, batch in enumerate(batches):
        compiled(images(step, batch)).sum().backward()
        if step == 0:
            torch.compiler.set_stance("fail_on_recompile")
    assert tracker.steps == 5
    assert tracker.count("head") == 4 + 5 + 2
    assert tracker.count("blocks.0.attn.qkv") == 17 * 11


def test_a_graph_in_evaluation_mode_holds_nothing_of_the_tracker() -> None:
    kept: list[str] = []

    def backend(graph: torch.fx.GraphModule, _inputs: Any) -> Any:
        kept.append(graph.code)
        return graph.forward

    model = timm_transformer(depth=1)
    tracker = fastcov.track(model, rows="all")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(images(0))
    model.eval()
    with torch.no_grad():
        compiled(images(0))
    model.train()
    compiled(images(1))
    assert ["fastcov" in code for code in kept] == [True, False]
    assert tracker.count("head") == 6


def test_a_compiled_training_step_with_its_loss_and_several_trackers() -> None:
    model = timm_transformer(depth=1)
    model.register_forward_pre_hook(lambda _module, args: (args[0] * 2,))
    every = fastcov.track(model, rows="all")
    second = fastcov.track(model, rows="all", every=2, include="blocks.*.mlp.fc1")

    @torch.compile(fullgraph=True, backend="aot_eager")
    def step(x: Tensor) -> Tensor:
        return model(x).square().mean()

    for seed in range(4):
        step(images(seed)).backward()
    assert every.steps == second.steps == 4
    assert every.count("blocks.0.mlp.fc1") == 2 * second.count("blocks.0.mlp.fc1") == 4 * 3 * 17
    with second.paused():
        step(images(4))
    assert (every.steps, second.steps) == (5, 4)
    every.close()
    step(images(5))
    assert (every.steps, second.steps) == (5, 5)


def test_tracking_after_the_first_compiled_forward_says_so() -> None:
    compiled = torch.compile(timm_transformer(depth=1), backend="eager")
    compiled(images(0))
    tracker = fastcov.track(compiled, rows="all")
    with pytest.warns(UserWarning, match="reads nothing: .* compiled before it was tracked"):
        compiled(images(1))
    compiled(images(1))  # and says so once
    assert "compiled before it was tracked" in str(tracker.summary())
    tracker.close()
    torch.compiler.reset()
    tracker = fastcov.track(compiled, rows="all")
    compiled(images(1))
    assert tracker.count("head") == 3


def test_shared_inputs_when_compiled() -> None:
    """q, k and v read one tensor: compiled or not, each tap reports all of its rows."""

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q, self.k, self.v = (nn.Linear(8, 8) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = x.relu()
            return self.q(x) + self.k(x) * self.v(x)

    model = Attention()
    tracker = fastcov.track(model, rows="all", where="input")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        compiled(torch.randn(20, 8)).sum().backward()
    assert counts(tracker) == {"q:in": 60, "k:in": 60, "v:in": 60}


@pytest.mark.parametrize("is_wrapper_tracked", [True, False])
def test_a_compiled_sequential_of_before_is_named(is_wrapper_tracked: bool) -> None:
    """Roots of torch's own classes share their compiled code: a second one runs without hooks."""
    first, second = (nn.Sequential(nn.Linear(8, 4), nn.ReLU()) for _ in range(2))
    torch.compile(first, backend="eager")(torch.randn(64, 8))
    compiled = torch.compile(second, backend="eager")
    tracker = fastcov.track(compiled if is_wrapper_tracked else second)
    # Of a Sequential that is tracked itself, no hook runs at all: no step is counted.
    warned = (
        pytest.warns(UserWarning, match="reads nothing") if is_wrapper_tracked else nullcontext()
    )
    with warned:
        compiled(torch.randn(64, 8))
    text = str(tracker.summary())
    assert "torch.compiler.reset()" in text
    assert "include the parents" not in text
    tracker.close()
    torch.compiler.reset()
