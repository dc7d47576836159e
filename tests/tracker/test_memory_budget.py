"""memory=: layers that do not fit are sketched, and no more is allocated than was allowed."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import fastcov
from fastcov.arguments import bytes_of
from fastcov.stats.buffering import layer_bytes, sketch_for


class Wide(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.narrow = nn.Linear(32, 48)
        self.wide = nn.Linear(48, 600)
        self.widest = nn.Linear(600, 900)
        self.head = nn.Linear(900, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.widest(self.wide(self.narrow(x).relu()).relu()).relu())


def steps(model: nn.Module, count: int = 4, batch: int = 200, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        model(torch.randn(batch, 32, generator=generator)).square().mean().backward()


BUDGET = 1 << 20


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"rows": "all"},
        {"rows": 0.3},
        {"rows": 0.3, "weighting": "image"},
        {"rows": "all", "weighting": "image"},
        {"rows": "all", "decay": 0.9},
        {"rows": "all", "precision": "float64"},
    ],
    ids=["auto", "all", "sampled", "image", "all-image", "decay", "float64"],
)
def test_traces_are_those_of_whole_states(options: dict[str, Any]) -> None:
    model = Wide()
    whole = fastcov.track(model, **options)
    sketched = fastcov.track(model, memory=BUDGET, **options)
    steps(model)
    expected_spectra, spectra = whole.spectra(), sketched.spectra()
    assert len(spectra) >= 3
    for layer, expected in expected_spectra.items():
        found = spectra[layer]
        # Rows wait in buffers of other sizes, but none is lost. "auto" reads more, as each is less
        # work.
        assert found.count == expected.count or (not options and found.count > expected.count)
        assert (found.sketch is not None) == (layer in ("wide", "widest"))
        if options.get("rows") == "all":
            assert found.total == pytest.approx(expected.total, rel=1e-5)
            if found.sketch is not None:
                ratio = found.participation_ratio() / expected.participation_ratio()
                assert 0.7 < ratio < 1.4, layer


def test_the_summary_says_so_and_other_numbers_are_refused_by_name() -> None:
    model = Wide()
    tracker = fastcov.track(model, memory="1MiB", rows="all")
    steps(model)
    summary = tracker.summary()
    assert "sketched to " in str(summary)
    assert str(summary).count("sketched to ") == 2
    assert summary["widest/channels"] == 900
    for ask in (tracker.covariance, tracker.mean, tracker.directions):
        with pytest.raises(ValueError, match=r"layer 'widest' is sketched, 900 channels to \d+"):
            ask("widest")
        ask("narrow")
    assert tracker.count("widest") == 800


def test_no_more_is_allocated_than_was_allowed_and_estimate_says_how_much() -> None:
    model = Wide()
    example = torch.zeros(200, 32)
    report = fastcov.estimate(model, example, rows=0.3, memory=BUDGET)
    assert report.memory_bytes <= BUDGET
    assert report.memory_bytes > 0.7 * BUDGET
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["narrow"].sketch == 0
    assert by_name["wide"].sketch == by_name["widest"].sketch > 100
    assert "sketched: 2 layers to" in str(report)

    assert added_bytes(rows=0.3, memory=BUDGET) == pytest.approx(report.memory_bytes, rel=0.03)


def test_rows_with_weights_wait_in_no_larger_buffers() -> None:
    mask = torch.arange(40) % 3 > 0
    assert added_bytes(batch=40, rows="all", memory=BUDGET, mask=lambda x: mask) < 1.05 * BUDGET


def added_bytes(batch: int = 200, **options: Any) -> int:
    """Bytes that tracking a few steps leaves allocated."""
    model = Wide()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        tracker = fastcov.track(model, **options)
        steps(model, batch=batch)
        model.zero_grad(set_to_none=True)
    events = profiler.profiler.kineto_results.events()
    total = sum(event.nbytes() for event in events if event.name() == "[memory]")
    del tracker
    return total


def test_auto_spends_on_sketches_what_whole_states_would_cost() -> None:
    """One per cent of the training flops, of projections and of the moments of r channels."""
    model, example = Wide(), torch.zeros(4000, 32)
    for memory in (None, BUDGET):
        report = fastcov.estimate(model, example, memory=memory)
        assert report.flops_share == pytest.approx(0.01, rel=0.05)
        per_channel = {layer.name: layer.rows_read / layer.channels for layer in report.layers}
        assert per_channel["wide"] == pytest.approx(per_channel["widest"])
        r = report.layers[1].sketch
        if r:
            layer = report.layers[1]
            assert layer.flops / layer.rows_read == 2 * 600 * r + (r + 1) * (r + 2)


def test_enough_memory_keeps_all_channels() -> None:
    model = Wide()
    tracker = fastcov.track(model, memory="1GiB", rows="all")
    steps(model)
    assert all(spectrum.sketch is None for spectrum in tracker.spectra().values())
    tracker.covariance("widest")
    assert fastcov.estimate(model, torch.zeros(2, 32), memory="1GiB").projection_bytes == 0


def test_layers_wider_than_max_channels_are_read_within_a_budget() -> None:
    model = Wide()
    tracker = fastcov.track(model, memory=BUDGET, max_channels=100)
    assert "wide" in tracker.names()


def test_a_budget_too_small_is_refused_before_any_hook_is_set() -> None:
    model = Wide()
    with pytest.raises(ValueError, match=r"memory=1000 bytes is too little: 4 layers.*include="):
        fastcov.track(model, memory=1000)
    assert not model.wide._forward_hooks
    with pytest.raises(ValueError, match="memory='2 gallons'"):
        fastcov.track(model, memory="2 gallons")
    with pytest.raises(TypeError, match=r"memory=2\.5"):
        fastcov.track(model, memory=2.5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2 << 30), ("512 MiB", 512 << 20), ("1.5kB", 1500), ("7", 7), (7, 7), ("3g", 3e9)],
)
def test_amounts_of_memory(text: Any, expected: int) -> None:
    assert bytes_of("memory", text) == expected


@pytest.mark.parametrize("text", ["", "GiB", "-2GiB", "1.2.3GB", 0, -1, "0.1"])
def test_amounts_that_are_none(text: Any) -> None:
    with pytest.raises(ValueError, match="memory="):
        bytes_of("memory", text)


def test_the_sketch_is_the_largest_that_fits() -> None:
    widths = [64, 1024, 4096, None]
    found = sketch_for(widths, 64 << 20, 4, is_host=True)
    assert found is not None
    known = [64, 1024, 4096, 4096]

    def needed(sketch: int) -> int:
        return sum(layer_bytes(width, sketch, 4, is_host=True) for width in known) + sketch * sum(
            {width for width in known if width > sketch}
        )

    assert needed(found) <= 64 << 20 < needed(found + 1)


def test_checkpoints_go_on_as_they_were_saved() -> None:
    model = Wide()
    tracker = fastcov.track(model, memory=BUDGET, rows="all")
    steps(model)
    saved = tracker.state_dict()
    expected = tracker.spectra()
    for memory in (BUDGET, 2 * BUDGET, None):
        fresh_model = Wide()
        fresh = fastcov.track(fresh_model, memory=memory, rows="all")
        steps(fresh_model, count=1)
        fresh.load_state_dict(saved)
        for name, spectrum in fresh.spectra().items():
            assert torch.equal(spectrum.eigenvalues, expected[name].eigenvalues)
        steps(fresh_model, count=1)
        assert fresh.count("widest") == 1000
    twin = copy.deepcopy(tracker)
    # A matrix alone is solved in another way than one of many, which may give other last bits.
    alone = tracker.spectrum("widest")
    assert torch.equal(twin.spectrum("widest").eigenvalues, alone.eigenvalues)


def test_trackers_merge_where_their_sketches_agree() -> None:
    first, second, third = Wide(), Wide(), Wide()
    trackers = [
        fastcov.track(model, memory=memory, rows="all")
        for model, memory in ((first, BUDGET), (second, BUDGET), (third, 2 * BUDGET))
    ]
    for seed, model in enumerate((first, second, third)):
        steps(model, seed=seed)
    totals = [tracker.spectrum("widest").total for tracker in trackers]
    before = trackers[0].count("narrow")
    with pytest.raises(ValueError, match=r"cannot merge layer 'wide': sketched to \d+ channels"):
        trackers[0].merge(trackers[2])
    assert trackers[0].count("narrow") == before
    trackers[0].merge(trackers[1])
    merged = trackers[0].spectrum("widest")
    assert merged.count == 1600
    assert merged.total == pytest.approx((totals[0] + totals[1]) / 2, rel=1e-9)


def test_pairs_keep_all_channels_within_the_budget() -> None:
    taken = added_bytes(rows=0.3, memory=4 * BUDGET, pairs=[("narrow", "wide")])
    assert 3 * BUDGET < taken <= 4 * BUDGET
    model = Wide()
    tracker = fastcov.track(model, memory=4 * BUDGET, rows="all", pairs=[("narrow", "wide")])
    whole = fastcov.track(model, rows="all", pairs=[("narrow", "wide")])
    steps(model)
    assert tracker.spectrum("wide").sketch is not None
    found, expected = (each.cross_covariance("narrow", "wide") for each in (tracker, whole))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-9)
    assert tracker.cka("narrow", "wide") == pytest.approx(whole.cka("narrow", "wide"))


def test_pairs_that_a_budget_cannot_hold_are_refused_before_any_hook_is_set() -> None:
    model = Wide()
    with pytest.raises(ValueError, match=r"memory=1048576 .* of it for pairs, which are not"):
        fastcov.track(model, memory=BUDGET, pairs=[("wide", "widest")])
    with pytest.raises(ValueError, match=r"the width of 'mine' is known in the first forward"):
        fastcov.track(model, memory=BUDGET, pairs=[("wide", "mine")])
    assert not model.wide._forward_hooks


def test_sensitivity_of_a_sketched_layer_is_refused_by_name() -> None:
    model = Wide()
    tracker = fastcov.track(model, memory=BUDGET, rows="all", of="both")
    steps(model)
    with pytest.raises(ValueError, match="layer 'widest' is sketched"):
        tracker.sensitivity("widest")
    assert tracker.spectrum("widest:grad").sketch is not None
    tracker.sensitivity("narrow")


def test_rows_of_a_mask_are_sketched_alone() -> None:
    model = Wide()
    mask = torch.arange(200) % 3 == 0

    def steps_of(**options: Any) -> fastcov.Spectrum:
        tracker = fastcov.track(model, rows="all", mask=lambda x: mask, replace=True, **options)
        steps(model)
        return tracker.spectrum("widest")

    found, expected = steps_of(memory=BUDGET), steps_of()
    assert found.count == expected.count == 4 * 67
    assert found.total == pytest.approx(expected.total, rel=1e-5)


def test_compiled_models_are_sketched_too() -> None:
    model = Wide()
    tracker = fastcov.track(model, memory=BUDGET, rows="all")
    exact = fastcov.track(model, rows="all")
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for _ in range(3):
        compiled(torch.randn(100, 32))
    found, expected = tracker.spectrum("widest"), exact.spectrum("widest")
    assert found.count == 300
    assert found.total == pytest.approx(expected.total, rel=1e-5)


def test_convolutions_are_sketched_in_any_layout() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 300, 3), nn.ReLU(), nn.Conv2d(300, 400, 3))
    exact, sketched = (
        fastcov.track(model, rows="all", memory=memory) for memory in (None, "600KiB")
    )
    for layout in (torch.contiguous_format, torch.channels_last):
        model(torch.randn(4, 3, 12, 12).to(memory_format=layout)).mean().backward()
    for name in ("0", "2"):
        found, expected = sketched.spectrum(name), exact.spectrum(name)
        assert found.sketch is not None
        assert found.total == pytest.approx(expected.total, rel=1e-5)


def test_llama_of_eight_billion_parameters_within_a_gibibyte() -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=128256, hidden_size=4096, intermediate_size=14336, num_hidden_layers=32,
        num_attention_heads=32, num_key_value_heads=8,
    )  # fmt: skip
    with torch.device("meta"):
        model = LlamaForCausalLM(config).bfloat16()
    example = {"input_ids": torch.zeros(1, 2048, dtype=torch.long, device="meta")}
    widths = []
    for gibibytes in (1, 2, 4):
        report = fastcov.estimate(model, example, memory=f"{gibibytes}GiB")
        assert len(report.layers) == 225
        assert not report.skipped
        assert report.memory_bytes <= gibibytes << 30
        widths.append({layer.name: layer.sketch for layer in report.layers})
    names = ("model.layers.0.mlp.up_proj", "model.layers.0.self_attn.k_proj")
    # 0: all channels are kept.
    assert [[width[name] for name in names] for width in widths] == [
        [877, 877],
        [1023, 1023],
        [2015, 0],
    ]


def test_spectra_solved_beside_the_training_are_sketched_too() -> None:
    """The callbacks for Trainers solve what lies in a checkpoint."""
    from fastcov.integrations import runs

    model = Wide()
    tracker = fastcov.track(model, memory=BUDGET, rows="all")
    steps(model, count=1)
    found = runs._solve(runs._mark(tracker, 1, True, True)).spectra
    for name, spectrum in tracker.spectra().items():
        assert torch.equal(found[name].eigenvalues, spectrum.eigenvalues)
        assert found[name].sketch == spectrum.sketch


@pytest.mark.parametrize("precision", ["split", "float64"])
def test_spectra_solved_beside_the_training_have_the_trackers_precision(
    precision: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU solves in float32 by default, which would hide small eigenvalues."""
    from fastcov.integrations import runs

    asked = []

    class Recorded(runs.PendingSpectra):
        def __init__(self, *args: Any, in_float64: bool = False, **options: Any) -> None:
            asked.append(in_float64)
            super().__init__(*args, in_float64=in_float64, **options)

    monkeypatch.setattr(runs, "PendingSpectra", Recorded)
    model = Wide()
    tracker = fastcov.track(model, memory=BUDGET, rows="all", precision=precision)
    steps(model, count=1)
    runs._solve(runs._mark(tracker, 1, True, True))
    assert asked == [precision == "float64"]
