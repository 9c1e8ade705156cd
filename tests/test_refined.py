"""proposal="refined": exact on linear models, unbiased on others, and for every likelihood and prior."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch import nn

import fastvae
from fastvae import distributions, likelihoods, proposals
from fastvae.estimation import refined
from fastvae.estimation.stream import Chunks
from fastvae.inputs.batch import Inputs

from .cases import DEVICE

B, D, X, K = 5, 3, 8, 400


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def _randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=_generator(seed), device=DEVICE)


class Linear:
    """Model x ~ N(W z + b, s²) with z ~ N(0, I), whose log p(x) is known."""

    def __init__(self, scale: float = 0.5):
        self.w, self.b, self.scale = _randn(X, D, seed=1), _randn(X, seed=2), scale
        self.likelihood = likelihoods.Gaussian(scale=scale)

    def decoder(self, z):
        return z @ self.w.T + self.b

    def log_px(self, x):
        total = self.w @ self.w.T + self.scale**2 * torch.eye(X, device=DEVICE)
        return torch.distributions.MultivariateNormal(self.b.double(), total.double()).log_prob(x.double())


def test_a_linear_decoder_has_equal_weights(backend):
    """The fit is exact from any q, so that each weight is p(x): no error, with few draws."""
    model, x = Linear(), _randn(B, X, seed=3)
    q = 0.3 * _randn(B, D, seed=4), _randn(B, D, seed=5)
    result = fastvae.log_marginal(
        x, q, model.decoder, k=20, likelihood=model.likelihood, proposal="refined", generator=_generator()
    )
    exact = model.log_px(x)
    torch.testing.assert_close(result.log_px.double(), exact, rtol=0, atol=2e-4)
    assert float(result.log_px_stderr.max()) < 2e-4
    # q itself is far off.
    plain = fastvae.log_marginal(x, q, model.decoder, k=20, likelihood=model.likelihood)
    assert float((plain.log_px.double() - exact).abs().max()) > 0.5


def test_errors_of_nearly_equal_weights():
    """Errors and intervals hold for a posterior that is nearly normal."""
    n, k, scale, options = 400, 1000, 0.5, {"dtype": torch.float64, "device": DEVICE}
    gain = torch.linspace(0.5, 1.5, 6, **options)

    def decoder(z):
        return (z + 1e-3 * z.square()) * gain

    x = decoder(_randn(n, 1, seed=3).double()) + scale * _randn(n, 6, seed=4)
    z = torch.linspace(-8, 8, 4001, **options)[:, None]
    joint = torch.distributions.Normal(decoder(z)[:, None], scale).log_prob(x).sum(2) - z.square() / 2
    exact = joint.logsumexp(0) + math.log(16 / 4000 / math.sqrt(2 * math.pi))
    q = torch.zeros(2, n, 1, **options).unbind()
    result = fastvae.log_marginal(
        x, q, decoder, k=k, likelihood=likelihoods.Gaussian(scale=scale), proposal="refined",
        generator=_generator(),
    )  # fmt: skip
    assert bool((result.log_px_stderr > 0).all()) and bool((result.jackknife_stderr > 0).all())
    assert bool((result.ess <= k).all())
    holds = float(((result.low <= exact) & (exact <= result.high)).double().mean())
    assert holds > 0.95 - 4 * math.sqrt(0.05 * 0.95 / n)


class Wavy(nn.Module):
    """Decoder whose posterior is not normal."""

    def __init__(self, outputs: int = X):
        super().__init__()
        generator = torch.Generator().manual_seed(8)
        self.first, self.second = nn.Linear(D, 16), nn.Linear(16, outputs)
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.7 * torch.randn(p.shape, generator=generator))
        self.to(DEVICE)

    def forward(self, z):
        return self.second(torch.tanh(self.first(z)))


def _truth(x, decoder, likelihood, **options) -> torch.Tensor:
    """Return log p(x) by a million draws from the prior."""
    q = torch.zeros(2, len(x), D, device=DEVICE).unbind()
    result = fastvae.log_marginal(
        x, q, decoder, k=2 * 10**6, likelihood=likelihood, generator=_generator(9), **options
    )
    assert float(result.log_px_stderr.max()) < 0.01
    return result.log_px.double()


def test_the_mean_of_p_hat_is_p():
    """Over many seeds p̂(x) averages to p(x) within its error: the fit's noise is independent of the draws."""
    decoder, seeds = Wavy(), 300
    x = _randn(B, X, seed=3).gt(0).float()
    exact = _truth(x, decoder, "bernoulli")
    # One evaluation of all seeds: each copy of the data has its own rows of noise.
    rows = x.repeat(seeds, 1)
    q = torch.full((len(rows), D), 0.8, device=DEVICE), torch.full((len(rows), D), -1.5, device=DEVICE)
    result = fastvae.log_marginal(
        rows, q, decoder, k=20, likelihood="bernoulli", proposal=proposals.Refined(steps=3, draws_per_step=2),
        generator=_generator(),
    )  # fmt: skip
    p_hat = (result.log_px.double().unflatten(0, (seeds, B)) - exact).exp()
    error = p_hat.std(0) / math.sqrt(seeds)
    assert float(((p_hat.mean(0) - 1).abs() / error.clamp(min=1e-3)).max()) < 4.5
    assert float(error.max()) < 0.1


