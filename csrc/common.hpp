// Storage types, loads and stores, and sums. Loops marked `omp simd` run over a tile of a row; everything
// they call is branch-free, so that they vectorise.
#pragma once

#include <cstdint>
#include <cstring>
#include <limits>
#include <new>
#include <type_traits>
#ifdef __SSE2__
#include <immintrin.h>
#endif

#include "target.hpp"
#include "parallel.hpp"
#include "arguments.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// Marks a loop over a tile as a separate function: inlined into another, GCC forgets that its pointers do not
// overlap and leaves it scalar. (`inline`: several units may define it.)
#define FASTVAE_LOOP inline __attribute__((noinline))

// Marks functions called per element by such loops: one call that is not inlined leaves the loop scalar. Left
// to itself, GCC stops inlining when a file has grown by some share.
#define FASTVAE_INLINE inline __attribute__((always_inline))
#define FASTVAE_INLINED __attribute__((always_inline))  // for a lambda

// Columns processed at a time: a few buffers of this length stay in the first-level cache.
constexpr int kTile = 1024;

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

// The type in which a storage type is computed and summed.
template <class T>
struct Compute {
  using type = float;
};
template <>
struct Compute<double> {
  using type = double;
};
template <class T>
using compute_t = typename Compute<T>::type;

template <class To, class From>
FASTVAE_INLINE To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

FASTVAE_INLINE double upcast(double v) { return v; }
template <class T>
FASTVAE_INLINE std::enable_if_t<std::is_integral<T>::value, T> upcast(T v) {
  return v;
}
FASTVAE_INLINE float upcast(float v) { return v; }
FASTVAE_INLINE float upcast(bf16 v) { return bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16); }
FASTVAE_INLINE float upcast(f16 v) {
  // Shift the exponent into place; infinities and NaN get the rest of it, a subtraction renormalises
  // subnormals.
  const std::uint32_t magnitude = (v.bits & 0x7fffu) << 13;
  const std::uint32_t exponent = magnitude & (0x7c00u << 13);
  const std::uint32_t normal = magnitude + (112u << 23);
  const float subnormal = bit_cast<float>(normal + (1u << 23)) - bit_cast<float>(113u << 23);
  std::uint32_t bits = exponent == (0x7c00u << 13) ? normal + (112u << 23) : normal;
  bits = exponent == 0 ? bit_cast<std::uint32_t>(subnormal) : bits;
  return bit_cast<float>(bits | (static_cast<std::uint32_t>(v.bits & 0x8000u) << 16));
}

