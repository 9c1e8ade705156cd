"""Contracts: forms of encoders' outputs, and results required of users' likelihoods and posteriors."""

from __future__ import annotations

import types
from collections import OrderedDict, namedtuple

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal, Distribution, StandardNormal, register_kl
from fastvae.distributions.closed_form import closed_kl
from fastvae.likelihoods import Gaussian, Likelihood

from . import models
from .conftest import DEVICE
from .models import evaluate_parts, generator, rand, randn

B, D, X, K = 5, 3, 7, 4
BERNOULLI = {"likelihood": "bernoulli"}


# Encoders' outputs


class DiagonalGaussianDistribution:
    """Posterior class of diffusers and latent-diffusion."""

    def __init__(self, parameters):
        self.parameters = parameters
        self.mean, self.logvar = torch.chunk(parameters, 2, dim=1)
        self.std, self.var = torch.exp(0.5 * self.logvar), torch.exp(self.logvar)

    def sample(self):
        return self.mean + self.std * torch.randn_like(self.mean)


class ModelOutput(OrderedDict):
    """Output class of diffusers and transformers, whose entries are also attributes."""

    def __init__(self, **entries):
        super().__init__(entries)
        self.__dict__.update(entries)


class PlainOutput(OrderedDict):
    """Output class of pythae, whose entries are not attributes."""


Backwards = namedtuple("Backwards", "logvar, mu")
WithDraw = namedtuple("WithDraw", "z, mu, log_var")

OUTPUTS = {
    "a tensor": lambda both, mu, logvar: both,
    "a list": lambda both, mu, logvar: [mu, logvar],
    "a posterior": lambda both, mu, logvar: DiagonalNormal(mu, logvar),
    "a Normal": lambda both, mu, logvar: td.Normal(mu, torch.exp(0.5 * logvar)),
    "an Independent": lambda both, mu, logvar: td.Independent(td.Normal(mu, torch.exp(0.5 * logvar)), 1),
    "diffusers' distribution": lambda both, mu, logvar: DiagonalGaussianDistribution(both),
    "diffusers' output": lambda both, mu, logvar: ModelOutput(latent_dist=DiagonalGaussianDistribution(both)),
    "pythae's output": lambda both, mu, logvar: PlainOutput(embedding=mu, log_covariance=logvar),
    "a dict": lambda both, mu, logvar: {"z": None, "logvar": logvar, "mu": mu},
    "an object": lambda both, mu, logvar: types.SimpleNamespace(mu=mu, logvar=logvar),
    "a named tuple": lambda both, mu, logvar: Backwards(logvar, mu),
    "a longer named tuple": lambda both, mu, logvar: WithDraw(mu + 1, mu, logvar),
}


@pytest.mark.parametrize("form", OUTPUTS)
def test_forms_of_q(form):
    """Every form is read as the pair (mu, logvar) by every function, gradients included."""
    networks = models.networks(X, D, "bernoulli")
    linear, decoder = networks[0].linear, networks[1]
    x = rand(B, X, seed=1)

    def pair(x):
        return linear(x).chunk(2, dim=1)

    def encoder(x):
        both = linear(x)
        return OUTPUTS[form](both, *both.chunk(2, dim=1))

    def same(got, expected):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-5)

    for objective, options in (
        (fastvae.elbo, {"k": 2}),
        (fastvae.iwae, {"k": K, "estimator": "dreg"}),
    ):
        results = []
        for read in (pair, encoder):
            bound = objective(x, read(x), decoder, generator=generator(1), **options, **BERNOULLI)
            results.append((bound, *torch.autograd.grad(bound, [*linear.parameters()])))
        for got, expected in zip(*results, strict=True):
            same(got, expected)
    vaes = [fastvae.VAE(read, decoder, modules=[linear], **BERNOULLI) for read in (pair, encoder)]
    same(*(vae.reconstruct(x) for vae in vaes))
    same(*(vae.reconstruction_log_prob(x, 9, generator=generator(1)) for vae in vaes))
    assert vaes[1].latent_dim == D
    evaluations = [
        evaluate_parts(read, decoder, x, k=9, progress=False, generator=generator(1), **BERNOULLI)
        for read in (pair, encoder)
    ]
    same(evaluations[1].log_px, evaluations[0].log_px)
    same(evaluations[1].kl_per_dim, evaluations[0].kl_per_dim)


# Results of users' own methods


class Own(Likelihood):
    """Poisson likelihood whose result passes through ``end``, a mistake."""

    def __init__(self, end):
        super().__init__()
        self.end = end

    def log_prob(self, x, log_rate):
        return self.end(x * log_rate - log_rate.exp() - torch.lgamma(x + 1))


