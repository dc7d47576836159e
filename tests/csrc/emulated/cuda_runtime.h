// As much of CUDA as the kernels use, on the host: a block is a thread of the operating
// system, its CUDA threads are fibers that run in turn and give way where they wait (runtime.cpp).
// So the kernels' own sources, with their indices, shuffles and barriers, run without a GPU.
//
// Checked: that results do not hang on the order of the fibers, writes beyond the dynamic shared
// memory of a launch (and reads of it before a write, which give NaN), limits of a launch; under
// ThreadSanitizer every access that no barrier orders. Not modelled: registers, divergence.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>

#define __host__
#define __device__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)
#define __shared__ thread_local
#define __align__(bytes) __attribute__((aligned(bytes)))

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

using cudaStream_t = void*;
using cudaError_t = int;
constexpr cudaError_t cudaSuccess = 0;
constexpr cudaError_t cudaErrorInvalidValue = 1;
constexpr cudaError_t cudaErrorInvalidConfiguration = 9;
constexpr cudaError_t cudaErrorCooperativeLaunchTooLarge = 720;
constexpr cudaError_t cudaErrorNotSupported = 801;
enum { cudaFuncAttributeMaxDynamicSharedMemorySize };
enum { cudaLaunchAttributeClusterDimension, cudaLaunchAttributeCooperative };
enum cudaDeviceAttr {
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
  cudaDevAttrMultiProcessorCount,
  cudaDevAttrClusterLaunch
};

struct cudaFuncAttributes {
  size_t sharedSizeBytes;
};
struct cudaLaunchAttribute {
  int id;
  struct {
    dim3 clusterDim;
    int cooperative;
  } val;
};
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes;
  cudaStream_t stream;
  cudaLaunchAttribute* attrs;
  unsigned numAttrs;
};

namespace emulated {

constexpr size_t kSharedCapacity = 256 << 10;

struct Device {
  int multiprocessors = 6;
  int shared_bytes = 0;  // a block may ask for
  bool has_clusters = false;
};
extern Device device;

// Of a file of kernels: where this thread's dynamic shared memory lies.
[[maybe_unused]] static unsigned char* (*dynamic_shared)() = nullptr;

struct Indices {
  dim3 thread, block, grid;
};
extern thread_local Indices here;  // of the fiber that runs

cudaError_t run(const void* kernel, const cudaLaunchConfig_t& config, unsigned char* (*shared)(),
                const std::function<void()>& body);
int& shared_limit(const void* kernel);

constexpr unsigned kWholeBlock = 0;  // no mask of a warp's lanes
// All of a group wait for each other; the result says whether `flag` holds for any.
int meet(unsigned mask, int flag, bool is_barrier);
uint64_t exchange(unsigned mask, uint64_t bits, unsigned other_lane);
void arrive_at_cluster();
void wait_for_cluster();
void fetch_add(unsigned* target, unsigned value);
unsigned load(const unsigned* source);
float reciprocal(float value);

// Read as threadIdx.x and so on; macros would also catch the members of a launch configuration.
template <dim3 Indices::* Which>
struct Index {
  struct X {
    operator unsigned() const { return (here.*Which).x; }
  } x;
  struct Y {
    operator unsigned() const { return (here.*Which).y; }
  } y;
};

}  // namespace emulated

inline constexpr emulated::Index<&emulated::Indices::thread> threadIdx{};
inline constexpr emulated::Index<&emulated::Indices::block> blockIdx{};
inline constexpr emulated::Index<&emulated::Indices::grid> gridDim{};

inline void __syncthreads() { emulated::meet(emulated::kWholeBlock, 0, true); }
inline int __syncthreads_or(int flag) { return emulated::meet(emulated::kWholeBlock, flag, false); }
inline void __syncwarp(unsigned mask) { emulated::meet(mask, 0, true); }
inline int __any_sync(unsigned mask, int flag) { return emulated::meet(mask, flag, false); }
template <class Value>
Value __shfl_xor_sync(unsigned mask, Value value, int offset, int = 32) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  bits = emulated::exchange(mask, bits, (threadIdx.x % 32u) ^ static_cast<unsigned>(offset));
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}
inline void __cluster_barrier_arrive() { emulated::arrive_at_cluster(); }
inline void __cluster_barrier_wait() { emulated::wait_for_cluster(); }

constexpr int __NV_ATOMIC_ACQUIRE = 2;
constexpr int __NV_ATOMIC_RELEASE = 3;
constexpr int __NV_THREAD_SCOPE_DEVICE = 3;
inline void __nv_atomic_fetch_add(unsigned* target, unsigned value, int, int) {
  emulated::fetch_add(target, value);
}
inline unsigned __nv_atomic_load_n(const unsigned* source, int, int) {
  return emulated::load(source);
}
template <class Value>
Value atomicMax(Value* target, Value value) {
  Value old = __atomic_load_n(target, __ATOMIC_RELAXED);
  while (old < value && !__atomic_compare_exchange_n(target, &old, value, false, __ATOMIC_RELAXED,
                                                     __ATOMIC_RELAXED)) {
  }
  return old;
}
inline unsigned long long atomicAdd(unsigned long long* target, unsigned long long value) {
  return __atomic_fetch_add(target, value, __ATOMIC_ACQ_REL);
}
inline void __threadfence() {}  // the counter that follows orders what the host's threads see
#define FASTCOV_EMULATED_RECIPROCAL(value) ::emulated::reciprocal(value)

inline cudaError_t cudaGetDevice(int* number) { return *number = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr name, int) {
  const emulated::Device& device = emulated::device;
  *value = name == cudaDevAttrMaxSharedMemoryPerBlockOptin ? device.shared_bytes
           : name == cudaDevAttrMultiProcessorCount        ? device.multiprocessors
                                                           : device.has_clusters;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, Kernel) {
  // More than the kernels with dynamic shared memory have beside it.
  return attributes->sharedSizeBytes = 256, cudaSuccess;
}
template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel kernel, int, int bytes) {
  if (bytes > emulated::device.shared_bytes) return cudaErrorInvalidValue;
  emulated::shared_limit(reinterpret_cast<const void*>(kernel)) = bytes;
  return cudaSuccess;
}
template <class Kernel>
cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, Kernel, const cudaLaunchConfig_t*) {
  return *clusters = emulated::device.has_clusters, cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* target, int value, size_t bytes, cudaStream_t) {
  std::memset(target, value, bytes);
  return cudaSuccess;
}
template <class... Parameters, class... Arguments>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Parameters...),
                               Arguments&&... arguments) {
  return emulated::run(reinterpret_cast<const void*>(kernel), *config, emulated::dynamic_shared,
                       [&] { kernel(static_cast<Parameters>(arguments)...); });
}
