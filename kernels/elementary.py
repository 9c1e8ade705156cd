"""Elementary functions, shared by the kernels.

They use float32 arithmetic and the hardware's 2^x and 1/sqrt(x) of small arguments, so a GPU, Triton's
interpreter and the C++ of csrc agree to an ulp or two. Triton's own are used in float64 only: ``tl.exp`` is
2^(x log2 e), whose relative error grows with the argument, and ``tl.log`` accepts any argument, at twice the
instructions.
"""

import triton
import triton.language as tl

from .common import INTERPRETED

LOG2_E = tl.constexpr(1.4426950408889634)
LOG_2 = tl.constexpr(0.6931471805599453)
# log 2 in two parts; the first has nine bits, so its product with an exponent is exact.
LOG_2_HIGH = tl.constexpr(0.693359375)
LOG_2_LOW = tl.constexpr(-2.12194440e-4)
# Adding it rounds a float32 to an integer, left in the low bits.
ROUNDER = tl.constexpr(12582912.0)
ONE_BITS = tl.constexpr(0x3F800000)
SQRT_HALF_BITS = tl.constexpr(0x3F3504F3)


@triton.jit
def add_bits(b_x, b_y):
    """Add integers modulo 2^32; TRITON_DEBUG=1 would report the overflow of a plain sum."""
    return tl.add(b_x, b_y, sanitize_overflow=False)


@triton.jit
def exp(b_x):
    """Compute exp(x) to 1.5 ulp everywhere, including denormal results; NaN stays NaN."""
    if b_x.dtype == tl.float64:
        b_y = tl.exp(b_x)
    else:
        b_t = b_x * LOG2_E + ROUNDER
        # Keeps 2^n normal; exp2 of r covers the range beyond.
        b_y = _two_to_n_exp_r(b_x, tl.minimum(tl.maximum(b_t, ROUNDER - 126.0), ROUNDER + 127.0))
    return b_y


@triton.jit
def exp_of_negative(b_x):
    """Compute exp(x) for x <= 0 to two ulps, flushing denormal results to 0; NaN stays NaN."""
    if b_x.dtype == tl.float64:
        b_y = tl.exp(b_x)
    else:
        # Clamp so that -inf does not produce inf - inf.
        b_x = tl.maximum(b_x, -104.0, propagate_nan=tl.PropagateNan.ALL)
        b_t = b_x * LOG2_E
        b_y = tl.exp2(b_t)
        # Correct the rounding error of t. The interpreter's fma rounds twice.
        if INTERPRETED:
            b_r = (b_x.to(tl.float64) - b_t.to(tl.float64) * LOG_2).to(tl.float32)
        else:
            b_r = tl.fma(b_t, -LOG_2, b_x)
        b_y += b_y * b_r
    return b_y


@triton.jit
def _two_to_n_exp_r(b_x, b_t):
    """Compute 2^n exp(x - n log 2), n in the low bits of t; the hardware's 2^f is good for small f."""
    b_f = b_t - ROUNDER
    b_r = (b_x - b_f * LOG_2_HIGH) - b_f * LOG_2_LOW
    # The shift drops the bits of t above n; the sum wraps for an x outside the domain.
    b_bits = add_bits(b_t.to(tl.int32, bitcast=True) << 23, ONE_BITS)
    return tl.exp2(b_r * LOG2_E) * b_bits.to(tl.float32, bitcast=True)


