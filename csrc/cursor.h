// Counters of a layer and the layout of its last call, which Python shares: see
// fastcov/stats/cursor.py.
#pragma once

#include <cstdint>

#include "boxing.h"

namespace fastcov {

constexpr int64_t kWhole = int64_t{1} << 32;  // the fraction 1
constexpr int kMostDims = 5;

// Layout of a call, in the order of layout_numbers in fastcov/rows/layout.py.
struct CallLayout {
  int64_t run_length;
  int64_t channel_dim;
  int64_t dtype;
  int64_t dims;
  int64_t size[kMostDims];
  int64_t stride[kMostDims];

  bool fits(const Tensor& rows) const {
    if (rows.dim() != dims || dims > kMostDims || code_of(rows.scalar_type()) != dtype)
      return false;
    for (int64_t dim = 0; dim < dims; ++dim) {
      if (rows.size(dim) != size[dim] || rows.stride(dim) != stride[dim]) return false;
    }
    return true;
  }

  static int64_t code_of(ScalarType dtype) {
    switch (dtype) {
      case ScalarType::Float:
        return 0;
      case ScalarType::BFloat16:
        return 1;
      case ScalarType::Half:
        return 2;
      case ScalarType::Double:
        return 3;
      default:
        return -1;
    }
  }
};

// Fields in the order of fastcov/stats/cursor.py.
struct Cursor {
  int64_t calls;
  int64_t offered;
  int64_t positions;
  int64_t fraction;
  int64_t carry;
  int64_t sampled;
  int64_t fill;
  int64_t limit;
  int64_t phase;
  CallLayout layout;

  static Cursor& of(const Tensor& numbers) {
    STD_TORCH_CHECK(numbers.scalar_type() == ScalarType::Long && numbers.is_cpu() &&
                        numbers.numel() == sizeof(Cursor) / sizeof(int64_t) &&
                        numbers.is_contiguous(),
                    "cursor must be contiguous int64 on the CPU, one value for each counter");
    return *static_cast<Cursor*>(numbers.mutable_data_ptr());
  }

  void count(int64_t rows, int64_t images) {
    calls += 1;
    offered += rows;
    positions += rows / images;
  }
};

}  // namespace fastcov
