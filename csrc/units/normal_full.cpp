// Draws of a full normal, and noise by itself: ops/normal_full.py and random.py.
#include "normal_full.hpp"
#include "random.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// @param z (K, B, D), @param log_q (K, B), @param eps (B, K, D) or null: written
// @param mu (B, D), @param tril (B, D (D + 1) / 2) of the same dtype
void rsample_tril(Output z, Output log_q, Output eps, const Tensor& mu, const Tensor& tril, Output seed,
                  const Place& place, int threads) {
  for_dtype(mu.dtype, [&](auto t) {
    full_draws<decltype(t)>(z, log_q, eps, mu, tril, *pointer<const std::uint64_t>(seed), place, threads);
  });
}

// @param to_mu (B, D), @param to_tril (B, D (D + 1) / 2): written, null where not needed
// @param grad_z (K, B, D) or (K B, D), @param grad_log_q (K, B): null where the result has no upstream
// gradient
// @param eps from the forward pass; may be null if grad_z or to_tril is
void rsample_tril_backward(Output to_mu, Output to_tril, const Tensor& grad_z, const Tensor& grad_log_q,
                           const Tensor& eps, const Tensor& mu, const Tensor& tril, const Place& place,
                           int threads) {
  for_dtype(mu.dtype, [&](auto t) {
    full_gradients<decltype(t)>(to_mu, to_tril, grad_z.stacked(place.samples), grad_log_q, eps, mu, tril,
                                place, threads);
  });
}

// The noise itself.
// @param out (samples, rows, columns): float, or double with `wide`
// @param seed the address of an int64
// @param net of quasi-Monte-Carlo noise (kNetBits, kNetColumns) int64
// @param randomisations of it, as many as there are seeds; 0 for none
void normal(Output out, bool wide, Output seed, Output net, i64 randomisations, i64 samples, i64 rows,
            i64 columns, i64 sample_offset, i64 row_offset, i64 level, int threads) {
  auto run = [&](auto zero) {
    using C = decltype(zero);
    const Key key(*pointer<const std::uint64_t>(seed));
    const i64 height = rows_per_tile(rows, columns), tiles = (rows + height - 1) / height;
    parallel(threads, samples * tiles, samples * rows * columns, [&](i64 begin, i64 end) {
      Noise<C> noise(key, sample_offset, row_offset, static_cast<std::uint32_t>(level));
      for (i64 unit = begin; unit < end; ++unit) {
        const i64 k = unit / tiles, b = unit % tiles * height;
        for (i64 column = 0; column < columns; column += kTile) {
          const Tile tile = tile_of(rows, b, height, columns, column);
          noise.shape(column, tile);
          const C* eps = randomisations ? noise.of_net(k, b, pointer<const std::uint64_t>(seed),
                                                       randomisations, pointer<const i64>(net))
                                        : noise(k, b);
          C* p = pointer<C>(out) + (k * rows + b) * columns + column;
          for (int r = 0; r < tile.rows; ++r) copy(p + r * columns, eps + r * tile.pitch, tile.n);
        }
      }
    });
  };
  wide ? run(double{}) : run(float{});
}

void philox_words(const std::uint32_t* counter, std::uint64_t seed, std::uint32_t* words) {
  const Words made = philox({counter[0], counter[1], counter[2], counter[3]}, Key(seed));
  words[0] = made.w0, words[1] = made.w1, words[2] = made.w2, words[3] = made.w3;
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