@triton.jit
def expm1_minus_near(b_x):
    """Compute exp(x) - 1 - x for |x| < 0.69 and slightly beyond."""
    if b_x.dtype == tl.float64:
        b_half = 0.5 * b_x
        # Taylor series of exp(h) - 1 - h to h^15: its relative truncation error is below 1e-17 in this range.
        b_p = b_half * (1.0 / 1307674368000.0) + 1.0 / 87178291200.0
        b_p = (b_p * b_half + 1.0 / 6227020800.0) * b_half + 1.0 / 479001600.0
        b_p = (b_p * b_half + 1.0 / 39916800.0) * b_half + 1.0 / 3628800.0
        b_p = (b_p * b_half + 1.0 / 362880.0) * b_half + 1.0 / 40320.0
        b_p = (b_p * b_half + 1.0 / 5040.0) * b_half + 1.0 / 720.0
        b_p = (b_p * b_half + 1.0 / 120.0) * b_half + 1.0 / 24.0
        b_q = ((b_p * b_half + 1.0 / 6.0) * b_half + 0.5) * b_half * b_half
        # Doubling the argument squares exp: the excess from that of x / 2, a sum of positive terms.
        b_excess = (b_half + b_q) * (b_half + b_q) + 2.0 * b_q
    else:
        # (exp(x) - 1 - x) / x^2 on [-1, 1.5] to 3e-8, a minimax polynomial.
        b_p = ((3.39566828e-6 * b_x + 2.52610675e-5) * b_x + 1.97230238e-4) * b_x + 1.3886383e-3
        b_p = ((b_p * b_x + 8.33399185e-3) * b_x + 4.16667273e-2) * b_x + 1.66666574e-1
        b_excess = (b_p * b_x + 0.5) * (b_x * b_x)
    return b_excess


@triton.jit
def expm1_parts(b_x):
    """Compute (exp(x) - 1, exp(x) - 1 - x) without cancellation near zero."""
    b_excess = expm1_minus_near(b_x)
    if b_x.dtype == tl.float64:
        b_near = tl.abs(b_x) < 0.69
    else:
        b_near = tl.abs(b_x - 0.25) < 1.25
    b_far = exp(b_x) - 1.0
    # inf - inf would be NaN.
    b_bounded = tl.minimum(b_x, 710.0)
    return tl.where(b_near, b_x + b_excess, b_far), tl.where(b_near, b_excess, b_far - b_bounded)


@triton.jit
def log_of_parts(b_g, b_e):
    """Compute log((1 + g) 2^e), 1 + g in [sqrt(1/2), sqrt(2)]; relatively accurate for small g if e is 0."""
    b_z = b_g * b_g
    b_p = (7.0376836292e-2 * b_g - 1.1514610310e-1) * b_g + 1.1676998740e-1
    b_p = (b_p * b_g - 1.2420140846e-1) * b_g + 1.4249322787e-1
    b_p = (b_p * b_g - 1.6668057665e-1) * b_g + 2.0000714765e-1
    b_p = (b_p * b_g - 2.4999993993e-1) * b_g + 3.3333331174e-1
    # An explicit fma: of two products the compiler may round either, differently in different tiles.
    b_y = tl.fma(b_e, LOG_2_LOW, b_g * b_z * b_p) - 0.5 * b_z
    return (b_g + b_y) + LOG_2_HIGH * b_e


@triton.jit
def split_float(b_x):
    """Split a positive normal float32 x = m 2^e into (m, e), m in [sqrt(1/2), sqrt(2)) and e an int32."""
    b_bits = b_x.to(tl.int32, bitcast=True)
    # Outside the domain, in unused lanes, they wrap.
    b_e = add_bits(b_bits, -SQRT_HALF_BITS) >> 23
    return tl.sub(b_bits, b_e << 23, sanitize_overflow=False).to(tl.float32, bitcast=True), b_e


@triton.jit
def log(b_x):
    """Compute log(x) for a finite positive normal x; NaN stays NaN."""
    if b_x.dtype == tl.float64:
        b_y = tl.log(b_x)
    else:
        b_m, b_e = split_float(b_x)
        b_y = tl.where(b_x == b_x, log_of_parts(b_m - 1.0, b_e.to(tl.float32)), b_x)
    return b_y


