// One call of accumulate_ on a CPU: its rows, their weights, and the shift that is subtracted from
// them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <type_traits>
#include <vector>

#include "boxing.h"
#include "covariance.h"
#include "rows.h"
#include "triangle.h"
#include "vectors.h"

namespace fastcov {

constexpr int64_t kShiftRows = 64;
constexpr int64_t kFollowRows = 8;

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

// Weights of rows. Rows of weight 0 are left out. A negative weight, or one that is not finite,
// makes its row count as skipped; fastcov/ops/covariance.py refuses such weights before.
struct RowWeights {
  const void* data = nullptr;
  bool is_double = false;
  double unit = 1;  // a power of two, at least the largest, so that no row times a root overflows

  double raw(int64_t row) const {
    return is_double ? static_cast<const double*>(data)[row]
                     : static_cast<double>(static_cast<const float*>(data)[row]);
  }
  // Weight of a row in units of `unit`; NaN if it cannot weigh a row.
  double at(int64_t row) const {
    const double weight = raw(row);
    return weight >= 0 && std::isfinite(weight) ? weight / unit
                                                : std::numeric_limits<double>::quiet_NaN();
  }
  bool is_read(int64_t row) const { return !data || raw(row) != 0; }

  void choose_unit(int64_t rows) {
    double largest = 0;
    for (int64_t row = 0; row < rows; ++row) {
      const double weight = raw(row);
      if (weight > largest && std::isfinite(weight)) largest = weight;
    }
    if (largest > 0) unit = std::ldexp(1.0, std::ilogb(largest));
    if (unit < largest) unit *= 2;
  }
};

struct Update {
  RowsView rows;
  Dtype dtype;
  RowWeights row_weight;
  double row_scale;
  double decay;
  double* moment;  // triangle of [C, C]
  double* sum;     // [C]
  double* shift;   // [C]
  double* weight;  // []
  int64_t* count;  // [2]
};

// Numbers of rows that one thread has read. They are added in the order of the threads.
struct Tally {
  int64_t rows = 0;
  int64_t finite = 0;
  double weight = 0;  // of finite rows, without row_scale
  uint64_t peak = 0;

  void add(const Tally& other) {
    rows += other.rows;
    finite += other.finite;
    weight += other.weight;
    peak = std::max(peak, other.peak);
  }
};

template <typename S>
void read_values(const RowsView& rows, int64_t offset, double* values) {
  const S* at = reinterpret_cast<const S*>(rows.data) + offset;
  for (int64_t channel = 0; channel < rows.channels; ++channel) {
    values[channel] = static_cast<double>(widen(at[channel * rows.channel_stride]));
  }
}

// Reads one row. [channels]
inline void read_row(const RowsView& rows, Dtype dtype, int64_t row, double* values) {
  const int64_t offset = row_offset(rows, row);
  switch (dtype) {
    case Dtype::kFloat64:
      return read_values<double>(rows, offset, values);
    case Dtype::kFloat32:
      return read_values<float>(rows, offset, values);
    case Dtype::kBFloat16:
      return read_values<BFloat16>(rows, offset, values);
    default:
      return read_values<Float16>(rows, offset, values);
  }
}

inline bool is_half(Dtype dtype) { return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16; }

// Rounds to eight significant bits, ties to even, so that a 16-bit row less this number is short as
// well.
inline double rounded_to_bfloat16(double value) {
  const float single = static_cast<float>(value);
  uint32_t bits;
  std::memcpy(&bits, &single, sizeof(bits));
  bits = (bits + 0x7fff + (bits >> 16 & 1)) & 0xffff0000u;
  float rounded;
  std::memcpy(&rounded, &bits, sizeof(rounded));
  return rounded;
}

// Half of the last bit of the largest number of a working type. A shift below it can be subtracted
// from that number without overflow.
constexpr double kLargestFloatShift = 0x1p103;
constexpr double kLargestDoubleShift = 0x1p970;

// Means and variances of the first finite rows that have a weight, of every row or of every
// stride-th one. [channels] each
struct FirstRows {
  std::vector<double> mean;
  std::vector<double> variance;
  int64_t rows = 0;

  FirstRows(const Update& update, int64_t most_rows, int64_t stride = 1)
      : mean(update.rows.channels, 0.0), variance(update.rows.channels, 0.0) {
    const int64_t channels = update.rows.channels;
    std::vector<double> values(channels);
    for (int64_t row = 0; row < update.rows.rows && rows < most_rows; row += stride) {
      if (!update.row_weight.is_read(row)) continue;
      read_row(update.rows, update.dtype, row, values.data());
      bool finite = true;
      for (const double value : values) finite = finite && std::isfinite(value);
      if (!finite) continue;
      const double share = 1.0 / static_cast<double>(++rows);
      // Welford's update neither overflows nor cancels.
      for (int64_t channel = 0; channel < channels; ++channel) {
        const double step = values[channel] - mean[channel];
        mean[channel] += step * share;
        variance[channel] += step * (values[channel] - mean[channel]);
      }
    }
    for (double& value : variance) value /= static_cast<double>(std::max<int64_t>(rows, 1));
  }

