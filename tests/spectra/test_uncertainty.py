"""Coverage of Spectrum.uncertainty: of Gaussian, heavy-tailed and correlated rows."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastcov.spectra.spectrum import Spectrum, uncertainty
from fastcov.spectra.uncertainty import gaussian_rows

TRIALS = 120

pytestmark = pytest.mark.slow
RANKS = torch.arange(1, 13, dtype=torch.float64)
POPULATIONS = {
    "flat": torch.ones(12, dtype=torch.float64),
    "power law": RANKS**-1,
    "steep": RANKS**-2,
    "spikes": torch.cat([torch.tensor([100.0, 30.0]), torch.ones(10)]).double(),
    "step": torch.where(RANKS <= 3, 1.0, 0.01).double(),
    # Sampled, its eigenvalues look as those of a slope or of a flat spectrum do.
    "two levels": torch.where(RANKS <= 6, 2.0, 1.0).double(),
}


def gaussian(count: int, generator: torch.Generator) -> Tensor:
    return torch.randn(count, 12, generator=generator, dtype=torch.float64)


def coverage(
    population: Tensor, count: int, draw: Callable[[int, torch.Generator], Tensor], told: int
) -> float:
    generator, covered = torch.Generator().manual_seed(5), 0
    for _ in range(TRIALS):
        rows = draw(count, generator) * population.sqrt()
        sampled = torch.linalg.eigvalsh(rows.T @ rows / count)
        spectrum = Spectrum(sampled, told, float(sampled.sum()))
        error = (spectrum.eigenvalues - population).abs()
        covered += bool((error <= spectrum.uncertainty).all())
    return covered / TRIALS


@pytest.mark.parametrize("rows_per_channel", [4, 16, 64])
def test_coverage_of_gaussian_rows(rows_per_channel: int) -> None:
    """Of all eigenvalues at once; 0.02 is the standard error of one of the six shares."""
    count = 12 * rows_per_channel
    shares = [coverage(p, count, gaussian, count) for p in POPULATIONS.values()]
    assert min(shares) >= 0.89
    assert 0.94 <= sum(shares) / len(shares) <= 0.995


def students(freedom: int, shares_scale: bool) -> Callable[[int, torch.Generator], Tensor]:
    """Student's t of unit variance, each value or each row on its own scale."""

    def draw(count: int, generator: torch.Generator) -> Tensor:
        width = 1 if shares_scale else 12
        squares = torch.randn(count, freedom, width, generator=generator, dtype=torch.float64)
        scale = squares.square().sum(1) / (freedom - 2)
        return gaussian(count, generator) / scale.sqrt()

    return draw


@pytest.mark.parametrize("shares_scale", [True, False])
def test_coverage_of_heavy_tailed_rows(shares_scale: bool) -> None:
    count, draw = 12 * 32, students(8, shares_scale)
    told = gaussian_rows(count, excess_kurtosis=6 / (8 - 4))
    shares = [coverage(p, count, draw, told) for p in POPULATIONS.values()]
    assert min(shares) >= 0.91
    assert 0.93 <= sum(shares) / len(shares) <= 1.0


def groups_of_4(count: int, generator: torch.Generator) -> Tensor:
    return gaussian(count // 4, generator).repeat_interleave(4, 0)


def neighbours(count: int, generator: torch.Generator) -> Tensor:
    """Each row 0.8 times the row before, and something new."""
    rows = gaussian(count, generator)
    for row in range(1, count):
        rows[row] = 0.8 * rows[row - 1] + 0.6 * rows[row]
    return rows


def test_coverage_of_correlated_rows() -> None:
    count = 12 * 64
    told = gaussian_rows(count, squared_correlations=1.5)
    shares = [coverage(p, count, groups_of_4, told) for p in POPULATIONS.values()]
    assert min(shares) >= 0.91
    assert 0.94 <= sum(shares) / len(shares) <= 0.995
    # Taken for independent, they lie outside nearly always: nothing in their spectrum tells.
    assert coverage(POPULATIONS["flat"], count, groups_of_4, count) < 0.5


def test_coverage_of_rows_that_resemble_their_neighbours() -> None:
    count = 12 * 64
    told = gaussian_rows(count, squared_correlations=0.64 / (1 - 0.64))
    assert coverage(POPULATIONS["power law"], count, neighbours, told) >= 0.93


def test_the_bound_is_tighter_than_the_closed_form() -> None:
    for name, population in POPULATIONS.items():
        sampled = population * 1.0
        spectrum = Spectrum(sampled, 192, float(sampled.sum()))
        closed = uncertainty(sampled, 192)
        assert float(spectrum.uncertainty[0]) < float(closed[0]) * (0.75 if name == "flat" else 0.5)
        assert torch.equal(spectrum.uncertainty, spectrum.uncertainty)


@pytest.mark.parametrize("scale", [1e-300, 1e-30, 1e30, 1e300])
def test_the_bound_scales_with_the_eigenvalues(scale: float) -> None:
    plain = Spectrum(RANKS, 200, 78.0).uncertainty
    scaled = Spectrum(RANKS * scale, 200, 78.0 * scale).uncertainty
    torch.testing.assert_close(scaled, plain * scale, rtol=1e-9, atol=0)


def test_channels_without_variance_have_no_error() -> None:
    bound = Spectrum(torch.tensor([2.0, 1.0, 0.0, 0.0]), 100, 3.0).uncertainty
    assert bound[:2].gt(0).all()
    assert not bound[2:].any()
    assert not Spectrum(torch.zeros(3), 100, 0.0).uncertainty.any()
    assert Spectrum(torch.ones(12), 12, 12.0).uncertainty.isinf().all()
    assert Spectrum(torch.ones(1), 1000, 1.0).uncertainty.isfinite().all()


def test_wide_spectra_take_the_closed_form() -> None:
    wide = Spectrum(torch.ones(300), 5000, 300.0)
    assert torch.equal(wide.uncertainty, uncertainty(wide.eigenvalues, 5000))


def test_random_numbers_of_the_caller_stay_as_they_are() -> None:
    before = torch.get_rng_state()
    assert Spectrum(RANKS, 200, 78.0).uncertainty.isfinite().all()
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("wrong", [-1.0, float("nan"), float("inf")])
def test_equivalent_rows_refuse_what_is_no_number(wrong: float) -> None:
    with pytest.raises(ValueError, match="excess_kurtosis must be"):
        gaussian_rows(100, excess_kurtosis=wrong)
    with pytest.raises(ValueError, match="squared_correlations must be"):
        gaussian_rows(100, squared_correlations=wrong)
