// Log probability that a logistic variable falls in the bin of x. See
// fastvae/likelihoods/discretized_logistic.py for the mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct DiscretizedLogistic : Declaration {
  static constexpr int kParameters = 3;
  static constexpr bool kSharedLog = true;
  static constexpr double kFactor = -1, kLow = 0, kHigh = 1;

  // In units of the scale: distance of the mean, outwards at an end, and half the bin's width; 1 - exp(-2
  // half).
  template <class C>
  struct Parts {
    C inverse_s, r, half, below, k, far;
    bool end, turned;
  };
  template <class C>
  static FASTVAE_INLINE Parts<C> parts(Element<C> e) {
    const C log_s = clip(e.p1, C(-60), C(60)), inverse_s = exp_<-2>(log_s), z = (e.x - e.p0) * inverse_s;
    const C width = exp_(e.p2 - log_s), half = C(0.5) * width;
    // 0 or 1, with one comparison.
    const bool end = e.x * (C(1) - e.x) <= C(0), turned = (end ? e.x - C(0.5) : z) < C(0);
    const C r = turned ? -z : z;
    return {
        inverse_s, r,     half, -expm1_(-width), exp_negative(-width), end ? C(0) : exp_negative(-(r + half)),
        end,       turned};
  }
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    const Parts<C> s = parts(e);
    const C v = s.r - s.half, rest = s.end ? C(0) : log1p_((s.far + s.k) / s.below);
    return {(v < C(0) ? C(0) : v) + rest, exp_minus(abs_(v))};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    const Parts<C> s = parts(e);
    const C v = s.r - s.half, t = exp_negative(-abs_(v)), sigmoid = (v >= C(0) ? C(1) : t) / (C(1) + t),
            beyond = C(1) / (C(1) + s.far);
    // Derivatives by r and by the log width. The two sides of an interior bin pull against each other,
    // equally at r = 0.
    const C by_r = s.end ? sigmoid : sigmoid * beyond * -expm1_(C(-2) * s.r);
    const C inside = s.end ? C(0) : (s.half * (s.far * beyond) + C(2) * s.half * (s.k / s.below));
    const C by_width = s.half * sigmoid + inside, push = g * by_r * s.inverse_s;
    return {C(0), s.turned ? -push : push, g * (s.r * by_r - by_width), g * by_width};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
