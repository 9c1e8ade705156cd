// Estimates of log p(x), their errors and diagnostics, from the statistics of importance weights. In torch
// they are hundreds of small ops, which take longer than the draws of a small model. The formulas are those
// of fastvae/estimation/weights.py and pareto.py, where they are explained.
#pragma once

#include <vector>

#include "common.hpp"
#include "elementary.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

inline double finite_or_zero(double x) { return __builtin_isinf(x) ? 0.0 : x; }
inline double square(double x) { return x * x; }
inline bool is_finite(double x) { return __builtin_isfinite(x); }
inline bool is_nan(double x) { return __builtin_isnan(x); }
inline double or_nan(double first, double second, bool smaller) {
  if (is_nan(first) || is_nan(second)) return __builtin_nan("");
  return smaller == (first < second) ? first : second;
}
inline double maximum(double a, double b) { return or_nan(a, b, false); }
inline double minimum(double a, double b) { return or_nan(a, b, true); }
// NaN stays NaN.
inline double at_least(double x, double low) { return x < low ? low : x; }
inline double at_most(double x, double high) { return x > high ? high : x; }

// Sums log(1 - theta x[i]) for x >= 0, of which x[0] is the largest: logarithms of products of mantissas,
// exponents apart. Where the sum is small, 1 + e = prod(1 + a) keeps its relative accuracy.
FASTVAE_LOOP double sum_log1m(int n, double theta, const double* x, double sum_of_x) {
  const double farthest = 1 - theta * x[0];  // from 1
  if (!(farthest > 1e-290 && farthest < 1e290)) {
    double sum = 0;
    for (int i = 0; i < n; ++i) sum += __builtin_log1p(-theta * x[i]);
    return sum;
  }
  if (abs_(theta) * sum_of_x < 0.5) {
    double e = 0;
    for (int i = 0; i < n; ++i) e -= theta * x[i] * (1 + e);
    return __builtin_log1p(e);
  }
  constexpr int block = 512;  // mantissas below 2
  double sum = 0;
  for (int first = 0; first < n; first += block) {
    const int last = n - first < block ? n : first + block;
    double product = 1;
    i64 exponent = 0;
#pragma omp simd reduction(* : product) reduction(+ : exponent)
    for (int i = first; i < last; ++i) {
      const i64 bits = bit_cast<i64>(1 - theta * x[i]);
      product *= bit_cast<double>((bits & 0xfffffffffffff) | 0x3ff0000000000000);
      exponent += (bits >> 52) - 1023;
    }
    sum += __builtin_log(product) + static_cast<double>(exponent) * 0.69314718055994530942;
  }
  return sum;
}

inline i64 pareto_tail_length(double k) {
  return static_cast<i64>(__builtin_ceil(at_most(k / 5, 3 * __builtin_sqrt(k))));
}

// The statistics of one example, see WeightSums in fastvae/estimation/sums.py.
struct WeightStatistics {
  static constexpr int kPowers = 6, kOrders = 3, kMoments = 4;
  std::vector<double> tail;
  double powers[kPowers], moments[kOrders][kMoments], count, log_px;
};

enum Estimate { kLogPxError, kEss, kKhat, kJackknife, kJackknifeError, kPsis, kLow, kHigh, kEstimates };

class WeightEstimates {
 public:
  explicit WeightEstimates(int length)
      : statistics{std::vector<double>(static_cast<std::size_t>(length)), {}, {}, 0, 0},
        weight_(static_cast<std::size_t>(length)), excess_(static_cast<std::size_t>(length)) {}

  WeightStatistics statistics;  // to be filled, then compute()

