// Operators eigvalsh, eigh and count_above on a GPU. Orders up to 2048 (eigh: 128) are solved by
// kernels of this library, without host synchronisation and without any call that a graph capture
// forbids. Larger orders go to torch.linalg.
#include <algorithm>
#include <array>
#include <string>
#include <tuple>
#include <vector>

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>

#include "boxing.h"
#include "eigen_call.h"

namespace fastcov {
namespace {

std::vector<int64_t> shape_without_last(const Tensor& tensor) {
  return {tensor.sizes().begin(), tensor.sizes().end() - 1};
}

int64_t batch_count(const Tensor& matrices) { return matrices.dim() == 3 ? matrices.size(0) : 1; }

EigenEntry entry_of(const Tensor& matrices) {
  const int64_t dims = matrices.dim();
  STD_TORCH_CHECK(dims == 2 || dims == 3, "matrices must be [n, n] or [B, n, n]");
  STD_TORCH_CHECK(matrices.size(dims - 1) == matrices.size(dims - 2) &&
                      matrices.size(dims - 1) > 0 && matrices.size(dims - 1) < (1 << 20),
                  "matrices must be square and not empty");
  STD_TORCH_CHECK(matrices.is_cuda(), "matrices must be on the GPU");
  EigenEntry entry{};
  entry.matrices = matrices.const_data_ptr();
  entry.batch_stride = dims == 3 ? matrices.stride(0) : 0;
  entry.row_stride = matrices.stride(dims - 2);
  entry.column_stride = matrices.stride(dims - 1);
  entry.n = static_cast<int>(matrices.size(dims - 1));
  return entry;
}

template <size_t Results>
std::array<StableIValue, Results> call_linalg(const char* name, const Tensor& matrices) {
  std::array<StableIValue, 2> stack{torch::stable::detail::from(matrices),
                                    torch::stable::detail::from(std::string("L"))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, "", stack.data(), TORCH_ABI_VERSION));
  std::array<StableIValue, Results> results;
  std::copy_n(stack.begin(), Results, results.begin());
  return results;
}

// Solves one entry by torch.linalg. Returns its eigenvalues [B, n] and, where wanted, eigenvectors.
template <typename Real>
std::array<Tensor, 2> run_library(const Tensor& matrices, EigenEntry entry, bool wants_vectors) {
  const int64_t count = batch_count(matrices);
  STD_TORCH_CHECK(count <= 65535, "too many large matrices in one batch");
  const int64_t n = entry.n;
  EigenTable table{};
  table.entries = 1;
  table.matrices = count;
  table.entry[0] = entry;
  const cudaStream_t stream = current_stream(matrices.get_device_index());
  const Tensor largest = torch::stable::new_empty(matrices, {count}, ScalarType::Long);
  auto* const bits = static_cast<unsigned long long*>(largest.mutable_data_ptr());
  const Tensor copy = torch::stable::new_empty(matrices, {count, n, n});
  if (count > 0) {
    STD_CUDA_CHECK(prepare_library<Real>(table, bits, copy.mutable_data_ptr(), stream));
  }
  std::array<Tensor, 2> results;
  void* vectors = nullptr;
  if (wants_vectors) {
    const auto pair = call_linalg<2>("aten::linalg_eigh", copy);
    results[0] = torch::stable::detail::to<Tensor>(pair[0]);
    results[1] = torch::stable::contiguous(torch::stable::detail::to<Tensor>(pair[1]));
    vectors = results[1].mutable_data_ptr();
  } else {
    results[0] =
        torch::stable::detail::to<Tensor>(call_linalg<1>("aten::linalg_eigvalsh", copy)[0]);
  }
  if (count > 0) {
    STD_CUDA_CHECK(
        restore_library<Real>(table, bits, results[0].mutable_data_ptr(), vectors, stream));
  }
  return results;
}

template <typename Real>
void eigvalsh_of(const std::vector<Tensor>& matrices, const std::vector<size_t>& chosen,
                 std::vector<Tensor>& results) {
  Call<Real> call(matrices[chosen.front()]);
  std::vector<size_t> late;
  for (const size_t index : chosen) {
    const Tensor& matrix = matrices[index];
    EigenEntry entry = entry_of(matrix);
    if (!call.has_values(entry.n)) {
      late.push_back(index);
      continue;
    }
    results[index] = torch::stable::new_empty(matrix, shape_without_last(matrix));
    entry.values = results[index].mutable_data_ptr();
    call.add(entry, batch_count(matrix));
  }
  call.run();
  for (const size_t index : late) {
    const Tensor& matrix = matrices[index];
    const Tensor values = run_library<Real>(matrix, entry_of(matrix), false)[0];
    results[index] = torch::stable::reshape(values, shape_without_last(matrix));
  }
}

template <typename Real>
void eigh_of(const std::vector<Tensor>& matrices, const std::vector<size_t>& chosen,
             std::vector<Tensor>& values, std::vector<Tensor>& vectors) {
  Call<Real> call(matrices[chosen.front()]);
  std::vector<size_t> late;
  for (const size_t index : chosen) {
    const Tensor& matrix = matrices[index];
    EigenEntry entry = entry_of(matrix);
    if (!call.has_vectors(entry.n)) {
      late.push_back(index);
      continue;
    }
    values[index] = torch::stable::new_empty(matrix, shape_without_last(matrix));
    vectors[index] = torch::stable::new_empty(matrix, matrix.sizes());
    entry.values = values[index].mutable_data_ptr();
    call.add(entry, batch_count(matrix), vectors[index].mutable_data_ptr());
  }
  call.run();
  for (const size_t index : late) {
    const Tensor& matrix = matrices[index];
    const auto pair = run_library<Real>(matrix, entry_of(matrix), true);
    values[index] = torch::stable::reshape(pair[0], shape_without_last(matrix));
    vectors[index] = torch::stable::reshape(pair[1], matrix.sizes());
  }
}

// Indices of a call's entries by dtype. All entries must be on one device.
struct Split {
  std::vector<size_t> singles;
  std::vector<size_t> doubles;

