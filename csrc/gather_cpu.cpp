// Operators gather_, gather_again_ and gather_counted_ on a CPU. They copy sampled rows of any
// strides into a buffer.
#include "gather.h"

#include <cstring>

#include "boxing.h"
#include "cursor.h"
#include "rows.h"

namespace fastcov {
namespace {

// Below this number of bytes a second thread costs more than it saves.
constexpr int64_t kSerialBytes = 1 << 18;
// Rows of a buffer for each channel. More rows than that are added to the state at once, without a
// buffer (BUFFER_ROWS_PER_CHANNEL in fastcov/rows/sequence.py).
constexpr int64_t kBufferRows = 2;

template <typename Item>
void copy_row(const char* source, char* destination, int64_t channels, int64_t channel_stride) {
  const Item* from = reinterpret_cast<const Item*>(source);
  Item* to = reinterpret_cast<Item*>(destination);
  for (int64_t channel = 0; channel < channels; ++channel) {
    to[channel] = from[channel * channel_stride];
  }
}

// Copies `samples` rows into the buffer, from its row `buffer_row` on.
void copy_samples(const Tensor& buffer, const RowsView& view, const Sampling& sampling,
                  int64_t buffer_row, int64_t samples) {
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

void gather_(Tensor buffer, Tensor rows, int64_t buffer_row, int64_t first_sample, int64_t samples,
             int64_t run_length, int64_t phase, int64_t channel_dim) {
  const RowsView view = view_rows(rows, channel_dim);
  check_gather(buffer, rows, view, buffer_row, first_sample, samples, run_length);
  if (samples == 0 || view.rows == 0) return;
  const Sampling sampling = sampling_of(rows, view, first_sample, run_length, phase);
  copy_samples(buffer, view, sampling, buffer_row, samples);
}

// Counts a call and copies the rows that are due. Returns their number; or -1, with nothing
// counted, if the call does not have the layout of the last one, if the rows do not fit the buffer,
// or if too many are due.
int64_t gather_again_(Tensor cursor, Tensor buffer, Tensor rows) {
  Cursor& at = Cursor::of(cursor);
  if (!at.layout.fits(rows)) return -1;
  const RowsView view = view_rows(rows, at.layout.channel_dim);
  if (at.fraction <= 0 || at.fraction >= kWhole || view.rows < 1 || view.rows >= kWhole / 2) {
    return -1;
  }
  const int64_t total = view.rows * at.fraction + at.carry;
  const int64_t due = total / kWhole;
  if (due >= view.rows || due > kBufferRows * view.channels || at.fill + due > at.limit) return -1;
  check_gather(buffer, rows, view, at.fill, at.sampled, due, at.layout.run_length);
  if (due > 0) {
    const Sampling sampling = sampling_of(rows, view, at.sampled, at.layout.run_length, at.phase);
    copy_samples(buffer, view, sampling, at.fill, due);
  }
  at.count(view.rows, rows.size(0));
  at.carry = total % kWhole;
  at.sampled += due;
  at.fill += due;
  return due;
}

// gather_counted_ on a host that stands for a GPU: in tests, and where the time of hooks is
// measured.
int64_t gather_counted_(Tensor prepared, Tensor rows) {
  const CountedGather* const at = counted_gather(prepared, rows);
  if (at == nullptr) return 0;
  if (at->blocks == 0) return 1;
  auto& cursor = *reinterpret_cast<DeviceCursor*>(at->cursor);
  const DueRows due = due_rows(*at, cursor);
  const auto* const source = static_cast<const char*>(rows.const_data_ptr());
  const auto step = static_cast<int32_t>(*reinterpret_cast<const int64_t*>(at->step));
  for (int64_t sample = 0; sample < due.samples; ++sample) {
    const int64_t buffer_row = cursor.fill + sample;
    const char* from = source + row_start(*at, cursor, sample) * at->item_bytes;
    char* to = reinterpret_cast<char*>(at->buffer) + buffer_row * at->channels * at->item_bytes;
    bool broken = false;
    for (int64_t channel = 0; channel < at->channels; ++channel) {
      uint32_t bits = 0;
      std::memcpy(&bits, from, static_cast<size_t>(at->item_bytes));
      std::memcpy(to, &bits, static_cast<size_t>(at->item_bytes));
      broken |= is_broken(bits, *at);
      from += at->stride_channel * at->item_bytes;
      to += at->item_bytes;
    }
    reinterpret_cast<int32_t*>(at->row_step)[buffer_row] = broken ? -1 : step;
  }
  count_gathered(cursor, due);
  return 1;
}

}  // namespace
}  // namespace fastcov

STABLE_TORCH_LIBRARY_IMPL(fastcov, CPU, m) {
  m.impl("gather_", TORCH_BOX(&fastcov::gather_));
  m.impl("gather_again_", TORCH_BOX(&fastcov::gather_again_));
  m.impl("gather_counted_", TORCH_BOX(&fastcov::gather_counted_));
}
