// Inner loops of the streaming second moment, compiled once for each instruction set
// (FASTCOV_LEVEL). No inline function of the standard library may be used here: the linker keeps
// one copy of it for the whole library, which may be the copy that needs AVX-512.
#include "covariance.h"
#include "vectors.h"

#define FASTCOV_PASTE_(a, b) a##b
#define FASTCOV_PASTE(a, b) FASTCOV_PASTE_(a, b)
#define FASTCOV_QUOTE_(a) #a
#define FASTCOV_QUOTE(a) FASTCOV_QUOTE_(a)

namespace fastcov {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 16;  // 16 of 32 registers are accumulators; factors come from memory
#elif defined(__AVX2__)
constexpr int kTileRows = 6;  // 12 of 16 registers are accumulators
#else
constexpr int kTileRows = 3;  // 12 of 16 registers are accumulators
#endif

template <typename T>
inline T* element(const PackRun<T>& run, int64_t row, int64_t channel) {
  constexpr int64_t W = kPanel<T>;
  return run.panels + channel / W * run.panel_stride + row * W + channel % W;
}

// Packs rows of any strides, and the edges that the vector loops leave.
template <typename S, typename T>
uint64_t pack_scalar(const PackRun<T>& run, int64_t row_begin, int64_t row_end,
                     int64_t channel_begin, int64_t channel_end) {
  typedef typename BitsOf<T>::type Bits;
  const S* source = static_cast<const S*>(run.source);
  Bits peak = 0;
  for (int64_t row = row_begin; row < row_end; ++row) {
    const T root = run.root_weight ? run.root_weight[row] : T{1};
    for (int64_t channel = channel_begin; channel < channel_end; ++channel) {
      const S raw = source[row * run.row_stride + channel * run.channel_stride];
      const T value = (static_cast<T>(widen(raw)) - run.shift[channel]) * root;
      *element(run, row, channel) = value;
      Bits bits;
      __builtin_memcpy(&bits, &value, sizeof(bits));
      bits &= static_cast<Bits>(~Bits{0}) >> 1;
      if (bits > peak) peak = bits;
    }
  }
  return peak;
}

// Packs rows whose channels lie side by side: channels_last maps, tokens, vectors.
template <typename S, typename T>
uint64_t pack_contiguous(const PackRun<T>& run) {
  constexpr int64_t W = kPanel<T>;
  constexpr int64_t L = kLanes<T>;
  // It takes 32 panels at a time: more streams of writes would miss the first-level TLB at every
  // row.
  constexpr int64_t kSlab = 32 * W;
  const int64_t vector_end = run.channels / L * L;
  BitVector<T> peak = {};
  for (int64_t slab = 0; slab < vector_end; slab += kSlab) {
    const int64_t slab_end = slab + kSlab < vector_end ? slab + kSlab : vector_end;
    for (int64_t row = 0; row < run.rows; ++row) {
      const S* source = static_cast<const S*>(run.source) + row * run.row_stride;
      const T root = run.root_weight ? run.root_weight[row] : T{1};
      T* destination = run.panels + slab / W * run.panel_stride + row * W;
      int64_t channel = slab;
      for (; channel + W <= slab_end; channel += W, destination += run.panel_stride) {
#pragma GCC unroll 4
        for (int64_t part = 0; part < W; part += L) {
          Vector<T> value = load(source + channel + part);
          value = (value - load(run.shift + channel + part)) * root;
          peak = larger<T>(peak, magnitude_bits<T>(value));
          __builtin_memcpy(destination + part, &value, sizeof(value));
        }
      }
      for (int64_t part = 0; channel < slab_end; channel += L, part += L) {
        Vector<T> value = load(source + channel);
        value = (value - load(run.shift + channel)) * root;
        peak = larger<T>(peak, magnitude_bits<T>(value));
        __builtin_memcpy(destination + part, &value, sizeof(value));
      }
    }
  }
  uint64_t result = largest_lane<T>(peak);
  const uint64_t edge = pack_scalar<S, T>(run, 0, run.rows, vector_end, run.channels);
  return edge > result ? edge : result;
}

// Packs rows that lie side by side, channel by channel (NCHW maps). They are transposed meanwhile.
template <typename S, typename T>
uint64_t pack_transposed(const PackRun<T>& run) {
  constexpr int64_t L = kLanes<T>;
  const int64_t row_end = run.rows / L * L;
  const int64_t channel_end = run.channels / L * L;
  BitVector<T> peak = {};
  for (int64_t channel = 0; channel < channel_end; channel += L) {
    const S* source = static_cast<const S*>(run.source) + channel * run.channel_stride;
    T* destination = element(run, 0, channel);
    for (int64_t row = 0; row < row_end; row += L) {
      Vector<T> square[L];
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) {
        Vector<T> value = load(source + i * run.channel_stride + row);
        value -= run.shift[channel + i];
        if (run.root_weight) value *= load(run.root_weight + row);
        peak = larger<T>(peak, magnitude_bits<T>(value));
        square[i] = value;
      }
      transpose<T>(square);
#pragma GCC unroll 16
      for (int64_t i = 0; i < L; ++i) {
        __builtin_memcpy(destination + (row + i) * kPanel<T>, &square[i], sizeof(square[i]));
      }
    }
  }
  uint64_t result = largest_lane<T>(peak);
  const uint64_t below = pack_scalar<S, T>(run, row_end, run.rows, 0, channel_end);
  const uint64_t beside = pack_scalar<S, T>(run, 0, run.rows, channel_end, run.channels);
  if (below > result) result = below;
  return beside > result ? beside : result;
}