class Around(Distribution):
    """Gaussian, one result of which passes through ``end``, a mistake."""

    def __init__(self, mu, logvar, method=None, index=0, end=None):
        super().__init__()
        self._q = DiagonalNormal(mu, logvar)
        self.batch, self.device = self._q.batch, self._q.device
        self._mistake = method, index, end

    def rsample_log_prob(self, samples, seed, **place):
        results = list(self._q.rsample_log_prob(samples, seed, **place))
        wrong, index, end = self._mistake
        if wrong == "rsample_log_prob":
            results[index] = end(results[index])
        return tuple(results)

    def log_prob(self, z):
        wrong, _, end = self._mistake
        value = self._q.log_prob(z)
        return end(value) if wrong == "log_prob" else value


@register_kl(Around, StandardNormal)
def _kl(q, p):
    wrong, _, end = q._mistake
    value = closed_kl(q._q, p)
    return end(value) if wrong == "kl" else value


def _calls(with_kl: bool = True):
    """Yield (samples, function of x, q, decoder) for everything that draws from q and takes a likelihood."""
    if with_kl:
        yield K, lambda x, q, f, **o: fastvae.elbo(x, q, f, k=K, **o)
    yield K, lambda x, q, f, **o: fastvae.elbo(x, q, f, k=K, kl="mc", **o)
    yield K, lambda x, q, f, **o: fastvae.iwae(x, q, f, k=K, **o)
    yield 2, lambda x, q, f, **o: fastvae.iwae(x, q, f, k=K, k_chunk=2, **o)
    yield 2, lambda x, q, f, **o: fastvae.iwae(x, q, f, k=K, k_chunk=2, estimator="dreg", **o)
    yield 3, lambda x, q, f, **o: fastvae.log_marginal(x, q, f, k=9, k_chunk=3, **o)
    yield 3, lambda x, q, f, **o: fastvae.reconstruction_log_prob(x, q, f, k=9, k_chunk=3, **o)
    yield 1, lambda x, q, f, **o: evaluate_parts(lambda x: q, f, x, k=9, progress=False, **o)


def _arguments(event):
    decoder = nn.Linear(D, event, device=DEVICE)
    return rand(B, event, seed=1).round(), (randn(B, D, seed=2), randn(B, D, seed=3)), decoder


SHAPES = {
    "summed over all": (lambda v: v.sum(), lambda n, x: []),
    "summed over the rows": (lambda v: v.sum(0), lambda n, x: [x]),
    "of all pairs": (lambda v: v.sum(-1) + v.sum(-1, keepdim=True), lambda n, x: [n, n]),
    "rows last": (lambda v: v.T, lambda n, x: [x, n]),
    "a column": (lambda v: v.sum(-1, keepdim=True), lambda n, x: [n, 1]),
    "of some rows": (lambda v: v[1:], lambda n, x: [n - 1, x]),
}


@pytest.mark.parametrize("event", [X, B], ids=["X", "X = B"])
@pytest.mark.parametrize("mistake", SHAPES)
def test_wrong_shape_of_a_log_prob(mistake, event):
    """Every wrong shape is reported, even where an event as large as the batch would broadcast."""
    end, shape = SHAPES[mistake]
    x, q, decoder = _arguments(event)
    for samples, call in _calls():
        rows = samples * B
        if rows == event:  # indistinguishable
            continue
        with pytest.raises(ValueError) as raised:
            call(x, q, decoder, likelihood=Own(end))
        message = str(raised.value)
        assert message.startswith(f"Own.log_prob returned {shape(rows, event)}; expected log p(x|z)")
        assert (
            f"summed over the event, [{rows}]; or of each element, [N, *event] = [{rows}, {event}]" in message
        )
        assert "an entry for each row, sample times batch" in message


def test_wrong_kind_of_a_log_prob():
    x, q, decoder = _arguments(X)
    for end, exception, words in (
        (lambda v: v.sum(-1).long(), TypeError, "a tensor of torch.int64; expected"),
        (lambda v: v.sum(-1).tolist(), TypeError, "list; expected"),
        (lambda v: None, TypeError, "NoneType; expected"),
        (lambda v: v.sum(-1).to("meta"), ValueError, "a tensor on meta; expected"),
    ):
        for _, call in _calls():
            with pytest.raises(exception, match=f"Own.log_prob returned {words}"):
                call(x, q, decoder, likelihood=Own(end))


