// eigvalsh, eigh and count_above for the CPU: groups of matrices of one order go to the kernels of
// the machine's instruction set, on torch's threads; what LAPACK does faster goes to torch.linalg.
#include "eigen_cpu.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>
#include <new>
#include <string>
#include <tuple>
#include <vector>

#include "boxing.h"

extern "C" const char* fastcov_cpu_instruction_set();

namespace fastcov {
namespace {

// Below this much estimated work a second thread costs more than it brings.
constexpr double kSerialNanoseconds = 150e3;
// Up to this order one thread of ours is faster than LAPACK on all of them. Above, up to
// kCrewOrder, that holds where there is a matrix for every thread, or LAPACK has no more than two.
// From there on threads share a matrix here as well: on two of them ours takes 0.4 of LAPACK's time
// in float32 at order 2048, 0.6 in float64.
constexpr int kAlwaysOwnOrder = 256;
constexpr int kFewThreads = 2;

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

// Of the two dtypes' kernels in a level.
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

// Scratch memory of the calling thread, kept between calls unless it is large.
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
  // Of the two ways to read a triangle by columns, the one that finds them side by side.
  MatrixRef<T> operator[](int64_t index) const {
    const T* const matrix = data + index * batch_stride;
    if (row_stride == 1) return {matrix, row_stride, column_stride};
    return {matrix + (n - 1) * (row_stride + column_stride), -column_stride, -row_stride};
  }
};

// Whether eigenvalues of order n are found here, given how many of the call are above
// kAlwaysOwnOrder.
bool is_own(int n, int64_t large, int threads) {
  return n <= kAlwaysOwnOrder || n >= kCrewOrder || large >= threads || threads <= kFewThreads;
}

template <typename T>
int64_t count_large(const std::vector<Batch<T>>& batches) {
  int64_t large = 0;
  for (const Batch<T>& batch : batches) {
    if (batch.n > kAlwaysOwnOrder) large += batch.count;
  }
  return large;
}

// Runs tasks in groups of one order, of at most `most`, the longest first, each thread taking the
// next when it is free.
template <typename T, typename Run>
void run_groups(std::vector<EigenTask<T>>& tasks, int64_t most, const Run& run) {
  if (tasks.empty()) return;
  const auto is_larger = [](const EigenTask<T>& a, const EigenTask<T>& b) { return a.n > b.n; };
  if (!std::is_sorted(tasks.begin(), tasks.end(), is_larger)) {
    std::stable_sort(tasks.begin(), tasks.end(), is_larger);
  }
  const int64_t threads = thread_count();
  const int64_t total = static_cast<int64_t>(tasks.size());
  double work = 0;  // nanoseconds, measured on an EPYC with AVX2
  std::vector<int64_t> starts;
  for (int64_t begin = 0; begin < total;) {
    int64_t end = begin;
    while (end < total && tasks[end].n == tasks[begin].n) ++end;
    const double order = tasks[begin].n;
    work += static_cast<double>(end - begin) * (100 + order * order * (4.5 + 0.02 * order));
    // Groups as wide as the kernels take, in full vectors, and a multiple of the threads.
    const int64_t count = end - begin;
    const int64_t rounds = divide_up(count, threads * most);
    int64_t width = divide_up(count, threads * rounds);
    const int64_t lanes = kernels<T>().lanes;
    if (width > lanes) width = divide_up(width, lanes) * lanes;
    for (; begin < end; begin += width) starts.push_back(begin);
    begin = end;
  }
  const int64_t groups = static_cast<int64_t>(starts.size());
  starts.push_back(total);
  const int64_t bytes = kernels<T>().scratch_bytes(tasks.front().n);
  std::atomic<int64_t> next{0};
  const auto drain = [&] {
    void* const memory = arena.reserve(bytes);
    for (int64_t group = next++; group < groups; group = next++) {
      run(&tasks[starts[group]], static_cast<int>(starts[group + 1] - starts[group]), memory);
    }
    if (arena.bytes > kKeptBytes) arena.release();
  };
  if (threads == 1 || groups == 1 || work < kSerialNanoseconds) {
    drain();
    return;
  }
  torch::stable::parallel_for(0, std::min(threads, groups), 1, [&](int64_t, int64_t) { drain(); });
}

// Eigenvalues of the large matrices that would leave threads idle, one after the other by all
// threads; those tasks are taken out.
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

template <size_t Results>
std::array<Tensor, Results> call_linalg(const char* name, const Tensor& matrices) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(matrices),
                                    torch::stable::detail::from(std::string("L"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  std::array<Tensor, Results> results;
  for (size_t r = 0; r < Results; ++r) results[r] = torch::stable::detail::to<Tensor>(stack[r]);
  return results;
}

// One entry of a call by LAPACK: eigenvalues and, with two results, eigenvectors. It refuses what
// is not finite, so such matrices go around it.
template <size_t Results, typename T>
std::array<Tensor, Results> run_lapack(const Tensor& matrices, const Batch<T>& batch) {
  const char* const name = Results == 2 ? "aten::linalg_eigh" : "aten::linalg_eigvalsh";
  std::vector<int64_t> broken;
  for (int64_t index = 0; index < batch.count; ++index) {
    EigenTask<T> task{};
    task.matrix = batch[index];
    task.n = batch.n;
    if (!kernels<T>().is_finite(task)) broken.push_back(index);
  }
  if (broken.empty()) return call_linalg<Results>(name, matrices);
  const int64_t n = batch.n;
  Tensor copy = torch::stable::new_zeros(matrices, {batch.count, n, n});
  T* const data = static_cast<T*>(copy.mutable_data_ptr());
  for (int64_t index = 0; index < batch.count; ++index) {
    if (std::binary_search(broken.begin(), broken.end(), index)) continue;
    const MatrixRef<T> source = batch.plain(index);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        data[(index * n + i) * n + j] = source.data[i * source.step_i + j * source.step_j];
      }
    }
  }
  std::array<Tensor, Results> results = call_linalg<Results>(name, copy);
  int64_t size = n;
  for (size_t r = 0; r < Results; ++r, size *= n) {
    results[r] = torch::stable::contiguous(results[r]);
    T* const out = static_cast<T*>(results[r].mutable_data_ptr());
    for (const int64_t index : broken) {
      std::fill_n(out + index * size, size, std::numeric_limits<T>::quiet_NaN());
    }
    results[r] = torch::stable::reshape(results[r],
                                        r == 0 ? shape_without_last(matrices) : shape_of(matrices));
  }
  return results;
}

