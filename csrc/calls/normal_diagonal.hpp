// Draws of a diagonal normal: ops/normal_diagonal.py.
#pragma once

#include <cstring>
#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

template <class Caller>
struct DiagonalArguments {
  GivenOf<Caller> mu;
  Tensor logvar, prior_mu, prior_logvar, seed_tensor;
  Draw draw;
  Output seed;
  DiagonalArguments(Caller& from, const Contract& contract)
      : mu(from.given()), logvar(from.tensor()), prior_mu(from.tensor()), prior_logvar(from.tensor()),
        seed_tensor(from.tensor()), draw(from.draw()), seed{seed_tensor.data} {
    contract.expect("mu", mu, kFloating, {-1, -1});
    contract.expect("logvar", logvar, mu.dtype, {mu.n0, mu.n1});
    if (prior_mu.given) contract.expect("prior_mu", prior_mu, mu.dtype, {mu.n0, mu.n1});
    if (prior_logvar.given) contract.expect("prior_logvar", prior_logvar, mu.dtype, {mu.n0, mu.n1});
    contract.expect("seed", seed_tensor, kInt64, {});
    contract.expect_count("samples", draw.samples);
  }
  // Checks an upstream gradient of z, or a tensor saved with z's shape.
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
struct DiagonalGradients {
  MadeOf<Caller> made[4];
  DiagonalGradients(const GivenOf<Caller>& like, const Need& need) {
    for (int i = 0; i < 4; ++i) {
      if (need[i]) made[i] = make_like(like, like.dtype);
    }
  }
};

struct RsampleKl {
  static constexpr const char* kName = "rsample_kl";
  static constexpr bool kEmptyForNone = true;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(rsample_kl);
    const DiagonalArguments<Caller> q(from, {kName});
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

// Upstream gradients of z and of the KL, the slope, the op's arguments, need -> gradients. Without the slope
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
    const DiagonalArguments<Caller> q(from, contract);
    const int wide = q.mu.wide();
    q.expect_like_z(contract, "grad_z", grad_z, q.mu.dtype);
    q.expect_like_z(contract, "slope", slope, wide);
    if (grad_kl.given) contract.expect_either("grad_kl", grad_kl, wide, {q.mu.n0}, {q.mu.n0, q.mu.n1});
    if (!slope.data && q.mu.size()) return from.otherwise();
    DiagonalGradients<Caller> to(q.mu, from.need());
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
    const DiagonalArguments<Caller> q(from, {kName});
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

// Upstream gradients of z and of the log-ratio, weights, the slope, the op's arguments, path, need ->
// gradients.
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
    const DiagonalArguments<Caller> q(from, contract);
    const int wide = q.mu.wide();
    q.expect_like_z(contract, "grad_z", grad_z, q.mu.dtype);
    q.expect_like_z(contract, "slope", slope, wide);
    if (grad_log_ratio.given)
      contract.expect("grad_log_ratio", grad_log_ratio, wide, {q.draw.samples, q.mu.n0});
    if (weight.given) contract.expect("weight", weight, wide, {q.draw.samples, q.mu.n0});
    if (!slope.data && q.mu.size()) return from.otherwise();
    const bool path = from.flag();
    DiagonalGradients<Caller> to(q.mu, from.need());
    from.run(kernel, to.made[0], to.made[1], to.made[2], to.made[3], grad_z, grad_log_ratio, weight, slope,
             q.mu, q.logvar, q.prior_mu, q.prior_logvar, q.draw, from.threads(), path);
    return from.results(std::move(to.made));
  }
};

}  // namespace fastvae
