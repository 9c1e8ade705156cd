// Log density of x whose logarithm is N(location, exp(log_scale)^2). See fastvae/likelihoods/log_normal.py
// for the mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct LogNormal : Declaration {
  static constexpr int kParameters = 2, kHooked = 1, kPrepared = 1, kData = 1;
  static constexpr double kFactor = -0.5, kConstant = 1.8378770664093454835606594728112;  // log 2 pi
  static constexpr double kLow = 0;

  // At x = 0 the square is infinite, and adding -log x would give inf - inf.
  template <class C>
  static FASTVAE_INLINE Prepared<C> data(C x) {
    const C log_x = log_positive(x);
    return {x == C(0) ? C(0) : -log_x, log_x};
  }
  template <class C>
  static FASTVAE_INLINE Prepared<C> prepare(C log_scale) {
    return {C(2) * log_scale, exp_<-2>(log_scale)};
  }
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    const C t = (e.d0 - e.p0) * e.q0;
    return {t * t};
  }
  // Zero upstream gradient gives zero, even where x is 0.
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    const C t = (log_positive(e.x) - e.p0) * e.q0, push = g * t, location = push * e.q0;
    const bool none = g == C(0);
    return {none ? C(0) : -(g + location) / e.x, none ? C(0) : location, none ? C(0) : push * t - g};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
