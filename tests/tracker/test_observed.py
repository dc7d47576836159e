"""Tensors that a forward names, and pairs of tensors, against float64 oracles."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import fastcov


class Attention(nn.Module):
    """One layer whose heads and residual stream its forward names."""

    def __init__(self) -> None:
        super().__init__()
        self.tracker: fastcov.Tracker | None = None
        self.q = nn.Linear(8, 8)
        self.k = nn.Linear(8, 6)
        self.is_checkpointed: bool | None = None

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if self.is_checkpointed is None:
            return self.inner(x)
        return checkpoint(self.inner, x, use_reentrant=self.is_checkpointed)

    def inner(self, x: Tensor) -> Tensor:
        q = self.q(x)
        heads = q.unflatten(-1, (2, 4))
        columns = (x + q).tanh().transpose(1, 2)
        residual = columns.transpose(1, 2)
        if self.tracker is not None:
            self.tracker.observe("heads", heads)
            self.tracker.observe("residual", columns, channel_dim=1)
        return self.k(residual * residual)


def make() -> Attention:
    torch.manual_seed(0)
    return Attention()


def tracked(model: Attention, **options: Any) -> fastcov.Tracker:
    model.tracker = fastcov.track(model, include="q", **{"rows": "all", **options})
    return model.tracker


def inputs(seed: int, batch: int = 3) -> Tensor:
    return torch.randn(batch, 5, 8, generator=torch.Generator().manual_seed(seed))


def moment(rows: list[Tensor]) -> Tensor:
    flat = torch.cat([each.detach().double().flatten(0, -2) for each in rows])
    return flat.T @ flat / len(flat)


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def named(model: Attention, x: Tensor) -> tuple[Tensor, Tensor]:
    q = nn.functional.linear(x, model.q.weight, model.q.bias)
    return q.unflatten(-1, (2, 4)), (x + q).tanh()


@pytest.mark.parametrize("is_checkpointed", [None, False, True])
@pytest.mark.parametrize("decay", [None, 0.5])
def test_heads_and_residual_stream(is_checkpointed: bool | None, decay: float | None) -> None:
    model = make()
    model.is_checkpointed = is_checkpointed
    tracker = tracked(model, decay=decay)
    heads, residual = [], []
    for seed in range(3):
        model(inputs(seed).requires_grad_()).sum().backward()
        weight = 1.0 if decay is None else decay ** ((2 - seed) / 2)
        for kept, rows in zip((heads, residual), named(model, inputs(seed)), strict=True):
            kept.append(rows * weight)
    total = 1.0 if decay is None else 3 / (1 + 0.5 + 0.25)
    assert tracker.names() == ["q", "heads", "residual"]
    assert tracker.count("heads") == 3 * 3 * 5 * 2
    assert tracker.count("residual") == 3 * 3 * 5
    assert error(tracker.covariance("heads"), moment(heads) * total) < 1e-5
    assert error(tracker.covariance("residual"), moment(residual) * total) < 1e-5
    model.eval()
    model(inputs(0))
    assert tracker.count("residual") == 45
    assert "heads" in str(tracker.summary())


@pytest.mark.parametrize("is_checkpointed", [None, False, True])
def test_gradients_of_named_tensors(is_checkpointed: bool | None) -> None:
    model = make()
    model.is_checkpointed = is_checkpointed
    tracker = tracked(model, of="both")
    x = inputs(0).requires_grad_()
    model(x).square().sum().backward()
    _, residual = named(model, inputs(0))
    residual = residual.detach().double().requires_grad_()
    wide = nn.functional.linear(residual * residual, model.k.weight.double(), model.k.bias.double())
    (gradient,) = torch.autograd.grad(wide.square().sum(), residual)
    assert tracker.count("residual:grad") == 15
    assert error(tracker.covariance("residual:grad"), moment([gradient])) < 1e-5
    assert tracker.sensitivity("residual").channels == 8


def test_samples_resume_and_merge() -> None:
    def run(tracker: fastcov.Tracker, model: Attention, seeds: range) -> None:
        model.tracker = tracker
        for seed in seeds:
            model(inputs(seed))

    model = make()
    options: dict[str, Any] = {"include": "q", "rows": 6, "pairs": [("q", "residual")]}
    with fastcov.track(model, **options) as whole:
        run(whole, model, range(6))
    with fastcov.track(model, **options) as first:
        run(first, model, range(3))
        saved = first.state_dict()
    with fastcov.track(model, **options) as second:
        second.load_state_dict(saved)
        run(second, model, range(3, 6))
    assert whole.count("heads") == 36
    assert second.names() == whole.names()
    for name in whole.names():
        assert second.count(name) == whole.count(name)
        assert error(second.covariance(name), whole.covariance(name)) < 1e-6
    crossed = whole.cross_covariance("q", "residual")
    assert error(second.cross_covariance("q", "residual"), crossed) < 1e-6
    with fastcov.track(model, **options) as empty:
        pass
    empty.merge(whole)
    assert empty.count("heads") == 36
    assert error(empty.cross_covariance("q", "residual"), crossed) < 1e-12


def test_masks_and_images_of_named_tensors() -> None:
    model = make()
    tracker = tracked(model, mask="mask", weighting="image")
    mask = torch.arange(5) < torch.tensor([[5], [2], [1]])
    model(inputs(0), mask)
    heads = named(model, inputs(0))[0].detach().double()
    weights = (mask / mask.sum(1, keepdim=True) / 2).double()
    wanted = torch.einsum("bt,bthc,bthd->cd", weights, heads, heads) / 3
    assert tracker.count("heads") == 16
    assert error(tracker.covariance("heads"), wanted) < 1e-5


def test_wrong_arguments() -> None:
    model = make()
    tracker = tracked(model)
    with pytest.raises(ValueError, match=r"channel_dim=3\): the tensor has shape \[2, 3\]"):
        tracker.observe("x", torch.zeros(2, 3), channel_dim=3)
    with pytest.raises(TypeError, match="expected floating point"):
        tracker.observe("x", torch.zeros(2, 3, dtype=torch.int64))
    with pytest.raises(TypeError, match="give a name and a tensor"):
        tracker.observe("x", [1.0])
    with pytest.raises(ValueError, match="a name that is not empty"):
        tracker.observe("", torch.zeros(2, 3))
    tracker.observe("x", torch.zeros(2, 3))
    assert "x" not in tracker.names()
    handle = model.q.register_forward_hook(lambda _m, _a, out: tracker.observe("q", out))
    with pytest.raises(ValueError, match="a module's tensor has this name already"):
        model(inputs(0))
    handle.remove()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled(backend: str) -> None:
    def run(is_compiled: bool) -> fastcov.Tracker:
        model = make()
        tracker = tracked(model, rows=0.5, pairs=[("q", "residual")], of="both")
        called = torch.compile(model, backend=backend, fullgraph=True) if is_compiled else model
        for seed in range(3):
            called(inputs(seed)).sum().backward()
        model.eval()
        called(inputs(3))
        return tracker

    compiled, eager = run(True), run(False)
    for name in ("q", "heads", "residual", "q:grad"):
        assert compiled.count(name) == eager.count(name) > 0
        assert error(compiled.covariance(name), eager.covariance(name)) < 1e-3
    wanted = eager.cross_covariance("q", "residual")
    assert error(compiled.cross_covariance("q", "residual"), wanted) < 1e-3
    assert "gradients of named tensors are not read in compiled code" in str(compiled.summary())


@pytest.mark.parametrize("rows", ["all", 0.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_cross_covariance_and_cka(rows: Any, dtype: torch.dtype) -> None:
    """Convolutions with an in-place ReLU between them, which changes the first's output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.ReLU(inplace=True), nn.Conv2d(6, 5, 3, padding=1))
    model = model.to(dtype)
    tracker = fastcov.track(model, rows=rows, pairs=[("0", "2")])
    kept: list[list[Tensor]] = [[], []]
    for _ in range(20):
        x = torch.randn(2, 3, 8, 8).to(dtype)
        first = nn.functional.conv2d(x, model[0].weight, model[0].bias)
        second = model(x)
        for rows_of, output in zip(kept, (first, second), strict=True):
            rows_of.append(output.detach().double().movedim(1, -1).flatten(0, -2))
    a, b = (torch.cat(each) for each in kept)
    tolerance = 1e-5 if rows == "all" else 0.35
    if dtype is torch.bfloat16:
        tolerance = max(tolerance, 1e-2)  # rounding of another convolution kernel
    assert error(tracker.cross_covariance("0", "2"), a.T @ b / len(a)) < tolerance
    assert error(tracker.cross_covariance("2", "0"), b.T @ a / len(a)) < tolerance
    a, b = a - a.mean(0), b - b.mean(0)
    assert error(tracker.cross_covariance("0", "2", centered=True), a.T @ b / len(a)) < tolerance
    cka = (a.T @ b).square().sum() / ((a.T @ a).norm() * (b.T @ b).norm())
    assert tracker.cka("0", "2") == pytest.approx(float(cka), rel=tolerance)
    summary = tracker.summary()
    assert summary["0 x 2/cka"] == pytest.approx(float(cka), rel=tolerance)
    assert f"0 x 2: linear CKA {float(summary['0 x 2/cka']):.3f}" in str(summary)
    assert "0 x 2" not in tracker.spectra()


