"""Every decoder gives the same numbers, gradients, hook calls and errors, its last layer left out or not."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

import fastvae
from fastvae.ops import head

from .decoders import DECODERS, EVENTS

B, K, D, X = 13, 130, 3, 160  # K·B·X is above the threshold, 2^18


@pytest.fixture(autouse=True)
def threshold(monkeypatch):
    """The threshold of processors with tiles, so that every processor leaves the last layer out here."""
    monkeypatch.setattr(head, "FEWEST_BY_BLAS", head.FEWEST_NUMBERS)
    monkeypatch.setattr(head, "NUMBERS_PER_INPUT", 0)


def outcome(name, fuse, run):
    """Value, gradients by name, hook calls and the error's type of a fresh decoder."""
    case = DECODERS[name]
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(X, 2 * D), case.make(D, X)
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", latent_dim=D, fuse=fuse)
    x = torch.rand(B, X, generator=torch.Generator().manual_seed(1)).round()
    EVENTS.clear()
    torch.manual_seed(2)
    error = None
    value = torch.full((), torch.nan)
    try:
        with case.around(decoder), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            value = run(vae, x)
            if value.requires_grad:
                value.sum().backward()
    except Exception as e:
        error = type(e)
    grads = {n: p.grad for n, p in vae.named_parameters()}
    return value.detach(), grads, dict(EVENTS), error


RUNS = {
    "iwae": lambda vae, x: vae.iwae(x, k=K),
    "log_marginal": lambda vae, x: vae.log_marginal(x, k=K).log_px,
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("name", DECODERS)
def test_a_decoder_is_called_as_it_is(name, run):
    value, grads, events, error = outcome(name, True, RUNS[run])
    expected, expected_grads, expected_events, expected_error = outcome(name, False, RUNS[run])
    assert error is expected_error
    assert events == expected_events
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=1e-3, equal_nan=True)
    assert grads.keys() == expected_grads.keys()
    for parameter, grad in expected_grads.items():
        assert (grads[parameter] is None) == (grad is None), parameter
        if grad is not None:
            scale = float(grad.abs().max())
            torch.testing.assert_close(grads[parameter], grad, rtol=1e-3, atol=1e-4 * scale, equal_nan=True)
