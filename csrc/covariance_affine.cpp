// Operator accumulate_affine_ on a CPU: the second moment of y = W x + b from that of x, in
// float32.
//
// W and the product W Sigma are kept as panels of 16 outputs, with one row for each input and a
// last row for the mean. A gram multiplies such panels, so that the product is written in the form
// in which it is read again, and its triangle with W is a gram of two different sides.
#include "boxing.h"
#include "covariance_gram.h"

namespace fastcov {
namespace {

// Most times that the largest variance may grow when it is taken about the inputs' shift and as if
// inputs were not correlated. Rounding of float32 grows by this factor, and also by the root of the
// number of inputs where what cancels is one direction of many. At these limits the error stays
// below 2e-6 of the result.
constexpr double kCancellation = 4;
constexpr double kFewInputs = 64;
constexpr double kLeastCancellation = 1.5;  // inputs that are not correlated have a factor of 1
// Range of squares that float32 sums without loss.
constexpr double kSmallest = 1e-20;
constexpr double kLargest = 1e30;
// Panels of W that stay in the second-level cache while Sigma passes by.
constexpr int64_t kGroup = 4;

struct AffineUpdate {
  double* moment;       // triangle of [C, C]
  double* sum;          // [C]
  const double* shift;  // [C]
  double* weight;       // []
  int64_t* count;       // [2]
  int64_t channels;
  const double* input_moment;  // triangle of [I, I]
  const double* input_sum;     // [I]
  const double* input_shift;   // [I]
  int64_t inputs;
  int64_t rows;
  const float* matrix;  // [C, I]
  int64_t matrix_stride;
  int64_t matrix_input_stride;
  const float* bias;  // [C] or null
  int64_t bias_stride;
  double row_scale;
  double decay;
};

// Largest squares among some outputs, in units of Sigma.
struct Extent {
  double variance = 0;
  double uncorrelated = 0;  // variance about the shift if inputs were not correlated
  double mean = 0;
  bool is_finite = true;

  void add(double variance_, double uncorrelated_, double mean_) {
    is_finite = is_finite && std::isfinite(variance_ + uncorrelated_ + mean_);
    variance = std::max(variance, variance_);
    uncorrelated = std::max(uncorrelated, uncorrelated_);
    mean = std::max(mean, mean_);
  }
  void add(const Extent& other) {
    is_finite = is_finite && other.is_finite;
    add(other.variance, other.uncorrelated, other.mean);
  }
  // True if the result is exact enough. Outputs whose squares add up to less than float32 holds
  // cannot have overflowed.
  bool is_exact(double unit, int64_t inputs) const {
    const double many = std::max(1.0, static_cast<double>(inputs) / kFewInputs);
    const double limit = std::max(kLeastCancellation, kCancellation / std::sqrt(many));
    return is_finite && variance > kSmallest && variance < kLargest && mean < kLargest &&
           uncorrelated < limit * variance &&
           (variance + mean) * unit < static_cast<double>(std::numeric_limits<float>::max());
  }
};

class AffineAccumulator {
 public:
  static constexpr int64_t W = kPanel<float>;

  explicit AffineAccumulator(const AffineUpdate& update)
      : update_(update),
        inputs_(update.inputs),
        columns_(update.inputs + 1),
        input_panels_((update.inputs + W - 1) / W),
        panels_((update.channels + W - 1) / W),
        tiles_(panels_ * (panels_ + 1) / 2),
        unit_(unit_of(update)) {}

  // Makes the update. Returns false, with nothing added, where reading the rows themselves would be
  // more exact.
  bool run() {
    const int64_t threads = useful_threads(columns_ * tiles_ * W * W);
    const int64_t side = panels_ * columns_ * W;
    const int64_t scatter_values = input_panels_ * inputs_ * W;
    Workspace workspace((panels_ * W + scatter_values + 2 * side) * int64_t{sizeof(float)} +
                        (panels_ * W + inputs_) * int64_t{sizeof(double)} +
                        threads * int64_t{sizeof(Extent)} + 7 * 64);
    zeros_ = workspace.take<float>(panels_ * W);
    scatter_ = workspace.take<float>(scatter_values);
    matrix_ = workspace.take<float>(side);
    product_ = workspace.take<float>(side);
    mean_ = workspace.take<double>(panels_ * W);
    input_mean_ = workspace.take<double>(inputs_);
    Extent* extents = workspace.take<Extent>(threads);
    std::fill(zeros_, zeros_ + panels_ * W, 0.0f);
    for (int64_t input = 0; input < inputs_; ++input) {
      input_mean_[input] =
          update_.input_shift[input] + update_.input_sum[input] / static_cast<double>(update_.rows);
    }
    parallel(threads, [&](int64_t slot) {
      fill_scatter(inputs_ * slot / threads, inputs_ * (slot + 1) / threads);
    });
    parallel(threads, [&](int64_t slot) {
      extents[slot] = map(panels_ * slot / threads, panels_ * (slot + 1) / threads);
    });
    Extent extent;
    for (int64_t slot = 0; slot < threads; ++slot) extent.add(extents[slot]);
    if (!extent.is_exact(unit_, inputs_)) return false;
    parallel(threads, [&](int64_t slot) {
      add_tiles(tiles_ * slot / threads, tiles_ * (slot + 1) / threads);
    });
    add_mean();
    return true;
  }

