// Operators gather_ and gather_counted_ on a GPU. They copy sampled rows of an activation of any
// strides into a buffer, on the current stream, without synchronisation or allocation.
#include <cuda_runtime.h>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "gather.h"
#include "gather_counted_cuda.h"
#include "rows.h"

namespace fastcov {
namespace {

constexpr int kTile = 32;
constexpr int kTileThreads = 8;  // rows of threads; a block has 32 x 8 of them

__device__ __forceinline__ int64_t locate(const RowsView& view, const Sampling& sampling,
                                          int64_t sample) {
  return row_offset(view, sampled_row(sampling, sample));
}

// Copies rows whose channels lie side by side, in items as wide as the alignment allows.
template <typename Item>
__global__ void __launch_bounds__(kTile* kTileThreads)
    gather_contiguous_kernel(Item* buffer, const RowsView view, const Sampling sampling,
                             const int64_t samples, const int64_t items,
                             const int channels_per_item) {
  const int64_t sample = blockIdx.x * int64_t{kTileThreads} + threadIdx.y;
  if (sample >= samples) return;
  const Item* source =
      reinterpret_cast<const Item*>(view.data) + locate(view, sampling, sample) / channels_per_item;
  Item* destination = buffer + sample * items;
  for (int64_t item = threadIdx.x; item < items; item += kTile) destination[item] = source[item];
}

// Copies rows whose channels lie apart (NCHW). Neighbouring samples of a run are read together and
// transposed in a tile of shared memory, so that reads and writes both cover whole sectors.
template <typename Item>
__global__ void __launch_bounds__(kTile* kTileThreads)
    gather_strided_kernel(Item* buffer, const RowsView view, const Sampling sampling,
                          const int64_t samples) {
  __shared__ Item tile[kTile][kTile + 1];
  __shared__ int64_t offsets[kTile];
  const int64_t first_sample = blockIdx.x * int64_t{kTile};
  const int64_t first_channel = blockIdx.y * int64_t{kTile};
  if (threadIdx.y == 0 && first_sample + threadIdx.x < samples) {
    offsets[threadIdx.x] = locate(view, sampling, first_sample + threadIdx.x);
  }
  __syncthreads();
  const Item* source = reinterpret_cast<const Item*>(view.data);
  for (int row = threadIdx.y; row < kTile; row += kTileThreads) {
    const int64_t channel = first_channel + row;
    if (first_sample + threadIdx.x < samples && channel < view.channels) {
      tile[row][threadIdx.x] = source[offsets[threadIdx.x] + channel * view.channel_stride];
    }
  }
  __syncthreads();
  for (int row = threadIdx.y; row < kTile; row += kTileThreads) {
    const int64_t sample = first_sample + row;
    const int64_t channel = first_channel + threadIdx.x;
    if (sample < samples && channel < view.channels) {
      buffer[sample * view.channels + channel] = tile[threadIdx.x][row];
    }
  }
}

template <typename Item>
void launch_contiguous(void* buffer, const RowsView& view, const Sampling& sampling,
                       int64_t samples, cudaStream_t stream) {
  const int channels_per_item = static_cast<int>(sizeof(Item) / view.item_bytes);
  const unsigned blocks = static_cast<unsigned>((samples + kTileThreads - 1) / kTileThreads);
  gather_contiguous_kernel<Item><<<blocks, dim3(kTile, kTileThreads), 0, stream>>>(
      static_cast<Item*>(buffer), view, sampling, samples, view.channels / channels_per_item,
      channels_per_item);
}

template <typename Item>
void launch_strided(void* buffer, const RowsView& view, const Sampling& sampling, int64_t samples,
                    cudaStream_t stream) {
  const dim3 blocks(static_cast<unsigned>((samples + kTile - 1) / kTile),
                    static_cast<unsigned>((view.channels + kTile - 1) / kTile));
  gather_strided_kernel<Item><<<blocks, dim3(kTile, kTileThreads), 0, stream>>>(
      static_cast<Item*>(buffer), view, sampling, samples);
}

// Width in bytes of the widest access for which every row of both tensors is aligned.
int64_t common_alignment(const RowsView& view, const void* buffer) {
  uint64_t bits = reinterpret_cast<uint64_t>(view.data) | reinterpret_cast<uint64_t>(buffer) |
                  static_cast<uint64_t>(view.channels * view.item_bytes) | 16;
  for (int dim = 0; dim < kMaxLeading; ++dim) {
    if (view.size[dim] > 1) bits |= static_cast<uint64_t>(view.stride[dim] * view.item_bytes);
  }
  return static_cast<int64_t>(bits & (~bits + 1));
}

void launch(void* buffer, const RowsView& view, const Sampling& sampling, int64_t samples,
            cudaStream_t stream) {
  if (view.channel_stride == 1) {
    switch (common_alignment(view, buffer)) {
      case 16:
        return launch_contiguous<uint4>(buffer, view, sampling, samples, stream);
      case 8:
        return launch_contiguous<uint2>(buffer, view, sampling, samples, stream);
      case 4:
        return launch_contiguous<uint32_t>(buffer, view, sampling, samples, stream);
      default:
        return launch_contiguous<uint16_t>(buffer, view, sampling, samples, stream);
    }
  }
  switch (view.item_bytes) {
    case 2:
      return launch_strided<uint16_t>(buffer, view, sampling, samples, stream);
    case 4:
      return launch_strided<uint32_t>(buffer, view, sampling, samples, stream);
    default:
      return launch_strided<uint64_t>(buffer, view, sampling, samples, stream);
  }
}

void gather_(Tensor buffer, Tensor rows, int64_t buffer_row, int64_t first_sample, int64_t samples,
             int64_t run_length, int64_t phase, int64_t channel_dim) {
  const RowsView view = view_rows(rows, channel_dim);
  check_gather(buffer, rows, view, buffer_row, first_sample, samples, run_length);
  if (samples == 0 || view.rows == 0 || view.channels == 0) return;
  const Sampling sampling = sampling_of(rows, view, first_sample, run_length, phase);
  char* first =
      static_cast<char*>(buffer.mutable_data_ptr()) + buffer_row * view.channels * view.item_bytes;
  const int32_t device = rows.get_device_index();
  const torch::stable::accelerator::DeviceGuard guard(device);
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  (void)cudaGetLastError();  // clears an error of an earlier call, which that call has reported
  launch(first, view, sampling, samples, static_cast<cudaStream_t>(current));
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

// Stream of the calling thread on the current device.
cudaStream_t current_stream(int32_t device) {
  void* current = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
  return static_cast<cudaStream_t>(current);
}

// Copies the rows that are due by the counters on the device. Returns 0, with nothing done, if
// `rows` does not have the prepared layout. It reads no counter, so only the device knows whether a
// row was due.
int64_t gather_counted_(Tensor prepared, Tensor rows) {
  const CountedGather* const at = counted_gather(prepared, rows);
  if (at == nullptr) return 0;
  const auto device = static_cast<int32_t>(at->device);
  int current = -1;
  STD_CUDA_CHECK(cudaGetDevice(&current));
  cudaError_t status = cudaSuccess;
  if (current == device) {
    status = launch_gather_counted(*at, rows.const_data_ptr(), current_stream(device));
  } else {
    const torch::stable::accelerator::DeviceGuard guard(device);
    status = launch_gather_counted(*at, rows.const_data_ptr(), current_stream(device));
  }
  STD_CUDA_CHECK(status);
  return 1;
}

}  // namespace
}  // namespace fastcov

STABLE_TORCH_LIBRARY_IMPL(fastcov, CUDA, m) {
  m.impl("gather_", TORCH_BOX(&fastcov::gather_));
  m.impl("gather_counted_", TORCH_BOX(&fastcov::gather_counted_));
}