@pytest.mark.parametrize("rows", ["all", 4, 0.3])
def test_pairs_are_planned_masked_and_weighted(rows: Any) -> None:
    """Rows of both sides are those of the same positions: y is a function of x."""

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Identity(), nn.Identity()

        def forward(self, x: Tensor, mask: Tensor) -> None:
            self.b(3 * x[..., :2])
            self.a(x)

    torch.manual_seed(0)
    model = Root()
    tracker = fastcov.track(
        model, include=["a", "b"], rows=rows, mask="mask", weighting="image", pairs=[("a", "b")]
    )
    for _ in range(60):
        mask = torch.arange(20) < torch.randint(1, 21, (4, 1))
        model(torch.where(mask[..., None], torch.randn(4, 20, 3), 1e3), mask)
    joint = tracker.watcher.pairs["a", "b"].layer.state.covariance()
    assert torch.allclose(joint[:2, 3:], 3 * joint[:2, :2], rtol=1e-5, atol=1e-6)
    assert float(joint.max()) < 20
    if rows != "all":
        layer = tracker.watcher.pairs["a", "b"].layer
        assert int(layer.state.count[0]) == pytest.approx(tracker.count("a"), rel=0.1)


def test_pairs_that_find_no_rows_say_so() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 2, stride=2), nn.Linear(4, 4))
    options: dict[str, Any] = {"include": ["0", "1"], "rows": "all"}
    tracker = fastcov.track(model, pairs=[("0", "1"), ("0", "heads")], **options)
    model(torch.randn(2, 3, 8, 8))
    text = str(tracker.summary())
    assert "'0' has rows of [2, 8, 8], '1' of [2, 4, 4]: not paired" in text
    assert "no call of 'heads' came" in text
    with pytest.raises(ValueError, match="no rows of 0 x 1 have been paired"):
        tracker.cka("0", "1")
    with pytest.raises(KeyError, match="no pair: pass track"):
        tracker.cka("0", "2")
    for pairs, message in (
        ([("0", "0")], "two different names"),
        ([("0", "1"), ("1", "0")], "each pair once"),
        ([("0", "1:grad")], "gradients are not paired"),
    ):
        with pytest.raises(ValueError, match=message):
            fastcov.track(model, pairs=pairs, replace=True, **options)
    with pytest.raises(TypeError, match="give two names each"):
        fastcov.track(model, pairs=["01"], replace=True, **options)
