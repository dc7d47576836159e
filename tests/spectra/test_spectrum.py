"""Measures of eigenvalues against closed forms and laws; coverage of the uncertainty bound."""

import math
import pickle
import random
import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fastcov.spectra.spectrum import (
    Spectrum,
    alpha,
    condition_number,
    dim,
    dof,
    effective_rank,
    interval,
    log_determinant,
    participation_ratio,
    power_law,
    rank_at,
    rankme,
    spectral_distance,
    spectral_entropy,
    stable_rank,
    uncertainty,
)

MEASURES = {
    "dim": dim,
    "rank_at": rank_at,
    "dof": dof,
    "effective_rank": effective_rank,
    "participation_ratio": participation_ratio,
    "stable_rank": stable_rank,
    "rankme": rankme,
    "spectral_entropy": spectral_entropy,
    "power_law": lambda x: power_law(x)[0],
}

spectra = st.lists(st.one_of(st.just(0.0), st.floats(1e-6, 1e6)), min_size=1, max_size=40).map(
    lambda values: torch.tensor(values, dtype=torch.float64)
)


@pytest.mark.parametrize("channels", [1, 3, 64, 123])
def test_flat_spectrum_fills_every_direction(channels: int) -> None:
    flat = torch.full((channels,), 0.25, dtype=torch.float64)
    assert dim(flat) == channels
    assert rank_at(flat, 1.0) == channels
    assert dof(flat, 0.25) == channels / 2
    assert torch.allclose(effective_rank(flat), torch.tensor(float(channels)).double())
    assert participation_ratio(flat) == channels
    assert stable_rank(flat) == channels


def test_one_direction() -> None:
    one = torch.tensor([0.0, 7.0, 0.0, 0.0])
    assert dim(one) == rank_at(one) == rank_at(one, 1.0) == 1
    assert dof(one).item() == pytest.approx(1 / 1.001)
    assert effective_rank(one) == participation_ratio(one) == stable_rank(one) == 1


def test_zero_matrix_has_no_direction() -> None:
    zero = torch.zeros(5)
    for name, measure in MEASURES.items():
        if name == "power_law":
            assert measure(zero).isnan()
        else:
            assert measure(zero) == 0, name
    assert dim(zero, 0.0, relative=False) == 0
    assert dof(zero, 1.0) == 0
    assert torch.equal(uncertainty(zero, 1000), zero.double())


def test_formulas_written_out() -> None:
    values = [5.0, 2.0, 0.4, 0.004, 0.0]
    eigenvalues = torch.tensor(values, dtype=torch.float64)
    total = sum(values)
    entropy = -sum(v / total * math.log(v / total) for v in values if v)
    assert dim(eigenvalues) == 3  # 0.004 is not above 1e-3 * 5
    assert dim(eigenvalues, relative=False) == 4
    assert dim(eigenvalues, 0.5) == 1
    assert [int(rank_at(eigenvalues, s)) for s in (0.5, 5 / total, 0.95, 0.999, 1)] == [
        1,
        1,
        3,
        3,
        4,
    ]
    assert dof(eigenvalues, 0.4).item() == pytest.approx(sum(v / (v + 0.4) for v in values))
    assert dof(eigenvalues).item() == pytest.approx(sum(v / (v + 0.005) for v in values))
    assert effective_rank(eigenvalues).item() == pytest.approx(math.exp(entropy))
    assert participation_ratio(eigenvalues).item() == pytest.approx(
        total**2 / sum(v * v for v in values)
    )
    assert stable_rank(eigenvalues).item() == pytest.approx(total / 5)


@pytest.mark.parametrize("exponent", [0.5, 1.0, 2.0, 3.5])
def test_power_law_is_recovered(exponent: float) -> None:
    ranks = torch.arange(1, 201, dtype=torch.float64)
    fitted, error = power_law(3e-7 * ranks**-exponent)
    assert fitted.item() == pytest.approx(exponent, abs=1e-9)
    assert error.item() < 1e-9


