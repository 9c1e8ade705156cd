// Classes of positions: ops/categorical.py.
#pragma once

#include <string>
#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

// x (B, P), begins (P + 1) or none, logits (N, C, P), or (N, P, C) if classes are `last`, and the class that
// does not count; with begins logits are (N, W). `fits` is false for empty sums.
template <class Caller>
struct ClassArguments {
  GivenOf<Caller> x;
  const Tensor begins;
  GivenOf<Caller> logits;
  bool last;
  double ignored;
  int wide;
  bool fits;

  ClassArguments(Caller& from, const Contract& contract)
      : x(from.given()), begins(from.tensor()), logits(from.given()), last(from.flag()),
        ignored(static_cast<double>(from.integer())),
        wide(x.dtype == kFloat64 || logits.dtype == kFloat64 ? kFloat64 : kFloat32) {
    if (begins.given) {
      contract.expect("logits", logits, kFloating, {-1, -1});
      contract.expect("x", x, kAnyDtype, {-1, -1});
      contract.expect("begins", begins, kInt64, {x.n1 + 1}, true);
      const i64* begin = reinterpret_cast<const i64*>(begins.data);
      bool right = begin[0] == 0 && begin[x.n1] == logits.n1;
      for (i64 p = 0; p < x.n1; ++p) right &= begin[p] < begin[p + 1];
      if (!right) contract.refuse("begins", begins, "ascending from 0 to the columns of logits");
    } else {
      contract.expect("logits", logits, kFloating, {-1, -1, -1});
      contract.expect_count("the number of classes", last ? logits.n2 : logits.n1);
      contract.expect("x", x, kAnyDtype, {-1, last ? logits.n1 : logits.n2});
    }
    if (x.n0 > 0 ? logits.n0 % x.n0 != 0 : logits.n0 != 0)
      contract.refuse("logits", logits, "a multiple of x's " + std::to_string(x.n0) + " rows");
    fits = logits.size() > 0 && x.size() > 0;
  }
};

// x, begins, logits, last, ignored -> log-likelihoods, and the log-sums of each position. `otherwise` is
// called for empty sums, or if x holds anything but classes.
struct CategoricalLogProb {
  static constexpr const char* kName = "categorical_log_prob";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(categorical_log_prob);
    from.read_otherwise();
    const ClassArguments<Caller> a(from, {kName});
    if (!a.fits) return from.otherwise();
    MadeOf<Caller> out = make(a.logits, {a.logits.n0}, a.wide),
                   normaliser = make(a.logits, {a.logits.n0, a.x.n1}, a.wide);
    if (!from.run(kernel, a.x, a.begins, a.logits, a.last, a.ignored, a.wide == kFloat64, out, normaliser,
                  from.threads()))
      return from.otherwise();
    return from.results({std::move(out), std::move(normaliser)});
  }
};

// The upstream gradient, log-sums, x, begins, logits, last, ignored -> the gradient of the logits.
struct CategoricalLogProbBackward {
  static constexpr const char* kName = "categorical_log_prob_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(categorical_log_prob_backward);
    from.read_otherwise();
    const Tensor grad = from.tensor(), normaliser = from.tensor();
    const Contract contract{kName};
    const ClassArguments<Caller> a(from, contract);
    contract.expect("grad", grad, a.wide, {a.logits.n0});
    contract.expect("normaliser", normaliser, a.wide, {a.logits.n0, a.x.n1}, true);
    if (!a.fits) return from.otherwise();
    MadeOf<Caller> to = make_like(a.logits, a.logits.dtype);
    from.run(kernel, grad, normaliser, a.x, a.begins, a.logits, a.last, a.ignored, a.wide == kFloat64, to,
             from.threads());
    return from.results({std::move(to)});
  }
};

}  // namespace fastvae
