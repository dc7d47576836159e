// Steps of every eigenvalue kernel before and after the reduction, and its launch.
#pragma once

#include <map>
#include <mutex>
#include <utility>

#include "eigen.h"
#include "eigen_cuda.h"
#include "eigen_storage.h"
#include "team_cuda.h"

namespace fastcov {

template <class... Parameters, class... Arguments>
cudaError_t launch_kernel(void (*kernel)(Parameters...), dim3 blocks, int threads,
                          int64_t shared_bytes, cudaStream_t stream,
                          const Arguments&... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.dynamicSmemBytes = static_cast<size_t>(shared_bytes);
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernel, static_cast<Parameters>(arguments)...);
}

// Lets a kernel use `bytes` of dynamic shared memory. The limit belongs to the kernel, not to a
// launch. It is therefore always set to all that the GPU gives: threads that launch different sizes
// at the same time then never lower it under each other.
template <class... Parameters>
cudaError_t allow_shared(void (*kernel)(Parameters...), int64_t bytes) {
  // The limit is set once for each kernel and device, because setting it may wait for running
  // copies.
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int> most_of;
  int device = 0;
  if (const cudaError_t error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto key = std::make_pair(reinterpret_cast<const void*>(kernel), device);
  auto found = most_of.find(key);
  if (found == most_of.end()) {
    int available = 0;
    cudaFuncAttributes attributes{};
    cudaError_t error =
        cudaDeviceGetAttribute(&available, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
    if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, kernel);
    if (error != cudaSuccess) return error;
    const int most = available - static_cast<int>(attributes.sharedSizeBytes);
    error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
    if (error != cudaSuccess) return error;
    found = most_of.emplace(key, most).first;
  }
  return bytes > found->second ? cudaErrorInvalidValue : cudaSuccess;
}

// One matrix of a table, by its number.
template <class Real>
struct Located {
  const EigenEntry* entry;
  int64_t index;  // number of the matrix in its entry
  const Real* matrix;

  __device__ Located(const EigenTable& table, int64_t number) {
    int found = 0;
    while (found + 1 < table.entries && table.entry[found + 1].first <= number) ++found;
    entry = &table.entry[found];
    index = number - entry->first;
    matrix = static_cast<const Real*>(entry->matrices) + index * entry->batch_stride;
  }
  __device__ int order() const { return entry->n; }
  // Entry of the lower triangle, row >= column.
  __device__ Real lower(int row, int column) const {
    return matrix[row * entry->row_stride + column * entry->column_stride];
  }
};

// Mean of the diagonal of a scaled matrix, which is subtracted from it. Every squad finds the same
// bits.
template <class Real, class Team>
__device__ Real shift_of(Team& team, const Located<Real>& located, const Scale<Real>& scale) {
  if (!scale.is_finite) return Real(0);
  const Real trace =
      team.sum(sum_strided<Real>(team.lane(), located.order(), team.lanes(),
                                 [&](int i) { return located.lower(i, i) * scale.shrink; }));
  return diagonal_shift(trace, located.order());
}

// Writes the eigenvalues, or the counts, of a tridiagonal matrix. All lanes of the team see it.
template <class Real, class Team>
__device__ void finish(Team& team, const Located<Real>& located, const Scale<Real>& scale,
                       const Real* diagonal, Real* off_diagonal, int* counts) {
  const EigenEntry& entry = *located.entry;
  const int n = entry.n;
  Real lower, upper;
  bound_eigenvalues(team, diagonal, off_diagonal, n, lower, upper);
  const int lane = team.member() * team.size() + team.rank();
  const int step = team.members() * team.size();
  if constexpr (sizeof(Real) == 8) {
    if (entry.thresholds) {
      const double* const tau = entry.thresholds + located.index * entry.threshold_batch_stride;
      int64_t* const out = entry.counts + located.index * entry.threshold_count * 2;
      const double error = count_error(diagonal, off_diagonal, n, scale.shift);
      for (int t = lane; t < entry.threshold_count; t += step) {
        int low = 0, high = n;
        if (scale.is_finite) {
          count_above(diagonal, off_diagonal, n, error,
                      tau[t * entry.threshold_stride] * scale.shrink - scale.shift, low, high);
        }
        out[2 * t] = low;
        out[2 * t + 1] = high;
      }
      return;
    }
  }
  Real* const values = static_cast<Real*>(entry.values) + located.index * n;
  bisect(team, diagonal, off_diagonal, n, lower, upper, counts,
         [&](int k, Real value) { values[k] = scale.eigenvalue(value); });
}

}  // namespace fastcov
