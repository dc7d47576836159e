"""Tracking inside a training loop: it changes nothing, and counts exactly."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastcov


class Net(nn.Module):
    """A convolution, an in-place ReLU, a head that is called twice a step."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.norm = nn.BatchNorm2d(6)
        self.act = nn.ReLU(inplace=True)
        self.pool = nn.MaxPool2d(2)
        self.head = nn.Conv2d(6, 4, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.act(self.conv(x))
        coarse = self.pool(self.norm(fine))
        return self.head(fine).mean() + self.head(coarse).mean()


def images(seed: int = 0, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def frozen() -> Net:
    torch.manual_seed(0)
    return Net()


@pytest.mark.parametrize("rows", ["auto", "all", 7, 0.3])
def test_training_is_bitwise_the_same(rows: object) -> None:
    def run(tracked: bool) -> tuple[list[Tensor], Tensor]:
        torch.manual_seed(3)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        tracker = fastcov.track(model, rows=rows, where="both") if tracked else None
        losses = []
        for seed in range(5):
            optimizer.zero_grad()
            loss = model(images(seed))
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())
        if tracker is not None:
            assert tracker.steps == 5
            tracker.summary()
        state = [*model.state_dict().values(), *(p.grad for p in model.parameters()), *losses]
        return state, torch.get_rng_state()

    plain, tracked = run(False), run(True)
    assert all(torch.equal(a, b) for a, b in zip(plain[0], tracked[0], strict=True))
    assert torch.equal(plain[1], tracked[1])


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpoint_recomputation_does_not_count_twice(use_reentrant: bool) -> None:
    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.block = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

        def forward(self, x: Tensor) -> Tensor:
            return checkpoint(self.block, x, use_reentrant=use_reentrant)

    model = Checkpointed()
    calls = []
    model.block[0].register_forward_hook(lambda *_: calls.append(1))
    with fastcov.track(model, rows="all") as tracker:
        model(torch.randn(10, 4, requires_grad=True)).sum().backward()
    assert len(calls) == 2
    assert tracker.count("block.0") == 10


@pytest.mark.slow
@pytest.mark.parametrize("track_first", [True, False])
@pytest.mark.parametrize("rows", ["auto", "all"])
def test_compiled_model_has_one_graph_and_exact_counts(track_first: bool, rows: str) -> None:
    torch.compiler.reset()
    model = frozen()
    if track_first:
        tracker = fastcov.track(model, rows=rows)
        compiled = torch.compile(model, fullgraph=True)
    else:
        compiled = torch.compile(model, fullgraph=True)
        tracker = fastcov.track(compiled, rows=rows)
    reference_model = frozen()
    reference = fastcov.track(reference_model, rows=rows)
    for seed in range(4):
        loss = compiled(images(seed))
        loss.backward()
        reference_model(images(seed))
        if seed == 1:
            torch.compiler.set_stance("fail_on_recompile")
    torch.compiler.set_stance("default")
    compiled.eval()
    with torch.no_grad():
        compiled(images())
    assert tracker.steps == 4
    assert tracker.names() == ["conv", "head"]
    for name in tracker.names():
        assert tracker.count(name) == reference.count(name)
        torch.testing.assert_close(
            tracker.covariance(name), reference.covariance(name), rtol=1e-4, atol=1e-5
        )
    tracker.close()


def test_autocast_does_not_reach_the_statistics() -> None:
    model = nn.Linear(16, 16)
    x = torch.randn(200, 16)
    with torch.autocast("cpu", torch.bfloat16), fastcov.track(model, rows="all") as tracker:
        rows = model(x).double()
    torch.testing.assert_close(tracker.covariance(""), rows.T @ rows / 200, rtol=1e-5, atol=1e-6)


def test_precision_may_change_while_training() -> None:
    model = nn.Linear(4, 4)
    x = torch.randn(30, 4) + 5
    with fastcov.track(model, rows="all") as tracker:
        first = model(x).double()
        with torch.autocast("cpu", torch.bfloat16):
            second = model(x).double()
        third = model(x).double()
    rows = torch.cat([first, second, third])
    torch.testing.assert_close(tracker.covariance(""), rows.T @ rows / 90, rtol=1e-5, atol=1e-6)


def test_copies_do_not_feed_the_tracker() -> None:
    model = frozen()
    with fastcov.track(model, rows="all") as tracker:
        ema = copy.deepcopy(model)
        thawed = pickle.loads(pickle.dumps(model))
        averaged = torch.optim.swa_utils.AveragedModel(model)
        for twin in (ema, thawed, averaged):
            twin(images())
        assert tracker.steps == 0
        model(images())
    assert tracker.count("conv") == 192


def test_inference_mode_between_epochs() -> None:
    model = frozen()
    with fastcov.track(model, rows="all", train_only=False) as tracker:
        with torch.inference_mode():
            model(images())
        model(images()).backward()
    assert tracker.count("conv") == 2 * 192


def test_state_dict_continues_the_same_run(tmp_path: object) -> None:
    model = frozen()
    with fastcov.track(model, rows=0.2) as whole:
        for seed in range(4):
            model(images(seed))
    with fastcov.track(model, rows=0.2) as first:
        for seed in range(2):
            model(images(seed))
    torch.save(first.state_dict(), tmp_path / "tracker.pt")
    with fastcov.track(model, rows=0.2) as second:
        second.load_state_dict(torch.load(tmp_path / "tracker.pt", weights_only=True))
        for seed in range(2, 4):
            model(images(seed))
    assert second.steps == 4
    assert second.count("conv") == whole.count("conv")
    torch.testing.assert_close(second.covariance("conv"), whole.covariance("conv"))
