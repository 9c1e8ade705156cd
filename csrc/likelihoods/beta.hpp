// log Beta(x; exp(c1), exp(c0)). See fastvae/likelihoods/beta.py for the mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct Beta : Declaration {
  static constexpr int kParameters = 2, kData = 2;
  static constexpr bool kGradientTakesData = true;
  static constexpr double kLow = 0, kHigh = 1;

  // The logit of x in two parts, as log p multiplies its error by n. Both logarithms are infinite at an end,
  // where the term of x alone is 0.
  template <class C>
  static FASTVAE_INLINE Prepared<C> data(C x) {
    const bool low = x < C(0.5);
    const C y = low ? x : C(1) - x, of_rest = log1p_(-y), smallest = smallest_normal(x);
    // Denormal numbers are scaled to normal ones first.
    const bool denormal = y < smallest, end = y == C(0);
    const TwoParts<C> log_y = log_in_parts(denormal ? y * C(0x1p24) : y);
    const C high = log_y.high - (denormal ? C(16.635532333438687) : C(0));
    const C near = log1p_((y + y - C(1)) / (C(1) - y));
    const bool middle = y > C(0.25);
    const C first = end      ? -infinity(x)
                    : middle ? near
                             : high,
            second = middle || end ? C(0) : log_y.low - of_rest;
    return {end ? C(0) : -(high + of_rest), low ? first : -first, low ? second : -second};
  }

  // The lesser concentration (log p, exp(p)), the other, their shares of the sum n, and the distances of x
  // and 1 - x from these: rise is the logarithm of x's share over the lesser's, fall that of the rest's over
  // the other's, negative.
  template <class C>
  struct Parts {
    C p, q, least, largest, fold, w, v, rise, fall, distance;
    bool other;
  };
  template <class C>
  static FASTVAE_INLINE C clamped(C c) {
    return clip(c, C(-80), C(80));
  }
  template <class C>
  static FASTVAE_INLINE Parts<C> parts(Element<C> e) {
    const C a = clamped(e.p0), b = clamped(e.p1);
    const bool other = a > b;
    const C p = other ? b : a, q = other ? a : b, gap = q - p, k = exp_negative(-gap), fold = log1p_(k);
    const C v = C(1) / (C(1) + k), w = k * v, least = exp_(p), largest = exp_(q);
    const C logit = other ? -e.d0 : e.d0, low = other ? -e.d1 : e.d1, s = (logit + gap) + low,
            clipped = clip(s, C(-1), C(1));
    const C less_line = expm1_minus(clipped);
    const LogAndRest<C> near = log1p_and_rest(w * (less_line + clipped));
    // Far from the mode use the logarithms themselves, log(1 + exp(+-logit)).
    const C l = logit + low, of_rest = log1p_(e.x < C(0.5) ? -e.x : e.x - C(1));
    const C above = (l > C(0) ? l : C(0)) - of_rest, below = (l > C(0) ? C(0) : -l) - of_rest;
    const bool is_near = abs_(s) < C(1);
    const C rise = is_near ? clipped - near.log : (gap + fold) - below,
            fall = is_near ? near.log : above - fold;
    const C distance =
        is_near ? least * less_line - (least + largest) * near.rest : largest * fall - least * rise;
    return {p, q, least, largest, fold, w, v, rise, fall, distance, other};
  }
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    const Parts<C> s = parts(e);
    const C of_n = stirling_error(s.least + s.largest, s.q + s.fold) - stirling_error(s.largest, s.q);
    const C inside = ((s.p - C(0.5) * s.fold) + (of_n - log_factorial_excess(s.least, s.p))) - s.distance;
    // At an end one concentration decides: above 1 the density is 0.
    const bool low = e.x < C(0.5);
    const C decides = low ? e.p0 : e.p1, limit = decides * -infinity(decides);
    const C at_end = (low ? e.p1 : e.p0) + (decides == C(0) ? C(0) : limit);
    return {is_infinite(e.d0) ? at_end : inside};
  }
  // Zero upstream gradient gives zero, even where log p is infinite.
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    const Parts<C> s = parts(e);
    const C of_n = digamma_excess(s.least + s.largest, s.q + s.fold);
    const C least = s.least * s.rise + (C(0.5) * s.v + (digamma_excess(s.least, s.p) - s.w * of_n));
    const C largest = (C(0.5) * s.w + (digamma_excess(s.largest, s.q) - s.v * of_n)) - s.largest * s.fall;
    const C low = expm1_(clamped(e.p0)), high = expm1_(clamped(e.p1));
    const C of_x = (low == C(0) ? C(0) : low / e.x) - (high == C(0) ? C(0) : high / (C(1) - e.x));
    const bool none = g == C(0);
    return {none ? C(0) : g * of_x, none ? C(0) : g * (s.other ? largest : least),
            none ? C(0) : g * (s.other ? least : largest)};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
