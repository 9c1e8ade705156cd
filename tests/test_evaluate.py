"""Evaluation of data sets: ground truth, streaming, stopping, ranks, checkpoints, and faulty data."""

from __future__ import annotations

import dataclasses
import datetime
import errno
import functools
import io
import itertools
import math
import os
import signal
import subprocess
import sys
import threading
import types
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import distributed, nn
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fastvae
from fastvae.core.digest import digest
from fastvae.distributions import DiagonalNormal, Distribution, Mixture, StandardNormal, VampPrior
from fastvae.estimation import stream as _stream
from fastvae.estimation.evaluation import checkpoint as checkpoint_module
from fastvae.estimation.evaluation.checkpoint import Store, write_arrays
from fastvae.estimation.evaluation.model import Model
from fastvae.estimation.weights import ESTIMATES
from fastvae.inputs.batch import Inputs
from fastvae.inputs.last_layer import run_to_last_layer
from fastvae.inputs.modules import modules_of, parameters_digest
from fastvae.likelihoods import Bernoulli, Gaussian, Poisson

from . import models
from .conftest import DEVICE
from .models import LinearGaussian, evaluate_parts, generator, rand, randn, seed_of

N, D, X, K = 23, 3, 7, 40
QUIET = {"progress": False}
SHIFT, STRETCH = 0.3, 0.2


def _model_and_data(n=N, dtype=torch.float64):
    model = LinearGaussian(D, X, dtype=dtype)
    return model, model.sample(n), lambda x: model.posterior(x, SHIFT, STRETCH)


def _evaluate(model, q, x, **options):
    options = {"k": K, "likelihood": model.likelihood, "generator": generator(1), **QUIET, **options}
    return evaluate_parts(q, model.decoder, x, **options)


FIELDS = (*(f.name for f in dataclasses.fields(fastvae.LogMarginal)), "k", "elbo", "kl_per_dim")
NUMBERS = ("nll", "stderr", "mc_stderr", "bits_per_dim", "active_units", "dims")


def _assert_same(actual, expected, tolerance=1e-10):
    for name in FIELDS:
        torch.testing.assert_close(
            getattr(actual, name), getattr(expected, name), rtol=tolerance, atol=tolerance, equal_nan=True
        )
    for name in NUMBERS:
        assert getattr(actual, name) == pytest.approx(getattr(expected, name), rel=tolerance, nan_ok=True)
    assert np.allclose(actual.curve, expected.curve, rtol=tolerance, equal_nan=True)


# Truth


@pytest.mark.parametrize("k", [100, pytest.param(10_000, marks=pytest.mark.slow)])
def test_linear_gaussian(k):
    """Estimates agree with 2000 known log p(x), for an inexact q whose weights' moments are known."""
    n = 2000
    model, x, q = _model_and_data(n, torch.float32)
    result = _evaluate(model, q, x, k=k)
    error = result.log_px - model.log_px(x).cpu()
    score = error / result.log_px_stderr
    assert float((score.abs() < 4).double().mean()) >= 0.99
    # The bias of log p is -Var(w) / (2 p^2 K).
    variance = model.moment(2, SHIFT, STRETCH) - 1
    spread = math.sqrt(variance / k)
    assert abs(float(error.mean()) + variance / (2 * k)) < 4 * spread / math.sqrt(n)
    assert float(error.std()) == pytest.approx(spread, rel=0.1)
    assert result.mc_stderr == pytest.approx(spread / math.sqrt(n), rel=0.1)
    assert float(result.khat.median()) < 0.7
    # nll's standard error is that of the mean over examples.
    assert result.nll == pytest.approx(-float(result.log_px.mean()), rel=1e-12)
    assert result.stderr == pytest.approx(float(result.log_px.std()) / math.sqrt(n), rel=1e-12)
    assert result.bits_per_dim == pytest.approx(result.nll / (X * math.log(2)), rel=1e-12)
    # The bound rises with the number of draws, from the ELBO to log p(x).
    nll = [v for _, v, _ in result.curve]
    assert [n for n, _, _ in result.curve] == [n for n in (1, 10, 100, 1000) if n < k] + [k]
    for (fewer, before, _), (_, after, _) in itertools.pairwise(result.curve):
        # Fewer draws are a subset of more, so their difference has a smaller error.
        assert after < before + 4 * math.sqrt(model.moment(2, SHIFT, STRETCH) / (fewer * n))
    assert nll[-1] == result.nll
    kl = fastvae.ops.rsample_kl(*q(x))[1].mean()
    at_mean = torch.distributions.Normal(model.decoder(q(x)[0]), model.scale).log_prob(x).sum(1)
    variance = q(x)[1].exp()
    elbo = float((at_mean - 0.5 * (model.gain**2 * variance).sum(1) / model.scale**2).mean() - kl)
    assert float(result.elbo.mean()) == pytest.approx(elbo, abs=0.05)


