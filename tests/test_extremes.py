"""Variances from e^-170 to e^170: results that fit float32 are accurate, others are infinite."""

from __future__ import annotations

import math

import pytest
import torch
from torch.distributions import Independent, Normal

import fastvae
from fastvae import ops

from .conftest import DEVICE

WIDEST = 170.0
INFO = torch.finfo(torch.float32)
# Roundings of the longest formula, each half an eps, an exponential or a normal counted as three; plus one to
# spare.
ROUNDINGS = 32


def assert_right(name, actual, exact, scale, one_sign=False):
    """Assert accuracy to the roundings of the terms, summed in ``scale``, wherever these fit float32.

    A result that overflows is not finite; with ``one_sign`` it is infinite, otherwise inf - inf may be NaN.
    """
    actual, exact, scale = (t.detach().double().cpu() for t in (actual, exact, scale))
    fits = scale < INFO.max / 4
    bound = ROUNDINGS * INFO.eps / 2 * scale + INFO.tiny
    # Written so that a NaN is a failure.
    wrong = fits & ~((actual - exact).abs() <= bound)
    beyond = exact.abs() > 1.001 * INFO.max
    wrong |= beyond & actual.isfinite()
    if one_sign:
        wrong |= beyond & (actual != exact.sign() * torch.inf)
    at = wrong.nonzero()
    assert not len(at), (
        f"{name}: {len(at)} of {wrong.numel()} are off; at {at[0].tolist()}: got {actual[wrong][0]:.9g}, "
        f"exact {exact[wrong][0]:.9g}, allowed error {bound[wrong][0]:.3g}"
    )
    return bool(fits.any())


def _uniform(low, high, *shape):
    return torch.empty(shape).uniform_(low, high)


def _latent_case(b, d):
    """Return inputs whose rows cycle through four cases.

    q and p of one width, the means that far apart or by one; a narrow q and a wide p; and both at random.
    """
    kind = torch.arange(b)[:, None] % 4
    logvar = torch.where(kind == 2, _uniform(-WIDEST, WIDEST / 4, b, d), _uniform(-WIDEST, WIDEST, b, d))
    logvar[:3, 0], logvar[:2, 1] = -WIDEST, WIDEST
    near = (logvar + torch.randn(b, d)).clamp(-WIDEST, WIDEST)
    far = torch.where(kind == 2, _uniform(-WIDEST / 4, WIDEST, b, d), _uniform(-WIDEST, WIDEST, b, d))
    sigma = torch.where(kind == 0, torch.exp(logvar / 2), 1.0)
    return [
        torch.randn(b, d) * sigma, logvar, torch.randn(b, d) * sigma, torch.where(kind < 2, near, far)
    ]  # fmt: skip


def _moved(tensors):
    return [t.to(DEVICE) for t in tensors]


def _latent(op, inputs, with_prior, samples, seed, grads, dtype, **options):
    """Return results and gradients of float32 inputs, computed in ``dtype``."""
    inputs = [t.to(dtype).requires_grad_() for t in inputs[: 4 if with_prior else 2]]
    results = op(
        *inputs[:2], k=samples, seed=seed, prior=tuple(inputs[2:]) if with_prior else None, **options
    )
    arriving = [g.to(dtype) for g in grads]
    pairs = [(r, g) for r, g in zip(results, arriving, strict=True) if bool(g.abs().sum() > 0)]
    outs, arriving = zip(*pairs, strict=True)
    found = torch.autograd.grad(outs, inputs, arriving, allow_unused=True)
    return results, [torch.zeros_like(t) if g is None else g for t, g in zip(inputs, found, strict=True)]


# DReG takes its weights from the ratio's upstream gradient, without which its gradient is undefined.
ARRIVING = [
    (estimator, arriving)
    for estimator in ("kl", "kl per dimension", "iwae", "stl", "dreg")
    for arriving in ("both", "first", "second")
    if (estimator, arriving) != ("dreg", "first")
]


