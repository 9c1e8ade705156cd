"""Type checking of a user's program: a call's result type follows from its arguments."""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import get_args, get_type_hints

import pytest
import torch

import fastvae
from fastvae import bounds, proposals, random
from fastvae.core import options
from fastvae.estimation import options as estimates
from fastvae.objectives import options as objectives
from fastvae.ops import normal_diagonal

pytest.importorskip("mypy")

# Lines that end in a comment, which is mypy's expected output for them.
PROGRAM = """
import torch
import fastvae
from fastvae import VAE
from fastvae.distributions import DiagonalNormal
from fastvae.likelihoods import Gaussian
from fastvae.ops import gaussian_log_prob

x = torch.rand(16, 8)
encoder, decoder = torch.nn.Linear(8, 4), torch.nn.Linear(2, 8)
q = encoder(x)
either = bool(x.any())
name = str(input())


def bound(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return fastvae.elbo(x, encoder(x), decoder, context=y, reduction="none")


reveal_type(fastvae.elbo(x, q, decoder))  # Tensor
reveal_type(fastvae.elbo(x, q, decoder, likelihood="bernoulli", beta=0.5, kl="mc"))  # Tensor
reveal_type(fastvae.elbo(x, q, decoder, terms=False))  # Tensor
reveal_type(fastvae.elbo(x, q, decoder, terms=True).kl)  # Tensor
reveal_type(fastvae.elbo(x, q, decoder, terms=True).z)  # Tensor | None
reveal_type(fastvae.elbo(x, q, decoder, likelihood=name))  # Tensor
reveal_type(fastvae.elbo(x, q, decoder, prior=None, terms=True))  # Terms
reveal_type(fastvae.elbo(x, q, decoder, terms=either))  # Tensor | Terms
reveal_type(fastvae.iwae(x, q, decoder, k=5, estimator="dreg", k_chunk=2))  # Tensor
reveal_type(fastvae.iwae(x, q, decoder, k=5, terms=True))  # Terms
reveal_type(fastvae.iwae(x, q, decoder, k=5, terms=either))  # Tensor | Terms
reveal_type(fastvae.bound(x, q, decoder, fastvae.bounds.TVO(), k=5, noise="qmc"))  # Tensor
reveal_type(fastvae.bound(x, q, decoder, fastvae.bounds.TVO(), terms=True))  # Terms
reveal_type(fastvae.bound(x, q, decoder, fastvae.bounds.TVO(), terms=either))  # Tensor | Terms
reveal_type(fastvae.beta_tc(x, q, decoder, beta=4.0, reduction="none"))  # Tensor
reveal_type(fastvae.beta_tc(x, q, decoder, dataset_size=100, terms=True))  # BetaTCTerms
reveal_type(fastvae.beta_tc(x, q, decoder, terms=either))  # Tensor | BetaTCTerms
reveal_type(fastvae.sleep(encoder, decoder, 9, latent_dim=2))  # Tensor
reveal_type(fastvae.schedules.linear(0.0, 1.0, 100)(3))  # Tensor
reveal_type(fastvae.schedules.stages([(0, 1), (10, 5)])(3))  # int
reveal_type(fastvae.diagnostics.gradient_snr(x.sum, encoder).snr["weight"])  # float
reveal_type(fastvae.log_weights(x, q, decoder, k=5))  # LogWeights
reveal_type(fastvae.log_marginal(x, q, decoder, k=5))  # LogMarginal
reveal_type(fastvae.reconstruction_log_prob(x, q, decoder))  # Tensor
reveal_type(fastvae.marginalize(x, bound, classes=3, alpha=0.5))  # Tensor
reveal_type(fastvae.marginalize(x, bound, log_q=x, terms=True))  # Marginal
reveal_type(fastvae.marginalize(x, bound, log_q=x, terms=either))  # Tensor | Marginal

vae = VAE(encoder, decoder, likelihood=Gaussian(scale=0.1))
reveal_type(vae.elbo(x))  # Tensor
reveal_type(vae.elbo(x, k=3, reduction="none"))  # Tensor
reveal_type(vae.elbo(x, terms=True))  # Terms
reveal_type(vae.elbo(x, terms=either))  # Tensor | Terms
reveal_type(vae.iwae(x, 5))  # Tensor
reveal_type(vae.iwae(x, k=5, terms=True))  # Terms
reveal_type(vae.iwae(x, k=5, terms=either))  # Tensor | Terms
reveal_type(vae.bound(x, fastvae.bounds.TVO(), 5))  # Tensor
reveal_type(vae.bound(x, fastvae.bounds.TVO(), q_objective=fastvae.bounds.WakePhi(), terms=True))  # Terms
reveal_type(vae.bound(x, fastvae.bounds.TVO(), terms=either))  # Tensor | Terms
reveal_type(vae.beta_tc(x, alpha=0.5))  # Tensor
reveal_type(vae.beta_tc(x, terms=True))  # BetaTCTerms
reveal_type(vae.beta_tc(x, terms=either))  # Tensor | BetaTCTerms
reveal_type(vae.sleep(3))  # Tensor
reveal_type(fastvae.diagnostics.latents(vae, x).kl)  # float
reveal_type(vae.log_marginal(x))  # LogMarginal
reveal_type(vae.log_marginal(x, k=10, noise="qmc", proposal="defensive"))  # LogMarginal
reveal_type(vae.ais(x, k=2, steps=3, start="prior"))  # AnnealedMarginal
reveal_type(vae.bdmc(n=3, latent_dim=2).gap)  # float
reveal_type(vae.reconstruction_log_prob(x, elementwise=True))  # Tensor
reveal_type(vae.evaluate(x))  # Evaluation
result = vae.evaluate(x, tol=0.1, checkpoint="run.npz", prepare_batch=lambda batch: {"x": batch[0]})
reveal_type(result.nll_interval)  # tuple[float, float]
reveal_type(result.to_dict()["nll"])  # Any
reveal_type(vae.posterior(x))  # Distribution
reveal_type(vae.sample(3))  # Any
reveal_type(DiagonalNormal(x, x).mu)  # Tensor
reveal_type(fastvae.quantize.VectorQuantizer(4, 2).encode(x))  # Tensor
b, g = fastvae.ops.bernoulli_log_prob, gaussian_log_prob
reveal_type(b)  # def (x: Tensor, logits: Tensor, *, mask: Tensor | None =) -> Tensor
reveal_type(g)  # def (x: Tensor, mean: Tensor, logvar: Tensor | float, *, mask: Tensor | None =) -> Tensor
reveal_type(gaussian_log_prob(x, x, logvar=0.0))  # Tensor
print(-vae.elbo(x), vae.encoder.weight)

fastvae.elbo(x, q, decoder, sample=3)  # error
fastvae.elbo(x, q, decoder, samples=3)  # error
fastvae.iwae(x, q, decoder, samples=3)  # error
fastvae.iwae(x, q, decoder, k="5")  # error
fastvae.beta_tc(x, q, decoder, samples=3)  # error
fastvae.log_weights(x, q, decoder)  # error
fastvae.marginalize(x, bound, c=3)  # error
fastvae.elbo(x, q, decoder, reduction="avg")  # error
fastvae.elbo(x, q, decoder, kl="exact")  # error
fastvae.elbo(x, q, decoder, free_bits_per="row")  # error
fastvae.iwae(x, q, decoder, estimator="DReG")  # error
fastvae.iwae(x, q, decoder, noise="sobol")  # error
fastvae.beta_tc(x, q, decoder, reduction="avg")  # error
fastvae.bound(x, q, decoder, fastvae.bounds.IWAE(), reduction="avg")  # error
fastvae.bounds.CIWAE(0.5, estimator="covariance")  # error
fastvae.bounds.TVO(estimator="dreg")  # error
fastvae.log_weights(x, q, decoder, k=3, noise="normal")  # error
fastvae.log_marginal(x, q, decoder, proposal="adaptive")  # error
fastvae.marginalize(x, bound, reduction="avg")  # error
fastvae.sleep(encoder, decoder, 9, latent_dim=2, reduction="avg")  # error
fastvae.audit.ais(x, q, decoder, start="q")  # error
fastvae.elbo(x, q, decoder, likelihood=0)  # error
vae.elbo(x, reduction="avg")  # error
vae.iwae(x, estimator="DReG")  # error
vae.forward(x, objective="ELBO")  # error
bound, log_likelihood, kl = vae.elbo(x, terms=True)  # error
vae.elbo(x, terms=True)[0]  # error
vae.elbo(x, bta=0.5)  # error
vae.iwae(x, beta=0.5)  # error
vae.bound(x, fastvae.bounds.TVO(), likelihood="bernoulli")  # error
gaussian_log_prob(x, x)  # error
gaussian_log_prob(x, mean=x, log_var=x)  # error
fastvae.ops.benoulli_log_prob(x, x)  # error
-vae.elbo(x, terms=True)  # error
vae.log_marginal(x, noise="sobol")  # error
vae.evaluate(x, tols=0.1)  # error
vae.evaluate(x, likelihood="bernoulli")  # error
vae.ais(x, step=3)  # error
vae.bdmc(start="q")  # error
vae.reconstruction_log_prob(x, elementwise="yes")  # error
vae.sleep(3, reduction="avg")  # error
result.to_dict(1)  # error
"""


