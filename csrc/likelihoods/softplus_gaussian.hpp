// log N(x; mean, log(1 + exp(raw)) + exp(log_floor)). See fastvae/likelihoods/softplus_gaussian.py for the
// mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct SoftplusGaussian : Declaration {
  static constexpr int kParameters = 3;
  static constexpr double kFactor = -0.5, kConstant = 1.8378770664093454835606594728112;  // log 2 pi

  // The variance, clamped to normal numbers, and its derivatives by raw and by log_floor.
  template <class C>
  struct Variance {
    C variance, by_raw, floor;
  };
  template <class C>
  static FASTVAE_INLINE Variance<C> variance(Element<C> e) {
    const C floor = exp_(e.p2 > C(80) ? C(80) : e.p2);
    const Softplus<C> s = softplus(clip(e.p1, C(-80), C(1e38)));
    return {s.value + floor, s.slope, floor};
  }
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    const C delta = e.x - e.p0, variance_ = variance(e).variance;
    return {log_(variance_) + delta * (delta / variance_)};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    const Variance<C> s = variance(e);
    const C delta = e.x - e.p0, inverse = C(1) / s.variance, mean = g * (delta * inverse);
    const C by_variance = C(0.5) * (mean * delta - g);
    return {-mean, mean, by_variance * (s.by_raw * inverse), by_variance * (s.floor * inverse)};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
