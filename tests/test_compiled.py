"""torch.compile of every entry point, in one graph and with graph breaks; posteriors as plain objects."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.distributions import (
    DiagonalNormal,
    Distribution,
    Exponential,
    FullNormal,
    Laplace,
    LowRankNormal,
    Mixture,
    NormalMixture,
    StandardNormal,
    StudentT,
)

from .models import randn

pytestmark = pytest.mark.usefixtures("one_thread")

B, D, X, K = 5, 3, 7, 6
BERNOULLI = {"likelihood": "bernoulli"}


class Decoder(nn.Module):
    """Decoder of logits, with a statement that a compiler cannot trace before them."""

    def __init__(self, statement="none"):
        super().__init__()
        self.statement, self.layer = statement, nn.Linear(D, X)

    @torch.compiler.disable
    def skipped(self, z):
        return z

    def forward(self, z):
        if self.statement == "print":
            print("z", tuple(z.shape))
        elif self.statement == "item" and z.detach().square().sum().item() < 0:
            z = -z
        elif self.statement == "disable":
            z = self.skipped(z)
        return self.layer(z)


def _vae(statement="none"):
    torch.manual_seed(0)
    return fastvae.VAE(nn.Linear(X, 2 * D), Decoder(statement), latent_dim=D, **BERNOULLI)


def _x():
    return torch.rand(B, X, generator=torch.Generator().manual_seed(1)).round()


def _compare(function, *, fullgraph=False, backend="eager", leaves=()):
    """Assert that values and gradients of the leaves equal those of eager mode."""
    torch._dynamo.reset()
    results = []
    with torch._inductor.config.patch(fallback_random=True):
        for run in (function, torch.compile(function, fullgraph=fullgraph, backend=backend)):
            torch.manual_seed(3)
            value = run()
            results.append([value.detach()])
            if leaves and value.requires_grad:
                results[-1] += torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


# Each returns a tensor. Entries that loop, or search for modules, break the graph themselves.
ENTRIES = {
    "elbo": lambda v, x: v(x),
    "iwae": lambda v, x: v(x, objective="iwae", k=K),
    "dreg": lambda v, x: v.iwae(x, k=K, estimator="dreg"),
    "k_chunk": lambda v, x: v.iwae(x, k=K, k_chunk=4),
    "bound": lambda v, x: v(x, objective=fastvae.bounds.CIWAE(0.5), k=K),
    "beta_tc": lambda v, x: v(x, objective="beta_tc", dataset_size=100),
    "sleep": lambda v, x: v(B, objective="sleep"),
    "log_marginal": lambda v, x: v(x, objective="log_marginal", k=K).log_px,
    "log_weights": lambda v, x: fastvae.log_weights(x, v.encoder(x), v.decoder, k=K, **BERNOULLI).log_ratio,
    "ais": lambda v, x: fastvae.audit.ais(x, v.encoder(x), v.decoder, steps=2, k=2, **BERNOULLI).log_px,
    "reconstruction_log_prob": lambda v, x: v.reconstruction_log_prob(x, k=K),
    "reconstruct": lambda v, x: v.reconstruct(x),
    "posterior": lambda v, x: v.posterior(x).log_prob(torch.zeros(2, B, D)),
    "generator": lambda v, x: v.iwae(x, k=K, generator=torch.Generator().manual_seed(5)),
}


# One objective represents those that share its code.
SLOW = {"log_marginal", "beta_tc", "ais"}
BROKEN = [
    pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in ENTRIES if name != "dreg"
]


@pytest.mark.parametrize("entry", BROKEN)
def test_every_entry_works_across_a_graph_break(entry):
    vae, x = _vae("disable"), _x()
    _compare(lambda: ENTRIES[entry](vae, x), leaves=list(vae.parameters()))


@pytest.mark.parametrize("statement", ["print", "item"])
def test_statements_that_break_the_graph(statement):
    vae, x = _vae(statement), _x()
    _compare(lambda: vae.iwae(x, k=K), leaves=list(vae.parameters()))


# The others are compiled as one graph in their own tests.
WHOLE = ["dreg", "sleep", "log_weights", "reconstruction_log_prob", "reconstruct", "posterior"]


@pytest.mark.parametrize("entry", WHOLE)
def test_every_entry_compiles_to_one_graph(entry):
    vae, x = _vae(), _x()
    _compare(lambda: ENTRIES[entry](vae, x), fullgraph=True, leaves=list(vae.parameters()))


@pytest.mark.parametrize("statement", ["none", "disable"])
def test_inductor(statement):
    vae, x = _vae(statement), _x()
    fullgraph = statement == "none"
    _compare(lambda: vae.iwae(x, k=K), fullgraph=fullgraph, backend="inductor", leaves=list(vae.parameters()))


# Forms of an encoder's output, computed from h [B, 2 D].
POSTERIORS = {
    "tensor": lambda h: h,
    "pair": lambda h: h.chunk(2, 1),
    "td.Normal": lambda h: td.Normal(h[:, :D], h[:, D:].exp(), validate_args=False),
    "td.Laplace": lambda h: td.Laplace(h[:, :D], h[:, D:].exp(), validate_args=False),
    "td.MultivariateNormal": lambda h: td.MultivariateNormal(
        h[:, :D], scale_tril=torch.diag_embed(h[:, D:].exp()), validate_args=False
    ),
    "DiagonalNormal": lambda h: DiagonalNormal(h[:, :D], h[:, D:], scale_form="softplus"),
    "FullNormal": lambda h: FullNormal(h[:, :D], torch.cat([h, h], 1)[:, : D * (D + 1) // 2]),
    "LowRankNormal": lambda h: LowRankNormal(h[:, :D], h[:, D:], h[:, :D, None]),
    "StudentT": lambda h: StudentT(h[:, :D], h[:, D:], 4.0),
    "Mixture": lambda h: Mixture([h.chunk(2, 1), Laplace(h[:, :D], h[:, D:])]),
}


@pytest.mark.parametrize("name", [n for n in POSTERIORS if n not in ("tensor", "LowRankNormal", "StudentT")])
def test_every_posterior_works_across_a_graph_break(name):
    """Graph breaks in the encoder, between networks and objective, and in the decoder all work."""
    encoder, decoder, x = nn.Linear(X, 2 * D), Decoder("disable"), _x()

    def run():
        q = POSTERIORS[name](encoder(x))
        torch._dynamo.graph_break()
        return fastvae.iwae(x, q, decoder, k=K, **BERNOULLI)

    _compare(run, leaves=[*encoder.parameters(), *decoder.parameters()])


DRAWN_BY_TORCH = {
    "Gamma": lambda t: td.Gamma(t.exp(), 1 + t.exp(), validate_args=False),
    "Beta": lambda t: td.Beta(t.exp(), 1 + t.exp(), validate_args=False),
    "Dirichlet": lambda t: td.Dirichlet(t.exp(), validate_args=False),
    "RelaxedOneHotCategorical": lambda t: td.RelaxedOneHotCategorical(
        torch.tensor(0.7), logits=t, validate_args=False
    ),
    "RelaxedBernoulli": lambda t: td.RelaxedBernoulli(torch.tensor(0.7), logits=t, validate_args=False),
    "StudentT": lambda t: td.StudentT(3 + t.exp(), t, t.exp(), validate_args=False),
    "FisherSnedecor": lambda t: td.FisherSnedecor(4 + t.exp(), 5 + t.exp(), validate_args=False),
}


@pytest.mark.parametrize("name", DRAWN_BY_TORCH)
def test_torch_samplers_compile_to_one_graph(name):
    encoder, decoder, x = nn.Linear(X, D), Decoder(), _x()
    prior = DRAWN_BY_TORCH[name](torch.zeros(D))

    def run():
        q = DRAWN_BY_TORCH[name](encoder(x))
        return fastvae.iwae(x, q, decoder, k=K, prior=prior, **BERNOULLI)

    _compare(run, fullgraph=True, backend="aot_eager", leaves=[*encoder.parameters(), *decoder.parameters()])


class Closure(Distribution):
    """A user's q whose parameters are attributes, and reached by the density as such or in a closure."""

    batch, device = B, torch.device("cpu")

    def __init__(self, mu, log_scale, hidden):
        self.mu, self.log_scale = mu, log_scale
        self.parameters_of = (lambda: (mu, log_scale)) if hidden else None

    def rsample_log_prob(self, samples, seed, *, sample_offset=0, row_offset=0):
        place = {"sample_offset": sample_offset, "row_offset": row_offset}
        noise = fastvae.random.normal(seed, samples, B, D, **place)
        z = self.mu + self.log_scale.exp() * noise
        return z, self.log_prob(z)

    def log_prob(self, z):
        mu, log_scale = (self.mu, self.log_scale) if self.parameters_of is None else self.parameters_of()
        return td.Normal(mu, log_scale.exp(), validate_args=False).log_prob(z).sum(-1)


