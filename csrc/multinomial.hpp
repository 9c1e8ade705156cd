// Counts over an event, log p = sum_i x_i (a_i - log sum_j exp(a_j)) + log n! - sum_i log x_i!, n = sum x.
// See fastvae/ops/multinomial.py. A row's x is read once for all samples; the logits once per direction.
#pragma once

#include "categorical.hpp"
#include "common.hpp"
#include "elementary.hpp"
#include "logsumexp.hpp"
#include "storage.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// sum_i x_i (a_i - shift): a count of 0 adds 0 even where its class is impossible.
template <class C>
FASTVAE_LOOP double sum_of_products(int n, C shift, const C* x, const C* a) {
  return sum_over<C>(n, [=](int i) FASTVAE_INLINED { return x[i] == C(0) ? C(0) : x[i] * (a[i] - shift); });
}
// The sum of counts, the least, and whether one is neither 0 nor 1.
template <class C>
struct Counted {
  double sum;
  C least;
  bool other;
};
template <class C>
FASTVAE_LOOP Counted<C> count(int n, const C* x) {
  constexpr int block = 16 * kLanes<C>;
  double total = 0;
  C least = 0, most = 0;
  for (int first = 0; first < n; first += block) {
    const int last = n - first < block ? n : first + block;
    C part = 0;
#pragma omp simd reduction(+ : part) reduction(min : least) reduction(max : most)
    for (int i = first; i < last; ++i) {
      const C other = x[i] * (x[i] - C(1));  // 0 for 0 and 1; negative in between
      part += x[i];
      least = x[i] < least ? x[i] : least;
      most = abs_(other) > most ? abs_(other) : most;
    }
    total += part;
  }
  return {total, least, most > C(0)};
}
// out = g x - gn exp(a - normaliser).
template <class C>
FASTVAE_LOOP void count_gradients(int n, C g, C gn, C normaliser, const C* __restrict x,
                                  const C* __restrict a, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = g * x[i] - gn * exp_up_to_1(a[i] - normaliser);
}
template <class C>
FASTVAE_LOOP void where_seen(int n, const std::uint8_t* __restrict seen, C otherwise, const C* from, C* to) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = seen[i] ? from[i] : otherwise;
}

inline double log_factorial(double x) {
  static const auto small = [] {
    struct {
      double value[256];
    } made;
    int sign;  // lgamma would write a global variable
    for (int i = 0; i < 256; ++i) made.value[i] = ::lgamma_r(i + 1.0, &sign);
    return made;
  }();
  if (x >= 0 && x < 256 && x == __builtin_floor(x)) return small.value[static_cast<int>(x)];
  int sign;
  return ::lgamma_r(x + 1, &sign);
}

// A call: x (B, X) of any type, a mask (B, X) of bytes or none, logits (N, X); N a multiple of B. If x is
// sparse, `x` (M) holds its values, `begins` (B + 1) where rows begin among them, `columns` (M) their
// columns, which ascend in a row.
struct CountRows {
  Tensor x, begins, columns, mask, logits;
  i64 rows() const { return logits.n0; }
  i64 width() const { return logits.n1; }
  i64 batch() const { return begins.data ? begins.n0 - 1 : x.n0; }
  // Units of rows of x: all samples of a row, which read its x once; or single ones, if rows are few.
  i64 together() const { return batch() < 16 ? 1 : rows() / batch(); }
  i64 units() const { return rows() / together(); }
};

// Reads the numbers of a row block by block.
template <class C>
struct CountReader {
  const CountRows& a;
  const Storage<C>&of_x, &of_logits;
  alignas(kVectorBytes) C x_buffer[kBuffer], buffer[kBuffer], masked[kBuffer];
  std::uint8_t seen_buffer[kBuffer];
  const std::uint8_t* seen = nullptr;

  explicit CountReader(const CountRows& call)
      : a(call), of_x(storage<C>(call.x.dtype)), of_logits(storage<C>(call.logits.dtype)) {}

  void look(i64 b, i64 first, int n) {
    if (!a.mask.data) return;
    const std::uint8_t* from = pointer<const std::uint8_t>(a.mask.data) + b * a.mask.s0 + first * a.mask.s1;
    seen = a.mask.s1 == 1 ? from : seen_buffer;
    for (int i = 0; i < n && a.mask.s1 != 1; ++i) seen_buffer[i] = from[i * a.mask.s1];
  }
  // Counts and logits of a block, after look().
  const C* counts(i64 b, i64 first, int n) {
    const i64 offset = b * a.x.s0 + first * a.x.s1;
    const C* x = of_x.load(x_buffer, a.x.data + static_cast<address>(offset * of_x.size), a.x.s1, n);
    if (!seen) return x;
    where_seen(n, seen, C(0), x, x_buffer);
    return x_buffer;
  }
  const C* logits(i64 row, i64 first, int n) {
    const C* s = of_logits.load(buffer, logit_at(row, first), a.logits.s1, n);
    if (!seen) return s;
    where_seen(n, seen, -infinity(C(0)), s, masked);
    return masked;
  }

