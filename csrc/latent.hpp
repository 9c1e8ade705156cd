// Reparameterised sampling with the KL or with log p(z) - log q(z|x), forward and backward.
// The mathematics stands in fastvae/ops/latent.py; names and arguments are those of fastvae/reference/latent.py.

// Samples of one row that a unit of work handles: long enough to share what a row needs, short enough to spread K over
// threads when there are few rows.
constexpr i64 kSamplesPerUnit = 64;
// Samples summed before their sum is added to those before.
constexpr int kSamplesPerBlock = 16;

template <class T>
struct Latent {
  View<const T> mu, logvar, prior_mu, prior_logvar;  // (B, D)
  std::uint64_t seed;
  i64 samples, rows, columns, sample_offset, row_offset;
  compute_t<T> logvar_min, logvar_max;
  int threads;
};

// What a tile of one row of q and p comes to, in buffers.
template <class T>
struct LatentTile {
  using C = compute_t<T>;
  C mu_buffer[kTile], logvar_buffer[kTile], prior_mu_buffer[kTile], prior_logvar_buffer[kTile];
  C clamped[kTile], sigma[kTile], precision[kTile];
  const C *mu, *logvar, *prior_mu, *prior_logvar;

  void read(const Latent<T>& a, i64 row, i64 column, int n) {
    mu = load(mu_buffer, a.mu.at(row, column), a.mu.s1, n);
    logvar = load(logvar_buffer, a.logvar.at(row, column), a.logvar.s1, n);
    const C lo = a.logvar_min, hi = a.logvar_max;
#pragma omp simd
    for (int i = 0; i < n; ++i) {
      C v = logvar[i];
      v = v < lo ? lo : v;
      v = v > hi ? hi : v;
      clamped[i] = v;
      sigma[i] = exp_(C(0.5) * v);
    }
    if (a.prior_mu) {
      prior_mu = load(prior_mu_buffer, a.prior_mu.at(row, column), a.prior_mu.s1, n);
    } else {
      fill(prior_mu_buffer, C(0), n);
      prior_mu = prior_mu_buffer;
    }
    if (a.prior_logvar) {
      prior_logvar = load(prior_logvar_buffer, a.prior_logvar.at(row, column), a.prior_logvar.s1, n);
#pragma omp simd
      for (int i = 0; i < n; ++i) precision[i] = exp_(-prior_logvar[i]);
    } else {
      fill(prior_logvar_buffer, C(0), n);
      fill(precision, C(1), n);
      prior_logvar = prior_logvar_buffer;
    }
  }
};

inline int tile_width(i64 columns, i64 column) {
  return static_cast<int>(columns - column < kTile ? columns - column : kTile);
}

// z [K, B, D]; and kl [B] (or [B, D] with per_dimension), or log_ratio [K, B] when that is given.
template <class T>
void latent_forward(const Latent<T>& a, T* z, compute_t<T>* kl, bool per_dimension, compute_t<T>* log_ratio) {
  using C = compute_t<T>;
  const i64 chunks = (a.samples + kSamplesPerUnit - 1) / kSamplesPerUnit;
  parallel(a.threads, a.rows * chunks, a.samples * a.rows * a.columns, [&](i64 begin, i64 end) {
    Noise<C> noise(Key(a.seed), a.samples, a.sample_offset, a.row_offset);
    LatentTile<T> t;
    C z_buffer[kTile];
    double kl_sum, ratio_sum[kSamplesPerUnit];
    const i64 last_row = a.samples == 1 ? end : a.rows;
    // Tiles within units, but for one sample a row's window of noise spans rows: then a tile is outermost.
    for (i64 unit = begin; unit < end; ++unit) {
      const i64 b = unit / chunks, k0 = unit % chunks * kSamplesPerUnit;
      const i64 k1 = k0 + kSamplesPerUnit < a.samples ? k0 + kSamplesPerUnit : a.samples;
      kl_sum = 0;
      for (i64 k = k0; k < k1; ++k) ratio_sum[k - k0] = 0;
      for (i64 column = 0; column < a.columns; column += kTile) {
        const int n = tile_width(a.columns, column);
        if (unit == begin || a.columns > kTile) noise.columns(column, n);
        t.read(a, b, column, n);
        const C *mu = t.mu, *prior_mu = t.prior_mu, *prior_logvar = t.prior_logvar;
        const C *clamped = t.clamped, *sigma = t.sigma, *precision = t.precision;
        if (kl && k0 == 0) {
          if (per_dimension) {
            C* row = kl + b * a.columns + column;
#pragma omp simd
            for (int i = 0; i < n; ++i) {
              const C delta = mu[i] - prior_mu[i];
              row[i] = C(0.5) * (delta * delta * precision[i] + expm1_minus(clamped[i] - prior_logvar[i]));
            }
          } else {
            kl_sum += sum_over<C>(n, [=](int i) {
              const C delta = mu[i] - prior_mu[i];
              return delta * delta * precision[i] + expm1_minus(clamped[i] - prior_logvar[i]);
            });
          }
        }
        double constant = 0;
        if (log_ratio) constant = sum_over<C>(n, [=](int i) { return clamped[i] - prior_logvar[i]; });
        for (i64 k = k0; k < k1; ++k) {
          const C* eps = noise(k, b, a.samples == 1 ? last_row : k1);
          T* place = z + (k * a.rows + b) * a.columns + column;
          C* out = target(place, z_buffer);
          if (log_ratio) {
            const double sum = sum_over<C>(n, [=](int i) {
              const C v = mu[i] + sigma[i] * eps[i], delta = v - prior_mu[i];
              out[i] = v;
              return eps[i] * eps[i] - delta * delta * precision[i];
            });
            ratio_sum[k - k0] += sum + constant;
          } else {
#pragma omp simd
            for (int i = 0; i < n; ++i) out[i] = mu[i] + sigma[i] * eps[i];
          }
          commit(place, out, n);
        }
      }
      if (kl && k0 == 0 && !per_dimension) kl[b] = static_cast<C>(0.5 * kl_sum);
      if (log_ratio) {
        for (i64 k = k0; k < k1; ++k) log_ratio[k * a.rows + b] = static_cast<C>(0.5 * ratio_sum[k - k0]);
      }
    }
  });
}

