"""Mistakes of other implementations, one test each, with a comment on how the test reveals the mistake."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import distributions as td
from torch.utils._python_dispatch import TorchDispatchMode

import fastvae
from fastvae import ops
from fastvae.likelihoods import Likelihood

from . import models
from .conftest import DEVICE
from .models import generator, rand, randn, seed_of
from .strategies import of_addresses

B, D, X, K = 5, 3, 7, 4


@pytest.mark.parametrize("shape", [(K, B), (B, B)])
def test_softmax_runs_over_the_samples(backend, shape):
    # Weights normalised over the batch fail here: with K = B the shapes agree, and only the numbers differ.
    log_w = randn(*shape, seed=1).requires_grad_()
    bound = ops.log_mean_exp(log_w)
    assert bound.shape == (shape[1],)
    exact = log_w.detach().double()
    torch.testing.assert_close(
        bound.double(), torch.logsumexp(exact, 0) - math.log(shape[0]), rtol=1e-6, atol=1e-6
    )
    (weights,) = torch.autograd.grad(bound.sum(), log_w)
    torch.testing.assert_close(weights.double(), torch.softmax(exact, 0), rtol=1e-6, atol=1e-7)
    assert not torch.allclose(weights.sum(1), torch.ones(shape[0], device=DEVICE), atol=0.1)


@pytest.mark.parametrize("k", [K, B])
def test_examples_do_not_mix(k):
    # Changing the other examples must not change an example's bound and gradients. A softmax, a maximum or a
    # mean over the wrong axis mixes them.
    _, decoder = models.networks(X, D)
    results = []
    for other in (2, 3):
        mu, logvar = (torch.cat([randn(1, D, seed=s), randn(B - 1, D, seed=s * other)]) for s in (4, 5))
        x = torch.cat([randn(1, X, seed=6), randn(B - 1, X, seed=7 * other)])
        mu.requires_grad_(), logvar.requires_grad_()
        bound = fastvae.iwae(
            x, (mu, logvar), decoder, k=k, estimator="dreg", reduction="none", generator=generator(1)
        )
        grads = torch.autograd.grad(bound.sum(), (mu, logvar))
        results.append([bound[0], grads[0][0], grads[1][0], bound[1]])
    first, second = results
    # The decoder's matrix product may split its rows differently, so not bit for bit.
    for actual, expected in zip(first[:3], second[:3], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)
    assert not torch.equal(first[3], second[3])


def test_weights_are_detached(backend):
    # If w~ kept its graph in sum w~ log w, the gradient would gain w~ (log w - sum w~ log w), of the size of
    # the spread of log w, here about 3.
    log_w = (3 * randn(K, B, seed=8)).requires_grad_()
    (got,) = torch.autograd.grad(ops.log_mean_exp(log_w).sum(), log_w)
    weights = torch.softmax(log_w.detach(), 0)
    wrong = weights * (1 + log_w.detach() - (weights * log_w.detach()).sum(0))
    torch.testing.assert_close(got, weights, rtol=1e-6, atol=1e-7)
    assert float((got - wrong).abs().max()) > 0.1


@pytest.mark.parametrize("estimator", ["iwae", "dreg", "stl"])
def test_value_is_the_bound(estimator):
    # sum w~ log w, the value of a surrogate loss, exceeds the bound by log K minus the entropy of the
    # weights.
    _, decoder = models.networks(X, D)
    x, mu, logvar = randn(B, X, seed=9), randn(B, D, seed=10), randn(B, D, seed=11)
    bound = fastvae.iwae(
        x, (mu, logvar), decoder, k=K, estimator=estimator, reduction="none", generator=generator(2)
    )

    log_w = models.textbook_log_weights(
        x, mu, logvar, models.gaussian_log_likelihood(decoder, x), K, seed_of(2)
    )
    torch.testing.assert_close(bound, torch.logsumexp(log_w, 0) - math.log(K), rtol=1e-5, atol=1e-5)
    surrogate = (torch.softmax(log_w, 0) * log_w).sum(0)
    assert float((surrogate - bound).min()) > 0.05


def test_last_chunk_may_be_ragged():
    # A divisor of chunks * k_chunk is off by log(8/7) or more. Chunks must also have different noise.
    k = 7
    _, decoder = models.networks(X, D, dtype=torch.float64)
    x, mu, logvar = (randn(B, n, seed=s, dtype=torch.float64) for n, s in ((X, 12), (D, 13), (D, 14)))
    log_w = models.textbook_log_weights(
        x, mu, logvar, models.gaussian_log_likelihood(decoder, x), k, seed_of(3)
    )
    log_px = torch.logsumexp(log_w, 0) - math.log(k)
    w = torch.softmax(log_w, 0)
    stderr = torch.sqrt(((w**2).sum(0) - 1 / k) * k / (k - 1))
    for k_chunk in (*range(1, k + 2), 100, None):
        got = fastvae.log_marginal(x, (mu, logvar), decoder, k=k, k_chunk=k_chunk, generator=generator(3))
        for name, expected in {"log_px": log_px, "log_px_stderr": stderr, "ess": 1 / (w**2).sum(0)}.items():
            torch.testing.assert_close(getattr(got, name), expected.detach(), rtol=1e-12, atol=1e-12)


def test_running_maximum_may_rise_and_fall():
    # Chunks whose maxima differ by 10^5, in both directions, and chunks of zeros: unscaled sums overflow or
    # underflow.
    levels = torch.tensor([-1e5, 3.0, -math.inf, 1e5, -2.0, 1e5 + 1, -math.inf], dtype=torch.float64)
    x, q = torch.zeros(2, X), (torch.zeros(2, D), torch.zeros(2, D))
    coming = iter(levels)

    class Given(Likelihood):
        """Likelihood for a decoder that returns log p(x|z) itself."""

        def log_likelihood(self, x, parameters, samples, conditioning=None):
            return parameters.reshape(samples, x.shape[0]).to(x.device)

    def decoder(z):
        return next(coming).to(DEVICE).expand(z.shape[0])

    got = fastvae.log_marginal(
        x.to(DEVICE), tuple(t.to(DEVICE) for t in q), decoder, k=7, k_chunk=1, likelihood=Given()
    )
    # q is the prior, so log w is the level; the two largest weights have the ratio 1 : e.
    expected = 1e5 + math.log1p(math.e) - math.log(7)
    torch.testing.assert_close(got.log_px.cpu().double(), torch.full((2,), expected, dtype=torch.float64))
    ess = (1 + math.e) ** 2 / (1 + math.e**2)
    torch.testing.assert_close(got.ess.cpu().double(), torch.full((2,), ess, dtype=torch.float64))


def test_reductions_run_over_the_batch_only():
    # A mean over events or over samples, or a mean of means, fails here; batches of unequal size add up as
    # sums.
    _, decoder = models.networks(X, D)
    x, mu, logvar = randn(B, X, seed=15), randn(B, D, seed=16), randn(B, D, seed=17)
    for objective, options in ((fastvae.elbo, {"k": K}), (fastvae.iwae, {"k": K})):
        call = functools.partial(objective, x, (mu, logvar), decoder, **options)
        each, total, mean = (call(reduction=r, generator=generator(4)) for r in ("none", "sum", "mean"))
        assert each.shape == (B,)
        torch.testing.assert_close(total, each.sum())
        torch.testing.assert_close(mean, each.sum() / B)


def test_events_are_summed(backend):
    # Twice the features are twice the nats. A mean over pixels, channels or latent dimensions would not
    # change.
    x, mean = rand(B, X, seed=18), randn(K, B, X, seed=19)
    twice = lambda t: torch.cat([t, t], dim=-1)  # noqa: E731
    for op in (lambda x, m: ops.gaussian_log_prob(x, m, 0.3), ops.bernoulli_log_prob):
        torch.testing.assert_close(op(twice(x), twice(mean)), 2 * op(x, mean))
    image = op(x[:, :6].reshape(B, 1, 2, 3), mean[..., :6].reshape(K, B, 1, 2, 3))
    torch.testing.assert_close(image, op(x[:, :6], mean[..., :6]))


def test_kl_is_not_averaged_over_dimensions(backend):
    mu, logvar = randn(B, D, seed=20), randn(B, D, seed=21)
    twice = lambda t: torch.cat([t, t], dim=1)  # noqa: E731
    _, one = ops.rsample_kl(mu, logvar)
    _, two = ops.rsample_kl(twice(mu), twice(logvar))
    torch.testing.assert_close(two, 2 * one)
    assert float(one.min()) > 0.1


def test_dreg_differs_from_iwae_and_stl():
    # A hook on a copy outside the graph leaves the gradient unchanged. Here z is returned to the user, who
    # runs the decoder: the gradient through this z must be reweighted too, as the objective does.
    _, decoder = models.networks(X, D)
    x, mu, logvar = (
        randn(B, X, seed=22),
        randn(B, D, seed=23).requires_grad_(),
        randn(B, D, seed=24).requires_grad_(),
    )
    gradients = {}
    for estimator in ("iwae", "stl", "dreg"):
        z, ratio = ops.rsample_log_ratio(mu, logvar, k=K, estimator=estimator, seed=seed_of(5))
        log_w = ops.gaussian_log_prob(x, *decoder(z)) + ratio
        gradients[estimator] = torch.autograd.grad(ops.log_mean_exp(log_w).sum(), (mu, logvar))
        through = fastvae.iwae(
            x, (mu, logvar), decoder, k=K, estimator=estimator, reduction="sum", generator=generator(5)
        )
        for actual, expected in zip(
            torch.autograd.grad(through, (mu, logvar)), gradients[estimator], strict=True
        ):
            torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)
    # Without the weights it would be "stl". Where one weight dominates they nearly agree; 1e-3 is a hundred
    # times the rounding error.
    for other in ("iwae", "stl"):
        for one, two in zip(gradients["dreg"], gradients[other], strict=True):
            assert float((one - two).abs().median()) > 1e-3


def test_dreg_does_not_change_the_decoder():
    # The decoder's gradient is sum w~ grad log p, not sum w~^2 grad log p, which is smaller, often several
    # times.
    _, decoder = models.networks(X, D, dtype=torch.float64)
    x, mu, logvar = (randn(B, n, seed=s, dtype=torch.float64) for n, s in ((X, 25), (D, 26), (D, 27)))
    mu.requires_grad_()
    bound = fastvae.iwae(x, (mu, logvar), decoder, k=K, estimator="dreg", generator=generator(6))
    got = torch.autograd.grad(bound, list(decoder.parameters()))
    log_w = models.textbook_log_weights(
        x, mu.detach(), logvar, models.gaussian_log_likelihood(decoder, x), K, seed_of(6)
    )
    w = torch.softmax(log_w.detach(), 0)
    expected = torch.autograd.grad((w * log_w).sum(0).mean(), list(decoder.parameters()), retain_graph=True)
    wrong = torch.autograd.grad((w**2 * log_w).sum(0).mean(), list(decoder.parameters()))
    for actual, right, other in zip(got, expected, wrong, strict=True):
        torch.testing.assert_close(actual, right, rtol=1e-11, atol=1e-12)
        assert float((right - other).norm() / right.norm()) > 0.1


@pytest.mark.parametrize("size", [1, 8, 127, 128, 129, 1000, 1025, 4097])
def test_constants_count_once_per_element(backend, size):
    # A constant or bias added once per tile (or for the masked lanes of the last one) is invisible in tiny
    # inputs.
    rows = 3
    x = torch.full((rows, size), 30.0, device=DEVICE)
    # Sums of equal terms: at worst a rounding per addition along a chain of size/8, fewer for pairwise sums.
    close = lambda got, value: torch.testing.assert_close(  # noqa: E731
        got.double(), torch.full_like(got.double(), value), rtol=(4 + size / 8) * 6e-8, atol=0
    )
    close(ops.gaussian_log_prob(x, x.expand(2, rows, size), 4.0), -size * 0.5 * (math.log(2 * math.pi) + 4))
    close(ops.gaussian_log_prob(x, x - 2, x * 0), -size * 0.5 * (math.log(2 * math.pi) + 4))
    close(ops.bernoulli_log_prob(x * 0, (x * 0).expand(2, rows, size)), -size * math.log(2))
    close(ops.bernoulli_log_prob(x * 0, x), -size * 30.0)
    _, kl = ops.rsample_kl(x, x * 0)
    close(kl, size * 450.0)
    # q = p: the ratio vanishes for every draw, whatever the mean and the tile, up to the rounding of z near
    # 32, which is 2e-6, times eps / sigma, and a few roundings of eps^2.
    _, ratio = ops.rsample_log_ratio(x, x * 0 + 1, k=2, prior=(x, x * 0 + 1), seed=seed_of(13))
    eps = fastvae.random.normal(seed_of(13), 2, rows, size).abs()
    allowed = (2e-6 * eps / math.exp(0.5) + 5e-7 * eps**2).sum(2)
    assert bool((ratio.abs() <= allowed).all())


def test_weights_of_large_negative_log_weights(backend):
    # An image's log w is near -1000 or -100 000: weights computed from the rounded bound are off by 1e-4 or
    # by 1e-2.
    for level in (-1e3, -1e5):
        log_w = (level + randn(K, B, seed=28)).requires_grad_()
        (got,) = torch.autograd.grad(ops.log_mean_exp(log_w).sum(), log_w)
        torch.testing.assert_close(
            got.double(), torch.softmax(log_w.detach().double(), 0), rtol=1e-6, atol=1e-9
        )


# Half precision: digits rounded off before a cancellation are lost.


def _bf16(*values):
    return torch.tensor(values, device=DEVICE).bfloat16()


def test_bf16_differences_are_taken_in_float32(backend):
    # 100 - 0.3 rounds to 99.5 in bfloat16, half a unit off; x = 1.001 rounds to 1 and the residual is gone.
    x, mean = _bf16(100.0, -7.0, 3.0)[None], _bf16(0.3, 250.0, 2.984375)[None]
    got = ops.gaussian_log_prob(x, mean, 0.0)
    exact = td.Normal(mean.double(), 1.0).log_prob(x.double()).sum(1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)
    x, mean = torch.tensor([[1.001, 2.002]], device=DEVICE), _bf16(1.0, 2.0)[None]
    got = ops.gaussian_log_prob(x, mean, -12.0)
    exact = td.Normal(mean.double(), math.exp(-6.0)).log_prob(x.double()).sum(1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-5, atol=0)


def test_bf16_kl_near_the_prior(backend):
    # exp(l) - 1 - l at l = 0.01 is 5e-5: it is lost if exp(l), or the difference, is rounded to bfloat16, and
    # in float32 without expm1 it is off by a thousandth.
    logvar = _bf16(0.01, -0.02, 0.005)[None]
    _, kl = ops.rsample_kl(torch.zeros_like(logvar), logvar)
    exact = 0.5 * (torch.expm1(logvar.double()) - logvar.double()).sum(1)
    assert kl.dtype == torch.float32
    # expm1(l) and l are each accurate to 1 ulp, magnified by 2/l = 400 in the cancellation.
    torch.testing.assert_close(kl.double(), exact, rtol=400 * 1.2e-7, atol=0)


def test_bf16_log_ratio(backend):
    # eps^2 - z^2 with z rounded to bfloat16 is off by 2^-8 z^2, which is 4 nats at z = 32.
    mu, logvar = _bf16(32.0, -20.0, 9.0)[None], _bf16(0.5, -1.0, 2.0)[None]
    prior = (mu, logvar)
    z, ratio = ops.rsample_log_ratio(mu, logvar, k=K, prior=prior, seed=seed_of(7))
    assert z.dtype == torch.bfloat16
    assert ratio.dtype == torch.float32
    # q = p, so the ratio is zero up to float32 roundings of z, 4e-6 at 32, times 2 eps / sigma < 8.
    assert float(ratio.abs().max()) < 1e-4
    _, ratio = ops.rsample_log_ratio(mu, logvar, k=K, seed=seed_of(7))
    eps = fastvae.random.normal(seed_of(7), K, 1, 3).double()
    exact = 0.5 * (eps**2 - (mu + torch.exp(0.5 * logvar.double()) * eps) ** 2 + logvar).sum(2)
    torch.testing.assert_close(ratio.double(), exact, rtol=1e-5, atol=0)


def test_bf16_bernoulli_certain_pixels(backend):
    # x l - softplus(l) at l = 20, x = 1 is -2e-9, a difference of two numbers that are equal in bfloat16
    # and in float32.
    logits = _bf16(20.0, -20.0, 12.0)[None]
    got = ops.bernoulli_log_prob(_bf16(1.0, 0.0, 1.0)[None], logits)
    exact = -torch.nn.functional.softplus(-logits.double().abs()).sum(1)
    torch.testing.assert_close(got.double(), exact, rtol=1e-6, atol=0)


def test_bf16_sums_are_kept_in_float32(backend):
    # Adding 1 to 256 changes nothing in bfloat16: such a sum stops there.
    size = 1000
    x = torch.zeros(2, size, device=DEVICE, dtype=torch.bfloat16)
    got = ops.bernoulli_log_prob(x, x)
    torch.testing.assert_close(got, torch.full((2,), -size * math.log(2), device=DEVICE), rtol=1e-5, atol=0)
    log_w = x.T
    bound = ops.log_mean_exp(log_w)
    assert bound.dtype == torch.float32
    assert float(bound.abs().max()) < 1e-6


@pytest.mark.parametrize("magnitude", [50.0, 1e4, 1e30, math.inf])
def test_zero_times_log_zero_is_zero(backend, magnitude):
    # A certain pixel has log p 0 if right and minus its logit's magnitude if wrong: never NaN.
    x = torch.tensor([[1.0, 0.0, 1.0, 0.0, 0.5]], device=DEVICE)
    signs = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0], device=DEVICE)
    expected = [0.0, 0.0, -magnitude, -magnitude, -0.5 * magnitude]
    for pixel in range(5):
        logits = (magnitude * signs[None, pixel : pixel + 1]).requires_grad_()
        got = ops.bernoulli_log_prob(x[:, pixel : pixel + 1], logits)
        # log(1 + e^-50) = 2e-22 is the only other term.
        torch.testing.assert_close(got, torch.tensor([expected[pixel]], device=DEVICE), rtol=1e-6, atol=1e-21)
        (grad,) = torch.autograd.grad(got.sum(), logits)
        slope = [0.0, 0.0, 1.0, -1.0, -0.5][pixel]
        torch.testing.assert_close(grad, torch.full_like(grad, slope), rtol=1e-6, atol=1e-21)


def test_seed_is_a_value(backend):
    # If the address were used instead of the value, a fresh or moved seed tensor would give different noise,
    # and a rewritten one the same.
    mu, logvar = torch.zeros(B, D, device=DEVICE), torch.zeros(B, D, device=DEVICE)
    draw = lambda seed: ops.rsample_kl(mu, logvar, seed=seed)[0]  # noqa: E731
    seeds = torch.tensor([5, -6, 2**40 + 5, 5 + 2**32], device=DEVICE)
    first = draw(seeds[0].clone())
    assert torch.equal(first, draw(torch.tensor(5, device=DEVICE)))
    # An element of a larger tensor, whose pointer is not the storage's.
    assert torch.equal(draw(seeds[1]), draw(torch.tensor(-6, device=DEVICE)))
    # Both halves of the 64 bits matter.
    draws = [draw(seed) for seed in seeds]
    for i, one in enumerate(draws):
        for other in draws[:i]:
            assert not torch.equal(one, other)
    place = seeds[0].clone()
    draw(place)
    place.fill_(7)
    assert not torch.equal(draw(place), first)


def test_backward_sees_the_noise_of_forward(backend):
    # dz/dlogvar = sigma eps / 2 with the forward pass's eps; with other noise it would not match z.
    mu, logvar = randn(B, D, seed=29).requires_grad_(), randn(B, D, seed=30).requires_grad_()
    z, _ = ops.rsample_kl(mu, logvar)
    (got,) = torch.autograd.grad(z.sum(), logvar)
    torch.testing.assert_close(got, 0.5 * (z - mu).detach(), rtol=1e-5, atol=1e-6)


def test_every_call_draws_a_new_seed():
    mu, logvar = torch.zeros(B, D, device=DEVICE), torch.zeros(B, D, device=DEVICE)
    torch.manual_seed(0)
    first, second = ops.rsample_kl(mu, logvar)[0], ops.rsample_kl(mu, logvar)[0]
    assert not torch.equal(first, second)
    torch.manual_seed(0)
    assert torch.equal(first, ops.rsample_kl(mu, logvar)[0])
    # A user's generator leaves torch's state unchanged.
    state = torch.get_rng_state()
    drawn = [ops.rsample_kl(mu, logvar, generator=generator(8))[0] for _ in range(2)]
    assert torch.equal(*drawn)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.skipif(DEVICE.type != "cpu", reason="needs memory that is mapped when touched")
@pytest.mark.parametrize("implementation", ["native", "reference"])
def test_offsets_of_more_than_31_bits(implementation):
    # Rows 2^31 elements apart: with int32 offsets the second row is read elsewhere, or the process crashes.
    # (Triton's offsets are in test_shapes.py.)
    stride = 2**31 + 64
    far = lambda t: of_addresses(*t.shape, stride=(stride, 1), dtype=t.dtype).copy_(t)  # noqa: E731
    rows, near = 2, rand(2, X, seed=31).half()
    with fastvae.use_backend(implementation):
        for op in (
            lambda t: ops.gaussian_log_prob(t, torch.zeros_like(near), 0.0),
            lambda t: ops.gaussian_log_prob(torch.zeros_like(near), t, 0.0),
            lambda t: ops.bernoulli_log_prob(t, near),
            lambda t: ops.bernoulli_log_prob(near, t),
            lambda t: ops.log_mean_exp(t),
            lambda t: ops.rsample_kl(t, near)[1],
            lambda t: ops.rsample_log_ratio(near, t, k=K, seed=seed_of(9))[1],
        ):
            assert torch.equal(op(far(near)), op(near))
        # Noise addresses use all 32 bits, too.
        z = [
            ops.rsample_kl(near * 0, near * 0, k=1, seed=seed_of(10), sample_offset=k, row_offset=b)[0]
            for k in (0, 2**31, 2**32 - 1)
            for b in (0, 2**31, 2**32 - rows)
        ]
        for i, one in enumerate(z):
            assert not any(torch.equal(one, other) for other in z[:i])


def test_log_marginal_keeps_no_graph():
    # A graph kept per chunk holds every chunk's activations, and chunking saves nothing.
    encoder, decoder = models.networks(X, D)
    seen = []

    def watching(z):
        mean, logvar = decoder(z)
        seen.append((torch.is_grad_enabled(), z.requires_grad, mean.requires_grad, z.shape[0]))
        return mean, logvar

    x = randn(B, X, seed=32)
    result = fastvae.log_marginal(x, encoder(x), watching, k=10, k_chunk=4)
    assert seen == [(False, False, False, 4 * B), (False, False, False, 4 * B), (False, False, False, 2 * B)]
    assert not any(v.requires_grad for v in vars(result).values())
    assert torch.is_grad_enabled()


class _HostReads(TorchDispatchMode):
    """Mode that counts reads that would synchronise with a GPU."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.is_nonzero,
            torch.ops.aten.equal,
        ):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("likelihood", ["gaussian", "bernoulli"])
