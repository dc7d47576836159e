// GCC vectors, each element of which belongs to a matrix of its own. For the host.
#pragma once

#include "eigen_numeric.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

#if defined(FASTCOV_VECTOR_BYTES)  // set by tests, for the lanes of another machine
constexpr int kVectorBytes = FASTCOV_VECTOR_BYTES;
#elif defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T, int Lanes>
struct LanesOf {
  typedef T type __attribute__((vector_size(sizeof(T) * Lanes)));
};
template <class T, int Lanes>
using Pack = typename LanesOf<T, Lanes>::type;

// Numeric of a pack: the constants of its element, and one count for each lane.
template <class T, class Integer, int Lanes>
struct PackNumeric {
  using Real = Pack<T, Lanes>;
  using Element = T;
  using Count = Pack<Integer, Lanes>;
  static constexpr bool is_scalar = false;
  static constexpr int lanes = Lanes;
  static constexpr int digits = Numeric<T>::digits;
  static constexpr T negligible_square = Numeric<T>::negligible_square;
  static constexpr T least_square = Numeric<T>::least_square;

  static FASTCOV_INLINE Real fill(T value) { return value - Real{}; }
  static FASTCOV_INLINE Real square_root(Real value) {
    for (int lane = 0; lane < Lanes; ++lane) {
      value[lane] = Numeric<T>::square_root(value[lane]);
    }
    return value;
  }
  static FASTCOV_INLINE Real ratio(Real a, Real b) { return a / b; }
  static FASTCOV_INLINE Count is_negative(Real value) { return -(value < Real{}); }
  static FASTCOV_INLINE bool any(Count mask) {
    bool is_any = false;
    for (int lane = 0; lane < Lanes; ++lane) is_any |= mask[lane] != 0;
    return is_any;
  }
};
template <>
struct Numeric<Pack<float, 4>> : PackNumeric<float, int32_t, 4> {};
template <>
struct Numeric<Pack<float, 8>> : PackNumeric<float, int32_t, 8> {};
template <>
struct Numeric<Pack<float, 16>> : PackNumeric<float, int32_t, 16> {};
template <>
struct Numeric<Pack<double, 2>> : PackNumeric<double, int64_t, 2> {};
template <>
struct Numeric<Pack<double, 4>> : PackNumeric<double, int64_t, 4> {};
template <>
struct Numeric<Pack<double, 8>> : PackNumeric<double, int64_t, 8> {};

FASTCOV_INLINE bool all_of(bool mask) { return mask; }
template <class V>
FASTCOV_INLINE bool all_of(V mask) {
  bool all = true;
  for (int lane = 0; lane < static_cast<int>(sizeof(V) / sizeof(mask[0])); ++lane) {
    all &= mask[lane] != 0;
  }
  return all;
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