  // The entries of a sparse row: from begin(b) to begin(b + 1).
  bool sparse() const { return a.begins.data != 0; }
  i64 begin(i64 b) const { return pointer<const i64>(a.begins.data)[b * a.begins.s0]; }
  i64 column(i64 j) const { return pointer<const i64>(a.columns.data)[j * a.columns.s0]; }
  C value(i64 b, i64 j) const {
    if (a.mask.data && !pointer<const std::uint8_t>(a.mask.data)[b * a.mask.s0 + column(j) * a.mask.s1])
      return 0;
    C one;
    return *of_x.load(&one, a.x.data + static_cast<address>(j * a.x.s0 * of_x.size), 0, 1);
  }
  C logit(i64 row, i64 column) const {
    C one;
    return *of_logits.load(&one, logit_at(row, column), 0, 1);
  }
  // Whether columns ascend in [0, X).
  bool in_order(i64 b) const {
    const i64 first = begin(b), end = begin(b + 1);
    bool right = 0 <= first && first <= end && end <= a.x.n0;
    for (i64 j = first; j < end && right; ++j)
      right = column(j) >= (j > first ? column(j - 1) : 0) && column(j) < a.width();
    return right;
  }

 private:
  address logit_at(i64 row, i64 column) const {
    const i64 offset = row * a.logits.s0 + column * a.logits.s1;
    return a.logits.data + static_cast<address>(offset * of_logits.size);
  }
};

// What all samples share: the number of counts, the coefficient's logarithm, and whether x is valid.
struct CountTotals {
  double n = 0, coefficient = 0;
  bool valid = true;

  template <class C>
  void add(int size, const C* x, bool coefficients) {
    const Counted<C> found = count(size, x);
    n += found.sum;
    valid &= !(found.least < C(0));
    for (int i = 0; i < size && coefficients && found.other; ++i)
      if (x[i] != C(0) && x[i] != C(1)) coefficient -= log_factorial(x[i]);
  }
};
template <class C>
CountTotals totals_of(CountReader<C>& r, i64 b, bool coefficient) {
  CountTotals t;
  if (r.sparse()) {
    t.valid = r.in_order(b);
    for (i64 j = r.begin(b); t.valid && j < r.begin(b + 1); ++j) {
      const C x = r.value(b, j);
      t.add(1, &x, coefficient);
    }
  } else {
    for (i64 first = 0; first < r.a.width(); first += kTile) {
      const int n = tile_width(r.a.width(), first);
      r.look(b, first, n);
      t.add(n, r.counts(b, first, n), coefficient);
    }
  }
  if (coefficient) t.coefficient += log_factorial(t.n);
  return t;
}

template <class C>
bool count_rows(const CountRows& a, bool coefficient, C* out, C* normaliser, C* total, int threads) {
  const i64 width = a.width(), batch = a.batch(), together = a.together();
  bool outside = false;
  parallel(threads, a.units(), a.logits.size(), [&](i64 begin, i64 end) {
    CountReader<C> r(a);
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 b = unit % batch;
      const CountTotals t = totals_of(r, b, coefficient);
      if (unit < batch) total[b] = static_cast<C>(t.n);
      if (!t.valid) {
        __atomic_store_n(&outside, true, __ATOMIC_RELAXED);
        return;
      }
      for (i64 k = 0; k < together; ++k) {
        const i64 row = unit + k * batch;
        if (t.n == 0) {
          normaliser[row] = out[row] = C(0);
          continue;
        }
        LogSum<C> sum;
        for (i64 first = 0; first < width; first += kTile) {
          const int n = tile_width(width, first);
          r.look(b, first, n);
          sum.add(n, r.logits(row, first, n));
        }
        // Relative to the largest logit.
        const C shift = shift_of(sum.top);
        double product = 0;
        for (i64 j = r.sparse() ? r.begin(b) : 0; r.sparse() && j < r.begin(b + 1); ++j) {
          const C x = r.value(b, j);
          if (x != C(0)) product += static_cast<double>(x * (r.logit(row, r.column(j)) - shift));
        }
        for (i64 first = 0; !r.sparse() && first < width; first += kTile) {
          const int n = tile_width(width, first);
          r.look(b, first, n);
          const C* x = r.counts(b, first, n);
          product += sum_of_products(n, shift, x, r.logits(row, first, n));
        }
        normaliser[row] = static_cast<C>(sum.value());
        out[row] = static_cast<C>(product - t.n * __builtin_log(sum.sum) + t.coefficient);
      }
    }
  });
  return !outside;
}

template <class C>
void count_rows_backward(const CountRows& a, const Tensor& grad, const C* normaliser, const C* total,
                         address to, int threads) {
  const i64 width = a.width(), batch = a.batch(), together = a.together();
  const Storage<C>& kind = storage<C>(a.logits.dtype);
  parallel(threads, a.units(), a.logits.size(), [&](i64 begin, i64 end) {
    CountReader<C> r(a);
    alignas(kVectorBytes) C results[kBuffer];
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 b = unit % batch;
      for (i64 k = 0; k < together; ++k) {
        const i64 row = unit + k * batch;
        const C g = pointer<const C>(grad.data)[row * grad.s0], gn = g * total[b];
        i64 j = r.sparse() ? r.begin(b) : 0;
        for (i64 first = 0; first < width; first += kTile) {
          const int n = tile_width(width, first);
          const address place = to + static_cast<address>((row * width + first) * kind.size);
          C* out = kind.in_place ? pointer<C>(place) : results;
          if (total[b] == C(0)) {
            fill(out, C(0), n);
          } else {
            r.look(b, first, n);
            const C* s = r.logits(row, first, n);
            if (r.sparse()) {
              times_shares(n, -gn, normaliser[row], s, out);
              for (; j < r.begin(b + 1) && r.column(j) < first + n; ++j)
                out[r.column(j) - first] += g * r.value(b, j);
            } else {
              count_gradients(n, g, gn, normaliser[row], r.counts(b, first, n), s, out);
            }
            if (r.seen) where_seen(n, r.seen, C(0), out, out);
          }
          if (out == results) kind.store(place, results, n);
        }
      }
    }
  });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
