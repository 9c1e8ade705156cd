"""k_chunk recomputes the draws in the backward pass, and fails if the tensors have changed."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal, Mixture
from fastvae.likelihoods import Gaussian
from fastvae.objectives import bounds

from .conftest import DEVICE

B, D, X, K, K_CHUNK = 4, 3, 7, 11, 4
CHANGED = "changed in place between the forward and the backward pass"


class Model:
    """Inputs of a bound, and the bound by chunks."""

    def __init__(self):
        torch.manual_seed(0)
        layers = nn.Linear(D, D), nn.BatchNorm1d(D), nn.Tanh(), nn.Linear(D, X).requires_grad_(False)
        self.decoder = nn.Sequential(*layers).to(DEVICE)
        self.x = torch.rand(B, X, device=DEVICE)
        self.mu, self.logvar = (torch.randn(B, D, device=DEVICE).requires_grad_() * 1.0 for _ in range(2))
        self.mask = torch.rand(B, X, device=DEVICE) < 0.7
        self.context = torch.randn(B, D, device=DEVICE)
        self.prior = DiagonalNormal(*(nn.Parameter(torch.zeros(D, device=DEVICE)) for _ in range(2)))
        self.likelihood = Gaussian(scale=0.5, learned=True).to(DEVICE)

    def bound(self, call=fastvae.iwae, *more, q=None, decoder=None, k_chunk=K_CHUNK, **options):
        torch.manual_seed(1)
        q = (self.mu, self.logvar) if q is None else q
        return call(
            self.x, q, decoder or self.decoder, *more, k=K, k_chunk=k_chunk, likelihood=self.likelihood,
            prior=self.prior, mask=self.mask, **options,
        )  # fmt: skip

    def conditional(self):
        return self.bound(decoder=lambda z, c: self.decoder(z + c), context=self.context)


@torch.no_grad()
def add(tensor):
    tensor.detach().add_(0.1)


CHANGES = {
    "x": lambda m: add(m.x),
    "q.mu": lambda m: add(m.mu),
    "q.logvar": lambda m: add(m.logvar),
    "mask": lambda m: m.mask.logical_not_(),
    "context": lambda m: add(m.context),
    # A function's parameters are found in the graph.
    "a tensor that the decoder reads": lambda m: add(m.decoder[0].weight),
    "a tensor that the decoder reads ": lambda m: add(m.decoder[0].bias),
    "prior": lambda m: add(m.prior.mu),
    "likelihood": lambda m: add(m.likelihood.log_scale),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_before_the_backward_pass_is_refused(name):
    model = Model()
    value = model.conditional()
    CHANGES[name](model)
    # If the graph outside the chunks reads it too, autograd may raise first.
    with pytest.raises(RuntimeError, match=f"^{name.strip()}.*{CHANGED}|modified by an inplace operation"):
        value.backward()


@pytest.mark.parametrize("objective", [None, bounds.Jackknife(), bounds.IWAE(estimator="dreg")], ids=str)
def test_a_step_of_the_optimiser_before_the_backward_pass_is_refused(objective):
    model = Model()
    model.decoder.eval()  # dreg needs rows that do not depend on each other
    call = (fastvae.iwae,) if objective is None else (fastvae.bound, objective)
    optimiser = torch.optim.Adam(model.decoder[0].parameters())
    first, second = model.bound(*call), model.bound(*call)
    first.backward(retain_graph=True)
    optimiser.step()
    for value in (second, first):
        with pytest.raises(RuntimeError, match=rf"^decoder\.0\.weight.*{CHANGED}.*before optimizer\.step"):
            value.backward()


def test_changes_of_frozen_parameters_are_detected():
    model = Model()
    value = model.bound()
    add(model.decoder[3].weight)
    with pytest.raises(RuntimeError, match=rf"^decoder\.3\.weight, \[7, 3\], was {CHANGED}"):
        value.backward()


@pytest.mark.parametrize("family", ["Normal", "Laplace", "Mixture"])
def test_changes_of_any_posterior_are_detected(family):
    model = Model()
    if family == "Mixture":
        parts = [DiagonalNormal(model.mu + i, model.logvar + i) for i in range(2)]
        q, read = Mixture(parts, torch.zeros(B, 2, device=DEVICE)), parts[1].mu
    else:
        scale = model.logvar.exp()
        q, read = getattr(torch.distributions, family)(model.mu, scale), scale
    value = model.bound(q=q)
    add(read)
    with pytest.raises(RuntimeError, match=f"^q.*{CHANGED}|modified by an inplace operation"):
        value.backward()


class Shifted(nn.Module):
    """Decoder that changes its own bias while it runs, and restores it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(D, X)

    def forward(self, z):
        with torch.no_grad():
            self.layer.bias.add_(1.0)
            before = self.layer.bias.clone()
        output = nn.functional.linear(z, self.layer.weight, before)
        with torch.no_grad():
            self.layer.bias.sub_(1.0)
        return output


def test_a_decoder_may_change_its_own_parameters():
    model, decoder = Model(), Shifted().to(DEVICE)
    grads = []
    for k_chunk in (None, K_CHUNK):
        value = model.bound(decoder=decoder, k_chunk=k_chunk)
        grads.append(torch.autograd.grad(value, [decoder.layer.weight, model.prior.mu]))
    for whole, chunked in zip(*grads, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-6)


def test_running_statistics_may_move_between_two_losses():
    model = Model()
    (model.bound() + model.bound()).backward()
    assert bool(model.decoder[0].weight.grad.isfinite().all())


def test_the_encoder_may_change():
    """The encoder may change, as without chunks: it is not rerun."""
    model, encoder = Model(), nn.Linear(X, 2 * D).to(DEVICE)
    value = model.bound(q=encoder(model.x))
    add(encoder.bias)
    value.backward()
    assert encoder.bias.grad is not None
