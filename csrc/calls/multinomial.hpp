// Counts over an event: ops/multinomial.py.
#pragma once

#include <string>
#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

// x (B, X), or the values (M) of a sparse x, where its rows begin (B + 1) and its columns (M); a mask (B, X);
// and logits (N, X). `fits` is false for empty sums.
template <class Caller>
struct CountArguments {
  GivenOf<Caller> x;
  const Tensor begins, columns, mask;
  GivenOf<Caller> logits;
  int wide;
  i64 batch;
  bool fits;

  CountArguments(Caller& from, const Contract& contract)
      : x(from.given()), begins(from.tensor()), columns(from.tensor()), mask(from.tensor()),
        logits(from.given()), wide(x.dtype == kFloat64 || logits.dtype == kFloat64 ? kFloat64 : kFloat32) {
    contract.expect("logits", logits, kFloating, {-1, -1});
    if (begins.given) {
      contract.expect("x", x, kAnyDtype, {-1});
      contract.expect("begins", begins, kInt64, {-1});
      contract.expect_count("the number of begins", begins.n0);
      contract.expect("columns", columns, kInt64, {x.n0});
      batch = begins.n0 - 1;
    } else {
      contract.expect("x", x, kAnyDtype, {-1, logits.n1});
      batch = x.n0;
    }
    // A bool is read as such a byte.
    if (mask.given) contract.expect("mask", mask, kUInt8, {batch, logits.n1});
    if (batch > 0 ? logits.n0 % batch != 0 : logits.n0 != 0)
      contract.refuse("logits", logits, "a multiple of x's " + std::to_string(batch) + " rows");
    fits = logits.size() > 0 && batch > 0;
  }
};

// x, begins, columns, mask, logits, coefficient -> log-likelihoods, log-sums over the event (N), and the
// numbers of counts (B). `otherwise` is called for empty sums, negative counts, or invalid columns.
struct MultinomialLogProb {
  static constexpr const char* kName = "multinomial_log_prob";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(multinomial_log_prob);
    from.read_otherwise();
    const CountArguments<Caller> a(from, {kName});
    const bool coefficient = from.flag();
    if (!a.fits) return from.otherwise();
    MadeOf<Caller> out = make(a.logits, {a.logits.n0}, a.wide),
                   normaliser = make(a.logits, {a.logits.n0}, a.wide),
                   total = make(a.logits, {a.batch}, a.wide);
    if (!from.run(kernel, a.x, a.begins, a.columns, a.mask, a.logits, coefficient, a.wide == kFloat64, out,
                  normaliser, total, from.threads()))
      return from.otherwise();
    return from.results({std::move(out), std::move(normaliser), std::move(total)});
  }
};

// The upstream gradient, log-sums, numbers of counts, x, begins, columns, mask, logits -> the gradient of the
// logits.
struct MultinomialLogProbBackward {
  static constexpr const char* kName = "multinomial_log_prob_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(multinomial_log_prob_backward);
    from.read_otherwise();
    const Tensor grad = from.tensor(), normaliser = from.tensor(), total = from.tensor();
    const Contract contract{kName};
    const CountArguments<Caller> a(from, contract);
    contract.expect("grad", grad, a.wide, {a.logits.n0});
    contract.expect("normaliser", normaliser, a.wide, {a.logits.n0}, true);
    contract.expect("total", total, a.wide, {a.batch}, true);
    if (!a.fits) return from.otherwise();
    MadeOf<Caller> to = make_like(a.logits, a.logits.dtype);
    from.run(kernel, grad, normaliser, total, a.x, a.begins, a.columns, a.mask, a.logits, a.wide == kFloat64,
             to, from.threads());
    return from.results({std::move(to)});
  }
};

}  // namespace fastvae