FASTVAE_INLINE void assign(double& to, double v) { to = v; }
FASTVAE_INLINE void assign(float& to, float v) { to = v; }
FASTVAE_INLINE void assign(bf16& to, float v) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(v);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
FASTVAE_INLINE void assign(f16& to, float v) {
  const std::uint32_t all = bit_cast<std::uint32_t>(v), sign = all & 0x80000000u, bits = all ^ sign;
  const std::uint32_t magic = ((127u - 15u) + (23u - 10u) + 1u)
                              << 23;  // adding it rounds to the last digit of the subnormals
  const std::uint32_t subnormal =
      bit_cast<std::uint32_t>(bit_cast<float>(bits) + bit_cast<float>(magic)) - magic;
  const std::uint32_t normal = (bits + ((15u - 127u) << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  std::uint32_t half = bits < (113u << 23) ? subnormal : normal;
  half = bits >= (143u << 23) ? (bits > 0x7f800000u ? 0x7e00u : 0x7c00u) : half;
  to.bits = static_cast<std::uint16_t>(half | (sign >> 16));
}

// A matrix or a stack of matrices anywhere in memory: address of the first element and strides in elements.
template <class T>
struct View {
  T* data;
  i64 s0, s1, s2;
  explicit operator bool() const { return data != nullptr; }
  T* at(i64 i, i64 j) const { return data + i * s0 + j * s1; }
  T* at(i64 i, i64 j, i64 l) const { return data + i * s0 + j * s1 + l * s2; }
};

template <class T>
inline View<T> view(const Tensor& m) {
  return {reinterpret_cast<T*>(m.data), m.s0, m.s1, m.s2};
}
template <class T>
inline T* pointer(address a) {
  return reinterpret_cast<T*>(a);
}

struct Yes {
  static constexpr bool value = true;
};
struct No {
  static constexpr bool value = false;
};

template <class C>
inline void fill(C* p, C value, int n) {
  for (int i = 0; i < n; ++i) p[i] = value;
}

// One vector of the instruction set, at any address. clang would drop the attributes of an alias template.
constexpr int kVectorBytes = FASTVAE_VECTOR_BYTES;
template <class C>
struct VectorOf {
  typedef C type __attribute__((vector_size(kVectorBytes), aligned(sizeof(C)), may_alias));
};
template <class C>
using Vector = typename VectorOf<C>::type;
template <class C>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(C));
// A whole vector may be read beyond a tile's last element.
constexpr int kBuffer = kTile + 16;

// Copies a short row in whole vectors, the last of which overlaps the one before.
template <class C>
inline void copy(C* to, const C* from, int n) {
  constexpr int step = kLanes<C>;
  if (n < step) {
    for (int i = 0; i < n; ++i) to[i] = from[i];
    return;
  }
  for (int i = 0; i < n - step; i += step) {
    *reinterpret_cast<Vector<C>*>(to + i) = *reinterpret_cast<const Vector<C>*>(from + i);
  }
  *reinterpret_cast<Vector<C>*>(to + n - step) = *reinterpret_cast<const Vector<C>*>(from + n - step);
}

// Returns n elements from p in the compute type: p itself where no conversion is needed, else the filled
// buffer.
template <class T>
inline const compute_t<T>* load(compute_t<T>* __restrict buffer, const T* p, i64 stride, int n) {
  if constexpr (sizeof(T) == sizeof(compute_t<T>)) {
    if (stride == 1) return p;
  }
  if (stride == 1) {
#pragma omp simd
    for (int i = 0; i < n; ++i) buffer[i] = upcast(p[i]);
  } else if (stride == 0) {
    fill(buffer, upcast(*p), n);
  } else {
    for (int i = 0; i < n; ++i) buffer[i] = upcast(p[i * stride]);
  }
  return buffer;
}

// Buffer for n results whose destination p is contiguous: p itself or `buffer`; commit() stores them.
template <class T>
FASTVAE_INLINE compute_t<T>* target(T* p, compute_t<T>* buffer) {
  if constexpr (sizeof(T) == sizeof(compute_t<T>)) {
    return p;
  } else {
    return buffer;
  }
}
template <class T>
inline void commit(T* __restrict p, const compute_t<T>* __restrict buffer, int n) {
  if constexpr (sizeof(T) != sizeof(compute_t<T>)) {
#pragma omp simd
    for (int i = 0; i < n; ++i) assign(p[i], buffer[i]);
  }
}

// A tile: `rows` rows of n columns each, `pitch` elements apart in buffers. Loops run over all of it at once,
// including the few elements between rows, whose results are never read.
struct Tile {
  int rows, n, pitch;
  int size() const { return (rows - 1) * pitch + n; }
  bool dense(i64 stride) const { return rows == 1 || (pitch == n && stride == n); }
};

// Returns the tile of a strided matrix that begins at p in the compute type, in place where possible. In half
// precision it is a separate function, as commit() is: inlined wherever a tile is read or written, the
// conversions were a third of the code of a draw.
template <class T>
inline const compute_t<T>* load_rows(compute_t<T>* buffer, const T* p, i64 s0, i64 s1, const Tile& t) {
  if (s1 == 1 && t.dense(s0)) return load(buffer, p, 1, t.size());
  for (int r = 0; r < t.rows; ++r) {
    compute_t<T>* row = buffer + r * t.pitch;
    const compute_t<T>* from = load(row, p + r * s0, s1, t.n);
    if (from != row) copy(row, from, t.n);
  }
  return buffer;
}

template <class T>
FASTVAE_LOOP const compute_t<T>* load_half(compute_t<T>* buffer, const T* p, i64 s0, i64 s1, const Tile& t) {
  return load_rows(buffer, p, s0, s1, t);
}
template <class T>
inline const compute_t<T>* load(compute_t<T>* buffer, const T* p, i64 s0, i64 s1, const Tile& t) {
  if constexpr (sizeof(T) == sizeof(compute_t<T>)) {
    return load_rows(buffer, p, s0, s1, t);
  } else {
    return load_half(buffer, p, s0, s1, t);
  }
}

// Buffer for a tile whose destination is rows s0 apart at p, and how it is stored there.
template <class T>
FASTVAE_INLINE compute_t<T>* target(T* p, compute_t<T>* buffer, i64 s0, const Tile& t) {
  return p && t.dense(s0) ? target(p, buffer) : buffer;
}
template <class T>
inline void commit_rows(T* p, const compute_t<T>* from, i64 s0, const Tile& t) {
  if (t.dense(s0)) return commit(p, from, t.size());
  for (int r = 0; r < t.rows; ++r) {
    if constexpr (sizeof(T) == sizeof(compute_t<T>)) {
      copy(p + r * s0, from + r * t.pitch, t.n);
    } else {
      commit(p + r * s0, from + r * t.pitch, t.n);
    }
  }
}

template <class T>
FASTVAE_LOOP void commit_half(T* p, const compute_t<T>* from, i64 s0, const Tile& t) {
  commit_rows(p, from, s0, t);
}
template <class T>
inline void commit(T* p, const compute_t<T>* from, i64 s0, const Tile& t) {
  if constexpr (sizeof(T) == sizeof(compute_t<T>)) {
    commit_rows(p, from, s0, t);
  } else {
    commit_half(p, from, s0, t);
  }
}

// Sums term(i) over [0, n): blocks in which each lane adds 16 terms in C, then in double.
template <class C, class F>
FASTVAE_INLINE double sum_over(int n, F term) {
  constexpr int block = 16 * kLanes<C>;
  double total = 0;
  for (int first = 0; first < n; first += block) {
    const int last = n - first < block ? n : first + block;
    C part = 0;
#pragma omp simd reduction(+ : part)
    for (int i = first; i < last; ++i) part += term(i);
    total += part;
  }
  return total;
}

// The sum of kSize numbers, a power of two, which are overwritten: one after the other they would wait for
// each other.
template <int kSize>
FASTVAE_INLINE double sum_in_halves(double* p) {
  if constexpr (kSize == 1) {
    return *p;
  } else {
#pragma GCC unroll 8
    for (int i = 0; i < kSize / 2; ++i) p[i] += p[i + kSize / 2];
    return sum_in_halves<kSize / 2>(p);
  }
}

// Adds the sum of row r of a buffered tile to sums[r], in the order of sum_over.
template <class C>
FASTVAE_LOOP void add_row_sums(const C* p, const Tile& t, double* sums) {
  constexpr int lanes = kLanes<C>, block = 16 * lanes;
  const int whole = t.n / lanes * lanes;
  alignas(kVectorBytes) C tail[lanes];  // 1 where the last, incomplete vector has an element
  for (int l = 0; l < lanes; ++l) tail[l] = C(l < t.n - whole);
  const Vector<C> mask = *reinterpret_cast<const Vector<C>*>(tail), zero = {};
  for (int r = 0; r < t.rows; ++r) {
    const C* row = p + r * t.pitch;
    double total = 0;
    for (int first = 0; first < t.n; first += block) {
      const int last = whole - first < block ? whole : first + block;
      Vector<C> part = zero;
      for (int i = first; i < last; i += lanes) part += *reinterpret_cast<const Vector<C>*>(row + i);
      // Selected, not multiplied: elements beyond the row may be NaN.
      if (last == whole && whole < t.n)
        part += mask > zero ? *reinterpret_cast<const Vector<C>*>(row + whole) : zero;
      C sum = 0;
#pragma omp simd reduction(+ : sum)
      for (int l = 0; l < lanes; ++l) sum += part[l];
      total += sum;
      if (last == whole) break;
    }
    sums[r] += total;
  }
}

// Calls f with a value of the storage type given by a dtype code.
template <class F>
inline void for_dtype(int code, F f) {
  switch (code) {
    case kFloat32: return f(float{});
    case kFloat64: return f(double{});
    case kBFloat16: return f(bf16{});
    case kFloat16: return f(f16{});
  }
}

// Runs body(begin, end) over parts of [0, units), on several threads if there are enough elements to pay for
// them.
template <class F>
inline void parallel(int threads, i64 units, i64 elements, F body) {
  parallel_ranges(
      threads, units, elements, [](void* f, i64 begin, i64 end) { (*static_cast<F*>(f))(begin, end); },
      &body);
}

// Uninitialised memory for the duration of a call. Vectors of it, as of the arrays on the stack, are aligned:
// across cache lines a load takes twice as long.
template <class C>
struct Scratch {
  static constexpr std::align_val_t kAlignment{64};
  C* const data;
  explicit Scratch(i64 size)
      : data(static_cast<C*>(::operator new(static_cast<std::size_t>(size) * sizeof(C), kAlignment))) {}
  ~Scratch() { ::operator delete(data, kAlignment); }
  Scratch(const Scratch&) = delete;
};

// sums += p, in double: sums over many samples.
template <class C>
FASTVAE_LOOP void add_to(int n, const C* __restrict p, double* __restrict sums) {
#pragma omp simd
  for (int i = 0; i < n; ++i) sums[i] += p[i];
}

FASTVAE_LOOP void add_doubles(i64 n, const double* __restrict p, double* __restrict sums) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) sums[i] += p[i];
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
