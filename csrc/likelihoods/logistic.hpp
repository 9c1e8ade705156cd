// log Logistic(x; location, exp(log_scale)). See fastvae/likelihoods/logistic.py for the mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct Logistic : Declaration {
  static constexpr int kParameters = 2, kHooked = 1, kPrepared = 1;
  static constexpr bool kSharedLog = true;
  static constexpr double kFactor = -2;

  // The value is halved, since the logarithm counts twice.
  template <class C>
  static FASTVAE_INLINE Prepared<C> prepare(C log_scale) {
    return {C(0.5) * log_scale, exp_<-2>(log_scale)};
  }
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    const C distance = abs_(e.x - e.p0) * e.q0;
    return {C(0.5) * distance, exp_minus(distance)};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    const C t = (e.x - e.p0) * e.q0, slope = tanh_half(t), location = g * slope * e.q0;
    return {-location, location, g * (t * slope - C(1))};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
