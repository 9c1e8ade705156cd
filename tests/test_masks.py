"""Masks of observed elements in the fused ops: nothing that is masked reaches a value or a gradient."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

import fastvae
from fastvae import ops
from fastvae.likelihoods import Bernoulli, DiscretizedLogistic, Gaussian, NegativeBinomial, Poisson
from fastvae.likelihoods.declared import DECLARED
from fastvae.ops.reduce import BoundReduction
from fastvae.ops.reduce import reduce as fused

from . import cases
from .compare import assert_accurate
from .conftest import DEVICE
from .models import rand, randn

each = pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)
# Rows of several tiles, of one (in the C++), and many in a tile.
COLUMNS = (1100, 600, 37, 3)


def _is_interpreted(backend):
    return backend == "triton" and DEVICE.type == "cpu"


def _op(likelihood):
    return getattr(ops, f"{likelihood}_log_prob")


def _leaves(likelihood, x, given):
    return [t.detach().clone().requires_grad_(i > 0 or DECLARED[likelihood].differentiable)
            for i, t in enumerate((x, *given))]  # fmt: skip


def _run(likelihood, leaves, mask, grad=None):
    out = _op(likelihood)(*leaves, mask=mask)
    asked = [t for t in leaves if t.requires_grad]
    return out, torch.autograd.grad(out, asked, torch.ones_like(out) if grad is None else grad.to(out.dtype))


def _probabilities(kind):
    """Return a likelihood of natural outputs, x, and an output that is invalid under the mask alone."""
    shown = 0.5 * rand(6, 4, seed=1) + 0.25
    if kind == "categorical":
        x = torch.randint(4, (6, 3), device=DEVICE)
        return fastvae.likelihoods.Categorical(probs=True), x, shown[:, :, None].repeat(1, 1, 3)
    likelihood = Bernoulli(probs=True) if kind == "bernoulli" else Poisson(rate=True)
    return likelihood, torch.ones(6, 4, device=DEVICE), shown


@pytest.mark.parametrize("bad", [-1.0, 7.0, math.inf, math.nan])
@pytest.mark.parametrize("kind", ["bernoulli", "poisson", "categorical"])
def test_probabilities_under_the_mask_are_not_checked(backend, kind, bad):
    likelihood, x, shown = _probabilities(kind)
    mask = torch.ones_like(x, dtype=torch.bool)
    mask[:, 1] = False
    spoiled = shown.clone()
    spoiled[..., 1] = bad
    q, k = randn(6, 4, seed=2), 3

    def run(output):
        output = output.repeat(k, *[1] * (output.dim() - 1)).requires_grad_()
        seed = torch.Generator(DEVICE).manual_seed(0)
        bound = fastvae.iwae(x, q, lambda z: output, k=k, likelihood=likelihood, mask=mask, generator=seed)
        return bound.detach(), *torch.autograd.grad(bound, output)

    for one, other in zip(run(spoiled), run(shown), strict=True):
        torch.testing.assert_close(one, other)
    if bad < 0:
        with pytest.raises(ValueError, match="the decoder returned values in"):
            fastvae.elbo(x, q, lambda z: spoiled, likelihood=likelihood)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_mixture_reads_nothing_under_the_mask(backend, bad):
    """Missing pixels of any value, and outputs for them, change neither the bound nor a gradient."""
    likelihood = fastvae.likelihoods.DiscretizedLogisticMixture(16)
    x = torch.randint(16, (5, 3, 2, 3), device=DEVICE).float() / 15
    mask = rand(5, 3, 2, 3, seed=1) < 0.7
    mask[0, :, 0, 0] = False
    shapes = (5, 4, 2, 3), *[(5, 4, 3, 2, 3)] * 3
    outputs = [randn(*shape, seed=i) for i, shape in enumerate(shapes)]
    seen = mask[:, None]
    hidden = [seen.any(2), seen, seen, seen[:, :, [1, 2, 2]]]
    spoiled = [torch.where(m, t, bad) for m, t in zip(hidden, outputs, strict=True)]
    q = randn(5, 4, seed=9)

    def run(x, outputs):
        outputs = [t.detach().requires_grad_() for t in outputs]
        bound = fastvae.elbo(x, q, lambda z: tuple(outputs), likelihood=likelihood, mask=mask,
                             generator=torch.Generator(DEVICE).manual_seed(0))  # fmt: skip
        return bound.detach(), *torch.autograd.grad(bound, outputs)

    found = run(torch.where(mask, x, bad), spoiled)
    for one, other in zip(found, run(torch.where(mask, x, 0.0), outputs), strict=True):
        torch.testing.assert_close(one, other)
    assert all(bool((g[~m.expand_as(g)] == 0).all()) for g, m in zip(found[1:], hidden, strict=True))
    # A NaN elsewhere does not excuse a value off the grid.
    off = torch.where(mask, 3 * x + 1, math.nan)
    with pytest.raises(ValueError, match="must be on the grid of 16 values"):
        fastvae.elbo(off, q, lambda z: tuple(outputs), likelihood=likelihood, mask=mask)


@each
@pytest.mark.parametrize("columns", COLUMNS)
def test_against_distributions(backend, likelihood, columns):
    """Values and all gradients are those of the observed elements, whatever stands under the mask."""
    few = _is_interpreted(backend)
    k, b = (2, 3) if columns > 600 or few else (3, 11)
    shapes = cases.forms(likelihood, k, b, (columns,)) or [None]
    for kind in ("of one event", "most") if few else cases.MASKS:
        for i, shape in enumerate(shapes[1:3] if few and shapes[1:] else shapes[:3] + shapes[6:]):
            bad = cases.BAD[i % len(cases.BAD)]
            for result in cases.results(cases.case(likelihood, k, b, columns, shape, mask=kind, bad=bad)):
                assert_accurate(*result)


@each
@pytest.mark.parametrize("columns", COLUMNS)
def test_what_is_masked_is_not_seen(backend, likelihood, columns):
    """Every bit is the same whatever x and the outputs hold under the mask; gradients there are 0."""
    few = _is_interpreted(backend)
    k, b = (2, 3) if columns > 600 or few else (9, 11)
    x, given = cases.data(likelihood, b, columns), cases.parameters(likelihood, k, b, columns)
    mask = cases.mask_of("most", b, columns)
    grad = randn(k, b, seed=3)
    leaves = _leaves(likelihood, x, given)
    value, grads = _run(likelihood, leaves, mask, grad)
    assert torch.equal(value[:, ::3], torch.zeros_like(value[:, ::3])) and bool(value.isfinite().all())
    for g in grads:
        assert not bool(g[~mask.expand(g.shape)].any()) and bool(g.isfinite().all())
    for bad in cases.BAD[: 1 if few else None]:
        spoiled = [cases.spoiled(t, mask, bad) for t in (x, *given)]
        again, found = _run(likelihood, _leaves(likelihood, spoiled[0], spoiled[1:]), mask, grad)
        assert torch.equal(again, value)
        assert all(torch.equal(f, g) for f, g in zip(found, grads, strict=True))


@each
@pytest.mark.parametrize("columns", COLUMNS)
def test_rows_observed_in_whole_are_those_without_a_mask(backend, likelihood, columns):
    k, b = 3, 4
    x, given = cases.data(likelihood, b, columns), cases.parameters(likelihood, k, b, columns)
    mask = torch.ones(b, columns, dtype=torch.bool, device=DEVICE)
    leaves = _leaves(likelihood, x, given)
    value, grads = _run(likelihood, leaves, None)
    found, same = _run(likelihood, leaves, mask)
    assert torch.equal(found, value) and all(torch.equal(s, g) for s, g in zip(same, grads, strict=True))
    mask[1:3] = rand(2, columns, seed=4) < 0.5
    found, same = _run(likelihood, leaves, mask)
    whole = [0, 3]
    torch.testing.assert_close(found[:, whole], value[:, whole], rtol=1e-5, atol=1e-5)
    for s, g in zip(same, grads, strict=True):
        torch.testing.assert_close(s[..., whole, :], g[..., whole, :], rtol=1e-5, atol=1e-5)


@each
def test_forms_of_a_mask(backend, likelihood):
    """A mask of one event, of any strides, in events of several axes, and for one sample."""
    k, b, event = 3, 4, (5, 6)
    x, given = cases.data(likelihood, b, *event), cases.parameters(likelihood, k, b, *event)
    mask = cases.mask_of("few", b, *event)
    flat = [t.flatten(-2) for t in (x, *given)]
    expected, grads = _run(likelihood, _leaves(likelihood, flat[0], flat[1:]), mask.flatten(1))
    for form in (
        mask,
        mask.transpose(1, 2).contiguous().transpose(1, 2),
        torch.stack([mask, ~mask], -1)[..., 0],
    ):
        found, slopes = _run(likelihood, _leaves(likelihood, x, given), form)
        assert torch.equal(found, expected)
        assert all(torch.equal(s.flatten(-2), g) for s, g in zip(slopes, grads, strict=True))
    turned = mask.flatten(1).mT.contiguous().mT
    # Plain PyTorch sums in another order.
    found = _run(likelihood, _leaves(likelihood, flat[0], flat[1:]), turned)[0]
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    one = mask[1]
    found = _op(likelihood)(x, *given, mask=one)
    assert torch.equal(found, _op(likelihood)(x, *given, mask=one.expand(b, *event).contiguous()))
    first = _op(likelihood)(x, *(p[0] for p in given), mask=one)
    assert torch.equal(first, found[0])


@pytest.mark.parametrize("likelihood", [n for n in cases.LIKELIHOODS if DECLARED[n].takes_integers])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integers(backend, likelihood, dtype):
    x, given = cases.data(likelihood, 5, 40, dtype=dtype), cases.parameters(likelihood, 2, 5, 40)
    mask = cases.mask_of("most", 5, 40)
    given = [p.requires_grad_() for p in given]
    value = _op(likelihood)(torch.where(mask, x, 255).to(dtype), *given, mask=mask)
    expected = _op(likelihood)(x.float(), *given, mask=mask)
    assert torch.equal(value, expected)
    assert torch.equal(*(torch.autograd.grad(v.sum(), given[0])[0] for v in (value, expected)))


@each
def test_nan_that_was_observed_stays(backend, likelihood):
    x, given = cases.data(likelihood, 4, 300), cases.parameters(likelihood, 3, 4, 300)
    mask = torch.ones(4, 300, dtype=torch.bool, device=DEVICE)
    mask[:, 100:] = False
    x[1, 5], x[2, 200], given[0][2, 3, 7] = math.nan, math.nan, math.nan
    lost = _op(likelihood)(x, *given, mask=mask).isnan()
    assert bool(lost[:, 1].all()) and bool(lost[2, 3]) and int(lost.sum()) == 4


@pytest.mark.parametrize("likelihood", [n for n in cases.LIKELIHOODS if DECLARED[n].low > -math.inf])
@pytest.mark.parametrize("columns", [6, 700])
def test_only_what_was_observed_must_lie_in_the_support(backend, monkeypatch, likelihood, columns):
    monkeypatch.setenv("FASTVAE_CHECK", "1")
    x, given = cases.data(likelihood, 4, columns), cases.parameters(likelihood, 2, 4, columns)
    mask = torch.ones(4, columns, dtype=torch.bool, device=DEVICE)
    x[2, 1], mask[2, 1] = -5.0, False
    assert bool(_op(likelihood)(x, *given, mask=mask).isfinite().all())
    x[3, 2] = -6.0
    with pytest.raises(ValueError, match=r"x holds values in \[-6, "):
        _op(likelihood)(x, *given, mask=mask)


@pytest.mark.parametrize(
    "how",
    [
        BoundReduction(-0.5, "mean", "none"),
        BoundReduction(-0.5, "mean", "mean"),
        BoundReduction(-0.5, "log_mean_exp", "sum"),
        BoundReduction(-0.5, "log_mean_exp", "none", 0.5, 3, 0.2),
    ],
    ids=lambda how: f"{how.over}-{how.reduction}",
)
@each
def test_bounds(backend, likelihood, how):
    """A fused bound is that of the masked log-likelihoods, in all reductions."""
    k, b, columns = 3, 4, 50
    x, given = cases.data(likelihood, b, columns), cases.parameters(likelihood, k, b, columns)
    mask = cases.mask_of("most", b, columns)
    x, given[0] = cases.spoiled(x, mask, math.nan), cases.spoiled(given[0], mask, math.inf)
    term = randn(k, b, seed=5).requires_grad_()
    rows = [p.requires_grad_() for p in given]
    bound, mean = fused(likelihood, x, tuple(p.flatten(0, 1) for p in rows), term, None, how, True, mask)
    found = torch.autograd.grad(bound.sum(), (*rows, term))
    with fastvae.use_backend("reference"):
        inside = torch.where(mask, x, DECLARED[likelihood].inside)
        clean = [torch.where(mask, p.detach(), 0.3).double().requires_grad_() for p in given]
        wide = term.detach().double().requires_grad_()
        # The op on rows of one element.
        every = _op(likelihood)(inside.double().reshape(-1, 1), *(p.reshape(k, -1, 1) for p in clean))
        log_p = torch.where(mask, every.reshape(k, b, columns), 0.0).sum(2)
        w = log_p - 0.5 * wide
        if how.over == "mean":
            expected = w.mean(0)
        else:
            power, groups, share = 1 - how.alpha, how.groups, how.share
            each_group = (power * w).reshape(groups, -1, b).logsumexp(1) - math.log(k // groups)
            expected = (1 - share) * each_group.mean(0) / power + share * w.mean(0)
        expected = expected if how.reduction == "none" else getattr(expected, how.reduction)()
        slopes = torch.autograd.grad(expected.sum(), (*clean, wide))
    torch.testing.assert_close(bound.double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(mean.double(), log_p.mean(0), rtol=1e-4, atol=1e-4)
    for f, s in zip(found, slopes, strict=True):
        torch.testing.assert_close(f.double(), s, rtol=2e-3, atol=2e-4)
    assert not bool(found[0][~mask.expand(k, b, columns)].any())


class Decoder(nn.Module):
    """Decoder whose outputs are NaN where the mask is False."""

    def __init__(self, number: int, event: tuple[int, ...], mask: torch.Tensor, positive: bool = False):
        super().__init__()
        self.number, self.event, self.mask, self.positive = number, event, mask, positive
        self.layer = nn.Linear(4, number * math.prod(event)).to(DEVICE)

    def forward(self, z):
        outputs = self.layer(z).reshape(len(z), self.number, *self.event).unbind(1)
        keep = self.mask.expand(outputs[0].shape[0] // len(self.mask), *self.mask.shape).flatten(0, 1)
        outputs = [torch.where(keep, o.sigmoid() if self.positive else o, math.nan) for o in outputs]
        return outputs[0] if self.number == 1 else tuple(outputs)


OBJECTIVES = {
    "elbo": functools.partial(fastvae.elbo, k=3),
    "iwae": functools.partial(fastvae.iwae, k=6),
    "iwae in groups": functools.partial(fastvae.iwae, k=6, reduction="mean"),
    "iwae in chunks": functools.partial(fastvae.iwae, k=6, k_chunk=2),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(
    "likelihood, number",
    [
        ("bernoulli", 1),
        ("gaussian", 2),
        (Bernoulli(probs=True), 1),
        (Poisson(rate=True), 1),
        (Gaussian(scale=0.3), 1),
        (Gaussian(scale=0.3, learned=True), 1),
        (Gaussian(scale="optimal"), 1),
        (Gaussian(scale=torch.full((5, 6), 0.3, device=DEVICE)), 1),
        (DiscretizedLogistic(low=-1.0), 2),
        (NegativeBinomial(10.0), 1),
    ],
    ids=str,
)
def test_objectives(backend, objective, likelihood, number, shared):
    """Bounds and their gradients equal those of the observed elements, the decoder's NaN unseen."""
    b, event = 5, (5, 6)
    natural = isinstance(likelihood, (Bernoulli, Poisson))
    name = likelihood if isinstance(likelihood, str) else likelihood.name
    x = cases.data(name, b, *event)
    mask = cases.mask_of("of one event" if shared else "most", b, *event)
    decoder, clean = (Decoder(number, event, m, natural) for m in (mask, torch.ones_like(mask)))
    clean.load_state_dict(decoder.state_dict())
    run = OBJECTIVES[objective]
    given = mask[0] if shared else mask

    def of(x, decoder, likelihood, backend):
        q = randn(b, 8, seed=2).requires_grad_()
        with fastvae.use_backend(backend):
            bound = run(
                x, q, decoder, likelihood=likelihood, mask=given,
                generator=torch.Generator(DEVICE).manual_seed(1),
            )  # fmt: skip
            return bound, *torch.autograd.grad(bound.sum(), (q, *decoder.parameters()))

    if isinstance(likelihood, Gaussian) and "Optimal" in type(likelihood).__name__:
        likelihood.variance.fill_(math.nan)
    found = of(torch.where(mask, x, math.nan), decoder, likelihood, backend)
    if isinstance(likelihood, Gaussian) and "Optimal" in type(likelihood).__name__:
        likelihood.variance.fill_(math.nan)
    expected = of(x, clean, likelihood, "reference")
    for f, e in zip(found, expected, strict=True):
        torch.testing.assert_close(f, e, rtol=2e-4, atol=1e-4 * max(1.0, float(e.abs().max())))