def test_stopping_at_a_tolerance():
    """Every example reaches the tolerance or the maximum of draws; the draws are log_marginal's."""
    model, x, _ = _model_and_data()
    tol, most = 0.1, 3000

    def q(x):  # from nearly exact to hopeless
        mu, logvar = model.posterior(x)
        return mu + torch.linspace(0.3, 2, len(x), device=DEVICE, dtype=x.dtype)[:, None] * (
            0.5 * logvar
        ).exp(), logvar

    result = _evaluate(model, q, x, k=None, tol=tol, batch_size=N)
    assert int(result.k.max()) > 1000
    result = _evaluate(model, q, x, k=most, tol=tol, batch_size=N)
    assert bool(((result.log_px_stderr <= tol) | (result.k == most)).all())
    assert set(result.k.tolist()) <= {100, 200, 400, 800, 1600, most}
    assert {100, most} <= set(result.k.tolist())
    for k in result.k.unique().tolist():
        rows = result.k == k
        expected = fastvae.log_marginal(
            x, q(x), model.decoder, k=k, likelihood=model.likelihood, generator=generator(1)
        )
        torch.testing.assert_close(result.log_px[rows], expected.log_px.cpu()[rows], rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(result.khat[rows], expected.khat.cpu()[rows], rtol=1e-8, atol=1e-8)
    # Also in batches, where a whole batch may stop early.
    _assert_same(_evaluate(model, q, x, k=most, tol=tol, k_chunk=17, batch_size=N), result)
    assert [n for n, _, _ in result.curve] == [1, 10, 100, 200, 400, 800, 1600, most]
    assert "on average" in str(result)


def test_only_unfinished_examples_are_drawn():
    """Decoder and sampler process only examples still drawing, with unchanged results."""
    model, x, _ = _model_and_data(100)
    hard = [7, 8, 60]
    drawn = {True: [], False: []}

    class Counting(DiagonalNormal):
        """Subclass whose rows cannot be sliced, so that the whole batch is drawn."""

        sliced = True

        def rows(self, start, stop):
            part = super().rows(start, stop) if not self.sliced else None
            if self.sliced:
                part = Counting(self.mu[start:stop], self.logvar[start:stop])
            return part

        def rsample_log_prob(self, samples, seed, **place):
            drawn[self.sliced].append((samples, self.batch))
            return super().rsample_log_prob(samples, seed, **place)

    def q(x):
        mu, logvar = model.posterior(x)
        mu = mu.clone()
        mu[hard] += 2 * (0.5 * logvar[hard]).exp()
        return Counting(mu + 0.05, logvar)

    results = []
    for Counting.sliced in (True, False):
        results.append(_evaluate(model, q, x, k=3000, tol=0.05))
        assert results[-1].k[hard].tolist() == [3000] * 3
        assert set(results[-1].k.tolist()) == {100, 3000}
    _assert_same(*results, 1e-9)
    # Plus, once, a few draws to check that rows can be decoded separately.
    assert 0 <= sum(k * n for k, n in drawn[True]) - (100 * 100 + 2900 * 3) <= 5 * 100
    assert 0 <= sum(k * n for k, n in drawn[False]) - 3000 * 100 <= 5 * 100
    # The number of draws at once is bounded in either case.
    most = 2**18 if DEVICE.type == "cuda" else 2**13
    assert all(k * n <= most for calls in drawn.values() for k, n in calls)
    # A prior with a row per example cannot be sliced, but is correct.
    prior = DiagonalNormal(*(0 * randn(100, D, seed=1, dtype=torch.float64) for _ in range(2)))
    Counting.sliced = True
    _assert_same(_evaluate(model, q, x, k=3000, tol=0.05, prior=prior), results[0], 1e-9)


def test_drawing_continues_while_all_weights_are_zero():
    """While all weights are 0 the error is unknown and drawing continues; a warning says if it stays so."""

    class Rare(fastvae.likelihoods.Likelihood):
        def log_likelihood(self, x, parameters, samples, conditioning=None):
            return torch.where(parameters.reshape(samples, x.shape[0], D)[..., 0] > x[:, 0], 0.0, -math.inf)

    x = torch.tensor([[2.5], [50.0], [-9.0]], device=DEVICE).expand(3, X)
    q = lambda x: (torch.zeros(len(x), D, device=DEVICE), torch.zeros(len(x), D, device=DEVICE))  # noqa: E731
    with pytest.warns(RuntimeWarning, match=r"-inf for 1 of 3 examples \(number 1\)"):
        result = evaluate_parts(
            q, nn.Identity(), x, likelihood=Rare(), k=20_000, tol=0.3, generator=generator(1), **QUIET
        )
    assert result.k.tolist()[1:] == [20_000, 100]
    assert float(result.log_px_stderr[0]) <= 0.3
    exact = math.log(0.5 * math.erfc(2.5 / math.sqrt(2)))
    assert abs(float(result.log_px[0]) - exact) < 1.5


# Uses of per-row tensors of the whole batch in a decoder; all are correct while no row stops.
_CLOSING_OVER = {
    "repeated": lambda mean, y: mean + y.repeat(len(mean) // len(y), 1),
    "cut to length": lambda mean, y: mean + y.repeat(-(-len(mean) // len(y)), 1)[: len(mean)],
    "unfolded": lambda mean, y: (mean.unflatten(0, (-1, len(y))) + y).flatten(0, 1),
    "statistics of the batch": lambda mean, y: mean - 0.5 * mean.unflatten(0, (-1, len(y))).mean(1).mean(0),
    "indexed": lambda mean, y: mean + y[torch.arange(len(mean)) % len(y)],
}


@pytest.mark.parametrize("how", _CLOSING_OVER)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tolerance_refuses_rows_that_depend_on_others(how, dtype):
    """A decoder that closes over tensors of the batch's rows is refused.

    When rows stop, it would combine the remaining rows with those of others.
    """
    model, x, q = _model_and_data(24, dtype)
    labels = randn(24, X, seed=11, dtype=dtype)
    x = x + labels

    class Conditional:
        """Decoder that takes its batch's labels from outside, as a closure does, and counts batches."""

        def __init__(self):
            self.seen = 0

        def encode(self, b):
            self.y = labels[self.seen : self.seen + len(b)]
            self.seen += len(b)
            return q(b - self.y)

        def decode(self, z):
            return _CLOSING_OVER[how](model.decoder(z), self.y)

    def run(data, **options):
        this = Conditional()
        options = {"k": 300, "likelihood": model.likelihood, "generator": generator(1), **QUIET, **options}
        return evaluate_parts(this.encode, this.decode, data, **options)

    whole = run(x, batch_size=24)
    words = r"tol=0\.1 needs a model in which.*leave tol out.*batch_size=1"
    for data in (x, [x[:1], x[1:]]):  # a single row decides nothing
        with pytest.raises(ValueError, match=words):
            run(data, batch_size=24, tol=0.1)
    # With the minimum of draws no row stops early; a batch of one row has no others.
    assert run(x, batch_size=24, tol=0.1, k=100).k.tolist() == [100] * 24
    alone = run(x, batch_size=1, tol=1e-9)
    if how != "statistics of the batch" and dtype == torch.float64:
        torch.testing.assert_close(alone.log_px, whole.log_px, rtol=1e-10, atol=1e-10)


def test_a_tolerance_reports_why_part_of_a_batch_cannot_be_decoded():
    model, x, q = _model_and_data(24)

    def decoder(z):
        if len(z) % 24:
            raise RuntimeError("a batch norm of mine")
        return model.decoder(z)

    with pytest.raises(
        ValueError, match="12 of 24 rows .* raised RuntimeError: a batch norm of mine"
    ) as error:
        evaluate_parts(q, decoder, x, tol=0.1, likelihood=model.likelihood, batch_size=24, **QUIET)
    assert isinstance(error.value.__cause__, RuntimeError)
    # The whole batch fails too, with the decoder's own message.
    with pytest.raises(RuntimeError, match="^a batch norm of mine"):
        evaluate_parts(q, decoder, x, tol=0.1, likelihood=model.likelihood, batch_size=23, **QUIET)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_tolerance_accepts_decoders_of_independent_rows(dtype):
    """Rounding that depends on the number of rows, a decoder's own noise, and NaN are accepted."""
    encoder, decoder = models.networks(X, D, "bernoulli", dtype=dtype)
    x = rand(N, X, seed=2, dtype=dtype).round()
    options = {"likelihood": "bernoulli", "tol": 0.3, "k": 400, **QUIET}

    def noisy(z):
        return decoder(z) + torch.randn_like(decoder(z))

    def nan(z):
        return torch.where(z[:, :1] > 0.3, math.nan, decoder(z))

    def impossible(z):
        return torch.where(z[:, :1] > 0.3, math.inf, -math.inf).expand(-1, X).to(z.dtype)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for these in (decoder, noisy, nan, impossible):
            for size in (N, 2, 1):
                assert len(evaluate_parts(encoder, these, x, batch_size=size, **options).log_px) == N
        for low in (torch.bfloat16, torch.float16):
            with torch.autocast(DEVICE.type, low):
                evaluate_parts(encoder, decoder, x, **options)


def test_checking_the_rows_of_a_decoder_has_no_side_effects():
    """The check of the decoder's rows changes neither the random state nor the results."""
    model, x, q = _model_and_data()

    def decoder(z):
        return model.decoder(z) + 0.01 * torch.randn_like(z).sum(1, keepdim=True)

    def run(**options):
        torch.manual_seed(3)
        options = {"likelihood": model.likelihood, "generator": generator(1), **QUIET, **options}
        return evaluate_parts(q, decoder, x, batch_size=10, **options), torch.get_rng_state()

    # All are done after a hundred draws.
    (asked, state), (plain, expected) = run(tol=1e9, k=200), run(k=100)
    assert torch.equal(state, expected)
    assert torch.equal(asked.log_px, plain.log_px)


def test_bias_due_to_stopping():
    """Stopping biases estimates low, by less than half of the tolerance, for log weights of deviation 1.

    (Shift 1, 3 latents: 1.7.)
    """
    model = LinearGaussian(D, X, dtype=torch.float32)
    x = model.sample(1500)
    result = evaluate_parts(
        lambda x: model.posterior(x, 0.6, 0.0), model.decoder, x, tol=0.1, likelihood=model.likelihood,
        batch_size=500, generator=generator(2), **QUIET,
    )  # fmt: skip
    error = result.log_px - model.log_px(x).cpu()
    assert -0.05 < float(error.mean()) < 0.01
    assert float(error.square().mean().sqrt()) < 0.13


# Streaming


def test_independent_of_batches_and_chunks():
    model, x, q = _model_and_data()
    whole = _evaluate(model, q, x, batch_size=N)
    for options in (
        {"batch_size": 4},
        {"batch_size": 1, "k_chunk": 3},
        {"k_chunk": 1000},
        {"batch_size": 22},
    ):
        _assert_same(_evaluate(model, q, x, **options), whole)


def test_draws_equal_those_of_log_marginal():
    model, x, q = _model_and_data()
    result = _evaluate(model, q, x, batch_size=N)
    expected = fastvae.log_marginal(
        x, q(x), model.decoder, k=K, likelihood=model.likelihood, generator=generator(1)
    )
    for name, values in vars(expected).items():
        torch.testing.assert_close(getattr(result, name), values.cpu(), rtol=1e-10, atol=1e-10)


def test_autocast():
    """A bfloat16 encoder and decoder give log p(x) to a bfloat16's accuracy, in float64 sums."""
    encoder, decoder = models.networks(X, D, "bernoulli")
    x = rand(N, X, seed=9).round()
    results = []
    for enabled in (False, True):
        with torch.autocast(DEVICE.type, torch.bfloat16, enabled=enabled):
            results.append(
                evaluate_parts(
                    encoder, decoder, x, k=500, likelihood="bernoulli", generator=generator(1), **QUIET
                )
            )
    difference = (results[0].log_px - results[1].log_px).abs()
    assert 0 < float(difference.max()) < 0.05
    assert results[1].log_px.dtype == torch.float64


def test_backends_agree(backend):
    model, x, q = _model_and_data(dtype=torch.float32)
    result = _evaluate(model, q, x[:6], k=25, batch_size=4, k_chunk=9)
    with fastvae.use_backend("reference"):
        expected = _evaluate(model, q, x[:6], k=25, batch_size=4, k_chunk=9)
    torch.testing.assert_close(result.log_px, expected.log_px, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(result.ess, expected.ess, rtol=1e-3, atol=1e-3)


def test_means_are_over_examples():
    """Means are over examples: a mean of batch means would weigh the short last batch's eleven times."""
    model, x, q = _model_and_data()
    x[-1] += 30
    result = _evaluate(model, q, x, batch_size=11)
    assert [len(b) for b in x.split(11)] == [11, 11, 1]
    exact = model.log_px(x).cpu()
    assert result.nll == pytest.approx(-float(exact.mean()), rel=0.01)
    mu, logvar = q(x)
    kl = fastvae.ops.rsample_kl(mu, logvar, per_dimension=True)[1].mean(0)
    torch.testing.assert_close(result.kl_per_dim, kl.cpu(), rtol=1e-10, atol=1e-10)


def test_active_units():
    """Active units are latents whose posterior mean has variance above 0.01 over the data: two of four."""
    scale = torch.tensor([1.0, 0.0, 0.09, 0.11], device=DEVICE)
    x = randn(4000, 4, seed=1)
    x = (x - x.mean(0)) / x.std(0)
    for batch_size in (4000, 7):
        result = evaluate_parts(
            lambda x: (x * scale + 5, torch.zeros_like(x)), nn.Identity(), x, k=1,
            likelihood=Gaussian(1.0), batch_size=batch_size, **QUIET,
        )  # fmt: skip
        assert result.active_units == 2
    assert "2 of 4 active" in str(result)


class _Bare(Distribution):
    """Posterior with the required methods only."""

    def __init__(self, mu, logvar):
        super().__init__()
        self._q = DiagonalNormal(mu, logvar)
        self.batch, self.device = self._q.batch, self._q.device

    def rsample_log_prob(self, samples, seed, **place):
        return self._q.rsample_log_prob(samples, seed, **place)


class _MonteCarlo(_Bare):
    """Posterior with a mean and without a closed-form KL."""

    @property
    def mean(self):
        return self._q.mean


def test_posteriors_without_means_or_kl():
    model, x, q = _model_and_data()
    expected = _evaluate(model, q, x)
    for kind, active in ((_Bare, None), (_MonteCarlo, expected.active_units)):
        for tol in (None, 1.0):
            result = _evaluate(model, lambda x, kind=kind: kind(*q(x)), x, tol=tol)
            torch.testing.assert_close(result.log_px, expected.log_px, rtol=1e-10, atol=1e-10)
            assert result.active_units == active
            assert result.kl_per_dim is None
        assert ("latents" in str(result)) == (active is not None)
        vae = fastvae.VAE(
            lambda x, kind=kind: kind(*q(x)), model.decoder, likelihood=model.likelihood, modules=[]
        )
        vae.evaluate(x, k=3, **QUIET)


def test_one_example_and_varying_event_sizes():
    model, x, q = _model_and_data()
    result = _evaluate(model, q, x[:1])
    assert math.isnan(result.stderr)
    assert "1 example, " in str(result) and "nan" not in str(result)
    assert result.active_units == 0

    class Sum(fastvae.likelihoods.Likelihood):
        def log_prob(self, x, parameters):
            return parameters.sum(1) - x.sum(1)

    def encoder(x):
        return torch.zeros(len(x), D, device=DEVICE), torch.zeros(len(x), D, device=DEVICE)

    batches = [torch.ones(3, 4), torch.ones(2, 9), torch.ones(1, 0)]
    result = evaluate_parts(
        encoder, nn.Identity(), [b.to(DEVICE) for b in batches], k=9, likelihood=Sum(), **QUIET
    )
    assert result.dims == (3 * 4 + 2 * 9) / 6
    assert result.bits_per_dim == pytest.approx(-float(result.log_px.sum()) / (30 * math.log(2)))
    result = evaluate_parts(
        encoder, nn.Identity(), torch.ones(2, 0, device=DEVICE), k=9, likelihood=Sum(), **QUIET
    )
    assert math.isnan(result.bits_per_dim)


def test_dimensions_are_those_observed():
    """The bits per dimension are those of the elements that the NLL is of."""
    x = torch.rand(11, X, generator=torch.Generator().manual_seed(0)).round().to(DEVICE)
    mask = torch.arange(11 * X, device=DEVICE).reshape(11, X) % 3 > 0
    vae = fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), likelihood="bernoulli").to(DEVICE)
    data = torch.utils.data.TensorDataset(x.cpu(), mask.cpu())
    options = {"k": 20, "batch_size": 4, **QUIET}
    result = vae.evaluate(data, prepare_batch=lambda b: {"x": b[0], "mask": b[1]}, **options)
    assert result.dims == pytest.approx(float(mask.sum()) / 11)
    assert result.bits_per_dim == pytest.approx(result.nll / (result.dims * math.log(2)))


def test_untrusted_is_a_fraction_of_the_known():
    model, x, q = _model_and_data(11)
    x[:7] = math.nan
    with pytest.warns(RuntimeWarning, match="NaN for 7 of 11"):
        result = _evaluate(model, lambda x: q(x * 3), x, k=200)
    known = result.khat[~result.khat.isnan()]
    assert len(known) == 4 and result.untrusted == float((known > 0.7).double().mean())
    with pytest.warns(RuntimeWarning, match="NaN for 7 of 7"):
        assert math.isnan(_evaluate(model, q, x[:7], k=200).untrusted)


def test_exact_posterior_is_trusted():
    """Weights that differ only by rounding have a flat tail, not a heavy one."""
    model = LinearGaussian(D, X, dtype=torch.float32)
    x = model.sample(300)
    result = evaluate_parts(model.posterior, model.decoder, x, k=1000, likelihood=model.likelihood, **QUIET)
    assert result.khat.tolist() == [-math.inf] * 300


def test_eval_mode_is_set_and_restored():
    """Evaluation turns dropout off, also if the encoder is a function of modules, and restores every mode."""
    encoder = nn.Sequential(nn.Linear(X, 2 * D), nn.Dropout(0.9)).to(DEVICE)
    decoder = nn.Sequential(nn.Linear(D, 9), nn.Dropout(0.9), nn.BatchNorm1d(9), nn.Linear(9, X)).to(DEVICE)
    decoder[2].eval()
    x, seen = rand(N, X, seed=2), []

    def q(x):
        seen.append((encoder.training, decoder[1].training, torch.is_grad_enabled()))
        return encoder(x).chunk(2, dim=1)

    options = {"k": 5, **QUIET}
    vae = fastvae.VAE(q, decoder, modules=[encoder], likelihood="bernoulli")
    first, second = (vae.evaluate(x, generator=generator(1), **options) for _ in range(2))
    options["likelihood"] = "bernoulli"
    assert set(seen) == {(False, False, False)}
    assert torch.equal(first.log_px, second.log_px)
    assert [m.training for m in (encoder, encoder[1], decoder, decoder[1], decoder[2])] == [True] * 4 + [
        False
    ]
    assert torch.is_grad_enabled()
    assert not first.log_px.requires_grad

    def broken(z):
        raise RuntimeError("stop here")

    with pytest.raises(RuntimeError, match="stop here"):
        evaluate_parts(q, broken, x, **options)
    assert encoder.training

    class Watching(Bernoulli):
        def log_prob(self, x, parameters):
            assert not self.training
            return super().log_prob(x, parameters)

    evaluate_parts(q, decoder, x, **{**options, "likelihood": Watching()})


def test_two_threads_evaluate_one_model():
    """A model is in eval mode while either thread works, and in its own mode after both."""
    encoder, decoder = models.networks(X, D)
    decoder = nn.Sequential(decoder, nn.Identity())
    decoder[1].eval()
    x, modes, failed = rand(N, X, seed=2), [], []
    second_began, first_ended = threading.Event(), threading.Event()

    class Encoder(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = encoder

        def forward(self, x):
            modes.append((encoder.training, decoder.training, decoder[0].training))
            return encoder(x)

    q = Encoder()

    def data_of_the_first():
        yield x
        assert second_began.wait(60)

    def data_of_the_second():
        yield x
        second_began.set()
        assert first_ended.wait(60)
        yield x

    def second():
        try:
            evaluate_parts(q, decoder, data_of_the_second(), k=3, **QUIET)
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=second)

    def starting():
        batches = data_of_the_first()
        yield next(batches)
        thread.start()
        yield from batches

    evaluate_parts(q, decoder, starting(), k=3, **QUIET)
    first_ended.set()
    thread.join()
    assert not failed
    assert modes == [(False, False, False)] * 3
    assert [m.training for m in (encoder, decoder, decoder[0], decoder[1])] == [True, True, True, False]
    # Also for nested evaluations.
    inner = lambda x: (evaluate_parts(encoder, decoder, x, k=1, **QUIET), q(x))[1]  # noqa: E731
    fastvae.VAE(inner, decoder, modules=[q]).evaluate(x, k=3, **QUIET)
    assert modes[-1] == (False, False, False)
    assert encoder.training


def test_modules_of_a_callable():
    """A callable's modules are itself, its owner and a distribution's; none is found inside a function."""
    module, other = nn.Linear(2, 2), nn.Linear(2, 2)

    class Plain:
        def method(self, x):
            return module(x)

    prior = Mixture([VampPrior(module, torch.zeros(3, 2)), StandardNormal()])
    compiled = torch.compile(module)
    for function, found in (
        (module, [module]),
        (module.forward, [module]),
        (functools.partial(run_to_last_layer, module), [module]),
        (compiled, [compiled]),
        (StandardNormal(), []),
        (lambda x: module(x), []),
        (functools.partial(module), []),
        (Plain().method, []),
        (len, []),
    ):
        assert modules_of(function) == found
    assert other not in modules_of(prior) and module in [m for p in modules_of(prior) for m in p.modules()]


def test_a_prior_that_all_batches_share_is_encoded_once():
    model, x, q = _model_and_data()
    calls = []

    def encoder(inputs):
        calls.append(len(inputs))
        return q(inputs)

    whole = _evaluate(model, q, x, prior=VampPrior(encoder, x[:4]), batch_size=N)
    parts = _evaluate(model, q, x, prior=VampPrior(encoder, x[:4]), batch_size=10)
    _assert_same(parts, whole)
    assert calls == [4, 4]


def test_progress_shows_the_running_nll(capsys, monkeypatch):
    model, x, q = _model_and_data()
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    result = _evaluate(model, q, x, batch_size=10, progress=True)
    shown = capsys.readouterr().err
    assert "3/3" in shown
    assert f"NLL {result.nll:.2f} ± {result.stderr:.2f}" in shown
    _evaluate(model, q, x)
    assert capsys.readouterr().err == ""


def test_the_summary_is_readable(tmp_path):
    model, x, q = _model_and_data()
    result = _evaluate(model, q, x)
    text = str(result)
    print(text)
    nll = f"{result.nll:.2f} ± {result.stderr:.2f} nats"
    for words in (
        f"{N} examples, {K} draws each",
        nll,
        "per dimension",
        "ELBO",
        "for nine of ten examples",
        "Pareto k-hat",
        "active",
    ):
        assert words in text
    assert max(map(len, text.splitlines())) <= 110
    assert "of ten examples" not in str(_evaluate(model, q, x[:1]))
    low, median, high = result.ess_quantiles
    assert float((result.ess <= low).double().mean()) == pytest.approx(0.05, abs=0.05)
    assert median == float(result.ess.median())
    assert float((result.ess >= high).double().mean()) == pytest.approx(0.05, abs=0.05)
    assert result.untrusted == float((result.khat > 0.7).double().mean())
    result.save(tmp_path / "result.npz")
    with np.load(tmp_path / "result.npz") as saved:
        assert np.array_equal(saved["log_px"], result.log_px.numpy())
        assert float(saved["nll"]) == result.nll
        assert saved["curve"].shape == (3, 3)


def _quoted(result):
    """Return the summary's line that starts with "to quote"."""
    lines = [line for line in str(result).splitlines() if line.startswith("  to quote")]
    assert len(lines) <= 1
    return "".join(lines)


def test_the_summary_recommends_an_estimate():
    model, x, q = _model_and_data()
    result = _evaluate(model, q, x, k=200)
    assert result.figures["psis"] == -float(result.psis.mean())
    trusted = dataclasses.replace(result, khat=torch.full_like(result.khat, 0.5))
    assert trusted.nll_jackknife == -float(result.jackknife.mean())
    low, high = trusted.nll_interval
    assert low < trusted.nll_jackknife < high
    assert high - trusted.nll_jackknife == pytest.approx(
        float((result.jackknife - result.low).square().sum().sqrt()) / N
    )
    assert f"{trusted.nll_jackknife:.2f} ± {result.stderr:.2f} nats, the jackknife's" in _quoted(trusted)
    # As many digits as the draws determine, two to six.
    for error, digits in ((0.5, 2), (2e-4, 4), (1e-12, 6)):
        shown = _quoted(dataclasses.replace(trusted, mc_stderr=error))
        assert f"by the draws: {low:.{digits}f} to {high:.{digits}f})" in shown
    # An untrusted example contributes its bound, and its interval is open.
    khat, high = trusted.khat.clone(), result.high.clone()
    khat[0], high[0] = 1.2, math.inf
    mixed = dataclasses.replace(result, khat=khat, high=high)
    expected = -float(torch.cat([result.log_px[:1], result.jackknife[1:]]).mean())
    assert mixed.nll_jackknife == pytest.approx(expected, rel=1e-14)
    assert mixed.nll_interval[0] == -math.inf and math.isfinite(mixed.nll_interval[1])
    assert ("the jackknife's (not above" in _quoted(mixed)) == (1 / N <= 0.05)
    doubtful = dataclasses.replace(result, khat=torch.full_like(result.khat, 0.8))
    assert f"at most {result.nll:.2f}" in _quoted(doubtful)
    assert "a bound only: k-hat is above 0.7 for 100.0 % of the examples" in _quoted(doubtful)
    assert "too few draws" in _quoted(_evaluate(model, q, x, k=10))
    nothing = dataclasses.replace(result, nll=math.nan)
    assert not _quoted(nothing)
    assert max(len(_quoted(r)) for r in (trusted, mixed, doubtful)) <= 110


def test_figures_of_the_data():
    model, x, q = _model_and_data()
    result = _evaluate(model, q, x, k=200)
    figures = result.figures
    assert figures["log_px"] == result.nll and figures["log_px_stderr"] == result.mc_stderr
    assert figures["jackknife"] == result.nll_jackknife and figures["psis"] == -float(result.psis.mean())
    assert figures["jackknife_stderr"] == float(result.jackknife_stderr.square().sum().sqrt()) / N
    assert figures["ess"] == float(result.ess.median()) and figures["khat"] == float(result.khat.median())
    assert not {"low", "high"} & figures.keys()


def test_estimates_with_a_heading_are_reported(monkeypatch):
    model, x, q = _model_and_data()
    for k in (200, 1):
        result = _evaluate(model, q, x, k=k)
        plain = str(result).splitlines()
        with monkeypatch.context() as patched:
            declared = dataclasses.replace(ESTIMATES["psis"], heading="PSIS")
            patched.setitem(ESTIMATES, "psis", declared)
            found = [line for line in str(result).splitlines() if line not in plain]
        error = f" (± {result.mc_stderr:.2g} by the draws)" * (k > 1)
        assert found == [f"  PSIS           {result.figures['psis']:.2f} nats{error}"]
        # A number that is unknown is omitted: the jackknife of one draw.
        with monkeypatch.context() as patched:
            declared = dataclasses.replace(ESTIMATES["jackknife"], heading="jackknife")
            patched.setitem(ESTIMATES, "jackknife", declared)
            assert len(str(result).splitlines()) == len(plain) + (k > 1)


# Data in every form


class _Pairs(torch.utils.data.IterableDataset):
    def __init__(self, x):
        self.x = x

    def __iter__(self):
        return ((x, 7) for x in self.x.split(5))


class _Table:
    """Table that iterates over something other than rows, like a DataFrame."""

    def __init__(self, array):
        self.array = array

    def __array__(self, dtype=None, copy=None):
        return self.array

    def __iter__(self):
        return iter("abc")


def test_forms_of_data():
    model, x, q = _model_and_data()
    x = x.cpu()
    labels = torch.arange(N)
    expected = _evaluate(model, q, x.to(DEVICE))

    encoder = nn.Module()
    encoder.anchor = nn.Parameter(torch.zeros(1, device=DEVICE, dtype=x.dtype))
    encoder.forward = q
    loader = DataLoader(TensorDataset(x, labels), batch_size=10)
    forms = [x, x.numpy(), TensorDataset(x, labels), loader, [[b, 1] for b in x.split(4)], list(x.split(6))]
    forms += [_Pairs(x), DataLoader(_Pairs(x), None), (b for b in x.split(9)), [x[:5], x[:0], x[5:]]]
    # Arrays: in batches, with swapped bytes, with negative strides, and array-likes.
    array = x.numpy()
    fixed = array.copy()
    fixed.flags.writeable = False
    forms += [[array[:9], array[9:]], array.astype(">f8"), array[::-1].copy()[::-1], fixed, _Table(array)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for data in forms:
            _assert_same(_evaluate(model, encoder, data), expected)


def test_an_error_of_the_encoder_names_its_input():
    """An encoder's error names its input: a list of examples is indistinguishable from a list of batches."""
    encoder, decoder = models.networks(X, D)
    with pytest.raises(IndexError) as error:
        evaluate_parts(encoder, decoder, list(torch.zeros(5, X, device=DEVICE)), k=3, **QUIET)
    if sys.version_info >= (3, 11):
        assert error.value.__notes__[-1] == "fastvae.evaluate gave the encoder batch 0: [7], torch.float32"


@pytest.mark.parametrize(
    ("given", "own"),
    [
        (torch.float64, torch.float32),
        (torch.float32, torch.float64),
        (torch.float32, torch.bfloat16),
        (torch.bfloat16, torch.float32),
    ],
)
def test_batches_are_cast_to_the_dtype_of_the_model(given, own, tmp_path):
    """Batches are cast to the model's dtype: NumPy's float64 to float32; float32 to bfloat16 or float64.

    The latter as with Lightning's bf16-true and 64-true.
    """
    encoder, decoder = models.networks(X, D, dtype=own)
    x = randn(N, X, seed=5, dtype=given)
    vae = fastvae.VAE(encoder, decoder)
    file = tmp_path / "run.npz"

    def run(data, evaluate=vae.evaluate, **options):
        return evaluate(data, k=K, batch_size=10, generator=generator(1), **QUIET, **options)

    expected = run(x.to(own))
    forms = [x, TensorDataset(x), [x[:10], x[10:20], x[20:]]]
    if given != torch.bfloat16:
        forms.append(x.cpu().numpy())
    near = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 1e-2}[own]
    for data in forms:
        torch.testing.assert_close(run(data).log_px, expected.log_px, rtol=near, atol=near)
    # Where the encoder has no parameters, the decoder's dtype is the model's.
    plain = functools.partial(evaluate_parts, lambda x: (x[:, :D], x[:, :D]), decoder)
    torch.testing.assert_close(run(x, plain).log_px, run(x.to(own), plain).log_px, rtol=near, atol=near)
    # A checkpoint compares the data as given.
    first = run(x, checkpoint=file)
    assert torch.equal(run(x, checkpoint=file).log_px, first.log_px)
    with pytest.raises(ValueError, match="other data"):
        run(x.to(own), checkpoint=file)


def test_data_keep_their_dtype_if_the_model_has_none():
    seen = []

    def q(x):
        seen.append(x.dtype)
        return x[:, :D], x[:, :D]

    for dtype in (torch.float64, torch.float32):
        x = rand(N, X, seed=1, dtype=dtype)
        evaluate_parts(
            q, lambda z: torch.zeros_like(z[:, :1]).expand(-1, X), x, k=2, likelihood="bernoulli", **QUIET
        )
    assert seen == [torch.float64, torch.float32]


def test_nan_in_one_example():
    """An example with NaN has NaN results, all others are correct, and a warning counts such examples."""
    encoder, decoder = models.networks(X, D)
    x = randn(N, X, seed=3)
    options = {"k": 25, "batch_size": 10, **QUIET}
    clean = evaluate_parts(encoder, decoder, x, generator=generator(1), **options)
    bad = x.clone()
    bad[12, 1] = math.nan
    with pytest.warns(RuntimeWarning, match=r"NaN for 1 of 23 examples \(number 12\)"):
        result = evaluate_parts(encoder, decoder, bad, generator=generator(1), **options)

    def spoils(z):
        mean, logvar = decoder(z)
        rows = mean.unflatten(0, (-1, 10 if len(z) % 10 == 0 else 3)).clone()
        rows[:, 2] = math.nan
        return rows.flatten(0, 1), logvar

    with pytest.warns(RuntimeWarning, match=r"NaN for 3 of 23 examples \(number 2, 12, 22\)"):
        other = evaluate_parts(encoder, spoils, x, generator=generator(1), k_chunk=1, **options)
    for got, lost in ((result, [12]), (other, [2, 12, 22])):
        kept = [n for n in range(N) if n not in lost]
        for name in ("log_px", "log_px_stderr", "ess", "khat", "elbo"):
            values = getattr(got, name)
            assert values[lost].isnan().all()
            torch.testing.assert_close(values[kept], getattr(clean, name)[kept], rtol=1e-4, atol=1e-4)
        assert math.isnan(got.nll)
        assert f"NaN            {len(lost)} example" in str(got)
    # An example with NaN stops drawing.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate_parts(encoder, decoder, bad, tol=10.0, **QUIET)
    assert set(result.k.tolist()) == {100}


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (torch.zeros(0, X), ValueError, "no batches"),
        ([], ValueError, "no batches"),
        ([torch.zeros(0, X)], ValueError, "no batches"),
        (torch.tensor(1.0), ValueError, r"expected \[N, \*event\]"),
        (3, TypeError, "data must be a tensor"),
        ([{"x": torch.zeros(2, X)}], TypeError, r"a dict.*batch\['x'\]"),
        ([("a", 1)], TypeError, "a tuple of str.*a generator of tensors"),
        ("digits", TypeError, "data must be a tensor"),
        ([torch.tensor(1.0)], ValueError, "no dimensions"),
        (np.float32(1.0), ValueError, r"no dimensions; expected \[N, \*event\]"),
        (np.array(["a", "b"]), TypeError, "a batch must be.*got a ndarray of <U1"),
        (
            (torch.zeros(4, X), torch.zeros(4)),
            ValueError,
            r"shape \[4\] after batches of 2 axes.*give x alone",
        ),
        (
            torch.zeros(3, X, dtype=torch.uint8),
            TypeError,
            r"data has dtype torch.uint8.*data\.float\(\) / 255",
        ),
        (torch.zeros(3, X, dtype=torch.int64), TypeError, r"data has dtype torch.int64.*data\.float\(\)"),
    ],
)
def test_bad_data(data, error, words):
    encoder, decoder = models.networks(X, D)
    with pytest.raises(error, match=words):
        evaluate_parts(encoder, decoder, data, k=3, **QUIET)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"k": 0}, ValueError, "k must be at least 1"),
        ({"k": 2.5}, TypeError, "k must be an int"),
        ({"tol": 0}, ValueError, "tol must be greater than 0"),
        ({"tol": -1}, ValueError, "tol must be finite and at least 0"),
        ({"shard": "rows"}, ValueError, "'data', 'samples', 'none'"),
        ({"batch_size": 0}, ValueError, "batch_size must be at least 1"),
        ({"k_chunk": 0}, ValueError, "k_chunk must be at least 1"),
        ({"likelihood": "gauss"}, ValueError, "unknown"),
        ({"checkpoint": "/nowhere/at/all.npz"}, ValueError, "there is no folder"),
        ({"checkpoint": "/"}, ValueError, "is a folder; expected the name of a file"),
    ],
)
def test_bad_options(options, error, words):
    encoder, decoder = models.networks(X, D)
    with pytest.raises(error, match=words):
        evaluate_parts(encoder, decoder, torch.zeros(3, X), **QUIET, **options)