def test_it_is_better_than_q():
    """k̂ and standard error fall where q is narrow and misplaced."""
    decoder, x = Wavy(40), _randn(B, 40, seed=3).gt(0).float()
    q = torch.full((B, D), 0.8, device=DEVICE), torch.full((B, D), -3.0, device=DEVICE)
    options = {"k": 1000, "likelihood": "bernoulli"}
    plain, better = (
        fastvae.log_marginal(x, q, decoder, proposal=p, generator=_generator(), **options)
        for p in ("posterior", "refined")
    )
    exact = _truth(x, decoder, "bernoulli")
    errors = (better.log_px - exact).abs() / better.log_px_stderr
    assert float(errors.max()) < 5
    assert float(better.log_px_stderr.max()) < 0.2 < float((plain.log_px - exact).abs().max())
    assert bool((better.khat < 0.7).all()) and bool((better.ess > 10 * plain.ess).all())


class Outputs(nn.Module):
    """Decoder of several outputs [N, *event] of one layer."""

    def __init__(self, *shapes: tuple[int, ...]):
        super().__init__()
        self.shapes = shapes
        self.layers = nn.ModuleList([Wavy(math.prod(shape)) for shape in shapes])

    def forward(self, z):
        found = tuple(layer(z).unflatten(1, s) for layer, s in zip(self.layers, self.shapes, strict=True))
        return found if len(found) > 1 else found[0]


_COUNTS = lambda: _randn(B, X, seed=3).abs().mul(2).round()  # noqa: E731
LIKELIHOODS = {
    "bernoulli": (lambda: _randn(B, X, seed=3).gt(0).float(), "bernoulli", 1),
    "gaussian": (lambda: _randn(B, X, seed=3), "gaussian", 2),
    "softplus": (lambda: _randn(B, X, seed=3), likelihoods.Gaussian(scale="softplus"), 2),
    "laplace": (lambda: _randn(B, X, seed=3), "laplace", 2),
    "student": (lambda: _randn(B, X, seed=3), likelihoods.StudentT(df=4.0), 2),
    "poisson": (_COUNTS, "poisson", 1),
    "negative binomial": (_COUNTS, "negative_binomial", 2),
    "zinb": (_COUNTS, "zero_inflated_negative_binomial", 3),
    "beta": (lambda: torch.sigmoid(_randn(B, X, seed=3)), "beta", 2),
    "multinomial": (_COUNTS, "multinomial", 1),
    "probabilities": (lambda: _randn(B, X, seed=3).gt(0).float(), likelihoods.Bernoulli(probs=True), 1),
}


@pytest.mark.parametrize("name", list(LIKELIHOODS))
def test_every_likelihood(name):
    """The estimate agrees with that of many draws from the prior."""
    data, likelihood, number = LIKELIHOODS[name]
    decoder: nn.Module = Outputs(*[(X,)] * number)
    if name == "probabilities":
        decoder = nn.Sequential(decoder, nn.Sigmoid())
    _agrees(data(), decoder, likelihood)


def _agrees(x, decoder, likelihood, **options):
    q = torch.full((2, B, D), 0.3, device=DEVICE).unbind()
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no fallback
        # Of torch, which compiles its own formulas when a process first uses forward mode.
        warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
        result = fastvae.log_marginal(
            x,
            q,
            decoder,
            k=2000,
            likelihood=likelihood,
            proposal="refined",
            generator=_generator(),
            **options,
        )
    q = torch.zeros(2, B, D, device=DEVICE).unbind()
    other = fastvae.log_marginal(
        x,
        q,
        decoder,
        k=400_000,
        likelihood=likelihood,
        proposal="defensive",
        generator=_generator(1),
        **options,
    )
    error = (result.log_px_stderr.square() + other.log_px_stderr.square()).sqrt()
    assert float(((result.log_px - other.log_px).abs() / (error + 1e-3)).max()) < 5
    # A posterior that one Gaussian does not cover is left to the shares of q and the prior.
    assert float(result.log_px_stderr.median()) < 0.1


