"""Every declared likelihood on every backend, against an independent distribution in float64."""

from __future__ import annotations

import importlib
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import fastvae
from fastvae import ops
from fastvae.core import backend as _backend
from fastvae.core.checks import INTEGERS
from fastvae.likelihoods import ContinuousBernoulli
from fastvae.likelihoods.base import NAMED
from fastvae.likelihoods.declared import DECLARED

from . import cases
from .cases import LIKELIHOODS
from .compare import assert_accurate
from .conftest import DEVICE
from .oracles import ORACLES

each = pytest.mark.parametrize("likelihood", LIKELIHOODS)
INTEGER = [n for n in LIKELIHOODS if DECLARED[n].takes_integers]
BOUNDED = [n for n in LIKELIHOODS if DECLARED[n].low > -math.inf]


def _op(likelihood):
    return getattr(ops, f"{likelihood}_log_prob")


def _check(case):
    for result in cases.results(case):
        assert_accurate(*result)


@each
def test_every_layer_implements_the_likelihood(likelihood):
    """A declared likelihood has its C++ and Triton twins, and the test data of its declaration."""
    assert likelihood in _backend.extension().likelihoods, "no csrc/likelihoods file, or not built since"
    if importlib.util.find_spec("triton"):
        twin = importlib.import_module(f"fastvae.kernels.likelihoods.{likelihood}")
        assert callable(twin.value) and callable(twin.gradient)
        assert hasattr(twin, "data") == (DECLARED[likelihood].data is not None)
    assert callable(ORACLES[likelihood]), "tests compare with an independent distribution"
    assert set(_backend.extension().likelihoods) == set(LIKELIHOODS)


@given(case=st.sampled_from(LIKELIHOODS).flatmap(cases.log_prob))
def test_log_prob(backend, case):
    _check(case)


@each
@pytest.mark.parametrize("shape", [(2, 3, 2500), (2500,), (3, 1)])
def test_rows_longer_than_a_tile(backend, likelihood, shape):
    _check(cases.case(likelihood, 2, 3, 2500, shape))


@each
def test_gradients_of_a_row_shared_by_many(backend, likelihood):
    """Gradients of a shared row are correct for more rows than partial sums."""
    _check(cases.case(likelihood, 3, 150, 6, (6,)))


@each
@pytest.mark.parametrize("k, b, size", [(2, 0, 3), (2, 3, 0), (0, 3, 2)])
@pytest.mark.parametrize("form", ["full", "row", "number"])
def test_empty(backend, likelihood, k, b, size, form):
    x = cases.data(likelihood, b, size).requires_grad_(DECLARED[likelihood].differentiable)
    first, *others = cases.parameters(likelihood, k, b, size)
    shape = {"full": (k, b, size), "row": (size,), "number": ()}[form]
    given = [p.requires_grad_() for p in (first, *(torch.zeros(shape, device=DEVICE) for _ in others))]
    out = _op(likelihood)(x, *given)
    assert torch.equal(out, torch.zeros(k, b, device=DEVICE))
    asked = [t for t in (x, *given) if t.requires_grad]
    grads = torch.autograd.grad(out.sum(), asked)
    assert [g.shape for g in grads] == [t.shape for t in asked]
    assert all(bool((g == 0).all()) for g in grads)


@each
@pytest.mark.parametrize("columns", [6, 300])
def test_nan_stays_in_its_row(backend, likelihood, columns):
    x, given = cases.data(likelihood, 4, columns), cases.parameters(likelihood, 3, 4, columns)
    given[0][1, 2, 3] = math.nan
    out = _op(likelihood)(x, *given)
    assert int(out.isnan().sum()) == 1 and bool(out[1, 2].isnan())
    x[3, 0] = math.nan
    out = _op(likelihood)(x, *given)
    assert bool(out[:, 3].isnan().all()) and int(out.isnan().sum()) == 4


