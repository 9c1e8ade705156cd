// Activations of hidden layers and their derivatives, over a block of rows.

#pragma once

#include "common.hpp"
#include "elementary.hpp"

namespace fastvae {
namespace FASTVAE_ISA {

// Standard normal distribution function. In float by Cephes' polynomials of erf and erfc (S. Moshier), both
// computed and one selected.
FASTVAE_INLINE float normal_cdf(float x) {
  const float a = abs_(x) * 0.70710678118654752f, z = a * a;
  const float near =
      a * ((((((7.853861353153693e-5f * z - 8.010193625184903e-4f) * z + 5.188327685732524e-3f) * z -
              2.685381193529856e-2f) *
                 z +
             1.128358514861418e-1f) *
                z -
            3.761262582423300e-1f) *
               z +
           1.128379165726710f);
  // erfc(a) = exp(-a^2) / a * q(1 / a^2)
  const float v = 1.0f / (a < 1.0f ? 1.0f : a), w = v * v;
  const float below_2 =
      (((((((2.326819970068386e-2f * w - 1.387039388740657e-1f) * w + 3.687424674597105e-1f) * w -
           5.824733027278666e-1f) *
              w +
          6.210004621745983e-1f) *
             w -
         4.944515323274145e-1f) *
            w +
        3.404879937665872e-1f) *
           w -
       2.741127028184656e-1f) *
          w +
      5.638259427386472e-1f;
  const float above_2 =
      ((((((-1.047766399936249e+1f * w + 1.297719955372516e+1f) * w - 7.495518717768503f) * w +
          2.921019019210786f) *
             w -
         1.015265279202700f) *
            w +
        4.218463358204948e-1f) *
           w -
       2.820767439740514e-1f) *
          w +
      5.641895067754075e-1f;
  const float tail = 0.5f * exp_negative(-z) * v * (a < 2.0f ? below_2 : above_2);
  const float lower = a < 1.0f ? 0.5f - 0.5f * near : tail;
  return bit_cast<std::int32_t>(x) < 0 ? lower : 1.0f - lower;
}
FASTVAE_INLINE double normal_cdf(double x) { return 0.5 * __builtin_erfc(-0.70710678118654752440 * x); }

template <class C>
FASTVAE_INLINE C normal_pdf(C x) {
  return C(0.39894228040143267794) * exp_negative(C(-0.5) * x * x);
}
template <class C>
FASTVAE_INLINE C sigmoid(C x) {
  const C e = exp_negative(-abs_(x));
  return (x < C(0) ? e : C(1)) / (C(1) + e);
}
// The argument of the tanh in the approximation of GELU (Hendrycks & Gimpel, 2016), and its derivative.
template <class C>
FASTVAE_INLINE C gelu_inner(C x) {
  return C(0.79788456080286535588) * (x + C(0.044715) * x * x * x);
}
template <class C>
FASTVAE_INLINE C gelu_inner_slope(C x) {
  return C(0.79788456080286535588) * (C(1) + C(0.134145) * x * x);
}

template <class C, class F>
FASTVAE_INLINE void each(i64 n, C* __restrict p, F f) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) p[i] = f(p[i]);
}

// p = activation(p)
template <class C>
FASTVAE_LOOP void activate(const Activation& a, i64 n, C* __restrict p) {
  const C alpha = static_cast<C>(a.parameter);
  switch (a.kind) {
    case ActivationKind::identity: return;
    case ActivationKind::relu: return each(n, p, [](C x) FASTVAE_INLINED { return x < C(0) ? C(0) : x; });
    case ActivationKind::tanh: return each(n, p, [](C x) FASTVAE_INLINED { return tanh_half(x + x); });
    case ActivationKind::sigmoid: return each(n, p, [](C x) FASTVAE_INLINED { return sigmoid(x); });
    case ActivationKind::silu: return each(n, p, [](C x) FASTVAE_INLINED { return x * sigmoid(x); });
    case ActivationKind::gelu: return each(n, p, [](C x) FASTVAE_INLINED { return x * normal_cdf(x); });
    case ActivationKind::gelu_tanh:
      return each(n, p, [](C x) FASTVAE_INLINED { return x * sigmoid(C(2) * gelu_inner(x)); });
    case ActivationKind::elu:
      return each(n, p,
                  [=](C x) FASTVAE_INLINED { return x > C(0) ? x : alpha * expm1_(x > C(0) ? C(0) : x); });
    case ActivationKind::leaky_relu:
      return each(n, p, [=](C x) FASTVAE_INLINED { return x > C(0) ? x : alpha * x; });
    case ActivationKind::softplus: return each(n, p, [](C x) FASTVAE_INLINED { return softplus(x).value; });
  }
}

template <class C, class F>
FASTVAE_INLINE void multiply_each(i64 n, const C* __restrict from, C* __restrict grad, F slope) {
#pragma omp simd
  for (i64 i = 0; i < n; ++i) grad[i] *= slope(from[i]);
}

// Returns true if the derivative is a function of the activation's value; otherwise it needs the argument.
inline bool slope_of_value(const Activation& a) {
  return a.kind != ActivationKind::silu && a.kind != ActivationKind::gelu &&
         a.kind != ActivationKind::gelu_tanh;
}

// grad *= the derivative, given values or arguments, see slope_of_value.
template <class C>
FASTVAE_LOOP void activate_backward(const Activation& a, i64 n, const C* __restrict from,
                                    C* __restrict grad) {
  const C alpha = static_cast<C>(a.parameter);
  switch (a.kind) {
    case ActivationKind::identity: return;
    case ActivationKind::relu:
      return multiply_each(n, from, grad, [](C y) FASTVAE_INLINED { return y > C(0) ? C(1) : C(0); });
    case ActivationKind::tanh:
      return multiply_each(n, from, grad, [](C y) FASTVAE_INLINED { return C(1) - y * y; });
    case ActivationKind::sigmoid:
      return multiply_each(n, from, grad, [](C y) FASTVAE_INLINED { return y * (C(1) - y); });
    case ActivationKind::silu:
      return multiply_each(n, from, grad, [](C x) FASTVAE_INLINED {
        const C s = sigmoid(x);
        return s * (C(1) + x * (C(1) - s));
      });
    case ActivationKind::gelu:
      return multiply_each(n, from, grad,
                           [](C x) FASTVAE_INLINED { return normal_cdf(x) + x * normal_pdf(x); });
    case ActivationKind::gelu_tanh:
      return multiply_each(n, from, grad, [](C x) FASTVAE_INLINED {
        const C s = sigmoid(C(2) * gelu_inner(x));
        return s + C(2) * x * s * (C(1) - s) * gelu_inner_slope(x);
      });
    case ActivationKind::elu:
      return multiply_each(n, from, grad, [=](C y) FASTVAE_INLINED { return y > C(0) ? C(1) : y + alpha; });
    case ActivationKind::leaky_relu:
      return multiply_each(n, from, grad, [=](C y) FASTVAE_INLINED { return y > C(0) ? C(1) : alpha; });
    case ActivationKind::softplus:
      return multiply_each(n, from, grad, [](C y) FASTVAE_INLINED { return -expm1_(-y); });
  }
}

}  // namespace FASTVAE_ISA
}  // namespace fastvae