@pytest.mark.parametrize("k_chunk", [None, 4])
@pytest.mark.parametrize("estimator", ["stl", "dreg"])
def test_a_density_that_cannot_be_frozen_is_an_error(estimator, k_chunk):
    encoder, decoder, x = nn.Linear(X, 2 * D), nn.Linear(D, X), _x()

    def bound(hidden):
        q = Closure(*encoder(x).chunk(2, 1), hidden)
        return fastvae.iwae(x, q, decoder, k=K, k_chunk=k_chunk, estimator=estimator, **BERNOULLI)

    _compare(lambda: bound(False), backend="aot_eager", leaves=[*encoder.parameters(), *decoder.parameters()])
    for run in (bound, torch.compile(bound, backend="aot_eager")):
        with pytest.raises(RuntimeError, match=r"needs Closure\.log_prob with its parameters frozen"):
            run(True)


# Posteriors and priors as objects


def _made(name):
    return (
        fastvae.VAE(
            nn.Linear(X, 2 * D),
            nn.Linear(D, X),
            **BERNOULLI,
        ).posterior(_x())
        if name == "read"
        else POSTERIORS[name](randn(B, 2 * D, seed=4).cpu().requires_grad_() * 0.3)
    )


OBJECTS = ["read", *(name for name in POSTERIORS if name[0].isupper())]


