// The ops: reading of arguments, allocation of results, and the kernel to call. Written once for both
// callers, Python (python.hpp) and torch's dispatcher (dispatcher.hpp).
#pragma once

#include <initializer_list>
#include <string>

#include "arguments.hpp"
#include "targets.hpp"
#include "torch.hpp"

namespace fastvae {

template <class Caller>
using GivenOf = typename Caller::Given;
template <class Caller>
using MadeOf = typename Caller::Made;
template <class Caller>
using ResultsOf = typename Caller::Results;

// z (K, B, D), or (K B, D).
template <class Caller>
MadeOf<Caller> make_z(const GivenOf<Caller>& mu, i64 samples, bool flat, int dtype) {
  if (!flat) return make(mu, {samples, mu.n0, mu.n1}, dtype);
  return samples == 1 ? make_like(mu, dtype) : make(mu, {samples * mu.n0, mu.n1}, dtype);
}

template <class Caller>
struct LatentArguments {
  GivenOf<Caller> mu;
  Tensor logvar, prior_mu, prior_logvar, seed_tensor;
  Draw draw;
  Output seed;
  LatentArguments(Caller& from, const Contract& contract)
      : mu(from.given()), logvar(from.tensor()), prior_mu(from.tensor()), prior_logvar(from.tensor()),
        seed_tensor(from.tensor()), draw(from.draw()), seed{seed_tensor.data} {
    contract.expect("mu", mu, kFloating, {-1, -1});
    contract.expect("logvar", logvar, mu.dtype, {mu.n0, mu.n1});
    if (prior_mu.given) contract.expect("prior_mu", prior_mu, mu.dtype, {mu.n0, mu.n1});
    if (prior_logvar.given) contract.expect("prior_logvar", prior_logvar, mu.dtype, {mu.n0, mu.n1});
    contract.expect("seed", seed_tensor, kInt64, {});
    contract.expect_count("samples", draw.samples);
  }
  // What arrives at z or was kept of it, of this dtype.
  void expect_like_z(const Contract& contract, const char* name, const Tensor& t, int dtype) const {
    if (t.given)
      contract.expect_either(name, t, dtype, {draw.samples * mu.n0, mu.n1}, {draw.samples, mu.n0, mu.n1});
  }

  MadeOf<Caller> make_z(int dtype) const {
    return fastvae::make_z<Caller>(mu, draw.samples, draw.flat, dtype);
  }
};

// Gradients of q and p.
template <class Caller>
struct LatentGradients {
  MadeOf<Caller> made[4];
  LatentGradients(const GivenOf<Caller>& like, const Need& need) {
    for (int i = 0; i < 4; ++i) {
      if (need[i]) made[i] = make_like(like, like.dtype);
    }
  }
};

// x, the likelihood's parameters, term, beta, and how, with `behind` arguments more behind them.
template <class Caller>
struct WeighArguments {
  int likelihood, count = 0;
  GivenOf<Caller> x, parameter[kMostParameters], term;
  Tensor beta;
  How how;
  int wide, term_dtype;
  bool fits = true;  // there is something to sum over, and no dtype in the way

