// The matrices of one call on a GPU, sorted into size classes that run at the same time.
#pragma once

#include <algorithm>
#include <map>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "boxing.h"
#include "eigen_cuda.h"

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

inline cudaStream_t current_stream(int device) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  return static_cast<cudaStream_t>(stream);
}

// Work that runs beside the current stream, on streams of torch's pool: starts after what the
// current stream holds, and what comes next there waits for it.
class Fork {
 public:
  Fork(int device, size_t branches) : device_(device), current_(current_stream(device)) {
    is_forked_ = branches > 1;
    if (!is_forked_) return;
    STD_CUDA_CHECK(cudaEventCreateWithFlags(&event_, cudaEventDisableTiming));
    STD_CUDA_CHECK(cudaEventRecord(event_, current_));
  }
  Fork(const Fork&) = delete;
  Fork& operator=(const Fork&) = delete;
  ~Fork() {
    if (event_) cudaEventDestroy(event_);
  }

  cudaStream_t branch() {
    if (!is_forked_) return current_;
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(torch_get_cuda_stream_from_pool(false, device_, &stream));
    streams_.push_back(static_cast<cudaStream_t>(stream));
    STD_CUDA_CHECK(cudaStreamWaitEvent(streams_.back(), event_, 0));
    return streams_.back();
  }
  void join() {
    for (const cudaStream_t stream : streams_) {
      STD_CUDA_CHECK(cudaEventRecord(event_, stream));
      STD_CUDA_CHECK(cudaStreamWaitEvent(current_, event_, 0));
    }
    streams_.clear();
  }

 private:
  int device_;
  cudaStream_t current_;
  cudaEvent_t event_ = nullptr;
  bool is_forked_;
  std::vector<cudaStream_t> streams_;
};

// Entries of a call that go to one kernel, a table at a time.
struct Bucket {
  std::vector<EigenEntry> entries;
  std::vector<int64_t> counts;
  std::vector<void*> vectors;  // eigh only

  void add(const EigenEntry& entry, int64_t count, void* eigenvectors = nullptr) {
    // One grid holds at most 2^31 blocks; far fewer than that are already a long wait.
    constexpr int64_t kMost = int64_t{1} << 30;
    if (count == 0) return;
    STD_TORCH_CHECK(count <= kMost, "too many matrices in one batch");
    entries.push_back(entry);
    counts.push_back(count);
    vectors.push_back(eigenvectors);
  }
  template <typename Run>
  void for_each_table(const Run& run) const {
    for (size_t begin = 0; begin < entries.size(); begin += EigenTable::kEntries) {
      EigenTable table{};
      const size_t end = std::min(entries.size(), begin + EigenTable::kEntries);
      for (size_t e = begin; e < end; ++e) {
        table.entry[table.entries] = entries[e];
        table.entry[table.entries].first = table.matrices;
        table.matrices += counts[e];
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

// Kernels that size their shared memory by the largest order of a table get tables of similar
// orders.
inline int order_band(int n) { return (n + 31) / 32 * 32; }

// The matrices of one call, by size class.
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

  // Eigenvalues, or counts, of an order that has_values.
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
  // Eigenvectors too, of an order that has_vectors.
  void add(const EigenEntry& entry, int64_t count, void* vectors) {
    jacobi_[order_band(entry.n)].add(entry, count, vectors);
  }

  void run() {
    Fork fork(device_, registers_.size() + triangles_.size() + jacobi_.size() +
                           static_cast<size_t>(!members_.empty()));
    // Cooperative grids follow one another in one stream: two that wait for room at the same time
    // could keep it from each other. They come first, because they need most of the GPU.
    const cudaStream_t members_stream = members_.empty() ? nullptr : fork.branch();
    descending(members_, [&](int n, const EigenTable& table, void* const*) {
      const MembersPlan plan = plan_members<Real>(n, table.matrices, limits_);
      return launch_members<Real>(table, plan, keep(plan.workspace_bytes), members_stream);
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
      return launch_jacobi<Real>(table, vectors, plan, keep(plan.workspace_bytes), branch_of(key));
    });
    stream = nullptr;
    descending(registers_, [&](EigenClass key, const EigenTable& table, void* const*) {
      return launch_registers<Real>(key, table, branch_of(static_cast<int>(key)));
    });
    fork.join();
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

  // Memory of the current stream: given back when the call returns, when that stream already waits
  // for every branch.
  void* keep(int64_t bytes) {
    if (bytes == 0) return nullptr;
    workspaces_.push_back(torch::stable::new_empty(first_, {bytes}, ScalarType::Byte));
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
