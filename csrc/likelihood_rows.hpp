// Rows of a likelihood's data and parameters, read tile by tile: long rows in parts, short ones many at a
// time.
#pragma once

#include <cstdint>
#include <cstring>
#include <memory>

#include "common.hpp"
#include "elementary.hpp"
#include "likelihood_table.hpp"
#include "storage.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

template <class C>
FASTVAE_LOOP void mark(int n, const C* x, std::uint8_t* __restrict differs) {
#pragma omp simd
  for (int i = 0; i < n; ++i) differs[i] = x[i] != C(0);
}

// Unmarks what was not observed.
template <class C>
FASTVAE_LOOP void unmark(int n, const Bits<C>* seen, std::uint8_t* __restrict marks) {
#pragma omp simd
  for (int i = 0; i < n; ++i) marks[i] = seen[i] != 0 ? marks[i] : std::uint8_t{0};
}

template <class C>
FASTVAE_LOOP void pack(int n, const int* place, const C* from, C* __restrict to) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = from[place[i]];
}

// The order in which rows (k, b) are computed: all samples of `at_once` rows, sample by sample, then those of
// the next rows. A unit of it is the share of a thread.
struct Order {
  i64 samples, rows, at_once, per_unit;

  i64 size() const { return samples * rows; }
  i64 units() const { return (size() + per_unit - 1) / per_unit; }
  i64 begin(i64 unit) const { return unit * per_unit; }
  i64 end(i64 unit) const { return begin(unit) + per_unit < size() ? begin(unit) + per_unit : size(); }

  // One row after the other, without a division for each.
  struct Place {
    i64 samples, rows, at_once, first, stop, k, b;
    void next() {
      if (++b < stop) return;
      b = first;
      if (++k < samples) return;
      k = 0;
      b = first = stop;
      stop = rows - first < at_once ? rows : first + at_once;
    }
  };
  Place operator[](i64 i) const {
    const i64 first = i / (at_once * samples) * at_once, rest = i - first * samples;
    const i64 here = rows - first < at_once ? rows - first : at_once;
    return {samples, rows, at_once, first, first + here, rest / here, first + rest % here};
  }
};

// With a mask, the samples of this many rows share what follows from x and the mask, which fits a core's
// cache: many where that is little. Of one row at a time memory would be read and written in short stretches:
// measured, 1.4 times as slow.
constexpr i64 kRowsAtOnce = 8, kMostRowsAtOnce = 64;
constexpr i64 kRowsPerUnit = 16, kMostRowsPerUnit = kRowsAtOnce * kRowsAtOnce;

inline i64 rows_at_once(const Rows& a, bool data) {
  return data || a.columns > kTile ? kRowsAtOnce : kMostRowsAtOnce;
}
// Of rows longer than a tile, a unit has several samples of each row, as it takes tile after tile. Values
// prepared from x are shared by a row's samples, too.
inline Order order_of(const Rows& a, bool data, bool values) {
  if (!a.mask.data) return {a.samples, a.rows, data && values ? 1 : a.rows, kRowsPerUnit};
  const i64 at_once = rows_at_once(a, data), together = a.samples < kRowsAtOnce ? a.samples : kRowsAtOnce;
  return {a.samples, a.rows, at_once, a.columns > kTile ? at_once * together : kRowsPerUnit};
}
// For tiles of many short rows.
inline Order order_of_tiles(const Rows& a, i64 tiles, bool data) {
  return {a.samples, tiles, data || a.mask.data ? 1 : tiles, 1};
}

// What follows from x, and from its mask, in a row's share of a tile.
template <class C>
struct RowOfX {
  i64 b = -1, column = -1;
  const C* data = nullptr;
  int observed = 0;     // number of observed elements
  double own = 0;       // of these the own terms of a hooked parameter that all rows share
  double own_data = 0;  // of these the terms of x alone, if requested
  int others = -1;      // number of positions with x != 0; negative if unknown, or if they are most
  C x[kBuffer], d[kMostData][kBuffer];
  Bits<C> seen[kBuffer];
  int place[kTile];  // those positions, and their x and data
  C packed_x[kBuffer], packed_d[kMostData][kBuffer];

