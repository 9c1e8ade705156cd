// Likelihood engine: log p(x|z) of rows (k, b) of parameters, summed over the event, and its gradients.
//
// A likelihood is a declaration of scalar functions, in a file of csrc/likelihoods. It is compiled to a few
// loops over a tile, in float and in double, which are called through a table (likelihood_table.hpp). Reading
// of rows (likelihood_rows.hpp), iteration over them, conversions from and to storage types, broadcasting and
// sums are written once.
#pragma once

#include <type_traits>
#include <vector>

#include "common.hpp"
#include "likelihood_table.hpp"
#include "likelihood_rows.hpp"
#include "storage.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// Returns true if x lies in [low, high], or is NaN, where it was observed.
template <bool kMasked, class C>
FASTVAE_LOOP bool within(int n, const C* x, const Bits<C>* seen, C lowest, C highest) {
  C low = lowest, high = highest;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int i = 0; i < n; ++i) {
    const C given = x[i], value = !kMasked || seen[i] != 0 ? given : lowest;
    low = value < low ? value : low;
    high = value > high ? value : high;
  }
  return low == lowest && high == highest;
}
template <class C>
bool is_outside(int n, const TileArrays<C>& a, bool masked, const Loops<C>& f) {
  return !(masked ? within<true>(n, a.x, a.seen, f.low, f.high)
                  : within<false>(n, a.x, a.seen, f.low, f.high));
}

// Rows of up to this many columns are processed many at a time; longer ones gain more by sharing logarithms
// (measured: equal near 100).
constexpr i64 kShortRow = kTile / 2, kShortRowWithLog = 96;

// out[k, b] = log p(x_b | parameters of (k, b)). Returns true if x lies in the support.
template <class C>
bool reduce_rows(const Rows& a, C* out) {
  const Loops<C>& f = loops<C>(a.likelihood);
  const i64 size = a.samples * a.rows * a.columns;
  bool outside = false;
  auto done = [&](bool o) {
    // Several threads may write this; they write the same value.
    if (o) __atomic_store_n(&outside, true, __ATOMIC_RELAXED);
  };
  if (a.columns <= (f.shared_log ? kShortRowWithLog : kShortRow)) {
    const i64 height = rows_per_tile(a.rows, a.columns), tiles = (a.rows + height - 1) / height;
    const Order order = order_of_tiles(a, tiles, f.data);
    parallel(a.threads, order.units(), size, [&](i64 begin, i64 end) {
      ShortRows<C> r(a, static_cast<int>(height), true);
      for (i64 unit = begin; unit < end; ++unit) {
        const Order::Place at = order[unit];
        const i64 k = at.k, b = at.b * height;
        double sums[kMostRows] = {};
        const int count = r.sums(k, b, height, sums);
        if (f.checked && k == 0 && r.observed > 0)
          r.outside |= is_outside(r.shape(count).size(), r.tile, r.is_masked(r.shape(count)), f);
        for (int i = 0; i < count; ++i) out[k * a.rows + b + i] = static_cast<C>(sums[i]);
      }
      done(r.outside);
    });
  } else {
    const Order order = order_of(a, f.data, true);
    parallel(a.threads, order.units(), size, [&](i64 begin, i64 end) {
      Reader<C> r(a, true);
      bool o = false;
      for (i64 unit = begin; unit < end; ++unit) {
        const i64 first = order.begin(unit), last = order.end(unit);
        double sums[kMostRowsPerUnit] = {};
        for (i64 column = 0; column < a.columns; column += kTile) {
          const int n = tile_width(a.columns, column);
          r.begin_tile(column, n);
          Order::Place at = order[first];
          for (i64 i = first; i < last; ++i, at.next()) {
            r.read(at.k, at.b, column, n);
            if (f.checked && at.k == 0 && r.observes()) o |= is_outside(n, r.tile, r.is_masked(n), f);
            sums[i - first] += r.sum(n);
          }
        }
        Order::Place at = order[first];
        for (i64 i = first; i < last; ++i, at.next())
          out[at.k * a.rows + at.b] = static_cast<C>(sums[i - first]);
      }
      done(o);
    });
  }
  return !outside;
}

