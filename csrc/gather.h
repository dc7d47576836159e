// Arguments of the gather operators: their checks, and the structs that host and device code take.
#pragma once

#include <cstdint>

#include "cursor.h"
#include "gather_counted.h"
#include "rows.h"
#include "sampling.h"

namespace fastcov {

inline Sampling sampling_of(const Tensor& rows, const RowsView& view, int64_t first_sample,
                            int64_t run_length, int64_t phase) {
  const int64_t images = rows.dim() > 1 ? rows.size(0) : 1;
  return {first_sample, run_length, static_cast<uint64_t>(phase), view.rows, view.rows / images};
}

inline void check_gather(const Tensor& buffer, const Tensor& rows, const RowsView& view,
                         int64_t buffer_row, int64_t first_sample, int64_t samples,
                         int64_t run_length) {
  STD_TORCH_CHECK(buffer.dim() == 2 && buffer.size(1) == view.channels && buffer.is_contiguous() &&
                      buffer.scalar_type() == rows.scalar_type() &&
                      buffer.is_cuda() == rows.is_cuda() &&
                      buffer.get_device_index() == rows.get_device_index(),
                  "buffer must be contiguous [capacity, C], of the rows' dtype and device");
  STD_TORCH_CHECK(samples >= 0 && run_length >= 1 && first_sample >= 0 && buffer_row >= 0 &&
                      buffer_row + samples <= buffer.size(0),
                  "the samples do not fit the buffer");
}

// Gather that fastcov/ops/counted.py has prepared; null if `rows` does not have its layout.
inline const CountedGather* counted_gather(const Tensor& prepared, const Tensor& rows) {
  constexpr int64_t kFields = sizeof(CountedGather) / sizeof(int64_t);
  STD_TORCH_CHECK(prepared.scalar_type() == ScalarType::Long && prepared.is_cpu() &&
                      prepared.numel() == kFields && prepared.is_contiguous(),
                  "prepared must be contiguous int64 on the CPU, one value for each field");
  const auto* const at = static_cast<const CountedGather*>(prepared.const_data_ptr());
  const bool fits = rows.get_device_index() == at->device &&
                    rows.numel() == at->rows * at->channels &&
                    static_cast<int64_t>(rows.element_size()) == at->item_bytes;
  return fits ? at : nullptr;
}

}  // namespace fastcov
