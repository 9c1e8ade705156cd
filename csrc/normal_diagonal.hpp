// Reparameterised sampling with the KL or with log p(z) - log q(z|x), forward and backward. See
// fastvae/ops/normal_diagonal.py for the mathematics; names and arguments are those of
// fastvae/reference/normal_diagonal.py.
#pragma once

#include "common.hpp"
#include "elementary.hpp"
#include "normal_tiles.hpp"
#include "random.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// Samples per tile of a unit of work: enough to amortise the tile's own quantities, few enough to spread K
// over threads when there are few rows.
constexpr i64 kSamplesPerUnit = 16;

template <class C>
FASTVAE_LOOP void half_sigmas(int n, const C* __restrict logvar, C* __restrict half_sigma) {
#pragma omp simd
  for (int i = 0; i < n; ++i) half_sigma[i] = C(0.5) * exp_<1>(logvar[i]);
}

// Twice the KL of each element.
template <bool kPrior, class C>
FASTVAE_LOOP void kl_terms(int n, const LatentArrays<C>& q, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C white = over_s<kPrior>(q, distance<kPrior>(q, q.mu[i], i), i);
    out[i] = white * white + expm1_minus(log_variances<kPrior>(q, i));
  }
}

// z, the derivative of z by logvar if it is stored, and the noise-dependent part of twice the log-ratio if
// needed.
template <bool kKeep, bool kRatio, bool kPrior, class C>
FASTVAE_LOOP void draw(int n, const LatentArrays<C>& q, const C* __restrict half_sigma,
                       const C* __restrict eps, C* __restrict z, C* __restrict slope, C* __restrict terms) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C half = half_sigma[i] * eps[i], v = q.mu[i] + C(2) * half;
    z[i] = v;
    if constexpr (kKeep) slope[i] = half;
    if constexpr (kRatio) {
      const C white = over_s<kPrior>(q, distance<kPrior>(q, v, i), i);
      terms[i] = eps[i] * eps[i] - white * white;
    }
  }
}

template <bool kPrior, class C>
FASTVAE_LOOP double sum_log_variances(int n, const C* __restrict logvar, const C* __restrict prior_logvar) {
  return sum_over<C>(n, [=](int i) { return kPrior ? logvar[i] - prior_logvar[i] : logvar[i]; });
}

// Results of a forward pass: z [K, B, D]; if stored, the derivative of z by logvar [K, B, D]; and kl [B] (or
// [B, D] with per_dimension), or log_ratio [K, B].
template <class T>
struct DiagonalResults {
  T* z;
  compute_t<T>*slope, *kl, *log_ratio;
  bool per_dimension;
};

template <bool kPrior, class T>
void diagonal_forward(const Diagonal<T>& a, const DiagonalResults<T>& to) {
  using C = compute_t<T>;
  const i64 height = rows_per_tile(a.rows, a.columns), tiles = (a.rows + height - 1) / height;
  const i64 chunks = (a.samples + kSamplesPerUnit - 1) / kSamplesPerUnit;
  parallel(a.threads, tiles * chunks, a.samples * a.rows * a.columns, [&](i64 begin, i64 end) {
    Noise<C> noise(Key(a.seed), a.sample_offset, a.row_offset);
    LatentTile<T, false> buffers;
    alignas(kVectorBytes) C half_sigma_buffer[kTile], z_buffer[kTile], slope_buffer[kTile], terms[kBuffer];
    double kl_sum[kMostRows], constant[kMostRows], ratio_sum[kSamplesPerUnit][kMostRows];
    const auto draw_tile = to.log_ratio
                               ? (to.slope ? draw<true, true, kPrior, C> : draw<false, true, kPrior, C>)
                               : (to.slope ? draw<true, false, kPrior, C> : draw<false, false, kPrior, C>);
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 b = unit / chunks * height, k0 = unit % chunks * kSamplesPerUnit;
      const i64 k1 = k0 + kSamplesPerUnit < a.samples ? k0 + kSamplesPerUnit : a.samples;
      const bool with_kl = to.kl && k0 == 0;
      const int rows = tile_of(a.rows, b, height, a.columns, 0).rows;
      fill(kl_sum, 0.0, rows);
      for (i64 k = k0; k < k1; ++k) fill(ratio_sum[k - k0], 0.0, rows);
      for (i64 column = 0; column < a.columns; column += kTile) {
        const Tile t = tile_of(a.rows, b, height, a.columns, column);
        noise.shape(column, t);
        const LatentArrays<C> q = buffers.read(a, b, column, t);
        const C* half_sigma = q.half_sigma;
        if (!half_sigma) {
          half_sigmas(t.size(), q.clamped, half_sigma_buffer);
          half_sigma = half_sigma_buffer;
        }
        if (with_kl) {
          kl_terms<kPrior>(t.size(), q, terms);
          if (!to.per_dimension) add_row_sums(terms, t, kl_sum);
          for (int r = 0; r < rows && to.per_dimension; ++r) {
            C* out = to.kl + (b + r) * a.columns + column;
            for (int i = 0; i < t.n; ++i) out[i] = C(0.5) * terms[r * t.pitch + i];
          }
        }
        if (to.log_ratio) {
          for (int r = 0; r < rows; ++r) {
            const C* prior_logvar = kPrior ? q.prior_logvar + r * t.pitch : nullptr;
            constant[r] = sum_log_variances<kPrior>(t.n, q.clamped + r * t.pitch, prior_logvar);
          }
        }
        for (i64 k = k0; k < k1; ++k) {
          const i64 offset = (k * a.rows + b) * a.columns + column;
          const C* eps = noise(k, b);
          C* z = target(to.z + offset, z_buffer, a.columns, t);
          C* slope = target(to.slope ? to.slope + offset : nullptr, slope_buffer, a.columns, t);
          draw_tile(t.size(), q, half_sigma, eps, z, slope, terms);
          commit(to.z + offset, z, a.columns, t);
          if (to.slope) commit(to.slope + offset, slope, a.columns, t);
          if (!to.log_ratio) continue;
          add_row_sums(terms, t, ratio_sum[k - k0]);
          for (int r = 0; r < rows; ++r) ratio_sum[k - k0][r] += constant[r];
        }
      }
      if (with_kl && !to.per_dimension) {
        for (int r = 0; r < rows; ++r) to.kl[b + r] = static_cast<C>(0.5 * kl_sum[r]);
      }
      if (to.log_ratio) {
        for (i64 k = k0; k < k1; ++k) {
          C* out = to.log_ratio + k * a.rows + b;
          for (int r = 0; r < rows; ++r) out[r] = static_cast<C>(0.5 * ratio_sum[k - k0][r]);
        }
      }
    }
  });
}

