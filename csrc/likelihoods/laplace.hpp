// log Laplace(x; location, exp(log_scale)). See fastvae/likelihoods/laplace.py for the mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct Laplace : Declaration {
  static constexpr int kParameters = 2, kHooked = 1, kPrepared = 1;
  static constexpr double kFactor = -1, kConstant = 0.69314718055994530941723212145818;  // log 2

  template <class C>
  static FASTVAE_INLINE Prepared<C> prepare(C log_scale) {
    return {log_scale, exp_<-2>(log_scale)};
  }
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    return {abs_(e.x - e.p0) * e.q0};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    const C delta = e.x - e.p0, location = g * sign_(delta) * e.q0;
    return {-location, location, g * (abs_(delta) * e.q0 - C(1))};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
