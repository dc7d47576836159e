// Runs the reduction of csrc/eigen_large.h by threads: eigen_crew CREW DTYPE N < matrix > results
//   matrix:  lower triangle in full [N, N], float64
//   results: diagonal [N], shift added, off-diagonal [N - 1] and scale of the tridiagonal form, float64
// CREW is one (rank), even (four ranks, a thread each), uneven (the same on two threads), serial
// (the same on one thread) or unsafe (two sweeps that do not wait for each other).
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "eigen_large.h"

namespace fastcov {
namespace {

constexpr int kRanks = 4;
std::vector<int> bounds;  // of the threads' ranges of ranks

void run_ranks(int, void (*body)(void*, int, int), void* argument) {
  std::vector<std::thread> threads;
  for (size_t t = 0; t + 1 < bounds.size(); ++t) {
    threads.emplace_back(body, argument, bounds[t], bounds[t + 1]);
  }
  for (std::thread& thread : threads) thread.join();
}

template <class T>
int run(const std::string& name, int n) {
  std::vector<double> input(static_cast<size_t>(n) * n);
  if (std::fread(input.data(), sizeof(double), input.size(), stdin) != input.size()) return 2;
  const std::vector<T> matrix(input.begin(), input.end());
  const Crew crew{name == "one" ? 1 : kRanks, run_ranks};
  const auto size = static_cast<size_t>(LargeSpace<T>(nullptr, n, crew.ranks).bytes);
  void* const scratch = std::aligned_alloc(64, size);
  for (size_t byte = 0; byte < size; ++byte) static_cast<unsigned char*>(scratch)[byte] = 0xff;
  const LargeSpace<T> space(scratch, n, crew.ranks);
  if (name == "unsafe") {
    const Band<T> band{space.band};
    for (int64_t e = 0; e < Band<T>::elements(tile_count(n) * kTile); ++e) band.data[e] = T(1);
    // Two sweeps, a thread each, neither of which sees what the other has done.
    std::vector<SweepProgress> unseen(2 * static_cast<size_t>(n), SweepProgress{n});
    std::vector<std::thread> threads;
    for (int sweep = 0; sweep < 2; ++sweep) {
      const ChaseSpace<T> alone{band, unseen.data() + sweep * n, space.handed};
      threads.emplace_back([=] { chase_sweep_range(alone, n, sweep, 0, 1); });
    }
    for (std::thread& thread : threads) thread.join();
    return 0;
  }
  EigenTask<T> task{};
  task.matrix = {matrix.data(), n, 1};
  task.n = n;
  const Scale<T> scale = reduce_large(task, crew, space);
  std::vector<double> results(space.diagonal, space.diagonal + n);
  for (double& entry : results) entry += static_cast<double>(scale.shift);
  results.insert(results.end(), space.off_diagonal, space.off_diagonal + n - 1);
  results.push_back(static_cast<double>(scale.restore));
  std::fwrite(results.data(), sizeof(double), results.size(), stdout);
  std::free(scratch);
  return 0;
}

}  // namespace
}  // namespace fastcov

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const std::string crew = arguments[1];
  const int n = std::atoi(arguments[3]);
  if (crew == "uneven") {
    fastcov::bounds = {0, 3, 4};
  } else if (crew == "serial") {
    fastcov::bounds = {0, 4};
  } else {
    fastcov::bounds = {0, 1, 2, 3, 4};
  }
  return std::string(arguments[2]) == "float32" ? fastcov::run<float>(crew, n)
                                                : fastcov::run<double>(crew, n);
}
