// Mixtures of U diagonal normal distributions: log sum_u exp(s_nu) with s_nu = c_u - 1/2 sum_d w^2, w = (z_nd
// - mu_ud) / sigma_ud. The differences are computed directly: products of z^2, z and the parameters would
// lose (mu / sigma)^2 roundings. Lanes are components; rows come in units, whose scores for a block of
// components are all that is kept of [N, U].
#pragma once

#include "common.hpp"
#include "elementary.hpp"
#include "logsumexp.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

constexpr i64 kUnitRows = 16;
// Rows whose gradients are added in the type of the computation, before double takes over; and parts of a sum
// over rows.
constexpr i64 kRowsAdded = 128, kFewestRowsAdded = 32;
constexpr i64 kParts = 16, kMostParts = 64, kBytesOfParts = i64{1} << 24;
// Squares that are added one after the other.
constexpr i64 kSquares = 128;

// Packed inputs of the kernels, block by block: for each dimension means, inverse scales and, if asked for,
// the dimension's constants side by side, then constants. Padding components have zero weight.
template <class C>
struct Components {
  static constexpr i64 kMost = 1024 / static_cast<i64>(sizeof(C)), kPad = 64 / static_cast<i64>(sizeof(C));
  const i64 count, dims, blocks, width;
  const bool each;  // constants of each dimension, too
  const i64 pitch;
  const Scratch<C> numbers;

  // Without the padding the dimensions of a block would meet in a few sets of the cache.
  Components(i64 u, i64 d, bool constants_of_each = false)
      : count(u), dims(d), blocks((u + kMost - 1) / kMost),
        width(((u + blocks - 1) / blocks + kLanes<C> - 1) / kLanes<C> * kLanes<C>), each(constants_of_each),
        pitch((each ? 3 : 2) * width + kPad), numbers(blocks * block_size()) {}
  i64 block_size() const { return dims * pitch + width; }
  C* means(i64 block) const { return numbers.data + block * block_size(); }
  C* constants(i64 block) const { return means(block) + dims * pitch; }
  i64 first(i64 block) const { return block * width; }
  i64 in_block(i64 block) const { return count - first(block) < width ? count - first(block) : width; }

  void pack(const Tensor& mu, const Tensor& logvar, const Tensor& log_weight, int threads) const {
    parallel(threads, blocks, 8 * count * dims, [&](i64 begin, i64 end) {
      for (i64 block = begin; block < end; ++block) {
        const i64 n = in_block(block) > 0 ? in_block(block) : 0;
        for (i64 i = 0; i < width; ++i) {
          const bool none = i >= n;
          const i64 u = first(block) + i;
          const C *mean = pointer<const C>(mu.data) + u * mu.s0,
                  *spread = pointer<const C>(logvar.data) + u * logvar.s0;
          C* to = means(block) + i;
          double sum = 0;
          for (i64 d = 0; d < dims; ++d, to += pitch) {
            const C lambda = none ? C(0) : spread[d * logvar.s1];
            to[0] = none ? C(0) : mean[d * mu.s1];
            to[width] = exp_<-1>(lambda);
            const double spread_of_both = lambda + 2 * kHalfLog2Pi;
            if (each) to[2 * width] = none ? -infinity(C(0)) : static_cast<C>(-0.5 * spread_of_both);
            sum += spread_of_both;
          }
          const double weight =
              none                ? -infinity(0.0)
              : !log_weight.given ? 0.0
                                  : static_cast<double>(pointer<const C>(log_weight.data)[u * log_weight.s0]);
          constants(block)[i] = static_cast<C>(weight - 0.5 * sum);
        }
      }
    });
  }
};

// s of kRows rows and kVectors vectors of components: z lies with rows side by side.
template <class C, int kRows, int kVectors>
FASTVAE_INLINE void score_tile(i64 dims, i64 pitch, i64 width, const C* means, const C* constants, const C* z,
                               C* s) {
  constexpr int lanes = kLanes<C>;
  for (i64 begin = 0; begin < dims; begin += kSquares) {
    const i64 end = dims - begin < kSquares ? dims : begin + kSquares;
    Vector<C> sum[kRows][kVectors] = {};
    const C* at = means + begin * pitch;
    for (i64 d = begin; d < end; ++d, at += pitch) {
      Vector<C> mean[kVectors], inverse[kVectors];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        mean[v] = *reinterpret_cast<const Vector<C>*>(at + v * lanes);
        inverse[v] = *reinterpret_cast<const Vector<C>*>(at + width + v * lanes);
      }
#pragma GCC unroll 8
      for (int i = 0; i < kRows; ++i) {
        const C x = z[d * kUnitRows + i];
#pragma GCC unroll 2
        for (int v = 0; v < kVectors; ++v) {
          const Vector<C> w = (x - mean[v]) * inverse[v];
          sum[i][v] += w * w;
        }
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) {
        Vector<C>* to = reinterpret_cast<Vector<C>*>(s + i * width + v * lanes);
        *to = (begin ? *to : *reinterpret_cast<const Vector<C>*>(constants + v * lanes)) - C(0.5) * sum[i][v];
      }
    }
  }
}