def test_power_law_error_is_the_residual_over_the_fitted_ranks() -> None:
    eigenvalues = 2.0 ** -torch.arange(30, dtype=torch.float64)
    cut = int(rank_at(eigenvalues, 0.99))
    x = torch.arange(1, cut + 1, dtype=torch.float64).log()
    design = torch.stack([torch.ones_like(x), x], 1)
    y = eigenvalues[:cut].log()
    solution = torch.linalg.lstsq(design, y).solution
    exponent, error = power_law(eigenvalues)
    assert exponent.item() == pytest.approx(-solution[1].item())
    assert error.item() == pytest.approx((y - design @ solution).square().mean().sqrt().item())
    assert error > 0.1


def test_power_law_needs_two_positive_eigenvalues() -> None:
    exponent, error = power_law(torch.tensor([[3.0, 0.0, 0.0], [4.0, 1.0, 0.0]]))
    assert exponent[0].isnan()
    assert error[0].isnan()
    assert exponent[1].item() == pytest.approx(2.0)
    assert error[1].item() == pytest.approx(0.0, abs=1e-12)


@settings(deadline=None, max_examples=60)
@given(spectra, st.randoms(use_true_random=False), st.floats(-250, 250))
def test_order_scale_and_negatives_do_not_matter(
    eigenvalues: Tensor, generator: random.Random, log10_scale: float
) -> None:
    shuffled = eigenvalues.tolist()
    generator.shuffle(shuffled)
    changed = torch.tensor(shuffled, dtype=torch.float64) * 10.0**log10_scale
    changed = torch.where(changed == 0, -changed.max(), changed)
    for name, measure in MEASURES.items():
        before, after = measure(eigenvalues), measure(changed)
        assert torch.allclose(before.double(), after.double(), rtol=1e-9, equal_nan=True), name


@settings(deadline=None, max_examples=60)
@given(spectra)
def test_measures_stay_in_range_and_order(eigenvalues: Tensor) -> None:
    channels = len(eigenvalues)
    positive = int((eigenvalues > 0).sum())
    ranks = [int(rank_at(eigenvalues, share)) for share in (0.1, 0.5, 0.9, 0.99, 1.0)]
    assert ranks == sorted(ranks)
    assert ranks[-1] <= positive
    assert dim(eigenvalues, 0.0) == positive
    if positive:
        sr, pr, er = (
            m(eigenvalues).item() for m in (stable_rank, participation_ratio, effective_rank)
        )
        assert 1 - 1e-12 <= sr <= channels * (1 + 1e-12)
        assert sr <= pr * (1 + 1e-9)  # tr / max <= tr^2 / sum of squares
        assert pr <= er * (1 + 1e-9)  # Renyi entropies fall with their order
        assert er <= positive * (1 + 1e-9)


def test_batches_equal_single_matrices() -> None:
    torch.manual_seed(0)
    eigenvalues = torch.randn(4, 3, 17).exp()
    for name, measure in MEASURES.items():
        expected = torch.stack([measure(row) for row in eigenvalues.reshape(12, 17)]).reshape(4, 3)
        assert torch.allclose(measure(eigenvalues), expected, rtol=1e-12), name
    lam = torch.rand(4, 3) + 0.1
    assert torch.allclose(dof(eigenvalues, lam)[1, 2], dof(eigenvalues[1, 2], lam[1, 2]))
    assert interval(eigenvalues, 1000)[1].shape == (4, 3, 17)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_any_floating_dtype(dtype: torch.dtype) -> None:
    assert dof(torch.tensor([4.0, 1.0], dtype=dtype), 1.0).item() == pytest.approx(1.3)


def _draw_spectra(true: Tensor, mean: Tensor, rows: int, draws: int) -> Tensor:
    channels = len(true)
    rotation = torch.linalg.qr(torch.randn(channels, channels, dtype=torch.float64)).Q
    normal = torch.randn(draws, rows, channels, dtype=torch.float64)
    samples = normal * (true - mean.square()).sqrt() + mean
    samples = samples @ rotation
    return torch.linalg.eigvalsh(samples.mT @ samples / rows)


