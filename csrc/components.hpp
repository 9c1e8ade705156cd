// Likelihoods of positions that are mixtures over a component axis, log p = log sum_c exp(s_c) - log sum_c
// exp(a_c): of logits a_c, with s_c = a_c + the components' log-likelihoods. Lanes are positions; components
// come one after the other, with running maxima and sums.
#pragma once

#include <vector>

#include "common.hpp"
#include "elementary.hpp"
#include "logsumexp.hpp"
#include "storage.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// The derivatives of a component's log-likelihood of an element.
template <class C>
struct ComponentSlopes {
  C location, log_scale;
};

template <class C>
FASTVAE_LOOP double sum_of_differences(int n, const C* joint, const C* normaliser) {
  return sum_over<C>(n, [=](int i) FASTVAE_INLINED { return joint[i] - normaliser[i]; });
}
template <class L, class C>
FASTVAE_LOOP void add_component(int n, C setting, const C* __restrict x, const C* __restrict location,
                                const C* __restrict log_scale, C* __restrict s) {
#pragma omp simd
  for (int i = 0; i < n; ++i) s[i] += L::value(x[i], location[i], log_scale[i], setting);
}
// r = g exp(s - joint), the gradient for a component's score; and the gradient for its logit.
template <class C>
FASTVAE_LOOP void component_shares(int n, C g, const C* __restrict a, const C* __restrict s,
                                   const C* __restrict normaliser, const C* __restrict joint, C* __restrict r,
                                   C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    r[i] = g * exp_(s[i] - joint[i]);
    out[i] = r[i] - g * exp_(a[i] - normaliser[i]);
  }
}
template <class L, class C>
FASTVAE_LOOP void component_gradients(int n, C setting, const C* __restrict r, const C* __restrict x,
                                      const C* __restrict location, const C* __restrict log_scale,
                                      C* __restrict out_location, C* __restrict out_log_scale) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const ComponentSlopes<C> slopes = L::gradient(x[i], location[i], log_scale[i], setting);
    out_location[i] = r[i] * slopes.location;
    out_log_scale[i] = r[i] * slopes.log_scale;
  }
}
// Colours: location + tanh(coefficient) x of an earlier channel.
template <class C>
FASTVAE_LOOP void couple(int n, const C* __restrict x, const C* __restrict coefficient,
                         const C* __restrict from, C* __restrict to) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = from[i] + tanh_half(C(2) * coefficient[i]) * x[i];
}
template <class C>
FASTVAE_LOOP void uncouple(int n, const C* __restrict x, const C* __restrict coefficient,
                           const C* __restrict grad, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C t = tanh_half(C(2) * coefficient[i]);
    out[i] = grad[i] * x[i] * (C(1) - t) * (C(1) + t);
  }
}

// A logistic variable rounded to values half * 2 apart in [-1, 1], the outer bins open. For the mathematics
// see fastvae/likelihoods/discretized_logistic_mixture.py.
struct DiscretizedLogisticComponent {
  // Scales are clamped to e^±60, so that the ends of the bin stay finite.
  template <class C>
  static FASTVAE_INLINE C inverse_scale(C log_scale) {
    return exp_(-clip(log_scale, C(-60), C(60)));
  }
  // log of sigmoid(upper) sigmoid(-lower) (1 - exp(lower - upper)), the first and the last without what lies
  // outside.
  template <class C>
  static FASTVAE_INLINE C value(C x, C location, C log_scale, C half) {
    const C inverse = inverse_scale(log_scale), delta = x - location;
    const C upper = (delta + half) * inverse, lower = (delta - half) * inverse;
    const bool first = x < half - C(1);
    const bool last = x > C(1) - half;
    const C below = first ? C(0) : exp_negative(-abs_(lower)),
            above = last ? C(0) : exp_negative(-abs_(upper));
    const C inner = -expm1_(C(-2) * half * inverse), share = first || last ? C(1) : inner;
    const C linear = (lower > C(0) && !first ? lower : C(0)) - (upper < C(0) && !last ? upper : C(0));
    return log_positive(share / ((C(1) + below) * (C(1) + above))) - linear;
  }
  template <class C>
  static FASTVAE_INLINE ComponentSlopes<C> gradient(C x, C location, C log_scale, C half) {
    const C inverse = inverse_scale(log_scale), delta = x - location;
    const C upper = (delta + half) * inverse, lower = (delta - half) * inverse, width = C(2) * half * inverse;
    const bool first = x < half - C(1);
    const bool last = x > C(1) - half;
    const C k_below = exp_negative(-abs_(lower)), k_above = exp_negative(-abs_(upper));
    // sigmoid(lower), sigmoid(-upper)
    const C large_below = C(1) / (C(1) + k_below), large_above = C(1) / (C(1) + k_above);
    const C below = first ? C(0) : lower > C(0) ? large_below : k_below * large_below;
    const C above = last ? C(0) : upper > C(0) ? k_above * large_above : large_above;
    const C most = width < C(80) ? width : C(80), share = first || last ? C(0) : most / expm1_(most);
    return {(below - above) * inverse, (lower * below - upper * above) - share};
  }
};