// Upstream gradients: of z (K, B, D), of kl (B, D) with strides, or of log_ratio (K, B); and the weights of
// DReG (K, B).
template <class T>
struct DiagonalGrads {
  View<const T> z;
  View<const compute_t<T>> slope, kl, log_ratio, weight;
  bool path;
  T *mu, *logvar, *prior_mu, *prior_logvar;  // results (B, D); null where not needed
};

// Sums over samples for each element of a tile: h, h times the derivative of z by logvar, and the prior's.
template <class C>
struct LatentSums {
  alignas(kVectorBytes) C h[kTile], h_slope[kTile], prior[kTile], prior_logvar[kTile];

  template <bool kPrior>
  void clear(int n) {
    fill(h, C(0), n);
    fill(h_slope, C(0), n);
    if constexpr (!kPrior) return;
    fill(prior, C(0), n);
    fill(prior_logvar, C(0), n);
  }
  template <bool kPrior>
  void add(int n, const LatentSums& other) {
    add(n, h, other.h);
    add(n, h_slope, other.h_slope);
    if constexpr (!kPrior) return;
    add(n, prior, other.prior);
    add(n, prior_logvar, other.prior_logvar);
  }
  static FASTVAE_LOOP void add(int n, C* __restrict to, const C* __restrict from) {
#pragma omp simd
    for (int i = 0; i < n; ++i) to[i] += from[i];
  }
};

// Adds one sample's part, without the log-ratio.
template <class C>
FASTVAE_LOOP void accumulate(int n, const C* __restrict slope, const C* __restrict grad_z,
                             C* __restrict h_sum, C* __restrict h_slope_sum) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    h_sum[i] += grad_z[i];
    h_slope_sum[i] += grad_z[i] * slope[i];
  }
}

// The same with the log-ratio; ratio and weight are expanded over the elements of their row.
template <bool kPath, bool kPrior, class C>
FASTVAE_LOOP void accumulate_ratio(int n, const LatentArrays<C>& q, const C* inverse_sigma,
                                   const C* __restrict slope, const C* __restrict grad_z,
                                   const C* __restrict ratio, const C* __restrict weight,
                                   LatentSums<C>& __restrict sums) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    // A sample with zero upstream gradient contributes zero, even where the distance is infinite.
    const C white =
        ratio[i] == C(0) ? C(0) : over_s<kPrior>(q, distance<kPrior>(q, q.mu[i] + C(2) * slope[i], i), i);
    const C part = ratio[i] * white, pull = over_s<kPrior>(q, part, i);
    // h times the slope, factor by factor: it can be finite where h overflows.
    C h = grad_z[i] - pull, h_slope = grad_z[i] * slope[i] - part * over_s<kPrior>(q, slope[i], i);
    if constexpr (kPath) {
      const C eps = C(2) * slope[i] * inverse_sigma[i], push = ratio[i] * eps;
      h = weight[i] * (h + push * inverse_sigma[i]);
      h_slope = weight[i] * (h_slope + C(0.5) * push * eps);
    }
    sums.h[i] += h;
    sums.h_slope[i] += h_slope;
    if constexpr (kPrior) {
      sums.prior[i] += pull;
      sums.prior_logvar[i] += part * white - ratio[i];
    }
  }
}

