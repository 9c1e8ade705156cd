// log-mean-exp: ops/logsumexp.py.
#pragma once

#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

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
