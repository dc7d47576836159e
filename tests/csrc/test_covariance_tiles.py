"""csrc/covariance_driver.h multiplies half of a gram, once, on the threads that torch has."""

from __future__ import annotations

import pytest
import torch

GRAMS = ["float32", "float64", "matrix"]
WIDTHS = [1, 16, 17, 41, 64, 123, 128, 129, 200, 256, 520, 1128]
THREADS = [1, 2, 3, 6, 40]


def counted(tiles, gram: str, rows: int, channels: int, threads: int):
    """Most pieces of work at once, channels of a side, rows multiplied [sides, sides]."""
    results, _ = tiles(gram, rows, channels, threads)
    pieces, side = (int(value) for value in results[:2])
    sides = -(-channels // side)
    return pieces, side, results[2:].reshape(sides, sides)


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("rows", [1, 199, 3000])
@pytest.mark.parametrize("gram", GRAMS)
def test_every_row_meets_each_tile_of_the_lower_triangle_once(
    tiles, gram: str, rows: int, threads: int
) -> None:
    for channels in WIDTHS:
        _, _, multiplied = counted(tiles, gram, rows, channels, threads)
        assert torch.equal(multiplied, rows * torch.ones_like(multiplied).tril()), channels


@pytest.mark.parametrize(
    ("gram", "bound"), [("float32", 0.51), ("float64", 0.51), ("matrix", 0.52)]
)
def test_a_wide_layer_takes_half_the_multiplications(tiles, gram: str, bound: float) -> None:
    _, side, multiplied = counted(tiles, gram, 300, 1024, 2)
    assert float(multiplied.sum()) * side**2 <= bound * 300 * 1024**2


@pytest.mark.parametrize("threads", THREADS)
@pytest.mark.parametrize("gram", GRAMS)
@pytest.mark.parametrize("channels", [128, 256, 520, 1128])  # rows are split, then tiles
def test_work_is_cut_for_the_threads_that_torch_has(
    tiles, gram: str, channels: int, threads: int
) -> None:
    pieces, _, _ = counted(tiles, gram, 20_000, channels, threads)
    assert pieces == threads


def test_little_work_stays_on_one_thread(tiles) -> None:
    assert counted(tiles, "float32", 100, 32, 6)[0] == 1
