// Eigenvalues of a symmetric matrix, written once over a Team (team.h): Householder reduction to
// tridiagonal form, then bisection on Sturm counts.
//
// Matrices are scaled by a power of two to a largest entry of about 1, so that squares neither
// overflow nor vanish, and shifted by the mean of their diagonal. Real is float, double, or a GCC
// vector of them. Each element of a vector belongs to a matrix of its own, so that a condition on
// values selects elements and never branches.
#pragma once

#include "eigen_numeric.h"
#include "team.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

// Vectors that a team works with, each of padded(n) elements. A reflector is I - inverse_half u
// u^T.
template <class Real>
struct Reflectors {
  Real* reflector[2];  // u of this step and v of the last one; they swap places
  Real* update;        // w: -(v w^T + w v^T) has still to be added to the matrix
  Real* product;       // A v; a sweep may use one more row of it for each squad
};

FASTCOV_INLINE constexpr int padded(int n) { return (n + 3) / 4 * 4; }
FASTCOV_INLINE constexpr int tile_start(int column) { return column / 4 * 4; }

// Reduces a matrix to tridiagonal form. Its sweep applies the pending update and multiplies by the
// new reflector in one pass, so that each step touches every entry once. Matrix has
//   pivot(i, k)                           entry of the column that is reduced now, for i >= k
//   sweep(team, k, n, v, w, u, product)   works on rows and columns beyond k; ends with a sync
//   may_rest                              true if a step without a reflector needs no sweep
// A column whose entries below the off-diagonal are negligible needs no reflector. Where no matrix
// of a pack needs one, and Matrix may rest, the update stays pending. That spares most of the work
// for matrices that are diagonal or tridiagonal already, or have few distinct eigenvalues.
template <class Real, class Team, class Matrix>
FASTCOV_INLINE void tridiagonalize(Team& team, Matrix& matrix, int n,
                                   const Reflectors<Real>& vectors, Real* diagonal,
                                   Real* off_diagonal) {
  using Number = Numeric<Real>;
  const int lane = team.lane();
  const int lanes = team.lanes();
  const Real zero = Number::fill(0);
  const Real one = Number::fill(1);
  for (int i = team.rank(); i < padded(n); i += team.size()) {
    vectors.reflector[0][i] = zero;
    vectors.reflector[1][i] = zero;
    vectors.update[i] = zero;
    vectors.product[i] = zero;
  }
  team.sync();
  Real* const w = vectors.update;
  const Real* const product = vectors.product;
  Real inverse_half = zero;
  bool has_rested = false;  // true while w is that of an earlier step
  int rest_count = 0;
  for (int k = 0; k < n; ++k) {
    const bool is_odd = (k - rest_count) % 2 != 0;
    Real* const u = is_odd ? vectors.reflector[1] : vectors.reflector[0];
    const Real* const v = is_odd ? vectors.reflector[0] : vectors.reflector[1];
    Real correction = zero;
    if (!has_rested) {
      const Real dot =
          team.sum(sum_strided<Real>(k + lane, n, lanes, [=](int i) { return product[i] * v[i]; }));
      correction = Number::fill(0.5) * inverse_half * inverse_half * dot;
    }
    const auto update = [=](int i) {
      return has_rested ? w[i] : inverse_half * product[i] - correction * v[i];
    };
    const Real v_k = v[k];
    const Real w_k = update(k);
    const Real pivot = matrix.pivot(k, k) - (v_k * w_k + w_k * v_k);
    if (team.leads()) diagonal[k] = pivot;
    if (k == n - 1) break;

    // The first entry of the column is computed once: the reflector is orthogonal only if its norm,
    // its sign and its entries agree bit for bit, which a second copy of the sum, contracted to
    // other fused operations, would not do where it cancels.
    const Real w_next = update(k + 1);
    const Real first = matrix.pivot(k + 1, k) - (v[k + 1] * w_k + w_next * v_k);
    const Real rest =
        team.sum(sum_strided<Real>(k + 2 + lane, n, lanes, [=, &matrix, &team](int i) {
          const Real w_i = update(i);
          const Real x_i = matrix.pivot(i, k) - (v[i] * w_k + w_i * v_k);
          if (team.owns(i)) {
            if (!has_rested) w[i] = w_i;
            u[i] = x_i;
          }
          return x_i * x_i;
        }));
    const auto is_live = rest > Number::fill(Number::negligible_square);
    const bool rests = Matrix::may_rest && !Number::any(is_live);
    // The first tile of a sweep also holds rows that are reduced already: zeros keep them out of
    // the products.
    for (int i = tile_start(k + 1) + lane; i <= k; i += lanes) {
      if (team.owns(i)) u[i] = zero;
    }
    if (lane == 0 && team.owns(k + 1) && !has_rested) w[k + 1] = w_next;
    if (rests) {
      if (team.leads()) off_diagonal[k] = first;
      has_rested = true;
      ++rest_count;
      team.sync();
      continue;
    }

    // u = x / |x| + sign(x_0) e_0 has entries of order one, whatever the size of x.
    const Real norm = Number::square_root(is_live ? rest + first * first : one);
    const Real inverse_norm = is_live ? one / norm : zero;
    const Real sign = is_live ? (first < zero ? -one : one) : zero;
    inverse_half = is_live ? one / (one + absolute(first) * inverse_norm) : zero;
    if (team.leads()) off_diagonal[k] = is_live ? -sign * norm : first;
    for (int i = k + 2 + lane; i < n; i += lanes) {
      if (team.owns(i)) u[i] *= inverse_norm;
    }
    if (lane == 0 && team.owns(k + 1)) u[k + 1] = first * inverse_norm + sign;
    team.sync();
    matrix.sweep(team, k, n, v, w, u, vectors.product);
    has_rested = false;
  }
  team.sync();
}

