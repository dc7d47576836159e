// Symmetric eigenvalues on the CPU, compiled once for each instruction set (FASTCOV_LEVEL). No
// inline function of the standard library may be used here: the linker keeps one copy of it for the
// whole library, which may be the copy that needs AVX-512.
//
// Small matrices lie side by side, one in each lane of a vector. Larger ones are reduced one by
// one, with vectors along their columns. Either way the matrices of a group share the iteration
// that finds the eigenvalues.
#include "eigen_cpu.h"

#include "eigen.h"
#include "eigen_bisect.h"
#include "eigen_jacobi.h"
#include "eigen_lanes.h"
#include "eigen_large.h"
#include "eigen_ql.h"
#include "eigen_storage.h"
#include "eigen_vectors.h"

#define FASTCOV_PASTE_(a, b) a##b
#define FASTCOV_PASTE(a, b) FASTCOV_PASTE_(a, b)
#define FASTCOV_QUOTE_(a) #a
#define FASTCOV_QUOTE(a) FASTCOV_QUOTE_(a)

namespace fastcov {
namespace {

constexpr int kPacks = 4;  // vectors of doubles at a time, to hide the latency of divisions
constexpr int kDoubles = kVectorBytes / 8;
constexpr int kGroup = kPacks * kDoubles;
using Doubles = Pack<double, kDoubles>;

// Above this order matrices side by side take as long as one by one.
constexpr int kLaneOrder = 320;
// Up to this many matrices bisection, in vectors of eigenvalues, is faster than QL, in which
// matrices lie side by side. That holds in float32 alone, whose vectors are twice as long and whose
// eigenvalues need half as many halvings, and for orders that fill the vectors. Measured on a Xeon
// with AVX-512.
template <class T>
constexpr int bisect_count(int n) {
  if (sizeof(T) == 8 || n <= 16) return 0;
  if (n < 20) return 1;
  return n <= 32 ? 2 : 5;
}

template <class T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

// Scratch memory of a group's iteration, without that of its reductions.
constexpr int64_t group_bytes(int n) { return 2 * int64_t{padded(n)} * kGroup * 8; }

// Fewest matrices for which a vector takes less time than one by one, for orders up to 32, 64, 128,
// 256 and kLaneOrder. A vector takes the same time whether it is full or not. Measured on a Xeon
// with AVX-512, which was also held to AVX2 and to SSE4.
constexpr int kOrderClasses = 5;
struct FewestLanes {
  int vector_bytes;
  int real_bytes;
  int count[kOrderClasses];
};
constexpr FewestLanes kFewestLanes[] = {
    {64, 4, {3, 4, 5, 8, 10}}, {64, 8, {2, 3, 4, 6, 8}}, {32, 4, {2, 4, 5, 5, 7}},
    {32, 8, {2, 2, 3, 3, 4}},  {16, 4, {2, 3, 3, 3, 4}}, {16, 8, {2, 2, 2, 2, 2}},
};
template <class T>
constexpr int lane_count(int n) {
  if (n > kLaneOrder) return kGroup + 1;
  int order_class = 0;
  for (int order = 32; order < n && order_class < kOrderClasses - 1; order *= 2) ++order_class;
  for (const FewestLanes& fewest : kFewestLanes) {
    if (fewest.vector_bytes == kVectorBytes && fewest.real_bytes == sizeof(T)) {
      return fewest.count[order_class];
    }
  }
  return kLanes<T>;
}

// Scratch memory of one reduction. Sizes are in elements of R, which is T or a vector of it.
template <class R>
struct Workspace {
  R* triangle;
  Reflectors<R> vectors;
  R* diagonal;
  R* off_diagonal;