  // All are NaN where the tail is shorter than the fit to these draws needs.
  void compute(double level, double normal_quantile, double* to) {
    const double k = statistics.count, top = statistics.tail[0];
    if (!(k >= 1) || pareto_tail_length(k) >= length()) {
      for (int i = 0; i < kEstimates; ++i) to[i] = __builtin_nan("");
      return;
    }
    relate();
    centre();
    fit();
    const double total = tail_sum_ + rest_[0], log_px = statistics.log_px;
    error_ = __builtin_sqrt(variance_ * (k / (k - 1)));
    to[kLogPxError] = error_;
    to[kEss] = 1 / (1 / k + variance_);
    to[kKhat] = khat_;
    jackknife(total, to);
    to[kPsis] = is_finite(khat_) ? log_mean(smoothed()) : log_px;

    const double below = (1 - level) / 2;
    double skewness = third_ / (variance_ * __builtin_sqrt(variance_));
    skewness = is_nan(skewness) ? 0 : at_most(at_least(skewness, -1), 1);
    double low = log_px + __builtin_log(at_least(1 - error_ * hall(normal_quantile, skewness), below));
    double high = log_px + __builtin_log(1 - error_ * hall(-normal_quantile, skewness));
    high = maximum(high, pareto_end(1 - below));
    const bool nothing = top == -__builtin_inf();
    if (k == 1) low = log_px + __builtin_log(below);
    if (k == 1 || nothing) high = __builtin_inf();
    to[kLow] = nothing ? -__builtin_inf() : low;
    to[kHigh] = is_nan(top) ? top : high;
  }

 private:
  static constexpr int kPowers = WeightStatistics::kPowers;
  std::vector<double> weight_, excess_;  // of the tail, relative to the maximum
  double shift_, rest_[kPowers], tail_sum_;
  double variance_, third_, error_;  // central moments over powers of the sum; standard error
  // The fit of a generalised Pareto distribution to the first n_ weights.
  int n_;
  double khat_, scale_, cutoff_;
  std::vector<double> theta_, xi_, posterior_;
  struct Node {
    double weight, at, spread;
  };
  std::vector<Node> nodes_;

  int length() const { return static_cast<int>(statistics.tail.size()); }
  double log_mean(double total) const {
    return shift_ + __builtin_log(total) - __builtin_log(statistics.count);
  }
  static double rescaled(double power_sum, int order, double log_scale) {
    return power_sum == 0 ? 0 : power_sum * __builtin_exp(order * log_scale);
  }

  void relate() {
    const double* t = statistics.tail.data();
    shift_ = finite_or_zero(t[0]);
    tail_sum_ = 0;
    for (int i = 0; i < length(); ++i) {
      weight_[static_cast<std::size_t>(i)] = __builtin_exp(t[i] - shift_);
      tail_sum_ += weight_[static_cast<std::size_t>(i)];
    }
    const double scale = finite_or_zero(t[length() - 1]) - shift_;
    for (int j = 0; j < kPowers; ++j) rest_[j] = rescaled(statistics.powers[j], j + 1, scale);
  }

  void centre() {
    const auto& m = statistics.moments;
    const double every = m[0][0], mean = m[0][1] / every, total = every * (1 - mean);
    double central[WeightStatistics::kOrders][WeightStatistics::kMoments];
    for (int a = 0; a < WeightStatistics::kOrders; ++a) {
      for (int b = 0; b < WeightStatistics::kMoments; ++b) central[a][b] = m[a][b];
      for (int b = 1; b < WeightStatistics::kMoments; ++b) {
        for (int i = WeightStatistics::kMoments - 1; i >= b; --i) central[a][i] -= mean * central[a][i - 1];
      }
    }
    variance_ = at_least(central[1][2], 0) / square(total);
    third_ = -central[2][3] / (total * total * total);
  }

