// Operator accumulate_ on a CPU: choice of the instruction set, checks of the tensors,
// registration.
#include <cstdlib>
#include <cstring>

#ifdef FASTCOV_AMX
#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

#include "boxing.h"
#include "covariance_driver.h"
#include "cursor.h"

namespace fastcov {

namespace {

#ifdef FASTCOV_AMX
// Linux gives a process the large tile registers only when it asks for them (since 5.16). It
// refuses under an older kernel, under a hypervisor that hides them, and where a signal stack is
// too small for them.
bool grants_amx() {
  constexpr unsigned kTiles = 1u << 24 | 1u << 22;  // AMX-TILE, AMX-BF16
  constexpr long kRequestPermission = 0x1023;       // ARCH_REQ_XCOMP_PERM
  constexpr long kTileData = 18;
  unsigned eax, ebx, ecx, edx = 0;
  if (!__get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) || (edx & kTiles) != kTiles) return false;
  return syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

const Level& pick_level() {
#ifdef FASTCOV_X86
  // For tests and diagnosis, a lower set than the machine has can be asked for, but never a higher
  // one.
  const char* wanted = std::getenv("FASTCOV_CPU_LEVEL");
  __builtin_cpu_init();
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
                        __builtin_cpu_supports("f16c");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") &&
                          __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (wanted && std::strcmp(wanted, "baseline") == 0) return baseline_level;
  const bool avx2_wanted = wanted && std::strcmp(wanted, "avx2") == 0;
#ifdef FASTCOV_AMX
  const bool avx512_wanted = wanted && std::strcmp(wanted, "avx512") == 0;
  if (has_avx512 && !avx2_wanted && !avx512_wanted && grants_amx()) {
    static const Level amx_level = {"amx", avx512_level.float32, avx512_level.float64,
                                    &amx_kernels};
    return amx_level;
  }
#endif
  if (has_avx512 && !avx2_wanted) return avx512_level;
  if (has_avx2) return avx2_level;
#endif
  return baseline_level;
}

}  // namespace

const Level& level() {
  static const Level& picked = pick_level();
  return picked;
}

namespace {

Dtype dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    case ScalarType::Double:
      return Dtype::kFloat64;
    default:
      STD_TORCH_CHECK(false, "rows must be float32, bfloat16, float16 or float64");
  }
}

bool is_multiplied_by_matrix(const Update& update) {
  return update.dtype != Dtype::kFloat64 && level().matrix &&
         MatrixGram::pays_for(update.dtype, update.rows.channels);
}

void add_rows(const Update& update) {
  if (update.dtype == Dtype::kFloat64) {
    Accumulator<double, VectorGram<double>>(update).run();
  } else if (is_multiplied_by_matrix(update)) {
    Accumulator<float, MatrixGram>(update).run();
  } else {
    Accumulator<float, VectorGram<float>>(update).run();
  }
}

// Argument of choose_shift. Vectors multiply shifted rows as fast as others, with the rounding of
// float32. A matrix unit takes three to six products instead of one, and rounds less.
double exact_near(const Update& update) {
  if (!is_half(update.dtype)) return 0;
  return is_multiplied_by_matrix(update) ? kNear : 1;
}

// Number near a shift that can be subtracted in the rows' working type. float64 corrects the rest.
inline double usable_shift(double shift) {
  return std::abs(shift) < kLargestFloatShift ? static_cast<double>(static_cast<float>(shift)) : 0;
}

bool is_usable(const Update& update) {
  if (update.dtype == Dtype::kFloat64) return true;
  bool usable = true;
  for (int64_t channel = 0; channel < update.rows.channels; ++channel) {
    usable &= usable_shift(update.shift[channel]) == update.shift[channel];
  }
  return usable;
}

