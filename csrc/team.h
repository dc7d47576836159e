// Team policy: the lanes that work on one matrix, and the ways in which they wait for each other.
//
// An algorithm written over a Team compiles to a plain loop, to host threads with real barriers,
// and to a warp, a block, a cluster or a whole grid of a GPU. A team is made of squads, a squad of
// lanes:
//   lane(), lanes()    a lane's place in its squad; a squad reduces without waiting for the others
//   squad(), squads()  a squad's place among those that share vectors in memory
//   rank(), size()     a lane's place among all lanes that share those vectors
//   owns(i)            true if this squad writes element i of a shared vector
//   leads()            true if this lane writes values that all lanes know
//   squad_sync()       lanes of a squad see each other's writes
//   sync()             all lanes that share vectors see each other's writes
//   sum, maximum       over the lanes of a squad; every lane gets the same bits
//   add_sums(s, t, n)  adds the squad's sum of s[c] to t[c], for c < 4 and c < n
// A matrix too large for one block has several members, each of which is a team with vectors of its
// own:
//   member(), members()
//   exchange()         all members see each other's writes to the memory in which they publish
// Reductions have a fixed order, so that results repeat bit for bit.
#pragma once

#if defined(__CUDACC__)
#define FASTCOV_INLINE __host__ __device__ __forceinline__
#define FASTCOV_UNROLL _Pragma("unroll")
#define FASTCOV_SIMD(...)
#else
#define FASTCOV_INLINE inline __attribute__((always_inline))
#define FASTCOV_UNROLL _Pragma("GCC unroll 16")
#define FASTCOV_PRAGMA(text) _Pragma(#text)
#define FASTCOV_SIMD(...) FASTCOV_PRAGMA(omp simd __VA_ARGS__)
#endif

// Code that is compiled once for each instruction set must not share a name with its other copies:
// the linker would keep one of them for all sets.
#if !defined(FASTCOV_LEVEL)
#define FASTCOV_LEVEL portable
#endif

namespace fastcov {
inline namespace FASTCOV_LEVEL {

// Part of a team that has a matrix to itself.
struct SingleMember {
  static FASTCOV_INLINE constexpr int member() { return 0; }
  static FASTCOV_INLINE constexpr int members() { return 1; }
};

// One thread, for which every loop over lanes is a plain loop.
struct LoopTeam : SingleMember {
  static FASTCOV_INLINE constexpr int lane() { return 0; }
  static FASTCOV_INLINE constexpr int lanes() { return 1; }
  static FASTCOV_INLINE constexpr int squad() { return 0; }
  static FASTCOV_INLINE constexpr int squads() { return 1; }
  static FASTCOV_INLINE constexpr int rank() { return 0; }
  static FASTCOV_INLINE constexpr int size() { return 1; }
  static FASTCOV_INLINE constexpr bool owns(int) { return true; }
  static FASTCOV_INLINE constexpr bool leads() { return true; }
  FASTCOV_INLINE void squad_sync() const {}
  FASTCOV_INLINE void sync() const {}
  template <class Real>
  FASTCOV_INLINE Real sum(Real value) const {
    return value;
  }
  template <class Real>
  FASTCOV_INLINE Real maximum(Real value) const {
    return value;
  }
  template <class Real>
  FASTCOV_INLINE void add_sums(const Real (&sums)[4], Real* target, int count) const {
    for (int c = 0; c < 4 && c < count; ++c) target[c] += sums[c];
  }
};

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