def test_unusable_modules_and_loaders_are_refused():
    encoder, decoder = models.networks(X, D)
    with pytest.raises(ValueError, match="the encoder is on meta but the decoder is on"):
        evaluate_parts(encoder.to("meta"), decoder, torch.zeros(3, X), k=3, **QUIET)
    with pytest.raises(ValueError, match="without numbers"):
        evaluate_parts(encoder, decoder.to("meta"), torch.zeros(3, X), k=3, **QUIET)
    with pytest.raises(TypeError, match="encoder must be a module"):
        evaluate_parts(None, decoder, torch.zeros(3, X))
    loader = DataLoader(TensorDataset(torch.zeros(4, X)), sampler=DistributedSampler([0] * 4, 2, 0))
    with pytest.raises(ValueError, match="DistributedSampler"):
        evaluate_parts(*models.networks(X, D), loader)


# Memory


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory."),
        MemoryError(),
        RuntimeError("not enough memory: you tried to allocate 9 bytes"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ],
)
def test_out_of_memory_halves_the_chunk(error):
    model, x, q = _model_and_data()
    sizes = []

    def decoder(z):
        sizes.append(len(z) // N)
        if len(z) > 11 * N:
            raise error
        return model.decoder(z)

    options = {"k": K, "likelihood": model.likelihood}
    expected = fastvae.log_marginal(x, q(x), model.decoder, generator=generator(1), **options)
    with pytest.warns(
        RuntimeWarning, match=r"memory ran out with \d+ draws of 23 examples.*going on with 10 "
    ):
        got = fastvae.log_marginal(x, q(x), decoder, generator=generator(1), **options)
    assert sizes == [40, 20, 10, 10, 10, 10]
    torch.testing.assert_close(vars(got), vars(expected), rtol=1e-10, atol=1e-10)
    # The reduced size is kept for the following batches.
    sizes.clear()
    with pytest.warns(RuntimeWarning, match="memory ran out"):
        evaluate_parts(q, decoder, [x, x], **options, **QUIET)
    assert [n for n in sizes if n > 11] == [30, 15]


def test_other_errors_are_not_swallowed():
    model, x, q = _model_and_data()

    def decoder(z):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")

    def too_large(z):
        raise torch.OutOfMemoryError("one row does not fit")

    with pytest.raises(RuntimeError, match="mat1"):
        fastvae.log_marginal(x, q(x), decoder, k=K)
    with pytest.raises(torch.OutOfMemoryError, match="one row"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fastvae.log_marginal(x, q(x), too_large, k=K)


@pytest.mark.parametrize(
    ("event", "draws"), [((784,), 53), ((8, 8), 81), ((3, 64, 64), 3), ((3, 512, 512), 1)]
)
def test_chunks_fit_the_caches(event, draws):
    """A chunk has at most 4 million elements of the decoder's output, and 8192 rows."""

    def inputs(device):
        zeros = torch.zeros(100, D, device=device)
        q = DiagonalNormal(zeros, zeros)
        x = torch.empty(100, *event, device=device)
        return Inputs(x, q, nn.Identity(), Bernoulli(), StandardNormal())

    assert _stream.Chunks(None).draws(inputs("meta"), 100, 1000) >= draws
    assert _stream.Chunks(None).draws(inputs("cpu"), 100, 1000) == draws
    assert _stream.Chunks(7).draws(inputs("cpu"), 100, 1000) == 7


def test_the_curve_is_that_of_fewer_draws(monkeypatch):
    """Each look is the estimate by the first draws, whether they were folded at once or in parts."""
    model, x, q = _model_and_data()
    expected = [-float(_evaluate(model, q, x, k=k).log_px.mean()) for k in (1, 10, 100, 250)]
    for folded in (_stream._FOLDED, 30 * len(x)):
        monkeypatch.setattr(_stream, "_FOLDED", folded)
        found = _evaluate(model, q, x, k=250).curve
        assert [n for n, _, _ in found] == [1, 10, 100, 250]
        assert [v for _, v, _ in found] == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize(("device", "draws"), [("cpu", 209), ("meta", 2621)])
def test_chunks_count_what_is_stored(device, draws):
    """A fused decoder stores z alone, so that its chunks have more draws."""
    zeros = torch.zeros(100, D, device=device)
    x = torch.empty(100, 784, device=device)
    inputs = Inputs(x, DiagonalNormal(zeros, zeros), nn.Identity(), Bernoulli(), StandardNormal())
    chunks = _stream.Chunks(None)
    before = chunks.draws(inputs, 100, 10_000)
    for width, expected in ((2 * 784, before), (50, draws)):
        chunks.see(torch.empty(6, D), [torch.empty(6, width)])
        assert chunks.draws(inputs, 100, 10_000) == expected


@pytest.mark.parametrize(
    ("data", "size"),
    [
        (torch.empty(9, 784, device="meta"), 2000),
        (torch.empty(9, 3, 32, 32, device="meta"), 682),
        (torch.empty(9, 3, 64, 64, device="meta"), 500),
        ([torch.empty(9, 784, device="meta")], 500),
        (torch.empty(9, 784), 100),
    ],
)
def test_batches_of_a_gpu_are_large(data, size):
    """They hold at most 2000 examples, of 2 million numbers, but 500 examples of any size."""
    place = torch.device("meta") if isinstance(data, list) else None
    model = types.SimpleNamespace(place=(place,))
    assert Model.batch_size(model, data) == size


# Checkpoints

_STOPS = """
import os, sys, torch, fastvae
from tests.test_evaluate import _model_and_data, _evaluate
model, x, q = _model_and_data()
def stops(x):
    if os.path.exists(sys.argv[1]):
        print("saved", flush=True)
        sys.stdin.read()
    return q(x)
_evaluate(model, stops, x, batch_size=2, checkpoint=sys.argv[1])
"""


def test_a_killed_run_can_be_resumed(tmp_path):
    """A run killed by SIGKILL resumes without repeating work and gives the result of an unbroken run."""
    file = tmp_path / "run.npz"
    root = Path(__file__).parents[1]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", _STOPS, str(file)], cwd=root, **pipes) as process:
        assert process.stdout.readline() == "saved\n"
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "it was over before it could be killed"
    with np.load(file) as saved:
        done = len(saved["sizes"])
    assert 1 <= done < 12
    model, x, q = _model_and_data()
    calls = []

    def counting(x):
        calls.append(len(x))
        return q(x)

    result = _evaluate(model, counting, x, batch_size=2, checkpoint=file)
    # One batch is encoded again, to compare the weights.
    assert len(calls) == 12 - done + 1
    _assert_same(result, _evaluate(model, q, x, batch_size=2), 1e-14)
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]
    # A further run finds everything in the checkpoint.
    calls.clear()
    again = _evaluate(model, counting, x, batch_size=2, checkpoint=file)
    assert len(calls) == 1
    _assert_same(again, result, 0)


def test_the_seed_is_in_the_checkpoint(tmp_path):
    """Without a generator, a resumed run uses the first run's seed."""
    model, x, q = _model_and_data()
    torch.manual_seed(1)
    options = {"generator": None, "batch_size": 5}
    expected = _evaluate(model, q, x, **options)
    torch.manual_seed(1)

    class Stop(Exception):
        pass

    def stops(x):
        if len(calls) == 2:
            raise Stop
        calls.append(1)
        return q(x)

    calls = []
    with pytest.raises(Stop):
        _evaluate(model, stops, x, checkpoint=tmp_path / "run.npz", **options)
    torch.manual_seed(2)
    _assert_same(_evaluate(model, q, x, checkpoint=tmp_path / "run.npz", **options), expected, 1e-14)


def test_a_run_interrupted_twice_can_be_resumed(tmp_path):
    """The first run's work is kept when the second run is interrupted too."""
    model, x, q = _model_and_data()
    calls = []

    class Stop(Exception):
        pass

    def stops(x):
        calls.append(1)
        if len(calls) % 4 == 0:
            raise Stop
        return q(x)

    options = {"batch_size": 2, "checkpoint": tmp_path / "run.npz"}
    for done in (3, 5):  # a resumed run spends one batch on comparing the weights
        with pytest.raises(Stop):
            _evaluate(model, stops, x, **options)
        with np.load(tmp_path / "run.npz") as saved:
            assert sorted(saved["index"].tolist()) == list(range(done))
    _assert_same(_evaluate(model, q, x, **options), _evaluate(model, q, x, batch_size=2), 1e-14)


def test_saving_takes_little_time_and_leaves_no_drafts(tmp_path, monkeypatch):
    model, x, q = _model_and_data()
    result = _evaluate(model, q, x, batch_size=1, checkpoint=tmp_path / "a.npz")
    writes = []
    write = Store._write

    now = [0.0]

    def slow(self, file, parts):
        writes.append(len(parts))
        now[0] += 0.05
        return write(self, file, parts)

    def encoder(x):
        now[0] += 0.12
        return q(x)

    monkeypatch.setattr(Store, "_write", slow)
    monkeypatch.setattr(checkpoint_module, "time", types.SimpleNamespace(monotonic=lambda: now[0]))
    _assert_same(_evaluate(model, encoder, x, batch_size=1, checkpoint=tmp_path / "b.npz"), result, 1e-14)
    # After the first batch, whenever 20 times a write's duration has passed, at the end, and when merging.
    assert writes[0] == 1
    assert 3 < len(writes) < 6
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.npz", "b.npz"]


def _full_disk(monkeypatch, times: int) -> list[int]:
    """Make the first ``times`` files fail while being written."""
    left, sync = [times], os.fsync

    def full(handle):
        left[0] -= 1
        if left[0] >= 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        sync(handle)

    monkeypatch.setattr(os, "fsync", full)
    return left


@pytest.mark.parametrize("times", [2, 10**6])
def test_a_full_disk_loses_the_checkpoint_but_not_the_results(tmp_path, monkeypatch, times):
    """On a full disk the run continues and retries, and an existing file is not damaged."""
    model, x, q = _model_and_data()
    file = tmp_path / "run.npz"
    expected = _evaluate(model, q, x, batch_size=2)
    with pytest.raises(KeyError):
        _evaluate(model, q, _stops_after(x, 2), checkpoint=file)
    before = file.read_bytes()
    left = _full_disk(monkeypatch, times)
    with pytest.warns(RuntimeWarning, match=r"run\.npz cannot be written \(No space left.*tries again"):
        result = _evaluate(model, q, x, batch_size=2, checkpoint=file)
    _assert_same(result, expected)
    assert [p.name for p in tmp_path.iterdir()] == ["run.npz"]
    if times > 9:
        assert left[0] < times - 1
        assert file.read_bytes() == before
    else:
        with np.load(file) as saved:
            assert len(saved["index"]) == 12


def _stops_after(x, count):
    yield from x.split(2)[:count]
    raise KeyError("stop")


def test_the_home_folder_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    model, x, q = _model_and_data()
    result = _evaluate(model, q, x, checkpoint="~/run.npz")
    result.save("~/result.npz")
    assert {p.name for p in tmp_path.iterdir()} == {"run.npz", "result.npz"}
    assert torch.equal(fastvae.Evaluation.load("~/result.npz").log_px, result.log_px)


def test_symbolic_links_are_followed(tmp_path):
    model, x, q = _model_and_data()
    (tmp_path / "big").mkdir()
    (tmp_path / "run.npz").symlink_to(tmp_path / "big" / "run.npz")
    _evaluate(model, q, x, checkpoint=tmp_path / "run.npz").save(os.devnull)
    assert (tmp_path / "run.npz").is_symlink()
    assert (tmp_path / "big" / "run.npz").is_file()
    assert not Path(os.devnull).is_file()


@pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder that nobody can write to")
def test_an_unwritable_folder_fails_before_evaluation():
    model, x, _ = _model_and_data()

    def encoder(x):
        raise AssertionError("too late")

    with pytest.raises(
        ValueError, match=r"checkpoint /proc/run\.npz: no file can be created in the folder /proc"
    ):
        _evaluate(model, encoder, x, checkpoint="/proc/run.npz")


# Results in files


@pytest.mark.parametrize("kind", ["all", "no KL", "no means", "one example"])
def test_a_result_is_saved_and_loaded(tmp_path, kind):
    model, x, q = _model_and_data()
    encoder = {"no KL": lambda x: _MonteCarlo(*q(x)), "no means": lambda x: _Bare(*q(x))}.get(kind, q)
    result = _evaluate(model, encoder, x[:1] if kind == "one example" else x)
    file = tmp_path / "result"
    result.save(file)
    loaded = fastvae.Evaluation.load(file)
    assert type(loaded) is fastvae.Evaluation
    for name, value in vars(result).items():
        got = getattr(loaded, name)
        assert type(got) is type(value), name
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(got, value, rtol=0, atol=0, equal_nan=True)
        else:
            assert repr(got) == repr(value), name
    assert {type(v) for row in loaded.curve for v in row} == {int, float}
    assert str(loaded) == str(result)


def test_files_that_are_not_results_are_refused(tmp_path):
    model, x, q = _model_and_data()
    file = tmp_path / "result.npz"
    _evaluate(model, q, x, checkpoint=tmp_path / "run.npz").save(file)
    with np.load(file) as saved:
        arrays = dict(saved)
    (tmp_path / "garbage.npz").write_bytes(b"nonsense")
    (tmp_path / "cut.npz").write_bytes(file.read_bytes()[:-100])
    (tmp_path / "empty.npz").write_bytes(b"")
    np.save(tmp_path / "array.npz.npy", np.zeros(3))
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "short.npz", **{**arrays, "khat": arrays["khat"][:-1]})
    np.savez(tmp_path / "less.npz", **{k: v for k, v in arrays.items() if k != "ess"})
    np.savez(tmp_path / "curve.npz", **{**arrays, "curve": np.zeros(3)})
    for name, words in {
        "run.npz": "it is a checkpoint; evaluate",
        "garbage.npz": "",
        "cut.npz": "",
        "empty.npz": "",
        "array.npz.npy": "",
        "other.npz": "log_px",
        "short.npz": r"khat has dtype float64 and shape \[22\]; expected float64 \[23\]",
        "less.npz": "there is no ess",
        "curve.npz": "",
    }.items():
        with pytest.raises(ValueError, match=f"{name} holds no result that Evaluation.save wrote.*{words}"):
            fastvae.Evaluation.load(tmp_path / name)
    with pytest.raises(FileNotFoundError):
        fastvae.Evaluation.load(tmp_path / "nothing.npz")


