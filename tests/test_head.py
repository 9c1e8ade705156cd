"""Likelihoods fused with the decoder's last layer: the ops against formulas, and their use."""

from __future__ import annotations

import copy
import dataclasses
import functools
import math
import os
import pickle
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch._inductor.compile_fx import compile_fx
from torch.nn.utils import parametrizations, prune

import fastvae
from fastvae import ops
from fastvae.core.deferred import HiddenLayer, LastLayer
from fastvae.likelihoods import (
    Categorical,
    DiscretizedLogistic,
    Gaussian,
    Joint,
    Likelihood,
    ZeroInflatedNegativeBinomial,
)
from fastvae.ops import head
from fastvae.ops.head import MOST_HIDDEN, Layers, reduce_linear
from fastvae.ops.reduce import BoundReduction

from . import cases as registered
from . import formulas, strategies
from .compare import Rounded, assert_accurate
from .conftest import CUDA, DEVICE
from .models import rand, randn

K, B, D, H, X = 5, 3, 2, 4, 12
EVENT = (3, 4)
SIZES = strategies.distinct_sizes(4, largest=40, elements=20_000)
CONSTANTS = {"row": lambda x: (x,), "number": lambda x: (1,)}
HOW = BoundReduction(1.0, "log_mean_exp", "mean")
ACTIVATIONS = [n + {"elu": ":0.7", "leaky_relu": ":0.2"}.get(n, "") for n in formulas.ACTIVATIONS]


@pytest.fixture
def calls(monkeypatch):
    """Record the calls of the ops."""
    found = []

    def spied(module, name):
        function = getattr(module, name)

        def spy(*args):
            found.append(name)
            return function(*args)

        monkeypatch.setattr(module, name, spy)

    spied(fastvae.objectives.reduce, "reduce_linear")
    spied(fastvae.likelihoods.declared, "linear_rows")
    return found


# The ops


@st.composite
def layers(draw):
    """Draw x, h, weight, bias and fixed parameters of any likelihood."""
    k, b, inner, size = draw(SIZES)
    likelihood = draw(st.sampled_from(registered.LIKELIHOODS))
    declared = registered.DECLARED[likelihood]
    dtype = draw(strategies.dtypes)
    outputs = len(declared.outputs)
    least = len(declared.constants)
    fixed = draw(st.integers(least, outputs - 1))
    spread = draw(st.sampled_from([0.05, 1.0, 3.0]))

    def tensor(*shape, **options):
        return draw(strategies.tensors(shape, dtype, device=DEVICE, **options))

    kinds = [dtype, torch.float32, *([torch.int32] if declared.takes_integers else [])]
    x = registered.data(likelihood, b, size, seed=draw(strategies.seeds), dtype=draw(st.sampled_from(kinds)))
    # The formula's errors are of first order, too low for an inverse dispersion of exp(20).
    large = draw(st.sampled_from([1.0] if "negative" in likelihood else [1.0, 4.0]))
    chain, activations = [], draw(st.lists(st.sampled_from(ACTIVATIONS), max_size=MOST_HIDDEN))
    first = width = inner + 1 if activations else inner
    for i, _ in enumerate(activations):
        last = i == len(activations) - 1
        to = inner if last else inner + 2 + i
        chain.append(tensor(to, width, spread=width**-0.5))
        chain.append(tensor(to, spread=1.0) if draw(st.booleans()) else None)
        width = to
    case = {
        "h": tensor(k * b, first, spread=spread),
        "weight": tensor((outputs - fixed) * size, inner, spread=inner**-0.5),
        "bias": tensor((outputs - fixed) * size, spread=large) if draw(st.booleans()) else None,
    }
    for i in range(2):
        shape = CONSTANTS[draw(st.sampled_from(sorted(CONSTANTS)))](size)
        case[f"constant{i}"] = tensor(*shape) if i < fixed else None
    case |= {f"hidden{i}": t for i, t in enumerate(chain)}
    need = {n: t is not None and draw(st.booleans()) for n, t in case.items()}
    return {
        "likelihood": likelihood,
        "x": strategies.laid_out(x, draw(strategies.layouts)),
        "layers": case,
        "activations": activations,
        "need": need,
        "samples": k,
        "dtype": formulas.computation(x, *case.values()),
        "seed": draw(strategies.seeds),
    }


def outputs_of(case):
    """Return all parameters as the formulas take them, [K, B, X] or a row."""
    x, given, dtype = case["x"], case["layers"], case["dtype"]
    case["values"], case["slopes"] = formulas.hidden(given["h"], hidden_of(case), dtype)
    made = formulas.linear(case["values"][-1], given["weight"], given["bias"], dtype)
    k, (b, size) = case["samples"], x.shape
    parts = zip(made.value.split(size, 1), made.error.split(size, 1), strict=True)
    rows = [Rounded(v.reshape(k, b, size), e.reshape(k, b, size), made.u) for v, e in parts]
    return rows + [
        p.reshape(1, 1, -1) for n, p in given.items() if n.startswith("constant") and p is not None
    ]


def expected_gradients(case, grads):
    """Return the layers' gradients by name, from the gradients of the outputs."""
    given = case["layers"]
    products = given["weight"].shape[0] // case["x"].shape[1]
    flat = [(g.value.flatten(0, 1), g.error.flatten(0, 1)) for g in grads[:products]]
    arrives = Rounded(*(torch.cat(part, 1) for part in zip(*flat, strict=True)), grads[0].u)
    values, hidden = case["values"], hidden_of(case)
    to_value, *own = formulas.linear_backward(arrives, values[-1], given["weight"])
    to_h, *below = formulas.hidden_backward(to_value, values, case["slopes"], hidden)
    found = {"h": to_h, "weight": own[0], "bias": own[1]}
    found |= {f"hidden{i}": g for i, g in enumerate(below)}
    for i, g in enumerate(grads[products:]):
        p = given[f"constant{i}"]
        found[f"constant{i}"] = Rounded(g.value.reshape(p.shape), g.error.reshape(p.shape), g.u)
    return found


def hidden_of(case, tensors=None):
    """Return the hidden layers, of the case's tensors or of these."""
    given = tensors or case["layers"]
    return [
        HiddenLayer(given[f"hidden{2 * i}"], given[f"hidden{2 * i + 1}"], activation)
        for i, activation in enumerate(case["activations"])
    ]


def layers_of(case, leaves):
    """Return the op's layers of these tensors."""
    last = [t for n, t in leaves.items() if not n.startswith("hidden")]
    return Layers(*last, tuple(hidden_of(case, leaves)))


def leaves_of(case):
    return {
        n: None if t is None else t.detach().requires_grad_(case["need"][n])
        for n, t in case["layers"].items()
    }


def compare(case, outputs, grads, expected, expected_grads):
    for name, (actual, wanted) in expected.items():
        assert_accurate(name, actual, None, wanted)
    leaves = outputs
    asked = [n for n, t in leaves.items() if t is not None and t.requires_grad]
    for name, got in zip(asked, grads, strict=True):
        assert got.dtype == leaves[name].dtype and got.shape == leaves[name].shape
        assert_accurate(f"gradient of {name}", got, None, expected_grads[name])


