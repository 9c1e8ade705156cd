// Classes of positions, log p = a_x - log sum_c exp(a_c). See fastvae/ops/categorical.py. Lanes are the
// classes of one position, if these are many and side by side in memory; else positions, or rows where
// positions are few.
#pragma once

#include <vector>

#include "common.hpp"
#include "elementary.hpp"
#include "logsumexp.hpp"
#include "storage.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// The logit of the class given by x.
template <class C>
FASTVAE_LOOP void pick_class(int n, C number, const C* __restrict x, const C* __restrict a,
                             C* __restrict picked) {
#pragma omp simd
  for (int i = 0; i < n; ++i) picked[i] = x[i] == number ? a[i] : picked[i];
}
// Where no class has been picked: -inf, and NaN for an x of NaN.
template <class C>
FASTVAE_LOOP void nothing_picked(int n, const C* __restrict x, C* __restrict picked) {
#pragma omp simd
  for (int i = 0; i < n; ++i) picked[i] = x[i] == x[i] ? -infinity(C(0)) : x[i];
}
template <class C>
FASTVAE_LOOP double sum_of_classes(int n, C ignored, const C* x, const C* picked, const C* normaliser) {
  return sum_over<C>(
      n, [=](int i) FASTVAE_INLINED { return x[i] == ignored ? C(0) : picked[i] - normaliser[i]; });
}
template <class C>
FASTVAE_LOOP void add_classes(int n, C ignored, const C* __restrict x, const C* __restrict picked,
                              const C* __restrict normaliser, double* __restrict sums) {
#pragma omp simd
  for (int i = 0; i < n; ++i) sums[i] += x[i] == ignored ? C(0) : picked[i] - normaliser[i];
}
template <class C>
FASTVAE_LOOP void class_gradients(int n, const C* __restrict g, C number, C ignored, const C* __restrict x,
                                  const C* __restrict a, const C* __restrict normaliser, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C share = exp_negative(a[i] - normaliser[i]);
    const C value = g[i] * ((x[i] == number ? C(1) : C(0)) - share);
    out[i] = x[i] == ignored ? C(0) : value;
  }
}
// Gradients of rows of n classes. Rows shorter than a vector must follow one another in memory, in both.
template <class C>
FASTVAE_LOOP void row_gradients(int rows, int n, const C* __restrict g, C ignored, const C* __restrict x,
                                const C* __restrict a, i64 pitch, const C* __restrict normaliser,
                                C* __restrict out, i64 out_pitch) {
  constexpr int lanes = kLanes<C>;
  for (int r = 0; r < rows; ++r, a += pitch, out += out_pitch) {
    const bool skip = x[r] == ignored;
    const C upstream = g[r], norm = normaliser[r];
    // NaN is not a class.
    const int number = x[r] >= C(0) ? static_cast<int>(x[r]) : -1;
    const auto set = [&](int first, int count) FASTVAE_INLINED {
      const C* from = a + first;
      C* to = out + first;
#pragma omp simd
      for (int i = 0; i < count; ++i) {
        const C value = upstream * ((i == number - first ? C(1) : C(0)) - exp_negative(from[i] - norm));
        to[i] = skip ? C(0) : value;
      }
    };
    for (int first = 0; first <= n - lanes; first += lanes) set(first, lanes);
    if (n % lanes == 0) continue;
    if (n > lanes) {
      set(n - lanes, lanes);
    } else if ((rows - r) * n >= lanes) {
      set(0, lanes);  // and the beginning of the rows to come, which they overwrite
    } else {
      set(0, n);
    }
  }
}
// out = g exp(a - normaliser).
template <class C>
FASTVAE_LOOP void times_shares(int n, C g, C normaliser, const C* __restrict a, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = g * exp_negative(a[i] - normaliser);
}
// Whether each is a whole number in [0, classes), or ignored, or NaN.
template <class C>
FASTVAE_LOOP bool are_classes(int n, const C* x, C classes, C ignored) {
  int wrong = 0;
#pragma omp simd reduction(| : wrong)
  for (int i = 0; i < n; ++i) {
    const bool inside = x[i] >= C(0) && x[i] < classes && __builtin_floor(x[i]) == x[i];
    wrong |= !(inside || x[i] == ignored || x[i] != x[i]);
  }
  return wrong == 0;
}

// A call: x (B, P), logits (N, C, P), or (N, P, C) if classes are `last`; N a multiple of B. With `begins`
// (P + 1) logits are (N, W), and the classes of position p are its columns from begins[p] to begins[p + 1].
struct ClassRows {
  Tensor x, logits;
  bool last;
  double ignored;
  const i64* begins = nullptr;

