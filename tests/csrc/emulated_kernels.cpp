// One file of kernels, compiled for the host over emulated/cuda_runtime.h.
#include <cuda_runtime.h>

#include FASTCOV_KERNEL_FILE

namespace fastcov {
namespace {
// What a launch hands out as dynamic shared memory: each emulated block has its own.
[[maybe_unused]] thread_local unsigned char shared[emulated::kSharedCapacity]
    __attribute__((aligned(64)));
[[maybe_unused]] const bool kIsKnown = [] {
  emulated::dynamic_shared = [] { return shared; };
  return true;
}();
}  // namespace
}  // namespace fastcov