  WeighArguments(int its, Caller& from, int behind, const Contract& contract) : likelihood(its) {
    const int outputs = from.left() - 3 - Caller::kHow - behind;
    if (outputs < 1 || outputs > kMostParameters)
      throw std::runtime_error("fastvae._C: weigh takes one to three parameters");
    x = from.given();
    wide = x.wide();
    for (; count < outputs; ++count) {
      parameter[count] = from.given();
      wide = parameter[count].dtype == kFloat64 ? kFloat64 : wide;
    }
    contract.expect("x", x, kAnyDtype, {-1, -1});
    contract.expect("the first parameter", parameter[0], kFloating, {-1, x.n1});
    const i64 all = parameter[0].n0;
    if (x.n0 > 0 ? all % x.n0 != 0 : all != 0)
      contract.refuse("the first parameter", parameter[0],
                      "a multiple of x's " + std::to_string(x.n0) + " rows");
    for (int j = 1; j < count; ++j) {
      const Tensor& p = parameter[j];
      const auto fit = [&](std::initializer_list<i64> sizes) { return Contract::fits(p, kFloating, sizes); };
      if (!fit({all, x.n1}) && !fit({all, 1}) && !fit({1, x.n1}) && !fit({x.n1}) && !fit({1, 1}) &&
          !fit({1}) && !fit({}))
        contract.refuse(
            "a further parameter", p,
            "the first one's shape " + Contract::shape({all, x.n1}) + ", a row, a column or a number");
    }
    fits = parameter[0].size() > 0;
    term = from.given();
    if (term.given)
      contract.expect_either("term", term, kFloating, {x.n0 > 0 ? all / x.n0 : -1, x.n0}, {x.n0});
    term_dtype = term.dtype;
    if (term.data && term.dtype != wide) {
      fits = fits && from.converts();
      if (fits) term = from.in_dtype(term, wide);
    }
    beta = from.tensor();
    if (beta.given) contract.expect_either("beta", beta, kFloating, {}, {x.n0});
    how = from.how();
    contract.expect_count("groups", how.groups);
    if (x.n0 > 0 && all / x.n0 % how.groups != 0)
      contract.refuse("the first parameter", parameter[0], "whole groups of samples");
  }
  Weighing weighing(int threads) const {
    const Tensor outputs[kMostParameters] = {parameter[0], parameter[1], parameter[2]};
    return {likelihood, x, count, outputs, term, beta, how, threads};
  }
};

// x (B, X) and parameters: the first (B, X) or (K, B, X), the others like it or broadcast over samples and
// rows, over columns, or over all; `fits` says whether they are.
template <class Caller>
struct LikelihoodArguments {
  GivenOf<Caller> x, parameter[kMostParameters];
  int count = 0, wide = kFloat32;
  bool fits;
  Rows rows{};

  LikelihoodArguments(int likelihood, Caller& from, int behind, const Contract& contract) : x(from.given()) {
    const int outputs = from.left() - behind;
    if (outputs < 1 || outputs > kMostParameters)
      throw std::runtime_error("fastvae._C: log_prob takes one to three parameters");
    if (!x.given || x.flaw != kSound) contract.refuse("x", x, "a tensor on the CPU");
    for (int j = 0; j < outputs; ++j) {
      parameter[j] = from.given();
      if (!parameter[j].given || parameter[j].flaw != kSound || parameter[j].dtype > kFloat16)
        contract.refuse("a parameter", parameter[j], "a floating-point tensor on the CPU");
    }
    const GivenOf<Caller>& first = parameter[0];
    const Tensor full = first.along(3);
    fits = x.axes == 2 && (first.axes == 2 || first.axes == 3) && full.n1 == x.n0 && full.n2 == x.n1 &&
           full.size() > 0;
    rows.likelihood = likelihood;
    rows.threads = from.threads();
    rows.x = x;
    rows.samples = full.n0;
    rows.rows = x.n0;
    rows.columns = x.n1;
    wide = x.wide();
    for (; count < outputs; ++count) {
      if (parameter[count].dtype == kFloat64) wide = kFloat64;
      fits = fits && parameter[count].axes <= 3 && lay_out(parameter[count].along(3));
    }
  }
  MadeOf<Caller> per_row() const {
    return parameter[0].axes == 2 ? make(x, {rows.rows}, wide) : make(x, {rows.samples, rows.rows}, wide);
  }
  // Gradients of parameters that broadcast are sums, and must not be rounded before.
  int gradient_dtype(int j) const { return rows.kind[j] == kFull ? parameter[j].dtype : wide; }