  // Mean, in as many digits as the rows' own dtype subtracts exactly. It is 0 where a row less the
  // mean might overflow: sums about 0 are right too, only less exact.
  double shift(Dtype dtype, int64_t channel) const {
    double value = mean[channel];
    if (dtype == Dtype::kFloat32) value = static_cast<double>(static_cast<float>(value));
    if (is_half(dtype)) value = rounded_to_bfloat16(value);
    const double limit = dtype == Dtype::kFloat64 ? kLargestDoubleShift : kLargestFloatShift;
    return std::abs(value) < limit ? value : 0.0;
  }
};

// Squared distance of a mean from the shift, in variances, that is left as it is: centred sums then
// round at most 17 times as much as plain ones.
constexpr double kNear = 16;

// Chooses the shift of a state without rows. Products of 16-bit rows are exact without a shift, so
// there is none where the square of the mean is at most exact_near variances.
inline void choose_shift(const Update& update, double exact_near) {
  const FirstRows first(update, kShiftRows);
  for (int64_t channel = 0; channel < update.rows.channels; ++channel) {
    const double mean = first.mean[channel];
    const bool is_near = mean * mean <= exact_near * first.variance[channel];
    update.shift[channel] = is_near ? 0.0 : first.shift(update.dtype, channel);
  }
}

// Turns the sums of a state into those about another shift, exactly but for float64's rounding.
inline void translate(const Update& update, const std::vector<double>& shift) {
  const int64_t channels = update.rows.channels;
  const double weight = *update.weight;
  std::vector<double> step(channels);
  for (int64_t channel = 0; channel < channels; ++channel) {
    step[channel] = update.shift[channel] - shift[channel];
  }
  for (int64_t row = 0; row < channels; ++row) {
    const double sum = update.sum[row] + weight * step[row];
    for (int64_t first = 0; first <= row; first += kTriangleTile) {
      double* moment = update.moment + triangle_entry(row, first);
      const int64_t columns = std::min(kTriangleTile, row + 1 - first);
      for (int64_t column = 0; column < columns; ++column) {
        moment[column] += step[row] * update.sum[first + column] + sum * step[first + column];
      }
    }
    double& square = update.moment[triangle_entry(row, row)];
    square = std::max(0.0, square);  // a sum of squares, which rounding may have made negative
  }
  for (int64_t channel = 0; channel < channels; ++channel) {
    update.sum[channel] += weight * step[channel];
    update.shift[channel] = shift[channel];
  }
}

// Shift of the state, moved to the mean of these rows in each channel whose mean has left it. Where
// exact products would serve (see choose_shift) it becomes 0, because the first rows may have been
// too few to tell.
inline std::vector<double> followed_shift(const Update& update, const FirstRows& first,
                                          double exact_near) {
  std::vector<double> shift(update.shift, update.shift + update.rows.channels);
  if (first.rows == 0) return shift;
  const int64_t channels = update.rows.channels;
  for (int64_t channel = 0; channel < channels; ++channel) {
    const double distance = first.mean[channel] - shift[channel];
    double variance = first.variance[channel];
    if (*update.weight > 0) {  // the state's variance too: a single row has none
      const double own = update.sum[channel] / *update.weight;
      const double square = update.moment[triangle_entry(channel, channel)] / *update.weight;
      variance += std::max(0.0, square - own * own);
    }
    const double mean = first.mean[channel];
    if (exact_near > 0 && 4 * mean * mean <= exact_near * variance) {
      shift[channel] = 0;
      continue;
    }
    if (distance * distance <= kNear * variance) continue;
    shift[channel] = first.shift(update.dtype, channel);
  }
  return shift;
}

// Moves the shift where the rows of this call have left it, because sums about a shift far from the
// rows cancel. A few rows from all over the call tell whether to look closer.
inline void follow_mean(const Update& update, double exact_near) {
  const auto followed = [&](int64_t most_rows) {
    const int64_t stride = std::max<int64_t>(1, update.rows.rows / most_rows);
    return followed_shift(update, FirstRows(update, most_rows, stride), exact_near);
  };
  const auto moves = [&](const std::vector<double>& shift) {
    return !std::equal(shift.begin(), shift.end(), update.shift);
  };
  if (!moves(followed(kFollowRows))) return;
  const std::vector<double> shift = followed(kShiftRows);
  if (moves(shift)) translate(update, shift);
}

}  // namespace fastcov
