// The matrices of one call on a GPU, sorted into classes of size that run at the same time.
#pragma once

#include <algorithm>
#include <map>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "boxing.h"
#include "eigen_cuda.h"
#include "fork.h"

namespace fastcov {

inline int attribute(cudaDeviceAttr name, int device) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, name, device));
  return value;
}

inline DeviceLimits limits_of(int device) {
  return {attribute(cudaDevAttrMultiProcessorCount, device),
          attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          attribute(cudaDevAttrClusterLaunch, device) != 0};
}

// Entries of a call that go to the same kernel. They are launched a table at a time.
struct Bucket {
  // Most matrices of one table, because a grid has fewer than 2^31 blocks.
  static constexpr int64_t kMost = int64_t{1} << 30;

  std::vector<EigenEntry> entries;
  std::vector<int64_t> counts;
  std::vector<void*> vectors;  // used by eigh alone

  void add(const EigenEntry& entry, int64_t count, void* eigenvectors = nullptr) {
    if (count == 0) return;
    STD_TORCH_CHECK(count <= kMost, "too many matrices in one batch");
    entries.push_back(entry);
    counts.push_back(count);
    vectors.push_back(eigenvectors);
  }
  template <typename Run>
  void for_each_table(const Run& run) const {
    for (size_t begin = 0, end = 0; begin < entries.size(); begin = end) {
      EigenTable table{};
      for (; end < entries.size() && table.entries < EigenTable::kEntries; ++end) {
        if (table.matrices + counts[end] > kMost) break;
        table.entry[table.entries] = entries[end];
        table.entry[table.entries].first = table.matrices;
        table.matrices += counts[end];
        ++table.entries;
      }
      run(table, vectors.data() + begin);
    }
  }
};

inline EigenClass register_class(int n, size_t item_bytes) {
  if (n <= 8) return EigenClass::kWarp8;
  if (n <= 16) return EigenClass::kWarp16;
  if (n <= 32) return EigenClass::kWarp32;
  if (n <= 64) return EigenClass::kBlock64;
  if (n <= 128 && item_bytes == 4) return EigenClass::kBlock128;
  return EigenClass::kTriangle;
}

// Largest of the 32 orders that n is grouped with. Kernels that size their shared memory by the
// largest order of a table get tables of one such group, so that small matrices do not reserve the
// memory of large ones.
inline int order_band(int n) { return (n + 31) / 32 * 32; }

// Matrices of one call, sorted into classes of size as they are added, and launched by run().
template <typename Real>
class Call {
 public:
  explicit Call(const Tensor& first)
      : first_(first),
        device_(first.get_device_index()),
        limits_(limits_of(device_)),
        triangle_order_(largest_triangle<Real>(limits_.shared_bytes)) {}

  bool has_values(int n) const {
    if (n <= triangle_order_ || register_class(n, sizeof(Real)) != EigenClass::kTriangle) {
      return true;
    }
    return n <= kLargestMembers && plan_members<Real>(n, 1, limits_).members > 0;
  }
  bool has_vectors(int n) const { return plan_jacobi<Real>(n, 1, limits_.shared_bytes).fits; }

  // Adds matrices of an order for which has_values() is true. Their eigenvalues are wanted, or
  // counts.
  void add(const EigenEntry& entry, int64_t count) {
    const EigenClass size_class = register_class(entry.n, sizeof(Real));
    if (size_class != EigenClass::kTriangle) {
      registers_[size_class].add(entry, count);
    } else if (entry.n <= triangle_order_) {
      triangles_[order_band(entry.n)].add(entry, count);
    } else {
      members_[entry.n].add(entry, count);
    }
  }
  // Adds matrices of an order for which has_vectors() is true. Their eigenvectors are wanted too.
  void add(const EigenEntry& entry, int64_t count, void* vectors) {
    jacobi_[order_band(entry.n)].add(entry, count, vectors);
  }

  void run() {
    Fork fork(device_, registers_.size() + triangles_.size() + jacobi_.size() +
                           static_cast<size_t>(!members_.empty()));
    // Cooperative grids follow one another in one stream: if two of them waited for room on the GPU
    // at the same time, each could keep it from the other. They come first, because they need most
    // of the GPU.
    const cudaStream_t members_stream = members_.empty() ? nullptr : fork.branch();
    descending(members_, [&](int n, const EigenTable& table, void* const*) {
      const MembersPlan plan = plan_members<Real>(n, table.matrices, limits_);
      void* workspace = keep(plan.workspace_bytes, fork, members_stream);
      return launch_members<Real>(table, plan, workspace, members_stream);
    });
    cudaStream_t stream = nullptr;
    int band = 0;
    const auto branch_of = [&](int key) {
      if (!stream || key != band) stream = fork.branch();
      band = key;
      return stream;
    };
    descending(triangles_, [&](int key, const EigenTable& table, void* const*) {
      return launch_triangle<Real>(table, branch_of(key));
    });
    stream = nullptr;
    descending(jacobi_, [&](int key, const EigenTable& table, void* const* vectors) {
      const JacobiPlan plan = plan_jacobi<Real>(key, table.matrices, limits_.shared_bytes);
      const cudaStream_t branch = branch_of(key);
      void* workspace = keep(plan.workspace_bytes, fork, branch);
      return launch_jacobi<Real>(table, vectors, plan, workspace, branch);
    });
    stream = nullptr;
    descending(registers_, [&](EigenClass key, const EigenTable& table, void* const*) {
      return launch_registers<Real>(key, table, branch_of(static_cast<int>(key)));
    });
    STD_CUDA_CHECK(fork.join());
  }

 private:
  template <typename Key, typename Launch>
  static void descending(const std::map<Key, Bucket>& buckets, const Launch& launch) {
    for (auto bucket = buckets.rbegin(); bucket != buckets.rend(); ++bucket) {
      bucket->second.for_each_table([&](const EigenTable& table, void* const* vectors) {
        STD_CUDA_CHECK(launch(bucket->first, table, vectors));
      });
    }
  }

  // Takes memory from the current stream for work on a branch. It is given back when the call
  // returns, at which time the current stream waits for every branch already.
  void* keep(int64_t bytes, Fork& fork, cudaStream_t branch) {
    if (bytes == 0) return nullptr;
    workspaces_.push_back(torch::stable::new_empty(first_, {bytes}, ScalarType::Byte));
    fork.follow(branch);
    return workspaces_.back().mutable_data_ptr();
  }

  const Tensor first_;
  const int device_;
  const DeviceLimits limits_;
  const int triangle_order_;
  std::map<EigenClass, Bucket> registers_;
  std::map<int, Bucket> triangles_;
  std::map<int, Bucket> members_;
  std::map<int, Bucket> jacobi_;
  std::vector<Tensor> workspaces_;
};

}  // namespace fastcov
