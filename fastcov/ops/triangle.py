"""Layout of a second moment: the lower triangle of a symmetric matrix, in square tiles.

A matrix [C, C] is cut into tiles of 32 by 32; the last row and column of tiles may be cut short.
The tiles on and below the diagonal lie one after the other, row by row, each contiguous:

    0
    1 2
    3 4 5        tile of entry (i, j): I (I + 1) / 2 + J with I = i // 32, J = j // 32

So a state takes about half of a square's memory, and kernels, which compute tiles, write each
tile to one place. What a diagonal tile holds above the diagonal, and what the last tiles hold
beyond the channels, is undefined but finite. csrc/triangle.h and kernels/triangle.py know this
layout too; everything else asks one of the three.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

TILE = 32
"""Rows and columns of a tile: a multiple of what every kernel computes at once on a CPU."""


def tiles_of(channels: int) -> int:
    """Number of tiles of a triangle.

    Example:
        >>> tiles_of(32), tiles_of(33), tiles_of(2048)
        (1, 3, 2080)
    """
    edges = _edges_of(channels)
    return edges * (edges + 1) // 2


def shape_of(channels: int) -> tuple[int, int, int]:
    """Sizes of a triangle's tensor."""
    return tiles_of(channels), TILE, TILE


def values_of(channels: int) -> int:
    """Number of values that a triangle takes.

    Example:
        >>> values_of(2048) / 2048**2
        0.5078125
    """
    return tiles_of(channels) * TILE * TILE


def zeros(channels: int, device: torch.device | str | None = None) -> Tensor:
    """Triangle of zeros, float64. [tiles, 32, 32]"""
    return torch.zeros(shape_of(channels), dtype=torch.float64, device=device)


def pack(matrix: Tensor) -> Tensor:
    """Triangle of a symmetric matrix, of which the lower half and the diagonal tiles are read.

    Args:
        matrix: Any dtype, which stays. [C, C]

    Returns:
        The tiles. [tiles, 32, 32]

    Example:
        >>> unpack(pack(torch.tensor([[1.0, 5.0], [5.0, 2.0]])), 2)
        tensor([[1., 5.],
                [5., 2.]])
    """
    edges = _edges_of(len(matrix))
    missing = edges * TILE - len(matrix)
    padded = functional.pad(matrix, (0, missing, 0, missing)) if missing else matrix
    row, column = _numbers(edges, matrix.device)
    return padded.reshape(edges, TILE, edges, TILE).transpose(1, 2)[row, column]


def unpack(tiles: Tensor, channels: int) -> Tensor:
    """Symmetric matrix [C, C], both halves, of a triangle [tiles, 32, 32]."""
    edges = _edges_of(channels)
    row, column = _numbers(edges, tiles.device)
    matrix = tiles.new_empty(edges * TILE, edges * TILE)
    blocks = matrix.view(edges, TILE, edges, TILE).transpose(1, 2)
    blocks[column, row] = tiles.mT
    blocks[row, column] = tiles
    number = torch.arange(edges, device=tiles.device)
    lower = blocks[number, number].tril()
    blocks[number, number] = lower + lower.tril(-1).mT
    return matrix[:channels, :channels].contiguous()


def diagonal(tiles: Tensor, channels: int) -> Tensor:
    """Copy of a triangle's diagonal. [C]"""
    squares = tiles[_on_diagonal(channels, tiles.device)]
    return squares.diagonal(dim1=1, dim2=2).reshape(-1)[:channels]


def clamp_diagonal_(tiles: Tensor, channels: int) -> None:
    """Lower bound of 0 for the diagonal: sums of squares, whatever rounding says."""
    number = _on_diagonal(channels, tiles.device)
    squares = tiles[number]
    squares.diagonal(dim1=1, dim2=2).clamp_(min=0)
    tiles[number] = squares


def outer(left: Tensor, right: Tensor) -> Tensor:
    """Triangle [tiles, 32, 32] of the products ``left[i] * right[j]`` of two vectors. [C] each"""
    rows, columns = _spread(torch.stack((left, right)))
    return rows[0] * columns[1]


def translation(step: Tensor, total: Tensor, weight: Tensor | float) -> Tensor:
    r"""Triangle of the second moment's gain where every row grows by a vector.

    .. math:: s t^T + t s^T + w s s^T

    Args:
        step: The vector, s: the shift before, less the one after. [C]
        total: Sum of the rows before, t. [C]
        weight: Sum of the rows' weights, w. []

    Returns:
        The tiles. [tiles, 32, 32]
    """
    rows, columns = _spread(torch.stack((step, total)))
    crossed = rows[0] * columns[1] + rows[1] * columns[0]
    return crossed + weight * (rows[0] * columns[0])


def cleared(tiles: Tensor, channels: int) -> Tensor:
    """Copy of a triangle with zeros where entries are undefined. [tiles, 32, 32]"""
    edges = _edges_of(channels)
    row, column = _numbers(edges, tiles.device)
    inside = torch.arange(TILE, device=tiles.device)
    rows = (row[:, None] * TILE + inside)[:, :, None]
    columns = (column[:, None] * TILE + inside)[:, None, :]
    return torch.where((columns <= rows) & (rows < channels), tiles, torch.zeros_like(tiles))


def _edges_of(channels: int) -> int:
    return -(-channels // TILE)


def _numbers(edges: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Row and column of each tile, in the order of the tiles.
    row, column = torch.tril_indices(edges, edges, device=device)
    return row, column


def _on_diagonal(channels: int, device: torch.device) -> Tensor:
    # Numbers of the tiles on the diagonal.
    edge = torch.arange(_edges_of(channels), device=device)
    return edge * (edge + 3) // 2


def _spread(vectors: Tensor) -> tuple[Tensor, Tensor]:
    # Entries of vectors [K, C] by the rows of each tile [K, tiles, 32, 1], and by its columns
    # [K, tiles, 1, 32].
    edges = _edges_of(vectors.shape[1])
    padded = functional.pad(vectors, (0, edges * TILE - vectors.shape[1]))
    parts = padded.view(len(vectors), edges, TILE)
    row, column = _numbers(edges, vectors.device)
    return parts[:, row, :, None], parts[:, column, None, :]
