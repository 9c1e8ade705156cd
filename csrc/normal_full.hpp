// Reparameterised sampling with a full covariance, and the density of the samples. See
// fastvae/ops/normal_full.py for the mathematics. A row's samples are a product with a triangular matrix:
// lanes are the columns of the result, and steps end where the triangle does.
#pragma once

#include "common.hpp"
#include "elementary.hpp"
#include "random.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// Maximum and minimum samples per unit of work, and the noise values per unit between them; a block of a sum
// over samples has the maximum.
constexpr i64 kMostDraws = 64, kFewestDraws = 16, kNumbersDrawn = 16384;
// Rows of L whose gradients a unit computes; and products added sequentially.
constexpr i64 kScaleRows = 64, kStepsAdded = 128;

// c (kRows x kVectors vectors) = sum_p a(i, p) b(p, v), or adds that to c. Rows of `a` are a_row apart, steps
// a_step.
template <class C, int kRows, int kVectors>
FASTVAE_INLINE void triangle_tile(i64 steps, const C* a, i64 a_row, i64 a_step, const C* b, i64 b_step,
                                  bool add, C* c, i64 c_row) {
  constexpr int lanes = kLanes<C>;
  Vector<C> sum[kRows][kVectors] = {};
  for (i64 p = 0; p < steps; ++p, a += a_step, b += b_step) {
    Vector<C> right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = *reinterpret_cast<const Vector<C>*>(b + v * lanes);
#pragma GCC unroll 8
    for (int i = 0; i < kRows; ++i) {
      const C left = a[i * a_row];
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] += left * right[v];
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      Vector<C>* to = reinterpret_cast<Vector<C>*>(c + i * c_row + v * lanes);
      *to = add ? *to + sum[i][v] : sum[i][v];
    }
  }
}

// Calls f(number of rows as a compile-time constant, index of the first) until `rows` are done.
template <class F>
FASTVAE_INLINE void by_tiles(i64 rows, F f) {
  i64 i = 0;
  for (; i + 8 <= rows; i += 8) f(std::integral_constant<int, 8>(), i);
  for (; i + 2 <= rows; i += 2) f(std::integral_constant<int, 2>(), i);
  for (; i < rows; ++i) f(std::integral_constant<int, 1>(), i);
}

// One panel of L eps: c (draws x a panel), from eps (draws x steps) and adjacent columns of L.
template <class C>
FASTVAE_LOOP void times_panel(i64 draws, i64 steps, const C* eps, i64 eps_row, const C* panel, C* c,
                              i64 c_row) {
  constexpr i64 width = kTileVectors * kLanes<C>;
  for (i64 p = 0; p < steps || p == 0; p += kStepsAdded) {
    const i64 n = steps - p < kStepsAdded ? steps - p : kStepsAdded;
    by_tiles(draws, [=](auto rows, i64 k) FASTVAE_INLINED {
      triangle_tile<C, decltype(rows)::value, kTileVectors>(
          n, eps + k * eps_row + p, eps_row, 1, panel + p * width, width, p > 0, c + k * c_row, c_row);
    });
  }
}

// Products of each pair of columns i >= j of a triangle, summed over draws: stored in c(i, j), or added. Row
// i is the triangle's row first + i.
template <class C>
FASTVAE_LOOP void products_below(i64 draws, i64 rows, i64 first, const C* grad, i64 grad_row, const C* eps,
                                 i64 eps_row, bool add, C* c, i64 c_row) {
  constexpr i64 lanes = kLanes<C>;
  by_tiles(rows, [=](auto number, i64 i) FASTVAE_INLINED {
    constexpr int kRows = decltype(number)::value;
    const i64 columns = first + i + kRows;
    i64 j = 0;
    for (; j + (kTileVectors - 1) * lanes < columns; j += kTileVectors * lanes) {
      triangle_tile<C, kRows, kTileVectors>(draws, grad + i, 1, grad_row, eps + j, eps_row, add,
                                            c + i * c_row + j, c_row);
    }
    if (kTileVectors > 1 && j < columns) {
      triangle_tile<C, kRows, 1>(draws, grad + i, 1, grad_row, eps + j, eps_row, add, c + i * c_row + j,
                                 c_row);
    }
  });
}

