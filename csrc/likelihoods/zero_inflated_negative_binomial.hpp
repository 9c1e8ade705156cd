// Zeros with probability sigmoid(l) of a dropout logit l, else a negative binomial count. See
// fastvae/likelihoods/zero_inflated_negative_binomial.py for the mathematics.
#pragma once

#include "negative_binomial.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct ZeroInflatedNegativeBinomial : NegativeBinomial {
  static constexpr int kParameters = 3;

  // sigmoid(v), sigmoid(-v), exp(-|v|), log(1 + exp(v)).
  template <class C>
  struct Shares {
    C yes, no, odds, softplus;
  };
  template <class C>
  static FASTVAE_INLINE Shares<C> shares(C v) {
    const C k = exp_negative(-abs_(v)), large = C(1) / (C(1) + k), small = k * large;
    const bool above = v > C(0);
    return {above ? large : small, above ? small : large, k, (above ? v : C(0)) + log1p_(k)};
  }

  // From log p of a counted 0. Near p = 1 use 1 + no (p - 1), else the sum of both ways to a 0, where l is
  // below 0.
  template <class C>
  static FASTVAE_INLINE C either(C counted, C l, Shares<C> dead) {
    const C change = dead.no * expm1_(counted), apart = abs_(l - counted), larger = l > counted ? l : counted;
    const bool near = change > C(-0.5);
    const C log = log1p_(near ? change : (exp_negative(-apart) - dead.odds) * dead.no);
    return near ? log : larger + log;
  }
  template <class C>
  static FASTVAE_INLINE C zero(Element<C> e) {
    return either(NegativeBinomial::zero(e), e.p2, shares(e.p2));
  }
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    const C counted = log_prob(e);
    const Shares<C> dead = shares(e.p2);
    const C of_zero = either(counted, e.p2, dead);
    return {e.x == C(0) ? of_zero : counted - dead.softplus};
  }

  template <class C>
  static FASTVAE_INLINE Slopes<C> of_zero(C g, C l, Slopes<C> s) {
    const Shares<C> dead = shares(l), dropped = shares(l - s.x);
    const C part = g * dropped.no;
    return {C(0), part * s.p0, part * s.p1, g * (-dropped.yes * dead.no * expm1_(s.x))};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> zero_gradient(C g, Element<C> e) {
    return of_zero(g, e.p2, zero_slopes(e));
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    const Slopes<C> s = slopes(e), z = of_zero(g, e.p2, s);
    const bool zero = e.x == C(0);
    const C p0 = g * s.p0, p1 = g * s.p1, p2 = -g * shares(e.p2).yes;
    return {C(0), zero ? z.p0 : p0, zero ? z.p1 : p1, zero ? z.p2 : p2};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
