"""Activation checkpointing: what the backward pass runs again is not read again."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

import fastcov

pytestmark = pytest.mark.usefixtures("fresh_compiler")


class Blocks(nn.Module):
    """Transformer blocks of timm, each checkpointed."""

    def __init__(self, use_reentrant: bool, **options: Any) -> None:
        super().__init__()
        from timm.models.vision_transformer import Block

        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(24, 2, mlp_ratio=2.0) for _ in range(3))
        self.head = nn.Linear(24, 5)
        self.checkpoint = partial(checkpoint, use_reentrant=use_reentrant, **options)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = self.checkpoint(block, x)
        return self.head(x)


def tokens(seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(2, 7, 24, generator=generator).requires_grad_()


ROWS = {f"blocks.{i}.{name}" for i in range(3) for name in ("attn.qkv", "attn.proj", "mlp.fc1")}


def assert_read_once(tracker: fastcov.Tracker, steps: int) -> None:
    assert tracker.steps == steps
    assert set(tracker.names()) >= ROWS
    assert {tracker.count(name) for name in tracker.names()} == {steps * 14}


def recomputations(model: nn.Module) -> list[int]:
    calls: list[int] = []
    model.blocks[0].mlp.fc1.register_forward_hook(lambda *_: calls.append(1))
    return calls


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_eager(use_reentrant: bool) -> None:
    model = Blocks(use_reentrant)
    calls = recomputations(model)
    tracker = fastcov.track(model, rows="all")
    for seed in range(2):
        model(tokens(seed)).sum().backward()
    assert len(calls) == 4
    assert_read_once(tracker, 2)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_compiled_blocks_inside_an_eager_checkpoint(use_reentrant: bool) -> None:
    model = Blocks(use_reentrant)
    tracker = fastcov.track(model, rows="all")
    for block in model.blocks:
        block.compile(backend="aot_eager", fullgraph=True)
    for seed in range(2):
        model(tokens(seed)).sum().backward()
    assert_read_once(tracker, 2)


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
def test_checkpoints_inside_a_compiled_model(backend: str) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=False)

    model = Checkpointed()
    tracker = fastcov.track(model, rows="all")
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for seed in range(2):
        compiled(tokens(seed)).sum().backward()
    assert {tracker.count(name) for name in tracker.names()} == {28}


def test_partitioner_that_recomputes_on_its_own() -> None:
    model = nn.Sequential(*(nn.Sequential(nn.Linear(24, 24), nn.GELU()) for _ in range(4)))
    tracker = fastcov.track(model, rows="all")
    with torch._functorch.config.patch(activation_memory_budget=0.0):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager_decomp_partition")
        for seed in range(2):
            compiled(tokens(seed)).sum().backward()
    assert {tracker.count(name) for name in tracker.names()} == {28}


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_over_the_tracked_model_itself(use_reentrant: bool) -> None:
    model = Blocks(use_reentrant=False)
    tracker = fastcov.track(model, rows="all", every=2)
    for seed in range(4):
        checkpoint(model, tokens(seed), use_reentrant=use_reentrant).sum().backward()
    assert tracker.steps == 4
    assert {tracker.count(name) for name in tracker.names()} == {2 * 14}


@pytest.mark.parametrize("use_reentrant", [True, False])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_transformers(cases: Any, name: str, use_reentrant: bool) -> None:
    case = cases[name]

    def run(checkpointed: bool) -> tuple[fastcov.Tracker, list[Tensor]]:
        model = case.make()
        if checkpointed:
            model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
            model.enable_input_require_grads()
        with fastcov.track(model, rows="all", where="both") as tracker:
            for seed in range(2):
                torch.manual_seed(seed)
                case.loss(model, seed).backward()
        return tracker, [p.grad for p in model.parameters() if p.grad is not None]

    plain, gradients = run(checkpointed=False)
    again, same_gradients = run(checkpointed=True)
    for ours, theirs in zip(gradients, same_gradients, strict=True):
        torch.testing.assert_close(ours, theirs)
    for layer in plain.names():
        assert again.count(layer) == plain.count(layer) > 0
        torch.testing.assert_close(again.covariance(layer), plain.covariance(layer))


def test_selective_checkpointing_pairs_its_own_operators_only() -> None:
    """Saved outputs are matched by their order: operators of ours among them would shift it."""

    def save_everything(_context: Any, _operator: Any, *_: Any, **__: Any) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE

    def gradients(track: bool) -> list[Tensor]:
        context = partial(create_selective_checkpoint_contexts, save_everything)
        model = Blocks(use_reentrant=False, context_fn=context)
        tracker = fastcov.track(model, rows="all", where="both") if track else None
        for seed in range(2):
            model(tokens(seed)).square().sum().backward()
        if tracker is not None:
            assert_read_once(tracker, 2)
        return [p.grad for p in model.parameters()]

    pairs = zip(gradients(track=False), gradients(track=True), strict=True)
    assert all(torch.equal(plain, tracked) for plain, tracked in pairs)


def test_a_backward_pass_inside_the_forward() -> None:
    """Forces are gradients of an energy: the checkpoint recomputes before the step has ended."""

    class Forces(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.energy = Blocks(use_reentrant=False)

        def forward(self, x: Tensor) -> Tensor:
            (force,) = torch.autograd.grad(self.energy(x).sum(), x)
            return force

    model = Forces()
    with fastcov.track(model, rows="all") as tracker:
        model(tokens(0))
        model(tokens(1))
    assert {tracker.count(name) for name in tracker.names()} == {28}
