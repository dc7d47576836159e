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
  T* values;            // [n], ascending
  const T* thresholds;  // [threshold_count], threshold_stride apart
  int64_t threshold_stride;
  int threshold_count;
  int64_t* counts;  // [threshold_count][2]
  T* vectors;       // [n, n], in columns
};

// Up to this order Jacobi rotations of matrices side by side, one to a lane, are faster than LAPACK
// on one thread. Full vectors of a Xeon with AVX-512 in float32: 5 times at order 16, 3 at 24, 1.4
// at 32, 0.9 at 48; in float64 2, 1.2 and 0.7.
constexpr int kVectorsOrder = 32;
constexpr int vectors_order(int lanes) {
  return lanes >= 16 ? kVectorsOrder : lanes >= 8 ? 24 : 16;
}
// From this order on one thread reduces a matrix in two stages (eigen_large.h) in less time than in
// one. On a Xeon with AVX-512 and in float32: 1.1 ms against 1.3 at order 256, 24 against 39 at
// 1024; in float64 even at 768, 53 against 75 at 1024.
template <typename T>
constexpr int kTwoStageOrder = sizeof(T) == 4 ? 256 : 768;
// From this order on threads that would be idle help: 3.8 ms on two against 5.2 on one in float32
// at 512, nothing at 384.
constexpr int kCrewOrder = 512;

template <typename T>
struct EigenKernels {
  int group;  // how many matrices of one order are solved side by side
  int lanes;  // how many of them fill a vector
  // Bytes of scratch, aligned to 64, for up to `group` matrices.
  int64_t (*scratch_bytes)(int n);
  // Up to `group` matrices of one order.
  void (*eigenvalues)(const EigenTask<T>* tasks, int count, void* scratch);
  void (*counts)(const EigenTask<T>* tasks, int count, void* scratch);
  // Up to `lanes` matrices, read as they are, of an order up to kVectorsOrder.
  void (*eigenvectors)(const EigenTask<T>* tasks, int count, void* scratch);
  // Whether every entry of the triangle is a finite number.
  bool (*is_finite)(const EigenTask<T>& task);
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
