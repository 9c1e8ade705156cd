"""Sparse counts give the numbers of the dense counts, in every entry point that takes x or data."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fastvae
from fastvae import diagnostics
from fastvae.core.digest import digest
from fastvae.core.sparse import at_rows, joined
from fastvae.likelihoods import Joint, Multinomial

from .conftest import DEVICE
from .models import generator, rand, randn

N, X, D = 13, 9, 2


def coo(x):
    return x.to_sparse()


def uncoalesced(x):
    """Return a COO matrix whose entries stand twice, with parts of the counts, in another order."""
    entries = x.to_sparse()
    parts = (entries.values() * torch.arange(len(entries.values()), device=x.device).fmod(2)).to(x.dtype)
    indices = torch.cat([entries.indices().flip(1), entries.indices()], 1)
    found = torch.sparse_coo_tensor(indices, torch.cat([(entries.values() - parts).flip(0), parts]), x.shape)
    assert not (len(x) and found.is_coalesced())
    return found


def csr(x):
    return x.to_sparse_csr()


def narrow_csr(x):
    """Return a CSR matrix with indices in int32, as scipy's are."""
    wide = x.to_sparse_csr()
    crow, column = wide.crow_indices().int(), wide.col_indices().int()
    return torch.sparse_csr_tensor(crow, column, wide.values(), x.shape)


def integers(x):
    return x.long().to_sparse_csr()


LAYOUTS = [coo, uncoalesced, csr, narrow_csr, integers]


@pytest.fixture
def clicks():
    """Return counts [N, X]; two examples have none."""
    x = (3 * rand(N, X, seed=1)).floor()
    x[[4, N - 1]] = 0
    return x


def model(likelihood="multinomial"):
    torch.manual_seed(0)
    return fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), likelihood=likelihood).to(DEVICE)


def near(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=2e-5, equal_nan=True)


def of_batch(name, **options):
    """Return a function of x that calls an estimate of the batch."""

    def call(x):
        q = randn(len(x), D, seed=3), randn(len(x), D, seed=4)
        decoder, given = model().decoder, {"likelihood": "multinomial", "generator": generator(5), **options}
        found = name(x, q, decoder, **given)
        fields = [found] if isinstance(found, torch.Tensor) else [v for v in vars(found).values()]
        return [v for v in fields if isinstance(v, torch.Tensor)]

    return call


MASK = (torch.arange(N * X).reshape(N, X) % 3 > 0).to(DEVICE)
ESTIMATES = {
    "log_marginal": of_batch(fastvae.log_marginal, k=64),
    "log_marginal, k_chunk": of_batch(fastvae.log_marginal, k=20, k_chunk=7),
    "log_marginal, qmc": of_batch(fastvae.log_marginal, k=64, noise="qmc"),
    "log_marginal, masked": of_batch(fastvae.log_marginal, k=20, mask=MASK),
    "adapted": of_batch(fastvae.log_marginal, k=200, proposal="adapted"),
    "defensive": of_batch(fastvae.log_marginal, k=40, proposal="defensive"),
    "reconstruction": of_batch(fastvae.reconstruction_log_prob, k=20),
    "log_weights": lambda x: [getattr(of_weights(x), n) for n in ("log_likelihood", "log_ratio")],
    "iwae, k_chunk": of_batch(fastvae.iwae, k=5, k_chunk=2, reduction="none"),
    "bound": of_batch(fastvae.bound, objective=fastvae.bounds.IWAE(2), k=4, reduction="none"),
    "beta_tc": of_batch(fastvae.beta_tc, dataset_size=100, reduction="none"),
    "ais": of_batch(fastvae.audit.ais, k=2, steps=4),
    "lattice": lambda x: [
        fastvae.audit.lattice(x, model().decoder, latent_dim=D, points=9, likelihood="multinomial").log_px
    ],
    "all pairs": lambda x: [
        fastvae.ops.all_pairs_log_prob(x, randn(5, X, seed=6), likelihood=Multinomial())
    ],
    "VAE.log_marginal": lambda x: [model().log_marginal(x, k=20, generator=generator(5)).log_px],
    "VAE.iwae": lambda x: [model().iwae(x, k=5, generator=generator(5))],
}  # fmt: skip


def of_weights(x):
    q = randn(len(x), D, seed=3), randn(len(x), D, seed=4)
    return fastvae.log_weights(x, q, model().decoder, k=5, likelihood="multinomial", generator=generator(5))


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", ESTIMATES)
def test_estimates_of_a_batch(name, layout, clicks):
    call = ESTIMATES[name]
    for found, wanted in zip(call(layout(clicks)), call(clicks), strict=True):
        near(found, wanted)


@pytest.mark.parametrize("layout", [uncoalesced, csr])
def test_every_backend(backend, layout, clicks):
    call = of_batch(fastvae.log_marginal, k=6, k_chunk=4)
    for found, wanted in zip(call(layout(clicks)), call(clicks), strict=True):
        near(found, wanted)


def batches(x, layout):
    """Return batches of a data set, one of them empty."""
    return [layout(x[:5]), layout(x[5:5]), layout(x[5:])]


