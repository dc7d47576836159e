"""Error bars of the running moments, on every path a CPU can run: relative to the largest entry.

1e-5 for bfloat16, float16 and float32 rows after 2**20 rows and after 10**4 updates, for values
that are worst for what a path does; what the tensor cores add to it is in
tests/kernels/test_truncation.py.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastcov.ops import aten
from fastcov.ops.covariance import Moments
from fastcov.ops.reference import accumulate_reference_
from fastcov.stats.state import CovarianceState

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BAR = dict.fromkeys(DTYPES, 1e-5) | {torch.float64: 1e-12}
PATHS = {"dispatched": torch.ops.fastcov.accumulate_, "aten": aten.accumulate_}

Update = Callable[[Moments, Tensor], None]


@pytest.fixture(params=PATHS)
def update(request: pytest.FixtureRequest) -> Update:
    path = PATHS[request.param]
    return lambda moments, rows: path(*vars(moments).values(), rows)


def exact_moment(rows: Tensor) -> Tensor:
    total = torch.zeros(rows.shape[1], rows.shape[1], dtype=torch.float64)
    # Short chains: a sum of 2^16 equal products in order is off by 1.4e-12 (BLAS with AVX2).
    for part in rows.split(1 << 10):
        total += part.double().T @ part.double()
    return total / len(rows)


def largest_error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


def one_sign(count: int) -> Tensor:
    return torch.rand(count, 16, generator=torch.Generator().manual_seed(2)) + 0.5


def two_values(count: int) -> Tensor:
    sign = torch.randn(count, 16, generator=torch.Generator().manual_seed(3)).sign()
    return sign * (1 + 2**-8 + 2**-16 - 2**-20)


def constant(count: int) -> Tensor:
    return torch.full((count, 16), 1 / 3)


@pytest.mark.slow
@pytest.mark.parametrize("make", [one_sign, two_values, constant])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_million_rows(update: Update, dtype: torch.dtype, make: Callable[[int], Tensor]) -> None:
    rows = make(1 << 20).to(dtype)
    moments = Moments(16)
    update(moments, rows)
    assert largest_error(moments.covariance(), exact_moment(rows)) <= BAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ten_thousand_updates(dtype: torch.dtype) -> None:
    rows = one_sign(10_000 * 4).to(dtype)[:, :8]
    moments = Moments(8)
    for part in rows.split(4):
        torch.ops.fastcov.accumulate_(*vars(moments).values(), part)
    assert moments.count.tolist() == [40_000, 0]
    assert largest_error(moments.covariance(), exact_moment(rows)) <= BAR[dtype]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_mean_ten_thousand_times_std(update: Update, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    rows = (torch.randn(4096, 32, generator=generator, dtype=torch.float64) + 1e4).to(dtype)
    moments = Moments(32)
    for part in rows.split(500):
        update(moments, part)
    centred = rows.double() - rows.double().mean(0)
    assert largest_error(moments.covariance(True), centred.T @ centred / len(rows)) <= 1e-5
    assert largest_error(moments.covariance(), exact_moment(rows)) <= 1e-12


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_keeps_the_bar_of_a_state_about_zero(
    update: Update, dtype: torch.dtype
) -> None:
    """No shift: the centred error may grow with mean**2 / var, and does no more than that."""
    rows = (torch.randn(8192, 24, generator=torch.Generator().manual_seed(4)) + 30).to(dtype)
    moments = Moments(24)
    update(moments, rows)
    centred = rows.double() - rows.double().mean(0)
    exact = centred.T @ centred / len(rows)
    ratio = float((rows.double().mean(0) ** 2 / exact.diag()).max())
    assert largest_error(moments.covariance(True), exact) <= 1e-5 * (1 + ratio)


def test_fp16_near_overflow(update: Update) -> None:
    generator = torch.Generator().manual_seed(5)
    values = torch.rand(3000, 41, generator=generator) * 5504 + 60_000
    rows = (values * torch.randn(3000, 41, generator=generator).sign()).half()
    rows[::7, ::3] = 2.0**-24  # the smallest beside the largest
    rows[5] = 65504.0
    moments = Moments(41)
    update(moments, rows)
    assert moments.count.tolist() == [3000, 0]
    assert largest_error(moments.covariance(), exact_moment(rows)) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("order", ["one by one", "tree"])
def test_merging_many_states_about_many_shifts(dtype: torch.dtype, order: str) -> None:
    generator = torch.Generator().manual_seed(6)
    parts = [
        (torch.randn(40, 12, generator=generator) + 100 * i * (-1) ** i).to(dtype)
        for i in range(32)
    ]
    states = []
    for part in parts:
        state = CovarianceState(12)
        # The oracle adds: what is measured is the merge alone.
        accumulate_reference_(state.moment, state.sum, state.shift, state.weight, state.count, part)
        states.append(state)
    assert len({float(state.shift[0]) for state in states}) == 32
    while len(states) > 1:
        if order == "tree":
            for left, right in zip(states[::2], states[1::2], strict=True):
                left.merge(right)
            states = states[::2]
        else:
            states[0].merge(states.pop(1))
    exact = exact_moment(torch.cat(parts))
    error = float((states[0].covariance() - exact).abs().max())
    assert error <= 1e-12 * float(exact.trace())
    assert states[0].count.tolist() == [32 * 40, 0]