_SPOILED = {
    "dtype": ("log_px", lambda v: v.astype(np.float32), "log_px has dtype float32"),
    "integers": ("ess", lambda v: v.astype(np.int64), "ess has dtype int64"),
    "draws": ("k", lambda v: v.astype(float), "k has dtype float64"),
    "axes": ("log_px", lambda v: v[None], r"log_px has shape \[1, 23\]"),
    "no number": ("nll", lambda v: np.array("1"), "nll has dtype <U1"),
    "a row": ("nll", lambda v: v[None], r"nll has dtype float64 and shape \[1\]"),
    "latents": ("kl_per_dim", lambda v: v[None], "kl_per_dim has dtype float64 and shape"),
    "nll": ("nll", lambda v: v + 1, "nll must be minus the mean of log_px"),
    "bits": ("bits_per_dim", lambda v: v * 2, "bits_per_dim must be"),
    "error": ("mc_stderr", lambda v: v * 2, "mc_stderr must be"),
    "ess": ("ess", lambda v: v + 1e4, "ess must be between 0 and k"),
    "negative": ("jackknife_stderr", lambda v: -v - 1, "jackknife_stderr must not be negative"),
    "k": ("k", lambda v: v * 0, "k must be at least 1"),
    "interval": ("low", lambda v: v * 0 + np.inf, "low must not be above high"),
    "dims": ("dims", lambda v: v * 0, "dims must be positive"),
    "curve": ("curve", lambda v: v[::-1], "curve must rise"),
    "active": ("active_units", lambda v: v + 99, "active_units must be among the latents"),
    "objects": ("khat", lambda v: v.astype(object), "allow_pickle=False"),
}


