// Likelihoods with an axis of classes or components: ops/categorical.py, ops/multinomial.py and
// ops/components.py.
#include "categorical.hpp"
#include "multinomial.hpp"
#include "components.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// @param begins (P + 1) or none; @param out (N), normaliser (N, P): of compute type, that is double if
// `wide`, contiguous; results. Returns false if x holds anything but classes.
bool categorical_log_prob(Tensor x, Tensor begins, Tensor logits, bool last, double ignored, bool wide,
                          Output out, Output normaliser, int threads) {
  return log_prob_of_classes({x, logits, last, ignored, pointer<const i64>(begins.data)}, wide, out,
                             normaliser, threads);
}

// @param grad (N) of compute type. The result is contiguous, in the storage type of the logits.
void categorical_log_prob_backward(Tensor grad, Tensor normaliser, Tensor x, Tensor begins, Tensor logits,
                                   bool last, double ignored, bool wide, Output to, int threads) {
  gradient_of_classes({x, logits, last, ignored, pointer<const i64>(begins.data)}, grad, normaliser, wide, to,
                      threads);
}

// @param out (N), normaliser (N), total (B): of compute type, that is double if `wide`, contiguous; results.
// Returns false for negative counts, or columns of a sparse x that do not ascend in [0, X).
bool multinomial_log_prob(Tensor x, Tensor begins, Tensor columns, Tensor mask, Tensor logits,
                          bool coefficient, bool wide, Output out, Output normaliser, Output total,
                          int threads) {
  const CountRows a{x, begins, columns, mask, logits};
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    return count_rows<C>(a, coefficient, pointer<C>(out), pointer<C>(normaliser), pointer<C>(total), threads);
  };
  return wide ? run(double()) : run(float());
}

// @param grad (N) of compute type. The result is contiguous, in the storage type of the logits.
void multinomial_log_prob_backward(Tensor grad, Tensor normaliser, Tensor total, Tensor x, Tensor begins,
                                   Tensor columns, Tensor mask, Tensor logits, bool wide, Output to,
                                   int threads) {
  const CountRows a{x, begins, columns, mask, logits};
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    count_rows_backward<C>(a, grad, pointer<const C>(normaliser.data), pointer<const C>(total.data), to,
                           threads);
  };
  wide ? run(double()) : run(float());
}

// @param out (N), normaliser (N, P), joint (N, P): of compute type, that is double if `wide`, contiguous;
// results.
void components_log_prob(Tensor x, Tensor logits, Tensor location, Tensor log_scale, Tensor coefficients,
                         double setting, bool wide, Output out, Output normaliser, Output joint,
                         int threads) {
  const ComponentRows a{x, logits, location, log_scale, coefficients, setting};
  if (wide) {
    components_rows(a, pointer<double>(out), pointer<double>(normaliser), pointer<double>(joint), threads);
  } else {
    components_rows(a, pointer<float>(out), pointer<float>(normaliser), pointer<float>(joint), threads);
  }
}

// @param grad (N) of compute type. The results are contiguous, in the storage types of the parameters.
void components_log_prob_backward(Tensor grad, Tensor normaliser, Tensor joint, Tensor x, Tensor logits,
                                  Tensor location, Tensor log_scale, Tensor coefficients, double setting,
                                  bool wide, Output to_logits, Output to_location, Output to_log_scale,
                                  Output to_coefficients, int threads) {
  const ComponentRows a{x, logits, location, log_scale, coefficients, setting};
  const ComponentsGradients to{to_logits, to_location, to_log_scale, to_coefficients};
  if (wide) {
    components_rows_backward(a, grad, pointer<const double>(normaliser.data),
                             pointer<const double>(joint.data), to, threads);
  } else {
    components_rows_backward(a, grad, pointer<const float>(normaliser.data), pointer<const float>(joint.data),
                             to, threads);
  }
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
