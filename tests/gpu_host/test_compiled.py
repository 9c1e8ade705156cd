"""Compiled graphs on the card: small ops are formulas that the compiler fuses, with the C++'s values."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.compiler import config
from torch.nn import functional

import fastvae
from fastvae import ops
from fastvae.distributions import DiagonalNormal
from fastvae.likelihoods import Gaussian
from fastvae.likelihoods.declared import DECLARED
from fastvae.ops import normal_diagonal, reduce

from .compared import DTYPES, B, D, X, assert_same, draw

K = 6
ELEMENTARY = sorted(name for name, kind in DECLARED.items() if kind.elementary)


def _compiled(function):
    """Return a function, eager on the CPU, and compiled on the card with torch's own random numbers."""
    torch._dynamo.reset()
    compiled = torch.compile(function, options={"fallback_random": True})
    return lambda first, *rest: (compiled if first.is_cuda else function)(first, *rest)


def _inputs(dtype=torch.float32):
    """Return mu, logvar and the decoder's weights."""
    given = draw(B, D, seed=2), draw(B, D, seed=3), draw(2 * X, D, seed=4, scale=0.3)
    return [t.to(dtype).requires_grad_() for t in given]


def _data(name, dtype=torch.float32):
    x = draw(B, X, seed=1)
    return ((x > 0).float() if name == "bernoulli" else x.exp() if name == "log_normal" else x).to(dtype)


def _decoder(name, weight):
    def decoder(z):
        mean, log_scale = (z.to(weight.dtype) @ weight.T).chunk(2, 1)
        return mean if name == "bernoulli" else (mean, log_scale)

    return decoder


def _names(card):
    return {launch.name for launch in card}


def _assert_fused(card):
    """Assert that Triton's kernels of compiled graphs were launched, and none of fastvae's."""
    names = [n for n in _names(card) if n.endswith("_kernel") or n.startswith("triton_")]
    assert names and all(n.startswith("triton_") for n in names), names


