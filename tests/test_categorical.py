"""Classes: every backend against the formula in float64, for each layout of the logits."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import fastvae
from fastvae import ops
from fastvae.likelihoods import Categorical

from . import strategies
from .compare import assert_near
from .conftest import DEVICE
from .models import generator, rand, randn

B, K = 3, 4


def naive_categorical(x, logits, ignore=-100):
    """Return log p [K, B] of x [B, P] and logits [K, B, C, P]."""
    # Zero, with a gradient even if every class is ignored.
    picked = torch.where(torch.ones_like(logits[:, :, 0], dtype=torch.bool), 0.0, logits[:, :, 0])
    normal = logits - torch.logsumexp(logits, 2, keepdim=True)
    for b in range(x.shape[0]):
        for p in range(x.shape[1]):
            if int(x[b, p]) != ignore:
                picked[:, b, p] = normal[:, b, int(x[b, p]), p]
    return picked.sum(2)


SIZES = strategies.distinct_sizes(4, largest=33, elements=6000)


@st.composite
def classes(draw):
    """Draw x [B, P], logits [K, B, C, P] or [K, B, P, C] in any layout, the axis, and the class to ignore."""
    k, b, c, p = draw(SIZES)
    dtype, seed = draw(strategies.dtypes), draw(st.integers(0, 99))
    spread = draw(st.sampled_from([0.1, 1.0, 30.0]))
    ignore = draw(st.sampled_from([-100, 0, c - 1]))
    x = (rand(b, p, seed=seed) * c).floor().clamp(max=c - 1)
    x[rand(b, p, seed=seed + 1) < 0.1] = ignore
    kinds = [torch.int64, torch.int32, torch.int16, torch.float32]
    x = strategies.laid_out(x.to(draw(st.sampled_from(kinds))), draw(strategies.layouts))
    logits = (spread * randn(k * b, c, p, seed=seed + 2)).to(dtype)
    axis = draw(st.sampled_from([1, -1]))
    if axis == -1:
        logits = logits.movedim(1, -1).contiguous()
    elif draw(st.booleans()):
        logits = logits.movedim(1, -1).contiguous().movedim(-1, 1)
    return x, strategies.laid_out(logits, draw(strategies.layouts)), (k, b, c, p), axis, ignore


@given(classes())
def test_categorical(backend, case):
    x, logits, (k, b, c, p), axis, ignore = case
    logits = logits.detach().requires_grad_()
    wide = logits.detach().double().movedim(axis, 1).reshape(k, b, c, p).requires_grad_()
    got = ops.categorical_log_prob(x, logits.unflatten(0, (k, b)), ignore, axis=axis)
    expected = naive_categorical(x, wide, ignore)
    assert got.shape == (k, b)
    assert got.dtype == (torch.float64 if logits.dtype == torch.float64 else torch.float32)
    single = torch.float32 if logits.dtype != torch.float64 else got.dtype
    assert_near(got.detach(), expected.detach(), single, 1 + float(wide.detach().abs().amax()) * p, "value")
    weight = randn(k, b, seed=7).to(got.dtype)
    (grad,) = torch.autograd.grad((got * weight).sum(), logits)
    (wanted,) = torch.autograd.grad((expected * weight.double()).sum(), wide)
    size = 3 * (1 + float(wide.detach().abs().amax()))
    found = grad.movedim(axis, 1).reshape(wanted.shape)
    assert_near(found, wanted, logits.dtype, size, "gradient")
    ignored = (x == ignore)[None, :, None].expand(wanted.shape)
    assert not bool(found[ignored].any())


@pytest.mark.parametrize(
    "shape",
    [
        *[(70, 1, 3000), (9, 2, 1500), (4000, 1, 3), (1500, 3, 5), (2, 1500, 3), (3, 700, 40)],
        # Vectors of classes, whole and not.
        *[(300, 1, 16), (200, 1, 17), (1100, 1, 31), (70, 2, 100), (70, 1, 256), (40, 3, 257)],
    ],
    ids=lambda s: "x".join(map(str, s)),
)  # fmt: skip
@pytest.mark.parametrize("axis", [1, -1])
def test_sizes_beyond_a_tile(backend, shape, axis):
    """More rows, positions or classes than one tile: equal to PyTorch in float64."""
    rows, p, c = shape
    if backend == "triton" and DEVICE.type == "cpu" and rows * p * c > 40000:
        rows = max(1, 40000 // (p * c))  # the interpreter is slow
    x = torch.randint(c, (rows, p), device=DEVICE, generator=generator(1))
    logits = randn(rows, *((c, p) if axis == 1 else (p, c)), seed=2).requires_grad_()
    wide = logits.detach().double().movedim(axis, 1).requires_grad_()
    got = ops.categorical_log_prob(x, logits, axis=axis)
    each = -nn.functional.cross_entropy(wide, x, reduction="none")
    assert_near(
        got.detach(), each.detach().sum(1), torch.float32, float(each.detach().abs().sum(1).max()), "value"
    )
    weight = randn(rows, seed=3)
    (grad,) = torch.autograd.grad((got * weight).sum(), logits)
    (wanted,) = torch.autograd.grad((each.sum(1) * weight.double()).sum(), wide)
    assert_near(grad.movedim(axis, 1), wanted, torch.float32, 12.0, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("c", [5, 16, 20, 130, 300])
def test_values_that_are_not_finite(backend, c, dtype):
    """NaN reaches its row's results alone; a class of -inf has probability 0; where others are +inf, too."""
    logits = randn(7, c, seed=1).to(dtype)
    logits[1, c - 1], logits[2, 0], logits[3, 1:], logits[6, 1:3] = math.nan, -math.inf, -math.inf, math.inf
    x = torch.tensor([0.0, 0.0, 0.0, 0.0, math.nan, c - 1, 0.0], device=DEVICE, dtype=dtype)
    logits.requires_grad_()
    got = ops.categorical_log_prob(x, logits)
    (grad,) = torch.autograd.grad(got.nansum(), logits)
    value = got.detach().cpu()
    assert value[:6].isnan().tolist() == [False, True, False, False, True, False]
    assert float(value[6]) == float(value[2]) == -math.inf and float(value[3]) == 0
    expected = torch.log_softmax(logits.detach().double().cpu(), 1)
    assert_near(value[[0, 5]], expected[[0, 5], [0, c - 1]], dtype, 1 + c, "value")
    assert grad[[0, 3, 5]].isfinite().all()


