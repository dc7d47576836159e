// Eigenvalues on a GPU of matrices whose lower triangle fits a block's shared memory.
#include "eigen_device.h"

namespace fastcov {
namespace {

constexpr int kWarps = 8;
using Team = BlockTeam<kWarps>;

// Vectors in shared memory, after the triangle and before the counts.
template <class Real>
constexpr int kVectors =
    3 + kWarps + 2;  // reflectors and update, a product for each warp, diagonals

template <class Real>
__host__ __device__ constexpr int64_t shared_bytes(int n) {
  return static_cast<int64_t>(sizeof(Real)) *
             (ColumnTriangle<Real, Team>::elements(padded(n)) + kVectors<Real> * padded(n)) +
         static_cast<int64_t>(sizeof(int)) * 32 * kWarps;
}

// Blocks that share a multiprocessor's registers. Without the bound, doubles spill on sm_103 and
// sm_120.
template <class Real>
constexpr int kBlocks = sizeof(Real) == 4 ? 4 : 2;

template <class Real>
__global__ void __launch_bounds__(32 * kWarps, kBlocks<Real>)
    eigen_triangle_kernel(const __grid_constant__ EigenTable table) {
  using Bits = typename Numeric<Real>::Bits;
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ Bits warp_largest[kWarps];
  Team team;
  const Located<Real> located(table, blockIdx.x);
  const int n = located.order();
  const int stride = padded(n);
  Real* const vectors = reinterpret_cast<Real*>(shared);
  Real* const diagonal = vectors + 3 * stride;
  Real* const off_diagonal = vectors + 4 * stride;
  Real* const product = vectors + 5 * stride;
  ColumnTriangle<Real, Team> triangle{vectors + kVectors<Real> * stride, n, stride};
  int* const counts = reinterpret_cast<int*>(triangle.data + triangle.elements(stride));

  // The triangle is loaded with both indices reversed, which leaves the eigenvalues as they are.
  // Its column j is then row n - 1 - j of the matrix, read from the end: neighbouring lanes read
  // neighbouring entries of a row-major matrix.
  Bits largest = 0;
  for (int j = team.squad(); j < n; j += Team::squads()) {
    Real* const column = triangle.column(j);
    for (int i = j + team.lane(); i < n; i += Team::lanes()) {
      const Real value = located.lower(n - 1 - j, n - 1 - i);
      const Bits bits = magnitude_bits(value);
      largest = bits > largest ? bits : largest;
      column[i] = value;
    }
  }
  largest = team.maximum(largest);
  if (team.lane() == 0) warp_largest[team.squad()] = largest;
  team.sync();
  for (int s = 0; s < Team::squads(); ++s) {
    largest = warp_largest[s] > largest ? warp_largest[s] : largest;
  }
  Scale<Real> scale(largest);
  scale.shift = shift_of(team, located, scale);
  for (int i = team.rank(); i < static_cast<int>(triangle.elements(n)); i += Team::size()) {
    triangle.data[i] = scale.is_finite ? triangle.data[i] * scale.shrink : Real(0);
  }
  team.sync();
  for (int j = team.rank(); j < n; j += Team::size()) triangle.column(j)[j] -= scale.shift;
  const Reflectors<Real> reflectors{{vectors, vectors + stride}, vectors + 2 * stride, product};
  tridiagonalize(team, triangle, n, reflectors, diagonal, off_diagonal);
  finish(team, located, scale, diagonal, off_diagonal, counts);
}

}  // namespace

template <class Real>
int largest_triangle(int available_bytes) {
  int n = 0;
  while (n < kLargestTriangle && shared_bytes<Real>(n + 1) + 1024 <= available_bytes) ++n;
  return n;
}

template <class Real>
cudaError_t launch_triangle(const EigenTable& table, cudaStream_t stream) {
  int n = 0;
  for (int e = 0; e < table.entries; ++e) n = table.entry[e].n > n ? table.entry[e].n : n;
  const int bytes = static_cast<int>(shared_bytes<Real>(n));
  const cudaError_t error = allow_shared(eigen_triangle_kernel<Real>, bytes);
  if (error != cudaSuccess) return error;
  const unsigned blocks = static_cast<unsigned>(table.matrices);
  return launch_kernel(eigen_triangle_kernel<Real>, blocks, 32 * kWarps, bytes, stream, table);
}

template int largest_triangle<float>(int);
template int largest_triangle<double>(int);
template cudaError_t launch_triangle<float>(const EigenTable&, cudaStream_t);
template cudaError_t launch_triangle<double>(const EigenTable&, cudaStream_t);

}  // namespace fastcov
