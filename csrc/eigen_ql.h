// Eigenvalues of tridiagonal matrices on the host by the rational QL iteration of Pal, Walker and
// Kahan (LAPACK's sterf), in double. It takes one matrix, or many of one order with all lanes in
// step.
//
// An eigenvalue takes about two sweeps here, and fifty Sturm counts by bisection. Lanes that have
// converged at an entry sweep along until the last one has; the shift leaves their eigenvalues as
// they are.
#pragma once

#include "eigen_lanes.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

// An off-diagonal of at most this share of the largest entry counts as zero, for matrices reduced
// in T. A smaller share than the rounding that made it would never be reached between equal
// eigenvalues.
template <class T>
constexpr double kTolerance = sizeof(T) == 4 ? 0x1p-28 : 0x1p-51;
// Most sweeps for each eigenvalue, on average over a matrix. Three are usual.
constexpr int kSweeps = 30;

// Replaces `diagonal` by the eigenvalues, in no order, and overwrites the squares of the
// off-diagonals in `square`. [n][Packs] each. Off-diagonals of at most `tolerance` times the
// largest entry count as zero. Returns false, and leaves nothing usable, if a lane has not
// converged after `limit` sweeps.
template <class V, int Packs>
FASTCOV_INLINE bool rational_ql(V* diagonal, V* square, int n, double tolerance, int limit) {
  using Number = Numeric<V>;
  const V zero = {};
  const V one = Number::fill(1);
  V negligible[Packs], least[Packs];
  for (int p = 0; p < Packs; ++p) {
    V size = zero;
    for (int i = 0; i < n; ++i) {
      const V magnitude = absolute(diagonal[i * Packs + p]);
      size = larger(size, magnitude * magnitude);
      if (i < n - 1) size = larger(size, square[i * Packs + p]);
    }
    // A matrix of zeros has converged.
    size = size > zero ? size : one;
    negligible[p] = size * (tolerance * tolerance);
    least[p] = size * 1e-36;
    for (int i = 0; i < n - 1; ++i) {
      square[i * Packs + p] = larger(square[i * Packs + p], least[p]);
    }
  }
  // First entry from `top` on whose off-diagonal counts as zero in every lane. A sweep ends there,
  // which spares a matrix of low rank most of its work.
  const auto block_end = [&](int top) {
    for (int i = top; i < n - 1; ++i) {
      bool is_split = true;
      for (int p = 0; p < Packs; ++p) {
        is_split = is_split && all_of(square[i * Packs + p] <= negligible[p]);
      }
      if (is_split) return i;
    }
    return n - 1;
  };
  int sweeps = 0;
  for (int top = 0; top < n - 1; ++top) {
    for (int bottom = block_end(top); bottom > top; bottom = block_end(top)) {
      if (++sweeps > limit) return false;

      V shift[Packs], gamma[Packs], power[Packs], cosine[Packs], sine[Packs];
      for (int p = 0; p < Packs; ++p) {
        const V root = Number::square_root(square[top * Packs + p]);
        const V first = diagonal[top * Packs + p];
        const V slope = (diagonal[(top + 1) * Packs + p] - first) / (root + root);
        const V length = Number::square_root(slope * slope + one);
        shift[p] = first - root / (slope < zero ? slope - length : slope + length);
        gamma[p] = diagonal[bottom * Packs + p] - shift[p];
        power[p] = gamma[p] * gamma[p];
        cosine[p] = one;
        sine[p] = zero;
      }
      for (int i = bottom - 1; i >= top; --i) {
        FASTCOV_UNROLL
        for (int p = 0; p < Packs; ++p) {
          const V below = square[i * Packs + p];
          const V sum = power[p] + below;
          // power may be zero. The quotient of the next step then has a limit, which is used
          // instead.
          const auto is_small = power[p] < Number::fill(1e-150);
          const V guarded = is_small ? one : power[p];
          const V old_cosine = cosine[p];
          const V old_gamma = gamma[p];
          if (i < bottom - 1) square[(i + 1) * Packs + p] = larger(sine[p] * sum, least[p]);
          const V alpha = diagonal[i * Packs + p];
          V quotient;
          if constexpr (Number::is_scalar) {
            // A single matrix waits for every step, so two divisions overlap.
            const V inverse_sum = one / sum;
            quotient = sum / guarded;
            cosine[p] = power[p] * inverse_sum;
            sine[p] = below * inverse_sum;
          } else {
            // Matrices side by side keep the divider busy, so one division serves both quotients.
            const V inverse = one / (guarded * sum);
            quotient = sum * (sum * inverse);
            cosine[p] = power[p] * (guarded * inverse);
            sine[p] = below * (guarded * inverse);
          }
          gamma[p] = cosine[p] * (alpha - shift[p]) - sine[p] * old_gamma;
          diagonal[(i + 1) * Packs + p] = old_gamma + (alpha - gamma[p]);
          power[p] = is_small ? old_cosine * below : gamma[p] * gamma[p] * quotient;
        }
      }
      for (int p = 0; p < Packs; ++p) {
        square[top * Packs + p] = larger(sine[p] * power[p], least[p]);
        diagonal[top * Packs + p] = shift[p] + gamma[p];
      }
    }
  }
  return true;
}

// Sorts each lane in ascending order, by Batcher's merge exchange (Knuth, volume 3, algorithm
// 5.2.2M).
template <class V, int Packs>
FASTCOV_INLINE void sort_lanes(V* values, int n) {
  int top = 1;
  while (top < n) top *= 2;
  for (int p = top / 2; p > 0; p /= 2) {
    int q = top / 2;
    int r = 0;
    int d = p;
    while (true) {
      for (int i = 0; i < n - d; ++i) {
        if ((i & p) != r) continue;
        for (int pack = 0; pack < Packs; ++pack) {
          const V a = values[i * Packs + pack];
          const V b = values[(i + d) * Packs + pack];
          values[i * Packs + pack] = a < b ? a : b;
          values[(i + d) * Packs + pack] = a < b ? b : a;
        }
      }
      if (q == p) break;
      d = q - p;
      q /= 2;
      r = p;
    }
  }
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
