"""Consumers of one tensor share its rows only while it holds the same values, read the same way."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov

ROWS = 32


def _copies(model: nn.Module, kinds: tuple[type[nn.Module], ...]) -> dict[str, Tensor]:
    """Input of each module's last call, as it is then."""
    seen: dict[str, Tensor] = {}

    def copy(name: str, given: Tensor) -> None:
        seen[f"{name}:in"] = given.detach().clone().double()

    for name, module in model.named_modules():
        if isinstance(module, kinds):
            module.register_forward_pre_hook(lambda _, args, name=name: copy(name, args[0]))
    return seen


def _check(tracker: fastcov.Tracker, seen: dict[str, Tensor]) -> None:
    assert set(tracker.names()) == set(seen)
    wrong = {}
    for name, given in seen.items():
        rows = given if given.dim() == 2 else given.movedim(1, -1).flatten(0, -2)
        assert tracker.count(name) == len(rows), name
        wanted = rows.T @ rows / len(rows)
        error = float((tracker.covariance(name) - wanted).abs().max() / wanted.abs().max())
        if error > 1e-5:
            wrong[name] = error
    assert not wrong


def test_an_in_place_activation_between_two_consumers() -> None:
    model = nn.Sequential(nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))
    tracker = fastcov.track(model, include=[nn.ReLU, nn.Conv2d], where="input", rows="all")
    images = torch.randn(4, 8, 5, 5)
    seen = _copies(model, (nn.ReLU, nn.Conv2d))
    model(images)
    _check(tracker, seen)
    assert float(tracker.mean("1:in").abs().max()) < 1e-5
    assert float(tracker.mean("2:in").min()) > 0.3


def test_mobilenet_v2() -> None:
    from torchvision.models import mobilenet_v2

    model = mobilenet_v2(width_mult=0.25)
    kinds = (nn.ReLU, nn.ReLU6, nn.Conv2d)
    tracker = fastcov.track(model, include=list(kinds), where="input", rows="all")
    seen = _copies(model, kinds)
    model(torch.randn(2, 3, 64, 64))
    assert len(seen) == 87
    _check(tracker, seen)


class PreActivation(nn.Module):
    """Shortcut and first layer read one tensor, before and after an in-place change of it."""

    def __init__(self, change: str, calls: int = 1) -> None:
        super().__init__()
        self.shortcut, self.first = nn.Linear(6, 5), nn.Linear(6, 5)
        self.change, self.calls = change, calls

    def forward(self, x: Tensor) -> Tensor:
        y = x + 0.0  # a tensor of the block's own
        total = torch.zeros(())
        for _ in range(self.calls):
            total = total + self.shortcut(y).sum()
            if self.change == "relu_":
                y.relu_()
            elif self.change == "+=":
                y += 1.0
            elif self.change == "out=":
                torch.mul(y, -2.0, out=y)
            elif self.change == "view":
                y[:, :3].neg_()  # of the same memory: the version is shared
            total = total + self.first(y).sum()
        return total


@pytest.mark.parametrize("mode", ["frozen", "no_grad", "inference"])
@pytest.mark.parametrize("change", ["relu_", "+=", "out=", "view", "none"])
@pytest.mark.parametrize("rows", ["all", 1.0])
def test_a_frozen_pre_activation_block(mode: str, change: str, rows: Any) -> None:
    model = PreActivation(change)
    context: AbstractContextManager[Any] = nullcontext()
    if mode == "frozen":
        model.requires_grad_(False)
    else:
        context = torch.no_grad() if mode == "no_grad" else torch.inference_mode()
    tracker = fastcov.track(model, where="input", rows=rows)
    seen = _copies(model, (nn.Linear,))
    inputs = torch.randn(ROWS, 6)
    with context:
        model(inputs)
        _check(tracker, seen)
        tracker.reset()
        model(inputs)  # what was decided in the first step holds in the second
    _check(tracker, seen)


def test_consumers_share_until_a_step_that_changes_the_tensor_between_them() -> None:
    model = PreActivation("none").requires_grad_(False)
    tracker = fastcov.track(model, where="input", rows="all")
    inputs = torch.randn(ROWS, 6)
    model(inputs)
    model.change = "+="
    model(inputs)
    changed = inputs.double() + 1
    torch.testing.assert_close(
        tracker.covariance("first:in"), changed.T @ changed / ROWS, rtol=1e-6, atol=1e-6
    )
    assert tracker.count("first:in") == ROWS
    (status,) = (s for s in tracker.statuses() if s.name == "first:in")
    assert "rows of its own since step 1; shared those of shortcut:in before" in status.note
    assert tracker.count("shortcut:in") == 2 * ROWS


