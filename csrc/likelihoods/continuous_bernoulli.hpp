// x l - log((exp(l) - 1) / l) of logits l. See fastvae/likelihoods/continuous_bernoulli.py for the
// mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct ContinuousBernoulli : Declaration {
  static constexpr int kParameters = 1;
  static constexpr double kLow = 0, kHigh = 1;

  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    const C l = e.p0, a = abs_(l), miss = l > C(0) ? C(1) - e.x : e.x;
    const bool right = miss == C(0);
    // Avoids inf - inf for an infinite logit, whose density at the favoured end is infinite.
    const C most = a < C(1e38) ? a : C(1e38), end = right ? a - most : C(0);
    const C near = (C(0.5) - miss) * a - sinhc(a).value;
    const C far = log_(most / (C(1) - exp_negative(-a))) - (right ? C(0) : miss * a);
    return {a < C(1) ? near : far + end};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    const C l = e.p0, a = abs_(l), k = exp_negative(-a);
    // Distance of the mean from the end it is nearer to.
    const C rest = a < C(1) ? C(0.5) - sinhc(a).slope : C(1) / a - k / (C(1) - k);
    return {g * l, g * (l > C(0) ? (e.x - C(1)) + rest : e.x - rest)};
  }

  // log(sinh(a / 2) / (a / 2)) and its slope for 0 <= a <= 1: minimax polynomials to 1e-9; in double the
  // series.
  template <class C>
  struct Sinhc {
    C value, slope;
  };
  static FASTVAE_INLINE Sinhc<float> sinhc(float a) {
    const float v = a * a, v2 = v * v;
    const float p = (-9.92826586e-8f * v + 5.50895058e-6f) * v2 + (-3.47221722e-4f * v + 4.16666667e-2f);
    const float q = (-7.86376896e-7f * v + 3.30438378e-5f) * v2 + (-1.38888392e-3f * v + 8.33333332e-2f);
    return {v * p, a * q};
  }
  static FASTVAE_INLINE Sinhc<double> sinhc(double a) {
    const double v = a * a;
    const double p =
        1.0 / 24 +
        v * (-1.0 / 2880 +
             v * (1.0 / 181440 +
                  v * (-1.0 / 9676800 +
                       v * (1.0 / 479001600 +
                            v * (-4.4034917822395776e-11 +
                                 v * (9.5589546647747706e-13 +
                                      v * (-2.1185501852016143e-14 +
                                           v * (4.7700343047570991e-16 - v * 1.0874343492790309e-17))))))));
    const double q =
        1.0 / 12 +
        v * (-1.0 / 720 +
             v * (1.0 / 30240 +
                  v * (-1.0 / 1209600 +
                       v * (1.0 / 47900160 +
                            v * (-5.2841901386874932e-10 +
                                 v * (1.3382536530684679e-11 +
                                      v * (-3.3896802963225829e-13 +
                                           v * (8.5860620562778446e-15 - v * 2.1748686985580619e-16))))))));
    return {v * p, a * q};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