@pytest.mark.slow
def test_a_typed_program(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file=", "--follow-imports=silent"]
    command += ["--cache-dir", str(tmp_path / "cache"), "--no-error-summary", program.name]
    environment = dict(os.environ)
    root = Path(fastvae.__file__).parents[1]
    if root.name != "site-packages":  # which mypy searches by itself
        environment["MYPYPATH"] = str(root)
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    said: dict[int, str] = {}
    for number, kind, message in re.findall(r"^program\.py:(\d+): (error|note): (.*)$", done.stdout, re.M):
        if kind == "error":
            said[int(number)] = "error"
        elif found := re.fullmatch(r'Revealed type is "(.*)"', message):
            named = re.sub(r"tuple\[[^\]]*fallback=([\w.]+)\]", r"\1", found[1])
            said[int(number)] = re.sub(r"\b\w+\.", "", named)
    wanted = {n: line.split("  # ")[1] for n, line in enumerate(PROGRAM.splitlines(), 1) if "  # " in line}
    assert said == wanted, done.stdout + done.stderr


def test_signatures_and_docstrings_at_run_time():
    names = list(inspect.signature(fastvae.elbo).parameters)
    assert names[:3] == ["x", "q", "decoder"] and {"k", "beta", "terms"} <= set(names)
    assert (
        "Evidence lower bound" in fastvae.elbo.__doc__ and ":func:`fastvae.elbo`" in fastvae.VAE.elbo.__doc__
    )


@pytest.mark.parametrize("name", ["elbo", "iwae", "bound", "beta_tc"])
def test_overloads_take_every_argument(name):
    """The keyword arguments of the overloads have the names and types of the function's."""
    function = inspect.unwrap(getattr(fastvae, name))
    keywords = [n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    types = get_type_hints(function)
    arguments = getattr(objectives, {"beta_tc": "BetaTC"}.get(name, name.title()) + "Arguments")
    assert {n: types[n] for n in keywords if n != "terms"} == get_type_hints(arguments)


# Keywords that a VAE passes itself, by method.
PASSED = {
    "log_marginal": {"k", "likelihood", "prior"},
    "reconstruction_log_prob": {"k"},
    "ais": {"likelihood", "prior", "modules"},
    "bdmc": {"modules"},
    "evaluate": set(),
    "sleep": set(),
}
OPTIONS = {
    "log_marginal": (fastvae.log_marginal, estimates.LogMarginalOptions),
    "reconstruction_log_prob": (fastvae.reconstruction_log_prob, estimates.ReconstructionOptions),
    "ais": (fastvae.audit.ais, estimates.AISOptions),
    "bdmc": (fastvae.audit.bdmc, estimates.BDMCOptions),
    "evaluate": (fastvae.evaluate, estimates.EvaluateOptions),
    "sleep": (fastvae.sleep, objectives.SleepOptions),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_options_of_a_vae_are_the_keywords_of_the_function(name):
    """They have its names and types, and the method's annotation names their type."""
    function, options = OPTIONS[name]
    function = inspect.unwrap(function)
    keywords = [n for n, p in inspect.signature(function).parameters.items() if p.kind is p.KEYWORD_ONLY]
    types = get_type_hints(function)
    assert {n: types[n] for n in keywords if n not in PASSED[name]} == get_type_hints(options)
    method = inspect.unwrap(getattr(fastvae.VAE, name))
    assert method.__annotations__["options"] == f"Unpack[{options.__name__}]"
    assert not options.__required_keys__


@pytest.mark.parametrize("name", [*OPTIONS, "elbo", "iwae", "bound", "beta_tc"])
def test_docstrings_of_a_vae_name_its_options(name):
    """An editor's hover shows the docstring, and ``**options`` without its names."""
    kinds = {
        "elbo": "ElboOptions",
        "iwae": "IwaeOptions",
        "bound": "QObjectiveOptions",
        "beta_tc": "BetaTCOptions",
    }
    options = OPTIONS[name][1] if name in OPTIONS else getattr(objectives, kinds[name])
    listed = re.search(r"Options: ([^.]*)\.", getattr(fastvae.VAE, name).__doc__)[1]
    expected = {*get_type_hints(options), *(["terms"] if name in kinds else [])}
    assert sorted(re.findall(r"``(\w+)``", listed)) == sorted(expected)


def test_a_vae_takes_no_keyword_that_it_passes():
    """Calls that the types reject fail at run time, too."""
    vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8), latent_dim=2)
    first = {"bdmc": (), "sleep": (3,)}
    for name, passed in PASSED.items():
        for keyword in passed - {"k"}:
            with pytest.raises(TypeError, match=f"multiple values for keyword argument '{keyword}'"):
                getattr(vae, name)(*first.get(name, (torch.rand(3, 8),)), **{keyword: None})


def test_literals_match_the_accepted_options():
    assert get_args(options.Noise) == random.NOISES
    assert get_args(options.Estimator) == normal_diagonal.ESTIMATORS
    assert set(get_args(options.ProposalName)) <= set(proposals._NAMED)
    kinds = [v for v in vars(bounds).values() if isinstance(v, type) and issubclass(v, bounds.Bound)]
    assert {e for kind in kinds for e in kind.estimators} == set(get_args(options.BoundEstimator))
    assert all(callable(getattr(fastvae.VAE, name)) for name in options.OBJECTIVES)


def _public_functions():
    """Yield (name, function) of every public function, and of the methods of every public class."""
    modules = [fastvae, *(m for m in vars(fastvae).values() if inspect.ismodule(m) and hasattr(m, "__all__"))]
    for module in modules:
        for name in module.__all__:
            value = getattr(module, name)
            if inspect.isclass(value):
                methods = inspect.getmembers(value, inspect.isfunction)
                yield from ((f"{name}.{n}", f) for n, f in methods if f.__module__.startswith("fastvae"))
            elif inspect.isfunction(value):
                yield f"{module.__name__}.{name}", value


def test_types_resolve_at_run_time():
    """Libraries of commands, settings and documentation read type hints at run time."""
    functions = dict(_public_functions())
    assert {"fastvae.elbo", "VAE.elbo", "VAE.evaluate", "Evaluation.plot"} <= set(functions)
    for name, function in functions.items():
        assert isinstance(get_type_hints(function), dict), name
