// Philox4x32-10 and Box-Muller: noise as a function of its address. fastvae/random.py has the definition.
// Salmon, Moraes, Dror, Shaw: Parallel random numbers: as easy as 1, 2, 3. SC 2011.
#pragma once

#include "elementary.hpp"
#include "tiles.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

struct Key {
  std::uint32_t low, high;
  explicit Key(std::uint64_t seed)
      : low(static_cast<std::uint32_t>(seed)), high(static_cast<std::uint32_t>(seed >> 32)) {}
};

struct Words {
  std::uint32_t w0, w1, w2, w3;
};

FASTVAE_INLINE Words philox(Words c, Key key) {
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

// Two words make two normals, radius * (cosine, sine) of an angle.
FASTVAE_INLINE float radius_of(std::uint32_t w, float) {
  // u = (w + 1/2) / 2^32. Its upper half is taken as 1 - f with f exact, which keeps small radii accurate.
  const bool upper = static_cast<std::int32_t>(w) < 0;
  const std::int32_t t = static_cast<std::int32_t>(upper ? ~w : w);
  const float f = static_cast<float>(t) * 0x1p-32f + 0x1p-33f;
  const float u = upper ? 1.0f - f : f;
  // u = 2^e m with sqrt(1/2) <= m < sqrt(2).
  const std::uint32_t shifted = bit_cast<std::uint32_t>(u) - 0x3f3504f3u;
  const std::int32_t exponent = static_cast<std::int32_t>(shifted) >> 23;
  const float m = bit_cast<float>((shifted & 0x007fffffu) + 0x3f3504f3u);
  const float g = upper && exponent == 0 ? -f : m - 1.0f;
  return __builtin_sqrtf(-2.0f * log_from(g, static_cast<float>(exponent)));
}
FASTVAE_INLINE double radius_of(std::uint32_t w, double) {
  return __builtin_sqrt(-2.0 * __builtin_log((w + 0.5) * 0x1p-32));
}

template <class C>
struct Pair {
  C first, second;
};
FASTVAE_INLINE Pair<float> turn(float radius, std::uint32_t w) {
  // The angle 2 pi (w + 1/2) / 2^32 less its quarter turns, within +-pi/4: the lower 30 bits with their sign,
  // exactly.
  const float a = static_cast<float>(static_cast<std::int32_t>(w << 2)) * 3.6572951981678990e-10f +
                  7.3145903963357980e-10f;
  const float z = a * a;
  float s = -1.9515295891e-4f;
  s = s * z + 8.3321608736e-3f;
  s = s * z - 1.6666654611e-1f;
  s = s * z * a + a;
  float c = 2.443315711809948e-5f;
  c = c * z - 1.388731625493765e-3f;
  c = c * z + 4.166664568298827e-2f;
  c = (c * z - 0.5f) * z + 1.0f;
  // Quarter turns, the upper two bits: (c, s), (-s, c), (-c, -s), (s, -c).
  const std::uint32_t turns = w + 0x20000000u, sign = 0x80000000u;
  const bool odd = turns & 0x40000000u;
  const float cosine = bit_cast<float>(bit_cast<std::uint32_t>(odd ? s : c) ^ ((turns + 0x40000000u) & sign));
  const float sine = bit_cast<float>(bit_cast<std::uint32_t>(odd ? c : s) ^ (turns & sign));
  return {radius * cosine, radius * sine};
}
FASTVAE_INLINE Pair<double> turn(double radius, std::uint32_t w) {
  const double angle = (w + 0.5) * (6.283185307179586476925286766559 * 0x1p-32);
  return {radius * __builtin_cos(angle), radius * __builtin_sin(angle)};
}

// Philox on vectors of 64-bit lanes. A lane's lower half is a word of a counter; a product's upper half is
// harmless, since a multiplication reads lower halves only.
typedef std::uint64_t U64 __attribute__((vector_size(kVectorBytes)));
#if FASTVAE_VECTOR_BYTES == 64
FASTVAE_INLINE U64 multiply_lower(U64 a, U64 b) { return (U64)_mm512_mul_epu32((__m512i)a, (__m512i)b); }
#elif FASTVAE_VECTOR_BYTES == 32
FASTVAE_INLINE U64 multiply_lower(U64 a, U64 b) { return (U64)_mm256_mul_epu32((__m256i)a, (__m256i)b); }
#elif defined(__SSE2__)
FASTVAE_INLINE U64 multiply_lower(U64 a, U64 b) { return (U64)_mm_mul_epu32((__m128i)a, (__m128i)b); }
#else
FASTVAE_INLINE U64 multiply_lower(U64 a, U64 b) { return (a & 0xffffffffu) * (b & 0xffffffffu); }
#endif
constexpr int kCallsPerStep = sizeof(U64) / 4;  // one vector of even calls and one of odd calls

FASTVAE_INLINE void philox(U64& c0, U64& c1, U64& c2, U64& c3, Key key) {
  std::uint32_t k0 = key.low, k1 = key.high;
  const U64 zero = {}, m0 = zero + 0xD2511F53u, m1 = zero + 0xCD9E8D57u;
#pragma GCC unroll 10
  for (int round = 0; round < 10; ++round) {
    const U64 p0 = multiply_lower(c0, m0), p1 = multiply_lower(c2, m1);
    c0 = (p1 >> 32) ^ c1 ^ (zero + k0);
    c1 = p1;
    c2 = (p0 >> 32) ^ c3 ^ (zero + k1);
    c3 = p0;
    k0 += 0x9E3779B9u;
    k1 += 0xBB67AE85u;
  }
}

// The words of `calls` counters (block + c0[i], row + c1[i], sample, level); with kOfSamples (block + c0[i],
// row, sample + c1[i], level); whole steps are done.
constexpr int kCalls = kTile / 4;
template <bool kOfSamples>
FASTVAE_LOOP void philox_calls(int calls, const std::uint32_t* c0, std::uint32_t block,
                               const std::uint32_t* c1, std::uint32_t row, std::uint32_t sample,
                               std::uint32_t level, Key key, std::uint32_t (*words)[kCalls]) {
  const U64 zero = {}, blocks = zero + block, rows = zero + row, samples = zero + sample,
            levels = zero + level, lower = zero + 0xffffffffu;
  for (int i = 0; i < calls; i += kCallsPerStep) {
    U64 pattern0, pattern1;
    __builtin_memcpy(&pattern0, c0 + i, sizeof(U64));
    __builtin_memcpy(&pattern1, c1 + i, sizeof(U64));
    const U64 row_pattern = kOfSamples ? zero : pattern1, sample_pattern = kOfSamples ? pattern1 : zero;
    U64 even[4] = {pattern0 + blocks, row_pattern + rows, sample_pattern + samples, levels};
    U64 odd[4] = {(pattern0 >> 32) + blocks, (row_pattern >> 32) + rows, (sample_pattern >> 32) + samples,
                  levels};
    philox(even[0], even[1], even[2], even[3], key);
    philox(odd[0], odd[1], odd[2], odd[3], key);
    for (int j = 0; j < 4; ++j) {
      const U64 both = (even[j] & lower) | (odd[j] << 32);
      __builtin_memcpy(words[j] + i, &both, sizeof(U64));
    }
  }
}

// Normals from the words, in two loops: a processor looks only so far ahead, and short bodies show it several
// elements at once.
template <class C>
FASTVAE_LOOP void radii(int calls, const std::uint32_t* __restrict words, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < calls; ++i) out[i] = radius_of(words[i], C{});
}
template <class C>
FASTVAE_LOOP void turns(int calls, const C* __restrict radii, const std::uint32_t* __restrict words,
                        C* __restrict first, C* __restrict second) {
#pragma omp simd
  for (int i = 0; i < calls; ++i) {
    const Pair<C> pair = turn(radii[i], words[i]);
    first[i] = pair.first;
    second[i] = pair.second;
  }
}

