"""Masks of rows against float64 oracles that the tests' own hooks collect."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastcov

LENGTHS = (12, 5, 3, 6)  # of 12: 46 % is padding


def gpt2() -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=40, n_positions=16, n_embd=32, n_layer=2, n_head=2,
            attn_pdrop=0.0, embd_pdrop=0.0, resid_pdrop=0.0,
        )
    )  # fmt: skip


def batch(seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.tensor(LENGTHS).roll(seed)
    mask = (torch.arange(12) < lengths[:, None]).long()
    return {"input_ids": torch.randint(40, (4, 12), generator=generator), "attention_mask": mask}


class Oracle:
    """Rows of every watched module's output, with the weights that a test says."""

    def __init__(self, model: nn.Module, names: list[str]) -> None:
        self.sums: dict[str, Any] = defaultdict(float)
        self.counts: dict[str, int] = defaultdict(int)
        self.weights: dict[str, float] = defaultdict(float)
        self.row_weights = torch.zeros(0)
        self.handles = [
            model.get_submodule(name).register_forward_hook(self.hook(name)) for name in names
        ]

    def hook(self, name: str) -> Any:
        def read(_module: nn.Module, _args: Any, output: Tensor) -> None:
            weights = self.row_weights.double()
            weights = weights.reshape(*weights.shape, *[1] * (output.dim() - 1 - weights.dim()))
            weights = weights.expand(output.shape[:-1])
            rows = output.detach().double()[weights > 0]
            kept = weights[weights > 0]
            self.sums[name] += rows.T @ (rows * kept[:, None])
            self.counts[name] += len(rows)
            self.weights[name] += float(kept.sum())

        return read

    def covariance(self, name: str) -> Tensor:
        return self.sums[name] / self.weights[name]