// Number of partial sums kept for a gradient summed over all rows: a function of the batch alone, so that the
// order of summation, and with it every bit, is the same for any number of threads. Adding two costs as much
// as a row's gradient: each covers at least four rows, or a row with as many samples.
inline i64 column_partials(i64 samples, i64 rows) {
  const i64 most = samples < 4 ? (rows + 3) / 4 : rows;
  return most < 64 ? most : 64;
}

// Destination of the gradients of a pass's tiles, each of whole rows or of part of one.
template <class C>
struct GradientSink {
  const Rows& a;
  const Loops<C>& f;
  const RowGradients& to;
  C out[kMostParameters][kBuffer], out_x[kBuffer];
  double sum_x[kTile];
  C* place[kMostParameters] = {};

  GradientSink(const Rows& rows, const RowGradients& gradients)
      : a(rows), f(loops<C>(rows.likelihood)), to(gradients) {}

  C grad(i64 k, i64 b) const { return *(pointer<const C>(to.grad.data) + k * to.grad.s0 + b * to.grad.s1); }

  // Returns buffers for elements from `first` of (K, B, X) on: in place where possible.
  C* const* places(i64 first) {
    for (int j = 0; j < f.parameters; ++j) {
      const bool direct = to.p[j] && a.kind[j] == kFull && storage<C>(a.p[j].dtype).in_place;
      place[j] = direct ? pointer<C>(to.p[j]) + first : out[j];
    }
    return place;
  }
  // Clears gradients of what was not observed, of n elements; of all of them.
  void keep(int n, const Bits<C>* seen) {
    for (int j = 0; j < f.parameters; ++j) {
      if (to.p[j]) keep_observed(n, seen, place[j]);
    }
    if (to.x) keep_observed(n, seen, out_x);
  }
  void clear(int n) {
    for (int j = 0; j < f.parameters; ++j) {
      if (to.p[j]) fill(place[j], C(0), n);
    }
    if (to.x) fill(out_x, C(0), n);
  }
  // Stores the buffers returned by places(): t.rows rows from (k, b) on, columns from `column` on. `partial`
  // are sums over rows.
  void put(i64 k, i64 b, i64 column, const Tile& t, std::vector<double>* partial, i64 group) {
    const i64 first = (k * a.rows + b) * a.columns + column;
    for (int j = 0; j < f.parameters; ++j) {
      if (!to.p[j] || place[j] != out[j]) continue;
      if (a.kind[j] == kFull) {
        const Storage<C>& s = storage<C>(a.p[j].dtype);
        s.store(to.p[j] + static_cast<address>(first * s.size), out[j], t.size());
      } else if (a.kind[j] == kOne) {
        double sums[kMostRows] = {};
        add_row_sums(out[j], t, sums);
        C* sum = pointer<C>(to.p[j]) + k * a.rows + b;
        for (int r = 0; r < t.rows; ++r) sum[r] = (column == 0 ? C(0) : sum[r]) + static_cast<C>(sums[r]);
      } else {
        double* sums = &partial[j][static_cast<std::size_t>(group * a.columns + column)];
        for (int r = 0; r < t.rows; ++r) add_to(t.n, out[j] + r * t.pitch, sums);
      }
    }
    if (to.x) add_to(t.size(), out_x, sum_x);
  }
  void put_x(i64 b, i64 column, int n) {
    for (int i = 0; i < n; ++i) out_x[i] = static_cast<C>(sum_x[i]);
    const Storage<C>& s = storage<C>(a.x.dtype);
    s.store(to.x + static_cast<address>((b * a.columns + column) * s.size), out_x, n);
  }
};

