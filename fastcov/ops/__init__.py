"""Operators: running covariances and batched symmetric eigenvalues."""

from fastcov.ops.covariance import accumulate_, covariance
from fastcov.ops.eigen import count_above, eigh, eigvalsh

__all__ = ["accumulate_", "count_above", "covariance", "eigh", "eigvalsh"]