def error(found: Tensor, wanted: Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("weighting", ["position", "image"])
@pytest.mark.parametrize("is_function", [False, True])
def test_padding_is_left_out(weighting: Any, is_function: bool) -> None:
    model = gpt2()
    mask: Any = (lambda **given: given["attention_mask"].bool()) if is_function else None
    tracker = fastcov.track(model, rows="all", weighting=weighting, mask=mask or "attention_mask")
    oracle = Oracle(model, tracker.names())
    for seed in range(5):
        given = batch(seed)
        valid = given["attention_mask"].double()
        oracle.row_weights = valid / (valid.sum(1, keepdim=True) if weighting == "image" else 1)
        model(**given)
    for name in tracker.names():
        assert tracker.count(name) == oracle.counts[name] == 5 * sum(LENGTHS)
        assert error(tracker.covariance(name), oracle.covariance(name)) < 1e-5
    assert "mask" not in str(tracker.summary())


def test_weights_with_decay_and_every() -> None:
    model = gpt2()
    tracker = fastcov.track(
        model,
        include="*.c_fc",
        rows="all",
        every=2,
        decay=0.5,
        mask=lambda **given: given["attention_mask"] * 0.25,
    )
    oracle = Oracle(model, tracker.names())
    for seed in range(5):
        oracle.row_weights = batch(seed)["attention_mask"] * 0.5 ** (4 - seed) * (seed % 2 == 0)
        model(**batch(seed))
    for name in tracker.names():
        assert tracker.count(name) == oracle.counts[name]
        assert error(tracker.covariance(name), oracle.covariance(name)) < 1e-5


@pytest.mark.parametrize("weighting", ["position", "image"])
@pytest.mark.parametrize("rows", ["auto", 8, 0.3])
def test_only_valid_rows_are_sampled(rows: Any, weighting: Any) -> None:
    """Padding is a constant that no valid row holds: one row of it would show."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Identity()

        def forward(self, x: Tensor, valid: Tensor) -> Tensor:
            return self.layer(torch.where(valid[..., None], x, 1e3))

    torch.manual_seed(0)
    model = Model()
    tracker = fastcov.track(model, include="layer", rows=rows, mask="valid", weighting=weighting)
    steps, offered = 300, 0
    for _ in range(steps):
        valid = torch.arange(20) < torch.randint(1, 21, (4, 1))
        offered += int(valid.sum())
        model(torch.randn(4, 20, 3) * torch.tensor([1.0, 2.0, 3.0]), valid)
    fraction = tracker.watcher.taps.layers["layer"].fraction
    assert tracker.count("layer") == pytest.approx(fraction * offered, rel=0.05)
    diagonal = tracker.covariance("layer").diagonal()
    assert torch.allclose(diagonal, torch.tensor([1.0, 4, 9]).double(), rtol=0.3)


def test_sampling_weighs_sequences_the_same() -> None:
    """Long and short sequences hold different values: their share says who weighs what."""
    model = Labelled()
    tracker = fastcov.track(model, include="layer", rows=0.2, mask="mask", weighting="image")
    mask = torch.arange(40) < torch.tensor([[40], [4]])
    x = torch.tensor([0.0, 1.0])[:, None, None].expand(2, 40, 1)
    for _ in range(400):
        model(x, mask=mask)
    assert float(tracker.mean("layer")) == pytest.approx(0.5, abs=0.03)
    assert tracker.count("layer") == pytest.approx(400 * 44 * 0.2, rel=0.05)


class Labelled(nn.Module):
    """A layer whose rows are the model's input; calls it as often as it is told."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.pooled = nn.Identity()

    def forward(self, x: Tensor, calls: int = 1, mask: Tensor | None = None) -> Tensor:
        for _ in range(calls):
            self.layer(x)
        return self.pooled(x[:, 0])


def test_packed_sequences_weigh_the_same() -> None:
    """One row of the batch holds sequences of 6, 2 and 1 positions, then padding."""
    torch.manual_seed(0)
    model = Labelled()
    tracker = fastcov.track(model, include="layer", rows="all", mask="mask", weighting="image")
    numbers = torch.tensor([[3, 3, 3, 3, 3, 3, 1, 1, 2, 0]])
    shares = torch.tensor([[1 / 6] * 6 + [1 / 2] * 2 + [1.0, 0.0]]).double()
    wanted = torch.zeros(2, 2, dtype=torch.float64)
    for calls in (1, 2, 1):
        x = torch.randn(1, 10, 2)
        model(x, calls, mask=numbers)
        wanted += torch.einsum("bt,btc,btd->cd", shares, x.double(), x.double())
    assert error(tracker.covariance("layer"), wanted / 9) < 1e-5
    assert tracker.count("layer") == 4 * 9


def test_positions_of_one_step_fit_a_mask_of_images_and_of_pixels() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 5, 3, stride=2))
    masks = [torch.rand(2, 8, 8) > 0.5, torch.tensor([0.25, 2.0])]
    for mask in masks:
        tracker = fastcov.track(model, rows="all", mask=lambda _x, mask=mask: mask)
        x = torch.randn(2, 3, 8, 8)
        model(x)
        output = model[0](x).detach().double().movedim(1, -1)
        weights = mask.double().reshape(*mask.shape, *[1] * (3 - mask.dim())).expand(2, 8, 8)
        wanted = torch.einsum("bhw,bhwc,bhwd->cd", weights, output, output) / weights.sum()
        assert error(tracker.covariance("0"), wanted) < 1e-5
        assert tracker.count("1") == 2 * 3 * 3
        note = next(each.note for each in tracker.statuses() if each.name == "1")
        assert ("ignores the mask" in note) == (mask.dim() == 3)
        tracker.close()


def test_a_layer_that_the_mask_does_not_fit_says_so() -> None:
    model = Labelled()
    tracker = fastcov.track(model, include=["layer", "pooled"], rows="all", mask="mask")
    model(torch.randn(2, 5, 3), mask=torch.ones(2, 5))
    model(torch.randn(2, 5, 3))
    assert (tracker.count("layer"), tracker.count("pooled")) == (20, 4)
    text = str(tracker.summary())
    assert "ignores the mask: [2, 5] fits no rows of [2]" in text
    assert "1 of 2 steps had no mask (mask)" in text


