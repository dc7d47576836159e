// Eigenvalues on a GPU of matrices that are too large for one block. Each is solved by several
// blocks: by a cluster (sm_90 and newer), or by as many as a cooperative launch keeps running
// together.
#include "eigen_device.h"

namespace fastcov {
namespace {

constexpr int kThreads = 512;
constexpr int kVectors =
    7;  // of shared memory: 2 reflectors, update, product, pivot row, 2 diagonals
constexpr int kRowsOfMember =
    16;  // fewest on average: with fewer rows waiting would cost more than it saves
constexpr int kClusterOrder = 512;    // largest order for which a cluster is enough
constexpr int kClusterMembers = 8;    // blocks of a cluster: every GPU with clusters takes as many
constexpr int kReservedBytes = 2048;  // shared memory that the system and reductions use

struct MembersArguments {
  MembersPlan plan;
  unsigned char* far;
  unsigned char* published;
  unsigned* counters;  // [groups], must be zero at launch
};

template <class Real>
__host__ __device__ constexpr int64_t published_bytes(int n, int members) {
  const int64_t bytes = static_cast<int64_t>(sizeof(Real)) * (4 * padded(n) + members);
  return (bytes + 255) / 256 * 256;
}
constexpr int64_t counter_bytes(int groups) { return (int64_t{groups} * 4 + 255) / 256 * 256; }

template <class Real, class Team>
__device__ void solve_members(Team& team, const Located<Real>& located,
                              const MembersArguments& arguments, int group, Real* vectors) {
  using Bits = typename Numeric<Real>::Bits;
  const MembersPlan& plan = arguments.plan;
  const int n = located.order();
  const int stride = padded(n);
  const int members = team.members();
  Real* const product = vectors + 3 * stride;
  Real* const pivot_row = vectors + 4 * stride;
  Real* const diagonal = vectors + 5 * stride;
  Real* const off_diagonal = vectors + 6 * stride;
  Real* const near = vectors + kVectors * stride;
  int* const counts = reinterpret_cast<int*>(near + static_cast<int64_t>(plan.near_rows) * n);
  Real* const published =
      reinterpret_cast<Real*>(arguments.published + group * published_bytes<Real>(n, members));
  Bits* const largest_of = reinterpret_cast<Bits*>(published + 4 * stride);
  Real* const far = reinterpret_cast<Real*>(arguments.far + group * plan.far_bytes) +
                    static_cast<int64_t>(team.member()) * plan.far_rows * n;
  MemberRows<Real, Team> rows{far,    near,     plan.far_rows, {published, published + 2 * stride},
                              stride, pivot_row};
  const int row_count = rows.rows_before(n, team.member(), members);

  Bits largest = 0;
  for (int r = team.row_squad(); r < row_count; r += team.row_squads()) {
    const int i = r * members + team.member();
    Real* const row = rows.row(r, n);
    for (int j = team.row_lane(); j < n; j += team.row_lanes()) {
      const Real value = j <= i ? located.lower(i, j) : located.lower(j, i);
      const Bits bits = magnitude_bits(value);
      largest = bits > largest ? bits : largest;
      row[j] = value;
    }
  }
  largest = team.maximum(largest);
  if (team.leads()) largest_of[team.member()] = largest;
  team.exchange();
  for (int m = team.lane(); m < members; m += team.lanes()) {
    const Bits other = load_published(largest_of + m);
    largest = other > largest ? other : largest;
  }
  Scale<Real> scale(team.maximum(largest));
  scale.shift = shift_of(team, located, scale);
  for (int r = team.row_squad(); r < row_count; r += team.row_squads()) {
    Real* const row = rows.row(r, n);
    for (int j = team.row_lane(); j < n; j += team.row_lanes()) {
      row[j] = scale.is_finite ? row[j] * scale.shrink : Real(0);
      if (j == r * members + team.member()) row[j] -= scale.shift;
      if (r == 0 && team.member() == 0) rows.publish_first(j, row[j]);
    }
  }
  rows.gather(team, -1, n, product);
  const Reflectors<Real> reflectors{{vectors, vectors + stride}, vectors + 2 * stride, product};
  tridiagonalize(team, rows, n, reflectors, diagonal, off_diagonal);
  finish(team, located, scale, diagonal, off_diagonal, counts);
}

template <class Real, class Barrier>
__global__ void __launch_bounds__(kThreads, 1)
    eigen_members_kernel(const __grid_constant__ EigenTable table,
                         const __grid_constant__ MembersArguments arguments) {
  extern __shared__ __align__(16) unsigned char shared[];
  __shared__ double scratch[kThreads / 32];
  const int members = arguments.plan.members;
  const int group = blockIdx.x / members;
  MemberTeam<kThreads, Barrier> team;
  if constexpr (sizeof(Barrier) > 1) {
    team.barrier.counter = arguments.counters + group;
    team.barrier.members = members;
  }
  team.index = blockIdx.x % members;
  team.count = members;
  team.scratch = scratch;
  for (int64_t number = group; number < table.matrices; number += arguments.plan.groups) {
    const Located<Real> located(table, number);
    solve_members(team, located, arguments, group, reinterpret_cast<Real*>(shared));
    team.sync();
  }
}

template <class Real, class Barrier>
cudaError_t launch(const EigenTable& table, const MembersArguments& arguments, bool is_cluster,
                   cudaStream_t stream) {
  const auto kernel = eigen_members_kernel<Real, Barrier>;
  const MembersPlan& plan = arguments.plan;
  cudaError_t error = allow_shared(kernel, plan.shared_bytes);
  if (error != cudaSuccess) return error;
  cudaLaunchAttribute attribute{};
  if (is_cluster) {
    attribute.id = cudaLaunchAttributeClusterDimension;
    attribute.val.clusterDim.x = plan.members;
    attribute.val.clusterDim.y = 1;
    attribute.val.clusterDim.z = 1;
  } else {
    attribute.id = cudaLaunchAttributeCooperative;
    attribute.val.cooperative = plan.members > 1;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(plan.groups) * plan.members);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = plan.shared_bytes;
  config.stream = stream;
  config.attrs = &attribute;
  config.numAttrs = 1;
  if (is_cluster) {
    int clusters = 0;
    error = cudaOccupancyMaxActiveClusters(&clusters, kernel, &config);
    if (error != cudaSuccess || clusters == 0) return cudaErrorNotSupported;
  }
  return cudaLaunchKernelEx(&config, kernel, table, arguments);
}

}  // namespace

template <class Real>
MembersPlan plan_members(int n, int64_t matrices, const DeviceLimits& limits) {
  MembersPlan plan{};
  const int64_t vector_bytes = static_cast<int64_t>(sizeof(Real)) * kVectors * padded(n) +
                               static_cast<int64_t>(sizeof(int)) * kThreads;
  const int64_t row_bytes = static_cast<int64_t>(sizeof(Real)) * n;
  const int64_t free_bytes = limits.shared_bytes - kReservedBytes - vector_bytes;
  if (free_bytes < 0 || matrices == 0) return plan;
  const int64_t share = limits.multiprocessors / matrices;
  int64_t members = share < 1 ? 1 : share;
  const int64_t most = (n + kRowsOfMember - 1) / kRowsOfMember;
  members = members > most ? most : members;
  if (limits.has_clusters && n <= kClusterOrder && members > 1) {
    int64_t size = 2;
    while (size * 2 <= members && size < kClusterMembers) size *= 2;
    members = size;
    plan.is_cluster = true;
  }
  const int64_t at_once = limits.multiprocessors / members;
  plan.members = static_cast<int>(members);
  plan.groups = static_cast<int>(matrices < at_once ? matrices : at_once);
  const int rows = static_cast<int>((n + members - 1) / members);
  const int64_t fitting = free_bytes / row_bytes;
  plan.near_rows = static_cast<int>(fitting < rows ? fitting : rows);
  plan.far_rows = rows - plan.near_rows;
  plan.shared_bytes = static_cast<int>(vector_bytes + plan.near_rows * row_bytes);
  plan.far_bytes = (members * plan.far_rows * row_bytes + 255) / 256 * 256;
  plan.workspace_bytes = counter_bytes(plan.groups) +
                         plan.groups * (published_bytes<Real>(n, plan.members) + plan.far_bytes);
  return plan;
}

template <class Real>
cudaError_t launch_members(const EigenTable& table, const MembersPlan& plan, void* workspace,
                           cudaStream_t stream) {
  unsigned char* const counters = static_cast<unsigned char*>(workspace);
  unsigned char* const published = counters + counter_bytes(plan.groups);
  const int n = table.entry[0].n;
  const MembersArguments arguments{plan,
                                   published + plan.groups * published_bytes<Real>(n, plan.members),
                                   published, reinterpret_cast<unsigned*>(counters)};
  if (plan.is_cluster) {
    const cudaError_t error = launch<Real, ClusterBarrier>(table, arguments, true, stream);
    if (error != cudaErrorNotSupported) return error;
  }
  const cudaError_t error = cudaMemsetAsync(counters, 0, counter_bytes(plan.groups), stream);
  if (error != cudaSuccess) return error;
  return launch<Real, CounterBarrier>(table, arguments, false, stream);
}

template MembersPlan plan_members<float>(int, int64_t, const DeviceLimits&);
template MembersPlan plan_members<double>(int, int64_t, const DeviceLimits&);
template cudaError_t launch_members<float>(const EigenTable&, const MembersPlan&, void*,
                                           cudaStream_t);
template cudaError_t launch_members<double>(const EigenTable&, const MembersPlan&, void*,
                                            cudaStream_t);

}  // namespace fastcov