template <typename S, typename T>
uint64_t pack_layout(const PackRun<T>& run) {
  constexpr int64_t W = kPanel<T>;
  if (run.channels % W != 0) {
    T* last = run.panels + run.channels / W * run.panel_stride;
    for (int64_t row = 0; row < run.rows; ++row) {
      for (int64_t column = run.channels % W; column < W; ++column) last[row * W + column] = 0;
    }
  }
  if (run.channel_stride == 1) return pack_contiguous<S, T>(run);
  if (run.row_stride == 1) return pack_transposed<S, T>(run);
  return pack_scalar<S, T>(run, 0, run.rows, 0, run.channels);
}

uint64_t pack_float32(const PackRun<float>& run) {
  switch (run.dtype) {
    case Dtype::kBFloat16:
      return pack_layout<BFloat16, float>(run);
    case Dtype::kFloat16:
      return pack_layout<Float16, float>(run);
    default:
      return pack_layout<float, float>(run);
  }
}

uint64_t pack_float64(const PackRun<double>& run) { return pack_layout<double, double>(run); }

// Sets sums[row][column] to sum_k left[k][row] right[k][column], or adds it, for Rows rows from row
// `Begin` on.
template <typename T, int Begin, int Rows>
inline void strip(const T* left, const T* right, int64_t chain, bool adds, T* sums) {
  constexpr int64_t W = kPanel<T>;
  constexpr int L = kLanes<T>;
  constexpr int kParts = static_cast<int>(W) / L;
  Vector<T> sum[Rows][kParts] = {};
#pragma GCC unroll 2
  for (int64_t k = 0; k < chain; ++k) {
    Vector<T> factor[kParts];
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) factor[part] = load(right + k * W + part * L);
#pragma GCC unroll 16
    for (int row = 0; row < Rows; ++row) {
      const T scalar = left[k * W + Begin + row];
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) sum[row][part] += factor[part] * scalar;
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < Rows; ++row) {
#pragma GCC unroll 4
    for (int part = 0; part < kParts; ++part) {
      T* to = sums + (Begin + row) * W + part * L;
      if (adds) sum[row][part] += load(to);
      __builtin_memcpy(to, &sum[row][part], sizeof(sum[row][part]));
    }
  }
}

