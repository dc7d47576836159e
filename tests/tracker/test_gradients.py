"""Gradients of watched tensors against float64 oracles that tensor hooks of the tests collect."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastcov


class Model(nn.Module):
    """Convolutions with in-place operators, a branch, a frozen layer; may be checkpointed."""

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.stem = nn.Conv2d(3, 6, 3)
        self.block = nn.Sequential(
            nn.Conv2d(6, 8, 1), nn.ReLU(inplace=True), nn.Conv2d(8, 6, 1), nn.ReLU(inplace=True)
        )
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu_()
        if self.reentrant is None:
            y = self.block(x)
        else:
            y = checkpoint(self.block, x, use_reentrant=self.reentrant)
        return self.head((x + y).mean((2, 3)))


def images(seed: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 8, 8, generator=torch.Generator().manual_seed(seed))


def make(reentrant: bool | None = None) -> Model:
    torch.manual_seed(0)
    return Model(reentrant)


class Oracle:
    """Second moments of the gradients of the modules' outputs, in float64."""

    def __init__(self, model: nn.Module, names: list[str], channel_dim: int = 1) -> None:
        self.sums: dict[str, Any] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.model, self.names, self.channel_dim = model, names, channel_dim

    def step(self, loss: Any) -> None:
        found: dict[str, Tensor] = {}
        handles = []
        for name in self.names:
            module = self.model.get_submodule(name)

            def hook(_module: nn.Module, _args: Any, output: Tensor, name: str = name) -> None:
                output.register_hook(lambda gradient: found.__setitem__(name, gradient.clone()))

            handles.append(module.register_forward_hook(hook))
        loss(self.model).backward()
        for handle in handles:
            handle.remove()
        for name, gradient in found.items():
            rows = gradient.double().movedim(self.channel_dim, -1).flatten(0, -2)
            self.sums[name] += rows.T @ rows
            self.counts[name] += len(rows)

    def covariance(self, name: str) -> Tensor:
        return self.sums[name] / self.counts[name]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def assert_equal(tracker: fastcov.Tracker, oracle: Oracle, tolerance: float = 1e-5) -> None:
    for name in oracle.names:
        assert tracker.count(f"{name}:grad") == oracle.counts[name]
        wanted = oracle.covariance(name)
        assert error(tracker.covariance(f"{name}:grad"), wanted) < tolerance, name


def loss_of(seed: int) -> Any:
    return lambda model: model(images(seed)).square().sum()


NAMES = ["stem", "block.0", "block.2", "head"]


@pytest.mark.parametrize("of", ["gradient", "both"])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_every_gradient_is_read_once(of: Any, reentrant: bool | None) -> None:
    tracker_model, plain = make(reentrant), make()
    tracker = fastcov.track(tracker_model, of=of, rows="all")
    oracle = Oracle(plain, NAMES)
    for seed in range(3):
        loss_of(seed)(tracker_model).backward()
        oracle.step(loss_of(seed))
    assert_equal(tracker, oracle)
    assert ("stem" in tracker.names()) == (of == "both")
    assert "no gradient" not in str(tracker.summary())
    for mine, theirs in zip(tracker_model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-5, atol=1e-6)


def test_every_second_step_with_decay() -> None:
    model, plain = make(), make()
    tracker = fastcov.track(model, of="gradient", rows="all", every=2, decay=0.5)
    oracle = Oracle(plain, ["head"], -1)
    weights = 0.0
    wanted: Any = 0.0
    for seed in range(5):
        loss_of(seed)(model).backward()
        oracle.sums.clear()
        oracle.step(loss_of(seed))
        if seed % 2 == 0:
            wanted = wanted + oracle.sums["head"] * 0.5 ** (4 - seed)
            weights += 3 * 0.5 ** (4 - seed)
    assert tracker.count("head:grad") == 9
    assert error(tracker.covariance("head:grad"), wanted / weights) < 1e-5


def test_samples_are_planned_and_resumed() -> None:
    """The shares are known once the second step begins, or when somebody looks."""

    def run(tracker: fastcov.Tracker, model: nn.Module, seeds: range) -> None:
        for seed in seeds:
            loss_of(seed)(model).backward()

    model = make()
    with fastcov.track(model, of="both", rows=7) as whole:
        run(whole, model, range(8))
    assert {whole.count(f"{name}:grad") for name in NAMES[:3]} == {56}
    assert whole.count("head:grad") == whole.count("head") == 24
    with fastcov.track(model, of="both", rows=7) as first:
        run(first, model, range(1))
        assert first.count("stem:grad") == 7
        run(first, model, range(1, 4))
        saved = first.state_dict()
    with fastcov.track(model, of="both", rows=7) as second:
        second.load_state_dict(saved)
        run(second, model, range(4, 8))
    for name in whole.names():
        assert second.count(name) == whole.count(name)
        assert error(second.covariance(name), whole.covariance(name)) < 1e-6
    clone = copy.deepcopy(second.watcher)
    assert clone.taps.layers["head:grad"].state is not None