def test_classes_tables_several_parts_and_own_likelihoods():
    classes = _COUNTS().clamp(max=3).long()
    _agrees(classes, Outputs((4, X)), "categorical")
    _agrees(classes, Outputs((X, 4)), likelihoods.Categorical(axis=-1))

    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Outputs((X,), (2,))

        def forward(self, z):
            first, second = self.body(z)
            return {"pixels": first, "size": second}

    data = {"pixels": _randn(B, X, seed=3).gt(0).float(), "size": _randn(B, 2, seed=4)}
    joint = likelihoods.Joint(
        pixels="bernoulli", size=likelihoods.Gaussian(scale=0.5), weights={"pixels": 0.7}
    )
    q = torch.full((2, B, D), 0.3, device=DEVICE).unbind()
    body = Both()
    result = fastvae.log_marginal(data, q, body, k=500, likelihood=joint, proposal="refined")
    assert float(result.log_px_stderr.median()) < 0.1

    class Own(likelihoods.Likelihood):
        def log_prob(self, x, parameters):
            return -(x - parameters).abs() - math.log(2)

    _agrees(_randn(B, X, seed=3), Outputs((X,)), Own())


def test_masks_sizes_and_contexts():
    mask = _randn(B, X, seed=6) > -0.3
    x = torch.where(mask, _randn(B, X, seed=3).gt(0).float(), math.nan)
    _agrees(x, Outputs((X,)), "bernoulli", mask=mask)
    _agrees(_COUNTS(), Outputs((X,)), "poisson", size_factor=torch.linspace(0.3, 1, B, device=DEVICE))

    class Conditional(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = Outputs((X,))

        def forward(self, z, context):
            return self.body(z) + context

    _agrees(_randn(B, X, seed=3).gt(0).float(), Conditional(), "bernoulli", context=_randn(B, X, seed=7))


PRIORS = {
    "normal": lambda: distributions.DiagonalNormal(0.3 * _randn(D, seed=1), 0.5 * _randn(D, seed=2)),
    "mixture": lambda: distributions.NormalMixture(
        _randn(4, D, seed=1), torch.full((4, D), -1.0, device=DEVICE), torch.zeros(4, device=DEVICE)
    ),
    "rows": lambda: distributions.DiagonalNormal(0.3 * _randn(B, D, seed=1), 0.5 * _randn(B, D, seed=2)),
}


@pytest.mark.parametrize("name", list(PRIORS))
def test_priors(name):
    x, q = _randn(B, X, seed=3).gt(0).float(), torch.full((2, B, D), 0.3, device=DEVICE).unbind()
    prior, decoder = PRIORS[name](), Outputs((X,))
    options = {"likelihood": "bernoulli", "prior": prior}
    result = fastvae.log_marginal(
        x, q, decoder, k=4000, proposal="refined", generator=_generator(), **options
    )
    wide = torch.zeros(B, D, device=DEVICE), torch.full((B, D), 1.0, device=DEVICE)
    other = fastvae.log_marginal(x, wide, decoder, k=400_000, generator=_generator(1), **options)
    error = (result.log_px_stderr.square() + other.log_px_stderr.square()).sqrt()
    assert float(((result.log_px - other.log_px).abs() / (error + 1e-3)).max()) < 5


def test_batches_chunks_and_ranks_change_nothing(tmp_path):
    """The fit of an example depends on its address alone."""
    torch.manual_seed(0)
    vae = fastvae.VAE(nn.Linear(X, 2 * D, device=DEVICE), Wavy(), likelihood="bernoulli")
    x = _randn(7, X, seed=3).gt(0).float()
    options = {"k": K, "proposal": "refined", "progress": False}
    whole = vae.evaluate(x, generator=torch.Generator().manual_seed(1), **options)
    where = {"batch_size": 3, "k_chunk": 17, "checkpoint": tmp_path / "c.npz"}
    parts = vae.evaluate(x, generator=torch.Generator().manual_seed(1), **where, **options)
    for name in ("log_px", "elbo", "khat"):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name), rtol=1e-3, atol=1e-3)
    stopped = vae.evaluate(x, tol=0.05, proposal="refined", progress=False)
    assert float(stopped.log_px_stderr.max()) <= 0.05
    qmc = vae.evaluate(x, noise="qmc", **{**options, "k": 4096})
    error = (qmc.log_px_stderr.square() + whole.log_px_stderr.square()).sqrt()
    assert float(((qmc.log_px - whole.log_px).abs() / (error + 1e-3)).max()) < 5
    shared = vae.evaluate(x, shared_noise=True, **options)
    assert bool(shared.delta(0).stderr.isfinite().all())
    # The ELBO is q's.
    plain = vae.evaluate(x, **{**options, "proposal": "posterior", "k": 4000})
    assert (
        float((whole.elbo - plain.elbo).abs().max())
        < 6 * float((plain.log_px - plain.elbo).max()) / math.sqrt(64) + 1
    )


