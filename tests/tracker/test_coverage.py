"""Modules that are not read say so: the summary's last line, and notes on layers."""

from __future__ import annotations

import importlib

import pytest
import torch
from torch import Tensor, nn

import fastcov
from fastcov.watch.coverage import coverage
from fastcov.watch.select import canonical_name


def last_line(tracker: fastcov.Tracker) -> str:
    return str(tracker.summary()).splitlines()[-1]


def test_the_last_line_counts_parameters_and_names_the_largest_that_are_not_watched() -> None:
    model = nn.Sequential(nn.Embedding(1000, 8), nn.Linear(8, 8), nn.LayerNorm(8))
    with fastcov.track(model) as tracker:
        model(torch.randint(1000, (4, 5)))
        line = last_line(tracker)
    assert line.startswith("watched modules hold 72 of 8088 parameters (0 %)")
    assert line.endswith("largest that are not: 0 (8000), 2 (16)")


def test_a_shared_parameter_is_watched_if_one_module_is() -> None:
    embedding, head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
    head.weight = embedding.weight
    model = nn.Sequential(embedding, head)
    assert coverage(model, [head]) == "watched modules hold 400 of 400 parameters (100 %)"


def test_modules_inside_a_watched_one_count() -> None:
    model = nn.Sequential(nn.MultiheadAttention(8, 2, batch_first=True), nn.BatchNorm1d(8))
    assert coverage(model, [model[0]]).startswith(
        "watched modules hold 288 of 304 parameters (94 %)"
    )


def test_fused_experts_are_named() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        num_local_experts=4,
    )
    model = transformers.MixtralForCausalLM(config)
    with fastcov.track(model, rows="all") as tracker:
        model(torch.randint(32, (2, 8)))
        assert "model.layers.0.mlp.experts" in last_line(tracker)


class FusedExperts(nn.Module):
    """Uses its children's weights itself: none of them is called."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.inner.weight


def test_compilation_is_not_blamed_where_nothing_was_compiled() -> None:
    model = FusedExperts()
    with fastcov.track(model) as tracker:
        model(torch.randn(4, 8))
        note = str(tracker.summary())
    assert "compile" not in note
    assert "no watched module was called" in note


def test_compilation_is_blamed_where_it_came_first() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU())

    class Root(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x)

    root = Root()
    compiled = torch.compile(root, backend="eager")
    compiled(torch.randn(4, 8))
    with fastcov.track(root) as tracker:
        with pytest.warns(UserWarning, match="reads nothing"):
            compiled(torch.randn(4, 8))
        note = str(tracker.summary())
    torch.compiler.reset()
    assert "compiled before it was tracked" in note


def test_a_layer_that_is_replaced_says_so() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 4))
    with fastcov.track(model, rows="all") as tracker:
        model(torch.randn(4, 8))
        model[1] = nn.Conv1d(8, 4, 1)
        model[1].forward = lambda x: x
        model(torch.randn(4, 8))
        notes = {status.name: status.note for status in tracker.statuses()}
    assert "replaced by a Conv1d since track()" in notes["1"]
    assert "replaced" not in notes["0"]


class Adapted(nn.Module):
    """A layer with a low-rank addition, as adapter libraries wrap it."""

    def __init__(self, base_layer: nn.Linear) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.down, self.up = nn.Linear(8, 2, bias=False), nn.Linear(2, 8, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.up(self.down(x))


def test_the_base_layer_of_an_adapter_says_which_part_it_is() -> None:
    model = nn.Sequential(Adapted(nn.Linear(8, 8)))
    with fastcov.track(model, rows="all") as tracker:
        model(torch.randn(64, 8))
        notes = {status.name: status.note for status in tracker.statuses()}
    assert "without its adapter's part: include '0' for the sum" in notes["0.base_layer"]


@pytest.mark.parametrize("is_after_compiled", [False, True])
def test_complex_outputs_are_named(is_after_compiled: bool) -> None:
    if is_after_compiled:  # another Sequential, which shares its compiled code with this one
        torch.compile(nn.Sequential(nn.Linear(2, 2)), backend="eager")(torch.randn(4, 2))

    class Spectral(nn.Linear):
        def forward(self, input: Tensor) -> Tensor:
            return torch.fft.fft(super().forward(input))

    model = nn.Sequential(Spectral(8, 8))
    with fastcov.track(model, rows="all") as tracker:
        model(torch.randn(4, 8))
        assert "complex64" in tracker.statuses()[0].note
    torch.compiler.reset()


def test_eigenvalues_that_are_rounding_are_noticed() -> None:
    torch.manual_seed(0)
    model = nn.Identity()
    rows = torch.randn(4096, 64)
    with fastcov.track(model, include="", rows="all") as tracker:
        model(rows)
        assert "rounding" not in tracker.statuses()[0].note
        sink = torch.randn(64)
        rows[:40] += 1e5 * sink / sink.norm()
        for _ in range(3):
            model(rows)
        note = tracker.statuses()[0].note
    assert "small eigenvalues are rounding" in note
    assert "float64" in note


def test_few_rows_and_low_rank_are_not_called_rounding() -> None:
    torch.manual_seed(0)
    model = nn.Identity()
    mix = torch.randn(8, 64)
    with fastcov.track(model, include="", rows="all") as tracker:
        for _ in range(20):
            model(torch.randn(256, 8) @ mix)
        assert "rounding" not in tracker.statuses()[0].note


@pytest.mark.parametrize("library", ["torchvision.ops.misc", "timm.layers"])
def test_layer_norms_of_maps_hold_channels_first(library: str) -> None:
    if library.startswith("torchvision"):
        norm = importlib.import_module("torchvision.models.convnext").LayerNorm2d(8)
    else:
        norm = importlib.import_module("timm.layers").LayerNorm2d(8)
    model = nn.Sequential(norm)
    with fastcov.track(model, include="0", rows="all") as tracker:
        output = model(torch.randn(2, 8, 7, 7))
    rows = output.detach().double().movedim(1, -1).flatten(0, -2)
    assert tracker.count("0") == 98
    torch.testing.assert_close(tracker.covariance("0"), rows.T @ rows / 98, rtol=1e-6, atol=1e-7)


def test_names_are_those_of_the_model_without_wrappers() -> None:
    assert canonical_name("_forward_module.module._orig_mod.layer1.0") == "layer1.0"
