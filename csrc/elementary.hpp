// Elementary functions, branch-free, so that loops over a tile of a row vectorise.
#pragma once

#include <math.h>  // lgamma_r
#ifdef __APPLE__
extern "C" double lgamma_r(double, int*);  // declared there for -pthread alone
#endif

#include "common.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

FASTVAE_INLINE float abs_(float x) { return __builtin_fabsf(x); }
FASTVAE_INLINE double abs_(double x) { return __builtin_fabs(x); }
FASTVAE_INLINE float sqrt_(float x) { return __builtin_sqrtf(x); }
FASTVAE_INLINE double sqrt_(double x) { return __builtin_sqrt(x); }

// Elementary functions: in float Cephes' polynomials (S. Moshier), to about 1 ulp; in double the C library.

// exp(x) = 2^n (1 + p) with |x - n ln 2| < 0.35; at n = 0, p = x + x^2 q(x).
struct Reduced {
  std::uint32_t integer;  // n in its low bits
  float n, p, r2q;
  // 2^(n + shift), within the range of normal numbers. For NaN the result is arbitrary, as p is NaN then.
  FASTVAE_INLINE float power(int shift) const {
    return bit_cast<float>((integer + static_cast<std::uint32_t>(127 + shift)) << 23);
  }
};
// Evaluates at kHalves / 2 times x: the power of two is folded into the constants, and no rounding changes.
template <int kHalves = 2>
FASTVAE_INLINE Reduced range_reduced(float x) {
  constexpr float f = kHalves / 2.0f, f2 = f * f, f3 = f2 * f, f4 = f3 * f;
  const float rounded =
      x * (1.44269504088896341f * f) + 12582912.0f;  // adding 1.5 * 2^23 leaves the nearest integer
  const float n = rounded - 12582912.0f;
  const float t = (x - n * (0.693359375f / f)) + n * (2.12194440e-4f / f);  // remainder f t
  // In pairs, which shortens the dependency chain; likewise below.
  const float t2 = t * t;
  const float q = ((1.9875691500e-4f * f4 * f3 * t + 1.3981999507e-3f * f4 * f2) * t2 +
                   (8.3334519073e-3f * f4 * f * t + 4.1665795894e-2f * f4)) *
                      t2 +
                  (1.6666665459e-1f * f3 * t + 5.0000001201e-1f * f2);
  const float r2q = t2 * q;
  return {bit_cast<std::uint32_t>(rounded), n, f * t + r2q, r2q};
}
FASTVAE_INLINE float clip_below(float x, float lo) { return x < lo ? lo : x; }  // NaN stays NaN
template <class C>
FASTVAE_INLINE C clip(C x, C lo, C hi) {
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}

// exp(kHalves / 2 * x). In two steps, 2^(n -+ 64) and then 2^+-64, so that neither subnormal nor very large
// results lose accuracy. The sign bit of x selects: two comparisons of x would tempt the compiler to branch,
// and leave the surrounding loop scalar.
template <int kHalves = 2>
FASTVAE_INLINE float exp_(float x) {
  constexpr float f = kHalves / 2.0f, low = -104.0f / f, high = 89.0f / f;
  const Reduced e = range_reduced<kHalves>(kHalves > 0 ? clip(x, low, high) : clip(x, high, low));
  const std::int32_t side = (bit_cast<std::int32_t>(x) >> 31) & 128,
                     shift = kHalves > 0 ? side - 64 : 64 - side;
  const float s = e.power(shift);
  return (s * e.p + s) * bit_cast<float>((127 - shift) << 23);
}
template <int kHalves = 2>
FASTVAE_INLINE double exp_(double x) {
  return __builtin_exp(kHalves * 0.5 * x);
}

