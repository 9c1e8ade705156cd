// The engine of the likelihoods: log p(x|z) of rows (k, b) of parameters, summed over the event, and its
// gradients.
//
// A likelihood is a declaration of scalar functions, in a file of csrc/likelihoods. From it come a few loops
// over a tile, in float and in double; walks over rows, conversions from and to storage types, broadcasting
// and sums are written once, here, and reach the loops by a table.

#if defined(FASTVAE_LIKELIHOOD_HPP) == defined(FASTVAE_TOGGLE)
#ifdef FASTVAE_LIKELIHOOD_HPP
#undef FASTVAE_LIKELIHOOD_HPP
#else
#define FASTVAE_LIKELIHOOD_HPP
#endif

#include <vector>

#include "common.hpp"
#include "declaration.hpp"
#include "storage.hpp"
#include "tiles.hpp"

// Written by list_likelihoods.py: includes csrc/likelihoods and lists F(name, Struct).
#include "likelihoods.inc"

namespace fastvae {
namespace FASTVAE_ISA {

// A tile's data, parameters, and what was prepared of them and of one of these.
template <class C>
struct TileArrays {
  const C* x;
  const C* d[kMostData];
  const C* p[kMostParameters];
  const C* q[kMostPrepared];
};

// The loops of one likelihood. An index "ready" tells that what is prepared is there.
template <class C>
struct Loops {
  int parameters, hooked, prepared;
  bool shared_log, checked, gradient_takes_data;
  double factor, constant;
  C low, high;
  double (*sum[2])(int n, const TileArrays<C>& a, C* odds);
  void (*terms[2])(int n, const TileArrays<C>& a, C* out);
  using Gradients = void (*)(int n, const C* g, const TileArrays<C>& a, C* out_x, C* const* out);
  Gradients gradients[2][2][2];  // [ready][with out_x][many g]
  double (*prepare)(int n, const C* p, C* const* q);
  double (*data)(int n, const C* x, C* const* d);  // null for none
  // Of the elements where x is 0 alone; null where that is not declared.
  double (*zeros[2])(int n, const TileArrays<C>& a);
  void (*zero_gradients[2])(int n, C g, const TileArrays<C>& a, C* const* out);
};

// Element i, its hooked parameter prepared here or before; and what that adds by itself, if here.
template <class L, bool kReady, class C>
FASTVAE_INLINE Element<C> element(const TileArrays<C>& a, int i, C& own) {
  Element<C> e{};
  e.x = a.x[i];
  if constexpr (!(kReady && L::kHooked == 0)) e.p0 = a.p[0][i];
  if constexpr (L::kParameters > 1 && !(kReady && L::kHooked == 1)) e.p1 = a.p[1][i];
  if constexpr (L::kParameters > 2 && !(kReady && L::kHooked == 2)) e.p2 = a.p[2][i];
  if constexpr (L::kHooked >= 0) {
    if constexpr (kReady) {
      e.q0 = a.q[0][i];
      if constexpr (L::kPrepared > 1) e.q1 = a.q[1][i];
      if constexpr (L::kPrepared > 2) e.q2 = a.q[2][i];
      if constexpr (L::kPrepared > 3) e.q3 = a.q[3][i];
    } else {
      const Prepared<C> p = L::prepare(L::kHooked == 0 ? e.p0 : L::kHooked == 1 ? e.p1 : e.p2);
      own = p.own;
      e.q0 = p.q0;
      e.q1 = p.q1;
      e.q2 = p.q2;
      e.q3 = p.q3;
    }
  }
  return e;
}

// With the numbers made of its data, if they are taken.
template <class L, bool kTaken, class C>
FASTVAE_INLINE Element<C> with_data(const TileArrays<C>& a, int i, Element<C> e) {
  if constexpr (kTaken && L::kData > 0) e.d0 = a.d[0][i];
  if constexpr (kTaken && L::kData > 1) e.d1 = a.d[1][i];
  return e;
}

template <class L, bool kReady, class C>
FASTVAE_LOOP double sum_of(int n, const TileArrays<C>& a, C* odds) {
  return sum_over<C>(n, [=](int i) FASTVAE_INLINED {
    C own = 0;
    const Value<C> v = L::value(with_data<L, true>(a, i, element<L, kReady>(a, i, own)));
    if constexpr (L::kSharedLog) odds[i] = v.odds;
    // Not 0 + value, which is no value to a compiler that minds the sign of 0.
    return L::kHooked >= 0 && !kReady ? own + v.value : v.value;
  });
}

// Each element's part, logarithms not shared: for rows too short for that.
template <class L, bool kReady, class C>
FASTVAE_LOOP void terms_of(int n, const TileArrays<C>& a, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    C own = 0;
    const Value<C> v = L::value(with_data<L, true>(a, i, element<L, kReady>(a, i, own)));
    const C value = L::kHooked >= 0 && !kReady ? own + v.value : v.value;
    out[i] = L::kSharedLog ? value + log1p_(v.odds) : value;
  }
}

// g is one number, or with kMany one for each element.
template <class L, bool kReady, bool kX, bool kMany, class C>
FASTVAE_LOOP void gradients_of(int n, const C* g, const TileArrays<C>& a, C* __restrict out_x,
                               C* const* out) {
  const C one = *g;
  C* __restrict out0 = out[0], * __restrict out1 = out[1], * __restrict out2 = out[2];
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    C own = 0;
    const Slopes<C> s = L::gradient(kMany ? g[i] : one,
                                    with_data<L, L::kGradientTakesData>(a, i, element<L, kReady>(a, i, own)));
    out0[i] = s.p0;
    if constexpr (L::kParameters > 1) out1[i] = s.p1;
    if constexpr (L::kParameters > 2) out2[i] = s.p2;
    if constexpr (kX) out_x[i] = s.x;
  }
}

