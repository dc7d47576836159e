// Counts what csrc/covariance_driver.h multiplies: covariance_tiles GRAM ROWS C THREADS > results
//   results: the most pieces that torch was asked to spread over its threads, channels of a side,
//            rows multiplied for every pair of sides [sides, sides], float64
// GRAM is float32, float64 (by vectors) or matrix. Kernels do nothing; torch is one thread, however
// many it says that it has.
#include <cstdio>
#include <cstdlib>
#include <string>
#include <thread>
#include <vector>

#include "covariance_driver.h"

namespace {

uint32_t threads = 1;
int64_t most_pieces = 1;
int64_t side = 0;
int64_t sides = 0;
std::vector<double> multiplied;  // [sides, sides]

}  // namespace

extern "C" AOTITorchError torch_get_num_threads(uint32_t* count) {
  *count = threads;
  return AOTI_TORCH_SUCCESS;
}

extern "C" AOTITorchError torch_parallel_for(int64_t begin, int64_t end, int64_t, ParallelFunc body,
                                             void* context) {
  most_pieces = std::max(most_pieces, end - begin);
  body(begin, end, context);
  return AOTI_TORCH_SUCCESS;
}

namespace fastcov {
namespace {

template <typename T>
constexpr Kernels<T> idle_kernels = {
    [](const PackRun<T>&) -> uint64_t { return 0; },
    [](const T*, const T*, int64_t, double, double, double*, int64_t, int64_t, int64_t) {},
    [](const T*, const T*, int64_t, double, double*, int64_t) {},
};

constexpr MatrixKernels idle_matrix = {
    [] {},
    [] {},
    [](int, const float*, int64_t, int64_t, uint16_t*, uint16_t*) {},
    [](int, const MatrixSide&, int64_t, double, double, double*, int64_t, int64_t, int64_t) {},
};

template <typename Gram>
class CountedGram : public Gram {
 public:
  using Gram::Gram;

  template <typename T>
  void multiply(const Block<T>& block, int64_t panels, int64_t rows, const GramBlock& to) const {
    if (std::this_thread::get_id() != torch_thread_) std::abort();
    multiplied.at(static_cast<size_t>(to.i * sides + to.j)) += static_cast<double>(rows);
    Gram::multiply(block, panels, rows, to);
  }

 private:
  const std::thread::id torch_thread_ = std::this_thread::get_id();
};

template <typename T, typename Gram>
void run(Dtype dtype, int64_t rows, int64_t channels) {
  side = Gram::kSide;
  sides = (channels + side - 1) / side;
  multiplied.assign(static_cast<size_t>(sides * sides), 0);
  std::vector<double> moment(static_cast<size_t>(triangle_values(channels)));
  std::vector<double> sum(static_cast<size_t>(channels));
  std::vector<double> shift(sum);
  double weight = 0;
  int64_t count[2] = {};
  Update update{};
  std::fill(std::begin(update.rows.size), std::end(update.rows.size), 1);
  update.rows.size[kMaxLeading - 1] = update.rows.rows = rows;
  update.rows.stride[kMaxLeading - 1] = update.rows.channels = channels;
  update.rows.channel_stride = 1;
  update.dtype = dtype;
  update.row_scale = update.decay = 1;
  update.moment = moment.data();
  update.sum = sum.data();
  update.shift = shift.data();
  update.weight = &weight;
  update.count = count;
  Accumulator<T, CountedGram<Gram>>(update).run();
}

}  // namespace

const Level& level() {
  static const Level idle{"idle", idle_kernels<float>, idle_kernels<double>, &idle_matrix};
  return idle;
}

}  // namespace fastcov

int main(int count, char** arguments) {
  if (count != 5) return 2;
  using namespace fastcov;
  const std::string gram = arguments[1];
  const int64_t rows = std::atoll(arguments[2]);
  const int64_t channels = std::atoll(arguments[3]);
  threads = static_cast<uint32_t>(std::atoi(arguments[4]));
  if (gram == "matrix") {
    run<float, MatrixGram>(Dtype::kBFloat16, rows, channels);
  } else if (gram == "float64") {
    run<double, VectorGram<double>>(Dtype::kFloat64, rows, channels);
  } else {
    run<float, VectorGram<float>>(Dtype::kFloat32, rows, channels);
  }
  const double head[] = {static_cast<double>(most_pieces), static_cast<double>(side)};
  std::fwrite(head, sizeof(double), 2, stdout);
  std::fwrite(multiplied.data(), sizeof(double), multiplied.size(), stdout);
}