@pytest.mark.parametrize("case", _SPOILED)
def test_inconsistent_results_are_refused(tmp_path, case):
    model, x, q = _model_and_data()
    file = tmp_path / "result.npz"
    _evaluate(model, q, x).save(file)
    with np.load(file) as saved:
        arrays = dict(saved)
    name, spoil, words = _SPOILED[case]
    np.savez(file, **{**arrays, name: spoil(arrays[name])})
    with pytest.raises(ValueError, match=f"holds no result that Evaluation.save wrote.*{words}"):
        fastvae.Evaluation.load(file)


class _Spy:
    """Object that writes a file when unpickled."""

    def __init__(self, mark: Path):
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


def test_loading_runs_no_code(tmp_path):
    model, x, q = _model_and_data()
    file, mark = tmp_path / "result.npz", tmp_path / "mark"
    _evaluate(model, q, x).save(file)
    with np.load(file) as saved:
        arrays = dict(saved)
    np.savez(file, **{**arrays, "khat": np.array([_Spy(mark)], dtype=object)})
    with pytest.raises(ValueError, match="holds no result"):
        fastvae.Evaluation.load(file)
    with pytest.raises(ValueError, match="is not a checkpoint"):
        _evaluate(model, q, x, checkpoint=file)
    assert not mark.exists()


