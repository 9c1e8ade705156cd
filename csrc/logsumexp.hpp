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
// The sum of exp(s - shift_of(most)), where none exceeds `most`; inf for +inf.
template <class C>
FASTVAE_LOOP double sum_of_exponentials(int n, C most, const C* s) {
  const C shift = shift_of(most);
  const double sum = sum_over<C>(n, [=](int i) FASTVAE_INLINED { return exp_up_to_1(s[i] - shift); });
  return most == infinity(C(0)) ? sum + most : sum;
}

// A log-sum-exp of numbers that arrive in parts.
template <class C>
struct LogSum {
  C top = -std::numeric_limits<C>::infinity();
  double sum = 0;  // of exp(s - shift_of(top))

  void add(int n, const C* s) {
    const C here = largest(n, s), above = here > top ? here : top;
    if (top < above) sum *= static_cast<double>(exp_(top - shift_of(above)));
    sum += sum_of_exponentials(n, above, s);
    top = above;
  }
  double value() const { return static_cast<double>(top) + __builtin_log(sum); }
};

// Reduces `rows` vectors that follow one another, each to one number, by combining neighbours: a third of the
// instructions of reducing one after the other. The vectors are overwritten.
template <class C, bool kSum>
FASTVAE_LOOP void combine_pairs(i64 n, const C* __restrict from, C* __restrict to) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    const C a = from[2 * i], b = from[2 * i + 1];
    to[i] = kSum ? a + b : b > a ? b : a;
  }
}
template <class C, bool kSum>
FASTVAE_INLINE void reduce_vectors(int rows, C* vectors, C* buffer, C* to) {
  int width = kLanes<C> / 2;
  for (; width > 1; width /= 2) {
    combine_pairs<C, kSum>(rows * width, vectors, buffer);
    C* const next = vectors;
    vectors = buffer;
    buffer = next;
  }
  combine_pairs<C, kSum>(rows, vectors, to);
}

// Maximum and sum of exponentials of rows of n numbers, at least a vector's, of which no lane sums more
// than 16. A row's last vector ends with the row: `seen` of its lanes belong to the one before, too.
template <class C>
FASTVAE_LOOP void largest_of_lanes(int rows, int n, const C* __restrict s, i64 pitch, C* __restrict out) {
  constexpr int lanes = kLanes<C>;
  for (int r = 0; r < rows; ++r, s += pitch, out += lanes) {
    Vector<C> most = *reinterpret_cast<const Vector<C>*>(s + n - lanes);
    for (int i = 0; i < n - lanes; i += lanes) {
      const Vector<C> next = *reinterpret_cast<const Vector<C>*>(s + i);
      most = next > most ? next : most;
    }
    *reinterpret_cast<Vector<C>*>(out) = most;
  }
}
template <class C>
FASTVAE_LOOP void exponentials_of_lanes(int rows, int n, const C* __restrict s, i64 pitch,
                                        const C* __restrict top, C* __restrict out) {
  constexpr int lanes = kLanes<C>;
  const int seen = (lanes - n % lanes) % lanes;
  for (int r = 0; r < rows; ++r, s += pitch, out += lanes) {
    const C shift = shift_of(top[r]), *last = s + n - lanes;
    alignas(kVectorBytes) C e[lanes];
#pragma omp simd
    for (int l = 0; l < lanes; ++l) {
      const C value = exp_up_to_1(last[l] - shift);
      e[l] = l < seen ? C(0) : value;
    }
    Vector<C> total = *reinterpret_cast<const Vector<C>*>(e);
    for (int i = 0; i < n - lanes; i += lanes) {
      const C* from = s + i;  // not s[i + l], which -fwrapv would gather
#pragma omp simd
      for (int l = 0; l < lanes; ++l) e[l] = exp_up_to_1(from[l] - shift);
      total += *reinterpret_cast<const Vector<C>*>(e);
    }
    *reinterpret_cast<Vector<C>*>(out) = total;
  }
}
template <class C>
void exponentials_of_rows(int rows, int n, const C* s, i64 pitch, C* top, C* sum) {
  constexpr int most = 32;
  alignas(kVectorBytes) C vectors[most * kLanes<C>], buffer[most * kLanes<C>];
  for (int first = 0; first < rows; first += most) {
    const int count = rows - first < most ? rows - first : most;
    const C* from = s + first * pitch;
    largest_of_lanes(count, n, from, pitch, vectors);
    reduce_vectors<C, false>(count, vectors, buffer, top + first);
    exponentials_of_lanes(count, n, from, pitch, top + first, vectors);
    reduce_vectors<C, true>(count, vectors, buffer, sum + first);
  }
}

// The running maximum and the sum of exp(s - maximum).
template <class C>
struct RunningSums {
  alignas(kVectorBytes) C top[kBuffer], sum[kBuffer];
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
    // Equal infinities differ by nothing.
    const C e = value == most ? C(1) : exp_negative(-abs_(value - most));
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
    alignas(kVectorBytes) C block[kSamplesPerBlock][kColumnsPerUnit], peak[kColumnsPerUnit],
        next[kColumnsPerUnit], shift[kColumnsPerUnit], scale[kColumnsPerUnit], part[kColumnsPerUnit];
    // Sums of blocks: thousands of samples must not cost digits.
    alignas(kVectorBytes) double sum[kColumnsPerUnit];
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
    alignas(kVectorBytes) C row_buffer[kTile], grad_buffer[kTile], out_buffer[kTile], shift[kTile],
        inverse[kTile];
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
