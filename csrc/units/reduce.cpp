// Likelihoods and their bounds: ops/likelihood.py, ops/reduce.py and ops/logsumexp.py.
#include "likelihood.hpp"
#include "reduce.hpp"
#include "logsumexp.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// @param out (K, B) of compute type, which is double if `wide`: contiguous, written. Returns true if x lies
// in the support.
bool log_prob(const Rows& a, bool wide, Output out) {
  return wide ? reduce_rows(a, pointer<double>(out)) : reduce_rows(a, pointer<float>(out));
}

void log_prob_backward(const Rows& a, bool wide, const RowGradients& to) {
  wide ? reduce_rows_backward<double>(a, to) : reduce_rows_backward<float>(a, to);
}

bool reduce(const BoundReduction& w, bool wide, const ReductionResults& to) {
  return wide ? reduce_samples<double>(w, to) : reduce_samples<float>(w, to);
}

void reduce_backward(const BoundReduction& w, bool wide, const ReductionGradients& from,
                     const RowGradients& to, address out_term) {
  wide ? reduce_samples_backward<double>(w, from, to, out_term)
       : reduce_samples_backward<float>(w, from, to, out_term);
}

// @param bound, maximum, total (N): written; @param log_w (K, N)
void log_mean_exp(Output bound, Output maximum, Output total, const Tensor& log_w, int threads) {
  for_dtype(log_w.dtype, [&](auto t) {
    using T = decltype(t);
    using C = compute_t<T>;
    log_mean_exp_columns<T>(view<const T>(log_w), log_w.n0, log_w.n1, pointer<C>(bound), pointer<C>(maximum),
                            pointer<C>(total), threads);
  });
}

// @param out (K, N): written; @param grad (N), @param log_w (K, N), @param maximum, total (N): contiguous
void log_mean_exp_backward(Output out, const Tensor& grad, const Tensor& log_w, Output maximum, Output total,
                           int threads) {
  for_dtype(log_w.dtype, [&](auto t) {
    using T = decltype(t);
    using C = compute_t<T>;
    log_mean_exp_weights<T>(pointer<T>(out), view<const C>(grad), view<const T>(log_w),
                            pointer<const C>(maximum), pointer<const C>(total), log_w.n0, log_w.n1, threads);
  });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
