// A likelihood straight from the decoder's last linear layers, and from hidden layers before them, whose
// outputs are never stored: blocks of rows go through the products, the engine's loops and back through the
// products while they lie in a core's own cache.
// For the mathematics see fastvae/ops/head.py.
#pragma once

#include <limits>

#include "activations.hpp"
#include "common.hpp"
#include "elementary.hpp"
#include "gemm.hpp"
#include "likelihood.hpp"
#include "storage.hpp"
#include "reduce.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// x (B, X), h (K B, H), sample-major. The first `linear` outputs are products: weight (X, H) and bias (X) of
// compute type, the bias null for none; the others are fixed: a row (X) or a number. With `hidden` layers,
// whose weights (W, V) and biases (W) come after those of the outputs, h is the first one's input.
struct Head {
  int likelihood, linear, outputs, hidden;
  Tensor x, h, weight[kMostLayers], bias[kMostLayers], constant[kMostParameters];
  Activation activation[kMostHidden];
  int threads;

  i64 rows() const { return x.n0; }
  i64 columns() const { return x.n1; }
  i64 samples() const { return h.n0 / x.n0; }
  // Of h, and of each hidden layer's output.
  i64 width(int stage) const { return stage ? weight[kMostParameters + stage - 1].n0 : h.n1; }
  i64 inner() const { return width(hidden); }
  i64 widest() const {
    i64 most = columns() * linear;
    for (int i = 0; i <= hidden; ++i) most = width(i) > most ? width(i) : most;
    return most;
  }
  // Whether layer j, in the order of the weights, is there; its outputs and inputs.
  bool has(int j) const { return j < kMostParameters ? j < linear : j < kMostParameters + hidden; }
  i64 to(int j) const { return j < kMostParameters ? columns() : width(j - kMostParameters + 1); }
  i64 from(int j) const { return j < kMostParameters ? inner() : width(j - kMostParameters); }
};