@pytest.mark.parametrize("kind", ["loop", "long", "folder", "file as a folder"])
def test_invalid_checkpoint_paths_are_explained(tmp_path, kind):
    model, x, q = _model_and_data()
    path, words = {
        "loop": (tmp_path / "a", "symbolic links"),
        "long": (tmp_path / ("n" * 300), "too long"),
        "folder": (tmp_path, "is a folder"),
        "file as a folder": (tmp_path / "file" / "a.npz", "no folder|[Nn]ot a directory"),
    }[kind]
    (tmp_path / "file").touch()
    if kind == "loop":
        path.symlink_to(tmp_path / "b")
        (tmp_path / "b").symlink_to(path)
    with pytest.raises(ValueError, match=f"^checkpoint .*({words})"):
        _evaluate(model, q, x, checkpoint=path)
    if kind != "folder":
        with pytest.raises(OSError, match=f"{words}|No such file"):
            fastvae.Evaluation.load(path)


def test_a_file_name_of_maximum_length(tmp_path):
    model, x, q = _model_and_data()
    path = tmp_path / ("ä" * 120 + ".npz")
    first = _evaluate(model, q, x, checkpoint=path)
    assert torch.equal(_evaluate(model, q, x, checkpoint=path).log_px, first.log_px)
    first.save(path)
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_names_of_drafts_are_unpredictable(tmp_path, monkeypatch):
    """A draft's name is unpredictable, as a symbolic link at it would be followed."""
    model, x, q = _model_and_data()
    result, names = _evaluate(model, q, x), []
    monkeypatch.setattr(os, "replace", lambda old, new: names.append(Path(old).name))
    for _ in range(2):
        result.save(tmp_path / "result.npz")
    assert len(set(names)) == 2 and all(str(os.getpid()) not in n.rpartition("-")[0] for n in names)
    monkeypatch.setattr("secrets.token_hex", lambda n: "0" * 2 * n)
    target = tmp_path / "target"
    (tmp_path / names[0].replace(names[0].rpartition("-")[2], "0" * 16)).symlink_to(target)
    with pytest.raises(FileExistsError):
        result.save(tmp_path / "result.npz")
    assert not target.exists()