// out[4 i + j] = planes[j][i]. Spelt out, since some compilers scatter every element by itself.
template <class C>
FASTVAE_LOOP void interleave(int calls, const C (*planes)[kCalls], C* out) {
#ifdef __clang__
  for (int i = 0; i < calls; ++i) {
    for (int j = 0; j < 4; ++j) out[4 * i + j] = planes[j][i];
  }
#else
  constexpr int lanes = kLanes<C>;
  using Integer = std::conditional_t<sizeof(C) == 4, std::int32_t, std::int64_t>;
  typedef Integer Index __attribute__((vector_size(kVectorBytes)));
  // Of two vectors, the lower or the upper half, alternating by single elements or by pairs.
  Index low1, low2, high1, high2;
  for (int l = 0; l < lanes; ++l) {
    low1[l] = l / 2 + l % 2 * lanes;
    low2[l] = l / 4 * 2 + l % 2 + l / 2 % 2 * lanes;
    high1[l] = low1[l] + lanes / 2;
    high2[l] = low2[l] + (lanes > 2 ? lanes / 2 : 2);
  }
  for (int i = 0; i < calls; i += lanes) {
    Vector<C> in[4];
    for (int j = 0; j < 4; ++j) in[j] = *reinterpret_cast<const Vector<C>*>(planes[j] + i);
    const Vector<C> a0 = __builtin_shuffle(in[0], in[1], low1), a1 = __builtin_shuffle(in[0], in[1], high1);
    const Vector<C> b0 = __builtin_shuffle(in[2], in[3], low1), b1 = __builtin_shuffle(in[2], in[3], high1);
    Vector<C>* to = reinterpret_cast<Vector<C>*>(out + 4 * i);
    to[0] = __builtin_shuffle(a0, b0, low2);
    to[1] = __builtin_shuffle(a0, b0, high2);
    to[2] = __builtin_shuffle(a1, b1, low2);
    to[3] = __builtin_shuffle(a1, b1, high2);
  }
#endif
}

