// Counters of a layer, shared with Python: fastcov/cursor.py says what they are.
#pragma once

#include <cstdint>

#include "boxing.h"

namespace fastcov {

constexpr int64_t kWhole = int64_t{1} << 32;  // a fraction of 1

// In the order of fastcov/cursor.py.
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
  int64_t run_length;
  int64_t channel_dim;

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