 private:
  bool lay_out(Tensor p) {
    const bool samples = p.n0 == rows.samples, all_rows = p.n1 == rows.rows, columns = p.n2 == rows.columns;
    int& kind = rows.kind[count];
    if (samples && all_rows) {
      kind = columns ? kFull : kOne;
    } else {
      if (p.n0 != 1 || p.n1 != 1) return false;
      kind = columns ? kColumn : kNumber;
      p.s0 = p.s1 = 0;
    }
    if (!columns) p.s2 = 0;
    rows.p[count] = p;
    return columns || p.n2 == 1;
  }
};

// Each op: its name, whether the dispatcher has a tensor [0] for a result that is None, and the call.

struct RsampleKl {
  static constexpr const char* kName = "rsample_kl";
  static constexpr bool kEmptyForNone = true;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(rsample_kl);
    const LatentArguments<Caller> q(from, {kName});
    const bool per_dimension = from.flag(), keep_slope = from.flag();
    const int wide = q.mu.wide();
    MadeOf<Caller> z = q.make_z(q.mu.dtype),
                   kl = per_dimension ? make_like(q.mu, wide) : make(q.mu, {q.mu.n0}, wide), slope;
    if (keep_slope) slope = q.make_z(wide);
    from.run(kernel, z, slope, kl, q.mu, q.logvar, q.prior_mu, q.prior_logvar, q.draw, q.seed, from.threads(),
             per_dimension);
    return from.results({std::move(z), std::move(kl), std::move(slope)});
  }
};

// Upstream gradients of z and the KL, the slope, the op's arguments, need -> gradients. Without the slope
// `otherwise` is called.
struct RsampleKlBackward {
  static constexpr const char* kName = "rsample_kl_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(rsample_kl_backward);
    from.read_otherwise();
    const Tensor grad_z = from.tensor(), grad_kl = from.tensor(), slope = from.tensor();
    const Contract contract{kName};
    const LatentArguments<Caller> q(from, contract);
    const int wide = q.mu.wide();
    q.expect_like_z(contract, "grad_z", grad_z, q.mu.dtype);
    q.expect_like_z(contract, "slope", slope, wide);
    if (grad_kl.given) contract.expect_either("grad_kl", grad_kl, wide, {q.mu.n0}, {q.mu.n0, q.mu.n1});
    if (!slope.data && q.mu.size()) return from.otherwise();
    LatentGradients<Caller> to(q.mu, from.need());
    from.run(kernel, to.made[0], to.made[1], to.made[2], to.made[3], grad_z, grad_kl, slope, q.mu, q.logvar,
             q.prior_mu, q.prior_logvar, q.draw, from.threads());
    return from.results(std::move(to.made));
  }
};

struct RsampleLogRatio {
  static constexpr const char* kName = "rsample_log_ratio";
  static constexpr bool kEmptyForNone = true;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(rsample_log_ratio);
    const LatentArguments<Caller> q(from, {kName});
    from.skip();
    from.skip();
    from.skip();  // the estimator, its alpha and groups, which are the gradient's
    const bool with_paths = from.flag(), keep_slope = from.flag();
    const int wide = q.mu.wide();
    MadeOf<Caller> z = q.make_z(q.mu.dtype), log_ratio = make(q.mu, {q.draw.samples, q.mu.n0}, wide), paths,
                   slope;
    const auto bytes = static_cast<std::size_t>(q.draw.samples * q.mu.n0) * (wide == kFloat64 ? 8 : 4);
    if (with_paths) paths = make(q.mu, {q.draw.samples, q.mu.n0}, wide);
    if (paths.data) std::memset(reinterpret_cast<void*>(paths.data), 0, bytes);
    if (keep_slope) slope = q.make_z(wide);
    from.run(kernel, z, slope, log_ratio, q.mu, q.logvar, q.prior_mu, q.prior_logvar, q.draw, q.seed,
             from.threads());
    return from.results({std::move(z), std::move(log_ratio), std::move(paths), std::move(slope)});
  }
};

