"""Formulas of every op and its gradients on rounded numbers: expected values and their bounds.

Written by hand from the mathematics (docstrings of fastvae.ops), so that they are independent of the
reference. Where implementations round differently, the formula has the larger number of roundings.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fastvae.likelihoods.declared import DECLARED

from .compare import EXP, LOG, Rounded, total
from .oracles import ORACLES


def computation(*tensors: Tensor | None) -> torch.dtype:
    """Return the dtype of the computation."""
    wide = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if wide else torch.float32


def _given(value: Tensor | Rounded, dtype: torch.dtype) -> Rounded:
    """Wrap an input; return a computed number unchanged."""
    return value if isinstance(value, Rounded) else Rounded.exact(value, dtype)


def _constant(value: float, like: Rounded) -> Rounded:
    """Wrap a constant with a rounding error, such as a logarithm that the kernel computes."""
    value = torch.full_like(like.value, value)
    return Rounded(value, value.abs() * LOG * like.u, like.u)


def rsample(
    inputs: Sequence[Tensor | None],
    eps: Tensor,
    grad_z: Tensor | None,
    grad_kl: Tensor | None = None,
    grad_ratio: Tensor | None = None,
    *,
    scale: str = "logvar",
    floor: float = 0.0,
    logvar_range: tuple[float, float] | None = None,
    per_dimension: bool = False,
    estimator: str = "iwae",
) -> tuple[dict[str, Rounded], list[Rounded | None]]:
    """Compute rsample_kl and rsample_log_ratio: z, kl and ratio, and the gradients of the four inputs.

    ``inputs`` are mu, logvar (or the form ``scale``), and mean and log variance of the prior or None; ``eps``
    is the noise [K, B, D] in float64. The upstream gradients ``grad_z`` [K, B, D], ``grad_kl`` [B] (or [B, D]
    with ``per_dimension``) and ``grad_ratio`` [K, B] may be None.
    """
    dtype = computation(*inputs)
    storage, device = inputs[0].dtype, eps.device

    def given(t, shape=None):
        return Rounded.exact(torch.zeros(shape, device=device) if t is None else t, dtype)

    b, d = inputs[0].shape
    mu, raw, m, s = (given(t, (b, d)).expand(b, d) for t in inputs)
    lo, hi = logvar_range or (-math.inf, math.inf)
    logvar, sigma, inverse_sigma, chain = spread(raw, scale, floor, lo, hi)
    inside = ((raw.value >= lo) & (raw.value <= hi)) | raw.value.isnan()
    eps = Rounded.exact(eps, dtype).noise()
    # N(0, I) has precision exactly 1.
    precision = s.precision() if inputs[3] is not None else Rounded.exact(torch.ones_like(s.value), dtype)
    move = sigma * eps
    z = mu + move

    delta, u = mu - m, logvar - s
    push = delta * precision
    kl = total([delta * push, u.expm1_minus()])
    kl = (kl if per_dimension else kl.sum(1)) * 0.5

    far = z - m
    white = far * precision
    square = far * white
    noise = eps.square()
    ratio = total([noise, -square, logvar.expand(*eps.value.shape), -s.expand(*eps.value.shape)], 2) * 0.5

    zero = given(None, eps.value.shape)
    g_z = zero if grad_z is None else given(grad_z)
    g_kl = given(grad_kl, (b, d)) if grad_kl is None or per_dimension else given(grad_kl)[:, None]
    g = (zero if grad_ratio is None else given(grad_ratio)[:, :, None]).expand(*eps.value.shape)
    pull = g * white
    h = [g_z, -pull]
    if estimator != "iwae":
        h.append(g * (move * inverse_sigma.square()))
    h = total(h)
    if estimator == "dreg":
        row = given(grad_ratio)
        whole = row.sum(0)
        h = h * (row / whole).where(whole.value != 0)[:, :, None]
    entropy = g if estimator == "iwae" else zero
    mu_grad = total([h.sum(0), g_kl * push])
    logvar_grad = total([(h * move * 0.5).sum(0), (entropy * 0.5).sum(0), g_kl * u.expm1() * 0.5])
    m_grad = total([pull.sum(0), -(g_kl * push)])
    s_grad = total([(g * square).sum(0), -g.sum(0), -(g_kl * u.expm1()), -(g_kl * (delta * push))]) * 0.5
    grads = [mu_grad, logvar_grad.where(inside) if chain is None else logvar_grad * chain, m_grad, s_grad]
    # The gradient of a row shared by the batch is the sum of the stored gradients.
    grads = [
        None if t is None else grad if t.shape == (b, d) else grad.stored(storage).sum_to_size(t.shape)
        for grad, t in zip(grads, inputs, strict=True)
    ]
    return {"z": z, "kl": kl, "ratio": ratio}, grads


def spread(
    raw: Rounded, scale: str, floor: float, lo: float, hi: float
) -> tuple[Rounded, Rounded, Rounded, Rounded | float | None]:
    """Return log σ², σ, 1/σ, and the derivative of log σ² by ``raw``, None if ``raw`` is log σ² itself."""
    one = Rounded(torch.ones_like(raw.value), torch.zeros_like(raw.value), raw.u)
    if scale == "logvar":
        logvar = raw.clamp(lo, hi)
        return logvar, (logvar * 0.5).exp(), (logvar * -0.5).exp(), None
    if scale == "log_scale":
        # 1 / σ may be computed from a rounded σ.
        return raw * 2.0, raw.exp(), one / raw.exp(), 2.0
    if scale == "scale":
        return raw.log() * 2.0, raw, one / raw, one / raw * 2.0
    variance = raw.clamp(min=0) + (-raw.abs()).exp().log1p() + floor
    logvar, sigma, chain = variance.log(), variance.sqrt(), raw.sigmoid() / variance
    if floor == 0:
        # There softplus(raw) is exp(raw), in float64 too.
        tail = raw.value < -80
        logvar = Rounded._where(tail, raw, logvar)
        sigma = Rounded._where(tail, (raw * 0.5).exp(), sigma)
        chain = Rounded._where(tail, one, chain)
    return logvar, sigma, one / sigma, chain


# Allowed roundings of a likelihood's kernels as a multiple of its definition's, since kernels group terms
# differently: a logarithm of a product of 16 factors adds 12 to the 9.
GROUPED = 3


def rows(
    likelihood: str, x: Tensor, *rest: Tensor | Rounded, mask: Tensor | None = None
) -> tuple[Rounded, list[Rounded | None]]:
    """Compute log_prob [K, B] of a declared likelihood, and the gradients of x and of the parameters.

    x is [B, *event], and its gradient None if the likelihood has none. The parameters, given or computed,
    broadcast to the first, [K, B, *event]. The last argument is the upstream gradient [K, B]. The values are
    those of an independent distribution in float64, the errors those of the definition. Where the mask
    [B, *event] is False, x and the parameters are valid but count nothing.
    """
    declared = DECLARED[likelihood]
    *parameters, grad = (t.detach() if isinstance(t, Tensor) else t for t in rest)
    x = x.detach()
    dtype = computation(x, *parameters)
    parameters = [_given(p, dtype) for p in parameters]
    shape = parameters[0].value.shape
    events = tuple(range(2, len(shape)))
    g = _given(grad, dtype)[(..., *[None] * len(events))]

    wide = x.double().expand(shape).clone().requires_grad_(declared.differentiable)
    exact = [p.value.expand(shape).clone().requires_grad_() for p in parameters]
    values = ORACLES[likelihood](*exact).log_prob(wide)
    asked = [wide, *exact] if declared.differentiable else exact
    slopes = torch.autograd.grad(values.sum(), asked)
    # Cancellation inside the distribution, in float64.
    sizes = (1 + wide.detach().abs()) * sum(1 + p.detach().abs() for p in exact)
    of_oracle = 2.0**-46 * (values.detach().abs() + sizes)

    terms = [Rounded.exact(wide, dtype)]
    terms += [
        Rounded(*torch.broadcast_tensors(t.detach(), p.error), p.u)
        for t, p in zip(exact, parameters, strict=True)
    ]
    defined = declared.value(*terms)
    error = GROUPED * defined.error + of_oracle
    if declared.data is not None:
        own = declared.data(wide.detach())
        assert_close(defined.value + own, values.detach(), of_oracle)
        # Computed separately, to a few roundings.
        error = error + 8 * defined.u * own.abs()
    else:
        assert_close(defined.value, values.detach(), of_oracle)
    each = Rounded(values.detach(), error, defined.u)
    out = total([each if mask is None else each.where(mask)], *events)

    made = declared.gradient(g, *terms)
    found = []
    for gradient, slope in zip(made[0 if declared.differentiable else 1 :], slopes, strict=True):
        value = g.value * slope
        bound = GROUPED * gradient.error + of_oracle * g.value.abs()
        assert_close(gradient.value, value, of_oracle * (1 + g.value.abs()))
        gradient = Rounded(*torch.broadcast_tensors(value, bound), defined.u)
        found.append(gradient if mask is None else gradient.where(mask))
    to_x = [found.pop(0).sum(0)] if declared.differentiable else [None]
    return out, to_x + [f.sum_to_size(p.value.shape) for f, p in zip(found, parameters, strict=True)]


def assert_close(defined: Tensor, expected: Tensor, error: Tensor) -> None:
    """Assert that a definition agrees with the independent distribution."""
    same = (defined == expected) | (defined.isnan() & expected.isnan())
    wrong = ~same & ~((defined - expected).abs() <= error + 2.0**-40 * expected.abs())
    assert not bool(wrong.any()), (
        f"defined {defined[wrong][:3].tolist()}, but {expected[wrong][:3].tolist()} by its oracle"
    )


def log_mean_exp(log_w: Tensor, grad: Tensor) -> tuple[Rounded, Rounded]:
    """Compute log_mean_exp over the first axis, and the gradient of log_w."""
    dtype = computation(log_w)
    bound, weight = _log_mean_exp(Rounded.exact(log_w, dtype), dtype)
    return bound, Rounded.exact(grad, dtype) * weight


def _log_mean_exp(log_w: Rounded, dtype: torch.dtype, mean: bool = True) -> tuple[Rounded, Rounded]:
    """Compute the bound (without ``mean`` the logarithm of the sum), and the normalised weights."""
    k = log_w.value.shape[0]
    peak = log_w.value.amax(0)
    shift = Rounded.exact(torch.where(peak.isinf(), 0.0, peak), dtype)
    e = (Rounded.exact(log_w.value, dtype) - shift).exp()
    # A running sum is rescaled by an exponential whenever the maximum rises: at most once per block of 16,
    # and rarely.
    scaled = e.rounded((EXP + 1) * min((k - 1) // 16, 8))
    sum_ = scaled.sum(0)
    log_k = [-_constant(math.log(k), sum_)] if mean else []
    bound = total([Rounded.exact(peak, dtype), sum_.log(), *log_k])
    # In a column of zero total weight all weights are 0.
    weight = _flushed(e / sum_, dtype).where(sum_.value != 0)
    # Propagated errors of the log weights: in the bound at most the largest of them; in a weight, which stays
    # within [0, 1], its own and those of the others.
    largest = log_w.error.amax(0)
    change = torch.fmin(weight.value * torch.expm1(log_w.error + largest), torch.ones_like(weight.value))
    return bound.off(largest), weight.off(change)


def mixture(
    z: Tensor, mu: Tensor, logvar: Tensor, log_weight: Tensor, grad: Tensor
) -> tuple[Rounded, list[Rounded]]:
    """Compute log p [N] of a mixture of normal distributions, and the gradients of z and the components."""
    dtype = computation(z, mu, logvar, log_weight)
    z, mu, logvar, log_weight, grad = (Rounded.exact(t, dtype) for t in (z, mu, logvar, log_weight, grad))
    inverse = (logvar * -0.5).exp()
    white = (z[:, None] - mu) * inverse
    spread = (logvar + _constant(math.log(2 * math.pi), logvar)).sum(1) * 0.5
    n, u = white.value.shape[:2]
    s = total([log_weight.expand(n, u), -spread.expand(n, u), -(_in_turn(white.square(), 2) * 0.5)])
    value, weight = _log_mean_exp(Rounded(s.value.mT, s.error.mT, s.u), dtype, mean=False)
    weight = Rounded(weight.value.mT, weight.error.mT, weight.u)
    r = _flushed(grad[:, None] * weight, dtype)[:, :, None]
    slope = r * white
    shares = _in_turn(r, 0)
    grads = [
        -_in_turn(slope * inverse, 1),
        _in_turn(slope, 0) * inverse,
        total([_in_turn(slope * white, 0), -shares.expand(*mu.value.shape)]) * 0.5,
        shares[:, 0],
    ]
    return value, grads


def aggregate(
    z: Tensor, mu: Tensor, logvar: Tensor, size: int, grad: Tensor | None, grad_each: Tensor | None
) -> tuple[Rounded, Rounded, list[Rounded]]:
    """Compute log q [N] and log q of each dimension [N, D], and the gradients of z and the components.

    ``size`` is that of the data set, for stratified weights; 0 for equal ones.
    """
    dtype = computation(z, mu, logvar)
    z, mu, logvar = (Rounded.exact(t, dtype) for t in (z, mu, logvar))
    white = (z[:, None] - mu) * (logvar * -0.5).exp()
    n, u, d = white.value.shape
    weights = torch.full((n, u), -math.log(u - 1 if size else u), dtype=torch.float64)
    weights = weights.to(z.value.device)
    for row in range(n if size else 0):
        weights[row, row % u] = math.log(1 / size)
        weights[row, (row + 1) % u] = math.log((size - u + 1) / (size * (u - 1)))
    # Sums of logarithms, one of them of a quotient.
    log_weight = Rounded(weights, z.u * (4 + 2 * LOG * (weights.abs() + math.log(u))), z.u)
    constant = (logvar + _constant(math.log(2 * math.pi), logvar)) * 0.5  # [U, D]
    half = white.square() * 0.5
    whole = total([log_weight, -constant.sum(1).expand(n, u), -_in_turn(half, 2)])
    each = total([log_weight[:, :, None].expand(n, u, d), -constant.expand(n, u, d), -half])
    log_q, share = _aggregated(whole, dtype)
    log_q_each, share_each = _aggregated(each, dtype)
    r = None
    if grad is not None:
        r = _flushed(Rounded.exact(grad, dtype)[:, None] * share, dtype)[:, :, None].expand(n, u, d)
    if grad_each is not None:
        more = _flushed(Rounded.exact(grad_each, dtype)[:, None] * share_each, dtype)
        r = more if r is None else r + more
    slope, inverse = r * white, (logvar * -0.5).exp()
    grads = [
        -_in_turn(slope * inverse, 1),
        _in_turn(slope, 0) * inverse,
        total([_in_turn(slope * white, 0), -_in_turn(r, 0)]) * 0.5,
    ]
    return log_q, log_q_each, grads


def _aggregated(scores: Rounded, dtype: torch.dtype) -> tuple[Rounded, Rounded]:
    """Compute the log-sum-exp over axis 1, and the weights computed from its rounded result."""
    moved = Rounded(scores.value.movedim(1, 0), scores.error.movedim(1, 0), scores.u)
    value, weight = _log_mean_exp(moved, dtype, mean=False)
    value = value.rounded(2)
    off = torch.where(weight.value == 0, 0.0, weight.value * torch.expm1(value.error))
    weight = weight.off(torch.fmin(off, torch.ones_like(off)))
    return value, Rounded(weight.value.movedim(0, 1), weight.error.movedim(0, 1), weight.u)


def full(
    mu: Tensor, tril: Tensor, eps: Tensor, grad_z: Tensor | None, grad_log_q: Tensor | None
) -> tuple[Rounded, Rounded, list[Rounded]]:
    """Compute z and log q of draws with the packed triangle of L, and the gradients of mu and the triangle.

    ``eps`` is the noise [K, B, D] in float64; the upstream gradients ``grad_z`` [K, B, D] and ``grad_log_q``
    [K, B] may be None.
    """
    dtype = computation(mu, tril)
    (k, b, d), device = eps.shape, eps.device
    mu, tril, eps = Rounded.exact(mu, dtype), Rounded.exact(tril, dtype), Rounded.exact(eps, dtype).noise()
    rows, columns = torch.tril_indices(d, d, device=device)
    places = torch.zeros(d, d, dtype=torch.long, device=device)
    places[rows, columns] = torch.arange(len(rows), device=device)
    below = rows.new_ones(d, d).tril().bool()
    on_diagonal = torch.eye(d, dtype=torch.bool, device=device)
    packed = tril[:, places].where(below)  # [B, D, D]
    logs = packed.where(on_diagonal)
    scale = Rounded._where(on_diagonal, logs.exp(), packed)
    move = _in_turn(scale * eps[:, :, None, :], 3)
    constant = _constant(0.5 * math.log(2 * math.pi), mu)
    of_scale = total([logs.sum(2), constant], 1).expand(k, b)
    log_q = total([-(_in_turn(eps.square(), 2) * 0.5), -of_scale])

    zero = Rounded.exact(torch.zeros(k, b, d, device=device), dtype)
    g_z = zero if grad_z is None else Rounded.exact(grad_z, dtype)
    g_q = zero[:, :, 0] if grad_log_q is None else Rounded.exact(grad_log_q, dtype)
    by_scale = _in_turn(g_z[:, :, :, None] * eps[:, :, None, :], 0)  # [B, D, D]
    arrives = _in_turn(g_q, 0)[:, None, None].expand(b, d, d).where(on_diagonal)
    by_scale = total([Rounded._where(on_diagonal, by_scale * scale, by_scale), -arrives])
    return mu + move, log_q, [_in_turn(g_z, 0), by_scale[:, rows, columns]]


def _in_turn(terms: Rounded, dim: int, most: int = 256) -> Rounded:
    """Sum over one axis, up to ``most`` terms of it sequentially."""
    size = terms.value.abs().sum(dim)
    return total([terms], dim).off(min(terms.value.shape[dim], most) * terms.u * size)


def _flushed(number: Rounded, dtype: torch.dtype) -> Rounded:
    """Allow for flushing to zero below the smallest normal number."""
    tiny = torch.finfo(dtype).tiny
    small = number.value.abs() < 2 * tiny
    return Rounded(number.value, torch.where(small, number.error + 2 * tiny, number.error), number.u)


def product(a: Rounded, b: Rounded) -> Rounded:
    """Compute a @ b, summing over the common axis in any order."""
    value, size = a.value @ b.value, a.value.abs() @ b.value.abs()
    error = a.error @ (b.value.abs() + b.error) + a.value.abs() @ b.error
    return Rounded(value, error + a.u * a.value.shape[-1] * size, a.u)


def linear(h: Tensor | Rounded, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Rounded:
    """Compute the output of a linear layer, [N, X]."""
    made = product(_given(h, dtype), Rounded.exact(weight.mT, dtype))
    return made if bias is None else total([made, Rounded.exact(bias, dtype)])


def linear_backward(grad: Rounded, h: Tensor | Rounded, weight: Tensor) -> list[Rounded]:
    """Compute the gradients of h, weight and bias from the upstream gradient [N, X]."""
    dtype = grad.dtype
    flipped = Rounded(grad.value.mT, grad.error.mT, grad.u)
    ones = torch.ones(len(grad.value), 1, dtype=torch.float64, device=grad.value.device)
    to_bias = product(flipped, Rounded.exact(ones, dtype))[:, 0]
    return [product(grad, Rounded.exact(weight, dtype)), product(flipped, _given(h, dtype)), to_bias]


def _step(a: Rounded, below: float) -> Rounded:
    """Compute 1 above 0, else ``below``; either for an argument that its error may carry across 0."""
    value = torch.where(a.value > 0, 1.0, torch.full_like(a.value, below))
    unsure = (a.value.abs() <= a.error) & (a.error > 0)
    return Rounded(value, torch.where(unsure, torch.full_like(value, abs(1 - below)), a.u * abs(below)), a.u)


def _leaky(a: Rounded, slope: float) -> tuple[Rounded, Rounded]:
    value = torch.where(a.value > 0, a.value, slope * a.value)
    # Neither branch is steeper than this, so neither is their union.
    error = max(1.0, slope) * a.error + 2 * a.u * value.abs()
    return Rounded(value, error, a.u), _step(a, slope)


def _elu(a: Rounded, alpha: float) -> tuple[Rounded, Rounded]:
    value = torch.where(a.value > 0, a.value, alpha * torch.expm1(a.value.clamp(max=0)))
    error = max(1.0, alpha) * a.error + (2 * EXP + 2) * a.u * value.abs()
    slope = _step(a, 0.0)
    # Below 0 either exp(a) alpha, or the value plus alpha.
    below = torch.where(a.value > 0, 0.0, alpha * torch.exp(a.value.clamp(max=0)))
    off = torch.where(a.value > a.error, 0.0, error + 2 * EXP * a.u * alpha)
    unsure = slope.error * (1 + alpha)
    return Rounded(value, error, a.u), Rounded(slope.value + below, off + unsure, a.u)


def _normal_cdf(a: Rounded) -> Rounded:
    """Compute the normal distribution function, either by erf and a sum or by the tail: an absolute error."""
    value, density = torch.special.ndtr(a.value), 0.3989422804014327
    return Rounded(value, density * a.error + 8 * a.u, a.u)


def _gelu(a: Rounded) -> tuple[Rounded, Rounded]:
    cdf = _normal_cdf(a)
    return a * cdf, cdf + a * ((a.square() * -0.5).exp() * 0.3989422804014327)


def _gelu_tanh(a: Rounded) -> tuple[Rounded, Rounded]:
    inner = (a + a.square() * a * 0.044715) * 0.7978845608028654
    # Half of 1 + tanh(inner), by a sigmoid or by a sum.
    s = (inner * 2.0).sigmoid().off(torch.full_like(a.value, 8 * a.u))
    slope = (a.square() * 0.134145 + 1.0) * 0.7978845608028654
    return a * s, s + a * (s * (1.0 - s)) * slope * 2.0


def _silu(a: Rounded) -> tuple[Rounded, Rounded]:
    s = a.sigmoid()
    return a * s, s * (a * (1.0 - s) + 1.0)


def _tanh(a: Rounded) -> tuple[Rounded, Rounded]:
    y = a.tanh()
    return y, 1.0 - y.square()


def _sigmoid(a: Rounded) -> tuple[Rounded, Rounded]:
    y = a.sigmoid()
    return y, y * (1.0 - y)


def _softplus(a: Rounded) -> tuple[Rounded, Rounded]:
    value = torch.nn.functional.softplus(a.value, threshold=700)
    # Beyond 20 torch's is linear.
    y = Rounded(value, a.error + (LOG + EXP + 2) * a.u * value + (a.value > 20) * 2.1e-9, a.u)
    return y, a.sigmoid().off(y.error + 8 * a.u)


# Value and slope of a hidden layer's activation, functions of the argument and the parameter.
ACTIVATIONS = {
    "identity": lambda a: (a, Rounded.exact(torch.ones_like(a.value), a.dtype)),
    "relu": lambda a: _leaky(a, 0.0),
    "tanh": _tanh,
    "sigmoid": _sigmoid,
    "silu": _silu,
    "gelu": _gelu,
    "gelu_tanh": _gelu_tanh,
    "elu": _elu,
    "leaky_relu": _leaky,
    "softplus": _softplus,
}


def hidden(h: Tensor, layers: Sequence[tuple], dtype: torch.dtype) -> tuple[list[Rounded], list[Rounded]]:
    """Compute the inputs of the layers (weight, bias, activation), the last one's value, and the slopes."""
    values, slopes = [Rounded.exact(h, dtype)], []
    for weight, bias, activation in layers:
        name, _, parameter = activation.partition(":")
        argument = linear(values[-1], weight, bias, dtype)
        given = [float(parameter)] if parameter else []
        value, slope = ACTIVATIONS[name](argument, *given)
        values.append(value)
        slopes.append(slope)
    return values, slopes


