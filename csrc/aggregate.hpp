// An aggregate posterior and its marginals: ops/aggregate.py. The scores of a unit of rows for a block of
// components are computed as for a mixture (mixture.hpp), of all dimensions together and of one at a time,
// and reduced before the next: nothing of size N U is stored.
#pragma once

#include "common.hpp"
#include "elementary.hpp"
#include "mixture.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// Exponentials that are added one after the other before double takes over.
constexpr i64 kTermsAdded = 16;

// Log weights of the components: for a row, that of its own example, that of the next one, and that of the
// others, which is left to the end.
template <class C>
struct Strata {
  i64 count;  // of components; 0: all weights are equal
  C own, next;
  double others;

  Strata(i64 components, i64 dataset_size)
      : count(dataset_size ? components : 0), own(0), next(0),
        others(-__builtin_log(static_cast<double>(dataset_size ? components - 1 : components))) {
    if (!dataset_size) return;
    const double all = static_cast<double>(dataset_size), rest = static_cast<double>(components - 1);
    own = static_cast<C>(__builtin_log(rest / all));
    next = static_cast<C>(__builtin_log((all - rest) / all));
  }
  // Adds the weights, less that of the others, to the scores of `rows` rows and of `components` components.
  void weigh(i64 row, i64 rows, i64 component, i64 components, i64 row_stride, i64 stride, C* s) const {
    if (!count) return;
    for (i64 i = 0; i < rows; ++i) {
      const i64 of_own = (row + i) % count - component, of_next = (row + i + 1) % count - component;
      if (of_own >= 0 && of_own < components) s[i * row_stride + of_own * stride] += own;
      if (of_next >= 0 && of_next < components) s[i * row_stride + of_next * stride] += next;
    }
  }
};

// z (N, D), mu (U, D), logvar (U, D), all of compute type; and the size of the data set, 0 for equal weights.
struct Aggregate {
  Tensor z, mu, logvar;
  i64 dataset_size;
  i64 rows() const { return z.n0; }
  i64 dims() const { return z.n1; }
};

// Scores of one dimension for a block of components, with rows as lanes: s (components, kUnitRows). Raises
// the rows' maxima.
template <class C>
FASTVAE_LOOP void score_rows(i64 components, i64 width, const C* means, const C* z, C* s, C* most) {
  constexpr int lanes = kLanes<C>, vectors = kUnitRows / lanes;
  for (int v = 0; v < vectors; ++v) {
    const Vector<C> x = *reinterpret_cast<const Vector<C>*>(z + v * lanes);
    Vector<C> above = *reinterpret_cast<const Vector<C>*>(most + v * lanes);
    for (i64 u = 0; u < components; ++u) {
      const Vector<C> w = (x - means[u]) * means[width + u], t = means[2 * width + u] - C(0.5) * (w * w);
      *reinterpret_cast<Vector<C>*>(s + u * kUnitRows + v * lanes) = t;
      above = t > above ? t : above;
    }
    *reinterpret_cast<Vector<C>*>(most + v * lanes) = above;
  }
}
// sum += exp(s - shift) over components.
template <class C>
FASTVAE_LOOP void add_exponentials_of_rows(i64 components, const C* __restrict s, const C* __restrict shift,
                                           C* __restrict sum) {
  for (i64 u = 0; u < components; ++u) {
#pragma omp simd
    for (i64 i = 0; i < kUnitRows; ++i) sum[i] += exp_up_to_1(s[u * kUnitRows + i] - shift[i]);
  }
}

// Maxima and scaled sums of a unit of rows.
template <class C>
struct UnitSums {
  alignas(kVectorBytes) C most[kUnitRows];
  alignas(kVectorBytes) double sum[kUnitRows];
  void clear() {
    for (i64 i = 0; i < kUnitRows; ++i) {
      most[i] = -infinity(C(0));
      sum[i] = 0;
    }
  }
  // Of a block's scores s (rows, width).
  void add(i64 rows, i64 width, const C* s) {
    for (i64 i = 0; i < rows; ++i) {
      LogSum<C> all{most[i], sum[i]};
      all.add(static_cast<int>(width), s + i * width);
      most[i] = all.top, sum[i] = all.sum;
    }
  }
  // Of a block's scores s (components, kUnitRows), whose maxima are known.
  void add_components(i64 components, const C* s, const C* above) {
    alignas(kVectorBytes) C shift[kUnitRows], part[kUnitRows];
    for (i64 i = 0; i < kUnitRows; ++i) {
      shift[i] = shift_of(above[i]);
      if (most[i] < above[i] && sum[i] != 0) sum[i] *= static_cast<double>(exp_(most[i] - shift[i]));
      most[i] = above[i];
    }
    for (i64 u = 0; u < components; u += kTermsAdded) {
      fill(part, C(0), kUnitRows);
      add_exponentials_of_rows(components - u < kTermsAdded ? components - u : kTermsAdded, s + u * kUnitRows,
                               shift, part);
      add_to(kUnitRows, part, sum);
    }
  }
};

