// A likelihood straight from the decoder's last linear layer, whose output is never stored: blocks of rows go
// through a product, the engine's loops and back through two products while they lie in a core's own cache.
// For the mathematics see fastvae/ops/head.py.
#pragma once

#include "common.hpp"
#include "elementary.hpp"
#include "gemm.hpp"
#include "likelihood.hpp"
#include "storage.hpp"
#include "reduce.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// x (B, X), h (K B, H), sample-major. The first `linear` outputs are products: weight (X, H) and bias (X) of
// compute type, the bias null for none; the others are fixed: a row (X) or a number.
struct Head {
  int likelihood, linear, outputs;
  Tensor x, h, weight[kMostParameters], bias[kMostParameters], constant[kMostParameters];
  int threads;

  i64 rows() const { return x.n0; }
  i64 columns() const { return x.n1; }
  i64 inner() const { return h.n1; }
  i64 samples() const { return h.n0 / x.n0; }
};

// Destinations of the gradients, contiguous, of compute type; null where not needed.
struct HeadGradients {
  address h, weight[kMostParameters], bias[kMostParameters], constant[kMostParameters];
  bool any() const {
    bool found = h != 0;
    for (int j = 0; j < kMostParameters; ++j) found |= weight[j] || bias[j] || constant[j];
    return found;
  }
};

// Samples k to k + samples of the rows b to b + rows.
struct Block {
  i64 k, samples, b, rows;
  i64 size() const { return samples * rows; }
};

// Bytes of a block's outputs: with their gradients they stay in a second-level cache (measured: anything from
// 256 to 1024 KiB does). A product of fewer rows is slower, and weights that do not fit there are read again
// for each block. Small calls are divided, too.
constexpr i64 kBlockBytes = 3 << 17, kFewestBlockRows = 64, kMostBlockRows = 512, kFewestBlocks = 16,
              kCachedWeights = 1 << 20;
// The outputs of all samples of a row are kept by all threads up to this number of bytes, from one pass to
// the other; beyond it, they are recomputed.
constexpr i64 kKeptBytes = i64{1} << 27;
// Partial gradients of the weights, each of at least this number of rows, and of at most this number of bytes
// in all: a function of the shape, so that the bits are the same for any number of threads, up to that of the
// partials; each further thread has a separate one.
constexpr i64 kRowsPerPartial = 512, kMostPartials = 64, kPartialBytes = i64{1} << 22;

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
inline i64 between(i64 low, i64 value, i64 high) { return value < low ? low : value > high ? high : value; }

template <class C>
i64 rows_per_block(const Head& a) {
  const i64 row = a.columns() * a.linear * static_cast<i64>(sizeof(C));
  const i64 fewest = row * a.inner() <= kCachedWeights
                         ? kFewestBlockRows
                         : between(kFewestBlockRows, a.inner() / 2, kMostBlockRows / 2);
  const i64 fit = kBlockBytes / row, share = ceil_div(a.h.n0, kFewestBlocks);
  return between(fewest, fit < share ? fit : share, kMostBlockRows);
}

// All samples and rows in blocks of about `most` rows, or of `samples` samples if given: samples of a row,
// which share values prepared from x, stay together.
struct Blocks {
  i64 all_samples, all_rows, samples, rows, across;
  Blocks(const Head& a, i64 most, bool whole) : all_samples(a.samples()), all_rows(a.rows()) {
    samples = whole ? all_samples : ceil_div(all_samples, ceil_div(all_samples, most));
    rows = ceil_div(all_rows, ceil_div(all_rows, most < samples ? 1 : most / samples));
    across = ceil_div(all_samples, samples);
  }
  i64 count() const { return across * ceil_div(all_rows, rows); }
  Block operator[](i64 i) const {
    const i64 k = i % across * samples, b = i / across * rows;
    return {k, all_samples - k < samples ? all_samples - k : samples, b,
            all_rows - b < rows ? all_rows - b : rows};
  }
};

// The layers of the outputs, ready for products.
template <class C>
struct Layers {
  Layer<C> layer[kMostParameters];
  Scratch<C> packed;

