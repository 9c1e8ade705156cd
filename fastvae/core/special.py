"""Numerical functions shared by the reference implementations."""

from __future__ import annotations

import math
from typing import overload

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


@overload
def upcast(*tensors: Tensor) -> tuple[Tensor, ...]: ...
@overload
def upcast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]: ...
def upcast(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """Cast to the computation's dtype: float64 if any tensor is float64, else float32."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    dtype = torch.float64 if wide else torch.float32
    return tuple(t if t is None else t.to(dtype) for t in tensors)


def softplus(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return log(1 + exp(x)) and its derivative, to full relative accuracy where exp(x) is normal."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs())), torch.sigmoid(x)


# Where a series of two terms is exact to 1e-8, and a difference in float64 to 1e-11.
_NEAR = 1e-4


def _is_precise(x: Tensor, dtype: torch.dtype | None) -> bool:
    """Return True if a result in ``dtype``, by default x's, needs more than a difference in float64."""
    return (x.dtype if dtype is None else dtype) == torch.float64 or not (x.is_cpu or x.is_cuda)


def expm1_minus(u: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return exp(u) - 1 - u without cancellation, in u's dtype, precise enough for ``dtype`` (default u's).

    It is a series near 0: in float64 where |u| < 1/8 (next term < 1e-17). Less precise results are
    differences in float64 but where |u| < 1e-4, and take a third of the operations.
    """
    if has_torch_function_unary(u):
        return handle_torch_function(expm1_minus, (u,), u)
    if not _is_precise(u, dtype):
        near, wide = u.clamp(-_NEAR, _NEAR), u.double()
        far = torch.expm1(wide) - wide.clamp(max=710)
        return torch.where(near == u, near * near * (0.5 + near / 6), far.to(u.dtype))
    # Clamped: where the series is not used, its overflow would still give a gradient 0 · inf.
    near = u.clamp(-0.125, 0.125)
    series = torch.zeros_like(u)
    for n in range(10, 1, -1):
        series = 1 / math.factorial(n) + series * near
    # Clamped, so that an infinite variance has an infinite KL, not inf - inf = NaN.
    return torch.where(u.abs() < 0.125, near * near * series, torch.expm1(u) - u.clamp(max=710))


def log1p_rest(t: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return t - log(1 + t) for t > -1 without cancellation, in t's dtype, precise enough for ``dtype``.

    Where |t| < 0.3 it uses the series of log(1 + t) = 2 artanh(r), r = t / (2 + t) (next term < 1e-18). Less
    precise results are as those of :func:`expm1_minus`.
    """
    if has_torch_function_unary(t):
        return handle_torch_function(log1p_rest, (t,), t)
    if not _is_precise(t, dtype):
        near, wide = t.clamp(-_NEAR, _NEAR), t.double()
        return torch.where(near == t, near * near * (0.5 - near / 3), (wide - torch.log1p(wide)).to(t.dtype))
    r = t / (2 + t)
    series = torch.zeros_like(t)
    for n in range(21, 1, -2):
        series = 1 / n + r * r * series
    return torch.where(t.abs() < 0.3, r * (t - 2 * r * r * series), t - torch.log1p(t))


def stirling_error(x: Tensor) -> Tensor:
    """Return log x! - (x + 1/2) log x + x - log(2 pi) / 2 for x > 0."""
    if has_torch_function_unary(x):
        return handle_torch_function(stirling_error, (x,), x)
    wide = x.double()
    u = 1 / (wide * wide)
    series = (
        1 / 12 - u * (1 / 360 - u * (1 / 1260 - u * (1 / 1680 - u * (1 / 1188 - u * 691 / 360360))))
    ) / wide
    exact = torch.lgamma(wide + 1) - (wide + 0.5) * wide.log() + wide - 0.5 * math.log(2 * math.pi)
    return torch.where(wide < 16, exact, series).to(x.dtype)


def digamma_excess(x: Tensor) -> Tensor:
    """Return x (log x - digamma(x)) - 1/2 for x > 0."""
    if has_torch_function_unary(x):
        return handle_torch_function(digamma_excess, (x,), x)
    wide = x.double()
    u = 1 / (wide * wide)
    series = (1 / 12 - u * (1 / 120 - u * (1 / 252 - u * (1 / 240 - u * (1 / 132 - u * 691 / 32760))))) / wide
    exact = wide * (wide.log() - torch.digamma(wide)) - 0.5
    return torch.where(wide < 16, exact, series).to(x.dtype)


def log1p_square(r: Tensor) -> Tensor:
    """Return log(1 + r²), also where r² overflows."""
    magnitude = r.abs()
    large = magnitude > 2.0**60
    near = torch.log1p(torch.where(large, 0.0, magnitude) ** 2)
    return torch.where(large, 2 * torch.log(torch.where(large, magnitude, 1.0)), near)


def log1p_excess(share: Tensor, log_1pt: Tensor) -> Tensor:
    """Return log(1 + t) - t / (1 + t) for t >= 0 without cancellation: t²/2 near 0.

    ``share`` is t / (1 + t), ``log_1pt`` is log(1 + t).
    """
    # 2 atanh(s) - t / (1 + t), with s = t / (2 + t), is a series of positive terms.
    s = share / (2 - share)
    series = torch.zeros_like(share)
    for n in range(33, 1, -2):
        series = 1 / n + series * (s * s)
    return torch.where(share < 0.5, share * s + 2 * s * (s * s) * series, log_1pt - share)


def half_step(log_z: Tensor) -> Tensor:
    """Return log Γ(z + ½) - log Γ(z) - ½ log z: -1/(8 z) for large z, where differences of log Γ cancel.

    It is computed in float64, by Stirling's series at z + 16 and a factor near 1 for each step down to z.
    """
    if has_torch_function_unary(log_z):
        return handle_torch_function(half_step, (log_z,), log_z)
    wide = log_z.double()
    z = wide.exp()
    factor = torch.ones_like(z)
    for y in (z + i for i in range(16)):
        # The factor z of the first step may be almost 0; its log is added separately.
        factor = factor * (y + 1) / (y + 0.5) * torch.where((y == z) & (z < 1), 1.0, y) / (y + 0.5)
    steps = 0.5 * (torch.log(factor) + torch.where(z < 1, wide, 0.0))
    return (_series(z + 16, (-1 / 8, 1 / 192, -1 / 640, 17 / 14336, -31 / 18432, 691 / 180224)) + steps).to(
        log_z.dtype
    )


def half_step_slope(log_z: Tensor) -> Tensor:
    """Return the derivative of :func:`half_step`: z (ψ(z + ½) - ψ(z)) - ½, a sum of positive terms."""
    if has_torch_function_unary(log_z):
        return handle_torch_function(half_step_slope, (log_z,), log_z)
    z = log_z.double().exp()
    steps = 0.25 / ((z + 0.5) * (z + 1))
    for y in (z + i for i in range(1, 16)):
        steps = steps + 0.25 / (y + 0.5) / (y + 1) * (z / y)
    last = _series(z + 16, (1 / 8, -1 / 64, 1 / 128, -17 / 2048, 31 / 2048, -691 / 16384, 5461 / 32768))
    return (steps + z / (z + 16) * last).to(log_z.dtype)


def _series(z: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Return the series Σ_n c_n z^-(2n + 1): coefficients times 1/z, 1/z³, …."""
    u = 1 / z
    total = torch.zeros_like(z)
    for c in reversed(coefficients):
        total = c + total * u * u
    return total * u


def log_sinhc(a: Tensor) -> Tensor:
    """Return log(sinh(a/2) / (a/2)) for |a| <= 1, a²/24 - a⁴/2880 + …, by its series (next term < 1e-18)."""
    return _even(a, _SINHC) * (a * a)


def log_sinhc_slope(a: Tensor) -> Tensor:
    """Return the derivative of :func:`log_sinhc`: ½ coth(a/2) - 1/a."""
    return _even(a, tuple(2 * n * c for n, c in enumerate(_SINHC, 1))) * a


# B(2 n) / (2 n (2 n)!), with Bernoulli numbers B.
_SINHC = (
    *(1 / 24, -1 / 2880, 1 / 181440, -1 / 9676800, 1 / 479001600, -691 / 15692092416000),
    *(1 / 1046139494400, -3617 / 170729965486080000, 43867 / 91963695909076992000),
    *(-174611 / 16057153253965824000000,),
)


def _even(a: Tensor, coefficients: tuple[float, ...]) -> Tensor:
    """Return the series of coefficients times 1, a², a⁴, …."""
    v = a * a
    total = torch.zeros_like(a)
    for c in reversed(coefficients):
        total = c + v * total
    return total


# Noise of other families from normals n, as their quantile at Φ(n). Each tail is computed by itself, so that
# single precision suffices.


def _tail(normals: Tensor) -> Tensor:
    """Return Φ(−|n|)."""
    return torch.erfc(normals.abs() * math.sqrt(0.5)).mul_(0.5)


def log_normal_cdf(normals: Tensor) -> Tensor:
    """Return log Φ(n); ``torch.special.log_ndtr`` takes five times as long."""
    tail = _tail(normals)
    return torch.where(normals > 0, torch.log1p(-tail), torch.log(tail))


def laplace_noise(normals: Tensor) -> Tensor:
    """Return the Laplace distribution's quantile at Φ(n)."""
    return torch.copysign(torch.log(_tail(normals).mul_(2)), normals)


def logistic_noise(normals: Tensor) -> Tensor:
    """Return the logistic distribution's quantile at Φ(n)."""
    tail = _tail(normals)
    return torch.copysign(torch.log((1 - tail) / tail), normals)


def gumbel_noise(normals: Tensor) -> Tensor:
    """Return the Gumbel distribution's quantile at Φ(n)."""
    return -torch.log(-log_normal_cdf(normals))
