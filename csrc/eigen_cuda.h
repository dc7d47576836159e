// Symmetric eigenvalues on a GPU: types shared by the driver (eigen.cu) and the kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace fastcov {

// One entry of a call: B matrices of order n, and the places of their results. If it has
// thresholds, counts are wanted and not values.
struct EigenEntry {
  const void* matrices;
  int64_t batch_stride;  // all strides are in elements
  int64_t row_stride;
  int64_t column_stride;
  void* values;              // [B, n]
  const double* thresholds;  // for float64 matrices only
  int64_t threshold_batch_stride;
  int64_t threshold_stride;
  int64_t* counts;  // [B, T, 2]
  int64_t first;    // matrices in the entries before this one
  int n;
  int threshold_count;
};

// Entries of one launch. The table is a kernel parameter, so that nothing has to be copied to the
// device beforehand, nothing has to be waited for, and a captured graph keeps it. Parameters may
// take 4 KB.
struct EigenTable {
  static constexpr int kEntries = 32;
  int64_t matrices;
  int entries;
  EigenEntry entry[kEntries];
};
static_assert(sizeof(EigenTable) <= 3072, "leave room for a kernel's other parameters");

enum class EigenClass {
  kWarp8,  // rows in registers, 8 lanes of a warp for a matrix
  kWarp16,
  kWarp32,
  kBlock64,   // rows in registers, a block for a matrix
  kBlock128,  // float32 alone
  kTriangle,  // lower triangle in shared memory, a block for a matrix
  kMembers,   // rows in shared and global memory, several blocks for a matrix
  kLibrary,   // solved by torch.linalg
};

struct DeviceLimits {
  int multiprocessors;
  int shared_bytes;  // most that a block may ask for
  bool has_clusters;
};

// Division of the work among several blocks for each matrix of a table. All matrices are of one
// order.
struct MembersPlan {
  int members;  // blocks for a matrix
  int groups;   // matrices that are solved at the same time
  bool is_cluster;
  int near_rows;  // rows of each block that lie in shared memory
  int far_rows;   // rows of each block that lie in the workspace
  int shared_bytes;
  int64_t far_bytes;  // workspace of one matrix, for all its blocks
  int64_t workspace_bytes;
};

constexpr int kLargestTriangle = 256;
constexpr int kLargestMembers = 2048;

// Largest order whose triangle fits into a block's shared memory, at most kLargestTriangle.
template <class Real>
int largest_triangle(int shared_bytes);

template <class Real>
cudaError_t launch_registers(EigenClass size_class, const EigenTable& table, cudaStream_t stream);
template <class Real>
cudaError_t launch_triangle(const EigenTable& table, cudaStream_t stream);
template <class Real>
MembersPlan plan_members(int n, int64_t matrices, const DeviceLimits& limits);
// Launches a plan. A plan with 0 members means that the order is too large for this GPU.
template <class Real>
cudaError_t launch_members(const EigenTable& table, const MembersPlan& plan, void* workspace,
                           cudaStream_t stream);

// Largest order whose eigenvectors are found by Jacobi rotations.
constexpr int kLargestJacobi = 128;

struct JacobiPlan {
  bool fits;              // false if the order is too large for the algorithm or for this GPU
  bool has_near_vectors;  // true if eigenvectors lie in shared memory
  int64_t workspace_bytes;
};

// n is the largest order of a table; vectors are pointers to [B, n, n], one for each entry.
template <class Real>
JacobiPlan plan_jacobi(int n, int64_t matrices, int shared_bytes);
template <class Real>
cudaError_t launch_jacobi(const EigenTable& table, void* const* vectors, const JacobiPlan& plan,
                          void* workspace, cudaStream_t stream);

// What comes before and after torch.linalg, for one entry. prepare_library writes a scaled copy [B,
// n, n] in which matrices that are not finite are zero. restore_library undoes the scaling of the
// eigenvalues, or takes counts of them where the entry has thresholds. largest is scratch. [B]
template <class Real>
cudaError_t prepare_library(const EigenTable& table, unsigned long long* largest, void* copy,
                            cudaStream_t stream);
template <class Real>
cudaError_t restore_library(const EigenTable& table, const unsigned long long* largest,
                            void* values, void* vectors, cudaStream_t stream);

}  // namespace fastcov