DATA = {
    "whole": lambda x, layout: layout(x),
    "batches": batches,
    "a generator": lambda x, layout: (batch for batch in batches(x, layout)),
    "tuples": lambda x, layout: [(batch, None) for batch in batches(x, layout)],
    "a data set": lambda x, layout: TensorDataset(layout(x), torch.zeros(len(x))),
    "a data set of dicts": lambda x, layout: Rows(layout(x)),
    "a loader": lambda x, layout: DataLoader(range(len(x)), 5, collate_fn=lambda rows: layout(x[rows])),
}


class Rows(torch.utils.data.Dataset):
    """Data set of examples that are dicts, which ``prepare_batch`` reads."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, row):
        return {"x": self.x[row]}


def evaluated(vae, data, **options):
    given = {"k": 20, "batch_size": 5, "progress": False, "generator": generator(7), **options}
    return fastvae.evaluate(vae, data, **given)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("kind", DATA)
def test_data_sets(kind, layout, clicks):
    vae, read = model(), None
    if kind == "a data set of dicts":
        read = lambda batch: batch  # noqa: E731
    found = evaluated(vae, DATA[kind](clicks, layout), prepare_batch=read)
    wanted = evaluated(vae, clicks)
    near(found.log_px, wanted.log_px)
    near(found.kl_per_dim, wanted.kl_per_dim)
    assert found.dims == wanted.dims == X
    near(vae.evaluate(layout(clicks), k=20, progress=False, generator=generator(7)).log_px, wanted.log_px)


OPTIONS = {
    "tol": {"tol": 0.2, "k": 400},
    "adapted": {"proposal": "adapted", "k": 200},
    "defensive": {"proposal": "defensive", "k": 40},
    "k_chunk": {"k_chunk": 3},
    "qmc": {"noise": "qmc", "k": 64},
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("name", OPTIONS)
def test_evaluations(name, layout, clicks):
    vae = model()
    found, wanted = (evaluated(vae, data, **OPTIONS[name]) for data in (layout(clicks), clicks))
    near(found.log_px, wanted.log_px)
    assert torch.equal(found.k, wanted.k)


@pytest.mark.parametrize("layout", [uncoalesced, csr])
def test_audits(layout, clicks):
    """The audit stores rows of the batches, sparse like them."""
    vae = model()
    found, wanted = (evaluated(vae, data, audit=4).audit for data in (layout(clicks), clicks))
    assert torch.equal(found.examples, wanted.examples)
    near(found.log_px, wanted.log_px)
    near(found.lower, wanted.lower)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_checkpoints(layout, clicks, tmp_path):
    vae, file = model(), tmp_path / "run.npz"
    first = evaluated(vae, layout(clicks), checkpoint=file)
    assert torch.equal(evaluated(vae, layout(clicks), checkpoint=file, generator=None).log_px, first.log_px)
    near(first.log_px, evaluated(vae, clicks).log_px)
    changed = clicks.clone()
    changed[0, 0] += 1
    with pytest.raises(ValueError, match="batch 0 differs"):
        evaluated(vae, layout(changed), checkpoint=file, generator=None)


def test_digests_tell_matrices_apart(clicks):
    one = digest([csr(clicks)])
    assert (digest([coo(clicks)]) == one).all() and (digest([uncoalesced(clicks)]) == one).all()
    wider = torch.nn.functional.pad(clicks, (0, 1))
    assert (digest([csr(wider)]) != one).any() and (digest([csr(clicks + (clicks == 2))]) != one).any()


@pytest.mark.parametrize("layout", [uncoalesced, csr])
@pytest.mark.parametrize("tol", [None, 0.2])
def test_parts_of_a_joint(layout, tol, clicks):
    """A dict of data may have sparse and dense parts."""
    decoder = nn.Linear(D, X).to(DEVICE)
    encoder = nn.Linear(1, 2 * D).to(DEVICE)
    vae = fastvae.VAE(
        lambda x: encoder(x["age"]), lambda z: {"clicks": decoder(z), "age": z[:, :1]},
        likelihood=Joint(clicks="multinomial", age="poisson"), modules=[encoder, decoder], latent_dim=D,
    )  # fmt: skip
    age = clicks[:, :1]
    options = {"k": 200, "tol": tol} if tol else {}
    found, wanted = (evaluated(vae, {"clicks": x, "age": age}, **options) for x in (layout(clicks), clicks))
    near(found.log_px, wanted.log_px)


@pytest.mark.parametrize("layout", [uncoalesced, csr])
def test_latents(layout, clicks):
    vae = model()
    found, wanted = (diagnostics.latents(vae, x, generator=generator(1)) for x in (layout(clicks), clicks))
    near(found.kl, wanted.kl)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_empty_batches(layout, clicks):
    q = torch.zeros(0, 2 * D, device=DEVICE)
    decoder = model().decoder
    found = fastvae.log_marginal(layout(clicks[:0]), q, decoder, k=5, likelihood="multinomial")
    assert found.log_px.shape == (0,)
    value = fastvae.iwae(
        layout(clicks[:0]), q, decoder, k=5, k_chunk=2, likelihood="multinomial", reduction="sum"
    )
    assert float(value.detach()) == 0


@pytest.mark.parametrize("layout", [coo, csr, narrow_csr, integers])
def test_rows(layout, clicks):
    given, rows = layout(clicks), torch.tensor([7, 4, 4, 0, N - 1], device=DEVICE)
    found = at_rows(given, rows)
    assert found.layout == given.layout and found.dtype == given.dtype
    assert torch.equal(found.to_dense(), given.to_dense()[rows])
    none = at_rows(given, rows[:0])
    assert none.layout == given.layout and none.shape == (0, X)
    both = joined([found, none, given])
    assert both.layout == given.layout
    assert torch.equal(both.to_dense(), torch.cat([given.to_dense()[rows], given.to_dense()]))


def test_a_nan_stays_in_its_example(clicks):
    clicks[2, 3] = math.nan
    vae = model()
    with pytest.warns(RuntimeWarning, match="NaN for 1 of 13 examples"):
        found = evaluated(vae, csr(clicks), tol=0.5, k=200)
    assert found.log_px.isnan().nonzero().flatten().tolist() == [2]


def test_sparse_counts_that_are_not_whole_warn(clicks):
    with pytest.warns(UserWarning, match=r"x holds 0\.5, which is not a whole number"):
        of_batch(fastvae.log_marginal, k=3)(uncoalesced(clicks / 2))


class Scaled(Multinomial):
    """User's likelihood, whose own log_prob gets rows that are repeated for each sample."""

    def log_prob(self, x, parameters):
        return 2 * (x * parameters.log_softmax(1)).sum(1)