def test_saving_replaces_a_result_atomically(tmp_path, monkeypatch):
    model, x, q = _model_and_data()
    result = _evaluate(model, q, x)
    result.save(tmp_path / "result.npz")
    before = (tmp_path / "result.npz").read_bytes()
    _full_disk(monkeypatch, 1)
    with pytest.raises(OSError, match="No space left"):
        result.save(tmp_path / "result.npz")
    assert (tmp_path / "result.npz").read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["result.npz"]


@pytest.mark.parametrize(
    ("encoding", "sign"), [("utf-8", "±"), ("cp1252", "±"), ("ascii", "+-"), ("cp932", "±")]
)
def test_a_summary_can_be_printed_anywhere(encoding, sign, monkeypatch):
    """A result prints even to an encoding without ±."""
    model, x, q = _model_and_data()
    result = _evaluate(model, q, x)
    stream = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", stream)
    print(result)
    stream.flush()
    assert f"{result.nll:.2f} {sign} {result.stderr:.2f} nats" in stream.buffer.getvalue().decode(encoding)


def test_drafts_of_a_killed_process_are_removed(tmp_path, monkeypatch):
    """A killed rank's drafts are removed; nothing else is, not even another checkpoint's."""
    model, x, q = _model_and_data()
    with monkeypatch.context() as killed:
        killed.setattr(os, "replace", lambda old, new: None)
        killed.setattr(Path, "unlink", lambda *a, **k: None)
        for name in ("run.npz", "run.rank3.npz", "other.npz"):
            write_arrays(tmp_path / name, {"a": np.zeros(3)})
    assert len(list(tmp_path.iterdir())) == 3
    (tmp_path / ".run.npz.bak").write_bytes(b"half")
    _evaluate(model, q, x, checkpoint=tmp_path / "run.npz")
    left = {p.name for p in tmp_path.iterdir()} - {"run.npz", ".run.npz.bak"}
    assert len(left) == 1
    _evaluate(model, q, x, checkpoint=tmp_path / "other.npz")
    assert {p.name for p in tmp_path.iterdir()} == {"run.npz", ".run.npz.bak", "other.npz"}


def test_checkpoints_leave_other_files_alone(tmp_path):
    model, x, q = _model_and_data()
    other = tmp_path / "run[1].rank_best.npz"
    _evaluate(model, q, x, batch_size=10, checkpoint=other)
    result = _evaluate(model, q, x[:10], batch_size=10, checkpoint=tmp_path / "run[1].npz")
    assert len(result.log_px) == 10
    assert other.exists()
    # A rank's finished file belongs to the checkpoint, though.
    (tmp_path / "run[1].npz").rename(tmp_path / "run[1].rank3.npz")
    calls = []
    _evaluate(
        model, lambda x: calls.append(1) or q(x), x[:10], batch_size=10, checkpoint=tmp_path / "run[1].npz"
    )
    assert len(calls) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run[1].npz", other.name]


def test_digests_depend_on_every_tensor_and_setting():
    """Digests depend on every tensor's name, dtype, shape and values, and on the settings of modules."""
    base = [torch.arange(6.0)]
    seen = [
        digest(v).tobytes() for v in (base, [base[0].view(2, 3)], [base[0].int()], [base[0] + 1e-7], base * 2)
    ]
    assert len(set(seen)) == 5
    assert digest(base).tobytes() == digest([torch.arange(6.0)]).tobytes()

    def parts(slope=0.1, scale=0.5, mean=0.0):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            module = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.LeakyReLU(slope))
        return module, Gaussian(scale), DiagonalNormal(torch.tensor([mean]), torch.zeros(1))

    same, *others = [parts(), parts(slope=0.2), parts(scale=0.6), parts(mean=1.0), parts()]
    others[-1][0][1].running_mean += 1
    swapped = parts()
    swapped[0].register_parameter("a", nn.Parameter(torch.zeros(1)))
    renamed = parts()
    renamed[0].register_parameter("b", nn.Parameter(torch.zeros(1)))
    computed = parts()[:2] + (DiagonalNormal(torch.ones(1, requires_grad=True) * 3, torch.zeros(1)),)
    found = [parameters_digest(*p) for p in (same, *others, swapped, renamed, computed)]
    assert len(set(found)) == len(found)
    assert parameters_digest(*parts()) == found[0]
    module, *rest = parts()
    assert parameters_digest(torch.compile(module), *rest) == found[0]
    parameters_digest(nn.LazyLinear(3))