@pytest.fixture
def any_samples(backend, monkeypatch):
    """Let Triton's kernel of whole decoders take any number of samples.

    Only in its interpreter, which computes half precision in float32; tests/test_cuda.py has a GPU's bounds.
    """
    if backend == "triton" and not CUDA:
        from fastvae.kernels import chain

        monkeypatch.setattr(chain, "FEWEST_SAMPLES", 1)


@given(case=layers())
def test_log_prob(backend, any_samples, case):
    leaves = leaves_of(case)
    x, k = case["x"], case["samples"]
    grad = randn(k, len(x), seed=case["seed"]).to(case["dtype"])
    out = head.linear_rows(case["likelihood"], x, layers_of(case, leaves))
    assert out.dtype == case["dtype"]
    asked = [t for t in leaves.values() if t is not None and t.requires_grad]
    found = torch.autograd.grad(out, asked, grad) if asked else ()
    value, grads = formulas.rows(case["likelihood"], x, *outputs_of(case), grad)
    compare(case, leaves, found, {"log_prob": (out, value)}, expected_gradients(case, grads[1:]))


@given(case=layers(), data=st.data())
def test_reduce(backend, case, data):
    leaves = leaves_of(case)
    x, k = case["x"], case["samples"]
    over = data.draw(st.sampled_from(["mean", "log_mean_exp"]))
    reduction = data.draw(st.sampled_from(["none", "sum", "mean"]))
    terms = reduction == "none" and data.draw(st.booleans())
    coefficient = data.draw(st.sampled_from([1.0, -0.3]))
    axes = data.draw(st.sampled_from([None, (len(x),), (k, len(x))]))
    term = None if axes is None else (5 * randn(*axes, seed=case["seed"])).to(case["dtype"]).requires_grad_()
    beta = data.draw(st.sampled_from([None, (), (len(x),)]))
    beta = None if beta is None else 2 * rand(*beta, seed=case["seed"] + 1)
    grad = randn(*((len(x),) if reduction == "none" else ()), seed=case["seed"] + 2)
    bound, mean = reduce_linear(
        case["likelihood"],
        x,
        layers_of(case, leaves),
        term,
        beta,
        BoundReduction(coefficient, over, reduction),
        terms,
    )
    asked = [t for t in (*leaves.values(), term) if t is not None and t.requires_grad]
    found = list(torch.autograd.grad(bound, asked, grad.to(bound.dtype))) if asked else []
    values, grads = formulas.reduce(
        case["likelihood"], x, outputs_of(case), term, beta, (coefficient, over, reduction), grad, None
    )
    if term is not None:
        assert_accurate("gradient of term", found.pop(), None, grads[-1])
    expected = {"bound": (bound, values[0])} | ({"mean": (mean, values[1])} if terms else {})
    compare(case, leaves, found, expected, expected_gradients(case, grads[1:-1]))


def wide_case(samples, batch, size, inner, outputs=1, likelihood="bernoulli", dtype=torch.float64):
    x = registered.data(likelihood, batch, size, seed=1).to(dtype)
    h = randn(samples * batch, inner, seed=2).to(dtype)
    weight = (randn(outputs * size, inner, seed=3) / math.sqrt(inner)).to(dtype)
    return (
        x,
        h.requires_grad_(),
        weight.requires_grad_(),
        randn(outputs * size, seed=4).to(dtype).requires_grad_(),
    )


# Rows and samples in one block, in many; samples of a row in many; rows of a group of blocks.
@pytest.mark.parametrize(
    ("samples", "batch", "size", "inner"),
    [(1, 1500, 130, 9), (7, 301, 33, 70), (700, 9, 150, 17), (1300, 3, 40, 5), (30, 65, 2100, 3)],
)
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_many_blocks(samples, batch, size, inner, reduction):
    """Many blocks combine to the definition's result, to float64 accuracy."""
    x, h, weight, bias = wide_case(samples, batch, size, inner, 2, "gaussian")
    term = (3 * randn(samples, batch, seed=5)).double().requires_grad_()
    how, beta = BoundReduction(0.7, "log_mean_exp", reduction), rand(batch, seed=6).double()
    results = {}
    for name in ("native", "reference"):
        with fastvae.use_backend(name):
            bound, _ = reduce_linear("gaussian", x, Layers(h, weight, bias, None, None), term, beta, how)
            arrives = torch.linspace(-2, 3, batch).double().to(DEVICE) if reduction == "none" else None
            results[name] = [bound, *torch.autograd.grad(bound, (h, weight, bias, term), arrives)]
            rows = head.linear_rows("gaussian", x, Layers(h, weight, bias, None, None))
            results[name] += [rows, *torch.autograd.grad(rows, (h, weight, bias), term.detach())]
    for got, expected in zip(results["native"], results["reference"], strict=True):
        assert torch.allclose(got, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))