  bool is_masked(int n) const { return observed < n; }
};

// A thread's buffers, and a tile's arrays: in place where the data is already in the compute type.
template <class C>
struct Reader {
  const Rows& a;
  const Loops<C>& f;
  const Storage<C>& x_storage;
  TileArrays<C> tile{}, packed{};
  bool ready;      // the hooked parameter broadcasts, and its prepared values are reused
  double own = 0;  // its own term for each row of the tile
  const bool with_data, sparse;
  const i64 at_once;
  // Of one row, or with a mask of several.
  RowOfX<C> one;
  std::unique_ptr<RowOfX<C>[]> several;
  RowOfX<C>* row = &one;
  C p[kMostParameters][kBuffer], q[kMostPrepared][kBuffer], own_each[kBuffer], data_each[kBuffer];
  C packed_p[kMostParameters][kBuffer], packed_q[kMostPrepared][kBuffer],
      packed_out[kMostParameters][kBuffer];

  Reader(const Rows& rows, bool values)
      : a(rows), f(loops<C>(rows.likelihood)), x_storage(storage<C>(rows.x.dtype)),
        ready(f.hooked >= 0 && rows.kind[f.hooked] != kFull),
        with_data(f.data && (values || f.gradient_takes_data)),
        sparse(values ? f.zeros[0] != nullptr : f.zero_gradients[0] != nullptr),
        at_once(rows_at_once(rows, f.data)) {
    if (a.mask.data && a.samples > 1) several.reset(new RowOfX<C>[static_cast<std::size_t>(at_once)]);
    take(one);
    for (int j = 0; j < f.prepared; ++j) {
      tile.q[j] = q[j];
      packed.q[j] = packed_q[j];
    }
    for (int j = 0; j < f.parameters; ++j) packed.p[j] = packed_p[j];
  }