def test_objectives_do_not_read_back_from_the_device(likelihood):
    # One .item() per example, or per call, stalls a GPU each time.
    encoder, decoder = models.networks(X, D, likelihood)
    x = rand(B, X, seed=33)
    # The reference checks Bernoulli targets separately; the kernels do so in the pass that reads them.
    with fastvae.use_backend("native"):
        # A decoder's first outputs on a CPU are inspected.
        fastvae.elbo(x, encoder(x), decoder, likelihood=likelihood)
    with fastvae.use_backend("native"), _HostReads() as reads:
        torch.ones(()).item()
        assert reads.count == 1, "the counter is blind"
        fastvae.elbo(x, encoder(x), decoder, likelihood=likelihood, free_bits=0.1).backward()
        fastvae.iwae(x, encoder(x), decoder, k=K, likelihood=likelihood, estimator="dreg").backward()
        fastvae.iwae(x, encoder(x), decoder, k=K, k_chunk=2, likelihood=likelihood).backward()
        fastvae.log_marginal(x, encoder(x), decoder, k=10, k_chunk=3, likelihood=likelihood)
    assert reads.count == 1
    # On the meta device, reading is impossible.
    encoder, decoder, x = encoder.to("meta"), decoder.to("meta"), x.to("meta")
    for bound in (
        fastvae.elbo(x, encoder(x), decoder, likelihood=likelihood, k=K, kl="mc"),
        fastvae.iwae(x, encoder(x), decoder, k=K, likelihood=likelihood, estimator="dreg"),
    ):
        bound.backward()
        assert bound.shape == ()
    assert fastvae.log_marginal(
        x, encoder(x), decoder, k=10, k_chunk=3, likelihood=likelihood
    ).log_px.shape == (B,)


def test_encoder_runs_once():
    # Re-encoding for every chunk costs as much as the chunks.
    encoder, decoder = models.networks(X, D)
    vae = fastvae.VAE(encoder, decoder)
    x = randn(B, X, seed=34)
    for call in (
        lambda: vae.log_marginal(x, k=10, k_chunk=3),
        lambda: vae.elbo(x, k=K),
        lambda: vae.iwae(x, k=K),
    ):
        encoder.calls = 0
        call()
        assert encoder.calls == 1


def test_decoder_runs_once_with_one_batch_axis():
    # Once per sample would be K launches of small matrix products; [K, B, D] would break convolutions.
    _, decoder = models.networks(X, D)
    shapes = []

    def watching(z):
        shapes.append(tuple(z.shape))
        return decoder(z)

    x, mu, logvar = randn(B, X, seed=35), randn(B, D, seed=36), randn(B, D, seed=37)
    fastvae.iwae(x, (mu, logvar), watching, k=K)
    fastvae.elbo(x, (mu, logvar), watching, k=K)
    fastvae.elbo(x, (mu, logvar), watching)
    assert shapes == [(K * B, D), (K * B, D), (B, D)]
