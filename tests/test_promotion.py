"""A pair (mu, logvar) of two dtypes gives the result of torch's promotion, and gradients in each dtype."""

from __future__ import annotations

import itertools

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal, Laplace, StudentT

from .conftest import DEVICE
from .models import rand, randn

B, D, X, K = 5, 3, 7, 4
FLOATING = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
PAIRS = [pair for pair in itertools.product(FLOATING, repeat=2) if pair[0] != pair[1]]


def _named(dtypes):
    return "-".join(str(d).removeprefix("torch.") for d in dtypes)


pairs = pytest.mark.parametrize("dtypes", PAIRS, ids=_named)
some_pairs = pytest.mark.parametrize("dtypes", [PAIRS[1], PAIRS[3], PAIRS[8]], ids=_named)
FORMS = {
    "pair": lambda mu, logvar: (mu, logvar),
    "list": lambda mu, logvar: [mu, logvar],
    "DiagonalNormal": DiagonalNormal,
    "log_scale": lambda mu, logvar: DiagonalNormal(mu, logvar, scale_form="log_scale"),
    "softplus": lambda mu, logvar: DiagonalNormal(mu, logvar, scale_form="softplus", floor=1e-3),
    "clamped": lambda mu, logvar: DiagonalNormal(mu, logvar, logvar_range=(-1.0, 1.0)),
    "Laplace": Laplace,
    "StudentT": lambda loc, log_scale: StudentT(loc, log_scale, 5.0),
    "spatial": lambda mu, logvar: (mu[:, :, None, None], logvar[:, :, None, None]),
}
PRIORS = {
    "N(0, I)": lambda mu, logvar: None,
    "row": lambda mu, logvar: DiagonalNormal(mu[0].detach(), logvar[0].detach()),
    "each": lambda mu, logvar: DiagonalNormal(logvar.detach(), mu.detach()),
}
ENTRIES = {
    "elbo": fastvae.elbo,
    "elbo of K": lambda *args, **kw: fastvae.elbo(*args, k=K, **kw),
    "monte carlo": lambda *args, **kw: fastvae.elbo(*args, k=K, kl="mc", **kw),
    "free bits": lambda *args, **kw: fastvae.elbo(*args, free_bits=0.1, **kw),
    "iwae": lambda *args, **kw: fastvae.iwae(*args, k=K, **kw),
    "dreg": lambda *args, **kw: fastvae.iwae(*args, k=K, estimator="dreg", **kw),
    "stl": lambda *args, **kw: fastvae.iwae(*args, k=K, estimator="stl", **kw),
    "chunks": lambda *args, **kw: fastvae.iwae(*args, k=K, k_chunk=2, **kw),
    "bound": lambda *args, **kw: fastvae.bound(*args, fastvae.bounds.IWAE(alpha=0.5), k=K, **kw),
    "log_marginal": lambda *args, **kw: fastvae.log_marginal(*args, k=K, **kw).log_px.mean(),
}


def _parts(dtypes):
    """Return mu and logvar [B, D] of two dtypes, x, and a decoder of z in any dtype."""
    mu, logvar = (randn(B, D, seed=s).to(dtype) for s, dtype in enumerate(dtypes))
    weight = randn(D, X, seed=2)
    return mu, 0.5 * logvar, rand(B, X, seed=3).round(), lambda z: z.flatten(1).to(weight.dtype) @ weight


def _value_and_gradients(entry, form, prior, mu, logvar, x, decoder):
    leaves = [t.detach().clone().requires_grad_() for t in (mu, logvar)]
    torch.manual_seed(0)
    value = entry(x, form(*leaves), decoder, likelihood="bernoulli", prior=prior(mu, logvar))
    return value.detach(), torch.autograd.grad(value, leaves) if value.requires_grad else (None, None)


def _check(entry, form, prior, dtypes):
    mu, logvar, x, decoder = _parts(dtypes)
    wide = torch.promote_types(*dtypes)
    value, grads = _value_and_gradients(entry, form, prior, mu, logvar, x, decoder)
    expected, promoted = _value_and_gradients(entry, form, prior, mu.to(wide), logvar.to(wide), x, decoder)
    assert torch.equal(value, expected)
    for grad, its, leaf in zip(grads, promoted, (mu, logvar), strict=True):
        if grad is not None:
            assert grad.dtype == leaf.dtype
            torch.testing.assert_close(grad, its.to(leaf.dtype), rtol=0, atol=0)


