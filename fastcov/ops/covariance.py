"""Running covariance of feature rows: public functions, which check arguments and dispatch."""

from __future__ import annotations

from typing import Literal, Protocol, get_args

import torch
from torch import Tensor

from fastcov.ops import aten, triangle
from fastcov.ops.transforms import has_derivative, is_wrapped
from fastcov.rows.dtypes import ROW_DTYPES, dtype_names

Precision = Literal["split", "tf32", "ieee", "float64"]
"""Precision of products of rows: see :func:`accumulate_`."""
_PRECISIONS = get_args(Precision)

_MOST_DIMS = 8  # of the rows that compiled code takes
_LARGEST_WEIGHT = 1e150  # the square of a weight is a float64


class MomentState(Protocol):
    """Tensors of a running second moment; :class:`fastcov.stats.state.CovarianceState` is one."""

    @property
    def moment(self) -> Tensor:
        """Weighted second moment of the rows less the shift: its lower triangle, in tiles.

        See :mod:`fastcov.ops.triangle`. [tiles, 32, 32]
        """

    @property
    def sum(self) -> Tensor:
        """Weighted sum of the rows less the shift. [C]"""

    @property
    def shift(self) -> Tensor:
        """Vector that is subtracted from every row. [C]"""

    @property
    def weight(self) -> Tensor:
        """Sum of the rows' weights. []"""

    @property
    def count(self) -> Tensor:
        """Rows read and rows skipped as non-finite. [2]"""


class WeightedState(MomentState, Protocol):
    """Tensors of a running second moment that keeps its rows' squared weights."""

    @property
    def excess(self) -> Tensor:
        """Squared weights, and number, of the rows not simply added with weight 1. [2]"""