  explicit Layers(const Head& a)
      : layer{of(a, 0), of(a, 1), of(a, 2)}, packed(a.linear * layer[0].packed_size()) {
    for (int j = 0; j < a.linear; ++j) layer[j].pack(packed.data + j * layer[j].packed_size(), a.threads);
  }
  static Layer<C> of(const Head& a, int j) {
    return {pointer<const C>(a.weight[j].data), pointer<const C>(a.bias[j].data), a.weight[j].s0, a.columns(),
            a.inner()};
  }
};

// A thread's buffers for blocks of up to `most` rows, and the steps of a block.
template <class C>
struct HeadWorker {
  const Head& a;
  const Layer<C>* const layers;
  const i64 columns, inner;
  Scratch<C> h, out, grad, back;

  HeadWorker(const Head& head, const Layer<C>* its, i64 kept, i64 most, bool backward)
      : a(head), layers(its), columns(head.columns()), inner(head.inner()), h(kept * inner),
        out(kept * columns * head.linear), grad(backward ? most * columns * head.outputs : 1),
        back(backward ? most * inner : 1) {}

  void gather(const Block& block, C* to) const {
    const Storage<C>& s = storage<C>(a.h.dtype);
    const int n = static_cast<int>(inner);
    for (i64 k = 0; k < block.samples; ++k) {
      for (i64 b = 0; b < block.rows; ++b, to += inner) {
        const i64 row = (block.k + k) * a.rows() + block.b + b;
        const C* read = s.load(to, a.h.data + static_cast<address>(row * a.h.s0 * s.size), a.h.s1, n);
        if (read != to) copy(to, read, n);
      }
    }
  }
  // The outputs of a block, one after the other, each (samples, rows, X).
  void multiply(i64 n, const C* from, C* to) const {
    for (int j = 0; j < a.linear; ++j) layers[j].outputs(n, from, to + j * n * columns);
  }
  // The block as the engine takes it.
  Rows rows(const Block& block, const C* from) const {
    Rows r{};
    r.likelihood = a.likelihood;
    r.samples = block.samples;
    r.rows = block.rows;
    r.columns = columns;
    r.threads = 1;
    r.x = a.x;
    r.x.n0 = block.rows;
    r.x.data += static_cast<address>(block.b * a.x.s0 * storage<C>(a.x.dtype).size);
    for (int j = 0; j < a.outputs; ++j) {
      if (j < a.linear) {
        Tensor& p = r.p[j];
        p.data = reinterpret_cast<address>(from + j * block.size() * columns);
        p.dtype = std::is_same<C, double>::value ? kFloat64 : kFloat32;
        p.s0 = block.rows * columns;
        p.s1 = columns;
        p.s2 = 1;
        r.kind[j] = kFull;
      } else {
        const bool number = a.constant[j].size() == 1;
        r.p[j] = a.constant[j];
        r.kind[j] = number ? kNumber : kColumn;
        r.p[j].s0 = r.p[j].s1 = 0;
        r.p[j].s2 = number ? 0 : a.constant[j].s0;
      }
    }
    return r;
  }
};

template <class C>
FASTVAE_LOOP void add_elements(i64 n, const C* __restrict p, C* __restrict sums) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) sums[i] += p[i];
}

// out (K, B) = log p(x_b | the outputs of (k, b)). Returns whether x lies where it must.
template <class C>
bool head_rows(const Head& a, C* out) {
  const Blocks blocks(a, rows_per_block<C>(a), false);
  const Layers<C> layers(a);
  bool outside = false;
  parallel(a.threads, blocks.count(), a.h.n0 * a.columns(), [&](i64 begin, i64 end) {
    const i64 most = blocks.samples * blocks.rows;
    const HeadWorker<C> work(a, layers.layer, most, most, false);
    const Scratch<C> sums(most);
    for (i64 unit = begin; unit < end; ++unit) {
      const Block block = blocks[unit];
      work.gather(block, work.h.data);
      work.multiply(block.size(), work.h.data, work.out.data);
      if (!reduce_rows(work.rows(block, work.out.data), sums.data))
        __atomic_store_n(&outside, true, __ATOMIC_RELAXED);
      for (i64 k = 0; k < block.samples; ++k)
        copy(out + (block.k + k) * a.rows() + block.b, sums.data + k * block.rows,
             static_cast<int>(block.rows));
    }
  });
  return !outside;
}