template <class L, class C>
FASTVAE_LOOP double prepare_all(int n, const C* p, C* const* q) {
  if constexpr (L::kHooked < 0) {
    return 0;
  } else {
    C *q0 = q[0], *q1 = q[1], *q2 = q[2], *q3 = q[3];
    return sum_over<C>(n, [=](int i) FASTVAE_INLINED {
      const Prepared<C> prepared = L::prepare(p[i]);
      q0[i] = prepared.q0;
      if constexpr (L::kPrepared > 1) q1[i] = prepared.q1;
      if constexpr (L::kPrepared > 2) q2[i] = prepared.q2;
      if constexpr (L::kPrepared > 3) q3[i] = prepared.q3;
      return prepared.own;
    });
  }
}

template <class L, class C>
FASTVAE_LOOP double data_of(int n, const C* x, C* const* d) {
  C *d0 = d[0], *d1 = d[1];
  return sum_over<C>(n, [=](int i) FASTVAE_INLINED {
    const Prepared<C> prepared = L::data(x[i]);
    d0[i] = prepared.q0;
    if constexpr (L::kData > 1) d1[i] = prepared.q1;
    return prepared.own;
  });
}
template <class L, class C>
constexpr auto data_loop() -> double (*)(int, const C*, C* const*) {
  if constexpr (L::kData > 0) return data_of<L, C>;
  return nullptr;
}

template <class L, bool kReady, class C>
FASTVAE_LOOP double zeros_of(int n, const TileArrays<C>& a) {
  return sum_over<C>(n, [=](int i) FASTVAE_INLINED {
    C own = 0;
    const Element<C> e = element<L, kReady>(a, i, own);
    const C value = L::zero(e);
    return e.x == C(0) ? value : C(0);
  });
}
template <class L, bool kReady, class C>
FASTVAE_LOOP void zero_gradients_of(int n, C g, const TileArrays<C>& a, C* const* out) {
  C* __restrict out0 = out[0], * __restrict out1 = out[1], * __restrict out2 = out[2];
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    C own = 0;
    const Slopes<C> s = L::zero_gradient(g, element<L, kReady>(a, i, own));
    out0[i] = s.p0;
    if constexpr (L::kParameters > 1) out1[i] = s.p1;
    if constexpr (L::kParameters > 2) out2[i] = s.p2;
  }
}
template <class L, bool kReady, class C>
constexpr auto zeros_loop() -> double (*)(int, const TileArrays<C>&) {
  if constexpr (L::kSparse) return zeros_of < L, kReady && L::kHooked >= 0, C > ;
  return nullptr;
}
template <class L, bool kReady, class C>
constexpr auto zero_gradients_loop() -> void (*)(int, C, const TileArrays<C>&, C* const*) {
  if constexpr (L::kSparseGradient) return zero_gradients_of < L, kReady && L::kHooked >= 0, C > ;
  return nullptr;
}

