"""Every kind of layer: the right rows, or a note that says why there are none."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, prune
from torch.nn.utils.rnn import pack_padded_sequence

import fastcov

NO_ROW = (
    "its module was not called (its parent may use its weights itself), or gave no floating-point "
    "tensor with a row"
)


def second_moment(rows: Tensor) -> Tensor:
    flat = rows.detach().double().reshape(-1, rows.shape[-1])
    return flat.T @ flat / len(flat)


def first(value: Any) -> Tensor:
    return value if isinstance(value, Tensor) else first(value[0])


# Layer, input shape, dimension of the channels in its output.
LAYERS = [
    (nn.Conv1d(3, 6, 3), (2, 3, 9), 1),
    (nn.Conv2d(4, 8, 3, groups=2, stride=2), (2, 4, 9, 9), 1),
    (nn.Conv2d(4, 8, 3, groups=4), (2, 4, 6, 6), 1),  # depthwise
    (nn.Conv2d(3, 6, 3), (3, 9, 9), 0),  # one image without a batch dimension
    (nn.Conv3d(2, 5, 2), (2, 2, 4, 4, 4), 1),
    (nn.ConvTranspose1d(3, 4, 3, stride=2), (2, 3, 5), 1),
    (nn.ConvTranspose2d(4, 6, 2, stride=2), (2, 4, 3, 3), 1),
    (nn.ConvTranspose3d(2, 3, 2), (1, 2, 3, 3, 3), 1),
    (nn.BatchNorm1d(4), (30, 4), 1),
    (nn.BatchNorm2d(4), (3, 4, 5, 5), 1),
    (nn.GroupNorm(2, 4), (3, 4, 5, 5), 1),
    (nn.InstanceNorm2d(4), (3, 4, 5, 5), 1),
    (nn.Sequential(nn.Conv2d(4, 5, 1), nn.ReLU()), (2, 4, 5, 5), 1),  # told by its rank
    (nn.Linear(4, 6), (2, 3, 5, 4), -1),
    (nn.Linear(4, 6), (4,), -1),
    (nn.Bilinear(4, 4, 5), (7, 4), -1),
    (nn.LayerNorm(6), (2, 5, 6), -1),
    (nn.RMSNorm(6), (2, 5, 6), -1),
    (nn.LSTM(4, 5, batch_first=True), (3, 7, 4), -1),
    (nn.LSTM(4, 5, num_layers=2, bidirectional=True), (7, 3, 4), -1),
    (nn.GRU(4, 5), (7, 4), -1),
    (nn.RNNCell(4, 5), (7, 4), -1),
    (nn.MultiheadAttention(4, 2), (7, 3, 4), -1),
    (nn.MultiheadAttention(4, 2, batch_first=True), (7, 4), -1),
    (nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), (3, 7, 4), -1),
    (parametrizations.weight_norm(nn.Conv2d(4, 5, 3)), (2, 4, 5, 5), 1),
    (parametrizations.spectral_norm(nn.Linear(4, 5)), (9, 4), -1),
    (parametrizations.orthogonal(nn.Linear(4, 5)), (9, 4), -1),
    (prune.random_unstructured(nn.Linear(4, 5), "weight", 0.5), (9, 4), -1),
    (nn.Linear(4, 5).requires_grad_(False), (9, 4), -1),  # frozen
]


@pytest.mark.parametrize(("module", "shape", "channel_dim"), LAYERS, ids=lambda v: str(v)[:30])
def test_rows_of_a_layer(module: nn.Module, shape: tuple[int, ...], channel_dim: int) -> None:
    x = torch.randn(shape)
    copies = {nn.MultiheadAttention: 3, nn.Bilinear: 2}.get(type(module), 1)
    outputs: list[Any] = []
    module.register_forward_hook(lambda _module, _args, output: outputs.append(output))
    with fastcov.track(module, rows="all", include="") as tracker:
        module(*[x] * copies)
    rows = first(outputs[0]).movedim(channel_dim, -1)
    torch.testing.assert_close(tracker.covariance(""), second_moment(rows), rtol=1e-5, atol=1e-6)
    assert tracker.count("") == rows[..., 0].numel()
    assert tracker.steps == 1


@pytest.mark.parametrize("module", [nn.Embedding(9, 4), nn.EmbeddingBag(9, 4)])
def test_embeddings(module: nn.Module) -> None:
    ids = torch.randint(9, (5, 3))
    with fastcov.track(module, rows="all", include="") as tracker:
        rows = module(ids)
    torch.testing.assert_close(tracker.covariance(""), second_moment(rows), rtol=1e-5, atol=1e-6)


def test_default_selection_of_real_models(cases: Any) -> None:
    gpt2 = fastcov.track(cases["gpt2"].make()).names()
    assert "transformer.h.0.attn.c_attn" in gpt2  # transformers' Conv1D, a Linear in all but name
    assert "lm_head" in gpt2
    assert "transformer.wte" not in gpt2
    recurrent = cases["recurrent"].make()
    assert fastcov.track(recurrent).names() == ["normed", "spectral", "frozen", "head"]
    kinds = [nn.LSTM, nn.Embedding, "head"]
    assert fastcov.track(recurrent, include=kinds).names() == ["embedding", "lstm", "head"]
    mobilenet = fastcov.track(cases["mobilenet"].make(), include=lambda _n, m: is_depthwise(m))
    assert len(mobilenet.names()) == 17


def is_depthwise(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.groups == module.in_channels > 1


def test_budget_counts_declared_weights(cases: Any) -> None:
    """Parametrised and pruned weights are held as other tensors: the flops stay the same."""
    plain, normed = nn.Linear(64, 64), parametrizations.weight_norm(nn.Linear(64, 64))
    counts = []
    for module in (plain, normed):
        with fastcov.track(module) as tracker:
            for _ in range(4):
                module(torch.randn(500, 64))
        counts.append(tracker.count(""))
    assert counts[0] == counts[1] > 0


@dataclass
class Result:
    """Output type of some libraries."""

    score: int
    hidden: Tensor


@pytest.mark.parametrize(
    "wrap",
    [
        lambda y: (y, y * 2),
        lambda y: [torch.ones(3, dtype=torch.long), y],
        lambda y: {"mask": y > 0, "hidden": y},
        lambda y: Result(3, y),
        lambda y: {"outer": [{"inner": (None, y)}]},
    ],
    ids=["tuple", "list", "dict", "dataclass", "nested"],
)
def test_first_floating_point_tensor_of_an_output(wrap: Callable[[Tensor], Any]) -> None:
    class Wrapping(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, *, x: Tensor) -> Any:
            return wrap(self.linear(x))

    model = Wrapping()
    with fastcov.track(model, rows="all", include="*", where="both") as tracker:
        model(x=torch.randn(9, 4))
    torch.testing.assert_close(tracker.covariance(""), tracker.covariance("linear"))
    assert {tracker.count(name) for name in tracker.names()} == {9}


def test_model_outputs_of_transformers(cases: Any) -> None:
    model = cases["bert"].make()
    with fastcov.track(model, rows="all", include=["bert", "bert.encoder", "cls*"]) as tracker:
        cases["bert"].loss(model, 0)
    assert {tracker.count("bert"), tracker.count("bert.encoder"), tracker.count("cls")} == {36}


def test_packed_sequences() -> None:
    lstm = nn.LSTM(4, 5, batch_first=True)
    packed = pack_padded_sequence(torch.randn(3, 7, 4), torch.tensor([7, 5, 2]), batch_first=True)
    with fastcov.track(lstm, rows="all", include="") as tracker:
        output, _ = lstm(packed)
    assert tracker.count("") == 14  # no padding
    torch.testing.assert_close(tracker.covariance(""), second_moment(output.data))


def test_shared_modules_and_tied_weights(cases: Any) -> None:
    """One module under two names is one layer that pools its rows; tied weights are two."""
    shared = nn.Linear(4, 4)
    model = nn.Sequential(shared, nn.ReLU(), shared)
    with fastcov.track(model, rows="all") as tracker:
        model(torch.randn(9, 4))
    assert tracker.names() == ["0"]
    assert tracker.count("0") == 18
    tied = cases["gpt2"].make()
    assert tied.lm_head.weight is tied.transformer.wte.weight
    with fastcov.track(tied, rows="all", include=["lm_head", nn.Embedding]) as tracker:
        cases["gpt2"].loss(tied, 0)
    assert tracker.count("lm_head") == tracker.count("transformer.wte") == 36


class Giving(nn.Module):
    """A layer, and a module that returns something else made of its output."""

    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)
        self.odd = Changing(change)

    def forward(self, x: Tensor) -> Any:
        return self.odd(self.linear(x))


class Changing(nn.Module):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(x)


class Labelled(Tensor):
    """A subclass without data of its own, as some libraries carry through a whole model."""


@pytest.mark.parametrize(
    ("change", "note"),
    [
        (lambda y: y.sum(), "single numbers, which have no channels"),
        (lambda y: y[:, :0], NO_ROW),
        (lambda y: y[:0], NO_ROW),
        (lambda y: None, NO_ROW),
        (lambda y: y > 0, NO_ROW),
        (lambda y: y.to(torch.complex64), "gives torch.complex64 tensors"),
        (lambda y: y.to(torch.float8_e4m3fn), "gives torch.float8_e4m3fn tensors"),
        (lambda y: y.to_sparse(), "gives torch.sparse_coo tensors"),
        (lambda y: y.to("meta"), "on the meta device"),
        (lambda y: y.to_mkldnn(), "gives torch._mkldnn tensors"),
        (lambda y: torch.nested.nested_tensor([y[:3], y[3:]]), "enable_nested_tensor=False"),
        (lambda y: y.repeat(1, 3), "12 channels > max_channels=8"),
        (lambda y: y * float("nan"), "10 rows with NaN or inf skipped"),
        (
            lambda y: torch.nested.nested_tensor([y[:3], y[3:]], layout=torch.jagged),
            "gives tensors of type NestedTensor",
        ),
    ],
)
def test_what_cannot_be_read_says_why_and_harms_nothing(
    change: Callable[[Tensor], Any], note: str
) -> None:
    model = Giving(change)
    with fastcov.track(model, rows="all", include="*", exclude="", max_channels=8) as tracker:
        model(torch.randn(10, 4))
        model(torch.randn(10, 4))
    notes = {status.name: status.note for status in tracker.statuses()}
    assert note.replace("10 rows", "20 rows") in notes["odd"]
    with pytest.raises(ValueError, match="has seen no row"):
        tracker.spectrum("odd")
    assert tracker.steps == 2
    assert tracker.count("linear") == 20
    assert list(tracker.spectra()) == ["linear"]
    tracker.load_state_dict(tracker.state_dict())


def test_subclasses_without_data_are_read() -> None:
    model = Giving(lambda y: y.as_subclass(Labelled))
    with fastcov.track(model, rows="all", include="*") as tracker:
        model(torch.randn(10, 4).as_subclass(Labelled))
    torch.testing.assert_close(tracker.covariance("odd"), tracker.covariance("linear"))
    assert tracker.count("") == 10


def test_a_width_that_changes_from_call_to_call() -> None:
    model = Giving(lambda y: y[:, : int(y[0, 0].item() > 1e9) + 3])
    model.odd.change = lambda y: y[:, :3]
    with fastcov.track(model, rows="all", include="*", exclude="") as tracker:
        model(torch.randn(10, 4))
        model.odd.change = lambda y: y[:, :2]
        model(torch.randn(10, 4))
        model.odd.change = lambda y: y[:, :3]
        model(torch.randn(10, 4))
    assert "gave 2 channels after 3: not read since then" in str(tracker.summary())
    assert (tracker.count("odd"), tracker.count("linear")) == (10, 30)


def test_a_failure_of_reading_is_a_warning_not_the_end_of_training(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4))
    tracker = fastcov.track(model, rows="all")

    def fail(*_: Any) -> None:
        raise torch.OutOfMemoryError("tried to allocate 20 GiB")

    monkeypatch.setattr(tracker.watcher.taps.layers["0"], "read", fail)
    with pytest.warns(UserWarning, match="no longer reads layer '0': OutOfMemoryError: tried"):
        model(torch.randn(9, 4)).sum().backward()
    model(torch.randn(9, 4)).sum().backward()
    assert tracker.count("1") == 18
    assert "not read since step 0, OutOfMemoryError" in str(tracker.summary())


def test_a_layer_that_is_replaced_or_never_called_says_so() -> None:
    class Optional(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.used, self.spare = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.used(x)

    model = Optional()
    with fastcov.track(model, rows="all") as tracker:
        model(torch.randn(100, 4))
        notes = {status.name: status.note for status in tracker.statuses()}
        assert notes == {
            "used": "",
            "spare": NO_ROW,
        }
        model.used = nn.Linear(4, 4)
        model.spare(torch.randn(100, 4))
        model(torch.randn(100, 4))
        notes = {status.name: status.note for status in tracker.statuses()}
        assert tracker.count("used") == 100
        resumed = fastcov.track(model, rows="all")
        resumed.load_state_dict(tracker.state_dict())
        assert "did not run" not in str(resumed.summary())
    assert "spare" in notes
    model = Optional()
    with fastcov.track(model, rows="all") as tracker:
        model(torch.randn(100, 4))
        used, model.used = model.used, model.spare
        model(torch.randn(100, 4))
    notes = {status.name: status.note for status in tracker.statuses()}
    assert notes["used"].startswith("replaced by a Linear since track()")
    assert notes["used"].endswith("did not run in the last step: replaced since, or optional")
    assert used is not model.used


def test_lazy_layers_need_their_shape_first() -> None:
    model = nn.Sequential(nn.LazyLinear(4), nn.ReLU(), nn.LazyConv1d(2, 1))
    with pytest.raises(ValueError, match="layer '0' is a LazyLinear that has no shape yet: run"):
        fastcov.track(model)
    model(torch.randn(2, 3, 5).transpose(1, 2))
    with fastcov.track(model, rows="all", where="both") as tracker:
        model(torch.randn(2, 3, 5).transpose(1, 2))
    assert tracker.count("0") == 10


class Heads(nn.Module):
    """Layers fed by one tensor, at times by others."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4) for _ in range(3))
        self.calls: Callable[[Heads, Tensor], Any] = lambda self, y: (self.a(y), self.b(y))

    def forward(self, x: Tensor) -> Any:
        return self.calls(self, x.relu())


