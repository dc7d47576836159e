// Streaming second moment on the CPU: what the driver (covariance_driver.h) and the inner loops
// (covariance_kernels.cpp, compiled once for each instruction set) share.
//
// Rows are packed, less the shift and times the root of their weight, into panels: W channels side
// by side, one row after the other, W * sizeof(T) = one cache line. A gram tile is the product of
// two panels; only tiles on and below the diagonal are computed. Accumulators live in registers
// for a chain of at most kChainRows rows; the chains of a block, few, are summed and then added to
// float64.
//
//   panels [C / W][block rows][W]        tile (i, j) = panel_i^T panel_j, [W, W]
#pragma once

#include <cstdint>

namespace fastcov {

// Rows added up one by one in the working type. A constant channel is the worst case, its rounding
// errors all have one sign: 3.8e-6 of the result for 256 float32 rows (measured).
constexpr int64_t kChainRows = 256;

template <typename T>
constexpr int64_t kPanel = 64 / static_cast<int64_t>(sizeof(T));

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A run of rows that lie a constant stride apart.
template <typename T>
struct PackRun {
  const void* source;
  Dtype dtype;
  int64_t rows;
  int64_t row_stride;      // in elements
  int64_t channel_stride;  // in elements
  int64_t channels;
  const T* shift;        // [panels * W], zero beyond the channels
  const T* root_weight;  // [rows] or null
  T* panels;             // first row of this run in panel 0
  int64_t panel_stride;  // elements from a panel to the next
};

template <typename T>
struct Kernels {
  // Packs a run. Returns the bits of the largest magnitude written, or of an infinity or NaN:
  // ordered as integers, so that a result from 0x7f80... on says that some row is not finite.
  uint64_t (*pack)(const PackRun<T>& run);
  // out[r][c] = keep * out[r][c] + scale * sum_k left[k][r] right[k][c], for r < rows, c < columns.
  void (*tile)(const T* left, const T* right, int64_t block_rows, double scale, double keep,
               double* out, int64_t out_stride, int64_t rows, int64_t columns);
  // out[c] += scale * sum_k factor[k] panel[k][c]; a null factor counts as ones.
  void (*panel_sum)(const T* panel, const T* factor, int64_t block_rows, double scale, double* out,
                    int64_t columns);
};

// A matrix unit (AMX) multiplies tiles of bfloat16: the panels of float32 above are split into
// parts and laid out a second time, 32 rows (a step) and 16 channels to a tile of 1 KiB:
//
//   right [parts][steps][row pair][channel][2]   left [parts][steps][channel][row pair][2]
constexpr int64_t kMatrixRows = 32;
constexpr int64_t kMatrixTileValues = 16 * kMatrixRows;
// Steps added up in float32 before float64 takes over. A product rounds less than a chain of its
// rows would: 4.4e-7 of the result at worst for channels of one magnitude and three parts
// (measured).
constexpr int64_t kMatrixChainSteps = 16;

// Two panels by two: what becomes a block of 32 by 32 channels.
struct MatrixSide {
  const uint16_t* left[2];
  const uint16_t* right[2];
  int64_t part_values;  // from a part to the next
  bool is_diagonal;     // the same panels: the tile above the diagonal is left out
};

struct MatrixKernels {
  // A thread's tile registers, before the first product and behind the last.
  void (*configure)();
  void (*release)();
  void (*split)(int parts, const float* panel, int64_t steps, int64_t part_values, uint16_t* left,
                uint16_t* right);
  // As Kernels::tile, for a block of 32 by 32.
  void (*product)(int parts, const MatrixSide& side, int64_t steps, double scale, double keep,
                  double* out, int64_t out_stride, int64_t rows, int64_t columns);
};

struct Level {
  const char* name;
  Kernels<float> float32;
  Kernels<double> float64;
  const MatrixKernels* matrix = nullptr;
};

extern const Level baseline_level;
extern const Level avx2_level;
extern const Level avx512_level;
extern const MatrixKernels amx_kernels;

}  // namespace fastcov
