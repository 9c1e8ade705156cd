// log-mean-exp over samples, and its gradient. See fastvae/ops/logsumexp.py for the mathematics.
#pragma once

#include "common.hpp"
#include "elementary.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// Columns processed at a time. The maximum is updated every kSamplesPerBlock (tiles.hpp) samples.
constexpr int kColumnsPerUnit = 64;

// The shift subtracted before exp: the maximum, or 0 where it is infinite (inf - inf would be NaN).
template <class C>
FASTVAE_INLINE C shift_of(C maximum) {
  return abs_(maximum) == infinity(C{}) ? C(0) : maximum;
}

template <class C>
FASTVAE_LOOP C largest(i64 n, const C* s) {
  C most = -infinity(C(0));
#pragma omp simd reduction(max : most)
  for (i64 i = 0; i < n; ++i) most = s[i] > most ? s[i] : most;
  return most;
}
template <class C>
FASTVAE_LOOP double sum_of_exponentials(int n, C shift, const C* s) {
  return sum_over<C>(n, [=](int i) FASTVAE_INLINED { return exp_(s[i] - shift); });
}

// A log-sum-exp of numbers that arrive in parts.
template <class C>
struct LogSum {
  C top = -std::numeric_limits<C>::infinity();
  double sum = 0;  // of exp(s - shift_of(top))

  void add(int n, const C* s) {
    const C here = largest(n, s), above = here > top ? here : top, shift = shift_of(above);
    if (top < above) sum *= static_cast<double>(exp_(top - shift));
    sum += sum_of_exponentials(n, shift, s);
    top = above;
  }
  double value() const { return static_cast<double>(top) + __builtin_log(sum); }
};

// Maximum and sum of exponentials of rows of n numbers, at least a vector's, of which no lane sums more
// than 16.
template <class C>
FASTVAE_LOOP void exponentials_of_rows(int rows, int n, const C* __restrict s, i64 pitch, C* __restrict top,
                                       C* __restrict sum) {
  constexpr int lanes = kLanes<C>;
  const int whole = n / lanes * lanes, rest = n - whole;
  for (int r = 0; r < rows; ++r, s += pitch) {
    // Ends with the row: its first lanes were seen before.
    const C* last = s + n - lanes;
    C most = -infinity(C(0)), total = 0;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < whole; ++i) most = s[i] > most ? s[i] : most;
#pragma omp simd reduction(max : most)
    for (int i = 0; i < lanes; ++i) most = last[i] > most ? last[i] : most;
    const C shift = shift_of(most);
#pragma omp simd reduction(+ : total)
    for (int i = 0; i < whole; ++i) total += exp_(s[i] - shift);
    if (rest > 0) {
#pragma omp simd reduction(+ : total)
      for (int i = 0; i < lanes; ++i) total += i < lanes - rest ? C(0) : exp_(last[i] - shift);
    }
    top[r] = most;
    sum[r] = total;
  }
}

// The running maximum and the sum of exp(s - maximum).
template <class C>
struct RunningSums {
  C top[kBuffer], sum[kBuffer];
  void clear(int n) {
    fill(top, std::numeric_limits<C>::lowest(), n);
    fill(sum, C(0), n);
  }
};

template <class C>
FASTVAE_LOOP void add_exponential(int n, const C* __restrict s, C* __restrict top, C* __restrict sum) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C value = s[i], most = top[i];
    const bool above = value > most;
    const C e = exp_negative(above ? most - value : value - most);
    sum[i] = above ? sum[i] * e + C(1) : sum[i] + e;
    top[i] = above ? value : most;
  }
}
template <class C>
FASTVAE_LOOP void log_of_sums(int n, const C* __restrict top, const C* __restrict sum, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = top[i] + log_positive(sum[i]);
}

template <class C>
FASTVAE_LOOP void raise_maximum(C* __restrict maximum, const C* __restrict row, int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) maximum[i] = row[i] > maximum[i] ? row[i] : maximum[i];
}

template <class C>
FASTVAE_LOOP void add_exponentials(C* __restrict sum, const C* __restrict row, const C* __restrict shift,
                                   int n) {
#pragma omp simd
  for (int i = 0; i < n; ++i) sum[i] += exp_(row[i] - shift[i]);
}