@triton.jit
def log_positive(b_x):
    """Compute log(x) for any x >= 0, including denormals, 0 and infinity; NaN for others."""
    if b_x.dtype == tl.float64:
        b_y = tl.log(b_x)
    else:
        b_small = b_x < 1.1754943508222875e-38
        b_y = log(tl.where(b_small, b_x * 16777216.0, b_x)) - tl.where(b_small, 24 * LOG_2, 0.0)
        b_y = tl.where(b_x == float("inf"), b_x, b_y)
    return tl.where(b_x > 0, b_y, tl.where(b_x == 0, float("-inf"), float("nan")))


@triton.jit
def log1p(b_t):
    """Compute log(1 + t) for t in [0, 1], relatively accurate for small t."""
    if b_t.dtype == tl.float64:
        # The rounding of 1 + t cancels in the quotient.
        b_v = 1.0 + b_t
        b_y = tl.where(b_v == 1.0, b_t, tl.log(b_v) * (b_t / tl.where(b_v == 1.0, 1.0, b_v - 1.0)))
    else:
        # log(1 + t) / t on [0, 1] to 5e-9, a minimax polynomial.
        b_p = ((-3.24402462e-3 * b_t + 1.98514598e-2) * b_t - 5.69595295e-2) * b_t + 1.06036544e-1
        b_p = ((b_p * b_t - 1.53055923e-1) * b_t + 1.96759392e-1) * b_t - 2.49541336e-1
        b_p = ((b_p * b_t + 3.33299624e-1) * b_t - 4.99999024e-1) * b_t + 1.0
        b_y = b_t * b_p
    return b_y


@triton.jit
def odds_of_both(b_s, b_t):
    """Compute (1 + s) (1 + t) - 1 for s, t >= 0 without cancellation; its log1p is log1p(s) + log1p(t)."""
    return b_s + (b_t + b_s * b_t)


@triton.jit
def log1p_of_odds(b_s):
    """Compute log(1 + s) for s in [0, 2^126], relatively accurate for small s; float32."""
    return tl.where(b_s < 0.5, log1p(b_s), log(1.0 + b_s))


@triton.jit
def reciprocal(b_x):
    """Compute 1/x for x in [1, 2] to an ulp: the GPU's rsqrt squared, and a Newton step."""
    b_y = tl.rsqrt(b_x)
    b_y *= b_y
    return b_y + b_y * (1.0 - b_x * b_y)


@triton.jit
def softplus(b_x):
    """Compute log(1 + exp(x)) and its derivative, to full relative accuracy where exp(x) is normal."""
    b_k = exp_of_negative(-tl.abs(b_x))
    b_y = tl.where(b_x < 0, 0.0, b_x) + log1p(b_k)
    return b_y, tl.where(b_x > 0, 1.0, b_k) * reciprocal(1.0 + b_k)


@triton.jit
def quotient(b_x, b_y):
    """Compute x / y, correctly rounded; the GPU's own float32 division is off by up to two ulps."""
    if b_x.dtype == tl.float64:
        b_z = b_x / b_y
    else:
        b_z = tl.div_rn(b_x, b_y)
    return b_z


@triton.jit
def sign(b_x):
    """Return the sign of x: 0 at 0, NaN at NaN."""
    return tl.where(b_x > 0, 1.0, tl.where(b_x < 0, -1.0, b_x))


@triton.jit
def tanh_half(b_x):
    """Compute tanh(x / 2), relatively accurate everywhere; NaN stays NaN."""
    b_a = tl.abs(b_x)
    if b_x.dtype == tl.float64:
        b_near = b_a < 0.69
    else:
        b_near = b_a < 1
    # exp(-|x|) - 1, without cancellation near 0.
    b_e = tl.where(b_near, expm1_minus_near(-b_a) - b_a, exp_of_negative(-b_a) - 1.0)
    b_e /= b_e + 2.0
    return tl.where(b_x < 0, b_e, -b_e)