  void jackknife(double total, double* to) const {
    const double *t = statistics.tail.data(), k = statistics.count, second = finite_or_zero(t[1]);
    double others = 0, first = 0, squares = 0, of_shares = 0;
    for (int i = 1; i < length(); ++i) others += __builtin_exp(t[i] - second);
    others += rescaled(statistics.powers[0], 1, finite_or_zero(t[length() - 1]) - second);
    const double without = second - shift_ + __builtin_log(others) - __builtin_log(total);
    for (int i = 0; i < length(); ++i) {
      const double share = weight_[static_cast<std::size_t>(i)] / total;
      const double left_out = i == 0 ? without : __builtin_log1p(-share);
      first += left_out;
      squares += square(left_out);
      of_shares += square(share);
    }
    // Coefficients of x^j in log(1 - x) and in its square.
    static constexpr double of_log[] = {-1, -1 / 2.0, -1 / 3.0, -1 / 4.0, -1 / 5.0, -1 / 6.0},
                            of_square[] = {0, 1, 1, 11 / 12.0, 5 / 6.0, 137 / 180.0};
    double scaled[kPowers], power = 1;
    for (int j = 0; j < kPowers; ++j) {
      scaled[j] = rest_[j] / (power *= total);
      first += of_log[j] * scaled[j];
      squares += of_square[j] * scaled[j];
    }
    const auto& m = statistics.moments;
    const double every = m[0][0];
    const double uneven =
        (m[1][0] / square(every) - 1 / k) / 2 + (m[2][0] / (every * every * every) - 1 / square(k)) / 3;
    const double value = log_mean(total) - (k - 1) * (first / k - __builtin_log1p(-1 / k) + uneven / k);
    const double of_delta = of_shares + scaled[1] - 1 / k;
    const double ratio = k * of_delta < 1e-8 ? square(k / (k - 1)) : (squares - square(first) / k) / of_delta;
    const bool nothing = t[0] == -__builtin_inf();
    to[kJackknife] = nothing && k > 1 ? -__builtin_inf() : value;
    to[kJackknifeError] = nothing ? __builtin_nan("") : __builtin_sqrt(variance_ * ratio * (k - 1) / k);
  }

  void fit() {
    const double* t = statistics.tail.data();
    const i64 tail = pareto_tail_length(statistics.count);
    cutoff_ = at_least(t[tail] - shift_, __builtin_log(__DBL_MIN__));
    if (is_nan(t[0])) cutoff_ = t[0];
    n_ = 0;
    const double threshold = __builtin_exp(cutoff_);
    double sum = 0;
    // Descending, so that those above the cutoff come first; NaN compares false.
    for (; n_ < length() && t[n_] - shift_ > cutoff_; ++n_) {
      const double excess = __builtin_expm1(t[n_] - shift_ - cutoff_) * threshold;
      excess_[static_cast<std::size_t>(n_)] = excess;
      sum += excess;
    }
    if (tail <= 4 || is_nan(t[0]) || t[0] == -__builtin_inf()) {
      khat_ = __builtin_nan("");
    } else if (t[0] - shift_ - cutoff_ < 1e-3) {
      khat_ = -__builtin_inf();
    } else if (n_ <= 4) {
      khat_ = __builtin_inf();
    } else {
      fit_shape(sum);
    }
  }
  // Zhang and Stephens' posterior mean.
  void fit_shape(double sum) {
    const double n = n_, m = 30 + __builtin_floor(__builtin_sqrt(n));
    const double* x = excess_.data();
    const double quartile = x[n_ - static_cast<int>(__builtin_floor(n / 4 + 0.5))];
    const int candidates = static_cast<int>(m);
    theta_.clear();
    xi_.clear();
    posterior_.clear();
    double highest = -__builtin_inf();
    for (int j = 1; j <= candidates; ++j) {
      const double theta = 1 / x[0] + (1 - __builtin_sqrt(m / (j - 0.5))) / (3 * quartile);
      const double xi = sum_log1m(n_, theta, x, sum) / n;
      const double profile = n * (__builtin_log(-theta / xi) - xi - 1);
      theta_.push_back(theta);
      xi_.push_back(xi);
      posterior_.push_back(profile);
      highest = maximum(highest, profile);
    }
    double total = 0, kept = 0, best = 0;
    for (double& p : posterior_) total += p = __builtin_exp(p - highest);
    for (std::size_t j = 0; j < posterior_.size(); ++j) {
      double& p = posterior_[j];
      p /= total;
      if (!(p >= 10 * __DBL_EPSILON__)) p = 0;
      if (p == 0) continue;
      kept += p;
      best += theta_[j] * p;
    }
    best /= kept;
    const double found = sum_log1m(n_, best, x, sum) / n;
    khat_ = (n * found + 10 * 0.5) / (n + 10);
    scale_ = -found / best;
  }

  // The sum of the weights, those above the cutoff replaced by quantiles.
  double smoothed() const {
    const double threshold = __builtin_exp(cutoff_);
    double total = rest_[0];
    for (int i = n_; i < length(); ++i) total += weight_[static_cast<std::size_t>(i)];
    for (int i = 0; i < n_; ++i) {
      const double x = -__builtin_log1p(-at_most((i + 0.5) / n_, 1 - 1e-16));
      const double grown = abs_(khat_) < 1e-8 ? x : __builtin_expm1(khat_ * x) / khat_;
      total += at_most(threshold + scale_ * grown, 1);
    }
    return total;
  }

