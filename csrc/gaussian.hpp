// Row-reduced diagonal Gaussian log-likelihood and its gradients. The mathematics stands in fastvae/ops/gaussian.py.

// How the log variance is laid out: per element; one row for all samples and rows; one number per row.
enum GaussianLayout { kFull = 0, kColumn = 1, kRow = 2 };

constexpr double kLog2Pi = 1.8378770664093454835606594728112;

template <class X, class P>
struct Gaussian {
  using Parameter = P;
  using C = compute_t<P>;
  View<const X> x;       // (B, X): s0, s1
  View<const P> mean;    // (K, B, X)
  Matrix logvar;         // (K, B, X) of P when full, else of C
  int layout;
  View<const C> grad;    // (K, B)
  X* grad_x;             // (B, X)
  P* grad_mean;          // (K, B, X)
  address grad_logvar;   // (K, B, X) of P when full; (column_partials, X) of C; (K, B) of C
  i64 samples, rows, columns;
};

// The sum of logvar + ((x - mean) / s)^2. exp(-logvar) itself overflows long before what it is a factor of does, here and below.
template <class C>
FASTVAE_LOOP double gaussian_sum(int n, const C* __restrict x, const C* __restrict mean, const C* __restrict logvar) {
  return sum_over<C>(n, [=](int i) {
    const C white = (x[i] - mean[i]) * exp_(C(-0.5) * logvar[i]);
    return logvar[i] + white * white;
  });
}

// The terms of that sum, times -1/2.
template <class C>
FASTVAE_LOOP void gaussian_terms(int n, const C* __restrict x, const C* __restrict mean, const C* __restrict logvar,
                                 C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C white = (x[i] - mean[i]) * exp_(C(-0.5) * logvar[i]);
    out[i] = C(-0.5) * (logvar[i] + white * white);
  }
}

// The derivatives by mean and logvar times g.
template <class C>
FASTVAE_LOOP void gaussian_gradients(int n, C g, const C* __restrict x, const C* __restrict mean,
                                     const C* __restrict logvar, C* __restrict out_mean, C* __restrict out_logvar) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C inverse_s = exp_(C(-0.5) * logvar[i]), white = (x[i] - mean[i]) * inverse_s, part = g * white;
    out_mean[i] = part * inverse_s;
    out_logvar[i] = C(0.5) * (part * white - g);
  }
}

// The same where 1 / s is known.
template <class C, class F>
FASTVAE_LOOP void gaussian_mean_gradient(int n, C g, const C* __restrict x, const C* __restrict mean, F inverse_s,
                                         C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) out[i] = g * ((x[i] - mean[i]) * inverse_s(i)) * inverse_s(i);
}
template <class C>
FASTVAE_LOOP void add_column_gradients(int n, C g, const C* __restrict x, const C* __restrict mean,
                                       const C* __restrict inverse_s, double* __restrict sum) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C white = (x[i] - mean[i]) * inverse_s[i];
    sum[i] += C(0.5) * (g * white * white - g);
  }
}

template <class X, class P>
struct GaussianBody {
  using C = compute_t<P>;
  const Gaussian<X, P>& a;
  C x_buffer[kTile], mean_buffer[kTile], logvar_buffer[kTile], inverse_s[kTile], out_buffer[kBuffer],
      logvar_out_buffer[kTile];
  double sum_x[kTile], sum_column[kTile];  // over samples; over all rows of a group
  double logvar_sum = 0;

  explicit GaussianBody(const Gaussian<X, P>& params) : a(params) {}

  void begin_tile(i64 column, int n) {
    if (a.layout != kColumn) return;
    const C* logvar = load(logvar_buffer, view<const C>(a.logvar).data + column * a.logvar.s2, a.logvar.s2, n);
    C* p = inverse_s;
    logvar_sum = sum_over<C>(n, [=](int i) {
      p[i] = exp_(C(-0.5) * logvar[i]);
      return logvar[i];
    });
  }

  static bool takes_tiles(const Gaussian<X, P>& params) { return params.layout == kFull; }

  void add_sums(i64 k, i64 b, const Tile& t, double* sums) {
    const View<const P> v = view<const P>(a.logvar);
    const C* x = load(x_buffer, a.x.at(b, 0), a.x.s0, a.x.s1, t);
    const C* mean = load(mean_buffer, a.mean.at(k, b), a.mean.s1, a.mean.s2, t);
    const C* logvar = load(logvar_buffer, v.at(k, b), v.s1, v.s2, t);
    gaussian_terms(t.size(), x, mean, logvar, out_buffer);
    for (int r = 0; r < t.rows; ++r) sums[r] += -0.5 * kLog2Pi * t.n;
    add_row_sums(out_buffer, t, sums);
  }