@triton.jit
def log_factorial_excess(b_x, b_log_x):
    """Compute log x! - (x log x - x), the function Stirling's series expands, for x >= 0.

    ``b_log_x`` is log x; at x = 0 it may be any number.
    """
    b_v = 1.0 / tl.maximum(b_x, 1.0)
    if b_x.dtype == tl.float64:
        # Below 16: evaluated at x + 16, minus the logarithm of the factors between.
        b_low = b_x < 16
        b_y = tl.where(b_low, b_x + 16.0, b_x)
        b_product = tl.zeros_like(b_x) + 1.0
        for i in tl.static_range(1, 17):
            b_product *= b_x + i
        b_product = tl.where(b_low, b_product, 1.0)
        b_v = 1.0 / b_y
        b_v2 = b_v * b_v
        b_series = (b_v2 * (1.0 / 156.0) - 691.0 / 360360.0) * b_v2 + 1.0 / 1188.0
        b_series = ((b_series * b_v2 - 1.0 / 1680.0) * b_v2 + 1.0 / 1260.0) * b_v2 - 1.0 / 360.0
        b_series = (b_series * b_v2 + 1.0 / 12.0) * b_v
        b_log_y = tl.log(b_y)
        # (y + 1/2) log y - y - (x log x - x); for x >= 16 the large terms cancel exactly.
        b_rest = tl.where(b_low, b_y * (b_log_y - 1.0) - b_x * (b_log_x - 1.0) - tl.log(b_product), 0.0)
        b_z = 0.91893853320467274178 + 0.5 * b_log_y + b_series + b_rest
        b_z = tl.where(b_x == 0, 0.0, b_z)
    else:
        # (log x! - (x log x - x) - log(2 pi x) / 2) x in 1/x to 6e-8 for x >= 1, log x! / (x (x - 1)) to 3e-8
        # below: minimax polynomials.
        b_p = ((1.4221894e-4 * b_v - 6.4566986e-4) * b_v + 1.0635331e-3) * b_v - 6.0909733e-5
        b_p = ((b_p * b_v - 2.7706881e-3) * b_v - 3.4973453e-7) * b_v + 0.0833333367
        b_above = 0.918938533 + 0.5 * b_log_x + b_v * b_p
        b_y = tl.minimum(b_x, 1.0)
        b_r = ((2.3883113e-3 * b_y - 1.3525379e-2) * b_y + 3.5975764e-2) * b_y - 6.2913768e-2
        b_r = ((b_r * b_y + 8.7903543e-2) * b_y - 1.1437390e-1) * b_y + 1.5536288e-1
        b_r = (b_r * b_y - 2.4524876e-1) * b_y + 5.7721565e-1
        b_below = b_y * ((b_y - 1.0) * b_r + 1.0 - b_log_x)
        b_z = tl.where(b_x < 1, tl.where(b_x == 0, 0.0, b_below), b_above)
    return b_z


@triton.jit
def log1p_square(b_r):
    """Compute log(1 + r^2), also where r^2 overflows; NaN stays NaN."""
    b_a = tl.abs(b_r)
    b_t = b_a * b_a
    # For large r it is 2 log r.
    b_large = b_a > 1.0e18
    b_log = log(tl.where(b_large, b_a, 1.0 + b_t))
    b_y = tl.where(b_t < 0.5, log1p(b_t), tl.where(b_large, 2.0 * b_log, b_log))
    return tl.where(b_a < float("inf"), b_y, b_a)


