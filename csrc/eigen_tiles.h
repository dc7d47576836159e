// Square tiles of a matrix, each in memory of its own by columns, and their product.
#pragma once

#include <cstdint>

#include "eigen_lanes.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

constexpr int kTile = 32;
constexpr int kTileElements = kTile * kTile;

template <class T>
constexpr int kTileLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <class T>
FASTCOV_INLINE Pack<T, kTileLanes<T>> load_pack(const T* source) {
  Pack<T, kTileLanes<T>> value;
  __builtin_memcpy(&value, source, sizeof(value));
  return value;
}
template <class T>
FASTCOV_INLINE void store_pack(T* target, Pack<T, kTileLanes<T>> value) {
  __builtin_memcpy(target, &value, sizeof(value));
}

template <class T>
FASTCOV_INLINE T sum_lanes(Pack<T, kTileLanes<T>> value) {
  FASTCOV_UNROLL
  for (int half = kTileLanes<T> / 2; half > 0; half /= 2) {
    FASTCOV_UNROLL
    for (int lane = 0; lane < half; ++lane) value[lane] += value[lane + half];
  }
  return value[0];
}

// out(i, j) += sum of left(i, k) right(k, j), with right(k, j) at right[k * StepK + j * StepJ].
// `next` is fetched meanwhile: the tile that is read from memory next. A tile's sum is formed
// before it is added: the chain of roundings over a whole column of equal entries would pass the
// bound.
template <int StepK, int StepJ, class T>
void add_product(T* out, const T* left, const T* right, const T* next) {
  using V = Pack<T, kTileLanes<T>>;
  constexpr int lanes = kTileLanes<T>;
  constexpr int parts = 2;
  // 16 of 32 registers, or 8 of 16, hold sums: enough to hide the latency of the products.
  constexpr int columns = kVectorBytes == 64 ? 8 : 4;
  constexpr int line = 64 / static_cast<int>(sizeof(T));
  constexpr int passes = kTile / columns * (kTile / (parts * lanes));
  constexpr int fetched = kTileElements / passes;  // elements a pass
  for (int j = 0; j < kTile; j += columns) {
    for (int i = 0; i < kTile; i += parts * lanes) {
      for (int e = 0; e < fetched; e += line) __builtin_prefetch(next + e);
      next += fetched;
      V sums[columns][parts] = {};
      for (int k = 0; k < kTile; ++k) {
        V factor[parts];
        FASTCOV_UNROLL
        for (int p = 0; p < parts; ++p) factor[p] = load_pack(left + k * kTile + i + p * lanes);
        FASTCOV_UNROLL
        for (int c = 0; c < columns; ++c) {
          const T scalar = right[k * StepK + (j + c) * StepJ];
          FASTCOV_UNROLL
          for (int p = 0; p < parts; ++p) sums[c][p] += factor[p] * scalar;
        }
      }
      FASTCOV_UNROLL
      for (int c = 0; c < columns; ++c) {
        FASTCOV_UNROLL
        for (int p = 0; p < parts; ++p) {
          T* const target = out + (j + c) * kTile + i + p * lanes;
          store_pack(target, load_pack(target) + sums[c][p]);
        }
      }
    }
  }
}

// out += left right, tiles all.
template <class T>
FASTCOV_INLINE void multiply(T* out, const T* left, const T* right, const T* next) {
  add_product<1, kTile>(out, left, right, next);
}
// out += left right^T.
template <class T>
FASTCOV_INLINE void multiply_transposed(T* out, const T* left, const T* right, const T* next) {
  add_product<kTile, 1>(out, left, right, next);
}

template <class T>
void clear(T* tile) {
  for (int e = 0; e < kTileElements; ++e) tile[e] = T(0);
}
template <class T>
void transpose_tile(const T* tile, T* out) {
  for (int j = 0; j < kTile; ++j) {
    for (int i = 0; i < kTile; ++i) out[i * kTile + j] = tile[j * kTile + i];
  }
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
