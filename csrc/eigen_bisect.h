// Eigenvalues of one tridiagonal matrix on the host by bisection, a vector of eigenvalues at a
// time.
#pragma once

#include "crew.h"
#include "eigen.h"
#include "eigen_lanes.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

// Sturm counts at the points of several packs. A count waits for its divisions, and those of
// several packs overlap.
template <class V, class T, int Chains>
FASTCOV_INLINE void count_below_packs(const T* diagonal, const T* square, int n,
                                      const V (&points)[Chains],
                                      typename Numeric<V>::Count (&below)[Chains]) {
  using Number = Numeric<V>;
  V pivot[Chains];
  FASTCOV_UNROLL
  for (int c = 0; c < Chains; ++c) {
    pivot[c] = diagonal[0] - points[c];
    below[c] = Number::is_negative(pivot[c]);
  }
  for (int i = 1; i < n; ++i) {
    const V square_i = Number::fill(square[i - 1]);
    FASTCOV_UNROLL
    for (int c = 0; c < Chains; ++c) {
      pivot[c] = (diagonal[i] - points[c]) - square_i / pivot[c];
      below[c] += Number::is_negative(pivot[c]);
    }
  }
}

// Most packs of eigenvalues that are bisected at once: with more, the divider has no time to spare.
constexpr int kMostChains = 4;

// Bisection as in bisect() of eigen.h for a team of one, Chains packs of eigenvalues at once.
// count_sections() must have been called for every section before find() is called. Neither depends
// on Chains but in its time.
template <class T>
struct PackBisection {
  static constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(T));
  using V = Pack<T, lanes>;
  using Count = typename Numeric<V>::Count;

  const T* diagonal;
  const T* square;
  int n;
  T lower;
  T upper;
  int* counts;  // [n + 1] scratch

  FASTCOV_INLINE T section() const { return (upper - lower) / static_cast<T>(n); }

  // Takes Sturm counts at `wide` of n evenly spaced points, from number `first` on. They replace
  // the first log2(n) halvings of every eigenvalue.
  template <int Chains>
  FASTCOV_INLINE void count_sections(int first) const {
    constexpr int wide = lanes * Chains;
    V points[Chains] = {};
    Count below[Chains];
    for (int c = 0; c < Chains; ++c) {
      for (int lane = 0; lane < lanes; ++lane) {
        points[c][lane] = lower + section() * static_cast<T>(first + c * lanes + lane);
      }
    }
    count_below_packs<V, T, Chains>(diagonal, square, n, points, below);
    for (int k = 0; k < wide && first + k < n; ++k) {
      counts[first + k] = static_cast<int>(below[k / lanes][k % lanes]);
    }
  }

  // Hands eigenvalues from number `first` on to write(k, value).
  template <int Chains, class Write>
  FASTCOV_INLINE void find(int first, const Write& write) const {
    constexpr int wide = lanes * Chains;
    int halvings = Numeric<T>::digits + 1;
    for (int s = n; s > 1; s /= 2) --halvings;
    V points[Chains], low[Chains], high[Chains];
    Count below[Chains], index[Chains];
    for (int k = 0; k < wide; ++k) {
      const int wanted = first + k < n ? first + k : n - 1;
      int from = 0;
      int to = n;
      while (to - from > 1) {
        const int middle = (from + to) / 2;
        (counts[middle] <= wanted ? from : to) = middle;
      }
      low[k / lanes][k % lanes] = lower + section() * static_cast<T>(from);
      high[k / lanes][k % lanes] = to == n ? upper : lower + section() * static_cast<T>(to);
      index[k / lanes][k % lanes] = wanted;
    }
    for (int step = 0; step < halvings; ++step) {
      for (int c = 0; c < Chains; ++c) points[c] = low[c] + (high[c] - low[c]) * T(0.5);
      count_below_packs<V, T, Chains>(diagonal, square, n, points, below);
      for (int c = 0; c < Chains; ++c) {
        const auto is_low = below[c] <= index[c];
        low[c] = is_low ? points[c] : low[c];
        high[c] = is_low ? high[c] : points[c];
      }
    }
    for (int k = 0; k < wide && first + k < n; ++k) {
      const T a = low[k / lanes][k % lanes];
      const T b = high[k / lanes][k % lanes];
      write(first + k, a + (b - a) * T(0.5));
    }
  }
};

// Hands all eigenvalues of a bisection to write(k, value), Chains packs at a time.
template <int Chains, class T, class Write>
void bisect_packs(const Crew& crew, const PackBisection<T>& bisection, const Write& write) {
  constexpr int wide = PackBisection<T>::lanes * Chains;
  const int parts = (bisection.n + wide - 1) / wide;
  deal(crew, parts, [&](int part) { bisection.template count_sections<Chains>(part * wide); });
  deal(crew, parts, [&](int part) { bisection.template find<Chains>(part * wide, write); });
}

// Hands all eigenvalues to write(k, value), found by the ranks of a crew. A matrix whose
// off-diagonal vanishes somewhere falls into blocks, which are solved one after the other: a count
// over a block then takes only as many divisions as the block has rows. Eigenvalues ascend within a
// block. Returns true if there was one block alone, so that all of them ascend. off_diagonal is
// overwritten; counts is scratch. [n + 1]
template <class T, class Write>
FASTCOV_INLINE bool bisect_blocks(const Crew& crew, const T* diagonal, T* off_diagonal, int n,
                                  int* counts, const Write& write) {
  constexpr int lanes = PackBisection<T>::lanes;
  int begin = 0;
  for (int end = 1; end <= n; ++end) {
    if (end < n) {
      const T coupling = off_diagonal[end - 1];
      if (coupling * coupling > Numeric<T>::negligible_square) continue;
    }
    const int size = end - begin;
    if (size == 1) {
      write(begin, diagonal[begin]);
    } else {
      LoopTeam team;
      T lower, upper;
      bound_eigenvalues(team, diagonal + begin, off_diagonal + begin, size, lower, upper);
      const PackBisection<T> bisection{
          diagonal + begin, off_diagonal + begin, size, lower, upper, counts};
      const auto write_own = [&](int k, T value) { write(begin + k, value); };
      // As few packs as hold the eigenvalues, in equal parts.
      const int packs = (size + lanes - 1) / lanes;
      const int parts = (packs + kMostChains - 1) / kMostChains;
      switch ((packs + parts - 1) / parts) {
        case 1:
          bisect_packs<1>(crew, bisection, write_own);
          break;
        case 2:
          bisect_packs<2>(crew, bisection, write_own);
          break;
        case 3:
          bisect_packs<3>(crew, bisection, write_own);
          break;
        default:
          bisect_packs<kMostChains>(crew, bisection, write_own);
      }
    }
    if (begin == 0 && end == n) return true;
    begin = end;
  }
  return false;
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