// A call: data (B, E, P), logits (N, C, P), the components' parameters (N, C E, P); N a multiple of B.
// `setting` is half a bin's width.
struct ComponentRows {
  Tensor x, logits, location, log_scale, coefficients;
  double setting;
  i64 channels() const { return x.n1; }
  bool coupled() const { return coefficients.data != 0; }
};

template <class C>
struct GroupReader {
  const ComponentRows& a;
  const C setting;
  alignas(kVectorBytes) C x[3][kBuffer], logit[kBuffer], location[3][kBuffer], log_scale[3][kBuffer],
      coefficient[3][kBuffer], shifted[3][kBuffer], s[kBuffer];
  const C *at_x[3] = {}, *at_logit = nullptr, *at_location[3] = {}, *at_log_scale[3] = {},
          *at_coefficient[3] = {};
  const C* means[3] = {};

  explicit GroupReader(const ComponentRows& call) : a(call), setting(static_cast<C>(call.setting)) {}
  static const C* read(C* buffer, const Tensor& t, i64 row, i64 group, i64 position, int n) {
    const Storage<C>& from = storage<C>(t.dtype);
    const address begin =
        t.data + static_cast<address>((row * t.s0 + group * t.s1 + position * t.s2) * from.size);
    if (from.in_place && t.s2 == 1) return pointer<const C>(begin);
    return from.load(buffer, begin, t.s2, n);
  }
  void data(i64 b, i64 position, int n) {
    for (i64 e = 0; e < a.channels(); ++e) at_x[e] = read(x[e], a.x, b, e, position, n);
  }
  void component(i64 row, i64 c, i64 position, int n) {
    at_logit = read(logit, a.logits, row, c, position, n);
    for (i64 e = 0; e < a.channels(); ++e) {
      at_location[e] = read(location[e], a.location, row, c * a.channels() + e, position, n);
      at_log_scale[e] = read(log_scale[e], a.log_scale, row, c * a.channels() + e, position, n);
      means[e] = at_location[e];
      if (a.coupled())
        at_coefficient[e] = read(coefficient[e], a.coefficients, row, c * a.channels() + e, position, n);
    }
    if (!a.coupled()) return;
    // Green by red; blue by red and green.
    couple(n, at_x[0], at_coefficient[0], at_location[1], shifted[0]);
    couple(n, at_x[0], at_coefficient[1], at_location[2], shifted[1]);
    couple(n, at_x[1], at_coefficient[2], shifted[1], shifted[2]);
    means[1] = shifted[0];
    means[2] = shifted[2];
  }
  template <class L>
  void log_likelihood(int n) {
    copy_all(n, at_logit, s);
    for (i64 e = 0; e < a.channels(); ++e)
      add_component<L>(n, setting, at_x[e], means[e], at_log_scale[e], s);
  }
  static void copy_all(int n, const C* from, C* to) {
    __builtin_memcpy(to, from, static_cast<std::size_t>(n) * sizeof(C));
  }
};

// Positions of a tile: their sums and a component's parameters stay in the first-level cache.
constexpr i64 kGroupTile = 1024;