template <class C>
void reduce_rows_backward(const Rows& a, const RowGradients& to) {
  const Loops<C>& f = loops<C>(a.likelihood);
  const i64 total = a.samples * a.rows;
  const bool ready = f.hooked >= 0 && a.kind[f.hooked < 0 ? 0 : f.hooked] != kFull, with_x = to.x != 0;
  bool across = with_x;
  for (int j = 0; j < f.parameters; ++j) across |= to.p[j] && is_shared(a.kind[j]);
  // Sums over rows are taken over groups of rows with all their samples.
  const i64 groups = column_partials(a.samples, a.rows);
  std::vector<double> partial[kMostParameters];
  for (int j = 0; j < f.parameters; ++j) {
    if (to.p[j] && is_shared(a.kind[j])) partial[j].resize(static_cast<std::size_t>(groups * a.columns));
  }
  if (a.columns <= kShortRow) {
    const i64 height = rows_per_tile(across ? a.rows / groups : a.rows, a.columns),
              tiles = (a.rows + height - 1) / height;
    const auto run = f.gradients[ready][with_x][1];
    const Order order = order_of_tiles(a, tiles, false);
    auto one = [&](ShortRows<C>& r, GradientSink<C>& sink, C* g, i64 k, i64 b, i64 most, i64 group) {
      const Tile t = r.read(k, b, most);
      C* const* places = sink.places((k * a.rows + b) * a.columns);
      if (r.observed == 0) {
        sink.clear(t.size());
      } else {
        for (int i = 0; i < t.rows; ++i) fill(g + i * t.n, sink.grad(k, b + i), t.n);
        run(t.size(), g, r.tile, sink.out_x, places);
        if (r.is_masked(t)) sink.keep(t.size(), r.seen);
      }
      sink.put(k, b, 0, t, partial, group);
      return t;
    };
    parallel(a.threads, across ? groups : order.units(), total * a.columns, [&](i64 begin, i64 end) {
      ShortRows<C> r(a, static_cast<int>(height), false);
      GradientSink<C> sink(a, to);
      C g[kBuffer];
      for (i64 unit = begin; unit < end; ++unit) {
        if (!across) {
          const Order::Place at = order[unit];
          one(r, sink, g, at.k, at.b * height, height, 0);
          continue;
        }
        const i64 stop = a.rows * (unit + 1) / groups;
        for (i64 b = a.rows * unit / groups; b < stop; b += height) {
          const i64 most = stop - b < height ? stop - b : height;
          fill(sink.sum_x, 0.0, static_cast<int>(most * a.columns));
          for (i64 k = 0; k < a.samples; ++k) one(r, sink, g, k, b, most, unit);
          if (with_x) sink.put_x(b, 0, static_cast<int>(most * a.columns));
        }
      }
    });
  } else {
    const Order order = order_of(a, f.data, false);
    parallel(a.threads, across ? groups : order.units(), total * a.columns, [&](i64 begin, i64 end) {
      Reader<C> r(a, false);
      GradientSink<C> sink(a, to);
      auto one = [&](i64 k, i64 b, i64 column, int n, i64 group) {
        r.read(k, b, column, n);
        C* const* places = sink.places((k * a.rows + b) * a.columns + column);
        if (!r.observes()) {
          sink.clear(n);
        } else if (!r.gradients(n, sink.grad(k, b), with_x, sink.out_x, places)) {
          sink.keep(n, r.row->seen);
        }
        sink.put(k, b, column, {1, n, n}, partial, group);
      };
      for (i64 unit = begin; unit < end; ++unit) {
        for (i64 column = 0; column < a.columns; column += kTile) {
          const int n = tile_width(a.columns, column);
          r.begin_tile(column, n);
          if (!across) {
            Order::Place at = order[order.begin(unit)];
            for (i64 i = order.begin(unit); i < order.end(unit); ++i, at.next())
              one(at.k, at.b, column, n, 0);
            continue;
          }
          for (i64 b = a.rows * unit / groups; b < a.rows * (unit + 1) / groups; ++b) {
            fill(sink.sum_x, 0.0, n);
            for (i64 k = 0; k < a.samples; ++k) one(k, b, column, n, unit);
            if (with_x) sink.put_x(b, column, n);
          }
        }
      }
    });
  }
  for (int j = 0; j < f.parameters; ++j) {
    if (partial[j].empty()) continue;
    C* place = pointer<C>(to.p[j]);
    // Group by group, in memory order.
    double* sums = partial[j].data();
    for (i64 group = 1; group < groups; ++group) add_doubles(a.columns, sums + group * a.columns, sums);
    double all = 0;
    for (i64 i = 0; i < a.columns; ++i) {
      if (a.kind[j] == kColumn) place[i] = static_cast<C>(sums[i]);
      all += sums[i];
    }
    if (a.kind[j] == kNumber) *place = static_cast<C>(all);
  }
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
