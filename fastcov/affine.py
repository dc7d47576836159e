r"""Second moments of an affine layer's output, from those of its input.

Every row that a Linear or a 1x1 convolution gives is y = W x + b, hence

.. math:: \sum_r (y_r - s)(y_r - s)^T = W \Sigma W^T + N m m^T, \quad
    \Sigma = \sum_r (x_r - \bar x)(x_r - \bar x)^T, \quad m = W \bar x + b - s

With the Cholesky factor of Sigma = L L^T the right side is the gram of C_in + 1 rows: those of
(W L)^T, and sqrt(N) m. Where a layer widens many more rows than that, reading its input instead is
less work. Sigma is summed in float64: the product with W on both sides squares what W's condition
does to its errors.
"""

from __future__ import annotations

from collections.abc import Callable
from math import nan
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from fastcov.ops import library
from fastcov.ops.covariance import Moments
from fastcov.state import CovarianceState

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Linear, *_CONVOLUTIONS)
}
# Added to Sigma's diagonal, as a share of each entry and for each channel: rounding may leave a
# singular Sigma without a factor. A channel that never varies has nothing to take a share of.
_PIVOT = 4 * torch.finfo(torch.float64).eps
_LEAST_PIVOT = 1e-280
_CANCELLATION = 16  # times fewer squares than a random W gives: from there W L takes float64
_AGREEMENT = 3e-5  # of a product's root sum of squares: float32 stays far below, TF32 above
_COMPARED = 64  # channels
_BLOCK = 128  # columns of L that are multiplied at once: nothing above the diagonal's blocks
_CHECK_PERIOD = 16  # calls
_FLOAT32_MAX = torch.finfo(torch.float32).max
_OVERHEAD = 10e6  # what small operators cost, in multiply-adds of float32
_LEAST_GAIN = 0.8


