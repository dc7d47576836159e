// Rows that a sampled step reads, for host and device. The sequence is defined in
// fastcov/ops/reference.py (sample_index_reference).
#pragma once

#include <cstdint>

#include "host_device.h"

namespace fastcov {

struct Sampling {
  int64_t first_sample;
  int64_t run_length;
  uint64_t phase;
  int64_t rows;       // of the whole batch
  int64_t positions;  // of one image
};

FASTCOV_HOST_DEVICE uint64_t multiply_high(uint64_t a, uint64_t b) {
#if defined(__CUDA_ARCH__)
  return __umul64hi(a, b);
#else
  return static_cast<uint64_t>((static_cast<unsigned __int128>(a) * b) >> 64);
#endif
}

// Number of the row that sample first_sample + index reads, row-major over (image, position).
FASTCOV_HOST_DEVICE int64_t sampled_row(const Sampling& sampling, int64_t index) {
  constexpr uint64_t kGoldenRatio = 0x9E3779B97F4A7C15ull;
  const int64_t sample = sampling.first_sample + index;
  const int64_t run = sample / sampling.run_length;
  const int64_t offset = sample - run * sampling.run_length;
  const uint64_t point = sampling.phase + static_cast<uint64_t>(run) * kGoldenRatio;
  const int64_t start =
      static_cast<int64_t>(multiply_high(point, static_cast<uint64_t>(sampling.rows)));
  const int64_t image = start / sampling.positions;
  const int64_t position = (start - image * sampling.positions + offset) % sampling.positions;
  return image * sampling.positions + position;
}

}  // namespace fastcov