def accumulate_(
    state: MomentState,
    x: Tensor,
    row_weight: Tensor | None = None,
    *,
    row_scale: float = 1.0,
    decay: float = 1.0,
    precision: Precision = "split",
) -> None:
    r"""Adds feature rows to a running second moment, in place.

    .. math:: M \leftarrow d M + \sum_r w_r (x_r - s)(x_r - s)^T

    with d = ``decay``, w = ``row_scale * row_weight`` and s the state's ``shift``, which its first
    rows choose. ``moment`` is kept as a triangle in tiles: ``state.covariance()`` reads it.

    Nothing is copied or cast: ``x`` is read through its strides, so pass views
    (``x.permute(0, 2, 3, 1)`` for NCHW). No host synchronisation. Rows that hold a NaN or an
    infinity are skipped and counted in ``state.count[1]``; rows of weight 0 are left out.

    Negative weights, and weights that are not finite, raise an error before anything is added. On a
    GPU, and in a compiled graph, this check would have to wait for the device: there such rows are
    skipped and counted in ``state.count[1]``.

    One state takes one call at a time. :meth:`fastcov.CovarianceState.update` holds a lock, which
    makes it safe on a CPU from several threads; this function holds none, and no lock orders the
    streams of a GPU. A process that is forked after a call hangs in its next one, as it does in
    torch's own operators that use OpenMP: start processes by "spawn".

    On a CPU with the compiled library, sums of float32 and 16-bit rows do not depend on the number
    of threads. Those of float64 rows do, by up to 4e-16 of the largest entry, and without the
    library all do, float32 by 2e-7; after ``torch.set_num_threads(1)`` they repeat bit for bit.

    ``precision`` chooses how Triton's kernels multiply float32 rows, after the shift is subtracted:

    - "split": as three bfloat16 numbers each, by six products of a GPU's tensor cores. Off by at
      most 1e-5 of the largest entry of S, however many rows.
    - "tf32": cut to 11 significant bits, by one product. The least arithmetic; off by about 1e-3
      of the largest entry, 2e-3 at worst.
    - "ieee": as they are, in float32 without tensor cores. More time, less error.
    - "float64": rows of every dtype, on every device, converted to float64 a piece at a time.
      Products and sums are float64's, whatever the magnitudes of the rows: beside rows of norm 1e5
      the others stay right. On a CPU about twice the time of float32, on a GPU plain torch.

    The first three change no other product. 16-bit rows have exact products; weighted, they are
    split. A CPU, and plain torch where it takes Triton's place (:func:`fastcov.backends`), multiply
    float32 rows in float32 and float64 rows in float64.

    About the shift, sums are right within 1e-5 of the largest entry. A centred covariance is right
    within 1e-5 (1 + q), q the squared distance of the mean from the shift over the variance. On a
    CPU q stays small: the shift follows the mean. A GPU reads 16-bit rows about 0, so that their
    means should not exceed 30 standard deviations where centred figures matter; and hooks of a
    tracker with ``decay`` keep the first rows' shift there. ``summary()`` notes layers with
    q > 1000.

    Args:
        state: Tensors to add to: ``moment`` [tiles, 32, 32], ``sum`` [C], ``shift`` [C],
            ``weight`` [] in float64, ``count`` [2] in int64.
        x: Rows in float32, bfloat16, float16 or float64, last dimension channels. Gradients do not
            pass. [..., C]
        row_weight: One weight a row, bool, float32 or float64, at most 1e150. Gradients do not
            pass. [N] or [...]
        row_scale: Factor on every row's weight, above 0.
        decay: Factor on the sums that the state holds, at least 0.
        precision: Precision of products of float32 rows on a GPU; "float64" of all rows.

    Raises:
        TypeError: If ``x`` is not a tensor of one of these dtypes.
        ValueError: If a shape or device does not fit ``state``, a weight is negative or not finite,
            or ``precision`` is none of these.
        MemoryError: If there is no memory for the call's scratch; the state is then as it was.

    Example:
        >>> from fastcov import CovarianceState
        >>> state = CovarianceState(2)
        >>> accumulate_(state, torch.tensor([[1.0, 0.0], [0.0, 2.0]]))
        >>> state.covariance()
        tensor([[0.5000, 0.0000],
                [0.0000, 2.0000]], dtype=torch.float64)
    """
    channels = len(state.sum)
    check_rows(x)
    check_precision(precision)
    if x.shape[-1] != channels:
        raise ValueError(
            f"x has {x.shape[-1]} channels (shape {tuple(x.shape)}), the state has {channels}: "
            "channels must be the last dimension; permute x, or make a state of its width"
        )
    shape = triangle.shape_of(channels)
    if state.moment.shape != shape:
        raise ValueError(
            f"moment has shape {tuple(state.moment.shape)}, expected {shape} for {channels} "
            "channels: it is a triangle in tiles, which fastcov.ops.triangle.pack makes of a matrix"
        )
    if x.device != state.moment.device:
        raise ValueError(
            f"x is on {x.device}, the state on {state.moment.device}: move one of them"
        )
    _check_factors(row_scale, decay)
    x = x.detach()
    if row_weight is not None:
        row_weight = _flat_weights(row_weight, x)
    if x.dim() > _MOST_DIMS:
        x = x.reshape(-1, channels)
    counted = None
    if row_weight is not None and x.is_cuda:
        # Triton's kernels count rows of weight 0 and add those of negative weight. So weights that
        # are not to be read are set to 0 before the call and the counts put right after it, without
        # waiting for the device.
        is_read, is_skipped = are_read(x, row_weight)
        row_weight = torch.where(is_read, row_weight, 0.0)
        counted = state.count + torch.stack([is_read.sum(), is_skipped.sum()])
    tensors = (state.moment, state.sum, state.shift, state.weight, state.count, x)
    is_followed = decay != 1.0 and x.is_cuda and x.numel() > 0 and not is_wrapped(x)
    if is_followed and ROW_DTYPES[x.dtype].is_centred:
        # Triton's kernels never move a shift; the CPU's kernels and plain torch do.
        aten.follow_mean_(*tensors[:5], _first_matrix(x))
    weights = {"row_weight": row_weight, "row_scale": row_scale, "decay": decay}
    try:
        if precision == "split":
            torch.ops.fastcov.accumulate_(*tensors, **weights)
        else:
            torch.ops.fastcov.accumulate_at_precision_(*tensors, precision, **weights)
    except MemoryError as error:  # compiled code's has no text
        raise MemoryError(
            f"no memory for the scratch of rows {tuple(x.shape)} {x.dtype}: the state is as it was"
        ) from error
    if counted is not None:
        torch.ops.fastcov.assign_(state.count, counted)


