// Gather whose counters lie on the rows' device, beside the buffer. No argument changes from step
// to step, so that a CUDA graph replays it with the right counts. Written once for the host
// (gather_cpu.cpp) and the GPU (gather_counted.cu), without a header of torch.
#pragma once

#include <cstdint>

#include "host_device.h"
#include "sampling.h"

namespace fastcov {

// Counters of a buffer, in the order of fastcov/kernels/gather.py. All start at 0.
struct DeviceCursor {
  int64_t fill;        // rows in the buffer
  int64_t sampled;     // rows gathered since the start, which is the number of the next sample
  int64_t carry;       // fraction of a row due, carried to the next call, in units of 2**-32
  int64_t gathered;    // blocks of the running gather that are done; 0 between launches
  int64_t flushed;     // programs of the running flush that are done
  int64_t state_step;  // step up to which decay has been applied to the state
  int64_t dropped;     // rows that were due and found no room
  int64_t is_apart;    // 1 if the buffer has been emptied at a moment of its own
};

// A prepared gather, in the order of fastcov/ops/counted.py, which makes one for each layout.
// Strides are in elements.
struct CountedGather {
  int64_t buffer;    // address, [capacity, channels] of the rows' dtype
  int64_t row_step;  // address, int32 [capacity]: a row's step, or -1 where a value is not finite
  int64_t cursor;    // address of a DeviceCursor
  int64_t step;      // address of an int64, the number of the running step
  int64_t device;    // number of the GPU, -1 for the host
  int64_t blocks;    // of the GPU's launch; with 0 nothing is launched
  int64_t item_bytes;
  int64_t exponent;   // bits of a value that are all set where it is not finite
  int64_t alignment;  // bitwise or of rows' strides in bytes, the buffer's address and 16
  int64_t capacity;
  int64_t fraction;  // of the rows that is read, in units of 2**-32; at 1 all are read in order
  int64_t run_length;
  int64_t phase;
  int64_t rows;
  int64_t image_rows;  // rows that a run wraps within
  int64_t channels;
  int64_t positions;  // row = image * positions + position
  int64_t size_1;     // an image's digits are (any, size_1, size_2)
  int64_t size_2;
  int64_t stride_0;
  int64_t stride_1;
  int64_t stride_2;
  int64_t stride_position;
  int64_t stride_channel;
};

constexpr int64_t kWholeRow = int64_t{1} << 32;
constexpr int kGatherRows = 8;  // in a block, where channels lie side by side; else kGatherTile
constexpr int kGatherTile = 32;

struct DueRows {
  int64_t samples;  // samples for which there is room
  int64_t wanted;
  int64_t carry;
};

FASTCOV_HOST_DEVICE DueRows due_rows(const CountedGather& at, const DeviceCursor& cursor) {
  const int64_t due = at.rows * at.fraction + cursor.carry;
  const int64_t wanted = due >> 32;
  const int64_t room = at.capacity - cursor.fill;
  return {wanted < room ? wanted : room, wanted, due & (kWholeRow - 1)};
}

// Offset in elements of the row of a sample of this call.
FASTCOV_HOST_DEVICE int64_t row_start(const CountedGather& at, const DeviceCursor& cursor,
                                      int64_t index) {
  int64_t row = index;
  if (at.fraction < kWholeRow) {
    const Sampling sampling{cursor.sampled, at.run_length, static_cast<uint64_t>(at.phase), at.rows,
                            at.image_rows};
    row = sampled_row(sampling, index);
  }
  const int64_t image = row / at.positions;
  const int64_t rest = image / at.size_2;
  return rest / at.size_1 * at.stride_0 + rest % at.size_1 * at.stride_1 +
         image % at.size_2 * at.stride_2 + row % at.positions * at.stride_position;
}

FASTCOV_HOST_DEVICE void count_gathered(DeviceCursor& cursor, const DueRows& due) {
  cursor.fill += due.samples;
  cursor.sampled += due.samples;
  cursor.carry = due.carry;
  cursor.dropped += due.wanted - due.samples;
  cursor.gathered = 0;
}

// True if a value in these bits is infinite or NaN: one value of 4 bytes, or either of two.
FASTCOV_HOST_DEVICE bool is_broken(uint32_t bits, const CountedGather& at) {
  const uint32_t low = static_cast<uint32_t>(at.exponent);
  const uint32_t high = at.item_bytes == 2 ? low << 16 : low;
  return (bits & low) == low || (bits & high) == high;
}

}  // namespace fastcov
