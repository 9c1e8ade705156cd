// log N(x; mean, exp(logvar)). See fastvae/likelihoods/gaussian.py for the mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct Gaussian : Declaration {
  static constexpr int kParameters = 2, kHooked = 1, kPrepared = 1;
  static constexpr double kFactor = -0.5, kConstant = 1.8378770664093454835606594728112;  // log 2 pi

  // 1 / s: exp(-logvar) overflows long before the products that contain it.
  template <class C>
  static FASTVAE_INLINE Prepared<C> prepare(C logvar) {
    return {logvar, exp_<-1>(logvar)};
  }
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    const C white = (e.x - e.p0) * e.q0;
    return {white * white};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    const C white = (e.x - e.p0) * e.q0, part = g * white, mean = part * e.q0;
    return {-mean, mean, C(0.5) * (part * white - g)};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
