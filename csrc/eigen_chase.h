// Reduction of a symmetric band matrix to tridiagonal form on the host. A sweep frees one column of
// its entries below the off-diagonal. That makes a bulge further down the band, which the steps of
// the sweep chase out of the matrix.
//
// Every step works on whole blocks of kTile rows. Beyond the matrix these hold zeros, and stay so.
// Threads share each sweep by ranges of its steps, so that each keeps its part of the band in
// cache.
#pragma once

#include <sched.h>

#include <utility>

#include "crew.h"
#include "eigen_band.h"
#include "eigen_tiles.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

// Storage of the band, both of its triangles, and of the bulges below it: entry (i, j) is
// data[stride * j + i], for -kTile < i - j < 2 kTile.
template <class T>
struct Band {
  static constexpr int stride = 3 * kTile;
  T* data;

  static int64_t elements(int n) { return (int64_t{stride} + 1) * (n + 2 * kTile) + 2 * kTile; }
  FASTCOV_INLINE T* at(int i, int j) const { return data + int64_t{stride} * j + i; }
};

template <class T>
struct BulgeReflector {
  alignas(64) T u[kTile];
  T inverse_half;
};

template <class V, int First, int... I>
FASTCOV_INLINE V interleave(V a, V b, std::integer_sequence<int, I...>) {
  constexpr int lanes = sizeof...(I);
  return __builtin_shufflevector(a, b, (First + I / 2 + I % 2 * lanes)...);
}

// Sums each of `terms` over its lanes. Lane c of the result is the sum of terms[c].
template <class T, int Lanes = kTileLanes<T>>
FASTCOV_INLINE Pack<T, Lanes> sum_each(Pack<T, Lanes> (&terms)[Lanes]) {
  using V = Pack<T, Lanes>;
  using Places = std::make_integer_sequence<int, Lanes>;
  FASTCOV_UNROLL
  for (int count = Lanes / 2; count > 0; count /= 2) {
    FASTCOV_UNROLL
    for (int i = 0; i < count; ++i) {
      const V a = terms[i];
      const V b = terms[i + count];
      terms[i] = interleave<V, 0>(a, b, Places{}) + interleave<V, Lanes / 2>(a, b, Places{});
    }
  }
  return terms[0];
}

// One column of a block, held in registers.
template <class T>
struct Column {
  static constexpr int parts = kTile / kTileLanes<T>;
  Pack<T, kTileLanes<T>> part[parts];

  static FASTCOV_INLINE Column load(const T* source) {
    Column column;
    FASTCOV_UNROLL
    for (int p = 0; p < parts; ++p) column.part[p] = load_pack(source + p * kTileLanes<T>);
    return column;
  }
  FASTCOV_INLINE void store(T* target) const {
    FASTCOV_UNROLL
    for (int p = 0; p < parts; ++p) store_pack(target + p * kTileLanes<T>, part[p]);
  }
  FASTCOV_INLINE void add(const Column& other, T factor) {
    FASTCOV_UNROLL
    for (int p = 0; p < parts; ++p) part[p] += other.part[p] * factor;
  }
  FASTCOV_INLINE Pack<T, kTileLanes<T>> terms(const Column& other) const {
    Pack<T, kTileLanes<T>> sum = part[0] * other.part[0];
    FASTCOV_UNROLL
    for (int p = 1; p < parts; ++p) sum += part[p] * other.part[p];
    return sum;
  }
  FASTCOV_INLINE T dot(const Column& other) const { return sum_lanes<T>(terms(other)); }
};

// Finds the reflector that maps a column of a block onto its first entry, and stores the mapped
// column.
template <class T>
FASTCOV_INLINE void reflect(Column<T> x, T* column, BulgeReflector<T>& reflector) {
  const T first = x.part[0][0];
  x.part[0][0] = T(0);
  const Reflection<T> reflection(first, x.dot(x));
  Column<T> u{};
  u.add(x, reflection.inverse_norm);
  u.store(reflector.u);
  reflector.u[0] = first * reflection.inverse_norm + reflection.sign;
  reflector.inverse_half = reflection.inverse_half;
  for (int i = 0; i < kTile; ++i) column[i] = T(0);
  column[0] = reflection.image;
}

// Product of a block and u, in two sums that do not wait for each other.
template <class T>
FASTCOV_INLINE Column<T> block_times(const T* block, const T* u) {
  Column<T> even{}, odd{};
  for (int j = 0; j < kTile; j += 2) {
    even.add(Column<T>::load(block + j * Band<T>::stride), u[j]);
    odd.add(Column<T>::load(block + (j + 1) * Band<T>::stride), u[j + 1]);
  }
  even.add(odd, T(1));
  return even;
}

