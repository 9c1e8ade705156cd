"""Decoder outputs by name: mappings, objects and torch distributions equal tuples, or raise."""

from __future__ import annotations

import collections
import math
import types
import warnings
from dataclasses import make_dataclass

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae import likelihoods
from fastvae.likelihoods.read import as_likelihood

from . import cases
from .cases import DEVICE, LIKELIHOODS

K, B, D, X = 5, 3, 2, 7

# The declared likelihoods, and those with parameters of their own or with a class axis.
OWN = {
    "gaussian, scale": lambda: likelihoods.Gaussian(scale=0.5),
    "gaussian, optimal": lambda: likelihoods.Gaussian(scale="optimal"),
    "negative binomial, dispersion": lambda: likelihoods.NegativeBinomial(2.0),
    "zero-inflated, dispersion": lambda: likelihoods.ZeroInflatedNegativeBinomial(2.0),
    "student, df": lambda: likelihoods.StudentT(df=4.0),
    "student, df and scale": lambda: likelihoods.StudentT(df=4.0, scale=0.5, learned=True),
    "bernoulli, probs": lambda: likelihoods.Bernoulli(probs=True),
    "poisson, rate": lambda: likelihoods.Poisson(rate=True),
    "categorical": likelihoods.Categorical,
    "categorical, probs": lambda: likelihoods.Categorical(probs=True),
    "multinomial": likelihoods.Multinomial,
    "mixture": lambda: likelihoods.DiscretizedLogisticMixture(),
    "mixture of colours": lambda: likelihoods.DiscretizedLogisticMixture(),
}


class ModelOutput(collections.OrderedDict):
    """Mapping whose entries are attributes, too, as in diffusers, transformers and pythae."""

    def __getattr__(self, name):
        return self[name]


class Decoder(nn.Module):
    """A linear layer for each name, of an output shape, returned as ``form`` makes it."""

    def __init__(self, shapes, form, activation=None, dtype=torch.float32):
        super().__init__()
        self.shapes, self.form, self.activation = shapes, form, activation
        generator = torch.Generator().manual_seed(3)
        self.weights = nn.ParameterDict(
            {
                name: (0.5 * torch.randn(D, math.prod(shape), generator=generator)).to(DEVICE, dtype)
                for name, shape in shapes.items()
            }
        )

    def forward(self, z):
        out = {n: (z @ self.weights[n]).reshape(len(z), *s) for n, s in self.shapes.items()}
        if self.activation is not None:
            out = {n: self.activation(t) for n, t in out.items()}
        return self.form(out)


def as_tuple(out):
    return tuple(out.values()) if len(out) > 1 else next(iter(out.values()))


def reversed_with_more(out):
    more = {"features": torch.ones(4), "epoch": 3, "loss": None}
    return {**more, **dict(reversed(out.items()))}


FORMS = {
    "mapping": reversed_with_more,
    "model output": lambda out: ModelOutput(**out),
    "object": lambda out: types.SimpleNamespace(**out, z=torch.ones(3)),
    "dataclass": lambda out: make_dataclass("Out", list(out))(**out),
    "named tuple": lambda out: collections.namedtuple("Out", reversed(out))(**out),
}


def case(name):
    """Return a likelihood, x and the shapes of the outputs by name."""
    make = OWN.get(name, lambda: as_likelihood(name))
    likelihood = make().to(DEVICE)
    event = (X,)
    if name.startswith("mixture"):
        event = (3, X) if "colours" in name else (1, X)
        x = torch.randint(256, (B, *event)).to(DEVICE) / 255
        shapes = {"logits": (4, X), "location": (4, *event), "log_scale": (4, *event)}
        if "colours" in name:
            shapes["coefficients"] = (4, 3, X)
        return likelihood, x, shapes
    if isinstance(likelihood, likelihoods.Categorical):
        return likelihood, torch.randint(4, (B, X)).to(DEVICE), {likelihood.expected_names[0]: (4, X)}
    if isinstance(likelihood, likelihoods.Multinomial):
        return likelihood, torch.randint(4, (B, X)).to(DEVICE), {"logits": (X,)}
    x = cases.data(type(likelihood).name, B, *event)
    return likelihood, x, dict.fromkeys(likelihood.expected_names, event)