  static const C* load(const Storage<C>& s, C* buffer, const Tensor& t, i64 offset, i64 stride, int n) {
    const address from = t.data + static_cast<address>(offset * s.size);
    if (s.in_place && stride == 1) return pointer<const C>(from);
    return s.load(buffer, from, stride, n);
  }
  const C* parameter(int j, i64 k, i64 b, i64 column, int n) {
    const Tensor& t = a.p[j];
    return load(storage<C>(t.dtype), p[j], t, k * t.s0 + b * t.s1 + column * t.s2, t.s2, n);
  }
  void prepare(int n) { own = f.prepare(n, tile.p[f.hooked], q_rows(), own_each); }
  C* const* q_rows() {
    for (int j = 0; j < kMostPrepared; ++j) q_row[j] = q[j];
    return q_row;
  }
  C* q_row[kMostPrepared];
  // Quantities of a tile's columns common to all rows.
  void begin_tile(i64 column, int n) {
    for (int j = 0; j < f.parameters; ++j) {
      if (!is_shared(a.kind[j])) continue;
      tile.p[j] = parameter(j, 0, 0, column, n);
      if (j == f.hooked) prepare(n);
    }
  }
  void take(RowOfX<C>& r) {
    row = &r;
    tile.seen = r.seen;
    packed.x = r.packed_x;
    for (int j = 0; j < kMostData; ++j) {
      tile.d[j] = r.d[j];
      packed.d[j] = r.packed_d[j];
    }
  }
  bool is_masked(int n) const { return row->is_masked(n); }
  bool observes() const { return row->observed > 0; }
  // A row's share of the tile. What follows from its x is reused where it is known. Where nothing was
  // observed, nothing but the mask is read.
  void read(i64 k, i64 b, i64 column, int n) {
    if (several) take(several[static_cast<std::size_t>(b % at_once)]);
    if (b != row->b || column != row->column) {
      read_x(*row, b, column, n);
      row->b = b;
      row->column = column;
    }
    if (!observes()) return;
    tile.x = row->data;
    for (int j = 0; j < f.parameters; ++j) {
      if (is_shared(a.kind[j])) continue;
      if (a.kind[j] == kFull) {
        tile.p[j] = parameter(j, k, b, column, n);
        continue;
      }
      // One number: prepared once, then expanded.
      tile.p[j] = parameter(j, k, b, 0, 1);
      if (j == f.hooked) {
        prepare(1);
        own *= row->observed;
        for (int i = 0; i < f.prepared; ++i) fill(q[i], q[i][0], n);
      }
      const C value = tile.p[j][0];
      fill(p[j], value, n);
      tile.p[j] = p[j];
    }
  }
  void read_x(RowOfX<C>& r, i64 b, i64 column, int n) {
    r.observed = n;
    if (a.mask.data) {
      std::uint8_t buffer[kTile];
      const auto* mask = pointer<const std::uint8_t>(a.mask.data) + b * a.mask.s0 + column * a.mask.s1;
      if (a.mask.s1 != 1) {
        for (int i = 0; i < n; ++i) buffer[i] = mask[i * a.mask.s1];
        mask = buffer;
      }
      r.observed = read_bits<C>(n, mask, r.seen);
      if (r.observed == 0) return;
    }
    r.data = load(x_storage, r.x, a.x, b * a.x.s0 + column * a.x.s1, a.x.s1, n);
    const bool masked = r.is_masked(n);
    if (masked && (with_data || sparse)) {
      cover(n, r.seen, f.inside, r.data, r.x);
      r.data = r.x;
    }
    if (sparse) find_others(r, n);
    if (with_data) {
      C *const rows[kMostData] = {r.d[0], r.d[1]}, *const packed_rows[kMostData] = {r.packed_d[0],
                                                                                    r.packed_d[1]};
      // A 0 adds nothing.
      r.own_data = r.others < 0 ? f.data(n, r.data, rows, data_each)
                                : f.data(r.others, r.packed_x, packed_rows, data_each);
      if (r.others < 0 && masked) r.own_data = sum_observed(n, r.seen, data_each);
    }
    if (ready && is_shared(a.kind[f.hooked])) {
      const bool number = a.kind[f.hooked] == kNumber;
      r.own = !masked  ? own
              : number ? r.observed * static_cast<double>(own_each[0])
                       : sum_observed(n, r.seen, own_each);
    }
  }
  static void find_others(RowOfX<C>& r, int n) {
    // Bytes first, eight of which are tested together: most are 0. (Without branches, by a table of 256, it
    // took longer.)
    alignas(8) std::uint8_t differs[kTile + 8];
    mark(n, r.data, differs);
    if (r.is_masked(n)) unmark<C>(n, r.seen, differs);
    for (int i = n; i < n + 8; ++i) differs[i] = 0;
    r.others = 0;
    for (int i = 0; i < n; i += 8) {
      std::uint64_t eight;
      __builtin_memcpy(&eight, differs + i, 8);
      for (; eight != 0; eight &= eight - 1) r.place[r.others++] = i + (__builtin_ctzll(eight) >> 3);
    }
    // Measured: equal near a third.
    if (3 * r.others > n) {
      r.others = -1;
      return;
    }
    pack(r.others, r.place, r.data, r.packed_x);
  }
  void pack_parameters() {
    for (int j = 0; j < f.parameters; ++j) {
      if (!ready || j != f.hooked) pack(row->others, row->place, tile.p[j], packed_p[j]);
    }
    for (int j = 0; j < f.prepared && ready; ++j) pack(row->others, row->place, q[j], packed_q[j]);
  }
  double elements(int n) {
    if (row->others < 0) return f.sum[ready][is_masked(n)](n, tile);
    pack_parameters();
    // The x of what was not observed is not 0.
    return f.zeros[ready](n, tile) + f.sum[ready][0](row->others, packed);
  }
  // The gradients of a row's share. Returns false if those of what was not observed are still to be cleared.
  bool gradients(int n, C g, bool with_x, C* out_x, C* const* out) {
    const bool masked = is_masked(n);
    if (row->others < 0) {
      if (!masked || with_x) {
        f.gradients[ready][with_x][0](n, &g, tile, out_x, out);
        return !masked;
      }
      f.masked_gradients[ready](n, &g, tile, nullptr, out);
      return true;
    }
    pack_parameters();
    f.zero_gradients[ready](n, g, tile, out);
    C* const to[kMostParameters] = {packed_out[0], packed_out[1], packed_out[2]};
    f.gradients[ready][0][0](row->others, &g, packed, nullptr, to);
    for (int j = 0; j < f.parameters; ++j) {
      for (int i = 0; i < row->others; ++i) out[j][row->place[i]] = to[j][i];
    }
    return !masked;
  }
  double sum(int n) {
    if (!observes()) return 0;
    double total = elements(n) + f.constant * row->observed;
    if (ready) total += is_shared(a.kind[f.hooked]) ? row->own : own;
    return f.factor * total + row->own_data;
  }
};