  i64 rows() const { return logits.n0; }
  i64 batch() const { return x.n0; }
  i64 positions() const { return x.n1; }
  i64 classes(i64 position) const {
    return begins ? begins[position + 1] - begins[position] : last ? logits.n2 : logits.n1;
  }
  i64 class_stride() const { return begins || !last ? logits.s1 : logits.s2; }
  i64 position_stride() const { return last ? logits.s1 : logits.s2; }
  address at(i64 row, i64 c, i64 position, i64 size) const {
    const i64 offset = row * logits.s0 + (begins ? (begins[position] + c) * logits.s1
                                                 : c * class_stride() + position * position_stride());
    return logits.data + static_cast<address>(offset * size);
  }
  // Of the gradient, which is contiguous: numbers of a row, the stride of classes, and an element's place.
  i64 row_size() const { return begins ? logits.n1 : logits.n1 * logits.n2; }
  i64 class_step() const { return begins || last ? 1 : positions(); }
  address place(address to, i64 row, i64 c, i64 position, i64 size) const {
    const i64 first = begins ? begins[position] : last ? position * logits.n2 : position;
    return to + static_cast<address>((row * row_size() + first + c * class_step()) * size);
  }

  // Lanes of fewer classes or positions would be partly empty.
  static constexpr i64 kFewestClasses = 16, kFewestPositions = 8;
  bool along_classes(i64 position) const { return classes(position) >= kFewestClasses; }
  bool along_positions() const {
    return !begins && positions() >= kFewestPositions && !(last && along_classes(0));
  }
  // Rows of a tile, whose logits stay in the second-level cache.
  i64 height() const {
    const i64 fit = 32 * kTile / row_size(), least = begins || !along_classes(0) ? 64 : 1;
    return fit < least ? least : fit < kTile ? fit : kTile;
  }
};

// Data of a tile of lanes.
template <class C>
const C* classes_of(const ClassRows& a, i64 row, i64 position, i64 stride, C* buffer, int n) {
  const Storage<C>& from = storage<C>(a.x.dtype);
  const i64 offset = row % a.batch() * a.x.s0 + position * a.x.s1;
  return from.load(buffer, a.x.data + static_cast<address>(offset * from.size), stride, n);
}

// Logits of classes of one position after the other: log-sums and the logits of x for a tile of lanes.
template <class C>
struct ClassReader {
  const ClassRows& a;
  const Storage<C>& from;
  alignas(kVectorBytes) C buffer[kBuffer];
  RunningSums<C> all;

  explicit ClassReader(const ClassRows& call) : a(call), from(storage<C>(call.logits.dtype)) {}
  const C* load(i64 row, i64 c, i64 position, i64 stride, int n) {
    return load(a.at(row, c, position, from.size), stride, n);
  }
  // Few lanes take less time than a call.
  FASTVAE_INLINE const C* load(address begin, i64 stride, int n) {
    return from.in_place && stride == 1 ? pointer<const C>(begin) : from.load(buffer, begin, stride, n);
  }
  address step() const { return static_cast<address>(a.class_stride() * from.size); }
  // Lanes are rows or positions, `stride` apart.
  void sum_lanes(i64 row, i64 position, i64 stride, int n, const C* x, C* normaliser, C* picked) {
    all.clear(n);
    nothing_picked(n, x, picked);
    address at = a.at(row, 0, position, from.size);
    const i64 classes = a.classes(position);
    for (i64 c = 0; c < classes; ++c, at += step()) {
      const C* s = load(at, stride, n);
      add_exponential(n, s, all.top, all.sum);
      pick_class(n, static_cast<C>(c), x, s, picked);
    }
    log_of_sums(n, all.top, all.sum, normaliser);
  }
  // Whether rows of a position's classes are read and written in place, each by few vectors.
  bool in_rows(i64 position) const {
    return from.in_place && a.class_stride() == 1 && a.class_step() == 1 &&
           a.classes(position) <= 16 * kLanes<C>;
  }
  // Lanes are classes, of one row after the other.
  void sum_rows(i64 row, i64 position, int n, const C* x, C* normaliser, C* picked) {
    const int classes = static_cast<int>(a.classes(position));
    const C* s = pointer<const C>(a.at(row, 0, position, from.size));
    exponentials_of_rows(n, classes, s, a.logits.s0, all.top, all.sum);
    log_of_sums(n, all.top, all.sum, normaliser);
    nothing_picked(n, x, picked);
    for (int i = 0; i < n; ++i, s += a.logits.s0) {
      if (x[i] == static_cast<C>(a.ignored))
        normaliser[i] = picked[i] = C(0);
      else if (x[i] >= C(0) && x[i] < static_cast<C>(classes))
        picked[i] = s[static_cast<i64>(x[i])];
    }
  }
  // Lanes are classes.
  void sum_classes(i64 row, i64 position, C x, C& normaliser, C& picked) {
    const i64 classes = a.classes(position), stride = a.class_stride();
    if (x == static_cast<C>(a.ignored)) {
      normaliser = picked = C(0);
      return;
    }
    LogSum<C> sum;
    for (i64 c = 0; c < classes; c += kTile) {
      const int n = tile_width(classes, c);
      sum.add(n, load(row, c, position, stride, n));
    }
    normaliser = static_cast<C>(sum.value());
    nothing_picked(1, &x, &picked);
    if (x >= C(0) && x < static_cast<C>(classes)) picked = *load(row, static_cast<i64>(x), position, 0, 1);
  }
};