def test_more_outputs_than_a_block_of_a_product():
    """Single precision: gradients of 1100 outputs are those of float64 to its roundings."""
    found = {}
    for dtype in (torch.float32, torch.float64):
        x, h, weight, bias = wide_case(2, 30, 1100, 20, dtype=torch.float32)
        leaves = [t.detach().to(dtype).requires_grad_() for t in (h, weight, bias)]
        rows = head.linear_rows("bernoulli", x, Layers(*leaves, None, None))
        found[dtype] = torch.autograd.grad(rows.sum(), leaves)
    for got, expected in zip(found[torch.float32], found[torch.float64], strict=True):
        assert float((got - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.skipif(CUDA, reason="blocks of the C++")
def test_outputs_too_large_to_keep_are_recomputed():
    """Outputs of 72 MB per row are recomputed instead of kept between the two passes over them."""
    samples, batch, size = 9000, 8, 2000
    x = registered.data("bernoulli", batch, size, seed=1)
    h = randn(samples * batch, 2, seed=2).requires_grad_()
    weight = randn(size, 2, seed=3).requires_grad_()
    bound, _ = reduce_linear("bernoulli", x, Layers(h, weight, None, None, None), None, None, HOW)
    grads = torch.autograd.grad(bound, (h, weight))
    rows = head.linear_rows("bernoulli", x, Layers(h, weight, None, None, None))
    other = torch.autograd.grad(ops.log_mean_exp(rows).mean(), (h, weight))
    for got, expected in zip(grads, other, strict=True):
        assert torch.allclose(got, expected, rtol=1e-3, atol=1e-5 * float(expected.abs().max()))


def test_a_large_bias_is_added_once(backend):
    """A large bias is added once, here cancelling an offset of 1000 in h·W."""
    x, h, weight, bias = wide_case(3, 70, 150, 90, dtype=torch.float32)
    h = torch.cat([h.detach(), torch.full((len(h), 1), 1000.0, device=DEVICE)], 1)
    weight = torch.cat([weight.detach(), torch.ones(150, 1, device=DEVICE)], 1)
    bias = bias.detach() - 1000
    got = head.linear_rows("bernoulli", x, Layers(h, weight, bias, None, None))
    wide = ops.bernoulli_log_prob(
        x.double(), (h.double() @ weight.double().mT + bias.double()).unflatten(0, (3, 70))
    )
    # Each logit errs by some roundings of 1000.
    assert float((got - wide).abs().max()) < 150 * 8 * 2**-23 * 1000


def test_sums_over_rows_in_float32():
    """A half-precision weight's gradient is rounded once, not at every block."""
    x, h, weight, bias = (t.detach().bfloat16() for t in wide_case(40, 120, 160, 6))
    for t in (h, weight, bias):
        t.requires_grad_()
    rows = head.linear_rows("bernoulli", x, Layers(h, weight, bias, None, None))
    got = torch.autograd.grad(rows.sum(), (weight, bias))
    wide = [t.detach().double().requires_grad_() for t in (weight, bias)]
    logits = h.detach().double() @ wide[0].mT + wide[1]
    expected = torch.autograd.grad(
        ops.bernoulli_log_prob(x.double(), logits.unflatten(0, (40, 120))).sum(), wide
    )
    for g, e in zip(got, expected, strict=True):
        assert bool(((g.double() - e).abs() <= 2**-8 * e.abs() + 2**-20 * 40 * 120).all())


@pytest.mark.skipif(CUDA, reason="threads of a CPU")
def test_bits_do_not_depend_on_the_number_of_threads():
    x, h, weight, bias = wide_case(40, 101, 130, 21, dtype=torch.float32)
    found = []
    threads = torch.get_num_threads()
    try:
        for number in (1, 2, 3):
            torch.set_num_threads(number)
            bound, _ = reduce_linear("bernoulli", x, Layers(h, weight, bias, None, None), None, None, HOW)
            rows = head.linear_rows("bernoulli", x, Layers(h, weight, bias, None, None))
            grads = torch.autograd.grad(rows, (h, weight, bias), torch.cos(rows.detach()))
            found.append([bound, *torch.autograd.grad(bound, (h, weight, bias)), rows, *grads])
    finally:
        torch.set_num_threads(threads)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_a_second_backward_pass(backend):
    """A second backward pass recomputes the released buffers and leaves the first's gradients unchanged."""
    x, h, weight, bias = wide_case(K, 9, X, H, dtype=torch.float32)
    term = randn(K, 9, seed=7).requires_grad_()
    bound, _ = reduce_linear("bernoulli", x, Layers(h, weight, bias, None, None), term, None, HOW)
    leaves = (h, weight, bias, term)
    first = torch.autograd.grad(bound, leaves, retain_graph=True)
    kept = [g.clone() for g in first]
    second = torch.autograd.grad(-2 * bound, leaves, retain_graph=True)
    for a, b, c in zip(first, kept, second, strict=True):
        assert torch.equal(a, b) and torch.allclose(-2 * a, c, rtol=1e-5, atol=1e-7)
    (again,) = torch.autograd.grad(bound, h, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives"):
        again.sum().backward()


def test_transforms_and_compilers(backend):
    x, h, weight, bias = (t.detach() for t in wide_case(K, 9, X, H, dtype=torch.float32))

    def function(weight, bias):
        return reduce_linear("bernoulli", x, Layers(h, weight, bias, None, None), None, None, HOW)[0]

    wanted = [weight.clone().requires_grad_(), bias.clone().requires_grad_()]
    expected = torch.autograd.grad(function(*wanted), wanted)
    for run in (torch.func.grad(function, (0, 1)), torch.compile(torch.func.grad(function, (0, 1)))):
        for got, e in zip(run(weight, bias), expected, strict=True):
            assert torch.allclose(got, e, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(("samples", "batch", "inner"), [(0, 3, 4), (4, 3, 0)])
def test_empty(backend, samples, batch, inner):
    x, h = torch.ones(batch, X, device=DEVICE), torch.zeros(samples * batch, inner, device=DEVICE)
    weight, bias = torch.zeros(X, inner, device=DEVICE), torch.zeros(X, device=DEVICE)
    rows = head.linear_rows("bernoulli", x, Layers(h, weight, bias, None, None))
    assert rows.shape == (samples, batch)
    assert torch.allclose(rows, torch.full_like(rows, X * math.log(0.5)))


def test_nan_stays_in_its_row(backend):
    x, h, weight, bias = (t.detach() for t in wide_case(K, 9, X, H, dtype=torch.float32))
    h[4] = math.nan
    rows = head.linear_rows("bernoulli", x, Layers(h, weight, bias, None, None))
    assert bool(rows.flatten()[4].isnan()) and int(rows.isnan().sum()) == 1


def test_data_out_of_range(backend, monkeypatch):
    monkeypatch.setenv("FASTVAE_CHECK", "1")
    x, h, weight, bias = (t.detach() for t in wide_case(K, 9, X, H, dtype=torch.float32))
    x[3, 2] = -1
    with pytest.raises(ValueError, match=r"\[-1, 1\], but Bernoulli targets must lie in \[0, 1\]"):
        ops.linear_log_prob(x, h.unflatten(0, (K, 9)), weight, bias)
    layer = nn.Linear(H, X, device=DEVICE)
    with pytest.raises(ValueError, match="Bernoulli targets must lie"):
        fastvae.iwae(
            x,
            torch.zeros(9, 2 * H, device=DEVICE),
            fastvae.FusedHead(nn.Identity(), layer),
            k=2,
            likelihood="bernoulli",
        )


def test_linear_log_prob_checks():
    x, h = torch.ones(B, *EVENT), torch.zeros(K, B, H)
    weight, bias = torch.zeros(X, H), torch.zeros(X)
    assert ops.linear_log_prob(x, h, weight, bias).shape == (K, B)
    assert ops.linear_log_prob(x, h, weight, None, 0.0, likelihood="gaussian").shape == (K, B)
    two = ops.linear_log_prob(x, h, torch.zeros(2 * X, H), torch.zeros(2 * X), likelihood="gaussian")
    assert torch.allclose(two, torch.full((K, B), X * (-0.5 * math.log(2 * math.pi) - 0.5)))
    wrong = [
        ((x, h, weight[:7], bias), {}, r"weight has shape \[7, 4\]; expected \[m·X, H\] = \[1·12, 4\]"),
        ((x, h, weight, bias), {"likelihood": "gaussian"}, r"= \[2·12, 4\], of the 2 outputs of a gaussian"),
        ((x, h, weight, bias[:5]), {}, r"bias has shape \[5\]; expected \[m·X\] = \[12\]"),
        ((x, h[:, :2], weight, bias), {}, r"h has shape \[5, 2, 4\] and x \[3, 3, 4\]"),
        ((x, h, weight, bias), {"likelihood": "bernouli"}, "unknown here; known: 'bernoulli', 'beta'"),
        ((x, h, weight, bias, bias[:7]), {"likelihood": "gaussian"}, r"logvar has shape \[7\]; expected one"),
        ((x.clone().requires_grad_(), h, weight, bias), {}, "x requires a gradient, which linear_log_prob"),
    ]  # fmt: skip
    for args, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            ops.linear_log_prob(*args, **options)


# A decoder's last layers, fused by the objective


class Body(nn.Module):
    """Decoder body with a module that counts its calls, and a norm."""

    def __init__(self):
        super().__init__()
        self.hidden, self.norm, self.calls = nn.Linear(D, H), nn.LayerNorm(H), 0

    def forward(self, z):
        self.calls += 1
        return torch.tanh(self.norm(self.hidden(z)))


class Whole(nn.Module):
    """Plain PyTorch equivalent of a FusedHead: its layers called and their outputs split."""

    def __init__(self, fused):
        super().__init__()
        self.fused, self.event = fused, fused.event or EVENT

    def forward(self, z):
        h = self.fused.body(z)
        parts = [p for layer in self.fused.layers for p in layer(h).split(math.prod(self.event), 1)]
        parts = [p.reshape(-1, *self.event) for p in parts]
        return parts[0] if len(parts) == 1 else tuple(parts)


def fused_head(*features, event=None, bias=True):
    layers = [nn.Linear(H, n, bias=bias or i == 0) for i, n in enumerate(features)]
    return fastvae.FusedHead(Body(), *layers, event=event)


def sequential(*end):
    return nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Sequential(nn.Linear(H, X), *end))


DECODERS = {
    "one layer in two": (lambda: fused_head(2 * X), "gaussian"),
    "two": (lambda: fused_head(X, X, bias=False), "gaussian"),
    "one": (lambda: fused_head(X, event=EVENT), "bernoulli"),
    "fixed": (lambda: fused_head(X), lambda: Gaussian(scale=0.5, learned=True)),
    "row": (
        lambda: fused_head(X, bias=False),
        lambda: fastvae.likelihoods.Laplace(scale=torch.rand(*EVENT) + 0.1, learned=True),
    ),
    "student": (
        lambda: fused_head(2 * X, event=EVENT),
        lambda: fastvae.likelihoods.StudentT(df=4.0, learned_df=True),
    ),
    "floor": (lambda: fused_head(X, X), lambda: Gaussian(scale="softplus")),
    "three in two": (lambda: fused_head(2 * X, X), lambda: ZeroInflatedNegativeBinomial()),
}


def step(objective, decoder, likelihood, **options):
    """Return the bound and the gradients of all parameters, for the draws of one seed."""
    torch.manual_seed(3)
    x = rand(B, *EVENT, seed=1).round().cpu()
    q = randn(B, D, seed=2).cpu().requires_grad_(), torch.zeros(B, D, requires_grad=True)
    learned = [*decoder.parameters()]
    if isinstance(likelihood, nn.Module):
        learned += [p for p in likelihood.parameters() if not any(p is o for o in learned)]
    result = objective(x, q, decoder, likelihood=likelihood, **options)
    if dataclasses.is_dataclass(result):
        result = [v for v in vars(result).values() if isinstance(v, torch.Tensor)]
    result = result if isinstance(result, (tuple, list)) else (result,)
    if not result[0].requires_grad:
        return [*result]
    grads = torch.autograd.grad(result[0].sum(), [*q, *learned], allow_unused=True)
    return [*result, *(g for g in grads if g is not None)]


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        finite = b.detach()[b.detach().isfinite()]
        most = float(finite.abs().max()) if finite.numel() else 0.0
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5 * (1 + most), equal_nan=True)


CALLS = {
    "elbo": (fastvae.elbo, {"k": K}),
    "iwae": (fastvae.iwae, {"k": K}),
    "each": (fastvae.iwae, {"k": K, "reduction": "none"}),
    "dreg": (fastvae.iwae, {"k": K, "estimator": "dreg"}),
    "chunks": (fastvae.iwae, {"k": K, "k_chunk": 2}),
    "beta": (fastvae.elbo, {"beta": torch.tensor([0.5, 1.0, 2.0])}),
    "log_marginal": (fastvae.log_marginal, {"k": K, "k_chunk": 2}),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("name", DECODERS)
def test_fused_heads_give_the_numbers_of_plain_layers(always, calls, call, name):
    """Every objective gives the numbers of the layers' outputs, for every way of splitting them."""
    make, likelihood = DECODERS[name]
    decoder, (objective, options) = make(), CALLS[call]
    likelihood = likelihood if isinstance(likelihood, str) else likelihood()
    expected = step(objective, Whole(decoder), likelihood, **options)
    assert not calls
    assert_same(step(objective, decoder, likelihood, **options), expected)
    assert calls


def test_unsupported_cases_fall_back_to_plain_layers(always, calls):
    """Masks, size factors, unsupported likelihoods and transformed outputs fall back to the plain layer."""
    one, two, classes = fused_head(X), fused_head(2 * X), fused_head(3 * X, event=(3, *EVENT))

    class Own(Likelihood):
        def log_prob(self, x, logits):
            return -nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")

    class Pair(nn.Module):
        """Decoder that returns a fused last layer and a tensor."""

        def __init__(self):
            super().__init__()
            self.one, self.more = fused_head(X), nn.Linear(D, X)

        def forward(self, z):
            return self.one(z), self.more(z).reshape(-1, *EVENT).clamp(-1, 1)

    pair = Pair()
    mask = rand(B, *EVENT, seed=5).cpu() < 0.5
    td = torch.distributions
    asked = [
        (fastvae.iwae, one, "bernoulli", {"k": K, "mask": mask}),
        (fastvae.elbo, one, "bernoulli", {"k": K, "terms": True}),
        (fastvae.elbo, one, "poisson", {"size_factor": torch.tensor([1.0, 2.0, 0.5])}),
        (fastvae.iwae, fused_head(X, event=EVENT), Own(), {"k": K}),
        (
            fastvae.iwae,
            fused_head(X, X, event=EVENT),
            fastvae.likelihoods.from_distribution(_normal),
            {"k": K},
        ),
        (fastvae.elbo, one, Gaussian(scale="optimal"), {}),
        (fastvae.elbo, two, DiscretizedLogistic(low=-1.0), {"mask": mask}),
        (fastvae.elbo, classes, "categorical", {}),
        (fastvae.elbo, two, "zero_inflated_negative_binomial", {}),
    ]
    for objective, decoder, likelihood, options in asked[:-1]:
        expected = step(objective, Whole(decoder), copy.deepcopy(likelihood), **options)
        assert_same(step(objective, decoder, copy.deepcopy(likelihood), **options), expected)
    fixed = ZeroInflatedNegativeBinomial(10.0)
    assert_same(step(fastvae.elbo, two, fixed), step(fastvae.elbo, Whole(two), fixed))

    def separate(z):
        mean, logvar = pair(z)
        return Whole(pair.one)(z), logvar

    separate.parameters = pair.parameters
    expected = step(fastvae.iwae, separate, "gaussian", k=K)
    assert_same(step(fastvae.iwae, pair, "gaussian", k=K), expected)
    assert isinstance(td.Normal, type) and not calls


def _normal(mean, raw):
    return torch.distributions.Normal(mean, raw.exp())


def test_parts_of_a_joint(always, calls):
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.hidden, self.classes = nn.Linear(D, H), nn.Linear(H, 3)
            self.pixels = fastvae.FusedHead(nn.Identity(), nn.Linear(H, X))
            self.fused = True

        def forward(self, z):
            h = torch.tanh(self.hidden(z))
            pixels = self.pixels(h) if self.fused else self.pixels.layers[0](h)
            return {"pixels": pixels, "label": self.classes(h).unsqueeze(2)}

    decoder, joint = Two(), Joint(pixels="bernoulli", label="categorical")
    x = {"pixels": torch.rand(B, X).round(), "label": torch.randint(0, 3, (B, 1))}
    vae = fastvae.VAE(
        lambda x: torch.zeros(len(x["label"]), 2 * D), decoder, likelihood=joint, latent_dim=D, modules=[]
    )
    results = []
    for fused in (True, False):
        decoder.fused = fused
        torch.manual_seed(1)
        bound = fastvae.iwae(x, torch.zeros(B, 2 * D), decoder, k=K, likelihood=joint)
        bound.backward()
        assert bool(calls) == fused
        calls.clear()
        torch.manual_seed(1)
        drawn = [vae.sample(3)["pixels"], vae.sample(3, mean=True)["pixels"], vae.reconstruct(x)["pixels"]]
        results.append([bound, *(p.grad.clone() for p in decoder.parameters()), *drawn])
        decoder.zero_grad()
    assert_same(*results)


def test_a_fused_head_is_an_ordinary_module():
    fused = fused_head(X, X)
    assert list(fused.state_dict())[-4:] == [f"layers.{i}.{n}" for i in (0, 1) for n in ("weight", "bias")]
    assert all(name.startswith(("body.", "layers.")) for name in fused.state_dict())
    fused.eval()
    assert not fused.body.norm.training
    z = torch.randn(6, D)
    record = fused(z)
    assert type(record) is LastLayer and fused.body.calls == 1
    assert torch.equal(record.input, fused.body(z)) and len(record.weights) == len(record.biases) == 2
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert torch.equal(other(z).weights[1], fused.layers[1].weight)
        nn.init.ones_(other.layers[1].bias)
        assert float(fused.layers[1].bias.detach().abs().max()) < 1
    fused.load_state_dict({n: torch.zeros_like(t) for n, t in fused.state_dict().items()})
    assert float(fused(z).weights[0].abs().max()) == 0
    assert fused.double()(z.double()).input.dtype == torch.float64


def test_torch_func_and_inference_mode(always, calls):
    fused, x, q = fused_head(X), torch.rand(B, *EVENT).round(), torch.zeros(B, 2 * D)
    parameters = dict(fused.named_parameters())

    def bound(decoder, seed=1):
        torch.manual_seed(seed)
        return fastvae.iwae(x, q, decoder, k=K, likelihood="bernoulli")

    expected = torch.autograd.grad(bound(fused), [*parameters.values()])
    found = torch.func.grad(lambda p: bound(lambda z: torch.func.functional_call(fused, p, (z,))))(parameters)
    assert_same(list(found.values()), expected)
    with torch.inference_mode():
        assert_same([bound(fused)], [bound(Whole(fused))])
    assert len(calls) == 3


@pytest.mark.parametrize("event", [None, EVENT])
def test_likelihoods_accept_a_last_layer(event):
    """Likelihoods accept the record directly: log p, means and samples; without x the event is flat."""
    for name, features in (("bernoulli", (X,)), ("gaussian", (X, X)), ("gaussian", (2 * X,))):
        if len(features) == 1 and name == "gaussian" and event is None:
            continue
        fused, likelihood = fused_head(*features, event=event), fastvae.likelihoods.read.as_likelihood(name)
        z, x = torch.randn(5, D), torch.rand(5, *EVENT).round()
        record, parameters = fused(z), Whole(fused)(z)
        assert torch.allclose(likelihood.log_prob(x, record), likelihood.log_prob(x, parameters), atol=1e-6)
        mean = likelihood.mean(record)
        assert mean.shape == (5, *(event or (X,)))
        assert torch.allclose(mean.flatten(), likelihood.mean(parameters).flatten(), atol=1e-6)
        drawn = [
            likelihood.sample(p, generator=torch.Generator().manual_seed(1)) for p in (record, parameters)
        ]
        assert torch.allclose(*[d.flatten() for d in drawn], atol=1e-5)


def test_invalid_fused_heads_are_explained():
    layer, z = nn.Linear(H, X), torch.zeros(5, D)
    wrong = [
        ((lambda z: z, layer), {}, TypeError, "body must be an nn.Module z .* got function"),
        ((Body(),), {}, TypeError, "needs the last layers after the body"),
        ((Body(), nn.Sequential(layer)), {}, TypeError, "layer 0 must be an nn.Linear .* got Sequential"),
        ((Body(), Scaled(H, X)), {}, TypeError, "layer 0 must be an nn.Linear .* got Scaled"),
        ((Body(), layer, nn.Linear(D, X)), {}, ValueError, "layer 1 has in_features=2 and layer 0 4"),
        (
            (Body(), layer),
            {"event": (3, 5)},
            ValueError,
            "layer 0 has out_features=12; expected a multiple of 15",
        ),
        ((Body(), layer), {"event": (3, -4)}, ValueError, r"event must be a size.*got \(3, -4\)"),
    ]
    for args, options, error, message in wrong:
        with pytest.raises(error, match=message):
            fastvae.FusedHead(*args, **options)
    with pytest.raises(ValueError, match=r"the body of FusedHead returned \[5, 2\]; expected h \[N, 4\]"):
        fastvae.FusedHead(nn.Identity(), layer)(z)
    with pytest.raises(TypeError, match=r"h has dtype torch.float64 and a last layer torch.float32"):
        fastvae.FusedHead(Body().double(), layer)(z.double())
    x, q = torch.ones(5, 7), torch.zeros(5, 2 * D)
    with pytest.raises(
        ValueError, match=r"has 12 outputs; expected a multiple of 7, the numbers of an event"
    ):
        fastvae.elbo(x, q, fastvae.FusedHead(Body(), layer), likelihood="bernoulli")
    with pytest.raises(TypeError, match=r"must return \(mean, logvar\).* got a tensor \[5, 12\]"):
        fastvae.elbo(torch.ones(5, X), q, fastvae.FusedHead(Body(), layer))


class Scaled(nn.Linear):
    def forward(self, h):
        return 0.5 * super().forward(h)


HOOKED = {
    "weight_norm": nn.utils.weight_norm,
    "spectral_norm": nn.utils.spectral_norm,
    "pruned": lambda layer: prune.l1_unstructured(layer, "weight", 0.5),
    "forward hook": lambda layer: layer.register_forward_hook(lambda *_: None),
    "full backward hook": lambda layer: layer.register_full_backward_hook(lambda *_: None),
    "forward replaced": lambda layer: setattr(layer, "forward", lambda h: h),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", HOOKED)
def test_hooks_that_would_not_run_are_refused(name):
    fused = fused_head(X)
    HOOKED[name](fused.layers[0])
    with pytest.raises(TypeError, match=r"layer 0 of FusedHead has .* but it is not called; use"):
        fastvae.elbo(torch.ones(B, X), torch.zeros(B, 2 * D), fused, likelihood="bernoulli")


def test_parametrised_layers(always, calls):
    """Parametrised layers, which compute the weight on access, work."""
    fused = fused_head(X)
    parametrizations.weight_norm(fused.layers[0])
    parametrizations.spectral_norm(fused.layers[0], "weight")
    fused.eval()
    assert_same(
        step(fastvae.iwae, fused, "bernoulli", k=K), step(fastvae.iwae, Whole(fused), "bernoulli", k=K)
    )
    assert calls


def test_the_layer_keeps_the_state_of_its_call(always):
    """The fused layer has the state of its call: autocast, no_grad, or a weight swapped later."""

    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.fused, self.whole = fused_head(X), False

        def forward(self, z):
            decoder = Whole(self.fused) if self.whole else self.fused
            layer = self.fused.layers[0]
            kept = layer.weight.data
            with torch.autocast("cpu", torch.bfloat16, enabled=self.how == "autocast"):
                layer.weight.data = 2 * kept
                with torch.set_grad_enabled(self.how != "no_grad"):
                    out = decoder(z)
                layer.weight.data = kept
            return out

    decoder, x, q = Inside(), torch.rand(B, *EVENT).round(), torch.zeros(B, 2 * D)
    for decoder.how in ("swapped", "autocast", "no_grad"):
        results = []
        for decoder.whole in (True, False):
            torch.manual_seed(1)
            mu = q.clone().requires_grad_()
            bound = fastvae.elbo(x, mu, decoder, likelihood="bernoulli")
            grads = torch.autograd.grad(bound, [mu, *decoder.parameters()], allow_unused=True)
            results.append([bound, *(torch.zeros(()) if g is None else g for g in grads)])
            results[-1].append(torch.tensor([float(g is None) for g in grads]))
        assert_same(*results)


@pytest.mark.parametrize("what", ["input", "weight", "bias"])
def test_changes_in_place_are_refused(always, what):
    """In-place changes are refused between decoder and objective, and between forward and backward."""
    fused = fused_head(X)
    layer = fused.layers[0]

    class Changing(nn.Module):
        def forward(self, z):
            record = fused(z)
            with torch.no_grad():
                {"input": record.input, "weight": layer.weight, "bias": layer.bias}[what].mul_(0.5)
            return record

    x, q = torch.rand(B, X), torch.zeros(B, 2 * D)
    with pytest.raises(
        RuntimeError, match=r"of the decoder's last layers? was changed in place after the layer"
    ):
        fastvae.elbo(x, q, Changing(), likelihood="bernoulli")
    if what == "bias":
        return  # no gradient depends on the changed tensor
    kept = []
    fused.body.register_forward_hook(lambda _, __, h: kept.append(h))
    for structure in (fused, nn.Sequential(fused.body, layer)):
        vae = fastvae.VAE(nn.Linear(X, 2 * D), structure, likelihood="bernoulli")
        for options in ({}, {"reduction": "none"}):
            bound = vae.iwae(x, k=K, **options).sum()
            with torch.no_grad():
                (layer.weight if what == "weight" else kept[-1]).mul_(0.5)
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                bound.backward()


def test_freed_storage_is_refused(always):
    fused = fused_head(X)

    class Sharded(nn.Module):
        def forward(self, z):
            record = fused(z)
            fused.layers[0].weight.untyped_storage().resize_(0)
            return record

    with pytest.raises(RuntimeError, match="last layer was freed after the call"):
        fastvae.elbo(torch.rand(B, X), torch.zeros(B, 2 * D), Sharded(), likelihood="bernoulli")


@pytest.mark.parametrize("make", [lambda: sequential(), lambda: nn.Linear(D, X)])
def test_hooks_run_under_a_compiler(always, make):
    """Hooks run under a compiler: torch's older weight norm computes the weight in a hook."""
    decoder = make()
    layer = decoder if isinstance(decoder, nn.Linear) else decoder[2][0]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        nn.utils.weight_norm(layer)
    with torch.no_grad():
        layer.weight_g.mul_(2)
    x = torch.rand(B, X).round()
    bounds = []
    with torch._inductor.config.patch(fallback_random=True):
        for fuse, compiled in ((False, False), (True, False), (True, True)):
            torch.manual_seed(0)
            vae = fastvae.VAE(nn.Linear(X, 2 * D), decoder, likelihood="bernoulli", latent_dim=D, fuse=fuse)
            torch.manual_seed(1)
            bounds.append((torch.compile(vae, backend="aot_eager") if compiled else vae)(x))
    assert_same(bounds[1:], [bounds[0]] * 2)


def test_a_vae_fuses_automatically(always, calls):
    encoder, decoder = nn.Linear(X, 2 * D), sequential()
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli")
    forbidden = fastvae.VAE(encoder, decoder, likelihood="bernoulli", fuse=False)
    x = torch.rand(B, X).round()
    for options in (
        {"objective": "elbo"},
        {"objective": "iwae", "k": K},
        {"objective": "iwae", "k": K, "k_chunk": 2},
    ):
        torch.manual_seed(1)
        expected = forbidden(x, **options)
        assert not calls
        torch.manual_seed(1)
        assert torch.allclose(vae(x, **options), expected, rtol=1e-5)
        assert calls
        calls.clear()
    for method in ("log_marginal", "reconstruction_log_prob", "evaluate"):
        results = []
        for model in (vae, forbidden):
            calls.clear()
            torch.manual_seed(1)
            result = getattr(model, method)(x)
            results.append(getattr(result, "log_px", result))
            assert bool(calls) == (model is vae)
        assert torch.allclose(*results, rtol=1e-4)
    assert list(vae.state_dict()) == list(forbidden.state_dict())
    assert isinstance(vae.sample(3), torch.Tensor) and vae.reconstruct(x).shape == x.shape
    body, (last,) = decoder[:2], decoder[2]
    fused = fastvae.VAE(encoder, fastvae.FusedHead(body, last), likelihood="bernoulli")
    assert torch.allclose(fused.reconstruct(x), vae.reconstruct(x))
    assert isinstance(fused.sample(3, mean=True), torch.Tensor)
    results = []
    for model in (fused, forbidden):
        torch.manual_seed(1)
        results.append(model.evaluate(x, k=K).log_px)
    assert torch.allclose(*results, rtol=1e-5)
    assert calls


@pytest.mark.parametrize("tiles", [True, False])
def test_layers_are_fused_only_where_it_is_faster(tiles, monkeypatch):
    monkeypatch.setattr(head, "HAS_TILES", tiles)
    h = torch.empty(1)
    assert head.pays(3200, 784, h, 200)
    assert not head.pays(128, 784, h, 200) and not head.pays(200, 20_000, h, 200)
    assert head.pays(512, 784, h, 200) == tiles == head.pays(3200, 784, h, 500)
    assert not head.pays(512, 784, h.double(), 200)
    # torch's half-precision products are faster on a CPU.
    assert not head.pays(3200, 784, h.bfloat16(), 200)
    z = torch.empty(3200, 50)
    assert head.hidden_pay(z, [200, 200]) == tiles
    assert not head.hidden_pay(z, [2000]) and not head.hidden_pay(z[:200], [200])
    assert not head.hidden_pay(z.double(), [200]) and not head.hidden_pay(z.bfloat16(), [200])


COMPILED = {
    "layer": lambda: nn.Linear(D, X),
    "sequential": sequential,
    "shaped": lambda: sequential(nn.Unflatten(1, EVENT)),
    "fused head": lambda: fused_head(X, event=EVENT),
}


@pytest.mark.parametrize("name", COMPILED)
def test_compiled(always, name):
    decoder = COMPILED[name]()
    vae = fastvae.VAE(
        nn.Sequential(nn.Flatten(), nn.Linear(X, 2 * D)), decoder, likelihood="bernoulli", latent_dim=D
    )
    x = rand(B, *EVENT, seed=1).cpu().round()
    x = x.flatten(1) if name in ("layer", "sequential") else x
    results = []
    traced = []

    def backend(graph, inputs):
        traced.extend(str(node.target) for node in graph.graph.nodes)
        return compile_fx(graph, inputs)

    with torch._inductor.config.patch(fallback_random=True):
        for module in (vae, torch.compile(vae, fullgraph=True, backend=backend)):
            vae.zero_grad()
            torch.manual_seed(1)
            bound = module(x, objective="iwae", k=K)
            bound.backward()
            results.append([bound, *(p.grad.clone() for p in decoder.parameters() if p.grad is not None)])
    assert_same(*results)
    assert any("reduce_linear" in target for target in traced) == (name != "shaped")


@pytest.mark.skipif(CUDA, reason="a process's memory")
def test_the_output_is_never_stored():
    """The output, 200 MB like its gradient, is never stored; a whole step takes a quarter of that."""
    code = """
import resource, torch, fastvae
from fastvae.core.deferred import HiddenLayer
from fastvae.ops.head import MOST_HIDDEN, Layers, reduce_linear
from fastvae.ops.reduce import BoundReduction
def step(k, b, size=784):
    h, weight = torch.randn(k * b, 16, requires_grad=True), torch.randn(size, 16, requires_grad=True)
    how = BoundReduction(1.0, "log_mean_exp", "mean")
    layers = Layers(h, weight, None, None, None)
    reduce_linear("bernoulli", torch.ones(b, size), layers, None, None, how)[0].backward()
    rows = fastvae.ops.linear_log_prob(torch.ones(b, size), h.view(k, b, 16), weight)
    rows.sum().backward()
step(3, 8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
step(1000, 64)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    run = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=os.environ, check=True
    )
    assert int(run.stdout) < 50 * 1024


# All pairs


@pytest.mark.parametrize("name", registered.LIKELIHOODS)
def test_all_pairs(backend, name):
    """All-pairs log p [K, B] and gradients of every likelihood equal the op's on float64 copies."""
    k, b = 6, 4
    x = registered.data(name, b, *EVENT, seed=3)
    parameters = registered.parameters(name, k, *EVENT, seed=4)
    constants = len(registered.DECLARED[name].constants)
    for i in range(len(parameters) - constants, len(parameters)):
        parameters[i] = torch.tensor(-5.0, device=DEVICE)
    wanted = [p.requires_grad_() for p in parameters if p.dim()]
    got = ops.all_pairs_log_prob(x, tuple(parameters), likelihood=name)
    grad = randn(k, b, seed=5)
    found = torch.autograd.grad(got, wanted, grad)
    wide = [p.detach().double().requires_grad_() for p in wanted]
    spread = [p[:, None].expand(k, b, *EVENT) for p in wide] + [p.double() for p in parameters[len(wide) :]]
    with fastvae.use_backend("reference"):
        expected = getattr(ops, f"{name}_log_prob")(x.double() if x.is_floating_point() else x, *spread)
        grads = torch.autograd.grad(expected, wide, grad.double())
    assert got.shape == (k, b) and got.dtype == torch.float32
    assert bool(((got - expected).abs() <= 1e-5 * (1 + expected.abs())).all())
    for g, e in zip(found, grads, strict=True):
        assert bool(((g - e).abs() <= 1e-4 * (1 + e.abs()) + 1e-5 * e.abs().max()).all())


@pytest.mark.parametrize("constant", [[-1.5, -1.5, -1.5], np.full(3, -1.5, np.float32), np.float32(-1.5)])
def test_constants_are_whatever_torch_takes(constant, backend):
    x, h, weight = (randn(n, 3, seed=n, dtype=torch.float32) for n in (5, 4, 3))
    expected = ops.all_pairs_log_prob(x, (h, -1.5), likelihood="gaussian")
    assert torch.equal(ops.all_pairs_log_prob(x, (h, constant), likelihood="gaussian"), expected)
    rows = functools.partial(ops.linear_log_prob, x, x, weight, None, likelihood="gaussian")
    torch.testing.assert_close(rows(constant), rows(-1.5))


def test_all_pairs_in_tiles(monkeypatch):
    """Tiling of latents and of examples does not change the result."""
    x, location = torch.randn(7, X), torch.randn(11, X, requires_grad=True)
    whole = ops.all_pairs_log_prob(x, (location, torch.zeros(X)), likelihood="laplace")
    (grad,) = torch.autograd.grad(whole.sin().sum(), location)
    for tile in (1, 5 * X, 40 * X):
        monkeypatch.setattr(fastvae.ops.all_pairs, "_TILE", tile)
        parts = ops.all_pairs_log_prob(x, (location, torch.zeros(X)), likelihood="laplace")
        (part_grad,) = torch.autograd.grad(parts.sin().sum(), location)
        assert torch.allclose(parts, whole, rtol=1e-6) and torch.allclose(
            part_grad, grad, rtol=1e-5, atol=1e-6
        )


def test_all_pairs_of_a_decoder_that_fits_well():
    """Products that cancel stay accurate: confident logits, small variances, large counts."""
    x = torch.rand(5, 784).round()
    logits = (2 * x - 1) * 40 + torch.randn(5, 784)
    got = ops.all_pairs_log_prob(x, logits, likelihood="bernoulli")
    assert bool((got.diagonal().abs() < 1e-10).all()) and bool((got.diagonal() <= 0).all())
    mean, logvar = torch.rand(5, 784), torch.tensor(-13.8)
    x = mean + 1e-3 * torch.randn(5, 784)
    got = ops.all_pairs_log_prob(x, (mean, logvar), likelihood="gaussian")
    wide = mean.double()[:, None].expand(5, 5, 784)
    expected = ops.gaussian_log_prob(x.double(), wide, logvar.double())
    assert torch.allclose(got.double(), expected, rtol=2e-7)
    counts = torch.poisson(torch.full((5, 784), 1e4))
    log_mean = counts.log()
    got = ops.all_pairs_log_prob(counts, log_mean, likelihood="poisson")
    expected = ops.poisson_log_prob(counts.double(), log_mean.double()[:, None].expand(5, 5, 784))
    assert torch.allclose(got.double(), expected, rtol=2e-7)


@pytest.mark.skipif(CUDA, reason="there parameters are not looked at")
def test_all_pairs_of_infinite_logits():
    x, logits = torch.tensor([[0.0, 1.0], [1.0, 0.0]]), torch.tensor([[-math.inf, math.inf]])
    assert ops.all_pairs_log_prob(x, logits).tolist() == [[0.0, -math.inf]]


def test_all_pairs_of_objects():
    x, z = torch.rand(4, X).round(), torch.randn(6, D)
    layer = nn.Linear(D, X)

    class Own(Likelihood):
        def log_prob(self, x, mean):
            return -((x - mean) ** 2)

    mean = layer(z)
    squares = (mean[:, None] - x).square().sum(2)
    assert torch.allclose(ops.all_pairs_log_prob(x, mean, likelihood=Own()), -squares, rtol=1e-5)
    normal = ops.all_pairs_log_prob(x, mean, likelihood=Gaussian(math.sqrt(0.5)))
    assert torch.allclose(normal, -squares - 0.5 * X * math.log(math.pi), rtol=1e-5)
    fused = fastvae.FusedHead(nn.Identity(), layer)(z)
    assert torch.equal(ops.all_pairs_log_prob(x, fused, likelihood=Gaussian(math.sqrt(0.5))), normal)
    assert torch.equal(ops.all_pairs_log_prob(x, fused), ops.all_pairs_log_prob(x, mean))
    classes, logits = torch.randint(0, 3, (4, 9)), torch.randn(6, 3, 9)
    got = ops.all_pairs_log_prob(classes, logits, likelihood=Categorical())
    picked = (
        torch.log_softmax(logits, 1)[:, None]
        .expand(6, 4, 3, 9)
        .gather(2, classes[None, :, None].expand(6, 4, 1, 9))
    )
    assert torch.allclose(got, picked.sum((2, 3)), rtol=1e-5)


def test_all_pairs_checks():
    x, logits, gaussian = torch.ones(4, X), torch.zeros(6, X), {"likelihood": "gaussian"}
    wrong = [
        ((x, logits), gaussian, r"outputs of a gaussian likelihood, \(mean, logvar\); got 1"),
        ((x, logits[:, :5]), {}, r"logits has shape \[6, 5\] and x \[4, 12\]; expected \[K, \*event\]"),
        ((x, (logits, x[0, :7])), gaussian, r"logvar has shape \[7\]; expected that of mean"),
        ((2 * x, logits), {}, "Bernoulli targets must lie in"),
        ((x, logits), {"likelihood": "categorical"}, "give a likelihood object"),
    ]  # fmt: skip
    for args, options, message in wrong:
        with pytest.raises(ValueError, match=message):
            ops.all_pairs_log_prob(*args, **options)
    assert ops.all_pairs_log_prob(x[:0], logits).shape == (6, 0)


def test_log_px_by_draws_of_the_prior():
    """In two dimensions, draws from the prior give the exact log p(x) of a linear-Gaussian model."""
    from .models import LinearGaussian

    model = LinearGaussian(latent=2, features=5, scale=1.0)
    x = model.sample(6)
    z = torch.randn(20_000, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    pairs = ops.all_pairs_log_prob(x, model.decoder(z), likelihood=model.likelihood)
    estimate = pairs.logsumexp(0) - math.log(len(z))
    assert float((estimate - model.log_px(x)).abs().max()) < 0.2


@pytest.mark.skipif(CUDA, reason="compiled elsewhere, as by the tests of launches")
def test_products_run_on_matrix_units():
    """Half precision and TF32 compile to matrix instructions; IEEE float32 does not."""
    code = """
import re, torch
from types import SimpleNamespace
from tools.kernels import compiled, recorded, tensor
from fastvae.kernels import head
from fastvae.likelihoods.declared import DECLARED
for dtype in (torch.bfloat16, torch.float32):
    for precision in ("highest", "high"):
        torch.set_float32_matmul_precision(precision)
        h, x = tensor(3200, 200, dtype=dtype), tensor(64, 784)
        weight, bias = tensor(784, 200, dtype=dtype), tensor(784, dtype=dtype)
        layers = SimpleNamespace(weights=(weight,), biases=(bias,), constants=())
        (kernel, arguments, options, _), *_ = recorded(
            lambda: head.linear_log_prob(DECLARED["bernoulli"], x, h, layers)
        )
        for target, kind in (("sm_80", "ptx"), ("sm_90", "ptx"), ("sm_100", "ptx"), ("gfx942", "amdgcn")):
            text = compiled(kernel, arguments, options, target).asm[kind]
            found = bool(re.search(r"\\bw?g?mma\\.|tcgen05\\.mma|v_mfma", text))
            print(dtype, precision, target, found)
"""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    found = {tuple(line.split()[:3]): line.endswith("True") for line in run.stdout.splitlines()}
    for (dtype, precision, target), units in found.items():
        if dtype == "torch.bfloat16" or (precision == "high" and target != "gfx942"):
            assert units, (dtype, precision, target)
        elif precision == "highest" and target != "gfx942":
            assert not units, (dtype, precision, target)
    assert len(found) == 16


def test_each_weight_is_computed_once(backend):
    """A parametrisation with a state, such as spectral norm's power iteration, steps once per call."""

    class Counted(nn.Module):
        def __init__(self):
            super().__init__()
            self.calls = 0

        def forward(self, weight):
            self.calls += 1
            return weight * self.calls

    layers, counts = [nn.Linear(4, 6).to(DEVICE) for _ in range(2)], [Counted() for _ in range(2)]
    for layer, counted in zip(layers, counts, strict=True):
        torch.nn.utils.parametrize.register_parametrization(layer, "weight", counted)
    before = [c.calls for c in counts]
    x, q = randn(3, 6, seed=1), randn(3, 4, seed=2)
    for body in (nn.Linear(2, 4), nn.Sequential(nn.Linear(2, 4), nn.ReLU()), nn.GRUCell(2, 4)):
        decoder = fastvae.FusedHead(body.to(DEVICE), *layers)
        fastvae.iwae(x, q, decoder, k=3, likelihood="gaussian")
        before = [n + 1 for n in before]
        assert [c.calls for c in counts] == before