def hidden_backward(
    grad: Rounded, values: list[Rounded], slopes: list[Rounded], layers: Sequence[tuple]
) -> list[Rounded]:
    """Compute the gradients of h and of each layer's weight and bias from the last value's."""
    found = []
    for i in reversed(range(len(layers))):
        grad, *own = linear_backward(grad * slopes[i], values[i], layers[i][0])
        found = [*own, *found]
    return [grad, *found]


def reduce(
    likelihood: str,
    x: Tensor,
    parameters: Sequence[Tensor | Rounded],
    term: Tensor | None,
    beta: Tensor | None,
    how: tuple[float, str, str],
    grad: Tensor,
    grad_mean: Tensor | None,
    mask: Tensor | None = None,
) -> tuple[list[Rounded], list[Rounded | None]]:
    """Compute the bound and the mean log-likelihood, and the gradients of x, the parameters and the term.

    The first parameter is [K, B, X], others broadcast to it; given or computed. ``how`` is (coefficient,
    over, reduction). ``grad`` and ``grad_mean`` [B] are the upstream gradients of the bound and of the mean
    log-likelihood.
    """
    coefficient, over, reduction, *_ = how
    dtype = computation(x, *parameters)
    samples, batch = _given(parameters[0], dtype).value.shape[:2]

    def exact(value):
        return Rounded.exact(torch.as_tensor(value, dtype=torch.float64, device=x.device), dtype)

    nothing = torch.zeros(samples, batch, device=x.device)
    log_likelihood, _ = rows(likelihood, x, *parameters, nothing, mask=mask)
    log_likelihood = log_likelihood.rounded(1)
    k, one = exact(samples), exact(1.0)
    mean = log_likelihood.sum(0) / k
    factor = (exact(coefficient).rounded(1) * (one if beta is None else exact(beta))).expand(batch)
    added = exact(0.0).expand(batch) if term is None else exact(term)
    arrives = exact(grad) / exact(batch) if reduction == "mean" else exact(grad)
    arrives = arrives.expand(batch)
    if over == "mean":
        each = added if added.value.dim() == 1 else added.sum(0) / k
        bound = total([mean, factor * each])
        g = (arrives / k).expand(samples, batch)
    else:
        bound, weight = _log_mean_exp(total([log_likelihood, (factor * added).expand(samples, batch)]), dtype)
        g = _flushed(arrives * weight, dtype)
    if reduction != "none":
        bound = bound.sum(0) if reduction == "sum" else bound.sum(0) / exact(batch)
    once = arrives if over == "mean" else g.sum(0)
    to_term = factor * (g if added.value.dim() == 2 else once)
    if grad_mean is not None:
        g = total([g, (exact(grad_mean) / k).expand(samples, batch)])
    _, grads = rows(likelihood, x, *parameters, g, mask=mask)
    return [bound, mean], [*grads, None if term is None else to_term]