def test_decoders_without_derivatives_fall_back():
    x, q = _randn(B, X, seed=3).gt(0).float(), torch.zeros(2, B, D, device=DEVICE).unbind()
    body = Wavy()

    def detached(z):
        with torch.no_grad():
            return body(z)

    for decoder, reason in (
        (detached, "output has no gradient by z"),
        # fastvae's ops have no forward mode.
        (
            lambda z: body(z) + fastvae.ops.log_mean_exp(z.mT[:, :, None]),
            "forward-mode differentiation of the decoder failed",
        ),
    ):
        with pytest.warns(RuntimeWarning, match=reason):
            result = fastvae.log_marginal(
                x, q, decoder, k=K, likelihood="bernoulli", proposal="refined", generator=_generator()
            )
        adapted = fastvae.log_marginal(
            x, q, decoder, k=K, likelihood="bernoulli", proposal="adapted", generator=_generator()
        )
        assert torch.equal(result.log_px, adapted.log_px)


def test_a_nan_stays_with_its_example():
    decoder, x = Wavy(), _randn(B, X, seed=3).gt(0).float()
    x[2, 1] = math.nan
    q = torch.zeros(B, D, device=DEVICE), torch.zeros(B, D, device=DEVICE)
    q[0][4, 0] = math.nan
    result = fastvae.log_marginal(x, q, decoder, k=K, likelihood="bernoulli", proposal="refined")
    assert result.log_px.isnan().tolist() == [False, False, True, False, True]


def test_half_precision_and_double():
    x, q = _randn(B, X, seed=3).gt(0).float(), torch.zeros(2, B, D, device=DEVICE).unbind()
    exact = fastvae.log_marginal(x, q, Wavy(), k=100_000, likelihood="bernoulli").log_px
    for dtype, atol in ((torch.float64, 0.1), (torch.bfloat16, 0.3)):
        decoder = Wavy().to(dtype)
        given = tuple(v.to(dtype) for v in q)
        result = fastvae.log_marginal(
            x.to(dtype), given, decoder, k=2000, likelihood="bernoulli", proposal="refined"
        )
        torch.testing.assert_close(result.log_px.double(), exact.double(), rtol=0, atol=atol)


def test_refined_options_are_checked():
    for options, match in (
        ({"steps": 0}, "steps must be at least 1"),
        ({"draws_per_step": 2.5}, "draws_per_step"),
        ({"posterior": 0.9, "prior": 0.2}, "must leave a share"),
        ({"scale": 0.0}, "scale"),
    ):
        with pytest.raises((TypeError, ValueError), match=match):
            proposals.Refined(**options)
    gamma = torch.distributions.Independent(
        torch.distributions.Gamma(torch.ones(B, D, device=DEVICE), torch.ones(B, D, device=DEVICE)), 1
    )
    prior = torch.distributions.Independent(
        torch.distributions.Gamma(torch.ones(D, device=DEVICE), torch.ones(D, device=DEVICE)), 1
    )
    with pytest.raises(ValueError, match="proposal='refined' draws z from all of R"):
        fastvae.log_marginal(
            _COUNTS(), gamma, Wavy(), k=10, likelihood="poisson", prior=prior, proposal="refined"
        )


def test_the_refined_posterior():
    """It raises the ELBO to that of the best Gaussian: of a linear model, to log p(x)."""
    model, x = Linear(), _randn(B, X, seed=3)
    encoder = nn.Linear(X, 2 * D, device=DEVICE)
    vae = fastvae.VAE(encoder, model.decoder, likelihood=model.likelihood, modules=[])
    q = vae.refine(x, generator=_generator())
    bound = fastvae.elbo(x, q, model.decoder, likelihood=model.likelihood, k=200, reduction="none")
    # The weights of draws from the exact posterior are equal; the KL in closed form leaves a spread.
    torch.testing.assert_close(bound.double(), model.log_px(x), rtol=0, atol=0.5)
    weights = fastvae.log_weights(x, q, model.decoder, k=5, likelihood=model.likelihood)
    log_w = weights.log_likelihood + weights.log_ratio
    torch.testing.assert_close(log_w.double(), model.log_px(x).expand(5, B), rtol=0, atol=1e-3)
    with pytest.raises(ValueError, match="steps must be at least 1"):
        vae.refine(x, steps=0)
    with pytest.raises(RuntimeError, match="no gradient by z"):
        fastvae.VAE(
            encoder, lambda z: torch.zeros(len(z), X, device=DEVICE), likelihood="bernoulli", modules=[]
        ).refine(x.gt(0).float())