def activation_of(likelihood):
    return (
        torch.sigmoid if getattr(likelihood, "probs", False) or getattr(likelihood, "rate", False) else None
    )


def posterior(dtype=torch.float32):
    return 0.3 * torch.randn(B, 2 * D, generator=torch.Generator().manual_seed(4)).to(DEVICE, dtype)


def graded(run, decoder):
    """Return the value of ``run(decoder)`` and its gradients."""
    torch.manual_seed(7)
    value = run(decoder)
    return [value, *torch.autograd.grad(value.sum(), list(decoder.parameters()))]


def assert_same(got, expected):
    for one, other in zip(got, expected, strict=True):
        assert torch.equal(one.nan_to_num(), other.nan_to_num())


@pytest.mark.parametrize("name", [*LIKELIHOODS, *OWN])
def test_named_outputs_equal_tuples_bit_for_bit(name, backend):
    likelihood, x, shapes = case(name)
    q = posterior()
    for run in (
        lambda decoder: fastvae.iwae(x, q, decoder, k=K, likelihood=likelihood, reduction="none"),
        lambda decoder: fastvae.elbo(x, q, decoder, likelihood=likelihood, mask=x == x),
    ):
        expected = graded(run, Decoder(shapes, as_tuple, activation_of(likelihood)))
        assert expected[0].isfinite().all()
        for form in FORMS.values():
            assert_same(graded(run, Decoder(shapes, form, activation_of(likelihood))), expected)


@pytest.mark.parametrize("name", [*LIKELIHOODS, *OWN])
def test_likelihoods_read_named_outputs_themselves(name):
    likelihood, x, shapes = case(name)
    likelihood.variance = torch.tensor(0.5, device=DEVICE)
    z = torch.randn(B, D, device=DEVICE)
    plain = Decoder(shapes, as_tuple, activation_of(likelihood))(z)

    def results(output):
        generator = torch.Generator(DEVICE).manual_seed(1)
        drawn = likelihood.sample(output, generator=generator)
        return likelihood.log_prob(x, output), likelihood.mean(output), drawn

    for form in FORMS.values():
        assert_same(results(Decoder(shapes, form, activation_of(likelihood))(z)), results(plain))


def test_synonyms_and_a_decoders_only_output():
    x, q = cases.data("gaussian", B, X), posterior()
    forms = {
        ("mu", "log_var"): "gaussian",
        ("loc", "log_covariance"): "gaussian",
        ("mu", "log_scale"): "laplace",
        ("loc", "log_scale"): "logistic",
        ("sample",): likelihoods.Gaussian(scale=0.5),
        ("reconstruction",): likelihoods.Laplace(scale=0.5),
    }
    for names, likelihood in forms.items():

        def run(decoder, likelihood=likelihood):
            return fastvae.iwae(x, q, decoder, k=K, likelihood=likelihood)

        shapes = dict.fromkeys(names, (X,))
        for form in FORMS.values():
            assert_same(graded(run, Decoder(shapes, form)), graded(run, Decoder(shapes, as_tuple)))
    # The parameter's own name comes before that of an only output, and the same tensor may have two names.
    x = cases.data("bernoulli", B, X)

    def both(decoder):
        return fastvae.iwae(x, q, decoder, k=K, likelihood="bernoulli")

    shapes = {"logits": (X,)}
    expected = graded(both, Decoder(shapes, as_tuple))
    assert_same(
        graded(both, Decoder(shapes, lambda o: {**o, "reconstruction": o["logits"].sigmoid()})), expected
    )
    assert_same(
        graded(both, Decoder(shapes, lambda o: {"sample": (s := o["logits"]), "logits": s})), expected
    )


def test_a_tuple_with_other_field_names_is_read_by_position():
    x, q = cases.data("gaussian", B, X), posterior()
    out = collections.namedtuple("Out", "one other")
    shapes = {"mean": (X,), "logvar": (X,)}

    def run(decoder):
        return fastvae.iwae(x, q, decoder, k=K)

    expected = graded(run, Decoder(shapes, as_tuple))
    assert_same(graded(run, Decoder(shapes, lambda o: out(*o.values()))), expected)
    assert_same(graded(run, Decoder(shapes, lambda o: list(o.values()))), expected)


