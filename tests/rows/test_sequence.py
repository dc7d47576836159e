"""The budget, the carried fractions, and that sampling is unbiased."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastcov
from fastcov.ops import library
from fastcov.ops.reference import sample_index_reference
from fastcov.rows.layout import ActivationLayout
from fastcov.rows.sequence import (
    fixed_point,
    rows_due,
    sequence_phase,
)
from fastcov.rows.view import Layout, row_view
from fastcov.stats.layer import Layer


@given(
    st.floats(1e-6, 1.0),
    st.lists(st.integers(1, 10**6), min_size=1, max_size=50),
)
def test_fractions_carry_over(fraction: float, offers: list[int]) -> None:
    carry, total = 0, 0
    for offered in offers:
        due, carry = rows_due(offered, fixed_point(fraction), carry)
        assert 0 <= due <= offered + 1
        total += due
    assert total == pytest.approx(fraction * sum(offers), abs=1.01)


def test_layers_and_ranks_start_elsewhere() -> None:
    phases = {sequence_phase(name, rank) for name in ("a", "b") for rank in range(8)}
    assert len(phases) == 16


LAYOUTS = {
    "channels_last": lambda x: x.to(memory_format=torch.channels_last).permute(0, 2, 3, 1),
    "nchw": lambda x: x.permute(0, 2, 3, 1),
    "tokens": lambda x: x.flatten(2).mT.contiguous(),
    "vectors": lambda x: x.flatten(2).mT.reshape(-1, x.shape[1]),
    # [T, B, C], as attention and recurrent modules have it unless batch_first
    "sequence_first": lambda x: row_view(
        x.flatten(2).permute(2, 0, 1).contiguous(), Layout.SEQUENCE_FIRST
    ),
    "sliced_tokens": lambda x: torch.cat(2 * [x.flatten(2).mT], 2)[..., 1 : x.shape[1] + 1],
    "strided_maps": lambda x: (
        x.repeat_interleave(2, 2).repeat_interleave(3, 3)[:, :, ::2, ::3].permute(0, 2, 3, 1)
    ),
}


@pytest.mark.parametrize("weighting", ["position", "image"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_sampled_mean_over_draws_is_the_full_covariance(layout: str, weighting: str) -> None:
    generator = torch.Generator().manual_seed(5)
    images = torch.randn(4, 3, 6, 10, generator=generator).cumsum(3)  # neighbours correlate
    images *= torch.tensor([1.0, 2.0, 3.0, 4.0])[:, None, None, None]
    rows = LAYOUTS[layout](images)
    flat = rows.reshape(-1, 3).double()
    full = flat.T @ flat / len(flat)
    draws = []
    for draw in range(400):
        reader = Layer(
            "layer",
            weighting=weighting,
            decay=None,
            phase=sequence_phase("layer", draw),
            fraction=0.0625,
        )
        reader.begin_step(0)
        reader.read(rows, ActivationLayout(rows))
        reader.end_step()
        reader.flush()
        draws.append(reader.state.covariance())
    stack = torch.stack(draws)
    error = (stack.mean(0) - full).abs()
    assert bool((error < 4 * stack.std(0) / math.sqrt(len(draws)) + 1e-9).all())


@pytest.mark.parametrize("layout", LAYOUTS)
def test_moving_from_step_to_step_visits_every_position_equally_often(layout: str) -> None:
    """Rows are one-hot in their position and image, so that the moment's diagonal counts visits."""
    batch, height, width = 2, 4, 6
    count = batch * height * width
    rows = torch.eye(count).view(batch, height, width, count).permute(0, 3, 1, 2)
    reader = Layer(
        "layer", weighting="position", decay=None, phase=sequence_phase("layer"), fraction=0.07
    )
    view = LAYOUTS[layout](rows)
    steps = 600
    for step in range(steps):
        reader.begin_step(step)
        reader.read(view, ActivationLayout(view))
        reader.end_step()
    reader.flush()
    assert reader.state is not None
    assert int(reader.state.count[0]) == pytest.approx(0.07 * count * steps, abs=1)
    visits = (reader.state.covariance().diag() * reader.state.weight).round()
    mean = 0.07 * steps
    assert float(visits.min()) >= mean - 4
    assert float(visits.max()) <= mean + 4