// Upstream gradients of z and the log-ratio, weights, the slope, the op's arguments, path, need -> gradients.
struct RsampleLogRatioBackward {
  static constexpr const char* kName = "rsample_log_ratio_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(rsample_log_ratio_backward);
    from.read_otherwise();
    const Tensor grad_z = from.tensor(), grad_log_ratio = from.tensor(), weight = from.tensor(),
                 slope = from.tensor();
    const Contract contract{kName};
    const LatentArguments<Caller> q(from, contract);
    const int wide = q.mu.wide();
    q.expect_like_z(contract, "grad_z", grad_z, q.mu.dtype);
    q.expect_like_z(contract, "slope", slope, wide);
    if (grad_log_ratio.given)
      contract.expect("grad_log_ratio", grad_log_ratio, wide, {q.draw.samples, q.mu.n0});
    if (weight.given) contract.expect("weight", weight, wide, {q.draw.samples, q.mu.n0});
    if (!slope.data && q.mu.size()) return from.otherwise();
    const bool path = from.flag();
    LatentGradients<Caller> to(q.mu, from.need());
    from.run(kernel, to.made[0], to.made[1], to.made[2], to.made[3], grad_z, grad_log_ratio, weight, slope,
             q.mu, q.logvar, q.prior_mu, q.prior_logvar, q.draw, from.threads(), path);
    return from.results(std::move(to.made));
  }
};

// mu, tril, seed, place, keep_noise -> z, log q, the noise.
struct RsampleTril {
  static constexpr const char* kName = "rsample_tril";
  static constexpr bool kEmptyForNone = true;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(rsample_tril);
    const GivenOf<Caller> mu = from.given();
    const Tensor tril = from.tensor(), seed_tensor = from.tensor();
    const Output seed{seed_tensor.data};
    const Place place = from.place();
    const Contract contract{kName};
    contract.expect("mu", mu, kFloating, {-1, -1});
    contract.expect("tril", tril, mu.dtype, {mu.n0, mu.n1 * (mu.n1 + 1) / 2});
    contract.expect("seed", seed_tensor, kInt64, {});
    contract.expect_count("samples", place.samples);
    const int wide = mu.wide();
    MadeOf<Caller> z = make_z<Caller>(mu, place.samples, place.flat, mu.dtype),
                   log_q = make(mu, {place.samples, mu.n0}, wide), eps;
    if (from.flag()) eps = make(mu, {mu.n0, place.samples, mu.n1}, wide);
    from.run(kernel, z, log_q, eps, mu, tril, seed, place, from.threads());
    return from.results({std::move(z), std::move(log_q), std::move(eps)});
  }
};

// Upstream gradients of z and log q, the noise, the op's arguments, need -> gradients. Without the noise
// `otherwise` is called.
struct RsampleTrilBackward {
  static constexpr const char* kName = "rsample_tril_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(rsample_tril_backward);
    from.read_otherwise();
    const Tensor grad_z = from.tensor(), grad_log_q = from.tensor(), eps = from.tensor();
    const GivenOf<Caller> mu = from.given(), tril = from.given();
    const Tensor seed = from.tensor();
    const Place place = from.place();
    const Need need = from.need();
    const Contract contract{kName};
    contract.expect("mu", mu, kFloating, {-1, -1});
    contract.expect("tril", tril, mu.dtype, {mu.n0, mu.n1 * (mu.n1 + 1) / 2});
    contract.expect("seed", seed, kInt64, {});
    contract.expect_count("samples", place.samples);
    if (grad_z.given)
      contract.expect_either("grad_z", grad_z, mu.dtype, {place.samples * mu.n0, mu.n1},
                             {place.samples, mu.n0, mu.n1});
    if (grad_log_q.given) contract.expect("grad_log_q", grad_log_q, mu.wide(), {place.samples, mu.n0});
    if (eps.given) contract.expect("eps", eps, mu.wide(), {mu.n0, place.samples, mu.n1}, true);
    if (need[1] && grad_z.data && !eps.data && mu.size()) return from.otherwise();
    MadeOf<Caller> made[2];
    if (need[0]) made[0] = make_like(mu, mu.dtype);
    if (need[1]) made[1] = make_like(tril, tril.dtype);
    from.run(kernel, made[0], made[1], grad_z, grad_log_q, eps, mu, tril, place, from.threads());
    return from.results(std::move(made));
  }
};