OBJECTIVES = {
    "elbo": (fastvae.elbo, {}),
    "samples": (fastvae.elbo, {"k": K, "reduction": "none"}),
    "beta": (fastvae.elbo, {"beta": 0.3, "reduction": "sum"}),
    "free bits": (fastvae.elbo, {"free_bits": 0.2}),
    "monte carlo": (fastvae.elbo, {"kl": "mc", "k": K}),
    "iwae": (fastvae.iwae, {"k": K}),
    "sums": (fastvae.iwae, {"k": K, "reduction": "sum", "estimator": "stl"}),
    "dreg": (fastvae.iwae, {"k": K, "estimator": "dreg"}),
    "shard": (fastvae.iwae, {"k": K, "row_offset": 4}),
    "shared noise": (fastvae.iwae, {"k": K, "shared_noise": True}),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_objectives(card, objective):
    function, options = OBJECTIVES[objective]

    def bound(x, *given):
        mu, logvar, weight = given
        decoder = _decoder("bernoulli", weight)
        return function(x, (mu, logvar), decoder, likelihood="bernoulli", **options)

    assert_same(objective, _compiled(bound), [_data("bernoulli"), *_inputs()])
    _assert_fused(card)


@pytest.mark.parametrize(
    ("likelihood", "dtype"),
    [(name, torch.float32) for name in ELEMENTARY] + [("gaussian", dtype) for dtype in DTYPES[1:]],
)
def test_likelihoods(card, likelihood, dtype):
    chosen = Gaussian(scale="softplus", floor=1e-3) if likelihood == "softplus_gaussian" else likelihood

    def bound(x, *given):
        mu, logvar, weight = given
        q, decoder = torch.cat([mu, logvar], 1), _decoder(likelihood, weight)
        return fastvae.iwae(x, q, decoder, k=K, likelihood=chosen, reduction="sum")

    inputs = [_data(likelihood, dtype), *_inputs(dtype)]
    assert_same(likelihood, _compiled(bound), inputs, magnified=16 if dtype.itemsize == 2 else 4)
    if dtype == torch.float64:
        assert "log_prob_kernel" in _names(card)
    else:
        _assert_fused(card)


@pytest.mark.parametrize("prior", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_masks_and_priors(card, masked, prior):
    mask = (draw(B, X, seed=8) > 0) if masked else None

    def bound(x, mu, logvar, weight, m, s):
        own = DiagonalNormal(m, s) if prior else None
        seen = None if mask is None else mask.to(x.device)
        return fastvae.iwae(
            x, (mu, logvar), _decoder("gaussian", weight), k=K, likelihood="gaussian", prior=own, mask=seen
        )

    more = [t.requires_grad_(prior) for t in (draw(D, seed=11), draw(D, seed=12))]
    assert_same("bound", _compiled(bound), [_data("gaussian"), *_inputs(), *more], magnified=4)
    _assert_fused(card)


@pytest.mark.parametrize(("k", "scale"), [(None, "logvar"), (1, "log_scale"), (K, "softplus")])
def test_draws(card, k, scale):
    def drawn(mu, logvar):
        z, kl = ops.rsample_kl(mu, logvar, k=k, scale=scale, seed=torch.tensor(-7, device=mu.device))
        return z, kl

    assert_same("draw", _compiled(drawn), _inputs()[:2])
    _assert_fused(card)


def test_offsets_and_seeds(card):
    def drawn(mu, logvar, seed):
        return ops.rsample_kl(mu, logvar, k=3, seed=seed, row_offset=5, sample_offset=2)[0]

    for seed in (2**62 + 3, -5):
        assert_same("draw", _compiled(drawn), [*_inputs()[:2], torch.tensor(seed)])
    _assert_fused(card)


def test_a_draw_may_be_changed_in_place(card):
    def changed(mu, logvar):
        z, kl = ops.rsample_kl(mu, logvar, k=K, seed=torch.tensor(3, device=mu.device))
        z.mul_(2)
        z.relu_()
        return z, kl

    assert_same("draw", _compiled(changed), _inputs()[:2])


def test_results_that_are_not_used_cost_nothing(card):
    """Inductor drops them; formulas of a KL alone draw nothing."""

    def kl(mu, logvar):
        return ops.rsample_kl(mu, logvar, seed=torch.tensor(3, device=mu.device))[1]

    assert_same("kl", _compiled(kl), _inputs()[:2])
    _assert_fused(card)


def test_log_mean_exp_and_rows(card):
    def both(log_w, x, mean, logvar):
        rows = ops.gaussian_log_prob(x, mean, logvar)
        return ops.log_mean_exp(log_w), rows, functional.softplus(rows)

    log_w = draw(K, B, seed=1, scale=5).requires_grad_()
    mean, logvar = draw(3, B, X, seed=2).requires_grad_(), draw(1, 1, X, seed=3).requires_grad_()
    assert_same("ops", _compiled(both), [log_w, draw(B, X, seed=4), mean, logvar])
    _assert_fused(card)


def test_samples_of_zero_weight(card):
    """A column of -inf is -inf, and its gradient zero."""
    log_w = draw(K, B, seed=1, scale=5).index_fill_(1, torch.tensor(2), -torch.inf).cuda().requires_grad_()
    bound = _compiled(ops.log_mean_exp)(log_w)
    (grad,) = torch.autograd.grad(bound.sum(), log_w)
    assert bound[2].item() == -torch.inf and bound.isfinite().sum() == B - 1
    assert (grad[:, 2] == 0).all() and grad.isfinite().all()


def test_large_tensors_and_other_likelihoods_keep_their_kernels(card, monkeypatch):
    def bound(x, mu, logvar, weight):
        return fastvae.elbo(x, (mu, logvar), lambda z: z @ weight[:X].T, likelihood="poisson")

    counts = (draw(B, X, seed=1).abs() * 3).round()
    assert_same("poisson", _compiled(bound), [counts, *_inputs()], magnified=4)
    assert "log_prob_kernel" in _names(card) and "rsample_kl_kernel" not in _names(card)
    monkeypatch.setattr(normal_diagonal, "FEW_DRAWS", B * D - 1)
    monkeypatch.setattr(reduce, "FEW_ROWS", B * X - 1)
    card.clear()
    function, inputs = OBJECTIVES["elbo"][0], [_data("bernoulli"), *_inputs()]

    def large(x, mu, logvar, weight):
        return function(x, (mu, logvar), _decoder("bernoulli", weight), likelihood="bernoulli")

    assert_same("large", _compiled(large), inputs)
    assert {"rsample_kl_kernel", "log_prob_kernel"} <= _names(card)


def test_another_backend_calls_the_ops(card):
    """Without a compiler that fuses, formulas would be dozens of launches."""
    torch._dynamo.reset()

    def bound(x, mu, logvar, weight):
        return fastvae.elbo(x, (mu, logvar), _decoder("bernoulli", weight), likelihood="bernoulli")

    traced = torch.compile(bound, backend="aot_eager")
    inputs = [_data("bernoulli"), *_inputs()]
    assert_same("elbo", lambda x, *rest: (traced if x.is_cuda else bound)(x, *rest), inputs)
    assert {"rsample_kl_kernel", "log_prob_kernel"} <= _names(card)


def _iwae(x, mu, logvar, weight):
    decoder = _decoder("bernoulli", weight)
    return fastvae.iwae(x, (mu, logvar), decoder, k=K, likelihood="bernoulli")


def test_evaluation_without_gradients(card):
    assert_same("bound", _compiled(_iwae), [_data("bernoulli"), *(t.detach() for t in _inputs())])
    _assert_fused(card)


def test_transforms_call_the_ops(card):
    def gradient(mu, *rest):
        return torch.func.grad(lambda mu: _iwae(rest[0], mu, *rest[1:]))(mu)

    x, mu, logvar, weight = (t.detach() for t in [_data("bernoulli"), *_inputs()])
    assert_same("gradient", _compiled(gradient), [mu, x, logvar, weight])
    assert {"rsample_log_ratio_kernel", "log_prob_kernel"} <= _names(card)


def test_batches_of_several_sizes(card):
    compiled = torch.compile(_iwae, dynamic=True, options={"fallback_random": True})
    for rows in (B, B - 2):
        inputs = [_data("bernoulli")[:rows], *(t.detach()[:rows] for t in _inputs()[:2]), _inputs()[2]]
        assert_same("bound", lambda x, *rest: (compiled if x.is_cuda else _iwae)(x, *rest), inputs)


def test_an_unusual_output_of_the_decoder(card):
    def bound(x, mu, logvar, weight):
        def decoder(z):
            return {"logits": z @ weight[:X].T}

        return fastvae.iwae(x, (mu, logvar), decoder, k=K, likelihood="bernoulli")

    assert_same("mapping", _compiled(bound), [_data("bernoulli"), *_inputs()])


def test_a_fused_head(card):
    def bound(x, mu, logvar, weight):
        layer = torch.func.functional_call
        head = fastvae.FusedHead(nn.Identity(), linear.to(x.device))
        given = {"layers.0.weight": weight[:X], "layers.0.bias": weight[:X, 0]}
        return fastvae.iwae(x, (mu, logvar), lambda z: layer(head, given, (z,)), k=K, likelihood="bernoulli")

    linear = nn.Linear(D, X)
    assert_same("head", _compiled(bound), [_data("bernoulli"), *_inputs()])


def test_wrong_arguments_are_explained(card):
    x, mu, logvar, weight = (t.detach().cuda() for t in [_data("bernoulli"), *_inputs()])
    decoder = _decoder("bernoulli", weight)

    def bound(x=x, logvar=logvar, likelihood="bernoulli", **options):
        return fastvae.elbo(x, (mu, logvar), decoder, likelihood=likelihood, **options)

    for call, error in (
        (lambda: bound(logvar=logvar[:2]), "logvar"),
        (lambda: bound(x[:2]), "x"),
        (lambda: bound(k=0), "k"),
        (lambda: bound(likelihood="bernouli"), "bernoulli"),
        (lambda: bound(reduction="max"), "reduction"),
    ):
        torch._dynamo.reset()
        with pytest.raises(Exception, match=error):
            torch.compile(call)()


def test_other_formulas_are_compiled_anew(tmp_path, monkeypatch):
    """torch's cache on disk has no graph of another version of fastvae's formulas."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    inputs = [t.detach().cuda() for t in _inputs()[:2]]
    seed = torch.tensor(3, device="cuda")

    def hits():
        counters.clear()
        torch._dynamo.reset()
        torch.compile(lambda mu, logvar: ops.rsample_kl(mu, logvar, k=K, seed=seed))(*inputs)
        return counters["aot_autograd"]["autograd_cache_hit"]

    with config.patch(cache_key_tag="users"):
        assert (hits(), hits()) == (0, 1)
        assert config.cache_key_tag.startswith("users fastvae-")
    with config.patch(cache_key_tag="users fastvae-older"):
        assert (hits(), hits()) == (0, 1)
