// Eigenvectors of one small symmetric matrix on the host: Householder reduction, then the implicit
// QL iteration (Bowdler, Martin, Reinsch and Wilkinson 1968), all in double.
//
// Rotations of the basis run in vectors. The rest of the time goes to the chain of scalars that
// finds the angles, which would take as long in float.
#pragma once

#include "eigen_lanes.h"
#include "eigen_ql.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

// Scratch memory for a matrix of order n. Rows have `stride` doubles, and those beyond n are zero.
struct VectorSpace {
  static constexpr int lanes = kVectorBytes / static_cast<int>(sizeof(double));
  using Doubles = Pack<double, lanes>;

  int n;
  int stride;
  double* matrix;  // [n][stride], symmetric; once reduced, row k holds the reflector of step k
  double* basis;   // [n][stride]; row k becomes eigenvector k
  double* diagonal;
  double* off_diagonal;
  double* sine;    // sines of a sweep's rotations; in the reduction, the product of a step
  double* cosine;  // cosines of a sweep's rotations; in the reduction, the update of a step
  double* inverse_half;

  static constexpr int stride_of(int n) { return (n + lanes - 1) / lanes * lanes; }
  static constexpr int64_t bytes(int n) {
    return (2 * int64_t{n} + 5) * stride_of(n) * static_cast<int64_t>(sizeof(double));
  }
  VectorSpace(void* scratch, int n) : n(n), stride(stride_of(n)) {
    matrix = static_cast<double*>(scratch);
    basis = matrix + int64_t{n} * stride;
    diagonal = basis + int64_t{n} * stride;
    off_diagonal = diagonal + stride;
    sine = off_diagonal + stride;
    cosine = sine + stride;
    inverse_half = cosine + stride;
  }
};

FASTCOV_INLINE VectorSpace::Doubles& doubles_at(double* address) {
  return *reinterpret_cast<VectorSpace::Doubles*>(address);
}

FASTCOV_INLINE double row_dot(double* a, double* b, int from, int stride) {
  VectorSpace::Doubles sums = {};
  for (int i = from; i < stride; i += VectorSpace::lanes)
    sums += doubles_at(a + i) * doubles_at(b + i);
  double sum = 0;
  for (int lane = 0; lane < VectorSpace::lanes; ++lane) sum += sums[lane];
  return sum;
}

// Reduces the matrix to tridiagonal form, and fills the basis with the rows that it is tridiagonal
// in.
FASTCOV_INLINE void reduce_with_basis(const VectorSpace& space) {
  using Doubles = VectorSpace::Doubles;
  constexpr int lanes = VectorSpace::lanes;
  const int n = space.n;
  const int stride = space.stride;
  double* const product = space.sine;
  double* const update = space.cosine;
  for (int k = 0; k < n - 1; ++k) {
    double* const u = space.matrix + int64_t{k} * stride;  // row k is column k, by symmetry
    space.diagonal[k] = u[k];
    for (int i = 0; i <= k; ++i) u[i] = 0;
    const int from = (k + 1) / lanes * lanes;
    const double first = u[k + 1];
    u[k + 1] = 0;
    const double rest = row_dot(u, u, from, stride);
    space.inverse_half[k] = 0;
    space.off_diagonal[k] = first;
    if (!(rest > Numeric<double>::negligible_square)) continue;
    // As in eigen.h: u = x / |x| + sign(x_0) e_0.
    const double norm = Numeric<double>::square_root(rest + first * first);
    const double inverse_norm = 1 / norm;
    const double sign = first < 0 ? -1.0 : 1.0;
    const double inverse_half = 1 / (1 + absolute(first) * inverse_norm);
    space.inverse_half[k] = inverse_half;
    space.off_diagonal[k] = -sign * norm;
    for (int i = from; i < stride; i += lanes) doubles_at(u + i) *= inverse_norm;
    u[k + 1] = first * inverse_norm + sign;
    for (int i = from; i < k + 1; ++i) product[i] = 0;
    for (int i = k + 1; i < n; ++i) {
      product[i] = inverse_half * row_dot(space.matrix + int64_t{i} * stride, u, from, stride);
    }
    for (int i = n; i < stride; ++i) product[i] = 0;
    const double half = 0.5 * inverse_half * row_dot(product, u, from, stride);
    for (int i = from; i < stride; i += lanes) {
      doubles_at(update + i) = doubles_at(product + i) - half * doubles_at(u + i);
    }
    for (int i = k + 1; i < n; ++i) {
      double* const row = space.matrix + int64_t{i} * stride;
      const double u_i = u[i];
      const double w_i = update[i];
      for (int j = from; j < stride; j += lanes) {
        doubles_at(row + j) -= u_i * doubles_at(update + j) + w_i * doubles_at(u + j);
      }
    }
  }
  space.diagonal[n - 1] = space.matrix[int64_t{n - 1} * stride + n - 1];

  for (int i = 0; i < n; ++i) {
    double* const row = space.basis + int64_t{i} * stride;
    for (int j = 0; j < stride; j += lanes) doubles_at(row + j) = Doubles{};
    row[i] = 1;
  }
  for (int k = n - 2; k >= 0; --k) {
    if (space.inverse_half[k] == 0) continue;
    double* const u = space.matrix + int64_t{k} * stride;
    const int from = (k + 1) / lanes * lanes;
    for (int i = k + 1; i < n; ++i) {
      double* const row = space.basis + int64_t{i} * stride;
      const double along = space.inverse_half[k] * row_dot(row, u, from, stride);
      for (int j = from; j < stride; j += lanes) doubles_at(row + j) -= along * doubles_at(u + j);
    }
  }
}

