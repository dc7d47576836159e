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

// Rows that a buffer on the device takes in one step, counted on the host.
struct StepRoom {
  int64_t offered;  // by the calls of the running step
  int64_t most;     // to be copied
};

// Gather that fastcov/ops/counted.py has prepared.
struct PreparedGather {
  CountedGather at;
  int64_t counters;  // address of the layer's Cursor; 0 where Python counts the call
  int64_t room;      // address of the buffer's StepRoom; 0 there
  CallLayout layout;

  // Counts the call; false, with nothing counted, if `rows` have another layout or find no room.
  bool admit(const Tensor& rows) const {
    if (counters == 0) {
      return rows.numel() == at.rows * at.channels &&
             static_cast<int64_t>(rows.element_size()) == at.item_bytes;
    }
    if (!layout.fits(rows)) return false;
    auto& counted = *reinterpret_cast<Cursor*>(counters);
    auto& step = *reinterpret_cast<StepRoom*>(room);
    const int64_t offered = step.offered + at.rows;
    // Each call may round up by a row; more rows than this would overflow.
    if (offered >= kWhole / 2 || (offered * at.fraction >> 32) + counted.calls + 1 > step.most) {
      return false;
    }
    step.offered = offered;
    counted.count(at.rows, rows.size(0));
    return true;
  }
};

// The gather if it takes `rows`; else null, with nothing counted.
inline const CountedGather* counted_gather(const Tensor& prepared, const Tensor& rows) {
  constexpr int64_t kFields = sizeof(PreparedGather) / sizeof(int64_t);
  STD_TORCH_CHECK(prepared.scalar_type() == ScalarType::Long && prepared.is_cpu() &&
                      prepared.numel() == kFields && prepared.is_contiguous(),
                  "prepared must be contiguous int64 on the CPU, one value for each field");
  const auto& gather = *static_cast<const PreparedGather*>(prepared.const_data_ptr());
  const bool is_taken = rows.get_device_index() == gather.at.device && gather.admit(rows);
  return is_taken ? &gather.at : nullptr;
}

}  // namespace fastcov
