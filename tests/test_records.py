"""Results as frozen records: no unpacking or indexing, copies, files, and torch's compiler and exporter."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle

import pytest
import torch
from torch import nn

import fastvae

from .models import generator

B, D, X = 5, 2, 6


def _vae():
    torch.manual_seed(0)
    return fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), likelihood="bernoulli", latent_dim=D)


def _x():
    return torch.rand(B, X, generator=torch.Generator().manual_seed(1)).round()


def _marginal(vae, x):
    def bound(x, y):
        return vae.elbo(x * y[:, :1], kl="mc", reduction="none")

    return fastvae.marginalize(x, bound, classes=3, terms=True)


def _evaluation(vae, x, **options):
    return vae.evaluate(x, k=30, progress=False, generator=generator(1), **options)


RESULTS = {
    "LogMarginal": lambda vae, x: vae.log_marginal(x, k=30),
    "AnnealedMarginal": lambda vae, x: vae.ais(x, steps=3, k=2),
    "MarginalBounds": lambda vae, x: vae.bdmc(n=4, steps=3, k=2),
    "LatticeMarginal": lambda vae, x: fastvae.audit.lattice(
        x, vae.decoder, latent_dim=D, points=33, likelihood="bernoulli"
    ),
    "Marginal": _marginal,
    "Evaluation": _evaluation,
    "Audit": lambda vae, x: _evaluation(vae, x, audit=1).audit,
}
# Results of functions of tensors.
TRACED = ("LogMarginal", "Marginal")


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_a_frozen_record(name):
    result = RESULTS[name](_vae(), _x())
    assert type(result).__name__ == name and not isinstance(result, tuple)
    with pytest.raises(TypeError, match="unpack"):
        _first, *_ = result
    with pytest.raises(TypeError, match="subscriptable"):
        result[0]
    with pytest.raises(TypeError):
        len(result)
    field = dataclasses.fields(result)[0].name
    with pytest.raises(dataclasses.FrozenInstanceError):
        setattr(result, field, None)
    assert result == result
    assert result != copy.copy(result)  # values are compared by torch.equal


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_copied_and_pickled(name):
    result = RESULTS[name](_vae(), _x())
    detached = dataclasses.replace(
        result, **{n: v.detach() for n, v in vars(result).items() if isinstance(v, torch.Tensor)}
    )
    for other in (copy.deepcopy(detached), pickle.loads(pickle.dumps(detached))):  # noqa: S301
        assert type(other) is type(result)
        for field, value in vars(detached).items():
            got = getattr(other, field)
            if isinstance(value, torch.Tensor):
                assert torch.equal(got.nan_to_num(), value.nan_to_num()), field
            else:
                assert repr(got) == repr(value), field


class Traced(nn.Module):
    """Module whose output is a result."""

    def __init__(self, name):
        super().__init__()
        self.vae, self.call = _vae(), RESULTS[name]

    def forward(self, x):
        return self.call(self.vae, x)


def _equal_after_a_seed(one, other, x):
    results = []
    for function in (one, other):
        torch.manual_seed(3)
        results.append(function(x))
    assert type(results[0]) is type(results[1])
    torch.testing.assert_close(vars(results[0]), vars(results[1]), equal_nan=True)


@pytest.mark.parametrize("name", TRACED)
def test_a_result_of_a_compiled_function(name):
    torch._dynamo.reset()
    module = Traced(name)
    whole = name == "Marginal"
    with torch.no_grad():
        _equal_after_a_seed(torch.compile(module, backend="eager", fullgraph=whole), module, _x())


def test_a_result_of_an_exported_program_in_a_file():
    module = Traced("LogMarginal")
    file = io.BytesIO()
    with torch.no_grad():
        torch.export.save(torch.export.export(module, (_x(),)), file)
    file.seek(0)
    _equal_after_a_seed(torch.export.load(file).module(), module, _x())


def test_a_result_has_a_gradient_after_compilation():
    torch._dynamo.reset()
    module = Traced("Marginal")
    grads = []
    for function in (module, torch.compile(module, backend="eager")):
        torch.manual_seed(3)
        bound = function(_x()).bound
        grads.append(torch.autograd.grad(bound.sum(), list(module.parameters())))
    torch.testing.assert_close(*grads)


def test_a_result_of_vmap():
    """A result is a pytree: transforms map over its tensors."""
    log_w = torch.randn(3, 40, B, dtype=torch.float64)
    found = torch.vmap(lambda w: fastvae.audit.LatticeMarginal(w.logsumexp(0), w.amax(0)))(log_w)
    assert torch.equal(found.log_px, log_w.logsumexp(1)) and found.error.shape == (3, B)