@pytest.mark.parametrize("with_prior", [True, False])
@pytest.mark.parametrize("estimator, arriving", ARRIVING)
def test_log_variances_of_q_and_p(backend, estimator, arriving, with_prior):
    k, b, d = 3, 12, 7
    inputs = _moved(_latent_case(b, d))
    seed = torch.tensor(int(torch.randint(2**62, ())), device=DEVICE)
    is_kl = estimator.startswith("kl")
    per_dimension = estimator == "kl per dimension"
    shape = ((b, d) if per_dimension else (b,)) if is_kl else (k, b)
    grad_z, grad_other = torch.randn(k, b, d), torch.rand(shape) + 0.1
    if arriving == "first":
        grad_other.zero_()
    if arriving == "second":
        grad_z.zero_()
    grads = _moved([grad_z, grad_other])
    op = ops.rsample_kl if is_kl else ops.rsample_log_ratio
    options = {"per_dimension": per_dimension} if is_kl else {"estimator": estimator}
    case = (op, inputs, with_prior, k, seed, grads)
    results, found = _latent(*case, torch.float32, **options)
    with fastvae.use_backend("reference"):
        exact, exact_found = _latent(*case, torch.float64, **options)
        # If ½σε is stored, ε is recovered to 2e-8 for σ as small as here.
        eps = fastvae.random.normal(seed, k, b, d, dtype=torch.float64).abs().clamp(min=0.02)

    mu, logvar, m, prior_logvar = (t.double() for t in inputs)
    if not with_prior:
        m, prior_logvar = torch.zeros_like(m), torch.zeros_like(m)
    sigma, s = torch.exp(logvar / 2), torch.exp(prior_logvar / 2)
    z = mu.abs() + sigma * eps
    white, near = (z + m.abs()) / s, (mu.abs() + m.abs()) / s
    g_z, g = (t.double().abs() for t in grads)
    if is_kl:
        u = (logvar - prior_logvar).abs()
        # The exponential magnifies the rounding of u.
        excess = torch.expm1(logvar - prior_logvar).abs() * (1 + u / ROUNDINGS)
        terms = (near**2 + excess + u) / 2
        scales = [z, terms if per_dimension else terms.sum(1)]
        g = g if per_dimension else g[:, None]
        grad_scales = [
            g_z.sum(0) + g * near / s,
            ((g_z * eps).sum(0) * sigma + g * excess) / 2,
            g * near / s,
            g * (excess + near**2) / 2,
        ]
    else:
        scales = [z, (eps**2 + white**2 + logvar.abs() + prior_logvar.abs()).sum(2) / 2]
        g = g[:, :, None]
        path = estimator != "iwae"
        weight = g / g.sum(0) if estimator == "dreg" else torch.ones_like(g)
        grad_scales = [
            (weight * (g_z + g * white / s + path * g * eps / sigma)).sum(0),
            (weight * eps * (g_z * sigma + g * white * (sigma / s) + path * g * eps)).sum(0) / 2
            + (1 - path) * g.sum(0) / 2,
            (g * white / s).sum(0),
            (g * (white**2 + 1)).sum(0) / 2,
        ]
    for name, *values in zip(("z", "second"), results, exact, scales, strict=True):
        assert assert_right(name, *values, one_sign=True), f"{name}: nothing fits"
    names = ("mu", "logvar", "prior mu", "prior logvar")
    for name, *values in zip(names, found, exact_found, grad_scales, strict=False):
        assert assert_right(f"gradient of {name}", *values), f"gradient of {name}: nothing fits"


def test_dreg_of_a_normal_with_a_tiny_scale(backend):
    """DReG works for a user's torch Normal of precision 1e40, log variance -92."""
    linear = torch.nn.Linear(3, 4, device=DEVICE)
    mean = torch.zeros(5, 3, device=DEVICE, requires_grad=True)
    scale = torch.full((5, 3), 1e-20, device=DEVICE, requires_grad=True)
    q = Independent(Normal(mean, scale), 1)
    torch.manual_seed(1)
    x = torch.ones(5, 4, device=DEVICE)
    fastvae.iwae(x, q, linear, likelihood="bernoulli", k=6, estimator="dreg").backward()
    for grad in (mean.grad, scale.grad):
        assert bool(grad.isfinite().all()) and bool((grad != 0).all())


