// Layout of a second moment: the lower triangle of a symmetric matrix in tiles of 32 by 32, row by
// row of tiles, each tile contiguous. It is described in fastcov/ops/triangle.py.
#pragma once

#include <cstdint>

namespace fastcov {

// Rows and columns of a tile, which is also the stride of its rows. A block of 8, 16 or 32 channels
// a side that begins at a multiple of its side lies within one tile.
constexpr int64_t kTriangleTile = 32;

inline int64_t triangle_values(int64_t channels) {
  const int64_t edges = (channels + kTriangleTile - 1) / kTriangleTile;
  return edges * (edges + 1) / 2 * kTriangleTile * kTriangleTile;
}

// Place of the entry of a row and a column. Its tile must not lie above the diagonal.
inline int64_t triangle_entry(int64_t row, int64_t column) {
  const int64_t edge = row / kTriangleTile;
  const int64_t tile = edge * (edge + 1) / 2 + column / kTriangleTile;
  return (tile * kTriangleTile + row % kTriangleTile) * kTriangleTile + column % kTriangleTile;
}

}  // namespace fastcov