@triton.jit
def log1p_excess(b_t, b_y, b_log_1pt):
    """Compute log(1 + t) - y for t >= 0, given y = t / (1 + t) and log(1 + t); about y^2 / 2 near 0."""
    if b_t.dtype == tl.float64:
        # 2 atanh(s) - y, s = y / (2 - y): y s + 2 s^3 (1/3 + s^2 / 5 + ...), without cancellation.
        b_s = b_y / (2.0 - b_y)
        b_v = b_s * b_s
        b_p = tl.zeros_like(b_v)
        for i in tl.static_range(16):
            b_p = b_p * b_v + 1.0 / (33 - 2 * i)
        b_near = b_y * b_s + 2.0 * b_v * b_s * b_p
        b_excess = tl.where(b_t < 1, b_near, b_log_1pt - b_y)
    else:
        # (-log(1 - y) - y) / y^2 on [0, 0.35] to 2e-8, a minimax polynomial.
        b_p = ((4.79645165e-1 * b_y - 1.43728857e-1) * b_y + 2.32812975e-1) * b_y + 1.50784079e-1
        b_p = ((b_p * b_y + 2.01484848e-1) * b_y + 2.49932863e-1) * b_y + 3.33334478e-1
        b_p = b_p * b_y + 4.99999997e-1
        b_excess = tl.where(b_t < 0.5, b_p * (b_y * b_y), b_log_1pt - b_y)
    return b_excess


@triton.jit
def half_step(b_z, b_log_z):
    """Compute log Gamma(z + 1/2) - log Gamma(z) - log(z) / 2 for z >= 0, and z times its derivative.

    Starts from the value at z + 1, a polynomial in 1 / (z + 1); in float64 from Stirling's series at z + 16.
    Each step down adds the logarithm of a factor near 1 and a positive term of the derivative, so nothing
    cancels. ``b_log_z`` is log z.
    """
    b_small = b_z < 1
    if b_z.dtype == tl.float64:
        b_c = 1.0 / (b_z + 0.5)
        b_factor = ((b_z + 1.0) * b_c) * (tl.where(b_small, 1.0, b_z) * b_c)
        b_slope = 0.25 * b_c / (b_z + 1.0)
        for i in tl.static_range(1, 16):
            b_y = b_z + i
            b_c = 1.0 / (b_y + 0.5)
            b_factor *= ((b_y + 1.0) * b_c) * (b_y * b_c)
            b_slope += 0.25 * b_c / (b_y + 1.0) * (b_z / b_y)
        b_u = 1.0 / (b_z + 16.0)
        b_u2 = b_u * b_u
        b_p = (691.0 / 180224.0 - b_u2 * (5461.0 / 425984.0)) * b_u2 - 31.0 / 18432.0
        b_p = ((b_p * b_u2 + 17.0 / 14336.0) * b_u2 - 1.0 / 640.0) * b_u2 + 1.0 / 192.0
        b_p = b_p * b_u2 - 1.0 / 8.0
        b_q = (b_u2 * (5461.0 / 32768.0) - 691.0 / 16384.0) * b_u2 + 31.0 / 2048.0
        b_q = ((b_q * b_u2 - 17.0 / 2048.0) * b_u2 + 1.0 / 128.0) * b_u2 - 1.0 / 64.0
        b_q = b_q * b_u2 + 1.0 / 8.0
        b_log = tl.log(b_factor)
    else:
        b_u, b_c = 1.0 / (b_z + 1.0), 1.0 / (b_z + 0.5)
        b_factor = ((b_z + 1.0) * b_c) * (tl.where(b_small, 1.0, b_z) * b_c)
        b_slope = 0.25 * b_c * b_u
        b_p = ((-2.53897306e-4 * b_u + 1.18338026e-3) * b_u - 1.96744781e-3) * b_u + 3.84325176e-5
        b_p = ((b_p * b_u + 5.22010261e-3) * b_u - 2.97615975e-6) * b_u - 0.124999829
        b_q = ((2.0119627e-3 * b_u - 7.74921151e-3) * b_u + 1.05155874e-2) * b_u - 4.86777251e-4
        b_q = ((b_q * b_u - 1.55831696e-2) * b_u - 1.33040101e-6) * b_u + 0.125000015
        b_log = log(b_factor)
    b_steps = 0.5 * (b_log + tl.where(b_small, b_log_z, 0.0))
    return b_u * b_p + b_steps, b_slope + (b_z * b_u) * (b_u * b_q)
