"""Where rows are read about: means far above the spread, means that leave, rows near overflow."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from fastcov.ops import aten, covariance
from fastcov.ops.covariance import Moments
from fastcov.ops.reference import accumulate_reference_

PATHS = {"dispatched": torch.ops.fastcov.accumulate_, "aten": aten.accumulate_}
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

Add = Callable[..., None]


@pytest.fixture(params=PATHS)
def add(request: pytest.FixtureRequest) -> Add:
    path = PATHS[request.param]
    return lambda moments, rows, *options: path(*vars(moments).values(), rows, -1, *options)


def normal(count: int, channels: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, channels, generator=generator, dtype=torch.float64)


def centred(rows: Tensor, weights: Tensor | None = None) -> Tensor:
    weights = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights
    share = weights / weights.sum()
    away = rows.double() - share @ rows.double()
    return (away * share[:, None]).T @ away


def error(found: Tensor, exact: Tensor) -> float:
    return float((found - exact).abs().max() / exact.abs().max())


# bfloat16 holds no spread of 1 beside means above 250, float16 none beside means above 2000.
@pytest.mark.parametrize(
    ("dtype", "mean", "std"),
    [
        (torch.bfloat16, 3, 1),
        (torch.bfloat16, 100, 1),
        (torch.bfloat16, 1000, 30),
        (torch.bfloat16, -1e30, 1e28),
        (torch.float16, 3, 1),
        (torch.float16, 100, 1),
        (torch.float16, 1000, 1),
        (torch.float16, -6e4, 60),
        (torch.float32, 1000, 1),
        (torch.float32, -1e30, 1e25),
    ],
)
@pytest.mark.parametrize("channels", [24, 160])  # by AMX, where the processor has it, the second
def test_centred_covariance_where_the_mean_is_far_above_the_spread(
    add: Add, dtype: torch.dtype, mean: float, std: float, channels: int
) -> None:
    rows = (normal(4096, channels) * std + mean).to(dtype)
    moments = Moments(channels)
    for part in rows.split(1500):
        add(moments, part)
    assert error(moments.covariance(True), centred(rows)) < 1e-5
    assert error(covariance(rows, centered=True), centred(rows)) < 1e-5
    exact = rows.double().T @ rows.double() / len(rows)
    assert error(moments.covariance(), exact) < 1e-5
    torch.testing.assert_close(moments.mean(), rows.double().mean(0), rtol=1e-6, atol=1e-6 * std)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_call_of_few_rows(add: Add, dtype: torch.dtype) -> None:
    for count in (2, 5, 15):
        rows = (normal(count, 160, count) * 2 + 500).to(dtype)
        moments = Moments(160)
        add(moments, rows)
        assert error(moments.covariance(True), centred(rows)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("channels", [24, 160])
def test_sixteen_bit_rows_with_outliers_and_small_values(
    add: Add, dtype: torch.dtype, channels: int
) -> None:
    rows = normal(3000, channels) + 100
    rows[1000:, ::3] = normal(2000, channels, 1)[:, ::3]  # a mean of 33, and values about 0
    rows[5, 1], rows[7, 2], rows[9, 3] = 1e-4, -3e4, 0.0
    rows = rows.to(dtype)
    moments = Moments(channels)
    for part in rows.split(700):
        add(moments, part)
    assert error(moments.covariance(True), centred(rows)) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("decay", [0.5, 0.99])
@pytest.mark.parametrize("channels", [24, 160])
def test_a_shift_follows_the_mean_under_decay(
    add: Add, dtype: torch.dtype, decay: float, channels: int
) -> None:
    far = 250.0 if dtype == torch.bfloat16 else 1e4
    parts = [torch.zeros(70, channels, dtype=torch.float64)]
    parts += [normal(70, channels, seed) * far / 1000 + far for seed in range(40)]
    parts += [normal(70, channels, seed) - far for seed in range(40)]
    moments, seen = Moments(channels), []
    for number, part in enumerate(parts):
        seen.append(part.to(dtype))
        add(moments, seen[-1], None, 1.0, decay)
        if number in (1, 5, 40, 41, 60, 80):
            last = seen[-70:] if decay == 0.5 else seen
            age = torch.arange(len(last) - 1, -1, -1, dtype=torch.float64)
            exact = centred(torch.cat(last), (decay**age).repeat_interleave(70))
            assert error(moments.covariance(True), exact) < 1e-5, number
            assert float(moments.covariance(True).diagonal().min()) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_zeros_first_do_not_hold_the_shift_of_all_that_follows(
    add: Add, dtype: torch.dtype
) -> None:
    rows = torch.cat([torch.zeros(70, 8).double(), normal(20_000, 8) + 2000]).to(dtype)
    moments = Moments(8)
    for part in rows.split(70):
        add(moments, part)
    assert error(moments.covariance(True), centred(rows)) < 1e-6


def test_rows_near_the_largest_number_are_read(add: Add) -> None:
    for first, second in ((3e38, -3e38), (-3.4e38, 3.4e38), (3e38, 3e38), (1e31, -3.4e38)):
        rows = torch.tensor([[first, 1.0], [second, 3.0]])
        moments = Moments(2)
        for part in rows.split(1):
            add(moments, part)
        assert moments.count.tolist() == [2, 0]
        exact = rows.double().T @ rows.double() / 2
        assert error(moments.covariance(), exact) < 1e-6
        assert float(moments.mean()[1]) == 2


@pytest.mark.parametrize("weight", [1e-30, 0.3, 7.0, 1e30])
def test_rows_near_the_largest_number_are_weighed(add: Add, weight: float) -> None:
    rows = (normal(100, 5) * 8e37).float()
    weights = torch.full((100,), weight, dtype=torch.float64)
    weights[::2] *= 3
    moments = Moments(5)
    add(moments, rows, weights)
    assert moments.count.tolist() == [100, 0]
    exact = (rows.double() * weights[:, None]).T @ rows.double() / weights.sum()
    assert error(moments.covariance(), exact) < 1e-6


@pytest.mark.parametrize(
    ("dtype", "largest"), [(torch.float32, 3.3e38), (torch.float64, 1.7e308)], ids=str
)
@pytest.mark.parametrize("weight", [1.9, 1e-30, 3.99e100])
def test_rows_at_the_largest_number_are_weighed(
    add: Add, dtype: torch.dtype, largest: float, weight: float
) -> None:
    rows = torch.tensor([[largest, 1.0], [-largest, 3.0], [largest, 5.0]], dtype=dtype)
    moments = Moments(2)
    add(moments, rows, torch.full((3,), weight, dtype=torch.float64))
    assert moments.count.tolist() == [3, 0]
    assert float(moments.weight) == pytest.approx(3 * weight)
    if dtype == torch.float32:
        exact = rows.double().T @ rows.double() / 3
        assert error(moments.covariance(), exact) < 1e-6


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("offset", [1 / 3, 1e6 + 1 / 3, 1e100])
def test_rows_of_another_dtype_on_a_state_of_float64(
    add: Add, dtype: torch.dtype, offset: float
) -> None:
    """The shift of float64 rows has more digits, or a size, that others cannot subtract."""
    first = normal(50, 6) + offset
    rows = (normal(300, 6, 1) + 100).to(dtype)
    moments, oracle = Moments(6), Moments(6)
    for part in (first, rows):
        add(moments, part)
        accumulate_reference_(**vars(oracle), rows=part)
    assert moments.count.tolist() == [350, 0]
    assert error(moments.covariance(), oracle.covariance()) < 1e-9
    if offset < 1:
        assert error(moments.covariance(True), oracle.covariance(True)) < 1e-6


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_unusual_first_rows_of_a_later_call_do_not_move_the_shift(
    add: Add, dtype: torch.dtype
) -> None:
    parts = [normal(100, 8) + 20, normal(20_000, 8, 1) + 20]
    parts[1][:70] += 400
    moments = Moments(8)
    for part in parts:
        add(moments, part.to(dtype))
    assert float((moments.shift - 20).abs().max()) < 1
    assert error(moments.covariance(True), centred(torch.cat(parts).to(dtype))) < 1e-5
