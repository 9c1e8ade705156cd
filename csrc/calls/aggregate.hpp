// An aggregate posterior and its marginals: ops/aggregate.py.
#pragma once

#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

// z (N, D), mu (U, D), logvar (U, D), all of one dtype, and the size of the data set, 0 for equal weights.
template <class Caller>
struct AggregateArguments {
  GivenOf<Caller> z, mu, logvar;
  i64 dataset_size;
  AggregateArguments(Caller& from, const Contract& contract)
      : z(from.given()), mu(from.given()), logvar(from.given()), dataset_size(from.integer()) {
    contract.expect("z", z, z.wide(), {-1, -1});
    contract.expect("mu", mu, z.dtype, {-1, z.n1});
    contract.expect("logvar", logvar, z.dtype, {mu.n0, z.n1});
    contract.expect_count("the number of components", mu.n0, dataset_size ? 2 : 1);
    contract.expect_count("dataset_size", dataset_size, dataset_size ? mu.n0 : 0);
    if (dataset_size && z.n0 % mu.n0)
      contract.refuse("z", z, "a multiple of " + std::to_string(mu.n0) + " rows, whole draws of the batch");
  }
};

// z, components, the size of the data set -> log q(z), log q(z_d). An empty z is left to `otherwise`.
struct AggregateLogProb {
  static constexpr const char* kName = "aggregate_log_prob";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(aggregate_log_prob);
    from.read_otherwise();
    const AggregateArguments<Caller> a(from, {kName});
    if (a.z.size() == 0) return from.otherwise();
    MadeOf<Caller> out = make(a.z, {a.z.n0}, a.z.dtype), each = make_like(a.z, a.z.dtype);
    from.run(kernel, a.z, a.mu, a.logvar, a.dataset_size, out, each, from.threads());
    return from.results({std::move(out), std::move(each)});
  }
};

// Upstream gradients of both results, the results, the op's arguments, need -> gradients of z, mu and logvar.
struct AggregateLogProbBackward {
  static constexpr const char* kName = "aggregate_log_prob_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(aggregate_log_prob_backward);
    from.read_otherwise();
    const Tensor grad = from.tensor(), grad_each = from.tensor(), log_q = from.tensor(),
                 log_q_each = from.tensor();
    const Contract contract{kName};
    const AggregateArguments<Caller> a(from, contract);
    if (grad.given) contract.expect("grad", grad, a.z.dtype, {a.z.n0});
    if (grad_each.given) contract.expect("grad_each", grad_each, a.z.dtype, {a.z.n0, a.z.n1});
    contract.expect("log_q", log_q, a.z.dtype, {a.z.n0});
    contract.expect("log_q_each", log_q_each, a.z.dtype, {a.z.n0, a.z.n1});
    if (a.z.size() == 0) return from.otherwise();
    const Need need = from.need();
    MadeOf<Caller> to[3];
    const GivenOf<Caller>* of[] = {&a.z, &a.mu, &a.logvar};
    for (int i = 0; i < 3; ++i) {
      if (need[i]) to[i] = make_like(*of[i], a.z.dtype);
    }
    from.run(kernel, grad, grad_each, log_q, log_q_each, a.z, a.mu, a.logvar, a.dataset_size, to[0], to[1],
             to[2], from.threads());
    return from.results(std::move(to));
  }
};

}  // namespace fastvae
