// Tiles of a diagonal normal q and its prior, which the forward and backward pass of normal_diagonal share.
#pragma once

#include "common.hpp"
#include "elementary.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

template <class T>
struct Diagonal {
  using Storage = T;
  View<const T> mu, logvar, prior_mu, prior_logvar;  // (B, D)
  std::uint64_t seed;
  i64 samples, rows, columns, sample_offset, row_offset;
  compute_t<T> logvar_min, logvar_max;
  Scale scale;  // meaning of `logvar`
  compute_t<T> floor;
  int threads;
  bool with_prior() const { return prior_mu || prior_logvar; }
};

// Quantities of a tile of q and p. Without a prior, p = N(0, I), its three arrays are not read.
template <class C>
struct LatentArrays {
  const C *mu, *logvar, *clamped, *prior_mu, *prior_logvar, *inverse_s;
  // Where another form than log variances was given: sigma / 2, and the derivative of the log variance by it.
  const C *half_sigma, *chain;
};

template <class C>
FASTVAE_LOOP void clamp_all(int n, const C* __restrict x, C lo, C hi, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = clip(x[i], lo, hi);
}

// 1 / s from log variances. Callers multiply by one factor at a time: 1 / s^2 overflows long before products
// that contain it.
template <class C>
FASTVAE_LOOP void inverse_scales(int n, const C* __restrict logvar, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = exp_<-1>(logvar[i]);
}

// Converts a raw parameter to log sigma^2, sigma / 2, and the derivative of the former by the parameter.
template <class C>
struct Spread {
  C logvar, half_sigma, chain;
};
struct OfLogScale {
  template <class C>
  static FASTVAE_INLINE Spread<C> spread(C raw, C /*floor*/) {
    return {C(2) * raw, C(0.5) * exp_(raw), C(2)};
  }
};
struct OfSigma {
  template <class C>
  static FASTVAE_INLINE Spread<C> spread(C raw, C /*floor*/) {
    return {C(2) * log_of_any(raw), C(0.5) * raw, C(2) / raw};
  }
};
template <bool kFloor>
struct OfSoftplus {
  template <class C>
  static FASTVAE_INLINE Spread<C> spread(C raw, C floor) {
    const Softplus<C> s = softplus(raw);
    if constexpr (kFloor) {
      const C variance = s.value + floor;
      return {log_positive(variance), C(0.5) * sqrt_(variance), s.slope / variance};
    } else {
      // Below -40 the softplus is exp(raw), and may underflow.
      const bool tail = s.slope < C(4.2e-18);
      return {tail ? raw : log_positive(s.value), C(0.5) * (tail ? exp_<1>(raw) : sqrt_(s.value)),
              tail ? C(1) : s.slope / s.value};
    }
  }
};
template <class S, bool kChain, class C>
FASTVAE_LOOP void spreads(int n, const C* __restrict raw, C floor, C* __restrict logvar,
                          C* __restrict half_sigma, C* __restrict chain) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const Spread<C> s = S::spread(raw[i], floor);
    logvar[i] = s.logvar;
    half_sigma[i] = s.half_sigma;
    if constexpr (kChain) chain[i] = s.chain;
  }
}
template <bool kChain, class C>
inline void spreads(Scale scale, int n, const C* raw, C floor, C* logvar, C* half_sigma, C* chain) {
  const auto loop = scale == kLogScale ? spreads<OfLogScale, kChain, C>
                    : scale == kSigma  ? spreads<OfSigma, kChain, C>
                    : floor > C(0)     ? spreads<OfSoftplus<true>, kChain, C>
                                       : spreads<OfSoftplus<false>, kChain, C>;
  loop(n, raw, floor, logvar, half_sigma, chain);
}

template <class T, bool kChain>
struct LatentTile {
  using C = compute_t<T>;
  alignas(kVectorBytes) C mu[kTile] = {}, logvar[kTile] = {}, clamped[kTile],
                          half_sigma[kTile], chain[kChain ? kTile : 1];
  alignas(kVectorBytes) C prior_mu[kTile] = {}, prior_logvar[kTile] = {}, inverse_s[kTile];

  LatentArrays<C> read(const Diagonal<T>& a, i64 row, i64 column, const Tile& t) {
    const int n = t.size();
    LatentArrays<C> q{};
    q.mu = load(mu, a.mu.at(row, column), a.mu.s0, a.mu.s1, t);
    q.logvar = load(logvar, a.logvar.at(row, column), a.logvar.s0, a.logvar.s1, t);
    q.clamped = q.logvar;
    if (a.scale != kLogvar) {
      spreads<kChain>(a.scale, n, q.logvar, a.floor, clamped, half_sigma, chain);
      q.logvar = q.clamped = clamped;
      q.half_sigma = half_sigma;
      q.chain = chain;
    } else if (a.logvar_min > -infinity(C{}) || a.logvar_max < infinity(C{})) {
      clamp_all(n, q.logvar, a.logvar_min, a.logvar_max, clamped);
      q.clamped = clamped;
    }
    if (!a.with_prior()) return q;
    q.prior_mu =
        a.prior_mu ? load(prior_mu, a.prior_mu.at(row, column), a.prior_mu.s0, a.prior_mu.s1, t) : prior_mu;
    q.prior_logvar = a.prior_logvar ? load(prior_logvar, a.prior_logvar.at(row, column), a.prior_logvar.s0,
                                           a.prior_logvar.s1, t)
                                    : prior_logvar;
    inverse_scales(n, q.prior_logvar, inverse_s);
    q.inverse_s = inverse_s;
    return q;
  }
};

// x - m, its quotient with s, and log sigma^2 - log s^2, at i.
template <bool kPrior, class C>
FASTVAE_INLINE C distance(const LatentArrays<C>& q, C x, int i) {
  return kPrior ? x - q.prior_mu[i] : x;
}
template <bool kPrior, class C>
FASTVAE_INLINE C over_s(const LatentArrays<C>& q, C x, int i) {
  return kPrior ? x * q.inverse_s[i] : x;
}
template <bool kPrior, class C>
FASTVAE_INLINE C log_variances(const LatentArrays<C>& q, int i) {
  return kPrior ? q.clamped[i] - q.prior_logvar[i] : q.clamped[i];
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
