"""Outputs of decoders by name, mappings and objects: the same bits as tuples, everywhere."""

from __future__ import annotations

import collections
import types
from dataclasses import make_dataclass

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae import likelihoods
from fastvae.estimation.audit.lattices import lattice
from fastvae.likelihoods.read import as_likelihood

from . import cases
from .cases import DEVICE, LIKELIHOODS
from .outputs import (
    FORMS,
    B,
    D,
    Decoder,
    K,
    ModelOutput,
    X,
    as_tuple,
    assert_same,
    graded,
    posterior,
)

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
    option = likelihood.option
    return torch.sigmoid if option and getattr(likelihood, option) else None


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
    likelihood.eval().variance = torch.tensor(0.5, device=DEVICE)  # an optimal scale has one by then
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


def test_a_named_tuple_of_one_is_read_by_position():
    x, q = cases.data("bernoulli", B, X), posterior()
    out = collections.namedtuple("Out", "x_hat")

    def run(decoder):
        return fastvae.iwae(x, q, decoder, k=K, likelihood="bernoulli")

    shapes = {"logits": (X,)}
    assert_same(
        graded(run, Decoder(shapes, lambda o: out(o["logits"]))), graded(run, Decoder(shapes, as_tuple))
    )


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
        "log weights": lambda d: fastvae.log_weights(x, q, d, k=K, likelihood=likelihood).log_likelihood,
        "sleep": lambda d: fastvae.sleep(encoder, d, B, latent_dim=D, likelihood=likelihood),
        "all pairs": lambda d: fastvae.ops.all_pairs_log_prob(
            x, d(torch.ones(4, D, device=DEVICE)), likelihood=likelihood
        ),
        "lattice": lambda d: lattice(
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
    x, q, kept = cases.data("gaussian", B, X), posterior(), []
    decoder = Decoder({"mean": (X,), "logvar": (X,)}, None)
    for form in FORMS.values():
        decoder.form = lambda out, form=form: kept.append(form(out)) or kept[-1]
        for run in (
            lambda: fastvae.elbo(x, q, decoder, k=K, terms=True),
            lambda: fastvae.iwae(x, q, decoder, k=4, noise="qmc", terms=True),
        ):
            terms = run()
            assert terms.output is kept[-1]


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


def _normal(out):
    # torch's own validation breaks a graph.
    return td.Normal(out["mean"], (0.5 * out["logvar"]).exp(), validate_args=False)


@pytest.mark.parametrize("form", [*FORMS, "distribution"])
def test_compiled(form):
    torch._dynamo.reset()
    x, q = cases.data("gaussian", B, X), posterior()
    shapes = {"mean": (X,), "logvar": (X,)}
    make = FORMS.get(form, _normal)
    kinds = {
        "object": make_dataclass("Out", [*shapes, "z"], frozen=True),
        "dataclass": make_dataclass("Out", list(shapes)),
        "named tuple": collections.namedtuple("Out", "logvar mean"),
    }
    if form in kinds:  # a compiler does not trace the definition of a class
        kind, more = kinds[form], {"z": x} if form == "object" else {}
        make = lambda out: kind(**out, **more)  # noqa: E731
    decoder = Decoder(shapes, make)
    for k_chunk in (None, 2):

        def run(decoder, k_chunk=k_chunk):
            return fastvae.iwae(x, q, decoder, k=4, k_chunk=k_chunk)

        compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
        for got, expected in zip(graded(compiled, decoder), graded(run, decoder), strict=True):
            torch.testing.assert_close(got, expected)
