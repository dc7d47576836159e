"""Layout of a state's second moment, for kernels: see fastcov/ops/triangle.py."""

import triton
import triton.language as tl

TILE = tl.constexpr(32)


@triton.jit
def triangle_entry(row, column):
    """Offsets of entries by row and column, as int64; no row's tile is above the diagonal."""
    edge = row // TILE
    tile = edge * (edge + 1) // 2 + column // TILE
    inside = row % TILE * TILE + column % TILE
    return tile.to(tl.int64) * (TILE * TILE) + inside