template <class C>
FASTVAE_LOOP void squares(int n, const C* __restrict x, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = x[i] * x[i];
}
template <class T>
FASTVAE_LOOP void add_mean(int n, const compute_t<T>* __restrict move, const compute_t<T>* __restrict mean,
                           T* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) assign(out[i], mean[i] + move[i]);
}

// Index of the first element of row i of a packed triangle.
inline i64 triangle(i64 i) { return i * (i + 1) / 2; }

// L of one row of the batch, packed.
template <class T>
struct Triangle {
  using C = compute_t<T>;
  const T* data;
  i64 stride;
  C operator()(i64 i, i64 j) const { return upcast(data[(triangle(i) + j) * stride]); }
  C diagonal(i64 i) const { return exp_((*this)(i, i)); }

  // Returns rows [first, first + width) as adjacent columns; zeros above the diagonal and beyond the last
  // row.
  void panel(i64 first, i64 width, i64 rows, C* to) const {
    const i64 last = first + width < rows ? first + width : rows;
    for (i64 j = first; j < last; ++j) {
      for (i64 i = 0; i < width; ++i) to[j * width + i] = 0;
    }
    for (i64 i = first; i < last; ++i) {
      const T* row = data + triangle(i) * stride;
      for (i64 j = 0; j < i; ++j) to[j * width + i - first] = upcast(row[j * stride]);
      to[i * width + i - first] = diagonal(i);
    }
    for (i64 i = last; i < first + width; ++i) {
      for (i64 j = 0; j < last; ++j) to[j * width + i - first] = 0;
    }
  }
};

template <class T>
void full_draws(Output z, Output log_q, Output kept, const Tensor& mu, const Tensor& tril, std::uint64_t seed,
                const Place& place, int threads) {
  using C = compute_t<T>;
  constexpr i64 width = kTileVectors * kLanes<C>;
  const i64 rows = mu.n0, dims = mu.n1, samples = place.samples, columns = (dims + width - 1) / width * width;
  i64 most = kNumbersDrawn / (dims > 0 ? dims : 1);
  most = most > kMostDraws ? kMostDraws : most < kFewestDraws ? kFewestDraws : most;
  const i64 chunks = (samples + most - 1) / most;
  parallel(threads, rows * chunks, samples * rows * dims * (1 + dims / 64), [&](i64 begin, i64 end) {
    Noise<C> noise(Key(seed), place.sample_offset, place.row_offset);
    const Scratch<C> panel(dims * width), moves(most * columns), mean_buffer(dims),
        own(kept ? 0 : most * dims);
    alignas(kVectorBytes) C terms[kBuffer];
    double sums[kMostDraws];
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 b = unit / chunks, first = unit % chunks * most,
                draws = samples - first < most ? samples - first : most;
      C* eps = kept ? pointer<C>(kept) + (b * samples + first) * dims : own.data;
      fill(sums, 0.0, static_cast<int>(draws));
      const i64 height = rows_per_tile(draws, dims);
      for (i64 column = 0; column < dims; column += kTile) {
        for (i64 k = 0; k < draws; k += height) {
          const Tile t = tile_of(draws, k, height, dims, column);
          noise.shape(column, t);
          const C* drawn = noise.of_samples(first + k, b);
          for (int r = 0; r < t.rows; ++r) copy(eps + (k + r) * dims + column, drawn + r * t.pitch, t.n);
          squares(t.size(), drawn, terms);
          add_row_sums(terms, t, sums + k);
        }
      }
      const Triangle<T> scale{pointer<const T>(tril.data) + b * tril.s0, tril.s1};
      for (i64 i = 0; i < dims; i += width) {
        scale.panel(i, width, dims, panel.data);
        times_panel(draws, i + width < dims ? i + width : dims, eps, dims, panel.data, moves.data + i,
                    columns);
      }
      const C* mean =
          load(mean_buffer.data, pointer<const T>(mu.data) + b * mu.s0, mu.s1, static_cast<int>(dims));
      double logs = 0;
      for (i64 i = 0; i < dims; ++i) logs += static_cast<double>(scale(i, i)) + kHalfLog2Pi;
      for (i64 k = 0; k < draws; ++k) {
        const i64 row = (first + k) * rows + b;
        add_mean(static_cast<int>(dims), moves.data + k * columns, mean, pointer<T>(z) + row * dims);
        pointer<C>(log_q)[row] = static_cast<C>(-0.5 * sums[k] - logs);
      }
    }
  });
}

