// Reduction of one large symmetric matrix to band form on the host. The reflectors of a panel of
// columns are applied at once (compact WY form), so that all work outside of the panels is products
// of tiles.
//
// The matrix is stored as its lower tiles, by columns of tiles; tiles on the diagonal are whole. No
// sum depends on the number of threads.
#pragma once

#include "crew.h"
#include "eigen_numeric.h"
#include "eigen_tiles.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

// Scratch memory to reduce a matrix of `tiles` rows of tiles.
template <class T>
struct BandSpace {
  int tiles;
  T* matrix;      // [tiles (tiles + 1) / 2]
  T* transposed;  // [tiles]: transposed reflectors
  T* product;     // [tiles]: first A V T, later -W
  T* partial;     // [tiles]
  T* small;       // [kSmall]
  static constexpr int kSmall = 4;

  static int64_t elements(int tiles) {
    return (int64_t{tiles} * (tiles + 1) / 2 + 3 * int64_t{tiles} + kSmall) * kTileElements;
  }
  BandSpace(T* memory, int tiles) : tiles(tiles) {
    matrix = memory;
    transposed = matrix + int64_t{tiles} * (tiles + 1) / 2 * kTileElements;
    product = transposed + int64_t{tiles} * kTileElements;
    partial = product + int64_t{tiles} * kTileElements;
    small = partial + int64_t{tiles} * kTileElements;
  }
  T* tile(int i, int j) const {  // i >= j
    return matrix + (int64_t{j} * (2 * tiles - j - 1) / 2 + i) * kTileElements;
  }
};

// Reflector H = I - inverse_half u u^T of a column x, with u = x / |x| + sign(x_0) e_0 as in
// eigen.h. `rest` is the sum of squares of all entries but the first. Where it is negligible no
// reflector is needed, and inverse_half is 0.
template <class T>
struct Reflection {
  T inverse_norm;
  T sign;
  T inverse_half;
  T image;  // what the first entry becomes

  FASTCOV_INLINE Reflection(T first, T rest) {
    const bool is_live = rest > Numeric<T>::negligible_square;
    const T norm = Numeric<T>::square_root(is_live ? rest + first * first : T(1));
    inverse_norm = is_live ? T(1) / norm : T(0);
    sign = is_live ? (first < T(0) ? T(-1) : T(1)) : T(0);
    inverse_half = is_live ? T(1) / (T(1) + absolute(first) * inverse_norm) : T(0);
    image = is_live ? -sign * norm : first;
  }
};

// Rounding grows with the length of a sum. Sums are therefore formed over this many tiles at a
// time, and then added.
constexpr int kChainTiles = 4;

// Forms the sums u . a_j over a panel, for the Columns columns a_j from `column` on.
template <int Columns, class T>
FASTCOV_INLINE void panel_dots(const T* panel, int count, int reflector, int column,
                               T (&dots)[Columns]) {
  using V = Pack<T, kTileLanes<T>>;
  V sums[Columns] = {};
  for (int begin = 0; begin < count; begin += kChainTiles) {
    const int end = begin + kChainTiles < count ? begin + kChainTiles : count;
    V chains[Columns] = {};
    for (int t = begin; t < end; ++t) {
      const T* const tile = panel + t * kTileElements;
      for (int i = 0; i < kTile; i += kTileLanes<T>) {
        const V u = load_pack(tile + reflector * kTile + i);
        FASTCOV_UNROLL
        for (int c = 0; c < Columns; ++c) {
          chains[c] += u * load_pack(tile + (column + c) * kTile + i);
        }
      }
    }
    FASTCOV_UNROLL
    for (int c = 0; c < Columns; ++c) sums[c] += chains[c];
  }
  for (int c = 0; c < Columns; ++c) dots[c] = sum_lanes<T>(sums[c]);
}

// QR decomposition of a panel of `count` tiles. The reflectors u replace the panel, and `triangle`
// gets R. Returns true if there is any reflector.
template <class T>
bool factor_panel(T* panel, int count, T* triangle, T* inverse_halves) {
  using V = Pack<T, kTileLanes<T>>;
  constexpr int group = 4;
  bool is_live = false;
  clear(triangle);
  for (int c = 0; c < kTile; ++c) {
    T* const column = panel + c * kTile;
    for (int i = 0; i < c; ++i) {
      triangle[c * kTile + i] = column[i];
      column[i] = T(0);
    }
    const T first = column[c];
    column[c] = T(0);
    T rest[1];
    panel_dots<1>(panel, count, c, c, rest);
    const Reflection<T> reflection(first, rest[0]);
    inverse_halves[c] = reflection.inverse_half;
    triangle[c * kTile + c] = reflection.image;
    if (reflection.inverse_half == T(0)) {
      for (int t = 0; t < count; ++t) {
        for (int i = 0; i < kTile; ++i) column[t * kTileElements + i] = T(0);
      }
      continue;
    }
    is_live = true;
    for (int t = 0; t < count; ++t) {
      for (int i = 0; i < kTile; ++i) column[t * kTileElements + i] *= reflection.inverse_norm;
    }
    column[c] = first * reflection.inverse_norm + reflection.sign;
    for (int j = (c + 1) / group * group; j < kTile; j += group) {
      T dots[group];
      panel_dots<group>(panel, count, c, j, dots);
      for (int g = 0; g < group; ++g)
        dots[g] = j + g > c ? dots[g] * reflection.inverse_half : T(0);
      for (int t = 0; t < count; ++t) {
        T* const tile = panel + t * kTileElements;
        for (int i = 0; i < kTile; i += kTileLanes<T>) {
          const V u = load_pack(tile + c * kTile + i);
          FASTCOV_UNROLL
          for (int g = 0; g < group; ++g) {
            T* const a = tile + (j + g) * kTile + i;
            store_pack(a, load_pack(a) - u * dots[g]);
          }
        }
      }
    }
  }
  return is_live;
}