// Turns the diagonal into eigenvalues, in no order, and the rows of the basis into their
// eigenvectors. Off-diagonals of at most `tolerance` count as zero. Returns false if it has not
// converged after `limit` sweeps.
FASTCOV_INLINE bool implicit_ql(const VectorSpace& space, double tolerance, int limit) {
  using Doubles = VectorSpace::Doubles;
  const int n = space.n;
  double* const d = space.diagonal;
  double* const e = space.off_diagonal;
  int sweeps = 0;
  for (int top = 0; top < n; ++top) {
    while (true) {
      int bottom = top;
      while (bottom < n - 1 && absolute(e[bottom]) > tolerance) ++bottom;
      if (bottom == top) break;
      if (++sweeps > limit) return false;
      const double slope = (d[top + 1] - d[top]) / (2 * e[top]);
      const double length = Numeric<double>::square_root(slope * slope + 1);
      double g = d[bottom] - d[top] + e[top] / (slope < 0 ? slope - length : slope + length);
      double sine = 1;
      double cosine = 1;
      double shift = 0;
      for (int i = bottom - 1; i >= top; --i) {
        const double f = sine * e[i];
        const double b = cosine * e[i];
        const double square = f * f + g * g;
        double root = Numeric<double>::square_root(square);
        if (square < 1e-280) {  // the square has lost digits that f and g still have
          const double f_up = f * 0x1p500;
          const double g_up = g * 0x1p500;
          root = Numeric<double>::square_root(f_up * f_up + g_up * g_up) * 0x1p-500;
        }
        sine = root > 0 ? f / root : 0;
        cosine = root > 0 ? g / root : 1;
        if (i < bottom - 1) e[i + 1] = root;
        const double alpha = d[i + 1] - shift;
        const double change = (d[i] - alpha) * sine + 2 * cosine * b;
        shift = sine * change;
        d[i + 1] = alpha + shift;
        g = cosine * change - b;
        space.sine[i] = sine;
        space.cosine[i] = cosine;
      }
      d[top] -= shift;
      e[top] = g;
      for (int column = 0; column < space.stride; column += VectorSpace::lanes) {
        double* const rows = space.basis + column;
        Doubles carried = doubles_at(rows + int64_t{bottom} * space.stride);
        for (int i = bottom - 1; i >= top; --i) {
          const Doubles row = doubles_at(rows + int64_t{i} * space.stride);
          doubles_at(rows + int64_t{i + 1} * space.stride) =
              space.sine[i] * row + space.cosine[i] * carried;
          carried = space.cosine[i] * row - space.sine[i] * carried;
        }
        doubles_at(rows + int64_t{top} * space.stride) = carried;
      }
    }
  }
  return true;
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