// The noise of one tile at a time: rows of the same columns and the same sample, or samples of the same
// columns and the same row.
template <class C>
class Noise {
 public:
  // @param row_offset address of the first row, or -1 if all rows share the noise of row 0
  // @param level of latents in several levels, which the counter's last word tells apart
  Noise(Key key, i64 sample_offset, i64 row_offset, std::uint32_t level = 0)
      : key_(key), level_(level), sample_offset_(sample_offset), row_offset_(row_offset),
        shared_(row_offset < 0) {}

  // From here on tiles begin at `column`, a multiple of 4; their pitch is the least multiple of 4.
  void shape(i64 column, const Tile& tile) {
    block_ = static_cast<std::uint32_t>(column / 4);
    const int blocks = tile.pitch / 4;
    calls_ = (blocks * tile.rows + kCallsPerStep - 1) / kCallsPerStep * kCallsPerStep;
    if (blocks == blocks_) return;
    blocks_ = blocks;
    for (int i = 0, j = 0, r = 0; i < kCalls; ++i) {
      c0_[i] = static_cast<std::uint32_t>(j);
      c1_[i] = static_cast<std::uint32_t>(r);
      if (++j == blocks) {
        j = 0;
        ++r;
      }
    }
  }

  // The normals of the tile that begins at (sample, row).
  const C* operator()(i64 sample, i64 row) { return draw<false>(sample, row); }
  const C* of_samples(i64 sample, i64 row) { return draw<true>(sample, row); }

  // The same of randomised nets, which take turns.
  // @param seeds (randomisations)
  // @param net (kNetBits, kNetColumns)
  const C* of_net(i64 sample, i64 row, const std::uint64_t* seeds, i64 randomisations, const i64* net) {
    const i64 number = sample + sample_offset_;
    key_ = Key(seeds[number % randomisations]);
    const i64 begin = static_cast<i64>(block_) * 4, end = begin + blocks_ * 4,
              columns = level_ ? 0 : kNetColumns;
    if (end > columns) {
      random_words<false>(number, row);
      if (begin >= columns) return transform();
      __builtin_memcpy(beyond_, words_, sizeof(words_));
    }
    random_words<false>(0, row);
    const i64 point = number / randomisations;
    std::uint32_t at[kNetColumns] = {};
    for (int bit = 0; bit < kNetBits; ++bit) {
      if (!(point >> bit & 1)) continue;
      for (i64 d = begin; d < columns && d < end; ++d)
        at[d] ^= static_cast<std::uint32_t>(net[bit * kNetColumns + d]);
    }
    for (int i = 0; i < calls_; ++i) {
      const i64 column = begin + static_cast<i64>(c0_[i]) * 4;
      for (int j = 0; j < 4; ++j)
        words_[j][i] = column < columns ? words_[j][i] ^ at[column + j] : beyond_[j][i];
    }
    return transform();
  }

 private:
  template <bool kOfSamples>
  const C* draw(i64 sample, i64 row) {
    random_words<kOfSamples>(sample + sample_offset_, row);
    return transform();
  }

  template <bool kOfSamples>
  void random_words(i64 sample, i64 row) {
    static constexpr std::uint32_t kSameRow[kCalls] = {};
    const auto first = shared_ ? 0 : static_cast<std::uint32_t>(row + row_offset_);
    philox_calls<kOfSamples>(calls_, c0_, block_, shared_ && !kOfSamples ? kSameRow : c1_, first,
                             static_cast<std::uint32_t>(sample), level_, key_, words_);
  }

  const C* transform() {
    for (int j = 0; j < 4; j += 2) {
      radii(calls_, words_[j], radii_);
      turns(calls_, radii_, words_[j + 1], planes_[j], planes_[j + 1]);
    }
    interleave(calls_, planes_, normals_);
    return normals_;
  }

  Key key_;
  std::uint32_t level_;
  i64 sample_offset_, row_offset_;
  bool shared_;
  std::uint32_t block_ = 0;
  int blocks_ = 0, calls_ = 0;
  std::uint32_t c0_[kCalls], c1_[kCalls], words_[4][kCalls], beyond_[4][kCalls];
  alignas(kVectorBytes) C radii_[kCalls], planes_[4][kCalls], normals_[kTile];
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
