// The three products of a linear layer: outputs = h W' + bias, and from the outputs' gradients those of h and
// of W. Uses torch's BLAS, or in float with AVX2 and AVX-512 the tiles below, where use_tiles() says so.
#pragma once

#include "common.hpp"
#include "products.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// A tile's rows, of two vectors each: as many as stay in the 32 or 16 registers.
constexpr int kTallest = FASTVAE_VECTOR_BYTES == 64 ? 14 : 6;

#if FASTVAE_VECTOR_BYTES >= 32

// Vectors of floats, and which of a vector's elements are read and written.
#if FASTVAE_VECTOR_BYTES == 64
using Floats = __m512;
using Mask = __mmask16;
constexpr bool kMasksAreFree = true;
FASTVAE_INLINE Mask mask_of(i64 n) { return static_cast<Mask>((1u << n) - 1); }
FASTVAE_INLINE Floats load_floats(const float* from) { return _mm512_loadu_ps(from); }
FASTVAE_INLINE Floats load_floats(const float* from, Mask mask) { return _mm512_maskz_loadu_ps(mask, from); }
FASTVAE_INLINE void store_floats(float* to, Floats v) { _mm512_storeu_ps(to, v); }
FASTVAE_INLINE void store_floats(float* to, Floats v, Mask mask) { _mm512_mask_storeu_ps(to, mask, v); }
FASTVAE_INLINE Floats spread_float(float v) { return _mm512_set1_ps(v); }
FASTVAE_INLINE Floats zero_floats() { return _mm512_setzero_ps(); }
FASTVAE_INLINE Floats add_floats(Floats a, Floats b) { return _mm512_add_ps(a, b); }
FASTVAE_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
#else
using Floats = __m256;
using Mask = __m256i;
constexpr bool kMasksAreFree = false;  // a mask takes one of sixteen registers
FASTVAE_INLINE Mask mask_of(i64 n) {
  static const std::int32_t ones_then_zeros[16] = {-1, -1, -1, -1, -1, -1, -1, -1};
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(ones_then_zeros + 8 - n));
}
FASTVAE_INLINE Floats load_floats(const float* from) { return _mm256_loadu_ps(from); }
FASTVAE_INLINE Floats load_floats(const float* from, Mask mask) { return _mm256_maskload_ps(from, mask); }
FASTVAE_INLINE void store_floats(float* to, Floats v) { _mm256_storeu_ps(to, v); }
FASTVAE_INLINE void store_floats(float* to, Floats v, Mask mask) { _mm256_maskstore_ps(to, mask, v); }
FASTVAE_INLINE Floats spread_float(float v) { return _mm256_set1_ps(v); }
FASTVAE_INLINE Floats zero_floats() { return _mm256_setzero_ps(); }
FASTVAE_INLINE Floats add_floats(Floats a, Floats b) { return _mm256_add_ps(a, b); }
FASTVAE_INLINE Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
#endif

constexpr int kMiddle = FASTVAE_VECTOR_BYTES == 64 ? 8 : 3;
constexpr i64 kWidth = FASTVAE_VECTOR_BYTES / 4, kPanel = 2 * kWidth, kDepth = 512;

// GCC's first scheduling pass would gather the loads of a step and have no registers left for the sums.
#if defined(__GNUC__) && !defined(__clang__)
#pragma GCC push_options
#pragma GCC optimize("no-schedule-insns")
#endif

// c (kRows x up to kVectors vectors) = first + sum_p a(i, p) b(p, j), or adds that to c. With kByRows the
// elements of a row of `a` are contiguous and rows are a_stride apart; otherwise the elements of a step are
// contiguous, and steps a_stride apart. The last vector has the elements of `last`, or all if kWhole.
template <int kRows, int kVectors, bool kByRows, bool kWhole>
FASTVAE_INLINE void product_tile(i64 depth, const float* a, i64 a_stride, const float* b, i64 b_step,
                                 Mask last, const float* first, bool add, float* c, i64 c_row) {
  const auto load = [&](const float* from, int v) FASTVAE_INLINED {
    return kWhole || v + 1 < kVectors ? load_floats(from + kWidth * v) : load_floats(from + kWidth * v, last);
  };
  Floats sum[kRows][kVectors];
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) sum[i][v] = first ? load(first, v) : zero_floats();
  }
  // Three rows share a pointer: the others are one and two strides away.
  constexpr int kPointers = (kRows + 2) / 3;
  const float* base[kPointers];