// The same for rows so short that many form one tile, without gaps between them.
template <class C>
struct ShortRows {
  const Rows& a;
  const Loops<C>& f;
  const int n;
  TileArrays<C> tile{};
  bool ready, outside = false;
  double own[kMostRows] = {}, own_of_all = 0, own_data[kMostRows] = {};
  i64 b_read = -1;
  const bool with_data;
  C x[kBuffer], d[kMostData][kBuffer], p[kMostParameters][kBuffer], q[kMostPrepared][kBuffer], out[kBuffer];
  // Number of observed elements in the tile, and in each of its rows; the mask; and each element's own terms,
  // those of a hooked parameter for one row.
  int observed = 0, observed_in[kMostRows];
  Bits<C> seen[kBuffer];
  C own_each[kBuffer], data_each[kBuffer];

  ShortRows(const Rows& rows, int height, bool values)
      : a(rows), f(loops<C>(rows.likelihood)), n(static_cast<int>(rows.columns)),
        ready(f.hooked >= 0 && rows.kind[f.hooked] != kFull),
        with_data(f.data && (values || f.gradient_takes_data)) {
    tile.seen = seen;
    for (int j = 0; j < kMostData; ++j) tile.d[j] = d[j];
    for (int j = 0; j < f.prepared; ++j) tile.q[j] = q[j];
    for (int j = 0; j < f.parameters; ++j) {
      if (!is_shared(a.kind[j])) continue;
      const C* row = storage<C>(a.p[j].dtype).load(p[j], a.p[j].data, a.p[j].s2, n);
      if (row != p[j]) copy(p[j], row, n);
      if (j == f.hooked) prepare(0, n);
      for (int r = 1; r < height; ++r) repeat(j, r);
      tile.p[j] = p[j];
    }
    own_of_all = own[0];
  }
  Tile shape(int rows) const { return {rows, n, n}; }

