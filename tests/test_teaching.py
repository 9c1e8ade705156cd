"""Errors that teach: foreign words, near misses, and the arguments of a user's function."""

from __future__ import annotations

import inspect
import sys

import pytest
import torch
from torch import nn

import fastvae
from fastvae.likelihoods import Gaussian, Likelihood

x, q, decoder = torch.ones(4, 6), torch.zeros(4, 4), nn.Linear(2, 6)
vae = fastvae.VAE(nn.Linear(6, 4), decoder, likelihood="bernoulli")

KEYWORDS = {
    "samples of elbo": (lambda: fastvae.elbo(x, q, decoder, samples=5), ["elbo()", "'samples'", "mean k="]),
    "num_samples": (lambda: fastvae.elbo(x, q, decoder, num_samples=5), ["elbo()", "mean k="]),
    "n_samples": (lambda: fastvae.iwae(x, q, decoder, n_samples=5), ["iwae()", "mean k="]),
    "samples": (lambda: fastvae.log_weights(x, q, decoder, samples=5, k=2), ["log_weights()", "'samples'"]),
    "seed": (lambda: fastvae.log_marginal(x, q, decoder, seed=5), ["generator=", "manual_seed"]),
    "beta of iwae": (lambda: fastvae.iwae(x, q, decoder, beta=2.0), ["iwae()", "'beta'", "fastvae.elbo"]),
    "sigma": (lambda: fastvae.elbo(x, q, decoder, sigma=0.1), ["'sigma'", "Gaussian(scale=0.1)"]),
    "a typo": (lambda: fastvae.elbo(x, q, decoder, liklihood="bernoulli"), ["likelihood="]),
    "bound": (lambda: fastvae.bound(x, q, decoder, fastvae.bounds.IWAE(), samples=5), ["bound()", "k="]),
    "beta_tc": (lambda: fastvae.beta_tc(x, q, decoder, kl_weight=5), ["beta_tc()", "beta="]),
    "score": (lambda: fastvae.reconstruction_log_prob(x, q, decoder, samples=5), ["mean k="]),
    "evaluate": (lambda: vae.evaluate(x, num_samples=5), ["evaluate()", "mean k="]),
    "VAE": (lambda: fastvae.VAE(decoder, decoder, z_dim=2), ["VAE()", "latent_dim="]),
    "the module": (lambda: vae(x, samples=5), ["elbo()", "'samples'", "mean k="]),
    "a method": (lambda: vae.iwae(x, num_samples=5), ["iwae()", "num_samples"]),
    "sample": (lambda: vae.sample(n_samples=5), ["sample()", "mean n="]),
    "ais": (lambda: vae.ais(x, seed=5), ["ais()", "generator="]),
    "scale": (lambda: Gaussian(sigma=0.1), ["Gaussian()", "scale="]),
    "inherited": (lambda: fastvae.likelihoods.Laplace(std=0.1), ["Laplace()", "scale="]),
    "an op": (lambda: fastvae.ops.gaussian_log_prob(x, x), ["gaussian_log_prob()", "(x, mean, logvar, mask"]),
}  # fmt: skip


@pytest.mark.parametrize("name", KEYWORDS)
def test_unknown_keywords_suggest_the_intended_one(name):
    call, parts = KEYWORDS[name]
    with pytest.raises(TypeError) as error:
        call()
    assert all(part in str(error.value) for part in parts), error.value


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        ({"likelihood": "bce"}, "bernoulli"),
        ({"likelihood": "Bernoulli"}, "bernoulli"),
        ({"likelihood": "mse"}, "gaussian"),
        ({"likelihood": "normal"}, "gaussian"),
        ({"likelihood": "nb"}, "negative_binomial"),
        ({"likelihood": "zinb"}, "zero_inflated_negative_binomial"),
        ({"likelihood": "gausian"}, "gaussian"),
        ({"prior": "normal"}, "standard_normal"),
        ({"reduction": "avg"}, "mean"),
        ({"kl": "analytical"}, "analytic"),
        ({"objective": "iwelbo"}, "iwae"),
        ({"objective": "ELBO"}, "elbo"),
        ({"objective": "iwae", "estimator": "DReG"}, "dreg"),
        ({"objective": "log_marginal", "proposal": "adaptive"}, "adapted"),
        ({"objective": "iwae", "noise": "sobol"}, "qmc"),
    ],
)
def test_unknown_names_suggest_the_intended_one(arguments, meant):
    with pytest.raises(ValueError, match=rf"did you mean '{meant}'\?"):
        if "likelihood" in arguments or "prior" in arguments:
            fastvae.elbo(x, q, decoder, **arguments)
        vae(x, **arguments)


def test_signatures_are_preserved():
    """Editors and other readers of signatures see through the wrapper."""
    assert next(iter(inspect.signature(fastvae.elbo).parameters)) == "x"
    assert "scale" in inspect.signature(Gaussian.__init__).parameters
    assert fastvae.elbo.__name__ == "elbo"


class Failing(Likelihood):
    def log_prob(self, x, parameters):
        return x @ parameters


two = torch.zeros(10, 2)
NOTES = {
    "decoder": (lambda: fastvae.elbo(torch.ones(10, 6), two, nn.Linear(3, 6)),
                ["the decoder with z [N, D] = [10, 1]", "D = 1", "[B, 2 D] = [B, 2]", "side by side"]),
    "decoder with a context": (lambda: fastvae.elbo(x, q, lambda z: z, context=x),
                               ["decoder", "context [4, 6]"]),
    "encoder": (lambda: fastvae.VAE(nn.Linear(5, 4), decoder)(x), ["the encoder with x [4, 6] float32"]),
    "prior": (lambda: fastvae.elbo(x, q, lambda z, c: z, prior=lambda c: c @ c, context=x),
              ["prior", "[4, 6]"]),
    "likelihood": (lambda: fastvae.elbo(x, q, decoder, likelihood=Failing()),
                   ["Failing.log_prob", "x [4, 6]", "parameters [4, 6]"]),
    "reconstruct": (lambda: fastvae.VAE(nn.Linear(6, 4), nn.Linear(3, 6)).reconstruct(x),
                    ["the decoder", "[4, 2]"]),
}  # fmt: skip


@pytest.mark.skipif(sys.version_info < (3, 11), reason="notes came with Python 3.11")
@pytest.mark.parametrize("name", NOTES)
def test_errors_in_user_functions_show_their_arguments(name):
    call, parts = NOTES[name]
    with pytest.raises((RuntimeError, TypeError)) as error:
        call()
    notes = "\n".join(error.value.__notes__)
    assert all(part in notes for part in parts), notes


def test_compiled_calls_have_no_graph_break():
    def step(x, mu, logvar):
        return fastvae.iwae(x, (mu, logvar), decoder, k=3, likelihood="bernoulli", reduction="sum")

    compiled = torch.compile(step, fullgraph=True, backend="eager")
    mu, logvar = torch.zeros(4, 2), torch.zeros(4, 2)
    torch.manual_seed(0)
    found = compiled(x, mu, logvar)
    torch.manual_seed(0)
    torch.testing.assert_close(found, step(x, mu, logvar))


def test_missing_names_suggest_their_module():
    for name, place in (
        ("Bernoulli", "use fastvae.likelihoods.Bernoulli$"),
        ("Laplace", "use fastvae.likelihoods.Laplace or fastvae.distributions.Laplace$"),
        ("ais", "use fastvae.audit.ais$"),
        ("nothing", "no attribute 'nothing'$"),
    ):
        with pytest.raises(AttributeError, match=place):
            getattr(fastvae, name)