// What arrives: at z (K, B, D), at kl (B, D) with strides, or at log_ratio (K, B); the weights of DReG (K, B).
template <class T>
struct LatentGrads {
  View<const T> z;
  View<const compute_t<T>> kl, log_ratio, weight;
  bool path;
  T *mu, *logvar, *prior_mu, *prior_logvar;  // where results go, (B, D); null where none is asked for
};

// One sample's part of the row sums over k.
template <bool kRatio, bool kPath, bool kPrior, class C>
inline void latent_accumulate(int n, const C* __restrict mu, const C* __restrict sigma,
                              const C* __restrict inverse_sigma, const C* __restrict prior_mu,
                              const C* __restrict precision, const C* __restrict eps, const C* __restrict grad_z,
                              C ratio, C weight, C* __restrict sum, C* __restrict sum_eps, C* __restrict sum_prior,
                              C* __restrict sum_prior_logvar) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    C h = grad_z[i];
    if constexpr (kRatio) {
      const C delta = mu[i] + sigma[i] * eps[i] - prior_mu[i];
      const C pull = ratio * (delta * precision[i]);
      h -= pull;
      if constexpr (kPath) h += ratio * (eps[i] * inverse_sigma[i]);
      if constexpr (kPrior) {
        sum_prior[i] += pull;
        sum_prior_logvar[i] += pull * delta - ratio;
      }
    }
    h *= weight;
    sum[i] += h;
    sum_eps[i] += h * eps[i];
  }
}

