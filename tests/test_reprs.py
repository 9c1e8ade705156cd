"""Reprs show every argument that is not the default, if possible as the call itself."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fastvae
from fastvae.cli import main
from fastvae.distributions import (
    AggregatePosterior,
    DiagonalNormal,
    Exponential,
    FullNormal,
    Mixture,
    NormalMixture,
    StandardNormal,
    StudentT,
    VampPrior,
)
from fastvae.estimation import proposals
from fastvae.likelihoods import Gaussian, Joint, Laplace, from_distribution
from fastvae.objectives import bounds, schedules

NAMES = {**vars(bounds), **vars(proposals), **vars(fastvae.likelihoods), "schedules": schedules}

# Calls whose objects print as themselves; evaluating them gives equal objects.
CALLS = [
    "Gaussian()",
    "Gaussian(scale=0.1)",
    "Gaussian(scale=0.1, learned=True)",
    "SoftplusGaussian(floor=0.001)",
    "OptimalGaussian(momentum=0.5)",
    "Laplace(scale=0.25)",
    "LogNormal(scale=0.25, learned=True)",
    "StudentT(df=4.0)",
    "StudentT(scale=0.5, df=4.0, learned_df=True)",
    "NegativeBinomial(inverse_dispersion=2.0, learned=True)",
    "ZeroInflatedNegativeBinomial(inverse_dispersion=2.0)",
    "DiscretizedLogistic(levels=17, low=-1.0, scale=0.5)",
    "DiscretizedLogistic(high=255.0)",
    "DiscretizedLogisticMixture(levels=17, low=0, high=1)",
    "Categorical(ignore_index=-1)",
    "Beta()",
    "IWAE(groups=8, alpha=0.5, estimator='dreg')",
    "CIWAE(beta=0.25, estimator='iwae')",
    "Defensive(share=0.25)",
    "schedules.linear(0.0, 1.0, 100)",
    "schedules.cosine(0.5, 1.0, 100, delay=5)",
    "schedules.cyclical(0.0, 1.0, 80, cycles=2, ramp=0.25)",
    "schedules.stages([(0, 1), (1000, 'five')])",
]


@pytest.mark.parametrize("call", CALLS)
def test_repr_is_the_constructor_call(call):
    made = eval(call, NAMES)  # noqa: S307
    assert repr(made) == call
    assert repr(eval(repr(made), NAMES)) == call  # noqa: S307


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: Gaussian(scale="softplus", floor=0.001), "SoftplusGaussian(floor=0.001)"),
        (lambda: Gaussian(scale=torch.ones(5), learned=True), "Gaussian(scale=<tensor [5]>, learned=True)"),
        (lambda: Joint(pixels="bernoulli", size=Laplace(scale=0.5)), "(size): Laplace(scale=0.5)"),
        (lambda: from_distribution(torch.distributions.Poisson, inside=1.0), "Poisson'>, inside=1.0"),
        (
            lambda: fastvae.VAE(
                nn.Linear(5, 4), nn.Linear(2, 5), likelihood=Gaussian(scale=0.1), latent_dim=2, fuse=False
            ),
            "latent_dim=2, fuse=False",
        ),
    ],
)
def test_repr_shows_the_options(make, words):
    assert words in repr(make())


def _vector(*shape):
    return torch.zeros(shape or (3,))


class _Inputs(nn.Module):
    def forward(self):
        return torch.zeros(9, 7)


DISTRIBUTIONS = {
    "NormalMixture(mu=learned float32 [4, 3], logvar=float32 [4, 3], logits=float32 [4])": lambda: (
        NormalMixture(nn.Parameter(_vector(4, 3)), _vector(4, 3), _vector(4))
    ),
    "Laplace(loc=learned float32 [3], log_scale=float32 [3])": lambda: fastvae.distributions.Laplace(
        nn.Parameter(_vector()), _vector()
    ),
    "Exponential(log_scale=float32 [3])": lambda: Exponential(_vector()),
    "StudentT(loc=float32 [3], log_scale=float32 [3], df=4.0)": lambda: StudentT(_vector(), _vector(), 4.0),
    "FullNormal(mu=learned float32 [3], tril=float32 [6])": lambda: FullNormal(
        nn.Parameter(_vector()), _vector(6)
    ),
    "DiagonalNormal(mu=float32 [4, 3], logvar=float32 [4, 3], scale_form='softplus', floor=0.1)": lambda: (
        DiagonalNormal(_vector(4, 3), _vector(4, 3), scale_form="softplus", floor=0.1)
    ),
    "DiagonalNormal(mu=float32 [3], logvar=float32 [3], logvar_range=[-5.0, 5.0])": lambda: DiagonalNormal(
        _vector(), _vector(), logvar_range=(-5.0, 5.0)
    ),
    "Mixture(components=[Laplace(loc=float32 [4, 3], log_scale=float32 [4, 3]), StandardNormal()])": lambda: (
        Mixture([fastvae.distributions.Laplace(_vector(4, 3), _vector(4, 3)), StandardNormal()])
    ),
}


@pytest.mark.parametrize("shown", DISTRIBUTIONS)
def test_repr_of_distributions(shown):
    """Posteriors and priors print tensors by dtype and shape, and whether they are learned."""
    assert repr(DISTRIBUTIONS[shown]()) == shown


def test_repr_of_priors_with_modules():
    encoder, inputs = nn.Linear(7, 6), nn.Parameter(torch.rand(9, 7))
    vamp = repr(VampPrior(encoder, inputs, torch.zeros(9)))
    assert "logits=float32 [9]" in vamp and "pseudo_inputs=learned float32 [9, 7]" in vamp
    assert "(encoder): Linear(in_features=7" in vamp
    assert "(pseudo_inputs): _Inputs()" in repr(VampPrior(encoder, _Inputs()))
    aggregate = repr(AggregatePosterior(encoder, torch.rand(40, 7), batch_size=8))
    assert "batch_size=8, data=float32 [40, 7]" in aggregate and "(encoder): Linear" in aggregate
    learned = fastvae.distributions.Laplace(nn.Parameter(_vector()), _vector())
    mixture = repr(Mixture([learned, StandardNormal()], _vector(2)))
    assert "components=[Laplace, StandardNormal()], logits=float32 [2]" in mixture
    assert "(component_0): Laplace(loc=learned float32 [3], log_scale=float32 [3])" in mixture
    vae = fastvae.VAE(encoder, nn.Linear(3, 7), prior=VampPrior(encoder, inputs))
    assert "pseudo_inputs=learned float32 [9, 7]" in repr(vae)


def test_repr_shows_the_current_learned_scale():
    likelihood = Gaussian(scale=0.1, learned=True)
    with torch.no_grad():
        likelihood.log_scale.add_(1)
    assert repr(likelihood) == "Gaussian(scale=0.271828, learned=True)"


def test_columns_of_info_are_separated(capsys):
    assert main(["info"]) == 0
    lines = capsys.readouterr().out.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith("ops "))
    at = [lines[begin].index(heading) for heading in ("CPU tensors", "GPU tensors")]
    assert len(lines) - begin - 1 == len(fastvae.ops.__all__)
    for name, line in zip(fastvae.ops.__all__, lines[begin + 1 :], strict=True):
        assert line[: at[0]].strip() == name
        assert all(line[i - 1] == " " and line[i] != " " for i in at)


@pytest.mark.parametrize("gpu", [False, True])
@pytest.mark.parametrize("triton", [False, True])
def test_info_names_the_backend_on_a_gpu(monkeypatch, capsys, gpu, triton):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr("fastvae.core.backend.has_triton", lambda: triton)
    with fastvae.use_backend("native"):
        main(["info"])
    line = next(t for t in capsys.readouterr().out.splitlines() if t.startswith("  rsample_kl"))
    expected = {
        (True, True): "Triton",
        (True, False): "fails: no triton",
        (False, True): "Triton, but there is no GPU",
        (False, False): "nothing: no GPU, no Triton here",
    }
    assert expected[gpu, triton] in line
    assert line.endswith("Triton") == (gpu and triton)


def test_the_console_script():
    """The console script, installed next to the interpreter, is python -m fastvae."""
    script = Path(sys.executable).with_name("fastvae")
    assert script.exists(), "install again: pip install -e ."
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    found = subprocess.run([script, "info"], capture_output=True, text=True, env=environment, timeout=300)
    assert found.returncode == 0 and "rsample_kl" in found.stdout
