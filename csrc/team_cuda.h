// Teams of a GPU for one matrix: a part of a warp, a block, or several blocks.
#pragma once

#include <cuda_runtime.h>

#include "team.h"

#define FASTCOV_DEVICE __device__ __forceinline__

namespace fastcov {
inline namespace FASTCOV_LEVEL {

// Reductions over Width neighbouring lanes of a warp. Lanes exchange in a butterfly, which gives
// all of them the same bits.
template <int Width>
struct WarpLanes {
  unsigned mask;

  FASTCOV_DEVICE WarpLanes() {
    const unsigned all = Width == 32 ? 0xffffffffu : (1u << (Width & 31)) - 1;
    mask = all << (threadIdx.x % 32 / Width * Width);
  }
  FASTCOV_DEVICE int lane() const { return threadIdx.x % Width; }
  FASTCOV_DEVICE void sync() const { __syncwarp(mask); }
  template <class Value>
  FASTCOV_DEVICE Value sum(Value value) const {
    FASTCOV_UNROLL
    for (int offset = Width / 2; offset > 0; offset /= 2) {
      value += __shfl_xor_sync(mask, value, offset, Width);
    }
    return value;
  }
  template <class Value>
  FASTCOV_DEVICE Value maximum(Value value) const {
    FASTCOV_UNROLL
    for (int offset = Width / 2; offset > 0; offset /= 2) {
      const Value other = __shfl_xor_sync(mask, value, offset, Width);
      value = other > value ? other : value;
    }
    return value;
  }
  // Four sums take six exchanges instead of twenty: each exchange halves the values that a lane
  // still carries. The sum of sums[c] ends in lanes c * 8 to c * 8 + 7.
  template <class Value>
  FASTCOV_DEVICE Value sum_four(const Value (&sums)[4]) const {
    static_assert(Width == 32);
    const bool upper = lane() & 16;
    const Value a =
        (upper ? sums[2] : sums[0]) + __shfl_xor_sync(mask, upper ? sums[0] : sums[2], 16);
    const Value b =
        (upper ? sums[3] : sums[1]) + __shfl_xor_sync(mask, upper ? sums[1] : sums[3], 16);
    const bool odd = lane() & 8;
    Value sum = (odd ? b : a) + __shfl_xor_sync(mask, odd ? a : b, 8);
    FASTCOV_UNROLL
    for (int offset = 4; offset > 0; offset /= 2) sum += __shfl_xor_sync(mask, sum, offset);
    return sum;
  }
};

// Width lanes of a warp, so that 32 / Width matrices share a warp.
template <int Width>
struct WarpTeam : SingleMember {
  WarpLanes<Width> warp;

  FASTCOV_DEVICE int lane() const { return warp.lane(); }
  static constexpr FASTCOV_DEVICE int lanes() { return Width; }
  static constexpr FASTCOV_DEVICE int squad() { return 0; }
  static constexpr FASTCOV_DEVICE int squads() { return 1; }
  FASTCOV_DEVICE int rank() const { return warp.lane(); }
  static constexpr FASTCOV_DEVICE int size() { return Width; }
  static constexpr FASTCOV_DEVICE bool owns(int) { return true; }
  FASTCOV_DEVICE bool leads() const { return warp.lane() == 0; }
  FASTCOV_DEVICE void squad_sync() const { warp.sync(); }
  FASTCOV_DEVICE void sync() const { warp.sync(); }
  template <class Value>
  FASTCOV_DEVICE Value sum(Value value) const {
    return warp.sum(value);
  }
  template <class Value>
  FASTCOV_DEVICE Value maximum(Value value) const {
    return warp.maximum(value);
  }
};

// A block, whose squads are its warps. All of them compute the short vectors of a step, so that a
// step needs two barriers.
template <int Warps>
struct BlockTeam : SingleMember {
  WarpLanes<32> warp;

  FASTCOV_DEVICE int lane() const { return warp.lane(); }
  static constexpr FASTCOV_DEVICE int lanes() { return 32; }
  FASTCOV_DEVICE int squad() const { return threadIdx.x / 32; }
  static constexpr FASTCOV_DEVICE int squads() { return Warps; }
  FASTCOV_DEVICE int rank() const { return threadIdx.x; }
  static constexpr FASTCOV_DEVICE int size() { return 32 * Warps; }
  FASTCOV_DEVICE bool owns(int i) const { return i / 32 % Warps == squad(); }
  FASTCOV_DEVICE bool leads() const { return threadIdx.x == 0; }
  FASTCOV_DEVICE void squad_sync() const { warp.sync(); }
  FASTCOV_DEVICE void sync() const { __syncthreads(); }
  template <class Value>
  FASTCOV_DEVICE Value sum(Value value) const {
    return warp.sum(value);
  }
  template <class Value>
  FASTCOV_DEVICE Value maximum(Value value) const {
    return warp.maximum(value);
  }
  template <class Real>
  FASTCOV_DEVICE void add_sums(const Real (&sums)[4], Real* target, int count) const {
    const Real sum = warp.sum_four(sums);
    if (lane() % 8 == 0 && lane() / 8 < count) target[lane() / 8] += sum;
  }
};

// Barrier of the blocks of one matrix that form a cluster.
struct ClusterBarrier {
  FASTCOV_DEVICE void wait() {
    // Only these compilers have the instructions; a host compiler stands for the tests' emulation.
#if __CUDA_ARCH__ >= 900 || !defined(__CUDACC__)
    __cluster_barrier_arrive();
    __cluster_barrier_wait();
#endif
  }
};

// Barrier by a counter in global memory, zero at launch. The launch must be cooperative, so that
// every block that is waited for is running.
struct CounterBarrier {
  unsigned* counter;
  unsigned members;
  unsigned expected = 0;

  FASTCOV_DEVICE void wait() {
    expected += members;
    __syncthreads();
    if (threadIdx.x == 0) {
      __nv_atomic_fetch_add(counter, 1u, __NV_ATOMIC_RELEASE, __NV_THREAD_SCOPE_DEVICE);
      // The difference is signed, so that a counter that wraps still compares right.
      while (static_cast<int>(
                 __nv_atomic_load_n(counter, __NV_ATOMIC_ACQUIRE, __NV_THREAD_SCOPE_DEVICE) -
                 expected) < 0) {
      }
    }
    __syncthreads();
  }
};

// One of several blocks for one matrix. The whole block reduces together, because vectors are long
// here, and each block keeps a copy of them.
template <int Threads, class Barrier>
struct MemberTeam {
  static constexpr int kWarps = Threads / 32;

  WarpLanes<32> warp;
  Barrier barrier;
  int index;
  int count;
  void* scratch;  // [kWarps] values of 8 bytes, shared by the block

  static constexpr FASTCOV_DEVICE int lanes() { return Threads; }
  FASTCOV_DEVICE int lane() const { return threadIdx.x; }
  static constexpr FASTCOV_DEVICE int squad() { return 0; }
  static constexpr FASTCOV_DEVICE int squads() { return 1; }
  FASTCOV_DEVICE int rank() const { return threadIdx.x; }
  static constexpr FASTCOV_DEVICE int size() { return Threads; }
  static constexpr FASTCOV_DEVICE bool owns(int) { return true; }
  FASTCOV_DEVICE bool leads() const { return threadIdx.x == 0; }
  FASTCOV_DEVICE int member() const { return index; }
  FASTCOV_DEVICE int members() const { return count; }
  FASTCOV_DEVICE void squad_sync() const { __syncthreads(); }
  FASTCOV_DEVICE void sync() const { __syncthreads(); }
  FASTCOV_DEVICE void exchange() {
    if (count > 1) {
      barrier.wait();
    } else {
      __syncthreads();
    }
  }
  // In work on rows each warp of the block has rows of its own.
  FASTCOV_DEVICE int row_lane() const { return warp.lane(); }
  static constexpr FASTCOV_DEVICE int row_lanes() { return 32; }
  FASTCOV_DEVICE int row_squad() const { return threadIdx.x / 32; }
  static constexpr FASTCOV_DEVICE int row_squads() { return kWarps; }
  template <class Real>
  FASTCOV_DEVICE void store_sums(const Real (&sums)[4], Real* const (&targets)[4]) const {
    const Real sum = warp.sum_four(sums);
    const int c = warp.lane() / 8;
    Real* const target = c == 0   ? targets[0]
                         : c == 1 ? targets[1]
                         : c == 2 ? targets[2]
                                  : targets[3];
    if (warp.lane() % 8 == 0 && target) *target = sum;
  }

  template <class Value>
  FASTCOV_DEVICE Value sum(Value value) const {
    Value* const sums = static_cast<Value*>(scratch);
    value = warp.sum(value);
    __syncthreads();
    if (warp.lane() == 0) sums[threadIdx.x / 32] = value;
    __syncthreads();
    value = sums[0];
    FASTCOV_UNROLL
    for (int w = 1; w < kWarps; ++w) value += sums[w];
    return value;
  }
  template <class Value>
  FASTCOV_DEVICE Value maximum(Value value) const {
    Value* const values = static_cast<Value*>(scratch);
    value = warp.maximum(value);
    __syncthreads();
    if (warp.lane() == 0) values[threadIdx.x / 32] = value;
    __syncthreads();
    value = values[0];
    FASTCOV_UNROLL
    for (int w = 1; w < kWarps; ++w) value = values[w] > value ? values[w] : value;
    return value;
  }
};

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
