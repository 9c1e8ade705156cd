"""Integer data: every dtype gives int64's results, for every likelihood that takes integers."""

from __future__ import annotations

import pytest
import torch
from torch import distributions as td

import fastvae
from fastvae.core.checks import INTEGERS
from fastvae.likelihoods import Joint, Likelihood
from fastvae.likelihoods.base import NAMED
from fastvae.likelihoods.declared import DECLARED

from . import cases
from .conftest import DEVICE

B, K, D, EVENT, CLASSES = 3, 4, 2, 9, 2
DTYPES = [d for d in INTEGERS if d != torch.int64]


class Counts(Likelihood):
    """User's likelihood, undefined at x = 0."""

    takes_integers = True
    inside = 1.0

    def log_prob(self, x, log_rate):
        return x * log_rate - log_rate.exp() - (x * 1.0).log()


def _binomial():
    return fastvae.likelihoods.from_distribution(
        lambda logits: td.Binomial(300, logits=logits, validate_args=False)
    )


LIKELIHOODS = {name: lambda kind=kind: kind() for name, kind in NAMED.items() if kind.takes_integers}
LIKELIHOODS |= {
    "categorical of two": fastvae.likelihoods.Categorical,
    "categorical of 256": fastvae.likelihoods.Categorical,
    "categorical of few positions": fastvae.likelihoods.Categorical,
    "categorical that ignores": lambda: fastvae.likelihoods.Categorical(ignore_index=1),
    "from_distribution": _binomial,
    "own": Counts,
    "joint": lambda: Joint(part=fastvae.likelihoods.Poisson()),
}
LIKELIHOODS.pop("categorical")


def _problem(name, likelihood, masked):
    """Return x in int64, an encoder, a decoder and a mask."""
    torch.manual_seed(0)
    event = 5 if name == "categorical of few positions" else EVENT
    x = torch.randint(2, (B, event))
    x[0, 0], x[0, 1] = 0, 1
    if name == "own":
        x = torch.ones_like(x)
    shape = (event,)
    if name.startswith("categorical"):
        shape = (256 if name == "categorical of 256" else CLASSES, event)
    outputs = 1
    if name == "discretized_logistic_mixture":
        outputs, shape = 3, (2, event)
    elif name in DECLARED:
        outputs = cases.returned(name)
    layer = torch.nn.Linear(D, outputs * torch.Size(shape).numel())

    def decoder(z):
        parts = tuple(p.unflatten(1, shape) for p in layer(z).chunk(outputs, 1))
        parts = parts[0] if outputs == 1 else parts
        return {"part": parts} if name == "joint" else parts

    mask = torch.rand(B, event) < 0.6 if masked else None
    encoder = torch.nn.Linear(event, 2 * D)
    for module in (layer, encoder):
        module.to(DEVICE)
    x = x.to(DEVICE)
    mask = None if mask is None else mask.to(DEVICE)
    part = (lambda t: {"part": t}) if name == "joint" else (lambda t: t)
    return part, x, encoder, decoder, layer, None if mask is None else part(mask)


