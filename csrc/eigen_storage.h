// Storages of a matrix that is being reduced. Each of them can be the Matrix of tridiagonalize() in
// eigen.h.
#pragma once

#include "eigen_numeric.h"
#include "team.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

// Lower triangle by columns, one after the other, in memory that the team shares. Squads take tiles
// of four columns in turn, and lanes take rows. Each squad sums products in a row of its own.
template <class Real, class Team>
struct ColumnTriangle {
  static constexpr bool may_rest = true;
  Real* data;
  int n;
  int product_stride;  // from one squad's row of products to the next

  FASTCOV_INLINE Real* column(int j) const {  // entry (i, j) is column(j)[i]
    return data + static_cast<int64_t>(j) * (2 * n - j - 1) / 2;
  }
  static FASTCOV_INLINE constexpr int64_t elements(int n) {
    return static_cast<int64_t>(n) * (n + 1) / 2;
  }
  FASTCOV_INLINE Real pivot(int i, int k) const { return column(k)[i]; }

  FASTCOV_INLINE void sweep(Team& team, int k, int order, const Real* v, const Real* w,
                            const Real* u, Real* product) {
    const int lane = team.lane();
    const int lanes = team.lanes();
    const int start = tile_start(k + 1);
    const Real zero = Numeric<Real>::fill(0);
    Real* const partial = product + team.squad() * product_stride;
    for (int i = start + lane; i < padded(order); i += lanes) partial[i] = zero;
    team.squad_sync();
    for (int tile = start + 4 * team.squad(); tile < order; tile += 4 * team.squads()) {
      Real v_j[4], w_j[4], u_j[4], sums[4];
      Real* a[4];
      FASTCOV_UNROLL
      for (int c = 0; c < 4; ++c) {
        v_j[c] = v[tile + c];
        w_j[c] = w[tile + c];
        u_j[c] = u[tile + c];
        sums[c] = zero;
        a[c] = column(tile + c < order ? tile + c : order - 1);
      }
      for (int i = tile + lane; i < tile + 4 && i < order; i += lanes) {
        Real row = partial[i];
        FASTCOV_UNROLL
        for (int c = 0; c < 4; ++c) {
          if (tile + c > i) continue;
          const Real entry = a[c][i] - (v[i] * w_j[c] + w[i] * v_j[c]);
          a[c][i] = entry;
          row += entry * u_j[c];
          if (tile + c < i) sums[c] += entry * u[i];
        }
        partial[i] = row;
      }
      sweep_rows(tile + 4 + lane, order, lanes, a, v, w, u, v_j, w_j, u_j, sums, partial);
      team.squad_sync();
      // No later tile adds to these rows, so that no squad has to wait for them before the end.
      team.add_sums(sums, partial + tile, order - tile);
    }
    team.sync();
    if (team.squads() > 1) {
      for (int i = start + team.rank(); i < order; i += team.size()) {
        Real sum = product[i];
        for (int s = 1; s < team.squads(); ++s) sum += product[s * product_stride + i];
        product[i] = sum;
      }
      team.sync();
    }
  }

 private:
  // Rows below the tile. Four columns are worked on at once, so that v, w, u and the product are
  // loaded once for all four.
  static FASTCOV_INLINE void sweep_rows(int from, int order, int lanes, Real* const (&a)[4],
                                        const Real* v, const Real* w, const Real* u,
                                        const Real (&v_j)[4], const Real (&w_j)[4],
                                        const Real (&u_j)[4], Real (&sums)[4], Real* partial) {
    Real s0 = sums[0], s1 = sums[1], s2 = sums[2], s3 = sums[3];
    const auto row = [=](int i, Real& t0, Real& t1, Real& t2, Real& t3) {
      const Real v_i = v[i], w_i = w[i], u_i = u[i];
      const Real e0 = a[0][i] - (v_i * w_j[0] + w_i * v_j[0]);
      const Real e1 = a[1][i] - (v_i * w_j[1] + w_i * v_j[1]);
      const Real e2 = a[2][i] - (v_i * w_j[2] + w_i * v_j[2]);
      const Real e3 = a[3][i] - (v_i * w_j[3] + w_i * v_j[3]);
      a[0][i] = e0;
      a[1][i] = e1;
      a[2][i] = e2;
      a[3][i] = e3;
      t0 += e0 * u_i;
      t1 += e1 * u_i;
      t2 += e2 * u_i;
      t3 += e3 * u_i;
      partial[i] += (e0 * u_j[0] + e1 * u_j[1]) + (e2 * u_j[2] + e3 * u_j[3]);
    };
    int i = from;
#if !defined(__CUDACC__)
    if constexpr (Numeric<Real>::is_scalar) {
      if (lanes == 1) {
        FASTCOV_SIMD(reduction(+ : s0, s1, s2, s3))
        for (int j = from; j < order; ++j) row(j, s0, s1, s2, s3);
        i = order;
      }
    }
#endif
    for (; i < order; i += lanes) row(i, s0, s1, s2, s3);
    sums[0] = s0;
    sums[1] = s1;
    sums[2] = s2;
    sums[3] = s3;
  }
};

