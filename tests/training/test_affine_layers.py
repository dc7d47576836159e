"""Trackers of all rows that read affine layers through their inputs, and where they must not."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastcov
from fastcov.ops import backend
from fastcov.stats import affine
from fastcov.stats.affine import accumulate_mapped_
from fastcov.stats.layer import Layer

BAR = 1e-6  # of the largest entry; float32 rows themselves stay below 1e-5


@pytest.fixture
def outcomes(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Results of all calls of accumulate_mapped_."""
    returned: list[bool] = []

    def spy(*args: object, **kwargs: object) -> bool:
        returned.append(accumulate_mapped_(*args, **kwargs))
        return returned[-1]

    monkeypatch.setattr(affine, "accumulate_mapped_", spy)
    return returned


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(inplace=True), nn.Conv2d(16, 130, 1))


def train(model: nn.Module, steps: int = 4) -> Tensor:
    """Trains; returns the last layer's rows and their image in order. [steps, N, C]"""
    seen: list[Tensor] = []

    def keep(_module: nn.Module, _args: object, output: Tensor) -> None:
        seen.append(output.detach().clone().movedim(1, -1).reshape(-1, output.shape[1]))

    handle = model[-1].register_forward_hook(keep)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 3, 22, 22)).square().mean().backward()
        optimizer.step()
    handle.remove()
    return torch.stack(seen).double()


def add_weight_norm(module: nn.Module) -> None:
    nn.utils.parametrizations.weight_norm(module)


def change_kernel(module: nn.Module) -> None:
    module.weight = nn.Parameter(torch.randn(130, 16, 3, 3) / 12)


def change_stride(module: nn.Module) -> None:
    module.stride = 2


def change_padding(module: nn.Module) -> None:
    module.padding = (1, 1)


def change_class(module: nn.Module) -> None:
    class Doubled(nn.Conv2d):
        def forward(self, input: Tensor) -> Tensor:
            return 2 * super().forward(input)

    module.__class__ = Doubled


@pytest.mark.parametrize(
    "change", [add_weight_norm, change_kernel, change_stride, change_padding, change_class]
)
@pytest.mark.filterwarnings("error::UserWarning")
def test_a_layer_that_changes_while_it_is_tracked_is_read_on(
    outcomes: list[bool], change: Callable[[nn.Module], None]
) -> None:
    model = small_network()
    tracker = fastcov.track(model, rows="all")
    before = train(model).flatten(0, 1)
    change(model[-1])
    rows = torch.cat([before, train(model).flatten(0, 1)])
    assert outcomes == [True] * 3
    expected = rows.T @ rows / len(rows)
    error = (tracker.covariance("2") - expected).abs().max() / expected.abs().max()
    assert float(error) < BAR
    assert tracker.count("2") == len(rows)


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointed_and_functional_calls_of_linear_layers(
    outcomes: list[bool], use_reentrant: bool
) -> None:
    torch.manual_seed(0)
    block = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 96), nn.GELU(), nn.Linear(96, 16))

    class Network(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = block

        def forward(self, tokens: Tensor) -> Tensor:
            return checkpoint(self.block, tokens, use_reentrant=use_reentrant)

    model = Network()
    tracker = fastcov.track(model, rows="all", include="block.1")
    expected, count = torch.zeros(96, 96, dtype=torch.float64), 0
    for step in range(4):
        tokens = torch.randn(20, 197, 16, requires_grad=True)
        is_functional = step % 2 == 1
        weights = {n: w.detach() * (1 + is_functional) for n, w in block.named_parameters()}
        normed = nn.functional.layer_norm(tokens, (16,), weights["0.weight"], weights["0.bias"])
        rows = nn.functional.linear(normed.detach(), weights["1.weight"], weights["1.bias"])
        flat = rows.double().flatten(0, 1)
        expected += flat.T @ flat
        count += len(flat)
        if is_functional:
            named = {f"block.{name}": weight for name, weight in weights.items()}
            torch.func.functional_call(model, named, (tokens,))
        else:
            model(tokens).sum().backward()
    assert outcomes == [True] * 3
    expected /= count
    error = (tracker.covariance("block.1") - expected).abs().max() / expected.abs().max()
    assert float(error) < BAR
    assert tracker.count("block.1") == count


@pytest.mark.parametrize("weighting", ["position", "image"])
@pytest.mark.parametrize("decay", [None, 0.9])
def test_a_tracker_reads_inputs_where_that_pays(
    outcomes: list[bool], weighting: str, decay: float | None
) -> None:
    model = small_network()
    tracker = fastcov.track(model, rows="all", weighting=weighting, decay=decay)
    rows = train(model)
    assert outcomes == [True] * 3  # every step but the first
    weights = torch.tensor([(decay or 1.0) ** (3 - step) for step in range(4)]).double()
    weights = weights[:, None].expand(rows.shape[:2])
    expected = torch.einsum("sn,sni,snj->ij", weights, rows, rows) / weights.sum()
    error = (tracker.covariance("2") - expected).abs().max() / expected.abs().max()
    assert float(error) < BAR
    assert tracker.count("2") == rows.shape[0] * rows.shape[1]


def test_a_hook_that_changes_the_output_is_seen(outcomes: list[bool]) -> None:
    model = small_network()
    changed = model[-1]
    # Too rare a change for a comparison of some values to find.
    changed.register_forward_hook(lambda _module, _args, out: out.index_fill(0, torch.tensor(1), 0))
    tracker = fastcov.track(model, rows="all")
    rows = train(model).flatten(0, 1)
    assert outcomes == []
    expected = rows.T @ rows / len(rows)
    error = (tracker.covariance("2") - expected).abs().max() / expected.abs().max()
    assert float(error) < BAR


def test_two_trackers_of_one_model_read_inputs(outcomes: list[bool]) -> None:
    model = small_network()
    first, second = fastcov.track(model, rows="all"), fastcov.track(model, rows="all")
    train(model)
    assert outcomes == [True] * 6
    assert torch.equal(first.covariance("2"), second.covariance("2"))


def test_a_global_hook_may_change_outputs(outcomes: list[bool]) -> None:
    model = small_network()
    fastcov.track(model, rows="all")
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    train(model)
    handle.remove()
    assert outcomes == []
    train(model)
    assert outcomes == [True] * 4


def test_sampled_rows_are_the_outputs_own(outcomes: list[bool]) -> None:
    model = small_network()
    fastcov.track(model)
    train(model)
    assert outcomes == []


@pytest.mark.parametrize("is_host", [True, False])
def test_only_outputs_on_a_cpu_come_with_their_inputs(
    monkeypatch: pytest.MonkeyPatch, is_host: bool
) -> None:
    """A GPU adds the rows themselves: a way through inputs would only take its hooks time."""
    host = backend.HOST._replace(kernels="native", repeats_calls=True, is_host=is_host)
    monkeypatch.setattr(backend, "active", backend.Pretended(host))
    sources = []
    read = Layer.read

    def spy(layer: Layer, value: Tensor, layout: object, source: object = None) -> None:
        sources.append(source)
        read(layer, value, layout, source)

    monkeypatch.setattr(Layer, "read", spy)
    model = nn.Linear(16, 130)
    with fastcov.track(model, rows="all"):
        for _ in range(3):
            model(torch.randn(1000, 6, 16))
    assert any(source is not None for source in sources) == is_host