// Tiles of positions of one row.
template <class C>
bool class_positions(const ClassRows& a, C* out, C* normaliser, int threads) {
  const i64 rows = a.rows(), positions = a.positions(), tiles = (positions + kTile - 1) / kTile;
  const C ignored = static_cast<C>(a.ignored);
  std::vector<double> parts(static_cast<std::size_t>(rows * tiles));
  bool outside = false;
  parallel(threads, rows * tiles, a.logits.size(), [&](i64 begin, i64 end) {
    ClassReader<C> r(a);
    alignas(kVectorBytes) C x_buffer[kBuffer], picked[kBuffer];
    bool wrong = false;
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 row = unit / tiles, first = unit % tiles * kTile;
      const int n = tile_width(positions, first);
      C* norm = normaliser + row * positions + first;
      const C* x = classes_of(a, row, first, a.x.s1, x_buffer, n);
      if (row < a.batch()) wrong |= !are_classes(n, x, static_cast<C>(a.classes(0)), ignored);
      r.sum_lanes(row, first, a.position_stride(), n, x, norm, picked);
      parts[static_cast<std::size_t>(unit)] = sum_of_classes(n, ignored, x, picked, norm);
    }
    if (wrong) __atomic_store_n(&outside, true, __ATOMIC_RELAXED);
  });
  for (i64 row = 0; row < rows; ++row) {
    double sum = 0;
    for (i64 t = 0; t < tiles; ++t) sum += parts[static_cast<std::size_t>(row * tiles + t)];
    out[row] = static_cast<C>(sum);
  }
  return !outside;
}

// Tiles of rows of one sample, which take one position after the other.
template <class C>
bool class_tiles(const ClassRows& a, C* out, C* normaliser, int threads) {
  const i64 batch = a.batch(), positions = a.positions(), height = a.height(),
            tiles = (batch + height - 1) / height;
  const C ignored = static_cast<C>(a.ignored);
  bool outside = false;
  parallel(threads, a.rows() / batch * tiles, a.logits.size(), [&](i64 begin, i64 end) {
    ClassReader<C> r(a);
    alignas(kVectorBytes) C x_buffer[kBuffer], picked[kBuffer], norm[kBuffer];
    alignas(kVectorBytes) double sums[kBuffer];
    bool wrong = false;
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 first = unit % tiles * height, row = unit / tiles * batch + first;
      const int n = static_cast<int>(batch - first < height ? batch - first : height);
      fill(sums, 0.0, n);
      for (i64 p = 0; p < positions; ++p) {
        const C* x = classes_of(a, row, p, a.x.s0, x_buffer, n);
        if (row < batch) wrong |= !are_classes(n, x, static_cast<C>(a.classes(p)), ignored);
        if (a.along_classes(p) && r.in_rows(p)) {
          r.sum_rows(row, p, n, x, norm, picked);
        } else if (a.along_classes(p)) {
          for (int i = 0; i < n; ++i) r.sum_classes(row + i, p, x[i], norm[i], picked[i]);
        } else {
          r.sum_lanes(row, p, a.logits.s0, n, x, norm, picked);
        }
        add_classes(n, ignored, x, picked, norm, sums);
        for (int i = 0; i < n; ++i) normaliser[(row + i) * positions + p] = norm[i];
      }
      for (int i = 0; i < n; ++i) out[row + i] = static_cast<C>(sums[i]);
    }
    if (wrong) __atomic_store_n(&outside, true, __ATOMIC_RELAXED);
  });
  return !outside;
}

template <class C>
void class_positions_backward(const ClassRows& a, const Tensor& grad, const C* normaliser, address to,
                              int threads) {
  const i64 rows = a.rows(), positions = a.positions(), tiles = (positions + kTile - 1) / kTile;
  const i64 step = a.last ? a.logits.n2 : 1;
  parallel(threads, rows * tiles, a.logits.size(), [&](i64 begin, i64 end) {
    ClassReader<C> r(a);
    alignas(kVectorBytes) C x_buffer[kBuffer], g[kBuffer], out[kBuffer];
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 row = unit / tiles, first = unit % tiles * kTile;
      const int n = tile_width(positions, first);
      const C* x = classes_of(a, row, first, a.x.s1, x_buffer, n);
      fill(g, pointer<const C>(grad.data)[row * grad.s0], n);
      address at = a.at(row, 0, first, r.from.size), place = a.place(to, row, 0, first, r.from.size);
      const address place_step = static_cast<address>(a.class_step() * r.from.size);
      const bool direct = r.from.in_place && step == 1;
      for (i64 c = 0; c < a.classes(0); ++c, at += r.step(), place += place_step) {
        C* results = direct ? pointer<C>(place) : out;
        class_gradients(n, g, static_cast<C>(c), static_cast<C>(a.ignored), x,
                        r.load(at, a.position_stride(), n), normaliser + row * positions + first, results);
        if (!direct) r.from.scatter(place, step, out, n);
      }
    }
  });
}