@pytest.mark.parametrize("options", [{}, {"k": 3}, {"k": 5, "k_chunk": 2}], ids=str)
def test_classes_last_in_objectives(backend, options):
    """Objectives accept classes last, with padding by ignore_index or by a mask."""
    p, c, d = 7, 20, 2
    x = torch.randint(1, c, (B, p), device=DEVICE, generator=generator(1))
    padded = rand(B, p, seed=2) < 0.3
    x[padded] = 0
    decoder = nn.Linear(d, p * c).to(DEVICE)
    q = randn(B, d, seed=3), randn(B, d, seed=4)
    call = fastvae.iwae if options else fastvae.elbo

    def run(likelihood, shaped, **named):
        value = call(
            x,
            q,
            lambda z: shaped(decoder(z)),
            likelihood=likelihood,
            generator=generator(5),
            **options,
            **named,
        )
        return value, *torch.autograd.grad(value, list(decoder.parameters()))

    last = run(Categorical(0, axis=-1), lambda h: h.reshape(-1, p, c))
    first = run(Categorical(0), lambda h: h.reshape(-1, p, c).movedim(-1, 1))
    masked = run(Categorical(axis=-1), lambda h: h.reshape(-1, p, c), mask=~padded)
    for other in (first, masked):
        for one, two in zip(last, other, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)


def test_methods_of_classes_last():
    last, first = Categorical(axis=-1), Categorical()
    logits = randn(5, 2, 3, 7, seed=1)  # [N, *event, C]
    moved = logits.movedim(-1, 1)
    torch.testing.assert_close(last.mean(logits), first.mean(moved))
    assert torch.equal(
        last.sample(logits, generator=generator(1)), first.sample(moved, generator=generator(1))
    )
    x = first.sample(moved)
    torch.testing.assert_close(last.log_prob(x, logits), first.log_prob(x, moved))
    assert repr(last) == "Categorical(ignore_index=-100, axis=-1)"