def _first_matrix(x: Tensor) -> Tensor:
    # The first few rows, without copying the whole of a strided activation. [N, C]
    while x.dim() > 2:
        x = x[0]
    return x.reshape(-1, x.shape[-1])


def are_read(x: Tensor, row_weight: Tensor) -> tuple[Tensor, Tensor]:
    """Masks of the rows that a weighted call of :func:`accumulate_` reads, and that it skips.

    Args:
        x: Rows, last dimension channels. [..., C]
        row_weight: One weight a row. [N]

    Returns:
        Both masks; rows of weight 0 are in neither. [N] each
    """
    is_read = torch.isfinite(x).all(-1).flatten()
    is_read = is_read & torch.isfinite(row_weight) & (row_weight > 0)
    return is_read, ~is_read & (row_weight != 0)


def _flat_weights(row_weight: Tensor, x: Tensor) -> Tensor:
    rows = x.numel() // x.shape[-1]
    if row_weight.shape not in ((rows,), x.shape[:-1]):
        raise ValueError(
            f"row_weight has shape {tuple(row_weight.shape)}, expected ({rows},) or "
            f"{tuple(x.shape[:-1])}: one weight for each row of x"
        )
    is_weight = row_weight.dtype in (torch.bool, torch.float32, torch.float64)
    if row_weight.device != x.device or not is_weight:
        raise ValueError(
            f"row_weight is {row_weight.dtype} on {row_weight.device}, expected bool, float32 or "
            f"float64 on {x.device}"
        )
    flat = row_weight.detach().reshape(-1).contiguous()
    if flat.dtype == torch.bool:
        return flat.float()
    if flat.is_cpu and not (torch.compiler.is_compiling() or is_wrapped(flat)):
        is_wrong = ~((flat >= 0) & (flat <= _LARGEST_WEIGHT))
        if is_wrong.any():
            index = int(is_wrong.nonzero()[0])
            raise ValueError(
                f"row_weight[{index}] is {float(flat[index])}, expected a number from 0 to "
                f"{_LARGEST_WEIGHT:g}: give rows that are not to be read the weight 0"
            )
    return flat


def _check_factors(row_scale: float, decay: float) -> None:
    if not 0 < row_scale <= _LARGEST_WEIGHT:
        raise ValueError(
            f"row_scale={row_scale}: expected a number above 0, at most {_LARGEST_WEIGHT:g}"
        )
    if not 0 <= decay <= _LARGEST_WEIGHT:
        raise ValueError(f"decay={decay}: expected a number of at least 0, such as 0.99")


def covariance(x: Tensor, *, centered: bool = False, precision: Precision = "split") -> Tensor:
    r"""Second-moment matrix of feature rows; the covariance with ``centered=True``.

    .. math:: S = \frac{1}{N} \sum_r (x_r - c)(x_r - c)^T

    with c = 0, or the mean with ``centered=True`` (the divisor stays N). A GPU then reads a copy of
    16-bit rows in float32. Where a derivative is wanted, in reverse or forward mode, plain torch
    computes both, in float64; call it under ``torch.no_grad()`` where none is.

    Args:
        x: Rows in float32, bfloat16, float16 or float64, last dimension channels. [..., C]
        centered: True subtracts the mean.
        precision: Precision of the products: see :func:`accumulate_`.

    Returns:
        float64, symmetric; NaN where ``x`` has no finite row. [C, C]

    Raises:
        TypeError: If ``x`` is not a tensor of one of these dtypes.
        ValueError: If ``x`` has no channel dimension, or ``precision`` is none of the choices.

    Example:
        >>> covariance(torch.tensor([[1.0, 0.0], [3.0, 0.0]]), centered=True)
        tensor([[1., 0.],
                [0., 0.]], dtype=torch.float64)
    """
    check_rows(x)
    check_precision(precision)
    if has_derivative(x):
        return _derived_covariance(x, centered)
    moments = Moments(x.shape[-1], x.device)
    if is_wrapped(x):
        # Tensors made from x hold one second moment for each example of torch.vmap.
        for name, tensor in vars(moments).items():
            setattr(moments, name, x.new_zeros(tensor.shape, dtype=tensor.dtype))
    if centered and x.is_cuda and precision != "float64" and not ROW_DTYPES[x.dtype].is_centred:
        # Triton's kernels multiply such rows as they are: far from 0 the products would cancel.
        x = x.float()
    accumulate_(moments, x, precision=precision)
    return moments.covariance(centered)