def test_a_mask_that_is_true_at_padding_is_refused() -> None:
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    model = nn.TransformerEncoder(layer, 1)
    with pytest.raises(ValueError, match=r"true at padding.*returns ~src_key_padding_mask"):
        fastcov.track(model, mask="src_key_padding_mask")
    with pytest.raises(ValueError, match="true at padding"):
        fastcov.estimate(model, torch.zeros(2, 5, 8), mask="src_key_padding_mask")


def test_positional_masks_and_unknown_names() -> None:
    model = Labelled()
    tracker = fastcov.track(model, include="layer", rows="all", mask="mask")
    model(torch.randn(2, 5, 3), 1, torch.ones(2, 5).tril())
    assert tracker.count("layer") == 3
    with pytest.raises(ValueError, match="no argument of this name; closest names: mask"):
        fastcov.track(model, include="layer", mask="masks", replace=True)
    with pytest.raises(TypeError, match="mask=3: give the name"):
        fastcov.track(model, include="layer", mask=3, replace=True)


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        (torch.ones(2, 1, 5, 5, 1), "expected \\[B\\], \\[B, T\\]"),
        ("valid", "the mask is a str"),
        (-torch.ones(2, 5), "negative or not finite"),
        (torch.full((2, 5), float("nan")), "negative or not finite"),
    ],
)
def test_a_wrong_mask_stops_the_reading_and_not_the_training(mask: Any, message: str) -> None:
    model = Labelled()
    tracker = fastcov.track(model, include="layer", rows="all", mask="mask")
    with pytest.warns(UserWarning, match=message):
        model(torch.randn(2, 5, 3), mask=mask)
    model(torch.randn(2, 5, 3))
    assert tracker.count("layer") == 0
    assert "not read since step 0" in str(tracker.summary())


def test_a_function_that_fails_stops_the_reading_and_not_the_training() -> None:
    model = Labelled()
    tracker = fastcov.track(model, include="layer", rows="all", mask=lambda x: x.valid)
    with pytest.warns(UserWarning, match="no longer reads any layer"):
        model(torch.randn(2, 5, 3))
    assert tracker.count("layer") == 0


@pytest.mark.parametrize("weighting", ["position", "image"])
def test_a_first_step_without_a_valid_row(weighting: Any) -> None:
    model = Labelled()
    tracker = fastcov.track(model, include="layer", rows=4, mask="mask", weighting=weighting)
    model(torch.randn(2, 50, 3), mask=torch.zeros(2, 50, dtype=torch.bool))
    assert "the mask left out every row so far" in str(tracker.summary())
    mask = torch.arange(50) < torch.tensor([[40], [10]])
    for _ in range(100):
        model(torch.randn(2, 50, 3), mask=mask)
    assert tracker.count("layer") == pytest.approx(400, rel=0.05)


@pytest.mark.parametrize("rows", [1, 2])
def test_a_sample_of_a_first_step_leaves_rows_out(rows: int) -> None:
    """Fewer rows are offered than a buffer holds: all are kept, then a sample of them is drawn."""
    torch.manual_seed(0)
    model = Labelled()
    tracker = fastcov.track(model, include="layer", rows=rows, mask="mask")
    model(torch.randn(1, 6, 3), mask=torch.arange(6)[None] % 2 == 0)
    assert not tracker.watcher.taps.notes
    assert 0 < tracker.count("layer") <= 3


