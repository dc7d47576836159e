// Eigenvalues of one large symmetric matrix on the CPU, by all threads. Compiled once for each
// instruction set (FASTCOV_LEVEL): eigen_kernels.cpp says what that forbids.
#include "eigen_large.h"
#include "eigen_bisect.h"
#include "eigen_ql.h"

#define FASTCOV_PASTE_(a, b) a##b
#define FASTCOV_PASTE(a, b) FASTCOV_PASTE_(a, b)

namespace fastcov {
namespace {

template <class T>
struct SolveSpace {
  LargeSpace<T> reduction;
  double* wide_diagonal;
  double* wide_square;
  int* counts;
  int64_t bytes;

  SolveSpace(void* scratch, int n, int ranks) : reduction(scratch, n, ranks) {
    wide_diagonal = reduction.template take<double>(n);
    wide_square = reduction.template take<double>(n);
    counts = reduction.template take<int>(n + 1);
    bytes = reduction.bytes;
  }
};

template <class T>
bool solve_by_ql(const EigenTask<T>& task, const Scale<T>& scale, const SolveSpace<T>& space) {
  const int n = task.n;
  for (int i = 0; i < n; ++i) space.wide_diagonal[i] = space.reduction.diagonal[i];
  for (int i = 0; i < n - 1; ++i) {
    const double off_diagonal = space.reduction.off_diagonal[i];
    space.wide_square[i] = off_diagonal * off_diagonal;
  }
  if (!rational_ql<double, 1>(space.wide_diagonal, space.wide_square, n, kTolerance<T>,
                              kSweeps * n)) {
    return false;
  }
  sort_lanes<double, 1>(space.wide_diagonal, n);
  for (int k = 0; k < n; ++k) {
    task.values[k] = static_cast<T>(scale.eigenvalue(space.wide_diagonal[k]));
  }
  return true;
}

template <class T>
void solve_large(const EigenTask<T>& task, const Crew& crew, void* scratch) {
  const int n = task.n;
  const SolveSpace<T> space(scratch, n, crew.ranks);
  const Scale<T> scale = reduce_large(task, crew, space.reduction);
  if (sizeof(T) == 8 && solve_by_ql(task, scale, space)) return;
  const bool is_sorted =
      bisect_blocks(crew, space.reduction.diagonal, space.reduction.off_diagonal, n, space.counts,
                    [&](int k, T value) { task.values[k] = scale.eigenvalue(value); });
  if (!is_sorted) sort_lanes<T, 1>(task.values, n);
}

template <class T>
int64_t scratch_bytes(int n, int ranks) {
  return SolveSpace<T>(nullptr, n, ranks).bytes;
}

}  // namespace

const LargeEigenLevel FASTCOV_PASTE(large_eigen_, FASTCOV_LEVEL) = {
    {scratch_bytes<float>, solve_large<float>}, {scratch_bytes<double>, solve_large<double>}};

}  // namespace fastcov