  static int64_t bytes(int n) {
    const int64_t elements = ColumnTriangle<R, LoopTeam>::elements(n) + 6 * int64_t{padded(n)} + 16;
    return elements * static_cast<int64_t>(sizeof(R));
  }
  Workspace(void* scratch, int n) {
    const int stride = padded(n);
    R* next = static_cast<R*>(scratch);
    vectors = {{next, next + stride}, next + 2 * stride, next + 3 * stride};
    diagonal = next + 4 * stride;
    off_diagonal = next + 5 * stride;
    triangle = next + 6 * stride;
  }
};

// Copies a triangle by columns to out[0], out[stride] and so on. Returns the bits of the largest
// magnitude.
template <class T>
typename Numeric<T>::Bits load(const MatrixRef<T>& matrix, int n, T* out, int64_t stride) {
  using Bits = typename Numeric<T>::Bits;
  Bits largest = 0;
  for (int j = 0; j < n; ++j) {
    const T* const column = matrix.data + j * (matrix.step_i + matrix.step_j);
    const int rows = n - j;
    Bits top = 0;
    if (stride == 1 && matrix.step_i == 1) {
      FASTCOV_SIMD(reduction(max : top))
      for (int i = 0; i < rows; ++i) {
        const T value = column[i];
        const Bits bits = magnitude_bits(value);
        top = bits > top ? bits : top;
        out[i] = value;
      }
    } else if (stride == 1 && matrix.step_i == -1) {
      FASTCOV_SIMD(reduction(max : top))
      for (int i = 0; i < rows; ++i) {
        const T value = column[-i];
        const Bits bits = magnitude_bits(value);
        top = bits > top ? bits : top;
        out[i] = value;
      }
    } else {
      for (int i = 0; i < rows; ++i) {
        const T value = column[i * matrix.step_i];
        const Bits bits = magnitude_bits(value);
        top = bits > top ? bits : top;
        out[i * stride] = value;
      }
    }
    largest = top > largest ? top : largest;
    out += rows * stride;
  }
  return largest;
}

// Subtracts the mean of the diagonal from it, for one matrix or for a vector of them. Returns the
// mean.
template <class R>
R take_shift(ColumnTriangle<R, LoopTeam>& triangle) {
  const int n = triangle.n;
  R trace = Numeric<R>::fill(0);
  for (int j = 0; j < n; ++j) trace += triangle.column(j)[j];
  const R shift = diagonal_shift(trace, n);
  for (int j = 0; j < n; ++j) triangle.column(j)[j] -= shift;
  return shift;
}

// Reduces up to kLanes matrices side by side. Lanes beyond `count` hold zeros.
template <class T>
void reduce_lanes(const EigenTask<T>* tasks, int count, Workspace<Pack<T, kLanes<T>>>& work,
                  Scale<T>* scales) {
  using V = Pack<T, kLanes<T>>;
  using Triangle = ColumnTriangle<V, LoopTeam>;
  const int n = tasks[0].n;
  const int64_t elements = Triangle::elements(n);
  if (count < kLanes<T>) {
    for (int64_t i = 0; i < elements; ++i) work.triangle[i] = V{};
  }
  V shrink = V{};
  for (int lane = 0; lane < count; ++lane) {
    T* const first = reinterpret_cast<T*>(work.triangle) + lane;
    scales[lane] = Scale<T>(load(tasks[lane].matrix, n, first, kLanes<T>));
    shrink[lane] = scales[lane].is_finite ? scales[lane].shrink : T(0);
  }
  for (int64_t i = 0; i < elements; ++i) {
    const V scaled = work.triangle[i] * shrink;
    work.triangle[i] = shrink > V{} ? scaled : V{};  // a select, because zero times NaN is NaN
  }
  Triangle triangle{work.triangle, n, padded(n)};
  const V shift = take_shift(triangle);
  for (int lane = 0; lane < count; ++lane) scales[lane].shift = shift[lane];
  LoopTeam team;
  tridiagonalize(team, triangle, n, work.vectors, work.diagonal, work.off_diagonal);
}

template <class T>
Scale<T> reduce_one(const EigenTask<T>& task, Workspace<T>& work) {
  using Triangle = ColumnTriangle<T, LoopTeam>;
  const int n = task.n;
  Scale<T> scale(load(task.matrix, n, work.triangle, 1));
  const int64_t elements = Triangle::elements(n);
  const T shrink = scale.shrink;
  for (int64_t i = 0; i < elements; ++i) {
    work.triangle[i] = scale.is_finite ? work.triangle[i] * shrink : T(0);
  }
  Triangle triangle{work.triangle, n, padded(n)};
  scale.shift = take_shift(triangle);
  LoopTeam team;
  tridiagonalize(team, triangle, n, work.vectors, work.diagonal, work.off_diagonal);
  return scale;
}

// Reduces the matrices of a group, and calls visit(index, scale, diagonal, off_diagonal, stride)
// for each.
template <class T, class Visit>
void reduce_group(const EigenTask<T>* tasks, int count, void* scratch, const Visit& visit) {
  const int n = tasks[0].n;
  constexpr int lanes = kLanes<T>;
  int index = 0;
  while (count - index >= lane_count<T>(n)) {
    const int used = count - index < lanes ? count - index : lanes;
    Workspace<Pack<T, lanes>> work(scratch, n);
    Scale<T> scales[lanes]{};
    reduce_lanes(tasks + index, used, work, scales);
    for (int lane = 0; lane < used; ++lane) {
      visit(index + lane, scales[lane], reinterpret_cast<T*>(work.diagonal) + lane,
            reinterpret_cast<T*>(work.off_diagonal) + lane, lanes);
    }
    index += used;
  }
  for (; index < count; ++index) {
    if (n >= kTwoStageOrder<T>) {
      const LargeSpace<T> space(scratch, n, 1);
      const Scale<T> scale = reduce_large(tasks[index], {1, nullptr}, space);
      visit(index, scale, space.diagonal, space.off_diagonal, 1);
      continue;
    }
    Workspace<T> work(scratch, n);
    const Scale<T> scale = reduce_one(tasks[index], work);
    visit(index, scale, work.diagonal, work.off_diagonal, 1);
  }
}

template <class T>
int64_t reduce_bytes(int n) {
  const int64_t one_stage =
      n <= kLaneOrder ? Workspace<Pack<T, kLanes<T>>>::bytes(n) : Workspace<T>::bytes(n);
  const int64_t two_stages = n >= kTwoStageOrder<T> ? LargeSpace<T>(nullptr, n, 1).bytes : 0;
  return one_stage > two_stages ? one_stage : two_stages;
}

// Reduces the matrices of a group, and finds the eigenvalues of each by bisection.
template <class T>
void bisect_group(const EigenTask<T>* tasks, int count, void* scratch) {
  const int n = tasks[0].n;
  T* const diagonal = static_cast<T*>(scratch);
  T* const square = diagonal + padded(n);
  int* const sturm_counts = reinterpret_cast<int*>(square + padded(n));
  void* const rest = static_cast<char*>(scratch) + group_bytes(n);
  reduce_group(tasks, count, rest,
               [&](int index, const Scale<T>& scale, const T* a, const T* b, int step) {
                 for (int i = 0; i < n; ++i) diagonal[i] = a[i * step];
                 for (int i = 0; i < n - 1; ++i) square[i] = b[i * step];
                 T* const values = tasks[index].values;
                 const bool is_sorted =
                     bisect_blocks({1, nullptr}, diagonal, square, n, sturm_counts,
                                   [&](int k, T value) { values[k] = scale.eigenvalue(value); });
                 if (!is_sorted) sort_lanes<T, 1>(values, n);
               });
}

// Reduces up to Packs vectors of matrices, and finds the eigenvalues of all by the QL iteration. V
// is a vector of doubles, or double. Returns false, with nothing written, if it has not converged.
template <class T, class V, int Packs>
bool solve(const EigenTask<T>* tasks, int count, void* scratch) {
  constexpr int stride = Packs * static_cast<int>(sizeof(V) / sizeof(double));
  const int n = tasks[0].n;
  V* const diagonal = static_cast<V*>(scratch);
  V* const square = diagonal + int64_t{padded(n)} * Packs;
  void* const rest = static_cast<char*>(scratch) + group_bytes(n);
  double* const d = reinterpret_cast<double*>(diagonal);
  double* const s = reinterpret_cast<double*>(square);
  for (int i = 0; i < n * Packs; ++i) diagonal[i] = square[i] = V{};
  Scale<T> scales[stride];
  reduce_group(tasks, count, rest,
               [&](int index, const Scale<T>& scale, const T* a, const T* b, int step) {
                 scales[index] = scale;
                 for (int i = 0; i < n; ++i) d[i * stride + index] = a[i * step];
                 for (int i = 0; i < n - 1; ++i) {
                   const double off_diagonal = b[i * step];
                   s[i * stride + index] = off_diagonal * off_diagonal;
                 }
               });
  if (!rational_ql<V, Packs>(diagonal, square, n, kTolerance<T>, kSweeps * n)) return false;
  sort_lanes<V, Packs>(diagonal, n);
  for (int index = 0; index < count; ++index) {
    for (int k = 0; k < n; ++k) {
      tasks[index].values[k] = static_cast<T>(scales[index].eigenvalue(d[k * stride + index]));
    }
  }
  return true;
}

template <class T>
int64_t scratch_bytes(int n) {
  return group_bytes(n) + reduce_bytes<T>(n);
}

template <class T>
int64_t vector_bytes(int n) {
  const int64_t lanes = int64_t{2} * (n + 1) * (n + 1) * kVectorBytes;
  return lanes > VectorSpace::bytes(n) ? lanes : VectorSpace::bytes(n);
}

template <class T>
void eigenvalues(const EigenTask<T>* tasks, int count, void* scratch) {
  if (count > bisect_count<T>(tasks[0].n)) {
    const bool converged = count == 1          ? solve<T, double, 1>(tasks, count, scratch)
                           : count <= kDoubles ? solve<T, Doubles, 1>(tasks, count, scratch)
                           : count <= 2 * kDoubles
                               ? solve<T, Doubles, 2>(tasks, count, scratch)
                               : solve<T, Doubles, kPacks>(tasks, count, scratch);
    if (converged) return;
  }
  bisect_group(tasks, count, scratch);
}

void counts(const EigenTask<double>* tasks, int count, void* scratch) {
  const int n = tasks[0].n;
  double* const diagonal = static_cast<double*>(scratch);
  double* const square = diagonal + padded(n);
  void* const rest = static_cast<char*>(scratch) + group_bytes(n);
  reduce_group(
      tasks, count, rest,
      [&](int index, const Scale<double>& scale, const double* a, const double* b, int step) {
        const EigenTask<double>& task = tasks[index];
        for (int i = 0; i < n; ++i) diagonal[i] = a[i * step];
        for (int i = 0; i < n - 1; ++i) square[i] = b[i * step];
        LoopTeam team;
        double lower, upper;
        bound_eigenvalues(team, diagonal, square, n, lower, upper);
        const double error = count_error(diagonal, square, n, scale.shift);
        for (int t = 0; t < task.threshold_count; ++t) {
          const double tau = task.thresholds[t * task.threshold_stride] * scale.shrink;
          int low = 0, high = n;
          if (scale.is_finite) {
            count_above(diagonal, square, n, error, tau - scale.shift, low, high);
          }
          task.counts[2 * t] = low;
          task.counts[2 * t + 1] = high;
        }
      });
}

// Fewest matrices that Jacobi rotations solve side by side in less time than QL solves them one by
// one, for orders up to the given ones. Measured on a Xeon with AVX-512, which was also held to
// AVX2.
struct FewestRotated {
  int order;
  int count[2];  // with AVX-512, and without
};
constexpr FewestRotated kFewestRotated[] = {{3, {6, 8}},   {8, {4, 6}},   {12, {5, 7}},
                                            {17, {7, 9}},  {20, {8, 11}}, {24, {10, 11}},
                                            {28, {13, 13}}};
template <class T>
constexpr int fewest_rotated(int n) {
  for (const FewestRotated& fewest : kFewestRotated) {
    if (n <= fewest.order) return fewest.count[kVectorBytes < 64];
  }
  return n <= 32 ? 15 : kGroup + 1;
}

// Off-diagonals of at most this size are left by Jacobi rotations. The largest entry is about 1.
template <class T>
constexpr T kLeftByJacobi = sizeof(T) == 4 ? static_cast<T>(0x1p-26) : static_cast<T>(0x1p-55);
constexpr int kJacobiSweeps = 20;

template <class T>
void write_vectors(const EigenTask<T>& task, const Scale<T>& scale, const T* matrix,
                   const T* vectors, int lanes) {
  const int n = task.n;
  const T factor = scale.is_finite ? T(1) : scale.restore;
  for (int k = 0; k < n; ++k) {
    const T value = matrix[triangle_index(k, k) * lanes];
    int place = 0;  // equal eigenvalues keep their order
    for (int other = 0; other < n; ++other) {
      const T compared = matrix[triangle_index(other, other) * lanes];
      place += compared < value || (compared == value && other < k);
    }
    task.values[place] = value * scale.restore;
    for (int i = 0; i < n; ++i) {
      task.vectors[i * n + place] = vectors[(k * n + i) * lanes] * factor;
    }
  }
}

// Solves one matrix by QL. Returns false, with nothing written, if it has not converged.
template <class T>
bool solve_vectors(const EigenTask<T>& task, void* scratch) {
  const VectorSpace space(scratch, task.n);
  const int n = space.n;
  const MatrixRef<T>& ref = task.matrix;
  typename Numeric<T>::Bits largest = 0;
  for (int i = 0; i < n; ++i) {
    double* const row = space.matrix + int64_t{i} * space.stride;
    for (int j = 0; j <= i; ++j) {
      const T value = ref.data[i * ref.step_i + j * ref.step_j];
      const auto bits = magnitude_bits(value);
      largest = bits > largest ? bits : largest;
      row[j] = value;
    }
  }
  const Scale<T> scale(largest);
  const double shrink = scale.shrink;
  for (int i = 0; i < n; ++i) {
    double* const row = space.matrix + int64_t{i} * space.stride;
    for (int j = 0; j <= i; ++j) {
      row[j] = scale.is_finite ? row[j] * shrink : 0;
      space.matrix[int64_t{j} * space.stride + i] = row[j];
    }
    for (int j = n; j < space.stride; ++j) row[j] = 0;
  }
  reduce_with_basis(space);
  double size = 0;
  for (int i = 0; i < n; ++i) {
    size = larger(size, absolute(space.diagonal[i]));
    if (i < n - 1) size = larger(size, absolute(space.off_diagonal[i]));
  }
  if (!implicit_ql(space, kTolerance<T> * size, kSweeps * n)) return false;
  const T factor = scale.is_finite ? T(1) : scale.restore;
  for (int k = 0; k < n; ++k) {
    const double value = space.diagonal[k];
    int place = 0;  // equal eigenvalues keep their order
    for (int other = 0; other < n; ++other) {
      const double compared = space.diagonal[other];
      place += compared < value || (compared == value && other < k);
    }
    task.values[place] = static_cast<T>(value * static_cast<double>(scale.restore));
    const double* const vector = space.basis + int64_t{k} * space.stride;
    for (int i = 0; i < n; ++i) {
      task.vectors[i * n + place] = static_cast<T>(vector[i]) * factor;
    }
  }
  return true;
}

template <class T>
void rotate_group(const EigenTask<T>* tasks, int count, void* scratch) {
  constexpr int lanes = kLanes<T>;
  using V = Pack<T, lanes>;
  const int n = tasks[0].n;
  V* const matrix = static_cast<V*>(scratch);
  V* const vectors = matrix + n * (n + 1) / 2;
  V* const sine = vectors + n * n;
  const JacobiSpace<V> space{matrix, vectors, n, sine, sine + n};
  Scale<T> scales[lanes]{};
  V shrink = V{};
  for (int i = 0; i < n * (n + 1) / 2; ++i) matrix[i] = V{};
  for (int lane = 0; lane < count; ++lane) {
    const MatrixRef<T>& ref = tasks[lane].matrix;
    typename Numeric<T>::Bits largest = 0;
    T* const out = reinterpret_cast<T*>(matrix) + lane;
    for (int i = 0; i < n; ++i) {
      for (int j = 0; j <= i; ++j) {
        const T value = ref.data[i * ref.step_i + j * ref.step_j];
        const auto bits = magnitude_bits(value);
        largest = bits > largest ? bits : largest;
        out[triangle_index(i, j) * lanes] = value;
      }
    }
    scales[lane] = Scale<T>(largest);
    shrink[lane] = scales[lane].is_finite ? scales[lane].shrink : T(0);
  }
  for (int i = 0; i < n * (n + 1) / 2; ++i) {
    const V scaled = matrix[i] * shrink;
    matrix[i] = shrink > V{} ? scaled : V{};  // a select, because zero times NaN is NaN
  }
  LoopTeam team;
  jacobi(team, space, n, Numeric<V>::fill(kLeftByJacobi<T>), kJacobiSweeps,
         [](const auto& mask) { return Numeric<V>::any(mask); });
  for (int lane = 0; lane < count; ++lane) {
    write_vectors(tasks[lane], scales[lane], reinterpret_cast<const T*>(matrix) + lane,
                  reinterpret_cast<const T*>(vectors) + lane, lanes);
  }
}

template <class T>
void eigenvectors(const EigenTask<T>* tasks, int count, void* scratch) {
  if (count < fewest_rotated<T>(tasks[0].n)) {
    for (int index = 0; index < count; ++index) {
      if (!solve_vectors(tasks[index], scratch)) rotate_group(tasks + index, 1, scratch);
    }
    return;
  }
  rotate_group(tasks, count, scratch);
}

template <class T>
constexpr EigenKernels<T> kernels() {
  return {kGroup,           kLanes<T>,       lane_count<T>,  fewest_rotated<T>,
          scratch_bytes<T>, vector_bytes<T>, eigenvalues<T>, eigenvectors<T>};
}

}  // namespace

const EigenLevel FASTCOV_PASTE(eigen_, FASTCOV_LEVEL) = {
    FASTCOV_QUOTE(FASTCOV_LEVEL), kernels<float>(), kernels<double>(), counts};

}  // namespace fastcov
