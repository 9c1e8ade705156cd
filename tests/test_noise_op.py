"""random.normal, and sampling by it, under compilers and exporters: the values of eager mode."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal

from .conftest import DEVICE


def _seed(value=9):
    return torch.tensor(value, device=DEVICE)


def test_opcheck_on_every_backend(backend):
    arguments = _seed(), 2, 3, 5, 1, 4, 6
    for dtype in (torch.float32, torch.float64):
        torch.library.opcheck(torch.ops.fastvae.normal.default, (*arguments, dtype))


def test_compiled(backend):
    def draw(seed, like):
        return fastvae.random.normal(seed, 2, *like.shape, sample_offset=1, row_offset=3, level=2) * like

    compiled = torch.compile(draw, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((3, 5), (4, 7), (6, 1)):
        like = torch.rand(shape, device=DEVICE)
        assert torch.equal(compiled(_seed(), like), draw(_seed(), like))
    # The seed is an input, not a constant.
    assert not torch.equal(compiled(_seed(10), like), compiled(_seed(), like))


def test_an_int_seed_in_a_compiled_function(backend):
    def draw():
        return fastvae.random.normal(2**63 + 5, 2, 3, 5, dtype=torch.float64, device=DEVICE)

    assert torch.equal(torch.compile(draw, backend="aot_eager", fullgraph=True)(), draw())


class Draws(nn.Module):
    def forward(self, seed, like):
        return fastvae.random.normal(seed, 2, like.shape[0], 5) * like


@pytest.mark.parametrize("strict", [True, False])
def test_exported(strict):
    """Exported programs take any number of rows."""
    like = torch.ones(3, 5, device=DEVICE)
    shapes = {"seed": None, "like": {0: torch.export.Dim("rows")}}
    exported = torch.export.export(Draws(), (_seed(), like), dynamic_shapes=shapes, strict=strict)
    like = torch.rand(6, 5, device=DEVICE)
    assert torch.equal(exported.module()(_seed(4), like), Draws()(_seed(4), like))


def _vae():
    return fastvae.VAE(nn.Linear(7, 6), nn.Linear(3, 7), likelihood="bernoulli", latent_dim=3).to(DEVICE)


def _same_draws(one, other):
    """Assert that two functions draw the same from torch's random state."""
    torch.manual_seed(3)
    found = one()
    torch.manual_seed(3)
    torch.testing.assert_close(found, other())


@pytest.mark.parametrize("prior", ["standard", "diagonal"])
def test_prior_and_model_sample_compiled(backend, prior):
    vae = _vae()
    if prior == "diagonal":
        mu, logvar = torch.randn(2, 3, device=DEVICE)
        vae.prior = DiagonalNormal(mu, logvar)
    compiled = torch.compile(vae.sample, backend="aot_eager", fullgraph=True)
    _same_draws(lambda: compiled(4), lambda: vae.sample(4))


def test_model_samples_compiled_for_a_processor():
    vae = _vae()
    # Otherwise Inductor's random numbers are not torch's.
    compiled = torch.compile(vae.sample, fullgraph=True, options={"fallback_random": True})
    _same_draws(lambda: compiled(4), lambda: vae.sample(4))


class Samples(nn.Module):
    def __init__(self):
        super().__init__()
        self.vae = _vae()

    def forward(self, like):
        return self.vae.sample(like.shape[0])


def test_model_samples_exported():
    module = Samples()
    shapes = {"like": {0: torch.export.Dim("rows")}}
    exported = torch.export.export(module, (torch.ones(3, 1, device=DEVICE),), dynamic_shapes=shapes)
    like = torch.ones(5, 1, device=DEVICE)
    _same_draws(lambda: exported.module()(like), lambda: module(like))


def test_shapes_on_other_devices():
    seed = torch.zeros((), dtype=torch.int64, device="meta")
    drawn = fastvae.random.normal(seed, 2, 3, 5, dtype=torch.float64)
    assert (drawn.shape, drawn.dtype, drawn.device.type) == ((2, 3, 5), torch.float64, "meta")
