"""Tables: columns of several kinds equal the sum of their likelihoods, in float64 and in the fused ops."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.likelihoods import (
    Bernoulli,
    Categorical,
    Columns,
    DiscretizedLogistic,
    Gaussian,
    Joint,
    Laplace,
    Multinomial,
    OptimalGaussian,
    StudentT,
)

from .conftest import DEVICE
from .models import generator, rand, randn

B, K, D = 5, 3, 2
MIXED = [
    ("age", "gaussian"),
    ("income", Gaussian(scale=0.1)),
    ("city", "categorical", 8),
    ("debt", Gaussian(scale=0.7)),
    ("owner", "bernoulli"),
    ("level", DiscretizedLogistic(levels=4)),
    ("job", "categorical", 20),
    ("visits", "poisson"),
    ("height", "gaussian"),
    ("error", Laplace(scale=0.3, learned=True)),
    ("rent", Laplace(scale=0.5, learned=True)),
    ("sex", Categorical(ignore_index=7), 2),
    ("kids", "categorical", 3),
]


def _data(seed=1):
    x = torch.stack([_column(i, c, seed) for i, c in enumerate(MIXED)], 1)
    return x.to(DEVICE)


def _column(i, column, seed):
    u = rand(B, seed=seed * 100 + i)
    kinds = {"bernoulli": lambda: u.round(), "poisson": lambda: (5 * u).floor()}
    if len(column) == 3:
        return (u * column[2]).floor()
    if isinstance(column[1], DiscretizedLogistic):
        return (u * 3).round() / 3
    return kinds.get(column[1], lambda: 4 * u - 2)()


def _by_hand(x, h, table):
    """Return log p of each column [N, n], in float64 by torch.distributions."""
    values, first = [], 0
    x, h = x.double(), h.double()
    for i, column in enumerate(MIXED):
        kind, data = column[1], x[:, i]
        if len(column) == 3:
            logits = h[:, first : first + column[2]]
            values.append(td.Categorical(logits=logits).log_prob(data.long()))
            first += column[2]
            continue
        width = 2 if kind == "gaussian" or isinstance(kind, DiscretizedLogistic) else 1
        out = h[:, first : first + width]
        first += width
        if kind == "gaussian":
            values.append(td.Normal(out[:, 0], (0.5 * out[:, 1]).exp()).log_prob(data))
        elif isinstance(kind, Gaussian):
            values.append(td.Normal(out[:, 0], kind.scale).log_prob(data))
        elif isinstance(kind, Laplace):
            values.append(td.Laplace(out[:, 0], kind.scale.double()).log_prob(data))
        elif kind == "bernoulli":
            values.append(td.Bernoulli(logits=out[:, 0]).log_prob(data))
        elif kind == "poisson":
            values.append(td.Poisson(out[:, 0].exp()).log_prob(data))
        else:
            values.append(kind.log_prob(data[:, None], (out[:, :1], out[:, 1:]))[:, 0])
    assert first == table.width
    return torch.stack(values, 1)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
def test_values_and_gradients(backend, masked, weighted):
    weights = {"city": 0.5, "age": 2.0, "kids": 0.5} if weighted else None
    table = Columns(MIXED, weights=weights).to(DEVICE)
    x, h = _data(), randn(K * B, table.width, seed=2).requires_grad_()
    mask = rand(B, len(MIXED), seed=3) > 0.4 if masked else None
    given = x if mask is None else x.masked_fill(~mask, math.nan)
    wide = h.detach().double().requires_grad_()
    expected = _by_hand(x.repeat(K, 1), wide, table).reshape(K, B, -1)
    if mask is not None:
        expected = torch.where(mask, expected, 0.0)
    factors = torch.tensor([(weights or {}).get(n, 1.0) for n in table.names], device=DEVICE)
    expected = (expected * factors).sum(2)
    conditioning = fastvae.core.nested.Conditioning.of(mask, None, None)
    got = table.log_likelihood(given, h, K, conditioning)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-4)
    upstream = randn(K, B, seed=4)
    (grad,) = torch.autograd.grad((got * upstream).sum(), h)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), wide)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"k": 5, "k_chunk": 2}], ids=str)
def test_objectives_equal_a_joint(backend, options):
    """A table's bound and gradients are those of a Joint of its columns."""
    table = Columns(MIXED).to(DEVICE)
    parts = {c[0]: p for c, p in zip(MIXED, table.parts, strict=True)}
    x, decoder = _data(), nn.Linear(D, table.width).to(DEVICE)
    q = randn(B, D, seed=5), randn(B, D, seed=6)

    def split(z):
        found = table.split(decoder(z))
        return {n: o if isinstance(parts[n], Categorical) else o for n, o in found.items()}

    data = {
        n: x[:, i] if isinstance(parts[n], Categorical) else x[:, i : i + 1]
        for i, n in enumerate(table.names)
    }
    call = fastvae.iwae if options else fastvae.elbo
    learned = [*decoder.parameters(), *table.parameters()]
    found = []
    for given, decode, likelihood in ((x, decoder, table), (data, split, Joint(parts))):
        value = call(given, q, decode, likelihood=likelihood, generator=generator(7), **options)
        found.append((value, *torch.autograd.grad(value, learned)))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-5)


