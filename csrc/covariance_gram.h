// Products of packed rows: by vectors, or by a matrix unit, for which rows are first split into
// parts of bfloat16. Also the walk over a triangle of blocks, and the number of threads.
#pragma once

#include <algorithm>

#include "boxing.h"
#include "covariance_update.h"
#include "workspace.h"

namespace fastcov {

const Level& level();

template <typename T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return level().float32;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return level().float64;
}

// Below this many multiply-adds a second thread costs more than it saves.
constexpr int64_t kSerialWork = 1 << 18;

inline int64_t useful_threads(int64_t multiply_adds) {
  const int64_t threads = torch::stable::get_num_threads();
  return std::max<int64_t>(1, std::min(threads, multiply_adds / kSerialWork));
}

// Calls body(piece) for every piece, on as many threads.
template <typename Body>
void parallel(int64_t pieces, const Body& body) {
  if (pieces == 1) return body(0);
  torch::stable::parallel_for(0, pieces, 1, [&](int64_t begin, int64_t end) {
    for (int64_t piece = begin; piece < end; ++piece) body(piece);
  });
}

// Calls visit(i, j) for the blocks numbered `begin` to `end` of a lower triangle. Blocks are
// visited in groups of columns, whose panels stay in the second-level cache while the panels of the
// rows pass by.
template <typename Visit>
void for_each_tile(int64_t sides, int64_t group_columns, int64_t begin, int64_t end,
                   const Visit& visit) {
  int64_t tile = 0;
  for (int64_t group = 0; group < sides; group += group_columns) {
    for (int64_t i = group; i < sides; ++i) {
      const int64_t group_end = std::min(i + 1, group + group_columns);
      if (tile >= end) return;
      if (tile + group_end - group <= begin) {
        tile += group_end - group;
        continue;
      }
      for (int64_t j = group; j < group_end; ++j, ++tile) {
        if (tile >= begin && tile < end) visit(i, j);
      }
    }
  }
}

template <typename T>
struct Block {
  int64_t capacity;
  T* panels;        // [panels][capacity][W]
  T* root_weight;   // [capacity]; used where rows are weighted
  uint16_t* parts;  // [panels][2][parts][capacity / 32][tile], for a matrix unit
};

// A block of the gram: out[r][c] = keep * out[r][c] + scale * sum_k left[k][r] right[k][c], for r <
// rows and c < columns.
struct GramBlock {
  int64_t i;  // number of the block's kSide rows
  int64_t j;  // number of the block's kSide columns
  int64_t rows;
  int64_t columns;
  double scale;
  double keep;
  double* out;
  int64_t out_stride;
};

template <typename T>
class VectorGram {
 public:
  static constexpr int64_t kSide = kPanel<T>;
  static constexpr int64_t kRowUnit = 1;  // a block is filled up to a multiple of it
  static constexpr bool kIsPackedOnly =
      true;  // true: packed rows need no more work, so that each thread may pack them for itself

  // Rows of a block that threads share. A wide state passes through memory once for each block:
  // 1536 channels take 9.8 ms with blocks of 320 rows, 8.9 with all 788 in one. Panels of float64
  // outgrow the caches earlier: 27.3 ms with all rows in one block, 24.4 with 256.
  static int64_t shared_rows(int64_t) { return sizeof(T) == 4 ? 1024 : 256; }
  // Columns of blocks whose panels stay in the second-level cache: 256 KiB in float32.
  static int64_t group_columns(int64_t rows) {
    return std::clamp<int64_t>(4096 / std::max<int64_t>(rows, 1), 4, 16);
  }

  explicit VectorGram(const Update&) {}
  int64_t part_bytes(int64_t, int64_t) const { return 0; }
  void start() const {}
  void finish() const {}
  void prepare(const Block<T>&, int64_t, int64_t, int64_t) const {}

  void multiply(const Block<T>& block, int64_t, int64_t block_rows, const GramBlock& to) const {
    const T* left = block.panels + to.i * block.capacity * kSide;
    const T* right = block.panels + to.j * block.capacity * kSide;
    kernels<T>().tile(left, right, block_rows, to.scale, to.keep, to.out, to.out_stride, to.rows,
                      to.columns);
  }
};