def test_fullgraph(one_thread):
    """Compiled without breaks, with a mask as an input, bounds and gradients are those of eager mode."""
    mask, x = cases.mask_of("most", 5, 7), rand(5, 7, seed=1).round()
    logits, how = randn(4 * 5, 7, seed=2).requires_grad_(), BoundReduction(1.0, "log_mean_exp", "mean")

    def step(x, logits, mask):
        bound, _ = fused("bernoulli", x, (logits * 2,), None, None, how, False, mask)
        return bound + ops.gaussian_log_prob(x, logits.view(4, 5, 7), 0.0, mask=mask[0]).sum()

    compiled = torch.compile(step, fullgraph=True)
    for m in (mask, ~mask):
        expected, found = step(x, logits, m), compiled(x, logits, m)
        torch.testing.assert_close(found, expected)
        torch.testing.assert_close(*(torch.autograd.grad(v, logits)[0] for v in (found, expected)))
    decoder, q = nn.Linear(3, 7).to(DEVICE), randn(5, 6, seed=3)
    bound = torch.compile(
        lambda m: fastvae.iwae(x, q, decoder, k=3, likelihood="bernoulli", mask=m), fullgraph=True
    )
    assert bound(mask).isfinite() and bound(torch.zeros_like(mask)).isfinite()