  explicit Split(const std::vector<Tensor>& matrices) {
    for (size_t index = 0; index < matrices.size(); ++index) {
      const ScalarType dtype = matrices[index].scalar_type();
      STD_TORCH_CHECK(dtype == ScalarType::Float || dtype == ScalarType::Double,
                      "matrices must be float32 or float64");
      STD_TORCH_CHECK(matrices[index].get_device_index() == matrices.front().get_device_index(),
                      "matrices must be on one device");
      (dtype == ScalarType::Float ? singles : doubles).push_back(index);
    }
  }
};

// is_alone changes nothing here: on a GPU the bits of a matrix's eigenvalues never depend on the
// other matrices of the call.
std::vector<Tensor> eigvalsh(std::vector<Tensor> matrices, bool /*is_alone*/) {
  std::vector<Tensor> results(matrices.size());
  if (matrices.empty()) return results;
  const torch::stable::accelerator::DeviceGuard guard(matrices.front().get_device_index());
  const Split split(matrices);
  if (!split.singles.empty()) eigvalsh_of<float>(matrices, split.singles, results);
  if (!split.doubles.empty()) eigvalsh_of<double>(matrices, split.doubles, results);
  return results;
}

std::tuple<std::vector<Tensor>, std::vector<Tensor>> eigh(std::vector<Tensor> matrices) {
  std::vector<Tensor> values(matrices.size());
  std::vector<Tensor> vectors(matrices.size());
  if (matrices.empty()) return {values, vectors};
  const torch::stable::accelerator::DeviceGuard guard(matrices.front().get_device_index());
  const Split split(matrices);
  if (!split.singles.empty()) eigh_of<float>(matrices, split.singles, values, vectors);
  if (!split.doubles.empty()) eigh_of<double>(matrices, split.doubles, values, vectors);
  return {values, vectors};
}

std::vector<Tensor> count_above(std::vector<Tensor> matrices, std::vector<Tensor> thresholds) {
  STD_TORCH_CHECK(matrices.size() == thresholds.size(), "one set of thresholds for each entry");
  std::vector<Tensor> results(matrices.size());
  if (matrices.empty()) return results;
  const torch::stable::accelerator::DeviceGuard guard(matrices.front().get_device_index());
  const Split split(matrices);
  STD_TORCH_CHECK(split.singles.empty(), "matrices must be float64");
  Call<double> call(matrices.front());
  std::vector<EigenEntry> late;
  std::vector<size_t> late_index;
  for (size_t index = 0; index < matrices.size(); ++index) {
    const Tensor& matrix = matrices[index];
    const Tensor& tau = thresholds[index];
    EigenEntry entry = entry_of(matrix);
    const int64_t dims = tau.dim();
    STD_TORCH_CHECK(tau.is_cuda() && dims == matrix.dim() - 1 &&
                        (dims == 1 || tau.size(0) == matrix.size(0)) &&
                        tau.scalar_type() == ScalarType::Double,
                    "thresholds must be [T] or [B, T] beside the matrices, in float64");
    std::vector<int64_t> shape(tau.sizes().begin(), tau.sizes().end());
    shape.push_back(2);
    results[index] = torch::stable::new_empty(matrix, shape, ScalarType::Long);
    entry.thresholds = static_cast<const double*>(tau.const_data_ptr());
    entry.threshold_batch_stride = dims == 2 ? tau.stride(0) : 0;
    entry.threshold_stride = tau.stride(dims - 1);
    entry.threshold_count = static_cast<int>(tau.size(dims - 1));
    entry.counts = static_cast<int64_t*>(results[index].mutable_data_ptr());
    if (entry.threshold_count == 0) continue;
    if (call.has_values(entry.n)) {
      call.add(entry, batch_count(matrix));
    } else {
      late.push_back(entry);
      late_index.push_back(index);
    }
  }
  call.run();
  for (size_t l = 0; l < late.size(); ++l) {
    run_library<double>(matrices[late_index[l]], late[l], false);
  }
  return results;
}

}  // namespace
}  // namespace fastcov

STABLE_TORCH_LIBRARY_IMPL(fastcov, CUDA, m) {
  m.impl("eigvalsh", TORCH_BOX(&fastcov::eigvalsh));
  m.impl("eigh", TORCH_BOX(&fastcov::eigh));
  m.impl("count_above", TORCH_BOX(&fastcov::count_above));
}