// exp(x) for x <= 0.
FASTVAE_INLINE float exp_negative(float x) {
  const Reduced e = range_reduced(clip_below(x, -104.0f));
  const float s = e.power(64);
  return (s * e.p + s) * 0x1p-64f;
}
FASTVAE_INLINE double exp_negative(double x) { return __builtin_exp(x); }
// exp(-x) for x >= 0; 0 where that is below the normal numbers, which saves a third of the steps.
FASTVAE_INLINE float exp_minus(float x) {
  constexpr float shift = 12582912.0f + 127.0f;  // leaves the nearest integer and the exponent's bias
  const float most = x > 88.0f ? 88.0f : x;      // there the exponent's bits are 0
  const float rounded = most * -1.44269504088896341f + shift, n = rounded - shift;
  const float t = (n * -0.693359375f - most) + n * 2.12194440e-4f, t2 = t * t;
  // exp(t) to 3e-9; of this degree not to 1 ulp of exp(t) - 1.
  const float q = (1.3820911990e-3f * t2 + (8.3686700091e-3f * t + 4.1668262333e-2f)) * t2 +
                  (1.6666521132e-1f * t + 4.9999994040e-1f);
  const float s = bit_cast<float>(bit_cast<std::uint32_t>(rounded) << 23);
  return s * (t + t2 * q) + s;
}
FASTVAE_INLINE double exp_minus(double x) { return __builtin_exp(-x); }
// exp(x), or 1 for x > 0.
template <class C>
FASTVAE_INLINE C exp_up_to_1(C x) {
  return exp_negative(x > C(0) ? C(0) : x);
}

// The scaled half of exp(x) - 1: 2 * (s p + (s - 1/2)) with s = 2^(n-1) is exact in form at n = 0, and finite
// up to the largest x.
FASTVAE_INLINE float expm1_from(const Reduced& e) {
  const float s = e.power(-1);
  return 2.0f * (s * e.p + (s - 0.5f));
}
FASTVAE_INLINE float expm1_(float x) { return expm1_from(range_reduced(clip(x, -87.0f, 89.0f))); }
FASTVAE_INLINE double expm1_(double x) { return __builtin_expm1(x); }

// exp(x) - 1 - x, without cancellation near 0.
FASTVAE_INLINE float expm1_minus(float x) {
  // The last x is bounded above, so that inf gives inf; below -87 exp(x) is negligible against it.
  const float top = x > 89.0f ? 89.0f : x;
  const Reduced e = range_reduced(clip_below(top, -87.0f));
  return e.n == 0.0f ? e.r2q : expm1_from(e) - top;
}
FASTVAE_INLINE double expm1_minus(double x) {
  // The series where expm1(x) - x would lose more than 3 bits; its truncation error is below 1e-17 of the
  // sum.
  const double small =
      x * x *
      (0.5 + x * (1.0 / 6 +
                  x * (1.0 / 24 +
                       x * (1.0 / 120 +
                            x * (1.0 / 720 +
                                 x * (1.0 / 5040 + x * (1.0 / 40320 + x * (1.0 / 362880 + x / 3628800))))))));
  return __builtin_fabs(x) < 0.125 ? small : __builtin_expm1(x) - (x > 710.0 ? 710.0 : x);
}

// log(1 + g) - g for sqrt(1/2) <= 1 + g < sqrt(2).
FASTVAE_INLINE float log_tail(float g) {
  const float z = g * g;
  const float p = (((7.0376836292e-2f * z + (-1.1514610310e-1f * g + 1.1676998740e-1f)) * z +
                    (-1.2420140846e-1f * g + 1.4249322787e-1f)) *
                       z +
                   (-1.6668057665e-1f * g + 2.0000714765e-1f)) *
                      z +
                  (-2.4999993993e-1f * g + 3.3333331174e-1f);
  return z * (g * p - 0.5f);
}
// log(2^e (1 + g)).
FASTVAE_INLINE float log_from(float g, float e) {
  return (g + (log_tail(g) - 2.12194440e-4f * e)) + 0.693359375f * e;
}

