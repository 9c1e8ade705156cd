// Kernels called from Python with results that Python allocated: validates their arguments, once for all
// instruction sets.
#pragma once

#include <iterator>
#include <stdexcept>
#include <string>

#include "arguments.hpp"
#include "targets.hpp"

namespace fastvae {

constexpr int compute_dtype(bool wide) { return wide ? kFloat64 : kFloat32; }

// Data, or parameters, of any storage type. float64 is read only by a computation in double.
inline void expect_narrow(const Contract& contract, const char* name, const Tensor& t, bool wide) {
  if (!wide && t.given && t.dtype == kFloat64)
    contract.refuse(name, t, "no float64, unless the computation is in float64");
}

inline void checked_normal(Tensor out, bool wide, Tensor seed, Tensor net, i64 randomisations, i64 samples,
                           i64 rows, i64 columns, i64 sample_offset, i64 row_offset, i64 level, int threads) {
  static const auto kernel = FASTVAE_PICK(normal);
  const Contract contract{"normal"};
  contract.expect("out", out, compute_dtype(wide), {samples, rows, columns}, true);
  if (randomisations > 0) {
    contract.expect("seed", seed, kInt64, {randomisations}, true);
    contract.expect("net", net, kInt64, {base::kNetBits, base::kNetColumns}, true);
  } else {
    contract.expect("seed", seed, kInt64, {});
  }
  kernel({out.data}, wide, {seed.data}, {net.data}, randomisations, samples, rows, columns, sample_offset,
         row_offset, level, threads);
}

// Arguments common to both passes of the likelihoods with a component axis.
inline void expect_grouped(const Contract& contract, const Tensor& x, const Tensor& logits,
                           const Tensor& location, const Tensor& log_scale, const Tensor& coefficients,
                           bool wide) {
  contract.expect("logits", logits, kFloating, {-1, -1, -1});
  const i64 rows = logits.n0, groups = logits.n1, positions = logits.n2;
  contract.expect("x", x, kAnyDtype, {-1, location.given ? -1 : 1, positions});
  if (x.n0 < 1 || rows % x.n0 != 0)
    contract.refuse("logits", logits, "a multiple of x's " + std::to_string(x.n0) + " rows");
  if (x.n1 > kMostParameters) contract.refuse("x", x, "up to three channels");
  expect_narrow(contract, "x", x, wide);
  expect_narrow(contract, "logits", logits, wide);
  if (location.given || log_scale.given) {
    contract.expect("location", location, kFloating, {rows, groups * x.n1, positions});
    contract.expect("log_scale", log_scale, kFloating, {rows, groups * x.n1, positions});
    expect_narrow(contract, "location", location, wide);
    expect_narrow(contract, "log_scale", log_scale, wide);
  }
  if (!coefficients.given) return;
  if (!location.given || x.n1 != 3)
    contract.refuse("coefficients", coefficients, "None, where x has not three channels");
  contract.expect("coefficients", coefficients, kFloating, {rows, groups * 3, positions});
  expect_narrow(contract, "coefficients", coefficients, wide);
}

inline bool checked_grouped_log_prob(Tensor x, Tensor logits, Tensor location, Tensor log_scale,
                                     Tensor coefficients, double setting, bool wide, Tensor out,
                                     Tensor normaliser, Tensor joint, int threads) {
  static const auto kernel = FASTVAE_PICK(grouped_log_prob);
  const Contract contract{"grouped_log_prob"};
  expect_grouped(contract, x, logits, location, log_scale, coefficients, wide);
  const int dtype = compute_dtype(wide);
  contract.expect("out", out, dtype, {logits.n0}, true);
  contract.expect("normaliser", normaliser, dtype, {logits.n0, logits.n2}, true);
  contract.expect("joint", joint, dtype, {logits.n0, logits.n2}, true);
  return kernel(x, logits, location, log_scale, coefficients, setting, wide, {out.data}, {normaliser.data},
                {joint.data}, threads);
}

// A gradient: None, or contiguous, with the shape of its input, and of the input's dtype or another.
inline void expect_gradient(const Contract& contract, const char* name, const Tensor& t, const Tensor& of,
                            int dtype) {
  if (!t.given) return;
  if (of.axes == 0) return contract.expect(name, t, dtype, {}, true);
  if (of.axes == 1) return contract.expect(name, t, dtype, {of.n0}, true);
  if (of.axes == 2) return contract.expect(name, t, dtype, {of.n0, of.n1}, true);
  contract.expect(name, t, dtype, {of.n0, of.n1, of.n2}, true);
}

inline void checked_grouped_log_prob_backward(Tensor grad, Tensor normaliser, Tensor joint, Tensor x,
                                              Tensor logits, Tensor location, Tensor log_scale,
                                              Tensor coefficients, double setting, bool wide,
                                              Tensor to_logits, Tensor to_location, Tensor to_log_scale,
                                              Tensor to_coefficients, int threads) {
  static const auto kernel = FASTVAE_PICK(grouped_log_prob_backward);
  const Contract contract{"grouped_log_prob_backward"};
  expect_grouped(contract, x, logits, location, log_scale, coefficients, wide);
  const int dtype = compute_dtype(wide);
  contract.expect("grad", grad, dtype, {logits.n0});
  contract.expect("normaliser", normaliser, dtype, {logits.n0, logits.n2}, true);
  contract.expect("joint", joint, dtype, {logits.n0, logits.n2}, true);
  expect_gradient(contract, "to_logits", to_logits, logits, logits.dtype);
  // Classes have a gradient for their logits alone, which is written.
  if (!location.given && !to_logits.given) return;
  expect_gradient(contract, "to_location", to_location, location, location.dtype);
  expect_gradient(contract, "to_log_scale", to_log_scale, log_scale, log_scale.dtype);
  expect_gradient(contract, "to_coefficients", to_coefficients, coefficients, coefficients.dtype);
  kernel(grad, normaliser, joint, x, logits, location, log_scale, coefficients, setting, wide,
         {to_logits.data}, {to_location.data}, {to_log_scale.data}, {to_coefficients.data}, threads);
}

inline void expect_mixture(const Contract& contract, const Tensor& z, const Tensor& mu, const Tensor& logvar,
                           const Tensor& log_weight) {
  contract.expect("z", z, z.dtype == kFloat64 ? kFloat64 : kFloat32, {-1, -1});
  contract.expect("mu", mu, z.dtype, {-1, z.n1});
  contract.expect("logvar", logvar, z.dtype, {mu.n0, z.n1});
  contract.expect("log_weight", log_weight, z.dtype, {mu.n0});
  contract.expect_count("the number of components", mu.n0);
}
inline void checked_mixture_log_prob(Tensor z, Tensor mu, Tensor logvar, Tensor log_weight, Tensor out,
                                     Tensor maximum, Tensor total, int threads) {
  static const auto kernel = FASTVAE_PICK(mixture_log_prob);
  const Contract contract{"mixture_log_prob"};
  expect_mixture(contract, z, mu, logvar, log_weight);
  for (const Tensor& t : {out, maximum, total}) contract.expect("a result", t, z.dtype, {z.n0}, true);
  kernel(z, mu, logvar, log_weight, {out.data}, {maximum.data}, {total.data}, threads);
}
inline void checked_mixture_log_prob_backward(Tensor grad, Tensor maximum, Tensor total, Tensor z, Tensor mu,
                                              Tensor logvar, Tensor log_weight, Tensor to_z, Tensor to_mu,
                                              Tensor to_logvar, Tensor to_log_weight, int threads) {
  static const auto kernel = FASTVAE_PICK(mixture_log_prob_backward);
  const Contract contract{"mixture_log_prob_backward"};
  expect_mixture(contract, z, mu, logvar, log_weight);
  contract.expect("grad", grad, z.dtype, {z.n0});
  contract.expect("maximum", maximum, z.dtype, {z.n0});
  contract.expect("total", total, z.dtype, {z.n0});
  expect_gradient(contract, "to_z", to_z, z, z.dtype);
  expect_gradient(contract, "to_mu", to_mu, mu, z.dtype);
  expect_gradient(contract, "to_logvar", to_logvar, logvar, z.dtype);
  expect_gradient(contract, "to_log_weight", to_log_weight, log_weight, z.dtype);
  kernel(grad, maximum, total, z, mu, logvar, log_weight, {to_z.data}, {to_mu.data}, {to_logvar.data},
         {to_log_weight.data}, threads);
}

// Arguments common to all passes from a last layer: x (B, X), h (K B, H), weights (X, H) and biases (X) of
// the first outputs, other parameters.
inline void expect_head(const Contract& contract, int likelihood, const Tensor& x, const Tensor& h,
                        const HeadTensors& t, bool wide) {
  if (likelihood < 0 || likelihood >= static_cast<int>(std::size(kLikelihoods)))
    throw std::invalid_argument("fastvae::" + std::string(contract.op) + ": no likelihood has the number " +
                                std::to_string(likelihood));
  const int dtype = compute_dtype(wide);
  contract.expect("x", x, kAnyDtype, {-1, -1});
  contract.expect("h", h, kFloating, {-1, -1});
  expect_narrow(contract, "x", x, wide);
  expect_narrow(contract, "h", h, wide);
  if (x.size() < 1 || h.size() < 1 || h.n0 % x.n0 != 0)
    contract.refuse("h", h, "a multiple of x's " + std::to_string(x.n0) + " rows");
  bool products = true;
  for (int j = 0; j < kMostParameters; ++j) {
    products = products && t.weight[j].given;
    if (products) {
      contract.expect("weight", t.weight[j], dtype, {x.n1, h.n1});
      if (t.weight[j].s1 != 1 || t.weight[j].s0 < h.n1)
        contract.refuse("weight", t.weight[j], "contiguous rows");
      if (t.bias[j].given) contract.expect("bias", t.bias[j], dtype, {x.n1}, true);
    }
    if ((!products && (t.weight[j].given || t.bias[j].given)) || (products && t.held[j].given) ||
        (j == 0 && !products))
      contract.refuse("weight", t.weight[j],
                      "weights of the first outputs, and numbers or rows of the others");
    if (!t.held[j].given) continue;
    const Tensor& p = t.held[j];
    const bool number = p.axes <= 3 && p.size() == 1 && p.flaw == kSound && p.dtype <= kFloat16;
    if (!number) contract.expect("a constant output", p, kFloating, {x.n1});
    expect_narrow(contract, "a constant output", p, wide);
  }
}
inline HeadOutputs head_outputs(const Contract& contract, const HeadTensors& of, const HeadTensors& t,
                                bool wide) {
  const int dtype = compute_dtype(wide);
  HeadOutputs to{};
  for (int j = 0; j < kMostParameters; ++j) {
    expect_gradient(contract, "the weight's gradient", t.weight[j], of.weight[j], dtype);
    to.weight[j] = {t.weight[j].data};
    if (t.bias[j].given) contract.expect("the bias's gradient", t.bias[j], dtype, {of.weight[j].n0}, true);
    to.bias[j] = {t.bias[j].data};
    expect_gradient(contract, "a constant output's gradient", t.held[j], of.held[j], dtype);
    to.held[j] = {t.held[j].data};
  }
  return to;
}
inline bool checked_head_log_prob(int likelihood, Tensor x, Tensor h, HeadTensors tensors, bool wide,
                                  Tensor out, int threads) {
  static const auto kernel = FASTVAE_PICK(head_log_prob);
  const Contract contract{"linear_log_prob"};
  expect_head(contract, likelihood, x, h, tensors, wide);
  contract.expect("out", out, compute_dtype(wide), {h.n0 / x.n0, x.n0}, true);
  return kernel(likelihood, x, h, tensors, wide, {out.data}, threads);
}
inline void checked_head_log_prob_backward(int likelihood, Tensor grad, Tensor x, Tensor h,
                                           HeadTensors tensors, bool wide, Tensor to_h, HeadTensors outputs,
                                           int threads) {
  static const auto kernel = FASTVAE_PICK(head_log_prob_backward);
  const Contract contract{"linear_log_prob_backward"};
  expect_head(contract, likelihood, x, h, tensors, wide);
  contract.expect("grad", grad, compute_dtype(wide), {h.n0 / x.n0, x.n0});
  expect_gradient(contract, "to_h", to_h, h, compute_dtype(wide));
  kernel(likelihood, grad, x, h, tensors, wide, {to_h.data}, head_outputs(contract, tensors, outputs, wide),
         threads);
}
inline bool checked_head_weigh_rows(int likelihood, Tensor x, Tensor h, HeadTensors tensors, Tensor term,
                                    Tensor beta, double coefficient, bool log_mean_exp, char reduction,
                                    double alpha, i64 groups, double share, bool wide, Tensor bound,
                                    Tensor log_likelihood, Tensor weights, Tensor to_h, HeadTensors outputs,
                                    int threads) {
  static const auto kernel = FASTVAE_PICK(head_weigh_rows);
  const Contract contract{"weigh_linear"};
  expect_head(contract, likelihood, x, h, tensors, wide);
  const int dtype = compute_dtype(wide);
  const i64 samples = h.n0 / x.n0;
  if (term.given) contract.expect_either("term", term, dtype, {samples, x.n0}, {x.n0});
  if (beta.given) contract.expect_either("beta", beta, kFloating, {}, {x.n0});
  contract.expect_count("groups", groups);
  if (samples % groups != 0) contract.refuse("h", h, "whole groups of samples");
  reduction == 'n' ? contract.expect("bound", bound, dtype, {x.n0}, true)
                   : contract.expect("bound", bound, dtype, {});
  if (log_likelihood.given) contract.expect("log_likelihood", log_likelihood, dtype, {x.n0}, true);
  if (log_mean_exp || weights.given) contract.expect("weights", weights, dtype, {samples, x.n0}, true);
  expect_gradient(contract, "to_h", to_h, h, dtype);
  return kernel(likelihood, x, h, tensors, term, beta, coefficient, log_mean_exp, reduction, alpha, groups,
                share, wide, {bound.data}, {log_likelihood.data}, {weights.data}, {to_h.data},
                head_outputs(contract, tensors, outputs, wide), threads);
}

}  // namespace fastvae
