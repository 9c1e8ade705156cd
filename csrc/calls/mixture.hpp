// The density of a mixture of diagonal normal distributions: ops/mixture.py.
#pragma once

#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

// z (N, D), and the components' mu (U, D), logvar (U, D) and log weights (U), all of one dtype.
template <class Caller>
struct MixtureArguments {
  GivenOf<Caller> z, mu, logvar, log_weight;
  MixtureArguments(Caller& from, const Contract& contract)
      : z(from.given()), mu(from.given()), logvar(from.given()), log_weight(from.given()) {
    contract.expect("z", z, z.wide(), {-1, -1});
    contract.expect("mu", mu, z.dtype, {-1, z.n1});
    contract.expect("logvar", logvar, z.dtype, {mu.n0, z.n1});
    contract.expect("log_weight", log_weight, z.dtype, {mu.n0});
    contract.expect_count("the number of components", mu.n0);
  }
};

// z, components -> log densities, maxima and scaled sums. An empty z is left to `otherwise`.
struct MixtureLogProb {
  static constexpr const char* kName = "mixture_log_prob";
  static constexpr bool kEmptyForNone = true;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(mixture_log_prob);
    from.read_otherwise();
    const MixtureArguments<Caller> a(from, {kName});
    if (a.z.size() == 0) return from.otherwise();
    const auto per_row = [&] { return make(a.z, {a.z.n0}, a.z.dtype); };
    MadeOf<Caller> out = per_row(), maximum = per_row(), total = per_row();
    from.run(kernel, a.z, a.mu, a.logvar, a.log_weight, out, maximum, total, from.threads());
    return from.results({std::move(out), std::move(maximum), std::move(total)});
  }
};

// The upstream gradient, maxima, scaled sums, z, components, need -> gradients of z and of the components.
struct MixtureLogProbBackward {
  static constexpr const char* kName = "mixture_log_prob_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(mixture_log_prob_backward);
    from.read_otherwise();
    const Tensor grad = from.tensor(), maximum = from.tensor(), total = from.tensor();
    const Contract contract{kName};
    const MixtureArguments<Caller> a(from, contract);
    contract.expect("grad", grad, a.z.dtype, {a.z.n0});
    contract.expect("maximum", maximum, a.z.dtype, {a.z.n0});
    contract.expect("total", total, a.z.dtype, {a.z.n0});
    if (a.z.size() == 0) return from.otherwise();
    const Need need = from.need();
    MadeOf<Caller> to[4];
    const GivenOf<Caller>* of[] = {&a.z, &a.mu, &a.logvar, &a.log_weight};
    for (int i = 0; i < 4; ++i) {
      if (need[i]) to[i] = make_like(*of[i], a.z.dtype);
    }
    from.run(kernel, grad, maximum, total, a.z, a.mu, a.logvar, a.log_weight, to[0], to[1], to[2], to[3],
             from.threads());
    return from.results(std::move(to));
  }
};

}  // namespace fastvae