// Row i in the registers of lane i, for an order of at most Order. No entry is shared, and all
// lanes read the same entry of a step's vectors at the same time. Indices of `entry` must be
// constants, or the compiler would move it to memory.
template <class Real, int Order, class Team>
struct RegisterRows {
  static constexpr bool may_rest = false;  // a sweep also finds the next pivot column
  Real entry[Order];
  Real* pivot_column;  // shared by the team: the column that is reduced next

  FASTCOV_INLINE Real pivot(int i, int) const { return pivot_column[i]; }

  FASTCOV_INLINE void sweep(Team& team, int k, int n, const Real* v, const Real* w, const Real* u,
                            Real* product) {
    const int i = team.rank();
    const Real v_i = v[i];
    const Real w_i = w[i];
    Real sum = Numeric<Real>::fill(0);
    Real next = sum;
    FASTCOV_UNROLL
    for (int tile = 0; tile < Order; tile += 4) {
      if (tile + 3 <= k || tile >= n) continue;
      FASTCOV_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int j = tile + c;
        entry[j] -= v_i * w[j] + w_i * v[j];
        sum += entry[j] * u[j];
        next = j == k + 1 ? entry[j] : next;
      }
    }
    product[i] = sum;
    pivot_column[i] = next;
    team.sync();
  }
};

// Whole rows, dealt to the members in turn: member m holds rows m, m + members, and so on. Its last
// rows, which the reduction needs longest, lie in shared memory (`near`), the others in global
// memory (`far`). In each step members publish their products and the next pivot row, and wait for
// each other once.
template <class Real, class Team>
struct MemberRows {
  static constexpr bool may_rest = false;  // a sweep also finds the next pivot row
  Real* far;
  Real* near;
  int far_rows;
  Real* published[2];  // [2][stride] each, used in turn so that one exchange a step is enough
  int stride;
  Real* pivot_row;  // copy of this member

  static FASTCOV_INLINE int rows_before(int i, int member, int members) {
    return i <= member ? 0 : (i - member + members - 1) / members;
  }
  FASTCOV_INLINE Real* row(int r, int n) const {
    return r < far_rows ? far + static_cast<int64_t>(r) * n
                        : near + static_cast<int64_t>(r - far_rows) * n;
  }
  FASTCOV_INLINE Real pivot(int i, int) const { return pivot_row[i]; }

  FASTCOV_INLINE void sweep(Team& team, int k, int n, const Real* v, const Real* w, const Real* u,
                            Real* product) {
    const int members = team.members();
    const int rows = rows_before(n, team.member(), members);
    const int first = rows_before(k + 1, team.member(), members);
    Real* const product_out = k % 2 ? published[1] : published[0];
    Real* const pivot_out = product_out + stride;
    for (int r = first + 4 * team.row_squad(); r < rows; r += 4 * team.row_squads()) {
      const int count = rows - r < 4 ? rows - r : 4;
      Real v_i[4], w_i[4], sums[4];
      Real *a[4], *targets[4];
      FASTCOV_UNROLL
      for (int c = 0; c < 4; ++c) {
        const int i = (c < count ? r + c : r) * members + team.member();
        a[c] = row(c < count ? r + c : r, n);
        targets[c] = c < count ? product_out + i : nullptr;
        v_i[c] = v[i];
        w_i[c] = w[i];
        sums[c] = Numeric<Real>::fill(0);
      }
      for (int j = k + 1 + team.row_lane(); j < n; j += team.row_lanes()) {
        const Real v_j = v[j], w_j = w[j], u_j = u[j];
        FASTCOV_UNROLL
        for (int c = 0; c < 4; ++c) {
          if (c >= count) continue;
          const Real entry = a[c][j] - (v_i[c] * w_j + w_i[c] * v_j);
          a[c][j] = entry;
          sums[c] += entry * u_j;
        }
      }
      team.store_sums(sums, targets);
      if (r * members + team.member() == k + 1) {
        for (int j = k + 1 + team.row_lane(); j < n; j += team.row_lanes()) pivot_out[j] = a[0][j];
      }
    }
    gather(team, k, n, product);
  }

  // Publishes an entry of row 0 for the gather before the first step, which counts as that of step
  // -1.
  FASTCOV_INLINE void publish_first(int j, Real entry) const { published[1][stride + j] = entry; }

  // Waits for all members, and copies the values that they have published.
  FASTCOV_INLINE void gather(Team& team, int k, int n, Real* product) {
    const Real* const product_in = k % 2 ? published[1] : published[0];
    const Real* const pivot_in = product_in + stride;
    team.exchange();
    for (int j = k + 1 + team.lane(); j < n; j += team.lanes()) {
      product[j] = load_published(product_in + j);
      pivot_row[j] = load_published(pivot_in + j);
    }
    team.sync();
  }
};

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