// Sums over the rows of a group of blocks.
template <class C>
struct HeadSums {
  const Head& a;
  C *weight[kMostParameters] = {}, *constant[kMostParameters] = {};
  double* bias[kMostParameters] = {};
  bool first = true;
  explicit HeadSums(const Head& head) : a(head) {}
};

// The gradients of a block whose outputs and rows of h are loaded; g (samples, rows) is the upstream
// gradient.
template <class C>
void head_block_backward(HeadWorker<C>& work, const Block& block, const C* h, const C* out, const C* g,
                         i64 g_stride, const HeadGradients& to, HeadSums<C>& sums) {
  const Head& a = work.a;
  const i64 n = block.size(), columns = work.columns, inner = work.inner;
  RowGradients gradients{};
  gradients.grad = {reinterpret_cast<address>(g), std::is_same<C, double>::value, g_stride, 1};
  C* const grad = work.grad.data;
  for (int j = 0; j < a.outputs; ++j) {
    if (j < a.linear ? to.h || to.weight[j] || to.bias[j] : to.constant[j] != 0)
      gradients.p[j] = reinterpret_cast<address>(grad + j * n * columns);
  }
  reduce_rows_backward<C>(work.rows(block, out), gradients);
  for (int j = 0; j < a.outputs; ++j) {
    const C* its = grad + j * n * columns;
    if (j >= a.linear) {
      if (to.constant[j]) add_elements(a.constant[j].size(), its, sums.constant[j]);
      continue;
    }
    if (to.weight[j]) work.layers[j].to_weight(n, h, its, !sums.first, sums.weight[j]);
    for (i64 i = 0; i < n && to.bias[j]; ++i)
      add_to(static_cast<int>(columns), its + i * columns, sums.bias[j]);
    if (to.h) work.layers[j].to_inputs(n, its, j > 0, work.back.data);
  }
  sums.first = false;
  if (!to.h) return;
  const C* from = work.back.data;
  for (i64 k = 0; k < block.samples; ++k) {
    C* row = pointer<C>(to.h) + ((block.k + k) * a.rows() + block.b) * inner;
    copy(row, from + k * block.rows * inner, static_cast<int>(block.rows * inner));
  }
}

// Calls body(unit, sums) for all units in groups, and adds the groups' sums in their order.
template <class C, class F>
void head_groups(const Head& a, const HeadGradients& to, i64 units, F body) {
  i64 elements = 0;
  for (int j = 0; j < a.linear; ++j) elements += to.weight[j] ? a.columns() * a.inner() : 0;
  const i64 fit = elements > 0 ? kPartialBytes / (elements * static_cast<i64>(sizeof(C))) : kMostPartials;
  i64 groups = a.h.n0 / kRowsPerPartial;
  groups = groups < fit ? groups : fit;
  groups = groups < kMostPartials ? groups : kMostPartials;
  groups = groups < a.threads ? a.threads : groups;
  groups = groups < units ? groups : units;
  // The first group's sums of weights are the result itself.
  const i64 columns = a.columns(), size = columns * a.inner();
  const Scratch<C> partial((groups - 1) * elements);
  std::vector<C> constant(static_cast<std::size_t>(groups * columns * a.outputs));
  std::vector<double> bias(static_cast<std::size_t>(groups * columns * a.outputs));
  const auto sums_of = [&](i64 group) {
    HeadSums<C> sums(a);
    C* at = partial.data + (group - 1) * elements;
    for (int j = 0; j < a.outputs; ++j) {
      const auto small = static_cast<std::size_t>((group * a.outputs + j) * columns);
      sums.constant[j] = &constant[small];
      sums.bias[j] = &bias[small];
      if (j >= a.linear || !to.weight[j]) continue;
      sums.weight[j] = group == 0 ? pointer<C>(to.weight[j]) : at;
      at += size;
    }
    return sums;
  };
  parallel(a.threads, groups, a.h.n0 * columns, [&](i64 begin, i64 end) {
    for (i64 group = begin; group < end; ++group) {
      HeadSums<C> sums = sums_of(group);
      body(units * group / groups, units * (group + 1) / groups, sums);
    }
  });
  const HeadSums<C> all = sums_of(0);
  for (int j = 0; j < a.outputs; ++j) {
    for (i64 group = 1; group < groups; ++group) {
      const HeadSums<C> sums = sums_of(group);
      add_elements(columns, sums.constant[j], all.constant[j]);
      add_doubles(columns, sums.bias[j], all.bias[j]);
    }
    if (to.constant[j])
      copy(pointer<C>(to.constant[j]), all.constant[j], static_cast<int>(a.constant[j].size()));
    C* to_bias = pointer<C>(to.bias[j]);
    for (i64 i = 0; i < columns && to_bias; ++i) to_bias[i] = static_cast<C>(all.bias[j][i]);
    if (j >= a.linear || !to.weight[j]) continue;
    constexpr i64 kPart = 4096;
    parallel(a.threads, ceil_div(size, kPart), groups * size, [&](i64 begin, i64 end) {
      const i64 stop = end * kPart < size ? end * kPart : size;
      for (i64 group = 1; group < groups; ++group)
        add_elements(stop - begin * kPart, sums_of(group).weight[j] + begin * kPart,
                     all.weight[j] + begin * kPart);
    });
  }
}

