// The kernels: what csrc/units defines for each instruction set, and what the ops of csrc/calls run.
#pragma once

#include "arguments.hpp"

// Declares a kernel in the namespace of every instruction set. A hidden one that no unit defines is an error
// of the linker, not of the first import.
#define FASTVAE_KERNEL(result, name, ...)                         \
  namespace base {                                                \
  __attribute__((visibility("hidden"))) result name(__VA_ARGS__); \
  }                                                               \
  namespace avx2 {                                                \
  __attribute__((visibility("hidden"))) result name(__VA_ARGS__); \
  }                                                               \
  namespace avx512 {                                              \
  __attribute__((visibility("hidden"))) result name(__VA_ARGS__); \
  }                                                               \
  static_assert(true, "takes a semicolon")

namespace fastvae {

FASTVAE_KERNEL(bool, categorical_log_prob, Tensor x, Tensor begins, Tensor logits, bool last, double ignored,
               bool wide, Output out, Output normaliser, int threads);
FASTVAE_KERNEL(void, categorical_log_prob_backward, Tensor grad, Tensor normaliser, Tensor x, Tensor begins,
               Tensor logits, bool last, double ignored, bool wide, Output to, int threads);

FASTVAE_KERNEL(bool, multinomial_log_prob, Tensor x, Tensor begins, Tensor columns, Tensor mask,
               Tensor logits, bool coefficient, bool wide, Output out, Output normaliser, Output total,
               int threads);
FASTVAE_KERNEL(void, multinomial_log_prob_backward, Tensor grad, Tensor normaliser, Tensor total, Tensor x,
               Tensor begins, Tensor columns, Tensor mask, Tensor logits, bool wide, Output to, int threads);

FASTVAE_KERNEL(void, components_log_prob, Tensor x, Tensor logits, Tensor location, Tensor log_scale,
               Tensor coefficients, double setting, bool wide, Output out, Output normaliser, Output joint,
               int threads);
FASTVAE_KERNEL(void, components_log_prob_backward, Tensor grad, Tensor normaliser, Tensor joint, Tensor x,
               Tensor logits, Tensor location, Tensor log_scale, Tensor coefficients, double setting,
               bool wide, Output to_logits, Output to_location, Output to_log_scale, Output to_coefficients,
               int threads);

FASTVAE_KERNEL(bool, head_log_prob, int likelihood, Tensor x, Tensor h, HeadTensors tensors, bool wide,
               Output out, int threads);
FASTVAE_KERNEL(void, head_log_prob_backward, int likelihood, Tensor grad, Tensor x, Tensor h,
               HeadTensors tensors, bool wide, Output to_h, HeadOutputs outputs, int threads);
FASTVAE_KERNEL(bool, head_reduce_rows, int likelihood, Tensor x, Tensor h, HeadTensors tensors, Tensor term,
               Tensor beta, How how, bool wide, Output bound, Output log_likelihood, Output weights,
               Output to_h, HeadOutputs outputs, int threads);

FASTVAE_KERNEL(void, mixture_log_prob, Tensor z, Tensor mu, Tensor logvar, Tensor log_weight, Output out,
               Output maximum, Output total, int threads);
FASTVAE_KERNEL(void, mixture_log_prob_backward, Tensor grad, Tensor maximum, Tensor total, Tensor z,
               Tensor mu, Tensor logvar, Tensor log_weight, Output to_z, Output to_mu, Output to_logvar,
               Output to_log_weight, int threads);

FASTVAE_KERNEL(void, aggregate_log_prob, Tensor z, Tensor mu, Tensor logvar, i64 dataset_size, Output out,
               Output each, int threads);
FASTVAE_KERNEL(void, aggregate_log_prob_backward, Tensor grad, Tensor grad_each, Tensor log_q,
               Tensor log_q_each, Tensor z, Tensor mu, Tensor logvar, i64 dataset_size, Output to_z,
               Output to_mu, Output to_logvar, int threads);

FASTVAE_KERNEL(void, rsample_kl, Output z, Output slope, Output kl, const Tensor& mu, const Tensor& logvar,
               const Tensor& prior_mu, const Tensor& prior_logvar, const Draw& draw, Output seed, int threads,
               bool per_dimension);
FASTVAE_KERNEL(void, rsample_log_ratio, Output z, Output slope, Output log_ratio, const Tensor& mu,
               const Tensor& logvar, const Tensor& prior_mu, const Tensor& prior_logvar, const Draw& draw,
               Output seed, int threads);
FASTVAE_KERNEL(void, rsample_kl_backward, Output out_mu, Output out_logvar, Output out_prior_mu,
               Output out_prior_logvar, const Tensor& grad_z, const Tensor& grad_kl, const Tensor& slope,
               const Tensor& mu, const Tensor& logvar, const Tensor& prior_mu, const Tensor& prior_logvar,
               const Draw& draw, int threads);
FASTVAE_KERNEL(void, rsample_log_ratio_backward, Output out_mu, Output out_logvar, Output out_prior_mu,
               Output out_prior_logvar, const Tensor& grad_z, const Tensor& grad_log_ratio,
               const Tensor& weight, const Tensor& slope, const Tensor& mu, const Tensor& logvar,
               const Tensor& prior_mu, const Tensor& prior_logvar, const Draw& draw, int threads, bool path);

FASTVAE_KERNEL(void, rsample_tril, Output z, Output log_q, Output eps, const Tensor& mu, const Tensor& tril,
               Output seed, const Place& place, int threads);
FASTVAE_KERNEL(void, rsample_tril_backward, Output to_mu, Output to_tril, const Tensor& grad_z,
               const Tensor& grad_log_q, const Tensor& eps, const Tensor& mu, const Tensor& tril,
               const Place& place, int threads);

FASTVAE_KERNEL(void, normal, Output out, bool wide, Output seed, Output net, i64 randomisations, i64 samples,
               i64 rows, i64 columns, i64 sample_offset, i64 row_offset, i64 level, int threads);

FASTVAE_KERNEL(bool, log_prob, const Rows& a, bool wide, Output out);
FASTVAE_KERNEL(void, log_prob_backward, const Rows& a, bool wide, const RowGradients& to);

FASTVAE_KERNEL(bool, reduce, const BoundReduction& w, bool wide, const ReductionResults& to);
FASTVAE_KERNEL(void, reduce_backward, const BoundReduction& w, bool wide, const ReductionGradients& from,
               const RowGradients& to, address out_term);

FASTVAE_KERNEL(void, log_mean_exp, Output bound, Output maximum, Output total, const Tensor& log_w,
               int threads);
FASTVAE_KERNEL(void, log_mean_exp_backward, Output out, const Tensor& grad, const Tensor& log_w,
               Output maximum, Output total, int threads);

FASTVAE_KERNEL(void, weight_estimates, const Tensor& log_px, const Tensor& tail, const Tensor& powers,
               const Tensor& moments, const Tensor& count, double level, double normal_quantile,
               const Output* to, int threads);

// The number of a likelihood's parameters.
FASTVAE_KERNEL(int, parameter_count, int likelihood);
// The four random words of a counter of four, for the known-answer test.
FASTVAE_KERNEL(void, philox_words, const std::uint32_t* counter, std::uint64_t seed, std::uint32_t* words);

}  // namespace fastvae