def test_a_refined_posterior_of_shaped_latents():
    encoder = nn.Sequential(nn.Linear(X, 2 * 4, device=DEVICE), nn.Unflatten(1, (2, 2, 2)))
    decoder = nn.Sequential(nn.Flatten(), nn.Linear(4, X, device=DEVICE))
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli")
    x = _randn(B, X, seed=3).gt(0).float()
    q = vae.refine(x)
    assert q.latent == (1, 2, 2)
    assert float(fastvae.elbo(x, q, decoder, likelihood="bernoulli", k=50)) > float(vae.elbo(x, k=50))


def test_an_empty_batch():
    x, q = torch.ones(0, X, device=DEVICE), torch.zeros(0, 2 * D, device=DEVICE)
    result = fastvae.log_marginal(x, q, Wavy(), k=K, likelihood="bernoulli", proposal="refined")
    assert result.log_px.shape == (0,)


def test_two_modes():
    """x = z² + noise has two modes, of which the fit finds one; the shares of q and prior find the other."""
    x = torch.linspace(0.5, 2, B, device=DEVICE)[:, None]
    likelihood = likelihoods.Gaussian(scale=0.1)

    def decoder(z):
        return z.square()

    q = torch.full((B, 1), 0.9, device=DEVICE), torch.full((B, 1), -2.0, device=DEVICE)
    result = fastvae.log_marginal(
        x, q, decoder, k=4000, likelihood=likelihood, proposal="refined", generator=_generator()
    )
    exact = fastvae.audit.lattice(x, decoder, latent_dim=1, likelihood=likelihood).log_px
    error = (result.log_px.double() - exact.to(DEVICE).double()).abs() / result.log_px_stderr
    assert float(error.max()) < 4.5
    # From q, which has one mode, log 2 is missing.
    plain = fastvae.log_marginal(x, q, decoder, k=4000, likelihood=likelihood, generator=_generator())
    assert float((exact.to(DEVICE) - plain.log_px).median()) > 0.5


def test_the_decoder_never_gets_more_rows_than_a_chunk():
    """k_chunk bounds the fit's passes, too, and changes the results only by rounding."""
    body, rows = Wavy(), []

    def decoder(z):
        rows.append(len(z))
        return body(z)

    x, q = _randn(B, X, seed=3).gt(0).float(), torch.zeros(B, 2 * D, device=DEVICE)
    options = {"k": 100, "likelihood": "bernoulli", "proposal": "refined"}
    whole, parts = (
        fastvae.log_marginal(x, q, decoder, k_chunk=chunk, generator=_generator(), **options)
        for chunk in (None, 2)
    )
    torch.testing.assert_close(whole.log_px, parts.log_px, rtol=0, atol=1e-3)
    first = rows.index(2 * B)
    assert max(rows[first:]) <= 2 * B


# Steps towards the mean and covariance


def _counts(batch, latent):
    """Return x, q, decoder and log p(x) of counts with a rate for each latent: a skewed posterior."""
    rotation = torch.linalg.qr(_randn(latent, latent, seed=1).double()).Q
    z = _randn(batch, latent, seed=2).double()
    x = torch.poisson((z @ rotation + 0.5).exp(), generator=_generator(3))
    grid = torch.linspace(-8, 8, 801, dtype=torch.float64, device=DEVICE)
    log_prior = -0.5 * grid.square() - 0.5 * math.log(2 * math.pi) + math.log(16 / 800)
    rate = grid + 0.5
    log_joint = x[..., None] * rate - rate.exp() - torch.lgamma(x + 1)[..., None] + log_prior
    w = torch.softmax(log_joint, -1)
    mean, second = w @ grid, w @ grid.square()
    q = mean @ rotation.T, (second - mean.square()) @ rotation.T.square()
    moments = q[0], (rotation * (second - mean.square())[:, None]) @ rotation.T
    return x, (q[0], q[1].log()), lambda z: z @ rotation + 0.5, log_joint.logsumexp(-1).sum(1), moments