  // Prepares `count` elements of the hooked parameter from row r on.
  void prepare(int r, int count) {
    C* to[kMostPrepared];
    for (int i = 0; i < kMostPrepared; ++i) to[i] = q[i] + r * n;
    own[r] = f.prepare(count, p[f.hooked] + r * n, to, own_each);
  }
  void repeat(int j, int r) {
    copy(p[j] + r * n, p[j], n);
    if (j != f.hooked) return;
    for (int i = 0; i < f.prepared; ++i) copy(q[i] + r * n, q[i], n);
    own[r] = own[0];
  }
  const C* load(C* buffer, const Tensor& t, i64 offset, i64 s0, i64 s1, const Tile& shape) const {
    const Storage<C>& s = storage<C>(t.dtype);
    const address from = t.data + static_cast<address>(offset * s.size);
    if (s1 == 1 && shape.dense(s0))
      return s.in_place ? pointer<const C>(from) : s.load(buffer, from, 1, shape.size());
    for (int r = 0; r < shape.rows; ++r) {
      const C* row = s.load(buffer + r * n, from + static_cast<address>(r * s0 * s.size), s1, n);
      if (row != buffer + r * n) copy(buffer + r * n, row, n);
    }
    return buffer;
  }
  bool is_masked(const Tile& t) const { return observed < t.size(); }
  void read_mask(i64 b, const Tile& t) {
    std::uint8_t buffer[kTile];
    const auto* from = pointer<const std::uint8_t>(a.mask.data) + b * a.mask.s0;
    const auto* mask = a.mask.s1 == 1 && t.dense(a.mask.s0) ? from : buffer;
    for (int r = 0; r < t.rows && mask == buffer; ++r) {
      const std::uint8_t* row = from + r * a.mask.s0;
      if (a.mask.s1 == 1) {
        std::memcpy(buffer + r * n, row, static_cast<std::size_t>(n));
      } else {
        for (int i = 0; i < n; ++i) buffer[r * n + i] = row[i * a.mask.s1];
      }
    }
    observed = read_bits<C>(t.size(), mask, seen);
    for (int r = 0; r < t.rows && is_masked(t); ++r) observed_in[r] = count_observed<C>(n, seen + r * n);
  }
  void read_x(i64 b, const Tile& t) {
    observed = t.size();
    if (a.mask.data) read_mask(b, t);
    if (observed == 0) return;
    const bool masked = is_masked(t);
    tile.x = load(x, a.x, b * a.x.s0, a.x.s0, a.x.s1, t);
    if (masked && with_data) {
      cover(t.size(), seen, f.inside, tile.x, x);
      tile.x = x;
    }
    const bool has_own = ready && is_shared(a.kind[f.hooked]);
    for (int r = 0; r < t.rows; ++r) {
      C* const rows[kMostData] = {d[0] + r * n, d[1] + r * n};
      if (with_data) own_data[r] = f.data(n, tile.x + r * n, rows, data_each);
      if (with_data && masked) own_data[r] = sum_observed(n, seen + r * n, data_each);
      if (has_own && a.mask.data) own[r] = masked ? sum_observed(n, seen + r * n, own_each) : own_of_all;
      if (!masked) observed_in[r] = n;
    }
  }
  // Reads the rows (k, b), (k, b + 1), .... Where nothing was observed, nothing but the mask is read.
  Tile read(i64 k, i64 b, i64 height) {
    const Tile t = shape(static_cast<int>(a.rows - b < height ? a.rows - b : height));
    if (b != b_read) {
      read_x(b, t);
      b_read = b;
    }
    if (observed == 0) return t;
    for (int j = 0; j < f.parameters; ++j) {
      const Tensor& from = a.p[j];
      if (a.kind[j] == kFull) tile.p[j] = load(p[j], from, k * from.s0 + b * from.s1, from.s1, from.s2, t);
      if (a.kind[j] != kOne) continue;
      for (int r = 0; r < t.rows; ++r) {
        C* row = p[j] + r * n;
        storage<C>(from.dtype)
            .load(row,
                  from.data +
                      static_cast<address>((k * from.s0 + (b + r) * from.s1) * storage<C>(from.dtype).size),
                  0, 1);
        if (j == f.hooked) {
          prepare(r, 1);
          own[r] *= observed_in[r];
          for (int i = 0; i < f.prepared; ++i) fill(q[i] + r * n, q[i][r * n], n);
        }
        fill(row, row[0], n);
      }
      tile.p[j] = p[j];
    }
    return t;
  }
  // Adds the sums of these rows; returns their number.
  int sums(i64 k, i64 b, i64 height, double* to) {
    const Tile t = read(k, b, height);
    if (observed == 0) return t.rows;
    f.terms[ready](t.size(), tile, out);
    if (is_masked(t)) keep_observed(t.size(), seen, out);
    add_row_sums(out, t, to);
    for (int r = 0; r < t.rows; ++r)
      to[r] = f.factor * (to[r] + f.constant * observed_in[r] + (ready ? own[r] : 0.0)) + own_data[r];
    return t.rows;
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