# torch.distributions


def _positive(t):
    return nn.functional.softplus(t) + 0.1


DISTRIBUTIONS = {
    "bernoulli": ("bernoulli", lambda a, b, c: td.Bernoulli(logits=a)),
    "bernoulli, probs": ("bernoulli", lambda a, b, c: td.Bernoulli(probs=a.sigmoid())),
    "bernoulli, probs twice": (
        likelihoods.Bernoulli(probs=True),
        lambda a, b, c: td.Bernoulli(probs=a.sigmoid()),
    ),
    "continuous bernoulli": ("continuous_bernoulli", lambda a, b, c: td.ContinuousBernoulli(logits=3 * a)),
    "normal": ("gaussian", lambda a, b, c: td.Normal(a, _positive(b))),
    "normal of one scale": ("gaussian", lambda a, b, c: td.Normal(a, 0.3)),
    "normal of one row of scales": ("gaussian", lambda a, b, c: td.Normal(a, _positive(b[:1]))),
    "laplace": ("laplace", lambda a, b, c: td.Laplace(a, _positive(b))),
    "log-normal": ("log_normal", lambda a, b, c: td.LogNormal(a, _positive(b))),
    "student": ("student_t", lambda a, b, c: td.StudentT(_positive(c), a, _positive(b))),
    "beta": ("beta", lambda a, b, c: td.Beta(_positive(a), _positive(b))),
    "poisson": ("poisson", lambda a, b, c: td.Poisson(_positive(a))),
    "poisson, rate twice": (likelihoods.Poisson(rate=True), lambda a, b, c: td.Poisson(_positive(a))),
    "negative binomial": (
        "negative_binomial",
        lambda a, b, c: td.NegativeBinomial(_positive(b), logits=a),
    ),
    "negative binomial, probs": (
        "negative_binomial",
        lambda a, b, c: td.NegativeBinomial(_positive(b), probs=a.sigmoid()),
    ),
}


def _data_of(likelihood, shape):
    name = type(as_likelihood(likelihood)).name
    x = cases.data(name, *shape, dtype=torch.float64)
    # torch rejects counts that are not whole, and soft pixels.
    return x.round() if name in ("bernoulli", "poisson", "negative_binomial") else x


