// Eigenvectors on a GPU of matrices up to order 128, by Jacobi rotations in shared memory. Up to
// order 32 a matrix has a warp, above a block.
#include "eigen_device.h"
#include "eigen_jacobi.h"

namespace fastcov {
namespace {

constexpr int kWarps = 8;
constexpr int kWarpTeams = 4;  // matrices of a block in which each matrix has a warp
constexpr int kWarpOrder = 32;
constexpr int kSweeps = 20;  // eight or nine are usual: late sweeps converge quadratically

template <class Real>
constexpr Real kNegligible =
    sizeof(Real) == 4 ? static_cast<Real>(0x1p-26) : static_cast<Real>(0x1p-55);

// An odd stride, so that the rows of the vectors start in different banks of shared memory.
__host__ __device__ constexpr int vector_stride(int n) { return n | 1; }
__host__ __device__ constexpr int64_t vector_elements(int n) {
  return int64_t{n} * vector_stride(n);
}

// Bytes of shared memory for one matrix: its vectors unless they lie in the workspace, then the
// triangle, the sines, the taus and the order of the eigenvalues.
template <class Real>
__host__ __device__ constexpr int64_t shared_bytes(int n, bool has_vectors) {
  const int64_t elements =
      (has_vectors ? vector_elements(n) : 0) + n * (n + 1) / 2 + 2 * ((n + 1) / 2);
  const int64_t bytes =
      elements * static_cast<int64_t>(sizeof(Real)) + n * static_cast<int64_t>(sizeof(int));
  return (bytes + 15) / 16 * 16;
}

FASTCOV_DEVICE bool is_anywhere(const WarpTeam<32>&, bool value) {
  return __any_sync(0xffffffffu, value);
}
FASTCOV_DEVICE bool is_anywhere(const BlockTeam<kWarps>&, bool value) {
  return __syncthreads_or(value);
}

template <class Real, class Team>
__device__ void solve_jacobi(Team& team, const Located<Real>& located, unsigned char* shared,
                             Real* far_vectors, typename Numeric<Real>::Bits* squad_largest,
                             Real* eigenvectors) {
  using Bits = typename Numeric<Real>::Bits;
  const int n = located.order();
  const int pairs = (n + 1) / 2;
  const int stride = vector_stride(n);
  Real* next = reinterpret_cast<Real*>(shared);
  Real* const vectors = far_vectors ? far_vectors : next;
  if (!far_vectors) next += vector_elements(n);
  const JacobiSpace<Real> space{next, vectors, stride, next + n * (n + 1) / 2,
                                next + n * (n + 1) / 2 + pairs};
  int* const order = reinterpret_cast<int*>(space.tau + pairs);

  Bits largest = 0;
  for (int i = team.squad(); i < n; i += team.squads()) {
    for (int j = team.lane(); j <= i; j += team.lanes()) {
      const Real value = located.lower(i, j);
      const Bits bits = magnitude_bits(value);
      largest = bits > largest ? bits : largest;
      space.matrix[triangle_index(i, j)] = value;
    }
  }
  largest = team.maximum(largest);
  if (team.lane() == 0) squad_largest[team.squad()] = largest;
  team.sync();
  for (int s = 0; s < team.squads(); ++s) {
    largest = squad_largest[s] > largest ? squad_largest[s] : largest;
  }
  const Scale<Real> scale(largest);
  for (int i = team.rank(); i < n * (n + 1) / 2; i += team.size()) {
    space.matrix[i] = scale.is_finite ? space.matrix[i] * scale.shrink : Real(0);
  }
  jacobi(team, space, n, kNegligible<Real>, kSweeps,
         [&](bool has_rotated) { return is_anywhere(team, has_rotated); });

  // Equal eigenvalues keep their order, so that every eigenvalue has a place of its own.
  for (int k = team.rank(); k < n; k += team.size()) {
    const Real value = space.matrix[triangle_index(k, k)];
    int place = 0;
    for (int other = 0; other < n; ++other) {
      const Real compared = space.matrix[triangle_index(other, other)];
      place += compared < value || (compared == value && other < k);
    }
    order[place] = k;
    static_cast<Real*>(located.entry->values)[located.index * n + place] = value * scale.restore;
  }
  team.sync();
  const Real factor = scale.is_finite ? Real(1) : scale.restore;
  Real* const out = eigenvectors + located.index * n * n;
  for (int i = team.squad(); i < n; i += team.squads()) {
    for (int place = team.lane(); place < n; place += team.lanes()) {
      out[i * n + place] = vectors[order[place] * stride + i] * factor;
    }
  }
}

// Addresses of the eigenvectors of a table's entries. The kernels take far_vectors beside them,
// which is null or has room for vector_elements(largest order) of every matrix of the table.
struct JacobiOutputs {
  void* of[EigenTable::kEntries];
};

template <class Real>
__global__ void __launch_bounds__(32 * kWarpTeams)
    eigen_jacobi_warp_kernel(const __grid_constant__ EigenTable table,
                             const __grid_constant__ JacobiOutputs vectors, int largest_order) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ typename Numeric<Real>::Bits largest[kWarpTeams];
  const int slot = threadIdx.x / 32;
  const int64_t number = int64_t{blockIdx.x} * kWarpTeams + slot;
  if (number >= table.matrices) return;
  WarpTeam<32> team;
  const Located<Real> located(table, number);
  solve_jacobi<Real>(team, located, shared + slot * shared_bytes<Real>(largest_order, true),
                     nullptr, largest + slot,
                     static_cast<Real*>(vectors.of[located.entry - table.entry]));
}

template <class Real>
__global__ void __launch_bounds__(32 * kWarps, 2)
    eigen_jacobi_block_kernel(const __grid_constant__ EigenTable table,
                              const __grid_constant__ JacobiOutputs vectors, Real* far_vectors,
                              int largest_order) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ typename Numeric<Real>::Bits largest[kWarps];
  BlockTeam<kWarps> team;
  const Located<Real> located(table, blockIdx.x);
  if (far_vectors) far_vectors += blockIdx.x * vector_elements(largest_order);
  solve_jacobi<Real>(team, located, shared, far_vectors, largest,
                     static_cast<Real*>(vectors.of[located.entry - table.entry]));
}