def test_wrong_rows_of_a_decoder_with_a_custom_likelihood():
    """A decoder output with one row per sample, which would broadcast over the batch, is reported."""

    class Broadcasting(Likelihood):
        def log_prob(self, x, parameters):
            return td.Normal(parameters.mean(0), 1.0).log_prob(x).sum(-1)

    x, q, decoder = _arguments(X)
    averaging = lambda z: decoder(z).reshape(K, B, X).mean(1)  # noqa: E731
    with pytest.raises(
        ValueError, match=r"decoder returned \[4, 7\] for z \[20, 3\]; expected K·B = 4·5 rows"
    ):
        fastvae.iwae(x, q, averaging, k=K, likelihood=Broadcasting())


RATIOS = {
    "a column": (lambda v: v.mean(1, keepdim=True), lambda k: [k, 1]),
    "of each dimension": (lambda v: v.unsqueeze(2).expand(-1, -1, D), lambda k: [k, B, D]),
    "of all": (lambda v: v.sum(), lambda k: []),
    "of the batch": (lambda v: v.mean(0), lambda k: [B]),
}


@pytest.mark.parametrize("mistake", RATIOS)
def test_wrong_shape_of_a_density(mistake):
    end, shape = RATIOS[mistake]
    x, q, decoder = _arguments(X)
    for samples, call in _calls(with_kl=False):
        with pytest.raises(ValueError) as raised:
            call(x, Around(*q, "rsample_log_prob", 1, end), decoder, likelihood=Gaussian(1.0))
        message = str(raised.value)
        assert message.startswith(f"Around.rsample_log_prob returned {shape(samples)}; expected log q(z|x)")
        assert f"[K, B] = [{samples}, {B}]" in message
    for estimator in ("stl", "dreg"):
        with pytest.raises(ValueError, match=r"Around.log_prob returned .*; expected log q\(z\|x\) \[K, B\]"):
            wrong = Around(*q, "log_prob", 0, end)
            fastvae.iwae(x, wrong, decoder, k=K, likelihood=Gaussian(1.0), estimator=estimator)
        with pytest.raises(ValueError, match=r"Around.log_prob returned .*; expected log p\(z\) \[K, B\]"):
            wrong = Around(*q, "log_prob", 0, end)
            fastvae.iwae(x, q, decoder, k=K, likelihood=Gaussian(1.0), prior=wrong)


def test_wrong_shape_of_a_kl():
    x, q, decoder = _arguments(X)

    def bound(method, end, **options):
        q_of_ones_own = Around(*q, method, 0, end)
        return fastvae.elbo(x, q_of_ones_own, decoder, likelihood=Gaussian(1.0), **options)

    for end, shape in ((lambda v: v.mean(), r"\[\]"), (lambda v: v[:, :1], r"\[5, 1\]"), (list, "list")):
        with pytest.raises(
            ValueError, match=rf"KL of Around and StandardNormal is {shape}; expected \[B\] ="
        ):
            bound("kl", end)
    with pytest.raises(ValueError, match="each dimension, but the KL of Around and"):
        bound("kl", lambda v: v.sum(1), free_bits=0.1)
    assert bound(None, None).shape == bound(None, None, free_bits=0.1).shape == ()


@pytest.mark.parametrize("kl", ["analytic", "mc"])
def test_wrong_shape_of_draws(kl):
    x, q, decoder = _arguments(X)
    for end, shape in (
        (lambda z: z.transpose(0, 1), [B, K, D]),
        (lambda z: z[0], [B, D]),
        (lambda z: z.flatten(0, 1), [K * B, D]),
    ):
        with pytest.raises(ValueError) as raised:
            fastvae.elbo(
                x, Around(*q, "rsample_log_prob", 0, end), decoder, k=K, likelihood=Gaussian(1.0), kl=kl
            )
        assert f"Around.rsample_log_prob returned {shape}; expected z [K, B, D] = [4, 5, 3]" in str(
            raised.value
        )


def test_draws_without_a_density_are_refused():
    x, q, decoder = _arguments(X)

    class Alone(Around):
        def rsample_log_prob(self, samples, seed, **place):
            return super().rsample_log_prob(samples, seed, **place)[0]

    with pytest.raises(
        TypeError, match=r"Alone.rsample_log_prob returned Tensor; expected z \[K, B, D\] and log q"
    ):
        fastvae.iwae(x, Alone(*q), decoder, k=K, likelihood=Gaussian(1.0))


def test_right_shapes_are_accepted():
    """Correct users' classes give the results of fastvae's own."""
    x, q, decoder = _arguments(X)
    own = Own(lambda v: v.sum(-1))
    for _, call in _calls():
        results = []
        for posterior in (q, Around(*q)):
            result = call(x, posterior, decoder, likelihood=own, generator=generator(1))
            results.append(getattr(result, "log_px", result))
        torch.testing.assert_close(*results, rtol=1e-5, atol=1e-5)