// out = most + log(sum) + constant.
template <class C>
FASTVAE_LOOP void log_sums(const UnitSums<C>& u, C constant, C* out) {
#pragma omp simd
  for (i64 i = 0; i < kUnitRows; ++i) {
    const C sum = static_cast<C>(u.sum[i]), log = u.most[i] + (log_(sum) + constant);
    // Without mass: log_ takes positive numbers.
    out[i] = sum == C(0) ? -infinity(C(0)) : log;
  }
}

template <class C>
void aggregate_rows(const Aggregate& a, C* out, C* each, int threads) {
  const i64 rows = a.rows(), dims = a.dims();
  const Strata<C> strata(a.mu.n0, a.dataset_size);
  const Components<C> c(a.mu.n0, dims, true);
  c.pack(a.mu, a.logvar, {}, threads);
  parallel(threads, (rows + kUnitRows - 1) / kUnitRows, rows * c.count * dims, [&](i64 begin, i64 end) {
    const Scratch<C> z(dims * kUnitRows), s(kUnitRows * c.width);
    const Scratch<UnitSums<C>> sums(dims + 1);  // of each dimension, then of all together
    alignas(kVectorBytes) C logs[kUnitRows], above[kUnitRows];
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 first = unit * kUnitRows, n = rows - first < kUnitRows ? rows - first : kUnitRows;
      for (i64 d = 0; d <= dims; ++d) sums.data[d].clear();
      transpose_rows(a.z, first, z.data);
      for (i64 block = 0; block < c.blocks; ++block) {
        const i64 from = c.first(block), m = c.in_block(block);
        for (i64 d = 0; d < dims; ++d) {
          // The maxima of unweighted scores: weights are between 1 and 2^-63 of the others'.
          for (i64 i = 0; i < kUnitRows; ++i) above[i] = sums.data[d].most[i];
          score_rows(m, c.width, c.means(block) + d * c.pitch, z.data + d * kUnitRows, s.data, above);
          strata.weigh(first, n, from, m, 1, kUnitRows, s.data);
          sums.data[d].add_components(m, s.data, above);
        }
        score(dims, c.pitch, c.width, c.means(block), c.constants(block), z.data, s.data);
        strata.weigh(first, n, from, m, c.width, 1, s.data);
        sums.data[dims].add(n, c.width, s.data);
      }
      for (i64 d = 0; d <= dims; ++d) {
        log_sums(sums.data[d], static_cast<C>(strata.others), logs);
        C* to = d < dims ? each + first * dims + d : out + first;
        for (i64 i = 0; i < n; ++i) to[i * (d < dims ? dims : 1)] = logs[i];
      }
    }
  });
}

// Upstream gradients of a unit's sums, and what is subtracted from its scores; zeros behind the last row.
template <class C>
struct UnitSlopes {
  alignas(kVectorBytes) C scale[kUnitRows], shift[kUnitRows];
  // Of column d of the gradient (N, D) and of the op's result.
  void read(const Tensor& grad, const Tensor& logs, i64 first, i64 rows, i64 d, C others) {
    for (i64 i = 0; i < kUnitRows; ++i) {
      const i64 row = first + i;
      scale[i] = shift[i] = 0;
      if (row >= rows || !grad.data) continue;
      const C log = pointer<const C>(logs.data)[row * logs.s0 + d * logs.s1];
      if (is_infinite(log)) continue;
      scale[i] = pointer<const C>(grad.data)[row * grad.s0 + d * grad.s1];
      shift[i] = log - others;
    }
  }
};

// r = base + scale exp(s - shift), in place of s (kUnitRows, width); without kBase base is null.
template <class C, bool kBase>
FASTVAE_LOOP void shares_of(const UnitSlopes<C>& u, i64 width, const C* __restrict base, C* __restrict s) {
  const C tiny = smallest_normal(C(0));
  for (i64 row = 0; row < kUnitRows; ++row) {
    const C scale = u.scale[row], shift = u.shift[row];
    const i64 from = row * width, to = from + width;
    if (scale == C(0)) {
      for (i64 i = from; i < to; ++i) s[i] = kBase ? base[i] : C(0);
      continue;
    }
#pragma omp simd
    for (i64 i = from; i < to; ++i) {
      const C r = scale * exp_(s[i] - shift);
      const C kept = abs_(r) < tiny ? C(0) : r;
      s[i] = kBase ? base[i] + kept : kept;
    }
  }
}

// Upstream gradients of log q (N) and of the marginals (N, D), null where there is none; and those results.
struct AggregateGradients {
  Tensor grad, grad_each, log_q, log_q_each;
};

