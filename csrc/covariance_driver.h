// Driver of accumulate_ on a CPU. Blocks of rows are packed, and then multiplied tile by tile.
//
// Narrow layers have few tiles: threads divide the rows, and each has a triangle of its own, which
// are added in the order of the threads. Wide layers divide the tiles: few threads pack a block
// each, many pack one together. No way has a race, and each repeats its bits for a given number of
// threads.
#pragma once

#include "covariance_gram.h"

namespace fastcov {

// Up to these widths a triangle for each thread stays in its second-level cache beside the packed
// rows. That always pays up to the first, and up to the second where many rows would pass from
// thread to thread. Two threads take 1.4 ms for 6272 rows of 192; divided by tiles 1.5, and 2.6
// while the threads share no cache.
constexpr int64_t kSplitRowsChannels = 128;
constexpr int64_t kSplitManyRowsChannels = 256;
constexpr int64_t kManyRows = 16;  // rows for each channel
// Up to this many threads pack all rows each for itself, if their blocks are no larger than this.
// Writing a line again that another core has read takes 6 ns, or 28 where cores share no cache; a
// line that no other core has takes less than 1. Two threads that pack 784 rows of 512 together
// take 70 to 370 us for that reason.
constexpr int64_t kApartThreads = 4;
constexpr int64_t kApartBytes = 4 << 20;
// Rows that threads pack together are divided in units of this many.
constexpr int64_t kPieceRows = 32;

template <typename T, typename Gram>
class Accumulator {
 public:
  static constexpr int64_t W = kPanel<T>;
  static constexpr int64_t kSide = Gram::kSide;
  static_assert(kTriangleTile % kSide == 0, "a block must not leave its tile of the state");
  static constexpr uint64_t kInfinity = sizeof(T) == 4 ? 0x7f800000ull : 0x7ff0000000000000ull;

  explicit Accumulator(const Update& update)
      : update_(update),
        channels_(update.rows.channels),
        panels_((channels_ + W - 1) / W),
        sides_((channels_ + kSide - 1) / kSide),
        tiles_(sides_ * (sides_ + 1) / 2),
        gram_(update) {}

  void run() {
    const int64_t useful = useful_threads(update_.rows.rows * tiles_ * kSide * kSide);
    const Tally tally = [&] {
      if constexpr (Gram::kIsPackedOnly) {
        if (splits_rows()) return split_rows(useful);
        if (useful <= kApartThreads && block_bytes_of(shared_capacity()) <= kApartBytes) {
          return split_tiles_apart(useful);
        }
      }
      return split_tiles(useful);
    }();
    const double read_weight =
        update_.row_weight.data ? tally.weight : static_cast<double>(tally.finite);
    const double scale = update_.row_scale * update_.row_weight.unit;
    *update_.weight = *update_.weight * update_.decay + read_weight * scale;
    update_.count[0] += tally.finite;
    update_.count[1] += tally.rows - tally.finite;
  }

 private:
  Tally split_rows(int64_t threads) {
    const int64_t rows = update_.rows.rows;
    const int64_t blocks = (rows + kChainRows - 1) / kChainRows;
    const int64_t slots = std::max<int64_t>(1, std::min(threads, blocks));
    const int64_t capacity = capacity_of(std::min(rows, kChainRows));
    const int64_t block_bytes = block_bytes_of(capacity);
    const int64_t triangle_values = tiles_ * kSide * kSide;
    const int64_t slot_bytes = block_bytes + Workspace::round_up(triangle_values * 8) +
                               Workspace::round_up(panels_ * W * 8);
    Workspace workspace(shift_bytes() + slots * (slot_bytes + 64));
    take_shift(workspace);
    Tally* tallies = workspace.take<Tally>(slots);
    double* triangles = workspace.take<double>(slots * triangle_values);
    double* sums = workspace.take<double>(slots * panels_ * W);
    char* block_memory = workspace.take<char>(slots * block_bytes);

    parallel(slots, [&](int64_t slot) {
      double* triangle = triangles + slot * triangle_values;
      double* sum = sums + slot * panels_ * W;
      std::fill(triangle, triangle + triangle_values, 0.0);
      std::fill(sum, sum + panels_ * W, 0.0);
      Block<T> block = block_at(block_memory + slot * block_bytes, capacity);
      Tally tally;
      const int64_t first = blocks * slot / slots;
      const int64_t last = blocks * (slot + 1) / slots;
      for (int64_t index = first; index < last; ++index) {
        const int64_t begin = index * kChainRows;
        const int64_t end = std::min(rows, begin + kChainRows);
        const Tally packed = pack(block, 0, begin, end);
        tally.add(packed);
        const T factor = rescale_factor(packed.peak);
        if (factor != T{1}) rescale(block, end - begin, factor);
        multiply(block, end - begin, factor, triangle, sum);
      }
      tallies[slot] = tally;
    });

    Tally total;
    for (int64_t slot = 0; slot < slots; ++slot) total.add(tallies[slot]);
    int64_t tile = 0;
    for (int64_t i = 0; i < sides_; ++i) {
      for (int64_t j = 0; j <= i; ++j, ++tile) {
        add_tile(i, j, triangles + tile * kSide * kSide, slots, triangle_values);
      }
    }
    for (int64_t channel = 0; channel < channels_; ++channel) {
      double added = 0;
      for (int64_t slot = 0; slot < slots; ++slot) added += sums[slot * panels_ * W + channel];
      update_.sum[channel] = update_.sum[channel] * update_.decay + added;
    }
    return total;
  }

