"""Covariances of 16-bit rows multiplied by AMX: their parts lose nothing, whatever the values."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastcov.ops import native, triangle
from fastcov.ops.covariance import Moments
from fastcov.ops.reference import accumulate_reference_

REASON = native.status()["cpu"].reason
pytestmark = pytest.mark.skipif("amx" not in REASON, reason=f"left out: no AMX here ({REASON})")

DTYPES = [torch.bfloat16, torch.float16]
# A tenth of the bar of 1e-5: weighted rows of one magnitude in two parts miss it.
BOUND = 1e-6
CHANNELS = 160
"""AMX multiplies from 129 on."""


def signs(rows: int, channels: int) -> Tensor:
    """One sign a row: products of two channels all have one sign, as their errors have."""
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, 1, generator=generator).sign().expand(-1, channels)


VALUES: dict[str, Callable[[int, int], Tensor]] = {
    "half way between two parts": lambda n, c: signs(n, c) * (1 + 2**-8 - 2**-17 - 2**-20),
    "last bits": lambda n, c: signs(n, c) * (1 + 2**-8 + 2**-16 - 2**-20),
    "below two": lambda n, c: signs(n, c) * (2 - 2**-23),
    "a third": lambda n, c: signs(n, c) / 3,
    "many magnitudes": lambda n, c: signs(n, c) * torch.linspace(0.5, 2, c),
    "one sign": lambda n, c: torch.rand(n, c, generator=torch.Generator().manual_seed(8)) + 0.5,
    "mean >> std": lambda n, c: torch.randn(n, c, generator=torch.Generator().manual_seed(9)) + 1e4,
}


def error(rows: Tensor, moments: Moments | None = None, row_weight: Tensor | None = None) -> float:
    moments = moments or Moments(rows.shape[-1])
    oracle = Moments(rows.shape[-1])
    for name, value in vars(moments).items():
        getattr(oracle, name).copy_(value)
    torch.ops.fastcov.accumulate_(*vars(moments).values(), rows, row_weight=row_weight)
    accumulate_reference_(**vars(oracle), rows=rows, row_weight=row_weight)
    assert torch.equal(moments.count, oracle.count)
    # About the shift that was found: which one it is changes no covariance.
    step = oracle.shift - moments.shift
    outer = torch.outer(step, oracle.sum)
    channels = rows.shape[-1]
    moment = triangle.unpack(oracle.moment, channels)
    moment = moment + outer + outer.T + oracle.weight * torch.outer(step, step)
    largest = moment.abs().max().clamp(min=1e-300)
    return float((triangle.unpack(moments.moment, channels) - moment).abs().max() / largest)


@pytest.mark.parametrize("values", VALUES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_that_are_worst_for_parts(values: str, dtype: torch.dtype) -> None:
    rows = VALUES[values](20_000, CHANNELS)
    if dtype == torch.float16:
        rows = rows.clamp(-6e4, 6e4)
    assert error(rows.to(dtype)) < BOUND


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "value", [1 + 2**-8 - 2**-17 - 2**-20, 1 + 2**-8 + 2**-16 - 2**-20, 2 - 2**-23, 1 / 3]
)
def test_weights_that_are_worst_for_parts(value: float, dtype: torch.dtype) -> None:
    """A weighted row is as good as float32: it takes three parts."""
    rows = signs(20_000, CHANNELS).to(dtype)
    weights = torch.full((20_000,), value, dtype=torch.float64).square()
    assert error(rows, row_weight=weights) < BOUND


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [1, 31, 33, 199, 8192])
@pytest.mark.parametrize("channels", [129, 144, 256, 1128])
def test_sizes_that_end_inside_a_tile(
    channels: int, count: int, dtype: torch.dtype, threads: int
) -> None:
    rows = torch.randn(count + 5, channels, generator=torch.Generator().manual_seed(1)) + 1
    moments = Moments(channels)
    assert error(rows[:5].to(dtype), moments) < BOUND
    assert error(rows[5:].to(dtype), moments) < BOUND


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_half_precision_that_is_not_exact_in_its_own_parts(dtype: torch.dtype) -> None:
    """Roots of weights, and the shift of a state that began with float32 rows."""
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(3000, 160, generator=generator)
    weights = torch.full((3000,), 1 / 3)
    assert error(rows.to(dtype), row_weight=weights) < BOUND
    moments = Moments(160)
    torch.ops.fastcov.accumulate_(*vars(moments).values(), rows + 1 / 3)
    assert float(moments.shift.abs().min()) > 0
    assert error(rows.to(dtype), moments) < BOUND


@pytest.mark.parametrize("scale", [1e-37, 1e-30, 1e-13, 1e14, 1e18, 1e37])
def test_parts_of_extreme_values_neither_vanish_nor_overflow(scale: float) -> None:
    rows = torch.randn(700, CHANNELS, generator=torch.Generator().manual_seed(4)) * scale
    assert error(rows.bfloat16()) < BOUND
    assert error(rows.bfloat16(), row_weight=torch.full((700,), 1 / 3)) < BOUND


def test_a_row_that_is_not_finite_leaves_no_trace_in_its_step() -> None:
    rows = torch.randn(100, CHANNELS, generator=torch.Generator().manual_seed(5))
    rows[40, 7] = float("inf")
    rows[41, CHANNELS - 1] = float("nan")
    moments = Moments(CHANNELS)
    assert error(rows.bfloat16(), moments) < BOUND
    assert moments.count.tolist() == [98, 2]