@some_pairs
@pytest.mark.parametrize("form", FORMS)
def test_forms(form, dtypes, backend):
    _check(ENTRIES["iwae"], FORMS[form], PRIORS["N(0, I)"], dtypes)


@pairs
def test_dtypes(dtypes):
    _check(ENTRIES["elbo"], FORMS["pair"], PRIORS["N(0, I)"], dtypes)


@some_pairs
@pytest.mark.parametrize("prior", PRIORS)
@pytest.mark.parametrize("entry", ENTRIES)
def test_entries(entry, prior, dtypes):
    _check(ENTRIES[entry], FORMS["pair"], PRIORS[prior], dtypes)


@pytest.mark.parametrize("entry", ["elbo", "iwae"])
@pytest.mark.parametrize("dtypes", [(torch.float32, torch.bfloat16), (torch.float16, torch.float32)], ids=str)
def test_large_inputs_are_not_read_beyond_the_end(entry, dtypes):
    """Regression: large inputs were read beyond a tensor's end."""
    mu, logvar = (randn(512, 512, seed=s).to(dtype) for s, dtype in enumerate(dtypes))
    x = rand(512, X, seed=3).round()

    def value(mu, logvar):
        torch.manual_seed(0)
        decoder = lambda z: z.float()[:, :X]  # noqa: E731
        return ENTRIES[entry](x, (mu, logvar), decoder, likelihood="bernoulli")

    assert torch.equal(value(mu, logvar), value(mu.float(), logvar.float()))


@pairs
def test_normal(dtypes):
    """A torch Normal of two dtypes is promoted; its scale is 1, whose logarithm is exact in any dtype."""
    mu, _, x, decoder = _parts(dtypes)
    scale = torch.ones(B, D, dtype=dtypes[1], device=DEVICE)
    wide = torch.promote_types(*dtypes)

    def value(loc, scale):
        torch.manual_seed(0)
        q = td.Normal(loc, scale)
        return fastvae.elbo(x, q, decoder, likelihood="bernoulli")

    assert torch.equal(value(mu, scale), value(mu.to(wide), scale.to(wide)))


@pytest.mark.parametrize("entry", ["elbo", "iwae"])
def test_compiled(entry):
    mu, logvar, x, decoder = _parts((torch.float32, torch.bfloat16))

    def function(mu, logvar):
        return ENTRIES[entry](x, (mu, logvar), decoder, likelihood="bernoulli")

    torch.manual_seed(0)
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")(mu, logvar)
    torch.manual_seed(0)
    assert torch.equal(compiled, function(mu, logvar.float()))


