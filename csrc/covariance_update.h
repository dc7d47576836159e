// One call of accumulate_ on the CPU: what it brings, and the shift that a first call fixes.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>

#include "boxing.h"
#include "covariance.h"
#include "rows.h"

namespace fastcov {

constexpr int64_t kShiftRows = 64;

template <typename T>
using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;

template <typename T>
uint64_t bits_of(T value) {
  Bits<T> bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits & (std::numeric_limits<Bits<T>>::max() >> 1);
}

template <typename T>
T from_bits(uint64_t bits) {
  const Bits<T> narrow = static_cast<Bits<T>>(bits);
  T value;
  std::memcpy(&value, &narrow, sizeof(value));
  return value;
}

template <typename T>
T* state_pointer(const Tensor& tensor, ScalarType dtype, int64_t values) {
  STD_TORCH_CHECK(tensor.scalar_type() == dtype && tensor.numel() == values &&
                      tensor.is_contiguous() && tensor.is_cpu(),
                  "a state tensor has the wrong dtype, size, layout or device");
  return static_cast<T*>(tensor.mutable_data_ptr());
}

struct RowWeights {
  const void* data = nullptr;
  bool is_double = false;

  double at(int64_t row) const {
    return is_double ? static_cast<const double*>(data)[row]
                     : static_cast<double>(static_cast<const float*>(data)[row]);
  }
};

struct Update {
  RowsView rows;
  Dtype dtype;
  RowWeights row_weight;
  double row_scale;
  double decay;
  double* moment;  // [C, C]
  double* sum;     // [C]
  double* shift;   // [C]
  double* weight;  // []
  int64_t* count;  // [2]
};

// What one thread has read; added up in thread order.
struct Tally {
  int64_t rows = 0;
  int64_t finite = 0;
  double weight = 0;  // of finite rows, before row_scale
  uint64_t peak = 0;

  void add(const Tally& other) {
    rows += other.rows;
    finite += other.finite;
    weight += other.weight;
    peak = std::max(peak, other.peak);
  }
};

inline double read(const RowsView& rows, Dtype dtype, int64_t offset) {
  const char* at = rows.data + offset * rows.item_bytes;
  switch (dtype) {
    case Dtype::kFloat64: {
      double value;
      std::memcpy(&value, at, sizeof(value));
      return value;
    }
    case Dtype::kFloat32: {
      float value;
      std::memcpy(&value, at, sizeof(value));
      return value;
    }
    default:
      return 0;  // the shift of 16-bit rows is zero: they are never read here
  }
}

// Mean of the first finite rows, rounded to the rows' dtype so that it is subtracted exactly.
inline void choose_shift(const Update& update) {
  const RowsView& rows = update.rows;
  const int64_t channels = rows.channels;
  std::fill(update.shift, update.shift + channels, 0.0);
  if (update.dtype == Dtype::kBFloat16 || update.dtype == Dtype::kFloat16) return;
  int64_t found = 0;
  for (int64_t row = 0; row < rows.rows && found < kShiftRows; ++row) {
    const int64_t offset = row_offset(rows, row);
    bool finite = true;
    for (int64_t channel = 0; channel < channels && finite; ++channel) {
      finite = std::isfinite(read(rows, update.dtype, offset + channel * rows.channel_stride));
    }
    if (!finite) continue;
    ++found;
    for (int64_t channel = 0; channel < channels; ++channel) {
      update.shift[channel] += read(rows, update.dtype, offset + channel * rows.channel_stride);
    }
  }
  bool finite = true;
  for (int64_t channel = 0; channel < channels; ++channel) {
    double mean = found ? update.shift[channel] / static_cast<double>(found) : 0.0;
    if (update.dtype == Dtype::kFloat32) mean = static_cast<double>(static_cast<float>(mean));
    update.shift[channel] = mean;
    finite = finite && std::isfinite(mean);
  }
  // A mean of huge rows may leave their range; an unshifted state is right, only less exact.
  if (!finite) std::fill(update.shift, update.shift + channels, 0.0);
}

}  // namespace fastcov