@pytest.mark.parametrize("name", DISTRIBUTIONS)
@pytest.mark.parametrize("independent", [0, 1, 2])
def test_distributions_equal_their_own_log_prob(name, independent, backend):
    likelihood, make = DISTRIBUTIONS[name]
    event = (2, X)
    x, q = _data_of(likelihood, (B, *event)), posterior(torch.float64)

    def form(out):
        made = make(*out.values())
        return td.Independent(made, independent) if independent else made

    decoder = Decoder(dict.fromkeys("abc", event), form, dtype=torch.float64)

    def own(decoder):
        terms = fastvae.iwae(x, q, decoder, k=K, likelihood=likelihood, terms=True)
        d = terms.output
        assert isinstance(d, td.Distribution)  # what the decoder returned
        log_p = d.log_prob(x.repeat(K, 1, 1)).reshape(K, B, -1).sum(2)
        torch.testing.assert_close(terms.log_likelihood, log_p.mean(0), rtol=1e-9, atol=1e-9)
        mu, logvar = q.chunk(2, 1)
        ratio = (-0.5 * terms.z**2 + 0.5 * ((terms.z - mu) ** 2 / logvar.exp() + logvar)).sum(2)
        return (log_p + ratio).logsumexp(0).sub(math.log(K)).mean()

    def fused(decoder):
        return fastvae.iwae(x, q, decoder, k=K, likelihood=likelihood)

    def graded_where_used(run):
        torch.manual_seed(7)
        value = run(decoder)
        return [
            value, *torch.autograd.grad(value, list(decoder.parameters()), allow_unused=True)
        ]  # fmt: skip

    for got, expected in zip(graded_where_used(fused), graded_where_used(own), strict=True):
        if expected is None:
            assert got is None or not got.any()
            continue
        torch.testing.assert_close(got, expected, rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("probs", [False, True])
def test_categorical_and_multinomial_distributions(probs):
    x, z = torch.randint(4, (B, X), device=DEVICE), torch.randn(B, D, device=DEVICE)
    logits = Decoder({"logits": (X, 4)}, as_tuple)(z)
    d = td.Categorical(probs=logits.softmax(-1)) if probs else td.Categorical(logits=logits)
    for likelihood in (likelihoods.Categorical(), likelihoods.Categorical(probs=True)):
        torch.testing.assert_close(likelihood.log_prob(x, d), d.log_prob(x))
        assert likelihood.mean(d).shape == likelihood.sample(td.Independent(d, 1)).shape == (B, X)
        pairs = fastvae.ops.all_pairs_log_prob(x, d, likelihood=likelihood)
        expected = d.expand((B, X)).log_prob(x[:, None]) if False else None
        assert expected is None and torch.allclose(pairs.diagonal(), d.log_prob(x).sum(1), atol=1e-5)
    likelihood = likelihoods.Multinomial()
    counts = torch.randint(4, (B, 4), device=DEVICE)
    rows = td.Multinomial(6, logits=logits[:, 0], validate_args=False)
    torch.testing.assert_close(likelihood.log_prob(counts, rows), rows.log_prob(counts))
    with pytest.raises(ValueError, match=r"Multinomials of batch shape \[3, 7\].*expected the batch shape"):
        likelihood.log_prob(x, td.Multinomial(6, logits=logits))


def test_options_do_not_change_what_a_distribution_means():
    x, z = cases.data("bernoulli", B, X), torch.randn(B, D, device=DEVICE)
    logits = 40 * Decoder({"logits": (X,)}, as_tuple)(z)
    for d in (td.Bernoulli(logits=logits), td.Independent(td.Bernoulli(logits=logits), 1)):
        plain, probs = likelihoods.Bernoulli(), likelihoods.Bernoulli(probs=True)
        assert torch.equal(probs.log_prob(x, d), plain.log_prob(x, logits))
        assert torch.equal(probs.mean(d), plain.mean(logits))


def test_a_subclass_with_its_familys_density_is_read():
    class Named(td.Normal):
        """Subclass that adds no density."""

    class Shifted(td.Normal):
        def log_prob(self, value):
            return super().log_prob(value - 1)

    x, mean = cases.data("gaussian", B, X), torch.zeros(B, X, device=DEVICE)
    likelihood = likelihoods.Gaussian()
    expected = td.Normal(mean, 0.5).log_prob(x)
    torch.testing.assert_close(likelihood.log_prob(x, Named(mean, 0.5)), expected)
    with pytest.raises(TypeError, match="returned a Shifted, a distribution of your own.*from_distribution"):
        likelihood.log_prob(x, Shifted(mean, 0.5))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype, backend):
    x, z = cases.data("gaussian", B, X), torch.randn(K * B, D, device=DEVICE)
    mean, scale = Decoder({"a": (X,), "b": (X,)}, as_tuple)(z)
    mean, scale = mean.to(dtype), _positive(scale).to(dtype)
    d = td.Normal(mean, scale)
    got = fastvae.elbo(x, posterior(), lambda z: d, k=K, terms=True).log_likelihood
    wide = td.Normal(mean.double(), scale.double()).log_prob(x.double().repeat(K, 1))
    torch.testing.assert_close(got.double(), wide.reshape(K, B, X).sum(2).mean(0), rtol=1e-5, atol=1e-5)


def test_a_masked_element_of_a_distribution_has_no_effect(backend):
    x, q = cases.data("gaussian", B, X), posterior()
    mask = torch.arange(X, device=DEVICE) != 2
    mean = torch.zeros(B, X, device=DEVICE, requires_grad=True)
    for bad in (0.0, math.nan):
        scale = torch.where(mask, 0.5, bad).expand(B, X).clone().requires_grad_()
        d = td.Normal(mean, scale, validate_args=False)
        bound = fastvae.elbo(x, q, lambda z, d=d: d, mask=mask)
        grads = torch.autograd.grad(bound, (mean, scale))
        assert bound.isfinite() and all(g.isfinite().all() and not g[:, 2].any() for g in grads)