def _derived_covariance(x: Tensor, centered: bool) -> Tensor:
    rows = x.reshape(-1, x.shape[-1]).double()
    is_read = rows.detach().isfinite().all(-1, keepdim=True)
    rows = torch.where(is_read, rows, 0.0)
    count = is_read.sum()
    if centered:
        rows = torch.where(is_read, rows - rows.sum(0) / count, 0.0)
    return rows.mT @ rows / count


class Moments:
    """Tensors of one running second moment, without a lock, weights' squares or merging.

    Args:
        channels: Length of a row, C.
        device: Device of the tensors.
    """

    def __init__(self, channels: int, device: torch.device | str | None = None) -> None:
        # Tensors made under inference_mode could not be updated in training later.
        with torch.inference_mode(False):
            self.moment = triangle.zeros(channels, device)
            self.sum = torch.zeros(channels, dtype=torch.float64, device=device)
            self.shift = torch.zeros(channels, dtype=torch.float64, device=device)
            self.weight = torch.zeros((), dtype=torch.float64, device=device)
            self.count = torch.zeros(2, dtype=torch.int64, device=device)

    def covariance(self, centered: bool = False) -> Tensor:
        """Second-moment matrix of the rows read, the covariance if ``centered``; float64. [C, C]"""
        return covariance_of(self, centered)

    def mean(self) -> Tensor:
        """Mean of the rows read, float64. [C]"""
        return self.sum / self.weight + self.shift


def covariance_of(state: MomentState, centered: bool = False) -> Tensor:
    """Second-moment matrix of the rows that a state has read; the covariance if ``centered``.

    Args:
        state: Tensors of a running second moment.
        centered: True subtracts the mean.

    Returns:
        float64, symmetric; NaN where no row was read. [C, C]
    """
    # In tiles up to the end: the matrix itself is made once.
    mean = state.sum / state.weight
    tiles = state.moment / state.weight
    if centered:
        tiles = tiles - triangle.outer(mean, mean)
    else:
        tiles = tiles + triangle.translation(state.shift, mean, 1.0)
    return triangle.unpack(tiles, len(mean))


def check_precision(precision: object) -> None:
    """Check that ``precision`` is one of the choices of :func:`accumulate_`.

    Raises:
        ValueError: If not; names the choices.
    """
    if precision not in _PRECISIONS:
        choices = ", ".join(map(repr, _PRECISIONS))
        raise ValueError(f"precision={precision!r}: choose one of {choices}")


def check_rows(x: Tensor) -> None:
    """Check that a tensor holds rows of a dtype that is read.

    Raises:
        TypeError: If not a dense tensor of such a dtype.
        ValueError: If there is no channel.
    """
    if not isinstance(x, Tensor):
        raise TypeError(f"x is a {type(x).__name__}, expected a torch.Tensor of rows [..., C]")
    if x.dtype not in ROW_DTYPES:
        raise TypeError(f"x is {x.dtype}, expected {dtype_names()}: convert it first")
    if x.dim() == 0 or x.shape[-1] == 0:
        raise ValueError(f"x has shape {tuple(x.shape)}, expected [..., C] with at least 1 channel")
    if x.layout != torch.strided:
        raise TypeError(f"x has layout {x.layout}, expected a dense tensor: call x.to_dense()")