// x, parameters -> log-likelihoods. Calls that do not fit, or whose x is outside the support, are left to
// `otherwise`.
struct LogProb {
  static constexpr const char* kName = "log_prob";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(log_prob);
    const int likelihood = from.likelihood();
    from.read_otherwise();
    const LikelihoodArguments<Caller> a(likelihood, from, 0, {kName, kLikelihoods[likelihood]});
    if (!a.fits) return from.otherwise();
    MadeOf<Caller> out = a.per_row();
    if (!from.run(kernel, a.rows, a.wide == kFloat64, out)) return from.otherwise();
    return from.results({std::move(out)});
  }
};

// Upstream gradient, x, parameters, need -> gradients of x and of the parameters.
struct LogProbBackward {
  static constexpr const char* kName = "log_prob_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(log_prob_backward);
    const int likelihood = from.likelihood();
    from.read_otherwise();
    const Tensor grad = from.tensor();
    const Contract contract{kName, kLikelihoods[likelihood]};
    const LikelihoodArguments<Caller> a(likelihood, from, 1, contract);
    if (!grad.given || grad.flaw != kSound) contract.refuse("grad", grad, "a tensor on the CPU");
    if (!a.fits || grad.axes != a.parameter[0].axes - 1) return from.otherwise();
    if (grad.axes == 1) {
      contract.expect("grad", grad, a.wide, {a.rows.rows});
    } else {
      contract.expect("grad", grad, a.wide, {a.rows.samples, a.rows.rows});
    }
    const Need need = from.need();
    MadeOf<Caller> to[kMostParameters + 1];
    if (need[0]) to[0] = make_like(a.x, a.x.dtype);
    for (int j = 0; j < a.count; ++j) {
      if (!need[j + 1]) continue;
      if (a.gradient_dtype(j) != a.parameter[j].dtype && !from.converts()) return from.otherwise();
      to[j + 1] = make_like(a.parameter[j], a.gradient_dtype(j));
    }
    from.run(kernel, a.rows, a.wide == kFloat64, RowGradients{grad.along(2), to[0], {to[1], to[2], to[3]}});
    for (int j = 0; j < a.count; ++j) to[j + 1].convert(a.parameter[j].dtype);
    return from.results(std::move(to), a.count + 1);
  }
};

// x, parameters, term, beta, how, terms -> bound, mean log-likelihood, weights. Where there is nothing to sum
// over, or x lies where it cannot, `otherwise` is called with them.
struct Weigh {
  static constexpr const char* kName = "weigh";
  static constexpr bool kEmptyForNone = true;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(weigh);
    const int likelihood = from.likelihood();
    from.read_otherwise();
    const WeighArguments<Caller> a(likelihood, from, 1, {kName, kLikelihoods[likelihood]});
    if (!a.fits) return from.otherwise();
    const Weighing w = a.weighing(from.threads());
    MadeOf<Caller> bound = w.scale == 0 ? make(a.x, {a.x.n0}, a.wide) : make(a.x, {}, a.wide), log_likelihood,
                   weights;
    if (from.flag()) log_likelihood = make(a.x, {a.x.n0}, a.wide);
    if (w.log_mean_exp) weights = make(a.x, {w.rows.samples, w.rows.rows}, a.wide);
    if (!from.run(kernel, w, w.wide(), WeighingResults{bound, log_likelihood, weights}))
      return from.otherwise();
    return from.results({std::move(bound), std::move(log_likelihood), std::move(weights)});
  }
};