# Every way to a decoder's output


def _ways(x, likelihood):
    """Return functions of a decoder that evaluate it in all ways, each with a tensor as the result."""
    q = posterior()
    encoder = nn.Linear(x[0].numel(), 2 * D).to(DEVICE)
    data = torch.utils.data.TensorDataset(x)

    def vae(decoder):
        return fastvae.VAE(encoder, decoder, likelihood=likelihood, latent_dim=D)

    return {
        "chunks": lambda d: fastvae.iwae(x, q, d, k=K, k_chunk=2, likelihood=likelihood),
        "dreg": lambda d: fastvae.iwae(x, q, d, k=K, estimator="dreg", likelihood=likelihood),
        "qmc": lambda d: fastvae.iwae(x, q, d, k=4, noise="qmc", likelihood=likelihood),
        "beta tc": lambda d: fastvae.beta_tc(x, q, d, dataset_size=B, likelihood=likelihood),
        "mask": lambda d: fastvae.elbo(x, q, d, likelihood=likelihood, mask=x > x.mean()),
        "log marginal": lambda d: fastvae.log_marginal(x, q, d, k=K, likelihood=likelihood).log_px,
        "log weights": lambda d: fastvae.log_weights(x, q, d, k=K, likelihood=likelihood),
        "sleep": lambda d: fastvae.sleep(encoder, d, B, latent_dim=D, likelihood=likelihood),
        "all pairs": lambda d: fastvae.ops.all_pairs_log_prob(
            x, d(torch.ones(4, D, device=DEVICE)), likelihood=likelihood
        ),
        "lattice": lambda d: fastvae.lattice(
            x, d, latent_dim=D, points=9, likelihood=likelihood
        ).log_px,
        "vae": lambda d: vae(d).iwae(x, k=K),
        "sample": lambda d: vae(d).sample(4),
        "sampled mean": lambda d: vae(d).sample(4, mean=True),
        "reconstruct": lambda d: vae(d).reconstruct(x),
        "evaluate": lambda d: torch.as_tensor(vae(d).evaluate(data, k=K, progress=False).log_px),
    }  # fmt: skip


@pytest.mark.parametrize("way", _ways(torch.zeros(B, X), None))
@pytest.mark.parametrize("name", ["gaussian", "bernoulli"])
def test_every_way_to_the_output(name, way):
    if not hasattr(fastvae, "lattice") and way == "lattice":
        pytest.skip("no lattice at the top level")
    x = cases.data(name, B, X)
    torch.manual_seed(5)
    run = _ways(x, name)[way]
    shapes = dict.fromkeys(as_likelihood(name).expected_names, (X,))
    torch.manual_seed(7)
    expected = run(Decoder(shapes, as_tuple)).detach()
    forms = dict(FORMS)
    if name == "bernoulli":
        forms["distribution"] = lambda out: td.Independent(td.Bernoulli(logits=out["logits"]), 1)
    for form in forms.values():
        torch.manual_seed(7)
        assert torch.equal(run(Decoder(shapes, form)).detach(), expected)


def test_terms_keep_what_the_decoder_returned():
    x, q = cases.data("gaussian", B, X), posterior()
    shapes = {"mean": (X,), "logvar": (X,)}
    for form in FORMS.values():
        for k in (1, K):
            terms = fastvae.elbo(x, q, Decoder(shapes, form), k=k, terms=True)
            assert type(terms.output) is type(form(dict.fromkeys(shapes, x))) or form is FORMS["named tuple"]
            entries = terms.output if hasattr(terms.output, "keys") else vars_of(terms.output)
            assert entries["mean"].shape == (k * B, X)


def vars_of(value):
    return value._asdict() if hasattr(value, "_asdict") else vars(value)


