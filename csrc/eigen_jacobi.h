// Eigenvectors of small symmetric matrices over a Team, by cyclic Jacobi rotations. All pairs of a
// round are disjoint, and are rotated at once (the round-robin order of Brent and Luk).
#pragma once

#include "eigen_numeric.h"
#include "team.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

// Memory that a team shares. Entry (i, j) of the matrix, i >= j, is matrix[i (i + 1) / 2 + j].
template <class Real>
struct JacobiSpace {
  Real* matrix;
  Real* vectors;  // eigenvector k is row k: [n][vector_stride]
  int vector_stride;
  // Both [(n + 1) / 2]. A rotation is applied as p - s (q + tau p) and q + s (p - tau q), with tau
  // = s / (1 + c). The added term is proportional to the angle, so that the rounding of many small
  // rotations does not pile up.
  Real* sine;
  Real* tau;
};

FASTCOV_INLINE constexpr int triangle_index(int i, int j) { return i * (i + 1) / 2 + j; }

// Pair number t of a round, p < q. Where the order is odd, one pair of each round has q = n: its
// index p rests in this round.
struct JacobiPair {
  int p;
  int q;

  FASTCOV_INLINE JacobiPair(int round, int t, int n) {
    const int seats = n + n % 2 - 1;  // all indices but the last move around a table
    int a = round;
    int b = seats;
    if (t > 0) {
      a = round + t < seats ? round + t : round + t - seats;
      b = round < t ? round - t + seats : round - t;
    }
    p = a < b ? a : b;
    q = a < b ? b : a;
  }
};

template <class Real>
FASTCOV_INLINE void rotate(Real& p, Real& q, Real sine, Real tau) {
  const Real old_p = p;
  const Real old_q = q;
  p = old_p - sine * (old_q + tau * old_p);
  q = old_q + sine * (old_p - tau * old_q);
}

// Rotates the entries in which the rows of one pair cross the columns of another. An index that
// rests has no partner: entries in its partner's place do not exist.
template <class Real>
FASTCOV_INLINE void rotate_crossing(Real* matrix, const JacobiPair& first, const JacobiPair& second,
                                    int n, Real sine1, Real tau1, Real sine2, Real tau2) {
  const auto at = [matrix](int i, int j) -> Real& {
    return matrix[i > j ? triangle_index(i, j) : triangle_index(j, i)];
  };
  if (first.q < n && second.q < n) {
    Real& a00 = at(first.p, second.p);
    Real& a01 = at(first.p, second.q);
    Real& a10 = at(first.q, second.p);
    Real& a11 = at(first.q, second.q);
    Real b00 = a00, b01 = a01, b10 = a10, b11 = a11;
    rotate(b00, b01, sine2, tau2);
    rotate(b10, b11, sine2, tau2);
    rotate(b00, b10, sine1, tau1);
    rotate(b01, b11, sine1, tau1);
    a00 = b00;
    a01 = b01;
    a10 = b10;
    a11 = b11;
  } else if (first.q < n) {
    rotate(at(first.p, second.p), at(first.q, second.p), sine1, tau1);
  } else {
    rotate(at(first.p, second.p), at(first.p, second.q), sine2, tau2);
  }
}

// Diagonalises the matrix, which must have a largest entry of about 1 and may just have been
// written by the lanes. Sweeps end when no entry off the diagonal is above `negligible`, or when
// there have been `sweeps` of them. is_anywhere(mask) says whether a condition holds for any lane
// of the team or any matrix of a pack.
template <class Real, class Team, class IsAnywhere>
FASTCOV_INLINE void jacobi(Team& team, const JacobiSpace<Real>& space, int n, Real negligible,
                           int sweeps, const IsAnywhere& is_anywhere) {
  using Number = Numeric<Real>;
  const Real zero = Number::fill(0);
  const Real one = Number::fill(1);
  const int pairs = (n + 1) / 2;
  const int rounds = n + n % 2 - 1;
  for (int k = team.squad(); k < n; k += team.squads()) {
    for (int i = team.lane(); i < n; i += team.lanes()) {
      space.vectors[k * space.vector_stride + i] = i == k ? one : zero;
    }
  }
  team.sync();
  for (int sweep = 0; sweep < sweeps; ++sweep) {
    auto has_rotated = zero > one;
    for (int round = 0; round < rounds; ++round) {
      for (int t = team.rank(); t < pairs; t += team.size()) {
        const JacobiPair pair(round, t, n);
        Real sine = zero;
        Real tau = zero;
        if (pair.q < n) {
          Real* const matrix = space.matrix;
          const Real app = matrix[triangle_index(pair.p, pair.p)];
          const Real aqq = matrix[triangle_index(pair.q, pair.q)];
          const Real apq = matrix[triangle_index(pair.q, pair.p)];
          const auto is_live = absolute(apq) > negligible;
          const Real safe = is_live ? apq : one;
          const Real half = Number::fill(0.5) * (aqq - app) / safe;
          const Real length = absolute(half) + Number::square_root(half * half + one);
          const Real tangent = (half < zero ? -one : one) / length;
          const Real cosine = one / Number::square_root(tangent * tangent + one);
          sine = is_live ? tangent * cosine : zero;
          tau = sine / (one + cosine);
          has_rotated = has_rotated | is_live;
          matrix[triangle_index(pair.p, pair.p)] = is_live ? app - tangent * apq : app;
          matrix[triangle_index(pair.q, pair.q)] = is_live ? aqq + tangent * apq : aqq;
          matrix[triangle_index(pair.q, pair.p)] = is_live ? zero : apq;
        }
        space.sine[t] = sine;
        space.tau[t] = tau;
      }
      team.sync();
      for (int t = team.squad(); t < pairs; t += team.squads()) {
        const JacobiPair first(round, t, n);
        const Real sine = space.sine[t];
        const Real tau = space.tau[t];
        for (int other = t + 1 + team.lane(); other < pairs; other += team.lanes()) {
          const JacobiPair second(round, other, n);
          rotate_crossing(space.matrix, first, second, n, sine, tau, space.sine[other],
                          space.tau[other]);
        }
        if (first.q >= n) continue;
        Real* const row_p = space.vectors + first.p * space.vector_stride;
        Real* const row_q = space.vectors + first.q * space.vector_stride;
        for (int i = team.lane(); i < n; i += team.lanes()) {
          rotate(row_p[i], row_q[i], sine, tau);
        }
      }
      team.sync();
    }
    if (!is_anywhere(has_rotated)) break;
  }
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