// Upstream gradients of the bound and of the mean log-likelihood, weights, x, parameters, term, beta, how,
// need -> gradients of x, parameters, term.
struct WeighBackward {
  static constexpr const char* kName = "weigh_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(weigh_backward);
    const int likelihood = from.likelihood();
    from.read_otherwise();
    const Tensor bound = from.tensor(), log_likelihood = from.tensor(), weights_tensor = from.tensor();
    const Output weights{weights_tensor.data};
    const Contract contract{kName, kLikelihoods[likelihood]};
    const WeighArguments<Caller> a(likelihood, from, 1, contract);
    if (!a.fits) return from.otherwise();
    const Weighing w = a.weighing(from.threads());
    if (bound.given) {
      w.scale == 0 ? contract.expect("grad_bound", bound, a.wide, {a.x.n0})
                   : contract.expect("grad_bound", bound, a.wide, {});
    }
    if (log_likelihood.given) contract.expect("grad_log_likelihood", log_likelihood, a.wide, {a.x.n0});
    if (w.log_mean_exp || weights_tensor.given)
      contract.expect("weights", weights_tensor, a.wide, {w.rows.samples, a.x.n0}, true);
    const Need need = from.need();
    // Gradients of parameters that broadcast are sums, and must not be rounded before.
    const auto dtype = [&](int j) { return w.rows.kind[j] == kFull ? a.parameter[j].dtype : a.wide; };
    MadeOf<Caller> to[kMostParameters + 2];
    MadeOf<Caller>& to_term = to[a.count + 1];
    if (need[0]) to[0] = make_like(a.x, a.x.dtype);
    for (int j = 0; j < a.count; ++j) {
      if (!need[j + 1]) continue;
      if (dtype(j) != a.parameter[j].dtype && !from.converts()) return from.otherwise();
      to[j + 1] = make_like(a.parameter[j], dtype(j));
    }
    if (need[a.count + 1]) to_term = make_like(a.term, a.wide);
    address parameters[kMostParameters] = {};
    for (int j = 0; j < a.count; ++j) parameters[j] = to[j + 1];
    from.run(kernel, w, w.wide(), WeighingGradients{bound, log_likelihood, weights},
             RowGradients{{}, to[0], {parameters[0], parameters[1], parameters[2]}}, to_term);
    for (int j = 0; j < a.count; ++j) to[j + 1].convert(a.parameter[j].dtype);
    to_term.convert(a.term_dtype);
    return from.results(std::move(to), a.count + 2);
  }
};

struct LogMeanExp {
  static constexpr const char* kName = "log_mean_exp";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(log_mean_exp);
    const GivenOf<Caller> log_w = from.given();
    const Contract contract{kName};
    contract.expect("log_w", log_w, kFloating, {-1, -1});
    contract.expect_count("the number of samples", log_w.n0);
    const auto column = [&] { return make(log_w, {log_w.n1}, log_w.wide()); };
    MadeOf<Caller> bound = column(), maximum = column(), total = column();
    from.run(kernel, bound, maximum, total, log_w, from.threads());
    return from.results({std::move(bound), std::move(maximum), std::move(total)});
  }
};

struct LogMeanExpBackward {
  static constexpr const char* kName = "log_mean_exp_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(log_mean_exp_backward);
    const Tensor grad = from.tensor();
    const GivenOf<Caller> log_w = from.given();
    const Tensor maximum = from.tensor(), total = from.tensor();
    const Contract contract{kName};
    contract.expect("log_w", log_w, kFloating, {-1, -1});
    contract.expect("grad", grad, log_w.wide(), {log_w.n1});
    contract.expect("maximum", maximum, log_w.wide(), {log_w.n1}, true);
    contract.expect("total", total, log_w.wide(), {log_w.n1}, true);
    MadeOf<Caller> to = make_like(log_w, log_w.dtype);
    from.run(kernel, to, grad, log_w, Output{maximum.data}, Output{total.data}, from.threads());
    return from.results({std::move(to)});
  }
};

}  // namespace fastvae
