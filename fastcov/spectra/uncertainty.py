"""Sampling error of eigenvalues, by simulating the covariances that such a spectrum comes from.

Bounds in closed form (Davidson and Szarek 2001, through Ostrowski's theorem) hold for the worst
spectrum, a flat one, and are far too wide for others. Here a population that is consistent with the
sampled eigenvalues, Stein's estimate (Lin and Perlman 1985), is sampled again: how far its sampled
eigenvalues fall from its own is one part of the error. The other part is that nobody knows the
population. A flat part of a spectrum, sampled, looks like a slope, and rows alone do not tell
whether it is flat, slopes or has a step: neighbours that a flat spectrum would spread as far may
all be equal to their mean.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

MOST_SIMULATED_CHANNELS = 256
"""Widest layers that are simulated, in about a second. Wider ones get the bound in closed form."""

_QUANTILE = 0.95  # of the simulated errors
_SAMPLES, _FEW_SAMPLES = 100, 40  # a wide spectrum is nearly the same in each
_NARROW = 64  # channels


def gaussian_rows(
    count: int, excess_kurtosis: float = 0.0, squared_correlations: float = 0.0
) -> int:
    r"""Number of independent Gaussian rows that tell as much about a covariance as some others do.

    .. math:: \frac{N}{(1 + \kappa / 2)(1 + 2 \sum_{k > 0} \rho_k^2)}

    Both factors are those of the variance of a second moment: neighbouring positions of a feature
    map, or tokens of a sequence, repeat each other, and heavy tails let few rows decide.

    A kurtosis does not tell whether the values of a row are heavy-tailed one by one, or all of them
    together, by a scale of the row. The second spoils a covariance more, and the number holds for
    both: a 95 % bound of such spectra covered 97 % of those of rows with a scale, and 99 % of those
    of independent values (benchmarks/results/uncertainty-coverage.md).

    Args:
        count: Rows N.
        excess_kurtosis: Of a direction's values, kappa, at least 0: 0 for Gaussian rows, 3 for
            Laplace, 6 / (v - 4) for Student's t with v degrees of freedom.
        squared_correlations: Sum of the squared autocorrelations rho_k between a row and those
            behind it, at least 0: (m - 1) / 2 for rows that come in groups of m equal ones.

    Returns:
        Whole number, to be given as the ``count`` of a spectrum.

    Raises:
        ValueError: If an argument is negative or not finite.

    Example:
        >>> gaussian_rows(8000, squared_correlations=1.5), gaussian_rows(8000, excess_kurtosis=3.0)
        (2000, 3200)
    """
    for name, value in (
        ("count", count),
        ("excess_kurtosis", excess_kurtosis),
        ("squared_correlations", squared_correlations),
    ):
        if not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a number of at least 0, got {value}")
    return int(count / ((1 + excess_kurtosis / 2) * (1 + 2 * squared_correlations)))


def error_bound(eigenvalues: Tensor, count: int) -> Tensor:
    r"""95 % bound on all :math:`|\hat\lambda_i - \lambda_i|` of independent Gaussian rows at once.

    Args:
        eigenvalues: Descending, not negative, float64; at most
            :data:`MOST_SIMULATED_CHANNELS`. [C]
        count: Rows N, more than C.

    Returns:
        float64; 0 where an eigenvalue is 0. [C]
    """
    channels = len(eigenvalues)
    largest = float(eigenvalues[0])
    if largest == 0:
        return torch.zeros_like(eigenvalues)
    sampled = eigenvalues / largest
    factors = _factors(channels, count)
    simulated = _simulated(_stein(sampled, count), factors) * sampled
    # Both numbers were found by trying: benchmarks/uncertainty_coverage.py. Where rows are few,
    # Stein's estimate is off too.
    bound = (simulated + 0.4 * _unknown(sampled, count)) * (1 + 0.5 * channels / count)
    return bound * largest


def _factors(channels: int, count: int) -> Tensor:
    """Triangular factors of covariances of white rows (Bartlett): the same ones in every call."""
    generator = torch.Generator("cpu").manual_seed(0)
    samples = _SAMPLES if channels <= _NARROW else _FEW_SAMPLES
    here: dict[str, Any] = {"dtype": torch.float64, "device": "cpu"}
    normal = torch.randn(samples, channels, channels, generator=generator, **here)
    freedom = count - torch.arange(channels, **here)
    spread = 2 / (9 * freedom)
    # Wilson and Hilferty 1931: the cube root of chi-squared is nearly normal.
    chi_squared = freedom * (1 - spread + normal.diagonal(dim1=-2, dim2=-1) * spread.sqrt()) ** 3
    factors = normal.tril(-1) + torch.diag_embed(chi_squared.clamp_min(0).sqrt())
    return factors / math.sqrt(count)


def _simulated(population: Tensor, factors: Tensor) -> Tensor:
    # Bound on the errors as a share of the sampled eigenvalues, the same number of errors wide for
    # all of them. [C]
    roots = population.sqrt()[:, None] * factors
    sampled = torch.linalg.eigvalsh(roots @ roots.mT).flip(-1)
    tiny = torch.finfo(torch.float64).tiny
    share = (sampled - population).abs() / sampled.clamp_min(tiny)
    share = torch.where(population > 0, share, 0.0)
    typical = share.square().mean(0).sqrt().clamp_min(tiny)
    return torch.quantile((share / typical).amax(-1), _QUANTILE) * typical


def _stein(sampled: Tensor, count: int) -> Tensor:
    """Stein's estimate of the eigenvalues, made monotone by pooling neighbours."""
    channels = len(sampled)
    gaps = sampled[:, None] - sampled[None, :]
    repulsion = torch.where(gaps == 0, 0.0, 1 / gaps).sum(1) * sampled
    alphas = (count - channels + 1 + 2 * repulsion) / count
    blocks: list[tuple[float, float, int]] = []  # sums of eigenvalues, of alphas, members
    for value, alpha in zip(sampled.tolist(), alphas.tolist(), strict=True):
        block = (value, alpha, 1)
        while blocks and (block[1] <= 0 or block[0] * blocks[-1][1] >= blocks[-1][0] * block[1]):
            before = blocks.pop()
            block = (block[0] + before[0], block[1] + before[1], block[2] + before[2])
        blocks.append(block)
    estimate = [value / alpha for value, alpha, members in blocks for _ in range(members)]
    return torch.tensor(estimate, dtype=torch.float64, device="cpu").clamp_min(0)