template <class T>
void latent_backward(const Latent<T>& a, const LatentGrads<T>& g) {
  using C = compute_t<T>;
  const bool prior_asked = g.prior_mu || g.prior_logvar;
  parallel(a.threads, a.rows, a.samples * a.rows * a.columns, [&](i64 begin, i64 end) {
    Noise<C> noise(Key(a.seed), a.samples, a.sample_offset, a.row_offset);
    LatentTile<T> t;
    C grad_z_buffer[kTile], kl_buffer[kTile], out_buffer[kTile], inverse_sigma[kTile];
    // Sums over samples in two levels, blocks of kSamplesPerBlock and then the blocks: thousands must not cost digits.
    C sum[kTile], sum_eps[kTile], sum_prior[kTile], sum_prior_logvar[kTile];
    C part[kTile], part_eps[kTile], part_prior[kTile], part_prior_logvar[kTile];
    C *const sums[] = {sum, sum_eps, sum_prior, sum_prior_logvar};
    C *const parts[] = {part, part_eps, part_prior, part_prior_logvar};
    const int used = prior_asked ? 4 : 2;
    for (i64 b = begin; b < end; ++b) {
      for (i64 column = 0; column < a.columns; column += kTile) {
        const int n = tile_width(a.columns, column);
        if (b == begin || a.columns > kTile) noise.columns(column, n);
        t.read(a, b, column, n);
        const C *mu = t.mu, *prior_mu = t.prior_mu, *prior_logvar = t.prior_logvar, *logvar = t.logvar;
        const C *clamped = t.clamped, *sigma = t.sigma, *precision = t.precision;
        for (int j = 0; j < used; ++j) {
          fill(sums[j], C(0), n);
          fill(parts[j], C(0), n);
        }
        if (g.path) {
#pragma omp simd
          for (int i = 0; i < n; ++i) inverse_sigma[i] = exp_(C(-0.5) * clamped[i]);
        }
        double entropy = 0;
        if (g.z || g.log_ratio) {
          for (i64 k = 0; k < a.samples; ++k) {
            const C* eps = noise(k, b, a.samples == 1 ? end : a.samples);
            const C* grad_z = grad_z_buffer;
            if (g.z) {
              grad_z = load(grad_z_buffer, g.z.at(k, b, column), g.z.s2, n);
            } else {
              fill(grad_z_buffer, C(0), n);
            }
            const C ratio = g.log_ratio ? *g.log_ratio.at(k, b) : C(0);
            const C weight = g.weight ? *g.weight.at(k, b) : C(1);
            entropy += ratio * weight;
            auto go = [&](auto with_ratio, auto with_path, auto with_prior) {
              latent_accumulate<decltype(with_ratio)::value, decltype(with_path)::value, decltype(with_prior)::value, C>(
                  n, mu, sigma, inverse_sigma, prior_mu, precision, eps, grad_z, ratio, weight, part, part_eps,
                  part_prior, part_prior_logvar);
            };
            if (!g.log_ratio) {
              go(No{}, No{}, No{});
            } else if (g.path) {
              prior_asked ? go(Yes{}, Yes{}, Yes{}) : go(Yes{}, Yes{}, No{});
            } else {
              prior_asked ? go(Yes{}, No{}, Yes{}) : go(Yes{}, No{}, No{});
            }
            if ((k + 1) % kSamplesPerBlock && k + 1 < a.samples) continue;
            for (int j = 0; j < used; ++j) {
#pragma omp simd
              for (int i = 0; i < n; ++i) {
                sums[j][i] += parts[j][i];
                parts[j][i] = C(0);
              }
            }
          }
        }
        if (g.path) entropy = 0;
        const C* kl = kl_buffer;
        if (g.kl) {
          kl = load(kl_buffer, g.kl.at(b, column), g.kl.s1, n);
        } else {
          fill(kl_buffer, C(0), n);
        }
        const bool with_kl = static_cast<bool>(g.kl);
        const i64 offset = b * a.columns + column;
        if (g.mu) {
          C* out = target(g.mu + offset, out_buffer);
#pragma omp simd
          for (int i = 0; i < n; ++i) {
            const C pull = (mu[i] - prior_mu[i]) * precision[i];
            out[i] = sum[i] + (with_kl ? kl[i] * pull : C(0));
          }
          commit(g.mu + offset, out, n);
        }
        if (g.logvar) {
          C* out = target(g.logvar + offset, out_buffer);
#pragma omp simd
          for (int i = 0; i < n; ++i) {
            const C excess = expm1_(clamped[i] - prior_logvar[i]);
            const C v = C(0.5) * sum_eps[i] * sigma[i] + C(0.5) * (static_cast<C>(entropy) + (with_kl ? kl[i] * excess : C(0)));
            // Comparing for inequality keeps the NaN of a NaN log variance.
            out[i] = clamped[i] < logvar[i] || clamped[i] > logvar[i] ? C(0) : v;
          }
          commit(g.logvar + offset, out, n);
        }
        if (g.prior_mu) {
          C* out = target(g.prior_mu + offset, out_buffer);
#pragma omp simd
          for (int i = 0; i < n; ++i) {
            const C pull = (mu[i] - prior_mu[i]) * precision[i];
            out[i] = sum_prior[i] - (with_kl ? kl[i] * pull : C(0));
          }
          commit(g.prior_mu + offset, out, n);
        }
        if (g.prior_logvar) {
          C* out = target(g.prior_logvar + offset, out_buffer);
#pragma omp simd
          for (int i = 0; i < n; ++i) {
            const C delta = mu[i] - prior_mu[i];
            const C excess = expm1_(clamped[i] - prior_logvar[i]) + delta * delta * precision[i];
            out[i] = C(0.5) * (sum_prior_logvar[i] - (with_kl ? kl[i] * excess : C(0)));
          }
          commit(g.prior_logvar + offset, out, n);
        }
      }
    }
  });
}

