// Draws of a diagonal normal: ops/normal_diagonal.py.
#include "normal_diagonal.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// @param z (K, B, D), @param slope the same or null, @param kl (B), or (B, D) with per_dimension: written
void rsample_kl(Output z, Output slope, Output kl, const Tensor& mu, const Tensor& logvar,
                const Tensor& prior_mu, const Tensor& prior_logvar, const Draw& draw, Output seed,
                int threads, bool per_dimension) {
  LatentArguments{mu, logvar, prior_mu, prior_logvar, draw, threads, seed}.call([&](auto prior, auto& q) {
    using T = typename std::decay_t<decltype(q)>::Storage;
    using C = compute_t<T>;
    diagonal_forward<decltype(prior)::value>(
        q, DiagonalResults<T>{pointer<T>(z), pointer<C>(slope), pointer<C>(kl), nullptr, per_dimension});
  });
}

// @param z (K, B, D), @param slope the same or null, @param log_ratio (K, B): written
void rsample_log_ratio(Output z, Output slope, Output log_ratio, const Tensor& mu, const Tensor& logvar,
                       const Tensor& prior_mu, const Tensor& prior_logvar, const Draw& draw, Output seed,
                       int threads) {
  LatentArguments{mu, logvar, prior_mu, prior_logvar, draw, threads, seed}.call([&](auto prior, auto& q) {
    using T = typename std::decay_t<decltype(q)>::Storage;
    using C = compute_t<T>;
    diagonal_forward<decltype(prior)::value>(
        q, DiagonalResults<T>{pointer<T>(z), pointer<C>(slope), nullptr, pointer<C>(log_ratio), false});
  });
}

// @param out_mu, out_logvar, out_prior_mu, out_prior_logvar (B, D): written
// @param grad_z (K, B, D), @param grad_kl (B), or (B, D): null without an upstream gradient
// @param grad_z, slope (K, B, D) or (K B, D): the latter from the forward pass
void rsample_kl_backward(Output out_mu, Output out_logvar, Output out_prior_mu, Output out_prior_logvar,
                         const Tensor& grad_z, const Tensor& grad_kl, const Tensor& slope, const Tensor& mu,
                         const Tensor& logvar, const Tensor& prior_mu, const Tensor& prior_logvar,
                         const Draw& draw, int threads) {
  LatentArguments{mu, logvar, prior_mu, prior_logvar, draw, threads}.call([&](auto prior, auto& q) {
    using T = typename std::decay_t<decltype(q)>::Storage;
    using C = compute_t<T>;
    diagonal_backward<decltype(prior)::value>(q, DiagonalGrads<T>{view<const T>(grad_z.stacked(draw.samples)),
                                                                  view<const C>(slope.stacked(draw.samples)),
                                                                  view<const C>(grad_kl),
                                                                  {},
                                                                  {},
                                                                  false,
                                                                  pointer<T>(out_mu),
                                                                  pointer<T>(out_logvar),
                                                                  pointer<T>(out_prior_mu),
                                                                  pointer<T>(out_prior_logvar)});
  });
}

// @param grad_log_ratio (K, B), @param weight (K, B): null without an upstream gradient, and without DReG
void rsample_log_ratio_backward(Output out_mu, Output out_logvar, Output out_prior_mu,
                                Output out_prior_logvar, const Tensor& grad_z, const Tensor& grad_log_ratio,
                                const Tensor& weight, const Tensor& slope, const Tensor& mu,
                                const Tensor& logvar, const Tensor& prior_mu, const Tensor& prior_logvar,
                                const Draw& draw, int threads, bool path) {
  LatentArguments{mu, logvar, prior_mu, prior_logvar, draw, threads}.call([&](auto prior, auto& q) {
    using T = typename std::decay_t<decltype(q)>::Storage;
    using C = compute_t<T>;
    diagonal_backward<decltype(prior)::value>(q, DiagonalGrads<T>{view<const T>(grad_z.stacked(draw.samples)),
                                                                  view<const C>(slope.stacked(draw.samples)),
                                                                  {},
                                                                  view<const C>(grad_log_ratio),
                                                                  view<const C>(weight),
                                                                  path,
                                                                  pointer<T>(out_mu),
                                                                  pointer<T>(out_logvar),
                                                                  pointer<T>(out_prior_mu),
                                                                  pointer<T>(out_prior_logvar)});
  });
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
