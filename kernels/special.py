"""Building blocks of the gamma function, and logarithms accurate near 0; float32 and float64."""

import triton
import triton.language as tl

from .elementary import LOG_2_HIGH, LOG_2_LOW, add_bits, log, log_factorial_excess, log_of_parts, split_float

HALF_LOG_2_PI = tl.constexpr(0.91893853320467274178)


@triton.jit
def split_1p(b_t):
    """Return (g, e) with 1 + t = 2^e (1 + g), corrected for the sum's rounding error; float32, t > -1."""
    b_u = 1.0 + b_t
    b_whole = b_u - 1.0
    b_lost = (1.0 - (b_u - b_whole)) + (b_t - b_whole)
    b_m, b_e = split_float(b_u)
    b_scale = (add_bits(127, -b_e) << 23).to(tl.float32, bitcast=True)
    return tl.where(b_e == 0, b_t, (b_m - 1.0) + b_lost * b_scale), b_e


@triton.jit
def log1p_and_rest(b_t):
    """Compute log(1 + t) and t - log(1 + t) for t > -1, both relatively accurate near 0."""
    if b_t.dtype == tl.float64:
        # log(1 + t) = 2 artanh(r), by its series near 0.
        b_r = b_t / (2.0 + b_t)
        b_v = b_r * b_r
        b_p = b_v * (1.0 / 21.0) + 1.0 / 19.0
        b_p = ((b_p * b_v + 1.0 / 17.0) * b_v + 1.0 / 15.0) * b_v + 1.0 / 13.0
        b_p = ((b_p * b_v + 1.0 / 11.0) * b_v + 1.0 / 9.0) * b_v + 1.0 / 7.0
        b_p = (b_p * b_v + 1.0 / 5.0) * b_v + 1.0 / 3.0
        b_near = tl.abs(b_t) < 0.3
        b_log = tl.where(b_near, 2.0 * b_r * (1.0 + b_v * b_p), tl.log(1.0 + b_t))
        b_rest = tl.where(b_near, b_r * (b_t - 2.0 * b_v * b_p), b_t - b_log)
    else:
        b_g, b_e = split_1p(b_t)
        b_log = tl.where(b_t == b_t, log_of_parts(b_g, b_e.to(tl.float32)), b_t)
        b_rest = tl.where(b_e == 0, -log_tail(b_g), b_t - b_log)
    return b_log, b_rest


@triton.jit
def log_tail(b_g):
    """Compute log(1 + g) - g for 1 + g in [sqrt(1/2), sqrt(2)]; float32."""
    b_z = b_g * b_g
    b_p = (7.0376836292e-2 * b_g - 1.1514610310e-1) * b_g + 1.1676998740e-1
    b_p = (b_p * b_g - 1.2420140846e-1) * b_g + 1.4249322787e-1
    b_p = (b_p * b_g - 1.6668057665e-1) * b_g + 2.0000714765e-1
    b_p = (b_p * b_g - 2.4999993993e-1) * b_g + 3.3333331174e-1
    return b_z * (b_g * b_p - 0.5)


@triton.jit
def rest_of_log(b_t, b_u):
    """Compute t - log(1 + t) from t and u = 1 + t, each given to full relative accuracy."""
    if b_t.dtype == tl.float64:
        _, b_rest = log1p_and_rest(b_t)
        b_y = tl.where(tl.abs(b_t) < 0.25, b_rest, b_t - tl.log(b_u))
    else:
        b_y = tl.where(tl.abs(b_t) < 0.25, -log_tail(b_t), b_t - log(b_u))
    return b_y


@triton.jit
def log_in_parts(b_x):
    """Compute log(x) of a positive normal x in two parts, so that differences keep the rounding error."""
    if b_x.dtype == tl.float64:
        b_high = tl.log(b_x)
        b_low = tl.zeros_like(b_x)
    else:
        b_m, b_e = split_float(b_x)
        b_e = b_e.to(tl.float32)
        b_g = b_m - 1.0
        b_y = log_tail(b_g) + LOG_2_LOW * b_e
        b_whole = LOG_2_HIGH * b_e  # exact
        b_part = b_g + b_y
        b_high = b_whole + b_part
        b_low = ((b_whole - b_high) + b_part) + ((b_g - b_part) + b_y)
        b_high = tl.where(b_x == b_x, b_high, b_x)
    return b_high, b_low