def input_counts(tracker: fastcov.Tracker) -> list[int]:
    return [tracker.count(name) for name in tracker.names()]


def test_consumers_of_one_tensor_share_one_state() -> None:
    model = Heads()
    model.calls = lambda self, y: (self.a(y), self.b(y), self.c(y * 2))
    with fastcov.track(model, rows="all", where="input") as tracker:
        for _ in range(3):
            model(torch.randn(10, 4))
    assert len(tracker.watcher.taps.unique_layers) == 2
    assert input_counts(tracker) == [30, 30, 30]


def test_a_consumer_that_is_called_more_often_stands_alone() -> None:
    """Were the rows pooled, b would report rows that it never saw."""
    model = Heads()
    model.calls = lambda self, y: (self.a(y), self.b(y), self.a(y * 2), self.c(y))
    with fastcov.track(model, rows="all", where="input", include=["a", "b"]) as tracker:
        for _ in range(3):
            model(torch.randn(10, 4))
    assert input_counts(tracker) == [60, 20]
    assert "rows of its own since step 1; shared those of a:in before" in str(tracker.summary())


def test_a_consumer_whose_input_changes_later_stands_alone() -> None:
    model = Heads()
    with fastcov.track(model, rows="all", where="input", include=["a", "b"]) as tracker:
        model(torch.randn(10, 4))
        assert len(tracker.watcher.taps.unique_layers) == 1
        model.calls = lambda self, y: (self.a(y), self.b(y * 2))
        model(torch.randn(10, 4))
        model.calls = lambda self, y: self.b(y)
        model(torch.randn(10, 4))
    assert input_counts(tracker) == [20, 20]
    assert len(tracker.watcher.taps.unique_layers) == 2


def test_attention_projections_share_their_input(cases: Any) -> None:
    model = cases["llama"].make()
    with fastcov.track(model, rows="all", where="input") as tracker:
        cases["llama"].loss(model, 0)
    prefix = "model.layers.0."
    readers = [tracker.watcher.taps.layers[f"{prefix}self_attn.{p}_proj:in"] for p in "qkv"]
    assert readers[0] is readers[1] is readers[2]
    up, gate = (tracker.watcher.taps.layers[f"{prefix}mlp.{p}_proj:in"] for p in ("up", "gate"))
    assert up is gate is not readers[0]
    assert {tracker.count(name) for name in tracker.names()} == {36}
