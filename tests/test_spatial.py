"""Spatial latents: the same bits as flat ones with a decoder that reshapes them."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal, Distribution, TorchDistribution, as_posterior
from fastvae.distributions.spatial import ELEMENTWISE, flat_prior
from fastvae.likelihoods import Gaussian

from .conftest import DEVICE
from .models import evaluate_parts, generator, rand, randn, values_of

pytestmark = pytest.mark.usefixtures("one_thread")

K, B, X = 9, 5, 7
LATENT = C, H, W = 4, 2, 3
D = C * H * W
BERNOULLI = {"likelihood": "bernoulli"}


class Own(DiagonalNormal):
    """Subclass, for which nothing is fused."""


class Decoder(nn.Module):
    """Decoder z [N, C, H, W] -> logits [N, X] that records the shapes of z."""

    def __init__(self, latent=LATENT):
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            self.convolution = nn.Conv2d(latent[0], 6, 2, padding=1)
            self.linear = nn.Linear(6 * (latent[1] + 1) * (latent[2] + 1), X)
        self.to(DEVICE)
        self.came = []

    def forward(self, z):
        self.came.append(tuple(z.shape))
        return self.linear(self.convolution(z).tanh().flatten(1))


class Flat(nn.Module):
    """The same decoder of z [N, D], for comparison."""

    def __init__(self):
        super().__init__()
        self.whole = nn.Sequential(nn.Unflatten(1, LATENT), Decoder())

    def forward(self, z):
        return self.whole(z)


def parameters():
    """Return mu and logvar [B, C, H, W]."""
    return randn(B, *LATENT, seed=1).requires_grad_(), (0.5 * randn(B, *LATENT, seed=2)).requires_grad_()


def both(function, q, p=None):
    """Return a function's results of (q, decoder, prior, generator), spatial and flat, and all gradients."""
    found = []
    for decoder, flat in ((Decoder(), lambda t: t), (Flat(), lambda t: t.flatten(1))):
        mu, logvar = parameters()
        m, s = randn(*LATENT, seed=3).requires_grad_(), (0.5 + rand(C, 1, 1, seed=4)).requires_grad_()
        prior = p if p is None else p(m, s) if flat(mu) is mu else p(m.flatten(), s.expand(m.shape).flatten())
        results = function(q(flat(mu), flat(logvar)), decoder, prior, generator(5))
        leaves = [mu, logvar, m, s, *decoder.parameters()]
        grads = [None] * len(leaves)
        if results[0].requires_grad:
            values = torch.cat([r.reshape(-1) for r in results])
            upstream = 1 + torch.arange(len(values), dtype=values.dtype, device=DEVICE)
            grads = torch.autograd.grad(values, leaves, upstream, allow_unused=True)
        found.append([*results, *grads])
        if flat(mu) is mu:
            assert {shape[1:] for shape in decoder.came} == {LATENT}
    return found


