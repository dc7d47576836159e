"""Directions of a covariance, and the matrices made of them: whitening, regularised inverse.

Pure functions of a symmetric matrix, in the matrix's dtype.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastcov import ops
from fastcov.arguments import whole_number


class Directions(NamedTuple):
    """Eigenvalues of a covariance, descending, and the directions that have them.

    Attributes:
        eigenvalues: Variance along each direction; negatives, which are rounding, as 0. [k]
        vectors: Orthonormal columns, the largest entry of each positive. [C, k]
    """

    eigenvalues: Tensor
    vectors: Tensor


def directions_of(covariance: Tensor, k: int | None = None) -> Directions:
    """Directions of the largest variance.

    Args:
        covariance: Symmetric. [C, C]
        k: Number of directions; None for all.

    Returns:
        Eigenvalues and vectors; of a repeated eigenvalue, any basis of its space.

    Raises:
        ValueError: If ``k`` is not a whole number from 1 to C.

    Example:
        >>> found = directions_of(torch.tensor([[2.0, 1.0], [1.0, 2.0]]).double(), k=1)
        >>> found.eigenvalues.round(decimals=6), found.vectors.T.round(decimals=4)
        (tensor([3.], dtype=torch.float64), tensor([[0.7071, 0.7071]], dtype=torch.float64))
    """
    channels = len(covariance)
    kept = channels if k is None else whole_number(k)
    if kept is None or not 1 <= kept <= channels:
        raise ValueError(f"k={k!r}: expected a number of directions from 1 to {channels}, or None")
    eigenvalues, vectors = ops.eigh(covariance)
    eigenvalues, vectors = eigenvalues.flip(-1)[:kept].clamp(min=0), vectors.flip(-1)[:, :kept]
    largest = vectors.gather(0, vectors.abs().argmax(0, keepdim=True))
    return Directions(eigenvalues, vectors * torch.where(largest < 0, -1.0, 1.0))


def whitening_of(covariance: Tensor, eps: float) -> Tensor:
    """Symmetric matrix (S + eps I)^(-1/2) that makes the covariance of rows the identity. [C, C]"""
    raised, vectors = _raised(covariance, "eps", eps)
    return (vectors * raised.rsqrt()) @ vectors.T


def inverse_of(covariance: Tensor, damping: float) -> Tensor:
    """Symmetric matrix (S + damping I)^(-1), the inverse of a damped covariance. [C, C]"""
    raised, vectors = _raised(covariance, "damping", damping)
    return (vectors / raised) @ vectors.T


def _raised(covariance: Tensor, name: str, value: float) -> tuple[Tensor, Tensor]:
    """Eigenvalues with a number added to each, and their vectors; refused where one is near 0."""
    if not (math.isfinite(value) and value >= 0):
        raise ValueError(f"{name}={value}: expected a finite number of at least 0, such as 1e-5")
    eigenvalues, vectors = directions_of(covariance)
    raised = eigenvalues + value
    # Below this share of the largest, an eigenvalue is the rounding of the others.
    largest, smallest = float(raised.max()), float(raised.min())
    if smallest <= len(raised) * torch.finfo(raised.dtype).eps * largest:
        raise ValueError(
            f"the covariance with {name}={value} is singular: eigenvalues from {smallest:.3g} to "
            f"{largest:.3g}; give a larger {name} (1e-6 times the largest eigenvalue is usual), or "
            "read more rows than channels"
        )
    return raised, vectors
