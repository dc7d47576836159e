// Reduction of one large symmetric matrix to tridiagonal form on the host, in two stages: to a band
// by products of tiles, which the caches can feed, and then along the band. In one stage the whole
// matrix would be read from memory at every step.
#pragma once

#include "crew.h"
#include "eigen.h"
#include "eigen_band.h"
#include "eigen_chase.h"
#include "eigen_cpu.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

constexpr int tile_count(int n) { return (n + kTile - 1) / kTile; }

// Parts of the scratch memory, one after the other. Made with memory of null, it only finds their
// size.
template <class T>
struct LargeSpace {
  T* tiles;
  T* band;
  SweepProgress* progress;
  BulgeReflector<T>* handed;
  T* diagonal;
  T* off_diagonal;
  int64_t bytes = 0;

  LargeSpace(void* scratch, int n, int ranks) : memory_(static_cast<char*>(scratch)) {
    tiles = take<T>(BandSpace<T>::elements(tile_count(n)));
    band = take<T>(Band<T>::elements(tile_count(n) * kTile));
    progress = take<SweepProgress>(n);
    handed = take<BulgeReflector<T>>(int64_t{ranks} * kHandedOver);
    diagonal = take<T>(padded(n));
    off_diagonal = take<T>(padded(n));
  }

  template <class Item>
  Item* take(int64_t count) {
    Item* const start = memory_ ? reinterpret_cast<Item*>(memory_ + bytes) : nullptr;
    bytes += (count * static_cast<int64_t>(sizeof(Item)) + 63) / 64 * 64;
    return start;
  }

 private:
  char* memory_;
};

template <class T>
typename Numeric<T>::Bits largest_bits(const EigenTask<T>& task, int column_begin, int column_end) {
  using Bits = typename Numeric<T>::Bits;
  Bits largest = 0;
  for (int j = column_begin; j < column_end; ++j) {
    const T* const column = task.matrix.data + j * (task.matrix.step_i + task.matrix.step_j);
    FASTCOV_SIMD(reduction(max : largest))
    for (int i = 0; i < task.n - j; ++i) {
      const Bits bits = magnitude_bits(column[i * task.matrix.step_i]);
      largest = bits > largest ? bits : largest;
    }
  }
  return largest;
}

// Copies tile (tile_i, tile_j), with zeros beyond the matrix. A tile on the diagonal gets both
// triangles.
template <class T>
void load_tile(const EigenTask<T>& task, int tile_i, int tile_j, const Scale<T>& scale, T* tile) {
  const T shrink = scale.shrink;
  const MatrixRef<T>& matrix = task.matrix;
  const int row = tile_i * kTile;
  const int rows = task.n - row < kTile ? task.n - row : kTile;
  const int columns = task.n - tile_j * kTile < kTile ? task.n - tile_j * kTile : kTile;
  if (rows < kTile || columns < kTile) clear(tile);
  for (int c = 0; c < columns; ++c) {
    const T* const entries =
        matrix.data + row * matrix.step_i + (tile_j * kTile + c) * matrix.step_j;
    T* const out = tile + c * kTile;
    const int from = tile_i == tile_j ? c : 0;
    if (matrix.step_i == 1) {
      for (int r = from; r < rows; ++r) out[r] = entries[r] * shrink;
    } else if (matrix.step_i == -1) {
      for (int r = from; r < rows; ++r) out[r] = entries[-r] * shrink;
    } else {
      for (int r = from; r < rows; ++r) out[r] = entries[r * matrix.step_i] * shrink;
    }
  }
  if (tile_i != tile_j) return;
  for (int c = 0; c < columns; ++c) tile[c * kTile + c] -= scale.shift;
  for (int c = 1; c < kTile; ++c) {
    for (int r = 0; r < c; ++r) tile[c * kTile + r] = tile[r * kTile + c];
  }
}

template <class T>
void fill_band(const Crew& crew, const BandSpace<T>& matrix, const Band<T>& band) {
  deal(crew, matrix.tiles, [&](int k) {
    for (int c = 0; c < kTile; ++c) {
      const int j = k * kTile + c;
      const T* const square = matrix.tile(k, k) + c * kTile;
      for (int r = 0; r < kTile; ++r) *band.at(k * kTile + r, j) = square[r];
      if (k + 1 == matrix.tiles) continue;
      const T* const triangle = matrix.tile(k + 1, k) + c * kTile;
      for (int r = 0; r <= c; ++r) {
        const int i = (k + 1) * kTile + r;
        *band.at(i, j) = triangle[r];
        if (r < c) *band.at(j, i) = triangle[r];
      }
    }
  });
}

// Reduces a matrix to tridiagonal form.
template <class T>
Scale<T> reduce_large(const EigenTask<T>& task, const Crew& crew, const LargeSpace<T>& space) {
  using Bits = typename Numeric<T>::Bits;
  const int n = task.n;
  const int tiles = tile_count(n);
  const BandSpace<T> matrix(space.tiles, tiles);
  Bits* const largest_of = reinterpret_cast<Bits*>(space.diagonal);
  deal(crew, tiles, [&](int k) {
    largest_of[k] = largest_bits(task, k * kTile, (k + 1) * kTile < n ? (k + 1) * kTile : n);
  });
  Bits largest = 0;
  for (int k = 0; k < tiles; ++k) largest = largest_of[k] > largest ? largest_of[k] : largest;
  Scale<T> scale(largest);
  for (int i = 0; i < n; ++i) space.diagonal[i] = space.off_diagonal[i] = T(0);
  if (!scale.is_finite) return scale;
  const MatrixRef<T>& source = task.matrix;
  const T trace = sum_strided<T>(0, n, 1, [&](int i) {
    return source.data[i * (source.step_i + source.step_j)] * scale.shrink;
  });
  scale.shift = diagonal_shift(trace, n);

  deal(crew, tiles, [&](int j) {
    for (int i = j; i < tiles; ++i) load_tile(task, i, j, scale, matrix.tile(i, j));
  });
  reduce_to_band(crew, matrix);
  const Band<T> band{space.band};
  const int64_t elements = Band<T>::elements(tiles * kTile);
  for (int64_t e = 0; e < elements; ++e) space.band[e] = T(0);
  fill_band(crew, matrix, band);
  for (int s = 0; s < n; ++s) space.progress[s].steps = 0;
  chase(crew, ChaseSpace<T>{band, space.progress, space.handed}, n);
  for (int i = 0; i < n; ++i) space.diagonal[i] = *band.at(i, i);
  for (int i = 0; i < n - 1; ++i) space.off_diagonal[i] = *band.at(i + 1, i);
  return scale;
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