#pragma GCC unroll 5
  for (int i = 0; i < kPointers; ++i) base[i] = kByRows ? a + 3 * i * a_stride : a;
  for (i64 p = 0; p < depth; ++p, b += b_step) {
    Floats right[kVectors];
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) right[v] = load(b, v);
#pragma GCC unroll 16
    for (int i = 0; i < kRows; ++i) {
      const Floats left = spread_float(kByRows ? base[i / 3][(i % 3) * a_stride] : base[0][i]);
#pragma GCC unroll 2
      for (int v = 0; v < kVectors; ++v) sum[i][v] = multiply_add(left, right[v], sum[i][v]);
    }
#pragma GCC unroll 5
    for (int i = 0; i < (kByRows ? kPointers : 1); ++i) base[i] += kByRows ? 1 : a_stride;
  }
#pragma GCC unroll 16
  for (int i = 0; i < kRows; ++i) {
#pragma GCC unroll 2
    for (int v = 0; v < kVectors; ++v) {
      float* to = c + i * c_row;
      if (add) sum[i][v] = add_floats(sum[i][v], load(to, v));
      to += kWidth * v;
      kWhole || v + 1 < kVectors ? store_floats(to, sum[i][v]) : store_floats(to, sum[i][v], last);
    }
  }
}

// The same for any number of rows.
template <int kVectors, bool kByRows, bool kWhole>
__attribute__((noinline)) void product_strip(i64 rows, i64 depth, const float* a, i64 a_stride,
                                             const float* b, i64 b_step, i64 width, const float* first,
                                             bool add, float* c, i64 c_row) {
  const Mask last = mask_of(width - (kVectors - 1) * kWidth);
  i64 i = 0;
  const auto tiles = [&](auto height) FASTVAE_INLINED {
    constexpr int kRows = decltype(height)::value;
    for (; i + kRows <= rows; i += kRows) {
      const float* from = kByRows ? a + i * a_stride : a + i;
      product_tile<kRows, kVectors, kByRows, kWhole>(depth, from, a_stride, b, b_step, last, first, add,
                                                     c + i * c_row, c_row);
    }
  };
  tiles(std::integral_constant<int, kTallest>());
  tiles(std::integral_constant<int, kMiddle>());
  if (kMiddle > 4) tiles(std::integral_constant<int, 4>());
  if (kMiddle > 3) tiles(std::integral_constant<int, 3>());
  tiles(std::integral_constant<int, 2>());
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
    const i64 width = columns - j < kPanel ? columns - j : kPanel;
    const float *panel = b + (b_panel ? j / kPanel * b_panel : j), *start = first ? first + j : nullptr;
    const auto strip = [&](auto vectors, auto whole) FASTVAE_INLINED {
      product_strip<decltype(vectors)::value, kByRows, decltype(whole)::value>(
          rows, depth, a, a_stride, panel, b_step, width, start, add, c + j, c_row);
    };
    if (width == kPanel && !kMasksAreFree) {
      strip(std::integral_constant<int, 2>(), std::true_type());
    } else if (width > kWidth) {
      strip(std::integral_constant<int, 2>(), std::false_type());
    } else {
      strip(std::integral_constant<int, 1>(), std::false_type());
    }
  }
}

#endif

// A layer's weight (X, H), rows `stride` apart.
template <class C>
struct Layer {
  const C *weight, *bias;  // the bias (X) or null
  i64 stride, columns, inner;
  // Strips of kPanel outputs, and for to_inputs() of kPanel inputs; the elements of a step are contiguous.
  const C *packed = nullptr, *packed_back = nullptr;