def test_intervals_hold_and_p_hat_is_unbiased():
    """Intervals of 95 % contain log p(x) of 93 to 97 % of a thousand examples, and p̂ is p on average."""
    n = 1000
    x, q, decoder, exact, _ = _counts(n, 10)
    found = fastvae.log_marginal(
        x, q, decoder, k=500, likelihood="poisson", generator=_generator(), proposal="refined"
    )
    inside = ((found.low <= exact) & (exact <= found.high)).double().mean()
    assert 0.93 <= float(inside) <= 0.97 + 2 * math.sqrt(0.03 * 0.97 / n)
    ratio = (found.log_px - exact).exp()
    error = float(ratio.std()) / math.sqrt(n)
    assert error < 0.003 and abs(float(ratio.mean()) - 1) < 4.5 * error
    assert bool((found.khat < 0.7).all())


def test_the_fit_reaches_the_mean_and_covariance():
    """The Gaussian of the largest ELBO is off where the posterior is skewed; steps by the weights are not."""
    x, q, decoder, _, (mean, covariance) = _counts(40, 4)
    inputs = Inputs.read(x, q, decoder, "poisson", None)
    errors = []
    for steps in (0, 20):
        settings = refined.Settings(10, 64, 4, steps, 512, False, 0.05, 0.05, None)
        fitted = refined.refine(inputs, torch.tensor(3, device=DEVICE), settings, 0, Chunks(None))
        off = torch.linalg.solve_triangular(fitted.tril, (mean - fitted.mean)[:, :, None], upper=False)
        factor = torch.linalg.solve_triangular(fitted.tril, covariance, upper=False)
        whitened = torch.linalg.solve_triangular(fitted.tril, factor.mT, upper=False)
        identity = torch.eye(4, dtype=torch.float64, device=DEVICE)
        errors.append((float(off.norm(dim=1).mean()), float((whitened - identity).norm(dim=(1, 2)).mean())))
    (mean_before, covariance_before), (mean_after, covariance_after) = errors
    assert mean_after < 0.6 * mean_before and covariance_after < 0.6 * covariance_before


def test_diagonal_covariance():
    encoder, decoder = nn.Linear(X, 2 * D, device=DEVICE), Wavy()
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli")
    x = _randn(B, X, seed=3).gt(0).float()
    full, diagonal = (vae.refine(x, steps=20, diagonal=d, generator=_generator()) for d in (False, True))
    z, _ = fastvae.distributions.rsample_log_prob(diagonal, 20_000, torch.tensor(1, device=DEVICE))
    for row in z.unbind(1):
        off = torch.corrcoef(row.T) - torch.eye(D, device=DEVICE)
        assert float(off.abs().max()) < 5 / math.sqrt(20_000)

    def bound(q):
        found = fastvae.elbo(x, q, decoder, likelihood="bernoulli", k=4000, generator=_generator(2))
        return float(found)

    assert float(vae.elbo(x, k=4000)) < bound(diagonal) < bound(full) + 0.02
    result = fastvae.log_marginal(
        x, vae.posterior(x), decoder, k=K, likelihood="bernoulli", proposal=proposals.Refined(diagonal=True)
    )
    assert bool(result.log_px.isfinite().all())


def test_inference_gaps():
    """A linear model's encoder with the exact mean and conditional variances lacks the correlations alone."""
    model = Linear()
    x = _randn(200, X, seed=3)
    precision = model.w.T @ model.w / model.scale**2 + torch.eye(D, device=DEVICE)
    encoder = nn.Linear(X, 2 * D, device=DEVICE)
    with torch.no_grad():
        encoder.weight.zero_(), encoder.bias.zero_()
        to_mean = torch.linalg.solve(precision, model.w.T) / model.scale**2
        encoder.weight[:D], encoder.bias[:D] = to_mean, -to_mean @ model.b
        encoder.bias[D:] = -precision.diagonal().log()
    vae = fastvae.VAE(encoder, model.decoder, likelihood=model.likelihood, modules=[])
    gaps = fastvae.diagnostics.inference_gaps(vae, x, k=200, generator=_generator())
    # KL of the best diagonal normal from the posterior: (Σ log Λ_ii − log det Λ) / 2.
    expected = 0.5 * (precision.diagonal().log().sum() - torch.logdet(precision))
    assert float(gaps.approximation.mean()) == pytest.approx(float(expected), abs=0.1)
    assert abs(float(gaps.amortization.mean())) < 0.1
    torch.testing.assert_close(gaps.log_px, model.log_px(x), rtol=0, atol=1e-3)
    with torch.no_grad():
        encoder.bias[0] += 0.5
    shifted = fastvae.diagnostics.inference_gaps(vae, x, k=200, generator=_generator())
    cost = 0.125 * float(precision[0, 0])
    assert float(shifted.amortization.mean()) == pytest.approx(cost, rel=0.1, abs=0.1)
    full = fastvae.diagnostics.inference_gaps(vae, x, k=200, diagonal=False, generator=_generator())
    assert abs(float(full.approximation.mean())) < 0.1
    torch.testing.assert_close(full.inference.mean(), shifted.inference.mean(), rtol=0, atol=0.1)
    assert "by the encoder" in str(full)