// s (kUnitRows, width) of a unit of rows and a block of components.
template <class C>
FASTVAE_LOOP void score(i64 dims, i64 pitch, i64 width, const C* means, const C* constants, const C* z,
                        C* s) {
  constexpr int lanes = kLanes<C>;
  i64 j = 0;
  const auto columns = [&](auto number) FASTVAE_INLINED {
    constexpr int kVectors = decltype(number)::value;
    for (; j + kVectors * lanes <= width; j += kVectors * lanes) {
      for (i64 i = 0; i < kUnitRows; i += kTileRows) {
        score_tile<C, kTileRows, kVectors>(dims, pitch, width, means + j, constants + j, z + i,
                                           s + i * width + j);
      }
    }
  };
  columns(std::integral_constant<int, kTileVectors>());
  if constexpr (kTileVectors > 1) columns(std::integral_constant<int, 1>());
}

// r = scale exp(s - shift), which is added to sum.
template <class C>
FASTVAE_LOOP void shares(i64 n, C scale, C shift, C* __restrict s, C* __restrict sum) {
  const C tiny = smallest_normal(C(0));
#pragma omp simd
  for (i64 i = 0; i < n; ++i) {
    const C r = scale * exp_(s[i] - shift);
    const C kept = abs_(r) < tiny ? C(0) : r;
    s[i] = kept;
    sum[i] += kept;
  }
}

// Gradients from a block of components for kRows rows: by_z, accumulated; and the components' sums of r w and
// r w^2 (if kCentred of r (w^2 - 1)), accumulated.
template <class C, int kRows, bool kInputs, bool kParameters, bool kCentred>
FASTVAE_INLINE void slope_tile(i64 width, const C* means, const C* r, const C* z, double* by_z, C* by_mean,
                               C* by_logvar) {
  constexpr int lanes = kLanes<C>;
  Vector<C> sum[kRows] = {};
  C x[kRows];
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) x[i] = z[i];
  for (i64 j = 0; j < width; j += lanes) {
    const Vector<C> mean = *reinterpret_cast<const Vector<C>*>(means + j);
    const Vector<C> inverse = *reinterpret_cast<const Vector<C>*>(means + width + j);
    Vector<C> first = {}, second = {};
    if (kParameters) {
      first = *reinterpret_cast<Vector<C>*>(by_mean + j);
      second = *reinterpret_cast<Vector<C>*>(by_logvar + j);
    }
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const Vector<C> share = *reinterpret_cast<const Vector<C>*>(r + i * width + j),
                      w = (x[i] - mean) * inverse, rw = share * w;
      if (kInputs) sum[i] -= rw * inverse;
      if (kParameters) {
        first += rw;
        second += kCentred ? rw * w - share : rw * w;
      }
    }
    if (kParameters) {
      *reinterpret_cast<Vector<C>*>(by_mean + j) = first;
      *reinterpret_cast<Vector<C>*>(by_logvar + j) = second;
    }
  }
  if (!kInputs) return;
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
    C total = 0;
#pragma omp simd reduction(+ : total)
    for (int l = 0; l < lanes; ++l) total += sum[i][l];
    by_z[i] += total;
  }
}
template <class C, bool kInputs, bool kParameters, bool kCentred = false>
FASTVAE_LOOP void slopes(i64 dims, i64 pitch, i64 width, const C* means, const C* r, const C* z, double* by_z,
                         C* by_parameters) {
  constexpr int rows = kVectorBytes == 64 ? 8 : 4;
  for (i64 d = 0; d < dims; ++d) {
    for (i64 i = 0; i < kUnitRows; i += rows) {
      slope_tile<C, rows, kInputs, kParameters, kCentred>(
          width, means + d * pitch, r + i * width, z + d * kUnitRows + i, by_z + d * kUnitRows + i,
          by_parameters + d * 2 * width, by_parameters + d * 2 * width + width);
    }
  }
}

