"""Eigenvalue operators in plain torch: where no compiled path serves.

Same results as ops/reference.py within the rounding of the matrices' dtype. ``torch.linalg`` loops
over the matrices and synchronises with the host on a GPU.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcov.ops.reference import count_tolerance

_LARGEST_EXPONENT = 125  # 2**125 and 2**-125 are normal numbers in float32


def _prepare(matrix: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    # Lower triangles scaled to about 1 by a power of two, zero where not finite; finite [...] and
    # exponent [...]. LAPACK scales too, the solvers of a GPU need not.
    lower = matrix.tril()
    finite = torch.isfinite(lower).flatten(-2).all(-1)
    lower = torch.where(finite[..., None, None], lower, 0)
    exponent = torch.frexp(lower.abs().amax((-2, -1))).exponent
    exponent = exponent.clamp(-_LARGEST_EXPONENT, _LARGEST_EXPONENT)
    return torch.ldexp(lower, -exponent[..., None, None]), finite, exponent


def _restore(values: Tensor, finite: Tensor, exponent: Tensor) -> Tensor:
    return torch.where(finite[..., None], torch.ldexp(values, exponent[..., None]), torch.nan)


def _eigenvalues(matrix: Tensor) -> Tensor:
    scaled, finite, exponent = _prepare(matrix)
    # The compiled kernels shift in the same way (diagonal_shift, csrc/eigen_numeric.h). Without the
    # shift, a reduction rounds the large entries of c (I + E) the same way at every step.
    shift = torch.round(scaled.diagonal(dim1=-2, dim2=-1).mean(-1, keepdim=True) * 1024) / 1024
    shifted = scaled - torch.diag_embed(shift.expand(scaled.shape[:-1]))
    return _restore(torch.linalg.eigvalsh(shifted) + shift, finite, exponent)


def eigvalsh(matrices: list[Tensor], is_alone: bool = False) -> list[Tensor]:
    """Plain-torch form of :func:`fastcov.ops.reference.eigvalsh_reference`, for several batches.

    ``is_alone`` changes nothing: LAPACK takes the matrices one by one.
    """
    return [_eigenvalues(matrix) for matrix in matrices]


def eigh(matrices: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Plain-torch form of :func:`fastcov.ops.reference.eigh_reference`, for several batches."""
    values, vectors = [], []
    for matrix in matrices:
        scaled, finite, exponent = _prepare(matrix)
        eigenvalues, eigenvectors = torch.linalg.eigh(scaled)
        values.append(_restore(eigenvalues, finite, exponent))
        vectors.append(torch.where(finite[..., None, None], eigenvectors, torch.nan).contiguous())
    return values, vectors


def count_above(matrices: list[Tensor], thresholds: list[Tensor]) -> list[Tensor]:
    """Bounds of :func:`fastcov.ops.reference.count_above_reference`: (low, high) [..., T, 2]."""
    counts = []
    for matrix, tau in zip(matrices, thresholds, strict=True):
        order = matrix.shape[-1]
        values = _eigenvalues(matrix)[..., None, :]
        # The Frobenius norm is at most sqrt(n) times the largest value, and may overflow if summed.
        # NaN compares false both ways: a non-finite matrix or threshold gives (0, n).
        norm = math.sqrt(order) * values.abs().amax(-1, keepdim=True)
        error = count_tolerance(order) * norm
        low = (values > tau[..., None] + error).sum(-1)
        high = order - (values <= tau[..., None] - error).sum(-1)
        counts.append(torch.stack([low, high], -1))
    return counts
