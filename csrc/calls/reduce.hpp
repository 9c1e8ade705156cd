// The bound from the decoder's output: ops/reduce.py.
#pragma once

#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

// x, its mask, the likelihood's parameters, term, beta, and how, with `behind` arguments more behind them.
template <class Caller>
struct ReduceArguments {
  int likelihood, count = 0;
  GivenOf<Caller> x, parameter[kMostParameters], term;
  Tensor mask, beta;
  How how;
  int wide, term_dtype;
  bool fits = true;  // there is something to sum over, and no dtype in the way

  ReduceArguments(int its, Caller& from, int behind, const Contract& contract) : likelihood(its) {
    const int outputs = from.left() - 4 - Caller::kHow - behind;
    if (outputs < 1 || outputs > kMostParameters)
      throw std::runtime_error("fastvae._C: reduce takes one to three parameters");
    x = from.given();
    mask = from.tensor();
    wide = x.wide();
    for (; count < outputs; ++count) {
      parameter[count] = from.given();
      wide = parameter[count].dtype == kFloat64 ? kFloat64 : wide;
    }
    contract.expect("x", x, kAnyDtype, {-1, -1});
    // A bool is read as such a byte.
    if (mask.given) contract.expect("mask", mask, kUInt8, {x.n0, x.n1});
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
  BoundReduction reduction(int threads) const {
    const Tensor outputs[kMostParameters] = {parameter[0], parameter[1], parameter[2]};
    return {likelihood, x, mask, count, outputs, term, beta, how, threads};
  }
};

// x, mask, parameters, term, beta, how, terms -> bound, mean log-likelihood, weights. `otherwise` is called
// for empty sums, or if x lies outside of the support.
struct Reduce {
  static constexpr const char* kName = "reduce";
  static constexpr bool kEmptyForNone = true;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(reduce);
    const int likelihood = from.likelihood();
    from.read_otherwise();
    const ReduceArguments<Caller> a(likelihood, from, 1, {kName, kLikelihoods[likelihood]});
    if (!a.fits) return from.otherwise();
    const BoundReduction w = a.reduction(from.threads());
    MadeOf<Caller> bound = w.scale == 0 ? make(a.x, {a.x.n0}, a.wide) : make(a.x, {}, a.wide), log_likelihood,
                   weights;
    if (from.flag()) log_likelihood = make(a.x, {a.x.n0}, a.wide);
    if (w.log_mean_exp) weights = make(a.x, {w.rows.samples, w.rows.rows}, a.wide);
    if (!from.run(kernel, w, w.wide(), ReductionResults{bound, log_likelihood, weights}))
      return from.otherwise();
    return from.results({std::move(bound), std::move(log_likelihood), std::move(weights)});
  }
};

// Upstream gradients of the bound and of the mean log-likelihood, weights, x, mask, parameters, term, beta,
// how, need -> gradients of x, parameters, term.
struct ReduceBackward {
  static constexpr const char* kName = "reduce_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(reduce_backward);
    const int likelihood = from.likelihood();
    from.read_otherwise();
    const Tensor bound = from.tensor(), log_likelihood = from.tensor(), weights_tensor = from.tensor();
    const Output weights{weights_tensor.data};
    const Contract contract{kName, kLikelihoods[likelihood]};
    const ReduceArguments<Caller> a(likelihood, from, 1, contract);
    if (!a.fits) return from.otherwise();
    const BoundReduction w = a.reduction(from.threads());
    if (bound.given) {
      w.scale == 0 ? contract.expect("grad_bound", bound, a.wide, {a.x.n0})
                   : contract.expect("grad_bound", bound, a.wide, {});
    }
    if (log_likelihood.given) contract.expect("grad_log_likelihood", log_likelihood, a.wide, {a.x.n0});
    if (w.log_mean_exp || weights_tensor.given)
      contract.expect("weights", weights_tensor, a.wide, {w.rows.samples, a.x.n0}, true);
    const Need need = from.need();
    // Gradients of broadcast parameters are sums, which must not be rounded before they are complete.
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
    from.run(kernel, w, w.wide(), ReductionGradients{bound, log_likelihood, weights},
             RowGradients{{}, to[0], {parameters[0], parameters[1], parameters[2]}}, to_term);
    for (int j = 0; j < a.count; ++j) to[j + 1].convert(a.parameter[j].dtype);
    to_term.convert(a.term_dtype);
    return from.results(std::move(to), a.count + 2);
  }
};

}  // namespace fastvae
