"""NumPy integers behave like Python's wherever an integer is expected."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

import fastvae
from fastvae import diagnostics, ops
from fastvae.distributions import Level
from fastvae.estimation import proposals
from fastvae.likelihoods import Categorical, DiscretizedLogistic, DiscretizedLogisticMixture
from fastvae.objectives import bounds, schedules

from .models import evaluate_parts

X = torch.ones(4, 7)
Q = torch.zeros(4, 3), torch.zeros(4, 3)


def decoder(z):
    return z.sum(1, keepdim=True).expand(len(z), 7)


def encoder(x):
    return x[:, :3] * 0, x[:, 3:6] * 0


def _vae(**options):
    torch.manual_seed(1)
    return fastvae.VAE(nn.Linear(7, 6), nn.Linear(3, 7), likelihood="bernoulli", **options)


def _bound(objective, **options):
    return fastvae.bound(X, Q, decoder, objective, likelihood="bernoulli", **options)


def _evaluate(**options):
    options = {"k": 30, **options}
    return evaluate_parts(encoder, decoder, X, likelihood="bernoulli", progress=False, **options).log_px


def _marginal(**options):
    return fastvae.log_marginal(X, Q, decoder, likelihood="bernoulli", **{"k": 30, **options}).log_px


def _ais(**options):
    options = {"steps": 3, "k": 4, **options}
    return fastvae.audit.ais(X, Q, decoder, likelihood="bernoulli", **options).log_px


def _bdmc(**options):
    options = {"latent_dim": 3, "n": 3, "steps": 3, "k": 4, **options}
    return fastvae.audit.bdmc(lambda x: encoder(x), decoder, likelihood="bernoulli", **options).lower


def _lattice(**options):
    options = {"points": 9, **options}
    return fastvae.audit.lattice(
        X, lambda z: z.expand(-1, 7), latent_dim=1, likelihood="bernoulli", **options
    ).log_px


def _latents(**options):
    return diagnostics.latents(_vae(), X, **options).kl


def _hierarchy(dim):
    return Level(dim, nn.Linear(7, 6)).dim


# (function of an integer n, the integer).
CASES = {
    "elbo k": (lambda n: fastvae.elbo(X, Q, decoder, k=n, likelihood="bernoulli"), 3),
    "elbo row_offset": (lambda n: fastvae.elbo(X, Q, decoder, row_offset=n, likelihood="bernoulli"), 5),
    "iwae k": (lambda n: fastvae.iwae(X, Q, decoder, k=n, likelihood="bernoulli"), 5),
    "iwae k_chunk": (lambda n: fastvae.iwae(X, Q, decoder, k=5, k_chunk=n, likelihood="bernoulli"), 2),
    "iwae row_offset": (lambda n: fastvae.iwae(X, Q, decoder, row_offset=n, likelihood="bernoulli"), 5),
    "bound k": (lambda n: _bound(bounds.CIWAE(0.5), k=n), 5),
    "bound groups": (lambda n: _bound(bounds.IWAE(groups=n), k=6), 2),
    "bound permutations": (lambda n: _bound(bounds.UStatistic(2, permutations=n), k=6), 2),
    "log_weights k": (lambda n: fastvae.log_weights(X, Q, decoder, k=n, likelihood="bernoulli").log_ratio, 5),
    "log_marginal k": (lambda n: _marginal(k=n), 30),
    "log_marginal k_chunk": (lambda n: _marginal(k_chunk=n), 7),
    "log_marginal row_offset": (lambda n: _marginal(row_offset=n), 7),
    "adapted": (lambda n: _marginal(k=100, proposal=proposals.Adapted(df=n, most=n)), 70),
    "reconstruction k": (
        lambda n: fastvae.reconstruction_log_prob(X, Q, decoder, k=n, likelihood="bernoulli"),
        5,
    ),
    "beta_tc": (
        lambda n: fastvae.beta_tc(X, Q, decoder, k=n, dataset_size=n, likelihood="bernoulli"),
        9,
    ),
    "sleep": (
        lambda n: fastvae.sleep(encoder, decoder, n, latent_dim=3, likelihood="bernoulli"),
        5,
    ),
    "sleep latent_dim": (
        lambda n: fastvae.sleep(encoder, decoder, 5, latent_dim=n, likelihood="bernoulli"),
        3,
    ),
    "evaluate k": (lambda n: _evaluate(k=n), 20),
    "evaluate k_chunk": (lambda n: _evaluate(k_chunk=n), 7),
    "evaluate batch_size": (lambda n: _evaluate(batch_size=n), 3),
    "evaluate audit": (lambda n: _evaluate(audit=n), 2),
    "ais steps": (lambda n: _ais(steps=n), 3),
    "ais k": (lambda n: _ais(k=n), 3),
    "ais leapfrog": (lambda n: _ais(leapfrog=n), 3),
    "ais k_chunk": (lambda n: _ais(k_chunk=n), 3),
    "ais row_offset": (lambda n: _ais(row_offset=n), 3),
    "bdmc n": (lambda n: _bdmc(n=n), 3),
    "bdmc latent_dim": (lambda n: _bdmc(latent_dim=n), 3),
    "lattice points": (lambda n: _lattice(points=n), 9),
    "lattice batch_size": (lambda n: _lattice(batch_size=n), 3),
    "latents examples": (lambda n: _latents(examples=n), 3),
    "latents batch_size": (lambda n: _latents(batch_size=n), 3),
    "vae latent_dim": (lambda n: _vae(latent_dim=n).sample(2), 3),
    "vae sample": (lambda n: _vae(latent_dim=3).sample(n), 3),
    "vae sleep": (lambda n: _vae(latent_dim=3).sleep(n), 5),
    "vae elbo": (lambda n: _vae().elbo(X, k=n), 3),
    "vae iwae": (lambda n: _vae().iwae(X, n), 3),
    "vae reconstruction_log_prob": (lambda n: _vae().reconstruction_log_prob(X, n), 3),
    "level dim": (_hierarchy, 3),
    "normal shape": (lambda n: fastvae.random.normal(1, n, n, n), 3),
    "normal offsets": (lambda n: fastvae.random.normal(1, 2, 3, 4, sample_offset=n, row_offset=n), 3),
    "normal seed": (lambda n: fastvae.random.normal(n, 2, 3, 4), 3),
    "normal level": (lambda n: fastvae.random.normal(1, 2, 3, 4, level=n), 3),
    "rsample_kl samples": (lambda n: ops.rsample_kl(*Q, k=n)[0], 3),
    "rsample_kl offsets": (lambda n: ops.rsample_kl(*Q, sample_offset=n, row_offset=n)[0], 3),
    "rsample_log_ratio samples": (lambda n: ops.rsample_log_ratio(*Q, k=n)[0], 3),
    "rsample_tril": (
        lambda n: ops.rsample_tril(Q[0], torch.zeros(4, 6), k=n, sample_offset=n, row_offset=n)[0],
        3,
    ),
    "log_mean_exp dim": (lambda n: ops.log_mean_exp(X, n), 1),
    "categorical ignore_index": (lambda n: Categorical(n).ignore_index, 3),
    "discretized levels": (lambda n: DiscretizedLogistic(n).levels, 16),
    "mixture levels": (lambda n: DiscretizedLogisticMixture(n).levels, 16),
    "linear steps, delay, step": (lambda n: schedules.linear(0.0, 1.0, n, delay=n)(n + 2), 5),
    "cyclical cycles": (lambda n: schedules.cyclical(0.0, 1.0, 20, cycles=n)(n), 5),
    "stages": (lambda n: schedules.stages([(0, 1), (n, 2)])(n), 5),
    "vector quantizer": (lambda n: fastvae.quantize.VectorQuantizer(n, n, restart=n).codes, 5),
}
KINDS = (np.int64, np.int32, np.uint8)


@pytest.mark.parametrize("name", CASES)
def test_numpy_integers_equal_python_ints(name):
    """Every NumPy integer type gives the value of Python's int."""
    call, n = CASES[name]
    torch.manual_seed(3)
    expected = call(n)
    for kind in KINDS:
        torch.manual_seed(3)
        torch.testing.assert_close(call(kind(n)), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("name", [n for n in CASES if n != "normal seed" and not n.startswith("linear")])
@pytest.mark.parametrize("wrong", [True, 2.0, "3", torch.tensor(3)], ids=str)
def test_other_types_are_refused(name, wrong):
    """Booleans, floats, strings and tensors are refused as integers; the error shows the argument."""
    if name == "stages" and isinstance(wrong, torch.Tensor):
        call = lambda n: schedules.stages([(n, 1)])  # noqa: E731 # the returned function takes tensors
    else:
        call, _ = CASES[name]
    with pytest.raises(TypeError, match="int"):
        call(wrong)