// For 16-bit rows, in layers wide enough that the products save more than the split costs.
class MatrixGram {
 public:
  // Rows of float32 do not pay, because their three parts take six products. The two hardware
  // threads of a core share the unit, and a product takes 6 ns alone but 15 beside a busy
  // neighbour, which most rented machines have. Two threads of such a Xeon, as medians of 100 s:
  // 12.3 ms against 10.1 by vectors for 788 rows of 1536 channels, 3.6 against 2.6 for 1568 of 512.
  // Left alone: 5.9 against 7.5, and 2.0 against 1.8.
  static bool pays_for(Dtype dtype, int64_t channels) {
    return dtype != Dtype::kFloat32 && channels > 128;
  }

  static constexpr int64_t kSide = 32;
  static constexpr int64_t kRowUnit = kMatrixRows;
  static constexpr bool kIsPackedOnly = false;
  // The left parts are read from the third-level cache once for each group: 2048 channels take 3.3
  // ms with groups of 12, 3.8 with groups of 4.
  static int64_t group_columns(int64_t) { return 12; }

  // Up to 256 channels the parts of 256 rows of 16 bits stay in the second-level cache. Wider
  // layers would lose more by passing over their state more often.
  static int64_t shared_rows(int64_t channels) {
    return channels <= 256 ? 256 : std::clamp<int64_t>((1 << 19) / channels / 32 * 32, 128, 512);
  }

  explicit MatrixGram(const Update& update) : parts_(parts_of(update)), kernels_(*level().matrix) {}

  int64_t part_bytes(int64_t panels, int64_t capacity) const {
    return panels * 2 * parts_ * capacity * kPanel<float> * 2;
  }
  void start() const { kernels_.configure(); }
  void finish() const { kernels_.release(); }

  // Splits rows `begin`, a multiple of 32, to `end`. Rows that are missing from a step become zero.
  void prepare(const Block<float>& block, int64_t panels, int64_t begin, int64_t end) const {
    constexpr int64_t W = kPanel<float>;
    const int64_t filled = (end + kMatrixRows - 1) / kMatrixRows * kMatrixRows;
    const int64_t offset = begin / kMatrixRows * kMatrixTileValues;
    for (int64_t panel = 0; panel < panels; ++panel) {
      float* rows = block.panels + panel * block.capacity * W;
      std::fill(rows + end * W, rows + filled * W, 0.0f);
      kernels_.split(parts_, rows + begin * W, (filled - begin) / kMatrixRows, part_values(block),
                     part(block, panel, 0) + offset, part(block, panel, 1) + offset);
    }
  }

  void multiply(const Block<float>& block, int64_t panels, int64_t block_rows,
                const GramBlock& to) const {
    MatrixSide side;
    for (int64_t half = 0; half < 2; ++half) {
      // Where there is no second panel the first one stands for it, and its sums are not stored.
      side.left[half] = part(block, std::min(2 * to.i + half, panels - 1), 0);
      side.right[half] = part(block, std::min(2 * to.j + half, panels - 1), 1);
    }
    side.part_values = part_values(block);
    side.is_diagonal = to.i == to.j;
    kernels_.product(parts_, side, (block_rows + kMatrixRows - 1) / kMatrixRows, to.scale, to.keep,
                     to.out, to.out_stride, to.rows, to.columns);
  }

 private:
  // Number of parts, of 8 bits each, that hold a value exactly. A shift of one part leaves bfloat16
  // rows that two parts hold, unless they are 256 times smaller than the shift.
  static int parts_of(const Update& update) {
    if (update.row_weight.data) return 3;
    const bool is_bfloat16 = update.dtype == Dtype::kBFloat16;
    int parts = is_bfloat16 ? 1 : 2;
    for (int64_t channel = 0; channel < update.rows.channels; ++channel) {
      const double shift = update.shift[channel];
      if (shift == 0) continue;
      if (!is_bfloat16 || shift != rounded_to_bfloat16(shift)) return 3;
      parts = 2;
    }
    return parts;
  }

  int64_t part_values(const Block<float>& block) const { return block.capacity * kPanel<float>; }
  uint16_t* part(const Block<float>& block, int64_t panel, int64_t layout) const {
    return block.parts + (panel * 2 + layout) * parts_ * part_values(block);
  }

  const int parts_;
  const MatrixKernels& kernels_;
};

}  // namespace fastcov
