// Runs csrc/eigen.h over host teams: eigen_teams TEAM DTYPE N COUNT < matrices > results
//   matrices: COUNT lower triangles in full [N, N], float64, entries of at most about 1
//   results:  COUNT rows of eigenvalues [N], float64; jacobi adds eigenvectors [N, N], in rows
// TEAM is loop, block, registers, members, jacobi or unsafe (block without its barrier).
#include <cstdio>
#include <cstdlib>
#include <string>
#include <vector>

#include "eigen.h"
#include "eigen_jacobi.h"
#include "eigen_ql.h"
#include "eigen_storage.h"
#include "thread_team.h"

namespace fastcov {
namespace {

template <class Real>
struct Problem {
  int n;
  std::vector<Real> full;  // symmetric [n, n]
  std::vector<double> values;
  std::vector<double> vectors;

  Real at(int i, int j) const { return full[static_cast<size_t>(i) * n + j]; }
};

// Vectors of one block, as in the kernels.
template <class Real>
struct Space {
  std::vector<Real> memory;
  Reflectors<Real> vectors;
  Real* diagonal;
  Real* off_diagonal;
  std::vector<int> counts;

  Space(int n, int squads, int lanes) : counts(static_cast<size_t>(squads * lanes)) {
    const int stride = padded(n) + squads * lanes;
    memory.resize(static_cast<size_t>(stride) * (5 + squads));
    Real* next = memory.data();
    vectors = {{next, next + stride}, next + 2 * stride, next + 5 * stride};
    diagonal = next + 3 * stride;
    off_diagonal = next + 4 * stride;
  }
};

template <class Real, class Team, class Matrix>
void solve(Team& team, Matrix& matrix, Problem<Real>& problem, Space<Real>& space) {
  const int n = problem.n;
  tridiagonalize(team, matrix, n, space.vectors, space.diagonal, space.off_diagonal);
  Real lower, upper;
  bound_eigenvalues(team, space.diagonal, space.off_diagonal, n, lower, upper);
  bisect(team, space.diagonal, space.off_diagonal, n, lower, upper, space.counts.data(),
         [&](int k, Real value) { problem.values[static_cast<size_t>(k)] = value; });
}

template <class Real>
std::vector<Real> triangle_of(const Problem<Real>& problem) {
  std::vector<Real> triangle;
  for (int j = 0; j < problem.n; ++j) {
    for (int i = j; i < problem.n; ++i) triangle.push_back(problem.at(i, j));
  }
  return triangle;
}

template <class Real>
void run_loop(Problem<Real>& problem) {
  std::vector<Real> triangle = triangle_of(problem);
  Space<Real> space(problem.n, 1, 1);
  LoopTeam team;
  ColumnTriangle<Real, LoopTeam> matrix{triangle.data(), problem.n, padded(problem.n)};
  solve(team, matrix, problem, space);
}

template <class Real>
void run_block(Problem<Real>& problem, bool waits) {
  constexpr int squads = 3, lanes = 4;
  std::vector<Real> triangle = triangle_of(problem);
  Space<Real> space(problem.n, squads, lanes);
  const int stride = padded(problem.n) + squads * lanes;
  ThreadShape shape(1, squads, lanes, waits);
  run_threads<ThreadTeam>(shape, [&](ThreadTeam& team) {
    ColumnTriangle<Real, ThreadTeam> matrix{triangle.data(), problem.n, stride};
    solve(team, matrix, problem, space);
  });
}

// A lane for each row, with rows to spare.
template <class Real>
void run_registers(Problem<Real>& problem) {
  constexpr int squads = 4, lanes = 4, order = squads * lanes;
  if (problem.n > order) std::exit(2);
  Space<Real> space(problem.n, squads, lanes);
  std::vector<Real> pivot_column(order);
  ThreadShape shape(1, squads, lanes, true);
  run_threads<ThreadTeam>(shape, [&](ThreadTeam& team) {
    RegisterRows<Real, order, ThreadTeam> matrix;
    for (int j = 0; j < order; ++j) {
      const bool is_inside = j < problem.n && team.rank() < problem.n;
      matrix.entry[j] = is_inside ? problem.at(team.rank(), j) : Real(0);
    }
    matrix.pivot_column = pivot_column.data();
    pivot_column[static_cast<size_t>(team.rank())] = matrix.entry[0];
    solve(team, matrix, problem, space);
  });
}

template <class Real>
void run_members(Problem<Real>& problem) {
  constexpr int members = 3, squads = 2, lanes = 2;
  const int n = problem.n;
  const int stride = padded(n);
  const int rows = (n + members - 1) / members;
  const int far_rows = rows / 2;
  std::vector<Real> published(static_cast<size_t>(4 * stride));
  ThreadShape shape(members, squads, lanes, true);
  std::vector<Space<Real>> spaces;
  std::vector<std::vector<Real>> far, near, pivot_rows;
  for (int m = 0; m < members; ++m) {
    spaces.emplace_back(n, squads, lanes);
    far.emplace_back(static_cast<size_t>(far_rows) * n + 1);
    near.emplace_back(static_cast<size_t>(rows - far_rows) * n + 1);
    pivot_rows.emplace_back(static_cast<size_t>(stride));
  }
  run_threads<MemberThreadTeam>(shape, [&](MemberThreadTeam& team) {
    const auto m = static_cast<size_t>(team.member());
    MemberRows<Real, MemberThreadTeam> matrix{
        far[m].data(), near[m].data(),
        far_rows,      {published.data(), published.data() + 2 * stride},
        stride,        pivot_rows[m].data()};
    const int count = matrix.rows_before(n, team.member(), members);
    for (int r = team.row_squad(); r < count; r += team.row_squads()) {
      const int i = r * members + team.member();
      for (int j = team.row_lane(); j < n; j += team.row_lanes()) {
        matrix.row(r, n)[j] = problem.at(i, j);
        if (i == 0) matrix.publish_first(j, problem.at(i, j));
      }
    }
    Space<Real>& space = spaces[m];
    matrix.gather(team, -1, n, space.vectors.product);
    solve(team, matrix, problem, space);
  });
}

template <class Real>
void run_jacobi(Problem<Real>& problem, int squads, int lanes) {
  const int n = problem.n;
  std::vector<Real> matrix(static_cast<size_t>(n * (n + 1) / 2));
  for (int i = 0; i < n; ++i) {
    for (int j = 0; j <= i; ++j)
      matrix[static_cast<size_t>(triangle_index(i, j))] = problem.at(i, j);
  }
  std::vector<Real> vectors(static_cast<size_t>(n * n)), sine(static_cast<size_t>(n)),
      tau(static_cast<size_t>(n));
  std::vector<int> flags(static_cast<size_t>(squads * lanes));
  const JacobiSpace<Real> space{matrix.data(), vectors.data(), n, sine.data(), tau.data()};
  ThreadShape shape(1, squads, lanes, true);
  run_threads<ThreadTeam>(shape, [&](ThreadTeam& team) {
    const Real left = sizeof(Real) == 4 ? Real(0x1p-26) : Real(0x1p-55);
    jacobi(team, space, n, left, 20, [&](bool has_rotated) {
      flags[static_cast<size_t>(team.rank())] = has_rotated;
      team.sync();
      bool any = false;
      for (const int flag : flags) any |= flag != 0;
      team.sync();
      return any;
    });
  });
  for (int k = 0; k < n; ++k) {
    problem.values[static_cast<size_t>(k)] = matrix[static_cast<size_t>(triangle_index(k, k))];
  }
  problem.vectors.assign(vectors.begin(), vectors.end());
}

template <class Real>
bool run(const std::string& team, int n, int count) {
  std::vector<double> input(static_cast<size_t>(n) * n);
  for (int index = 0; index < count; ++index) {
    if (std::fread(input.data(), sizeof(double), input.size(), stdin) != input.size()) return false;
    Problem<Real> problem{n, std::vector<Real>(input.size()), std::vector<double>(n), {}};
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j <= i; ++j) {
        const auto value = static_cast<Real>(input[static_cast<size_t>(i) * n + j]);
        problem.full[static_cast<size_t>(i) * n + j] = value;
        problem.full[static_cast<size_t>(j) * n + i] = value;
      }
    }
    if (team == "loop") {
      run_loop(problem);
    } else if (team == "block" || team == "unsafe") {
      run_block(problem, team == "block");
    } else if (team == "registers") {
      run_registers(problem);
    } else if (team == "members") {
      run_members(problem);
    } else if (team == "jacobi") {
      run_jacobi(problem, 2, 3);
    } else {
      return false;
    }
    std::fwrite(problem.values.data(), sizeof(double), problem.values.size(), stdout);
    std::fwrite(problem.vectors.data(), sizeof(double), problem.vectors.size(), stdout);
  }
  return true;
}

}  // namespace
}  // namespace fastcov

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const int n = std::atoi(arguments[3]);
  const int matrices = std::atoi(arguments[4]);
  const std::string team = arguments[1];
  const bool is_single = std::string(arguments[2]) == "float32";
  const bool done =
      is_single ? fastcov::run<float>(team, n, matrices) : fastcov::run<double>(team, n, matrices);
  return done ? 0 : 2;
}
