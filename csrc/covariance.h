// Streaming second moment on the CPU: what the driver (covariance_cpu.cpp) and the inner loops
// (covariance_kernels.cpp, compiled once for each instruction set) share.
//
// Rows are packed, less the shift and times the root of their weight, into panels: W channels side
// by side, one row after the other, W * sizeof(T) = one cache line. A gram tile is the product of
// two panels; only tiles on and below the diagonal are computed. Accumulators live in registers
// for a chain of at most kChainRows rows and are then added to float64.
//
//   panels [C / W][block rows][W]        tile (i, j) = panel_i^T panel_j, [W, W]
#pragma once

#include <cstdint>

namespace fastcov {

// Rows added up in the working type before float64 takes over. A constant channel is the worst
// case, its rounding errors all have one sign: 3.8e-6 of the result for 256 float32 rows
// (measured).
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

struct Level {
  const char* name;
  Kernels<float> float32;
  Kernels<double> float64;
};

extern const Level baseline_level;
extern const Level avx2_level;
extern const Level avx512_level;

}  // namespace fastcov
