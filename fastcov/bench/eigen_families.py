"""Families of symmetric matrices on which eigenvalue solvers lose digits, by name.

The modes are those of LAPACK's test matrices (dlatms): a chosen spectrum, randomly rotated.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

_F64 = torch.float64
_CONDITION = 1e6


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def rotated(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A matrix of these eigenvalues in a random basis. [n, n], float64"""
    n = len(eigenvalues)
    square = torch.randn(n, n, generator=_generator(seed), dtype=_F64)
    basis, _ = torch.linalg.qr(square)
    matrix: Tensor = (basis * eigenvalues.double()) @ basis.T
    return matrix


def cluster(n: int, center: float = 1.001, coupling: float = 0.01) -> Tensor:
    """Cluster ``center (I + coupling J / n)``, J all ones: n - 1 equal eigenvalues, one above."""
    return center * (torch.eye(n, dtype=_F64) + coupling / n * torch.ones(n, n, dtype=_F64))


def _two_clusters(n: int) -> Tensor:
    """Eigenvalues of opposite sign: the mean of the diagonal is near neither."""
    return torch.block_diag(cluster(n - n // 2), -cluster(n // 2, 0.91)) if n > 1 else cluster(n)


def _exchange(n: int) -> Tensor:
    """Large entries off the diagonal: row i of the identity is exchanged with row i + n/2."""
    order = torch.arange(n).roll(n // 2) if n % 2 == 0 else torch.arange(n).flip(0)
    return 1.001 * (torch.eye(n, dtype=_F64)[order] + 0.01 / n)


def _alternating(n: int) -> Tensor:
    signs = torch.where(torch.arange(n) % 2 == 0, 1.001, -0.87).double()
    return torch.diag(signs) + 0.01 / n


def _hartley(n: int) -> Tensor:
    angle = 2 * math.pi / n * torch.outer(torch.arange(n), torch.arange(n)).double()
    return angle.cos() + angle.sin()


def _random(n: int) -> Tensor:
    square = torch.randn(n, n, generator=_generator(n), dtype=_F64)
    return square + square.T


def _uniform(n: int) -> Tensor:
    square = torch.rand(n, n, generator=_generator(n), dtype=_F64)
    return square + square.T


def _covariance(n: int, mean: float = 0.0) -> Tensor:
    rows = torch.randn(2 * n, n, generator=_generator(n), dtype=_F64) + mean
    rows *= torch.logspace(0, -2, n, dtype=_F64)
    return rows.T @ rows / (2 * n)


def _few_rows(n: int) -> Tensor:
    rows = torch.randn(5, n, generator=_generator(n), dtype=_F64).abs()
    return rows.T @ rows


def _tridiagonal(diagonal: Tensor, coupling: Tensor) -> Tensor:
    return torch.diag(diagonal.double()) + torch.diag(coupling, 1) + torch.diag(coupling, -1)


def _wilkinson(n: int) -> Tensor:
    middle = (torch.arange(n, dtype=_F64) - (n - 1) / 2).abs()
    return _tridiagonal(middle, torch.ones(n - 1, dtype=_F64))


def _glued_wilkinson(n: int) -> Tensor:
    coupling = torch.ones(n - 1, dtype=_F64)
    coupling[20::21] = 1e-7
    return _tridiagonal((torch.arange(n) % 21 - 10).abs(), coupling)


def _arrow(n: int) -> Tensor:
    matrix = torch.diag(torch.linspace(1, 2, n, dtype=_F64))
    matrix[0] = 1
    matrix[:, 0] = 1
    return matrix


def _minimum(n: int) -> Tensor:
    index = torch.arange(1, n + 1, dtype=_F64)
    return torch.minimum(index[:, None], index)


def _hilbert(n: int) -> Tensor:
    index = torch.arange(n, dtype=_F64)
    return 1 / (index[:, None] + index + 1)


def _modes(n: int) -> list[Tensor]:
    largest = torch.full((n,), 1 / _CONDITION, dtype=_F64)
    largest[0] = 1
    smallest = torch.ones(n, dtype=_F64)
    smallest[-1] = 1 / _CONDITION
    uniform = torch.rand(n, generator=_generator(n), dtype=_F64)
    return [
        largest,
        smallest,
        torch.logspace(0, -math.log10(_CONDITION), n, dtype=_F64),
        torch.linspace(1, 1 / _CONDITION, n, dtype=_F64),
        torch.exp(-math.log(_CONDITION) * uniform),
        torch.randn(n, generator=_generator(n), dtype=_F64),
    ]


def _mode(number: int) -> Callable[[int], Tensor]:
    return lambda n: rotated(_modes(n)[number - 1], seed=n)


def _halves(low: float, high: float) -> Callable[[int], Tensor]:
    return lambda n: rotated(torch.where(torch.arange(n) < n // 2, low, high), seed=n)


FAMILIES: dict[str, Callable[[int], Tensor]] = {
    "cluster": cluster,
    "cluster, coupling 1": lambda n: cluster(n, coupling=1.0),
    "cluster, negative": lambda n: -cluster(n, 1.37, 0.003),
    "two clusters": _two_clusters,
    "exchange": _exchange,
    "flip": lambda n: 1.001 * (torch.eye(n, dtype=_F64).flip(0) + 0.01 / n),
    "reflector": lambda n: 1.001 * (torch.eye(n, dtype=_F64) - 2 / n),
    "alternating": _alternating,
    "Hartley": _hartley,
    "ones": lambda n: torch.ones(n, n, dtype=_F64),
    "equal correlation": lambda n: 0.3 * torch.eye(n, dtype=_F64) + 0.7,
    "five rows": _few_rows,
    "random": _random,
    "uniform": _uniform,
    "covariance": _covariance,
    "covariance, mean 3": lambda n: _covariance(n, 3.0),
    "dlatms mode 1": _mode(1),
    "dlatms mode 2": _mode(2),
    "dlatms mode 3": _mode(3),
    "dlatms mode 4": _mode(4),
    "dlatms mode 5": _mode(5),
    "dlatms mode 6": _mode(6),
    "two values": _halves(1.0, 2.0),
    "two signs": _halves(-1.0, 1.0),
    "near identity": lambda n: rotated(1 + 1e-7 * torch.arange(n), seed=n),
    "graded": lambda n: rotated(torch.logspace(0, -12, n, dtype=_F64), seed=n),
    "Wilkinson": _wilkinson,
    "glued Wilkinson": _glued_wilkinson,
    "Laplace": lambda n: _tridiagonal(torch.full((n,), 2.0), -torch.ones(n - 1, dtype=_F64)),
    "arrow": _arrow,
    "minimum": _minimum,
    "Hilbert": _hilbert,
    "diagonal": lambda n: torch.diag(torch.linspace(-1, 2, n, dtype=_F64)),
    "tiny": lambda n: 1e-30 * _random(n),
    "huge": lambda n: 1e30 * _random(n),
}
"""Matrices [n, n] in float64, by order n >= 1."""