  void multiply(const Block<T>& block, int64_t rows, T factor, double* triangle,
                double* sum) const {
    const double linear = update_.row_scale * update_.row_weight.unit / static_cast<double>(factor);
    const double square = linear / static_cast<double>(factor);
    for (int64_t i = 0; i < sides_; ++i) {
      for (int64_t j = 0; j <= i; ++j, triangle += kSide * kSide) {
        gram_.multiply(block, panels_, rows, {i, j, kSide, kSide, square, 1.0, triangle, kSide});
      }
      add_sums(block, i, rows, linear, sum);
    }
  }

  bool splits_rows() const {
    return channels_ <= kSplitRowsChannels ||
           (channels_ <= kSplitManyRowsChannels && update_.rows.rows >= kManyRows * channels_);
  }

  // Adds the sums of the columns of one side.
  void add_sums(const Block<T>& block, int64_t i, int64_t rows, double scale, double* sum) const {
    const T* roots = update_.row_weight.data ? block.root_weight : nullptr;
    for (int64_t c = i * kSide; c < std::min(channels_, (i + 1) * kSide); c += W) {
      kernels<T>().panel_sum(block.panels + c * block.capacity, roots, rows, scale, sum + c,
                             std::min(W, channels_ - c));
    }
  }

  void add_tile(int64_t i, int64_t j, const double* tile, int64_t slots,
                int64_t slot_stride) const {
    const int64_t row_end = std::min(kSide, channels_ - i * kSide);
    for (int64_t row = 0; row < row_end; ++row) {
      double* out = update_.moment + triangle_entry(i * kSide + row, j * kSide);
      const int64_t column_end = i == j ? row + 1 : kSide;
      for (int64_t column = 0; column < column_end; ++column) {
        double added = tile[row * kSide + column];
        for (int64_t slot = 1; slot < slots; ++slot) {
          added += tile[slot * slot_stride + row * kSide + column];
        }
        out[column] = out[column] * update_.decay + added;
      }
    }
  }

  int64_t shared_capacity() const {
    const int64_t rows = update_.rows.rows;
    const int64_t most = Gram::shared_rows(panels_ * W);
    const int64_t blocks = std::max<int64_t>(1, (rows + most - 1) / most);
    return capacity_of((rows + blocks - 1) / blocks);
  }

  Tally split_tiles_apart(int64_t threads) {
    const int64_t rows = update_.rows.rows;
    const int64_t capacity = shared_capacity();
    const int64_t block_bytes = block_bytes_of(capacity);
    Workspace workspace(shift_bytes() + threads * block_bytes +
                        64 * threads * static_cast<int64_t>(sizeof(Tally)) + 64);
    take_shift(workspace);
    Tally* tallies = workspace.take<Tally>(threads);
    char* block_memory = workspace.take<char>(threads * block_bytes);
    parallel(threads, [&](int64_t slot) {
      const Block<T> block = block_at(block_memory + slot * block_bytes, capacity);
      Tally total;
      double keep = update_.decay;
      for (int64_t begin = 0; begin < rows; begin += capacity) {
        const int64_t end = std::min(rows, begin + capacity);
        const Tally packed = pack(block, 0, begin, end);
        total.add(packed);
        const T factor = rescale_factor(packed.peak);
        if (factor != T{1}) rescale(block, end - begin, factor);
        tile_range(block, end - begin, factor, keep, tiles_ * slot / threads,
                   tiles_ * (slot + 1) / threads);
        keep = 1.0;
      }
      tallies[slot] = total;
    });
    if (rows == 0) decay_only();
    return tallies[0];  // all threads have read all rows
  }