  // Number of elements that pack() needs.
  i64 packed_size([[maybe_unused]] bool backward) const {
#if FASTVAE_VECTOR_BYTES >= 32
    if (std::is_same<C, float>::value && use_tiles())
      return padded(columns) * inner + (backward ? padded(inner) * columns : 0);
#endif
    return 0;
  }
  void pack([[maybe_unused]] bool backward, [[maybe_unused]] C* to, [[maybe_unused]] int threads) {
#if FASTVAE_VECTOR_BYTES >= 32
    if constexpr (std::is_same<C, float>::value) {
      if (!use_tiles()) return;
      packed = to;
      strips(columns, inner, stride, 1, to, threads);
      if (!backward) return;
      packed_back = to += padded(columns) * inner;
      strips(inner, columns, 1, stride, to, threads);
    }
#endif
  }
#if FASTVAE_VECTOR_BYTES >= 32
  static i64 padded(i64 size) { return (size + kPanel - 1) / kPanel * kPanel; }
  // Copies the weight in strips; columns are `across` apart in it, and steps `along`.
  void strips(i64 size, i64 depth, i64 across, i64 along, C* to, int threads) const {
    parallel(threads, padded(size) / kPanel, size * depth, [=](i64 begin, i64 end) {
      for (i64 j = begin * kPanel; j < end * kPanel; ++j) {
        C* column = to + j / kPanel * kPanel * depth + j % kPanel;
        for (i64 p = 0; p < depth; ++p) column[p * kPanel] = j < size ? weight[j * across + p * along] : C(0);
      }
    });
  }
#endif

  // Computes out (n, X) from h (n, H), rows `h_row` apart.
  void outputs(i64 n, const C* h, i64 h_row, C* out) const {
#if FASTVAE_VECTOR_BYTES >= 32
    if constexpr (std::is_same<C, float>::value) {
      if (use_tiles())
        return product<true>(n, columns, inner, h, h_row, packed, kPanel, kPanel * inner, bias, false, out,
                             columns);
    }
#endif
    for (i64 i = 0; i < n && bias; ++i) copy(out + i * columns, bias, static_cast<int>(columns));
    gemm('T', 'N', columns, n, inner, weight, stride, h, h_row, bias ? C(1) : C(0), out, columns);
  }
  // Computes the gradient of h (n, H) from that of the outputs (n, X); adds to the existing values, or not.
  void to_inputs(i64 n, const C* grad, bool add, C* to) const {
#if FASTVAE_VECTOR_BYTES >= 32
    if constexpr (std::is_same<C, float>::value) {
      if (use_tiles()) {
        for (i64 p = 0; p < columns; p += kDepth) {
          const i64 depth = columns - p < kDepth ? columns - p : kDepth;
          product<true>(n, inner, depth, grad + p, columns, packed_back + p * kPanel, kPanel,
                        kPanel * columns, nullptr, add || p > 0, to, inner);
        }
        return;
      }
    }
#endif
    gemm('N', 'N', inner, n, columns, weight, stride, grad, columns, add ? C(1) : C(0), to, inner);
  }
  // Computes the gradient of the weight (X, H).
  void to_weight(i64 n, const C* h, const C* grad, bool add, C* to) const {
#if FASTVAE_VECTOR_BYTES >= 32
    if constexpr (std::is_same<C, float>::value) {
      if (use_tiles()) {
        // A few outputs at a time: their gradients stay in the first-level cache.
        constexpr i64 kOutputs = kTallest * (kTallest > 8 ? 4 : 8);
        for (i64 i = 0; i < columns; i += kOutputs) {
          const i64 rows = columns - i < kOutputs ? columns - i : kOutputs;
          product<false>(rows, inner, n, grad + i, columns, h, inner, 0, nullptr, add, to + i * inner, inner);
        }
        return;
      }
    }
#endif
    gemm('N', 'T', inner, columns, n, h, inner, grad, columns, add ? C(1) : C(0), to, inner);
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