// Finds an interval that holds every eigenvalue (Gershgorin). Replaces the off-diagonals by their
// squares, and raises these from zero so that a Sturm count never divides zero by zero.
template <class Real, class Team>
FASTCOV_INLINE void bound_eigenvalues(Team& team, const Real* diagonal, Real* off_diagonal, int n,
                                      Real& lower, Real& upper) {
  using Number = Numeric<Real>;
  Real top = diagonal[0];
  Real bottom = -diagonal[0];
  for (int i = team.lane(); i < n; i += team.lanes()) {
    const Real before = i > 0 ? absolute(off_diagonal[i - 1]) : Number::fill(0);
    const Real after = i < n - 1 ? absolute(off_diagonal[i]) : Number::fill(0);
    top = larger(top, diagonal[i] + (before + after));
    bottom = larger(bottom, (before + after) - diagonal[i]);
  }
  upper = team.maximum(top);
  lower = -team.maximum(bottom);
  team.sync();
  for (int i = team.rank(); i < n - 1; i += team.size()) {
    off_diagonal[i] = larger(off_diagonal[i] * off_diagonal[i], Number::fill(Number::least_square));
  }
  team.sync();
}

// Counts the eigenvalues below x, which are as many as the negative pivots of T - x I (Sturm). A
// pivot of zero makes the next one an infinity of the right sign, so that no guard is needed.
template <class Real>
FASTCOV_INLINE typename Numeric<Real>::Count count_below(const Real* diagonal, const Real* square,
                                                         int n, Real x) {
  using Number = Numeric<Real>;
  Real pivot = diagonal[0] - x;
  typename Number::Count below = Number::is_negative(pivot);
  for (int i = 1; i < n; ++i) {
    pivot = (diagonal[i] - x) - Number::ratio(square[i - 1], pivot);
    below += Number::is_negative(pivot);
  }
  return below;
}

// Finds all eigenvalues by bisection and hands them to write(k, value), k in ascending order. Each
// lane of each member takes one eigenvalue at a time. Before that the lanes of a team share out
// Sturm counts at size() evenly spaced points, which saves every eigenvalue the first log2(size())
// halvings.
template <class Real, class Team, class Write>
FASTCOV_INLINE void bisect(Team& team, const Real* diagonal, const Real* square, int n, Real lower,
                           Real upper, int* counts, const Write& write) {
  using Number = Numeric<Real>;
  const int sections = team.size();
  const Real section = (upper - lower) / static_cast<Real>(sections);
  int halvings = Number::digits + 1;
  for (int s = sections; s > 1; s /= 2) --halvings;
  if (sections > 1) {
    counts[team.rank()] =
        count_below(diagonal, square, n, lower + section * static_cast<Real>(team.rank()));
    team.sync();
  }
  const int step = team.size() * team.members();
  for (int k = team.member() * team.size() + team.rank(); k < n; k += step) {
    int first = 0;
    int last = sections;
    while (last - first > 1) {
      const int middle = (first + last) / 2;
      (counts[middle] <= k ? first : last) = middle;
    }
    Real low = lower + section * static_cast<Real>(first);
    Real high = last == sections ? upper : lower + section * static_cast<Real>(last);
    for (int halving = 0; halving < halvings; ++halving) {
      const Real middle = low + (high - low) * Number::fill(0.5);
      const bool is_low = count_below(diagonal, square, n, middle) <= k;
      low = is_low ? middle : low;
      high = is_low ? high : middle;
    }
    write(k, low + (high - low) * Number::fill(0.5));
  }
}

// Bound on the error of an eigenvalue that comes from the reduction of a matrix of this Frobenius
// norm, in double, and from Sturm counts of its tridiagonal form. It is proved, not measured. A
// step is exact for a matrix that differs from the true one by at most (16 m + 103) u times the
// norm, where sums have m terms, added in any order: 8 m come from products with the reflector, 4 m
// each from their sum and from the reflector's norm. Summed over m = n - 1, n - 2, ... that is 8
// n^2 u. A reduction in two stages errs less, because its sums run over tiles. In float32 the bound
// would be too wide to be of use, so counts are taken in double.
FASTCOV_INLINE double reduction_error(int n, double norm) {
  return 8.0 * n * (n + 16.0) * 0x1p-53 * norm;
}

// reduction_error() from the tridiagonal form, whose norm is the matrix's own because reflectors
// keep it, plus what else moves an eigenvalue: columns that were dropped as negligible (n of them,
// and n^2 / 64 more in the bulges of two stages), off-diagonals that were raised from zero, and the
// rounding of a threshold less the shift.
FASTCOV_INLINE double count_error(const double* diagonal, const double* square, int n,
                                  double shift) {
  double sum = diagonal[0] * diagonal[0];
  for (int i = 1; i < n; ++i) sum += diagonal[i] * diagonal[i] + 2 * square[i - 1];
  const double norm = Numeric<double>::square_root(sum);
  const double dropped = 2 * Numeric<double>::square_root(Numeric<double>::negligible_square);
  const double raised = 4 * Numeric<double>::square_root(Numeric<double>::least_square);
  return reduction_error(n, norm) + n * (1 + n / 64.0) * dropped + raised +
         0x1p-51 * absolute(shift);
}

// Bounds the number of eigenvalues above tau: an eigenvalue within `error` of tau may lie on either
// side. A NaN in tau gives (0, n), because it compares false.
FASTCOV_INLINE void count_above(const double* diagonal, const double* square, int n, double error,
                                double tau, int& low, int& high) {
  low = tau == tau ? n - count_below(diagonal, square, n, tau + error) : 0;
  high = tau == tau ? n - count_below(diagonal, square, n, tau - error) : n;
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