# Posteriors and priors of other kinds


def test_hierarchies_flows_and_a_vamp_prior():
    """The proposal is a Gaussian over all levels; estimates agree with those of many draws from q."""
    torch.manual_seed(5)
    x = torch.rand(6, X, device=DEVICE).round()
    hierarchy = distributions.Hierarchy(
        [
            distributions.Level(2, nn.Linear(4, 4)),
            distributions.Level(1, lambda h, z: (h[:, :1] + z[:, :1], h[:, 1:2]), prior=nn.Linear(2, 2)),
        ]
    ).to(DEVICE)
    pair = torch.zeros(2, 6, D, device=DEVICE).unbind()
    encoder = nn.Linear(X, 2 * D, device=DEVICE)
    vamp = distributions.VampPrior(encoder, torch.rand(4, X, device=DEVICE))
    flow = distributions.NeuralSplineFlow(D, layers=2) if hasattr(distributions, "NeuralSplineFlow") else None
    cases = [
        (hierarchy(nn.Linear(X, 4).to(DEVICE)(x)), None),
        (pair, vamp),
    ]
    if flow is not None:
        cases.append((pair, flow.to(DEVICE)))
    decoder = Wavy()
    for q, prior in cases:
        options = {"likelihood": "bernoulli", "prior": prior}
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            # Of torch, which compiles its own formulas when a process first uses forward mode.
            warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
            found = fastvae.log_marginal(
                x, q, decoder, k=3000, proposal="refined", generator=_generator(1), **options
            )
        many = fastvae.log_marginal(x, q, decoder, k=200_000, generator=_generator(2), **options)
        error = (found.log_px_stderr.square() + many.log_px_stderr.square()).sqrt()
        assert float(((found.log_px - many.log_px).abs() / (error + 1e-3)).max()) < 5
        assert float(found.log_px_stderr.median()) < 0.05


def test_frozen_last_layers():
    """A fused head's weights get no gradient, and the fit is that of the plain decoder."""
    x = _randn(B, X, seed=3).gt(0).float()
    body, last = nn.Sequential(nn.Linear(D, 16), nn.Tanh()).to(DEVICE), nn.Linear(16, X).to(DEVICE)
    q = torch.full((2, B, D), 0.3, device=DEVICE).unbind()
    found = [
        fastvae.log_marginal(
            x, q, decoder, k=K, likelihood="bernoulli", proposal="refined", generator=_generator()
        ).log_px
        for decoder in (nn.Sequential(body, last), fastvae.FusedHead(body, last))
    ]
    torch.testing.assert_close(*found, rtol=0, atol=1e-3)
    assert last.weight.grad is None and last.weight.requires_grad


def test_what_a_hook_stores_is_usable():
    """Hooks and functions see ordinary tensors, and change nothing."""
    x, q = _randn(B, X, seed=3).gt(0).float(), torch.full((2, B, D), 0.3, device=DEVICE).unbind()
    stored: list[torch.Tensor] = []
    plain, hooked = Wavy(), Wavy()
    hooked.first.register_forward_hook(lambda module, args, output: stored.append(output))

    def function(z):
        stored.append(plain.first(z))
        return plain(z)

    options = {"k": K, "likelihood": "bernoulli", "proposal": "refined"}
    expected = fastvae.log_marginal(x, q, plain, generator=_generator(), **options).log_px
    for decoder in (hooked, function):
        found = fastvae.log_marginal(x, q, decoder, generator=_generator(), **options).log_px
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)
        assert len(stored) > 10
        assert all(t.untyped_storage().nbytes() for t in stored)  # raises for a wrapper
        stored.clear()