int largest_order(const EigenTable& table) {
  int n = 0;
  for (int e = 0; e < table.entries; ++e) n = table.entry[e].n > n ? table.entry[e].n : n;
  return n;
}

}  // namespace

template <class Real>
JacobiPlan plan_jacobi(int n, int64_t matrices, int available_bytes) {
  JacobiPlan plan{};
  const int64_t reserved = 1024;
  plan.fits =
      n <= kLargestJacobi && shared_bytes<Real>(n, n <= kWarpOrder) + reserved <= available_bytes;
  plan.has_near_vectors =
      n <= kWarpOrder || shared_bytes<Real>(n, true) + reserved <= available_bytes;
  if (!plan.has_near_vectors) {
    plan.workspace_bytes = matrices * vector_elements(n) * static_cast<int64_t>(sizeof(Real));
  }
  return plan;
}

template <class Real>
cudaError_t launch_jacobi(const EigenTable& table, void* const* vectors, const JacobiPlan& plan,
                          void* workspace, cudaStream_t stream) {
  const int n = largest_order(table);
  JacobiOutputs outputs{};
  for (int e = 0; e < table.entries; ++e) outputs.of[e] = vectors[e];
  if (n <= kWarpOrder) {
    const int bytes = static_cast<int>(kWarpTeams * shared_bytes<Real>(n, true));
    const cudaError_t error = allow_shared(eigen_jacobi_warp_kernel<Real>, bytes);
    if (error != cudaSuccess) return error;
    const unsigned blocks = static_cast<unsigned>((table.matrices + kWarpTeams - 1) / kWarpTeams);
    return launch_kernel(eigen_jacobi_warp_kernel<Real>, blocks, 32 * kWarpTeams, bytes, stream,
                         table, outputs, n);
  }
  const int bytes = static_cast<int>(shared_bytes<Real>(n, plan.has_near_vectors));
  const cudaError_t error = allow_shared(eigen_jacobi_block_kernel<Real>, bytes);
  if (error != cudaSuccess) return error;
  Real* const far = plan.has_near_vectors ? nullptr : static_cast<Real*>(workspace);
  return launch_kernel(eigen_jacobi_block_kernel<Real>, static_cast<unsigned>(table.matrices),
                       32 * kWarps, bytes, stream, table, outputs, far, n);
}

template JacobiPlan plan_jacobi<float>(int, int64_t, int);
template JacobiPlan plan_jacobi<double>(int, int64_t, int);
template cudaError_t launch_jacobi<float>(const EigenTable&, void* const*, const JacobiPlan&, void*,
                                          cudaStream_t);
template cudaError_t launch_jacobi<double>(const EigenTable&, void* const*, const JacobiPlan&,
                                           void*, cudaStream_t);

}  // namespace fastcov
