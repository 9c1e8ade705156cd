"""Results of objectives: frozen, with draws and outputs on which further losses train."""

from __future__ import annotations

import dataclasses
import io

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.distributions import FullNormal, Laplace, Mixture
from fastvae.objectives.beta_tc import BetaTCTerms
from fastvae.objectives.bounds import CIWAE, IWAE, Jackknife, WakePhi
from fastvae.objectives.log_weights import LogWeights
from fastvae.objectives.marginalize import Marginal

from .conftest import DEVICE
from .models import generator, rand, randn

B, D, X, K = 5, 3, 7, 6
WIDE = {"dtype": torch.float64}
BERNOULLI = {"likelihood": "bernoulli"}


def model():
    """Return x, leaves mu, logvar and weight, and a decoder of the weight."""
    x = rand(B, X, seed=1, **WIDE).round()
    leaves = [randn(*s, seed=i, **WIDE).requires_grad_() for i, s in enumerate(((B, D), (B, D), (D, X)))]
    return x, leaves, lambda z: z @ leaves[2]


def extra(terms):
    """Return a loss on draws and outputs, different for every number."""
    return (terms.z.sin() * randn(K, B, D, seed=8, **WIDE)).sum() + (
        terms.output.tanh() * randn(K * B, X, seed=9, **WIDE)
    ).sum()


def plain(noise, x, mu, logvar, weight, loss):
    """Return the log weights of plain PyTorch, and the further loss, for this noise [K, B, D]."""
    z = mu + (0.5 * logvar).exp() * noise
    output = z @ weight
    log_px = td.Bernoulli(logits=output, validate_args=False).log_prob(x).sum(2)
    log_q = td.Normal(mu, (0.5 * logvar).exp()).log_prob(z).sum(2)
    log_w = log_px + td.Normal(0.0, 1.0).log_prob(z).sum(2) - log_q
    return log_w, loss(fastvae.Terms(log_px, log_px, log_px, z, output.flatten(0, 1)))


OBJECTIVES = {
    "elbo": (lambda *a, **o: fastvae.elbo(*a, kl="mc", **o), lambda w: w.mean(0)),
    "iwae": (fastvae.iwae, lambda w: w.logsumexp(0)),
    "qmc": (lambda *a, **o: fastvae.iwae(*a, noise="qmc", **o), lambda w: w.logsumexp(0)),
    "miwae": (
        lambda *a, **o: fastvae.bound(*a, IWAE(groups=2), **o),
        lambda w: w.unflatten(0, (2, -1)).logsumexp(1).mean(0),
    ),
    "ciwae": (
        lambda *a, **o: fastvae.bound(*a, CIWAE(0.3), **o),
        lambda w: 0.3 * w.mean(0) + 0.7 * w.logsumexp(0),
    ),
    "composed": (
        lambda *a, **o: fastvae.bound(*a, Jackknife(), **o),
        lambda w: K * w.logsumexp(0) - (K - 1) * torch.stack(
            [torch.cat([w[:i], w[i + 1 :]]).logsumexp(0) for i in range(K)]
        ).mean(0),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OBJECTIVES)
def test_losses_on_draws_and_outputs_train_as_in_plain_autograd(name, backend):
    """Further losses on terms.z and terms.output give the gradients of plain autograd code."""
    objective, written_out = OBJECTIVES[name]
    x, leaves, decoder = model()
    mu, logvar, _ = leaves
    terms = objective(x, (mu, logvar), decoder, k=K, terms=True, generator=generator(3), **BERNOULLI)
    assert terms.z.shape == (K, B, D) and terms.output.shape == (K * B, X)
    torch.testing.assert_close(terms.output, decoder(terms.z.flatten(0, 1)), rtol=1e-12, atol=1e-12)
    noise = ((terms.z - mu) / (0.5 * logvar).exp()).detach()
    log_w, other = plain(noise, x, *leaves, extra)
    for weight in (0.0, 0.7):
        found = torch.autograd.grad(terms.bound.sum() + weight * extra(terms), leaves, retain_graph=True)
        expected = torch.autograd.grad(written_out(log_w).sum() + weight * other, leaves, retain_graph=True)
        for got, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ["full", "laplace", "latents of a shape", "float16", "mixture"])
def test_z_is_the_input_of_the_decoder(family):
    x, (mu, logvar, weight), _ = model()
    came = []

    def decoder(z):
        came.append(z)
        return z.double().flatten(1) @ weight

    q = {
        "full": lambda: FullNormal(mu, randn(B, 6, seed=5, **WIDE)),
        "laplace": lambda: Laplace(mu, logvar),
        "latents of a shape": lambda: (mu.unflatten(1, (1, D)), logvar.unflatten(1, (1, D))),
        "float16": lambda: td.Normal(mu.half(), logvar.exp().half()),
        "mixture": lambda: Mixture([(mu, logvar), (mu + 1, logvar)], torch.tensor([0.3, 0.1])),
    }[family]()
    options = {"k": K, "terms": True, **BERNOULLI}
    for objective, more in (
        (fastvae.elbo, {} if family != "mixture" else {"kl": "mc"}),
        (fastvae.elbo, {"kl": "mc"}),
        (fastvae.iwae, {}),
        (fastvae.iwae, {"estimator": "stl", "k_chunk": K}),
    ):
        came.clear()
        terms = objective(x, q, decoder, **options, **more)
        (z,) = came
        assert terms.z.dtype == z.dtype and terms.z.shape == (K, B, *z.shape[1:])
        assert torch.equal(terms.z.flatten(0, 1), z)
        assert torch.autograd.grad(terms.z.double().square().sum(), mu, retain_graph=True)[0].abs().sum() > 0
        assert torch.equal(terms.output, z.double().flatten(1) @ weight)


