// Rows of a likelihood's data and parameters, read tile by tile: long rows in parts, short ones many at a
// time.

#if defined(FASTVAE_LIKELIHOOD_ROWS_HPP) == defined(FASTVAE_TOGGLE)
#ifdef FASTVAE_LIKELIHOOD_ROWS_HPP
#undef FASTVAE_LIKELIHOOD_ROWS_HPP
#else
#define FASTVAE_LIKELIHOOD_ROWS_HPP
#endif

#include "common.hpp"
#include "elementary.hpp"
#include "likelihood_loops.hpp"
#include "storage.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

template <class C>
FASTVAE_LOOP void mark(int n, const C* x, std::uint8_t* __restrict differs) {
#pragma omp simd
  for (int i = 0; i < n; ++i) differs[i] = x[i] != C(0);
}

template <class C>
FASTVAE_LOOP void pack(int n, const int* place, const C* from, C* __restrict to) {
#pragma omp simd
  for (int i = 0; i < n; ++i) to[i] = from[place[i]];
}

// A thread's buffers, and a tile's arrays: in place where the data is already in the compute type.
template <class C>
struct Reader {
  const Rows& a;
  const Loops<C>& f;
  const Storage<C>& x_storage;
  TileArrays<C> tile{};
  bool ready;           // the hooked parameter broadcasts, and its prepared values are reused
  double own = 0;       // its own term for each row of the tile
  double own_data = 0;  // the term of x alone, if requested
  i64 b_read = -1, column_read = -1;
  const bool with_data, sparse;
  C x[kBuffer], d[kMostData][kBuffer], p[kMostParameters][kBuffer], q[kMostPrepared][kBuffer];
  // Positions with x != 0, and the tile's arrays there; negative if unknown, or if they are most of the tile.
  int others = -1, place[kTile];
  TileArrays<C> packed{};
  C packed_x[kBuffer], packed_d[kMostData][kBuffer], packed_p[kMostParameters][kBuffer],
      packed_q[kMostPrepared][kBuffer], packed_out[kMostParameters][kBuffer];