WRONG = {
    "one-hot": (lambda x: nn.functional.one_hot(x, 5).movedim(-1, 1), {}, (5, 4), ["one-hot", "x.argmax(1)"]),
    "one-hot, classes last": (
        lambda x: nn.functional.one_hot(x, 5), {"axis": -1}, (4, 5), ["one-hot", "x.argmax(-1)"],
    ),
    "classes last": (lambda x: x, {}, (4, 5), ["pass axis=-1"]),
    "classes first": (lambda x: x, {"axis": -1}, (5, 4), ["pass axis=1"]),
    "another axis": (lambda x: x, {"axis": 2}, (5, 4), ["axis", "2"]),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistakes(case):
    of, options, shape, words = WRONG[case]
    x = torch.arange(4, device=DEVICE).expand(B, 4)
    for call in (
        lambda: ops.categorical_log_prob(of(x), torch.zeros(B, *shape, device=DEVICE), **options),
        lambda: fastvae.elbo(
            of(x), torch.zeros(B, 4, device=DEVICE), lambda z: torch.zeros(len(z), *shape, device=DEVICE),
            likelihood=Categorical(**options),
        ),
    ):  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as raised:
            call()
        for word in words:
            assert word in str(raised.value)


@pytest.mark.parametrize("classes_", [4, 20])
@pytest.mark.parametrize("axis", [1, -1])
def test_nan_stays_in_its_row(backend, classes_, axis):
    """NaN in gives NaN out, in its row alone."""
    x = torch.tensor([[0.0, math.nan, 2.0], [1.0, 2.0, 0.0]], device=DEVICE)
    logits = randn(K, 2, *((classes_, 3) if axis == 1 else (3, classes_)), seed=1)
    out = ops.categorical_log_prob(x, logits, axis=axis)
    assert bool(out[:, 0].isnan().all())
    torch.testing.assert_close(out[:, 1:], ops.categorical_log_prob(x[1:], logits[:, 1:], axis=axis))
    spoiled = logits.clone()
    spoiled[0, 0].select(axis - 1 if axis == 1 else axis, 3)[1] = math.nan
    out = ops.categorical_log_prob(x.nan_to_num(), spoiled, axis=axis)
    assert bool(out[0, 0].isnan()) and not bool(out[1:].isnan().any() | out[0, 1].isnan())


def test_impossible_classes(backend):
    """A class of logit −∞ has log p −∞; the others are unaffected."""
    logits = randn(2, 3, 20, seed=1).requires_grad_()
    with torch.no_grad():
        logits[:, 1, 4] = -math.inf
    x = torch.tensor([[1, 4, 2], [1, 5, 2]], device=DEVICE)
    out = ops.categorical_log_prob(x, logits, axis=-1)
    assert out[0] == -math.inf and bool(out[1].isfinite())
    (grad,) = torch.autograd.grad(out[1], logits)
    assert bool(grad.isfinite().all()) and grad[1, 1, 4] == 0


def test_one_class_for_each_example_in_every_mode(backend):
    """Classes [B] and logits [B, C]: the shortest call, which compilers and transforms must follow, too."""
    target = torch.tensor([4, 0, -100, 2, 1, 4, 3], device=DEVICE)
    logits = randn(7, 5, seed=3).requires_grad_()

    def loss(a):
        return -ops.categorical_log_prob(target, a)

    def near(got, value):
        # Roundings of logits and log-sums below 4.
        assert_near(got, value.detach(), torch.float32, 4.0, "")

    expected = nn.functional.cross_entropy(logits.double(), target, reduction="none")
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    near(loss(logits), expected)
    near(torch.autograd.grad(loss(logits).sum(), logits)[0], gradient)
    compiled = torch.compile(lambda a: loss(a).sum(), fullgraph=True, backend="aot_eager")
    near(torch.autograd.grad(compiled(logits), logits)[0], gradient)
    near(torch.func.grad(lambda a: loss(a).sum())(logits), gradient)
    near(torch.func.vmap(loss)(torch.stack([logits, logits]))[1], expected)
    with torch.no_grad():
        assert not loss(logits).requires_grad
    with torch.inference_mode():
        near(loss(logits.detach()), expected)
    with pytest.raises(ValueError, match="x holds 5, but classes are whole numbers from 0 to 4"):
        ops.categorical_log_prob(target + 1, logits)
