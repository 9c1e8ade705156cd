"""Addressed noise: the noise of a row and draw does not depend on the batch, and seeds have 64 bits."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastvae
from fastvae import ops
from fastvae.distributions import DiagonalNormal
from fastvae.likelihoods import Gaussian

from .conftest import DEVICE
from .models import LinearGaussian, evaluate_parts, generator, randn

N, D, X = 23, 3, 7


class _Whole(DiagonalNormal):
    """Subclass whose rows cannot be sliced, so that the whole batch is drawn."""


@pytest.mark.parametrize("hard", [3, 15], ids=["few go on", "most go on"])
@pytest.mark.parametrize("posterior", [DiagonalNormal, _Whole], ids=["rows", "whole"])
def test_stopping_draws_the_same_noise_in_any_batch(posterior, hard):
    """An example's noise is that of its index in the data, even after others of its batch have stopped."""
    model = LinearGaussian(D, X)
    x = model.sample(N)
    shift = torch.full((N,), 0.1, dtype=torch.float64, device=DEVICE)
    shift[torch.arange(2, 2 + hard, device=DEVICE)] = 1.3

    def run(batch_size, **options):
        starts = iter(range(0, N, batch_size))

        def encoder(x):
            mu, logvar = model.posterior(x)
            start = next(starts)
            return posterior(mu + shift[start : start + len(x), None] * torch.exp(0.5 * logvar), logvar)

        return evaluate_parts(
            encoder, model.decoder, x, k=1600, tol=0.1, batch_size=batch_size, likelihood=model.likelihood,
            progress=False, generator=generator(1), **options,
        )  # fmt: skip

    whole = run(N)
    assert int((whole.k > 100).sum()) >= hard and int((whole.k == 100).sum()) >= 5
    for batch_size, options in ((4, {}), (9, {"k_chunk": 60}), (1, {})):
        result = run(batch_size, **options)
        assert torch.equal(result.k, whole.k)
        for name in ("log_px", "log_px_stderr", "khat"):
            actual, expected = getattr(result, name), getattr(whole, name)
            torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


