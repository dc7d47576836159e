// Symmetric eigenvalues on a CPU: types shared by the driver (eigen_cpu.cpp) and by the loops that
// are compiled once for each instruction set (eigen_kernels.cpp).
#pragma once

#include <cstdint>

#include "crew.h"

namespace fastcov {

// Lower triangle of a matrix: entry (i, j), i >= j, is data[i * step_i + j * step_j]. A matrix has
// the same eigenvalues when both indices run backwards, so the driver picks the direction in which
// columns lie side by side in memory.
template <typename T>
struct MatrixRef {
  const T* data;
  int64_t step_i;
  int64_t step_j;
};

// One matrix of a call, and the places of its results.
template <typename T>
struct EigenTask {
  MatrixRef<T> matrix;
  int n;
  T* values;                 // [n], ascending
  const double* thresholds;  // [threshold_count], threshold_stride apart
  int64_t threshold_stride;
  int threshold_count;
  int64_t* counts;  // [threshold_count][2]
  T* vectors;       // [n, n], in columns
};

// From this order on one thread reduces a matrix in two stages (eigen_large.h). In float32 that
// takes less time from here on: on a Xeon with AVX-512 1.1 ms against 1.3 at order 256, 24 against
// 39 at 1024. In float64 it takes as long as one stage at 640, and 53 ms against 75 at 1024; it
// starts at 512, where crews start, so that no bit depends on the number of threads.
template <typename T>
constexpr int kTwoStageOrder = sizeof(T) == 4 ? 256 : 512;
// From this order on idle threads help with a matrix. In float32 at order 512 two of them take 3.8
// ms, one 5.2; at 384 nothing is gained.
constexpr int kCrewOrder = 512;

template <typename T>
struct EigenKernels {
  int group;  // matrices of one order that are solved side by side
  int lanes;  // matrices that fill a vector
  // Fewest matrices for which a vector takes less time than one by one. The driver estimates the
  // time of a vector by it.
  int (*fewest_lanes)(int n);
  int (*fewest_rotated)(int n);  // the same for eigenvectors
  // Bytes of scratch memory, aligned to 64: for up to `group` matrices, and for the eigenvectors of
  // up to `lanes`.
  int64_t (*scratch_bytes)(int n);
  int64_t (*vector_bytes)(int n);
  // Eigenvalues of up to `group` matrices of one order.
  void (*eigenvalues)(const EigenTask<T>* tasks, int count, void* scratch);
  // Eigenvalues and eigenvectors of up to `lanes` matrices, whose indices must not be reversed: the
  // vectors would be so too.
  void (*eigenvectors)(const EigenTask<T>* tasks, int count, void* scratch);
};

// Eigenvalues of one matrix, in two stages, by all ranks of a crew. Results do not depend on their
// number.
template <typename T>
struct LargeEigenKernels {
  int64_t (*scratch_bytes)(int n, int ranks);
  void (*eigenvalues)(const EigenTask<T>& task, const Crew& crew, void* scratch);
};

struct EigenLevel {
  const char* name;
  EigenKernels<float> float32;
  EigenKernels<double> float64;
  // Counts of up to a group of matrices of one order. They are taken in float64 alone: see
  // reduction_error in eigen.h.
  void (*counts)(const EigenTask<double>* tasks, int count, void* scratch);
};

struct LargeEigenLevel {
  LargeEigenKernels<float> float32;
  LargeEigenKernels<double> float64;
};

extern const LargeEigenLevel large_eigen_baseline;
extern const LargeEigenLevel large_eigen_avx2;
extern const LargeEigenLevel large_eigen_avx512;
extern const EigenLevel eigen_baseline;
extern const EigenLevel eigen_avx2;
extern const EigenLevel eigen_avx512;

}  // namespace fastcov
