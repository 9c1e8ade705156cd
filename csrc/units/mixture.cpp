// Mixtures of normals: ops/mixture.py and ops/aggregate.py.
#include "mixture.hpp"
#include "aggregate.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// @param out (N), maximum (N), total (N): of the dtype of all, contiguous, written.
void mixture_log_prob(Tensor z, Tensor mu, Tensor logvar, Tensor log_weight, Output out, Output maximum,
                      Output total, int threads) {
  const NormalMixture a{z, mu, logvar, log_weight};
  if (z.dtype == kFloat64) {
    mixture_rows(a, pointer<double>(out), pointer<double>(maximum), pointer<double>(total), threads);
  } else {
    mixture_rows(a, pointer<float>(out), pointer<float>(maximum), pointer<float>(total), threads);
  }
}

void mixture_log_prob_backward(Tensor grad, Tensor maximum, Tensor total, Tensor z, Tensor mu, Tensor logvar,
                               Tensor log_weight, Output to_z, Output to_mu, Output to_logvar,
                               Output to_log_weight, int threads) {
  const NormalMixture a{z, mu, logvar, log_weight};
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    const MixtureGradients<C> to{pointer<C>(to_z), pointer<C>(to_mu), pointer<C>(to_logvar),
                                 pointer<C>(to_log_weight)};
    mixture_rows_backward<C>(a, grad, maximum, total, to, threads);
  };
  z.dtype == kFloat64 ? run(double()) : run(float());
}

// @param out (N), each (N, D): of the dtype of all, contiguous, written.
void aggregate_log_prob(Tensor z, Tensor mu, Tensor logvar, i64 dataset_size, Output out, Output each,
                        int threads) {
  const Aggregate a{z, mu, logvar, dataset_size};
  if (z.dtype == kFloat64) {
    aggregate_rows(a, pointer<double>(out), pointer<double>(each), threads);
  } else {
    aggregate_rows(a, pointer<float>(out), pointer<float>(each), threads);
  }
}

// @param grad, log_q (N); grad_each, log_q_each (N, D); to_z (N, D), to_mu, to_logvar (U, D): written, null
// where not needed.
void aggregate_log_prob_backward(Tensor grad, Tensor grad_each, Tensor log_q, Tensor log_q_each, Tensor z,
                                 Tensor mu, Tensor logvar, i64 dataset_size, Output to_z, Output to_mu,
                                 Output to_logvar, int threads) {
  const Aggregate a{z, mu, logvar, dataset_size};
  const AggregateGradients up{grad, grad_each, log_q, log_q_each};
  const auto run = [&](auto zero) {
    using C = decltype(zero);
    const Components<C> c(mu.n0, a.dims(), true);
    c.pack(mu, logvar, {}, threads);
    C *by_z = pointer<C>(to_z), *by_mu = pointer<C>(to_mu), *by_logvar = pointer<C>(to_logvar);
    if (!by_mu && !by_logvar) {
      aggregate_slopes<C, true, false>(a, c, up, by_z, by_mu, by_logvar, threads);
    } else if (!by_z) {
      aggregate_slopes<C, false, true>(a, c, up, by_z, by_mu, by_logvar, threads);
    } else {
      aggregate_slopes<C, true, true>(a, c, up, by_z, by_mu, by_logvar, threads);
    }
  };
  z.dtype == kFloat64 ? run(double()) : run(float());
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