def test_a_shard_with_offsets_equals_that_part_of_the_whole(backend):
    """Given the offsets of the first row and draw, value and gradient equal that part of the whole."""
    k, b = 6, 9
    mu, logvar = (randn(b, D, seed=s) for s in (1, 2))
    upstream = randn(k, b, D, seed=3)
    seed = torch.tensor(-11, device=DEVICE)
    for op, options in (
        (ops.rsample_kl, {}),
        (ops.rsample_log_ratio, {}),
        (ops.rsample_log_ratio, {"estimator": "stl"}),
    ):
        results = []
        for rows, draws in (
            (slice(0, b), slice(0, k)),
            (slice(2, 7), slice(0, k)),
            (slice(4, b), slice(3, k)),
        ):
            leaves = [t[rows].clone().requires_grad_() for t in (mu, logvar)]
            z, second = op(
                *leaves, k=draws.stop - draws.start, seed=seed, sample_offset=draws.start,
                row_offset=rows.start, **options,
            )  # fmt: skip
            # Only the draws of one row, in a shard of them.
            loss = (z * upstream[draws, rows]).sum() + second.sum()
            results.append((z.detach(), *torch.autograd.grad(loss, leaves)))
        whole, part, tail = results
        assert torch.equal(part[0], whole[0][:, 2:7])
        assert torch.equal(tail[0], whole[0][3:, 4:])
        for got, expected in zip(part[1:], whole[1:], strict=True):
            torch.testing.assert_close(got, expected[2:7], rtol=1e-6, atol=1e-6)
        # The gradients of the first and of the last draws add up to the whole gradient.
        leaves = [t[4:].clone().requires_grad_() for t in (mu, logvar)]
        z, second = op(*leaves, k=3, seed=seed, row_offset=4, **options)
        extra = 0 if op is ops.rsample_kl else second.sum()
        first = torch.autograd.grad((z * upstream[:3, 4:]).sum() + extra, leaves)
        for a, c, expected in zip(first, tail[1:], whole[1:], strict=True):
            torch.testing.assert_close(a + c, expected[4:], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("given", [False, True], ids=["torch's state", "a generator"])
def test_seeds_have_64_bits(given):
    """Neither half repeats: two of 200 draws share 32 bits with probability 5e-6, and the draws are fixed."""
    source = generator(4) if given else None
    if not given:
        torch.manual_seed(4)
    seeds = [int(fastvae.random.draw_seed(DEVICE, source)) % 2**64 for _ in range(200)]
    for half in ([s >> 32 for s in seeds], [s % 2**32 for s in seeds]):
        assert len(set(half)) == 200
        # Every bit is 0 in some and 1 in others; 200 draws miss one with probability 2^-192.
        ones, zeros = 0, 0
        for word in half:
            ones |= word
            zeros |= word ^ (2**32 - 1)
        assert ones == zeros == 2**32 - 1


def test_seeds_that_differ_in_one_bit_draw_different_noise(backend):
    """An int seed equals the tensor of it; seeds that differ in one bit draw different noise."""
    make = lambda seed: fastvae.random.normal(seed, 2, 3, 5, device=DEVICE)  # noqa: E731
    for seed in (0, 12345, -1, 2**63 - 1, -(2**63)):
        whole = make(seed)
        assert torch.equal(make(torch.tensor(seed)), whole)
        for bit in (0, 1, 31, 32, 62, 63):
            flipped = seed ^ (1 << bit) if bit < 63 else seed + (2**63 if seed < 0 else -(2**63))
            assert not torch.equal(make(flipped), whole), bit


def test_all_rows_and_draws_have_different_noise():
    """No two latents of one call are equal, over rows and draws."""
    seen = []

    def decoder(z):
        seen.append(z)
        return z.sum(1, keepdim=True)

    b, k = 11, 6
    q = torch.zeros(b, D, device=DEVICE), torch.zeros(b, D, device=DEVICE)
    x = torch.zeros(b, 1, device=DEVICE)
    fastvae.iwae(x, q, decoder, k=k, likelihood=Gaussian(1.0))
    fastvae.log_marginal(x, q, decoder, k=k, k_chunk=2, likelihood=Gaussian(1.0))
    fastvae.elbo(x, q, decoder, k=k, likelihood=Gaussian(1.0))
    z = torch.cat(seen).flatten()
    # Among 594 float32 normals one pair is equal with probability below 0.02, three pairs with below 1e-6.
    assert len(z) == 3 * k * b * D and len(z.unique()) >= len(z) - 3


def test_vae_sample_depends_on_the_generator_alone():
    vae = fastvae.VAE(nn.Linear(X, 2 * D), nn.Identity(), likelihood=Gaussian(1.0), latent_dim=D).to(DEVICE)
    torch.manual_seed(1)
    first = vae.sample(5, generator=generator(2))
    torch.manual_seed(3)
    assert torch.equal(vae.sample(5, generator=generator(2)), first)
    torch.manual_seed(1)
    first = vae.sample(5)
    torch.manual_seed(1)
    assert torch.equal(vae.sample(5), first)


@pytest.mark.parametrize("objective", ["elbo", "elbo mc", "iwae", "log_marginal", "reconstruction_log_prob"])
def test_row_offset_gives_that_part_of_the_whole_batch(objective):
    """Part of a batch with its row offset gives that part of the whole batch's result."""
    x, mu, logvar, weight = (randn(*s, seed=5, dtype=torch.float64) for s in ((9, X), (9, D), (9, D), (D, X)))

    def run(rows, **options):
        options = {"likelihood": Gaussian(0.7), "generator": generator(6), **options}
        call = {
            "elbo": lambda *a: fastvae.elbo(*a, k=3, reduction="none", **options),
            "elbo mc": lambda *a: fastvae.elbo(*a, k=3, kl="mc", reduction="none", **options),
            "iwae": lambda *a: fastvae.iwae(*a, k=3, reduction="none", **options),
            "log_marginal": lambda *a: fastvae.log_marginal(*a, k=30, **options).log_px,
            "reconstruction_log_prob": lambda *a: fastvae.reconstruction_log_prob(*a, k=3, **options),
        }[objective]
        return call(x[rows], (mu[rows], logvar[rows]), lambda z: z @ weight)

    whole = run(slice(0, 9))
    torch.testing.assert_close(run(slice(4, 9), row_offset=4), whole[4:], rtol=1e-12, atol=1e-12)
    assert float((run(slice(4, 9)) - whole[4:]).abs().max()) > 1e-3