def equal(found):
    spatial, flat = found
    assert len(spatial) == len(flat)
    for a, b in zip(spatial, flat, strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def objective(name, **options):
    function = getattr(fastvae, name)

    def run(q, decoder, prior, noise):
        given = {"generator": noise, **BERNOULLI, **options}
        if prior is not None:
            given["prior"] = prior
        result = function(rand(B, X, seed=6), q, decoder, **given)
        if dataclasses.is_dataclass(result):
            return tuple(v for name, v in vars(result).items() if name not in ("z", "output"))
        return tuple(result) if isinstance(result, tuple) else (result,)

    return run


OBJECTIVES = {
    "elbo": objective("elbo", k=3, reduction="none"),
    "elbo, terms": objective("elbo", beta=0.5, terms=True, row_offset=2),
    "elbo, free bits": objective("elbo", free_bits=0.2),
    "elbo, free bits of each example": objective("elbo", free_bits=0.2, free_bits_per="example"),
    "beta_tc": objective("beta_tc", k=2, reduction="none"),
    "beta_tc, terms": objective("beta_tc", beta=3.0, terms=True, row_offset=2),
    "elbo, mc": objective("elbo", kl="mc", k=2, reduction="sum"),
    "iwae": objective("iwae", k=K, reduction="none"),
    "dreg": objective("iwae", k=K, estimator="dreg"),
    "stl": objective("iwae", k=K, estimator="stl"),
    "iwae, chunks": objective("iwae", k=K, k_chunk=4),
    "dreg, chunks": objective("iwae", k=K, k_chunk=4, estimator="dreg", reduction="none"),
    "log_weights": objective("log_weights", k=K),
    "log_marginal": objective("log_marginal", k=23, k_chunk=8),
}


def pair(mu, logvar):
    return mu, logvar


@pytest.mark.parametrize("name", [*OBJECTIVES, "reconstruction_log_prob"])
def test_every_objective_equals_that_of_flat_latents(name, backend):
    if name in OBJECTIVES:
        equal(both(OBJECTIVES[name], pair, DiagonalNormal))
        equal(both(OBJECTIVES[name], pair))
    else:
        equal(both(objective(name, k=K, k_chunk=2), pair))


def side_by_side(mu, logvar):
    return torch.cat([mu, logvar], 1)


QS = {
    "tensor": side_by_side,
    "list": lambda mu, logvar: [mu, logvar],
    "channels last": lambda mu, logvar: (
        (mu.contiguous(memory_format=torch.channels_last), logvar) if mu.dim() == 4 else (mu, logvar)
    ),
    "object": lambda mu, logvar: types.SimpleNamespace(mean=mu, logvar=logvar),
    "diffusers": lambda mu, logvar: types.SimpleNamespace(
        latent_dist=types.SimpleNamespace(mean=mu, logvar=logvar)
    ),
    "mapping": lambda mu, logvar: {"embedding": mu, "log_covariance": logvar},
    "Normal": lambda mu, logvar: td.Normal(mu, logvar.exp()),
    "Independent": lambda mu, logvar: td.Independent(td.Normal(mu, logvar.exp()), mu.dim() - 1),
    "nested": lambda mu, logvar: td.Independent(td.Independent(td.Normal(mu, logvar.exp()), 1), 0),
    "DiagonalNormal": lambda mu, logvar: DiagonalNormal(mu, logvar, logvar_range=(-0.3, 0.4)),
    "a subclass": lambda mu, logvar: Own(mu, logvar, logvar_range=(-0.3, 0.4)),
    "a subclass with buffers": lambda mu, logvar: Own(mu.detach(), logvar.detach()),
    "Laplace": lambda mu, logvar: td.Laplace(mu, logvar.exp()),
    "LogNormal": lambda mu, logvar: td.Independent(td.LogNormal(mu, logvar.exp()), 1),
    "Gamma": lambda mu, logvar: td.Gamma(mu.exp(), logvar.exp()),
}


@pytest.mark.parametrize("name", QS)
def test_every_form_of_q(name):
    run = objective("iwae", k=K, k_chunk=4, estimator="dreg")
    prior = [DiagonalNormal] if name in ("LogNormal", "Gamma") else []
    equal(both(run, QS[name], *prior))
    equal(both(objective("elbo", kl="mc", k=2), QS[name], *prior))
    equal(both(objective("log_marginal", k=23), QS[name], DiagonalNormal))


PRIORS = {
    "DiagonalNormal, clamped": lambda m, s: DiagonalNormal(m, s, logvar_range=(0.8, 1.2)),
    "of each row": lambda m, s: DiagonalNormal(m.expand(B, *m.shape), s.expand(1, *m.shape)),
    "a subclass": Own,
    "Normal": lambda m, s: td.Normal(m, s),
    "Independent, 1": lambda m, s: td.Independent(td.Normal(m, s), 1),
    "Independent, all": lambda m, s: td.Independent(td.Normal(m, s), m.dim()),
    "Laplace": lambda m, s: td.Laplace(m, s),
    "Independent Laplace": lambda m, s: td.Independent(td.Laplace(m, s), m.dim()),
    "a number": lambda m, s: td.Laplace(0.0, 1.0),
}


@pytest.mark.filterwarnings("error::UserWarning")
@pytest.mark.parametrize("name", PRIORS)
def test_every_form_of_prior(name):
    # A flat Laplace with an event axis has no closed-form KL.
    kl = "mc" if name == "Independent Laplace" else "analytic"
    for run in (
        objective("elbo", k=3, reduction="none", kl=kl),
        objective("iwae", k=K, k_chunk=4, estimator="dreg"),
        objective("log_marginal", k=23),
    ):
        equal(both(run, pair, PRIORS[name]))


def test_a_flat_prior_is_accepted():
    """A flat learned prior [D], as in older checkpoints of decoders with an Unflatten, works too."""
    x, (mu, logvar), m, s = rand(B, X, seed=6), parameters(), randn(D, seed=3), randn(B, D, seed=4)
    values = [
        fastvae.elbo(x, (mu, logvar), Decoder(), prior=p, generator=generator(1), **BERNOULLI)
        for p in (
            DiagonalNormal(m, s),
            DiagonalNormal(m.view(LATENT), s),
            DiagonalNormal(m, s.view(B, *LATENT)),
        )
    ]
    assert values[0] == values[1] == values[2]
    values = [
        fastvae.iwae(x, (mu, logvar), Decoder(), k=K, prior=p, generator=generator(1), **BERNOULLI)
        for p in (td.Laplace(m, 1.0), td.Laplace(m.view(LATENT), 1.0))
    ]
    assert values[0] == values[1]


@pytest.mark.parametrize("flat", [False, True])
def test_a_conditional_prior(flat):
    """A conditional prior may return any form of an encoder's output, in either shape."""
    x, context, decoder = rand(B, X, seed=6), randn(B, 2, seed=7), Decoder()
    mu, logvar = parameters()
    m, s = randn(B, *LATENT, seed=3), randn(B, *LATENT, seed=4)

    def prior(context):
        both = m + context.sum(), s
        return torch.cat(both, 1) if not flat else tuple(t.flatten(1) for t in both)

    def with_context(z, context):
        assert z.shape[1:] == LATENT and context.shape == (K * B, 2)
        return decoder(z)

    options = {"k": K, **BERNOULLI}
    found = fastvae.iwae(
        x, (mu, logvar), with_context, prior=prior, context=context, generator=generator(1), **options
    )
    expected = fastvae.iwae(
        x,
        (mu, logvar),
        decoder,
        prior=DiagonalNormal(m + context.sum(), s),
        generator=generator(1),
        **options,
    )
    assert found == expected


def test_custom_priors_get_flat_z():
    came = []

    class Prior(Distribution):
        def log_prob(self, z):
            came.append(tuple(z.shape))
            return -z.abs().sum(-1)

    x, q, decoder = rand(B, X, seed=6), parameters(), Decoder()
    fastvae.iwae(x, q, decoder, k=K, prior=Prior(), estimator="dreg", **BERNOULLI)
    # Once more for some samples, to find the tensors the density depends on.
    assert set(came) == {(K, B, D), (2, B, D)} and decoder.came == [(K * B, *LATENT)]


def test_custom_posteriors_declare_the_shape():
    class Posterior(Distribution):
        batch, device, latent = B, DEVICE, LATENT
        dims = D

        def rsample_log_prob(self, samples, seed, **place):
            z = fastvae.random.normal(seed, samples, B, self.dims)
            return z, -0.5 * (z.square() + torch.tensor(2 * torch.pi).log()).sum(2)

    x, decoder = rand(B, X, seed=6), Decoder()
    zeros = torch.zeros(B, *LATENT, device=DEVICE)
    found = fastvae.iwae(x, Posterior(), decoder, k=K, generator=generator(1), **BERNOULLI)
    expected = fastvae.iwae(x, (zeros, zeros), decoder, k=K, generator=generator(1), **BERNOULLI)
    torch.testing.assert_close(found, expected)
    Posterior.dims = D + 1
    with pytest.raises(ValueError, match=r"latents have the shape \[4, 2, 3\], 24 numbers, but z has D = 25"):
        fastvae.iwae(x, Posterior(), decoder, k=K, **BERNOULLI)


# torch's families, against their own densities


def _correlated(mu, scale):
    """Return a distribution with event axis W and the others as batch."""
    factor = scale.unsqueeze(-1) * torch.tensor([[1.0, 0, 0], [0.5, 1, 0], [-0.3, 0.2, 1]], device=DEVICE)
    return td.MultivariateNormal(mu, scale_tril=factor)


def _flow(mu, scale):
    turn = td.transforms.AffineTransform(mu, scale)
    return td.TransformedDistribution(td.Normal(torch.zeros_like(mu), 1.0), [td.SigmoidTransform(), turn])


FAMILIES = {
    "correlated": _correlated,
    "flow": _flow,
    "Laplace": lambda mu, scale: td.Independent(td.Laplace(mu, scale), 2),
}


@pytest.mark.parametrize("as_q", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_log_weights_equal_torch(name, as_q):
    mu, logvar = (t.detach().double() for t in parameters())
    usual = td.Normal(mu, (0.5 * logvar).exp())
    if as_q:
        q, p = FAMILIES[name](mu, (0.5 * logvar).exp()), td.Normal(0.0, 1.0)
    else:
        # Draws of q reach every element of the prior.
        q, p = usual, FAMILIES[name](mu[0] - 100 * (name == "flow"), 200.0 * torch.ones_like(mu[0]))
    zs = []

    def decoder(z):
        zs.append(z)
        return z.double().flatten(1)[:, :X]

    x = rand(B, X, seed=6).double()
    found = fastvae.log_weights(x, q, decoder, k=K, prior=p, **BERNOULLI)
    z = zs[0].unflatten(0, (K, B))
    assert z.shape[2:] == LATENT
    log_p, log_q = (d.log_prob(z).flatten(2).sum(2) for d in (p, q))
    torch.testing.assert_close(found.log_ratio, log_p - log_q, rtol=1e-9, atol=1e-8)
    # Each draw's noise is at its address in any chunk.
    whole, parts = (
        fastvae.log_marginal(x, q, decoder, k=K, k_chunk=n, prior=p, generator=generator(1), **BERNOULLI)
        for n in (K, 2)
    )
    torch.testing.assert_close(whole.log_px, parts.log_px, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("family", ELEMENTWISE, ids=lambda family: family.__name__)
def test_a_flattened_family_keeps_its_type(family):
    """A flattened family is rebuilt from its parameters, its constructor's arguments by name."""
    names = ("high", "low") if family is td.Uniform else sorted(family.arg_constraints)
    d = family(**{name: i + rand(C, 1, 1, seed=i) + 0.1 for i, name in zip((2, 1, 3), names, strict=False)})
    flat = flat_prior(TorchDistribution(d), LATENT, B)
    z = d.expand(LATENT).sample((K, B))
    torch.testing.assert_close(
        flat.log_prob(z.flatten(2)), d.log_prob(z).flatten(2).sum(2), rtol=1e-5, atol=1e-4
    )


@pytest.mark.filterwarnings("error")
def test_closed_forms_of_torch_are_used():
    x, (mu, logvar) = rand(B, X, seed=6), parameters()
    q, p = td.Laplace(mu, logvar.exp()), td.Laplace(randn(C, 1, 1, seed=3), 1.0)
    terms = fastvae.elbo(x, td.Independent(q, 3), Decoder(), prior=p, terms=True, **BERNOULLI)
    expected = td.kl_divergence(q, p.expand(LATENT)).flatten(1).sum(1)
    torch.testing.assert_close(terms.kl, expected, rtol=1e-5, atol=1e-5)


# Modules and data sets


class Encoder(nn.Module):
    """Encoder of images [B, 1, 5, 7] -> channels [B, 2 C, H, W], mu and then logvar."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.Conv2d(1, 2 * C, (4, 5))

    def forward(self, x):
        return self.convolution(x)


class Pictures(nn.Module):
    """Decoder z [N, C, H, W] -> logits [N, 1, 5, 7]."""

    def __init__(self):
        super().__init__()
        self.convolution = nn.ConvTranspose2d(C, 1, (4, 5))

    def forward(self, z):
        return self.convolution(z)


def convolutional(**options):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return fastvae.VAE(Encoder(), Pictures(), **BERNOULLI, **options).to(DEVICE)


@pytest.mark.parametrize("fuse", [False, True])
def test_a_convolutional_vae(fuse):
    x = rand(B, 1, 5, 7, seed=1)
    vae = convolutional(fuse=fuse)
    with pytest.raises(ValueError, match=r"latent_dim=D\), or a shape \(C, H, W\)"):
        vae.sample(2)
    flat = fastvae.VAE(
        lambda x: [t.flatten(1) for t in vae.encoder(x).chunk(2, 1)],
        lambda z: vae.decoder(z.unflatten(1, LATENT)),
        modules=[vae.encoder, vae.decoder],
        **BERNOULLI,
    )
    for options in ({}, {"objective": "iwae", "k": K, "estimator": "stl"}):
        found = [model(x, generator=generator(1), **options) for model in (vae, flat)]
        assert found[0] == found[1]
    assert vae.latent_dim == LATENT and flat.latent_dim == D
    q = vae.posterior(x)
    assert q.mean.shape == (B, D) and q.latent == LATENT and q.rows(1, 3).latent == LATENT
    assert torch.equal(vae.reconstruct(x), vae.decoder(q.mean.view(B, *LATENT)).sigmoid())
    assert torch.equal(vae.sample(3, generator=generator(2)), flat.sample(3, generator=generator(2)))
    assert vae.sample(3, mean=True).shape == (3, 1, 5, 7)
    for method, options in (("log_marginal", {"k": 30}), ("reconstruction_log_prob", {"k": 20})):
        a, b = (getattr(model, method)(x, generator=generator(3), **options) for model in (vae, flat))
        assert all(map(torch.equal, values_of(a), values_of(b)))
    # The posterior object may replace the encoder's output.
    bound = fastvae.elbo(x, q, vae.decoder, generator=generator(1), **BERNOULLI)
    assert bound == vae(x, generator=generator(1))
    assert fastvae.elbo(x[1:3], q.rows(1, 3), vae.decoder, **BERNOULLI).isfinite()


@pytest.mark.parametrize("name", ["none", *(n for n in PRIORS if n != "of each row")])
def test_sampling_before_encoding(name):
    m, s = randn(*LATENT, seed=3), 0.5 + rand(C, 1, 1, seed=4)
    priors = [None if name == "none" else PRIORS[name](m, s)]
    priors.append(None if name == "none" else PRIORS[name](m.flatten(), s.expand(LATENT).flatten()))
    drawn = []
    for prior, latent in zip(priors, (LATENT, D), strict=True):
        vae = convolutional(prior=prior, latent_dim=latent)
        vae.decoder.register_forward_pre_hook(lambda _, args: (args[0].reshape(-1, *LATENT),))
        drawn.append(vae.sample(3, generator=generator(1)))
    assert torch.equal(*drawn)


def test_sampling_with_a_conditional_prior():
    def prior(context):
        mu = context.view(-1, C, 1, 1).expand(-1, *LATENT)
        return DiagonalNormal(mu, torch.full((C, 1, 1), -99.0))

    vae = fastvae.VAE(
        lambda x, context: randn(B, 2 * C, H, W, seed=1),
        lambda z, context: z,
        likelihood=Gaussian(scale=1.0),
        prior=prior,
        latent_dim=list(LATENT),
        modules=[],
    ).cpu()
    context = torch.arange(3.0 * C).view(3, C)
    torch.testing.assert_close(
        vae.sample(3, mean=True, context=context), context.view(3, C, 1, 1).expand(3, *LATENT)
    )


@pytest.mark.parametrize(
    ("latent", "exception", "words"),
    [
        ((4, 0), ValueError, "each of latent_dim must be at least 1"),
        ((), ValueError, r"latent_dim is \(\), a shape without axes"),
        ("4", TypeError, r"latent_dim must be an int, .* such as \(C, H, W\)"),
        ((4, 2.0), TypeError, "each of latent_dim must be an int"),
    ],
)
def test_a_wrong_latent_dim(latent, exception, words):
    with pytest.raises(exception, match=words):
        convolutional(latent_dim=latent)


def test_evaluate_equals_that_of_flat_latents(tmp_path):
    x = rand(23, 1, 5, 7, seed=1)
    vae = convolutional()

    def encoder(x):
        return [t.flatten(1) for t in vae.encoder(x).chunk(2, 1)]

    def decoder(z):
        return vae.decoder(z.unflatten(1, LATENT))

    for options in (
        {"k": 40, "batch_size": 10},
        {"k": 400, "tol": 0.1, "batch_size": 10},
        {"k": 40, "prior": td.Normal(torch.zeros(C, 1, 1, device=DEVICE), 1.5)},
        {"k": 40, "prior": DiagonalNormal(randn(*LATENT, seed=2), randn(C, 1, 1, seed=3))},
    ):
        options = {"progress": False, **BERNOULLI, **options}
        spatial = evaluate_parts(vae.encoder, vae.decoder, x, generator=generator(1), **options)
        if isinstance(options.get("prior"), DiagonalNormal):
            p = options["prior"]
            options["prior"] = DiagonalNormal(p.mu.flatten(), p.logvar.expand(LATENT).flatten())
        elif "prior" in options:
            options["prior"] = td.Normal(torch.zeros(D, device=DEVICE), 1.5)
        flat = evaluate_parts(encoder, decoder, x, generator=generator(1), **options)
        for name in ("log_px", "log_px_stderr", "ess", "khat", "kl_per_dim"):
            a, b = (torch.as_tensor(getattr(result, name)) for result in (spatial, flat))
            assert torch.equal(a.nan_to_num(), b.nan_to_num()), name
        assert spatial.kl_per_dim.shape == (D,)

    # A checkpoint is resumed, by the module too.
    file = tmp_path / "run.npz"
    options = {"k": 40, "batch_size": 10, "progress": False, "checkpoint": file, **BERNOULLI}
    first = evaluate_parts(vae.encoder, vae.decoder, x, generator=generator(1), **options)
    vae.decoder.register_forward_pre_hook(lambda _, args: (args[0].clone(),))
    again = evaluate_parts(vae.encoder, vae.decoder, x, generator=generator(1), **options)
    assert torch.equal(torch.as_tensor(first.log_px), torch.as_tensor(again.log_px))


def test_a_decoder_with_a_fused_last_layer():
    """A decoder that flattens z, with an output large enough, fuses its last layer."""
    b, features, k = 40, 400, 50
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        decoder = nn.Sequential(nn.Flatten(), nn.Linear(D, 20), nn.ReLU(), nn.Linear(20, features)).to(DEVICE)
    x, q = rand(b, features, seed=1).round(), randn(b, 2 * C, H, W, seed=2).requires_grad_()
    layers = fastvae.FusedHead(decoder[:3], decoder[3])
    results = []
    for d, given in ((decoder, q), (layers, q), (layers, q.chunk(2, 1)[0:2])):
        bound = fastvae.iwae(x, given, d, k=k, generator=generator(1), **BERNOULLI)
        results.append([bound, *torch.autograd.grad(bound, [q, *decoder.parameters()])])
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4 * float(a.detach().abs().max()))


def test_a_graphed_step():
    vae = convolutional()
    optimizer = torch.optim.SGD(vae.parameters(), 0.1)

    def step(x):
        optimizer.zero_grad()
        loss = -vae(x, objective="iwae", k=K)
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = fastvae.graphed(step)
    for _ in range(5):
        assert step(rand(B, 1, 5, 7, seed=1)).isfinite()


def test_a_decoder_that_changes_z_in_place(backend):
    mu, logvar = parameters()
    bound = fastvae.iwae(
        rand(B, X, seed=6), (mu, logvar), lambda z: z.mul_(2).flatten(1)[:, :X], k=K, **BERNOULLI
    )
    assert all(g.isfinite().all() for g in torch.autograd.grad(bound, (mu, logvar)))


@pytest.mark.parametrize("prior", [None, "DiagonalNormal", "Normal"])
@pytest.mark.parametrize("name", ["elbo", "dreg"])
def test_compiled(name, prior):
    decoder = Decoder()

    def loss(x, q, m, s):
        p = None if prior is None else DiagonalNormal(m, s)
        if prior == "Normal":
            p = td.Normal(m, s.exp(), validate_args=False)
        options = {"prior": p, **BERNOULLI}
        if name == "elbo":
            return fastvae.elbo(x, q.chunk(2, 1), decoder, k=2, **options)
        return fastvae.iwae(x, q, decoder, k=K, estimator="dreg", **options)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = []
    for function in (loss, compiled):
        q = randn(B, 2 * C, H, W, seed=1).requires_grad_()
        m, s = randn(*LATENT, seed=3).requires_grad_(), randn(C, 1, 1, seed=4).requires_grad_()
        leaves = [q, *decoder.parameters(), *([] if prior is None else [m, s])]
        torch.manual_seed(3)
        value = function(rand(B, X, seed=6), q, m, s)
        results.append([value, *torch.autograd.grad(value, leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_an_error_in_the_decoder_shows_the_shape_of_z():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied") as caught:
        fastvae.elbo(rand(B, X, seed=6), parameters(), nn.Linear(D, X).to(DEVICE), **BERNOULLI)
    if hasattr(caught.value, "__notes__"):  # Python 3.11
        assert "z [N, *latent] = [5, 4, 2, 3]" in caught.value.__notes__[0]


def test_latents_of_one_extra_axis():
    """Latents may have one extra axis, [B, 2 C, L], as for sequences."""
    x, q = rand(B, X, seed=6), randn(B, 2 * C, 5, seed=1)
    came = []

    def decoder(z):
        came.append(tuple(z.shape))
        return z.flatten(1)[:, :X]

    assert fastvae.elbo(x, q, decoder, k=2, **BERNOULLI).isfinite() and came == [(2 * B, C, 5)]


def test_a_latent_dim_of_one_axis_equals_an_int():
    """latent_dim=(D,) is equivalent to latent_dim=D."""
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(X, 6).to(DEVICE), nn.Linear(3, X).to(DEVICE)
    one, other = (fastvae.VAE(encoder, decoder, latent_dim=dim, **BERNOULLI) for dim in ((3,), 3))
    x = rand(B, X, seed=6)
    assert one.latent_dim == other.latent_dim == 3
    assert torch.equal(one.sample(4, generator=generator(1)), other.sample(4, generator=generator(1)))
    assert torch.equal(one.iwae(x, 5, generator=generator(1)), other.iwae(x, 5, generator=generator(1)))


def test_an_empty_batch(backend):
    q = torch.zeros(0, 2 * C, H, W, device=DEVICE)
    x = torch.zeros(0, X, device=DEVICE)
    assert fastvae.iwae(x, q, Decoder(), k=K, reduction="none", **BERNOULLI).shape == (0,)


def test_moments_of_flattened_latents():
    """Moments of a posterior [B, *latent] are flat, and its entropy is summed over all latents."""
    loc, scale = randn(B, *LATENT, seed=1), randn(B, *LATENT, seed=2).exp()
    root = torch.diag_embed(scale)
    for d in (
        td.Laplace(loc, scale),
        td.FisherSnedecor(5 + scale, 5 + scale),
        td.MultivariateNormal(loc, scale_tril=root),
    ):
        flat = as_posterior(d)
        for word in ("mean", "variance", "stddev"):
            expected = getattr(d, word).reshape(B, -1)
            torch.testing.assert_close(getattr(flat, word), expected, msg=word)
        try:
            entropy = d.entropy()
        except NotImplementedError:
            with pytest.raises(NotImplementedError, match="has no entropy in closed form"):
                flat.entropy()
            continue
        torch.testing.assert_close(flat.entropy(), entropy.reshape(B, -1).sum(1), rtol=1e-5, atol=1e-4)