  Reader(const Rows& rows, bool values)
      : a(rows), f(loops<C>(rows.likelihood)), x_storage(storage<C>(rows.x.dtype)),
        ready(f.hooked >= 0 && rows.kind[f.hooked] != kFull),
        with_data(f.data && (values || f.gradient_takes_data)),
        sparse(values ? f.zeros[0] != nullptr : f.zero_gradients[0] != nullptr) {
    for (int j = 0; j < kMostData; ++j) {
      tile.d[j] = d[j];
      packed.d[j] = packed_d[j];
    }
    for (int j = 0; j < f.prepared; ++j) {
      tile.q[j] = q[j];
      packed.q[j] = packed_q[j];
    }
    for (int j = 0; j < f.parameters; ++j) packed.p[j] = packed_p[j];
    packed.x = packed_x;
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
  void prepare(int n) { own = f.prepare(n, tile.p[f.hooked], q_rows()); }
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
  // A row's share of the tile. Parts of x that are already loaded are not read again.
  void read(i64 k, i64 b, i64 column, int n) {
    if (b != b_read || column != column_read) {
      tile.x = load(x_storage, x, a.x, b * a.x.s0 + column * a.x.s1, a.x.s1, n);
      if (sparse) find_others(n);
      C* const rows[kMostData] = {others < 0 ? d[0] : packed_d[0], others < 0 ? d[1] : packed_d[1]};
      // A 0 adds nothing.
      if (with_data) own_data = others < 0 ? f.data(n, tile.x, rows) : f.data(others, packed_x, rows);
      b_read = b;
      column_read = column;
    }
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
        own *= n;
        for (int i = 0; i < f.prepared; ++i) fill(q[i], q[i][0], n);
      }
      const C value = tile.p[j][0];
      fill(p[j], value, n);
      tile.p[j] = p[j];
    }
  }
  void find_others(int n) {
    // Bytes first, eight of which are tested together: most are 0. (Without branches, by a table of 256, it
    // took longer.)
    alignas(8) std::uint8_t differs[kTile + 8];
    mark(n, tile.x, differs);
    for (int i = n; i < n + 8; ++i) differs[i] = 0;
    others = 0;
    for (int i = 0; i < n; i += 8) {
      std::uint64_t eight;
      __builtin_memcpy(&eight, differs + i, 8);
      for (; eight != 0; eight &= eight - 1) place[others++] = i + (__builtin_ctzll(eight) >> 3);
    }
    // Measured: equal near a third.
    if (3 * others > n) {
      others = -1;
      return;
    }
    pack(others, place, tile.x, packed_x);
  }
  void pack_parameters() {
    for (int j = 0; j < f.parameters; ++j) {
      if (!ready || j != f.hooked) pack(others, place, tile.p[j], packed_p[j]);
    }
    for (int j = 0; j < f.prepared && ready; ++j) pack(others, place, q[j], packed_q[j]);
  }
  double elements(int n, C* odds) {
    if (others < 0) return f.sum[ready](n, tile, odds);
    pack_parameters();
    return f.zeros[ready](n, tile) + f.sum[ready](others, packed, odds);
  }
  // The gradients of a row's share; `whole` is the loop for all of it.
  void gradients(int n, C g, typename Loops<C>::Gradients whole, C* out_x, C* const* out) {
    if (others < 0) return whole(n, &g, tile, out_x, out);
    pack_parameters();
    f.zero_gradients[ready](n, g, tile, out);
    C* const to[kMostParameters] = {packed_out[0], packed_out[1], packed_out[2]};
    f.gradients[ready][0][0](others, &g, packed, nullptr, to);
    for (int j = 0; j < f.parameters; ++j) {
      for (int i = 0; i < others; ++i) out[j][place[i]] = to[j][i];
    }
  }
  double sum(int n, C* odds) {
    double total = elements(n, odds) + f.constant * n;
    if (ready) total += own;
    if (f.shared_log) total += sum_log1p(odds, n);
    return f.factor * total + own_data;
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
  double own[kMostRows] = {}, own_data[kMostRows] = {};
  i64 b_read = -1;
  const bool with_data;
  C x[kBuffer], d[kMostData][kBuffer], p[kMostParameters][kBuffer], q[kMostPrepared][kBuffer], out[kBuffer];

  ShortRows(const Rows& rows, int height, bool values)
      : a(rows), f(loops<C>(rows.likelihood)), n(static_cast<int>(rows.columns)),
        ready(f.hooked >= 0 && rows.kind[f.hooked] != kFull),
        with_data(f.data && (values || f.gradient_takes_data)) {
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
  }
  Tile shape(int rows) const { return {rows, n, n}; }

  // Prepares `count` elements of the hooked parameter from row r on.
  void prepare(int r, int count) {
    C* to[kMostPrepared];
    for (int i = 0; i < kMostPrepared; ++i) to[i] = q[i] + r * n;
    own[r] = f.prepare(count, p[f.hooked] + r * n, to);
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
  // Reads the rows (k, b), (k, b + 1), ....
  Tile read(i64 k, i64 b, i64 height) {
    const Tile t = shape(static_cast<int>(a.rows - b < height ? a.rows - b : height));
    if (b != b_read) {
      tile.x = load(x, a.x, b * a.x.s0, a.x.s0, a.x.s1, t);
      for (int r = 0; r < t.rows && with_data; ++r) {
        C* const rows[kMostData] = {d[0] + r * n, d[1] + r * n};
        own_data[r] = f.data(n, tile.x + r * n, rows);
      }
      b_read = b;
    }
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
          own[r] *= n;
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
    f.terms[ready](t.size(), tile, out);
    add_row_sums(out, t, to);
    for (int r = 0; r < t.rows; ++r)
      to[r] = f.factor * (to[r] + f.constant * n + (ready ? own[r] : 0.0)) + own_data[r];
    return t.rows;
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae

#endif
