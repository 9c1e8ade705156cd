// x l - log(1 + exp(l)) of logits l. See fastvae/likelihoods/bernoulli.py for the mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct Bernoulli : Declaration {
  static constexpr int kParameters = 1;
  static constexpr bool kSharedLog = true;
  static constexpr double kFactor = -1, kLow = 0, kHigh = 1;

  // The distance of x from the favoured target, times |l|; log(1 + exp(-|l|)) is to be added.
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    const C l = e.p0, magnitude = abs_(l);
    // 0 * inf is 0: log p is 0 where x is certain.
    const C miss = l > C(0) ? C(1) - e.x : e.x;
    return {miss == C(0) ? C(0) : miss * magnitude, exp_minus(magnitude)};
  }
  template <class C>
  static FASTVAE_INLINE Value<C> value_if_finite(Element<C> e) {
    const C l = e.p0, magnitude = abs_(l);
    return {(l > C(0) ? C(1) - e.x : e.x) * magnitude, exp_minus(magnitude)};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    const C l = e.p0, t = exp_negative(-abs_(l));
    const C sigmoid = (l >= C(0) ? C(1) : t) / (C(1) + t);
    return {g * l, g * (e.x - sigmoid)};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