def test_a_checkpoint_of_another_run_is_refused(tmp_path):
    file = tmp_path / "run.npz"
    encoder, decoder = models.networks(X, D)
    x = randn(N, X, seed=5)

    def run(encoder=encoder, decoder=decoder, x=x, **options):
        options = {"k": K, "batch_size": 10, "checkpoint": file, **QUIET, **options}
        return evaluate_parts(encoder, decoder, x, **options)

    run()
    with pytest.raises(ValueError, match="other k: 40 then, 41 now"):
        run(k=41)
    with pytest.raises(ValueError, match=r"other tol: None then, 0\.1 now"):
        run(tol=0.1)
    with pytest.raises(ValueError, match="other seed"):
        run(generator=generator(3))
    with pytest.raises(ValueError, match="other parameters"):
        run(prior=DiagonalNormal(torch.zeros(D, device=DEVICE), torch.ones(D, device=DEVICE)))
    changed = x.clone()
    changed[15, 2] += 1e-6
    with pytest.raises(ValueError, match="other data: batch 1 differs"):
        run(x=changed)
    with pytest.raises(
        ValueError, match="other batches: batch 0 had 10 examples then and has 9 now.*batch_size"
    ):
        run(batch_size=9)
    with pytest.raises(ValueError, match="other batches: batch 0 had 10 examples then and has 23 now"):
        run(batch_size=50)
    with pytest.raises(ValueError, match="other batches: batch 2 had 3 examples then and has 10 now"):
        run(x=torch.cat([x, x[:9]]))
    for less in (x[:10], x[:0]):
        with pytest.raises(ValueError, match="it holds batch [01], which these data do not have"):
            run(x=less)
    assert len(run().log_px) == N
    with torch.no_grad():
        decoder.linear.weight[0, 0] += 1e-6
    with pytest.raises(ValueError, match="other parameters"):
        run()
    with torch.no_grad():
        decoder.linear.weight[0, 0] -= 1e-6
    # A change outside any module.
    holder = {"gain": 1.0}
    hidden = tmp_path / "hidden.npz"
    run(decoder=lambda z: tuple(holder["gain"] * v for v in decoder(z)), checkpoint=hidden)
    holder["gain"] = 1.001
    with pytest.raises(ValueError, match="another encoder or decoder"):
        run(decoder=lambda z: tuple(holder["gain"] * v for v in decoder(z)), checkpoint=hidden)
    for content in (b"", b"PK\x03\x04 nonsense", file.read_bytes()[:-300]):
        (tmp_path / "bad.npz").write_bytes(content)
        with pytest.raises(ValueError, match=r"bad\.npz is not a checkpoint of fastvae\.evaluate"):
            run(checkpoint=tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", a=np.zeros(3))
    np.savez(tmp_path / "list.npz", settings="[1, 2]")
    np.save(tmp_path / "array.npy", np.zeros(3))
    with np.load(file) as saved:
        np.savez(tmp_path / "older.npz", **{k: v for k, v in saved.items() if k != "khat"})
        for name, sizes in {
            "fewer": [10, 10],
            "more": [10, 10, 4],
            "none": [10, 13, 0],
            "real": [10.0, 10, 3],
        }.items():
            np.savez(tmp_path / f"{name}.npz", **{**saved, "sizes": np.array(sizes)})
        np.savez(tmp_path / "shape.npz", **{**saved, "sizes": np.array([[10, 10, 3]])})
    changed = ("fewer.npz", "more.npz", "none.npz", "real.npz", "shape.npz")
    for name in ("other.npz", "list.npz", "array.npy", "older.npz", *changed):
        with pytest.raises(ValueError, match=f"{name} is not a checkpoint"):
            run(checkpoint=tmp_path / name)
    run(tol=np.float32(0.1), checkpoint=tmp_path / "tol")
    run(tol=np.float32(0.1), checkpoint=tmp_path / "tol")


# Ranks


def _run_rank(rank: int, world: int, folder: str, shard: str, options: dict) -> None:
    torch.set_num_threads(1)
    store = f"file://{folder}/store-{world}-{shard}-{len(options)}"
    distributed.init_process_group("gloo", init_method=store, rank=rank, world_size=world)
    try:
        model, x, q = _model_and_data()
        # Each rank's own random state must not matter.
        torch.manual_seed(rank)
        options = {"k": 333, "batch_size": 4, "generator": None, "shard": shard, **options}
        if "seed" in options:
            # All ranks use rank 0's generator.
            options["generator"] = torch.Generator().manual_seed(options.pop("seed") + rank)
        if options.pop("shuffled", False):
            loader = DataLoader(TensorDataset(x), 4, shuffle=True)
            with pytest.raises(ValueError, match="data differ between the ranks"):
                _evaluate(model, q, loader, **{**options, "generator": None})
        result = _evaluate(model, q, x, **options)
        torch.save(vars(result), f"{folder}/{shard}-{world}-{rank}.pt")
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


def _ranks(world: int, folder, shard: str, **options) -> list[fastvae.Evaluation]:
    torch.multiprocessing.spawn(_run_rank, args=(world, str(folder), shard, options), nprocs=world)
    load = [torch.load(folder / f"{shard}-{world}-{r}.pt", weights_only=True) for r in range(world)]
    return [fastvae.Evaluation(**values) for values in load]


def _run_sharded(rank: int, folder: str) -> None:
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    vae, x = _vae_and_data()
    fully_shard(vae.encoder, mesh=distributed.device_mesh.init_device_mesh("cpu", (2,)))
    for shard in ("data", "samples"):
        with pytest.raises(ValueError, match='sharded over the ranks.*shard="none"'):
            vae.evaluate(x, k=7, shard=shard, progress=False)
    torch.manual_seed(3)
    result = vae.evaluate(x, k=7, shard="none", progress=False)
    torch.save(result.log_px, f"{folder}/{rank}.pt")
    distributed.destroy_process_group()


def _vae_and_data() -> tuple[fastvae.VAE, torch.Tensor]:
    torch.manual_seed(0)
    return fastvae.VAE(nn.Linear(8, 4), nn.Linear(2, 8), likelihood="bernoulli"), torch.rand(5, 8).round()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_sharded_parameters(tmp_path):
    """Ranks that gather each other's parameters must make the same calls, which only shard="none" does."""
    torch.multiprocessing.spawn(_run_sharded, args=(str(tmp_path),), nprocs=2)
    vae, x = _vae_and_data()
    torch.manual_seed(3)
    expected = vae.evaluate(x, k=7, progress=False).log_px
    for rank in range(2):
        torch.testing.assert_close(torch.load(tmp_path / f"{rank}.pt"), expected)


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("shard, noise", [("data", "philox"), ("samples", "philox"), ("samples", "qmc")])
def test_any_number_of_ranks(tmp_path, shard, noise):
    """1, 2 and 3 processes give the same results on each rank."""
    model, x, q = _model_and_data()
    generator = torch.Generator().manual_seed(6)
    expected = _evaluate(model, q, x, k=333, batch_size=4, noise=noise, generator=generator)
    for world in (1, 2, 3):
        for result in _ranks(world, tmp_path, shard, seed=6, noise=noise, shuffled=world == 2):
            _assert_same(result, expected)


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
def test_ranks_with_a_tolerance_and_a_checkpoint(tmp_path):
    """A run started by two ranks, continued by three and finished by one uses a single file."""
    for shard in ("samples", "data"):
        expected = None
        file = tmp_path / f"{shard}.npz"
        for world in (2, 3):
            for result in _ranks(world, tmp_path, shard, tol=0.05, checkpoint=str(file)):
                assert bool(((result.log_px_stderr <= 0.05) | (result.k == 333)).all())
                expected = expected or result
                _assert_same(result, expected)
        assert sorted(p.name for p in tmp_path.glob(f"{shard}*.npz")) == [f"{shard}.npz"]


class _Failure(Exception):
    pass


def _run_failures(rank: int, world: int, folder: str, shard: str) -> None:
    """Make rank 2 fail at every stage; any rank may be the last to call evaluate."""
    torch.set_num_threads(1)
    # Background processes of a shell, and their children, ignore SIGINT.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=world,
        timeout=datetime.timedelta(hours=1),
    )  # fmt: skip
    try:
        model, x, q = _model_and_data()
        bad = rank == 2

        def fail():
            if bad:
                raise _Failure("here")

        def interrupt():
            if bad:
                signal.raise_signal(signal.SIGINT)

        def at(call, action):
            calls = []

            def counting():
                calls.append(1)
                if len(calls) == call:
                    action()

            return counting

        def evaluate(encode=int, decode=int, iterate=int, count=12, **options):
            def batches():
                for b in x.split(2)[:count]:
                    iterate()
                    yield b

            def encoder(b):
                encode()
                return q(b)

            def decoder(z):
                decode()
                return model.decoder(z)

            options = {"k": 200, "likelihood": model.likelihood, "shard": shard, **QUIET, **options}
            return evaluate_parts(encoder, decoder, batches(), **options)

        class Likelihood(Gaussian):
            def log_prob(self, x, parameters):
                if bad and x.shape[0] == 1:
                    raise _Failure("here")
                return super().log_prob(x, parameters)

        def seeded():
            return {"generator": torch.Generator().manual_seed(6)}

        failed = "rank 2 failed: _Failure: here"
        resumed = {"checkpoint": f"{folder}/run.npz"}
        # Stage, rank 2's error, and the others' error.
        for options, own, words in (
            ({"encode": at(2, fail)}, _Failure, failed),
            ({"decode": at(5, fail)}, _Failure, failed),
            ({"iterate": at(1, fail)}, _Failure, failed),
            ({"iterate": at(12, fail)}, _Failure, failed),
            ({"encode": at(2, fail), **resumed, **seeded()}, _Failure, failed),
            (
                {"likelihood": Likelihood(model.scale), "tol": 0.1},
                ValueError,
                "rank 2 failed: ValueError: tol=0.1 needs .* raised _Failure: here",
            ),
            ({"decode": at(5, interrupt)}, KeyboardInterrupt, "rank 2 failed: KeyboardInterrupt"),
            ({"exchange": at(3, interrupt)}, KeyboardInterrupt, "rank 2 failed: KeyboardInterrupt"),
            ({"count": 5 if bad else 12}, ValueError, "data differ between the ranks"),
        ):
            expected = own if bad else ValueError if "count" in options else RuntimeError
            exchange, gather = options.pop("exchange", int), distributed.all_gather_object
            with pytest.MonkeyPatch.context() as patch, warnings.catch_warnings():
                patch.setattr(distributed, "all_gather_object", lambda *a: (exchange(), gather(*a)))  # noqa: B023
                warnings.simplefilter("ignore")
                with pytest.raises(expected, match=None if bad else words):
                    evaluate(**options)
        # All ranks are in step: a further run is correct, also from the checkpoint.
        expected = torch.load(f"{folder}/expected.pt", weights_only=False)
        _assert_same(evaluate(**seeded()), expected)
        _assert_same(evaluate(**seeded(), **resumed), expected)
        # One rank may evaluate alone while the others do other work.
        if rank == 1:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(distributed, "all_gather_object", None)
                result = evaluate(**{**seeded(), "shard": "none", "checkpoint": f"{folder}/alone.npz"})
            _assert_same(result, expected)
        distributed.barrier()
    finally:
        distributed.destroy_process_group()


@pytest.mark.slow
@pytest.mark.skipif(not distributed.is_available(), reason="torch without distributed")
@pytest.mark.parametrize("shard", ["data", "samples"])
def test_an_error_on_one_rank_is_raised_on_all(tmp_path, shard):
    """A failing rank's error is raised on the others, which do not hang and can continue."""
    model, x, q = _model_and_data()
    options = {"k": 200, "batch_size": 2, "generator": torch.Generator().manual_seed(6)}
    torch.save(_evaluate(model, q, x, **options), tmp_path / "expected.pt")
    torch.multiprocessing.spawn(_run_failures, args=(3, str(tmp_path), shard), nprocs=3)


# Reconstruction probability


def test_reconstruction_log_prob(backend):
    encoder, decoder = models.networks(X, D, "bernoulli")
    x, samples = rand(N, X, seed=7), 9
    q = encoder(x)
    z, _ = fastvae.ops.rsample_log_ratio(*q, k=samples, seed=seed_of(8))
    log_likelihood = torch.distributions.Bernoulli(logits=decoder(z), validate_args=False).log_prob(x).sum(2)
    expected = (torch.logsumexp(log_likelihood, 0) - math.log(samples)).detach()
    for k_chunk in (None, 2):
        got = fastvae.reconstruction_log_prob(
            x, q, decoder, k=samples, k_chunk=k_chunk, likelihood="bernoulli", generator=generator(8)
        )
        assert not got.requires_grad
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_reconstruction_log_prob_of_a_vae():
    """It is low for x unlike the data, whatever the learned prior."""
    model, x, q = _model_and_data(dtype=torch.float32)
    vae = fastvae.VAE(q, model.decoder, likelihood=model.likelihood, modules=[])
    odd = x + 3
    usual, unusual = (vae.reconstruction_log_prob(data, k=30) for data in (x, odd))
    assert float(unusual.max()) < float(usual.min())
    got = vae.reconstruction_log_prob(x, 30, generator=generator(9))
    expected = fastvae.reconstruction_log_prob(
        x, q(x), model.decoder, k=30, likelihood=model.likelihood, generator=generator(9)
    )
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="k must be at least 1"):
        vae.reconstruction_log_prob(x, 0)


def test_vae_evaluate():
    model, x, q = _model_and_data()
    vae = fastvae.VAE(q, model.decoder, likelihood=model.likelihood, modules=[])
    result = vae.evaluate(x, k=K, generator=generator(1), **QUIET)
    _assert_same(result, _evaluate(model, q, x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_data_are_not_rounded_to_half_precision(dtype):
    """A model in half precision: the likelihood reads counts and size factors as they are."""
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(6, 4).to(DEVICE, dtype), torch.nn.Linear(2, 6).to(DEVICE, dtype)
    torch.nn.init.zeros_(encoder.weight)
    x = torch.tensor([[257.0, 1, 0, 3, 4097, 2]] * 3, device=DEVICE)
    size = torch.tensor([1.2345, 500.7, 1000.3], device=DEVICE)
    seen = []

    class Counts(Poisson):
        def log_likelihood(self, x, parameters, samples, conditioning=None):
            seen.append((x, conditioning.size_factor))
            return super().log_likelihood(x, parameters, samples, conditioning)

    evaluate_parts(
        encoder, decoder, [(x, size)], k=3, prepare_batch=lambda b: {"x": b[0] * 1.0, "size_factor": b[1]},
        likelihood=Counts(), progress=False,
    )  # fmt: skip
    for data, factors in seen:
        assert torch.equal(data, x) and torch.equal(factors, size)
    assert seen
