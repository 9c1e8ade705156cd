// x r - exp(r) - log x! of log rates r. See fastvae/likelihoods/poisson.py for the mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct Poisson : Declaration {
  static constexpr bool kData = 1;
  static constexpr bool kSparse = true;
  static constexpr double kLow = 0;

  // x log x - x - log x!, and log x, which is not used for a count of 0.
  template <class C>
  static FASTVAE_INLINE Prepared<C> data(C x) {
    const C log_x = log_(x);
    return {-log_factorial_excess(x, log_x), log_x};
  }
  // With d = r - log x the rest is x (1 + d) - exp(r), or -x (exp(d) - 1 - d), which cancels less for small
  // d.
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    const C r = e.p0, d = r - e.d0;
    const C linear = C(1) + (d > C(710) ? C(710) : d);  // avoids inf - inf for an infinite rate
    const C far = (e.x == C(0) ? C(0) : e.x * linear) - exp_(r);
    return {abs_(d) < C(1) ? -e.x * expm1_minus(d) : far};
  }
  template <class C>
  static FASTVAE_INLINE C zero(Element<C> e) {
    return -exp_(e.p0);
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    // Zero upstream gradient gives zero, even where the rate overflows.
    return {C(0), g == C(0) ? C(0) : g * (e.x - exp_(e.p0))};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