class Tokens(nn.Module):
    """A layer told by the rank of its tensors, and one with channels last, read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.dropped, self.head = nn.Identity(), nn.Linear(6, 5)

    def forward(self, maps: Tensor) -> Tensor:
        return self.head(self.dropped(maps))


def test_layers_that_hold_channels_elsewhere_share_nothing() -> None:
    model, maps = Tokens(), torch.randn(2, 3, 4, 6)
    tracker = fastcov.track(model, include=[nn.Identity, nn.Linear], where="input", rows="all")
    model(maps)
    assert tracker.count("dropped:in") == 2 * 4 * 6
    assert tracker.covariance("dropped:in").shape == (3, 3)
    rows = maps.double().flatten(0, -2)
    assert tracker.count("head:in") == len(rows) == 2 * 3 * 4
    torch.testing.assert_close(
        tracker.covariance("head:in"), rows.T @ rows / len(rows), rtol=1e-6, atol=1e-7
    )


class TwoConsumers(nn.Module):
    """Two layers that read one tensor, or tensors of their own, in either order."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(4, 3), nn.Linear(4, 3)
        self.order = "ab"
        self.is_apart = False

    def forward(self, x: Tensor) -> Tensor:
        outputs = []
        for name in self.order:
            given = x.clone() if self.is_apart and name == "b" else x
            outputs.append(getattr(self, name)(given))
        return torch.stack(outputs).sum(0)


def _run(model: TwoConsumers, steps: int, order: str = "ab", is_apart: bool = False) -> None:
    model.order, model.is_apart = order, is_apart
    for _ in range(steps):
        model(torch.randn(10, 4))


@pytest.mark.parametrize("saved_apart", [False, True])
@pytest.mark.parametrize("order", ["ab", "ba"])
def test_a_loaded_run_is_shared_as_it_was_saved(saved_apart: bool, order: str) -> None:
    torch.manual_seed(0)
    saved, loaded = TwoConsumers(), TwoConsumers()
    first = fastcov.track(saved, where="input", rows="all")
    _run(saved, 3, is_apart=saved_apart)
    second = fastcov.track(loaded, where="input", rows="all")
    _run(loaded, 2, order)
    assert second.state_dict()["shared"]  # and in this order: other layers lead
    second.load_state_dict(first.state_dict())
    assert second.state_dict()["shared"] == first.state_dict()["shared"]
    for model in (saved, loaded):
        torch.manual_seed(1)
        _run(model, 2, is_apart=saved_apart)
    for name in first.names():
        assert first.count(name) == second.count(name) == 50
        assert torch.equal(first.covariance(name), second.covariance(name))


def test_a_branch_that_appears_in_a_resumed_run_has_the_rows_of_its_own_steps() -> None:
    model = TwoConsumers()
    tracker = fastcov.track(model, where="input", rows="all")
    _run(model, 3, "a")
    saved = tracker.state_dict()
    tracker.close()
    tracker = fastcov.track(model, where="input", rows="all")
    tracker.load_state_dict(saved)
    _run(model, 2)
    assert (tracker.count("a:in"), tracker.count("b:in")) == (50, 20)


def test_a_shared_layer_that_is_not_tracked_is_refused_before_anything_is_loaded() -> None:
    model = TwoConsumers()
    tracker = fastcov.track(model, where="input", rows="all")
    _run(model, 3)
    saved = tracker.state_dict()
    other = fastcov.track(TwoConsumers(), where="input", rows="all", exclude="b")
    with pytest.raises(ValueError, match=r"layers that are not tracked here: b:in"):
        other.load_state_dict(saved)
    assert other.steps == 0


def test_a_shared_layer_that_is_given_up_keeps_its_rows_for_all_taps() -> None:
    class AnyWidth(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x)

    model = AnyWidth()
    tracker = fastcov.track(model, include=["a", "b"], where="input", rows="all")
    for width in (4, 5, 4):
        model(torch.randn(10, width))
    assert (tracker.count("a:in"), tracker.count("b:in")) == (10, 10)
    assert tracker.watcher.taps.notes["b:in"] == "gave 5 channels after 4: not read since then"


@pytest.mark.parametrize("scales", [(1, 2), (2, 1), (2, 2), (1, 1)])
def test_trackers_that_share_otherwise_are_merged(scales: tuple[int, int]) -> None:
    class Scaled(TwoConsumers):
        scale = 1

        def forward(self, x: Tensor) -> Tensor:
            return self.a(x) + self.b(x if self.scale == 1 else self.scale * x)

    torch.manual_seed(0)
    wanted = {name: torch.zeros(4, 4, dtype=torch.float64) for name in ("a:in", "b:in")}
    models = [Scaled(), Scaled()]
    trackers = [fastcov.track(model, where="input", rows="all") for model in models]

    def run(model: Scaled) -> None:
        x = torch.randn(10, 4)
        model(x)
        for name, scale in (("a:in", 1), ("b:in", model.scale)):
            rows = scale * x.double()
            wanted[name] += rows.T @ rows / 30

    for model, scale in zip(models, scales, strict=True):
        model.scale = scale
        run(model)
    trackers[0].merge(trackers[1])
    run(models[0])
    for name, moment in wanted.items():
        assert trackers[0].count(name) == 30
        assert float((trackers[0].covariance(name) - moment).abs().max()) < 1e-5