// out = g w, or 0 where either is below the smallest normal number.
template <class C>
FASTVAE_LOOP void times_weights(C* __restrict out, const C* __restrict g, const C* __restrict row,
                                const C* __restrict shift, const C* __restrict inverse, int n) {
  const C tiny = smallest_normal(C{});
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C w = exp_(row[i] - shift[i]) * inverse[i];
    const C product = g[i] * w;
    out[i] = w < tiny || abs_(product) < tiny ? C(0) : product;
  }
}

template <class T>
void log_mean_exp_columns(View<const T> log_w, i64 samples, i64 columns, compute_t<T>* bound,
                          compute_t<T>* maximum, compute_t<T>* total, int threads) {
  using C = compute_t<T>;
  const i64 units = (columns + kColumnsPerUnit - 1) / kColumnsPerUnit;
  const double log_samples = __builtin_log(static_cast<double>(samples));
  parallel(threads, units, samples * columns, [&](i64 begin, i64 end) {
    C block[kSamplesPerBlock][kColumnsPerUnit], peak[kColumnsPerUnit], next[kColumnsPerUnit],
        shift[kColumnsPerUnit], scale[kColumnsPerUnit], part[kColumnsPerUnit];
    double sum[kColumnsPerUnit];  // for the sums of blocks: thousands of samples must not cost digits
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 column = unit * kColumnsPerUnit;
      const int n = static_cast<int>(columns - column < kColumnsPerUnit ? columns - column : kColumnsPerUnit);
      fill(peak, -infinity(C{}), n);
      fill(sum, 0.0, n);
      for (i64 k0 = 0; k0 < samples; k0 += kSamplesPerBlock) {
        const int m = static_cast<int>(samples - k0 < kSamplesPerBlock ? samples - k0 : kSamplesPerBlock);
        const C* rows[kSamplesPerBlock] = {};
        for (int k = 0; k < m; ++k) rows[k] = load(block[k], log_w.at(k0 + k, column), log_w.s1, n);
        fill(next, -infinity(C{}), n);
        for (int k = 0; k < m; ++k) raise_maximum(next, rows[k], n);
        // NaN may or may not reach `next`; the sum below keeps it in either case.
        raise_maximum(next, peak, n);
#pragma omp simd
        for (int i = 0; i < n; ++i) {
          shift[i] = shift_of(next[i]);
          // While all values are -inf the sum is 0 (or NaN), after +inf it is inf: both keep their scale.
          scale[i] = exp_negative(abs_(peak[i]) == infinity(C{}) ? C(0) : peak[i] - next[i]);
          part[i] = C(0);
          peak[i] = next[i];
        }
        for (int k = 0; k < m; ++k) add_exponentials(part, rows[k], shift, n);
#pragma omp simd
        for (int i = 0; i < n; ++i) sum[i] = sum[i] * scale[i] + part[i];
      }
      for (int i = 0; i < n; ++i) {
        bound[column + i] = static_cast<C>(peak[i] + __builtin_log(sum[i]) - log_samples);
        maximum[column + i] = peak[i];
        total[column + i] = static_cast<C>(sum[i]);
      }
    }
  });
}

template <class T>
void log_mean_exp_weights(T* out, View<const compute_t<T>> grad, View<const T> log_w,
                          const compute_t<T>* maximum, const compute_t<T>* total, i64 samples, i64 columns,
                          int threads) {
  using C = compute_t<T>;
  parallel(threads, samples, samples * columns, [&](i64 begin, i64 end) {
    C row_buffer[kTile], grad_buffer[kTile], out_buffer[kTile], shift[kTile], inverse[kTile];
    for (i64 column = 0; column < columns; column += kTile) {
      const int n = tile_width(columns, column);
      const C* g = load(grad_buffer, grad.data + column * grad.s0, grad.s0, n);
#pragma omp simd
      for (int i = 0; i < n; ++i) {
        shift[i] = shift_of(maximum[column + i]);
        // No weight at all: 0, so that its gradient is 0 and not 0 / 0.
        inverse[i] = total[column + i] == C(0) ? C(0) : C(1) / total[column + i];
      }
      for (i64 k = begin; k < end; ++k) {
        const C* row = load(row_buffer, log_w.at(k, column), log_w.s1, n);
        T* place = out + k * columns + column;
        C* p = target(place, out_buffer);
        times_weights(p, g, row, shift, inverse, n);
        commit(place, p, n);
      }
    }
  });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