// Splits the W rows of a tile into the fewest equal strips whose accumulators fit into the
// registers.
template <typename T, int Begin>
inline void strips(const T* left, const T* right, int64_t chain, int64_t rows, bool adds, T* sums) {
  constexpr int W = static_cast<int>(kPanel<T>);
  if constexpr (Begin < W) {
    if (Begin >= rows) return;
    constexpr int kStrips = (W - Begin + kTileRows - 1) / kTileRows;
    constexpr int kRows = (W - Begin + kStrips - 1) / kStrips;
    strip<T, Begin, kRows>(left, right, chain, adds, sums);
    strips<T, Begin + kRows>(left, right, chain, rows, adds, sums);
  }
}

// Not inlined, because it would take registers from the loop of a strip.
template <typename T>
__attribute__((noinline)) void add_square(const T* sums, double scale, double keep, double* out,
                                          int64_t out_stride, int64_t rows, int64_t columns) {
  constexpr int64_t W = kPanel<T>;
  for (int64_t row = 0; row < rows; ++row, sums += W, out += out_stride) {
    if (columns == W) {  // the compiler vectorises a constant number of columns
      for (int64_t column = 0; column < W; ++column) {
        out[column] = out[column] * keep + static_cast<double>(sums[column]) * scale;
      }
    } else {
      for (int64_t column = 0; column < columns; ++column) {
        out[column] = out[column] * keep + static_cast<double>(sums[column]) * scale;
      }
    }
  }
}

template <typename T>
void tile(const T* left, const T* right, int64_t block_rows, double scale, double keep, double* out,
          int64_t out_stride, int64_t rows, int64_t columns) {
  constexpr int64_t W = kPanel<T>;
  alignas(64) T sums[W * W];
  const int64_t chains = (block_rows + kChainRows - 1) / kChainRows;
  for (int64_t chain = 0; chain < chains; ++chain) {
    if (chain == chains - 1) {
      // A large state lies in memory, and is fetched while sums are formed.
      for (int64_t row = 0; row < rows; ++row) {
        __builtin_prefetch(out + row * out_stride, 1);
        __builtin_prefetch(out + row * out_stride + columns - 1, 1);
      }
    }
    const int64_t begin = block_rows * chain / chains;
    const int64_t end = block_rows * (chain + 1) / chains;
    strips<T, 0>(left + begin * W, right + begin * W, end - begin, rows, chain > 0, sums);
  }
  add_square(sums, scale, keep, out, out_stride, rows, columns);
}

template <typename T>
void panel_sum(const T* panel, const T* factor, int64_t block_rows, double scale, double* out,
               int64_t columns) {
  constexpr int64_t W = kPanel<T>;
  constexpr int L = kLanes<T>;
  constexpr int kParts = static_cast<int>(W) / L;
  constexpr int kChains = 4;  // short chains round less and do not wait for the adder
  Vector<T> sums[kChains][kParts] = {};
  int64_t k = 0;
  for (; k + kChains <= block_rows; k += kChains) {
#pragma GCC unroll 4
    for (int chain = 0; chain < kChains; ++chain) {
      const T weight = factor ? factor[k + chain] : T{1};
#pragma GCC unroll 4
      for (int part = 0; part < kParts; ++part) {
        sums[chain][part] += load(panel + (k + chain) * W + part * L) * weight;
      }
    }
  }
  for (; k < block_rows; ++k) {
    const T weight = factor ? factor[k] : T{1};
    for (int part = 0; part < kParts; ++part) {
      sums[0][part] += load(panel + k * W + part * L) * weight;
    }
  }
  for (int64_t column = 0; column < columns; ++column) {
    double total = 0;
    for (int chain = 0; chain < kChains; ++chain) total += sums[chain][column / L][column % L];
    out[column] += scale * total;
  }
}

}  // namespace

extern const Level FASTCOV_PASTE(FASTCOV_LEVEL, _level);
const Level FASTCOV_PASTE(FASTCOV_LEVEL, _level) = {
    FASTCOV_QUOTE(FASTCOV_LEVEL),
    {pack_float32, tile<float>, panel_sum<float>},
    {pack_float64, tile<double>, panel_sum<double>},
    nullptr,
};

}  // namespace fastcov