// With the upstream gradient of each sample's log-likelihood known, grad (K, B) of compute type with strides:
// the outputs are recomputed.
template <class C>
void head_rows_backward(const Head& a, const Tensor& grad, const HeadGradients& to) {
  const Blocks blocks(a, rows_per_block<C>(a), false);
  const i64 most = blocks.samples * blocks.rows;
  const Layers<C> layers(a);
  head_groups<C>(a, to, blocks.count(), [&](i64 begin, i64 end, HeadSums<C>& sums) {
    HeadWorker<C> work(a, layers.layer, most, most, true);
    const Scratch<C> g(most);
    for (i64 unit = begin; unit < end; ++unit) {
      const Block block = blocks[unit];
      for (i64 k = 0; k < block.samples; ++k) {
        const C* row = pointer<const C>(grad.data) + (block.k + k) * grad.s0 + block.b * grad.s1;
        for (i64 b = 0; b < block.rows; ++b) g.data[k * block.rows + b] = row[b * grad.s1];
      }
      work.gather(block, work.h.data);
      work.multiply(block.size(), work.h.data, work.out.data);
      head_block_backward(work, block, work.h.data, work.out.data, g.data, block.rows, to, sums);
    }
  });
}

// The part of a reduction that belongs to these rows, with one thread.
template <class C>
BoundReduction reduction_of(const BoundReduction& all, const Block& block) {
  BoundReduction w = all;
  w.rows.samples = block.samples;
  w.rows.rows = block.rows;
  w.rows.threads = 1;
  if (w.term.data) w.term.data += static_cast<address>(block.b * w.term.s1 * static_cast<i64>(sizeof(C)));
  if (w.beta.data) w.beta.data += static_cast<address>(block.b * w.beta.s0 * storage<C>(w.beta.dtype).size);
  return w;
}

