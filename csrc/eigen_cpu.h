// Symmetric eigenvalues on the CPU: what the driver (eigen_cpu.cpp) and the loops compiled once for
// each instruction set (eigen_kernels.cpp) share.
#pragma once

#include <cstdint>

#include "crew.h"

namespace fastcov {

// Entry (i, j) of a lower triangle, i >= j, is data[i * step_i + j * step_j]. A matrix and its
// reversal in both indices have the same eigenvalues: the driver picks the one that has columns
// side by side in memory.
template <typename T>
struct MatrixRef {
  const T* data;
  int64_t step_i;
  int64_t step_j;
};

// One matrix of a call, and where its results go.
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

// From this order on one thread reduces a matrix in two stages (eigen_large.h) in less time than in
// one. On a Xeon with AVX-512 and in float32: 1.1 ms against 1.3 at order 256, 24 against 39 at
// 1024; in float64 even at 640, 53 against 75 at 1024, but as crews do it, so that no bit depends
// on the number of threads.
template <typename T>
constexpr int kTwoStageOrder = sizeof(T) == 4 ? 256 : 512;
// From this order on threads that would be idle help: 3.8 ms on two against 5.2 on one in float32
// at 512, nothing at 384.
constexpr int kCrewOrder = 512;

template <typename T>
struct EigenKernels {
  int group;  // how many matrices of one order are solved side by side
  int lanes;  // how many of them fill a vector
  // Fewest matrices that are reduced side by side; it takes as long as this many one by one.
  int (*fewest_lanes)(int n);
  int (*fewest_rotated)(int n);  // the same of eigenvectors
  // Bytes of scratch, aligned to 64, for up to `group` matrices, or for eigenvectors of `lanes`.
  int64_t (*scratch_bytes)(int n);
  int64_t (*vector_bytes)(int n);
  // Up to `group` matrices of one order.
  void (*eigenvalues)(const EigenTask<T>* tasks, int count, void* scratch);
  // Up to `lanes` matrices, read as they are.
  void (*eigenvectors)(const EigenTask<T>* tasks, int count, void* scratch);
};

// One matrix, in two stages, by all ranks of a crew. Results do not depend on how many there are.
template <typename T>
struct LargeEigenKernels {
  int64_t (*scratch_bytes)(int n, int ranks);
  void (*eigenvalues)(const EigenTask<T>& task, const Crew& crew, void* scratch);
};

struct EigenLevel {
  const char* name;
  EigenKernels<float> float32;
  EigenKernels<double> float64;
  // Counts, of up to a group of matrices of one order. Of float64 alone: see count_error in
  // eigen.h.
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