// Represents a number as 2^e (1 + g), g as above.
struct Split {
  float g, e;
};
FASTVAE_INLINE Split split(float x) {
  const std::uint32_t shifted = bit_cast<std::uint32_t>(x) - 0x3f3504f3u;
  return {bit_cast<float>((shifted & 0x007fffffu) + 0x3f3504f3u) - 1.0f,
          static_cast<float>(static_cast<std::int32_t>(shifted) >> 23)};
}
// The same for 1 + t, corrected for the sum's rounding error.
FASTVAE_INLINE Split split_1p(float t) {
  const float u = 1.0f + t, whole = u - 1.0f;
  const float lost = (1.0f - (u - whole)) + (t - whole);
  const std::uint32_t shifted = bit_cast<std::uint32_t>(u) - 0x3f3504f3u;
  const std::int32_t e = static_cast<std::int32_t>(shifted) >> 23;
  const float m = bit_cast<float>((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float g = (m - 1.0f) + lost * bit_cast<float>(static_cast<std::uint32_t>(127 - e) << 23);
  return {e == 0 ? t : g, static_cast<float>(e)};
}

// log(1 + t) for -1 < t < 2^127, to full relative accuracy.
FASTVAE_INLINE float log1p_(float t) {
  const Split s = split_1p(t);
  // NaN has lost its bits on the way; the last term restores it.
  return log_from(s.g, s.e) + (t - t);
}
FASTVAE_INLINE double log1p_(double t) { return __builtin_log1p(t); }

// log(1 + exp(x)), and its derivative; to full relative accuracy where exp(x) is a normal number.
template <class C>
struct Softplus {
  C value, slope;
};
template <class C>
FASTVAE_INLINE Softplus<C> softplus(C x) {
  const C k = exp_negative(-abs_(x));
  const bool above = x > C(0);
  return {(above ? x : C(0)) + log1p_(k), (above ? C(1) : k) / (C(1) + k)};
}

// log(x) for positive normal numbers, arbitrary for others; NaN stays NaN, and infinity becomes NaN.
FASTVAE_INLINE float log_(float x) {
  const Split s = split(x);
  return log_from(s.g, s.e) + (x - x);
}
FASTVAE_INLINE double log_(double x) { return __builtin_log(x); }

// The same in two parts: a difference of logarithms keeps the digits that the first part rounds away.
template <class C>
struct TwoParts {
  C high, low;
};
FASTVAE_INLINE TwoParts<float> log_in_parts(float x) {
  const Split s = split(x);
  const float y = log_tail(s.g) - 2.12194440e-4f * s.e, whole = 0.693359375f * s.e;  // the latter is exact
  const float part = s.g + y, high = whole + part;
  return {high + (x - x), ((whole - high) + part) + ((s.g - part) + y)};
}
FASTVAE_INLINE TwoParts<double> log_in_parts(double x) { return {__builtin_log(x), 0.0}; }

// log(1 + t) for t > -1, and t - log(1 + t), also to full relative accuracy.
template <class C>
struct LogAndRest {
  C log, rest;
};
FASTVAE_INLINE LogAndRest<float> log1p_and_rest(float t) {
  const Split s = split_1p(t);
  const float log = log_from(s.g, s.e) + (t - t);
  return {log, s.e == 0.0f ? -log_tail(s.g) : t - log};
}
FASTVAE_INLINE LogAndRest<double> log1p_and_rest(double t) {
  // log(1 + t) = 2 artanh(r), by its series near 0.
  const double r = t / (2 + t), v = r * r, log = __builtin_log1p(t);
  const double series =
      1.0 / 3 +
      v * (1.0 / 5 +
           v * (1.0 / 7 +
                v * (1.0 / 9 +
                     v * (1.0 / 11 +
                          v * (1.0 / 13 + v * (1.0 / 15 + v * (1.0 / 17 + v * (1.0 / 19 + v / 21))))))));
  return {log, __builtin_fabs(t) < 0.3 ? r * (t - 2 * v * series) : t - log};
}

// t - log(1 + t) from t and 1 + t, each given to full relative accuracy.
FASTVAE_INLINE float rest_of_log(float t, float u) {
  const Split s = split(u);
  const bool near = abs_(t) < 0.25f;
  const float tail = log_tail(near ? t : s.g);
  return near ? -tail : t - ((s.g + (tail - 2.12194440e-4f * s.e)) + 0.693359375f * s.e);
}
FASTVAE_INLINE double rest_of_log(double t, double u) {
  return __builtin_fabs(t) < 0.25 ? log1p_and_rest(t).rest : t - __builtin_log(u);
}

// Building blocks of the gamma function, for x >= 0 and log x: polynomials in 1 / x for x >= 1, and in x
// below.

// Stirling's error, log x! - (x + 1/2) log x + x - log(2 pi) / 2, times x, as a function of 1 / x.
FASTVAE_INLINE float stirling_series(float u) {
  const float u2 = u * u;
  const float series = ((1.4221894e-4f * u - 6.4566986e-4f) * u2 + (1.0635331e-3f * u - 6.0909733e-5f)) * u2 +
                       (-2.7706881e-3f * u - 3.4973453e-7f);
  return series * u + 0.0833333367f;
}
inline double stirling_series(double u) {
  const double v = u * u;
  return 1.0 / 12 +
         v * (-1.0 / 360 +
              v * (1.0 / 1260 + v * (-1.0 / 1680 + v * (1.0 / 1188 + v * (-691.0 / 360360 + v / 156)))));
}
// log x! - (x log x - x) for x < 1; log x! / (x (x - 1)) is the polynomial.
FASTVAE_INLINE float log_factorial_below(float x, float log_x) {
  const float y = x < 1.0f ? x : 1.0f, y2 = y * y;
  const float r = (((2.3883113e-3f * y - 1.3525379e-2f) * y2 + (3.5975764e-2f * y - 6.2913768e-2f)) * y2 +
                   (8.7903543e-2f * y - 1.1437390e-1f)) *
                      y2 +
                  (1.5536288e-1f * y - 2.4524876e-1f);
  return y * ((y - 1.0f) * (r * y + 5.7721565e-1f) + 1.0f - log_x);
}
inline double log_factorial_below(double x, double log_x) {
  int sign;  // lgamma would write a global variable
  return ::lgamma_r(1 + x, &sign) - x * (log_x - 1);
}

// Argument from which the series is accurate.
FASTVAE_INLINE float series_begins(float) { return 1.0f; }
FASTVAE_INLINE double series_begins(double) { return 16.0; }
constexpr double kHalfLog2Pi = 0.91893853320467274178;

// log x! - (x log x - x), with any number for log x at 0; and the same without 1/2 log(2 pi x): Stirling's
// error.
template <class C>
FASTVAE_INLINE C log_factorial_excess(C x, C log_x) {
  const C begins = series_begins(x), u = C(1) / (x < begins ? begins : x);
  const C above = C(kHalfLog2Pi) + C(0.5) * log_x + u * stirling_series(u);
  return x < begins ? (x == C(0) ? C(0) : log_factorial_below(x, log_x)) : above;
}
template <class C>
FASTVAE_INLINE C stirling_error(C x, C log_x) {
  const C begins = series_begins(x), u = C(1) / (x < begins ? begins : x);
  return x < begins ? log_factorial_below(x, log_x) - C(kHalfLog2Pi) - C(0.5) * log_x
                    : u * stirling_series(u);
}

// x (log x - digamma(x)) - 1/2 from x > 0 and log x.
FASTVAE_INLINE float digamma_excess(float x, float log_x) {
  const float u = 1.0f / (x < 1.0f ? 1.0f : x), u2 = u * u;
  const float series =
      ((-2.5877416e-4f * u + 1.782787e-3f) * u2 + (-4.7971519e-3f * u + 5.8417973e-3f)) * u2 +
      (-3.919531e-4f * u - 8.2927618e-3f);
  const float y = x < 1.0f ? x : 1.0f, y2 = y * y;
  const float digamma =
      ((((-3.6161063e-2f * y + 1.9612116e-1f) * y2 + (-4.9107448e-1f * y + 7.8699407e-1f)) * y2 +
        (-9.7081327e-1f * y + 1.0711097f)) *
           y2 +
       (-1.2010771f * y + 1.6449006f)) *
          y -
      5.7721548e-1f;  // logarithm of 1 + y
  return x < 1.0f ? 0.5f + y * (log_x - digamma) : u * ((series * u - 1.6125311e-6f) * u + 8.3333344e-2f);
}
inline double digamma_excess(double x, double log_x) {
  double shifted = 0, z = x;
  for (int i = 0; i < 16; ++i) {
    const bool small = z < 16.0;
    shifted += small ? x / z : 0.0;
    z += small ? 1.0 : 0.0;
  }
  const double v = 1 / (z * z);
  const double rest =
      v *
      (1.0 / 12 + v * (-1.0 / 120 +
                       v * (1.0 / 252 + v * (-1.0 / 240 + v * (1.0 / 132 + v * (-691.0 / 32760 + v / 12))))));
  // Without a shift the logarithms are equal.
  return z == x ? z * rest : x * (log_x - (__builtin_log(z) - 0.5 / z - rest)) + shifted - 0.5;
}

FASTVAE_INLINE float smallest_normal(float) { return __FLT_MIN__; }
FASTVAE_INLINE double smallest_normal(double) { return __DBL_MIN__; }
FASTVAE_INLINE float infinity(float) { return __builtin_inff(); }
FASTVAE_INLINE double infinity(double) { return __builtin_inf(); }
// By its bits, for callers that have already compared x.
FASTVAE_INLINE bool is_infinite(float x) { return (bit_cast<std::uint32_t>(x) & 0x7fffffffu) == 0x7f800000u; }
FASTVAE_INLINE bool is_infinite(double x) { return __builtin_isinf(x); }

// The sign of x, 0 for 0; NaN stays NaN. Two comparisons of x would be two branches.
template <class C>
FASTVAE_INLINE C sign_(C x) {
  const C large = C(1) / smallest_normal(C());
  return clip(x * large * large, C(-1), C(1));
}

// tanh(x / 2), relatively accurate everywhere.
template <class C>
FASTVAE_INLINE C tanh_half(C x) {
  const C e = expm1_(x > C(40) ? C(40) : x);  // beyond this it is 1
  return e / (e + C(2));
}

// log(x) for any x >= 0, including denormals, 0 and infinity; NaN stays NaN.
FASTVAE_INLINE float log_positive(float x) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(x);
  const bool small = bits < 0x00800000u;
  const float y = log_(small ? x * 0x1p24f : x) - (small ? 16.6355323f : 0.0f);
  return x == 0.0f ? -infinity(x) : bits == 0x7f800000u ? x : y;
}
FASTVAE_INLINE double log_positive(double x) { return __builtin_log(x); }
// The same for any x: NaN if negative. By its bits, as x has been compared already.
FASTVAE_INLINE float log_of_any(float x) {
  return bit_cast<std::uint32_t>(x) > 0x80000000u ? bit_cast<float>(0x7fc00000u) : log_positive(x);
}
FASTVAE_INLINE double log_of_any(double x) { return __builtin_log(x); }

// log(1 + r^2), also where r^2 overflows; NaN stays NaN.
template <class C>
FASTVAE_INLINE C log1p_square(C r) {
  const C a = abs_(r);
  // For large r it is 2 log r, and 2 is negligible against that. One half keeps 1 + a / 2 below 2^127.
  const bool large = a > C(0x1p60);
  const C y = log1p_(large ? C(0.5) * a : a * a);
  return is_infinite(a) ? a : large ? C(2) * (y + C(0.69314718055994530942)) : y;
}

// log(1 + t) - y for t >= 0, given y = t / (1 + t) and the logarithm; its expansion is y^2 / 2 + y^3 / 3 +
// ....
FASTVAE_INLINE float log1p_excess(float t, float y, float log_1pt) {
  const float y2 = y * y;
  // (-log(1 - y) - y) / y^2 on [0, 0.35] to 2e-8.
  const float p = (((0.479645165f * y - 0.143728857f) * y2 + (0.232812975f * y + 0.150784079f)) * y2 +
                   (0.201484848f * y + 0.249932863f)) *
                      y2 +
                  (0.333334478f * y + 0.499999997f);
  return t < 0.5f ? p * y2 : log_1pt - y;
}
FASTVAE_INLINE double log1p_excess(double t, double y, double log_1pt) {
  // 2 atanh(s) - y, s = y / (2 - y): y s + 2 s^3 (1/3 + s^2 / 5 + ...), without cancellation.
  const double s = y / (2 - y), v = s * s;
  double series = 0;
  for (int n = 33; n > 1; n -= 2) series = 1.0 / n + v * series;
  return t < 1 ? y * s + 2 * v * s * series : log_1pt - y;
}

// log Gamma(z + 1/2) - log Gamma(z) - log(z) / 2 from z >= 0 and log z, about -1 / (8 z) for large z; and z
// times its derivative.
template <class C>
struct HalfStep {
  C value, slope;
};
// Starts from the values at z + 1, polynomials in u = 1 / (z + 1). Each step down adds the logarithm of a
// factor near 1 and a positive term of the slope, so nothing cancels.
FASTVAE_INLINE HalfStep<float> half_step(float z, float log_z) {
  const float u = 1.0f / (z + 1.0f), c = 1.0f / (z + 0.5f), u2 = u * u;
  const float p =
      ((-2.53897306e-4f * u + 1.18338026e-3f) * u2 + (-1.96744781e-3f * u + 3.84325176e-5f)) * u2 +
      (5.22010261e-3f * u - 2.97615975e-6f);
  const float q = ((2.0119627e-3f * u - 7.74921151e-3f) * u2 + (1.05155874e-2f * u - 4.86777251e-4f)) * u2 +
                  (-1.55831696e-2f * u - 1.33040101e-6f);
  const bool small = z < 1.0f;
  const float factor = ((z + 1.0f) * c) * (small ? c : z * c);
  return {u * (p * u - 0.124999829f) + 0.5f * (log_(factor) + (small ? log_z : 0.0f)),
          u * (0.25f * c + (z * u) * (q * u + 0.125000015f))};
}
inline HalfStep<double> half_step(double z, double log_z) {
  const bool small = z < 1;
  double factor = 1, slope = 0;
  for (int i = 0; i < 16; ++i) {
    const double y = z + i, c = 1 / (y + 0.5), u = 1 / (y + 1);
    factor *= ((y + 1) * c) * (i == 0 && small ? c : y * c);
    slope += 0.25 * c * u * (i == 0 ? 1 : z / y);
  }
  const double u = 1 / (z + 16), v = u * u;
  const double p =
      -1.0 / 8 +
      v * (1.0 / 192 +
           v * (-1.0 / 640 +
                v * (17.0 / 14336 + v * (-31.0 / 18432 + v * (691.0 / 180224 - v * (5461.0 / 425984))))));
  const double q =
      1.0 / 8 + v * (-1.0 / 64 +
                     v * (1.0 / 128 + v * (-17.0 / 2048 +
                                           v * (31.0 / 2048 + v * (-691.0 / 16384 + v * (5461.0 / 32768))))));
  return {u * p + 0.5 * (__builtin_log(factor) + (small ? log_z : 0.0)), slope + z * u * u * q};
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
