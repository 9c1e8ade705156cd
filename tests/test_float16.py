"""Half precision where gradients and sums might overflow or lose accuracy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.likelihoods import Likelihood
from fastvae.objectives.bounds import CIWAE, IWAE, TVO, Jackknife

from .conftest import DEVICE
from .models import generator, rand, randn

B, D, X, K = 5, 3, 40, 16
ENCODERS = {
    "piwae": IWAE(4),
    "ciwae": CIWAE(0.5),
    "dreg": IWAE(4, estimator="dreg"),
    "tvo": TVO(estimator="stl"),
}


class Gradients:
    """Gradients of PIWAE and related bounds on one model, whose log weights differ by tens of nats."""

    def __init__(self, seed):
        torch.manual_seed(seed)
        self.decoder = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, X)).to(DEVICE)
        with torch.no_grad():
            self.decoder[2].weight.mul_(6)
        self.x = rand(B, X, seed=seed).round()
        self.mu, self.logvar = randn(B, D, seed=seed + 1), 0.3 * randn(B, D, seed=seed + 2)

    def __call__(self, encoder, where, chunk, dtype=torch.float16):
        decoder, mu, logvar = self.decoder, self.mu, self.logvar
        if where == "everything":
            decoder, mu, logvar = decoder.to(dtype), mu.to(dtype), logvar.to(dtype)
        mu, logvar = mu.detach().requires_grad_(), logvar.detach().requires_grad_()

        def inside(z):
            with torch.autocast(DEVICE.type, dtype, enabled=where == "autocast inside"):
                return self.decoder(z)

        function = inside if where == "autocast inside" else decoder
        with torch.autocast(DEVICE.type, dtype, enabled=where == "autocast"):
            bound = fastvae.bound(
                self.x, (mu, logvar), function, IWAE(), q_objective=encoder, k=K, k_chunk=chunk,
                likelihood="bernoulli", generator=generator(7), reduction="sum",
            )  # fmt: skip
        got = torch.autograd.grad(bound, [mu, logvar, *self.decoder.parameters()])
        self.decoder.float()
        return [g.float() for g in got]


@pytest.mark.parametrize("where", ["everything", "autocast", "autocast inside"])
@pytest.mark.parametrize("name", ENCODERS)
@pytest.mark.parametrize("chunk", [None, 6])
def test_a_separate_encoder_objective_trains_in_float16(name, where, chunk):
    for seed in range(3):
        gradients = Gradients(seed)
        if where == "everything":  # compare from the same rounded numbers
            gradients.decoder.half().float()
            gradients.mu, gradients.logvar = gradients.mu.half().float(), gradients.logvar.half().float()
        expected = gradients(ENCODERS[name], "nowhere", chunk, torch.float32)
        got = gradients(ENCODERS[name], where, chunk)
        for g, e in zip(got, expected, strict=True):
            assert bool(g.isfinite().all())
            assert float((g - e).norm() / e.norm()) < 0.05


class Own(Likelihood):
    def log_prob(self, x, mean):
        return -0.5 * (x - mean).square() - 0.5 * math.log(2 * math.pi)


class Summed(Own):
    def log_prob(self, x, mean):
        return super().log_prob(x, mean).sum(-1)


OWN = {
    "own": Own(),
    "from_distribution": fastvae.likelihoods.from_distribution(
        lambda mean: td.Normal(mean, torch.ones_like(mean), validate_args=False)
    ),
}


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("masked", [False, True])
def test_a_custom_likelihood_is_summed_in_float32(name, dtype, masked):
    x = randn(B, 400, seed=1).to(dtype)
    decoder = nn.Linear(D, 400).to(DEVICE, dtype)
    q = randn(B, D, seed=2), 0.1 * randn(B, D, seed=3)
    mask = rand(B, 400, seed=4) < 0.7 if masked else None
    likelihood = OWN[name]
    options = {"likelihood": likelihood, "mask": mask, "k": K, "generator": generator(1)}
    got = fastvae.log_weights(x, q, lambda z: decoder(z.to(dtype)), **options)
    assert got.log_likelihood.dtype == torch.float32
    z = randn(K * B, D, seed=5)
    outputs = decoder(z.to(dtype))
    each = likelihood.log_prob(x.repeat(K, 1), outputs).reshape(K, B, -1).float()
    each = each if mask is None else torch.where(mask, each, 0)
    expected = each.double().sum(2).float()
    from fastvae.core.nested import Conditioning

    found = likelihood.log_likelihood(x, outputs, K, Conditioning.of(mask, None, None))
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("name", OWN)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("encoder", [None, IWAE(4)])
@pytest.mark.parametrize("objective", [IWAE(estimator="dreg"), IWAE(), Jackknife()], ids=repr)
def test_every_estimator_accepts_a_custom_likelihood_in_half_precision(name, dtype, encoder, objective):
    x, decoder = randn(B, X, seed=1), nn.Linear(D, X).to(DEVICE)
    results = []
    for kind in (torch.float32, dtype):
        mu = randn(B, D, seed=2).requires_grad_()
        value = fastvae.bound(
            x, (mu, torch.zeros_like(mu)), lambda z, kind=kind: decoder(z).to(kind), objective,
            q_objective=encoder, k=K, likelihood=OWN[name], generator=generator(1),
        )  # fmt: skip
        results.append((value, *torch.autograd.grad(value, mu)))
    (expected, grad), (got, found) = results
    assert got.dtype == torch.float32
    torch.testing.assert_close(got, expected, rtol=2e-2, atol=0)
    assert float((found - grad).norm() / grad.norm()) < 0.3


@pytest.mark.parametrize(
    "call",
    [
        lambda x, q, d: fastvae.iwae(x, q, d, k=K, estimator="dreg"),
        lambda x, q, d: fastvae.iwae(x, q, d, k=K, estimator="dreg", k_chunk=3),
        lambda x, q, d: fastvae.bound(x, q, d, IWAE(2, estimator="dreg"), k=8),
        lambda x, q, d: fastvae.log_weights(x, q, d, k=K, estimator="dreg"),
        lambda x, q, d: fastvae.bound(x, q, d, IWAE(), q_objective=IWAE(4), k=K),
    ],
)
def test_batch_norm_is_refused_where_samples_are_weighted_individually(call):
    """A batch norm in training mode is refused; in eval mode, or by other estimators, it is accepted."""
    x, q = randn(B, X, seed=1), (randn(B, D, seed=2), randn(B, D, seed=3))

    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6))
            self.mean, self.logvar = nn.Linear(6, X), nn.Linear(6, X)

        def forward(self, z):
            h = self.body(z)
            return self.mean(h), self.logvar(h)

    decoder = Pair().to(DEVICE)
    with pytest.raises(ValueError, match=r"decoder's body.1, a BatchNorm1d.*Use estimator='iwae'"):
        call(x, q, decoder)
    fastvae.iwae(x, q, decoder, k=K)
    fastvae.iwae(x, q, decoder, k=K, estimator="stl")
    fastvae.iwae(x, q, decoder, k=1, estimator="dreg")
    call(x, q, decoder.eval())