@triton.jit
def stirling_error(b_x, b_log_x):
    """Compute log x! - (x + 1/2) log x + x - log(2 pi) / 2 from x > 0 and log x."""
    if b_x.dtype == tl.float64:
        b_v = 1.0 / tl.maximum(b_x, 16.0)
        b_v2 = b_v * b_v
        b_series = (b_v2 * (1.0 / 156.0) - 691.0 / 360360.0) * b_v2 + 1.0 / 1188.0
        b_series = ((b_series * b_v2 - 1.0 / 1680.0) * b_v2 + 1.0 / 1260.0) * b_v2 - 1.0 / 360.0
        b_above = (b_series * b_v2 + 1.0 / 12.0) * b_v
        b_below = log_factorial_excess(b_x, b_log_x) - HALF_LOG_2_PI - 0.5 * b_log_x
        b_z = tl.where(b_x < 16, b_below, b_above)
    else:
        b_v = 1.0 / tl.maximum(b_x, 1.0)
        b_p = ((1.4221894e-4 * b_v - 6.4566986e-4) * b_v + 1.0635331e-3) * b_v - 6.0909733e-5
        b_p = ((b_p * b_v - 2.7706881e-3) * b_v - 3.4973453e-7) * b_v + 0.0833333367
        b_below = log_factorial_excess(tl.minimum(b_x, 1.0), b_log_x) - HALF_LOG_2_PI - 0.5 * b_log_x
        b_z = tl.where(b_x < 1, b_below, b_v * b_p)
    return b_z


@triton.jit
def digamma_excess(b_x, b_log_x):
    """Compute x (log x - digamma(x)) - 1/2 from x > 0 and log x."""
    if b_x.dtype == tl.float64:
        # Below 16: evaluated at x + 16, with the fractions between summed as one: sixteen quotients take many
        # registers.
        b_low = b_x < 16
        b_z = tl.where(b_low, b_x + 16.0, b_x)
        b_product, b_sum = b_x, tl.zeros_like(b_x) + 1.0
        for i in tl.static_range(1, 16):
            b_sum = b_sum * (b_x + i) + b_product
            b_product *= b_x + i
        b_shifted = b_x * (b_sum / b_product)
        b_v = 1.0 / (b_z * b_z)
        b_rest = ((b_v * (1.0 / 12.0) - 691.0 / 32760.0) * b_v + 1.0 / 132.0) * b_v - 1.0 / 240.0
        b_rest = (((b_rest * b_v + 1.0 / 252.0) * b_v - 1.0 / 120.0) * b_v + 1.0 / 12.0) * b_v
        b_below = b_x * (b_log_x - (tl.log(b_z) - 0.5 / b_z - b_rest)) + b_shifted - 0.5
        b_y = tl.where(b_low, b_below, b_z * b_rest)
    else:
        # Minimax polynomials: times x in 1 / x to 1.4e-7 for x >= 1, and digamma(1 + x) to 2e-7 for x < 1.
        b_v = 1.0 / tl.maximum(b_x, 1.0)
        b_p = ((-2.5877416e-4 * b_v + 1.782787e-3) * b_v - 4.7971519e-3) * b_v + 5.8417973e-3
        b_p = ((b_p * b_v - 3.919531e-4) * b_v - 8.2927618e-3) * b_v - 1.6125311e-6
        b_above = (b_p * b_v + 8.3333344e-2) * b_v
        b_s = tl.minimum(b_x, 1.0)
        b_d = ((-3.6161063e-2 * b_s + 1.9612116e-1) * b_s - 4.9107448e-1) * b_s + 7.8699407e-1
        b_d = ((b_d * b_s - 9.7081327e-1) * b_s + 1.0711097) * b_s - 1.2010771
        b_d = (b_d * b_s + 1.6449006) * b_s - 5.7721548e-1
        b_y = tl.where(b_x < 1, 0.5 + b_s * (b_log_x - b_d), b_above)
    return b_y
