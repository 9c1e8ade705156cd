"""Continuous Bernoulli x l - log((exp(l) - 1) / l) of logits l.

See fastvae/likelihoods/continuous_bernoulli.py for the mathematics.
"""

import triton
import triton.language as tl

from ..elementary import exp_of_negative, log

# Uniform density: log p is 0.
PADDING = 0.0


@triton.jit
def sinhc(a):
    """Compute log(sinh(a / 2) / (a / 2)) and its slope for 0 <= a <= 1."""
    v = a * a
    if a.dtype == tl.float64:
        p = 4.7700343047570991e-16 - v * 1.0874343492790309e-17
        p = ((p * v - 2.1185501852016143e-14) * v + 9.5589546647747706e-13) * v - 4.4034917822395776e-11
        p = ((p * v + 1.0 / 479001600.0) * v - 1.0 / 9676800.0) * v + 1.0 / 181440.0
        p = (p * v - 1.0 / 2880.0) * v + 1.0 / 24.0
        q = 8.5860620562778446e-15 - v * 2.1748686985580619e-16
        q = ((q * v - 3.3896802963225829e-13) * v + 1.3382536530684679e-11) * v - 5.2841901386874932e-10
        q = ((q * v + 1.0 / 47900160.0) * v - 1.0 / 1209600.0) * v + 1.0 / 30240.0
        q = (q * v - 1.0 / 720.0) * v + 1.0 / 12.0
    else:
        # Minimax polynomials, to 1e-9.
        p = ((-9.92826586e-8 * v + 5.50895058e-6) * v - 3.47221722e-4) * v + 4.16666667e-2
        q = ((-7.86376896e-7 * v + 3.30438378e-5) * v - 1.38888392e-3) * v + 8.33333332e-2
    return v * p, a * q


@triton.jit
def value(x, data, logits):
    a = tl.abs(logits)
    miss = tl.where(logits > 0, 1.0 - x, x)
    log_sinhc, _ = sinhc(a)
    # Avoids inf - inf for an infinite logit, whose density at the favoured end is infinite.
    most = tl.where(a < 1e38, a, 1e38)
    far = log(most / (1.0 - exp_of_negative(-a))) + tl.where(miss == 0, a - most, -miss * a)
    return tl.where(a < 1, (0.5 - miss) * a - log_sinhc, far)


@triton.jit
def gradient(g, x, logits):
    a = tl.abs(logits)
    k = exp_of_negative(-a)
    _, slope = sinhc(a)
    # Distance of the mean from the end it is nearer to.
    rest = tl.where(a < 1, 0.5 - slope, 1.0 / a - k / (1.0 - k))
    return g * logits, g * tl.where(logits > 0, (x - 1.0) + rest, x - rest)