def test_refused(clicks):
    vae, q = model(), torch.zeros(N, 2 * D, device=DEVICE)
    with pytest.raises(TypeError, match=r"data is a DataLoader of sparse examples.*loader\.dataset"):
        evaluated(vae, DataLoader(TensorDataset(csr(clicks)), 5))
    with pytest.raises(TypeError, match=r"data has layout torch\.sparse_csc.*COO or CSR.*data\.to_sparse"):
        evaluated(vae, clicks.to_sparse_csc())
    with pytest.raises(TypeError, match=r"x has layout torch\.sparse_csc.*x\.to_sparse\(\)"):
        fastvae.log_marginal(clicks.to_sparse_csc(), q, vae.decoder, k=3, likelihood="multinomial")
    with pytest.raises(ValueError, match=r"data is sparse with shape \[13, 3, 3\]; expected a matrix"):
        evaluated(vae, clicks.unflatten(1, (3, 3)).to_sparse())
    with pytest.raises(TypeError, match=r"data has layout torch\.sparse_csr; expected a dense tensor"):
        evaluated(model("poisson"), csr(clicks))
    with pytest.raises(TypeError, match=r"x has layout torch\.sparse_csr; expected a dense.*x\.to_dense\(\)"):
        fastvae.elbo(csr(clicks), q, vae.decoder, likelihood=Scaled())

    class Foreign:
        def tocsr(self):
            return self

    with pytest.raises(TypeError, match=r"data is a Foreign.*torch\.sparse_csr_tensor\(m\.indptr"):
        evaluated(vae, Foreign())


@pytest.mark.parametrize("layout", [coo, csr])
def test_compiled(layout, clicks):
    """Values and gradients of a compiled objective are those of the dense counts."""
    decoder = nn.Linear(D, X, device=DEVICE)
    q = randn(N, 2 * D, seed=1).requires_grad_()

    def bound(x):
        return fastvae.elbo(x, q, decoder, likelihood="multinomial", generator=generator(2))

    found, expected = torch.compile(bound, backend="aot_eager")(layout(clicks)), bound(clicks)
    torch.testing.assert_close(found, expected)
    learned = [q, *decoder.parameters()]
    pairs = zip(torch.autograd.grad(found, learned), torch.autograd.grad(expected, learned), strict=True)
    for actual, wanted in pairs:
        torch.testing.assert_close(actual, wanted)


@pytest.mark.parametrize("layout", [coo, csr])
def test_marginalised(layout, clicks):
    """Rows are repeated for each class."""
    q, decoder = randn(N, 2 * D, seed=1), nn.Linear(D + 3, X, device=DEVICE)

    def bound(x, y):
        z = q.repeat_interleave(3, 0)
        return fastvae.elbo(
            x, z, lambda z, y: decoder(torch.cat([z, y], 1)), context=y, likelihood="multinomial",
            reduction="none", generator=generator(3),
        )  # fmt: skip

    found, expected = (fastvae.marginalize(x, bound, classes=3) for x in (layout(clicks), clicks))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("layout", [coo, csr])
def test_what_imputation_says(layout, clicks):
    vae = fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), likelihood="multinomial").to(DEVICE)
    with pytest.raises(TypeError, match="the likelihood is a Multinomial"):
        vae.impute(layout(clicks), torch.ones(N, X, dtype=torch.bool, device=DEVICE), k=3)
