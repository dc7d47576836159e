// gather_ for the CPU: copies sampled rows into a buffer, whatever the activation's strides.
#include "gather.h"

#include <cstring>

#include "boxing.h"
#include "rows.h"

namespace fastcov {
namespace {

// Bytes below which a second thread costs more than it brings.
constexpr int64_t kSerialBytes = 1 << 18;

template <typename Item>
void copy_row(const char* source, char* destination, int64_t channels, int64_t channel_stride) {
  const Item* from = reinterpret_cast<const Item*>(source);
  Item* to = reinterpret_cast<Item*>(destination);
  for (int64_t channel = 0; channel < channels; ++channel) {
    to[channel] = from[channel * channel_stride];
  }
}

void gather_(Tensor buffer, Tensor rows, int64_t buffer_row, int64_t first_sample, int64_t samples,
             int64_t run_length, int64_t phase, int64_t channel_dim) {
  const RowsView view = view_rows(rows, channel_dim);
  check_gather(buffer, rows, view, buffer_row, first_sample, samples, run_length);
  if (samples == 0 || view.rows == 0) return;
  const Sampling sampling = sampling_of(rows, view, first_sample, run_length, phase);
  const int64_t row_bytes = view.channels * view.item_bytes;
  char* first = static_cast<char*>(buffer.mutable_data_ptr()) + buffer_row * row_bytes;
  const auto copy = [&](int64_t begin, int64_t end) {
    for (int64_t sample = begin; sample < end; ++sample) {
      const int64_t offset = row_offset(view, sampled_row(sampling, sample));
      const char* source = view.data + offset * view.item_bytes;
      char* destination = first + sample * row_bytes;
      if (view.channel_stride == 1) {
        std::memcpy(destination, source, static_cast<size_t>(row_bytes));
      } else if (view.item_bytes == 2) {
        copy_row<uint16_t>(source, destination, view.channels, view.channel_stride);
      } else if (view.item_bytes == 4) {
        copy_row<uint32_t>(source, destination, view.channels, view.channel_stride);
      } else {
        copy_row<uint64_t>(source, destination, view.channels, view.channel_stride);
      }
    }
  };
  const int64_t grain = 1 + kSerialBytes / (1 + row_bytes);
  if (samples <= grain) {
    copy(0, samples);
  } else {
    torch::stable::parallel_for(0, samples, grain, copy);
  }
}

}  // namespace
}  // namespace fastcov

STABLE_TORCH_LIBRARY_IMPL(fastcov, CPU, m) { m.impl("gather_", TORCH_BOX(&fastcov::gather_)); }