@each
def test_without_an_event_axis(backend, likelihood):
    x, given = cases.data(likelihood, 5), cases.parameters(likelihood, 3, 5)
    exact = ORACLES[likelihood](*(p.double() for p in given)).log_prob(x.double())
    torch.testing.assert_close(_op(likelihood)(x, *given).double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("likelihood", [n for n in LIKELIHOODS if len(DECLARED[n].outputs) > 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", range(7))
def test_parameters_in_half_precision_that_broadcast(backend, likelihood, dtype, form):
    """Gradients of broadcast half-precision parameters are sums that are rounded once."""
    case = cases.case(likelihood, 3, 4, 37, cases.forms(likelihood, 3, 4, (37,))[form])
    case["parameters"] = [p.to(dtype) for p in case["parameters"]]
    _check(case)


@each
def test_parameters_of_one_sample_need_no_sample_axis(backend, likelihood):
    x, given = cases.data(likelihood, 4, 7), cases.parameters(likelihood, 3, 4, 7)
    every = _op(likelihood)(x, *given)
    for k in range(3):
        assert torch.equal(_op(likelihood)(x, *(p[k] for p in given)), every[k])


@each
def test_one_wide_tensor_widens_the_result(backend, likelihood):
    """Any single wide tensor widens the result; eager, compiled and every backend agree on the dtype."""
    narrow = [cases.data(likelihood, 3, 5), *cases.parameters(likelihood, 2, 3, 5)]
    exact = _op(likelihood)(*(t.double() for t in narrow))
    for i in range(len(narrow)):
        given = [t.double() if j == i else t for j, t in enumerate(narrow)]
        for t in given[1:]:
            t.requires_grad_()
        out = _op(likelihood)(*given)
        torch.testing.assert_close(out, exact, rtol=1e-12, atol=1e-12)
        grads = torch.autograd.grad(out.sum(), given[1:])
        assert [g.dtype for g in grads] == [t.dtype for t in given[1:]]


@pytest.mark.parametrize("likelihood", INTEGER)
@pytest.mark.parametrize("dtype", INTEGERS, ids=str)
@pytest.mark.parametrize("k, b, size", [(3, 4, 7), (2, 3, 300)])
def test_integers_equal_floats(backend, likelihood, dtype, k, b, size):
    x = cases.data(likelihood, b, size, dtype=dtype)
    given = [p.requires_grad_() for p in cases.parameters(likelihood, k, b, size)]
    found, expected = _op(likelihood)(x, *given), _op(likelihood)(x.float(), *given)
    assert torch.equal(found, expected)
    for a, e in zip(
        torch.autograd.grad(found.sum(), given), torch.autograd.grad(expected.sum(), given), strict=True
    ):
        assert torch.equal(a, e)


class Decoder(torch.nn.Linear):
    """Linear decoder with the likelihood's outputs."""

    def __init__(self, likelihood: str, latent: int, size: int):
        self.number = cases.returned(likelihood)
        super().__init__(latent, self.number * size)

    def forward(self, z):
        outputs = super().forward(z).chunk(self.number, dim=-1)
        return outputs[0] if self.number == 1 else outputs


@pytest.mark.parametrize("likelihood", INTEGER)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_networks_get_floats_and_the_likelihood_integers(likelihood, dtype):
    """Networks get floats; the likelihood gets the integers, which the model's dtype may not represent."""
    torch.manual_seed(0)
    encoder, decoder = torch.nn.Linear(7, 2 * 3), Decoder(likelihood, 3, 7)
    torch.nn.init.normal_(encoder.weight, std=1e-3)
    for m in (encoder, decoder):
        m.to(device=DEVICE, dtype=dtype)
    x = cases.data(likelihood, 20, 7).round().clamp(max=257).to(torch.int16)
    x[0, 0] = 257  # a bfloat16 is 256 or 258
    vae = fastvae.VAE(encoder, decoder, likelihood=likelihood)
    torch.manual_seed(1)
    found = vae.iwae(x, k=3, reduction="none")
    torch.manual_seed(1)
    q = encoder(x.to(dtype))
    expected = fastvae.iwae(x.double(), q, decoder, k=3, likelihood=likelihood, reduction="none")
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-5)
    seed = lambda: torch.Generator(DEVICE).manual_seed(3)  # noqa: E731
    result = vae.evaluate(x, k=20, batch_size=6, progress=False, generator=seed())
    if dtype == torch.float32:
        floats = vae.evaluate(x.float(), k=20, progress=False, generator=seed())
        torch.testing.assert_close(result.log_px, floats.log_px, rtol=1e-6, atol=1e-5)
    assert bool(result.log_px.isfinite().all())


@pytest.mark.parametrize("likelihood", BOUNDED)
@pytest.mark.parametrize("columns", [6, 500])
@pytest.mark.parametrize("with_nan", [False, True])
def test_data_outside_of_the_support(backend, monkeypatch, likelihood, columns, with_nan):
    monkeypatch.setenv("FASTVAE_CHECK", "1")  # on a GPU the check is optional
    declared = DECLARED[likelihood]
    for wrong in (declared.low - 0.5, declared.high + 0.5):
        if math.isinf(wrong):
            continue
        x = cases.data(likelihood, 4, columns)
        x[3, -1] = wrong
        if with_nan:  # does not hide the wrong value
            x[1, 0] = math.nan
        given = cases.parameters(likelihood, 2, 4, columns)[: cases.returned(likelihood)]
        flat = [p.flatten(0, 1) for p in given]
        message = rf"x holds values in .*{wrong:g}.*must lie .*{declared.hint.split()[0]}"
        with pytest.raises(ValueError, match=message):
            _op(likelihood)(x, *cases.parameters(likelihood, 2, 4, columns))
        decoder = lambda z, f=flat: f[0] if len(f) == 1 else tuple(f)  # noqa: E731
        with pytest.raises(ValueError, match=message):
            fastvae.iwae(x, torch.zeros(4, 2 * 5, device=DEVICE), decoder, k=2, likelihood=likelihood)


@pytest.mark.parametrize("likelihood", [n for n in LIKELIHOODS if not DECLARED[n].differentiable])
def test_data_that_require_a_gradient_are_refused(likelihood):
    x = cases.data(likelihood, 4, 3).requires_grad_()
    with pytest.raises(ValueError, match=r"x requires a gradient.*x.detach\(\)"):
        _op(likelihood)(x, *cases.parameters(likelihood, 2, 4, 3))
    pair = torch.zeros(4, 2, device=DEVICE), torch.zeros(4, 2, device=DEVICE)
    outputs = [p[0] for p in cases.parameters(likelihood, 1, 4, 3)][: cases.returned(likelihood)]
    decoder = lambda z: outputs[0] if len(outputs) == 1 else tuple(outputs)  # noqa: E731
    call = lambda x: fastvae.elbo(x, pair, decoder, likelihood=likelihood)  # noqa: E731
    # From the second call on, a likelihood's name takes the fast path.
    assert call(x.detach()).isfinite()
    with pytest.raises(ValueError, match=r"x requires a gradient.*x.detach\(\)"):
        call(x)


@each
def test_named_arguments(likelihood):
    declared = DECLARED[likelihood]
    x, given = cases.data(likelihood, 3, 5), cases.parameters(likelihood, 2, 3, 5)
    named = dict(zip(declared.outputs, given, strict=True))
    assert torch.equal(_op(likelihood)(x=x, **named), _op(likelihood)(x, *given))
    with pytest.raises(TypeError, match=declared.outputs[-1]):
        _op(likelihood)(x, *given[:-1])
    assert declared.outputs[0] in _op(likelihood).__doc__


@each
@pytest.mark.parametrize("objective", ["elbo", "iwae", "log_marginal"])
def test_objectives(backend, likelihood, objective):
    """Objectives take a likelihood by name, and give the same numbers in chunks."""
    k, b, size, latent = 6, 3, 11, 4
    x = cases.data(likelihood, b, size)
    number = cases.returned(likelihood)
    torch.manual_seed(0)
    layer = torch.nn.Linear(latent, number * size).to(DEVICE)
    decoder = lambda z: layer(z) if number == 1 else layer(z).chunk(number, dim=1)  # noqa: E731
    q = torch.randn(b, 2 * latent, device=DEVICE)
    options = {"likelihood": likelihood}

    def value(**more):
        torch.manual_seed(1)
        if objective == "elbo":
            return fastvae.elbo(x, q, decoder, k=k, reduction="none", **options)
        if objective == "iwae":
            return fastvae.iwae(x, q, decoder, k=k, reduction="none", **options, **more)
        return fastvae.log_marginal(x, q, decoder, k=k, **options, **more).log_px

    whole = value()
    with fastvae.use_backend("reference"):
        torch.testing.assert_close(whole, value(), rtol=1e-4, atol=1e-4)
    if objective != "elbo":
        torch.testing.assert_close(value(k_chunk=4), whole, rtol=1e-5, atol=1e-4)
    assert whole.shape == (b,)


@each
def test_means(likelihood):
    """Reconstructions are the distribution's mean."""
    given = cases.parameters(likelihood, 3, 5)[: cases.returned(likelihood)]
    kind = DECLARED[likelihood]()
    outputs = given[0] if len(given) == 1 else tuple(given)
    torch.testing.assert_close(kind.mean(outputs), ORACLES[likelihood](*kind._complete(outputs)).mean)


@pytest.mark.parametrize("likelihood", INTEGER)
@pytest.mark.parametrize("dtype", [torch.int8, torch.int16, torch.int32, torch.int64], ids=str)
def test_negative_counts_are_refused(backend, monkeypatch, likelihood, dtype):
    monkeypatch.setenv("FASTVAE_CHECK", "1")
    x = cases.data(likelihood, 4, 6, dtype=dtype)
    x[2, 3] = -1
    with pytest.raises(ValueError, match="-1"):
        _op(likelihood)(x, *cases.parameters(likelihood, 2, 4, 6))


_AXES = {"categorical": [(3, 4, 5)], "discretized_logistic_mixture": [(3, 4, 5), (3, 4, 5), (3, 4, 5)]}


def _outputs_of(name, number, draw):
    """Return a decoder's outputs for this likelihood, each drawn by ``draw(shape)``."""
    return [draw(shape) for shape in _AXES.get(name, [(3, 5)] * number)]


@pytest.mark.parametrize("likelihood", sorted(NAMED))
def test_means_have_finite_gradients(likelihood):
    """Means have finite gradients at 300 random scales and at 0, wherever the mean does not overflow."""
    kind = NAMED[likelihood]()
    number = cases.returned(likelihood) if likelihood in DECLARED else 1
    generator = torch.Generator().manual_seed(0)
    for trial in range(301):
        scale = 10 ** (6 * torch.rand((), generator=generator) - 3) if trial else torch.zeros(())
        draw = lambda shape, s=scale: s * torch.randn(shape, generator=generator)  # noqa: E731
        outputs = [o.requires_grad_() for o in _outputs_of(likelihood, number, draw)]
        mean = kind.mean(outputs[0] if len(outputs) == 1 else tuple(outputs))
        assert not bool(mean.isnan().any())
        grads = torch.autograd.grad(mean.sum(), outputs, allow_unused=True)
        # Near float32's maximum the slope itself may overflow; every output then has the mean's shape.
        finite = mean.abs() < 1e20
        for g in grads:
            if g is not None:
                found = g.isfinite() if g.shape != finite.shape else g[finite].isfinite()
                assert bool(found.all()), (trial, scale)


def test_the_slope_of_a_continuous_bernoulli_mean_is_accurate():
    logits = torch.tensor([0.0, 1e-6, -1e-6, 0.999, 1.001, -30.0, 200.0], requires_grad=True)
    (found,) = torch.autograd.grad(ContinuousBernoulli().mean(logits).sum(), logits)
    assert float(found[0]) == pytest.approx(1 / 12, rel=1e-6)
    wide = logits.detach().double()
    # The derivative is the variance, 1 / l^2 - 1 / (4 sinh^2(l / 2)), by a series near 0.
    small = 1 / 12 - wide.square() / 240
    exact = torch.where(wide.abs() < 1e-2, small, wide**-2 - 0.25 / torch.sinh(wide / 2).square())
    torch.testing.assert_close(found.double(), exact, rtol=1e-4, atol=1e-7)