def test_inputs_share_and_a_resumed_run_goes_on() -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict({name: nn.Linear(4, 4) for name in "qkv"})

    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inside = model

        def forward(self, x: Tensor, mask: Tensor) -> None:
            x = x * 2
            for name in "qkv":
                self.inside[name](x)

    def run(tracker: fastcov.Tracker, root: nn.Module, seeds: range) -> None:
        for seed in seeds:
            generator = torch.Generator().manual_seed(seed)
            mask = torch.arange(30) < torch.tensor([[30], [7 + seed]])
            root(torch.randn(2, 30, 4, generator=generator), mask)

    root = Attention()
    options: dict[str, Any] = {"where": "input", "rows": 0.4, "mask": "mask"}
    with fastcov.track(root, **options) as whole:
        run(whole, root, range(6))
    with fastcov.track(root, **options) as first:
        run(first, root, range(3))
        saved = first.state_dict()
    with fastcov.track(root, **options) as second:
        second.load_state_dict(saved)
        run(second, root, range(3, 6))
    assert len({id(layer) for layer in whole.watcher.taps.layers.values()}) == 1
    for name in whole.names():
        assert second.count(name) == whole.count(name) > 0
        assert error(second.covariance(name), whole.covariance(name)) < 1e-6
    merged = whole.covariance("inside.q:in") * float(whole._state("inside.q:in").weight)
    whole.merge(second)
    assert error(whole.covariance("inside.q:in") * float(whole._state("inside.q:in").weight),
                 2 * merged) < 1e-6  # fmt: skip


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled() -> None:
    def run(is_compiled: bool) -> fastcov.Tracker:
        model = gpt2()
        tracker = fastcov.track(model, rows=0.5, mask="attention_mask")
        called = torch.compile(model, backend="aot_eager") if is_compiled else model
        for seed in range(3):
            called(**batch(seed)).logits.sum().backward()
        return tracker

    compiled, eager = run(True), run(False)
    for name in eager.names():
        assert compiled.count(name) == eager.count(name)
        assert error(compiled.covariance(name), eager.covariance(name)) < 1e-3


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_inside_a_step() -> None:
    """The root is called by compiled code, so that its hooks are traced."""
    model = Labelled()
    tracker = fastcov.track(model, include="layer", rows="all", mask="mask")

    @torch.compile(backend="aot_eager", fullgraph=True)
    def step(x: Tensor, mask: Tensor) -> Tensor:
        return model(x, mask=mask).sum()

    mask = torch.ones(2, 5).tril()
    step(torch.randn(2, 5, 3), mask)
    step(torch.randn(2, 5, 3), mask)
    assert tracker.count("layer") == 2 * 3


def test_checkpointing_and_half_precision() -> None:
    from torch.utils.checkpoint import checkpoint

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(4, 6)

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return checkpoint(self.layer, x, use_reentrant=False).float()

    torch.manual_seed(0)
    model = Model()
    tracker = fastcov.track(model, rows="all", mask="mask")
    for _ in range(3):
        with torch.autocast("cpu", torch.bfloat16):
            model(torch.randn(2, 7, 4), torch.ones(2, 7).tril()).sum().backward()
    assert tracker.count("layer") == 3 * 3


