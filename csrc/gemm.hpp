// The three products of a linear layer: outputs = h W' + bias, and from the outputs' gradients those of h and
// of W. Uses torch's BLAS; in float with AVX-512 separate tiles, since that BLAS leaves half of the vectors'
// width unused on AMD's processors (measured: 107 and 250 of 255 GFLOP/s per core; docs/log.md).
#pragma once

#include "common.hpp"
#include "products.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

#if FASTVAE_VECTOR_BYTES == 64

constexpr i64 kPanel = 32, kDepth = 512;

// GCC's first scheduling pass would gather the loads of a step and have no registers left for the sums.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("no-schedule-insns")
#endif

// c (kRows x up to 16 kVectors) = first + sum_p a(i, p) b(p, j), or adds that to c. With kByRows the elements
// of a row of `a` are contiguous and rows are a_stride apart; otherwise the elements of a step are
// contiguous, and steps a_stride apart. A tile of 14 x 32 stays in registers.
template <int kRows, int kVectors, bool kByRows>
FASTVAE_INLINE void product_tile(i64 depth, const float* a, i64 a_stride, const float* b, i64 b_step,
                                 __mmask16 last, const float* first, bool add, float* c, i64 c_row) {
  const __mmask16 masks[2] = {kVectors == 1 ? last : static_cast<__mmask16>(0xffff), last};
  __m512 sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v)
      sum[i][v] = first ? _mm512_maskz_loadu_ps(masks[v], first + 16 * v) : _mm512_setzero_ps();
  }
  // Three rows share a pointer: the others are one and two strides away.
  constexpr int kPointers = (kRows + 2) / 3;
  const float* base[kPointers];
#pragma GCC unroll 5
  for (int i = 0; i < kPointers; ++i) base[i] = kByRows ? a + 3 * i * a_stride : a;
  for (i64 p = 0; p < depth; ++p, b += b_step) {
    __m512 right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = _mm512_maskz_loadu_ps(masks[v], b + 16 * v);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const __m512 left = _mm512_set1_ps(kByRows ? base[i / 3][(i % 3) * a_stride] : base[0][i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_fmadd_ps(left, right[v], sum[i][v]);
    }
#pragma GCC unroll 5
    for (int i = 0; i < (kByRows ? kPointers : 1); ++i) base[i] += kByRows ? 1 : a_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + i * c_row + 16 * v;
      if (add) sum[i][v] = _mm512_add_ps(sum[i][v], _mm512_maskz_loadu_ps(masks[v], to));
      _mm512_mask_storeu_ps(to, masks[v], sum[i][v]);
    }
  }
}

// The same for any number of rows.
template <int kVectors, bool kByRows>
__attribute__((noinline)) void product_strip(i64 rows, i64 depth, const float* a, i64 a_stride,
                                             const float* b, i64 b_step, __mmask16 last, const float* first,
                                             bool add, float* c, i64 c_row) {
  i64 i = 0;
  const auto tiles = [&](auto height) FASTVAE_INLINED {
    constexpr int kRows = decltype(height)::value;
    for (; i + kRows <= rows; i += kRows) {
      const float* from = kByRows ? a + i * a_stride : a + i;
      product_tile<kRows, kVectors, kByRows>(depth, from, a_stride, b, b_step, last, first, add,
                                             c + i * c_row, c_row);
    }
  };
  tiles(std::integral_constant<int, 14>());
  tiles(std::integral_constant<int, 8>());
  tiles(std::integral_constant<int, 4>());
  tiles(std::integral_constant<int, 1>());
}

#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC pop_options
#endif

// And any number of columns, strip by strip: strips are b_panel apart where b is packed, else adjacent.
template <bool kByRows>
void product(i64 rows, i64 columns, i64 depth, const float* a, i64 a_stride, const float* b, i64 b_step,
             i64 b_panel, const float* first, bool add, float* c, i64 c_row) {
  for (i64 j = 0; j < columns; j += kPanel) {
    const i64 left = columns - j;
    const float *panel = b + (b_panel ? j / kPanel * b_panel : j), *start = first ? first + j : nullptr;
    const i64 width = left < kPanel ? left : kPanel;
    if (width > 16) {
      const auto last = static_cast<__mmask16>((1u << (width - 16)) - 1);
      product_strip<2, kByRows>(rows, depth, a, a_stride, panel, b_step, last, start, add, c + j, c_row);
    } else {
      const auto last = static_cast<__mmask16>((1u << width) - 1);
      product_strip<1, kByRows>(rows, depth, a, a_stride, panel, b_step, last, start, add, c + j, c_row);
    }
  }
}

#endif

// A layer's weight (X, H), rows `stride` apart.
template <class C>
struct Layer {
  const C *weight, *bias;  // the bias (X) or null
  i64 stride, columns, inner;
  const C* packed = nullptr;  // strips of kPanel outputs, the elements of a step contiguous

  // Number of elements that pack() needs.
  i64 packed_size() const {
#if FASTVAE_VECTOR_BYTES == 64
    if (std::is_same<C, float>::value) return (columns + kPanel - 1) / kPanel * kPanel * inner;
#endif
    return 0;
  }
  void pack([[maybe_unused]] C* to, [[maybe_unused]] int threads) {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (std::is_same<C, float>::value) {
      packed = to;
      parallel(threads, (columns + kPanel - 1) / kPanel, columns * inner, [&](i64 begin, i64 end) {
        for (i64 j = begin * kPanel; j < end * kPanel; ++j) {
          C* column = to + j / kPanel * kPanel * inner + j % kPanel;
          for (i64 p = 0; p < inner; ++p) column[p * kPanel] = j < columns ? weight[j * stride + p] : C(0);
        }
      });
    }
#endif
  }

  // Computes out (n, X) from h (n, H).
  void outputs(i64 n, const C* h, C* out) const {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (std::is_same<C, float>::value)
      return product<true>(n, columns, inner, h, inner, packed, kPanel, kPanel * inner, bias, false, out,
                           columns);
#endif
    for (i64 i = 0; i < n && bias; ++i) copy(out + i * columns, bias, static_cast<int>(columns));
    gemm('T', 'N', columns, n, inner, weight, stride, h, inner, bias ? C(1) : C(0), out, columns);
  }
  // Computes the gradient of h (n, H) from that of the outputs (n, X); adds to the existing values, or not.
  void to_inputs(i64 n, const C* grad, bool add, C* to) const {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (std::is_same<C, float>::value) {
      for (i64 p = 0; p < columns; p += kDepth) {
        const i64 depth = columns - p < kDepth ? columns - p : kDepth;
        product<true>(n, inner, depth, grad + p, columns, weight + p * stride, stride, 0, nullptr,
                      add || p > 0, to, inner);
      }
      return;
    }
#endif
    gemm('N', 'N', inner, n, columns, weight, stride, grad, columns, add ? C(1) : C(0), to, inner);
  }
  // Computes the gradient of the weight (X, H).
  void to_weight(i64 n, const C* h, const C* grad, bool add, C* to) const {
#if FASTVAE_VECTOR_BYTES == 64
    if constexpr (std::is_same<C, float>::value) {
      // A few outputs at a time: their gradients stay in the first-level cache.
      constexpr i64 kOutputs = 56;
      for (i64 i = 0; i < columns; i += kOutputs) {
        const i64 rows = columns - i < kOutputs ? columns - i : kOutputs;
        product<false>(rows, inner, n, grad + i, columns, h, inner, 0, nullptr, add, to + i * inner, inner);
      }
      return;
    }
#endif
    gemm('N', 'T', inner, columns, n, h, inner, grad, columns, add ? C(1) : C(0), to, inner);
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
