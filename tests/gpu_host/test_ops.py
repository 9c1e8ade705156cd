"""Every op on the card computes what the C++ computes, forward and backward, in every dtype."""

from __future__ import annotations

import math

import pytest
import torch

import fastvae
from fastvae import ops
from fastvae.core.deferred import HiddenLayer
from fastvae.ops.head import Layers, linear_rows, reduce_linear
from fastvae.ops.reduce import BoundReduction, reduce
from tests import cases

from .compared import DTYPES, B, D, H, K, U, X, assert_launched, assert_same, draw


def _leaves(count, *shape, dtype=torch.float32, scale=1.0):
    return [draw(*shape, seed=i, dtype=dtype, scale=scale).requires_grad_() for i in range(count)]


def _data(name, dtype=torch.float32):
    return cases.data(name, B, X, seed=1).cpu().to(dtype)


def _outputs(name, *shape, dtype=torch.float32):
    return [p.cpu().to(dtype).requires_grad_() for p in cases.parameters(name, *shape, seed=2)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("prior", [False, True])
def test_draws(card, dtype, prior):
    inputs = _leaves(4 if prior else 2, B, D, dtype=dtype)

    def options(given):
        seed = torch.tensor(-1234567890123, device=given[0].device)
        return {"prior": given[2:] or None, "k": K, "seed": seed}

    assert_same("rsample_kl", lambda *t: ops.rsample_kl(*t[:2], **options(t)), inputs)
    for estimator in ("iwae", "dreg", "stl"):
        assert_same(
            f"rsample_log_ratio, {estimator}",
            lambda *t, e=estimator: ops.rsample_log_ratio(*t[:2], estimator=e, **options(t)),
            inputs,
        )
    assert_launched(card, 3, "rsample_kl_kernel", "rsample_log_ratio_kernel", "rsample_backward_kernel")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_draws_of_full_normals(card, dtype):
    inputs = [*_leaves(1, B, D, dtype=dtype), draw(B, D * (D + 1) // 2, seed=5, dtype=dtype).requires_grad_()]

    def drawn(mu, tril):
        return ops.rsample_tril(mu, tril, k=K, seed=torch.tensor(5, device=mu.device))

    assert_same("rsample_tril", drawn, inputs)
    assert_launched(card, 2)


def test_noise(card):
    assert_same("normal", lambda seed: fastvae.random.normal(seed, K, B, D), [torch.tensor(77)])
    assert card is None or len(card) == 2


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", cases.LIKELIHOODS)
def test_likelihoods(card, name, dtype):
    inputs = [_data(name, dtype), *_outputs(name, K, B, X, dtype=dtype)]
    op = getattr(ops, f"{name}_log_prob")
    assert_same(name, op, inputs)
    assert_launched(card, 2)
    if dtype == torch.float32:
        mask = cases.mask_of("most", B, X).cpu()
        assert_same(f"{name}, mask", lambda x, mask, *p: op(x, *p, mask=mask), [inputs[0], mask, *inputs[1:]])


@pytest.mark.parametrize("name", cases.LIKELIHOODS)
def test_gradients_of_x_and_of_shared_parameters(card, name):
    declared = cases.DECLARED[name]
    x = _data(name).requires_grad_(declared.differentiable)
    for shape in cases.forms(name, K, B, (X,))[1:4:2] or [()]:
        first, *others = _outputs(name, K, B, X)
        others = [o.detach().flatten()[: math.prod(shape)].view(shape).requires_grad_() for o in others]
        assert_same(f"{name}, {shape}", getattr(ops, f"{name}_log_prob"), [x, first, *others])


REDUCTIONS = [
    BoundReduction(-0.5, "mean", "mean"),
    BoundReduction(1.0, "log_mean_exp", "sum"),
    BoundReduction(1.0, "log_mean_exp", "none"),
    BoundReduction(1.0, "log_mean_exp", "mean", 0.3, 3, 0.2),
]


@pytest.mark.parametrize("how", REDUCTIONS, ids=lambda how: f"{how.over}, {how.reduction}, {how.groups}")
def test_reductions(card, how):
    inputs = [
        _data("bernoulli"), *_outputs("bernoulli", K * B, X), *_leaves(1, K, B), torch.linspace(0.5, 1, B),
    ]  # fmt: skip
    for terms in (False, True):
        assert_same(
            f"reduce, terms={terms}",
            lambda x, p, term, beta, t=terms: reduce("bernoulli", x, (p,), term, beta, how, t),
            inputs,
        )


@pytest.mark.parametrize("name", cases.LIKELIHOODS)
def test_bounds_of_every_likelihood(card, name):
    how = BoundReduction(1.0, "log_mean_exp", "mean")
    inputs = [_data(name), *_leaves(1, K, B), *_outputs(name, K * B, X)]
    assert_same(name, lambda x, term, *p: reduce(name, x, p, term, None, how)[0], inputs, magnified=16)


@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "poisson"])
def test_the_last_layer_fused(card, name):
    how = BoundReduction(1.0, "log_mean_exp", "mean")
    layer = [draw(K * B, H, seed=3), draw(X, H, seed=4), draw(X, seed=5)]
    inputs = [_data(name), *(t.requires_grad_() for t in layer), draw(K, B, seed=6).requires_grad_()]
    constants = [torch.zeros(()).requires_grad_()] if name == "gaussian" else []

    def rows(x, h, weight, bias, _, *constants):
        h = h.view(K, B, H)
        return ops.linear_log_prob(x, h, weight, bias, *constants, likelihood=name)

    def bound(x, h, weight, bias, term, *constants):
        layers = Layers(h, weight, bias, *constants, *[None] * (2 - len(constants)))
        return reduce_linear(name, x, layers, term, None, how)[0]

    inputs[4].requires_grad_(False)
    assert_same("linear_log_prob", rows, [*inputs, *constants])
    inputs[4].requires_grad_()
    assert_same("reduce_linear", bound, [*inputs, *constants])


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("name", ["bernoulli", "gaussian", "student_t"])
def test_whole_decoders(card, name, depth, monkeypatch):
    """The kernel's program with products in float32: the emulator has no matrix units."""
    from fastvae.kernels import chain

    monkeypatch.setattr(chain, "fits", lambda h, widths: True)
    monkeypatch.setattr(chain, "FEWEST_SAMPLES", 1)
    widths, activations = (17, 6, 20)[:depth], ("tanh", "gelu", "elu:0.7")
    count = len(cases.DECLARED[name].outputs)
    z, weight, bias = draw(K * B, D, seed=3), draw(count * X, widths[-1], seed=4), draw(count * X, seed=5)
    hidden = [
        (draw(w, v, seed=v, scale=v**-0.5), draw(w, seed=w))
        for v, w in zip((D, *widths), widths, strict=False)
    ]

    def rows(x, z, weight, bias, *tensors):
        layers = [HiddenLayer(*tensors[2 * i : 2 * i + 2], activations[i]) for i in range(depth)]
        return linear_rows(name, x, Layers(z, weight, bias, hidden=tuple(layers)))

    assert_same("whole decoder", rows, [_data(name), z, weight, bias, *(t for pair in hidden for t in pair)])
    assert_launched(card, 1, "chain_log_prob_kernel")


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64))
def test_other_ops(card, dtype):
    (log_w,) = _leaves(1, K, B, dtype=dtype)
    assert_same("log_mean_exp", ops.log_mean_exp, [log_w])
    z, means, logvars, weights = (
        draw(*shape, seed=i, dtype=dtype).requires_grad_()
        for i, shape in enumerate(((B, D), (U, D), (U, D), (U,)))
    )
    assert_same("mixture_log_prob", ops.mixture_log_prob, [z, means, logvars, weights])
    assert_same("aggregate_log_prob", ops.aggregate_log_prob, [z, means, logvars])
    logits = draw(K, B, U, X, seed=9, dtype=dtype).requires_grad_()
    classes = torch.arange(B * X).view(B, X) % U
    assert_same("categorical_log_prob", ops.categorical_log_prob, [classes, logits])
    counts = torch.arange(B * X).view(B, X).remainder(3).to(dtype)
    assert_same(
        "multinomial_log_prob",
        ops.multinomial_log_prob,
        [counts, draw(K, B, X, seed=8, dtype=dtype).requires_grad_()],
    )
    assert_launched(card, 8)


def test_mixtures_of_discretized_logistics(card):
    each = [draw(K, B, U, 3, X, seed=i).requires_grad_() for i in range(3)]
    logits = draw(K, B, U, X, seed=7).requires_grad_()
    x = torch.linspace(-1, 1, B * 3 * X).view(B, 3, X)
    assert_same(
        "discretized_logistic_mixture_log_prob", ops.discretized_logistic_mixture_log_prob, [x, logits, *each]
    )


def test_all_pairs(card):
    logits = draw(K, X, seed=1)
    assert_same("all_pairs_log_prob", lambda x, p: ops.all_pairs_log_prob(x, p), [_data("bernoulli"), logits])
