"""Batched symmetric eigenvalues: public functions. Check arguments, then dispatch.

One call takes matrices of mixed sizes. Eigenvalues come in ascending order, as from
``torch.linalg.eigvalsh``; only the lower triangle is read, through any strides. Eigenvalues and
eigenvectors are computed in the matrices' dtype, counts in float64. Where a derivative is wanted,
in reverse or forward mode, ``torch.linalg`` computes both, inside torch.vmap and torch.compile too.
As with torch's own operators that use OpenMP, a process that is forked after a call on several
threads may hang in its next one: start processes by "spawn".
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, NamedTuple, NoReturn, TypeVar, cast, overload

import torch
from torch import Tensor
from torch.autograd import forward_ad

from fastcov.ops import aten_eigen, library, native
from fastcov.ops.library import operators
from fastcov.ops.transforms import has_derivative, is_wrapped

MATRIX_DTYPES = (torch.float32, torch.float64)
# Largest order whose eigenvectors the compiled CPU library finds in no more time than LAPACK: up to
# 1.5 times as fast one by one. Measured on a Xeon with AVX-512, also held to AVX2.
_LARGEST_NATIVE = {"AVX512": 56, "AVX2": 32}.get(torch.backends.cpu.get_cpu_capability(), 16)
if not native.status()["cpu"].active:
    _LARGEST_NATIVE = 0
_LIN_ALG_ERROR: type[RuntimeError] = vars(torch.linalg)["LinAlgError"]
_FEW = 64  # numbers that Python looks through before one operator of torch has begun

_Result = TypeVar("_Result")


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

    Accurate to 6e-6 of the largest magnitude in float32 up to n = 256 and 1e-5 up to 2048, to
    1e-13 sqrt(n) in float64. Of 35 families of matrices, measured on a CPU, the worst came to 4e-6
    and 1e-13 (benchmarks/README.md names the table). Without the compiled library LAPACK's float32
    takes over, which was off by up to 9e-5.

    On a GPU with the compiled library matrices up to n = 2048 are solved without host
    synchronisation, so that a CUDA graph can capture the call. Larger matrices, and every matrix
    without the library, go to ``torch.linalg``, which synchronises.

    Matrices of a batch share instructions, so that the last bits of a result may depend on how many
    there are, and on the number of threads among which they are divided. They do not while
    ``torch.use_deterministic_algorithms(True)`` is in force: then every matrix is solved alone, in
    ten times the time for batches of the smallest and twice at n = 256.

    Args:
        A: Symmetric matrices, float32 or float64; only the lower triangle is read. One matrix or
            batch [..., n, n], or a sequence of them with mixed sizes.

    Returns:
        Eigenvalues in A's dtype [..., n], a list of them for a sequence. A matrix that holds a NaN
        or an infinity gets NaN, alone.

    Raises:
        TypeError: If ``A`` holds something else than dense real float32 or float64 tensors.
        ValueError: If a matrix is empty or not square, if devices or dtypes are mixed.
        MemoryError: If there is no memory for the call's scratch.

    Example:
        >>> eigvalsh(torch.tensor([[2.0, 0.0], [1.0, 2.0]]))
        tensor([1., 3.])
        >>> [values.shape for values in eigvalsh([torch.eye(3), torch.eye(2).expand(5, 2, 2)])]
        [torch.Size([3]), torch.Size([5, 2])]
    """
    if isinstance(A, Tensor):
        if _is_plain(A):
            try:
                return library.eigvalsh([A], torch.are_deterministic_algorithms_enabled())[0]
            except (MemoryError, RuntimeError) as error:
                _raise_explained(error, [A])
        _check_matrix(A, "A")
        if has_derivative(A):
            return _derived_eigvalsh(A)
        if A.dim() <= 3:
            return _eigvalsh([A])[0]
        return _eigvalsh([A.flatten(0, -3)])[0].reshape(A.shape[:-1])
    matrices = _check_sequence(A)
    if any(map(has_derivative, matrices)):
        return [_derived_eigvalsh(matrix) for matrix in matrices]
    results = _eigvalsh([_one_batch(matrix) for matrix in matrices])
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

    Both equations hold within 1e-5 in float32 up to n = 128, entry by entry and relative to the
    largest eigenvalue; above, LAPACK was off by up to 6e-5 at n = 1024. On a CPU the compiled
    library solves matrices of up to 56 rows (32 with AVX2), a few one by one and many side by
    side; all else is one call of ``torch.linalg.eigh`` and a look at its eigenvalues. While
    ``torch.use_deterministic_algorithms(True)`` is in force, so is everything on a CPU, on one
    thread: the last bits then depend neither on the batch nor on the number of threads. On a GPU
    with the compiled library, matrices up to n = 128 run without host synchronisation; larger ones
    go to ``torch.linalg``, which synchronises. The sign of an eigenvector, and the basis of a
    repeated eigenvalue's space, are arbitrary but repeatable.

    Args:
        A: As in :func:`eigvalsh`.

    Returns:
        ``eigenvalues`` [..., n] and ``eigenvectors`` [..., n, n], column k for eigenvalue k; a list
        of such pairs for a sequence. A matrix that holds a NaN or an infinity gets NaN, alone.

    Raises:
        TypeError: If ``A`` holds something else than dense real float32 or float64 tensors.
        ValueError: If a matrix is empty or not square, if devices or dtypes are mixed.
        MemoryError: If there is no memory for the call's scratch.

    Example:
        >>> system = eigh(torch.diag(torch.tensor([3.0, 1.0])))
        >>> system.eigenvalues, system.eigenvectors.abs()
        (tensor([1., 3.]), tensor([[0., 1.],
                [1., 0.]]))
    """
    if isinstance(A, Tensor):
        if not _is_plain(A):
            _check_matrix(A, "A")
            return _eigh_by_torch(A) if _is_for_torch(A) else _eigh([A])[0]
        if A.is_cpu and (
            A.shape[-1] > _LARGEST_NATIVE or torch.are_deterministic_algorithms_enabled()
        ):
            return _eigh_of_numbers(A)
        try:
            values, vectors = library.eigh([A])
        except (MemoryError, RuntimeError) as error:
            _raise_explained(error, [A])
        return Eigensystem(values[0], vectors[0])
    matrices = _check_sequence(A)
    # All matrices that the own operator solves go into one call.
    own = iter(_eigh([matrix for matrix in matrices if not _is_for_torch(matrix)]))
    return [_eigh_by_torch(matrix) if _is_for_torch(matrix) else next(own) for matrix in matrices]


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

    One Sturm pass a threshold, in float64 whatever the matrices' dtype. The bounds differ when an
    eigenvalue is so close to ``tau`` that rounding may have put it on either side; how close is a
    theorem (:func:`fastcov.ops.reference.count_tolerance`), so that they always hold: 5e-12 of the
    Frobenius norm at n = 64, 4e-9 at 2048. On a GPU as :func:`eigvalsh` of float64 matrices.

    Args:
        A: As in :func:`eigvalsh`.
        tau: One threshold, or T of them [T], for every matrix; or T for each matrix [..., T]. Real
            numbers, of Python, numpy or torch, compared as float64. For a sequence of matrices also
            a sequence with one such entry for each.

    Returns:
        ``low`` and ``high``: [...] for one threshold, [..., T] for several; a list of such pairs
        for a sequence of matrices. (0, n) for a matrix that holds a NaN or an infinity, and for a
        NaN in a ``tau`` on a GPU, where checking would synchronise.

    Raises:
        TypeError: If ``A`` or ``tau`` has the wrong type.
        ValueError: If a matrix is empty or not square, if devices or dtypes are mixed, if ``tau``
            is NaN, beyond float64, or of a shape that fits no matrix.
        MemoryError: If there is no memory for the call's scratch.

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
    counts = _run(
        operators.count_above if torch.compiler.is_compiling() else library.count_above,
        [_one_batch(matrix.detach().double()) for matrix in matrices],
        [_thresholds(entry, matrix) for entry, matrix in zip(taus, matrices, strict=True)],
    )
    intervals = []
    for count, entry, matrix in zip(counts, taus, matrices, strict=True):
        several = isinstance(entry, Tensor) and entry.dim() > 0
        shape = (*matrix.shape[:-2], count.shape[-2]) if several else matrix.shape[:-2]
        low, high = count.unbind(-1)
        intervals.append(CountInterval(low.reshape(shape), high.reshape(shape)))
    return intervals[0] if isinstance(A, Tensor) else intervals


def _finite_part(matrix: Tensor) -> tuple[Tensor, Tensor]:
    # Batch with zeros for the matrices that LAPACK would refuse, and the mask of the others [...].
    is_finite = matrix.detach().tril().isfinite().flatten(-2).all(-1)
    return torch.where(is_finite[..., None, None], matrix, 0), is_finite


def _derived_eigvalsh(matrix: Tensor) -> Tensor:
    finite, is_finite = _finite_part(matrix)
    return torch.where(is_finite[..., None], torch.linalg.eigvalsh(finite), math.nan)


def _derived_eigh(matrix: Tensor) -> Eigensystem:
    finite, is_finite = _finite_part(matrix)
    values, vectors = torch.linalg.eigh(finite)
    return Eigensystem(
        torch.where(is_finite[..., None], values, math.nan),
        torch.where(is_finite[..., None, None], vectors, math.nan),
    )


def _is_plain(matrix: Tensor) -> bool:
    # Whether a call passes every check and needs no more than the operator. The one test of most
    # calls: small matrices take little longer than all that may be asked about them.
    shape = matrix.shape
    return (
        2 <= len(shape) <= 3
        and shape[-1] == shape[-2] > 0
        and matrix.dtype in MATRIX_DTYPES
        and matrix.layout is torch.strided
        and not matrix.requires_grad
        # Tangents exist inside of a level alone, and traced code has none.
        and forward_ad._current_level < 0
        and not torch.compiler.is_compiling()
        and torch._C._functorch.peek_interpreter_stack() is None
    )


def _run(operator: Callable[..., _Result], matrices: list[Tensor], *arguments: object) -> _Result:
    try:
        return operator(matrices, *arguments)
    except (MemoryError, RuntimeError) as error:
        _raise_explained(error, matrices)


def _raise_explained(error: MemoryError | RuntimeError, matrices: list[Tensor]) -> NoReturn:
    # Errors of compiled code come without their text.
    if isinstance(error, MemoryError):
        raise MemoryError(f"no memory for the scratch of {_described(matrices)}") from error
    if "API call failed" not in str(error):
        raise error
    raise RuntimeError(
        f"{_described(matrices)} failed inside torch, for want of memory or because its solver "
        f"did not converge; torch.linalg.eigh of the same matrix says which: {error}"
    ) from error


def _described(matrices: list[Tensor]) -> str:
    largest = max(matrices, key=lambda matrix: matrix.shape[-1])
    return (
        f"{len(matrices)} matrices or batches, the largest {tuple(largest.shape)} "
        f"{largest.dtype} on {largest.device}"
    )


def _eigvalsh(matrices: list[Tensor]) -> list[Tensor]:
    if torch.compiler.is_compiling():
        return cast(list[Tensor], operators.eigvalsh(matrices))
    return _run(library.eigvalsh, matrices, torch.are_deterministic_algorithms_enabled())


def _is_for_torch(matrix: Tensor) -> bool:
    if not matrix.is_cpu:
        return has_derivative(matrix)
    if matrix.shape[-1] > _LARGEST_NATIVE or has_derivative(matrix):
        return True
    # Matrices of a batch share instructions, and may not where their bits may not depend on it.
    return torch.are_deterministic_algorithms_enabled()


def _eigh_by_torch(matrix: Tensor) -> Eigensystem:
    if has_derivative(matrix):
        return _derived_eigh(matrix)
    return _eigh_by_parts(matrix) if _is_traced(matrix) else _eigh_of_numbers(matrix)


def _eigh_of_numbers(matrix: Tensor) -> Eigensystem:
    try:
        if torch.are_deterministic_algorithms_enabled() and matrix.is_cpu:
            values, vectors = _eigh_on_one_thread(matrix)
        else:
            values, vectors = torch.linalg.eigh(matrix)
        # A NaN in a matrix of order 2 may leave values that are finite.
        if _is_finite(values) and (matrix.shape[-1] != 2 or _is_finite(vectors)):
            return Eigensystem(values, vectors)
    except RuntimeError as error:
        if type(error) is not _LIN_ALG_ERROR:
            raise
    # LAPACK refuses a batch with a matrix that is not finite, or spreads what is not.
    return _eigh_by_parts(matrix)


def _eigh_by_parts(matrix: Tensor) -> Eigensystem:
    # LAPACK gets the finite matrices alone.
    values, vectors = aten_eigen.eigh([matrix])
    return Eigensystem(values[0], vectors[0])


def _eigh_on_one_thread(matrix: Tensor) -> tuple[Tensor, Tensor]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # LAPACK's last bits depend on how many there are
    try:
        return cast(tuple[Tensor, Tensor], torch.linalg.eigh(matrix))
    finally:
        torch.set_num_threads(threads)


def _is_traced(tensor: Tensor) -> bool:
    # Its numbers are not to be looked at: inside torch.compile, or a transform of torch.func.
    return torch.compiler.is_compiling() or is_wrapped(tensor)


def _is_finite(values: Tensor) -> bool:
    if values.numel() > _FEW:
        return math.isfinite(values.max().item())
    numbers = values.tolist() if values.dim() == 1 else values.flatten().tolist()
    return math.isfinite(sum(numbers))


def _eigh(matrices: list[Tensor]) -> list[Eigensystem]:
    if not matrices:
        return []
    operator = operators.eigh if torch.compiler.is_compiling() else library.eigh
    values, vectors = _run(operator, [_one_batch(matrix) for matrix in matrices])
    return [
        Eigensystem(value, vector)
        if matrix.dim() <= 3
        else Eigensystem(value.reshape(matrix.shape[:-1]), vector.reshape(matrix.shape))
        for value, vector, matrix in zip(values, vectors, matrices, strict=True)
    ]


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


def _one_each(tau: Any, count: int, is_single: bool) -> Sequence[float | Tensor]:
    if isinstance(tau, (Real, Tensor)):
        return [cast(Any, tau)] * count
    if is_single or not isinstance(tau, Sequence):
        raise TypeError(
            f"tau is a {type(tau).__name__}, expected a real number or a tensor of thresholds"
            + ("" if is_single else ", or a sequence of them, one for each matrix")
        )
    if len(tau) != count:
        raise ValueError(
            f"tau has {len(tau)} entries for {count} matrices: give one for all, or one for each"
        )
    return tau


def _threshold(tau: Real) -> float:
    try:
        number = float(tau)
    except OverflowError:
        raise ValueError("tau is beyond float64: pass math.inf or -math.inf") from None
    if math.isnan(number):
        raise ValueError("tau is NaN: a threshold must be a number")
    return number


def _thresholds(tau: Any, matrix: Tensor) -> Tensor:
    # [..., T] with the batch dimension of _one_batch(matrix), in float64.
    if isinstance(tau, Tensor):
        if tau.is_complex() or tau.dtype == torch.bool or tau.is_quantized:
            raise TypeError(f"tau is {tau.dtype}, expected real thresholds: convert it to float")
        if tau.layout != torch.strided or tau.is_nested:
            raise TypeError(f"tau has layout {tau.layout}, expected a dense tensor of thresholds")
        if tau.device != matrix.device:
            raise ValueError(
                f"tau is on {tau.device}, the matrices on {matrix.device}: move tau with .to()"
            )
        if tau.dim() > 1 and tau.shape[:-1] != matrix.shape[:-2]:
            raise ValueError(
                f"tau has shape {tuple(tau.shape)} for matrices {tuple(matrix.shape)}: expected "
                f"[], [T] or {[*matrix.shape[:-2], 'T']}"
            )
        thresholds = tau.detach().double()
        if tau.is_cpu and not _is_traced(tau) and bool(thresholds.isnan().any()):
            raise ValueError("tau holds NaN: every threshold must be a number")
        thresholds = thresholds.reshape(-1) if tau.dim() <= 1 else thresholds
    elif isinstance(tau, Real):
        thresholds = matrix.new_full((1,), _threshold(tau), dtype=torch.float64)
    else:
        raise TypeError(f"tau is a {type(tau).__name__}, expected a real number or a tensor")
    if thresholds.dim() == 1:
        return thresholds.expand(*_one_batch(matrix).shape[:-2], -1)
    return thresholds.reshape(-1, thresholds.shape[-1])
