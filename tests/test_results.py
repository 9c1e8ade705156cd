"""Results of an op belong to the caller: they may be modified in place, and gradients stay right."""

from __future__ import annotations

import pytest
import torch

import fastvae
from fastvae import ops

from .cases import DECLARED, LIKELIHOODS, data
from .conftest import CUDA, DEVICE


def _leaf(*shape):
    return torch.randn(shape, device=DEVICE).requires_grad_()


def _seed():
    return torch.tensor(7, device=DEVICE)


# x [B, *event] and the leading axes of the parameters.
SHAPES = {
    "[B, X]": ((5, 4), ()),
    "[1, B, X]": ((5, 4), (1,)),
    "[K, B, X]": ((5, 4), (3,)),
    "[K, B, H, W]": ((5, 4, 2), (3,)),
    "[B, H, W]": ((5, 4, 2), ()),
    "[K, L, B, X]": ((5, 4), (3, 2)),
    "[K, B]": ((5,), (3,)),
}


def _likelihood(name, event, lead, row=False):
    """Return a call of a likelihood; with ``row``, the parameters after the first are one row."""
    declared = DECLARED[name]
    x = data(name, *event).requires_grad_(declared.differentiable)
    given = [_leaf(*lead, *event)]
    given += [_leaf(*(event[1:] if row else (*lead, *event))) for _ in declared.outputs[1:]]
    inputs = [*given, x] if declared.differentiable else given
    return lambda: (getattr(ops, f"{name}_log_prob")(x, *given),), inputs


def _latent(op, samples, **options):
    mu, logvar = _leaf(5, 4), _leaf(5, 4)
    return lambda: getattr(ops, op)(mu, logvar, k=samples, seed=_seed(), **options), [mu, logvar]


def _log_mean_exp(*shape, dim=0):
    log_w = _leaf(*shape)
    return lambda: (ops.log_mean_exp(log_w, dim=dim),), [log_w]


CASES = {
    **{
        f"{op} {name}{' row' * row}": lambda op=op, s=s, row=row: _likelihood(op, *s, row)
        for op in LIKELIHOODS
        for name, s in SHAPES.items()
        for row in range(len(DECLARED[op].outputs[:2]))
    },
    "kl without samples": lambda: _latent("rsample_kl", None),
    "kl of one sample": lambda: _latent("rsample_kl", 1),
    "kl of three": lambda: _latent("rsample_kl", 3),
    "kl per dimension": lambda: _latent("rsample_kl", 3, per_dimension=True),
    "ratio": lambda: _latent("rsample_log_ratio", 3),
    "ratio of one": lambda: _latent("rsample_log_ratio", 1, estimator="stl"),
    "log-mean-exp": lambda: _log_mean_exp(3, 5),
    "log-mean-exp of one row": lambda: _log_mean_exp(3),
    "log-mean-exp of three axes": lambda: _log_mean_exp(5, 3, 4, dim=1),
    "log-mean-exp of thousands": lambda: _log_mean_exp(3000, 2),
}


RESHAPED = ("one row", "three axes")


@pytest.mark.parametrize("name", CASES)
def test_results_may_be_modified_in_place(backend, name):
    call, inputs = CASES[name]()
    results = call()
    weights = [torch.rand_like(r) for r in results]
    expected = torch.autograd.grad(results, inputs, weights)
    modified = call()
    for i, r in enumerate(modified):
        kept = r.detach().clone()
        # Add a term with a gradient to one, multiply the other.
        r.add_(inputs[0].sum()) if i else r.mul_(2)
        torch.testing.assert_close(r.detach(), kept + inputs[0].sum().detach() if i else 2 * kept)
    found = torch.autograd.grad(modified, inputs, weights)
    # The factor doubles the gradient of the first result; the sum adds ones to that of the first input.
    first = torch.autograd.grad(call()[:1], inputs, weights[:1], allow_unused=True)
    for i, (f, e, g) in enumerate(zip(found, expected, first, strict=True)):
        more = sum(float(w.sum()) for w in weights[1:]) if i == 0 else 0.0
        torch.testing.assert_close(f, e + (0 if g is None else g) + more)


# Axes other than [K, N] are reshaped by PyTorch, and the results back.
@pytest.mark.parametrize("name", [n for n in CASES if n not in (f"log-mean-exp of {s}" for s in RESHAPED)])
@pytest.mark.parametrize("grad", [True, False])
def test_kernels_return_no_views(name, grad):
    for backend in ("native",) if CUDA else ("native", "triton"):
        with fastvae.use_backend(backend), torch.set_grad_enabled(grad):
            call, _ = CASES[name]()
            assert all(r._base is None for r in call()), backend