template <class T>
void full_gradients(Output to_mu, Output to_tril, const Tensor& grad_z, const Tensor& grad_log_q,
                    const Tensor& kept, const Tensor& mu, const Tensor& tril, const Place& place,
                    int threads) {
  using C = compute_t<T>;
  constexpr i64 lanes = kLanes<C>;
  const i64 rows = mu.n0, dims = mu.n1, samples = grad_z.data ? place.samples : 0,
            blocks = (dims + kScaleRows - 1) / kScaleRows;
  const bool with_scale = to_tril && samples > 0;
  const i64 columns = (dims + lanes - 1) / lanes * lanes;
  parallel(threads, rows * blocks, samples * rows * dims * (1 + dims / 64), [&](i64 begin, i64 end) {
    const Scratch<C> sums(kScaleRows * columns), grads(kMostDraws * kScaleRows),
        noise(with_scale ? kMostDraws * columns : 0);
    double total[kScaleRows];
    // Elements beyond a row may be multiplied; their results are never read.
    if (with_scale) fill(noise.data, C(0), static_cast<int>(kMostDraws * columns));
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 b = unit / blocks, first = unit % blocks * kScaleRows;
      const i64 height = dims - first < kScaleRows ? dims - first : kScaleRows, last = first + height;
      fill(total, 0.0, static_cast<int>(height));
      for (i64 k = 0; k < samples; k += kMostDraws) {
        const i64 draws = samples - k < kMostDraws ? samples - k : kMostDraws;
        for (i64 r = 0; r < draws; ++r) {
          const T* from =
              pointer<const T>(grad_z.data) + (k + r) * grad_z.s0 + b * grad_z.s1 + first * grad_z.s2;
          C* row = grads.data + r * kScaleRows;
          const C* loaded = load(row, from, grad_z.s2, static_cast<int>(height));
          if (loaded != row) copy(row, loaded, static_cast<int>(height));
          add_to(static_cast<int>(height), row, total);
          if (with_scale)
            copy(noise.data + r * columns, pointer<const C>(kept.data) + (b * samples + k + r) * dims,
                 static_cast<int>(last));
        }
        if (with_scale)
          products_below(draws, height, first, grads.data, kScaleRows, noise.data, columns, k > 0, sums.data,
                         columns);
      }
      if (to_mu) {
        T* to = pointer<T>(to_mu) + b * dims + first;
        for (i64 i = 0; i < height; ++i) assign(to[i], static_cast<C>(total[i]));
      }
      if (!to_tril) continue;
      double arrives = 0;
      for (i64 k = 0; k < place.samples && grad_log_q.data; ++k)
        arrives += pointer<const C>(grad_log_q.data)[k * grad_log_q.s0 + b * grad_log_q.s1];
      const Triangle<T> scale{pointer<const T>(tril.data) + b * tril.s0, tril.s1};
      T* to = pointer<T>(to_tril) + b * triangle(dims) + triangle(first);
      for (i64 i = 0; i < height; to += first + i + 1, ++i) {
        const C* row = sums.data + i * columns;
        const i64 diagonal = first + i;
        for (i64 j = 0; j < diagonal; ++j) assign(to[j], with_scale ? row[j] : C(0));
        const C slope = with_scale ? scale.diagonal(diagonal) * row[diagonal] : C(0);
        assign(to[diagonal], static_cast<C>(static_cast<double>(slope) - arrives));
      }
    }
  });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
