// View of rows: leading dimensions of any strides, channels last. Nothing is copied.
#pragma once

#include <cstdint>

#include "boxing.h"
#include "host_device.h"

namespace fastcov {

constexpr int kMaxLeading = 7;

struct RowsView {
  const char* data;
  int64_t item_bytes;
  // Leading dimensions, with strides in elements. Those that lie one after the other in memory are
  // merged, and sizes of 1 fill up the front. The last one is the run of evenly spaced rows.
  int64_t size[kMaxLeading];
  int64_t stride[kMaxLeading];
  int64_t rows;
  int64_t channels;
  int64_t channel_stride;

  int64_t run_rows() const { return size[kMaxLeading - 1]; }
  int64_t run_stride() const { return stride[kMaxLeading - 1]; }
};

// channel_dim is the dimension of the channels, -1 or any but 0. Rows run over the other dimensions
// in order.
inline RowsView view_rows(const Tensor& rows, int64_t channel_dim) {
  const int64_t dims = rows.dim();
  STD_TORCH_CHECK(dims >= 1 && dims <= kMaxLeading + 1, "rows must have 1 to 8 dimensions");
  if (channel_dim == -1) channel_dim = dims - 1;
  STD_TORCH_CHECK(channel_dim < dims && channel_dim >= (dims > 1 ? 1 : 0),
                  "channel_dim must be -1 or a dimension behind the first");
  RowsView view{};
  view.data = static_cast<const char*>(rows.const_data_ptr());
  view.item_bytes = static_cast<int64_t>(rows.element_size());
  view.channels = rows.size(channel_dim);
  view.channel_stride = view.channels == 1 ? 1 : rows.stride(channel_dim);
  view.rows = 1;
  int slot = kMaxLeading;
  for (int64_t dim = dims - 1; dim >= 0; --dim) {
    if (dim == channel_dim) continue;
    const int64_t size = rows.size(dim);
    const int64_t stride = rows.stride(dim);
    view.rows *= size;
    if (size == 1) continue;
    if (slot < kMaxLeading && stride == view.size[slot] * view.stride[slot]) {
      view.size[slot] *= size;
      continue;
    }
    --slot;
    view.size[slot] = size;
    view.stride[slot] = stride;
  }
  while (slot > 0) view.size[--slot] = 1;
  return view;
}

// Offset of a row in elements. Rows are counted row-major over the leading dimensions.
FASTCOV_HOST_DEVICE int64_t row_offset(const RowsView& view, int64_t row) {
  int64_t offset = 0;
#if defined(__CUDA_ARCH__)
#pragma unroll  // without a run-time index the view stays in constant memory
#endif
  for (int dim = kMaxLeading - 1; dim >= 0; --dim) {
    if (view.size[dim] == 1) continue;
    const int64_t above = row / view.size[dim];
    offset += (row - above * view.size[dim]) * view.stride[dim];
    row = above;
  }
  return offset;
}

// Calls visit(first row, rows, element offset) for each run of evenly spaced rows in [begin, end).
template <typename Visit>
void for_each_run(const RowsView& view, int64_t begin, int64_t end, const Visit& visit) {
  for (int64_t row = begin; row < end;) {
    const int64_t left = view.run_rows() - row % view.run_rows();
    const int64_t count = left < end - row ? left : end - row;
    visit(row, count, row_offset(view, row));
    row += count;
  }
}

}  // namespace fastcov