def test_ratio_to_a_narrow_prior(backend):
    """A narrow prior's log p(z) is large, not -inf: for q = p the ratio is 0, with terms 44 and -44."""
    logvar = torch.full((2, 3), -89.0, device=DEVICE)
    zeros = torch.zeros_like(logvar)
    _, ratio = ops.rsample_log_ratio(zeros, logvar, k=5, prior=(zeros, logvar))
    torch.testing.assert_close(ratio, torch.zeros_like(ratio), rtol=0, atol=1e-4)
    mean = torch.full_like(zeros, 1.0)
    _, kl = ops.rsample_kl(mean, logvar, prior=(mean, logvar))
    assert torch.equal(kl, torch.zeros_like(kl))


LAYOUTS = {
    "full": lambda k, b, x: (k, b, x),
    "per row": lambda k, b, x: (k, b, 1),
    "row": lambda k, b, x: (x,),
    "number": lambda k, b, x: (),
}


@pytest.mark.parametrize("pixels", [6, 1030])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_log_variances_of_the_likelihood(backend, layout, pixels):
    k, b = 3, 4
    logvar = torch.empty(LAYOUTS[layout](k, b, pixels)).uniform_(-WIDEST, WIDEST)
    x = torch.randn(b, pixels)
    # Cycling through distances of one scale, zero, and one (e^43 scales).
    kind = (torch.arange(k)[:, None, None] + torch.arange(b)[:, None]) % 3
    wide = torch.exp(logvar / 2).expand(k, b, pixels)
    far = torch.where(kind == 0, wide, torch.where(kind == 1, 0.0, (wide * math.exp(43)).clamp(max=1.0)))
    mean = x - far * torch.randn(k, b, pixels)
    grad = torch.randn(k, b)
    x, mean, logvar, grad = _moved([x, mean, logvar, grad])

    def run(dtype):
        inputs = [t.to(dtype).requires_grad_() for t in (x, mean, logvar)]
        value = ops.gaussian_log_prob(*inputs)
        return [value, *torch.autograd.grad(value, inputs, grad.to(dtype))]

    found = run(torch.float32)
    with fastvae.use_backend("reference"):
        exact = run(torch.float64)
    s, g = torch.exp(logvar.double() / 2), grad.double().abs()[:, :, None]
    white = ((x.double() - mean.double()) / s).abs()
    push = g * white / s
    scales = [
        (math.log(2 * math.pi) + logvar.double().abs() + white**2).sum(2) / 2,
        push.sum(0),
        push,
        (g * (white**2 + 1) / 2).sum_to_size(logvar.shape),
    ]
    names = ("value", "gradient of x", "gradient of mean", "gradient of logvar")
    for name, *values in zip(names, found, exact, scales, strict=True):
        fits = assert_right(name, *values, one_sign=name == "value")
        assert fits or layout in ("number", "per row"), f"{name}: nothing fits"


@pytest.mark.parametrize("logvar", [-89.0, -120.0, -170.0])
def test_a_pixel_equal_to_the_mean(backend, logvar):
    """At x = mean, (x - mean)^2 / s^2 is 0, though 1 / s^2 overflows float32."""
    x = torch.rand(2, 5, device=DEVICE)
    mean, v = x.clone().requires_grad_(), torch.tensor(logvar, device=DEVICE, requires_grad=True)
    value = ops.gaussian_log_prob(x, mean, v)
    wide = Normal(x.double(), math.exp(logvar / 2)).log_prob(x.double()).sum(1)
    torch.testing.assert_close(value.double(), wide, rtol=1e-6, atol=0)
    grads = torch.autograd.grad(value.sum(), (mean, v))
    assert torch.equal(grads[0], torch.zeros_like(mean)) and float(grads[1]) == -5.0


def test_a_scale_that_underflows(backend):
    """A scale that underflows gives infinities where it must, and padding rows contribute nothing."""
    x, mean = torch.ones(3, 5, device=DEVICE), torch.zeros(7, 3, 5, device=DEVICE, requires_grad=True)
    x.requires_grad_()
    logvar = torch.zeros(5, device=DEVICE)
    logvar[2] = -400  # 1 / s overflows float32
    logvar.requires_grad_()
    grads = torch.autograd.grad(ops.gaussian_log_prob(x, mean, logvar).sum(), (x, mean, logvar))
    others = torch.arange(5, device=DEVICE) != 2
    for grad, sign, value in zip(grads, (-1, 1, 1), (-7.0, 1.0, 0.0), strict=True):
        assert bool((grad[..., 2] == sign * torch.inf).all())
        assert bool((grad[..., others] == value).all())
