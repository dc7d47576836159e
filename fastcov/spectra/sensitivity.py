"""Spectrum of the directions of a tensor that the loss feels."""

from __future__ import annotations

import torch
from torch import Tensor

from fastcov.spectra.spectrum import Spectrum


def sensitivity_spectrum(
    covariance: Tensor, gradient: Tensor, count: int, name: str = ""
) -> Spectrum:
    """Spectrum of :math:`S^{1/2} G S^{1/2}` for two positive semidefinite matrices S and G.

    Args:
        covariance: Second moment S of the features. [C, C]
        gradient: Second moment G of the loss's gradient with respect to them. [C, C]
        count: Rows behind the two, the smaller number.
        name: Name of the layer.

    Example:
        >>> S, G = torch.diag(torch.tensor([4.0, 1.0])), torch.diag(torch.tensor([0.5, 1.0]))
        >>> sensitivity_spectrum(S, G, count=64).eigenvalues
        tensor([2., 1.], dtype=torch.float64)
    """
    covariance = covariance.double()
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ gradient.double().to(root.device) @ root
    eigenvalues = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0)
    return Spectrum(eigenvalues, count, float(eigenvalues.sum()), name)