template <class C>
void components_rows(const ComponentRows& a, C* out, C* normaliser, C* joint, int threads) {
  const i64 rows = a.logits.n0, groups = a.logits.n1, positions = a.logits.n2, batch = a.x.n0;
  const i64 tiles = (positions + kGroupTile - 1) / kGroupTile;
  std::vector<double> parts(static_cast<std::size_t>(rows * tiles));
  parallel(threads, rows * tiles, a.logits.size() + a.location.size(), [&](i64 begin, i64 end) {
    GroupReader<C> r(a);
    RunningSums<C> all, own;
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 row = unit / tiles, first = unit % tiles * kGroupTile;
      const int n = static_cast<int>(positions - first < kGroupTile ? positions - first : kGroupTile);
      C *to_normaliser = normaliser + row * positions + first, *to_joint = joint + row * positions + first;
      r.data(row % batch, first, n);
      all.clear(n);
      own.clear(n);
      for (i64 c = 0; c < groups; ++c) {
        r.component(row, c, first, n);
        add_exponential(n, r.at_logit, all.top, all.sum);
        r.template log_likelihood<DiscretizedLogisticComponent>(n);
        add_exponential(n, r.s, own.top, own.sum);
      }
      log_of_sums(n, all.top, all.sum, to_normaliser);
      log_of_sums(n, own.top, own.sum, to_joint);
      parts[static_cast<std::size_t>(unit)] = sum_of_differences(n, to_joint, to_normaliser);
    }
  });
  for (i64 row = 0; row < rows; ++row) {
    double sum = 0;
    for (i64 t = 0; t < tiles; ++t) sum += parts[static_cast<std::size_t>(row * tiles + t)];
    out[row] = static_cast<C>(sum);
  }
}

// Destinations of gradients, in the storage types of their inputs; null where not needed.
struct ComponentsGradients {
  address logits, location, log_scale, coefficients;
};

template <class C>
void components_rows_backward(const ComponentRows& a, const Tensor& grad, const C* normaliser, const C* joint,
                              const ComponentsGradients& to, int threads) {
  const i64 rows = a.logits.n0, groups = a.logits.n1, positions = a.logits.n2, batch = a.x.n0,
            channels = a.channels();
  const i64 tiles = (positions + kGroupTile - 1) / kGroupTile;
  const auto put = [&](address out, const Tensor& like, i64 index, i64 first, const C* from, int n) {
    const Storage<C>& s = storage<C>(like.dtype);
    s.store(out + static_cast<address>((index * positions + first) * s.size), from, n);
  };
  parallel(threads, rows * tiles, a.logits.size() + a.location.size(), [&](i64 begin, i64 end) {
    GroupReader<C> r(a);
    alignas(kVectorBytes) C out[kBuffer], share[kBuffer], out_location[3][kBuffer], out_log_scale[3][kBuffer],
        out_coefficient[kBuffer];
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 row = unit / tiles, first = unit % tiles * kGroupTile;
      const int n = static_cast<int>(positions - first < kGroupTile ? positions - first : kGroupTile);
      const C g = *(pointer<const C>(grad.data) + row * grad.s0);
      const C *at_normaliser = normaliser + row * positions + first,
              *at_joint = joint + row * positions + first;
      r.data(row % batch, first, n);
      for (i64 c = 0; c < groups; ++c) {
        const i64 index = row * groups + c;
        r.component(row, c, first, n);
        r.template log_likelihood<DiscretizedLogisticComponent>(n);
        component_shares(n, g, r.at_logit, r.s, at_normaliser, at_joint, share, out);
        if (to.logits) put(to.logits, a.logits, index, first, out, n);
        if (!to.location && !to.log_scale && !to.coefficients) continue;
        for (i64 e = 0; e < channels; ++e) {
          component_gradients<DiscretizedLogisticComponent>(n, r.setting, share, r.at_x[e], r.means[e],
                                                            r.at_log_scale[e], out_location[e],
                                                            out_log_scale[e]);
          if (to.location) put(to.location, a.location, index * channels + e, first, out_location[e], n);
          if (to.log_scale) put(to.log_scale, a.log_scale, index * channels + e, first, out_log_scale[e], n);
        }
        if (!to.coefficients) continue;
        for (int i = 0; i < 3; ++i) {
          uncouple(n, r.at_x[i == 2 ? 1 : 0], r.at_coefficient[i], out_location[i == 0 ? 1 : 2],
                   out_coefficient);
          put(to.coefficients, a.coefficients, index * channels + i, first, out_coefficient, n);
        }
      }
    }
  });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
