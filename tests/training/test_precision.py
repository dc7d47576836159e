"""Autocast, GradScaler, half-precision models, memory formats: right numbers, same training."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov

HALVES = [torch.bfloat16, torch.float16]


def watch(model: nn.Module, name: str) -> list[Tensor]:
    """A layer's outputs in float64 as rows, copied before an in-place successor. [N, C]"""
    seen: list[Tensor] = []
    module = model.get_submodule(name)

    def keep(_module: nn.Module, _args: Any, output: Tensor) -> None:
        rows = output.movedim(1, -1) if output.dim() == 4 else output
        seen.append(rows.detach().double().reshape(-1, rows.shape[-1]).clone())

    module.register_forward_hook(keep)
    return seen


def assert_covers(tracker: fastcov.Tracker, name: str, seen: list[Tensor]) -> None:
    rows = torch.cat(seen)
    assert tracker.count(name) == len(rows)
    expected = rows.T @ rows / len(rows)
    error = (tracker.covariance(name) - expected).abs().max()
    assert float(error) <= 1e-5 * float(expected.abs().max())


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    ("case_name", "layer"), [("vit", "blocks.1.mlp.fc1"), ("mobilenet", "features.3.conv.1.0")]
)
def test_autocast_with_gradient_scaling(
    cases: Any, case_name: str, layer: str, dtype: torch.dtype
) -> None:
    case = cases[case_name]

    def run(track: bool) -> list[Tensor]:
        model = case.make()
        tracker = fastcov.track(model, rows="all") if track else None
        seen = watch(model, layer)
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20)
        scales = []
        for seed in range(4):
            optimizer.zero_grad()
            with torch.autocast("cpu", dtype):
                loss = case.loss(model, seed)
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            scales.append(torch.tensor(scaler.get_scale()))
        if tracker is not None:
            assert_covers(tracker, layer, seen)
        return [*scales, *model.state_dict().values()]

    assert all(torch.equal(a, b) for a, b in zip(run(False), run(True), strict=True))


@pytest.mark.parametrize("dtype", [*HALVES, torch.float64])
def test_model_in_another_precision(cases: Any, dtype: torch.dtype) -> None:
    model = cases["vit"].make().to(dtype)
    seen = watch(model, "blocks.0.attn.qkv")
    with fastcov.track(model, rows="all") as tracker:
        for _ in range(2):
            model(torch.randn(2, 3, 32, 32, dtype=dtype)).sum().backward()
    assert_covers(tracker, "blocks.0.attn.qkv", seen)


def test_model_changes_its_precision_after_track(cases: Any) -> None:
    model = cases["vit"].make()
    seen = watch(model, "blocks.0.attn.qkv")
    with fastcov.track(model, rows="all") as tracker:
        for dtype in (torch.float32, torch.bfloat16, torch.float32):
            model.to(dtype)(torch.randn(3, 3, 32, 32, dtype=dtype)).sum().backward()
    assert_covers(tracker, "blocks.0.attn.qkv", seen)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_memory_formats_and_in_place_activations(
    cases: Any, memory_format: torch.memory_format
) -> None:
    model = cases["resnet"].make().to(memory_format=memory_format)
    layers = ("conv1", "layer1.0.conv2", "layer2.0.conv2")  # each has an in-place ReLU after it
    seen = {layer: watch(model, layer) for layer in layers}
    with fastcov.track(model, rows="all", include=list(layers)) as tracker:
        for _ in range(2):
            x = torch.randn(2, 3, 32, 32).to(memory_format=memory_format)
            model(x).sum().backward()
    for layer in layers:
        assert_covers(tracker, layer, seen[layer])


def test_default_device_and_default_dtype_do_not_reach_the_statistics() -> None:
    model = nn.Linear(8, 8)
    x = torch.randn(30, 8)
    torch.set_default_dtype(torch.float16)
    torch.set_default_device("meta")  # factories that name no device would land there
    try:
        tracker = fastcov.track(model, rows="all", weighting="image", decay=0.5)
        model(x)
        model(x[:4])
        covariance = tracker.covariance("")
    finally:
        torch.set_default_device(None)
        torch.set_default_dtype(torch.float32)
    rows = model(x).detach().double()
    weight = torch.full((30, 1), 0.5, dtype=torch.float64)
    weight[:4] += 1
    expected = (rows * weight).T @ rows / weight.sum()
    torch.testing.assert_close(covariance, expected, rtol=1e-5, atol=1e-6)