class Asked(nn.Module):
    """A layer of given rows, whose statistics are asked for between its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Identity()
        self.between: Any = lambda: None

    def forward(self, calls: list[Tensor], mask: Tensor | None = None) -> None:
        for x in calls:
            self.layer(x)
            self.between()


@pytest.mark.parametrize("weighting", ["position", "image"])
@pytest.mark.parametrize("decay", [None, 0.5])
@pytest.mark.parametrize("is_asked", [False, True])
@pytest.mark.parametrize("channels", [3, 64])
def test_steps_with_and_without_a_mask(
    weighting: Any, decay: float | None, is_asked: bool, channels: int
) -> None:
    """Weighted and plain rows wait in two buffers, which decay and are emptied in any order."""
    torch.manual_seed(0)
    model = Asked()
    tracker = fastcov.track(
        model, include="layer", rows="all", mask="mask", weighting=weighting, decay=decay
    )
    if is_asked:
        model.between = lambda: tracker.count("layer")
    total: Any = 0.0
    weight = 0.0
    count = 0
    for step, is_masked in enumerate([True, True, False, True, False, False, True, True, False]):
        lengths = torch.tensor([[5], [1 + step % 5]])
        mask = torch.arange(5) < lengths if is_masked else torch.ones(2, 5, dtype=torch.bool)
        calls = [torch.randn(2, 5, channels) for _ in range(1 + (step % 3 == 0))]
        dtype = torch.bfloat16 if step == 4 else torch.float32
        calls = [each.to(dtype) for each in calls]
        model(calls, mask if is_masked else None)
        total, weight = total * (decay or 1.0), weight * (decay or 1.0)
        shares = mask.double()
        if weighting == "image":
            shares = shares / mask.sum(1, keepdim=True) / len(calls)
        for each in calls:
            total = total + torch.einsum("bt,btc,btd->cd", shares, each.double(), each.double())
            weight += float(shares.sum())
            count += int(mask.sum())
    assert tracker.count("layer") == count
    assert error(tracker.covariance("layer"), total / weight) < 1e-5
    assert float(tracker._state("layer").weight) == pytest.approx(weight)


@pytest.mark.parametrize("rows", ["all", 0.5, 20])
def test_sketched_layers_have_masks_and_small_buffers(rows: Any) -> None:
    torch.manual_seed(0)
    model = Asked()
    model.layer = nn.Linear(4, 600, bias=False)
    tracker = fastcov.track(model, rows=rows, mask="mask", memory=250_000)
    total, valid = 0.0, 0
    for seed in range(12):
        mask = torch.arange(10) < torch.tensor([[10], [1 + seed % 9]])
        x = torch.randn(2, 10, 4)
        output = model.layer(torch.where(mask[..., None], x, 1e3))
        total += float(output.detach().double()[mask].square().sum())
        valid += int(mask.sum())
        model([torch.where(mask[..., None], x, 1e3)], mask)
    layer = tracker.watcher.taps.layers["layer"]
    assert layer.state is not None
    assert layer.state.sketch is not None
    spectrum = tracker.spectrum("layer")
    rel = 1e-5 if rows == "all" else 0.3
    assert spectrum.total == pytest.approx(total / valid, rel=rel)
    assert tracker.count("layer") == pytest.approx(valid * (layer.fraction or 0), rel=0.2)
    storage = layer._weighted._rows
    assert storage is not None
    assert len(storage) <= 64


@pytest.mark.parametrize("weighting", ["position", "image"])
@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("size", ["one", "many"])
def test_large_maps_are_added_in_parts(
    monkeypatch: pytest.MonkeyPatch, weighting: Any, is_weighted: bool, size: str
) -> None:
    """One image after the other, with channels first, one of them left out whole."""
    from fastcov.rows import mask as masks

    monkeypatch.setattr(masks, "_COPIED_AT_ONCE", 1 if size == "one" else 1 << 21)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 1))
    mask = (torch.rand(4, 8, 8) > 0.4) * (torch.arange(4) != 2)[:, None, None]
    weights = mask * torch.rand(4, 8, 8) if is_weighted else mask
    tracker = fastcov.track(
        model, rows="all", weighting=weighting, decay=0.5, mask=lambda _x: weights
    )
    total: Any = 0.0
    weight = 0.0
    for _ in range(3):
        x = torch.randn(4, 3, 8, 8)
        output = model(x).detach().double().movedim(1, -1)
        shares = weights.double()
        if weighting == "image":
            shares = shares / shares.sum((1, 2), keepdim=True).clamp(min=1e-9)
        total = 0.5 * total + torch.einsum("bhw,bhwc,bhwd->cd", shares, output, output)
        weight = 0.5 * weight + float(shares.sum())
    assert tracker.count("0") == 3 * int(mask.sum())
    assert error(tracker.covariance("0"), total / weight) < 1e-5
    assert float(tracker._state("0").weight) == pytest.approx(weight, rel=1e-6)