def test_parts_of_a_joint_in_any_form(backend):
    x = {"a": cases.data("gaussian", B, X), "b": cases.data("bernoulli", B, 4), "mean": torch.ones(B, 2)}
    x = {name: t.to(DEVICE) for name, t in x.items()}
    joint = likelihoods.Joint(a="gaussian", b="bernoulli", mean=likelihoods.Gaussian(scale=0.5))
    shapes = {"m": (X,), "v": (X,), "l": (4,), "p": (2,)}
    plain = Decoder(shapes, lambda o: {"a": (o["m"], o["v"]), "b": o["l"], "mean": o["p"]})
    named = Decoder(
        shapes,
        lambda o: {
            "mean": types.SimpleNamespace(sample=o["p"]),
            "b": td.Independent(td.Bernoulli(logits=o["l"]), 1),
            "a": {"logvar": o["v"], "mean": o["m"]},
        },
    )
    q = posterior()

    def run(decoder):
        return fastvae.iwae(x, q, decoder, k=K, likelihood=joint)

    assert_same(graded(run, named), graded(run, plain))
    vae = [fastvae.VAE(lambda x: q, d, likelihood=joint, latent_dim=D, modules=[]) for d in (plain, named)]
    one, other = (v.reconstruct(x) for v in vae)
    assert all(torch.equal(one[n], other[n]) for n in x)
    with pytest.raises(
        TypeError, match="must be a dict with 'a', 'b', 'mean', the parts.*got SimpleNamespace"
    ):
        run(Decoder(shapes, lambda o: types.SimpleNamespace(**o)))


def test_a_fused_head_by_name(monkeypatch):
    monkeypatch.setattr(fastvae.ops.head, "pays", lambda *_: True)
    monkeypatch.setattr(fastvae.likelihoods.declared, "pays", lambda *_: True)
    x, q = cases.data("bernoulli", B, X), posterior()
    head = fastvae.FusedHead(nn.Tanh(), nn.Linear(D, X).to(DEVICE))

    def run(form):
        return graded(lambda d: fastvae.iwae(x, q, lambda z: form(d(z)), k=K, likelihood="bernoulli"), head)

    assert_same(run(lambda out: {"logits": out}), run(lambda out: out))
    terms = fastvae.elbo(x, q, lambda z: ModelOutput(logits=head(z)), likelihood="bernoulli", terms=True)
    assert terms.output["logits"].shape == (B, X)


def test_likelihoods_of_a_users_own_get_the_output_as_it_is():
    x, q, given = cases.data("gaussian", B, X), posterior(), []

    class Own(likelihoods.Likelihood):
        def log_prob(self, x, parameters):
            given.append(parameters)
            return -(x - getattr(parameters, "loc", x)).square()

    class OwnBernoulli(likelihoods.Bernoulli):
        def log_prob(self, x, parameters):
            given.append(parameters)
            return x * parameters.loc

    for likelihood in (Own(), OwnBernoulli()):
        made = td.Normal(torch.zeros(B, X, device=DEVICE), 1.0)
        fastvae.elbo(x.sigmoid(), q, lambda z, made=made: made, likelihood=likelihood)
        assert given.pop() is made
    fields = {"mean": torch.zeros(B, X, device=DEVICE), "logits": 3}
    fastvae.elbo(x, q, lambda z: fields, likelihood=Own())
    assert given.pop() is fields
    mixed = likelihoods.from_distribution(lambda d: d)
    d = td.Gumbel(torch.zeros(B, X, device=DEVICE), 2.0)
    got = fastvae.elbo(x, q, lambda z: d, likelihood=mixed, terms=True).log_likelihood
    torch.testing.assert_close(got, d.log_prob(x).sum(1))


@pytest.mark.parametrize("form", [*FORMS, "distribution"])
def test_compiled(form):
    torch._dynamo.reset()
    x, q = cases.data("gaussian", B, X), posterior()
    shapes = {"mean": (X,), "logvar": (X,)}
    make = FORMS.get(form, lambda out: td.Normal(out["mean"], (0.5 * out["logvar"]).exp()))
    if form == "dataclass":
        kind = make_dataclass("Out", list(shapes))
        make = lambda out: kind(**out)  # noqa: E731
    elif form == "named tuple":
        kind = collections.namedtuple("Out", "logvar mean")
        make = lambda out: kind(**out)  # noqa: E731
    decoder = Decoder(shapes, make)
    for k_chunk in (None, 2):

        def run(decoder, k_chunk=k_chunk):
            return fastvae.iwae(x, q, decoder, k=4, k_chunk=k_chunk)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for got, expected in zip(graded(compiled, decoder), graded(run, decoder), strict=True):
            torch.testing.assert_close(got, expected)