@pytest.mark.parametrize("entry", ["elbo", "iwae"])
def test_autocast(entry):
    """An encoder under autocast may cast its log variance to float32."""

    class Encoder(nn.Module):
        def __init__(self, wide):
            super().__init__()
            torch.manual_seed(0)
            self.linear, self.wide = nn.Linear(X, 2 * D), wide

        def forward(self, x):
            mu, logvar = self.linear(x).chunk(2, 1)
            return (mu.float() if self.wide else mu), logvar.float()

    found = []
    for wide in (False, True):
        vae = fastvae.VAE(Encoder(wide), nn.Linear(D, X), likelihood="bernoulli").to(DEVICE)
        torch.manual_seed(1)
        for p in vae.decoder.parameters():
            nn.init.normal_(p)
        with torch.autocast(DEVICE.type, torch.bfloat16):
            bound = getattr(vae, entry)(rand(B, X, seed=3))
        bound.backward()
        found.append((bound.detach(), vae.encoder.linear.weight.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


@some_pairs
def test_ops(dtypes, backend):
    mu, logvar, *_ = _parts(dtypes)
    wide, seed = torch.promote_types(*dtypes), torch.tensor(3, device=DEVICE)
    for op, options in ((fastvae.ops.rsample_kl, {}), (fastvae.ops.rsample_log_ratio, {"k": K})):
        found = op(mu, logvar, seed=seed, prior=(logvar[0], mu), **options)
        expected = op(*(t.to(wide) for t in (mu, logvar)), seed=seed, prior=(logvar[0], mu), **options)
        for one, other in zip(found, expected, strict=True):
            assert torch.equal(one, other)


def _proposal(name):
    return lambda x, q, decoder, **o: fastvae.log_marginal(x, q, decoder, k=300, proposal=name, **o)


OBJECTIVES = {
    "elbo": fastvae.elbo,
    "elbo, kl=mc": lambda x, q, decoder, **o: fastvae.elbo(x, q, decoder, kl="mc", **o),
    "iwae": fastvae.iwae,
    "iwae, k_chunk": lambda x, q, decoder, **o: fastvae.iwae(x, q, decoder, k=K, k_chunk=2, **o),
    "iwae, qmc": lambda x, q, decoder, **o: fastvae.iwae(x, q, decoder, noise="qmc", **o),
    "iwae, dreg": lambda x, q, decoder, **o: fastvae.iwae(x, q, decoder, estimator="dreg", **o),
    "beta_tc": fastvae.beta_tc,
    "ais": lambda x, q, decoder, **o: fastvae.audit.ais(x, q, decoder, k=3, steps=4, **o),
    **{name: _proposal(name) for name in ("posterior", "defensive", "adapted", "refined")},
}
OF_TORCH = {
    "Normal": lambda mu, scale: td.Normal(mu, scale),
    "Laplace": lambda mu, scale: td.Independent(td.Laplace(mu, scale), 1),
    "StudentT": lambda mu, scale: td.Independent(td.StudentT(torch.full_like(mu, 5.0), mu, scale), 1),
}


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("prior", ["none", "normal", "wide normal", "Laplace", "wide Laplace"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_decoder_gets_z_in_one_dtype(objective, prior, dtype):
    """The dtype of the decoder's z depends on q and the prior, not on the objective, noise or proposal."""
    wide = torch.float32 if prior.startswith("wide") else dtype
    parameters = torch.zeros(D, dtype=wide, device=DEVICE), torch.zeros(D, dtype=wide, device=DEVICE)
    kind = prior.split()[-1]
    p = None if kind == "none" else parameters if kind == "normal" else Laplace(*parameters)
    x, weight = rand(B, X, seed=1).round(), randn(D, X, seed=2)
    q = randn(B, D, seed=3).to(dtype), torch.zeros(B, D, dtype=dtype, device=DEVICE)
    seen = set()

    def decoder(z):
        seen.add(z.dtype)
        return z.float() @ weight

    value = OBJECTIVES[objective](x, q, decoder, prior=p, likelihood="bernoulli")
    assert seen == {wide if kind == "normal" else dtype}
    assert getattr(value, "log_px", value).isfinite().all()


@pytest.mark.parametrize("objective", [name for name in OBJECTIVES if name != "beta_tc"])
@pytest.mark.parametrize("family", OF_TORCH)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_of_torchs_distributions(objective, family, dtype):
    """A decoder in half precision gets z in its dtype, though torch's distributions are computed wide."""
    x = rand(B, X, seed=1).round()
    decoder = nn.Linear(D, X, device=DEVICE).to(dtype)
    q = OF_TORCH[family](randn(B, D, seed=3).to(dtype), torch.ones(B, D, dtype=dtype, device=DEVICE))
    value = OBJECTIVES[objective](x, q, decoder, likelihood="bernoulli")
    assert getattr(value, "log_px", value).isfinite().all()


def test_refine_a_posterior_in_half_precision():
    """A refined posterior hands on z in the dtype of q's."""
    encoder, decoder = (nn.Linear(n, m, device=DEVICE).bfloat16() for n, m in ((X, D), (D, X)))
    vae = fastvae.VAE(
        lambda x: td.Laplace(h := encoder(x), torch.ones_like(h)), decoder,
        likelihood="bernoulli", modules=[encoder],
    )  # fmt: skip
    x = rand(B, X, seed=1).round().bfloat16()
    assert fastvae.elbo(x, vae.refine(x), decoder, likelihood="bernoulli").isfinite()
