// Tiles of the gram on AMX: rows in parts of bfloat16, products summed in tiles of float32.
//
// Compiled with AVX-512 and AMX, and called only where the processor and the system have both. As
// in the other kernels, no inline function of the standard library may be used.
#include <immintrin.h>

#include "covariance.h"
#include "vectors.h"

namespace fastcov {
namespace {

constexpr int64_t kTile = kMatrixTileValues;
constexpr int64_t kTileBytes = 64;  // bytes of a row of a tile

typedef Vec<double, 64>::type Doubles;
typedef Vec<float, 32>::type EightFloats;

// Setup of palette 1: eight tiles of 16 rows, 64 bytes each.
struct alignas(64) TileConfig {
  uint8_t palette = 1;
  uint8_t start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};
// It must not lie on the stack: the compiler's header declares that only eight of its bytes are
// read, so that stores to the others could be dropped.
const TileConfig kConfig;

void configure() { _tile_loadconfig(&kConfig); }

void release() { _tile_release(); }

// Splits values into parts that add up to them. All parts but the last are rounded to bfloat16,
// ties away from zero, which leaves at most seven bits for the last one. So three parts of float32
// are exact, two of float16 and one of bfloat16. `right` gets the parts of two rows, a pair in 32
// bits, and `left` its transpose.
template <int Parts>
void split(const float* panel, int64_t steps, int64_t part_values, uint16_t* left,
           uint16_t* right) {
  for (int64_t step = 0; step < steps; ++step) {
    const float* rows = panel + step * kMatrixRows * kPanel<float>;
#pragma GCC unroll 4
    for (int pair = 0; pair < 16; ++pair) {
      Vector<float> first = load(rows + 2 * pair * kPanel<float>);
      Vector<float> second = load(rows + (2 * pair + 1) * kPanel<float>);
#pragma GCC unroll 3
      for (int part = 0; part < Parts; ++part) {
        BitVector<float> low = reinterpret_cast<BitVector<float>>(first);
        BitVector<float> high = reinterpret_cast<BitVector<float>>(second);
        if (part + 1 < Parts) {
          low = (low + 0x8000u) & 0xffff0000u;
          high = (high + 0x8000u) & 0xffff0000u;
          first -= reinterpret_cast<Vector<float>>(low);
          second -= reinterpret_cast<Vector<float>>(high);
        }
        const BitVector<float> both = low >> 16 | high;
        __builtin_memcpy(right + part * part_values + step * kTile + pair * 32, &both, 64);
      }
    }
#pragma GCC unroll 3
    for (int part = 0; part < Parts; ++part) {
      Vector<float> square[16];
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        __builtin_memcpy(&square[i], right + part * part_values + step * kTile + i * 32, 64);
      }
      transpose<float>(square);
#pragma GCC unroll 16
      for (int i = 0; i < 16; ++i) {
        __builtin_memcpy(left + part * part_values + step * kTile + i * 32, &square[i], 64);
      }
    }
  }
}

void split_parts(int parts, const float* panel, int64_t steps, int64_t part_values, uint16_t* left,
                 uint16_t* right) {
  if (parts == 1) return split<1>(panel, steps, part_values, left, right);
  if (parts == 2) return split<2>(panel, steps, part_values, left, right);
  split<3>(panel, steps, part_values, left, right);
}

#define FASTCOV_LOAD_LEFT(part)                                      \
  do {                                                               \
    _tile_loadd(4, side.left[0] + (part) * stride + at, kTileBytes); \
    _tile_loadd(5, side.left[1] + (part) * stride + at, kTileBytes); \
  } while (0)
#define FASTCOV_LOAD_RIGHT(part)                                      \
  do {                                                                \
    _tile_loadd(6, side.right[0] + (part) * stride + at, kTileBytes); \
    _tile_loadd(7, side.right[1] + (part) * stride + at, kTileBytes); \
  } while (0)
#define FASTCOV_MULTIPLY()                  \
  do {                                      \
    _tile_dpbf16ps(0, 4, 6);                \
    _tile_dpbf16ps(2, 5, 6);                \
    if (!Diagonal) _tile_dpbf16ps(1, 4, 7); \
    _tile_dpbf16ps(3, 5, 7);                \
  } while (0)

// Fetches a large state from memory while sums are formed: a few rows in every step, because only a
// few fetches can be under way.
struct Prefetch {
  const double* next;
  int64_t stride;
  int64_t left;
  int64_t rows;  // rows that are fetched in a step
  int64_t columns;

