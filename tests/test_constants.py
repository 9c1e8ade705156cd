"""Cached constants, such as tables of indices: tensors of no mode, whatever mode first needs them."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import fastvae
from fastvae import likelihoods
from fastvae.distributions import FullNormal
from fastvae.distributions.covariance import triangle_positions
from fastvae.objectives import usual
from fastvae.ops import categorical
from fastvae.reference import random as reference

from .models import generator

K, B, X, D = 5, 4, 7, 3
CPU = torch.device("cpu")
CACHES = triangle_positions, categorical._table, usual._shared_number, reference.net
CACHED = {
    "triangle": lambda: triangle_positions(D, CPU),
    "columns": lambda: categorical._table((0, 2, X), CPU),
    "number": lambda: usual._shared_number(0.3, torch.float32, CPU, 0),
    "net": lambda: reference.net(CPU),
}


@pytest.fixture(autouse=True)
def fresh():
    for function in CACHES:
        function.cache_clear()


def _tensors(value):
    return value if isinstance(value, tuple) else (value,)


class Full(nn.Linear):
    """Encoder with a full covariance."""

    def __init__(self):
        super().__init__(X, D + D * (D + 1) // 2)

    def forward(self, x):
        h = super().forward(x)
        return FullNormal(h[:, :D], h[:, D:])


def _full_posterior():
    vae = fastvae.VAE(Full(), nn.Linear(D, X), likelihood="bernoulli")
    return vae, torch.rand(B, X).round(), {}


def _full_prior():
    prior = FullNormal(nn.Parameter(torch.zeros(D)), nn.Parameter(torch.zeros(D * (D + 1) // 2)))
    vae = fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), likelihood="bernoulli", prior=prior)
    return vae, torch.rand(B, X).round(), {}


def _net_of_noise():
    vae = fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), likelihood=likelihoods.Gaussian(scale=0.3))
    return vae, torch.randn(B, X), {"noise": "qmc", "k": K}


@pytest.mark.parametrize("model", [_full_posterior, _full_prior, _net_of_noise])
@pytest.mark.parametrize("first", [torch.inference_mode, lambda: torch.device("meta")])
def test_training_after_a_first_call_in_another_mode(model, first):
    """A first call in inference mode, such as a validation before training, leaves training as it is."""
    torch.manual_seed(0)
    vae, x, options = model()
    objectives = [vae.iwae] if options else [vae.elbo, vae.iwae]
    expected = [objective(x, generator=generator(3), **options) for objective in objectives]
    for function in CACHES:
        function.cache_clear()
    with first():
        for objective in objectives:
            objective(x, generator=generator(3), **options)
    for objective, value in zip(objectives, expected, strict=True):
        found = objective(x, generator=generator(3), **options)
        found.backward()
        assert torch.equal(found, value)


@pytest.mark.parametrize("name", CACHED)
def test_constants_of_a_mode_are_not_kept(name):
    """A fake mode, inference mode and a default device get right tensors, and leave right ones to others."""
    function = CACHED[name]
    with FakeTensorMode() as mode:
        assert all(t.fake_mode is mode for t in _tensors(function()))
    with torch.inference_mode(), torch.device("meta"):
        function()
    for t in _tensors(function()):
        assert type(t) is torch.Tensor and t.device == CPU and not t.is_inference()
    assert all(a is b for a, b in zip(_tensors(function()), _tensors(function()), strict=True))
    with FakeTensorMode() as mode:  # a real tensor among fake ones would raise
        assert all(t.fake_mode is mode for t in _tensors(function()))


def test_a_full_covariance_under_a_fake_mode():
    """Shapes from a fake mode, before and after real calls."""
    vae, x, _ = _full_posterior()
    for _ in range(2):
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert vae.posterior(mode.from_tensor(x)).scale_tril.shape == (B, D, D)
        vae.elbo(x).backward()
