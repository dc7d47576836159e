"""Directions, whitening and inverses, against the libraries whose numbers they are."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from sklearn.decomposition import PCA, IncrementalPCA
from torch import Tensor, nn
from torchmetrics.image.fid import FrechetInceptionDistance

import fastcov
from fastcov.stats.directions import directions_of, inverse_of, whitening_of

CHANNELS = 24


def rows_of(seed: int, count: int = 600) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(CHANNELS, CHANNELS, generator=generator, dtype=torch.float64)
    rows = torch.randn(count, CHANNELS, generator=generator, dtype=torch.float64)
    return rows * torch.linspace(0.3, 3, CHANNELS, dtype=torch.float64) @ mix + 2


def state_of(*batches: Tensor) -> fastcov.CovarianceState:
    state = fastcov.CovarianceState(batches[0].shape[1])
    for batch in batches:
        state.update(batch)
    return state


def test_principal_components_are_those_of_incremental_pca() -> None:
    rows = rows_of(0, count=1000)
    theirs = IncrementalPCA().fit(rows.numpy())  # all components kept: exact, whatever the batches
    state = state_of(*rows.split(170))
    variances, vectors = state.directions(centered=True, correction=1)
    np.testing.assert_allclose(variances, theirs.explained_variance_, rtol=1e-9)
    ours = vectors.T.numpy()
    signs = np.sign((ours * theirs.components_).sum(1, keepdims=True))
    np.testing.assert_allclose(ours * signs, theirs.components_, atol=1e-7)
    scores = ((rows - state.mean()) @ vectors).numpy()
    np.testing.assert_allclose(scores * signs.T, theirs.transform(rows.numpy()), atol=1e-6)
    np.testing.assert_allclose(
        state.spectrum(centered=True, correction=1).eigenvalues, theirs.explained_variance_
    )


def test_k_directions_are_the_first_with_their_largest_entry_positive() -> None:
    state = state_of(rows_of(1))
    values, vectors = state.directions()
    few = state.directions(k=3)
    assert torch.equal(few.eigenvalues, values[:3])
    assert torch.equal(few.vectors, vectors[:, :3])
    assert bool((values.diff() <= 0).all())
    assert bool((vectors.amax(0) == vectors.abs().amax(0)).all())
    restored = (vectors * values) @ vectors.T
    torch.testing.assert_close(restored, state.covariance(), rtol=1e-10, atol=1e-8)


@pytest.mark.parametrize("k", [0, CHANNELS + 1, -1, 2.0, True])
def test_k_out_of_range_is_refused(k: Any) -> None:
    with pytest.raises(ValueError, match=f"from 1 to {CHANNELS}"):
        state_of(rows_of(2)).directions(k)


def test_eigenvalues_below_zero_count_as_zero() -> None:
    matrix = torch.tensor([[1.0, 1.0], [1.0, 1.0 - 1e-15]], dtype=torch.float64)
    assert float(directions_of(matrix).eigenvalues[1]) == 0.0


@pytest.mark.parametrize("is_weighted", [False, True])
@pytest.mark.parametrize("correction", [0, 1, 2.5])
def test_correction_is_that_of_torch_cov(is_weighted: bool, correction: float) -> None:
    rows = rows_of(3)
    weights = torch.rand(len(rows), dtype=torch.float64) if is_weighted else None
    state = fastcov.CovarianceState(CHANNELS)
    state.update(rows, weights)
    # torch takes whole corrections alone; the definition: sum of w (x - m)^2 over W - c sum w^2 / W
    given = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights
    total = given.sum()
    centred = rows - (given @ rows) / total
    expected = (centred.T * given) @ centred / (total - correction * given.square().sum() / total)
    torch.testing.assert_close(
        state.covariance(centered=True, correction=correction), expected, rtol=1e-9, atol=1e-9
    )
    if correction in (0, 1):
        theirs = torch.cov(rows.T, correction=int(correction), aweights=weights)
        torch.testing.assert_close(expected, theirs, rtol=1e-9, atol=1e-9)


def test_rows_no_more_than_the_correction_give_nan_and_an_error_by_name() -> None:
    state = state_of(rows_of(4, count=1))
    assert bool(state.covariance(correction=1).isnan().all())
    for ask in (state.spectrum, state.directions):
        with pytest.raises(ValueError, match=r"has read 1 rows.*more than correction=1"):
            ask(correction=1)
    with pytest.raises(ValueError, match="has read 0 rows"):
        fastcov.CovarianceState(3).whitening()
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=r"correction=.*at least 0"):
            state.covariance(correction=wrong)


class Features(nn.Module):
    """Stands for Inception: the images are their own features."""

    num_features = CHANNELS

    def forward(self, images: Tensor) -> Tensor:
        return images


def test_frechet_distance_is_that_of_torchmetrics() -> None:
    real, fake = rows_of(5).float(), rows_of(6).float() * 1.2 + 1
    metric = FrechetInceptionDistance(feature=Features(), normalize=True).set_dtype(torch.float64)
    metric.update(real, real=True)
    metric.update(fake, real=False)
    a, b = state_of(*real.split(100)), state_of(fake)
    S, T = (state.covariance(centered=True, correction=1) for state in (a, b))
    shared = torch.linalg.eigvals(S @ T).sqrt().real.sum()
    distance = (a.mean() - b.mean()).square().sum() + S.trace() + T.trace() - 2 * shared
    assert float(distance) == pytest.approx(float(metric.compute()), rel=1e-5)


def test_hessian_of_a_linear_layer_is_twice_the_inputs_second_moment() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4, bias=False))
    tracker = fastcov.track(model, rows="all", where="input")
    seen: list[Tensor] = []
    model[2].register_forward_pre_hook(lambda _, args: seen.append(args[0].detach().double()))
    for _ in range(3):
        model(torch.randn(100, 8))
    X = torch.cat(seen)
    expected = 2 / len(X) * X.T @ X
    torch.testing.assert_close(2 * tracker.covariance("2:in"), expected, rtol=1e-5, atol=1e-6)
    # The Hessian of the mean squared error in one output's weights, by autograd.
    target = torch.randn(len(X), dtype=torch.float64)
    loss = torch.autograd.functional.hessian(
        lambda weights: (X @ weights - target).square().mean(), torch.zeros(16).double()
    )
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-12)


def test_white_rows_have_the_identity_for_covariance() -> None:
    rows = rows_of(7)
    state = state_of(rows)
    white = (rows - state.mean()) @ state.whitening()
    torch.testing.assert_close(
        torch.cov(white.T, correction=0), torch.eye(CHANNELS).double(), atol=1e-8, rtol=0
    )
    theirs = PCA(whiten=True).fit(rows.numpy())
    rotated = torch.from_numpy(theirs.transform(rows.numpy()) @ theirs.components_)
    factor = (len(rows) / (len(rows) - 1)) ** 0.5  # scikit-learn divides by one row less
    torch.testing.assert_close(white, rotated * factor, atol=1e-6, rtol=0)
    uncentred = rows @ state.whitening(centered=False)
    torch.testing.assert_close(
        uncentred.T @ uncentred / len(rows), torch.eye(CHANNELS).double(), atol=1e-8, rtol=0
    )


def test_inverse_is_that_of_the_damped_second_moment() -> None:
    rows = rows_of(8)
    state = state_of(rows)
    damped = rows.T @ rows / len(rows) + 0.1 * torch.eye(CHANNELS).double()
    torch.testing.assert_close(state.inverse(0.1), torch.linalg.inv(damped), rtol=1e-8, atol=1e-10)


def test_a_singular_matrix_is_refused_with_the_remedy() -> None:
    singular = torch.ones(3, 3, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"eps=0.0 is singular.*larger eps"):
        whitening_of(singular, 0.0)
    with pytest.raises(ValueError, match=r"damping=0.0 is singular.*larger damping"):
        inverse_of(singular, 0.0)
    assert bool(whitening_of(singular, 0.1).isfinite().all())
    for wrong in (-1e-3, float("nan")):
        with pytest.raises(ValueError, match=f"damping={wrong}: expected"):
            inverse_of(singular, wrong)


def test_tracker_gives_a_layers_directions() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 3))
    tracker = fastcov.track(model, rows="all")
    for _ in range(4):
        model(torch.randn(200, 6))
    found = tracker.directions("0", k=2, centered=True, correction=1)
    count = tracker.count("0")
    expected = torch.linalg.eigvalsh(tracker.covariance("0", centered=True)) * count / (count - 1)
    torch.testing.assert_close(found.eigenvalues, expected.flip(0)[:2])
    assert found.vectors.shape == (10, 2)
    torch.testing.assert_close(
        tracker.directions("0").eigenvalues, tracker.spectrum("0").eigenvalues, atol=1e-12, rtol=0
    )
    with pytest.raises(KeyError, match="no layer 'nought'"):
        tracker.directions("nought")