  Tally split_tiles(int64_t threads) {
    const int64_t rows = update_.rows.rows;
    const int64_t capacity = shared_capacity();
    Workspace workspace(shift_bytes() + block_bytes_of(capacity) +
                        64 * threads * static_cast<int64_t>(sizeof(Tally)) + 64);
    take_shift(workspace);
    Tally* tallies = workspace.take<Tally>(threads);
    Block<T> block = block_at(workspace.take<char>(block_bytes_of(capacity)), capacity);
    Tally total;
    double keep = update_.decay;
    for (int64_t begin = 0; begin < rows; begin += capacity) {
      const int64_t block_rows = std::min(capacity, rows - begin);
      const int64_t units = (block_rows + kPieceRows - 1) / kPieceRows;
      const int64_t pieces = std::min(threads, units);
      parallel(pieces, [&](int64_t piece) {
        const int64_t first = units * piece / pieces * kPieceRows;
        const int64_t last = std::min(block_rows, units * (piece + 1) / pieces * kPieceRows);
        tallies[piece] = pack(block, first, begin + first, begin + last);
        gram_.prepare(block, panels_, first, last);
      });
      uint64_t peak = 0;
      for (int64_t piece = 0; piece < pieces; ++piece) {
        total.add(tallies[piece]);
        peak = std::max(peak, tallies[piece].peak);
      }
      const T factor = rescale_factor(peak);
      if (factor != T{1}) {
        rescale(block, block_rows, factor);
        gram_.prepare(block, panels_, 0, block_rows);
      }
      parallel(threads, [&](int64_t slot) {
        gram_.start();
        tile_range(block, block_rows, factor, keep, tiles_ * slot / threads,
                   tiles_ * (slot + 1) / threads);
        gram_.finish();
      });
      keep = 1.0;
    }
    if (rows == 0) decay_only();
    return total;
  }

  void tile_range(const Block<T>& block, int64_t rows, T factor, double keep, int64_t begin,
                  int64_t end) const {
    const double linear = update_.row_scale * update_.row_weight.unit / static_cast<double>(factor);
    const double square = linear / static_cast<double>(factor);
    for_each_tile(sides_, Gram::group_columns(rows), begin, end, [&](int64_t i, int64_t j) {
      const int64_t row_end = std::min(kSide, channels_ - i * kSide);
      gram_.multiply(block, panels_, rows,
                     {i, j, row_end, std::min(kSide, channels_ - j * kSide), square, keep,
                      update_.moment + triangle_entry(i * kSide, j * kSide), kTriangleTile});
      if (i != j) return;
      double* sum = update_.sum + i * kSide;
      for (int64_t c = 0; keep != 1.0 && c < row_end; ++c) sum[c] *= keep;
      add_sums(block, i, rows, linear, update_.sum);
    });
  }

  void decay_only() const {
    if (update_.decay == 1.0) return;
    const int64_t values = triangle_values(channels_);
    for (int64_t at = 0; at < values; ++at) update_.moment[at] *= update_.decay;
    for (int64_t channel = 0; channel < channels_; ++channel) update_.sum[channel] *= update_.decay;
  }