// The gradient of one position of one row.
template <class C>
void class_gradient(ClassReader<C>& r, i64 row, i64 position, C g, C x, C normaliser, address to) {
  const ClassRows& a = r.a;
  const i64 classes = a.classes(position), step = a.class_step();
  alignas(kVectorBytes) C results[kBuffer];
  for (i64 c = 0; c < classes; c += kTile) {
    const int n = tile_width(classes, c);
    const address place = a.place(to, row, c, position, r.from.size);
    C* out = r.from.in_place && step == 1 ? pointer<C>(place) : results;
    if (x == static_cast<C>(a.ignored)) {
      fill(out, C(0), n);
    } else {
      const C* s = r.load(row, c, position, a.class_stride(), n);
      times_shares(n, -g, normaliser, s, out);
      const bool here = x >= static_cast<C>(c) && x < static_cast<C>(c + n);
      if (here) out[static_cast<i64>(x) - c] = g * (C(1) - exp_(s[static_cast<i64>(x) - c] - normaliser));
    }
    if (out == results) r.from.scatter(place, step, results, n);
  }
}

template <class C>
void class_tiles_backward(const ClassRows& a, const Tensor& grad, const C* normaliser, address to,
                          int threads) {
  const i64 batch = a.batch(), positions = a.positions(), height = a.height(),
            tiles = (batch + height - 1) / height;
  parallel(threads, a.rows() / batch * tiles, a.logits.size(), [&](i64 begin, i64 end) {
    ClassReader<C> r(a);
    alignas(kVectorBytes) C x_buffer[kBuffer], g_buffer[kBuffer], norm[kBuffer], out[kBuffer];
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 first = unit % tiles * height, row = unit / tiles * batch + first;
      const int n = static_cast<int>(batch - first < height ? batch - first : height);
      const C* g = load(g_buffer, pointer<const C>(grad.data) + row * grad.s0, grad.s0, n);
      for (i64 p = 0; p < positions; ++p) {
        const C* x = classes_of(a, row, p, a.x.s0, x_buffer, n);
        for (int i = 0; i < n; ++i) norm[i] = normaliser[(row + i) * positions + p];
        // Rows of one position may follow one another; of few classes, rows as lanes take less time.
        const bool follow = a.classes(p) > 8 && a.row_size() == a.classes(p) && a.logits.s0 == a.row_size();
        if (r.in_rows(p) && (follow || a.along_classes(p))) {
          const C* s = pointer<const C>(a.at(row, 0, p, r.from.size));
          row_gradients(n, static_cast<int>(a.classes(p)), g, static_cast<C>(a.ignored), x, s, a.logits.s0,
                        norm, pointer<C>(a.place(to, row, 0, p, r.from.size)), a.row_size());
          continue;
        }
        if (a.along_classes(p)) {
          for (int i = 0; i < n; ++i) class_gradient(r, row + i, p, g[i], x[i], norm[i], to);
          continue;
        }
        for (i64 c = 0; c < a.classes(p); ++c) {
          class_gradients(n, g, static_cast<C>(c), static_cast<C>(a.ignored), x,
                          r.load(row, c, p, a.logits.s0, n), norm, out);
          r.from.scatter(a.place(to, row, c, p, r.from.size), a.row_size(), out, n);
        }
      }
    }
  });
}

inline bool log_prob_of_classes(const ClassRows& a, bool wide, Output out, Output normaliser, int threads) {
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    C *to = pointer<C>(out), *norm = pointer<C>(normaliser);
    return a.along_positions() ? class_positions(a, to, norm, threads) : class_tiles(a, to, norm, threads);
  };
  return wide ? run(double()) : run(float());
}
inline void gradient_of_classes(const ClassRows& a, const Tensor& grad, const Tensor& normaliser, bool wide,
                                Output to, int threads) {
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    const C* norm = pointer<const C>(normaliser.data);
    a.along_positions() ? class_positions_backward(a, grad, norm, to, threads)
                        : class_tiles_backward(a, grad, norm, to, threads);
  };
  wide ? run(double()) : run(float());
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