def test_gradients_share_the_budget() -> None:
    model = make()
    with fastcov.track(model, exclude="head", of="activation") as alone:
        loss_of(0)(model).backward()
    with fastcov.track(model, exclude="head", of="both") as both:
        loss_of(0)(model).backward()
        loss_of(1)(model).backward()
    assert both.watcher.policy.rho == pytest.approx(alone.watcher.policy.rho / 2, rel=1e-6)
    fractions = {name: layer.fraction for name, layer in both.watcher.taps.layers.items()}
    assert fractions["stem:grad"] == pytest.approx(fractions["stem"])


def test_weighting_by_image() -> None:
    model = make()
    tracker = fastcov.track(model, include="block.2", of="gradient", rows="all", weighting="image")
    wanted: Any = 0.0
    for seed in range(3):
        gradient: list[Tensor] = []
        handle = model.block[2].register_forward_hook(
            lambda _m, _a, output, g=gradient: output.register_hook(g.append) and None
        )
        loss_of(seed)(model).backward()
        handle.remove()
        rows = gradient[0].double().movedim(1, -1).flatten(0, -2)
        wanted = wanted + rows.T @ rows / 36
        assert error(tracker.covariance("block.2:grad"), wanted / (3 * (seed + 1))) < 1e-5


def test_kfac_factors_of_a_linear() -> None:
    """A = E[a a^T] of the inputs and B = E[g g^T] of the outputs' gradients."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    tracker = fastcov.track(model, include="2", where="both", of="both", rows="all")
    A, B = torch.zeros(7, 7).double(), torch.zeros(3, 3).double()
    for seed in range(4):
        generator = torch.Generator().manual_seed(seed)
        x, y = torch.randn(64, 5, generator=generator), torch.arange(64) % 3
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
        wide = copy.deepcopy(model).double()
        wide[2]._forward_hooks.clear()
        wide[2]._forward_pre_hooks.clear()
        with torch.no_grad():
            a = wide[1](wide[0](x.double()))
            g = torch.softmax(wide[2](a), 1) - nn.functional.one_hot(y, 3)
        A += a.T @ a
        B += g.T @ g
    assert error(tracker.covariance("2:in"), A / 256) < 1e-5
    assert error(tracker.covariance("2:grad"), B / 256) < 1e-5
    assert tracker.count("2:in:grad") == 256


def test_kfac_of_a_linear_is_that_of_curvlinops() -> None:
    """The empirical Fisher matrix of the weight: the Kronecker product of both factors."""
    from curvlinops import KFACLinearOperator

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
    batches = [(torch.randn(64, 5), torch.arange(64) % 3) for _ in range(4)]
    theirs = KFACLinearOperator(
        model, nn.CrossEntropyLoss(), [model[2].weight], batches, fisher_type="empirical"
    ) @ torch.eye(21)
    tracker = fastcov.track(model, include="2", where="both", of="both", rows="all")
    for x, y in batches:
        nn.functional.cross_entropy(model(x), y, reduction="sum").backward()
    ours = torch.kron(tracker.covariance("2:grad"), tracker.covariance("2:in"))
    assert error(ours, theirs.double()) < 1e-5


def test_sensitivity_is_the_spectrum_of_both() -> None:
    model = make()
    tracker = fastcov.track(model, of="both", rows="all")
    for seed in range(4):
        loss_of(seed)(model).backward()
    S, G = tracker.covariance("block.0"), tracker.covariance("block.0:grad")
    wanted = torch.linalg.eigvals(S @ G).real.sort(descending=True).values
    spectrum = tracker.sensitivity("block.0")
    assert torch.allclose(spectrum.eigenvalues, wanted.clamp(min=0), atol=1e-9 * float(wanted[0]))
    assert spectrum.total == pytest.approx(float((S @ G).trace()))
    assert spectrum.count == tracker.count("block.0")
    assert fastcov.Spectrum(spectrum.eigenvalues, 1, spectrum.total).dim() == spectrum.dim()
    with pytest.raises(KeyError, match=r"no layer 'block\.1' is tracked; closest names: block"):
        tracker.sensitivity("block.1")
    with fastcov.track(model, include="head", replace=True) as other:
        loss_of(0)(model).backward()
        with pytest.raises(ValueError, match="gradient of layer 'head' is not tracked"):
            other.sensitivity("head")


def test_a_scaled_loss_is_unscaled() -> None:
    model, plain = make(), make()
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    tracker = fastcov.track(model, of="gradient", rows="all", unscale=scaler)
    oracle = Oracle(plain, NAMES[:3])
    for seed in range(2):
        scaler.scale(loss_of(seed)(model)).backward()
        scaler.step(optimizer)
        scaler.update()
        oracle.step(loss_of(seed))
    assert scaler.get_scale() == 4096.0
    assert_equal(tracker, oracle)
    with pytest.raises(TypeError, match=r"unscale=3: give a torch\.amp\.GradScaler"):
        fastcov.track(model, of="gradient", unscale=3, replace=True)


def test_float16_without_unscale_says_so() -> None:
    model = nn.Sequential(nn.Linear(4, 6))
    tracker = fastcov.track(model, of="gradient", rows="all")
    with torch.autocast("cpu", torch.float16):
        model(torch.randn(5, 4)).float().sum().backward()
    assert tracker.count("0:grad") == 5
    assert "pass track(..., unscale=scaler)" in str(tracker.summary())


def test_masks_hold_for_gradients() -> None:
    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.layer(x)

    torch.manual_seed(0)
    model = Root()
    tracker = fastcov.track(model, of="both", rows="all", mask="mask")
    mask = torch.arange(5) < torch.tensor([[5], [2]])
    output = model(torch.randn(2, 5, 4), mask)
    weights = torch.randn(2, 5, 6)
    (output * weights).sum().backward()
    rows = weights[mask].double()
    assert tracker.count("layer:grad") == tracker.count("layer") == 7
    assert error(tracker.covariance("layer:grad"), rows.T @ rows / 7) < 1e-5


def test_tensors_without_a_gradient_say_so() -> None:
    model = make()
    tracker = fastcov.track(model, include=["stem", "head"], of="gradient", where="both")
    with torch.no_grad():
        model(images(0))
    text = str(tracker.summary())
    assert text.count("no gradient reaches it") == 4
    model(images(0)).sum().backward()
    text = str(tracker.summary())
    assert text.count("no gradient reaches it") == 1  # the images
    tracker.close()
    tracker = fastcov.track(model, include="head", of="both")
    model(images(0))
    assert "did not run in the last step" not in str(tracker.summary())
    assert "no backward pass has reached it" in str(tracker.summary())
    model.eval()
    model(images(0)).sum().backward()
    assert tracker.count("head:grad") == 0


def test_a_leaf_that_is_an_input_is_read_once_a_step() -> None:
    model = nn.Sequential(nn.Linear(4, 2))
    tracker = fastcov.track(model, of="gradient", where="input", rows="all")
    prompt = torch.randn(3, 4, requires_grad=True)
    for _ in range(3):
        model(prompt).sum().backward()
    assert tracker.count("0:in:grad") == 9


def test_a_closed_tracker_reads_no_gradient() -> None:
    model = make()
    tracker = fastcov.track(model, of="gradient", rows="all")
    loss = loss_of(0)(model)
    tracker.close()
    loss.backward()
    assert tracker.count("head:grad") == 0


def test_two_forwards_before_their_backward_passes() -> None:
    model, plain = make(), make()
    tracker = fastcov.track(model, of="gradient", rows="all")
    losses = [loss_of(seed)(model) for seed in range(2)]
    sum(losses).backward()
    oracle = Oracle(plain, NAMES)
    for seed in range(2):
        oracle.step(loss_of(seed))
    assert_equal(tracker, oracle)


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_compiled(backend: str) -> None:
    model, plain = make(), make()
    tracker = fastcov.track(model, of="both", rows="all")
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    oracle = Oracle(plain, NAMES)
    for seed in range(3):
        compiled(images(seed)).square().sum().backward()
        oracle.step(loss_of(seed))
    assert_equal(tracker, oracle, 1e-4)
    for mine, theirs in zip(model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(mine.grad, theirs.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_code_says_what_it_does_not_read() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
    tracker = fastcov.track(model, of="gradient", where="input", rows="all")
    torch.compile(model, backend="aot_eager", fullgraph=True)(torch.randn(3, 4)).sum().backward()
    assert str(tracker.summary()).count("is not read in compiled code") == 2


def test_a_memory_budget_counts_gradients_and_refuses_what_needs_whole_states() -> None:
    model = nn.Sequential(nn.Linear(4, 300), nn.Linear(300, 4))
    tracker = fastcov.track(model, of="both", rows="all", memory=400_000)
    model(torch.randn(8, 4)).sum().backward()
    for name in ("0", "0:grad"):
        state = tracker.watcher.taps.layers[name].state
        assert state is not None
        assert state.sketch is not None
    with pytest.raises(ValueError, match="layer '0' is sketched"):
        tracker.sensitivity("0")
