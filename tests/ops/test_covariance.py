"""accumulate_, gather_ and covariance against their definition in float64."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from fastcov.ops import accumulate_, aten, covariance, triangle
from fastcov.ops.covariance import Moments
from fastcov.ops.reference import (
    accumulate_reference_,
    gather_reference_,
    sample_index_reference,
)

CHANNELS = [1, 3, 41, 64, 123, 256]
ROWS = [0, 1, 199, 8192]
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]

LAYOUTS = {
    "rows": lambda x: x,
    "channels first": lambda x: x.T.contiguous().T,
    "strided": lambda x: torch.stack([x, x], 1).flatten(0, 1)[::2],
    "column slice": lambda x: torch.cat([x, x], 1)[:, : x.shape[1]],
    "images": lambda x: x[None].expand(1, -1, -1),
}


def random_rows(count: int, channels: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(0, -2, channels)
    return (torch.randn(count, channels, generator=generator) * scale + 0.5).to(dtype)


def largest_error(moments: Moments, oracle: Moments) -> float:
    difference = moments.covariance() - oracle.covariance()
    return float(difference.abs().max() / oracle.covariance().abs().max())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", ROWS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_accumulate_matches_reference(channels: int, count: int, dtype: torch.dtype) -> None:
    rows = random_rows(count, channels, dtype)
    moments, oracle = Moments(channels), Moments(channels)
    for part in (rows, rows[: count // 3]):
        accumulate_(moments, part)
        accumulate_reference_(**vars(oracle), rows=part)
    assert moments.count.tolist() == oracle.count.tolist()
    assert float(moments.weight) == float(oracle.weight)
    if count:
        bound = 1e-13 if dtype == torch.float64 else 1e-5
        assert largest_error(moments, oracle) < bound
        torch.testing.assert_close(moments.mean(), oracle.mean(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_layout_gives_the_same_covariance(layout: str, dtype: torch.dtype) -> None:
    rows = random_rows(515, 41, dtype)
    view = LAYOUTS[layout](rows)
    assert torch.equal(view.reshape(-1, 41), rows)
    oracle = Moments(41)
    accumulate_reference_(**vars(oracle), rows=rows)
    moments = Moments(41)
    accumulate_(moments, view)
    assert largest_error(moments, oracle) < 1e-5


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("size", [(2, 24, 7, 7), (3, 64, 16, 12), (1, 5, 1, 1)])
def test_images_in_either_memory_format(
    memory_format: torch.memory_format, size: tuple[int, ...]
) -> None:
    images = torch.randn(size).to(memory_format=memory_format)
    rows = images.permute(0, 2, 3, 1)
    flat = rows.reshape(-1, size[1]).double()
    torch.testing.assert_close(covariance(rows), flat.T @ flat / len(flat), rtol=1e-5, atol=1e-6)
    sliced = rows[:, ::2, 1:]
    if sliced.numel():
        flat = sliced.reshape(-1, size[1]).double()
        torch.testing.assert_close(
            covariance(sliced), flat.T @ flat / len(flat), rtol=1e-5, atol=1e-6
        )


@pytest.mark.parametrize("path", [torch.ops.fastcov.accumulate_, aten.accumulate_])
def test_a_global_precision_does_not_reach_the_products(path: object) -> None:
    """bfloat16 by oneDNN, on processors that have it: off by 1e-3."""
    moments, oracle = Moments(64), Moments(64)
    rows = random_rows(4000, 64, torch.float32, 0)
    torch.set_float32_matmul_precision("medium")
    try:
        path(*vars(moments).values(), rows)
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    accumulate_reference_(**vars(oracle), rows=rows)
    assert largest_error(moments, oracle) < 1e-6
    assert torch.backends.mkldnn.enabled


@pytest.mark.parametrize("path", [torch.ops.fastcov.accumulate_, aten.accumulate_])
def test_weights_scale_and_decay(path: object) -> None:
    moments, oracle = Moments(7), Moments(7)
    for seed in range(3):
        rows = random_rows(100, 7, torch.float32, seed)
        row_weight = torch.rand(100, dtype=torch.float64)
        path(*vars(moments).values(), rows, -1, row_weight, 0.5, 0.9)
        accumulate_reference_(
            **vars(oracle), rows=rows, row_weight=row_weight, row_scale=0.5, decay=0.9
        )
    assert largest_error(moments, oracle) < 1e-6
    torch.testing.assert_close(moments.weight, oracle.weight)


@pytest.mark.parametrize("path", [torch.ops.fastcov.accumulate_, aten.accumulate_])
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_non_finite_rows_are_skipped_and_counted(
    path: object, bad: float, dtype: torch.dtype
) -> None:
    rows = random_rows(300, 24, dtype)
    rows[[0, 17, 299], [0, 5, 23]] = bad
    moments, oracle = Moments(24), Moments(24)
    path(*vars(moments).values(), rows)
    accumulate_reference_(**vars(oracle), rows=rows)
    assert moments.count.tolist() == [297, 3]
    assert largest_error(moments, oracle) < 1e-5


def test_state_survives_a_batch_without_a_finite_row() -> None:
    moments = Moments(3)
    accumulate_(moments, torch.full((5, 3), float("nan")))
    rows = random_rows(50, 3, torch.float32) + 1e4
    accumulate_(moments, rows)
    assert moments.count.tolist() == [50, 5]
    flat = rows.double()
    torch.testing.assert_close(moments.covariance(), flat.T @ flat / 50, rtol=1e-10, atol=0)


def test_same_input_same_bits() -> None:
    rows = random_rows(8192, 123, torch.float32)
    assert torch.equal(covariance(rows), covariance(rows))


@pytest.mark.parametrize("gather", [torch.ops.fastcov.gather_, aten.gather_])
@pytest.mark.parametrize("run_length", [1, 4, 8])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_gather_matches_reference(
    gather: object, run_length: int, channels_last: bool, dtype: torch.dtype
) -> None:
    images = torch.randn(3, 10, 7, 9).to(dtype)
    if channels_last:
        images = images.to(memory_format=torch.channels_last)
    rows = images.permute(0, 2, 3, 1)
    for first, samples, phase in ((0, 20, 12345), (977, 33, -(1 << 62)), (10**9, 1, -1)):
        got = torch.zeros(60, 10, dtype=dtype)
        expected = got.clone()
        gather(got, rows, 7, first, samples, run_length, phase)
        gather_reference_(expected, rows, 7, first, samples, run_length, phase)
        assert torch.equal(got, expected)


@pytest.mark.parametrize("run_length", [1, 8])
def test_every_position_is_read_equally_often(run_length: int) -> None:
    visits = torch.bincount(
        torch.tensor(sample_index_reference(49, 4, 0, 196 * 100, run_length, phase=999)),
        minlength=196,
    )
    assert int(visits.min()) >= 95
    assert int(visits.max()) <= 105


def test_samples_spread_over_all_images() -> None:
    for first in (0, 987, 12345):
        index = torch.tensor(sample_index_reference(100, 8, first, 16, 1, phase=3))
        assert torch.bincount(index // 100, minlength=8).tolist() == pytest.approx([2] * 8, abs=1)


OPERATOR_INPUTS = (random_rows(20, 5, torch.float32), -1, None, 1.0, 1.0)


def test_opcheck() -> None:
    torch.library.opcheck(
        torch.ops.fastcov.accumulate_, (*vars(Moments(5)).values(), *OPERATOR_INPUTS)
    )
    rows = random_rows(20, 5, torch.float32).view(2, 10, 5)
    inputs, outputs, matrix = Moments(5), Moments(7), torch.randn(7, 5)
    accumulate_reference_(**vars(inputs), rows=torch.randn(40, 5))
    state = (outputs.moment, outputs.sum, outputs.shift, outputs.weight, outputs.count)
    given = (inputs.moment, inputs.sum, inputs.shift, 40)
    torch.library.opcheck(
        torch.ops.fastcov.accumulate_affine_, (*state, *given, matrix, None, 1.0, 1.0)
    )
    torch.library.opcheck(torch.ops.fastcov.gather_, (torch.zeros(8, 5), rows, 1, 0, 4, 1, 7))


@pytest.mark.parametrize(
    ("rows", "error", "message"),
    [
        (torch.zeros(4, 3, dtype=torch.int64), TypeError, "int64"),
        (torch.zeros(4, 3, dtype=torch.complex64), TypeError, "complex64"),
        ([[1.0]], TypeError, "list"),
        (torch.zeros(4, 5), ValueError, "5 channels"),
        (torch.tensor(1.0), ValueError, r"shape \(\)"),
        (torch.zeros(4, 0), ValueError, "at least 1 channel"),
        (torch.zeros(4, 3, device="meta"), ValueError, "meta"),
        (torch.zeros(4, 3).to_sparse(), TypeError, "sparse"),
    ],
)
def test_bad_rows_are_named(rows: object, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        accumulate_(Moments(3), rows)


def test_a_square_moment_is_named() -> None:
    state = Moments(33)
    state.moment = torch.zeros(33, 33, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"\(33, 33\), expected \(3, 32, 32\) for 33 channels"):
        accumulate_(state, torch.zeros(4, 33))
    state.moment = triangle.pack(state.moment)
    accumulate_(state, torch.ones(4, 33))
    assert torch.equal(state.covariance(), torch.ones(33, 33, dtype=torch.float64))


def test_bad_row_weights_are_named() -> None:
    with pytest.raises(ValueError, match=r"\(3,\), expected \(4,\)"):
        accumulate_(Moments(3), torch.zeros(4, 3), torch.ones(3))
    with pytest.raises(ValueError, match="int64"):
        accumulate_(Moments(3), torch.zeros(4, 3), torch.ones(4, dtype=torch.int64))
