// Log-likelihoods: ops/likelihood.py.
#pragma once

#include <stdexcept>
#include <utility>

#include "arguments.hpp"
#include "calls/caller.hpp"
#include "targets.hpp"

namespace fastvae {

// x (B, X), a mask (B, X) or none, and parameters: the first (B, X) or (K, B, X), the others like it or
// broadcast over samples and rows, over columns, or over all; `fits` says whether they are.
template <class Caller>
struct LikelihoodArguments {
  GivenOf<Caller> x, parameter[kMostParameters];
  int count = 0, wide = kFloat32;
  bool fits;
  Rows rows{};

  LikelihoodArguments(int likelihood, Caller& from, int behind, const Contract& contract) : x(from.given()) {
    const Tensor mask = from.tensor();
    const int outputs = from.left() - behind;
    if (outputs < 1 || outputs > kMostParameters)
      throw std::runtime_error("fastvae._C: log_prob takes one to three parameters");
    if (!x.given || x.flaw != kSound) contract.refuse("x", x, "a tensor on the CPU");
    if (mask.given && (mask.flaw != kSound || mask.dtype != kUInt8))
      contract.refuse("mask", mask, "a tensor of bool on the CPU");
    for (int j = 0; j < outputs; ++j) {
      parameter[j] = from.given();
      if (!parameter[j].given || parameter[j].flaw != kSound || parameter[j].dtype > kFloat16)
        contract.refuse("a parameter", parameter[j], "a floating-point tensor on the CPU");
    }
    const GivenOf<Caller>& first = parameter[0];
    const Tensor full = first.along(3);
    fits = x.axes == 2 && (first.axes == 2 || first.axes == 3) && full.n1 == x.n0 && full.n2 == x.n1 &&
           full.size() > 0 && (!mask.given || (mask.axes == 2 && mask.n0 == x.n0 && mask.n1 == x.n1));
    rows.likelihood = likelihood;
    rows.threads = from.threads();
    rows.x = x;
    rows.mask = mask;
    rows.samples = full.n0;
    rows.rows = x.n0;
    rows.columns = x.n1;
    wide = x.wide();
    for (; count < outputs; ++count) {
      if (parameter[count].dtype == kFloat64) wide = kFloat64;
      fits = fits && parameter[count].axes <= 3 && lay_out(parameter[count].along(3));
    }
  }
  MadeOf<Caller> per_row() const {
    return parameter[0].axes == 2 ? make(x, {rows.rows}, wide) : make(x, {rows.samples, rows.rows}, wide);
  }
  // Gradients of parameters that broadcast are sums, and must not be rounded before.
  int gradient_dtype(int j) const { return rows.kind[j] == kFull ? parameter[j].dtype : wide; }

 private:
  bool lay_out(Tensor p) {
    const bool samples = p.n0 == rows.samples, all_rows = p.n1 == rows.rows, columns = p.n2 == rows.columns;
    int& kind = rows.kind[count];
    if (samples && all_rows) {
      kind = columns ? kFull : kOne;
    } else {
      if (p.n0 != 1 || p.n1 != 1) return false;
      kind = columns ? kColumn : kNumber;
      p.s0 = p.s1 = 0;
    }
    if (!columns) p.s2 = 0;
    rows.p[count] = p;
    return columns || p.n2 == 1;
  }
};

// x, mask, parameters -> log-likelihoods. `otherwise` is called if the arguments do not fit, or x lies
// outside of the support.
struct LogProb {
  static constexpr const char* kName = "log_prob";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(log_prob);
    const int likelihood = from.likelihood();
    from.read_otherwise();
    const LikelihoodArguments<Caller> a(likelihood, from, 0, {kName, kLikelihoods[likelihood]});
    if (!a.fits) return from.otherwise();
    MadeOf<Caller> out = a.per_row();
    if (!from.run(kernel, a.rows, a.wide == kFloat64, out)) return from.otherwise();
    return from.results({std::move(out)});
  }
};

// Upstream gradient, x, mask, parameters, need -> gradients of x and of the parameters.
struct LogProbBackward {
  static constexpr const char* kName = "log_prob_backward";
  static constexpr bool kEmptyForNone = false;
  template <class Caller>
  static ResultsOf<Caller> call(Caller& from) {
    static const auto kernel = FASTVAE_PICK(log_prob_backward);
    const int likelihood = from.likelihood();
    from.read_otherwise();
    const Tensor grad = from.tensor();
    const Contract contract{kName, kLikelihoods[likelihood]};
    const LikelihoodArguments<Caller> a(likelihood, from, 1, contract);
    if (!grad.given || grad.flaw != kSound) contract.refuse("grad", grad, "a tensor on the CPU");
    if (!a.fits || grad.axes != a.parameter[0].axes - 1) return from.otherwise();
    if (grad.axes == 1) {
      contract.expect("grad", grad, a.wide, {a.rows.rows});
    } else {
      contract.expect("grad", grad, a.wide, {a.rows.samples, a.rows.rows});
    }
    const Need need = from.need();
    MadeOf<Caller> to[kMostParameters + 1];
    if (need[0]) to[0] = make_like(a.x, a.x.dtype);
    for (int j = 0; j < a.count; ++j) {
      if (!need[j + 1]) continue;
      if (a.gradient_dtype(j) != a.parameter[j].dtype && !from.converts()) return from.otherwise();
      to[j + 1] = make_like(a.parameter[j], a.gradient_dtype(j));
    }
    from.run(kernel, a.rows, a.wide == kFloat64, RowGradients{grad.along(2), to[0], {to[1], to[2], to[3]}});
    for (int j = 0; j < a.count; ++j) to[j + 1].convert(a.parameter[j].dtype);
    return from.results(std::move(to), a.count + 1);
  }
};

}  // namespace fastvae
