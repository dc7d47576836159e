"""Loops as people write them: outputs of every layer against hooks that copy at the call."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import fastcov

ROWS = 32


class Network(nn.Module):
    """Two layers; the first may run as a frozen backbone does."""

    def __init__(self) -> None:
        super().__init__()
        self.body, self.head = nn.Linear(6, 8), nn.Linear(8, 3)
        self.is_frozen = False

    def forward(self, inputs: Tensor) -> Tensor:
        with torch.inference_mode(self.is_frozen):
            features = self.body(inputs)
        return self.head(features.clone())


def copy_outputs(model: nn.Module) -> dict[str, list[Tensor]]:
    seen: dict[str, list[Tensor]] = {"body": [], "head": []}
    for name, rows in seen.items():
        model.get_submodule(name).register_forward_hook(
            lambda _module, _args, output, rows=rows: rows.append(output.detach().double().clone())
        )
    return seen


def accumulate(model: Network) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(4):
        model(torch.randn(ROWS, 6)).square().mean().backward()
        if step % 2:
            optimizer.step()
            optimizer.zero_grad()


def by_accelerate(model: Network) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True, mixed_precision="bf16", gradient_accumulation_steps=2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    prepared, optimizer = accelerator.prepare(model, optimizer)
    for _ in range(4):
        with accelerator.accumulate(prepared):
            accelerator.backward(prepared(torch.randn(ROWS, 6)).square().mean())
            optimizer.step()
            optimizer.zero_grad()


def alternating_precision(model: Network) -> None:
    for step in range(4):
        with torch.autocast("cpu", torch.bfloat16, enabled=step % 2 == 0):
            model(torch.randn(ROWS, 6) * 3)


def frozen_backbone(model: Network) -> None:
    model.is_frozen = True
    for _ in range(4):
        model(torch.randn(ROWS, 6)).sum().backward()


def other_weights(model: Network) -> None:
    weights = dict(model.named_parameters())
    for factor in range(4):
        scaled = {name: weight * factor for name, weight in weights.items()}
        torch.func.functional_call(model, scaled, torch.randn(ROWS, 6))


def assigned_weights(model: Network) -> None:
    for _ in range(4):
        model(torch.randn(ROWS, 6))
        state = {name: weight * 3 for name, weight in model.state_dict().items()}
        model.load_state_dict(state, assign=True)


LOOPS = [
    accumulate,
    by_accelerate,
    alternating_precision,
    frozen_backbone,
    other_weights,
    assigned_weights,
]


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
@pytest.mark.parametrize("rows", ["all", 1.0])
def test_every_row_of_every_call(loop: Callable[[Network], None], rows: str | float) -> None:
    torch.manual_seed(0)
    model = Network()
    seen = copy_outputs(model)
    tracker = fastcov.track(model, rows=rows)
    loop(model)
    assert tracker.steps == 4
    for name, copies in seen.items():
        wanted = torch.cat(copies)
        assert tracker.count(name) == len(wanted) == 4 * ROWS
        moment = wanted.T @ wanted / len(wanted)
        error = (tracker.covariance(name) - moment).abs().max()
        assert float(error) <= 1e-5 * float(moment.abs().max()), name


def test_moving_averages_count_for_nothing() -> None:
    from timm.utils import ModelEmaV3

    model = Network()
    tracker = fastcov.track(model, rows="all")
    twins = [torch.optim.swa_utils.AveragedModel(model), ModelEmaV3(model)]
    model(torch.randn(ROWS, 6))
    twins[0].update_parameters(model)
    twins[1].update(model)
    for twin in twins:
        twin.train()
        twin.module(torch.randn(ROWS, 6))
    assert (tracker.steps, tracker.count("body")) == (1, ROWS)