template <class L, bool kReady, class C>
constexpr auto sum_loop = sum_of<L, kReady && L::kHooked >= 0, C>;
template <class L, bool kReady, class C>
constexpr auto terms_loop = terms_of<L, kReady && L::kHooked >= 0, C>;
template <class L, bool kReady, bool kX, bool kMany, class C>
constexpr auto gradients_loop = gradients_of<L, kReady && L::kHooked >= 0, kX, kMany, C>;

template <class L, class C>
const Loops<C> loops_of = {
    L::kParameters,
    L::kHooked,
    L::kPrepared,
    L::kSharedLog,
    L::kLow > -__builtin_inf() || L::kHigh < __builtin_inf(),
    L::kGradientTakesData,
    L::kFactor,
    L::kConstant,
    static_cast<C>(L::kLow),
    static_cast<C>(L::kHigh),
    {sum_loop<L, false, C>, sum_loop<L, true, C>},
    {terms_loop<L, false, C>, terms_loop<L, true, C>},
    {{{gradients_loop<L, false, false, false, C>, gradients_loop<L, false, false, true, C>},
      {gradients_loop<L, false, true, false, C>, gradients_loop<L, false, true, true, C>}},
     {{gradients_loop<L, true, false, false, C>, gradients_loop<L, true, false, true, C>},
      {gradients_loop<L, true, true, false, C>, gradients_loop<L, true, true, true, C>}}},
    prepare_all<L, C>,
    data_loop<L, C>(),
    {zeros_loop<L, false, C>(), zeros_loop<L, true, C>()},
    {zero_gradients_loop<L, false, C>(), zero_gradients_loop<L, true, C>()}};

template <class C>
const Loops<C>& loops(int likelihood) {
#define FASTVAE_LOOPS(name, L) &loops_of<L, C>,
  static const Loops<C>* const all[] = {FASTVAE_LIKELIHOODS(FASTVAE_LOOPS)};
#undef FASTVAE_LOOPS
  return *all[likelihood];
}

constexpr i64 kRowsPerUnit = 16;

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

// A thread's buffers, and a tile's arrays: in place where the numbers lie so already.
template <class C>
struct Reader {
  const Rows& a;
  const Loops<C>& f;
  const Storage<C>& x_storage;
  TileArrays<C> tile{};
  bool ready;           // the hooked parameter broadcasts, and what is prepared of it is kept
  double own = 0;       // what it adds by itself to a row of the tile
  double own_data = 0;  // what x adds, if asked for
  i64 b_read = -1, column_read = -1;
  const bool with_data, sparse;
  C x[kBuffer], d[kMostData][kBuffer], p[kMostParameters][kBuffer], q[kMostPrepared][kBuffer];
  // Where x is not 0, and the tile's arrays there; negative where that is not known, or most of the tile.
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
  // What a tile's columns have for all rows.
  void begin_tile(i64 column, int n) {
    for (int j = 0; j < f.parameters; ++j) {
      if (!is_shared(a.kind[j])) continue;
      tile.p[j] = parameter(j, 0, 0, column, n);
      if (j == f.hooked) prepare(n);
    }
  }
  // A row's part in the tile. What is there of x already is not read again.
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
      // One number: prepared once, then spread.
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
    // Bytes first, eight of which are looked at together: most are 0. (Without branches, by a table of 256,
    // it took longer.)
    alignas(8) std::uint8_t differs[kTile + 8];
    mark(n, tile.x, differs);
    for (int i = n; i < n + 8; ++i) differs[i] = 0;
    others = 0;
    for (int i = 0; i < n; i += 8) {
      std::uint64_t eight;
      __builtin_memcpy(&eight, differs + i, 8);
      for (; eight != 0; eight &= eight - 1) place[others++] = i + (__builtin_ctzll(eight) >> 3);
    }
    // Measured: even near a third.
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
  // The gradients of a row's part; `whole` is the loop for all of it.
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

// The same for rows so short that many are handled as one tile, without anything between them.
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

