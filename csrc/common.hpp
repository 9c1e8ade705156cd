// Storage types, loads and stores, and elementary functions. Included once per instruction set, inside its namespace.
// Loops marked `omp simd` run over a tile of a row; everything they call is branch-free, so that they vectorise.

enum Dtype { kFloat32 = 0, kFloat64 = 1, kBFloat16 = 2, kFloat16 = 3 };

// Columns handled at a time: a few buffers of this length stay in the first-level cache.
constexpr int kTile = 1024;

struct bf16 {
  std::uint16_t bits;
};
struct f16 {
  std::uint16_t bits;
};

// The type that a storage type is computed and summed in.
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
inline To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(To));
  return to;
}

inline double upcast(double v) { return v; }
inline float upcast(float v) { return v; }
inline float upcast(bf16 v) { return bit_cast<float>(static_cast<std::uint32_t>(v.bits) << 16); }
inline float upcast(f16 v) {
  // Shift the exponent into place; infinities and NaN get the rest of it, subnormals are renormalised by a subtraction.
  const std::uint32_t magnitude = (v.bits & 0x7fffu) << 13;
  const std::uint32_t exponent = magnitude & (0x7c00u << 13);
  const std::uint32_t normal = magnitude + (112u << 23);
  const float subnormal = bit_cast<float>(normal + (1u << 23)) - bit_cast<float>(113u << 23);
  std::uint32_t bits = exponent == (0x7c00u << 13) ? normal + (112u << 23) : normal;
  bits = exponent == 0 ? bit_cast<std::uint32_t>(subnormal) : bits;
  return bit_cast<float>(bits | (static_cast<std::uint32_t>(v.bits & 0x8000u) << 16));
}

