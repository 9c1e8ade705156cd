// Counts of mean exp(m) and variance exp(m) + exp(2 m - t). See fastvae/likelihoods/negative_binomial.py for
// the mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct NegativeBinomial : Declaration {
  static constexpr int kParameters = 2, kHooked = 1, kPrepared = 4, kData = 2;
  static constexpr bool kGradientTakesData = true, kSparse = true, kSparseGradient = true;
  static constexpr double kLow = 0;

  // Below it theta, negligible against counts, is replaced by exp(kLeast), a normal number.
  template <class C>
  static constexpr C kLeast = sizeof(C) == 4 ? C(-86) : C(-700);
  // theta, Stirling's errors of its gamma function and of its digamma, and t, clamped near the end of
  // float32's range.
  template <class C>
  static FASTVAE_INLINE Prepared<C> prepare(C t) {
    const C top = t > C(85) ? C(85) : t, theta = exp_(top < kLeast<C> ? kLeast<C> : top);
    return {C(0), theta, stirling_error(theta, top), digamma_excess(theta, top), top};
  }
  // log x in two parts; for x = 0 a value far below any log mean.
  template <class C>
  static FASTVAE_INLINE Prepared<C> data(C x) {
    const bool zero = x == C(0);
    const TwoParts<C> log_x = log_in_parts(x);
    return {zero ? C(0) : -log_factorial_excess(x, log_x.high), zero ? C(-1e30) : log_x.high,
            zero ? C(0) : log_x.low};
  }

  // exp(v) - 1, exp(v) - 1 - v where |v| < 1, and exp(v) and v clamped to normal numbers.
  template <class C>
  struct Exponential {
    C less_one, less_line, whole, v;
  };
  static FASTVAE_INLINE Exponential<float> exponential(float v) {
    const float top = clip(v, -87.0f, 87.0f);
    const Reduced e = range_reduced(top);
    const float less_one = expm1_from(e), s = e.power(0);
    return {less_one, e.n == 0.0f ? e.r2q : less_one - top, s * e.p + s, top};
  }
  static FASTVAE_INLINE Exponential<double> exponential(double v) {
    const double top = clip(v, -700.0, 700.0);
    return {__builtin_expm1(top), expm1_minus(top), __builtin_exp(top), top};
  }

  // -theta log(1 + mean / theta); for a mean negligible against theta the logarithm is the ratio.
  template <class C>
  static FASTVAE_INLINE bool is_small(C ratio) {
    return ratio < (sizeof(C) == 4 ? C(-20) : C(-40));
  }
  template <class C>
  static FASTVAE_INLINE C zero(Element<C> e) {
    const C ratio = e.p0 - e.q3;
    const bool small = is_small(ratio);
    const C exponent = small ? e.p0 : ratio;
    const Exponential<C> exponential_ = exponential(exponent);
    const C beyond = exponent - exponential_.v, above = beyond > C(0) ? beyond : C(0);
    return -(small ? exponential_.whole : e.q0 * (log1p_(exponential_.whole) + above));
  }
  // For any count.
  template <class C>
  static FASTVAE_INLINE C log_prob(Element<C> e) {
    const C theta = e.q0, n = e.x + theta, inverse = C(1) / n, w = e.x * inverse, v = theta * inverse;
    const C d = (e.p0 - e.d0) - e.d1, ratio = e.p0 - e.q3;
    const bool zero = e.x == C(0), other = w > v, small = is_small(ratio);
    // n times log(1 + w (exp(d) - 1)) - w d, never below 0; of its two forms, the one with the smaller
    // factor.
    const C a = other ? v : w, least = other ? theta : e.x, signed_d = other ? -d : d,
            exponent = zero ? (small ? e.p0 : ratio) : signed_d;
    const Exponential<C> exponential_ = exponential(exponent);
    const LogAndRest<C> log = log1p_and_rest(zero ? exponential_.whole : a * exponential_.less_one);
    const C beyond = exponent - exponential_.v, above = beyond > C(0) ? beyond : C(0);
    const C outside = beyond > C(0) ? (n - least) * beyond : -least * beyond;
    const C far = (n * log.log - least * exponential_.v) + outside,
            near = least * exponential_.less_line - n * log.rest;
    const C distance = abs_(signed_d) < C(1) ? near : far;
    // log p where the mean equals x: the Stirling errors of the gamma functions.
    const C quotient = e.x / theta;  // may be infinite
    const C spread = quotient < C(1e30) ? log1p_(quotient) : e.d0 - e.q3;
    const C own = (stirling_error(n, e.q3 + spread) - e.q1) - C(0.5) * spread;
    const C of_zero = small ? exponential_.whole : theta * (log.log + above);
    return zero ? -of_zero : own - distance;
  }
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    return {log_prob(e)};
  }

  // theta mean / (theta + mean); where the mean's share is too small for a number, the mean.
  template <class C>
  static FASTVAE_INLINE C pull_of_zero(Element<C> e, C ratio, C of_mean) {
    const C mean = exp_(e.p0);
    return ratio < C(-87) ? mean : e.q0 * of_mean;
  }
  // Log p of a count of 0, and the slopes by log mean and by log inverse dispersion.
  template <class C>
  static FASTVAE_INLINE Slopes<C> slopes(Element<C> e) {
    const C theta = e.q0, n = e.x + theta, inverse = C(1) / n;
    const C d = (e.p0 - e.d0) - e.d1, ratio = e.p0 - e.q3, size = abs_(ratio),
            most = size < C(87) ? size : C(87);
    const bool zero = e.x == C(0), near = abs_(d)<C(1), above = ratio> C(0);
    // The shares of theta and of the mean in their sum.
    const C k = exp_negative(-most), large = C(1) / (C(1) + k), small = k * large;
    const C of_theta = above ? small : large, of_mean = above ? large : small;
    const C pull = near ? -e.x * expm1_(d) * of_theta : e.x * of_theta - pull_of_zero(e, ratio, of_mean);
    const C u = n * (of_theta / theta), beyond = above ? size - most : C(0);
    const C rest = rest_of_log(pull / theta, u) + beyond;
    const C gamma = C(0.5) * (e.x * inverse) + (e.q2 - theta * inverse * digamma_excess(n, log_(n)));
    return {pull - theta * rest, pull, (zero ? C(0) : gamma) - theta * rest};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> zero_slopes(Element<C> e) {
    const C ratio = e.p0 - e.q3, size = abs_(ratio), most = size < C(87) ? size : C(87);
    const bool above = ratio > C(0);
    const C k = exp_negative(-most), large = C(1) / (C(1) + k), small = k * large;
    const C of_theta = above ? small : large, of_mean = above ? large : small;
    const C pull = -pull_of_zero(e, ratio, of_mean),
            rest = rest_of_log(-of_mean, of_theta) + (above ? size - most : C(0));
    return {pull - e.q0 * rest, pull, -e.q0 * rest};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> times(C g, Slopes<C> s) {
    return {C(0), g * s.p0, g * s.p1};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    return times(g, slopes(e));
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> zero_gradient(C g, Element<C> e) {
    return times(g, zero_slopes(e));
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
