// The bound of a batch: log p(x|z) of every row plus the term of q and p, reduced over samples and over the
// batch; and the gradients. See fastvae/ops/reduce.py for the mathematics.
#pragma once

#include "common.hpp"
#include "elementary.hpp"
#include "logsumexp.hpp"
#include "likelihood.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// Factor times term, where 0 times infinity is 0.
template <class C>
FASTVAE_INLINE C times(C factor, C term) {
  return factor == C(0) ? C(0) : factor * term;
}

// The factor of the term, for each row of the batch.
template <class C>
struct Factor {
  double coefficient;
  const Storage<C>* storage;
  Tensor beta;

  explicit Factor(const BoundReduction& w)
      : coefficient(w.coefficient), storage(&fastvae::FASTVAE_ISA::storage<C>(w.beta.dtype)), beta(w.beta) {}
  double operator()(i64 b) const {
    if (!beta.data) return coefficient;
    C number[1];
    return coefficient *
           storage->load(number, beta.data + static_cast<address>(b * beta.s0 * storage->size), 0, 1)[0];
  }
};

// out[b] = (1 / K) sum_k p[k, b].
template <class C>
void mean_over_samples(i64 samples, i64 first, int n, const C* p, i64 s0, i64 s1, double* out) {
  fill(out, 0.0, n);
  for (i64 k = 0; k < samples; ++k) {
    const C* row = p + k * s0 + first * s1;
    for (int i = 0; i < n; ++i) out[i] += row[i * s1];
  }
  for (int i = 0; i < n; ++i) out[i] /= static_cast<double>(samples);
}

// For log weights (K, B) to the power 1 - alpha in groups of samples: the log-mean-exps over 1 - alpha,
// averaged, and a share of the mean of the log weights; and the derivatives by the log weights, which are the
// weights. Computed in type W where the power makes differences small.
template <class W, class C>
void bounds_of_groups(const BoundReduction& w, const W* scaled, const C* log_w, C* bound, C* weights) {
  const i64 samples = w.rows.samples, rows = w.rows.rows, groups = w.how.groups, size = samples / groups;
  const double power = 1 - w.how.alpha, share = w.how.share;
  const Scratch<W> room(3 * rows), weight(size * rows);
  std::vector<double> sums(static_cast<std::size_t>(rows), 0.0), means(static_cast<std::size_t>(rows));
  const W part = static_cast<W>((1 - share) / static_cast<double>(groups));
  const C even = static_cast<C>(share / static_cast<double>(samples)), tiny = smallest_normal(C{});
  for (i64 g = 0; g < groups; ++g) {
    const View<const W> own{scaled + g * size * rows, rows, 1, 0}, parts{&part, 0, 0, 0};
    W *value = room.data, *maximum = value + rows, *total = maximum + rows;
    log_mean_exp_columns<W>(own, size, rows, value, maximum, total, w.rows.threads);
    for (i64 b = 0; b < rows; ++b) sums[static_cast<std::size_t>(b)] += value[b] / power;
    log_mean_exp_weights<W>(weight.data, parts, own, maximum, total, size, rows, w.rows.threads);
    C* out = weights + g * size * rows;
    for (i64 i = 0; i < size * rows; ++i)
      out[i] = (weight.data[i] < static_cast<W>(tiny) ? C(0) : static_cast<C>(weight.data[i])) + even;
  }
  for (i64 first = 0; share != 0 && first < rows; first += kColumnsPerUnit) {
    const int n = static_cast<int>(rows - first < kColumnsPerUnit ? rows - first : kColumnsPerUnit);
    mean_over_samples(samples, first, n, log_w, rows, 1, &means[static_cast<std::size_t>(first)]);
  }
  for (i64 b = 0; b < rows; ++b) {
    const auto i = static_cast<std::size_t>(b);
    const double mean = sums[i] / static_cast<double>(groups);
    bound[b] = static_cast<C>(share == 0 ? mean : (1 - share) * mean + share * means[i]);
  }
}