template <typename T>
void eigvalsh_of(const std::vector<Tensor>& matrices, const std::vector<size_t>& entries,
                 std::vector<Tensor>& results) {
  std::vector<Batch<T>> batches;
  for (const size_t entry : entries) batches.emplace_back(matrices[entry]);
  const int64_t large = count_large(batches);
  const int threads = thread_count();
  std::vector<EigenTask<T>> tasks;
  for (size_t index = 0; index < entries.size(); ++index) {
    const Tensor& matrix = matrices[entries[index]];
    const Batch<T>& batch = batches[index];
    Tensor& result = results[entries[index]];
    if (!is_own(batch.n, large, threads)) {
      result = run_lapack<1>(matrix, batch)[0];
      continue;
    }
    result = torch::stable::new_empty(matrix, shape_without_last(matrix));
    T* const values = static_cast<T*>(result.mutable_data_ptr());
    for (int64_t b = 0; b < batch.count; ++b) {
      tasks.push_back({batch[b], batch.n, values + b * batch.n, nullptr, 0, 0, nullptr, nullptr});
    }
  }
  run_large<T>(tasks);
  run_groups<T>(tasks, kernels<T>().group, kernels<T>().eigenvalues);
}

// Every order is counted here: LAPACK's eigenvalues in float32 are off by more than the interval
// allows for on some matrices of order 700 and more (Wilkinson's: 1.5e-5 to 4.2e-5).
template <typename T>
void count_above_of(const std::vector<Tensor>& matrices, const std::vector<Tensor>& thresholds,
                    const std::vector<size_t>& entries, std::vector<Tensor>& results) {
  std::vector<EigenTask<T>> tasks;
  for (const size_t entry : entries) {
    const Tensor& matrix = matrices[entry];
    const Tensor& tau = thresholds[entry];
    const Batch<T> batch(matrix);
    const int64_t dims = tau.dim();
    STD_TORCH_CHECK(dims == matrix.dim() - 1 && (dims == 1 || tau.size(0) == batch.count) &&
                        tau.scalar_type() == matrix.scalar_type(),
                    "thresholds must be [T] or [B, T], in the matrices' dtype");
    const int64_t per_matrix = tau.size(dims - 1);
    std::vector<int64_t> shape = shape_of(tau);
    shape.push_back(2);
    Tensor& result = results[entry];
    result = torch::stable::new_empty(matrix, shape, ScalarType::Long);
    int64_t* const counts = static_cast<int64_t*>(result.mutable_data_ptr());
    const T* const taus = static_cast<const T*>(tau.const_data_ptr());
    const int64_t tau_stride = dims == 2 ? tau.stride(0) : 0;
    for (int64_t b = 0; b < batch.count; ++b) {
      tasks.push_back({batch[b], batch.n, nullptr, taus + b * tau_stride, tau.stride(dims - 1),
                       static_cast<int>(per_matrix), counts + b * per_matrix * 2, nullptr});
    }
  }
  run_groups<T>(tasks, kernels<T>().group, kernels<T>().counts);
}