// A call: z (N, D), mu (U, D), logvar (U, D), log weights (U), all of compute type.
struct NormalMixture {
  Tensor z, mu, logvar, log_weight;
  i64 rows() const { return z.n0; }
  i64 dims() const { return z.n1; }
};

// A unit of rows, with rows side by side; zeros behind the last.
template <class C>
void transpose_rows(const Tensor& z, i64 first, C* to) {
  const i64 n = z.n0 - first < kUnitRows ? z.n0 - first : kUnitRows;
  for (i64 i = 0; i < kUnitRows; ++i) {
    const C* from = pointer<const C>(z.data) + (first + i) * z.s0;
    for (i64 d = 0; d < z.n1; ++d) to[d * kUnitRows + i] = i < n ? from[d * z.s1] : C(0);
  }
}

template <class C>
void mixture_rows(const NormalMixture& a, C* out, C* maximum, C* total, int threads) {
  const i64 rows = a.rows(), dims = a.dims();
  const Components<C> c(a.mu.n0, dims);
  c.pack(a.mu, a.logvar, a.log_weight, threads);
  parallel(threads, (rows + kUnitRows - 1) / kUnitRows, rows * c.count * dims, [&](i64 begin, i64 end) {
    const Scratch<C> z(dims * kUnitRows), s(kUnitRows * c.width);
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 first = unit * kUnitRows, n = rows - first < kUnitRows ? rows - first : kUnitRows;
      LogSum<C> sums[kUnitRows];
      transpose_rows(a.z, first, z.data);
      for (i64 block = 0; block < c.blocks; ++block) {
        score(dims, c.pitch, c.width, c.means(block), c.constants(block), z.data, s.data);
        for (i64 i = 0; i < n; ++i) sums[i].add(static_cast<int>(c.width), s.data + i * c.width);
      }
      for (i64 i = 0; i < n; ++i) {
        maximum[first + i] = sums[i].top;
        total[first + i] = static_cast<C>(sums[i].sum);
        out[first + i] = static_cast<C>(sums[i].value());
      }
    }
  });
}

// Destinations of gradients, contiguous and of compute type; null where not needed.
template <class C>
struct MixtureGradients {
  C *z, *mu, *logvar, *log_weight;
  bool parameters() const { return mu || logvar || log_weight; }
};

// How a sum over rows is cut: a function of the shape alone, so that its bits do not depend on threads.
struct RowParts {
  i64 added, chunks, parts;
  RowParts(i64 rows, i64 bytes) {
    added = ((rows + 3) / 4 + kUnitRows - 1) / kUnitRows * kUnitRows;
    added = added < kFewestRowsAdded ? kFewestRowsAdded : added > kRowsAdded ? kRowsAdded : added;
    chunks = (rows + added - 1) / added;
    const i64 many = chunks / 8 < kMostParts ? chunks / 8 : kMostParts, fit = kBytesOfParts / bytes;
    parts = many < kParts ? kParts : many;
    if (parts > fit) parts = fit < 4 ? 4 : fit;
    if (parts > chunks) parts = chunks;
  }
};

