"""Training with a tracker is training without one, bit for bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov

STEPS = 3


def train(case: Any, options: dict[str, Any] | None, optimizer: type[torch.optim.Optimizer]) -> Any:
    model = case.make()
    tracker = None if options is None else fastcov.track(model, **options)
    steps = optimizer(model.parameters(), lr=1e-3)
    losses = []
    for step in range(STEPS):
        steps.zero_grad()
        loss = case.loss(model, step)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        steps.step()
        losses.append(loss.detach())
    grads = [p.grad for p in model.parameters() if p.grad is not None]
    return [*losses, *grads, *model.state_dict().values(), torch.get_rng_state()], tracker


def assert_equal(plain: list[Tensor], tracked: list[Tensor]) -> None:
    assert len(plain) == len(tracked)
    assert all(torch.equal(a, b) for a, b in zip(plain, tracked, strict=True))


@pytest.mark.parametrize(
    "options",
    [{}, {"rows": "all", "where": "both", "weighting": "image", "decay": 0.9, "snapshot_every": 2}],
    ids=["default", "everything"],
)
def test_losses_gradients_parameters_buffers_and_random_state(
    case: Any, options: dict[str, Any]
) -> None:
    plain, _ = train(case, None, torch.optim.AdamW)
    tracked, tracker = train(case, options, torch.optim.AdamW)
    assert_equal(plain, tracked)
    assert tracker.steps == STEPS
    if options:
        assert not [name for name in tracker.names() if tracker.count(name) == 0]
    else:  # a handful of rows here at most: the summary says so
        text = str(tracker.summary())
        assert "more steps until" in text or "sampling has not reached it yet" in text


def test_anomaly_mode_deterministic_algorithms_and_offloaded_activations(cases: Any) -> None:
    def run(options: dict[str, Any] | None) -> list[Tensor]:
        torch.use_deterministic_algorithms(True)
        try:
            with torch.autograd.detect_anomaly(), torch.autograd.graph.save_on_cpu():
                return train(cases["vit"], options, torch.optim.SGD)[0]
        finally:
            torch.use_deterministic_algorithms(False)

    with pytest.warns(UserWarning, match="Anomaly Detection"):
        plain = run(None)
        tracked = run({"rows": 0.3, "where": "both"})
    assert_equal(plain, tracked)


def test_second_derivatives(cases: Any) -> None:
    """A gradient penalty differentiates twice through the tracked layers."""

    def run(options: dict[str, Any] | None) -> list[Tensor]:
        model = cases["vit"].make()
        tracker = None if options is None else fastcov.track(model, **options)
        x = torch.randn(2, 3, 32, 32, requires_grad=True)
        with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
            (slope,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
            slope.square().sum().backward()
        assert tracker is None or tracker.count("blocks.0.mlp.fc1") == 2 * 17
        return [p.grad for p in model.parameters() if p.grad is not None]

    assert_equal(run(None), run({"rows": "all"}))