template <class C, bool kInputs, bool kParameters>
void aggregate_slopes(const Aggregate& a, const Components<C>& c, const AggregateGradients& up, C* to_z,
                      C* to_mu, C* to_logvar, int threads) {
  const i64 rows = a.rows(), dims = a.dims(), sums = 2 * dims * c.width;
  const Strata<C> strata(a.mu.n0, a.dataset_size);
  const RowParts cut(rows, static_cast<i64>(sizeof(double)) * c.blocks * sums);
  const i64 parts = kParameters ? cut.parts : cut.chunks, units = cut.added / kUnitRows;
  const Scratch<double> partial(kParameters ? parts * c.blocks * sums : 0);
  parallel(threads, parts, rows * c.count * dims, [&](i64 begin, i64 end) {
    const Scratch<C> z(units * dims * kUnitRows), all(kUnitRows * c.width), s(kUnitRows * c.width),
        added(sums);
    const Scratch<double> by_z(units * dims * kUnitRows);
    const Scratch<UnitSlopes<C>> slopes_of(units * (dims + 1));
    const auto unit_of_block = [&](i64 unit, i64 first, i64 block) {
      const i64 n = rows - first < kUnitRows ? rows - first : kUnitRows;
      const C* at = z.data + unit * dims * kUnitRows;
      const UnitSlopes<C>* u = slopes_of.data + unit * (dims + 1);
      const auto weigh = [&](C* scores) {
        strata.weigh(first, n, c.first(block), c.in_block(block), c.width, 1, scores);
      };
      if (up.grad.data) {
        score(dims, c.pitch, c.width, c.means(block), c.constants(block), at, all.data);
        weigh(all.data);
        shares_of<C, false>(u[dims], c.width, nullptr, all.data);
      }
      for (i64 d = 0; d < dims; ++d) {
        const C* r = all.data;
        if (up.grad_each.data) {
          const C* means = c.means(block) + d * c.pitch;
          score(1, c.pitch, c.width, means, means + 2 * c.width, at + d * kUnitRows, s.data);
          weigh(s.data);
          if (up.grad.data) {
            shares_of<C, true>(u[d], c.width, all.data, s.data);
          } else {
            shares_of<C, false>(u[d], c.width, nullptr, s.data);
          }
          r = s.data;
        }
        slopes<C, kInputs, kParameters, true>(1, c.pitch, c.width, c.means(block) + d * c.pitch, r,
                                              at + d * kUnitRows, by_z.data + (unit * dims + d) * kUnitRows,
                                              added.data + 2 * d * c.width);
      }
    };
    for (i64 part = begin; part < end; ++part) {
      const i64 from = cut.chunks * part / parts;
      for (i64 chunk = from; chunk < cut.chunks * (part + 1) / parts; ++chunk) {
        const i64 first = chunk * cut.added, n = rows - first < cut.added ? rows - first : cut.added;
        const i64 used = (n + kUnitRows - 1) / kUnitRows;
        for (i64 unit = 0; unit < used; ++unit) {
          const i64 row = first + unit * kUnitRows;
          transpose_rows(a.z, row, z.data + unit * dims * kUnitRows);
          UnitSlopes<C>* u = slopes_of.data + unit * (dims + 1);
          const C others = static_cast<C>(strata.others);
          for (i64 d = 0; d < dims; ++d) u[d].read(up.grad_each, up.log_q_each, row, rows, d, others);
          u[dims].read(up.grad, up.log_q, row, rows, 0, others);
        }
        for (i64 i = 0; i < units * dims * kUnitRows; ++i) by_z.data[i] = 0;
        for (i64 block = 0; block < c.blocks; ++block) {
          for (i64 i = 0; i < sums; ++i) added.data[i] = 0;
          for (i64 unit = 0; unit < used; ++unit) unit_of_block(unit, first + unit * kUnitRows, block);
          if (!kParameters) continue;
          double* sum = partial.data + (part * c.blocks + block) * sums;
          for (i64 i = 0; i < sums; ++i)
            sum[i] = (chunk == from ? 0.0 : sum[i]) + static_cast<double>(added.data[i]);
        }
        if (!kInputs) continue;
        for (i64 i = 0; i < n; ++i) {
          const double* row = by_z.data + i / kUnitRows * dims * kUnitRows + i % kUnitRows;
          for (i64 d = 0; d < dims; ++d) to_z[(first + i) * dims + d] = static_cast<C>(row[d * kUnitRows]);
        }
      }
    }
  });
  if (!kParameters) return;
  parallel(threads, c.blocks * dims, parts * c.blocks * sums, [&](i64 begin, i64 end) {
    const Scratch<double> both(2 * c.width);
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 block = unit / dims, d = unit % dims, n = c.in_block(block), first = c.first(block);
      fill(both.data, 0.0, static_cast<int>(2 * c.width));
      for (i64 part = 0; part < parts; ++part)
        add_doubles(2 * c.width, partial.data + (part * c.blocks + block) * sums + 2 * d * c.width,
                    both.data);
      const C* inverse = c.means(block) + d * c.pitch + c.width;
      for (i64 i = 0; i < n && to_mu; ++i)
        to_mu[(first + i) * dims + d] = static_cast<C>(both.data[i] * inverse[i]);
      for (i64 i = 0; i < n && to_logvar; ++i)
        to_logvar[(first + i) * dims + d] = static_cast<C>(0.5 * both.data[c.width + i]);
    }
  });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