def test_output_is_as_the_decoder_returned_it():
    x, (mu, logvar, weight), _ = model()
    last = {}

    def decoder(z):
        last["output"] = {"mean": z @ weight, "log_scale": (z @ weight).tanh()}
        return tuple(last["output"].values())

    terms = fastvae.elbo(x, (mu, logvar), decoder, k=2, terms=True)
    assert type(terms.output) is tuple
    assert all(a is b for a, b in zip(terms.output, last["output"].values(), strict=True))


def test_output_includes_a_fused_last_layer():
    """The output is the real one with FusedHead, and with a VAE that would fuse the last layer."""
    features, rows = 300, 40
    x = rand(rows, features, seed=1).round()
    body, layer = nn.Sequential(nn.Linear(D, 4), nn.Tanh()).to(DEVICE), nn.Linear(4, features).to(DEVICE)
    encoder = nn.Linear(features, 2 * D).to(DEVICE)
    for decoder in (fastvae.FusedHead(body, layer), nn.Sequential(body, layer)):
        vae = fastvae.VAE(encoder, decoder, latent_dim=D, **BERNOULLI)
        terms = vae(x, objective="iwae", k=100, terms=True, generator=generator(1))
        z = terms.z.flatten(0, 1)
        torch.testing.assert_close(terms.output, layer(body(z)))
        bound = vae.iwae(x, 100, generator=generator(1))
        torch.testing.assert_close(terms.bound.mean(), bound, rtol=1e-5, atol=1e-3)


NONE = {
    "chunks": {"k_chunk": 4},
    "dreg": {"objective": IWAE(estimator="dreg")},
    "dreg of chunks": {"objective": IWAE(estimator="dreg"), "k_chunk": 2},
    "composed dreg": {"objective": Jackknife(estimator="dreg")},
    "q_objective": {"q_objective": IWAE(groups=2)},
    "the score": {"q_objective": WakePhi()},
}


@pytest.mark.parametrize("name", NONE)
def test_draws_are_omitted_where_a_loss_would_not_reach_q(name):
    x, (mu, logvar, _), decoder = model()
    options = {"objective": IWAE(), **NONE[name]}
    terms = fastvae.bound(x, (mu, logvar), decoder, k=K, terms=True, **options, **BERNOULLI)
    assert terms.z is None and terms.output is None and terms.bound.shape == (B,)


RESULTS = (fastvae.Terms, BetaTCTerms, LogWeights, Marginal)


@pytest.mark.parametrize("kind", RESULTS)
def test_results_are_frozen_and_cannot_be_unpacked(kind):
    names = [f.name for f in dataclasses.fields(kind)]
    result = kind(*torch.eye(len(names)))
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, names[0], None)
    for misuse in (lambda: [*result], lambda: result[0], lambda: len(result)):
        with pytest.raises(TypeError, match=kind.__name__):
            misuse()
    leaves, spec = torch.utils._pytree.tree_flatten(result)
    assert len(leaves) == len(names) and type(torch.utils._pytree.tree_unflatten(leaves, spec)) is kind
    assert all(f"{name}=" in repr(result) for name in names)


class Net(nn.Module):
    """Model that returns all terms of an objective."""

    def __init__(self, objective, **options):
        super().__init__()
        self.vae = fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), latent_dim=D, **BERNOULLI)
        self.objective, self.options = objective, options

    def forward(self, x):
        return self.vae(x, objective=self.objective, terms=True, **self.options)


COMPILED = {
    "elbo": ("elbo", {"k": 2}),
    "iwae": ("iwae", {"k": 2}),
    "dreg": ("iwae", {"k": 2, "estimator": "dreg"}),
    "chunks": ("iwae", {"k": 2, "k_chunk": 1}),
    "beta_tc": ("beta_tc", {}),
    "ciwae": (CIWAE(0.5), {"k": 2}),
}


@pytest.mark.parametrize("name", COMPILED)
def test_terms_are_results_of_compiled_functions(name):
    objective, options = COMPILED[name]
    net, x = Net(objective, **options), torch.rand(B, X, generator=torch.Generator().manual_seed(1)).round()
    torch._dynamo.reset()
    results = []
    for run in (net, torch.compile(net, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(3)
        terms = run(x)
        value = terms.bound.sum()
        if terms.z is not None:
            value = value + terms.z.sin().sum() + terms.output.tanh().sum()
        gradients = torch.autograd.grad(value, list(net.parameters()))
        results.append((type(terms), vars(terms), gradients))
    (kind, eager, expected), (same, compiled, got) = results
    assert kind is same and list(eager) == list(compiled)
    torch.testing.assert_close(compiled, eager, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["elbo", "iwae"])
def test_terms_are_results_of_exported_programs(name):
    objective, options = COMPILED[name]
    net, x = Net(objective, **options), torch.rand(B, X, generator=torch.Generator().manual_seed(1)).round()
    rows = torch.export.Dim("rows", min=2, max=100)
    program = torch.export.export(net, (x,), dynamic_shapes=({0: rows},))
    buffer = io.BytesIO()
    torch.export.save(program, buffer)
    buffer.seek(0)
    terms = torch.export.load(buffer).module()(torch.cat([x, x]))
    assert type(terms) is fastvae.Terms
    assert terms.bound.shape == (2 * B,) and terms.z.shape[1:] == (2 * B, D)


def test_compiled_log_weights():
    x, decoder, encoder = torch.rand(B, X).round(), nn.Linear(D, X), nn.Linear(X, 2 * D)
    torch._dynamo.reset()

    @torch.compile(fullgraph=True, backend="eager")
    def run():
        return fastvae.log_weights(x, encoder(x), decoder, k=K, **BERNOULLI)

    parts = run()
    assert type(parts) is LogWeights and parts.log_ratio.shape == (K, B)