// Forms the triangle T for which the product of the reflectors is I - V T V^T. gram is V^T V; t
// must be zero.
template <class T>
void form_factor(const T* gram, const T* inverse_halves, T* t) {
  for (int c = 0; c < kTile; ++c) {
    T column[kTile] = {};
    for (int k = 0; k < c; ++k) {
      const T weight = -inverse_halves[c] * gram[c * kTile + k];
      for (int i = 0; i < kTile; ++i) column[i] += t[k * kTile + i] * weight;
    }
    column[c] = inverse_halves[c];
    for (int i = 0; i < kTile; ++i) t[c * kTile + i] = column[i];
  }
}

// Sums tiles that lie one after the other in memory, pairwise. The first tile gets the sum.
template <class T>
void sum_tiles(T* tiles, int count) {
  for (int step = 1; step < count; step *= 2) {
    for (int t = 0; t + step < count; t += 2 * step) {
      T* const sum = tiles + t * kTileElements;
      const T* const other = sum + step * kTileElements;
      for (int e = 0; e < kTileElements; ++e) sum[e] += other[e];
    }
  }
}

// Reduces the matrix to its band: whole tiles on the diagonal, and an upper triangle below each.
template <class T>
void reduce_to_band(const Crew& crew, const BandSpace<T>& space) {
  const int tiles = space.tiles;
  T* const factor = space.small;
  T* const factor_transposed = factor + kTileElements;
  T* const coupling = factor_transposed + kTileElements;
  T* const triangle = coupling + kTileElements;
  for (int k = 0; k + 1 < tiles; ++k) {
    const int first = k + 1;
    const int count = tiles - first;
    T* const panel = space.tile(first, k);
    const auto v = [&](int i) { return panel + (i - first) * int64_t{kTileElements}; };
    const auto v_transposed = [&](int i) { return space.transposed + i * int64_t{kTileElements}; };
    const auto w = [&](int i) { return space.product + i * int64_t{kTileElements}; };
    const auto part = [&](int i) { return space.partial + (i - first) * int64_t{kTileElements}; };

    T inverse_halves[kTile];
    if (!factor_panel(panel, count, triangle, inverse_halves)) {
      __builtin_memcpy(panel, triangle, sizeof(T) * kTileElements);
      continue;
    }
    deal(crew, count, [&](int index) {
      const int i = first + index;
      transpose_tile(v(i), v_transposed(i));
      clear(part(i));
      multiply(part(i), v_transposed(i), v(i), v(i));
    });
    sum_tiles(part(first), count);
    clear(factor);
    form_factor(part(first), inverse_halves, factor);
    transpose_tile(factor, factor_transposed);

    // X = A V T from the lower tiles alone. Tiles right of the diagonal are mirror images: V^T
    // times the lower tile gives their part of (A V)^T.
    deal(crew, count, [&](int index) {
      const int i = first + index;
      T row[kTileElements] __attribute__((aligned(64))) = {};
      T column[kTileElements] __attribute__((aligned(64))) = {};
      for (int j = first; j <= i; ++j) {
        multiply(row, space.tile(i, j), v(j),
                 space.tile(j < i ? i : i + (i + 1 < tiles), j < i ? j + 1 : j));
      }
      for (int j = i + 1; j < tiles; ++j) {
        multiply(column, v_transposed(j), space.tile(j, i),
                 space.tile(j + 1 < tiles ? j + 1 : j, i));
      }
      for (int c = 0; c < kTile; ++c) {
        for (int r = 0; r < kTile; ++r) row[c * kTile + r] += column[r * kTile + c];
      }
      clear(w(i));
      multiply(w(i), row, factor, v(i));
      clear(part(i));
      multiply(part(i), v_transposed(i), w(i), v(i));
    });
    // With W = X - V (T^T V^T X) / 2 the reflectors turn A into A - V W^T - W V^T.
    sum_tiles(part(first), count);
    clear(coupling);
    multiply(coupling, factor_transposed, part(first), factor);
    for (int e = 0; e < kTileElements; ++e) coupling[e] *= T(0.5);
    deal(crew, count, [&](int index) {
      const int i = first + index;
      for (int e = 0; e < kTileElements; ++e) w(i)[e] = -w(i)[e];
      multiply(w(i), v(i), coupling, v(i));
    });
    deal(crew, count, [&](int index) {
      const int j = first + index;
      for (int i = j; i < tiles; ++i) {
        multiply_transposed(space.tile(i, j), v(i), w(j), space.tile(i + 1 < tiles ? i + 1 : i, j));
        multiply_transposed(space.tile(i, j), w(i), v(j), v(i));
      }
    });
    __builtin_memcpy(panel, triangle, sizeof(T) * kTileElements);
  }
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
