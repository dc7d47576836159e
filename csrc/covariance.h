// Streaming second moment on the CPU: types shared by the driver (covariance_driver.h) and by the
// inner loops (covariance_kernels.cpp, compiled once for each instruction set).
//
// Rows are packed into panels, less the shift and times the root of their weight: W channels side
// by side, one row after the other, W * sizeof(T) = one cache line. A tile of the gram is the
// product of two panels; only tiles on and below the diagonal are computed. Accumulators live in
// registers for a chain of at most kChainRows rows. The few chains of a block are summed and then
// added to float64.
//
//  panels [C / W][block rows][W]        tile (i, j) = panel_i^T panel_j, [W, W]
#pragma once

#include <cstdint>

namespace fastcov {

// Most rows that are added one by one in the working type. The worst case is a constant channel,
// all of whose rounding errors have one sign: 3.8e-6 of the result was measured for 256 float32
// rows.
constexpr int64_t kChainRows = 256;

template <typename T>
constexpr int64_t kPanel = 64 / static_cast<int64_t>(sizeof(T));

enum class Dtype { kFloat32, kBFloat16, kFloat16, kFloat64 };

// A run of evenly spaced rows.
template <typename T>
struct PackRun {
  const void* source;
  Dtype dtype;
  int64_t rows;
  int64_t row_stride;      // in elements
  int64_t channel_stride;  // in elements
  int64_t channels;
  const T* shift;        // [panels * W], zero beyond the channels
  const T* root_weight;  // [rows], or null if rows are not weighted
  T* panels;             // place of the run's first row in panel 0
  int64_t panel_stride;  // elements from one panel to the next
};

template <typename T>
struct Kernels {
  // Packs a run. Returns the bits of the largest magnitude that it wrote. Bits of an infinity or a
  // NaN count as larger than those of any number, so that a result of 0x7f80... or more says that
  // some row is not finite.
  uint64_t (*pack)(const PackRun<T>& run);
  // Forms out[r][c] = keep * out[r][c] + scale * sum_k left[k][r] right[k][c], for r < rows and c <
  // columns.
  void (*tile)(const T* left, const T* right, int64_t block_rows, double scale, double keep,
               double* out, int64_t out_stride, int64_t rows, int64_t columns);
  // Adds scale * sum_k factor[k] panel[k][c] to out[c]. A null factor stands for ones.
  void (*panel_sum)(const T* panel, const T* factor, int64_t block_rows, double scale, double* out,
                    int64_t columns);
};

// A matrix unit (AMX) multiplies tiles of bfloat16. The panels of float32 above are split into
// parts and laid out a second time, 32 rows (a step) and 16 channels to a tile of 1 KiB:
//
//  right [parts][steps][row pair][channel][2]   left [parts][steps][channel][row pair][2]
constexpr int64_t kMatrixRows = 32;
constexpr int64_t kMatrixTileValues = 16 * kMatrixRows;
// Steps that are summed in float32 before float64 takes over. A product of the unit rounds less
// than a chain of its rows would: 4.4e-7 of the result was measured at worst, for channels of one
// magnitude and three parts.
constexpr int64_t kMatrixChainSteps = 16;

// Two left and two right panels, whose products make up a block of 32 by 32 channels.
struct MatrixSide {
  const uint16_t* left[2];
  const uint16_t* right[2];
  int64_t part_values;  // values from one part to the next
  bool is_diagonal;  // true if left and right are the same panels: the tile above the diagonal is
                     // then left out
};

struct MatrixKernels {
  // Set up a thread's tile registers before its first product, and give them back after its last.
  void (*configure)();
  void (*release)();
  void (*split)(int parts, const float* panel, int64_t steps, int64_t part_values, uint16_t* left,
                uint16_t* right);
  // Does what Kernels::tile does, for a block of 32 by 32.
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