def _unknown(sampled: Tensor, count: int) -> Tensor:
    """Largest less smallest mean of the neighbours that a flat spectrum would spread as far. [C]

    The largest mean is that of neighbours before an eigenvalue, the smallest of those behind.
    """
    channels = len(sampled)
    spreads = [_flat_spread(members, count) for members in range(1, channels + 1)]
    index = torch.arange(channels, device="cpu")
    members = (index[None, :] - index[:, None]).clamp_min(0)  # from row to column, less 1
    ratios = torch.tensor(spreads, dtype=torch.float64, device="cpu")[members]
    is_flat = (sampled[:, None] <= sampled[None, :] * ratios).triu(1)
    sums = sampled.cumsum(0)
    means = (sums[None, :] - sums[:, None] + sampled[:, None]) / (members + 1)
    high = torch.where(is_flat, means, 0.0).amax(0)
    low = torch.where(is_flat, means, math.inf).amin(1)
    return torch.maximum(high, sampled) - torch.minimum(low, sampled)


def _flat_spread(members: int, count: int) -> float:
    # Largest over smallest eigenvalue of white rows, each one standard deviation of the law of
    # Tracy and Widom beyond its centre (Johnstone 2001).
    rows, channels = math.sqrt(count - 0.5), math.sqrt(members - 0.5)
    high = (rows + channels) ** 2 + (rows + channels) * (1 / rows + 1 / channels) ** (1 / 3)
    low = (rows - channels) ** 2 - (rows - channels) * (1 / channels - 1 / rows) ** (1 / 3)
    return high / low if low > 0 else math.inf