  double part(i64 k, i64 b, i64 column, int n) {
    const C* x = load_data(b, column, n);
    const C* mean = load(mean_buffer, a.mean.at(k, b, column), a.mean.s2, n);
    double sum, logvars = 0;
    if (a.layout == kFull) {
      const C* logvar = load(logvar_buffer, view<const P>(a.logvar).at(k, b, column), a.logvar.s2, n);
      sum = gaussian_sum(n, x, mean, logvar);
    } else if (a.layout == kColumn) {
      const C* p = inverse_s;
      sum = sum_over<C>(n, [=](int i) {
        const C white = (x[i] - mean[i]) * p[i];
        return white * white;
      });
      logvars = logvar_sum;
    } else {
      const C logvar = *view<const C>(a.logvar).at(k, b), p = exp_(C(-0.5) * logvar);
      sum = sum_over<C>(n, [=](int i) {
        const C white = (x[i] - mean[i]) * p;
        return white * white;
      });
      logvars = static_cast<double>(logvar) * n;
    }
    return -0.5 * (kLog2Pi * n + logvars + sum);
  }

  void finish() {}

  void begin_row(int n) { fill(sum_x, 0.0, n); }
  void begin_group(int n) { fill(sum_column, 0.0, n); }
  void end_row(i64 b, i64 column, int n) {
    if (!a.grad_x) return;
    X* place = a.grad_x + b * a.columns + column;
    for (int i = 0; i < n; ++i) assign(place[i], static_cast<C>(-sum_x[i]));
  }
  void end_group(i64 group, i64 column, int n) {
    if (!a.grad_logvar || a.layout != kColumn) return;
    C* place = pointer<C>(a.grad_logvar) + group * a.columns + column;
    for (int i = 0; i < n; ++i) place[i] = static_cast<C>(sum_column[i]);
  }

  void backward(i64 k, i64 b, i64 column, int n) {
    const C* x = load_data(b, column, n);
    const C* mean = load(mean_buffer, a.mean.at(k, b, column), a.mean.s2, n);
    const C g = *a.grad.at(k, b);
    const i64 offset = (k * a.rows + b) * a.columns + column;
    C* out = a.grad_mean ? target(a.grad_mean + offset, out_buffer) : out_buffer;
    if (a.layout == kFull) {
      const C* logvar = load(logvar_buffer, view<const P>(a.logvar).at(k, b, column), a.logvar.s2, n);
      P* place = a.grad_logvar ? pointer<P>(a.grad_logvar) + offset : nullptr;
      C* out_logvar = place ? target(place, logvar_out_buffer) : logvar_out_buffer;
      gaussian_gradients(n, g, x, mean, logvar, out, out_logvar);
      if (place) commit(place, out_logvar, n);
    } else if (a.layout == kColumn) {
      const C* p = inverse_s;
      gaussian_mean_gradient(n, g, x, mean, [=](int i) { return p[i]; }, out);
      if (a.grad_logvar) add_column_gradients(n, g, x, mean, p, sum_column);
    } else {
      const C p = exp_(C(-0.5) * *view<const C>(a.logvar).at(k, b));
      gaussian_mean_gradient(n, g, x, mean, [=](int) { return p; }, out);
      if (a.grad_logvar) {
        const double sum = sum_over<C>(n, [=](int i) {
          const C white = (x[i] - mean[i]) * p;
          return g * white * white - g;
        });
        C& place = pointer<C>(a.grad_logvar)[k * a.rows + b];
        place = (column == 0 ? C(0) : place) + static_cast<C>(0.5 * sum);
      }
    }
    if (a.grad_x) add_scaled(n, C(1), out, sum_x);
    if (a.grad_mean) commit(a.grad_mean + offset, out, n);
  }

  const C* load_data(i64 b, i64 column, int n) { return load(x_buffer, a.x.at(b, column), a.x.s1, n); }
};

// @param out (K, B): contiguous, written
// @param x (B, X), @param mean (K, B, X), @param logvar (K, B, X), of the parameters' type when full and else of the sums'
inline void gaussian_log_prob(int data, int parameter, int layout, address out, Matrix x, Matrix mean, Matrix logvar,
                              i64 samples, i64 rows, i64 columns, int threads) {
  for_dtypes(data, parameter, [&](auto x_value, auto p_value) {
    using X = decltype(x_value);
    using P = decltype(p_value);
    const Gaussian<X, P> a{view<const X>(x), view<const P>(mean), logvar, layout, {}, nullptr, nullptr, 0,
                           samples,          rows,                columns};
    reduce_rows<GaussianBody<X, P>>(a, samples, rows, columns, pointer<compute_t<P>>(out), threads);
  });
}

// @param grad_x (B, X), grad_mean (K, B, X), grad_logvar (by layout): contiguous, written, null where not asked for
// @param grad (K, B)
inline void gaussian_log_prob_backward(int data, int parameter, int layout, address grad_x, address grad_mean,
                                       address grad_logvar, Matrix grad, Matrix x, Matrix mean, Matrix logvar,
                                       i64 samples, i64 rows, i64 columns, int threads) {
  for_dtypes(data, parameter, [&](auto x_value, auto p_value) {
    using X = decltype(x_value);
    using P = decltype(p_value);
    using C = compute_t<P>;
    const Gaussian<X, P> a{view<const X>(x), view<const P>(mean), logvar,          layout,      view<const C>(grad),
                           pointer<X>(grad_x), pointer<P>(grad_mean), grad_logvar, samples, rows, columns};
    const bool across = grad_x || (grad_logvar && layout == kColumn);
    for_each_row<GaussianBody<X, P>>(a, samples, rows, columns, across, threads);
  });
}