@pytest.mark.parametrize("likelihood", ["bernoulli", "gaussian"])
def test_a_fused_head_has_the_derivatives_of_its_layers(likelihood):
    """Evaluation runs without gradients, and curvature in forward mode."""
    torch.manual_seed(0)
    body, last = nn.Sequential(nn.Linear(D, 6), nn.Tanh()), nn.Linear(6, X)
    x = torch.rand(B, X).round().to(DEVICE)
    q = 2 * _randn(B, 2 * D, seed=1)
    kind = likelihoods.Gaussian(scale=0.1) if likelihood == "gaussian" else "bernoulli"
    body, last = body.to(DEVICE), last.to(DEVICE)

    def estimate(decoder):
        return fastvae.log_marginal(
            x, q, decoder, k=50, likelihood=kind, proposal="refined", generator=_generator(3)
        )

    found, expected = estimate(fastvae.FusedHead(body, last)), estimate(nn.Sequential(body, last))
    for name in ("log_px", "ess"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-3, atol=1e-3)
    z, tangent = _randn(B, D, seed=5), _randn(B, D, seed=6)
    with torch.no_grad():
        head, read = fastvae.FusedHead(body, last), likelihoods.Bernoulli().read
        _, by_head = torch.func.jvp(lambda z: read(head(z), None), (z,), (tangent,))
        _, by_layers = torch.func.jvp(nn.Sequential(body, last), (z,), (tangent,))
    torch.testing.assert_close(by_head, by_layers)


class _Curved(nn.Module):
    """Prior's flow with a jump in its second derivative."""

    def __init__(self):
        super().__init__()
        self.shift = nn.Parameter(torch.linspace(-0.5, 0.5, D))

    def forward(self):
        normal = torch.distributions.Normal(self.shift, torch.ones_like(self.shift))
        return torch.distributions.Independent(
            torch.distributions.TransformedDistribution(normal, [_Kink()]), 1
        )


class _Kink(torch.distributions.transforms.Transform):
    domain = codomain = torch.distributions.constraints.real
    bijective, sign = True, 1

    def _call(self, x):
        return torch.where(x > 0, x + x.square(), x)

    def _inverse(self, y):
        return torch.where(y > 0, 2 * y / (1 + (1 + 4 * y.clamp(min=0)).sqrt()), y)

    def log_abs_det_jacobian(self, x, y):
        return torch.where(x > 0, torch.log1p(2 * x.clamp(min=0)), 0.0)


BATCH_PRIORS = {
    "Laplace": lambda: distributions.Laplace(torch.zeros(D), torch.zeros(D)),
    "mixture": lambda: distributions.NormalMixture(_randn(4, D, seed=2).cpu(), torch.zeros(4, D) - 1),
    "flow": lambda: distributions.Flow(_Curved()),
}


@pytest.mark.parametrize("prior", BATCH_PRIORS)
def test_results_do_not_depend_on_the_batch_size(prior):
    """An example's fit, with the differences of its prior's gradient, is the same in any batch.

    In double precision: rounding may decide whether a step is taken.
    """
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(D, 11), nn.Tanh(), nn.Linear(11, X))
    encoder = nn.Linear(X, 2 * D)
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", prior=BATCH_PRIORS[prior]())
    vae = vae.to(DEVICE, torch.float64)
    x = _randn(23, X, seed=3).double().sigmoid().round()
    options = {"k": 300, "proposal": "refined", "progress": False}
    whole, parts = (
        vae.evaluate(x, batch_size=size, generator=_generator(3), **options).log_px for size in (100, 4)
    )
    torch.testing.assert_close(whole, parts, rtol=0, atol=1e-9)


def test_a_prior_with_a_kink_has_a_curvature():
    """Differences over a draw's own width see a kink that a small step would meet by chance alone."""
    x, decoder = _randn(B, X, seed=3).sigmoid().round(), Wavy().to(DEVICE)
    prior = distributions.Laplace(torch.zeros(D, device=DEVICE), torch.zeros(D, device=DEVICE))
    q = _randn(B, 2 * D, seed=4)
    options = {"k": 4000, "likelihood": "bernoulli", "prior": prior, "generator": _generator(1)}
    plain = proposals.Refined(adapted=False, moment_steps=0)
    found = fastvae.log_marginal(x, q, decoder, proposal=plain, **options)
    assert found.ess.median() > 1200


def test_an_example_without_a_variance_changes_no_other():
    """Moments of examples whose variance is infinite are from draws, the others' are q's own."""
    df = torch.full((B, 1), 5.0, device=DEVICE)
    df[1] = 1.5
    loc, scale = _randn(B, D, seed=1), torch.ones(B, D, device=DEVICE)
    seed = torch.zeros((), dtype=torch.int64, device=DEVICE)
    with_it, without = (
        refined._moments(distributions.as_posterior(torch.distributions.StudentT(d, loc, scale)), seed, 0)
        for d in (df, torch.full_like(df, 5.0))
    )
    others = torch.arange(B, device=DEVICE) != 1
    for a, b in zip(with_it, without, strict=True):
        assert torch.equal(a[others], b[others]) and a.isfinite().all()