@pytest.mark.parametrize("name", OBJECTS)
def test_a_posterior_is_a_plain_object(name):
    q = _made(name)
    z = torch.full((2, B, D), 0.3)
    expected = q.log_prob(z)
    assert isinstance(q, Distribution) and not isinstance(q, nn.Module)
    assert type(q).__name__ in repr(q) and "log_prob" in dir(q)
    assert list(q.parameters()) == [] and q.state_dict() == {}
    for copied in (pickle.loads(pickle.dumps(q)), copy.copy(q), copy.deepcopy(q), q.to("cpu")):
        assert type(copied) is type(q) and copied.batch == B
        torch.testing.assert_close(copied.log_prob(z), expected)
    assert copy.deepcopy(q).log_prob(z).requires_grad
    wide = q.to(torch.float64)
    assert wide.log_prob(z.double()).dtype == torch.float64 and q.log_prob(z).dtype == torch.float32
    torch.testing.assert_close(wide.log_prob(z.double()).float(), expected, rtol=1e-4, atol=1e-4)
    with pytest.raises(TypeError, match="floating-point"):
        q.to(torch.int64)
    owner = nn.Linear(1, 1)
    owner.last = q  # such as an encoder that stores its last output
    assert len(list(owner.modules())) == 1 and len(owner.state_dict()) == 2


LEARNED = {
    "DiagonalNormal": lambda p: DiagonalNormal(p(D), p(D)),
    "FullNormal": lambda p: FullNormal(p(D), p(D * (D + 1) // 2)),
    "LowRankNormal": lambda p: LowRankNormal(p(D), p(D), p(D, 2)),
    "Laplace": lambda p: Laplace(p(D), p(D)),
    "Exponential": lambda p: Exponential(p(D)),
    "StudentT": lambda p: StudentT(p(D), p(D), 4.0),
    "NormalMixture": lambda p: NormalMixture(p(2, D), p(2, D)),
    "Mixture": lambda p: Mixture([DiagonalNormal(p(D), p(D)), Laplace(p(D), p(D))]),
}


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize("name", LEARNED)
def test_a_prior_owns_its_tensors(name, learned):
    """A prior's tensors, as an attribute of any module, are found, saved, loaded, moved and pickled."""
    made = []

    def tensor(*shape):
        made.append(0.3 * randn(*shape, seed=len(made)).cpu())
        return nn.Parameter(made[-1]) if learned else made[-1]

    owner = nn.Module()
    owner.prior = LEARNED[name](tensor)
    assert isinstance(owner.prior, Distribution)
    assert isinstance(owner.prior, getattr(fastvae.distributions, name))
    assert len(list(owner.parameters())) == (len(made) if learned else 0)
    state = owner.state_dict()
    assert len(state) >= len(made)
    z = torch.full((2, B, D), 0.3)
    expected = owner.prior.log_prob(z)
    for copied in (pickle.loads(pickle.dumps(owner)), copy.deepcopy(owner)):
        assert type(copied.prior) is type(owner.prior)
        assert torch.equal(copied.prior.log_prob(z), expected)
        assert len(list(copied.parameters())) == len(list(owner.parameters()))
        with torch.no_grad():
            for t in copied.state_dict().values():
                t.zero_()
        copied.load_state_dict(state)
        assert torch.equal(copied.prior.log_prob(z), expected)
    assert owner.to(torch.float64).prior.log_prob(z.double()).dtype == torch.float64


def test_a_fixed_prior_of_any_shape_moves_with_its_vae():
    for shape in ((1, D), (1, 3, 1)):
        prior = DiagonalNormal(torch.zeros(shape), torch.zeros(shape))
        vae = fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), prior=prior)
        assert {"prior.mu", "prior.logvar"} <= vae.state_dict().keys()
        assert vae.to(torch.float64).prior.mu.dtype == torch.float64


def test_the_prior_of_a_vae_may_be_replaced_by_any_other():
    """A VAE's prior may change from a module to a plain object, and back."""
    vae = _vae()
    for prior in (
        DiagonalNormal(nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D))),
        StandardNormal(),
        Laplace(torch.zeros(D), torch.zeros(D)),
    ):
        vae.prior = prior
        assert vae.prior is prior and vae.iwae(_x(), k=K).isfinite()


def test_an_unregistered_parameter_is_refused():
    class Plain(Distribution):
        def __init__(self):
            self.scale = nn.Parameter(torch.ones(D))

    class Owning(Distribution, nn.Module):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.ones(D))

        def log_prob(self, z):
            return -(z / self.scale).square().sum(-1)

    with pytest.raises(TypeError, match=r"class Plain\(fastvae.distributions.Distribution, nn.Module\)"):
        Plain()
    vae = fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), prior=Owning(), **BERNOULLI)
    assert "prior.scale" in vae.state_dict() and "scale" in repr(list(Owning().state_dict()))
    vae.iwae(_x(), k=K).backward()
    assert vae.prior.scale.grad is not None