// Destinations of the gradients, contiguous, of compute type; null where not needed.
struct HeadGradients {
  address h, weight[kMostLayers], bias[kMostLayers], constant[kMostParameters];
  // Of h or of a hidden layer.
  bool below() const {
    bool found = h != 0;
    for (int j = kMostParameters; j < kMostLayers; ++j) found |= weight[j] || bias[j];
    return found;
  }
  bool any() const {
    bool found = below();
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
constexpr i64 kRowsPerPartial = 512, kMostPartials = 64, kPartialBytes = i64{1} << 23;

inline i64 ceil_div(i64 a, i64 b) { return (a + b - 1) / b; }
// At most n, without factors that threads would share unevenly: 1, 2, 4, 6, 8, 12, 16, ...
inline i64 evenly(i64 n) {
  i64 power = 1;
  while (2 * power <= n) power *= 2;
  return power >= 4 && 3 * power / 2 <= n ? 3 * power / 2 : power;
}
inline i64 between(i64 low, i64 value, i64 high) { return value < low ? low : value > high ? high : value; }

template <class C>
i64 rows_per_block(const Head& a) {
  const i64 row = a.widest() * static_cast<i64>(sizeof(C));
  const i64 weights = a.columns() * a.linear * a.inner() * static_cast<i64>(sizeof(C));
  const i64 fewest = weights <= kCachedWeights ? kFewestBlockRows
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
    // Whole tiles; the last block has what is left.
    if (!whole && samples > kTallest) samples = ceil_div(samples, kTallest) * kTallest;
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

// The layers, ready for products.
template <class C>
struct Layers {
  Layer<C> layer[kMostLayers];
  Scratch<C> packed;

  Layers(const Head& a, bool backward) : packed(read(a, backward, layer)) {
    C* to = packed.data;
    for (int j = 0; j < kMostLayers; ++j) {
      if (!a.has(j)) continue;
      layer[j].pack(backward, to, a.threads);
      to += layer[j].packed_size(backward);
    }
  }

 private:
  // Returns the number of elements that packing needs.
  static i64 read(const Head& a, bool backward, Layer<C>* layers) {
    i64 size = 0;
    for (int j = 0; j < kMostLayers; ++j) {
      if (!a.has(j)) continue;
      layers[j] = {pointer<const C>(a.weight[j].data), pointer<const C>(a.bias[j].data), a.weight[j].s0,
                   a.to(j), a.from(j)};
      size += layers[j].packed_size(backward);
    }
    return size;
  }
};

// A thread's buffers for `kept` rows, whose gradients are computed in blocks of up to `most` rows, and the
// steps of a block. Its place among the kept rows is `at`.
template <class C>
struct HeadWorker {
  const Head& a;
  const Layer<C>* const layers;
  const i64 kept, columns;
  // h and the values of each hidden layer, and the arguments of activations whose derivative needs them.
  Scratch<C> stages, arguments, outputs, grad, back;

  HeadWorker(const Head& head, const Layer<C>* its, i64 rows, i64 most, bool backward)
      : a(head), layers(its), kept(rows), columns(head.columns()),
        stages(kept * width_before(head.hidden + 1)),
        arguments(backward && head.hidden ? kept * width_before(head.hidden + 1) : 1),
        outputs(kept * columns * head.linear), grad(backward ? most * columns * head.outputs : 1),
        back(backward ? 2 * most * head.widest() : 1) {}

  i64 width_before(int stage) const {
    i64 sum = 0;
    for (int i = 0; i < stage; ++i) sum += a.width(i);
    return sum;
  }
  C* stage(int i, i64 at) const { return stages.data + kept * width_before(i) + at * a.width(i); }
  C* argument(int i, i64 at) const { return arguments.data + kept * width_before(i) + at * a.width(i); }
  const C* out(i64 at) const { return outputs.data + at * columns * a.linear; }

  void gather(const Block& block, C* to) const {
    const Storage<C>& s = storage<C>(a.h.dtype);
    const int n = static_cast<int>(a.h.n1);
    for (i64 k = 0; k < block.samples; ++k) {
      for (i64 b = 0; b < block.rows; ++b, to += n) {
        const i64 row = (block.k + k) * a.rows() + block.b + b;
        const C* read = s.load(to, a.h.data + static_cast<address>(row * a.h.s0 * s.size), a.h.s1, n);
        if (read != to) copy(to, read, n);
      }
    }
  }
  // Inputs of a layer, rows `stride` apart.
  struct Inputs {
    const C* data;
    i64 stride;
  };
  // Those of a block where h has them as a matrix that a product can read; otherwise null.
  Inputs in_place(const Block& block) const {
    const Storage<C>& s = storage<C>(a.h.dtype);
    const bool even = block.rows == 1 || block.rows == a.rows();
    const i64 stride = block.rows < a.rows() ? a.rows() * a.h.s0 : a.h.s0;
    if (!s.in_place || !even || a.h.s1 != 1 || stride < a.h.n1 || stride > std::numeric_limits<int>::max())
      return {};
    const i64 row = block.k * a.rows() + block.b;
    return {pointer<const C>(a.h.data + static_cast<address>(row * a.h.s0 * s.size)), stride};
  }
  // The outputs of a block, one after the other, each (samples, rows, X).
  void forward(const Block& block, i64 at, bool backward) const {
    const i64 n = block.size();
    Inputs from = backward ? Inputs{} : in_place(block);
    if (!from.data) {
      from = {stage(0, at), a.h.n1};
      gather(block, stage(0, at));
    }
    for (int i = 1; i <= a.hidden; ++i) {
      const Activation& activation = a.activation[i - 1];
      C* const values = stage(i, at);
      const i64 size = n * a.width(i);
      layers[kMostParameters + i - 1].outputs(n, from.data, from.stride, values);
      from = {values, a.width(i)};
      if (backward && !slope_of_value(activation))
        std::memcpy(argument(i, at), values, static_cast<std::size_t>(size) * sizeof(C));
      activate(activation, size, values);
    }
    for (int j = 0; j < a.linear; ++j)
      layers[j].outputs(n, from.data, from.stride, outputs.data + (at * a.linear + j * n) * columns);
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
  const Layers<C> layers(a, false);
  bool outside = false;
  parallel(a.threads, blocks.count(), a.h.n0 * a.columns(), [&](i64 begin, i64 end) {
    const i64 most = blocks.samples * blocks.rows;
    const HeadWorker<C> work(a, layers.layer, most, most, false);
    const Scratch<C> sums(most);
    for (i64 unit = begin; unit < end; ++unit) {
      const Block block = blocks[unit];
      work.forward(block, 0, false);
      if (!reduce_rows(work.rows(block, work.out(0)), sums.data))
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
  C *weight[kMostLayers] = {}, *constant[kMostParameters] = {};
  double* bias[kMostLayers] = {};
  bool first = true;
  explicit HeadSums(const Head& head) : a(head) {}
};

// The gradients of a layer's weight and bias from that of its outputs.
template <class C>
void layer_backward(const HeadWorker<C>& work, int j, i64 n, const C* from, const C* grad,
                    const HeadGradients& to, HeadSums<C>& sums) {
  const i64 columns = work.a.to(j);
  if (to.weight[j]) work.layers[j].to_weight(n, from, grad, !sums.first, sums.weight[j]);
  for (i64 i = 0; i < n && to.bias[j]; ++i)
    add_to(static_cast<int>(columns), grad + i * columns, sums.bias[j]);
}

// The gradients of a block whose forward() has been called; g (samples, rows) is the upstream gradient.
template <class C>
void head_block_backward(HeadWorker<C>& work, const Block& block, i64 at, const C* g, i64 g_stride,
                         const HeadGradients& to, HeadSums<C>& sums) {
  const Head& a = work.a;
  const i64 n = block.size(), columns = work.columns;
  const bool below = to.below();
  RowGradients gradients{};
  gradients.grad = {reinterpret_cast<address>(g), std::is_same<C, double>::value, g_stride, 1};
  C* const grad = work.grad.data;
  for (int j = 0; j < a.outputs; ++j) {
    if (j < a.linear ? below || to.weight[j] || to.bias[j] : to.constant[j] != 0)
      gradients.p[j] = reinterpret_cast<address>(grad + j * n * columns);
  }
  reduce_rows_backward<C>(work.rows(block, work.out(at)), gradients);
  C *back = work.back.data, *next = back + n * a.widest();
  for (int j = 0; j < a.outputs; ++j) {
    const C* its = grad + j * n * columns;
    if (j >= a.linear) {
      if (to.constant[j]) add_elements(a.constant[j].size(), its, sums.constant[j]);
      continue;
    }
    layer_backward(work, j, n, work.stage(a.hidden, at), its, to, sums);
    if (below) work.layers[j].to_inputs(n, its, j > 0, back);
  }
  for (int i = a.hidden; i > 0 && below; --i) {
    const Activation& activation = a.activation[i - 1];
    activate_backward(activation, n * a.width(i),
                      slope_of_value(activation) ? work.stage(i, at) : work.argument(i, at), back);
    const int j = kMostParameters + i - 1;
    layer_backward(work, j, n, work.stage(i - 1, at), back, to, sums);
    if (i == 1 && !to.h) break;
    work.layers[j].to_inputs(n, back, false, next);
    std::swap(back, next);
  }
  sums.first = false;
  if (!to.h) return;
  const i64 width = a.h.n1;
  for (i64 k = 0; k < block.samples; ++k) {
    C* row = pointer<C>(to.h) + ((block.k + k) * a.rows() + block.b) * width;
    copy(row, back + k * block.rows * width, static_cast<int>(block.rows * width));
  }
}

// Calls body(unit, sums) for all units in groups, and adds the groups' sums in their order.
template <class C, class F>
void head_groups(const Head& a, const HeadGradients& to, i64 units, F body) {
  i64 elements = 0, biases = 0;
  for (int j = 0; j < kMostLayers; ++j) {
    if (!a.has(j)) continue;
    elements += to.weight[j] ? a.to(j) * a.from(j) : 0;
    biases += a.to(j);
  }
  const i64 fit = elements > 0 ? kPartialBytes / (elements * static_cast<i64>(sizeof(C))) : kMostPartials;
  i64 groups = a.h.n0 / kRowsPerPartial;
  groups = groups < fit ? groups : fit;
  groups = evenly(between(1, groups, kMostPartials));
  groups = groups < a.threads ? a.threads : groups;
  groups = groups < units ? groups : units;
  // The first group's sums of weights are the result itself.
  const i64 columns = a.columns();
  const Scratch<C> partial((groups - 1) * elements);
  std::vector<C> constant(static_cast<std::size_t>(groups * columns * a.outputs));
  std::vector<double> bias(static_cast<std::size_t>(groups * biases));
  const auto sums_of = [&](i64 group) {
    HeadSums<C> sums(a);
    C* at = partial.data + (group - 1) * elements;
    double* at_bias = bias.data() + group * biases;
    for (int j = 0; j < a.outputs; ++j)
      sums.constant[j] = &constant[static_cast<std::size_t>((group * a.outputs + j) * columns)];
    for (int j = 0; j < kMostLayers; ++j) {
      if (!a.has(j)) continue;
      sums.bias[j] = at_bias;
      at_bias += a.to(j);
      if (!to.weight[j]) continue;
      sums.weight[j] = group == 0 ? pointer<C>(to.weight[j]) : at;
      at += a.to(j) * a.from(j);
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
  for (int j = a.linear; j < a.outputs; ++j) {
    for (i64 group = 1; group < groups; ++group)
      add_elements(columns, sums_of(group).constant[j], all.constant[j]);
    if (to.constant[j])
      copy(pointer<C>(to.constant[j]), all.constant[j], static_cast<int>(a.constant[j].size()));
  }
  for (int j = 0; j < kMostLayers; ++j) {
    if (!a.has(j)) continue;
    for (i64 group = 1; group < groups; ++group) add_doubles(a.to(j), sums_of(group).bias[j], all.bias[j]);
    C* to_bias = pointer<C>(to.bias[j]);
    for (i64 i = 0; i < a.to(j) && to_bias; ++i) to_bias[i] = static_cast<C>(all.bias[j][i]);
    if (!to.weight[j]) continue;
    constexpr i64 kPart = 4096;
    const i64 size = a.to(j) * a.from(j);
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
  const Layers<C> layers(a, true);
  head_groups<C>(a, to, blocks.count(), [&](i64 begin, i64 end, HeadSums<C>& sums) {
    HeadWorker<C> work(a, layers.layer, most, most, true);
    const Scratch<C> g(most);
    for (i64 unit = begin; unit < end; ++unit) {
      const Block block = blocks[unit];
      for (i64 k = 0; k < block.samples; ++k) {
        const C* row = pointer<const C>(grad.data) + (block.k + k) * grad.s0 + block.b * grad.s1;
        for (i64 b = 0; b < block.rows; ++b) g.data[k * block.rows + b] = row[b * grad.s1];
      }
      work.forward(block, 0, true);
      head_block_backward(work, block, 0, g.data, block.rows, to, sums);
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
  i64 width = a.columns() * a.linear;
  for (int i = 0; i <= a.hidden; ++i) width += 2 * a.width(i);
  const i64 whole = spans.samples * spans.rows, most = whole < step ? whole : step;
  const bool keep = whole * width * static_cast<i64>(sizeof(C)) * a.threads <= kKeptBytes;
  const Layers<C> layers(a, true);
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
      for (i64 k = 0; k < span.samples; k += at_once) {
        const Block block = part(k);
        work.forward(block, place(k), true);
        if (!reduce_rows(work.rows(block, work.out(place(k))), log_p.data + k * span.rows))
          __atomic_store_n(&outside, true, __ATOMIC_RELAXED);
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
        if (!keep) work.forward(block, place(k), true);
        head_block_backward(work, block, place(k), log_p.data + k * span.rows, span.rows, gradients, sums);
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
  Head a{likelihood, 0, 0, t.hidden, x, h, {}, {}, {}, {}, threads};
  for (int j = 0; j < kMostLayers; ++j) {
    a.weight[j] = t.weight[j];
    a.bias[j] = t.bias[j];
  }
  for (int i = 0; i < t.hidden; ++i) a.activation[i] = t.activation[i];
  for (int j = 0; j < kMostParameters; ++j) {
    a.constant[j] = t.constant[j];
    a.linear += t.weight[j].data != 0;
    a.outputs += t.weight[j].data != 0 || t.constant[j].data != 0;
  }
  return a;
}
inline HeadGradients head_gradients_of(const Output& h, const HeadOutputs& t) {
  HeadGradients to{h, {}, {}, {}};
  for (int j = 0; j < kMostLayers; ++j) {
    to.weight[j] = t.weight[j];
    to.bias[j] = t.bias[j];
  }
  for (int j = 0; j < kMostParameters; ++j) to.constant[j] = t.constant[j];
  return to;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
