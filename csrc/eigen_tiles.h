// Square tiles of a matrix and their products. A tile lies in memory of its own, by columns.
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

// Adds left times right to out, where entry (k, j) of right is right[k * StepK + j * StepJ].
// Meanwhile it fetches `next`, the tile that will be read from memory next. The sum over a tile is
// formed before it is added: rounding in a single chain over a whole column of equal entries would
// exceed the bound.
template <int StepK, int StepJ, class T>
void add_product(T* out, const T* left, const T* right, const T* next) {
  using V = Pack<T, kTileLanes<T>>;
  constexpr int lanes = kTileLanes<T>;
  constexpr int parts = 2;
  // 16 of 32 registers hold sums, or 8 of 16: enough to hide the latency of the products.
  constexpr int columns = kVectorBytes == 64 ? 8 : 4;
  constexpr int line = 64 / static_cast<int>(sizeof(T));
  constexpr int passes = kTile / columns * (kTile / (parts * lanes));
  constexpr int fetched = kTileElements / passes;  // elements fetched in each pass
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

// Adds left times right to out.
template <class T>
FASTCOV_INLINE void multiply(T* out, const T* left, const T* right, const T* next) {
  add_product<1, kTile>(out, left, right, next);
}
// Adds left times the transpose of right to out.
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