 private:
  double scatter(int64_t i, int64_t j) const {
    const double product = update_.input_sum[i] * update_.input_sum[j];
    return update_.input_moment[triangle_entry(i, j)] - product / static_cast<double>(update_.rows);
  }

  // A power of two above all entries of Sigma, and of the moment that Sigma is taken from.
  static double unit_of(const AffineUpdate& update) {
    double largest = 0;
    for (int64_t i = 0; i < update.inputs; ++i) {
      largest = std::max(largest, update.input_moment[triangle_entry(i, i)]);
    }
    return std::isfinite(largest) && largest > 0 ? std::ldexp(1.0, std::ilogb(largest) + 1) : 1.0;
  }

  // Fills rows `begin` to `end` of Sigma's lower triangle, and their mirror images.
  void fill_scatter(int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t j = 0; j <= i; ++j) {
        const float value = static_cast<float>(scatter(i, j) / unit_);
        *scatter_at(i, j) = value;
        *scatter_at(j, i) = value;
      }
    }
  }

  float* scatter_at(int64_t row, int64_t column) const {
    return scatter_ + column / W * inputs_ * W + row * W + column % W;
  }

  // Fills panels `begin` to `end` of W, of W Sigma and of the means.
  Extent map(int64_t begin, int64_t end) {
    Extent extent;
    if (begin == end) return extent;
    pack(begin, end);
    for (int64_t group = begin; group < end; group += kGroup) {
      const int64_t group_end = std::min(end, group + kGroup);
      for (int64_t input_panel = 0; input_panel < input_panels_; ++input_panel) {
        for (int64_t panel = group; panel < group_end; ++panel) multiply(panel, input_panel);
      }
      for (int64_t panel = group; panel < group_end; ++panel) take_mean(panel, extent);
    }
    return extent;
  }

  void pack(int64_t begin, int64_t end) const {
    PackRun<float> run;  // its rows are inputs here
    run.source = update_.matrix + begin * W * update_.matrix_stride;
    run.dtype = Dtype::kFloat32;
    run.rows = inputs_;
    run.row_stride = update_.matrix_input_stride;
    run.channel_stride = update_.matrix_stride;
    run.channels = std::min(update_.channels, end * W) - begin * W;
    run.shift = zeros_;
    run.root_weight = nullptr;
    run.panels = matrix_ + begin * columns_ * W;
    run.panel_stride = columns_ * W;
    kernels<float>().pack(run);
  }

  void multiply(int64_t panel, int64_t input_panel) const {
    double block[W * W] = {};
    const int64_t rows = std::min(W, inputs_ - input_panel * W);
    kernels<float>().tile(scatter_ + input_panel * inputs_ * W, matrix_ + panel * columns_ * W,
                          inputs_, 1.0, 0.0, block, W, rows, W);
    float* to = product_ + (panel * columns_ + input_panel * W) * W;
    for (int64_t at = 0; at < rows * W; ++at) to[at] = static_cast<float>(block[at]);
  }

  // Fills the last row of a panel, the mean's, and notes the size of its outputs.
  void take_mean(int64_t panel, Extent& extent) const {
    float* matrix = matrix_ + panel * columns_ * W;
    float* product = product_ + panel * columns_ * W;
    double mean[W] = {};
    float variance[W] = {};
    float uncorrelated[W] = {};
    for (int64_t input = 0; input < inputs_; ++input) {
      const float* weight = matrix + input * W;
      const float own =
          static_cast<float>(update_.input_moment[triangle_entry(input, input)] / unit_);
      for (int64_t c = 0; c < W; ++c) {
        mean[c] += static_cast<double>(weight[c]) * input_mean_[input];
        variance[c] += weight[c] * product[input * W + c];
        uncorrelated[c] += weight[c] * weight[c] * own;
      }
    }
    const double root = std::sqrt(static_cast<double>(update_.rows) / unit_);
    for (int64_t c = 0; c < W; ++c) {
      const int64_t channel = panel * W + c;
      const bool is_real = channel < update_.channels;
      if (is_real) {
        mean[c] -= update_.shift[channel];
        if (update_.bias)
          mean[c] += static_cast<double>(update_.bias[channel * update_.bias_stride]);
      }
      mean_[channel] = mean[c];
      const double scaled = mean[c] * root;
      matrix[inputs_ * W + c] = product[inputs_ * W + c] = static_cast<float>(scaled);
      extent.add(static_cast<double>(variance[c]), static_cast<double>(uncorrelated[c]),
                 scaled * scaled);
    }
  }