def test_many_columns(backend):
    """Two hundred columns of different numbers of classes, among them one of many."""
    classes = [2 + i % 9 for i in range(199)] + [300]
    table = Columns([(f"c{i}", "categorical", c) for i, c in enumerate(classes)])
    rows = 3 if backend == "triton" else 70
    x = (rand(rows, 200, seed=1) * torch.tensor(classes, device=DEVICE)).floor()
    h = randn(rows, table.width, seed=2).requires_grad_()
    wide = h.detach().double().requires_grad_()
    parts = zip(wide.split(classes, 1), x.long().unbind(1), strict=True)
    expected = sum(-nn.functional.cross_entropy(o, t, reduction="none") for o, t in parts)
    got = table.log_prob(x, h)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-3)
    upstream = randn(rows, seed=3)
    (grad,) = torch.autograd.grad((got * upstream).sum(), h)
    (wanted,) = torch.autograd.grad((expected * upstream).sum(), wide)
    torch.testing.assert_close(grad.double(), wanted, rtol=1e-5, atol=1e-5)


def test_masked_classes_of_small_dtypes(backend):
    """A masked class counts nothing, in a dtype that does not represent ignore_index, too."""
    table = Columns([("item", "categorical", 200), ("shop", "categorical", 180)])
    x = torch.randint(150, (4, 2), device=DEVICE, generator=generator(1))
    mask = torch.tensor([[True, False]], device=DEVICE).expand(4, 2)
    output, q = randn(4, 380, seed=2), randn(4, 6, seed=3)

    def run(x):
        bound = fastvae.elbo(x, q, lambda z: output, likelihood=table, mask=mask, generator=generator(4))
        return float(bound)

    assert run(x.to(torch.uint8)) == run(x)


def test_means_and_draws():
    table = Columns(MIXED)
    h = randn(4, table.width, seed=1)
    mean = table.mean(h)
    assert mean.shape == (4, len(MIXED))
    outputs = table.split(h)
    torch.testing.assert_close(mean[:, 0], outputs["age"][0][:, 0])
    assert torch.equal(mean[:, 2].long(), outputs["city"].argmax(1))
    torch.testing.assert_close(mean[:, 4], outputs["owner"][:, 0].sigmoid())
    drawn = table.sample(h, generator=generator(2)).detach()
    table.check(drawn)
    assert bool(table.log_prob(drawn, h).isfinite().all())
    assert torch.equal(drawn, table.sample(h, generator=generator(2)))


def test_it_trains_and_is_saved():
    """Learned scales of columns are the likelihood's parameters, and survive a state dict."""
    table = Columns(
        [("a", StudentT(scale=0.3, df=4.0, learned=True)), ("b", Gaussian(scale=1.0, learned=True))]
    )
    assert len(list(table.parameters())) == 2
    other = Columns(
        [("a", StudentT(scale=0.9, df=4.0, learned=True)), ("b", Gaussian(scale=2.0, learned=True))]
    )
    other.load_state_dict(table.state_dict())
    x, h = randn(4, 2, seed=1), randn(4, table.width, seed=2)
    torch.testing.assert_close(other.log_prob(x, h), table.log_prob(x, h))
    assert "width=" in repr(table)