// The bound, and in the same pass the gradients for 1 arriving at its sum or mean: all samples of a row are
// there together, so that their weights are known while their outputs still lie in the cache.
template <class C>
bool head_reduce_once(const Head& a, const BoundReduction& w, C* bound, const ReductionResults& to,
                      const HeadGradients& gradients) {
  const i64 step = rows_per_block<C>(a), samples = a.samples(), all_rows = a.rows();
  const Blocks spans(a, step, true);
  const i64 width = a.columns() * a.linear, whole = spans.samples * spans.rows,
            most = whole < step ? whole : step;
  const bool keep = whole * width * static_cast<i64>(sizeof(C)) * a.threads <= kKeptBytes;
  const Layers<C> layers(a);
  bool outside = false;
  head_groups<C>(a, gradients, spans.count(), [&](i64 begin, i64 end, HeadSums<C>& sums) {
    HeadWorker<C> work(a, layers.layer, keep ? whole : most, most, true);
    const Scratch<C> log_p(2 * whole);
    C* const weights = log_p.data + whole;
    for (i64 unit = begin; unit < end; ++unit) {
      const Block span = spans[unit];
      const i64 at_once = span.rows > 1 ? span.samples : most;
      const auto part = [&](i64 k) {
        return Block{k, span.samples - k < at_once ? span.samples - k : at_once, span.b, span.rows};
      };
      const auto place = [&](i64 k) { return keep ? k * span.rows : 0; };
      const auto make = [&](const Block& block) {
        work.gather(block, work.h.data + place(block.k) * work.inner);
        work.multiply(block.size(), work.h.data + place(block.k) * work.inner,
                      work.out.data + place(block.k) * width);
      };
      for (i64 k = 0; k < span.samples; k += at_once) {
        const Block block = part(k);
        make(block);
        if (!reduce_rows(work.rows(block, work.out.data + place(k) * width), log_p.data + k * span.rows)) {
          __atomic_store_n(&outside, true, __ATOMIC_RELAXED);
        }
      }
      const BoundReduction own = reduction_of<C>(w, span);
      bounds_of_rows(own, log_p.data, bound + span.b,
                     to.log_likelihood ? pointer<C>(to.log_likelihood) + span.b : nullptr, weights);
      const C scale = static_cast<C>(w.scale), even = static_cast<C>(w.scale / static_cast<double>(samples));
      for (i64 k = 0; k < span.samples; ++k) {
        for (i64 b = 0; b < span.rows; ++b) {
          const i64 i = k * span.rows + b;
          if (w.log_mean_exp) pointer<C>(to.weights)[k * all_rows + span.b + b] = weights[i];
          // A denormal would slow the products many times over.
          const C product = scale * weights[i];
          log_p.data[i] = !w.log_mean_exp ? even : abs_(product) < smallest_normal(C{}) ? C(0) : product;
        }
      }
      for (i64 k = 0; k < span.samples; k += at_once) {
        const Block block = part(k);
        if (!keep) make(block);
        head_block_backward(work, block, work.h.data + place(k) * work.inner,
                            work.out.data + place(k) * width, log_p.data + k * span.rows, span.rows,
                            gradients, sums);
      }
    }
  });
  return !outside;
}

template <class C>
bool head_reduce(const Head& a, const BoundReduction& w, const ReductionResults& to,
                 const HeadGradients& gradients) {
  const i64 rows = a.rows();
  const Scratch<C> bound(rows);
  C* const bounds = w.scale == 0 ? pointer<C>(to.bound) : bound.data;
  bool inside;
  if (gradients.any()) {
    inside = head_reduce_once(a, w, bounds, to, gradients);
  } else {
    const Scratch<C> log_w(a.h.n0);
    inside = head_rows(a, log_w.data);
    bounds_of_rows(w, log_w.data, bounds, pointer<C>(to.log_likelihood), pointer<C>(to.weights));
  }
  if (w.scale == 0) return inside;
  double sum = 0;
  for (i64 b = 0; b < rows; ++b) sum += bounds[b];
  *pointer<C>(to.bound) = static_cast<C>(w.scale * sum);
  return inside;
}

// @param t weights and biases of the outputs that are products, then the fixed ones: each a tensor or null.
inline Head head_of(int likelihood, const Tensor& x, const Tensor& h, const HeadTensors& t, int threads) {
  Head a{likelihood, 0, 0, x, h, {}, {}, {}, threads};
  for (int j = 0; j < kMostParameters; ++j) {
    a.weight[j] = t.weight[j];
    a.bias[j] = t.bias[j];
    a.constant[j] = t.constant[j];
    a.linear += t.weight[j].data != 0;
    a.outputs += t.weight[j].data != 0 || t.constant[j].data != 0;
  }
  return a;
}
inline HeadGradients head_gradients_of(const Output& h, const HeadOutputs& t) {
  HeadGradients to{h, {}, {}, {}};
  for (int j = 0; j < kMostParameters; ++j) {
    to.weight[j] = t.weight[j];
    to.bias[j] = t.bias[j];
    to.constant[j] = t.constant[j];
  }
  return to;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
