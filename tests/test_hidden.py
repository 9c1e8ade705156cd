"""Hidden layers of a decoder, deferred with its last layer and computed in the head's blocks."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional

import fastvae
from fastvae.core.deferred import HiddenLayer, LastLayer
from fastvae.inputs.last_layer import run_to_last_layer
from fastvae.ops import head

from .models import rand, randn

K, B, D, X = 6, 9, 5, 11

ACTIVATIONS = {
    "identity": nn.Identity,
    "relu": nn.ReLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "tanh": nn.Tanh,
    "sigmoid": nn.Sigmoid,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "gelu_tanh": lambda: nn.GELU(approximate="tanh"),
    "elu": lambda: nn.ELU(0.7),
    "leaky_relu": lambda: nn.LeakyReLU(0.2),
    "softplus": nn.Softplus,
    "dropout": lambda: nn.Dropout(0.3).eval(),
}


def network(*between, widths=(17, 40, 33, 7), first=D):
    """Return linear layers with these modules between them, each a list."""
    layers, sizes = [], [first, *widths[: len(between)]]
    for i, modules in enumerate(between):
        layers += [nn.Linear(sizes[i], sizes[i + 1]), *modules]
    return nn.Sequential(*layers, nn.Linear(sizes[-1], X))


def deferred(decoder, z=None):
    """Return the names of the deferred hidden layers' activations, None if the last layer is not deferred."""
    returned = run_to_last_layer(decoder, randn(K * B, D, seed=1).cpu() if z is None else z)
    if type(returned) is not LastLayer:
        return None
    return [layer.activation.split(":")[0] for layer in returned.hidden]


def bounds(decoder, fuse, backward=True, **options):
    """Return IWAE bounds and the gradients of all parameters."""
    torch.manual_seed(2)
    vae = fastvae.VAE(nn.Linear(X, 2 * D), decoder, likelihood="bernoulli", fuse=fuse)
    x = rand(B, X, seed=3).cpu().round()
    with torch.set_grad_enabled(backward):
        bound = vae.iwae(x, k=K, **options)
    if not backward:
        return [bound]
    parameters = [*vae.parameters()]
    return [bound, *torch.autograd.grad(bound.mean(), parameters)]


def assert_close(found, expected):
    """Both are within the roundings of sums of at most 60 terms through five layers."""
    for a, b in zip(found, expected, strict=True):
        assert torch.allclose(a, b, rtol=1e-5, atol=1e-5 * float(b.detach().abs().max()))


@pytest.mark.parametrize("depth", [1, 2, 3, 4])
@pytest.mark.parametrize("name", ACTIVATIONS)
def test_values_and_gradients_are_those_of_the_modules(always, name, depth):
    decoder = network(*[[ACTIVATIONS[name]()] for _ in range(depth)])
    known = {"relu in place": "relu", "dropout": "identity"}.get(name, name)
    assert deferred(decoder) == [known] * min(depth, head.MOST_HIDDEN)
    for options in ({}, {"reduction": "none"}, {"reduction": "none", "k_chunk": 2}):
        assert_close(bounds(decoder, True, **options), bounds(decoder, False, **options))
    assert_close(bounds(decoder, True, False), bounds(decoder, False, False))


def test_nested_containers_and_modules_without_effect(always):
    """Containers are opened; Identity and Dropout in eval mode are left out."""
    inner = nn.Sequential(nn.Linear(D, 17), nn.Identity(), nn.Sequential(nn.Tanh(), nn.Dropout(0.5)))
    decoder = nn.Sequential(inner, nn.Sequential(nn.Linear(17, 7, bias=False), nn.Linear(7, X))).eval()
    assert deferred(decoder) == ["tanh", "identity"]
    assert_close(bounds(decoder, True), bounds(decoder, False))


class Loud(nn.Tanh):
    def forward(self, x):
        return super().forward(x) * 2


def _with_hook():
    tanh = nn.Tanh()
    tanh.register_forward_hook(lambda module, inputs, output: output * 2)
    return tanh


def _replaced():
    tanh = nn.Tanh()
    tanh.forward = lambda x: x * 2
    return tanh


