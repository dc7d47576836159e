r"""Second moments of an affine layer's output, from those of its input.

Every row that a Linear or a 1x1 convolution gives is y = W x + b, hence

.. math:: \sum_r (y_r - s)(y_r - s)^T = W \Sigma W^T + N m m^T, \quad
    \Sigma = \sum_r (x_r - \bar x)(x_r - \bar x)^T, \quad m = W \bar x + b - s

Where a layer has more output than input channels, and many rows, this is less work than reading
the rows of the output. The sums over k and l of W_ik Sigma_kl W_jl may cancel, and then the small
result holds the rounding of large terms: such calls are read by their rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeGuard

import torch
from torch import Tensor, nn

from fastcov.ops import library
from fastcov.ops.covariance import Moments
from fastcov.ops.reference import SHIFT_ROWS
from fastcov.stats.state import CovarianceState

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_FORWARDS: dict[type[nn.Module], Callable[..., Any]] = {
    kind: kind.forward for kind in (nn.Linear, *_CONVOLUTIONS)
}
# Largest difference between output and map, as a share of the product's root sum of squares:
# float32 stays far below, TF32 lies above.
_TOLERANCE = 3e-5
_COMPARED_CHANNELS = 64
_CHECK_EVERY_CALLS = 16
_OVERHEAD_MACS = 10e6  # time of the small operators around the products, as float32 arithmetic
_MOST_COST = 0.8  # of mapping, as a share of the cost of reading the rows


class AffineInput(NamedTuple):
    """Input rows of one call of an affine layer, and the map that the layer applied.

    Attributes:
        rows: Input, float32. [B, ..., C_in] or [B, C_in, ...]
        channel_dim: Dimension of input and output that holds the channels, -1 or 1.
        weight: Matrix of the map, float32. [C_out, C_in]
        bias: Added vector, float32; None without. [C_out]
    """

    rows: Tensor
    channel_dim: int
    weight: Tensor
    bias: Tensor | None

    def explains(self, output: Tensor) -> bool:
        """True if up to 64 channels of one row of the output agree with the map of the input row.

        False where the layer multiplied in reduced precision, or where other code has changed the
        output.
        """
        rows = self.rows.movedim(self.channel_dim, -1)
        output = output.detach().movedim(self.channel_dim, -1)
        if rows.shape[:-1] != output.shape[:-1]:
            return False
        place = tuple(size // 2 for size in rows.shape[:-1])
        step = -(-output.shape[-1] // _COMPARED_CHANNELS)
        # No matmul: it might use the very precision that is to be found out.
        products = self.weight[::step] * rows[place]
        expected, magnitude = products.sum(1), products.norm(dim=1)
        if not bool(magnitude.any()):
            return False  # a row of zeros tells nothing
        if self.bias is not None:
            expected += self.bias[::step]
            magnitude += self.bias[::step].abs()
        difference = (output[place][::step] - expected).abs()
        return bool((difference <= _TOLERANCE * magnitude).all())


class AffineMap:
    """Map of one affine layer, by which the rows of its outputs are added by way of its inputs.

    :meth:`AffineInput.explains` compares an output with the map in every 16th call.

    Args:
        module: Module that :func:`is_affine` accepts.
    """

    def __init__(self, module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        if isinstance(module, nn.Linear):
            self._channels = (module.in_features, module.out_features)
        else:
            self._channels = (module.in_channels, module.out_channels)
        self._calls = 0
        self._explains = False

    def pays(self, rows: int) -> bool:
        """True if mapping the moments of a number of rows is less work than adding the rows."""
        return _pays(rows, *self._channels)

    def add_to(
        self,
        module: nn.Module,
        args: Any,
        output: Tensor,
        state: CovarianceState,
        row_scale: float = 1.0,
        decay: float = 1.0,
    ) -> bool:
        """Update of a state with a call's rows, as :func:`fastcov.ops.accumulate_` does.

        Returns False, with the state untouched, where the rows themselves must be read: on a GPU;
        in the first call, whose rows choose a shift; where the map does not explain the output, or
        would not be exact (:func:`accumulate_mapped_`).
        """
        if not output.is_cpu:
            return False
        source = affine_input(module, args, output)
        # The count is read last: this takes 2 us, and on a GPU it would wait for the device.
        if source is None or int(state.count[0]) == 0:
            return False
        if self._calls % _CHECK_EVERY_CALLS == 0:
            self._explains = source.explains(output)
        self._calls += 1
        # After a call that could not be mapped, the rows are read until the next check.
        self._explains = self._explains and accumulate_mapped_(state, source, row_scale, decay)
        return self._explains


def is_affine(
    module: nn.Module,
) -> TypeGuard[nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d]:
    """True if a module computes y = W x + b on each row: Linear, 1x1 convolutions."""
    if type(module) is nn.Linear:
        return True
    return (
        isinstance(module, _CONVOLUTIONS)
        and type(module) in _FORWARDS
        and module.groups == 1
        and all(size == 1 for size in module.kernel_size)
        # Two checks: users may change `padding`, and the forward pads with other values than zeros
        # by the private attribute, which keeps the padding of the constructor.
        and module.padding in (0, "same", "valid", (0,) * len(module.kernel_size))
        and not any(module._reversed_padding_repeated_twice)
    )


def affine_input(module: nn.Module, args: Any, output: Tensor) -> AffineInput | None:
    """Input and map of a call, where both give the second moments exactly and for less work.

    None where the module is no longer affine, its weight or forward not torch's own, in other
    dtypes and precisions than float32, and where the output's own rows are less work.
    """
    given = args[0] if args else None
    # Checked in each call: the module may have been changed or wrapped since tracking began.
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
    # Reduced precision that the user chose, by autocast or oneDNN, would reach our products too.
    if torch.is_autocast_enabled("cpu") or not _is_full_precision():
        return None
    if "forward" in module.__dict__ or type(module).forward is not _FORWARDS[type(module)]:
        return None
    channel_dim = -1
    given = given.detach()
    if not isinstance(module, nn.Linear):
        is_plain = isinstance(module.stride, tuple) and weight.numel() == channels_in * channels_out
        if given.dim() != weight.dim() or not is_plain:
            return None  # a single image without dim 0, or a kernel that was changed since
        places = tuple(slice(None, None, step) for step in (1, 1, *module.stride))
        given, channel_dim = given[places], 1
    if given.numel() * channels_out != output.numel() * channels_in:
        return None
    return AffineInput(
        given, channel_dim, weight.detach().flatten(1), None if bias is None else bias.detach()
    )


def _pays(rows: int, channels_in: int, channels_out: int) -> bool:
    # Costs in multiply-adds. A gram is symmetric: half of its entries are computed.
    if not 0 < channels_in < channels_out:
        return False
    row_cost = channels_out**2 / 2
    map_cost = channels_in**2 * (rows / 2 + channels_out) + channels_in * row_cost + _OVERHEAD_MACS
    return map_cost < _MOST_COST * rows * row_cost


def accumulate_mapped_(
    state: CovarianceState, source: AffineInput, row_scale: float = 1.0, decay: float = 1.0
) -> bool:
    """Update of a state on the CPU with output rows, from the input rows' second moments.

    Returns False, with the state untouched, where some rows are not finite, where float32 cannot
    hold the result, and where it may lose more than 2e-6 of the largest entry.
    """
    inputs = Moments(source.weight.shape[1])
    inputs.shift.copy_(_spread_mean(source))
    # A count above 0 keeps this shift. Else the first rows would choose one, and may be unusual.
    inputs.count[0] = 1
    library.accumulate_(*vars(inputs).values(), source.rows, source.channel_dim)
    rows, skipped = inputs.count.tolist()
    rows -= 1
    if skipped or not rows:
        return False
    is_added = library.accumulate_affine_(
        state.moment,
        state.sum,
        state.shift,
        state.weight,
        state.count,
        inputs.moment,
        inputs.sum,
        inputs.shift,
        rows,
        source.weight,
        source.bias,
        row_scale,
        decay,
    )
    return bool(is_added)


def _spread_mean(source: AffineInput) -> Tensor:
    """Mean of a few rows of the call, in the rows' dtype: rows subtract it exactly. [C_in]"""
    sample = source.rows.new_empty(SHIFT_ROWS, source.weight.shape[1])
    library.gather_(sample, source.rows, 0, 0, SHIFT_ROWS, 1, 0, source.channel_dim)
    return sample.mean(0, dtype=torch.float64).float()


def _is_full_precision() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # torch raises where the precision was set for one backend alone
        return False
