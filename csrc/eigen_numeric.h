// Arithmetic of float, double and packs of them (eigen_lanes.h), for host and device.
#pragma once

#include <cstdint>

#include "team.h"

namespace fastcov {
inline namespace FASTCOV_LEVEL {

template <class Real>
struct Numeric;

template <>
struct Numeric<float> {
  using Element = float;
  using Bits = uint32_t;
  using Count = int;
  static constexpr bool is_scalar = true;
  static constexpr int digits = 24;
  static constexpr int mantissa_bits = 23;
  static constexpr int exponent_bias = 127;
  static constexpr Bits infinity = 0x7f800000u;
  static constexpr float negligible_square =
      0x1p-50f;                                  // of entries that are dropped from a scaled matrix
  static constexpr float least_square = 1e-36f;  // to which squares of off-diagonals are raised

  static FASTCOV_INLINE constexpr float fill(float value) { return value; }
  static FASTCOV_INLINE float square_root(float value) {
#if defined(__CUDA_ARCH__)
    return ::sqrtf(value);
#else
    return __builtin_sqrtf(value);
#endif
  }
  // a / b for Sturm counts. On a GPU it is one instruction, off by an ulp, which keeps infinities.
  // The emulated GPU of the tests brings a reciprocal of its own.
  static FASTCOV_INLINE float ratio(float a, float b) {
#if defined(FASTCOV_EMULATED_RECIPROCAL)
    return a * FASTCOV_EMULATED_RECIPROCAL(b);
#elif defined(__CUDA_ARCH__)
    float inverse;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(inverse) : "f"(b));
    return a * inverse;
#else
    return a / b;
#endif
  }
  static FASTCOV_INLINE int is_negative(float value) {
    return static_cast<int>(__builtin_bit_cast(Bits, value) >> 31);
  }
  static FASTCOV_INLINE bool any(bool is_true) { return is_true; }
};

template <>
struct Numeric<double> {
  using Element = double;
  using Bits = uint64_t;
  using Count = int;
  static constexpr bool is_scalar = true;
  static constexpr int digits = 53;
  static constexpr int mantissa_bits = 52;
  static constexpr int exponent_bias = 1023;
  static constexpr Bits infinity = 0x7ff0000000000000u;
  static constexpr double negligible_square = 0x1p-102;
  static constexpr double least_square = 1e-290;

  static FASTCOV_INLINE constexpr double fill(double value) { return value; }
  static FASTCOV_INLINE double square_root(double value) {
#if defined(__CUDA_ARCH__)
    return ::sqrt(value);
#else
    return __builtin_sqrt(value);
#endif
  }
  static FASTCOV_INLINE double ratio(double a, double b) { return a / b; }
  static FASTCOV_INLINE int is_negative(double value) {
    return static_cast<int>(__builtin_bit_cast(Bits, value) >> 63);
  }
  static FASTCOV_INLINE bool any(bool is_true) { return is_true; }
};

template <class Real>
FASTCOV_INLINE Real absolute(Real value) {
  return value < Numeric<Real>::fill(0) ? -value : value;
}
template <class Real>
FASTCOV_INLINE Real larger(Real a, Real b) {
  return a > b ? a : b;
}

// Bits of |value| as an integer. They are ordered as the magnitudes are, infinity and NaN last.
template <class Real>
FASTCOV_INLINE typename Numeric<Real>::Bits magnitude_bits(Real value) {
  using Bits = typename Numeric<Real>::Bits;
  return __builtin_bit_cast(Bits, value) & (~Bits{0} >> 1);
}

template <class Real>
FASTCOV_INLINE Real power_of_two(int exponent) {
  using Number = Numeric<Real>;
  return __builtin_bit_cast(Real,
                            static_cast<typename Number::Bits>(exponent + Number::exponent_bias)
                                << Number::mantissa_bits);
}

// Scale of a matrix, from the largest magnitude_bits of its entries, and the shift of its diagonal.
template <class Real>
struct Scale {
  Real shrink = 0;   // times it entries are at most 4, the largest at least 1/2 unless subnormal
  Real restore = 0;  // undoes shrink in eigenvalues; NaN if the matrix is not finite
  Real shift = 0;    // subtracted from the diagonal of the scaled matrix
  bool is_finite = false;

  Scale() = default;

  FASTCOV_INLINE explicit Scale(typename Numeric<Real>::Bits largest) {
    using Number = Numeric<Real>;
    const int limit = Number::exponent_bias - 1;
    int exponent = static_cast<int>(largest >> Number::mantissa_bits) - limit;
    exponent = exponent > limit ? limit : exponent;
    is_finite = largest < Number::infinity;
    shrink = power_of_two<Real>(-exponent);
    restore = is_finite ? power_of_two<Real>(exponent) : static_cast<Real>(__builtin_nan(""));
  }
  // Eigenvalue of the matrix, from one of the scaled and shifted matrix.
  template <class Value>
  FASTCOV_INLINE Value eigenvalue(Value value) const {
    return (value + static_cast<Value>(shift)) * static_cast<Value>(restore);
  }
};

// Shift of a scaled matrix: the mean of its diagonal, rounded to a multiple of 2^-10 so that
// subtracting it from entries near it is exact. Without a shift every step of a reduction would
// round the large entries of c (I + E) the same way: 150 roundings were measured to add up at order
// 256.
template <class Real>
FASTCOV_INLINE Real diagonal_shift(Real sum, int n) {
  using Number = Numeric<Real>;
  using Element = typename Number::Element;
  const Real grid = Number::fill(
      3 * power_of_two<Element>(Number::digits -
                                12));  // adding and subtracting it rounds to a multiple of 2^-10
  return (sum / Number::fill(static_cast<Element>(n)) + grid) - grid;
}

// Reads a value that another member has written since the launch, past the cache of this
// multiprocessor.
template <class Real>
FASTCOV_INLINE Real load_published(const Real* source) {
#if defined(__CUDA_ARCH__)
  return __ldcg(source);
#else
  return *source;
#endif
}

// Sum of term(i) over i = from, from + step, ... below n. Its order depends on the instruction set
// and the team alone.
template <class Real, class Term>
FASTCOV_INLINE Real sum_strided(int from, int n, int step, const Term& term) {
  Real sum = Numeric<Real>::fill(0);
#if !defined(__CUDACC__)
  if constexpr (Numeric<Real>::is_scalar) {
    if (step == 1) {
      FASTCOV_SIMD(reduction(+ : sum))
      for (int i = from; i < n; ++i) sum += term(i);
      return sum;
    }
  } else {
    // Several short sums lose less to rounding than a long one, and do not wait for each other.
    Real sums[4] = {sum, sum, sum, sum};
    for (; from + 3 * step < n; from += 4 * step) {
      FASTCOV_UNROLL
      for (int c = 0; c < 4; ++c) sums[c] += term(from + c * step);
    }
    sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
#endif
  for (int i = from; i < n; i += step) sum += term(i);
  return sum;
}

}  // namespace FASTCOV_LEVEL
}  // namespace fastcov
