// Mixtures over a component axis: ops/components.py.
#pragma once

#include <stdexcept>
#include <string>
#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

// x (B, E, P), logits (N, C, P), location and log_scale (N, C E, P), and coefficients like them or None; then
// half a bin's width, followed by further arguments. `fits` is false for empty sums, or many channels, which
// `otherwise` computes.
template <class Caller>
struct ComponentsArguments {
  static constexpr int kMost = 4;
  GivenOf<Caller> x, parameter[kMost];
  int wide;
  double setting;
  bool fits;

  ComponentsArguments(Caller& from, const Contract& contract) : x(from.given()), wide(x.wide()) {
    for (GivenOf<Caller>& p : parameter) {
      p = from.given();
      if (p.dtype == kFloat64) wide = kFloat64;
    }
    setting = from.real();
    const Tensor &logits = parameter[0], &coefficients = parameter[3];
    contract.expect("logits", logits, kFloating, {-1, -1, -1});
    contract.expect_count("the number of components", logits.n1);
    contract.expect("x", x, kAnyDtype, {-1, -1, logits.n2});
    if (x.n0 > 0 ? logits.n0 % x.n0 != 0 : logits.n0 != 0)
      contract.refuse("logits", logits, "a multiple of x's " + std::to_string(x.n0) + " rows");
    const char* names[] = {"logits", "location", "log_scale", "coefficients"};
    for (int j = 1; j < kMost; ++j) {
      if (j < 3 || coefficients.given)
        contract.expect(names[j], parameter[j], kFloating, {logits.n0, logits.n1 * x.n1, logits.n2});
    }
    if (coefficients.given && x.n1 != 3)
      contract.refuse("coefficients", coefficients, "None, where x has not three channels");
    fits = logits.size() > 0 && x.size() > 0 && x.n1 <= kMostParameters;
  }
};

// x, parameters, setting -> log-likelihoods, and for each position the log-sums over the logits and over the
// components.
struct ComponentsLogProb {
  static constexpr const char* kName = "components_log_prob";
  static constexpr bool kEmptyForNone = true;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(components_log_prob);
    from.read_otherwise();
    const ComponentsArguments<Caller> a(from, {kName});
    if (!a.fits) return from.otherwise();
    const GivenOf<Caller>& logits = a.parameter[0];
    const auto per_position = [&] { return make(logits, {logits.n0, logits.n2}, a.wide); };
    MadeOf<Caller> out = make(logits, {logits.n0}, a.wide), normaliser = per_position(),
                   joint = per_position();
    from.run(kernel, a.x, logits, a.parameter[1], a.parameter[2], a.parameter[3], a.setting,
             a.wide == kFloat64, out, normaliser, joint, from.threads());
    return from.results({std::move(out), std::move(normaliser), std::move(joint)});
  }
};

// The upstream gradient, both log-sums, x, parameters, setting, need -> gradients of x, which has none, and
// of the parameters.
struct ComponentsLogProbBackward {
  static constexpr const char* kName = "components_log_prob_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(components_log_prob_backward);
    from.read_otherwise();
    const Tensor grad = from.tensor(), normaliser = from.tensor(), joint = from.tensor();
    const Contract contract{kName};
    const ComponentsArguments<Caller> a(from, contract);
    if (!a.fits) return from.otherwise();
    const GivenOf<Caller>& logits = a.parameter[0];
    contract.expect("grad", grad, a.wide, {logits.n0});
    contract.expect("normaliser", normaliser, a.wide, {logits.n0, logits.n2}, true);
    contract.expect("joint", joint, a.wide, {logits.n0, logits.n2}, true);
    const Need need = from.need();
    MadeOf<Caller> to[ComponentsArguments<Caller>::kMost + 1];
    bool any = false;
    for (int j = 0; j < a.kMost; ++j) {
      if (!need[j + 1] || !a.parameter[j].given) continue;
      to[j + 1] = make_like(a.parameter[j], a.parameter[j].dtype);
      any = true;
    }
    if (any)
      from.run(kernel, grad, normaliser, joint, a.x, logits, a.parameter[1], a.parameter[2], a.parameter[3],
               a.setting, a.wide == kFloat64, to[1], to[2], to[3], to[4], from.threads());
    return from.results(std::move(to), a.kMost + 1);
  }
};

}  // namespace fastvae
