"""Outputs of decoders that do not fit the likelihood: errors and warnings."""

from __future__ import annotations

import collections
import types
import warnings

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae import likelihoods
from fastvae.estimation.audit.lattices import lattice

from . import cases
from .cases import DEVICE
from .outputs import (
    B,
    D,
    Decoder,
    X,
    posterior,
)

_normal = lambda t: td.Normal(t, 1.0)  # noqa: E731
REFUSED = {
    "a missing name": ("gaussian", lambda t: {"mean": t}, r"dict with 'mean'; .*Gaussian\(\) reads 'mean' "
        r"\(or 'mu', 'loc'\) and 'logvar'.*Missing: 'logvar'; for a mean alone, .*Gaussian\(scale=0.1\)"),
    "an only output": ("gaussian", lambda t: types.SimpleNamespace(sample=t),
        r"SimpleNamespace with 'sample'.*Missing: 'mean', 'logvar'; for a mean alone, give scale"),
    "another form": ("gaussian", lambda t: {"mean": t, "std": t},
        "'logvar', which is not computed from 'std'"),
    "no tensor": ("bernoulli", lambda t: {"logits": 0.0}, r"'logits' \(float\).*Missing: 'logits'"),
    "nothing": ("bernoulli", lambda t: {}, "dict with nothing"),
    "other names": ("poisson", lambda t: {"a": t, "b": {"log_rate": t}}, r"'a', 'b' \(dict\).*'log_rate'"),
    "two of the same": ("gaussian", lambda t: {"mean": t, "mu": t + 1, "logvar": t},
        "'mean' and 'mu' are different tensors"),
    "two only outputs": ("bernoulli", lambda t: {"sample": t, "reconstruction": t + 1},
        "'sample' and 'reconstruction' are different tensors"),
    "a whole output and another form": ("bernoulli", lambda t: {"reconstruction": t, "probs": t},
        r"Missing: 'logits'; for 'probs' use .*Bernoulli\(probs=True\)"),
    "probabilities": ("bernoulli", lambda t: types.SimpleNamespace(probs=t), r"Bernoulli\(probs=True\)"),
    "rates": ("poisson", lambda t: {"rate": t}, r"Poisson\(rate=True\)"),
    "logits for probabilities": (likelihoods.Bernoulli(probs=True), lambda t: {"logits": t},
        r"reads 'probs'.*leave the option out"),
    "a variance of the likelihood's own": (likelihoods.Gaussian(scale=0.5),
        lambda t: {"mean": t, "logvar": t}, r"Gaussian\(scale=0.5\).*its own logvar, .*'logvar' would"),
    "a scale of the likelihood's own": (likelihoods.Laplace(scale=0.5),
        lambda t: {"location": t, "sigma": t}, "its own log_scale.*'sigma' would be ignored"),
    "an estimated variance": (likelihoods.Gaussian(scale="optimal"),
        lambda t: types.SimpleNamespace(mean=t, scale=t), "its own logvar.*'scale' would be ignored"),
    "a named tuple of other names": ("gaussian", lambda t: collections.namedtuple("Out", "mu sigma")(t, t),
        "a Out with 'mu', 'sigma'; .*Missing: 'logvar', which is not computed from 'sigma'"),
    "another family": ("bernoulli", _normal, r"returned torch.distributions.Normal, but the likelihood "
        r"Bernoulli\(\) reads torch.distributions.Bernoulli; use likelihood='gaussian', or .*from_dist"),
    "another family, wrapped": ("laplace", lambda t: td.Independent(_normal(t), 1),
        r"Independent\(torch.distributions.Normal, 1\)"),
    "no likelihood's family": ("gaussian", lambda t: td.Gamma(t.exp(), 1.0), "use likelihood=fastvae"),
    "a dependent family": ("gaussian", lambda t: td.MultivariateNormal(t, torch.eye(X, device=t.device)),
        "MultivariateNormal, but the likelihood Gaussian"),
    "a family without a likelihood": ("logistic", _normal, "no distribution; use likelihood='gaussian'"),
    "a softplus scale": (likelihoods.Gaussian(scale="softplus"), _normal, "reads no distribution"),
    "two scales": (likelihoods.Gaussian(scale=0.5), _normal, "its own logvar; use likelihood='gaussian'"),
    "an estimated scale": (likelihoods.Gaussian(scale="optimal"), _normal, "its own logvar"),
    "the batch in the event": ("gaussian", lambda t: td.Independent(_normal(t), 2), "one axis less"),
    "a distribution over z": ("gaussian", lambda t: fastvae.distributions.DiagonalNormal(t, t),
        "fastvae.distributions.DiagonalNormal, a distribution over z"),
    "a shape": ("gaussian", lambda t: td.Normal(t[:, :4], 1.0), r"has shape \[3, 4\]; expected \[3, 7\]"),
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
        lattice(x, lambda z: td.Normal(torch.randn(len(z), X, device=DEVICE), 1.0), latent_dim=1, modules=[])


@pytest.mark.parametrize(
    ("name", "said"),
    {
        "mse": r"did you mean 'gaussian'\? .*half the sum is .*Gaussian\(scale=1.0\).*beta=w \* P",
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