def _gave(q, x, decoder, layer, likelihood, mask, objective):
    torch.manual_seed(1)
    if objective == "iwae":
        value = fastvae.iwae(x, q, decoder, k=K, likelihood=likelihood, mask=mask, reduction="none")
        return [value, *torch.autograd.grad(value.sum(), tuple(layer.parameters()))]
    return [fastvae.log_marginal(x, q, decoder, k=K, likelihood=likelihood, mask=mask).log_px]


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_every_dtype_equals_int64(backend, name, masked):
    likelihood = LIKELIHOODS[name]()
    part, x, encoder, decoder, layer, mask = _problem(name, likelihood, masked)
    q = encoder(x.float())
    some = DTYPES if backend == "native" else (torch.uint8,)
    for objective in ("iwae", "log_marginal") if backend == "native" else ("iwae",):
        expected = _gave(q, part(x), decoder, layer, likelihood, mask, objective)
        assert all(bool(t.isfinite().all()) for t in expected)
        for dtype in some:
            found = _gave(q, part(x.to(dtype)), decoder, layer, likelihood, mask, objective)
            for f, e in zip(found, expected, strict=True):
                torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-6, msg=lambda m, d=dtype: f"{d}: {m}")


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("masked", [False, True], ids=["all", "masked"])
def test_the_largest_values_of_a_dtype(backend, name, masked):
    """A dtype's largest values work: uint8 classes to 255, where 256 and -100 would wrap; maximal counts."""
    if name in ("own", "joint", "from_distribution") or (
        name.startswith("categorical") and name != "categorical of 256"
    ):
        return
    likelihood = LIKELIHOODS[name]()
    part, x, encoder, decoder, layer, mask = _problem(name, likelihood, masked)
    q = encoder(x.float())
    x[1, 2], x[2, 3], x[2, 4] = 255, 156, 127
    expected = _gave(q, x, decoder, layer, likelihood, mask, "iwae")
    every = torch.uint8, torch.int16, torch.uint16, torch.int32, torch.uint32, torch.uint64
    for dtype in every if backend == "native" else every[:1]:
        found = _gave(q, x.to(dtype), decoder, layer, likelihood, mask, "iwae")
        for f, e in zip(found, expected, strict=True):
            torch.testing.assert_close(f, e, rtol=1e-6, atol=1e-6, msg=lambda m, d=dtype: f"{d}: {m}")


@pytest.mark.parametrize("name", LIKELIHOODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_networks_get_their_own_dtype(name, dtype):
    likelihood = LIKELIHOODS[name]()
    part, x, encoder, decoder, layer, mask = _problem(name, likelihood, masked=False)
    seen = []

    class Encoder(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = encoder.to(dtype)

        def forward(self, x):
            x = x["part"] if isinstance(x, dict) else x
            seen.append(x.dtype)
            return self.layer(x)

    vae = fastvae.VAE(Encoder(), Decoder(decoder, layer.to(dtype)), likelihood=likelihood)
    values = []
    for kind in (torch.int64, *DTYPES):
        torch.manual_seed(2)
        values.append(vae.elbo(part(x.to(kind))).item())
    assert values == pytest.approx([values[0]] * len(values), rel=1e-6)
    assert set(seen) == {dtype}
    if not isinstance(part(x), dict):
        generator = torch.Generator(DEVICE).manual_seed(3)
        found = vae.evaluate(x.to(torch.uint16), k=5, progress=False, generator=generator).nll
        expected = vae.evaluate(x, k=5, progress=False, generator=generator.manual_seed(3)).nll
        assert found == pytest.approx(expected)


class Decoder(torch.nn.Module):
    def __init__(self, function, layer):
        super().__init__()
        self.function, self.layer = function, layer

    def forward(self, z):
        return self.function(z)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_log_prob_of_classes_in_any_dtype(dtype):
    likelihood, x = fastvae.likelihoods.Categorical(), torch.tensor([[0, 1, 1]], device=DEVICE)
    logits = torch.randn(1, 256, 3, device=DEVICE)
    assert torch.equal(likelihood.log_prob(x.to(dtype), logits), likelihood.log_prob(x, logits))
    if dtype in (torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.int16, torch.int32):
        x = torch.tensor([[255, 156, 200]], device=DEVICE)
        assert torch.equal(likelihood.log_prob(x.to(dtype), logits), likelihood.log_prob(x, logits))


def test_integers_are_widened_to_represent_the_value_of_masked_elements():
    class Half(Likelihood):
        takes_integers = True

        def __init__(self, inside):
            super().__init__()
            self.inside = inside

        def log_prob(self, x, mean):
            assert bool(((x == self.inside) | (x == 3)).all())
            return -((x - mean) ** 2)

    mask = torch.tensor([[True, False], [False, True], [True, True]], device=DEVICE)
    for inside in (0.5, -1.0, 300.0):
        x = torch.full((3, 2), 3, dtype=torch.uint8, device=DEVICE)
        q = torch.zeros(3, 2 * D, device=DEVICE)
        fastvae.elbo(
            x, q, lambda z: torch.zeros(len(z), 2, device=DEVICE), likelihood=Half(inside), mask=mask
        )
