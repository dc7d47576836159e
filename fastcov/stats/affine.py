r"""Second moments of an affine layer's output, from those of its input.

Every row that a Linear or a 1x1 convolution gives is y = W x + b, hence

.. math:: \sum_r (y_r - s)(y_r - s)^T = W \Sigma W^T + N m m^T, \quad
    \Sigma = \sum_r (x_r - \bar x)(x_r - \bar x)^T, \quad m = W \bar x + b - s

Where a layer widens many more rows than it has channels, this is less work than reading the rows.
Sums over k of W_ik Sigma_kl W_jl may cancel, and what is left then holds the rounding of terms
that are larger than itself: such layers are read by their rows.
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
_AGREEMENT = 3e-5  # of a product's root sum of squares: float32 stays far below, TF32 above
_COMPARED = 64  # channels
_CHECK_PERIOD = 16  # calls
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

    Args:
        module: One that :func:`is_affine` accepts.
    """

    def __init__(self, module: nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) -> None:
        if isinstance(module, nn.Linear):
            self._channels = (module.in_features, module.out_features)
        else:
            self._channels = (module.in_channels, module.out_channels)
        self._calls = 0
        self._explains = False

    def pays(self, rows: int) -> bool:
        """True if mapping the moments of so many rows is less work than adding the rows."""
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
        """Adds a call's rows as :func:`fastcov.ops.accumulate_` does.

        Args:
            module: One that :func:`is_affine` accepts.
            args: Of its forward.
            output: What it returned.
            state: Of the output.
            row_scale: Factor on every row's weight.
            decay: Factor on what the state holds.

        Returns:
            False, with the state untouched, where the rows themselves must be read: on a GPU; in
            the first call, whose rows choose a shift; where the map does not explain the output,
            or would not be exact (:func:`accumulate_mapped_`).
        """
        if not output.is_cpu:
            return False
        source = affine_input(module, args, output)
        # The count is asked for last: it takes 2 us, and on a GPU it would wait for the device.
        if source is None or int(state.count[0]) == 0:
            return False
        if self._calls % _CHECK_PERIOD == 0:
            self._explains = source.explains(output)
        self._calls += 1
        # What could not be mapped is not tried again before the next look.
        self._explains = self._explains and accumulate_mapped_(state, source, row_scale, decay)
        return self._explains


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
        # The first may be changed; the second is what padding with other than zeros goes by.
        and module.padding in (0, "same", "valid", (0,) * len(module.kernel_size))
        and not any(module._reversed_padding_repeated_twice)
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
    if given.numel() * channels_out != output.numel() * channels_in:
        return None
    return AffineInput(
        given, channel_dim, weight.detach().flatten(1), None if bias is None else bias.detach()
    )


def _pays(rows: int, channels_in: int, channels_out: int) -> bool:
    # Multiply-adds; a gram is half of a square.
    if not 0 < channels_in < channels_out:
        return False
    row_cost = channels_out**2 / 2
    mapping = channels_in**2 * (rows / 2 + channels_out) + channels_in * row_cost + _OVERHEAD
    return mapping < _LEAST_GAIN * rows * row_cost


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
        False, with the state untouched, where some rows are not finite, where float32 cannot hold
        the result, and where it may lose more than 2e-6 of the largest entry.
    """
    inputs = Moments(source.weight.shape[1])
    inputs.shift.copy_(_spread_mean(source))
    inputs.count[0] = 1  # holds the shift: the first rows, which would choose one, may be unusual
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
    # Of rows from all over the call, rounded to the rows' dtype: subtracted exactly. [C_in]
    sample = source.rows.new_empty(SHIFT_ROWS, source.weight.shape[1])
    library.gather_(sample, source.rows, 0, 0, SHIFT_ROWS, 1, 0, source.channel_dim)
    return sample.mean(0, dtype=torch.float64).float()


def _is_full_precision() -> bool:
    try:
        return torch.get_float32_matmul_precision() == "highest"
    except RuntimeError:  # set for one backend alone
        return False
