"""Plain-torch definitions of every operator: the oracle of tests and benchmarks.

Each function states what its operator computes, in float64 and without regard for speed. Nothing
else in the package defines these results a second time.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from fastcov.ops import triangle

GOLDEN_RATIO_64 = 0x9E3779B97F4A7C15
"""round(2**64 / golden ratio), odd: the step of the sampling sequence."""

SHIFT_ROWS = 64
"""Rows whose mean becomes the shift of a state."""

_MASK_64 = (1 << 64) - 1


LARGEST_SHIFT = {torch.float64: 2.0**970}
"""Below it the largest float64 less a shift does not overflow: half of that number's last bit."""

LARGEST_FLOAT_SHIFT = 2.0**103
"""The same for float32, in which rows of all other dtypes are multiplied."""


def initial_shift_reference(rows: Tensor, row_weight: Tensor | None = None) -> Tensor:
    """Shift of a state that has not seen a row: near the mean, in digits that rows can subtract.

    It has the digits of float64 or float32 for rows of that dtype, and eight significant bits for
    16-bit rows. It is 0 in channels where a row less the mean might overflow.

    Args:
        rows: Rows in order. [..., C]
        row_weight: Rows that weigh nothing are passed over. [N]

    Returns:
        Shift in float64. [C]
    """
    channels = rows.shape[-1]
    flat = rows.reshape(-1, channels)
    is_used = torch.isfinite(flat).all(1)
    if row_weight is not None:
        is_used &= row_weight.flatten() != 0
    first = flat[is_used][:SHIFT_ROWS].double()
    if len(first) == 0:
        return torch.zeros(channels, dtype=torch.float64, device=rows.device)
    is_half = rows.dtype.itemsize == 2
    shift = first.mean(0).to(torch.bfloat16 if is_half else rows.dtype).double()
    limit = LARGEST_SHIFT.get(rows.dtype, LARGEST_FLOAT_SHIFT)
    return torch.where(shift.abs() < limit, shift, 0.0)


def accumulate_reference_(
    moment: Tensor,
    sum: Tensor,
    shift: Tensor,
    weight: Tensor,
    count: Tensor,
    rows: Tensor,
    row_weight: Tensor | None = None,
    row_scale: float = 1.0,
    decay: float = 1.0,
) -> None:
    r"""Update of a running second moment about a shift with rows.

    .. math:: M \leftarrow d M + \sum_r w_r (x_r - s)(x_r - s)^T, \quad
        m \leftarrow d m + \sum_r w_r (x_r - s), \quad W \leftarrow d W + \sum_r w_r

    with d = ``decay``, w_r = ``row_scale`` times ``row_weight[r]``. Rows of weight 0 are left out.
    Rows that hold a non-finite value, or whose weight is negative or not finite, add nothing and
    are counted apart. The shift s is set by the first call that brings a finite row; operators that
    do not add up in float64 move it where later rows are far from it, which changes no covariance.

    Args:
        moment: Second moment about the shift, float64: see :mod:`fastcov.ops.triangle`.
            [tiles, 32, 32]
        sum: First moment about the shift, float64. [C]
        shift: float64. [C]
        weight: Normaliser, float64. []
        count: Rows read and rows skipped, int64. [2]
        rows: Any strides. [..., C]
        row_weight: One weight a row, in row-major order of the leading dimensions. [N]
        row_scale: Factor on every row's weight.
        decay: Factor on what was there before.
    """
    channels = rows.shape[-1]
    flat = rows.reshape(-1, channels)
    weights = torch.ones(len(flat), dtype=torch.float64, device=rows.device)
    if row_weight is not None:
        weights = row_weight.double()
    is_read = torch.isfinite(flat).all(1) & torch.isfinite(weights) & (weights > 0)
    is_skipped = ~is_read & (weights != 0)
    if int(count[0]) == 0:
        shift.copy_(initial_shift_reference(rows, row_weight))
    centred = flat[is_read].double() - shift
    weights = weights[is_read] * row_scale
    weighted = centred * weights[:, None]
    moment.mul_(decay).add_(triangle.pack(weighted.T @ centred))
    sum.mul_(decay).add_(weighted.sum(0))
    weight.mul_(decay).add_(weights.sum())
    count += torch.stack([is_read.sum(), is_skipped.sum()])


def accumulate_affine_reference_(
    moment: Tensor,
    sum: Tensor,
    shift: Tensor,
    weight: Tensor,
    count: Tensor,
    input_moment: Tensor,
    input_sum: Tensor,
    input_shift: Tensor,
    rows: int,
    matrix: Tensor,
    bias: Tensor | None,
    row_scale: float = 1.0,
    decay: float = 1.0,
) -> None:
    r"""Update of a running second moment with rows y = A x + b, from that of the x, of weight 1.

    .. math:: M \leftarrow d M + w (A \Sigma A^T + N \mu \mu^T), \quad
        \mu = A \bar x + b - s

    with d = ``decay`` and w = ``row_scale``; Sigma sums (x - mean)(x - mean)^T over N = ``rows``.

    Args:
        moment: As in :func:`accumulate_reference_`, and so are the next four. [tiles, 32, 32]
        sum: [C]
        shift: Set by an earlier call. [C]
        weight: []
        count: [2]
        input_moment: About ``input_shift``. [input tiles, 32, 32]
        input_sum: [I]
        input_shift: [I]
        rows: How many, N.
        matrix: A. [C, I]
        bias: b, if any. [C]
        row_scale: Factor on every row's weight.
        decay: Factor on what was there before.
    """
    about_shift = triangle.unpack(input_moment, len(input_sum))
    scatter = about_shift - torch.outer(input_sum, input_sum) / rows
    wide = matrix.double()
    mean = wide @ (input_shift + input_sum / rows) - shift
    if bias is not None:
        mean += bias
    added = wide @ scatter @ wide.T + rows * torch.outer(mean, mean)
    moment.mul_(decay).add_(triangle.pack(added), alpha=row_scale)
    sum.mul_(decay).add_(mean, alpha=rows * row_scale)
    weight.mul_(decay).add_(rows * row_scale)
    count[0] += rows