def test_scales_may_change():
    """A fixed scale that is set anew is used from then on."""
    table = Columns([("a", Gaussian(scale=0.3)), ("b", Gaussian(scale=1.0))])
    x, h = randn(4, 2, seed=1), randn(4, table.width, seed=2)
    before = table.log_prob(x, h)
    table.parts[0].fixed_scale = 0.9
    expected = Columns([("a", Gaussian(scale=0.9)), ("b", Gaussian(scale=1.0))]).log_prob(x, h)
    torch.testing.assert_close(table.log_prob(x, h), expected)
    assert not torch.allclose(before, expected)


def test_settings_separate_columns():
    """Columns of one kind with different options are not evaluated as one."""
    table = Columns([("a", Bernoulli()), ("b", Bernoulli(probs=True)), ("c", "bernoulli")])
    x, h = rand(4, 3, seed=1).round(), rand(4, 3, seed=2)
    expected = td.Bernoulli(logits=h[:, [0, 2]]).log_prob(x[:, [0, 2]]).sum(1)
    expected = expected + td.Bernoulli(probs=h[:, 1]).log_prob(x[:, 1])
    torch.testing.assert_close(table.log_prob(x, h), expected)


def _elbo(columns, x=None, width=None, **options):
    table = Columns(columns, **options)
    x = torch.zeros(B, len(table.names), device=DEVICE) if x is None else x
    size = table.width if width is None else width
    return fastvae.elbo(
        x, torch.zeros(B, 2 * D, device=DEVICE), lambda z: z.new_zeros(len(z), size), likelihood=table
    )


WRONG = {
    "no columns": (lambda: Columns([]), ["columns must be a list", '("age", "gaussian")']),
    "one name": (lambda: Columns(["age"]), ["(name, likelihood)", "'age'"]),
    "two of a name": (lambda: Columns([("a", "gaussian"), ("a", "laplace")]), ["two of the name 'a'"]),
    "no classes": (lambda: Columns([("a", "categorical")]), ["'a'", "needs their number"]),
    "classes of a number": (lambda: Columns([("a", "gaussian", 3)]), ["'a'", "no classes"]),
    "a measured variance": (lambda: Columns([("a", OptimalGaussian())]), ["'a'", "OptimalGaussian"]),
    "multinomial": (lambda: Columns([("a", Multinomial())]), ["'a'", "Multinomial", "Use Joint"]),
    "weights of others": (lambda: Columns([("a", "gaussian")], weights={"b": 1.0}), ["'b'", "'a'"]),
    "a weight of text": (lambda: Columns([("a", "gaussian")], weights={"a": "x"}), ["weights['a']", "'x'"]),
    "another x": (lambda: _elbo([("a", "gaussian")], torch.zeros(B, 2, device=DEVICE)), ["[5, 2]", "[B, 1]"]),
    "another output": (lambda: _elbo([("a", "gaussian")], width=3), ["[5, 3]", "2 numbers"]),
    "a class beyond": (
        lambda: _elbo([("a", "gaussian"), ("b", "categorical", 3)], torch.full((B, 2), 3.0, device=DEVICE)),
        ["columns 'b'", "holds 3", "0 to 2"],
    ),
    "a number beyond": (
        lambda: _elbo([("a", "gaussian"), ("b", "bernoulli")], torch.full((B, 2), 3.0, device=DEVICE)),
        ["columns 'b'", "[0, 1]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_mistakes(case, backend, monkeypatch):
    monkeypatch.setenv("FASTVAE_CHECK", "1")  # on a GPU data are checked on request only
    call, words = WRONG[case]
    with pytest.raises((TypeError, ValueError)) as raised:
        call()
    for word in words:
        assert word in str(raised.value), str(raised.value)


def test_weights_of_a_joint(backend):
    x = {"a": rand(B, 4, seed=1).round(), "b": randn(B, 3, seed=2)}
    outputs = {"a": randn(B, 4, seed=3), "b": randn(B, 3, seed=4)}
    parts = {"a": "bernoulli", "b": Gaussian(scale=1.0)}
    weighted = Joint(parts, weights={"b": 0.25})
    alone = [Joint({n: p}).log_prob({n: x[n]}, {n: outputs[n]}) for n, p in parts.items()]
    torch.testing.assert_close(weighted.log_prob(x, outputs), alone[0] + 0.25 * alone[1])
    with pytest.raises(ValueError, match="'c'"):
        Joint(parts, weights={"c": 1.0})
