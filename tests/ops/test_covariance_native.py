"""The compiled accumulate_ and gather_: layouts, instruction sets, threads, extreme values."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastcov.ops import aten, native, triangle
from fastcov.ops.covariance import Moments
from fastcov.ops.reference import accumulate_reference_, gather_reference_

pytestmark = pytest.mark.skipif(
    "native" not in native.allowed_backends(),
    reason="the library is excluded by FASTCOV_BACKEND",
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
# float32 chains of 256 rows; float64 is only bound by the order of its sums.
BOUND = dict.fromkeys(DTYPES, 5e-6) | {torch.float64: 1e-13}


def images(
    count: int, channels: int, height: int, width: int, dtype: torch.dtype, seed: int = 0
) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(count, channels, height, width, generator=generator) * 2 + 1).to(dtype)


def views(maps: Tensor) -> dict[str, Tensor]:
    """Views of rows [..., C] of the same maps [B, C, H, W] in every layout."""
    last = maps.to(memory_format=torch.channels_last)
    spread = maps.new_empty(*maps.shape[:2], maps.shape[2] * 2, maps.shape[3] + 3)
    sliced = spread[:, :, ::2, 3:].copy_(maps)
    pairs = maps.new_empty(*maps.shape[:1], *maps.shape[2:], maps.shape[1], 2)
    every_other = pairs[..., 1].copy_(maps.permute(0, 2, 3, 1))
    return {
        "NCHW": maps.permute(0, 2, 3, 1),
        "NCHW sliced": sliced.permute(0, 2, 3, 1),
        "channels_last": last.permute(0, 2, 3, 1),
        "tokens": last.permute(0, 2, 3, 1).flatten(1, 2),
        "vectors": last.permute(0, 2, 3, 1).flatten(0, 2),
        "no side by side": every_other,
        "six dimensions": maps.permute(0, 2, 3, 1)[:, None, :, None],
    }


def matrix_of(moments: Moments) -> Tensor:
    return triangle.unpack(moments.moment, len(moments.sum))


def errors(moments: Moments, oracle: Moments) -> tuple[float, float]:
    """Largest error of the moment, and of the sum, against the largest entry of the moment."""
    # About the shift that was found: which one it is changes no covariance.
    step = oracle.shift - moments.shift
    outer = torch.outer(step, oracle.sum)
    moment = matrix_of(oracle) + outer + outer.T + oracle.weight * torch.outer(step, step)
    largest = moment.abs().max()
    difference = matrix_of(moments) - moment
    error = moments.sum - oracle.sum - oracle.weight * step
    sums = error.abs().max() / (largest * oracle.weight).sqrt()
    return float(difference.abs().max() / largest), float(sums)


def check(
    rows: Tensor, row_weight: Tensor | None = None, row_scale: float = 0.5, decay: float = 0.75
) -> None:
    channels = rows.shape[-1]
    moments, oracle = Moments(channels), Moments(channels)
    for _ in range(2):
        torch.ops.fastcov.accumulate_(
            *vars(moments).values(), rows, -1, row_weight, row_scale, decay
        )
        accumulate_reference_(
            **vars(oracle), rows=rows, row_weight=row_weight, row_scale=row_scale, decay=decay
        )
    assert torch.equal(moments.count, oracle.count)
    torch.testing.assert_close(moments.weight, oracle.weight, rtol=1e-13, atol=0)
    if rows.numel() > channels:
        assert max(errors(moments, oracle)) < BOUND[rows.dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 3, 41, 64, 123, 256, 520])
def test_grid_of_layouts(channels: int, dtype: torch.dtype) -> None:
    for rows in views(images(3, channels, 9, 7, dtype)).values():
        check(rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [41, 130])
@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.float64], ids=str)
def test_grid_of_weights(channels: int, dtype: torch.dtype, weight_dtype: torch.dtype) -> None:
    row_weight = torch.rand(2 * 9 * 17, generator=torch.Generator().manual_seed(3)).to(weight_dtype)
    row_weight[5] = 0
    for rows in views(images(2, channels, 9, 17, dtype)).values():
        check(rows, row_weight)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [5, 200])
def test_grid_of_non_finite_rows(channels: int, dtype: torch.dtype) -> None:
    maps = images(3, channels, 13, 11, dtype)
    maps[0, 0, 0, 0] = float("nan")
    maps[1, channels - 1, 12, 3] = float("inf")
    maps[2, channels // 2, 5] = -float("inf")
    for rows in views(maps).values():
        check(rows)
        check(rows, torch.rand(3 * 13 * 11))


@pytest.mark.parametrize("rows", [0, 1, 199, 257, 3000])
@pytest.mark.parametrize("channels", [3, 129, 260])
def test_grid_of_row_counts(channels: int, rows: int, threads: int) -> None:
    check(images(rows, channels, 1, 1, torch.float32).flatten(1))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [41, 200, 520])
def test_grid_of_what_lies_around_a_triangle(
    channels: int, dtype: torch.dtype, threads: int
) -> None:
    # Nothing is added to it, nor aged. Not NaN, which would stay what it is.
    moments = Moments(channels)
    around = torch.full((len(moments.moment) + 2, 32, 32), 7.0, dtype=torch.float64)
    moments.moment = around[1:-1].zero_()
    for rows in (3000, 1, 0):
        maps = images(rows, channels, 1, 1, dtype).flatten(1)
        torch.ops.fastcov.accumulate_(*vars(moments).values(), maps, decay=0.5)
        assert bool((around[[0, -1]] == 7).all())
        assert not moments.moment[-1, channels % 32 :].any()
        assert not moments.moment[-1, :, channels % 32 :].any()


NEEDS = {
    "baseline": set(),
    "avx2": {"avx2", "fma", "f16c"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl"},
}


FLAGS = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())


@pytest.mark.slow
@pytest.mark.parametrize("level", NEEDS)
def test_an_instruction_set_is_obeyed_where_the_processor_has_it(level: str) -> None:
    environment = {**os.environ, "FASTCOV_CPU_LEVEL": level}
    asked = [sys.executable, "-c", "import fastcov; print(fastcov.backends()['cpu'].reason)"]
    reason = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True)
    assert (f"with {level} kernels" in reason.stdout) == (NEEDS[level] <= FLAGS)


@pytest.mark.slow
@pytest.mark.parametrize("level", [level for level in NEEDS if NEEDS[level] <= FLAGS])
def test_instruction_sets_up_to_the_processors_own_pass_the_grid(level: str) -> None:
    environment = {**os.environ, "FASTCOV_CPU_LEVEL": level}
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            __file__,
            "-k",
            "grid_of and (41 or 200)",
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:]


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e10, 1e18, 1e30])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_squares_beyond_float32_neither_overflow_nor_vanish(
    scale: float, dtype: torch.dtype
) -> None:
    rows = (torch.randn(700, 40, generator=torch.Generator().manual_seed(4)) * scale).to(dtype)
    check(rows, row_scale=1.0, decay=1.0)


@pytest.mark.parametrize("channels", [64, 300])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_constant_channels_do_not_drift(channels: int, dtype: torch.dtype) -> None:
    # Every partial sum is rounded the same way: the worst case of a long chain.
    values = torch.linspace(0.5, 2, channels).to(dtype)
    moments = Moments(channels)
    torch.ops.fastcov.accumulate_(*vars(moments).values(), values.expand(1 << 15, -1))
    exact = torch.outer(values.double(), values.double())
    assert float((moments.covariance() - exact).abs().max() / exact.max()) < 1e-5
    assert float(moments.covariance(True).abs().max() / exact.max()) < 1e-12


@pytest.mark.parametrize("channels", [48, 200, 520])
def test_same_bits_again_and_tiles_do_not_depend_on_threads(channels: int) -> None:
    rows = images(2, channels, 40, 30, torch.float32).permute(0, 2, 3, 1)
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (2, 2, 1, 6):
            torch.set_num_threads(threads)
            moments = Moments(channels)
            torch.ops.fastcov.accumulate_(*vars(moments).values(), rows)
            results.append(matrix_of(moments))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(results[0], results[1])
    # Wide layers split tiles, not rows: any number of threads gives the same bits.
    if channels > 128:
        assert torch.equal(results[0], results[2])
        assert torch.equal(results[0], results[3])


def test_decay_without_rows_still_ages_the_state() -> None:
    for channels in (4, 200):
        moments = Moments(channels)
        torch.ops.fastcov.accumulate_(*vars(moments).values(), torch.randn(50, channels))
        before = matrix_of(moments)
        torch.ops.fastcov.accumulate_(*vars(moments).values(), torch.zeros(0, channels), decay=0.5)
        assert torch.equal(matrix_of(moments), before * 0.5)
        assert float(moments.weight) == 25.0
        assert moments.count.tolist() == [50, 0]


def test_channels_last_is_not_copied() -> None:
    rows = images(8, 64, 56, 56, torch.float32).to(memory_format=torch.channels_last)
    moments = Moments(64)
    with torch.profiler.profile(profile_memory=True, acc_events=True) as profile:
        torch.ops.fastcov.accumulate_(*vars(moments).values(), rows.permute(0, 2, 3, 1))
    assert sum(max(event.self_cpu_memory_usage, 0) for event in profile.key_averages()) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("run_length", [1, 8])
def test_gather_in_every_layout(dtype: torch.dtype, run_length: int) -> None:
    for rows in views(images(3, 21, 9, 7, dtype)).values():
        got = torch.zeros(80, 21, dtype=dtype)
        expected = got.clone()
        torch.ops.fastcov.gather_(got, rows, 3, 12345, 70, run_length, -987654321)
        gather_reference_(expected, rows, 3, 12345, 70, run_length, -987654321)
        assert torch.equal(got, expected)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("channels", [1, 21, 64])
@pytest.mark.parametrize("run_length", [1, 8])
def test_gather_on_the_gpu_in_every_layout(
    dtype: torch.dtype, channels: int, run_length: int
) -> None:
    maps = images(3, channels, 9, 7, dtype).cuda()
    for rows in views(maps).values():
        got = torch.zeros(80, channels, dtype=dtype, device="cuda")
        expected = torch.zeros(80, channels, dtype=dtype)
        torch.ops.fastcov.gather_(got, rows, 3, 12345, 70, run_length, -987654321)
        gather_reference_(expected, rows.cpu(), 3, 12345, 70, run_length, -987654321)
        assert torch.equal(got.cpu(), expected)


@pytest.mark.parametrize("gather", [torch.ops.fastcov.gather_, aten.gather_])
@pytest.mark.parametrize("accumulate", [torch.ops.fastcov.accumulate_, aten.accumulate_])
@pytest.mark.parametrize("is_channels_last", [True, False])
def test_channel_dim_stands_for_the_row_view(
    gather: Callable[..., None], accumulate: Callable[..., None], is_channels_last: bool
) -> None:
    maps = images(3, 21, 9, 7, torch.float32).requires_grad_()
    if is_channels_last:
        maps = maps.to(memory_format=torch.channels_last)
    rows = maps.detach().permute(0, 2, 3, 1)
    got, expected = torch.zeros(2, 80, 21)
    gather(got, maps, 3, 12345, 70, 8, 77, 1)
    gather(expected, rows, 3, 12345, 70, 8, 77)
    assert torch.equal(got, expected)
    seen, oracle = Moments(21), Moments(21)
    accumulate(*vars(seen).values(), maps, 1)
    accumulate(*vars(oracle).values(), rows)
    assert all(torch.equal(vars(seen)[name], value) for name, value in vars(oracle).items())


def test_gather_refuses_samples_that_do_not_fit() -> None:
    rows = torch.zeros(2, 5, 3)
    for buffer, buffer_row, samples in (
        (torch.zeros(4, 3), 2, 3),
        (torch.zeros(4, 2), 0, 1),
        (torch.zeros(4, 3, dtype=torch.float64), 0, 1),
        (torch.zeros(4, 3), -1, 2),
    ):
        with pytest.raises(RuntimeError):
            torch.ops.fastcov.gather_(buffer, rows, buffer_row, 0, samples, 1, 0)
