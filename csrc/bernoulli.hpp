// Row-reduced Bernoulli log-likelihood from logits and its gradients. The mathematics stands in fastvae/ops/bernoulli.py.

template <class X, class P>
struct Bernoulli {
  using Parameter = P;
  using C = compute_t<P>;
  View<const X> x;       // (B, X): s0, s1
  View<const P> logits;  // (K, B, X)
  bool* out_of_range;    // set where a target lies outside [0, 1]
  View<const C> grad;    // (K, B)
  X* grad_x;             // (B, X)
  P* grad_logits;        // (K, B, X)
  i64 samples, rows, columns;
};

template <class C>
FASTVAE_LOOP bool within_unit_interval(int n, const C* x) {  // or NaN
  C low = 0, high = 1;
#pragma omp simd reduction(min : low) reduction(max : high)
  for (int i = 0; i < n; ++i) {
    low = x[i] < low ? x[i] : low;
    high = x[i] > high ? x[i] : high;
  }
  return low == C(0) && high == C(1);
}

// The sum of t |l|, t what the target lacks of the side the logit is on; and exp(-|l|) of each element.
template <class C>
FASTVAE_LOOP double bernoulli_sum(int n, const C* __restrict x, const C* __restrict logits, C* __restrict e) {
  return sum_over<C>(n, [=](int i) {
    const C l = logits[i], v = x[i], magnitude = abs_(l);
    e[i] = exp_negative(-magnitude);
    // 0 * inf is 0: certain and right.
    const C miss = l > C(0) ? C(1) - v : v;
    return miss == C(0) ? C(0) : miss * magnitude;
  });
}

// The log-likelihood of each element: log(1 + e) by itself, for rows too short to share logarithms.
template <class C>
FASTVAE_LOOP void bernoulli_terms(int n, const C* __restrict x, const C* __restrict logits, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C l = logits[i], v = x[i], magnitude = abs_(l);
    const C miss = l > C(0) ? C(1) - v : v;
    out[i] = -((miss == C(0) ? C(0) : miss * magnitude) + log1p_(exp_negative(-magnitude)));
  }
}

// The derivative by the logits times g.
template <class C>
FASTVAE_LOOP void bernoulli_gradient(int n, C g, const C* __restrict x, const C* __restrict logits, C* __restrict out) {
#pragma omp simd
  for (int i = 0; i < n; ++i) {
    const C l = logits[i], e = exp_negative(-abs_(l));
    const C sigmoid = (l >= C(0) ? C(1) : e) / (C(1) + e);
    out[i] = g * (x[i] - sigmoid);
  }
}

template <class X, class P>
struct BernoulliBody {
  using C = compute_t<P>;
  const Bernoulli<X, P>& a;
  C x_buffer[kTile], logits_buffer[kTile], out_buffer[kBuffer];
  double sum_x[kTile];  // over samples
  bool outside = false;

  explicit BernoulliBody(const Bernoulli<X, P>& params) : a(params) {}

  void begin_tile(i64, int) {}

  // Longer rows gain more by sharing logarithms (measured: they are even near 200).
  static bool takes_tiles(const Bernoulli<X, P>& params) { return params.columns <= 192; }

  void add_sums(i64 k, i64 b, const Tile& t, double* sums) {
    const C* x = load(x_buffer, a.x.at(b, 0), a.x.s0, a.x.s1, t);
    const C* logits = load(logits_buffer, a.logits.at(k, b), a.logits.s1, a.logits.s2, t);
    if (k == 0) outside |= !within_unit_interval(t.size(), x);
    bernoulli_terms(t.size(), x, logits, out_buffer);
    add_row_sums(out_buffer, t, sums);
  }

  double part(i64 k, i64 b, i64 column, int n) {
    const C* x = load(x_buffer, a.x.at(b, column), a.x.s1, n);
    const C* logits = load(logits_buffer, a.logits.at(k, b, column), a.logits.s2, n);
    if (k == 0) outside |= !within_unit_interval(n, x);
    const double linear = bernoulli_sum(n, x, logits, out_buffer);
    return -(linear + sum_log1p(out_buffer, n));
  }

  void finish() {
    // Threads may both write; they write the same.
    if (outside) __atomic_store_n(a.out_of_range, true, __ATOMIC_RELAXED);
  }

  void begin_row(int n) { fill(sum_x, 0.0, n); }
  void begin_group(int) {}
  void end_row(i64 b, i64 column, int n) {
    X* place = a.grad_x + b * a.columns + column;
    for (int i = 0; i < n; ++i) assign(place[i], static_cast<C>(sum_x[i]));
  }
  void end_group(i64, i64, int) {}

  void backward(i64 k, i64 b, i64 column, int n) {
    const C* x = load(x_buffer, a.x.at(b, column), a.x.s1, n);
    const C* logits = load(logits_buffer, a.logits.at(k, b, column), a.logits.s2, n);
    const C g = *a.grad.at(k, b);
    if (a.grad_x) add_scaled(n, g, logits, sum_x);
    if (!a.grad_logits) return;
    P* place = a.grad_logits + (k * a.rows + b) * a.columns + column;
    C* out = target(place, out_buffer);
    bernoulli_gradient(n, g, x, logits, out);
    commit(place, out, n);
  }
};

// @param out (K, B): contiguous, written; @param x (B, X), @param logits (K, B, X)
// @return whether all targets lie in [0, 1] (or are NaN)
inline bool bernoulli_log_prob(int data, int parameter, address out, Matrix x, Matrix logits, i64 samples, i64 rows,
                               i64 columns, int threads) {
  bool out_of_range = false;
  for_dtypes(data, parameter, [&](auto x_value, auto p_value) {
    using X = decltype(x_value);
    using P = decltype(p_value);
    const Bernoulli<X, P> a{view<const X>(x), view<const P>(logits), &out_of_range, {}, nullptr, nullptr, samples, rows,
                            columns};
    reduce_rows<BernoulliBody<X, P>>(a, samples, rows, columns, pointer<compute_t<P>>(out), threads);
  });
  return !out_of_range;
}

// @param grad_x (B, X), grad_logits (K, B, X): contiguous, written, null where not asked for; @param grad (K, B)
inline void bernoulli_log_prob_backward(int data, int parameter, address grad_x, address grad_logits, Matrix grad,
                                        Matrix x, Matrix logits, i64 samples, i64 rows, i64 columns, int threads) {
  for_dtypes(data, parameter, [&](auto x_value, auto p_value) {
    using X = decltype(x_value);
    using P = decltype(p_value);
    using C = compute_t<P>;
    const Bernoulli<X, P> a{view<const X>(x), view<const P>(logits), nullptr, view<const C>(grad), pointer<X>(grad_x),
                            pointer<P>(grad_logits), samples, rows, columns};
    for_each_row<BernoulliBody<X, P>>(a, samples, rows, columns, grad_x != 0, threads);
  });
}