// The gradients of mu and logvar from the sums; `side` is the gradient of kl, or else the summed gradient of
// the log-ratio.
template <bool kKl, bool kPrior, class C>
FASTVAE_LOOP void finish_q(int n, const LatentArrays<C>& q, const C* __restrict h_sum,
                           const C* __restrict h_slope_sum, const C* __restrict side, C* __restrict out_mu,
                           C* __restrict out_logvar) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    C mu = h_sum[i], entropy = side[i];
    if constexpr (kKl) {
      mu += over_s<kPrior>(q, side[i] * over_s<kPrior>(q, distance<kPrior>(q, q.mu[i], i), i), i);
      entropy *= expm1_(log_variances<kPrior>(q, i));
    }
    out_mu[i] = mu;
    const C v = h_slope_sum[i] + C(0.5) * entropy;
    // Comparing for inequality keeps NaN for a NaN log variance.
    out_logvar[i] = q.clamped[i] < q.logvar[i] || q.clamped[i] > q.logvar[i] ? C(0) : v;
  }
}
template <bool kKl, class C>
FASTVAE_LOOP void finish_prior(int n, const LatentArrays<C>& q, const LatentSums<C>& sums,
                               const C* __restrict side, C* __restrict out_mu, C* __restrict out_logvar) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    C mu = sums.prior[i], logvar = sums.prior_logvar[i];
    if constexpr (kKl) {
      const C white = (q.mu[i] - q.prior_mu[i]) * q.inverse_s[i], part = side[i] * white;
      mu -= part * q.inverse_s[i];
      logvar -= side[i] * expm1_(q.clamped[i] - q.prior_logvar[i]) + part * white;
    }
    out_mu[i] = mu;
    out_logvar[i] = C(0.5) * logvar;
  }
}

// For elements whose KL has zero gradient and may be infinite, replaces the sums with the KL by those without
// it.
template <class C>
FASTVAE_LOOP bool any_zero(int n, const C* __restrict from) {
  int zeros = 0;
#pragma omp simd reduction(+ : zeros)
  for (int i = 0; i < n; ++i) zeros += from[i] == C(0);
  return zeros != 0;
}
template <class C>
FASTVAE_LOOP void where_zero(int n, const C* __restrict side, const C* __restrict without, C* __restrict to) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = side[i] == C(0) ? without[i] : to[i];
}

template <class C>
FASTVAE_LOOP void multiply(int n, const C* __restrict by, C* __restrict to) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] *= by[i];
}
// 1 / sigma from sigma / 2.
template <class C>
FASTVAE_LOOP void half_inverses(int n, const C* __restrict half_sigma, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = C(0.5) / half_sigma[i];
}

// Expands one number per row to all elements of the row.
template <class C, class F>
inline void spread(C* out, const Tile& t, F value) {
  for (int r = 0; r < t.rows; ++r) fill(out + r * t.pitch, value(r), t.n);
}

