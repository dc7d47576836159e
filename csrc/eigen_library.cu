// Work before and after torch.linalg on a GPU, for matrices that are too large for the kernels
// here. torch.linalg does not scale, and a matrix that is not finite would spoil or stop its whole
// batch.
#include "eigen_device.h"

namespace fastcov {
namespace {

constexpr int kThreads = 256;

// Finds the largest magnitude of each matrix. `largest` must be zero. The order in which maxima of
// integers are taken changes nothing. [B]
template <class Real>
__global__ void __launch_bounds__(kThreads)
    eigen_largest_kernel(const __grid_constant__ EigenTable table, unsigned long long* largest) {
  using Bits = typename Numeric<Real>::Bits;
  const Located<Real> located(table, blockIdx.y);
  const int n = located.order();
  Bits top = 0;
  for (int row = blockIdx.x; row < n; row += gridDim.x) {
    for (int column = threadIdx.x; column <= row; column += kThreads) {
      const Bits bits = magnitude_bits(located.lower(row, column));
      top = bits > top ? bits : top;
    }
  }
  const WarpLanes<32> warp;
  top = warp.maximum(top);
  if (warp.lane() == 0) atomicMax(largest + blockIdx.y, static_cast<unsigned long long>(top));
}

template <class Real>
__device__ Scale<Real> scale_of(const unsigned long long* largest, int64_t matrix) {
  return Scale<Real>(static_cast<typename Numeric<Real>::Bits>(largest[matrix]));
}

// Writes scaled copies with zeros above the diagonal. [B, n, n]
template <class Real>
__global__ void __launch_bounds__(kThreads)
    eigen_copy_kernel(const __grid_constant__ EigenTable table, const unsigned long long* largest,
                      Real* copy) {
  const Located<Real> located(table, blockIdx.y);
  const int n = located.order();
  const Scale<Real> scale = scale_of<Real>(largest, blockIdx.y);
  for (int row = blockIdx.x; row < n; row += gridDim.x) {
    Real* const out = copy + (int64_t{blockIdx.y} * n + row) * n;
    for (int column = threadIdx.x; column < n; column += kThreads) {
      const bool is_kept = column <= row && scale.is_finite;
      out[column] = is_kept ? located.lower(row, column) * scale.shrink : Real(0);
    }
  }
}

template <class Real>
__global__ void __launch_bounds__(kThreads)
    eigen_restore_kernel(const unsigned long long* largest, Real* values, Real* vectors, int n) {
  const Scale<Real> scale = scale_of<Real>(largest, blockIdx.y);
  const int64_t first = int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (first < n) values[int64_t{blockIdx.y} * n + first] *= scale.restore;
  if (vectors && !scale.is_finite) {
    const int64_t elements = int64_t{n} * n;
    for (int64_t i = first; i < elements; i += int64_t{gridDim.x} * kThreads) {
      vectors[blockIdx.y * elements + i] = scale.restore;
    }
  }
}

// Counts eigenvalues above the thresholds of an entry, with the interval of count_above.
__global__ void __launch_bounds__(kThreads)
    eigen_count_kernel(const __grid_constant__ EigenTable table, const double* values) {
  const Located<double> located(table, blockIdx.y);
  const EigenEntry& entry = *located.entry;
  const int n = entry.n;
  const int t = blockIdx.x * kThreads + threadIdx.x;
  if (t >= entry.threshold_count) return;
  const double* const value = values + located.index * n;
  // Values ascend. Their Frobenius norm is at most sqrt(n) times the largest, and might overflow if
  // it were summed.
  const double size = larger(absolute(value[0]), absolute(value[n - 1]));
  const double error = reduction_error(n, Numeric<double>::square_root(n) * size);
  const double tau =
      entry.thresholds[located.index * entry.threshold_batch_stride + t * entry.threshold_stride];
  int low = 0;
  int high = n;
  for (int k = 0; k < n; ++k) {
    low += value[k] > tau + error;
    high -= value[k] <= tau - error;
  }
  int64_t* const out = entry.counts + (located.index * entry.threshold_count + t) * 2;
  out[0] = low;
  out[1] = high;
}

unsigned divide_up(int64_t a, int64_t b) { return static_cast<unsigned>((a + b - 1) / b); }

}  // namespace

template <class Real>
cudaError_t prepare_library(const EigenTable& table, unsigned long long* largest, void* copy,
                            cudaStream_t stream) {
  const dim3 blocks(64, static_cast<unsigned>(table.matrices));
  cudaError_t error = cudaMemsetAsync(largest, 0, sizeof(*largest) * table.matrices, stream);
  if (error != cudaSuccess) return error;
  error = launch_kernel(eigen_largest_kernel<Real>, blocks, kThreads, 0, stream, table, largest);
  if (error != cudaSuccess) return error;
  return launch_kernel(eigen_copy_kernel<Real>, blocks, kThreads, 0, stream, table, largest,
                       static_cast<Real*>(copy));
}

template <class Real>
cudaError_t restore_library(const EigenTable& table, const unsigned long long* largest,
                            void* values, void* vectors, cudaStream_t stream) {
  const int n = table.entry[0].n;
  const dim3 blocks(divide_up(n, kThreads), static_cast<unsigned>(table.matrices));
  const cudaError_t error =
      launch_kernel(eigen_restore_kernel<Real>, blocks, kThreads, 0, stream, largest,
                    static_cast<Real*>(values), static_cast<Real*>(vectors), n);
  const int thresholds = table.entry[0].thresholds ? table.entry[0].threshold_count : 0;
  if (error != cudaSuccess || thresholds == 0) return error;
  return launch_kernel(eigen_count_kernel, dim3(divide_up(thresholds, kThreads), blocks.y),
                       kThreads, 0, stream, table, static_cast<const double*>(values));
}

template cudaError_t prepare_library<float>(const EigenTable&, unsigned long long*, void*,
                                            cudaStream_t);
template cudaError_t prepare_library<double>(const EigenTable&, unsigned long long*, void*,
                                             cudaStream_t);
template cudaError_t restore_library<float>(const EigenTable&, const unsigned long long*, void*,
                                            void*, cudaStream_t);
template cudaError_t restore_library<double>(const EigenTable&, const unsigned long long*, void*,
                                             void*, cudaStream_t);

}  // namespace fastcov