  // Of `count` elements of the hooked parameter from row r on.
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
  // Adds the sums of these rows; returns how many there are.
  int sums(i64 k, i64 b, i64 height, double* to) {
    const Tile t = read(k, b, height);
    f.terms[ready](t.size(), tile, out);
    add_row_sums(out, t, to);
    for (int r = 0; r < t.rows; ++r)
      to[r] = f.factor * (to[r] + f.constant * n + (ready ? own[r] : 0.0)) + own_data[r];
    return t.rows;
  }
};

// Whether x lies in [low, high], or is NaN.
template <class C>
FASTVAE_LOOP bool within(int n, const C* x, C lowest, C highest) {
  C low = lowest, high = highest;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  return low == lowest && high == highest;
}

// Rows of up to this many columns are handled many at a time; longer ones gain more by sharing logarithms
// (measured: even near 200).
constexpr i64 kShortRow = kTile / 2, kShortRowWithLog = 192;

// out[k, b] = log p(x_b | parameters of (k, b)). Returns whether x lies where it must.
template <class C>
bool reduce_rows(const Rows& a, C* out) {
  const Loops<C>& f = loops<C>(a.likelihood);
  const i64 total = a.samples * a.rows, size = total * a.columns;
  // Samples of a row after one another where they share what is made of x.
  const bool row_by_row = f.data != nullptr;
  bool outside = false;
  auto done = [&](bool o) {
    // Threads may both write; they write the same.
    if (o) __atomic_store_n(&outside, true, __ATOMIC_RELAXED);
  };
  if (a.columns <= (f.shared_log ? kShortRowWithLog : kShortRow)) {
    const i64 height = rows_per_tile(a.rows, a.columns), tiles = (a.rows + height - 1) / height;
    parallel(a.threads, a.samples * tiles, size, [&](i64 begin, i64 end) {
      ShortRows<C> r(a, static_cast<int>(height), true);
      for (i64 unit = begin; unit < end; ++unit) {
        const i64 k = row_by_row ? unit % a.samples : unit / tiles;
        const i64 b = (row_by_row ? unit / a.samples : unit % tiles) * height;
        double sums[kMostRows] = {};
        const int count = r.sums(k, b, height, sums);
        if (f.checked && k == 0) r.outside |= !within(r.shape(count).size(), r.tile.x, f.low, f.high);
        for (int i = 0; i < count; ++i) out[k * a.rows + b + i] = static_cast<C>(sums[i]);
      }
      done(r.outside);
    });
  } else {
    const i64 units = (total + kRowsPerUnit - 1) / kRowsPerUnit;
    parallel(a.threads, units, size, [&](i64 begin, i64 end) {
      Reader<C> r(a, true);
      C odds[kBuffer];
      bool o = false;
      for (i64 unit = begin; unit < end; ++unit) {
        const i64 first = unit * kRowsPerUnit,
                  last = first + kRowsPerUnit < total ? first + kRowsPerUnit : total;
        double sums[kRowsPerUnit] = {};
        for (i64 column = 0; column < a.columns; column += kTile) {
          const int n = tile_width(a.columns, column);
          r.begin_tile(column, n);
          for (i64 i = first; i < last; ++i) {
            const i64 k = row_by_row ? i % a.samples : i / a.rows;
            r.read(k, row_by_row ? i / a.samples : i % a.rows, column, n);
            if (f.checked && k == 0) o |= !within(n, r.tile.x, f.low, f.high);
            sums[i - first] += r.sum(n, odds);
          }
        }
        for (i64 i = first; i < last; ++i) {
          out[row_by_row ? i % a.samples * a.rows + i / a.samples : i] = static_cast<C>(sums[i - first]);
        }
      }
      done(o);
    });
  }
  return !outside;
}

