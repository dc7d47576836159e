// Runs the kernels of csrc/eigen_*.cu on the host:
//   emulated_eigen KERNEL DTYPE N COUNT SHARED MULTIPROCESSORS CLUSTERS < input > results
//   input:   COUNT matrices [N, N], float64, row-major; only the lower triangles count
//   results: eigenvalues [COUNT, N]; for jacobi then eigenvectors [COUNT, N, N]; for counts bounds
//            [COUNT, 3, 2] at the thresholds -0.5, 0, 0.5; all float64
// KERNEL is registers, triangle, members, jacobi, library, counts (as the size has it) or plan; the
// emulated GPU has MULTIPROCESSORS, SHARED bytes that a block may ask for, and CLUSTERS (0 or 1).
#include <cuda_runtime.h>

#include <cstdio>
#include <cstdlib>
#include <string>
#include <utility>
#include <vector>

#include "eigen_cuda.h"

namespace fastcov {
namespace {

template <class T>
void write(const std::vector<T>& values) {
  for (const T value : values) {
    const double wide = static_cast<double>(value);
    std::fwrite(&wide, sizeof(wide), 1, stdout);
  }
}

EigenClass class_of(int n) {
  if (n <= 8) return EigenClass::kWarp8;
  if (n <= 16) return EigenClass::kWarp16;
  if (n <= 32) return EigenClass::kWarp32;
  return n <= 64 ? EigenClass::kBlock64 : EigenClass::kBlock128;
}

DeviceLimits limits() {
  const emulated::Device& device = emulated::device;
  return {device.multiprocessors, device.shared_bytes, device.has_clusters};
}

template <class Real>
int write_plan(int n, int count, int shared_bytes) {
  const MembersPlan plan = plan_members<Real>(n, count, limits());
  const JacobiPlan jacobi = plan_jacobi<Real>(n, count, shared_bytes);
  write(std::vector<int>{largest_triangle<Real>(shared_bytes), plan.members, plan.groups,
                         plan.near_rows, plan.far_rows, plan.shared_bytes, plan.is_cluster,
                         jacobi.fits, jacobi.has_near_vectors});
  return 0;
}

template <class Real>
int run(const std::string& kernel, int n, int count, int shared_bytes) {
  if (kernel == "plan") return write_plan<Real>(n, count, shared_bytes);
  const size_t elements = static_cast<size_t>(n) * n;
  std::vector<double> input(elements * count);
  if (std::fread(input.data(), sizeof(double), input.size(), stdin) != input.size()) return 2;
  std::vector<Real> matrices(input.begin(), input.end());
  std::vector<Real> values(static_cast<size_t>(n) * count);
  std::vector<Real> vectors(elements * count);
  const std::vector<double> thresholds{-0.5, 0, 0.5};  // counts are of float64 alone
  std::vector<int64_t> counts(6 * static_cast<size_t>(count));

  // Two entries, so that a matrix has to be found in the table.
  EigenTable table{};
  const int first = count / 2;
  for (const auto& [begin, size] : {std::pair{0, first}, std::pair{first, count - first}}) {
    if (size == 0) continue;
    EigenEntry& entry = table.entry[table.entries++];
    entry.matrices = matrices.data() + begin * elements;
    entry.batch_stride = static_cast<int64_t>(elements);
    entry.row_stride = n;
    entry.column_stride = 1;
    entry.values = values.data() + static_cast<size_t>(begin) * n;
    entry.first = begin;
    entry.n = n;
    if (kernel == "counts") {
      entry.thresholds = thresholds.data();
      entry.threshold_stride = 1;
      entry.threshold_count = 3;
      entry.counts = counts.data() + 6 * begin;
    }
    table.matrices += size;
  }

  cudaError_t error = cudaSuccess;
  const int most_in_registers = sizeof(Real) == 4 ? 128 : 64;
  if (kernel == "registers" || (kernel == "counts" && n <= most_in_registers)) {
    error = launch_registers<Real>(class_of(n), table, nullptr);
  } else if (kernel == "triangle" ||
             (kernel == "counts" && n <= largest_triangle<Real>(shared_bytes))) {
    if (n > largest_triangle<Real>(shared_bytes)) return 3;
    error = launch_triangle<Real>(table, nullptr);
  } else if (kernel == "members" || kernel == "counts") {
    const MembersPlan plan = plan_members<Real>(n, count, limits());
    if (plan.members == 0) return 3;
    std::fprintf(stderr, "members %d groups %d near %d far %d cluster %d\n", plan.members,
                 plan.groups, plan.near_rows, plan.far_rows, plan.is_cluster);
    std::vector<unsigned char> workspace(static_cast<size_t>(plan.workspace_bytes), 0xff);
    error = launch_members<Real>(table, plan, workspace.data(), nullptr);
  } else if (kernel == "jacobi") {
    const JacobiPlan plan = plan_jacobi<Real>(n, count, shared_bytes);
    if (!plan.fits) return 3;
    std::fprintf(stderr, "near_vectors %d\n", plan.has_near_vectors);
    std::vector<unsigned char> workspace(static_cast<size_t>(plan.workspace_bytes) + 1);
    void* const outputs[2] = {vectors.data(), vectors.data() + first * elements};
    error =
        launch_jacobi<Real>(table, outputs + (first == 0 ? 1 : 0), plan, workspace.data(), nullptr);
  } else if (kernel == "library") {
    // The copy stands for eigenvectors; its diagonals, for the eigenvalues of diagonal matrices.
    table.entries = 1;
    table.matrices = count;
    table.entry[0].matrices = matrices.data();
    table.entry[0].first = 0;
    std::vector<unsigned long long> largest(static_cast<size_t>(count), ~0ull);
    error = prepare_library<Real>(table, largest.data(), vectors.data(), nullptr);
    for (int b = 0; b < count; ++b) {
      for (int k = 0; k < n; ++k) {
        values[static_cast<size_t>(b) * n + k] =
            vectors[b * elements + static_cast<size_t>(k) * n + k];
      }
    }
    if (error == cudaSuccess) {
      error = restore_library<Real>(table, largest.data(), values.data(), vectors.data(), nullptr);
    }
  } else {
    return 2;
  }
  if (error != cudaSuccess) {
    std::fprintf(stderr, "error %d\n", error);
    return 4;
  }
  write(values);
  if (kernel == "jacobi" || kernel == "library") write(vectors);
  if (kernel == "counts") write(counts);
  return 0;
}

}  // namespace
}  // namespace fastcov

int main(int count, char** arguments) {
  if (count != 8) return 2;
  const int n = std::atoi(arguments[3]);
  const int matrices = std::atoi(arguments[4]);
  const int shared_bytes = std::atoi(arguments[5]);
  emulated::device = {std::atoi(arguments[6]), shared_bytes, std::atoi(arguments[7]) != 0};
  const std::string kernel = arguments[1];
  const bool is_single = std::string(arguments[2]) == "float32";
  return is_single ? fastcov::run<float>(kernel, n, matrices, shared_bytes)
                   : fastcov::run<double>(kernel, n, matrices, shared_bytes);
}
