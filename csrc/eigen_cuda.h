// Symmetric eigenvalues on a GPU: what the driver (eigen.cu) and the kernels share.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastcov {

// One entry of a call: B matrices of order n and where their results go. With thresholds, counts
// are wanted instead of values.
struct EigenEntry {
  const void* matrices;
  int64_t batch_stride;  // in elements, as all strides
  int64_t row_stride;
  int64_t column_stride;
  void* values;              // [B, n]
  const double* thresholds;  // float64 matrices only
  int64_t threshold_batch_stride;
  int64_t threshold_stride;
  int64_t* counts;  // [B, T, 2]
  int64_t first;    // matrices in the entries before this one
  int n;
  int threshold_count;
};

// Travels as a kernel parameter: no copy to the device, so nothing to synchronise, and a captured
// graph keeps it. Parameters may take 4 KB.
struct EigenTable {
  static constexpr int kEntries = 32;
  int64_t matrices;
  int entries;
  EigenEntry entry[kEntries];
};
static_assert(sizeof(EigenTable) <= 3072, "leave room for a kernel's other parameters");

enum class EigenClass {
  kWarp8,  // registers, 8 lanes of a warp for a matrix
  kWarp16,
  kWarp32,
  kBlock64,   // registers, a block for a matrix
  kBlock128,  // float32 only
  kTriangle,  // lower triangle in shared memory, a block for a matrix
  kMembers,   // rows over several blocks, in shared and global memory
  kLibrary,   // torch.linalg
};

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // a block may ask for
  bool has_clusters;
};

// Several blocks for each matrix of a table, all of one order.
struct MembersPlan {
  int members;  // blocks for a matrix
  int groups;   // matrices at a time
  bool is_cluster;
  int near_rows;  // rows of each block in shared memory
  int far_rows;   // and in the workspace
  int shared_bytes;
  int64_t far_bytes;  // of one group, for all its members
  int64_t workspace_bytes;
};

constexpr int kLargestTriangle = 256;
constexpr int kLargestMembers = 2048;

// Largest order whose triangle fits a block's shared memory, at most kLargestTriangle.
template <class Real>
int largest_triangle(int shared_bytes);

template <class Real>
cudaError_t launch_registers(EigenClass size_class, const EigenTable& table, cudaStream_t stream);
template <class Real>
cudaError_t launch_triangle(const EigenTable& table, cudaStream_t stream);
template <class Real>
MembersPlan plan_members(int n, int64_t matrices, const DeviceLimits& limits);
// A plan without members means that the order is too large for this GPU.
template <class Real>
cudaError_t launch_members(const EigenTable& table, const MembersPlan& plan, void* workspace,
                           cudaStream_t stream);

// Eigenvectors by Jacobi rotations.
constexpr int kLargestJacobi = 128;

struct JacobiPlan {
  bool fits;              // else the order is too large, for the algorithm or for this GPU
  bool has_near_vectors;  // in shared memory
  int64_t workspace_bytes;
};

// Order is the largest of a table. vectors: [entries] pointers to [B, n, n].
template <class Real>
JacobiPlan plan_jacobi(int n, int64_t matrices, int shared_bytes);
template <class Real>
cudaError_t launch_jacobi(const EigenTable& table, void* const* vectors, const JacobiPlan& plan,
                          void* workspace, cudaStream_t stream);

// For torch.linalg, one entry of one order: a scaled copy [B, n, n] of what is finite, and after it
// the eigenvalues as they should be; counts where the entry has thresholds. largest: [B] scratch.
template <class Real>
cudaError_t prepare_library(const EigenTable& table, unsigned long long* largest, void* copy,
                            cudaStream_t stream);
template <class Real>
cudaError_t restore_library(const EigenTable& table, const unsigned long long* largest,
                            void* values, void* vectors, cudaStream_t stream);

}  // namespace fastcov
