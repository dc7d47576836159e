// Operators eigvalsh, eigh and count_above on a CPU. Matrices of one order are solved in groups, by
// the kernels of the machine's instruction set, on torch's threads. Every order is served here, but
// fastcov/ops/eigen.py sends to LAPACK what LAPACK does faster: eigh of few matrices or of large
// ones.
#include "eigen_cpu.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <tuple>
#include <vector>

#include "boxing.h"

extern "C" const char* fastcov_cpu_instruction_set();

namespace fastcov {
namespace {

// Below this estimated time of a call a second thread costs more than it saves.
constexpr double kSerialNanoseconds = 150e3;

struct Level {
  const EigenLevel& batched;
  const LargeEigenLevel& large;
};

const Level& level() {
  static const Level chosen = [] {
#ifdef FASTCOV_X86
    const char* const name = fastcov_cpu_instruction_set();
    const bool is_avx512 = std::strcmp(name, "avx512") == 0 || std::strcmp(name, "amx") == 0;
    if (is_avx512) return Level{eigen_avx512, large_eigen_avx512};
    if (std::strcmp(name, "avx2") == 0) return Level{eigen_avx2, large_eigen_avx2};
#endif
    return Level{eigen_baseline, large_eigen_baseline};
  }();
  return chosen;
}

// Picks the kernels of a dtype.
template <typename T, typename Kernels>
const auto& of_dtype(const Kernels& kernels) {
  if constexpr (sizeof(T) == 4) {
    return kernels.float32;
  } else {
    return kernels.float64;
  }
}
template <typename T>
const EigenKernels<T>& kernels() {
  return of_dtype<T>(level().batched);
}

// Scratch memory of the calling thread. It is kept between calls unless it is larger than this.
constexpr int64_t kKeptBytes = int64_t{64} << 20;
struct Arena {
  std::unique_ptr<char, decltype(&std::free)> memory{nullptr, &std::free};
  int64_t bytes = 0;

  void* reserve(int64_t wanted) {
    if (bytes < wanted) {
      const int64_t rounded = (wanted + 4095) / 4096 * 4096;
      release();
      memory.reset(static_cast<char*>(std::aligned_alloc(64, rounded)));
      if (!memory) throw std::bad_alloc();
      bytes = rounded;
    }
    return memory.get();
  }
  void release() {
    memory.reset();
    bytes = 0;
  }
};
thread_local Arena arena;

int thread_count() {
  uint32_t threads = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&threads));
  return static_cast<int>(threads);
}

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

std::vector<int64_t> shape_of(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end()};
}
std::vector<int64_t> shape_without_last(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end() - 1};
}

// Makes a contiguous tensor without torch's dispatcher, which takes as long as a small matrix does.
Tensor empty(const std::vector<int64_t>& shape, ScalarType dtype) {
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) {
    strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  }
  AtenTensorHandle result;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(
      static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
      torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype)),
      aoti_torch_device_type_cpu(), 0, &result));
  return Tensor(result);
}

// One entry of a call: a matrix [n, n] or a batch [B, n, n] of any strides.
template <typename T>
struct Batch {
  const T* data;
  int64_t count;
  int n;
  int64_t batch_stride;
  int64_t row_stride;
  int64_t column_stride;

  explicit Batch(const Tensor& matrices) {
    const int64_t dims = matrices.dim();
    STD_TORCH_CHECK(dims == 2 || dims == 3, "matrices must be [n, n] or [B, n, n]");
    STD_TORCH_CHECK(matrices.size(dims - 1) == matrices.size(dims - 2) &&
                        matrices.size(dims - 1) > 0 && matrices.size(dims - 1) < (1 << 24),
                    "matrices must be square and not empty");
    data = static_cast<const T*>(matrices.const_data_ptr());
    n = static_cast<int>(matrices.size(dims - 1));
    count = dims == 3 ? matrices.size(0) : 1;
    batch_stride = dims == 3 ? matrices.stride(0) : 0;
    row_stride = matrices.stride(dims - 2);
    column_stride = matrices.stride(dims - 1);
  }
  MatrixRef<T> plain(int64_t index) const {
    return {data + index * batch_stride, row_stride, column_stride};
  }
  // A triangle can be read by columns from either end; this picks the way that finds the entries of
  // a column side by side in memory.
  MatrixRef<T> operator[](int64_t index) const {
    const T* const matrix = data + index * batch_stride;
    if (row_stride == 1) return {matrix, row_stride, column_stride};
    return {matrix + (n - 1) * (row_stride + column_stride), -column_stride, -row_stride};
  }
};

