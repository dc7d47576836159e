// Eigenvalues of small matrices on a GPU, each row in the registers of one lane. Up to order 32 a
// matrix has a part of a warp, up to 128 a block with a thread for each row.
#include "eigen_device.h"

namespace fastcov {
namespace {

constexpr int kWarpBlock = 128;  // threads of a block that holds several matrices

// Shared memory of one team.
template <class Real, int Order, int Lanes>
struct RegistersShared {
  Real reflector[2][Order];
  Real update[Order];
  Real product[Order];
  Real pivot_column[Order];
  Real diagonal[Order];
  Real off_diagonal[Order];
  Real staging[Order / Lanes][Lanes]
              [Lanes + 1];  // an odd stride, so that rows fall into different banks
  int counts[Order];
  typename Numeric<Real>::Bits largest[Order / Lanes];
};

// Fills a lane's row of the symmetric matrix from its lower triangle. Tiles left of the diagonal
// are read by rows and transposed in shared memory; a tile below the diagonal holds, in its
// columns, the rest of the lanes' rows. Either way neighbouring lanes read neighbouring entries of
// a row-major matrix.
template <class Real, int Order, class Team>
__device__ void load_rows(const Team& team, const Located<Real>& located, int n,
                          Real (*staging)[Team::lanes() + 1], Real (&entry)[Order]) {
  constexpr int lanes = Team::lanes();
  const int lane = team.lane();
  const int i = team.squad() * lanes + lane;
  FASTCOV_UNROLL
  for (int tile = 0; tile < Order / lanes; ++tile) {
    if (tile * lanes >= n) {
      FASTCOV_UNROLL
      for (int c = 0; c < lanes; ++c) entry[tile * lanes + c] = Real(0);
      continue;
    }
    if (tile <= team.squad()) {
      const int column = tile * lanes + lane;
      for (int r = 0; r < lanes; ++r) {
        const int row = team.squad() * lanes + r;
        staging[r][lane] = row < n && column <= row ? located.lower(row, column) : Real(0);
      }
      team.squad_sync();
      FASTCOV_UNROLL
      for (int c = 0; c < lanes; ++c) entry[tile * lanes + c] = staging[lane][c];
      team.squad_sync();
    }
    if (tile >= team.squad()) {
      FASTCOV_UNROLL
      for (int c = 0; c < lanes; ++c) {
        const int row = tile * lanes + c;
        if (row > i && row < n) entry[row] = located.lower(row, i);
        if (row >= n && tile > team.squad()) entry[row] = Real(0);
      }
    }
  }
}

template <class Real, int Order, class Team>
__device__ void solve_registers(Team& team, const Located<Real>& located,
                                RegistersShared<Real, Order, Team::lanes()>& shared) {
  using Bits = typename Numeric<Real>::Bits;
  const int n = located.order();
  RegisterRows<Real, Order, Team> rows;
  load_rows<Real, Order>(team, located, n, shared.staging[team.squad()], rows.entry);
  Bits largest = 0;
  FASTCOV_UNROLL
  for (int j = 0; j < Order; ++j) {
    const Bits bits = magnitude_bits(rows.entry[j]);
    largest = bits > largest ? bits : largest;
  }
  largest = team.maximum(largest);
  if (Team::squads() > 1) {
    if (team.lane() == 0) shared.largest[team.squad()] = largest;
    team.sync();
    for (int s = 0; s < Team::squads(); ++s) {
      largest = shared.largest[s] > largest ? shared.largest[s] : largest;
    }
  }
  Scale<Real> scale(largest);
  scale.shift = shift_of(team, located, scale);
  FASTCOV_UNROLL
  for (int j = 0; j < Order; ++j) {
    const Real scaled = scale.is_finite ? rows.entry[j] * scale.shrink : Real(0);
    rows.entry[j] = j == team.rank() && j < n ? scaled - scale.shift : scaled;
  }
  rows.pivot_column = shared.pivot_column;
  shared.pivot_column[team.rank()] = rows.entry[0];
  const Reflectors<Real> vectors{
      {shared.reflector[0], shared.reflector[1]}, shared.update, shared.product};
  tridiagonalize(team, rows, n, vectors, shared.diagonal, shared.off_diagonal);
  finish(team, located, scale, shared.diagonal, shared.off_diagonal, shared.counts);
}

// Fewest blocks that are to be resident on a multiprocessor, which limits the registers of a
// thread. Zero leaves their number to the compiler. It is given where the compiler would choose too
// few and spill: for float64 in half a warp on sm_100, for float32 in half a warp on sm_120 and in
// a warp on sm_87.
template <class Real, int Width>
constexpr int kResidentWarpBlocks = Width < 16          ? 0
                                    : sizeof(Real) == 4 ? 6
                                    : Width == 16       ? 4
                                                        : 0;

template <class Real, int Width>
__global__ void __launch_bounds__(kWarpBlock, kResidentWarpBlocks<Real, Width>)
    eigen_warp_kernel(const __grid_constant__ EigenTable table) {
  constexpr int teams = kWarpBlock / Width;
  __shared__ RegistersShared<Real, Width, Width> shared[teams];
  const int64_t number = int64_t{blockIdx.x} * teams + threadIdx.x / Width;
  if (number >= table.matrices) return;
  WarpTeam<Width> team;
  const Located<Real> located(table, number);
  solve_registers<Real, Width>(team, located, shared[threadIdx.x / Width]);
}

// Blocks whose registers fit on a multiprocessor at once: each thread has its row and about forty
// more.
template <class Real, int Order>
constexpr int kResidentBlocks = Order == 128        ? 3
                                : sizeof(Real) == 4 ? 6
                                                    : 4;

template <class Real, int Order>
__global__ void __launch_bounds__(Order, kResidentBlocks<Real, Order>)
    eigen_block_kernel(const __grid_constant__ EigenTable table) {
  __shared__ RegistersShared<Real, Order, 32> shared;
  BlockTeam<Order / 32> team;
  const Located<Real> located(table, blockIdx.x);
  solve_registers<Real, Order>(team, located, shared);
}

template <class Real, int Width>
cudaError_t launch_warp(const EigenTable& table, cudaStream_t stream) {
  constexpr int teams = kWarpBlock / Width;
  const unsigned blocks = static_cast<unsigned>((table.matrices + teams - 1) / teams);
  return launch_kernel(eigen_warp_kernel<Real, Width>, blocks, kWarpBlock, 0, stream, table);
}

template <class Real, int Order>
cudaError_t launch_block(const EigenTable& table, cudaStream_t stream) {
  const unsigned blocks = static_cast<unsigned>(table.matrices);
  return launch_kernel(eigen_block_kernel<Real, Order>, blocks, Order, 0, stream, table);
}

}  // namespace

template <class Real>
cudaError_t launch_registers(EigenClass size_class, const EigenTable& table, cudaStream_t stream) {
  switch (size_class) {
    case EigenClass::kWarp8:
      return launch_warp<Real, 8>(table, stream);
    case EigenClass::kWarp16:
      return launch_warp<Real, 16>(table, stream);
    case EigenClass::kWarp32:
      return launch_warp<Real, 32>(table, stream);
    case EigenClass::kBlock64:
      return launch_block<Real, 64>(table, stream);
    default:
      // Rows of 128 float64 values would not fit the registers of a thread.
      if constexpr (sizeof(Real) == 4) return launch_block<Real, 128>(table, stream);
      return cudaErrorInvalidValue;
  }
}

template cudaError_t launch_registers<float>(EigenClass, const EigenTable&, cudaStream_t);
template cudaError_t launch_registers<double>(EigenClass, const EigenTable&, cudaStream_t);

}  // namespace fastcov
