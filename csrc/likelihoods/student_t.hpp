// log of Student's t(x; location, exp(log_scale), exp(log_df)). See fastvae/likelihoods/student_t.py for the
// mathematics.
#pragma once

#include "../declaration.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct StudentT : Declaration {
  static constexpr int kParameters = 3, kHooked = 2, kPrepared = 3;
  static constexpr double kFactor = -0.5, kConstant = 1.8378770664093454835606594728112;  // log 2 pi

  // 1 / sqrt(df), df, and the derivative of the gamma functions' term by log df. From e^80 on it is the
  // normal distribution.
  template <class C>
  static FASTVAE_INLINE Prepared<C> prepare(C given) {
    const C log_df = given > C(80) ? C(80) : given, df = exp_(log_df);
    const HalfStep<C> gammas = half_step(C(0.5) * df, log_df - C(0.69314718055994530942));
    return {C(-2) * gammas.value, exp_<-1>(log_df), df, gammas.slope};
  }
  template <class C>
  static FASTVAE_INLINE Value<C> value(Element<C> e) {
    const C r = (e.x - e.p0) * exp_<-2>(e.p1) * e.q0;
    return {(e.q1 + C(1)) * log1p_square(r) + C(2) * e.p1};
  }
  template <class C>
  static FASTVAE_INLINE Slopes<C> gradient(C g, Element<C> e) {
    const C distance = e.x - e.p0, r = distance * exp_<-2>(e.p1) * e.q0, t = r * r, log_1pt = log1p_square(r);
    // t / (1 + t), also for infinite t.
    const C rest = C(1) / (C(1) + t), share = t < C(0.5) ? t * rest : C(1) - rest;
    // 0 at 0, where NaN stays NaN.
    const C location = g * ((e.q1 + C(1)) * (share / (distance == C(0) ? C(1) : distance)));
    const C log_df = e.q2 + C(0.5) * (share - e.q1 * log1p_excess(t, share, log_1pt));
    return {-location, location, g * ((e.q1 + C(1)) * share - C(1)), g * log_df};
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