  void add_tiles(int64_t begin, int64_t end) const {
    const int64_t channels = update_.channels;
    for_each_tile(
        panels_, VectorGram<float>::group_columns(columns_), begin, end, [&](int64_t i, int64_t j) {
          kernels<float>().tile(product_ + i * columns_ * W, matrix_ + j * columns_ * W, columns_,
                                unit_ * update_.row_scale, update_.decay,
                                update_.moment + triangle_entry(i * W, j * W), kTriangleTile,
                                std::min(W, channels - i * W), std::min(W, channels - j * W));
        });
  }

  void add_mean() const {
    const double weight = static_cast<double>(update_.rows) * update_.row_scale;
    for (int64_t channel = 0; channel < update_.channels; ++channel) {
      update_.sum[channel] = update_.sum[channel] * update_.decay + mean_[channel] * weight;
    }
    *update_.weight = *update_.weight * update_.decay + weight;
    update_.count[0] += update_.rows;
  }

  const AffineUpdate& update_;
  const int64_t inputs_;
  const int64_t columns_;
  const int64_t input_panels_;
  const int64_t panels_;
  const int64_t tiles_;
  const double unit_;
  float* zeros_ = nullptr;        // [panels][W]
  float* scatter_ = nullptr;      // [input panels][I][W]
  float* matrix_ = nullptr;       // [panels][I + 1][W]
  float* product_ = nullptr;      // [panels][I + 1][W]
  double* mean_ = nullptr;        // [panels][W]
  double* input_mean_ = nullptr;  // [I]
};

Tensor accumulate_affine_(Tensor moment, Tensor sum, Tensor shift, Tensor weight, Tensor count,
                          Tensor input_moment, Tensor input_sum, Tensor input_shift, int64_t rows,
                          Tensor matrix, std::optional<Tensor> bias, double row_scale,
                          double decay) {
  STD_TORCH_CHECK(matrix.dim() == 2 && matrix.scalar_type() == ScalarType::Float && matrix.is_cpu(),
                  "the matrix must be float32 [C_out, C_in] on the CPU");
  AffineUpdate update;
  const int64_t channels = update.channels = matrix.size(0);
  const int64_t inputs = update.inputs = matrix.size(1);
  update.moment = state_pointer<double>(moment, ScalarType::Double, triangle_values(channels));
  update.sum = state_pointer<double>(sum, ScalarType::Double, channels);
  update.shift = state_pointer<double>(shift, ScalarType::Double, channels);
  update.weight = state_pointer<double>(weight, ScalarType::Double, 1);
  update.count = state_pointer<int64_t>(count, ScalarType::Long, 2);
  update.input_moment =
      state_pointer<double>(input_moment, ScalarType::Double, triangle_values(inputs));
  update.input_sum = state_pointer<double>(input_sum, ScalarType::Double, inputs);
  update.input_shift = state_pointer<double>(input_shift, ScalarType::Double, inputs);
  update.rows = rows;
  update.matrix = static_cast<const float*>(matrix.const_data_ptr());
  update.matrix_stride = matrix.stride(0);
  update.matrix_input_stride = matrix.stride(1);
  update.bias = nullptr;
  update.bias_stride = 0;
  if (bias.has_value()) {
    STD_TORCH_CHECK(bias->scalar_type() == ScalarType::Float && bias->numel() == channels &&
                        bias->dim() == 1 && bias->is_cpu(),
                    "the bias must be float32 [C_out] on the CPU");
    update.bias = static_cast<const float*>(bias->const_data_ptr());
    update.bias_stride = bias->stride(0);
  }
  update.row_scale = row_scale;
  update.decay = decay;
  Tensor is_added = torch::stable::new_empty(moment, {}, ScalarType::Bool);
  *static_cast<bool*>(is_added.mutable_data_ptr()) =
      rows > 0 && channels > 0 && inputs > 0 && AffineAccumulator(update).run();
  return is_added;
}

}  // namespace
}  // namespace fastcov

STABLE_TORCH_LIBRARY_IMPL(fastcov, CPU, m) {
  m.impl("accumulate_affine_", TORCH_BOX(&fastcov::accumulate_affine_));
}