TRUE_SPECTRA = {
    "flat": lambda c: torch.ones(c),
    "power law": lambda c: torch.arange(1, c + 1) ** -1.5,
    "geometric": lambda c: 0.5 ** torch.arange(c),
    "half the rank": lambda c: (torch.arange(c) < c // 2).double(),
    "one spike": lambda c: torch.cat([torch.tensor([1000.0]), torch.ones(c - 1)]),
}


@pytest.mark.parametrize("rows_per_channel", [4, 16, 64])
@pytest.mark.parametrize("shape", TRUE_SPECTRA)
@pytest.mark.parametrize("has_mean", [False, True])
def test_interval_covers_the_truth(rows_per_channel: int, shape: str, has_mean: bool) -> None:
    torch.manual_seed(rows_per_channel)
    channels, draws = 24, 120
    true = TRUE_SPECTRA[shape](channels).double()
    mean = torch.zeros(channels).double()
    if has_mean:
        mean[0] = (0.9 * true[0]).sqrt()
    rows = rows_per_channel * channels
    sampled = _draw_spectra(true, mean, rows, draws)
    lower, upper = interval(sampled, rows)
    # LAPACK returns +-1e-16 for the zero eigenvalues of a rank-deficient covariance.
    rounding = 1e-12 * true[0]
    covered = ((lower <= true + rounding) & (true <= upper + rounding)).all(-1)
    assert covered.double().mean() >= 0.95
    descending = sampled.sort(-1, descending=True).values
    error = (descending - true).abs()
    bounded = (error <= uncertainty(sampled, rows) + rounding).all(-1)
    assert bounded.double().mean() >= 0.95


def test_interval_is_not_needlessly_wide() -> None:
    """On a flat spectrum the extreme eigenvalues come within 25 % of the interval's ends."""
    torch.manual_seed(1)
    channels, rows = 128, 64 * 128
    sampled = _draw_spectra(torch.ones(channels).double(), torch.zeros(channels).double(), rows, 8)
    lower, upper = interval(sampled, rows)
    assert upper[..., -1].max() < 1.25
    assert lower[..., 0].min() > 0.8


def test_too_few_rows_bound_nothing() -> None:
    eigenvalues = torch.tensor([2.0, 1.0])
    assert uncertainty(eigenvalues, 0).isinf().all()
    assert uncertainty(eigenvalues, 17).isinf().all()
    assert uncertainty(eigenvalues, 18).isfinite().all()
    assert (interval(eigenvalues, 17)[0] > 0).all()


def test_spectrum_sorts_clamps_and_delegates() -> None:
    values = torch.tensor([0.5, -1e-9, 4.0, 0.001], requires_grad=True)
    spectrum = Spectrum(values, count=1000, total=4.501, name="layer1.conv1")
    assert spectrum.eigenvalues.dtype == torch.float64
    assert not spectrum.eigenvalues.requires_grad
    assert torch.equal(spectrum.eigenvalues, torch.tensor([4.0, 0.5, 0.001, 0.0]).double())
    assert spectrum.channels == 4
    assert spectrum.dim() == 2
    assert spectrum.dim(relative=False, threshold=1e-4) == 3
    assert spectrum.rank_at(0.5) == 1
    assert spectrum.dof() == pytest.approx(dof(values.detach()).item())
    assert spectrum.dof(0.5) == pytest.approx(dof(values.detach(), 0.5).item())
    assert spectrum.effective_rank() == pytest.approx(effective_rank(values.detach()).item())
    assert spectrum.participation_ratio() == participation_ratio(values.detach()).item()
    assert spectrum.stable_rank() == stable_rank(values.detach()).item()
    assert spectrum.power_law().exponent == power_law(values.detach())[0].item()
    assert (spectrum.uncertainty <= uncertainty(values.detach(), 1000)).all()
    assert "layer1.conv1" in repr(spectrum)
    assert isinstance(spectrum.dim(), int)
    assert isinstance(spectrum.rank_at(), int)


def test_spectrum_is_frozen_and_pickles() -> None:
    spectrum = Spectrum(torch.tensor([2.0, 1.0]), 10, 3.0, "a")
    with pytest.raises(AttributeError):
        spectrum.count = 5
    copy = pickle.loads(pickle.dumps(spectrum))
    assert torch.equal(copy.eigenvalues, spectrum.eigenvalues)
    assert (copy.count, copy.total, copy.name) == (10, 3.0, "a")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: dim(x, -0.1), r"threshold .* -0\.1"),
        (lambda x: dim(x, math.nan), "threshold .* nan"),
        (lambda x: dim(x, math.inf), "threshold .* inf"),
        (lambda x: rank_at(x, 0.0), r"share .* 0\.0"),
        (lambda x: rank_at(x, 1.5), r"share .* 1\.5"),
        (lambda x: rank_at(x, math.nan), "share .* nan"),
        (lambda x: dof(x, 0.0), r"lam .* 0\.0"),
        (lambda x: dof(x, math.nan), "lam .* nan"),
        (lambda x: dof(x, torch.ones(5)), r"lam .* \[5\]"),
        (lambda x: uncertainty(x, -1), "count .* -1"),
        (lambda x: Spectrum(x, -3, 1.0), "count .* -3"),
        (lambda x: Spectrum(x, 3, math.nan), "total .* nan"),
        (lambda x: Spectrum(x, 3, -1.0), r"total .* -1\.0"),
        (lambda x: Spectrum(x[None], 3, 1.0, "conv1"), r"'conv1' .* \[1, 2\]"),
    ],
)
def test_bad_arguments_are_named(call: Callable[[Tensor], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call(torch.tensor([2.0, 1.0]))


@pytest.mark.parametrize("measure", [*MEASURES.values(), lambda x: interval(x, 9)])
@pytest.mark.parametrize(
    ("eigenvalues", "message"),
    [
        (torch.tensor([1.0, math.nan, math.inf]), "finite, got nan in 2 of 3"),
        (torch.tensor([-math.inf, 1.0]), "finite, got -inf in 1 of 2"),
        (torch.tensor(1.0), r"shape .* \[\]"),
        (torch.empty(3, 0), r"shape .* \[3, 0\]"),
        (torch.tensor([1, 2]), "floating-point tensor, got torch.int64"),
        (torch.tensor([1j]), "floating-point tensor, got torch.complex64"),
        ([1.0, 2.0], "floating-point tensor, got list"),
    ],
)
def test_bad_eigenvalues_are_named(
    measure: Callable[[Tensor], object], eigenvalues: object, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        measure(eigenvalues)


def test_distance_follows_its_definition() -> None:
    a = Spectrum(torch.tensor([6.0, 3.0, 1.0]), 10, 10.0)
    b = Spectrum(torch.tensor([1.0, 1.0]), 10, 2.0)
    assert spectral_distance(a, b) == pytest.approx(0.5 * (0.1 + 0.2 + 0.1))
    assert spectral_distance(b, a) == pytest.approx(spectral_distance(a, b))
    scaled = Spectrum(a.eigenvalues * 1e200, 10, 1e201)
    assert spectral_distance(a, scaled) == pytest.approx(0, abs=1e-15)
    zero = Spectrum(torch.zeros(2), 10, 0.0)
    assert spectral_distance(zero, a) == spectral_distance(a, zero) == 1
    assert spectral_distance(zero, zero) == 0
    wide = Spectrum(torch.full((1000,), 1e-300, dtype=torch.float64), 10, 1e-297)
    narrow = Spectrum(torch.tensor([1.0]), 10, 1.0)
    assert spectral_distance(wide, narrow) == pytest.approx(0.999)


def test_rankme_is_the_entropy_of_the_singular_values_of_the_rows() -> None:
    torch.manual_seed(0)
    rows = torch.randn(200, 16, dtype=torch.float64) * torch.arange(1, 17) + 1.0
    singular = torch.linalg.svdvals(rows)
    shares = singular / singular.sum() + 1e-7  # as the paper has it
    expected = math.exp(-(shares * shares.log()).sum().item())
    spectrum = Spectrum(torch.linalg.eigvalsh(rows.T @ rows / 200), 200, 1.0)
    assert spectrum.rankme() == pytest.approx(expected, rel=1e-5)
    assert spectrum.rankme() > spectrum.effective_rank()


@pytest.mark.parametrize(("first", "last"), [(12, 100), (1, 20), (3, 500)])
def test_alpha_is_the_weighted_fit_over_its_ranks(first: int, last: int) -> None:
    torch.manual_seed(1)
    eigenvalues = (torch.arange(1, 201) ** -1.2 * (1 + torch.rand(200))).double()
    eigenvalues = eigenvalues.sort(descending=True).values
    ranks = torch.arange(first, min(last, 200) + 1, dtype=torch.float64)
    root = ranks.rsqrt()[:, None]  # a weight of 1 / rank on every square
    design = torch.stack([torch.ones_like(ranks), ranks.log()], 1) * root
    values = eigenvalues[first - 1 : last].log()[:, None] * root
    slope = torch.linalg.lstsq(design, values).solution[1].item()
    assert alpha(eigenvalues, first, last).item() == pytest.approx(-slope, rel=1e-9)
    assert alpha(torch.stack([eigenvalues, 7 * eigenvalues]), first, last).tolist() == (
        pytest.approx([-slope, -slope], rel=1e-9)
    )


def test_alpha_needs_two_ranks_with_variance() -> None:
    assert alpha(torch.ones(12)).isnan()
    assert alpha(torch.tensor([4.0, 1.0, 0.0]), 1, 3).item() == pytest.approx(2.0)
    for first, last in ((0, 5), (5, 5), (9, 3)):
        with pytest.raises(ValueError, match=f"first={first}, last={last}"):
            alpha(torch.ones(4), first, last)


def test_measures_of_the_whole_matrix_follow_torch() -> None:
    torch.manual_seed(2)
    factor = torch.randn(9, 9, dtype=torch.float64)
    matrix = factor @ factor.T
    spectrum = Spectrum(torch.linalg.eigvalsh(matrix), 100, float(matrix.trace()))
    assert spectrum.log_determinant() == pytest.approx(torch.logdet(matrix).item())
    ridged = torch.logdet(matrix + 0.3 * torch.eye(9)).item()
    assert spectrum.log_determinant(ridge=0.3) == pytest.approx(ridged)
    assert spectrum.condition_number() == pytest.approx(torch.linalg.cond(matrix).item())
    shares = spectrum.eigenvalues / spectrum.eigenvalues.sum()
    entropy = torch.distributions.Categorical(shares).entropy().item()
    assert spectrum.spectral_entropy() == pytest.approx(entropy)
    nesum = float((spectrum.eigenvalues / spectrum.eigenvalues[0]).sum())
    assert spectrum.nesum() == pytest.approx(nesum)
    assert spectrum.distance(spectrum) == 0
    assert spectrum.alpha(1, 9) == alpha(spectrum.eigenvalues, 1, 9).item()
    with pytest.raises(ValueError, match="ridge must be finite and >= 0, got -1"):
        log_determinant(spectrum.eigenvalues, -1)


def test_a_singular_matrix_has_no_determinant_and_no_condition() -> None:
    eigenvalues = torch.tensor([[2.0, 0.0], [0.0, 0.0], [2.0, 1.0]])
    assert log_determinant(eigenvalues).tolist()[:2] == [-math.inf, -math.inf]
    assert log_determinant(eigenvalues, 1.0)[1] == 0
    singular, nothing, regular = condition_number(eigenvalues).tolist()
    assert (singular, regular) == (math.inf, 2)
    assert math.isnan(nothing)


@pytest.mark.parametrize("value", ["x", None, [1.0], math.nan, -1])
def test_what_is_no_number_is_named(value: Any) -> None:
    spectrum = Spectrum(torch.ones(4), 100, 4.0)
    with pytest.raises(
        ValueError, match=re.escape(f"threshold must be finite and >= 0, got {value!r}")
    ):
        spectrum.dim(value)
    with pytest.raises(ValueError, match=re.escape(f"share must be in (0, 1], got {value!r}")):
        spectrum.rank_at(value)
    assert spectrum.dim(torch.tensor(0.5)) == 4
