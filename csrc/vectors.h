// Vectors of one instruction set, by the compiler's own vector types: loads that widen 16-bit rows,
// magnitudes that order NaN last, transposes of squares. Included where a file is compiled once for
// each set, so everything has internal linkage.
#pragma once

#include <cstdint>

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastcov {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <typename T, int Bytes = kVectorBytes>
struct Vec {
  typedef T type __attribute__((vector_size(Bytes)));
};
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
struct BitsOf;
template <>
struct BitsOf<float> {
  typedef uint32_t type;
};
template <>
struct BitsOf<double> {
  typedef uint64_t type;
};

template <typename T>
using Vector = typename Vec<T>::type;
template <typename T>
using BitVector = typename Vec<typename BitsOf<T>::type>::type;

// Loads, which widen values to the working type.

template <typename V, typename S>
inline V load_unaligned(const S* source) {
  V value;
  __builtin_memcpy(&value, source, sizeof(V));
  return value;
}

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(BFloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float result;
  __builtin_memcpy(&result, &bits, sizeof(result));
  return result;
}
inline float widen(Float16 value) {
  // Exponent and mantissa move to their places in a float32. One product then corrects the
  // exponent's bias, for subnormal numbers too.
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fff) << 13;
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000) << 16;
  float scaled;
  __builtin_memcpy(&scaled, &magnitude, sizeof(scaled));
  scaled *= 0x1p112f;
  uint32_t bits;
  __builtin_memcpy(&bits, &scaled, sizeof(bits));
  if ((value.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000;
  bits |= sign;
  __builtin_memcpy(&scaled, &bits, sizeof(scaled));
  return scaled;
}

inline Vector<float> load(const float* source) { return load_unaligned<Vector<float>>(source); }
inline Vector<double> load(const double* source) { return load_unaligned<Vector<double>>(source); }

typedef Vec<uint16_t, kVectorBytes / 2>::type HalfBits;

inline Vector<float> load(const BFloat16* source) {
  const HalfBits narrow = load_unaligned<HalfBits>(source);
  const BitVector<float> wide = __builtin_convertvector(narrow, BitVector<float>) << 16;
  return reinterpret_cast<Vector<float>>(wide);
}

inline Vector<float> load(const Float16* source) {
#if defined(__AVX512F__)
  return _mm512_maskz_cvtph_ps(0xffff, load_unaligned<__m256i>(source));
#elif defined(__F16C__)
  return _mm256_cvtph_ps(load_unaligned<__m128i>(source));
#else
  const HalfBits narrow = load_unaligned<HalfBits>(source);
  const BitVector<float> wide = __builtin_convertvector(narrow, BitVector<float>);
  Vector<float> scaled = reinterpret_cast<Vector<float>>((wide & 0x7fff) << 13) * 0x1p112f;
  BitVector<float> bits = reinterpret_cast<BitVector<float>>(scaled);
  bits |= reinterpret_cast<BitVector<float>>((wide & 0x7c00) == 0x7c00) & 0x7f800000u;
  return reinterpret_cast<Vector<float>>(bits | ((wide & 0x8000) << 16));
#endif
}

template <typename T>
inline BitVector<T> magnitude_bits(Vector<T> value) {
  typedef typename BitsOf<T>::type Bits;
  constexpr Bits mask = static_cast<Bits>(~Bits{0}) >> 1;
  return reinterpret_cast<BitVector<T>>(value) & mask;
}

template <typename T>
inline BitVector<T> larger(BitVector<T> a, BitVector<T> b) {
  return a > b ? a : b;
}

template <typename T>
inline uint64_t largest_lane(BitVector<T> peak) {
  uint64_t result = 0;
  for (int lane = 0; lane < kLanes<T>; ++lane) {
    if (peak[lane] > result) result = peak[lane];
  }
  return result;
}

template <typename V, typename I, int L>
struct Interleave;
template <typename V>
struct Interleave<V, V, 2> {
  static V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 2); }
  static V high(V a, V b) { return __builtin_shufflevector(a, b, 1, 3); }
};
template <typename V>
struct Interleave<V, V, 4> {
  static V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 4, 1, 5); }
  static V high(V a, V b) { return __builtin_shufflevector(a, b, 2, 6, 3, 7); }
};
template <typename V>
struct Interleave<V, V, 8> {
  static V low(V a, V b) { return __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11); }
  static V high(V a, V b) { return __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15); }
};
template <typename V>
struct Interleave<V, V, 16> {
  static V low(V a, V b) {
    return __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  }
  static V high(V a, V b) {
    return __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15,
                                   31);
  }
};

// Transposes an L x L square in log2(L) perfect shuffles of its L vectors.
template <typename T>
inline void transpose(Vector<T> (&square)[kLanes<T>]) {
  constexpr int L = kLanes<T>;
  typedef Interleave<Vector<T>, Vector<T>, L> Shuffle;
#pragma GCC unroll 4
  for (int step = 1; step < L; step *= 2) {
    Vector<T> shuffled[L];
#pragma GCC unroll 8
    for (int i = 0; i < L / 2; ++i) {
      shuffled[2 * i] = Shuffle::low(square[i], square[i + L / 2]);
      shuffled[2 * i + 1] = Shuffle::high(square[i], square[i + L / 2]);
    }
#pragma GCC unroll 16
    for (int i = 0; i < L; ++i) square[i] = shuffled[i];
  }
}

}  // namespace
}  // namespace fastcov
