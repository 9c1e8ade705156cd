// A likelihood straight from the decoder's last linear layer: ops/head.py.
#include "head.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// All tensors but x and h are of compute type, double if `wide`. Returns false if x lies outside of the
// support.
bool head_log_prob(int likelihood, Tensor x, Tensor h, HeadTensors tensors, bool wide, Output out,
                   int threads) {
  const Head a = head_of(likelihood, x, h, tensors, threads);
  return wide ? head_rows(a, pointer<double>(out)) : head_rows(a, pointer<float>(out));
}

void head_log_prob_backward(int likelihood, Tensor grad, Tensor x, Tensor h, HeadTensors tensors, bool wide,
                            Output to_h, HeadOutputs outputs, int threads) {
  const Head a = head_of(likelihood, x, h, tensors, threads);
  const HeadGradients to = head_gradients_of(to_h, outputs);
  wide ? head_rows_backward<double>(a, grad, to) : head_rows_backward<float>(a, grad, to);
}

// With gradients, which need a sum or a mean over the batch, or without.
bool head_reduce_rows(int likelihood, Tensor x, Tensor h, HeadTensors tensors, Tensor term, Tensor beta,
                      How how, bool wide, Output bound, Output log_likelihood, Output weights, Output to_h,
                      HeadOutputs outputs, int threads) {
  const Head a = head_of(likelihood, x, h, tensors, threads);
  Tensor full = x;
  full.axes = 2;
  full.n0 = h.n0;
  const BoundReduction w(likelihood, x, {}, 1, &full, term, beta, how, threads);
  const ReductionResults to{bound, log_likelihood, weights};
  const HeadGradients gradients = head_gradients_of(to_h, outputs);
  return wide ? head_reduce<double>(a, w, to, gradients) : head_reduce<float>(a, w, to, gradients);
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
