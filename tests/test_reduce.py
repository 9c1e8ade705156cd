"""Bounds from a decoder's output: every backend against plain PyTorch in float64, and edge cases."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastvae
from fastvae import ops
from fastvae.core import backend as _backend
from fastvae.likelihoods import Bernoulli, Gaussian
from fastvae.ops.reduce import BoundReduction
from fastvae.ops.reduce import reduce as fused

from . import cases as registered
from . import formulas, strategies
from .compare import assert_accurate
from .conftest import DEVICE
from .models import rand, randn


def reduce(likelihood, x, parameters, term=None, *, beta=None, terms=False, mask=None, **how):
    how = {"coefficient": 1.0, "over": "mean", "reduction": "none"} | how
    return fused(likelihood, x, parameters, term, beta, BoundReduction(**how), terms, mask)


SIZES = strategies.distinct_sizes(3, elements=8000)
# Shapes of the parameters after the first, [K·B, X].
KINDS = {
    "full": lambda n, x: (n, x),
    "row": lambda n, x: (x,),
    "number": lambda n, x: (),
    "one": lambda n, x: (n, 1),
}


@st.composite
def cases(draw, sizes=SIZES):
    k, b, size = draw(sizes)
    likelihood = draw(st.sampled_from(registered.LIKELIHOODS))
    declared = registered.DECLARED[likelihood]
    dtype = draw(strategies.dtypes)
    kinds = [dtype, torch.float32, *([torch.int32] if declared.takes_integers else [])]
    spread = draw(st.sampled_from([0.01, 1.0, 8.0]))

    def tensor(*shape, dtype=dtype, **options):
        return draw(strategies.tensors(shape, dtype, device=DEVICE, **options))

    parameters = [tensor(k * b, size, spread=spread)]
    for _ in declared.outputs[1:]:
        parameters.append(tensor(*KINDS[draw(st.sampled_from(sorted(KINDS)))](k * b, size)))
    x = registered.data(likelihood, b, size, seed=draw(strategies.seeds), dtype=draw(st.sampled_from(kinds)))
    over = draw(st.sampled_from(["mean", "log_mean_exp"]))
    reduction = draw(st.sampled_from(["none", "sum", "mean"]))
    wide = formulas.computation(*parameters)
    term = draw(st.sampled_from([None, (b,), (k, b)]))
    beta = draw(st.sampled_from([None, (), (b,)]))
    terms = draw(st.booleans())
    kind = draw(st.sampled_from((None, None, *registered.MASKS)))
    seed = draw(strategies.seeds)
    return {
        "likelihood": likelihood,
        "mask": None if kind is None else registered.mask_of(kind, b, size, seed=seed),
        "bad": None if kind is None else draw(st.sampled_from((None, *registered.BAD))),
        "x": strategies.laid_out(x, draw(strategies.layouts)),
        "parameters": parameters,
        "term": None if term is None else tensor(*term, dtype=wide, spread=5.0),
        "beta": None if beta is None else tensor(*beta, dtype=wide, low=0.0, high=2.0),
        "how": (draw(st.sampled_from([1.0, -1.0, -0.3])), over, reduction),
        "terms": terms,
        "grad": tensor(*((b,) if reduction == "none" else ()), dtype=torch.float32),
        "grad_mean": tensor(b, dtype=torch.float32) if terms and over == "mean" else None,
        "need": [draw(st.booleans()) for _ in parameters] + [declared.differentiable],
    }


def _leaves(case):
    need_x, *need = reversed(case["need"])
    x, *parameters = (t.detach() for t in (case["x"], *case["parameters"]))
    if case.get("bad") is not None:
        mask = case["mask"]
        x = registered.spoiled(x, mask, case.get("bad"))
        parameters[0] = registered.spoiled(
            parameters[0], mask.repeat(len(parameters[0]) // len(mask), 1), case.get("bad")
        )
    leaves = [x.requires_grad_(need_x)]
    leaves += [p.requires_grad_(n) for p, n in zip(parameters, need, strict=True)]
    return leaves, None if case["term"] is None else case["term"].detach().requires_grad_()


def _run(case):
    (x, *parameters), term = _leaves(case)
    coefficient, over, reduction = case["how"]
    bound, mean = reduce(
        case["likelihood"], x, tuple(parameters), term, beta=case["beta"], coefficient=coefficient, over=over,
        reduction=reduction, terms=case["terms"], mask=case.get("mask"),
    )  # fmt: skip
    assert (mean is not None) == case["terms"]
    assert bound.dtype == formulas.computation(x, *parameters)
    outputs = [bound] if case["grad_mean"] is None else [bound, mean]
    grads = [case[n].to(bound.dtype) for n in ("grad", "grad_mean") if case[n] is not None]
    asked = [t for t in (x, *parameters, term) if t is not None and t.requires_grad]
    found = torch.autograd.grad(outputs, asked, grads) if asked else ()
    assert all(g.dtype == t.dtype and g.shape == t.shape for g, t in zip(found, asked, strict=True))
    return [bound, *([mean] if case["terms"] else []), *found]


def _spread(x, parameters):
    """Return the parameters as [K, B, X], or as [1, 1, X] and [1, 1, 1] those that do not vary by row."""
    return [p.unflatten(0, (-1, len(x))) if p.dim() == 2 else p.reshape(1, 1, -1) for p in parameters]


def results(case):
    """Return (name, actual, None, expected) for every result of a case, for assert_accurate."""
    actual = _run(case)
    x, parameters = case["x"], case["parameters"]
    values, grads = formulas.reduce(
        case["likelihood"],
        x,
        _spread(x, parameters),
        case["term"],
        case["beta"],
        case["how"],
        case["grad"],
        case["grad_mean"],
        case.get("mask"),
    )
    for i, p in enumerate(parameters, 1):
        assert grads[i].value.numel() == p.numel()
        grads[i] = formulas.Rounded(
            grads[i].value.reshape(p.shape), grads[i].error.reshape(p.shape), grads[i].u
        )
    need_x, *need = reversed(case["need"])
    need = [need_x, *need, case["term"] is not None]
    names = ["x", *(f"parameter {i}" for i in range(len(parameters))), "term"]
    wanted = [("bound", values[0])] + ([("mean", values[1])] if case["terms"] else [])
    wanted += [(f"gradient of {n}", g) for n, g, asked in zip(names, grads, need, strict=True) if asked]
    return [(n, a, None, w) for (n, w), a in zip(wanted, actual, strict=True)]


@given(case=cases())
def test_reduce(backend, case):
    for result in results(case):
        assert_accurate(*result)


def _at_once(likelihood, x, parameters, term, beta, how, counter):
    """Return the bound and weights of rows by one launch of Triton, None where two are better."""
    engine, declared = _backend.layer("triton", "likelihood"), registered.DECLARED[likelihood]
    return engine.log_prob_bound(declared, x, _spread(x, parameters), term, beta, how, counter)


@given(case=cases())
def test_rows_and_bound_by_one_launch(case):
    """The last program reduces all rows, and leaves the counter at zero for the next launch."""
    x, parameters, term, beta = (case[name] for name in ("x", "parameters", "term", "beta"))
    values, _ = formulas.reduce(
        case["likelihood"],
        x,
        _spread(x, parameters),
        term,
        beta,
        case["how"],
        case["grad"],
        case["grad_mean"],
    )
    counter, how = torch.zeros(1, dtype=torch.int32, device=DEVICE), BoundReduction(*case["how"])
    first, again = (_at_once(case["likelihood"], x, parameters, term, beta, how, counter) for _ in range(2))
    if len(parameters[0]) > 1024:
        assert first is again is None
        return
    assert counter.item() == 0
    assert_accurate("bound", first[0], None, values[0])
    assert torch.equal(first[0].nan_to_num(), again[0].nan_to_num())


@pytest.mark.parametrize("over", ["mean", "log_mean_exp"])
def test_parts_of_rows_and_their_bound_by_one_launch(over):
    """Several programs share a row, and the last one reduces several tiles."""
    k, b, size = 7, 60, 1300
    how = BoundReduction(-0.5, over, "sum")
    x, logits, term = rand(b, size, seed=1), randn(k * b, size, seed=2), randn(k, b, seed=3)
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    bound, weights = _at_once("bernoulli", x, [logits], term, None, how, counter)
    log_w = ops.bernoulli_log_prob(x, logits.unflatten(0, (k, b))).double() - 0.5 * term
    expected = torch.logsumexp(log_w, 0) - math.log(k) if over == "log_mean_exp" else log_w.mean(0)
    torch.testing.assert_close(bound.double(), expected.sum(), rtol=1e-6, atol=0)
    if over == "log_mean_exp":
        # A log-likelihood of some 1000 is rounded to 6e-5.
        torch.testing.assert_close(weights.double(), torch.softmax(log_w, 0), rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(
    "sizes, how",
    [
        ((5, 300, 3), {}),
        ((2, 2, 600_000), {}),
        ((512, 2, 3000), {}),
        ((4, 3, 7), {"alpha": 0.5}),
        ((4, 3, 7), {"groups": 2}),
        ((4, 3, 7), {"share": 0.5}),
    ],
)
def test_large_and_general_bounds_take_two_launches(sizes, how):
    k, b, size = sizes
    how = BoundReduction(1.0, "log_mean_exp", "mean", **how)
    counter = torch.zeros(1, dtype=torch.int32, device=DEVICE)
    x, logits = torch.zeros(b, size, device=DEVICE), torch.zeros(k * b, size, device=DEVICE)
    assert _at_once("bernoulli", x, [logits], None, None, how, counter) is None


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
@pytest.mark.parametrize("over", ["mean", "log_mean_exp"])
def test_equals_the_separate_ops(backend, likelihood, over):
    """Bound and gradients equal those of the separate log_prob, sum and reductions."""
    k, b, size = 5, 3, 7
    x, log_ratio = rand(b, size, seed=1), randn(k, b, seed=2)
    number = 2 if likelihood == "gaussian" else 1
    leaves = [randn(k * b, size, seed=3 + i).requires_grad_() for i in range(number)] + [
        log_ratio.requires_grad_()
    ]
    bound, _ = reduce(likelihood, x, tuple(leaves[:-1]), leaves[-1], over=over, reduction="mean")
    log_prob = getattr(ops, f"{likelihood}_log_prob")
    log_w = log_prob(x, *(p.unflatten(0, (k, b)) for p in leaves[:-1])) + leaves[-1]
    expected = (ops.log_mean_exp(log_w) if over == "log_mean_exp" else log_w.mean(0)).mean()
    torch.testing.assert_close(bound, expected, rtol=1e-6, atol=1e-5)
    for got, wanted in zip(
        torch.autograd.grad(bound, leaves), torch.autograd.grad(expected, leaves), strict=True
    ):
        torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("over", ["mean", "log_mean_exp"])
@pytest.mark.parametrize("axes", [1, 2])
def test_a_beta_per_row(backend, over, axes):
    """A beta per row works for more rows than are reduced at a time, and a term that is not contiguous."""
    k, b, size = 3, 150, 2
    term = randn(*((k, b) if axes == 2 else (b,)), 2, seed=3)[..., 0]
    case = {
        "likelihood": "bernoulli", "x": rand(b, size, seed=1), "parameters": [randn(k * b, size, seed=2)],
        "term": term, "beta": rand(b, 2, seed=4)[:, 1], "how": (-0.7, over, "none"), "terms": True,
        "grad": randn(b, 2, seed=5)[:, 0], "grad_mean": None, "need": [True, True],
    }  # fmt: skip
    for result in results(case):
        assert_accurate(*result)
    logvar = randn(size, 2, seed=6)[:, 0]
    case |= {"likelihood": "gaussian", "parameters": [*case["parameters"], logvar], "need": [True] * 3}
    for result in results(case):
        assert_accurate(*result)


def test_a_term_of_minus_infinity(backend):
    """A row's term of minus infinity gives that bound, and zero gradients."""
    x, logits = rand(2, 3, seed=1), randn(4 * 2, 3, seed=2).requires_grad_()
    term = torch.tensor([-math.inf, 0.5], device=DEVICE, requires_grad=True)
    bound, _ = reduce("bernoulli", x, (logits,), term, over="log_mean_exp")
    grad_logits, grad_term = torch.autograd.grad(bound.sum(), (logits, term))
    assert bound[0] == -math.inf and not grad_logits.view(4, 2, 3)[:, 0].any()
    torch.testing.assert_close(grad_term, torch.tensor([0.0, 1.0], device=DEVICE))


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_more_samples_than_a_tile(backend, order):
    """The running sum is rescaled whenever the maximum rises, over several tiles."""
    k, b = 700, 3
    ratio = torch.linspace(-60, 0, k, dtype=torch.float64, device=DEVICE)[:, None]
    ratio = (ratio if order == "rising" else ratio.flip(0)) - 100 * torch.arange(b, device=DEVICE)
    x, logits = torch.ones(b, 1, device=DEVICE), torch.zeros(k * b, 1, device=DEVICE)
    narrow = ratio.float().requires_grad_()
    bound, mean = reduce("bernoulli", x, (logits,), narrow, over="log_mean_exp", terms=True)
    expected = torch.logsumexp(ratio, 0) - math.log(k) - math.log(2)
    torch.testing.assert_close(bound.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(mean, torch.full_like(mean, -math.log(2)))
    (grad,) = torch.autograd.grad(bound.sum(), narrow)
    torch.testing.assert_close(grad.double(), torch.softmax(ratio, 0), rtol=2e-4, atol=1e-7)


def test_weights_of_zero_infinity_and_nan(backend):
    """Samples and rows of weight zero, infinity and NaN are treated as in log_mean_exp."""
    x, logits = torch.ones(4, 2, device=DEVICE), torch.zeros(3 * 4, 2, device=DEVICE, requires_grad=True)
    ratio = torch.zeros(3, 4, device=DEVICE)
    ratio[0, 0] = ratio[:, 1] = -math.inf
    ratio[1, 2], ratio[2, 3] = math.inf, math.nan
    ratio.requires_grad_()
    bound, _ = reduce("bernoulli", x, (logits,), ratio, over="log_mean_exp")
    assert bound[1] == -math.inf and bound[2] == math.inf and bound[3].isnan()
    grad_logits, grad_ratio = torch.autograd.grad(bound[:2].sum(), (logits, ratio))
    torch.testing.assert_close(grad_ratio[:, 0], torch.tensor([0.0, 0.5, 0.5], device=DEVICE))
    assert not grad_ratio[:, 1].any() and not grad_logits.view(3, 4, 2)[:, 1].any()
    assert grad_logits.view(3, 4, 2)[:, 0].isfinite().all()


def test_denormal_weights_are_flushed_to_zero(backend):
    """Denormal weights are flushed to zero: they would slow the decoder's backward pass many times."""
    ratio = torch.tensor([[0.0], [-95.0], [-87.0]], device=DEVICE, requires_grad=True)
    x, logits = torch.ones(1, 3, device=DEVICE), torch.zeros(3, 3, device=DEVICE, requires_grad=True)
    bound, _ = reduce("bernoulli", x, (logits,), ratio, over="log_mean_exp", reduction="sum")
    _, grad = torch.autograd.grad(bound, (logits, ratio), torch.tensor(1e-2, device=DEVICE))
    assert grad[0] == 1e-2 and grad[1] == 0 and grad[2] == 0


def test_any_subset_of_gradients(backend):
    """Gradients of one parameter, the term or the mean log-likelihood alone equal those of all."""
    k, b, size = 3, 4, 5
    x, mean, logvar = rand(b, size, seed=1), randn(k * b, size, seed=2), randn(size, seed=3)
    kl = randn(b, seed=4)

    def run(*asked):
        leaves = [t.clone().requires_grad_(n in asked) for n, t in enumerate((mean, logvar, kl))]
        bound, average = reduce(
            "gaussian", x, tuple(leaves[:2]), leaves[2], coefficient=-2.0, reduction="sum", terms=True
        )
        return bound, average, leaves

    bound, _, leaves = run(0, 1, 2)
    wanted = torch.autograd.grad(bound, leaves)
    for n in range(3):
        bound, _, alone = run(n)
        (got,) = torch.autograd.grad(bound, alone[n])
        torch.testing.assert_close(got, wanted[n], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(wanted[2], torch.full_like(kl, -2.0))
    _, average, leaves = run(0, 1)
    got = torch.autograd.grad(average.sum(), leaves[:2])
    for a, w in zip(got, wanted[:2], strict=True):
        torch.testing.assert_close(a, w, rtol=1e-6, atol=1e-6)


def test_rows_longer_than_a_tile_and_many_samples(backend):
    k, b, size = (40, 2, 2500) if backend != "triton" else (5, 2, 2500)
    x, logits = rand(b, size, seed=1), 0.05 * randn(k * b, size, seed=2)
    case = {
        "likelihood": "bernoulli", "x": x, "parameters": [logits], "term": randn(k, b, seed=3), "beta": None,
        "how": (1.0, "log_mean_exp", "mean"), "terms": True, "grad": torch.tensor(0.7, device=DEVICE),
        "grad_mean": None, "need": [True, True],
    }  # fmt: skip
    for result in results(case):
        assert_accurate(*result)


# The objectives use the op wherever it applies.

EVENT = (2, 3)
SCALES = {
    "bernoulli": lambda b: None,
    "decoder": lambda b: None,
    "number": lambda b: 0.3,
    "tensor": lambda b: torch.tensor(0.4),
    "one": lambda b: torch.tensor([[0.4]]),
    "pixel": lambda b: torch.linspace(0.2, 0.9, 6).view(EVENT),
    "row of a picture": lambda b: torch.tensor([0.3, 0.5, 0.9]),
    "batch": lambda b: torch.tensor([[[0.3]], [[0.5]], [[0.6]], [[0.9]]])[:b],
    "learned": lambda b: 0.3,
    "learned pixel": lambda b: torch.linspace(0.2, 0.9, 6).view(EVENT),
}


def _likelihood(form, batch, kind=None):
    scale = SCALES[form](batch)
    if form == "bernoulli":
        return (kind or Bernoulli)()
    return (kind or Gaussian)(scale, learned=form.startswith("learned")).to(DEVICE)


def _as_custom(own):
    """Return the likelihood as a user's class, whose bound comes from its log_prob."""

    class Own(own):
        def log_prob(self, x, parameters):
            return super().log_prob(x, parameters)

    return Own


@pytest.mark.parametrize("form", SCALES)
@pytest.mark.parametrize("objective", ["elbo", "elbo, 3", "elbo, mc", "iwae"])
def test_every_form_of_a_likelihood(backend, form, objective):
    """Every form gives log_prob's results and gradients by x, q, decoder and the likelihood's parameters."""
    batch, latent = 4, 3
    x, mu, logvar = rand(batch, *EVENT, seed=1), randn(batch, latent, seed=2), randn(batch, latent, seed=3)
    weight = randn(latent, 6, seed=4)
    results = []
    for wrap in (lambda kind: kind, _as_custom):
        kind = wrap(Bernoulli if form == "bernoulli" else Gaussian)
        likelihood = _likelihood(form, batch, kind)
        leaves = [t.clone().requires_grad_() for t in (x, mu, logvar, weight)] + list(likelihood.parameters())

        def decoder(z, weight=leaves[3]):
            out = (z @ weight).unflatten(1, EVENT)
            return (out, 0.1 * out) if form == "decoder" else out

        generator = torch.Generator(device=DEVICE).manual_seed(5)
        options = {"likelihood": likelihood, "generator": generator}
        if objective == "iwae":
            bound = fastvae.iwae(leaves[0], leaves[1:3], decoder, k=5, **options)
        else:
            samples, kl = (1, "analytic") if objective == "elbo" else (3, "analytic")
            kl = "mc" if objective == "elbo, mc" else kl
            bound = fastvae.elbo(
                leaves[0], leaves[1:3], decoder, k=samples, kl=kl, beta=0.7, reduction="sum", **options
            )
        results.append((bound, *torch.autograd.grad(bound, leaves)))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian", Gaussian(0.5)])
def test_scalar_events(backend, likelihood):
    """x [B] is treated as [B, 1]."""
    x, mu, logvar, weight = rand(5, seed=1), randn(5, 3, seed=2), randn(5, 3, seed=3), randn(3, seed=4)

    def bound(x):
        def decoder(z):
            out = (z @ weight).reshape(-1, *x.shape[1:])
            return (out, 0.1 * out) if likelihood == "gaussian" else out

        generator = torch.Generator(device=DEVICE).manual_seed(0)
        return fastvae.iwae(x, (mu, logvar), decoder, k=3, likelihood=likelihood, generator=generator)

    torch.testing.assert_close(bound(x), bound(x[:, None]))


@pytest.mark.parametrize("scale", [0.3, torch.tensor(0.3)])
def test_a_scale_stays_accurate_with_a_half_precision_decoder(backend, scale):
    x, q = rand(4, 7, seed=1), (torch.zeros(4, 3, device=DEVICE), torch.zeros(4, 3, device=DEVICE))
    likelihood = Gaussian(scale).to(DEVICE)
    mean = torch.zeros(4, 7, dtype=torch.bfloat16, device=DEVICE)
    bound = fastvae.elbo(x, q, lambda z: mean, likelihood=likelihood, reduction="none")
    exact = torch.distributions.Normal(0.0, 0.3).log_prob(x.double()).sum(1)
    torch.testing.assert_close(bound.double(), exact, rtol=1e-6, atol=1e-5)


def test_a_subclass_uses_its_own_log_prob():
    class Half(Bernoulli):
        def log_prob(self, x, parameters):
            return 0.5 * super().log_prob(x, parameters)

    x, q = rand(4, 7, seed=1), (torch.zeros(4, 3, device=DEVICE), torch.zeros(4, 3, device=DEVICE))
    weight = randn(3, 7, seed=2)

    def bound(likelihood):
        generator = torch.Generator(device=DEVICE).manual_seed(0)
        return fastvae.elbo(x, q, lambda z: z @ weight, likelihood=likelihood, generator=generator)

    # q is the prior: the bound is the likelihood.
    torch.testing.assert_close(bound(Half()), 0.5 * bound("bernoulli"))


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_terms_add_up_to_the_bound(backend, reduction):
    """bound = log-likelihood - beta KL, [B], each with its gradient, for any reduction."""
    x, mu, logvar = rand(4, 7, seed=1), randn(4, 3, seed=2), randn(4, 3, seed=3)
    weight = randn(3, 7, seed=4).requires_grad_()
    for kl, samples in (("analytic", 1), ("analytic", 2), ("mc", 2)):
        leaves = [mu.clone().requires_grad_(), logvar.clone().requires_grad_(), weight]
        terms = fastvae.elbo(
            x, leaves[:2], lambda z: z @ weight, likelihood="bernoulli", beta=0.3, kl=kl, k=samples,
            terms=True, reduction=reduction,
        )  # fmt: skip
        assert terms.bound.shape == terms.log_likelihood.shape == terms.kl.shape == (4,)
        torch.testing.assert_close(terms.bound, terms.log_likelihood - 0.3 * terms.kl)
        whole = torch.autograd.grad(terms.bound.sum(), leaves, retain_graph=True)
        parts = torch.autograd.grad((terms.log_likelihood - 0.3 * terms.kl).sum(), leaves)
        for a, b in zip(whole, parts, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)


def test_a_learned_beta_gets_a_gradient(backend):
    x, q = rand(4, 7, seed=1), (randn(4, 3, seed=2), randn(4, 3, seed=3))
    weight, beta = randn(3, 7, seed=4), torch.tensor(0.3, device=DEVICE, requires_grad=True)
    options = {"likelihood": "bernoulli", "reduction": "sum"}
    bound = fastvae.elbo(x, q, lambda z: z @ weight, beta=beta, **options)
    kl = fastvae.elbo(x, q, lambda z: z @ weight, terms=True, **options).kl
    torch.testing.assert_close(torch.autograd.grad(bound, beta)[0], -kl.sum())


def test_second_derivatives_raise():
    logits = torch.zeros(4, 7, device=DEVICE, requires_grad=True)
    bound, _ = reduce("bernoulli", rand(4, 7, seed=1), (logits,), reduction="sum")
    (grad,) = torch.autograd.grad(bound, logits, create_graph=True)
    with pytest.raises(RuntimeError, match="second derivatives are not implemented"):
        grad.sum().backward()


@pytest.mark.parametrize("over", ["mean", "log_mean_exp"])
def test_the_mean_log_likelihood_of_a_log_mean_exp_has_no_gradient(backend, over):
    x, logits = rand(4, 7, seed=1), randn(3 * 4, 7, seed=2).requires_grad_()
    bound, mean = reduce("bernoulli", x, (logits,), over=over, terms=True)
    assert bound.requires_grad and mean.requires_grad == (over == "mean")


def test_gradients_have_the_dtypes_of_their_inputs(backend):
    """The ops' gradients have their inputs' dtypes, before autograd's cast could hide an error."""
    b, k, x = 4, 3, 5
    data, mean = rand(b, x, seed=1), randn(k * b, x, seed=2)
    for logvar in (randn(x, seed=3), randn(seed=3)):
        given = data, mean, logvar.bfloat16(), randn(k, b, seed=4).double()
        how = BoundReduction(1.0, "mean", "sum")
        grad = torch.ones((), device=DEVICE)
        op = torch.ops.fastvae.reduce_gaussian_backward
        for inputs, need in (
            (given, [True] * 4),
            ((data.double(), mean, *given[2:]), [False, True, True, True]),
        ):
            grad = grad.to(torch.float64 if torch.float64 in {t.dtype for t in inputs[:3]} else torch.float32)
            found = op(grad, None, None, inputs[0], None, *inputs[1:], None, *how, need)
            for g, t, n in zip(found, inputs, need, strict=True):
                assert not n or (g.dtype == t.dtype and g.shape == t.shape)


def test_saved_buffers_have_no_gradient(backend):
    """Buffers saved for the backward pass, results of the dispatcher's ops, have no gradient."""
    mu, logvar = (randn(4, 3, seed=s).requires_grad_() for s in (1, 2))
    seed, logits = torch.tensor(3, device=DEVICE), randn(8, 5, seed=4).requires_grad_()
    draw = (2, 0, 0, -math.inf, math.inf, True, "logvar", 0.0)
    kept = [
        torch.ops.fastvae.rsample_kl(mu, logvar, None, None, seed, *draw, False, True)[2],
        torch.ops.fastvae.rsample_log_ratio(mu, logvar, None, None, seed, *draw, "iwae", 0.0, 1, False, True)[
            3
        ],
        torch.ops.fastvae.reduce_bernoulli(
            rand(4, 5, seed=5), None, logits, None, None, *BoundReduction(1.0, "log_mean_exp", "none"), False
        )[2],
        *torch.ops.fastvae.log_mean_exp(logits)[1:],
    ]
    assert not any(t.requires_grad for t in kept)
