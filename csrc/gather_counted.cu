// The GPU's side of gather_counted.h: one launch, without synchronisation or allocation.
#include "gather_counted.h"

#include <cuda_runtime.h>

#include "gather_counted_cuda.h"

namespace fastcov {
namespace {

constexpr int kThreads = 32 * kGatherRows;
constexpr unsigned kAllLanes = 0xffffffffu;

// Type that one access moves: a value of two bytes, or whole words.
template <int Words>
struct alignas(4 * Words) Item {
  uint32_t word[Words];
};
template <>
struct alignas(2) Item<0> {
  uint16_t value;
};

template <int Words>
__device__ __forceinline__ bool is_broken_item(const Item<Words>& item, const CountedGather& at) {
  if constexpr (Words == 0) {
    return is_broken(item.value, at);
  } else {
    bool is_any = false;
    for (int i = 0; i < Words; ++i) is_any |= is_broken(item.word[i], at);
    return is_any;
  }
}

__device__ __forceinline__ void mark_row(const CountedGather& at, int64_t buffer_row, bool broken) {
  const int64_t step = *reinterpret_cast<const int64_t*>(at.step);
  reinterpret_cast<int32_t*>(at.row_step)[buffer_row] = broken ? -1 : static_cast<int32_t>(step);
}

// Moves the counters on. The last block to arrive does so, because all blocks have read them by
// then. The order of arrival changes nothing that is stored.
__device__ __forceinline__ void finish(DeviceCursor* cursor, const DueRows& due) {
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    auto* const done = reinterpret_cast<unsigned long long*>(&cursor->gathered);
    if (atomicAdd(done, 1ull) == gridDim.x - 1) {
      __threadfence();
      count_gathered(*cursor, due);
    }
  }
}

// Copies rows whose channels lie side by side, a warp for each.
template <int Words>
__global__ void __launch_bounds__(kThreads)
    gather_counted_contiguous_kernel(const __grid_constant__ CountedGather at, const char* rows) {
  auto* const cursor = reinterpret_cast<DeviceCursor*>(at.cursor);
  const DueRows due = due_rows(at, *cursor);
  const int64_t sample = blockIdx.x * int64_t{kGatherRows} + threadIdx.x / 32;
  if (sample < due.samples) {
    const int64_t buffer_row = cursor->fill + sample;
    const int64_t row_bytes = at.channels * at.item_bytes;
    const auto* const source =
        reinterpret_cast<const Item<Words>*>(rows + row_start(at, *cursor, sample) * at.item_bytes);
    auto* const target =
        reinterpret_cast<Item<Words>*>(reinterpret_cast<char*>(at.buffer) + buffer_row * row_bytes);
    const int64_t items = row_bytes / static_cast<int64_t>(sizeof(Item<Words>));
    bool broken = false;
    for (int64_t item = threadIdx.x % 32; item < items; item += 32) {
      const Item<Words> value = source[item];
      target[item] = value;
      broken |= is_broken_item<Words>(value, at);
    }
    broken = __any_sync(kAllLanes, broken);
    if (threadIdx.x % 32 == 0) mark_row(at, buffer_row, broken);
  }
  finish(cursor, due);
}

// Copies rows whose channels lie apart (NCHW). Neighbouring samples of a run are read together and
// transposed in a tile of shared memory, so that reads and writes both cover whole sectors.
template <int Words>
__global__ void __launch_bounds__(kThreads)
    gather_counted_strided_kernel(const __grid_constant__ CountedGather at, const char* rows) {
  __shared__ Item<Words> tile[kGatherTile][kGatherTile + 1];
  __shared__ bool broken[kGatherRows][kGatherTile];
  auto* const cursor = reinterpret_cast<DeviceCursor*>(at.cursor);
  const DueRows due = due_rows(at, *cursor);
  const int64_t first_sample = blockIdx.x * int64_t{kGatherTile};
  const int lane = threadIdx.x % 32;
  const int warp = threadIdx.x / 32;
  const auto* const source = reinterpret_cast<const Item<Words>*>(rows);
  auto* const target = reinterpret_cast<Item<Words>*>(at.buffer);
  const bool is_read = first_sample + lane < due.samples;
  const int64_t start = is_read ? row_start(at, *cursor, first_sample + lane) : 0;
  bool is_any = false;
  for (int64_t channel = 0; channel < at.channels; channel += kGatherTile) {
    for (int row = warp; row < kGatherTile; row += kGatherRows) {
      if (is_read && channel + row < at.channels) {
        const Item<Words> value = source[start + (channel + row) * at.stride_channel];
        tile[row][lane] = value;
        is_any |= is_broken_item<Words>(value, at);
      }
    }
    __syncthreads();
    for (int row = warp; row < kGatherTile; row += kGatherRows) {
      const int64_t buffer_row = cursor->fill + first_sample + row;
      if (first_sample + row < due.samples && channel + lane < at.channels) {
        target[buffer_row * at.channels + channel + lane] = tile[lane][row];
      }
    }
    __syncthreads();
  }
  broken[warp][lane] = is_any;
  __syncthreads();
  if (warp == 0 && is_read) {
    for (int other = 1; other < kGatherRows; ++other) is_any |= broken[other][lane];
    mark_row(at, cursor->fill + first_sample + lane, is_any);
  }
  finish(cursor, due);
}

using Kernel = void (*)(const CountedGather, const char*);

Kernel kernel_of(const CountedGather& at, const void* rows) {
  if (at.stride_channel != 1) {
    return at.item_bytes == 2 ? gather_counted_strided_kernel<0> : gather_counted_strided_kernel<1>;
  }
  // Width of the widest access for which every row of both tensors is aligned.
  const uint64_t bits = reinterpret_cast<uint64_t>(rows) | static_cast<uint64_t>(at.alignment);
  switch (bits & (~bits + 1)) {
    case 16:
      return gather_counted_contiguous_kernel<4>;
    case 8:
      return gather_counted_contiguous_kernel<2>;
    case 4:
      return gather_counted_contiguous_kernel<1>;
    default:
      return gather_counted_contiguous_kernel<0>;
  }
}

}  // namespace

cudaError_t launch_gather_counted(const CountedGather& at, const void* rows, cudaStream_t stream) {
  if (at.blocks == 0) return cudaSuccess;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(at.blocks));
  config.blockDim = dim3(kThreads);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel_of(at, rows), at, static_cast<const char*>(rows));
}

}  // namespace fastcov