template <bool kPrior, class T>
void diagonal_backward(const Diagonal<T>& a, const DiagonalGrads<T>& g) {
  using C = compute_t<T>;
  const i64 height = rows_per_tile(a.rows, a.columns), tiles = (a.rows + height - 1) / height;
  parallel(a.threads, tiles, a.samples * a.rows * a.columns, [&](i64 begin, i64 end) {
    LatentTile<T, true> buffers;
    alignas(kVectorBytes) C grad_z_buffer[kTile] = {}, slope_buffer[kTile] = {}, side[kTile] = {},
                            ratio[kTile] = {}, weight[kTile] = {};
    alignas(kVectorBytes) C inverse_sigma[kTile], out_mu[kTile], out_logvar[kTile],
        no_side[kTile] = {}, first_without[kTile], second_without[kTile];
    // In two levels, blocks of kSamplesPerBlock and then the blocks: thousands of samples must not cost
    // digits.
    LatentSums<C> total, block;
    double entropy[kMostRows];
    for (i64 tile = begin; tile < end; ++tile) {
      const i64 b = tile * height;
      for (i64 column = 0; column < a.columns; column += kTile) {
        const Tile t = tile_of(a.rows, b, height, a.columns, column);
        const int n = t.size();
        const LatentArrays<C> q = buffers.read(a, b, column, t);
        if (g.path && q.half_sigma) {
          half_inverses(n, q.half_sigma, inverse_sigma);
        } else if (g.path) {
          inverse_scales(n, q.clamped, inverse_sigma);
        }
        fill(entropy, 0.0, t.rows);
        if (!g.z) fill(grad_z_buffer, C(0), n);
        total.template clear<kPrior>(n);
        // A single block needs no second level.
        LatentSums<C>& sums = a.samples > kSamplesPerBlock ? block : total;
        const i64 sampled = g.z || g.log_ratio ? a.samples : 0;
        for (i64 k = 0; k < sampled; ++k) {
          if (&sums == &block && k % kSamplesPerBlock == 0) block.template clear<kPrior>(n);
          const C* slope = load(slope_buffer, g.slope.at(k, b, column), g.slope.s1, g.slope.s2, t);
          const C* grad_z =
              g.z ? load(grad_z_buffer, g.z.at(k, b, column), g.z.s1, g.z.s2, t) : grad_z_buffer;
          if (!g.log_ratio) {
            accumulate(n, slope, grad_z, sums.h, sums.h_slope);
          } else {
            spread(ratio, t, [&](int r) { return *g.log_ratio.at(k, b + r); });
            if (g.path) {
              spread(weight, t, [&](int r) { return g.weight ? *g.weight.at(k, b + r) : C(1); });
            } else {
              for (int r = 0; r < t.rows; ++r) entropy[r] += *g.log_ratio.at(k, b + r);
            }
            (g.path ? accumulate_ratio<true, kPrior, C>
                    : accumulate_ratio<false, kPrior, C>)(n, q, inverse_sigma, slope, grad_z, ratio, weight,
                                                          sums);
          }
          const bool last = (k + 1) % kSamplesPerBlock == 0 || k + 1 == a.samples;
          if (&sums == &block && last) total.template add<kPrior>(n, block);
        }
        const C* at_side = side;
        if (g.kl) {
          at_side = load(side, g.kl.at(b, column), g.kl.s0, g.kl.s1, t);
        } else {
          spread(side, t, [&](int r) { return static_cast<C>(entropy[r]); });
        }
        const bool without_kl = g.kl && any_zero(n, at_side);
        const auto replace = [&](C* first, C* second) {
          where_zero(n, at_side, first_without, first);
          where_zero(n, at_side, second_without, second);
        };
        const i64 offset = b * a.columns + column;
        auto put = [&](T* first, T* second, auto compute) {
          if (!first && !second) return;
          C* to_first = target(first ? first + offset : nullptr, out_mu, a.columns, t);
          C* to_second = target(second ? second + offset : nullptr, out_logvar, a.columns, t);
          compute(to_first, to_second);
          if (first) commit(first + offset, to_first, a.columns, t);
          if (second) commit(second + offset, to_second, a.columns, t);
        };
        put(g.mu, g.logvar, [&](C* to_mu, C* to_logvar) {
          (g.kl ? finish_q<true, kPrior, C> : finish_q<false, kPrior, C>)(n, q, total.h, total.h_slope,
                                                                          at_side, to_mu, to_logvar);
          if (without_kl) {
            finish_q<false, kPrior, C>(n, q, total.h, total.h_slope, no_side, first_without, second_without);
            replace(to_mu, to_logvar);
          }
          if (q.chain) multiply(n, q.chain, to_logvar);
        });
        if constexpr (kPrior) {
          put(g.prior_mu, g.prior_logvar, [&](C* to_mu, C* to_logvar) {
            (g.kl ? finish_prior<true, C> : finish_prior<false, C>)(n, q, total, at_side, to_mu, to_logvar);
            if (without_kl) {
              finish_prior<false, C>(n, q, total, no_side, first_without, second_without);
              replace(to_mu, to_logvar);
            }
          });
        }
      }
    }
  });
}

// Inputs of every entry point: q and p, and the noise where it draws.
struct LatentArguments {
  Tensor mu, logvar, prior_mu, prior_logvar;  // (B, D); the priors may be null, for N(0, I)
  Draw draw;
  int threads;
  address seed = 0;  // address of an int64

  // Calls f(Yes or No: whether there is a prior other than N(0, I); the arguments for the storage type T).
  template <class F>
  void call(F f) const {
    for_dtype(mu.dtype, [&](auto t) {
      using T = decltype(t);
      using C = compute_t<T>;
      const Diagonal<T> a{view<const T>(mu),
                          view<const T>(logvar),
                          view<const T>(prior_mu),
                          view<const T>(prior_logvar),
                          seed ? *pointer<const std::uint64_t>(seed) : 0,
                          draw.samples,
                          mu.n0,
                          mu.n1,
                          draw.sample_offset,
                          draw.row_offset,
                          static_cast<C>(draw.logvar_min),
                          static_cast<C>(draw.logvar_max),
                          draw.scale,
                          static_cast<C>(draw.floor),
                          threads};
      a.with_prior() ? f(Yes{}, a) : f(No{}, a);
    });
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