// What every entry point takes of q, p and the noise.
struct LatentArguments {
  Matrix mu, logvar, prior_mu, prior_logvar;  // (B, D); the priors may be null, for N(0, I)
  address seed;                               // of an int64
  i64 samples, rows, columns, sample_offset, row_offset;
  double logvar_min, logvar_max;
  int threads;

  template <class T>
  Latent<T> as() const {
    using C = compute_t<T>;
    return {view<const T>(mu), view<const T>(logvar), view<const T>(prior_mu), view<const T>(prior_logvar),
            *reinterpret_cast<const std::uint64_t*>(seed), samples, rows, columns, sample_offset, row_offset,
            static_cast<C>(logvar_min), static_cast<C>(logvar_max), threads};
  }
};

// @param z (K, B, D), @param kl (B), or (B, D) with per_dimension: contiguous, written
inline void rsample_kl(int dtype, address z, address kl, Matrix mu, Matrix logvar, Matrix prior_mu, Matrix prior_logvar,
                       address seed, i64 samples, i64 rows, i64 columns, i64 sample_offset, i64 row_offset,
                       double logvar_min, double logvar_max, bool per_dimension, int threads) {
  const LatentArguments a{mu, logvar, prior_mu, prior_logvar, seed, samples, rows, columns, sample_offset, row_offset,
                          logvar_min, logvar_max, threads};
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    latent_forward<T>(a.as<T>(), pointer<T>(z), pointer<compute_t<T>>(kl), per_dimension, nullptr);
  });
}

// @param log_ratio (K, B): contiguous, written
inline void rsample_log_ratio(int dtype, address z, address log_ratio, Matrix mu, Matrix logvar, Matrix prior_mu,
                              Matrix prior_logvar, address seed, i64 samples, i64 rows, i64 columns, i64 sample_offset,
                              i64 row_offset, double logvar_min, double logvar_max, int threads) {
  const LatentArguments a{mu, logvar, prior_mu, prior_logvar, seed, samples, rows, columns, sample_offset, row_offset,
                          logvar_min, logvar_max, threads};
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    latent_forward<T>(a.as<T>(), pointer<T>(z), nullptr, false, pointer<compute_t<T>>(log_ratio));
  });
}

// @param out_mu, out_logvar, out_prior_mu, out_prior_logvar (B, D): contiguous, written, null where not asked for
// @param grad_z (K, B, D), @param grad_kl (B, D): null where nothing arrives
inline void rsample_kl_backward(int dtype, address out_mu, address out_logvar, address out_prior_mu,
                                address out_prior_logvar, Matrix grad_z, Matrix grad_kl, Matrix mu, Matrix logvar,
                                Matrix prior_mu, Matrix prior_logvar, address seed, i64 samples, i64 rows, i64 columns,
                                i64 sample_offset, i64 row_offset, double logvar_min, double logvar_max, int threads) {
  const LatentArguments a{mu, logvar, prior_mu, prior_logvar, seed, samples, rows, columns, sample_offset, row_offset,
                          logvar_min, logvar_max, threads};
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    using C = compute_t<T>;
    latent_backward<T>(a.as<T>(), {view<const T>(grad_z), view<const C>(grad_kl), {}, {}, false, pointer<T>(out_mu),
                                   pointer<T>(out_logvar), pointer<T>(out_prior_mu), pointer<T>(out_prior_logvar)});
  });
}

// @param grad_log_ratio (K, B), @param weight (K, B): null where nothing arrives, and without DReG
inline void rsample_log_ratio_backward(int dtype, address out_mu, address out_logvar, address out_prior_mu,
                                       address out_prior_logvar, Matrix grad_z, Matrix grad_log_ratio, Matrix weight,
                                       Matrix mu, Matrix logvar, Matrix prior_mu, Matrix prior_logvar, address seed,
                                       i64 samples, i64 rows, i64 columns, i64 sample_offset, i64 row_offset,
                                       double logvar_min, double logvar_max, bool path, int threads) {
  const LatentArguments a{mu, logvar, prior_mu, prior_logvar, seed, samples, rows, columns, sample_offset, row_offset,
                          logvar_min, logvar_max, threads};
  for_dtype(dtype, [&](auto t) {
    using T = decltype(t);
    using C = compute_t<T>;
    latent_backward<T>(a.as<T>(),
                       {view<const T>(grad_z), {}, view<const C>(grad_log_ratio), view<const C>(weight), path,
                        pointer<T>(out_mu), pointer<T>(out_logvar), pointer<T>(out_prior_mu), pointer<T>(out_prior_logvar)});
  });
}