  Tally pack(const Block<T>& block, int64_t offset, int64_t begin, int64_t end) const {
    T* roots = block.root_weight + offset;
    const bool weighted = update_.row_weight.data != nullptr;
    Tally tally;
    tally.rows = end - begin;
    for (int64_t row = begin; weighted && row < end; ++row) {
      roots[row - begin] = static_cast<T>(std::sqrt(update_.row_weight.at(row)));
      tally.rows -= !update_.row_weight.is_read(row);
    }
    for_each_run(update_.rows, begin, end, [&](int64_t row, int64_t count, int64_t element) {
      PackRun<T> run;
      run.source = update_.rows.data + element * update_.rows.item_bytes;
      run.dtype = update_.dtype;
      run.rows = count;
      run.row_stride = update_.rows.run_stride();
      run.channel_stride = update_.rows.channel_stride;
      run.channels = channels_;
      run.shift = shift_;
      run.root_weight = weighted ? roots + (row - begin) : nullptr;
      run.panels = block.panels + (offset + row - begin) * W;
      run.panel_stride = block.capacity * W;
      tally.peak = std::max(tally.peak, kernels<T>().pack(run));
    });
    tally.finite = tally.rows;
    if (tally.peak >= kInfinity) mask(block, offset, begin, end, tally);
    for (int64_t row = begin; weighted && row < end; ++row) {
      const T root = roots[row - begin];
      if (root >= 0) tally.weight += update_.row_weight.at(row);
    }
    return tally;
  }

  // Handles the rare rows that hold a value which is not finite, or that cannot be weighed. They
  // become zero, and are counted as skipped unless their weight is 0.
  void mask(const Block<T>& block, int64_t offset, int64_t begin, int64_t end, Tally& tally) const {
    tally.peak = 0;
    tally.finite = 0;
    for (int64_t row = offset; row < offset + end - begin; ++row) {
      uint64_t peak = 0;
      for (int64_t panel = 0; panel < panels_; ++panel) {
        const T* values = block.panels + (panel * block.capacity + row) * W;
        for (int64_t column = 0; column < W; ++column) {
          peak = std::max(peak, bits_of(values[column]));
        }
      }
      if (peak < kInfinity) {
        tally.finite += update_.row_weight.is_read(begin + row - offset);
        tally.peak = std::max(tally.peak, peak);
        continue;
      }
      for (int64_t panel = 0; panel < panels_; ++panel) {
        T* values = block.panels + (panel * block.capacity + row) * W;
        std::fill(values, values + W, T{0});
      }
      block.root_weight[row] = T{-1};  // marks a skipped row, whose panels are zero
    }
  }

  // Power of two that brings values to about one if their squares would overflow or vanish; else 1.
  static T rescale_factor(uint64_t peak) {
    const double largest = static_cast<double>(from_bits<T>(peak));
    const double high = sizeof(T) == 4 ? 1e15 : 1e145;
    const double low = sizeof(T) == 4 ? 1e-12 : 1e-130;
    if (largest == 0 || (largest < high && largest > low)) return T{1};
    return static_cast<T>(std::ldexp(1.0, std::clamp(-std::ilogb(largest), -126, 126)));
  }

  void rescale(const Block<T>& block, int64_t rows, T factor) const {
    for (int64_t panel = 0; panel < panels_; ++panel) {
      T* values = block.panels + panel * block.capacity * W;
      for (int64_t at = 0; at < rows * W; ++at) values[at] *= factor;
    }
  }

  int64_t block_bytes_of(int64_t capacity) const {
    return Workspace::round_up(panels_ * capacity * 64) +
           Workspace::round_up(capacity * static_cast<int64_t>(sizeof(T))) +
           gram_.part_bytes(panels_, capacity);
  }

  static int64_t capacity_of(int64_t rows) {
    constexpr int64_t unit = Gram::kRowUnit;
    return std::max(unit, (rows + unit - 1) / unit * unit);
  }

  Block<T> block_at(char* memory, int64_t capacity) const {
    char* parts = memory;
    memory += gram_.part_bytes(panels_, capacity);
    T* panels = reinterpret_cast<T*>(memory);
    return {capacity, panels, panels + panels_ * capacity * W, reinterpret_cast<uint16_t*>(parts)};
  }

  int64_t shift_bytes() const { return panels_ * 64; }

  void take_shift(Workspace& workspace) {
    T* shift = workspace.take<T>(panels_ * W);
    for (int64_t channel = 0; channel < panels_ * W; ++channel) {
      shift[channel] = channel < channels_ ? static_cast<T>(update_.shift[channel]) : T{0};
    }
    shift_ = shift;
  }

  const Update& update_;
  const int64_t channels_;
  const int64_t panels_;
  const int64_t sides_;
  const int64_t tiles_;
  const Gram gram_;
  const T* shift_ = nullptr;
};

}  // namespace fastcov