// One step of a sweep: applies `reflector` to rows and columns from r on. Column r then has entries
// below row r + kTile again, or still has those that the sweep before left there, and `reflector`
// becomes the one that frees it of them. Either reflector may be none: a sweep whose own column is
// free may still meet the bulges of the sweep before.
template <class T>
void chase_step(const Band<T>& band, int r, BulgeReflector<T>& reflector) {
  constexpr int stride = Band<T>::stride;
  constexpr int lanes = kTileLanes<T>;
  using V = Pack<T, lanes>;
  const T half = reflector.inverse_half;
  const bool is_live = half != T(0);
  T* const below = band.at(r + kTile, r);
  Column<T> minus_w{};
  Column<T> first = Column<T>::load(below);
  if (is_live) {
    const Column<T> u = Column<T>::load(reflector.u);
    T* const square = band.at(r, r);
    alignas(64) T q[kTile];
    Column<T> minus_q{};
    minus_q.add(block_times(square, reflector.u), -half);
    minus_q.add(u, T(-0.5) * half * minus_q.dot(u));
    minus_q.store(q);
    for (int j = 0; j < kTile; ++j) {
      Column<T> column = Column<T>::load(square + j * stride);
      column.add(minus_q, reflector.u[j]);
      column.add(u, q[j]);
      column.store(square + j * stride);
    }
    minus_w.add(block_times(below, reflector.u), -half);
    first.add(minus_w, reflector.u[0]);
  }

  // The block below is multiplied by the old reflector from the right, and by the next one from the
  // left.
  BulgeReflector<T> next;
  reflect(first, below, next);
  if (is_live || next.inverse_half != T(0)) {
    const Column<T> next_u = Column<T>::load(next.u);
    alignas(64) T dots[kTile];
    for (int j = 0; j < kTile; j += lanes) {
      V terms[lanes];
      FASTCOV_UNROLL
      for (int c = 0; c < lanes; ++c) {
        T* const entries = below + (j + c) * stride;
        Column<T> column = Column<T>::load(entries);
        if (j + c > 0) column.add(minus_w, reflector.u[j + c]);
        column.store(entries);
        terms[c] = column.terms(next_u);
      }
      store_pack(dots + j, sum_each<T>(terms) * -next.inverse_half);
    }
    for (int j = 1; j < kTile; ++j) {
      Column<T> column = Column<T>::load(below + j * stride);
      column.add(next_u, dots[j]);
      column.store(below + j * stride);
    }
  }
  // The first row of this block belongs to a square of the next sweep, which reads both triangles.
  T* const mirrored = band.at(r, r + kTile);
  for (int j = 1; j < kTile; ++j) mirrored[j] = below[j * stride];
  reflector = next;
}

FASTCOV_INLINE int chase_steps(int n, int sweep) { return (n - 2 - sweep) / kTile + 1; }

// Number of steps that a sweep has finished. Each number has a cache line to itself, because
// another thread waits for it.
struct alignas(64) SweepProgress {
  int steps;
};
// Slots for reflectors on their way from one range of steps to the next. A range is never two
// sweeps ahead of the one that follows it, so that no slot is overwritten early.
constexpr int kHandedOver = 4;
// In a range with fewer steps a thread would wait longer than it works.
constexpr int kFewestSteps = 4;

template <class T>
struct ChaseSpace {
  Band<T> band;
  SweepProgress* progress;    // [n], zero
  BulgeReflector<T>* handed;  // [ranks][kHandedOver]
};

FASTCOV_INLINE void wait_for(const int* steps, int wanted) {
  // A step takes half a microsecond. A thread that has waited a hundred times longer yields,
  // because it may hold the core of the thread that it waits for.
  for (int spins = 0; __atomic_load_n(steps, __ATOMIC_ACQUIRE) < wanted; ++spins) {
    if (spins >= 1000) sched_yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

template <class T>
void chase_sweep_range(const ChaseSpace<T>& space, int n, int sweep, int part, int parts) {
  const int steps = chase_steps(n, sweep);
  const int begin = steps * part / parts;
  const int end = steps * (part + 1) / parts;
  int* const own = &space.progress[sweep].steps;
  int* const before = sweep > 0 ? &space.progress[sweep - 1].steps : nullptr;
  const int before_steps = sweep > 0 ? chase_steps(n, sweep - 1) : 0;
  BulgeReflector<T> reflector;
  if (begin > 0) {
    wait_for(own, begin);
    reflector = space.handed[part * kHandedOver + sweep % kHandedOver];
  }
  for (int t = begin; t < end; ++t) {
    // The sweep before must have passed the rows that this step touches.
    if (before) wait_for(before, t + 2 < before_steps ? t + 2 : before_steps);
    if (t == 0) {
      T* const column = space.band.at(sweep + 1, sweep);
      reflect(Column<T>::load(column), column, reflector);
    }
    chase_step(space.band, sweep + 1 + t * kTile, reflector);
    if (t + 1 == end && part + 1 < parts) {
      space.handed[(part + 1) * kHandedOver + sweep % kHandedOver] = reflector;
    }
    __atomic_store_n(own, t + 1, __ATOMIC_RELEASE);
  }
}

template <class T>
void chase(const Crew& crew, const ChaseSpace<T>& space, int n) {
  on_ranks(crew, [&](int rank_begin, int rank_end) {
    for (int sweep = 0; sweep < n - 2; ++sweep) {
      int parts = chase_steps(n, sweep) / kFewestSteps;
      parts = parts > crew.ranks ? crew.ranks : parts < 1 ? 1 : parts;
      // A thread may have several ranks. It takes them sweep by sweep and in order, so that no
      // range ever waits for one that its own thread takes later.
      for (int part = rank_begin; part < rank_end && part < parts; ++part) {
        chase_sweep_range(space, n, sweep, part, parts);
      }
    }
  });
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