# Modules after a first hidden layer that can be deferred, and what is deferred after them.
OTHERS = {
    "another kind": (lambda: [nn.LayerNorm(17)], 0),
    "subclass": (lambda: [Loud()], 0),
    "hook": (lambda: [_with_hook()], 0),
    "replaced forward": (lambda: [_replaced()], 0),
    "dropout in training": (lambda: [nn.Dropout(0.3)], 0),
    "two activations": (lambda: [nn.Tanh(), nn.ReLU()], 0),
    "another slope": (lambda: [nn.Softplus(beta=2.0)], 0),
    "falling": (lambda: [nn.ELU(-0.5)], 0),
    "falling below 0": (lambda: [nn.LeakyReLU(-0.2)], 0),
    "learned": (lambda: [nn.PReLU()], 0),
    "after": (lambda: [nn.Tanh(), nn.Linear(17, 17), nn.Softsign()], 0),
    "before": (lambda: [nn.Softsign(), nn.Linear(17, 17), nn.Tanh()], 1),
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_cannot_be_deferred_is_called(always, name):
    make, count = OTHERS[name]
    decoder = network(make())
    assert len(deferred(decoder)) == count
    torch.manual_seed(5)
    results = []
    for fuse in (True, False):
        torch.manual_seed(5)
        results.append(bounds(decoder, fuse))
    assert_close(*results)


def test_a_replaced_function_of_torch_is_called(always, monkeypatch):
    decoder = network([nn.ReLU()], [nn.Tanh()])
    assert deferred(decoder) == ["relu", "tanh"]
    monkeypatch.setattr(functional, "relu", lambda x, inplace=False: x * 3)
    assert deferred(decoder) == ["tanh"]
    monkeypatch.setattr(torch, "tanh", lambda x: x * 3)
    assert deferred(decoder) == []
    assert_close(bounds(decoder, True), bounds(decoder, False))


def test_hooks_on_a_hidden_layer_run(always):
    decoder, seen = network([nn.Tanh()], [nn.ReLU()]), []
    decoder[2].register_forward_hook(lambda *_: seen.append(1))
    assert deferred(decoder) == []
    bounds(decoder, True)
    assert len(seen) == 2


class Meddling(nn.Module):
    """Module that changes another one when it is called."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, z):
        self.change()
        return z


def _hook(layer):
    if not layer._forward_hooks:
        layer.register_forward_hook(lambda module, inputs, output: output * 2)


def _new_weight(layer):
    layer.weight = nn.Parameter(torch.full_like(layer.weight, 0.1))


def _scaled(layer):
    layer.weight.data.mul_(1.5)


@pytest.mark.parametrize("change", [_hook, _new_weight, _scaled])
@pytest.mark.parametrize("place", [0, 2, 4])
def test_changes_by_modules_before_are_seen(always, change, place):
    """The hidden and the last layer are those that are there when it is their turn."""
    results = []
    for fuse in (True, False):
        torch.manual_seed(4)
        layers = network([nn.Tanh()], [nn.ReLU()])
        decoder = nn.Sequential(Meddling(lambda d=layers: change(d[place])), *layers)
        results.append(bounds(decoder, fuse, backward=False))
    assert_close(*results)


@pytest.mark.parametrize(
    ("dtype", "context"),
    [
        (torch.float64, torch.enable_grad),
        (torch.bfloat16, torch.enable_grad),
        (torch.float32, lambda: torch.autocast("cpu", torch.bfloat16)),
    ],
)
def test_other_dtypes_are_not_deferred(always, dtype, context):
    decoder = network([nn.Tanh()]).to(dtype)
    with context():
        assert not deferred(decoder, randn(K * B, D, seed=1).cpu().to(dtype))


def test_mixed_dtypes_and_shapes_raise_the_errors_of_the_layers(always):
    decoder = network([nn.Tanh()])
    decoder[2].double()
    with pytest.raises(RuntimeError, match="dtype"):
        deferred(decoder)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        deferred(nn.Sequential(nn.Linear(D, 7), nn.Tanh(), nn.Linear(8, X)))


def test_a_fused_head_defers_its_body(always):
    body, last = network([nn.Tanh()])[:2], nn.Linear(17, X)
    decoder = fastvae.FusedHead(body, last)
    z = randn(K * B, D, seed=1).cpu()
    assert [layer.activation for layer in decoder(z).hidden] == ["tanh"]
    assert_close(bounds(decoder, True), bounds(nn.Sequential(*body, last), False))
    body.register_forward_hook(lambda module, inputs, output: output * 2)
    assert decoder(z).hidden == ()
    with pytest.raises(ValueError, match=r"body of FusedHead returned \[54, 17\]; expected h \[N, 16\]"):
        fastvae.FusedHead(network([nn.Tanh()])[:2], nn.Linear(16, X))(z)


def test_outputs_that_are_needed_are_multiplied_out(always):
    """Callers without deferred layers get the decoder's output: a mask, log p of each element."""
    decoder = network([nn.GELU()], [nn.ELU(0.7)], [nn.Softplus()])
    z, mask = randn(K * B, D, seed=1).cpu(), rand(B, X, seed=2).cpu() < 0.5
    record = run_to_last_layer(decoder, z)
    assert len(record.hidden) == 3
    x = rand(len(z), X, seed=3).cpu().round()
    likelihood = fastvae.likelihoods.Bernoulli()
    assert torch.allclose(likelihood.log_prob(x, record), likelihood.log_prob(x, decoder(z)), rtol=1e-5)
    assert_close(bounds(decoder, True, mask=mask), bounds(decoder, False, mask=mask))


def test_hidden_weights_changed_after_the_call_are_refused(always):
    decoder = network([nn.Tanh()])
    record = run_to_last_layer(decoder, randn(K * B, D, seed=1).cpu())
    with torch.no_grad():
        decoder[0].weight.mul_(2)
    x = rand(B, X, seed=3).cpu().round()
    with pytest.raises(RuntimeError, match=r"weight or bias \[17, 5\] .* was changed in place after"):
        fastvae.iwae(x, torch.zeros(B, 2 * D), lambda z: record, k=K, likelihood="bernoulli")


def test_frozen_decoders_get_no_gradient(always):
    """Annealing and refined proposals differentiate by z alone."""
    decoder = network([nn.Tanh()])
    frozen = copy.deepcopy(decoder).requires_grad_(False)
    encoder = nn.Linear(X, 2 * D)
    x, found = rand(B, X, seed=3).cpu().round(), []
    for model in (decoder, frozen):
        vae = fastvae.VAE(encoder, model, likelihood="bernoulli")
        noise = torch.Generator().manual_seed(1)
        found.append(vae.ais(x, steps=20, k=3, generator=noise).log_px)
        assert all(p.grad is None for p in model.parameters())
    assert torch.equal(*found)


def test_bits_do_not_depend_on_chunks_or_threads(always):
    """A row of the result is a function of its z alone."""
    layers = (HiddenLayer(randn(40, D, seed=1).cpu(), randn(40, seed=2).cpu(), "tanh"),)
    weight, bias = randn(130, 40, seed=3).cpu(), randn(130, seed=4).cpu()
    x, z = rand(7, 130, seed=5).cpu().round(), randn(7 * 300, D, seed=6).cpu()

    def rows(z):
        return head.linear_rows("bernoulli", x, head.Layers(z, weight, bias, hidden=layers))

    whole, before = rows(z), torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            parts = torch.cat([rows(z[i : i + 7 * 20]) for i in range(0, len(z), 7 * 20)])
            assert torch.equal(rows(z), whole)
            if fastvae._C.products() == "tiles":
                assert torch.equal(parts, whole)
    finally:
        torch.set_num_threads(before)


def test_evaluation_gives_the_numbers_of_plain_layers(always):
    decoder, encoder = network([nn.Tanh()], [nn.SiLU()]), nn.Linear(X, 2 * D)
    x, found = rand(B, X, seed=3).cpu().round(), []
    for fuse in (True, False):
        vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", fuse=fuse).eval()
        for proposal in ("posterior", "refined"):
            noise = torch.Generator().manual_seed(1)
            found.append(vae.evaluate(x, k=200, proposal=proposal, generator=noise).log_px)
    assert torch.allclose(found[0], found[2], rtol=1e-5)
    # The fits see gradients that differ by roundings.
    assert torch.allclose(found[1], found[3], atol=1e-3)


def test_compiled_code_calls_hidden_layers(always):
    decoder = network([nn.Tanh()])
    vae = fastvae.VAE(nn.Linear(X, 2 * D), decoder, likelihood="bernoulli", latent_dim=D)
    x, results = rand(B, X, seed=3).cpu().round(), []
    with torch._inductor.config.patch(fallback_random=True):
        for module in (vae, torch.compile(vae)):
            torch.manual_seed(1)
            results.append(module(x, objective="iwae", k=K))
    assert torch.allclose(*results, rtol=1e-5)