template <class C, bool kInputs, bool kParameters>
void mixture_slopes(const NormalMixture& a, const Components<C>& c, const Tensor& grad, const Tensor& maximum,
                    const Tensor& total, const MixtureGradients<C>& to, int threads) {
  const i64 rows = a.rows(), dims = a.dims();
  // Of a block: for each dimension the two sums of its components; then the sums of r.
  const i64 sums = 2 * dims * c.width + c.width;
  const RowParts cut(rows, static_cast<i64>(sizeof(double)) * c.blocks * sums);
  const i64 parts = kParameters ? cut.parts : cut.chunks;
  const Scratch<double> partial(kParameters ? parts * c.blocks * sums : 0);
  parallel(threads, parts, rows * c.count * dims, [&](i64 begin, i64 end) {
    const i64 units = cut.added / kUnitRows;
    const Scratch<C> z(units * dims * kUnitRows), s(kUnitRows * c.width), added(sums);
    const Scratch<double> by_z(units * dims * kUnitRows);
    for (i64 part = begin; part < end; ++part) {
      const i64 from = cut.chunks * part / parts;
      for (i64 chunk = from; chunk < cut.chunks * (part + 1) / parts; ++chunk) {
        const i64 first = chunk * cut.added, n = rows - first < cut.added ? rows - first : cut.added;
        const i64 used = (n + kUnitRows - 1) / kUnitRows;
        for (i64 unit = 0; unit < used; ++unit)
          transpose_rows(a.z, first + unit * kUnitRows, z.data + unit * dims * kUnitRows);
        for (i64 i = 0; i < units * dims * kUnitRows; ++i) by_z.data[i] = 0;
        for (i64 block = 0; block < c.blocks; ++block) {
          for (i64 i = 0; i < sums; ++i) added.data[i] = 0;
          for (i64 unit = 0; unit < used; ++unit) {
            const C* rows_of_unit = z.data + unit * dims * kUnitRows;
            score(dims, c.pitch, c.width, c.means(block), c.constants(block), rows_of_unit, s.data);
            for (i64 i = 0; i < kUnitRows; ++i) {
              const i64 row = first + unit * kUnitRows + i;
              C *r = s.data + i * c.width, scale = 0, shift = 0;
              if (row < rows) {
                const C most = pointer<const C>(maximum.data)[row * maximum.s0],
                        sum = pointer<const C>(total.data)[row * total.s0];
                shift = shift_of(most);
                scale = sum == C(0) ? C(0) : pointer<const C>(grad.data)[row * grad.s0] / sum;
              }
              if (scale == C(0)) {
                for (i64 j = 0; j < c.width; ++j) r[j] = 0;
              } else {
                shares(c.width, scale, shift, r, added.data + 2 * dims * c.width);
              }
            }
            slopes<C, kInputs, kParameters>(dims, c.pitch, c.width, c.means(block), s.data, rows_of_unit,
                                            by_z.data + unit * dims * kUnitRows, added.data);
          }
          if (!kParameters) continue;
          double* sum = partial.data + (part * c.blocks + block) * sums;
          for (i64 i = 0; i < sums; ++i)
            sum[i] = (chunk == from ? 0.0 : sum[i]) + static_cast<double>(added.data[i]);
        }
        if (!kInputs) continue;
        for (i64 i = 0; i < n; ++i) {
          const double* row = by_z.data + i / kUnitRows * dims * kUnitRows + i % kUnitRows;
          for (i64 d = 0; d < dims; ++d) to.z[(first + i) * dims + d] = static_cast<C>(row[d * kUnitRows]);
        }
      }
    }
  });
  if (!kParameters) return;
  // The last row contains the sums of r.
  parallel(threads, c.blocks * (dims + 1), parts * c.blocks * sums, [&](i64 begin, i64 end) {
    const Scratch<double> both(2 * c.width), shares_of(c.width);
    const auto add = [&](i64 block, i64 from, i64 n, double* sum) {
      fill(sum, 0.0, static_cast<int>(n));
      for (i64 part = 0; part < parts; ++part) {
        const double* p = partial.data + (part * c.blocks + block) * sums + from;
        for (i64 i = 0; i < n; ++i) sum[i] += p[i];
      }
    };
    i64 known = -1;
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 block = unit / (dims + 1), d = unit % (dims + 1), n = c.in_block(block),
                first = c.first(block);
      if (known != block) {
        add(block, 2 * dims * c.width, c.width, shares_of.data);
        known = block;
      }
      if (d == dims) {
        for (i64 i = 0; i < n && to.log_weight; ++i)
          to.log_weight[first + i] = static_cast<C>(shares_of.data[i]);
        continue;
      }
      add(block, 2 * d * c.width, 2 * c.width, both.data);
      const C* inverse = c.means(block) + d * c.pitch + c.width;
      for (i64 i = 0; i < n && to.mu; ++i)
        to.mu[(first + i) * dims + d] = static_cast<C>(both.data[i] * inverse[i]);
      for (i64 i = 0; i < n && to.logvar; ++i) {
        to.logvar[(first + i) * dims + d] =
            static_cast<C>(0.5 * (both.data[c.width + i] - shares_of.data[i]));
      }
    }
  });
}

template <class C>
void mixture_rows_backward(const NormalMixture& a, const Tensor& grad, const Tensor& maximum,
                           const Tensor& total, const MixtureGradients<C>& to, int threads) {
  const Components<C> c(a.mu.n0, a.dims());
  c.pack(a.mu, a.logvar, a.log_weight, threads);
  if (!to.parameters()) {
    mixture_slopes<C, true, false>(a, c, grad, maximum, total, to, threads);
  } else if (!to.z) {
    mixture_slopes<C, false, true>(a, c, grad, maximum, total, to, threads);
  } else {
    mixture_slopes<C, true, true>(a, c, grad, maximum, total, to, threads);
  }
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