  inline void step() {
    for (int64_t row = 0; row < rows && left > 0; ++row, --left, next += stride) {
      for (int64_t column = 0; column < columns; column += 8) {
        __builtin_prefetch(next + column, 1);
      }
      __builtin_prefetch(next + columns - 1, 1);
    }
  }
};

// Multiplies two panels by two. The order of the parts lets two loads serve four products: a load
// from the second-level cache takes longer than a product (7.6 against 5.7 ns on a Xeon of 2024).
template <int Parts, bool Diagonal>
inline void multiply(const MatrixSide& side, int64_t first, int64_t last, Prefetch state) {
  const int64_t stride = side.part_values;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t at = first * kTile; at < last * kTile; at += kTile) {
    FASTCOV_LOAD_LEFT(0);
    state.step();
    if (Parts == 3) {
      FASTCOV_LOAD_RIGHT(2);
      FASTCOV_MULTIPLY();
    }
    if (Parts >= 2) {
      FASTCOV_LOAD_RIGHT(1);
      FASTCOV_MULTIPLY();
      FASTCOV_LOAD_LEFT(1);
      FASTCOV_MULTIPLY();
      FASTCOV_LOAD_RIGHT(0);
      FASTCOV_MULTIPLY();
    }
    if (Parts == 3) {
      FASTCOV_LOAD_LEFT(2);
      FASTCOV_MULTIPLY();
    }
    if (Parts >= 2) {
      FASTCOV_LOAD_LEFT(0);
    } else {
      FASTCOV_LOAD_RIGHT(0);
    }
    FASTCOV_MULTIPLY();
  }
}

inline void add_row(const float* sums, double scale, double keep, double* out, int64_t columns) {
  if (columns == 32) {
#pragma GCC unroll 4
    for (int64_t column = 0; column < 32; column += 8) {
      const EightFloats added = load_unaligned<EightFloats>(sums + column);
      Doubles state = load_unaligned<Doubles>(out + column);
      state = state * keep + __builtin_convertvector(added, Doubles) * scale;
      __builtin_memcpy(out + column, &state, sizeof(state));
    }
    return;
  }
  for (int64_t column = 0; column < columns; ++column) {
    out[column] = out[column] * keep + static_cast<double>(sums[column]) * scale;
  }
}

template <int Parts, bool Diagonal>
void product(const MatrixSide& side, int64_t steps, double scale, double keep, double* out,
             int64_t out_stride, int64_t rows, int64_t columns) {
  alignas(64) float sums[32 * 32];
  for (int64_t first = 0; first < steps; first += kMatrixChainSteps) {
    const int64_t last = first + kMatrixChainSteps < steps ? first + kMatrixChainSteps : steps;
    const Prefetch state = {out, out_stride, first ? 0 : rows, (rows + last - 1) / last, columns};
    multiply<Parts, Diagonal>(side, first, last, state);
    _tile_stored(0, sums, 128);
    if (!Diagonal) _tile_stored(1, sums + 16, 128);
    _tile_stored(2, sums + 16 * 32, 128);
    _tile_stored(3, sums + 16 * 32 + 16, 128);
    for (int64_t row = 0; row < rows; ++row) {
      // The tile above the diagonal has not been formed.
      const int64_t end = Diagonal && row < 16 && columns > 16 ? 16 : columns;
      add_row(sums + row * 32, scale, keep, out + row * out_stride, end);
    }
    keep = 1.0;
  }
}

template <int Parts>
inline void product_of(const MatrixSide& side, int64_t steps, double scale, double keep,
                       double* out, int64_t out_stride, int64_t rows, int64_t columns) {
  if (side.is_diagonal) {
    product<Parts, true>(side, steps, scale, keep, out, out_stride, rows, columns);
  } else {
    product<Parts, false>(side, steps, scale, keep, out, out_stride, rows, columns);
  }
}

void product_parts(int parts, const MatrixSide& side, int64_t steps, double scale, double keep,
                   double* out, int64_t out_stride, int64_t rows, int64_t columns) {
  switch (parts) {
    case 1:
      return product_of<1>(side, steps, scale, keep, out, out_stride, rows, columns);
    case 2:
      return product_of<2>(side, steps, scale, keep, out, out_stride, rows, columns);
    default:
      return product_of<3>(side, steps, scale, keep, out, out_stride, rows, columns);
  }
}

}  // namespace

const MatrixKernels amx_kernels = {configure, release, split_parts, product_parts};

}  // namespace fastcov