// How many partial sums over rows are kept for a gradient that is summed over all rows: a function of the
// batch alone, so that the order of summation, and with it every bit, is the same for any number of threads.
// To add two costs as much as a row's gradient: each is of four rows at least, or of a row with as many
// samples.
inline i64 column_partials(i64 samples, i64 rows) {
  const i64 most = samples < 4 ? (rows + 3) / 4 : rows;
  return most < 64 ? most : 64;
}

// Where a pass puts the gradients of its tiles, each of whole rows or of a part of one.
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

  // For elements from `first` of (K, B, X) on: in place where that is possible, else buffers.
  C* const* places(i64 first) {
    for (int j = 0; j < f.parameters; ++j) {
      const bool direct = to.p[j] && a.kind[j] == kFull && storage<C>(a.p[j].dtype).in_place;
      place[j] = direct ? pointer<C>(to.p[j]) + first : out[j];
    }
    return place;
  }
  // What places() gave is filled: t.rows rows from (k, b) on, columns from `column` on. `partial` sums over
  // rows.
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
  // Sums over rows are of groups of rows with all their samples.
  const i64 groups = column_partials(a.samples, a.rows);
  std::vector<double> partial[kMostParameters];
  for (int j = 0; j < f.parameters; ++j) {
    if (to.p[j] && is_shared(a.kind[j])) partial[j].resize(static_cast<std::size_t>(groups * a.columns));
  }
  if (a.columns <= kShortRow) {
    const i64 height = rows_per_tile(across ? a.rows / groups : a.rows, a.columns),
              tiles = (a.rows + height - 1) / height;
    const auto run = f.gradients[ready][with_x][1];
    auto one = [&](ShortRows<C>& r, GradientSink<C>& sink, C* g, i64 k, i64 b, i64 most, i64 group) {
      const Tile t = r.read(k, b, most);
      for (int i = 0; i < t.rows; ++i) fill(g + i * t.n, sink.grad(k, b + i), t.n);
      run(t.size(), g, r.tile, sink.out_x, sink.places((k * a.rows + b) * a.columns));
      sink.put(k, b, 0, t, partial, group);
      return t;
    };
    parallel(a.threads, across ? groups : a.samples * tiles, total * a.columns, [&](i64 begin, i64 end) {
      ShortRows<C> r(a, static_cast<int>(height), false);
      GradientSink<C> sink(a, to);
      C g[kBuffer];
      for (i64 unit = begin; unit < end; ++unit) {
        if (!across) {
          one(r, sink, g, unit / tiles, unit % tiles * height, height, 0);
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
    const i64 units = across ? groups : (total + kRowsPerUnit - 1) / kRowsPerUnit;
    const auto run = f.gradients[ready][with_x][0];
    parallel(a.threads, units, total * a.columns, [&](i64 begin, i64 end) {
      Reader<C> r(a, false);
      GradientSink<C> sink(a, to);
      auto one = [&](i64 k, i64 b, i64 column, int n, i64 group) {
        r.read(k, b, column, n);
        const C g = sink.grad(k, b);
        r.gradients(n, g, run, sink.out_x, sink.places((k * a.rows + b) * a.columns + column));
        sink.put(k, b, column, {1, n, n}, partial, group);
      };
      for (i64 unit = begin; unit < end; ++unit) {
        for (i64 column = 0; column < a.columns; column += kTile) {
          const int n = tile_width(a.columns, column);
          r.begin_tile(column, n);
          if (!across) {
            const i64 first = unit * kRowsPerUnit,
                      last = first + kRowsPerUnit < total ? first + kRowsPerUnit : total;
            for (i64 i = first; i < last; ++i) one(i / a.rows, i % a.rows, column, n, 0);
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
    // Group by group, as they lie in memory.
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

// @param out (K, B) of compute type, that is double if `wide`: contiguous, written. Returns whether x lies
// where it must.
inline bool log_prob(const Rows& a, bool wide, Output out) {
  return wide ? reduce_rows(a, pointer<double>(out)) : reduce_rows(a, pointer<float>(out));
}

inline void log_prob_backward(const Rows& a, bool wide, const RowGradients& to) {
  wide ? reduce_rows_backward<double>(a, to) : reduce_rows_backward<float>(a, to);
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae

#endif
