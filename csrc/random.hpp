// Philox4x32-10 and Box-Muller: noise as a function of its address. fastvae/random.py has the definition.
// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011.

struct Key {
  std::uint32_t low, high;
  explicit Key(std::uint64_t seed) : low(static_cast<std::uint32_t>(seed)), high(static_cast<std::uint32_t>(seed >> 32)) {}
};

struct Words {
  std::uint32_t w0, w1, w2, w3;
};

inline Words philox(Words c, Key key) {
  std::uint32_t k0 = key.low, k1 = key.high;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const std::uint64_t p0 = static_cast<std::uint64_t>(c.w0) * 0xD2511F53u;
    const std::uint64_t p1 = static_cast<std::uint64_t>(c.w2) * 0xCD9E8D57u;
    c = {static_cast<std::uint32_t>(p1 >> 32) ^ c.w1 ^ k0, static_cast<std::uint32_t>(p1),
         static_cast<std::uint32_t>(p0 >> 32) ^ c.w3 ^ k1, static_cast<std::uint32_t>(p0)};
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
  return c;
}

template <class C>
struct Pair {
  C first, second;
};

// Two words make two normals.
inline Pair<float> box_muller(std::uint32_t w0, std::uint32_t w1, float) {
  // u = (w0 + 1/2) / 2^32. Its upper half is taken as 1 - f with f exact, which keeps small radii accurate.
  const bool upper = static_cast<std::int32_t>(w0) < 0;
  const std::int32_t t = static_cast<std::int32_t>(upper ? ~w0 : w0);
  const float f = (static_cast<float>(t) + 0.5f) * 2.3283064365386963e-10f;
  const float u = upper ? 1.0f - f : f;
  // u = 2^e m with sqrt(1/2) <= m < sqrt(2).
  const std::uint32_t shifted = bit_cast<std::uint32_t>(u) - 0x3f3504f3u;
  const std::int32_t exponent = static_cast<std::int32_t>(shifted) >> 23;
  const float m = bit_cast<float>((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float g = upper && exponent == 0 ? -f : m - 1.0f;
  const float radius = __builtin_sqrtf(-2.0f * log_from(g, static_cast<float>(exponent)));
  // The angle 2 pi (w1 + 1/2) / 2^32 is reduced to +-pi/4 in integers, exactly.
  const std::uint32_t quarter = (w1 + 0x20000000u) >> 30;
  const float a = (static_cast<float>(static_cast<std::int32_t>(w1 - (quarter << 30))) + 0.5f) * 1.4629180792671596e-9f;
  const float z = a * a;
  float s = -1.9515295891e-4f;
  s = s * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * a + a;
  float c = 2.443315711809948e-5f;
  c = c * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = c * z * z - 0.5f * z + 1.0f;
  // Quarter turns: (c, s), (-s, c), (-c, -s), (s, -c).
  const bool odd = quarter & 1u;
  const std::uint32_t sign_cos = ((quarter + 1u) & 2u) << 30, sign_sin = (quarter & 2u) << 30;
  const float cosine = bit_cast<float>(bit_cast<std::uint32_t>(odd ? s : c) ^ sign_cos);
  const float sine = bit_cast<float>(bit_cast<std::uint32_t>(odd ? c : s) ^ sign_sin);
  return {radius * cosine, radius * sine};
}
inline Pair<double> box_muller(std::uint32_t w0, std::uint32_t w1, double) {
  const double radius = __builtin_sqrt(-2.0 * __builtin_log((w0 + 0.5) * 0x1p-32));
  const double angle = (w1 + 0.5) * (6.283185307179586476925286766559 * 0x1p-32);
  return {radius * __builtin_cos(angle), radius * __builtin_sin(angle)};
}

// A window of noise rows in a buffer, refilled as the kernel walks along the samples of a row, or along the rows when each
// has one sample: short rows then share the vector units.
template <class C>
class Noise {
 public:
  // Noise of columns [column, column + width) for samples and rows below the ends given; column is a multiple of 4.
  Noise(Key key, i64 samples, i64 sample_offset, i64 row_offset)
      : key_(key), along_rows_(samples == 1), sample_offset_(sample_offset), row_offset_(row_offset) {}

  void columns(i64 column, int width) {
    block_ = static_cast<std::uint32_t>(column / 4);
    blocks_ = (width + 3) / 4;
    count_ = 0;
  }

  // The normals of (sample, row): at least `width` of them. `end` is where the walk along its axis ends.
  const C* operator()(i64 sample, i64 row, i64 end) {
    const i64 position = along_rows_ ? row : sample, other = along_rows_ ? sample : row;
    if (position < start_ || position >= start_ + count_ || other != other_) refill(position, other, end);
    return normals_ + (position - start_) * blocks_ * 4;
  }

 private:
  static constexpr int kCalls = kTile / 4;

  void refill(i64 position, i64 other, i64 end) {
    start_ = position;
    other_ = other;
    const i64 fit = kCalls / blocks_;
    count_ = end - position < fit ? end - position : fit;
    const int calls = static_cast<int>(count_) * blocks_;
    const std::uint32_t first = static_cast<std::uint32_t>(position + (along_rows_ ? row_offset_ : sample_offset_));
    const std::uint32_t fixed = static_cast<std::uint32_t>(other + (along_rows_ ? sample_offset_ : row_offset_));
    std::uint32_t c0[kCalls], c1[kCalls], w[4][kCalls];
    int call = 0;
    for (int i = 0; i < count_; ++i) {
      for (int j = 0; j < blocks_; ++j, ++call) {
        c0[call] = block_ + static_cast<std::uint32_t>(j);
        c1[call] = first + static_cast<std::uint32_t>(i);
      }
    }
    const bool along_rows = along_rows_;
    const Key key = key_;
#pragma omp simd
    for (int i = 0; i < calls; ++i) {
      const Words r = philox({c0[i], along_rows ? c1[i] : fixed, along_rows ? fixed : c1[i], 0u}, key);
      w[0][i] = r.w0;
      w[1][i] = r.w1;
      w[2][i] = r.w2;
      w[3][i] = r.w3;
    }
    C* __restrict out = normals_;
#pragma omp simd
    for (int i = 0; i < calls; ++i) {
      const Pair<C> a = box_muller(w[0][i], w[1][i], C{});
      const Pair<C> b = box_muller(w[2][i], w[3][i], C{});
      out[4 * i] = a.first;
      out[4 * i + 1] = a.second;
      out[4 * i + 2] = b.first;
      out[4 * i + 3] = b.second;
    }
  }

  Key key_;
  bool along_rows_;
  i64 sample_offset_, row_offset_;
  std::uint32_t block_ = 0;
  int blocks_ = 1;
  i64 start_ = 0, count_ = 0, other_ = -1;
  C normals_[kTile];
};

// The noise itself.
// @param out (samples, rows, columns): float, or double with `wide`
// @param seed the address of an int64
inline void normal(address out, bool wide, address seed, i64 samples, i64 rows, i64 columns, i64 sample_offset,
                   i64 row_offset, int threads) {
  auto run = [&](auto zero) {
    using C = decltype(zero);
    const Key key(*reinterpret_cast<const std::uint64_t*>(seed));
    parallel(threads, rows, samples * rows * columns, [&](i64 begin, i64 end) {
      Noise<C> noise(key, samples, sample_offset, row_offset);
      for (i64 column = 0; column < columns; column += kTile) {
        const int n = static_cast<int>(columns - column < kTile ? columns - column : kTile);
        noise.columns(column, n);
        for (i64 b = begin; b < end; ++b) {
          for (i64 k = 0; k < samples; ++k) {
            const C* eps = noise(k, b, samples == 1 ? end : samples);
            C* p = reinterpret_cast<C*>(out) + (k * rows + b) * columns + column;
            for (int i = 0; i < n; ++i) p[i] = eps[i];
          }
        }
      }
    });
  };
  wide ? run(double{}) : run(float{});
}

// The random words of one counter, for the known-answer test.
inline Words philox_words(std::uint32_t c0, std::uint32_t c1, std::uint32_t c2, std::uint32_t c3, std::uint64_t seed) {
  return philox({c0, c1, c2, c3}, Key(seed));
}