// The bound of each row, and the mean of its log-likelihoods if requested. `log_w` contains the
// log-likelihoods (K, B), and is overwritten with the log weights where those are needed.
template <class C>
void bounds_of_rows(const BoundReduction& w, C* log_w, C* bound, C* log_likelihood, C* weights) {
  const i64 samples = w.rows.samples, rows = w.rows.rows;
  const C* term = pointer<const C>(w.term.data);
  const Factor<C> factor(w);
  const i64 units = (rows + kColumnsPerUnit - 1) / kColumnsPerUnit;
  parallel(w.rows.threads, units, samples * rows, [&](i64 begin, i64 end) {
    double likelihood[kColumnsPerUnit], added[kColumnsPerUnit];
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 first = unit * kColumnsPerUnit;
      const int n = static_cast<int>(rows - first < kColumnsPerUnit ? rows - first : kColumnsPerUnit);
      if (log_likelihood || !w.log_mean_exp) {
        mean_over_samples(samples, first, n, log_w, rows, 1, likelihood);
        for (int i = 0; i < n && log_likelihood; ++i)
          log_likelihood[first + i] = static_cast<C>(likelihood[i]);
      }
      if (!w.log_mean_exp) {
        fill(added, 0.0, n);
        if (term) mean_over_samples(w.each_sample ? samples : 1, first, n, term, w.term.s0, w.term.s1, added);
        for (int i = 0; i < n; ++i)
          bound[first + i] = static_cast<C>(likelihood[i] + times(factor(first + i), added[i]));
      } else if (term) {
        for (int i = 0; i < n; ++i) added[i] = factor(first + i);
        for (i64 k = 0; k < samples; ++k) {
          C* row = log_w + k * rows + first;
          const C* t = term + k * w.term.s0 + first * w.term.s1;
          for (int i = 0; i < n; ++i) row[i] += times(static_cast<C>(added[i]), t[i * w.term.s1]);
        }
      }
    }
  });
  if (!w.log_mean_exp) return;
  if (!w.how.plain()) {
    if (w.how.alpha == 0) return bounds_of_groups<C, C>(w, log_w, log_w, bound, weights);
    const Scratch<double> scaled(samples * rows);
    for (i64 i = 0; i < samples * rows; ++i)
      scaled.data[i] = (1 - w.how.alpha) * static_cast<double>(log_w[i]);
    return bounds_of_groups<double, C>(w, scaled.data, log_w, bound, weights);
  }
  const Scratch<C> maximum(2 * rows);
  const View<const C> view{log_w, rows, 1, 0};
  log_mean_exp_columns<C>(view, samples, rows, bound, maximum.data, maximum.data + rows, w.rows.threads);
  const C one = 1;
  const View<const C> ones{&one, 0, 0, 0};
  log_mean_exp_weights<C>(weights, ones, view, maximum.data, maximum.data + rows, samples, rows,
                          w.rows.threads);
}

template <class C>
bool reduce_samples(const BoundReduction& w, const ReductionResults& to) {
  const i64 rows = w.rows.rows;
  const Scratch<C> log_w(w.rows.samples * rows);
  const bool in_range = reduce_rows(w.rows, log_w.data);
  if (w.scale == 0) {
    bounds_of_rows(w, log_w.data, pointer<C>(to.bound), pointer<C>(to.log_likelihood),
                   pointer<C>(to.weights));
    return in_range;
  }
  const Scratch<C> bound(rows);
  bounds_of_rows(w, log_w.data, bound.data, pointer<C>(to.log_likelihood), pointer<C>(to.weights));
  double sum = 0;
  for (i64 b = 0; b < rows; ++b) sum += bound.data[b];
  *pointer<C>(to.bound) = static_cast<C>(w.scale * sum);
  return in_range;
}

template <class C>
void reduce_samples_backward(const BoundReduction& w, const ReductionGradients& from, const RowGradients& to,
                             address out_term) {
  const i64 samples = w.rows.samples, rows = w.rows.rows;
  const C tiny = smallest_normal(C{});
  const Factor<C> factor(w);
  const C* weights = pointer<const C>(from.weights);
  C* term = pointer<C>(out_term);
  const Scratch<C> grad(samples * rows);
  const double scale = w.scale == 0 ? 1 : w.scale, share = 1.0 / static_cast<double>(samples);
  for (i64 b = 0; b < rows; ++b) {
    const C arrives =
        from.bound.data ? static_cast<C>(scale * pointer<const C>(from.bound.data)[b * from.bound.s0]) : C(0);
    const double extra = from.log_likelihood.data
                             ? pointer<const C>(from.log_likelihood.data)[b * from.log_likelihood.s0]
                             : 0.0;
    const C even = static_cast<C>(share * (arrives + extra));
    const double c = factor(b);
    double sum = 0;
    for (i64 k = 0; k < samples; ++k) {
      const i64 i = k * rows + b;
      C g = even;
      if (w.log_mean_exp) {
        const C product = arrives * weights[i];
        // A denormal would slow the decoder's backward pass many times over.
        g = weights[i] == C(0) || abs_(product) < tiny ? C(0) : product;
        sum += g;
      }
      grad.data[i] = g;
      if (term && w.each_sample)
        term[i] = static_cast<C>(c * (w.log_mean_exp ? static_cast<double>(g) : share * arrives));
    }
    if (term && !w.each_sample)
      term[b] = static_cast<C>(c * (w.log_mean_exp ? sum : static_cast<double>(arrives)));
  }
  bool wanted = to.x != 0;
  for (address p : to.p) wanted |= p != 0;
  if (!wanted) return;
  RowGradients gradients = to;
  gradients.grad = {reinterpret_cast<address>(grad.data), std::is_same<C, double>::value, rows, 1};
  reduce_rows_backward<C>(w.rows, gradients);
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