// Divides `count` matrices of one order into groups of at most `most`, so that all threads take the
// same time. First come rounds in which every thread has a group of `most`, then groups of full
// vectors. The rest is one group, or is solved one by one where every thread then takes less time
// than a vector would.
template <typename T>
std::vector<int64_t> group_sizes(int64_t fewest, int64_t count, int64_t most, int64_t threads) {
  const int64_t lanes = kernels<T>().lanes;
  const bool has_lanes = most >= lanes && fewest <= lanes;
  std::vector<int64_t> sizes(count / (most * threads) * threads, most);
  count %= most * threads;
  if (!has_lanes) {
    for (int64_t left = threads; count > 0; --left) {
      sizes.push_back(divide_up(count, left));
      count -= sizes.back();
    }
    return sizes;
  }
  const int64_t width = divide_up(count / lanes, threads) * lanes;
  for (; count >= lanes; count -= sizes.back()) {
    sizes.push_back(std::min(width, count / lanes * lanes));
  }
  const int64_t share = divide_up(count, threads);
  const int64_t last = share < fewest ? share : count;
  for (; count > 0; count -= sizes.back()) sizes.push_back(std::min(last, count));
  return sizes;
}

// Runs tasks in groups of one order and of at most `most` matrices, the longest first. A thread
// takes the next group when it is free. bytes_of gives the scratch memory of a group by its order,
// fewest_of the fewest matrices for which one vector takes less time than one by one.
template <typename T, typename Run>
void run_groups(std::vector<EigenTask<T>>& tasks, int64_t most, int64_t (*bytes_of)(int),
                int (*fewest_of)(int), const Run& run) {
  if (tasks.empty()) return;
  const auto is_larger = [](const EigenTask<T>& a, const EigenTask<T>& b) { return a.n > b.n; };
  if (!std::is_sorted(tasks.begin(), tasks.end(), is_larger)) {
    std::stable_sort(tasks.begin(), tasks.end(), is_larger);
  }
  const int64_t total = static_cast<int64_t>(tasks.size());
  double work = 0;  // in nanoseconds, as measured on an EPYC with AVX2
  for (const EigenTask<T>& task : tasks) {
    const double order = task.n;
    work += 100 + order * order * (4.5 + 0.02 * order);
  }
  const int64_t threads = work < kSerialNanoseconds ? 1 : thread_count();
  std::vector<int64_t> starts;
  int64_t bytes = 0;  // of the order that needs most, which may not be the largest
  for (int64_t begin = 0; begin < total;) {
    int64_t end = begin;
    while (end < total && tasks[end].n == tasks[begin].n) ++end;
    bytes = std::max(bytes, bytes_of(tasks[begin].n));
    for (const int64_t size :
         group_sizes<T>(fewest_of(tasks[begin].n), end - begin, most, threads)) {
      starts.push_back(begin);
      begin += size;
    }
  }
  const int64_t groups = static_cast<int64_t>(starts.size());
  starts.push_back(total);
  std::atomic<int64_t> next{0};
  const auto drain = [&] {
    void* const memory = arena.reserve(bytes);
    for (int64_t group = next++; group < groups; group = next++) {
      run(&tasks[starts[group]], static_cast<int>(starts[group + 1] - starts[group]), memory);
    }
    if (arena.bytes > kKeptBytes) arena.release();
  };
  if (threads == 1 || groups == 1) {
    drain();
    return;
  }
  torch::stable::parallel_for(0, std::min(threads, groups), 1, [&](int64_t, int64_t) { drain(); });
}

// Large matrices that do not come out even among the threads are solved one after the other, each
// by all threads, and taken out of the tasks.
template <typename T>
void run_large(std::vector<EigenTask<T>>& tasks) {
  const auto is_large = [](const EigenTask<T>& task) { return task.n >= kCrewOrder; };
  const int threads = thread_count();
  auto left = std::count_if(tasks.begin(), tasks.end(), is_large) % threads;
  const LargeEigenKernels<T>& large = of_dtype<T>(level().large);
  const Crew crew{threads, [](int ranks, void (*body)(void*, int, int), void* argument) {
                    torch::stable::parallel_for(0, ranks, 1, [&](int64_t begin, int64_t end) {
                      body(argument, static_cast<int>(begin), static_cast<int>(end));
                    });
                  }};
  std::erase_if(tasks, [&](const EigenTask<T>& task) {
    if (!is_large(task) || left == 0) return false;
    --left;
    large.eigenvalues(task, crew, arena.reserve(large.scratch_bytes(task.n, threads)));
    return true;
  });
  if (arena.bytes > kKeptBytes) arena.release();
}

// With is_alone every matrix is solved in a group of its own, so that its bits depend on nothing
// else.
template <typename T>
void eigvalsh_of(const std::vector<Tensor>& matrices, const std::vector<size_t>& entries,
                 bool is_alone, std::vector<Tensor>& results) {
  std::vector<EigenTask<T>> tasks;
  for (const size_t entry : entries) {
    const Tensor& matrix = matrices[entry];
    const Batch<T> batch(matrix);
    Tensor& result = results[entry];
    result = empty(shape_without_last(matrix), matrix.scalar_type());
    T* const values = static_cast<T*>(result.mutable_data_ptr());
    tasks.reserve(tasks.size() + batch.count);
    for (int64_t b = 0; b < batch.count; ++b) {
      tasks.push_back({batch[b], batch.n, values + b * batch.n, nullptr, 0, 0, nullptr, nullptr});
    }
  }
  run_large<T>(tasks);
  run_groups<T>(tasks, is_alone ? 1 : kernels<T>().group, kernels<T>().scratch_bytes,
                kernels<T>().fewest_lanes, kernels<T>().eigenvalues);
}

