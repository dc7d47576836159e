"""Batched symmetric eigenvalues: public functions. Check arguments, then dispatch.

One call takes matrices of mixed sizes. Eigenvalues come in ascending order, as from
``torch.linalg.eigvalsh``; only the lower triangle is read, through any strides; the computation
runs in the matrices' dtype.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple, overload

import torch
from torch import Tensor

from fastcov.ops.library import operators

MATRIX_DTYPES = (torch.float32, torch.float64)


class Eigensystem(NamedTuple):
    """Eigenvalues, ascending [..., n], and orthonormal eigenvectors in columns [..., n, n]."""

    eigenvalues: Tensor
    eigenvectors: Tensor


class CountInterval(NamedTuple):
    """Bounds on a number of eigenvalues, int64; equal unless an eigenvalue is too close to call."""

    low: Tensor
    high: Tensor


@overload
def eigvalsh(A: Tensor) -> Tensor: ...
@overload
def eigvalsh(A: Sequence[Tensor]) -> list[Tensor]: ...
def eigvalsh(A: Tensor | Sequence[Tensor]) -> Tensor | list[Tensor]:
    r"""Eigenvalues of symmetric matrices, ascending.

    Accurate to 2e-6 of the largest magnitude in float32 up to n = 256 and 1e-5 above, to
    1e-13 sqrt(n) in float64. On a CPU, LAPACK takes over where it is faster (with more than two
    threads, for fewer matrices of 257 to 511 than threads); without the compiled library its
    float32 was measured to be off by up to 4.2e-5 at n = 2048. On a GPU with the compiled library:
    no host synchronisation and capturable in a CUDA graph up to n = 2048; larger matrices, and
    every matrix without the library, go to ``torch.linalg``, which synchronises.

    Args:
        A: Symmetric matrices, float32 or float64; only the lower triangle is read. One matrix or
            batch [..., n, n], or a sequence of them with mixed sizes.

    Returns:
        Eigenvalues in A's dtype [..., n], a list of them for a sequence. A matrix that holds a NaN
        or an infinity gets NaN, alone.

    Raises:
        TypeError: If ``A`` holds something else than dense real float32 or float64 tensors.
        ValueError: If a matrix is empty or not square, if devices or dtypes are mixed.
        RuntimeError: If a matrix requires grad: there is no derivative.

    Example:
        >>> eigvalsh(torch.tensor([[2.0, 0.0], [1.0, 2.0]]))
        tensor([1., 3.])
        >>> [values.shape for values in eigvalsh([torch.eye(3), torch.eye(2).expand(5, 2, 2)])]
        [torch.Size([3]), torch.Size([5, 2])]
    """
    if isinstance(A, Tensor):
        _check_matrix(A, "A")
        values: Tensor = operators.eigvalsh([_one_batch(A)])[0]
        return values if A.dim() <= 3 else values.reshape(A.shape[:-1])
    matrices = _check_sequence(A)
    results: list[Tensor] = operators.eigvalsh([_one_batch(matrix) for matrix in matrices])
    return [
        result.reshape(matrix.shape[:-1]) for result, matrix in zip(results, matrices, strict=True)
    ]


@overload
def eigh(A: Tensor) -> Eigensystem: ...
@overload
def eigh(A: Sequence[Tensor]) -> list[Eigensystem]: ...
def eigh(A: Tensor | Sequence[Tensor]) -> Eigensystem | list[Eigensystem]:
    r"""Eigenvalues, ascending, and eigenvectors of symmetric matrices.

    .. math:: A V = V \Lambda, \quad V^T V = I

    Both equations hold within 1e-5 in float32. On a GPU with the compiled library, matrices up to
    n = 128 run without host synchronisation; larger ones go to ``torch.linalg``, which
    synchronises. The sign of an eigenvector, and the basis of a repeated eigenvalue's space, are
    arbitrary but repeatable.

    Args:
        A: As in :func:`eigvalsh`.

    Returns:
        ``eigenvalues`` [..., n] and ``eigenvectors`` [..., n, n], column k for eigenvalue k; a list
        of such pairs for a sequence. A matrix that holds a NaN or an infinity gets NaN, alone.

    Raises:
        TypeError: If ``A`` holds something else than dense real float32 or float64 tensors.
        ValueError: If a matrix is empty or not square, if devices or dtypes are mixed.
        RuntimeError: If a matrix requires grad: there is no derivative.

    Example:
        >>> system = eigh(torch.diag(torch.tensor([3.0, 1.0])))
        >>> system.eigenvalues, system.eigenvectors.abs()
        (tensor([1., 3.]), tensor([[0., 1.],
                [1., 0.]]))
    """
    if isinstance(A, Tensor):
        _check_matrix(A, "A")
        matrices = [A]
    else:
        matrices = _check_sequence(A)
    values, vectors = operators.eigh([_one_batch(matrix) for matrix in matrices])
    systems = [
        Eigensystem(value.reshape(matrix.shape[:-1]), vector.reshape(matrix.shape))
        for value, vector, matrix in zip(values, vectors, matrices, strict=True)
    ]
    return systems[0] if isinstance(A, Tensor) else systems


@overload
def count_above(A: Tensor, tau: float | Tensor) -> CountInterval: ...
@overload
def count_above(
    A: Sequence[Tensor], tau: float | Tensor | Sequence[float | Tensor]
) -> list[CountInterval]: ...
def count_above(
    A: Tensor | Sequence[Tensor], tau: float | Tensor | Sequence[float | Tensor]
) -> CountInterval | list[CountInterval]:
    r"""Number of eigenvalues above thresholds, without computing the eigenvalues.

    .. math:: \text{low} \le \#\{k : \lambda_k > \tau\} \le \text{high}

    One Sturm pass a threshold. The bounds differ when an eigenvalue lies within the error bound of
    ``tau`` (:func:`fastcov.ops.reference.eigenvalue_tolerance`), so that rounding may have put it
    on either side.

    Args:
        A: As in :func:`eigvalsh`.
        tau: One threshold, or T of them [T], for every matrix; or T for each matrix [..., T]. For a
            sequence of matrices also a sequence with one such entry for each.

    Returns:
        ``low`` and ``high``: [...] for one threshold, [..., T] for several; a list of such pairs
        for a sequence of matrices. (0, n) for a matrix that holds a NaN or an infinity, and for a
        NaN in a ``tau`` on a GPU, where checking would synchronise.

    Raises:
        TypeError: If ``A`` or ``tau`` has the wrong type.
        ValueError: If a matrix is empty or not square, if devices or dtypes are mixed, if ``tau``
            is NaN or its shape fits no matrix.
        RuntimeError: If a matrix requires grad: there is no derivative.

    Example:
        >>> count_above(torch.diag(torch.tensor([3.0, 1.0, 0.0])), 0.5)
        CountInterval(low=tensor(2), high=tensor(2))
    """
    if isinstance(A, Tensor):
        _check_matrix(A, "A")
        matrices = [A]
    else:
        matrices = _check_sequence(A)
    taus = _one_each(tau, len(matrices), isinstance(A, Tensor))
    counts = operators.count_above(
        [_one_batch(matrix) for matrix in matrices],
        [_thresholds(entry, matrix) for entry, matrix in zip(taus, matrices, strict=True)],
    )
    intervals = []
    for count, entry, matrix in zip(counts, taus, matrices, strict=True):
        several = isinstance(entry, Tensor) and entry.dim() > 0
        shape = (*matrix.shape[:-2], count.shape[-2]) if several else matrix.shape[:-2]
        low, high = count.unbind(-1)
        intervals.append(CountInterval(low.reshape(shape), high.reshape(shape)))
    return intervals[0] if isinstance(A, Tensor) else intervals


def _check_matrix(matrix: object, name: str) -> None:
    if not isinstance(matrix, Tensor):
        raise TypeError(
            f"{name} is a {type(matrix).__name__}, expected a torch.Tensor of symmetric matrices "
            "[..., n, n] or a sequence of them"
        )
    shape = matrix.shape
    if len(shape) < 2 or shape[-1] != shape[-2]:
        raise ValueError(
            f"{name} has shape {tuple(shape)}, expected square matrices [..., n, n]; the "
            "covariance of rows comes from fastcov.ops.covariance"
        )
    if shape[-1] == 0:
        raise ValueError(f"{name} has shape {tuple(shape)}: a matrix needs at least one row")
    if matrix.dtype not in MATRIX_DTYPES:
        remedy = "its real part does not have its eigenvalues, use torch.linalg.eigvalsh"
        raise TypeError(
            f"{name} is {matrix.dtype}, expected float32 or float64: "
            + (remedy if matrix.is_complex() else "convert it with .float() or .double()")
        )
    if matrix.layout != torch.strided:
        raise TypeError(
            f"{name} has layout {matrix.layout}, expected a dense tensor: call .to_dense()"
        )
    if matrix.requires_grad and torch.is_grad_enabled():
        raise RuntimeError(
            f"{name} requires grad, and this function has no derivative: pass {name}.detach(), or "
            "use torch.linalg.eigvalsh or torch.linalg.eigh for gradients"
        )


def _check_sequence(A: Any) -> list[Tensor]:
    if not isinstance(A, Sequence):
        _check_matrix(A, "A")
    if len(A) == 0:
        raise ValueError("A is an empty sequence: pass at least one matrix")
    first = A[0]
    for index, matrix in enumerate(A):
        _check_matrix(matrix, f"A[{index}]")
        if matrix.device != first.device or matrix.dtype != first.dtype:
            raise ValueError(
                f"A[{index}] is {matrix.dtype} on {matrix.device}, A[0] is {first.dtype} on "
                f"{first.device}: one call takes one device and dtype; convert with .to(A[0])"
            )
    return list(A)


def _one_batch(matrix: Tensor) -> Tensor:
    return matrix if matrix.dim() <= 3 else matrix.flatten(0, -3)


def _one_each(tau: object, count: int, is_single: bool) -> Sequence[float | Tensor]:
    if isinstance(tau, (int, float, Tensor)):
        return [tau] * count
    if is_single or not isinstance(tau, Sequence):
        raise TypeError(
            f"tau is a {type(tau).__name__}, expected a float or a tensor of thresholds"
            + ("" if is_single else ", or a sequence of them, one for each matrix")
        )
    if len(tau) != count:
        raise ValueError(
            f"tau has {len(tau)} entries for {count} matrices: give one for all, or one for each"
        )
    return tau


def _thresholds(tau: float | Tensor, matrix: Tensor) -> Tensor:
    # [..., T] with the batch dimension of _one_batch(matrix), in the matrices' dtype.
    if isinstance(tau, Tensor):
        if tau.is_complex() or tau.dtype == torch.bool:
            raise TypeError(f"tau is {tau.dtype}, expected real thresholds: convert it to float")
        if tau.device != matrix.device:
            raise ValueError(
                f"tau is on {tau.device}, the matrices on {matrix.device}: move tau with .to()"
            )
        if tau.dim() > 1 and tau.shape[:-1] != matrix.shape[:-2]:
            raise ValueError(
                f"tau has shape {tuple(tau.shape)} for matrices {tuple(matrix.shape)}: expected "
                f"[], [T] or {[*matrix.shape[:-2], 'T']}"
            )
        thresholds = tau.detach().to(matrix.dtype)
        on_host = tau.device.type == "cpu" and not torch.compiler.is_compiling()
        if on_host and bool(thresholds.isnan().any()):
            raise ValueError("tau holds NaN: every threshold must be a number")
        thresholds = thresholds.reshape(-1) if tau.dim() <= 1 else thresholds
    elif isinstance(tau, (int, float)):
        if math.isnan(tau):
            raise ValueError("tau is NaN: a threshold must be a number")
        thresholds = matrix.new_full((1,), tau)
    else:
        raise TypeError(f"tau is a {type(tau).__name__}, expected a float or a tensor")
    if thresholds.dim() == 1:
        return thresholds.expand(*_one_batch(matrix).shape[:-2], -1)
    return thresholds.reshape(-1, thresholds.shape[-1])
