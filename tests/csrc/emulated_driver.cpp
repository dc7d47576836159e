// csrc/eigen.cu, the driver of the eigenvalue kernels, as operators fastcov_emulated::* of a CPU's
// tensors. The kernels around torch.linalg run; the others only note the stream they are launched
// on, and leave their results as they are.
#include <algorithm>
#include <cstdint>

#include "emulated/streams.h"

#include <torch/csrc/stable/accelerator.h>

#include "boxing.h"

namespace torch::stable::accelerator {
struct NoGuard {
  explicit NoGuard(int) {}
};
}  // namespace torch::stable::accelerator

inline AOTITorchError aoti_torch_get_current_cuda_stream(int, void** stream) {
  return *stream = reinterpret_cast<void*>(1), AOTI_TORCH_SUCCESS;
}
// Of STD_CUDA_CHECK.
inline void torch_c10_cuda_check_msg(int error, const char*, const char*, unsigned, bool,
                                     char** message) {
  static char text[] = "an emulated call failed";
  if (error != cudaSuccess) *message = text;
}
inline void torch_c10_cuda_free_error_msg(char*) {}

#define DeviceGuard NoGuard
#define is_cuda is_cpu
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(name, key, m) \
  _STABLE_TORCH_LIBRARY_IMPL(fastcov_emulated, CPU, m, C10_UID)

#include "eigen.cu"

namespace fastcov {
namespace {
int largest_members = kLargestMembers;  // order

cudaError_t noted(cudaStream_t stream) {
  emulated::note(emulated::kWork, stream);
  return cudaSuccess;
}
}  // namespace

template <class Real>
int largest_triangle(int) {
  return kLargestTriangle;
}
template <class Real>
MembersPlan plan_members(int n, int64_t, const DeviceLimits&) {
  MembersPlan plan{};
  plan.members = n <= largest_members;
  plan.workspace_bytes = 8;
  return plan;
}
template <class Real>
JacobiPlan plan_jacobi(int n, int64_t, int) {
  return {n <= kLargestJacobi, true, 8};
}
template <class Real>
cudaError_t launch_registers(EigenClass, const EigenTable&, cudaStream_t stream) {
  return noted(stream);
}
template <class Real>
cudaError_t launch_triangle(const EigenTable&, cudaStream_t stream) {
  return noted(stream);
}
template <class Real>
cudaError_t launch_members(const EigenTable&, const MembersPlan&, void*, cudaStream_t stream) {
  return noted(stream);
}
template <class Real>
cudaError_t launch_jacobi(const EigenTable&, void* const*, const JacobiPlan&, void*,
                          cudaStream_t stream) {
  return noted(stream);
}

#define FASTCOV_INSTANTIATE(Real)                                                              \
  template int largest_triangle<Real>(int);                                                    \
  template MembersPlan plan_members<Real>(int, int64_t, const DeviceLimits&);                  \
  template JacobiPlan plan_jacobi<Real>(int, int64_t, int);                                    \
  template cudaError_t launch_registers<Real>(EigenClass, const EigenTable&, cudaStream_t);    \
  template cudaError_t launch_triangle<Real>(const EigenTable&, cudaStream_t);                 \
  template cudaError_t launch_members<Real>(const EigenTable&, const MembersPlan&, void*,      \
                                            cudaStream_t);                                     \
  template cudaError_t launch_jacobi<Real>(const EigenTable&, void* const*, const JacobiPlan&, \
                                           void*, cudaStream_t)
FASTCOV_INSTANTIATE(float);
FASTCOV_INSTANTIATE(double);

}  // namespace fastcov

STABLE_TORCH_LIBRARY(fastcov_emulated, m) {
  m.def("eigvalsh(Tensor[] matrices, bool is_alone=False) -> Tensor[]");
  m.def("eigh(Tensor[] matrices) -> (Tensor[], Tensor[])");
  m.def("count_above(Tensor[] matrices, Tensor[] thresholds) -> Tensor[]");
}

extern "C" void set_largest_members(int order) { fastcov::largest_members = order; }

// Copies the notes made since the last call, and returns how many numbers they are.
extern "C" int64_t take_notes(int64_t* target, int64_t most) {
  const int64_t count = static_cast<int64_t>(emulated::notes.size());
  if (count > most) return -1;
  std::copy(emulated::notes.begin(), emulated::notes.end(), target);
  emulated::notes.clear();
  return count;
}