inline void assign(double& to, double v) { to = v; }
inline void assign(float& to, float v) { to = v; }
inline void assign(bf16& to, float v) {
  const std::uint32_t bits = bit_cast<std::uint32_t>(v);
  const std::uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  to.bits = static_cast<std::uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
}
inline void assign(f16& to, float v) {
  const std::uint32_t all = bit_cast<std::uint32_t>(v), sign = all & 0x80000000u, bits = all ^ sign;
  const std::uint32_t magic = ((127u - 15u) + (23u - 10u) + 1u) << 23;  // adding it rounds at the subnormals' last place
  const std::uint32_t subnormal = bit_cast<std::uint32_t>(bit_cast<float>(bits) + bit_cast<float>(magic)) - magic;
  const std::uint32_t normal = (bits + ((15u - 127u) << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  std::uint32_t half = bits < (113u << 23) ? subnormal : normal;
  half = bits >= (143u << 23) ? (bits > 0x7f800000u ? 0x7e00u : 0x7c00u) : half;
  to.bits = static_cast<std::uint16_t>(half | (sign >> 16));
}

// A matrix or a stack of matrices somewhere in memory: address of the first element and strides in elements.
template <class T>
struct View {
  T* data;
  i64 s0, s1, s2;
  explicit operator bool() const { return data != nullptr; }
  T* at(i64 i, i64 j) const { return data + i * s0 + j * s1; }
  T* at(i64 i, i64 j, i64 l) const { return data + i * s0 + j * s1 + l * s2; }
};

template <class T>
inline View<T> view(const Matrix& m) {
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

// n elements from p as compute type: p itself where nothing must be done, else buffer, filled.
template <class T>
inline const compute_t<T>* load(compute_t<T>* __restrict buffer, const T* p, i64 stride, int n) {
  if constexpr (sizeof(T) == sizeof(compute_t<T>)) {
    if (stride == 1) return p;
  }
  if (stride == 1) {
#pragma omp simd
    for (int i = 0; i < n; ++i) buffer[i] = upcast(p[i]);
  } else {
    for (int i = 0; i < n; ++i) buffer[i] = upcast(p[i * stride]);
  }
  return buffer;
}

// Where to write n results that shall end at p, which is contiguous: p itself or buffer, then commit().
template <class T>
inline compute_t<T>* target(T* p, compute_t<T>* buffer) {
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

template <class C>
inline void fill(C* p, C value, int n) {
  for (int i = 0; i < n; ++i) p[i] = value;
}

// The sum of term(i) over [0, n): short blocks in C, so that few lanes lose no more digits than many, then double.
constexpr int kSumBlock = 128;
template <class C, class F>
inline double sum_over(int n, F term) {
  double total = 0;
  for (int first = 0; first < n; first += kSumBlock) {
    const int last = n - first < kSumBlock ? n : first + kSumBlock;
    C part = 0;
#pragma omp simd reduction(+ : part)
    for (int i = first; i < last; ++i) part += term(i);
    total += part;
  }
  return total;
}

// Calls f with a value of the storage type that a dtype code means.
template <class F>
inline void for_dtype(int code, F f) {
  switch (code) {
    case kFloat32: return f(float{});
    case kFloat64: return f(double{});
    case kBFloat16: return f(bf16{});
    case kFloat16: return f(f16{});
  }
}

// Calls f with values of the types of data and parameters: equal, or float data with half-precision parameters.
template <class F>
inline void for_dtypes(int data, int parameter, F f) {
  if (data == kFloat32 && parameter == kBFloat16) return f(float{}, bf16{});
  if (data == kFloat32 && parameter == kFloat16) return f(float{}, f16{});
  for_dtype(parameter, [&](auto t) { f(t, t); });
}

// Runs body(begin, end) over parts of [0, units) on several threads where the number of elements pays for them.
template <class F>
inline void parallel(int threads, i64 units, i64 elements, F body) {
  parallel_ranges(
      threads, units, elements, [](void* f, i64 begin, i64 end) { (*static_cast<F*>(f))(begin, end); }, &body);
}

// Elementary functions in float: Cephes' polynomials (S. Moshier), about 1 ulp; in double: the C library.

// exp(x) = 2^n (1 + p) with |x - n ln 2| < 0.35; at n = 0, p = x + x^2 q(x).
struct Reduced {
  float n, p, r2q;
};
inline Reduced reduce(float x) {
  const float n = (x * 1.44269504088896341f + 12582912.0f) - 12582912.0f;
  const float r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  float q = 1.9875691500e-4f;
  q = q * r + 1.3981999507e-3f;
  q = q * r + 8.3334519073e-3f;
  q = q * r + 4.1665795894e-2f;
  q = q * r + 1.6666665459e-1f;
  q = q * r + 5.0000001201e-1f;
  const float r2q = r * r * q;
  return {n, r + r2q, r2q};
}
inline float power_of_two(float n) {  // -126 <= n <= 127
  return bit_cast<float>((static_cast<std::int32_t>(n) + 127) << 23);
}
inline float clip(float x, float lo, float hi) {  // NaN stays
  x = x < lo ? lo : x;
  return x > hi ? hi : x;
}

inline float exp_(float x) {
  const Reduced e = reduce(clip(x, -104.0f, 89.0f));
  // In two steps, so that neither subnormal results nor the largest ones lose anything on the way.
  const float half = (e.n * 0.5f + 12582912.0f) - 12582912.0f;
  // NaN must not reach the conversion to an integer.
  const float h = half == half ? half : 0.0f, rest = half == half ? e.n - half : 0.0f;
  return (1.0f + e.p) * power_of_two(h) * power_of_two(rest);
}
inline double exp_(double x) { return __builtin_exp(x); }

// The scaled half of exp(x) - 1: 2 * (s p + (s - 1/2)) with s = 2^(n-1) is exact in form at n = 0 and finite up to the end.
inline float expm1_from(const Reduced& e) {
  const float n = e.n == e.n ? e.n : 0.0f;
  const float s = power_of_two(n - 1.0f);
  return 2.0f * (s * e.p + (s - 0.5f));
}
inline float expm1_(float x) { return expm1_from(reduce(clip(x, -87.0f, 89.0f))); }
inline double expm1_(double x) { return __builtin_expm1(x); }

// exp(x) - 1 - x, without cancellation near 0.
inline float expm1_minus(float x) {
  const Reduced e = reduce(clip(x, -87.0f, 89.0f));
  // The second x is bounded above, so that inf gives inf.
  return e.n == 0.0f ? e.r2q : expm1_from(e) - (x > 89.0f ? 89.0f : x);
}
inline double expm1_minus(double x) {
  // The series where expm1(x) - x would lose more than 3 bits: the next term is below 1e-17 of the sum.
  const double small = x * x * (0.5 + x * (1.0 / 6 + x * (1.0 / 24 + x * (1.0 / 120 + x * (1.0 / 720 + x * (1.0 / 5040 +
                       x * (1.0 / 40320 + x * (1.0 / 362880 + x / 3628800))))))));
  return __builtin_fabs(x) < 0.125 ? small : __builtin_expm1(x) - (x > 710.0 ? 710.0 : x);
}

// log(2^e (1 + g)) for sqrt(1/2) <= 1 + g < sqrt(2).
inline float log_from(float g, float e) {
  const float z = g * g;
  float p = 7.0376836292e-2f;
  p = p * g - 1.1514610310e-1f;
  p = p * g + 1.1676998740e-1f;
  p = p * g - 1.2420140846e-1f;
  p = p * g + 1.4249322787e-1f;
  p = p * g - 1.6668057665e-1f;
  p = p * g + 2.0000714765e-1f;
  p = p * g - 2.4999993993e-1f;
  p = p * g + 3.3333331174e-1f;
  float y = g * z * p;
  y = y - 2.12194440e-4f * e;
  y = y - 0.5f * z;
  return (g + y) + 0.693359375f * e;
}

// log(1 + t) for 0 <= t <= 1, to full relative accuracy.
inline float log1p_unit(float t) {
  const bool big = t > 0.41421356f;
  return log_from(big ? 0.5f * (t - 1.0f) : t, big ? 1.0f : 0.0f);
}
inline double log1p_unit(double t) { return __builtin_log1p(t); }

inline float abs_(float x) { return __builtin_fabsf(x); }
inline double abs_(double x) { return __builtin_fabs(x); }
