"""Activations of hidden layers, by the names of :data:`fastvae.core.deferred.ACTIVATIONS`."""

import triton
import triton.language as tl

from .elementary import exp_of_negative, log1p, tanh_half


@triton.jit
def identity(b_a, PARAMETER: tl.constexpr):
    return b_a


@triton.jit
def relu(b_a, PARAMETER: tl.constexpr):
    # NaN stays NaN.
    return tl.where(b_a < 0, 0.0, b_a)


@triton.jit
def tanh(b_a, PARAMETER: tl.constexpr):
    return tanh_half(2.0 * b_a)


@triton.jit
def sigmoid(b_a, PARAMETER: tl.constexpr):
    # exp of a negative number does not overflow.
    b_t = exp_of_negative(-tl.abs(b_a))
    return tl.where(b_a < 0, b_t, 1.0) / (1.0 + b_t)


@triton.jit
def silu(b_a, PARAMETER: tl.constexpr):
    return b_a * sigmoid(b_a, PARAMETER)


@triton.jit
def gelu(b_a, PARAMETER: tl.constexpr):
    return 0.5 * b_a * (1.0 + tl.erf(b_a * 0.7071067811865476))


@triton.jit
def gelu_tanh(b_a, PARAMETER: tl.constexpr):
    # tanh(s / 2) of s = 2 sqrt(2 / π) (a + 0.044715 a³)
    b_s = 1.5957691216057308 * (b_a + 0.044715 * b_a * b_a * b_a)
    return 0.5 * b_a * (1.0 + tanh_half(b_s))


@triton.jit
def elu(b_a, PARAMETER: tl.constexpr):
    # exp(a) - 1 = 2 t / (1 - t) of t = tanh(a / 2), without cancellation near 0.
    b_t = tanh_half(tl.where(b_a < 0, b_a, 0.0))
    return tl.where(b_a < 0, PARAMETER * (2.0 * b_t / (1.0 - b_t)), b_a)


@triton.jit
def leaky_relu(b_a, PARAMETER: tl.constexpr):
    return tl.where(b_a < 0, PARAMETER * b_a, b_a)


@triton.jit
def softplus(b_a, PARAMETER: tl.constexpr):
    return tl.where(b_a < 0, 0.0, b_a) + log1p(exp_of_negative(-tl.abs(b_a)))
