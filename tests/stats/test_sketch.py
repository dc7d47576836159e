"""Sketched states: an exact trace, unbiased norms, intervals that hold, sums that merge."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor

import fastcov
from fastcov.ops import triangle
from fastcov.show.status import LayerStatus, Summary
from fastcov.spectra.sketched import head_interval, squared_norm
from fastcov.stats.sketch import Sketch

CHANNELS, WIDTH = 400, 64


def rows_of(seed: int, count: int = 3000, exponent: float = 1.0, sinks: bool = False) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, CHANNELS, generator=generator)
    rows *= torch.arange(1, CHANNELS + 1).float() ** (-exponent / 2)
    rows = rows[:, torch.randperm(CHANNELS, generator=generator)]
    if sinks:
        rows[::20, 11] += 30
    return rows


def both(*parts: Tensor, **options: Any) -> tuple[fastcov.CovarianceState, fastcov.CovarianceState]:
    whole = fastcov.CovarianceState(CHANNELS)
    sketched = fastcov.CovarianceState(CHANNELS, sketch=WIDTH)
    for part in parts:
        whole.update(part, **options)
        sketched.update(part, **options)
    return whole, sketched


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("centered", [False, True])
def test_the_trace_is_exact_and_the_spectrum_has_all_channels(
    dtype: torch.dtype, centered: bool
) -> None:
    whole, sketched = both(*(rows_of(0) + 0.5).to(dtype).split(700))
    expected, found = whole.spectrum(centered), sketched.spectrum(centered)
    # A centred trace is an estimate, which the mean, here far larger, does not spoil.
    assert found.total == pytest.approx(expected.total, rel=1e-6 if not centered else 0.2)
    assert found.channels == CHANNELS
    assert found.count == expected.count
    assert float(found.eigenvalues.sum()) == pytest.approx(found.total, rel=1e-9)
    assert found.sketch is not None
    assert found.sketch.width == WIDTH
    assert "sketched to 64" in repr(found)
    assert sketched.tensors.moment.shape == triangle.zeros(WIDTH + 1).shape


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_squared_norm_is_unbiased_and_the_interval_holds(exponent: float, sinks: bool) -> None:
    rows = rows_of(1, exponent=exponent, sinks=sinks).double()
    matrix = rows.T @ rows / len(rows)
    truth = torch.linalg.eigvalsh(matrix).flip(0)
    total = float(truth.sum())
    generator = torch.Generator().manual_seed(0)
    norms = []
    for _ in range(200):
        signs = torch.randint(0, 2, (CHANNELS, WIDTH), generator=generator).double() * 2 - 1
        sketch = signs.T @ matrix @ signs / WIDTH
        norms.append(float(squared_norm(sketch)))
        lower, upper = head_interval(torch.linalg.eigvalsh(sketch), total)
        head = truth[: len(lower)]
        assert bool(((lower <= head) & (head <= upper)).all())
    mean, spread = torch.tensor(norms).mean(), torch.tensor(norms).std() / 200**0.5
    assert float(mean) == pytest.approx(float(matrix.square().sum()), abs=4 * float(spread))


def test_estimates_are_near_the_truth() -> None:
    for sinks in (False, True):
        whole, sketched = both(rows_of(2, sinks=sinks))
        expected, found = whole.spectrum(), sketched.spectrum()
        assert found.participation_ratio() == pytest.approx(expected.participation_ratio(), rel=0.3)
        assert found.stable_rank() == pytest.approx(expected.stable_rank(), rel=0.3)
        assert found.effective_rank() == pytest.approx(expected.effective_rank(), rel=0.3)
        lower, upper = found.interval
        assert bool((lower <= expected.eigenvalues).all())
        assert bool((expected.eigenvalues <= upper).all())
        bound = found.uncertainty
        assert bool(((found.eigenvalues - expected.eigenvalues).abs() <= bound + 1e-12).all())


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("sinks", [False, True])
def test_the_stable_rank_lies_in_its_interval(exponent: float, sinks: bool) -> None:
    """Where the spectrum is flat the estimate is far off, and the interval still holds."""
    whole, sketched = both(rows_of(7, exponent=exponent, sinks=sinks))
    found = sketched.spectrum()
    low, high = found.stable_rank_interval
    assert low <= whole.spectrum().stable_rank() <= 1.05 * high
    assert low <= found.stable_rank() <= 1.001 * high
    assert high <= found.participation_ratio()


def test_a_summary_tells_the_interval_of_a_sketched_stable_rank() -> None:
    _, sketched = both(rows_of(8))
    spectrum = sketched.spectrum()
    summary = Summary([LayerStatus("wide", CHANNELS, 3000, 0, 0.0, spectrum, "sketched")])
    low, high = spectrum.stable_rank_interval
    assert f"sketched; stable rank between {low:.3g} and {high:.3g}" in str(summary)


def test_a_layer_of_zeros_has_no_stable_rank() -> None:
    _, sketched = both(torch.zeros(50, CHANNELS))
    assert all(end != end for end in sketched.spectrum().stable_rank_interval)


def test_rows_of_few_directions_show_them_all() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(500, 20, generator=generator) @ torch.randn(
        20, CHANNELS, generator=generator
    )
    whole, sketched = both(rows)
    assert whole.spectrum().dim() == sketched.spectrum().dim() == 20
    assert float(sketched.spectrum().eigenvalues[20:].sum()) == 0.0


def test_weights_decay_scaling_and_merging_act_on_the_sums() -> None:
    parts = rows_of(4).split(1000)
    weights = torch.rand(1000, generator=torch.Generator().manual_seed(5))
    weights[3] = 0
    broken = parts[1].clone()
    broken[7, 5] = float("nan")
    state = fastcov.CovarianceState(CHANNELS, sketch=WIDTH)
    other = fastcov.CovarianceState(CHANNELS, sketch=WIDTH)
    state.update(parts[0], weights, row_scale=0.5, decay=0.9)
    state.update(broken.view(10, 100, CHANNELS), decay=0.9)
    other.update(parts[2])
    state.merge(other, scale=0.25)
    wide = [part.double() for part in parts]
    kept = [row for row in range(1000) if row != 7]
    total = (
        0.9 * 0.5 * float((weights.double() * wide[0].square().sum(1)).sum())
        + float(wide[1][kept].square().sum())
        + 0.25 * float(wide[2].square().sum())
    )
    weight = 0.9 * 0.5 * float(weights.double().sum()) + 999 + 250
    assert float(state.weight) == pytest.approx(weight, rel=1e-12)
    assert state.count.tolist() == [999 + 999 + 1000, 1]
    assert state.spectrum().total == pytest.approx(total / weight, rel=1e-6)
    state.scale_(3.0)
    assert state.spectrum().total == pytest.approx(total / weight, rel=1e-6)


def test_order_of_merging_does_not_matter() -> None:
    parts = rows_of(6).split(1000)
    _, together = both(*parts)
    states = [both(part)[1] for part in parts]
    for state in states[1:]:
        states[0].merge(state)
    torch.testing.assert_close(
        states[0].spectrum().eigenvalues, together.spectrum().eigenvalues, rtol=1e-4, atol=1e-7
    )


@pytest.mark.parametrize("layout", ["maps", "channels_last", "strided", "one row"])
def test_layouts_are_read_as_rows(layout: str) -> None:
    maps = torch.randn(3, CHANNELS, 4, 5, generator=torch.Generator().manual_seed(7))
    rows = {
        "maps": maps.permute(0, 2, 3, 1),
        "channels_last": maps.to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
        "strided": maps.permute(0, 2, 3, 1).reshape(-1, CHANNELS)[::2],
        "one row": maps[0, :, 0, 0],
    }[layout]
    sketch = Sketch(CHANNELS, WIDTH)
    found = sketch.project(rows)
    expected = sketch.project(rows.reshape(-1, CHANNELS).clone())
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    norms = rows.reshape(-1, CHANNELS).norm(dim=1)
    torch.testing.assert_close(found[:, WIDTH], norms, rtol=1e-6, atol=0)


def test_float64_precision_keeps_the_bulk_beside_sinks() -> None:
    rows = rows_of(8)
    rows[::50, 3] += 1e5
    state = fastcov.CovarianceState(CHANNELS, sketch=WIDTH)
    state.update(rows, precision="float64")
    spectrum = state.spectrum()
    assert spectrum.total == pytest.approx(float(rows.double().square().sum(1).mean()), rel=1e-12)
    wide = rows.double()
    beside = float(wide.square().sum(1).mean() - wide[:, 3].square().mean())
    assert float(spectrum.eigenvalues[1:].sum()) == pytest.approx(beside, rel=0.3)


def test_copies_checkpoints_and_pickles_go_on() -> None:
    rows = rows_of(9)
    _, state = both(rows)
    for twin in (state.copy(), copy.deepcopy(state), pickle.loads(pickle.dumps(state))):
        twin.update(rows)
        assert twin.spectrum().total == pytest.approx(state.spectrum().total, rel=1e-9)
    fresh = fastcov.CovarianceState(CHANNELS, sketch=WIDTH)
    fresh.load_state_dict(state.state_dict())
    assert torch.equal(fresh.spectrum().eigenvalues, state.spectrum().eigenvalues)
    for wrong in (
        fastcov.CovarianceState(WIDTH + 1),
        fastcov.CovarianceState(CHANNELS + 1, sketch=WIDTH),
    ):
        with pytest.raises(ValueError, match=r"sketch of sizes \(400, 64\)"):
            wrong.load_state_dict(state.state_dict())
    with pytest.raises(ValueError, match="sketch of sizes None"):
        state.load_state_dict(fastcov.CovarianceState(WIDTH + 1).state_dict())


def test_two_states_of_one_width_share_their_signs_and_every_process_has_the_same() -> None:
    first, second = Sketch(CHANNELS, WIDTH), Sketch(CHANNELS, WIDTH)
    rows = rows_of(10, count=2)
    assert torch.equal(first.project(rows), second.project(rows))
    assert first._signs is second._signs
    assert first == second
    assert first != Sketch(CHANNELS, WIDTH + 1)
    one = torch.zeros(CHANNELS)
    one[0] = 8.0
    assert first.project(one)[0, :8].sign().tolist() == [1, -1, -1, -1, -1, 1, -1, 1]


def test_what_a_sketch_does_not_hold_is_refused() -> None:
    _, state = both(rows_of(11, count=10))
    for ask in (state.covariance, state.mean, state.directions, state.whitening, state.inverse):
        with pytest.raises(ValueError, match=r"sketched, 400 channels to 64"):
            ask()
    with pytest.raises(ValueError, match="sketched to None channels into one of 64"):
        state.merge(fastcov.CovarianceState(CHANNELS))
    with pytest.raises(ValueError, match="rows have 65 channels"):
        state.update(torch.randn(3, WIDTH + 1))
    with pytest.raises(ValueError, match="has read 0 rows"):
        fastcov.CovarianceState(CHANNELS, sketch=WIDTH).spectrum()
    for wrong in (1, CHANNELS, 3.0, True):
        with pytest.raises(ValueError, match="from 2 to 399"):
            fastcov.CovarianceState(CHANNELS, sketch=wrong)


def test_a_history_keeps_what_is_known_of_the_sketch(tmp_path: Any) -> None:
    from fastcov.spectra.history import Snapshot

    _, state = both(rows_of(12))
    spectrum = state.spectrum()
    history = fastcov.History(tmp_path / "run")
    history.append(Snapshot(0, 1.0, {"layer": spectrum}))
    found = fastcov.load_history(tmp_path / "run")[0].spectra["layer"]
    assert found.sketch == spectrum.sketch
    assert found.participation_ratio() == spectrum.participation_ratio()
    line = (tmp_path / "run" / "history.jsonl").read_text()
    broken = line.replace('"width": 64', '"width": -1')
    assert broken != line
    (tmp_path / "run" / "history.jsonl").write_text(broken)
    with pytest.raises(ValueError, match="the field 'sketch' is"):
        fastcov.load_history(tmp_path / "run")