@pytest.mark.parametrize("ranks", [2, 8])
def test_ranks_share_few_positions(ranks: int) -> None:
    """Every rank reads 10 % of its batch: together they see nearly the independent share."""
    positions, images, samples = 196, 4, 78
    total = positions * images
    seen = [
        set(
            sample_index_reference(
                positions, images, 0, samples, 1, sequence_phase("layer1.conv", rank)
            )
        )
        for rank in range(ranks)
    ]
    assert all(len(rank) == samples for rank in seen)
    assert len({frozenset(rank) for rank in seen}) == ranks
    independent = total * (1 - (1 - samples / total) ** ranks)
    assert len(set.union(*seen)) >= 0.85 * independent


@pytest.mark.parametrize("rows_per_channel", [4, 16, 64])
def test_uncertainty_of_sampled_gaussian_rows_covers_the_truth(rows_per_channel: int) -> None:
    """Through the whole path: layer, sampling, buffer, state, eigenvalues, bound."""
    channels, batch, draws = 16, 128, 60
    model = torch.nn.Linear(channels, channels, bias=False)
    scale = torch.logspace(0, -2, channels)
    torch.nn.init.eye_(model.weight)
    true = scale.double().square().sort(descending=True).values
    generator = torch.Generator().manual_seed(rows_per_channel)
    covered = 0
    for _ in range(draws):
        with fastcov.track(model, rows=0.25) as tracker:
            for _ in range(rows_per_channel * channels * 4 // batch):
                model(torch.randn(batch, channels, generator=generator) * scale)
        spectrum = tracker.spectrum("")
        assert spectrum.count == rows_per_channel * channels
        error = (spectrum.eigenvalues - true).abs()
        covered += bool((error <= spectrum.uncertainty).all())
    assert covered >= 0.87 * draws  # 95 % less three standard errors of as many draws


@pytest.mark.parametrize("rows", ["all", 0.5])
@pytest.mark.parametrize("sizes", [(8, 8), (2, 24)], ids=["equal", "unequal"])
def test_uncertainty_of_image_weighted_rows_covers_the_truth(
    sizes: tuple[int, int], rows: str | float
) -> None:
    """Where a few rows of small images carry most of the weight, they are what counts."""
    channels, draws = 8, 60
    model = torch.nn.Conv2d(channels, channels, 1, bias=False)
    scale = torch.logspace(0, -2, channels)[:, None, None]
    torch.nn.init.dirac_(model.weight)
    true = scale.double().flatten().square()
    generator = torch.Generator().manual_seed(1)
    covered = 0
    for _ in range(draws):
        with fastcov.track(model, rows=rows, weighting="image") as tracker:
            for _ in range(16):
                for size in sizes:
                    model(torch.randn(2, channels, size, size, generator=generator) * scale)
        spectrum = tracker.spectrum("")
        error = (spectrum.eigenvalues - true).abs()
        covered += bool((error <= spectrum.uncertainty).all())
    read = tracker.count("")
    positions = [size * size for size in sizes]
    share = (2 / sum(1 / count for count in positions)) / (sum(positions) / 2)
    assert spectrum.count == pytest.approx(share * read, rel=0.02)
    assert covered >= 0.87 * draws  # 95 % less three standard errors of as many draws


def test_equal_layers_empty_their_buffers_in_different_steps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(8)))
    tracker = fastcov.track(model, rows=1)
    updates: list[int] = []

    def counted(*arguments: Any) -> None:
        updates[-1] += 1
        library.accumulate_(*arguments)

    monkeypatch.setattr(library, "ACCUMULATE", dict.fromkeys(library.ACCUMULATE, counted))
    for _ in range(200):
        updates.append(0)
        model(torch.randn(4, 8))
    # 16 rows fill a buffer: 8 layers in 16 steps, not two in one.
    assert sum(updates[32:]) == 8 * 168 // 16
    assert max(updates) == 1
    assert all(tracker.count(name) == 200 for name in tracker.names())


def test_a_change_of_shape_or_memory_order_is_read_right() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 1))
    tracker = fastcov.track(model, rows="all")
    truth = torch.zeros(4, 4, dtype=torch.float64)
    shapes = [(2, 3, 5, 5), (2, 3, 5, 5), (2, 3, 4, 6), (3, 5, 5), (2, 3, 5, 5)]
    for number, shape in enumerate(shapes):
        image = torch.randn(shape)
        if number == 4:
            image = image.to(memory_format=torch.channels_last)
        flat = model(image).detach().movedim(-3, -1).reshape(-1, 4).double()
        truth += flat.T @ flat
    assert tracker.count("0") == 50 + 50 + 48 + 25 + 50
    measured = tracker.covariance("0") * tracker.count("0")
    torch.testing.assert_close(measured, truth, rtol=1e-5, atol=1e-5)