template <typename T>
void eigh_of(const std::vector<Tensor>& matrices, const std::vector<size_t>& entries,
             std::vector<Tensor>& all_values, std::vector<Tensor>& all_vectors) {
  std::vector<EigenTask<T>> tasks;
  for (const size_t entry : entries) {
    const Tensor& matrix = matrices[entry];
    const Batch<T> batch(matrix);
    // A vector of lanes at least, or half of one where ours is fast: one matrix alone is LAPACK's.
    const int lanes = kernels<T>().lanes;
    if (batch.n > vectors_order(lanes) || batch.count * (batch.n <= 16 ? 2 : 1) < lanes) {
      const std::array<Tensor, 2> results = run_lapack<2>(matrix, batch);
      all_values[entry] = results[0];
      all_vectors[entry] = torch::stable::contiguous(results[1]);
      continue;
    }
    all_values[entry] = torch::stable::new_empty(matrix, shape_without_last(matrix));
    all_vectors[entry] = torch::stable::new_empty(matrix, matrix.sizes());
    T* const values = static_cast<T*>(all_values[entry].mutable_data_ptr());
    T* const vectors = static_cast<T*>(all_vectors[entry].mutable_data_ptr());
    for (int64_t b = 0; b < batch.count; ++b) {
      tasks.push_back({batch.plain(b), batch.n, values + b * batch.n, nullptr, 0, 0, nullptr,
                       vectors + b * batch.n * batch.n});
    }
  }
  run_groups<T>(tasks, kernels<T>().lanes, kernels<T>().eigenvectors);
}

// Entries of a call by dtype: one call may mix them, a group may not.
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

std::vector<Tensor> eigvalsh(std::vector<Tensor> matrices) {
  std::vector<Tensor> results(matrices.size());
  const Split split(matrices);
  if (!split.singles.empty()) eigvalsh_of<float>(matrices, split.singles, results);
  if (!split.doubles.empty()) eigvalsh_of<double>(matrices, split.doubles, results);
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

std::vector<Tensor> count_above(std::vector<Tensor> matrices, std::vector<Tensor> thresholds) {
  STD_TORCH_CHECK(matrices.size() == thresholds.size(), "one set of thresholds for each entry");
  std::vector<Tensor> results(matrices.size());
  const Split split(matrices);
  if (!split.singles.empty()) count_above_of<float>(matrices, thresholds, split.singles, results);
  if (!split.doubles.empty()) count_above_of<double>(matrices, thresholds, split.doubles, results);
  return results;
}

}  // namespace
}  // namespace fastcov

STABLE_TORCH_LIBRARY_IMPL(fastcov, CPU, m) {
  m.impl("eigvalsh", TORCH_BOX(&fastcov::eigvalsh));
  m.impl("eigh", TORCH_BOX(&fastcov::eigh));
  m.impl("count_above", TORCH_BOX(&fastcov::count_above));
}