@pytest.mark.parametrize(
    "mask, message",
    [
        (torch.ones(4, 7), r"mask must be a tensor of bool"),
        (torch.ones(4, 6, dtype=torch.bool), r"mask has shape \[4, 6\]; expected that of x, \[4, 7\]"),
        ([True] * 7, r"mask must be a tensor of bool"),
    ],
)
def test_wrong_masks(mask, message):
    x = torch.zeros(4, 7, device=DEVICE)
    with pytest.raises((TypeError, ValueError), match=message):
        ops.bernoulli_log_prob(x, x, mask=mask)


@each
def test_empty(backend, likelihood):
    for k, b, size in ((2, 0, 3), (2, 3, 0), (0, 3, 2)):
        x, given = cases.data(likelihood, b, size), cases.parameters(likelihood, k, b, size)
        mask = torch.ones(b, size, dtype=torch.bool, device=DEVICE)
        assert torch.equal(_op(likelihood)(x, *given, mask=mask), torch.zeros(k, b, device=DEVICE))


@pytest.mark.parametrize("columns", [2500, 37])
def test_any_number_of_threads_gives_the_same_bits(columns):
    k, b = 7, 40
    x, given = cases.data("gaussian", b, columns), cases.parameters("gaussian", k, b, columns)
    given[1] = given[1][0, 0]
    mask = cases.mask_of("most", b, columns)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2):
            torch.set_num_threads(threads)
            found.append(_run("gaussian", _leaves("gaussian", x, given), mask))
    finally:
        torch.set_num_threads(before)
    (one, grads), (other, others) = found
    assert torch.equal(one, other) and all(torch.equal(g, o) for g, o in zip(grads, others, strict=True))
