// Estimates of log p(x) from importance weights: estimation/weights.py.
#pragma once

#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

// log_px, tail, powers, moments, count, level, the normal quantile of the interval -> the other fields of
// LogMarginal.
struct EstimatesOfWeights {
  static constexpr const char* kName = "weight_estimates";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(weight_estimates);
    const Tensor log_px = from.tensor();
    const GivenOf<Caller> tail = from.given();
    const Tensor powers = from.tensor(), moments = from.tensor(), count = from.tensor();
    const double level = from.real(), quantile = from.real();
    const Contract contract{kName};
    contract.expect("tail", tail, kFloat64, {-1, -1}, true);
    contract.expect("log_px", log_px, kFloat64, {tail.n1}, true);
    contract.expect("powers", powers, kFloat64, {6, tail.n1}, true);
    contract.expect("moments", moments, kFloat64, {3, 4, tail.n1}, true);
    contract.expect("count", count, kInt64, {tail.n1}, true);
    contract.expect_count("the length of the tail", tail.n0, 2);
    MadeOf<Caller> made[kFields] = {};
    Output to[kFields];
    for (int i = 0; i < kFields; ++i) {
      made[i] = make(tail, {tail.n1}, kFloat64);
      to[i] = made[i];
    }
    from.run(kernel, log_px, tail, powers, moments, count, level, quantile, static_cast<const Output*>(to),
             from.threads());
    return from.results(std::move(made));
  }

 private:
  static constexpr int kFields = 8;
};

}  // namespace fastvae