std::vector<Tensor> count_above(std::vector<Tensor> matrices, std::vector<Tensor> thresholds) {
  STD_TORCH_CHECK(matrices.size() == thresholds.size(), "one set of thresholds for each entry");
  std::vector<Tensor> results(matrices.size());
  std::vector<EigenTask<double>> tasks;
  for (size_t entry = 0; entry < matrices.size(); ++entry) {
    const Tensor& matrix = matrices[entry];
    const Tensor& tau = thresholds[entry];
    STD_TORCH_CHECK(matrix.scalar_type() == ScalarType::Double, "matrices must be float64");
    const Batch<double> batch(matrix);
    const int64_t dims = tau.dim();
    STD_TORCH_CHECK(dims == matrix.dim() - 1 && (dims == 1 || tau.size(0) == batch.count) &&
                        tau.scalar_type() == ScalarType::Double,
                    "thresholds must be [T] or [B, T], in float64");
    const int64_t per_matrix = tau.size(dims - 1);
    std::vector<int64_t> shape = shape_of(tau);
    shape.push_back(2);
    Tensor& result = results[entry];
    result = empty(shape, ScalarType::Long);
    int64_t* const counts = static_cast<int64_t*>(result.mutable_data_ptr());
    const double* const taus = static_cast<const double*>(tau.const_data_ptr());
    const int64_t tau_stride = dims == 2 ? tau.stride(0) : 0;
    for (int64_t b = 0; b < batch.count; ++b) {
      tasks.push_back({batch[b], batch.n, nullptr, taus + b * tau_stride, tau.stride(dims - 1),
                       static_cast<int>(per_matrix), counts + b * per_matrix * 2, nullptr});
    }
  }
  run_groups<double>(tasks, kernels<double>().group, kernels<double>().scratch_bytes,
                     kernels<double>().fewest_lanes, level().batched.counts);
  return results;
}

template <typename T>
void eigh_of(const std::vector<Tensor>& matrices, const std::vector<size_t>& entries,
             std::vector<Tensor>& all_values, std::vector<Tensor>& all_vectors) {
  std::vector<EigenTask<T>> tasks;
  for (const size_t entry : entries) {
    const Tensor& matrix = matrices[entry];
    const Batch<T> batch(matrix);
    all_values[entry] = empty(shape_without_last(matrix), matrix.scalar_type());
    all_vectors[entry] = empty(shape_of(matrix), matrix.scalar_type());
    T* const values = static_cast<T*>(all_values[entry].mutable_data_ptr());
    T* const vectors = static_cast<T*>(all_vectors[entry].mutable_data_ptr());
    if (batch.n == 1) {  // nothing to solve, and no group is as fast
      for (int64_t b = 0; b < batch.count; ++b) {
        const T zero = *batch.plain(b).data * T(0);  // NaN where the entry is not finite
        values[b] = *batch.plain(b).data + zero;
        vectors[b] = zero + T(1);
      }
      continue;
    }
    tasks.reserve(tasks.size() + batch.count);
    for (int64_t b = 0; b < batch.count; ++b) {
      tasks.push_back({batch.plain(b), batch.n, values + b * batch.n, nullptr, 0, 0, nullptr,
                       vectors + b * batch.n * batch.n});
    }
  }
  run_groups<T>(tasks, kernels<T>().lanes, kernels<T>().vector_bytes, kernels<T>().fewest_rotated,
                kernels<T>().eigenvectors);
}

// Indices of a call's entries by dtype: a call may mix dtypes, a group may not.
struct Split {
  std::vector<size_t> singles;
  std::vector<size_t> doubles;

  explicit Split(const std::vector<Tensor>& matrices) {
    for (size_t index = 0; index < matrices.size(); ++index) {
      const ScalarType dtype = matrices[index].scalar_type();
      STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                      "matrices must be float32 or float64");
      (dtype == ScalarType::Float ? singles : doubles).push_back(index);
    }
  }
};

std::vector<Tensor> eigvalsh(std::vector<Tensor> matrices, bool is_alone) {
  std::vector<Tensor> results(matrices.size());
  const Split split(matrices);
  if (!split.singles.empty()) eigvalsh_of<float>(matrices, split.singles, is_alone, results);
  if (!split.doubles.empty()) eigvalsh_of<double>(matrices, split.doubles, is_alone, results);
  return results;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> eigh(std::vector<Tensor> matrices) {
  std::vector<Tensor> values(matrices.size());
  std::vector<Tensor> vectors(matrices.size());
  const Split split(matrices);
  if (!split.singles.empty()) eigh_of<float>(matrices, split.singles, values, vectors);
  if (!split.doubles.empty()) eigh_of<double>(matrices, split.doubles, values, vectors);
  return {values, vectors};
}

}  // namespace
}  // namespace fastcov

STABLE_TORCH_LIBRARY_IMPL(fastcov, CPU, m) {
  m.impl("eigvalsh", TORCH_BOX(&fastcov::eigvalsh));
  m.impl("eigh", TORCH_BOX(&fastcov::eigh));
  m.impl("count_above", TORCH_BOX(&fastcov::count_above));
}