  static double hall(double z, double skewness) {
    const double a = abs_(skewness) < 1e-12 ? 1e-12 : skewness, x = a * (z - a / 6);
    const double root = x > -0.5 ? __builtin_expm1(__builtin_log1p(x) / 3) : __builtin_cbrt(1 + x) - 1;
    return 3 * root / a;
  }

  double pareto_end(double probability) {
    if (!is_finite(khat_)) return khat_ == __builtin_inf() ? khat_ : -__builtin_inf();
    const double k = statistics.count, n = n_, share = n / k;
    double mean = rest_[0], found_above = 0, within = 0;
    for (int i = n_; i < length(); ++i) mean += weight_[static_cast<std::size_t>(i)];
    mean /= k - n;
    for (int i = 0; i < n_; ++i) found_above += weight_[static_cast<std::size_t>(i)];
    found_above /= n;
    for (int i = 0; i < n_; ++i) within += square(weight_[static_cast<std::size_t>(i)] - found_above);
    within /= n;
    const double every = k * variance_ * square((1 - share) * mean + share * found_above);
    const double gap = minimum(found_above - mean, __builtin_sqrt(every / (share * (1 - share))));
    const double threshold = __builtin_exp(cutoff_), beyond = at_least(every - share * within, 0);
    // Nodes and weights of Gauss-Hermite quadrature for N(0, 1).
    static constexpr double quadrature[3][2] = {
        {-1.7320508075688772935, 1 / 6.0}, {0, 2 / 3.0}, {1.7320508075688772935, 1 / 6.0}};
    double open = 0, all = 0, used = 0, begin = __builtin_inf(), end = -__builtin_inf();
    nodes_.clear();
    for (const auto& node : quadrature) {
      const double factor = __builtin_exp(node[0] / __builtin_sqrt(n));
      for (std::size_t j = 0; j < posterior_.size(); ++j) {
        const double weight = posterior_[j] * node[1], shape = xi_[j] * factor;
        if (weight == 0) continue;
        all += weight;
        if (!(shape < 1)) {
          open += weight;
          continue;
        }
        const double above = threshold - shape / theta_[j] / (1 - shape);
        if (!is_finite(above)) continue;
        const double total = (1 - share) * mean + share * above, distance = above - found_above;
        const double variance = beyond + share * (1 - share) * distance * (2 * gap + distance);
        const double spread = __builtin_sqrt((variance > 0 ? variance : every) / k) / total;
        const double at = __builtin_log(total);
        nodes_.push_back({weight, at, spread});
        used += weight;
        begin = at - 7 * spread < begin ? at - 7 * spread : begin;
        end = at + 7 * spread > end ? at + 7 * spread : end;
      }
    }
    if (!(open / all < 0.25)) return __builtin_inf();
    return shift_ + quantile(probability * used, begin, end);
  }
  // Where the nodes' distribution functions sum to `target`: Newton's method, and where it would leave the
  // bracket or converges slowly, bisection.
  double quantile(double target, double begin, double end) const {
    double value = 0.5 * (begin + end), before = end - begin;
    for (int step = 0; step < 200; ++step) {
      double excess = -target, slope = 0;
      for (const Node& node : nodes_) {
        const double u = (value - node.at) / node.spread;
        excess += node.weight * 0.5 * __builtin_erfc(-0.70710678118654752440 * u);
        slope += node.weight * __builtin_exp(-0.5 * u * u) / node.spread;
      }
      slope *= 0.39894228040143267794;
      if (is_nan(excess)) return excess;
      (excess < 0 ? begin : end) = value;
      double next = value - excess / slope;
      if (!(next > begin && next < end) || abs_(next - value) > 0.5 * before) next = 0.5 * (begin + end);
      before = abs_(next - value);
      if (before <= 1e-15 * (1 + abs_(next))) return next;
      value = next;
    }
    return value;
  }
};

}  // namespace FASTVAE_ISA
}  // namespace fastvae