def sample_index_reference(
    positions: int,
    images: int,
    first_sample: int,
    samples: int,
    run_length: int,
    phase: int,
) -> list[int]:
    """Row numbers that :func:`gather_reference_` reads.

    Runs of ``run_length`` neighbouring positions start where a golden-ratio Kronecker sequence
    falls: every window of that sequence is spread evenly over all rows of all images (three-gap
    theorem, Sos 1958), each start is uniform over the rows when ``phase`` is, and runs wrap inside
    their image, so that every position is read equally often.

    Args:
        positions: Positions of one image.
        images: Images in the batch.
        first_sample: Number of the first sample, counted over the whole training.
        samples: How many.
        run_length: Neighbouring positions read together.
        phase: Start of the sequence, 64 bits.

    Returns:
        ``samples`` row numbers, row-major over (image, position).
    """
    total = positions * images
    index = []
    for sample in range(first_sample, first_sample + samples):
        run, offset = divmod(sample, run_length)
        start = ((((phase + run * GOLDEN_RATIO_64) & _MASK_64) * total) >> 64) % total
        image, position = divmod(start, positions)
        index.append(image * positions + (position + offset) % positions)
    return index


def gather_reference_(
    buffer: Tensor,
    rows: Tensor,
    buffer_row: int,
    first_sample: int,
    samples: int,
    run_length: int = 1,
    phase: int = 0,
) -> None:
    """Copy of sampled rows into a buffer.

    Args:
        buffer: Destination, the rows' dtype. [capacity, C]
        rows: Any strides; dim 0 holds the images. [B, ..., C]
        buffer_row: Row of the buffer for the first sample.
        first_sample: See :func:`sample_index_reference`.
        samples: How many rows to copy.
        run_length: See :func:`sample_index_reference`.
        phase: See :func:`sample_index_reference`.
    """
    channels = rows.shape[-1]
    images = rows.shape[0] if rows.dim() > 1 else 1
    total = rows.numel() // channels
    index = sample_index_reference(
        total // images, images, first_sample, samples, run_length, phase
    )
    picked = rows.reshape(-1, channels)[torch.tensor(index, device=rows.device)]
    buffer[buffer_row : buffer_row + samples] = picked


def eigenvalue_tolerance(order: int, dtype: torch.dtype) -> float:
    """Bound on the error of an eigenvalue, as a fraction of the largest magnitude among them.

    A measurement, not a theorem: the largest error over the families of
    :mod:`fastcov.bench.eigen_families` on every path of a CPU, with room to spare.

    Args:
        order: Size n of the n x n matrix.
        dtype: float32 or float64.
    """
    if dtype == torch.float64:
        return 1e-13 * math.sqrt(order)
    return 6e-6 if order <= 256 else 1e-5 * max(1.0, math.sqrt(order / 2048))


def count_tolerance(order: int) -> float:
    """Bound on what rounding in float64 moves an eigenvalue by, relative to the Frobenius norm.

    A theorem: Householder reflections are backward stable, and so are Sturm counts. The derivation
    stands at ``reduction_error`` in csrc/eigen.h, which has the same formula.

    Args:
        order: Size n of the n x n matrix.
    """
    return 8.0 * order * (order + 16) * 2.0**-53


def _symmetric_from_lower(matrix: Tensor) -> tuple[Tensor, Tensor]:
    lower = matrix.detach().double().tril()
    finite = torch.isfinite(lower).flatten(-2).all(-1)
    lower = torch.where(finite[..., None, None], lower, 0.0)
    return lower + lower.tril(-1).mT, finite


def eigvalsh_reference(matrix: Tensor) -> Tensor:
    """Eigenvalues, ascending, of symmetric matrices given by their lower triangles.

    Args:
        matrix: Only the lower triangle is read. [..., n, n]

    Returns:
        float64; NaN for a matrix whose lower triangle holds a NaN or an infinity. [..., n]
    """
    symmetric, finite = _symmetric_from_lower(matrix)
    return torch.where(finite[..., None], torch.linalg.eigvalsh(symmetric), torch.nan)


def eigh_reference(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Eigenvalues, ascending, and orthonormal eigenvectors of symmetric matrices.

    Args:
        matrix: Only the lower triangle is read. [..., n, n]

    Returns:
        Eigenvalues [..., n] and eigenvectors in columns [..., n, n], float64; NaN for a matrix
        whose lower triangle holds a NaN or an infinity.
    """
    symmetric, finite = _symmetric_from_lower(matrix)
    values, vectors = torch.linalg.eigh(symmetric)
    finite = finite[..., None]
    return torch.where(finite, values, torch.nan), torch.where(
        finite[..., None], vectors, torch.nan
    )


def count_above_reference(matrix: Tensor, thresholds: Tensor) -> Tensor:
    """Number of eigenvalues above each threshold; -1 for a matrix that is not finite.

    Args:
        matrix: Only the lower triangle is read. [..., n, n]
        thresholds: One set for each matrix, or shared. [..., T]

    Returns:
        int64. [..., T]
    """
    values = eigvalsh_reference(matrix)[..., None, :]
    count = (values > thresholds[..., None].double()).sum(-1)
    return torch.where(torch.isnan(values).any(-1), -1, count)