// Adds rows to a state whose shift was chosen by rows of another dtype, and is no number of the
// working type. Sums about the nearest such number are formed apart, and translated to the shift.
void add_rows_about_nearest(const Update& update) {
  const int64_t channels = update.rows.channels;
  const int64_t values = triangle_values(channels);
  std::vector<double> moment(values), sum(channels), usable(channels);
  for (int64_t channel = 0; channel < channels; ++channel) {
    usable[channel] = usable_shift(update.shift[channel]);
  }
  double weight = 0;
  Update part = update;
  part.decay = 1;
  part.moment = moment.data();
  part.sum = sum.data();
  part.shift = usable.data();
  part.weight = &weight;
  add_rows(part);
  translate(part, std::vector<double>(update.shift, update.shift + channels));
  for (int64_t at = 0; at < values; ++at) {
    update.moment[at] = update.moment[at] * update.decay + moment[at];
  }
  for (int64_t channel = 0; channel < channels; ++channel) {
    update.sum[channel] = update.sum[channel] * update.decay + sum[channel];
  }
  *update.weight = *update.weight * update.decay + weight;
}

// True if the number of rows grows past a power of two. Looking so rarely whether the shift is
// still where the rows are costs nothing.
bool passes_power_of_two(int64_t before, int64_t added) {
  return (before ^ (before + added)) > before;
}

void accumulate_(Tensor moment, Tensor sum, Tensor shift, Tensor weight, Tensor count, Tensor rows,
                 int64_t channel_dim, std::optional<Tensor> row_weight, double row_scale,
                 double decay) {
  Update update;
  update.rows = view_rows(rows, channel_dim);
  update.dtype = dtype_of(rows);
  const int64_t channels = update.rows.channels;
  update.moment = state_pointer<double>(moment, ScalarType::Double, triangle_values(channels));
  update.sum = state_pointer<double>(sum, ScalarType::Double, channels);
  update.shift = state_pointer<double>(shift, ScalarType::Double, channels);
  update.weight = state_pointer<double>(weight, ScalarType::Double, 1);
  update.count = state_pointer<int64_t>(count, ScalarType::Long, 2);
  update.row_scale = row_scale;
  update.decay = decay;
  if (row_weight.has_value()) {
    const bool is_double = row_weight->scalar_type() == ScalarType::Double;
    STD_TORCH_CHECK((is_double || row_weight->scalar_type() == ScalarType::Float) &&
                        row_weight->numel() == update.rows.rows && row_weight->is_contiguous(),
                    "row_weight must be contiguous float32 or float64, one value a row");
    update.row_weight = {row_weight->const_data_ptr(), is_double};
  }
  if (channels == 0 || (update.rows.rows == 0 && decay == 1)) return;
  if (update.row_weight.data) update.row_weight.choose_unit(update.rows.rows);
  if (update.count[0] == 0) {
    choose_shift(update, exact_near(update));
  } else if (*update.weight > 0 &&
             (decay != 1 || passes_power_of_two(update.count[0], update.rows.rows))) {
    follow_mean(update, exact_near(update));
  }
  if (is_usable(update)) {
    add_rows(update);
  } else {
    add_rows_about_nearest(update);
  }
}

// Counts a call of which every row is read, and adds its rows. Returns their number; or -1, with
// nothing counted, if the call does not have the layout of the last one or if not every row is
// read.
int64_t accumulate_again_(Tensor cursor, Tensor moment, Tensor sum, Tensor shift, Tensor weight,
                          Tensor count, Tensor rows) {
  Cursor& at = Cursor::of(cursor);
  if (!at.layout.fits(rows) || at.fraction < kWhole) return -1;
  const RowsView view = view_rows(rows, at.layout.channel_dim);
  if (view.rows < 1) return -1;
  accumulate_(moment, sum, shift, weight, count, rows, at.layout.channel_dim, std::nullopt, 1, 1);
  at.count(view.rows, rows.size(0));
  return view.rows;
}

}  // namespace
}  // namespace fastcov

extern "C" __attribute__((visibility("default"))) const char* fastcov_cpu_instruction_set() {
  return fastcov::level().name;
}

STABLE_TORCH_LIBRARY_IMPL(fastcov, CPU, m) {
  m.impl("accumulate_", TORCH_BOX(&fastcov::accumulate_));
  m.impl("accumulate_again_", TORCH_BOX(&fastcov::accumulate_again_));
}