# Errors and warnings

_normal = lambda t: td.Normal(t, 1.0)  # noqa: E731
REFUSED = {
    "a missing name": ("gaussian", lambda t: {"mean": t}, r"dict with 'mean'; .*Gaussian\(\) reads 'mean' "
        r"\(or 'mu', 'loc'\) and 'logvar'.*Missing: 'logvar'; for a mean alone, .*Gaussian\(scale=0.1\)"),
    "an only output": ("gaussian", lambda t: types.SimpleNamespace(sample=t),
        r"SimpleNamespace with 'sample'.*Missing: 'mean', 'logvar'; for a mean alone, give scale"),
    "another form": ("gaussian", lambda t: {"mean": t, "std": t}, "'logvar', which is not computed from 'std'"),
    "no tensor": ("bernoulli", lambda t: {"logits": 0.0}, r"'logits' \(float\).*Missing: 'logits'"),
    "nothing": ("bernoulli", lambda t: {}, "dict with nothing"),
    "other names": ("poisson", lambda t: {"a": t, "b": {"log_rate": t}}, r"'a', 'b' \(dict\).*'log_rate'"),
    "two of the same": ("gaussian", lambda t: {"mean": t, "mu": t + 1, "logvar": t},
        "'mean' and 'mu' are different tensors"),
    "two only outputs": ("bernoulli", lambda t: {"sample": t, "reconstruction": t + 1},
        "'sample' and 'reconstruction' are different tensors"),
    "an only output beside another form": ("bernoulli", lambda t: {"reconstruction": t, "probs": t},
        r"Missing: 'logits'; for 'probs' use .*Bernoulli\(probs=True\)"),
    "probabilities": ("bernoulli", lambda t: types.SimpleNamespace(probs=t), r"Bernoulli\(probs=True\)"),
    "rates": ("poisson", lambda t: {"rate": t}, r"Poisson\(rate=True\)"),
    "logits for probabilities": (likelihoods.Bernoulli(probs=True), lambda t: {"logits": t},
        r"reads 'probs'.*leave the option out"),
    "a variance of the likelihood's own": (likelihoods.Gaussian(scale=0.5),
        lambda t: {"mean": t, "logvar": t}, r"Gaussian\(scale=0.5\).*its own logvar.*'logvar' would be ignored"),
    "a scale of the likelihood's own": (likelihoods.Laplace(scale=0.5),
        lambda t: {"location": t, "sigma": t}, "its own log_scale.*'sigma' would be ignored"),
    "an estimated variance": (likelihoods.Gaussian(scale="optimal"),
        lambda t: types.SimpleNamespace(mean=t, scale=t), "its own logvar.*'scale' would be ignored"),
    "a named tuple of other names": ("gaussian", lambda t: collections.namedtuple("Out", "mu sigma")(t, t),
        "a Out with 'mu', 'sigma'; .*Missing: 'logvar', which is not computed from 'sigma'"),
    "another family": ("bernoulli", _normal, r"returned torch.distributions.Normal, but the likelihood "
        r"Bernoulli\(\) reads torch.distributions.Bernoulli; use likelihood='gaussian', or .*from_distribution"),
    "another family, wrapped": ("laplace", lambda t: td.Independent(_normal(t), 1),
        r"Independent\(torch.distributions.Normal, 1\)"),
    "no likelihood's family": ("gaussian", lambda t: td.Gamma(t.exp(), 1.0), "Gamma.*use likelihood=fastvae.*from_d"),
    "a dependent family": ("gaussian", lambda t: td.MultivariateNormal(t, torch.eye(X, device=t.device)),
        "MultivariateNormal, but the likelihood Gaussian"),
    "a family without a likelihood": ("logistic", _normal, "reads no distribution; use likelihood='gaussian'"),
    "a softplus scale": (likelihoods.Gaussian(scale="softplus"), _normal, "reads no distribution"),
    "two scales": (likelihoods.Gaussian(scale=0.5), _normal, "its own logvar; use likelihood='gaussian'"),
    "an estimated scale": (likelihoods.Gaussian(scale="optimal"), _normal, "its own logvar"),
    "the batch in the event": ("gaussian", lambda t: td.Independent(_normal(t), 2), "reinterpret one axis less"),
    "a distribution over z": ("gaussian", lambda t: fastvae.distributions.DiagonalNormal(t, t),
        "fastvae.distributions.DiagonalNormal, a distribution over z"),
    "a shape": ("gaussian", lambda t: td.Normal(t[:, :4], 1.0), r"mean has shape \[3, 4\]; expected \[3, 7\]"),
    "a string": ("gaussian", lambda t: "mean", r"must return \(mean, logvar\), got str"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name):
    likelihood, form, match = REFUSED[name]
    x = torch.ones(B, X, device=DEVICE)
    decoder = Decoder({"a": (X,)}, lambda out: form(out["a"]))
    with pytest.raises((TypeError, ValueError), match=match) as caught:
        fastvae.elbo(x, posterior(), decoder, likelihood=likelihood)
    assert len(str(caught.value)) < 400


def _warned(decoder, likelihood, x):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        vae = fastvae.VAE(nn.Linear(X, 2 * D), decoder, likelihood=likelihood).to(DEVICE)
        vae.elbo(x)
    return [str(w.message) for w in caught if "fastvae" in str(w.message)]


def test_a_distribution_of_probabilities_is_not_warned_about(monkeypatch):
    monkeypatch.setenv("FASTVAE_CHECK", "1")

    class Probabilities(nn.Module):
        def __init__(self, form):
            super().__init__()
            self.form, self.net = form, nn.Sequential(nn.Linear(D, X), nn.Sigmoid())

        def forward(self, z):
            return self.form(self.net(z))

    x = cases.data("bernoulli", B, X).round()
    assert not _warned(Probabilities(lambda p: td.Bernoulli(probs=p)), "bernoulli", x)
    joint = likelihoods.Joint(a="bernoulli")
    q = posterior()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        logits = Decoder({"a": (X,)}, lambda o: {"a": td.Bernoulli(logits=o["a"].sigmoid())})
        fastvae.elbo({"a": x}, q, logits, likelihood=joint)
    for form in (lambda p: p, lambda p: {"reconstruction": p}, lambda p: {"logits": p}):
        assert len(_warned(Probabilities(form), "bernoulli", x)) == 1
    said = _warned(Decoder({"a": (X,)}, lambda o: td.Poisson(o["a"].exp())), "poisson", x + 0.5)
    assert len(said) == 1 and "not a whole number" in said[0]


def test_a_function_whose_distribution_changes_is_refused():
    x = cases.data("gaussian", B, X)
    with pytest.raises(ValueError, match="returns another output when it is called again"):
        fastvae.estimation.audit.lattices.lattice(
            x, lambda z: td.Normal(torch.randn(len(z), X, device=DEVICE), 1.0), latent_dim=1, modules=[]
        )


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "mse": r"did you mean 'gaussian'\? .*half the sum is fastvae.likelihoods.Gaussian\(scale=1.0\).*beta=w \* P",
        "L2": "did you mean 'gaussian'.*squared error",
        "squared error": "did you mean 'gaussian'.*squared error",
        "bce": r"did you mean 'bernoulli'\? .*Bernoulli\(probs=True\)",
        "cross-entropy": "did you mean 'categorical'.*cross-entropies",
        "mae": r"did you mean 'laplace'\? .*Laplace\(scale=1.0\)",
        "gausian": r"did you mean 'gaussian'\?$",
    }.items(),
)
def test_names_of_losses(name, said):
    with pytest.raises(ValueError, match=said):
        fastvae.elbo(torch.ones(B, X), torch.zeros(B, 2 * D), nn.Linear(D, X), likelihood=name)
