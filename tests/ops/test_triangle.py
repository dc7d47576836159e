"""The layout of second moments, against dense matrices."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastcov.ops import triangle

CHANNELS = [1, 3, 31, 32, 33, 64, 100, 257]


def symmetric(channels: int, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    matrix = torch.randn(channels, channels, generator=torch.Generator().manual_seed(channels))
    return (matrix + matrix.T).to(dtype)


@pytest.mark.parametrize("channels", CHANNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_packed_matrix_is_the_same_matrix(channels: int, dtype: torch.dtype) -> None:
    matrix = symmetric(channels, dtype)
    tiles = triangle.pack(matrix)
    assert tiles.dtype == dtype
    assert tiles.shape == triangle.zeros(channels).shape
    assert tiles.numel() == triangle.values_of(channels)
    assert torch.equal(triangle.unpack(tiles, channels), matrix)
    assert torch.equal(triangle.diagonal(tiles, channels), matrix.diagonal())


@pytest.mark.parametrize("channels", CHANNELS)
def test_entries_lie_where_the_formula_says(channels: int) -> None:
    matrix = symmetric(channels)
    flat = triangle.pack(matrix).flatten()
    row, column = torch.tril_indices(channels, channels)
    tile = (row // 32) * (row // 32 + 1) // 2 + column // 32
    assert torch.equal(flat[(tile * 32 + row % 32) * 32 + column % 32], matrix[row, column])


@pytest.mark.parametrize("channels", CHANNELS)
def test_undefined_entries_are_not_read(channels: int) -> None:
    matrix = symmetric(channels)
    tiles = triangle.pack(matrix)
    defined = triangle.cleared(torch.ones_like(tiles), channels)
    assert int(defined.sum()) == channels * (channels + 1) // 2
    spoiled = torch.where(defined > 0, tiles, torch.nan)
    assert torch.equal(triangle.unpack(spoiled, channels), matrix)
    assert torch.equal(triangle.cleared(spoiled, channels), tiles * defined)


@pytest.mark.parametrize("channels", CHANNELS)
def test_products_of_vectors(channels: int) -> None:
    left, right = torch.randn(2, channels, dtype=torch.float64)
    found = triangle.unpack(triangle.outer(left, right), channels)
    assert torch.equal(found.tril(), torch.outer(left, right).tril())
    crossed = torch.outer(left, right) + torch.outer(right, left)
    moved = triangle.unpack(triangle.translation(left, right, 3.0), channels)
    torch.testing.assert_close(moved, crossed + 3 * torch.outer(left, left))


def test_a_negative_diagonal_is_raised_in_place() -> None:
    matrix = symmetric(70)
    tiles = triangle.pack(matrix)
    triangle.clamp_diagonal_(tiles, 70)
    matrix.diagonal().clamp_(min=0)
    assert torch.equal(triangle.unpack(tiles, 70), matrix)


def test_kernels_and_compiled_code_know_the_same_tile() -> None:
    header = Path(__file__).parents[2] / "csrc" / "triangle.h"
    assert f"kTriangleTile = {triangle.TILE};" in header.read_text(encoding="utf-8")
    kernels = pytest.importorskip("fastcov.kernels.triangle", reason="needs triton")
    assert kernels.TILE.value == triangle.TILE


def test_a_wide_triangle_takes_about_half_of_a_square() -> None:
    assert triangle.values_of(2048) <= 0.51 * 2048**2