class AffineInput(NamedTuple):
    """What one call of a layer was given, and the map that it applied.

    Attributes:
        rows: float32; channels in ``channel_dim``. [B, ..., C_in]
        channel_dim: Of input and output, -1 or 1.
        weight: float32. [C_out, C_in]
        bias: float32, if any. [C_out]
    """

    rows: Tensor
    channel_dim: int
    weight: Tensor
    bias: Tensor | None

    def explains(self, output: Tensor) -> bool:
        """Whether some values of a row are what the map makes of the input's.

        Products of reduced precision, and whatever else came between, are told by that.

        Args:
            output: Of the call. [B, ..., C_out] or [B, C_out, ...]
        """
        rows = self.rows.movedim(self.channel_dim, -1)
        output = output.detach().movedim(self.channel_dim, -1)
        if rows.shape[:-1] != output.shape[:-1]:
            return False
        place = tuple(size // 2 for size in rows.shape[:-1])
        step = -(-output.shape[-1] // _COMPARED)
        # No matmul: it might take the reduced precision that is looked for.
        products = self.weight[::step] * rows[place]
        expected, reach = products.sum(1), products.norm(dim=1)
        if not bool(reach.any()):
            return False  # a row of zeros tells nothing
        if self.bias is not None:
            expected += self.bias[::step]
            reach += self.bias[::step].abs()
        difference = (output[place][::step] - expected).abs()
        return bool((difference <= _AGREEMENT * reach).all())


class AffineMap:
    """Adds the rows of one affine layer's outputs to their state, by way of its inputs.

    Whether the map explains the outputs is looked at in every 16th call.
    """

    def __init__(self) -> None:
        self._calls = 0
        self._explains = False

    def add_to(
        self,
        module: nn.Module,
        args: Any,
        output: Tensor,
        state: CovarianceState,
        row_scale: float = 1.0,
        decay: float = 1.0,
    ) -> bool:
        """Adds a call's rows as :func:`fastcov.ops.accumulate_` does.

        Args:
            module: One that :func:`is_affine` accepts.
            args: Of its forward.
            output: What it returned.
            state: Of the output.
            row_scale: Factor on every row's weight.
            decay: Factor on what the state holds.

        Returns:
            False, with the state untouched, where the rows themselves must be read: on a GPU, the
            first ones, which choose a shift, and wherever this module tells the two apart.
        """
        # On a GPU, reading the count would wait for the device.
        if not output.is_cpu or int(state.count[0]) == 0:
            return False
        source = affine_input(module, args, output)
        if source is None:
            return False
        if self._calls % _CHECK_PERIOD == 0:
            self._explains = source.explains(output)
        self._calls += 1
        return self._explains and accumulate_mapped_(state, source, row_scale, decay)


def is_affine(
    module: nn.Module,
) -> TypeGuard[nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """Whether a module's rows may be mapped from its input's: Linear, 1x1 convolutions."""
    if type(module) is nn.Linear:
        return True
    return (
        isinstance(module, _CONVOLUTIONS)
        and type(module) in _FORWARDS
        and module.groups == 1
        and all(size == 1 for size in module.kernel_size)
        and all(width == 0 for width in module._reversed_padding_repeated_twice)
    )


def affine_input(module: nn.Module, args: Any, output: Tensor) -> AffineInput | None:
    """Input and map of a call, where second moments are cheaper to have from them.

    Args:
        module: One that :func:`is_affine` accepts.
        args: Of its forward.
        output: What it returned.

    Returns:
        None where the module is no longer affine, its weight or forward not torch's own, in other
        dtypes and precisions than float32, and where the output's own rows are less work.
    """
    given = args[0] if args else None
    # Asked again: what it was when tracking began may have been changed or wrapped since.
    if not is_affine(module):
        return None
    if type(given) is not Tensor or given.layout is not torch.strided or given.dim() < 2:
        return None
    weight, bias = module.weight, module.bias
    if type(weight) not in (Tensor, nn.Parameter) or weight.layout is not torch.strided:
        return None
    channels_out, channels_in = weight.shape[:2]
    if not _pays(output.numel() // channels_out, channels_in, channels_out):
        return None
    if not (output.dtype is given.dtype is weight.dtype is torch.float32):
        return None
    # Reduced precision of the user's choice, by autocast or oneDNN, would reach products here too.
    if torch.is_autocast_enabled("cpu") or not _is_full_precision():
        return None
    if "forward" in module.__dict__ or type(module).forward is not _FORWARDS[type(module)]:
        return None
    channel_dim = -1
    given = given.detach()
    if not isinstance(module, nn.Linear):
        is_plain = isinstance(module.stride, tuple) and weight.numel() == channels_in * channels_out
        if given.dim() != weight.dim() or not is_plain:
            return None  # a single image, or another kernel by now
        places = tuple(slice(None, None, step) for step in (1, 1, *module.stride))
        given, channel_dim = given[places], 1
    return AffineInput(
        given, channel_dim, weight.detach().flatten(1), None if bias is None else bias.detach()
    )


def _pays(rows: int, channels_in: int, channels_out: int) -> bool:
    # Multiply-adds of float32, two for one of float64; a gram is half of a square.
    if channels_out <= channels_in:
        return False
    row_cost = channels_out**2 / 2
    mapping = channels_in**2 * (rows + 2 * channels_in + channels_out) + _OVERHEAD
    return mapping + channels_in * row_cost < _LEAST_GAIN * rows * row_cost


def accumulate_mapped_(
    state: CovarianceState, source: AffineInput, row_scale: float = 1.0, decay: float = 1.0
) -> bool:
    """Adds the rows that a map makes of its input.

    Args:
        state: Of the output, with a shift, on the CPU.
        source: Of the call.
        row_scale: Factor on every row's weight.
        decay: Factor on what the state holds.

    Returns:
        False, with the state untouched, where some rows are not finite, or may have overflowed.
    """
    inputs = Moments(source.weight.shape[1])
    library.accumulate_(
        *vars(inputs).values(), source.rows, None, 1.0, 1.0, source.channel_dim, True
    )
    rows, skipped = inputs.count.tolist()
    if skipped or not rows:
        return False
    mean = source.weight.double() @ inputs.mean() - state.shift
    if source.bias is not None:
        mean += source.bias
    mapped, energy = _mapped_rows(inputs, source.weight)
    # The sum of all squares: where float32 holds it, no output has overflowed.
    if not energy + rows * float(mean @ mean) < _FLOAT32_MAX:
        return False
    mapped[-1] = mean * rows**0.5
    library.accumulate_(
        state.moment,
        torch.zeros_like(state.sum),
        torch.zeros_like(state.shift),
        torch.zeros_like(state.weight),
        torch.ones_like(state.count),  # none would choose a shift
        mapped,
        None,
        row_scale,
        decay,
    )
    state.sum.mul_(decay).add_(mean, alpha=rows * row_scale)
    state.weight.mul_(decay).add_(rows * row_scale)
    state.count[0] += rows
    return True


def _mapped_rows(inputs: Moments, weight: Tensor) -> tuple[Tensor, float]:
    # (W L)^T and room for one row more, [C_in + 1, C_out]; the sum of its squares, NaN if there
    # is no L.
    channels_out, channels_in = weight.shape
    mapped = weight.new_empty(channels_in + 1, channels_out)
    scatter = inputs.moment.addr(inputs.sum, inputs.sum / inputs.weight, alpha=-1)
    scatter.diagonal().add_(inputs.moment.diagonal(), alpha=_PIVOT * channels_in).add_(_LEAST_PIVOT)
    factor, failure = torch.linalg.cholesky_ex(scatter)
    if int(failure):
        return mapped, nan
    product, lower = mapped[:-1], factor.float()
    for first in range(0, channels_in, _BLOCK):
        last = first + _BLOCK
        torch.mm(lower[first:, first:last].T, weight[:, first:].T, out=product[first:last])
    energy = _energy(product)
    if not float(scatter.trace()) * _energy(weight) <= _CANCELLATION * channels_in * energy:
        product.copy_(torch.mm(factor.T, weight.T.double()))
        energy = _energy(product)
    return mapped, energy


def _is_full_precision() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for one backend alone
        return False


def _energy(matrix: Tensor) -> float:
    flat = matrix.flatten()
    return float(flat.dot(flat))
