// Draws of a normal with a full covariance: ops/normal_full.py.
#pragma once

#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

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

// Upstream gradients of z and of log q, the noise, the op's arguments, need -> gradients. Without the noise
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

}  // namespace fastvae
