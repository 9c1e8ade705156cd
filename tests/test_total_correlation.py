"""beta_tc against its sums in plain PyTorch, the ELBO, and the report on latents."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal, Flow, FullNormal, Laplace, LowRankNormal

from .conftest import DEVICE
from .models import generator, rand, randn

B, D, X, K = 6, 3, 7, 2
WIDE = {"dtype": torch.float64}
PARTS = ("mutual_information", "total_correlation", "dimension_kl")


def inputs(dtype=torch.float64):
    mu, logvar = (randn(B, D, seed=s, dtype=dtype).requires_grad_() for s in (1, 2))
    weight = randn(D, X, seed=3, dtype=dtype).requires_grad_()
    return rand(B, X, seed=4, dtype=dtype), mu, logvar, weight


def found(x, mu, logvar, weight, **options):
    options = {"likelihood": "bernoulli", "generator": generator(5), **options}
    return fastvae.beta_tc(x, (mu, logvar), lambda z: z @ weight, **options)


def written_out(x, mu, logvar, weight, n=1, k=K, weights=None):
    """Compute log-likelihood and the three parts [B], eqs. 2 and 5 of Chen et al. 2018.

    ``weights`` [B, B] replace those of the minibatch-weighted sampling, 1/(N B).
    """
    seed = fastvae.random.draw_seed(DEVICE, generator(5))
    sigma = (0.5 * logvar).exp()
    z = mu + sigma * fastvae.random.normal(seed, k, B, D, dtype=torch.float64)
    pairs = td.Normal(mu, sigma).log_prob(z[:, :, None])  # [K, z, posteriors, D]
    log_q = td.Normal(mu, sigma).log_prob(z).sum(2)
    if weights is None:
        weights = torch.full((B, B), 1 / (n * B), device=DEVICE, **WIDE)
    joint = torch.logsumexp(pairs.sum(3) + weights.log(), 2)
    each = torch.logsumexp(pairs + weights.log()[:, :, None], 2).sum(2)
    log_p = td.Normal(0.0, 1.0).log_prob(z).sum(2)
    log_likelihood = td.Bernoulli(logits=z @ weight, validate_args=False).log_prob(x).sum(2)
    return [t.mean(0) for t in (log_likelihood, log_q - joint, joint - each, each - log_p)]


def _each(terms):
    """Return the bound and the means of its parts."""
    kl = terms.mutual_information, terms.total_correlation, terms.dimension_kl
    return terms.bound, terms.log_likelihood, *kl


@pytest.mark.parametrize("n", [None, 1000])
def test_value_and_gradients_equal_the_formula(backend, n):
    x, *leaves = inputs()
    terms = found(x, *leaves, k=K, alpha=0.5, beta=3.0, gamma=0.7, dataset_size=n, terms=True)
    log_likelihood, *parts = written_out(x, *leaves, n=n or 1)
    bound = log_likelihood - 0.5 * parts[0] - 3.0 * parts[1] - 0.7 * parts[2]
    for got, expected in zip(_each(terms), (bound, log_likelihood, *parts), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    for weights in (torch.ones(B, device=DEVICE, **WIDE), randn(B, seed=6, **WIDE)):
        got, expected = (
            torch.autograd.grad(b @ weights, leaves, retain_graph=True) for b in (terms.bound, bound)
        )
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


def paper_weights(n):
    """Compute f of eq. S8: M others, of which the last has its own weight."""
    m = B - 1
    weights = torch.zeros(B, B, device=DEVICE, **WIDE)
    for b in range(B):
        others = [(b - i) % B for i in range(1, m)]
        weights[b, b] = 1 / n
        weights[b, others] = 1 / m
        weights[b, (b - m) % B] = (n - m) / (n * m)
    return weights


def published_weights(n):
    """Compute the matrix of rtqichen/beta-tcvae and its copies, whose strides select columns 0 and 1."""
    weights = torch.full((B, B), 1 / (B - 1), device=DEVICE, **WIDE)
    weights[:, 0] = 1 / n
    weights[:, 1] = weights[B - 2, 0] = (n - B + 1) / (n * (B - 1))
    return weights


@pytest.mark.parametrize("n", [B, B + 1, 60_000])
def test_stratified_sampling_equals_the_formula(backend, n):
    """Values and gradients of the paper's weights; each row of weights sums to 1."""
    x, *leaves = inputs()
    weights = paper_weights(n)
    torch.testing.assert_close(weights.sum(1), torch.ones(B, device=DEVICE, **WIDE))
    options = {"k": K, "dataset_size": n, "sampling": "stratified"}
    terms = found(x, *leaves, alpha=0.5, beta=3.0, gamma=0.7, terms=True, **options)
    log_likelihood, *parts = written_out(x, *leaves, weights=weights)
    bound = log_likelihood - 0.5 * parts[0] - 3.0 * parts[1] - 0.7 * parts[2]
    for got, expected in zip(_each(terms), (bound, log_likelihood, *parts), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-11)
    one = log_likelihood - 0.5 * (parts[0] + parts[2]) - 3.0 * parts[1]
    fused = found(x, *leaves, alpha=0.5, beta=3.0, gamma=0.5, reduction="none", **options)
    torch.testing.assert_close(fused, one, rtol=1e-11, atol=1e-11)
    for values in ((terms.bound, bound), (fused, one)):
        got, expected = (torch.autograd.grad(v.sum(), leaves, retain_graph=True) for v in values)
        for g, e in zip(got, expected, strict=True):
            torch.testing.assert_close(g, e, rtol=1e-10, atol=1e-10)


def test_the_first_example_has_the_published_codes_weights():
    """The published matrix has the paper's weights in its first row only."""
    n = 50
    x, *leaves = inputs()
    terms = found(x, *leaves, k=K, dataset_size=n, sampling="stratified", terms=True)
    parts = _each(terms)[1:]
    published = written_out(x, *leaves, weights=published_weights(n))
    for got, expected in zip(parts, published, strict=True):
        torch.testing.assert_close(got[0], expected[0], rtol=1e-11, atol=1e-11)
    assert not torch.allclose(parts[1][1:], published[1][1:], rtol=1e-2)


def test_sums_without_constants_differ_by_log_b():
    """Codes that leave out all constants, as PyTorch-VAE, differ from the default by multiples of log B."""
    x, *leaves = inputs()
    ours = _each(found(x, *leaves, k=K, terms=True))[2:]
    without = written_out(x, *leaves, weights=torch.ones(B, B, device=DEVICE, **WIDE))[1:]
    for got, expected, times in zip(ours, without, (1, D - 1, -D), strict=True):
        torch.testing.assert_close(got - expected, torch.full_like(got, times * math.log(B)))


@pytest.mark.parametrize("weight_of_all", [1.0, 0.3])
def test_equal_weights_give_the_monte_carlo_elbo_of_stratified_sampling(weight_of_all):
    x, *leaves = inputs()
    w = {name: weight_of_all for name in ("alpha", "beta", "gamma")}
    bound = found(x, *leaves, k=K, dataset_size=90, sampling="stratified", **w)
    expected = found(x, *leaves, k=K, **w)
    torch.testing.assert_close(bound, expected, rtol=1e-12, atol=1e-12)


def test_weights_given_as_tensors_or_unequal_give_the_same():
    """The pass for α = γ and the separate terms agree, also for a β of each example."""
    x, *leaves = inputs()
    beta = rand(B, seed=8, **WIDE) + 0.5
    alpha = torch.tensor(1.0, device=DEVICE, **WIDE)
    for one in (2.0, beta):
        fused, apart = (
            found(x, *leaves, k=K, beta=one, alpha=a, reduction="none", dataset_size=40) for a in (1.0, alpha)
        )
        torch.testing.assert_close(fused, apart, rtol=1e-12, atol=1e-12)
        gradients = (torch.autograd.grad(b.sum(), leaves) for b in (fused, apart))
        for got, expected in zip(*gradients, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_single_precision_is_accurate(backend):
    """Single precision is accurate to float32 roundings of log densities of some tens."""
    x, *leaves = inputs()
    expected = written_out(x, *leaves)
    terms = found(*(t.detach().float() for t in (x, *leaves)), k=K, beta=3.0, terms=True)
    assert terms.bound.dtype == torch.float32
    for got, wide in zip(_each(terms)[1:], expected, strict=True):
        torch.testing.assert_close(got.double(), wide.detach(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("n", [None, 500])
@pytest.mark.parametrize("weight_of_all", [1.0, 0.3])
def test_equal_weights_give_the_monte_carlo_elbo(weight_of_all, n):
    x, *leaves = inputs()
    w = weight_of_all
    bound = found(x, *leaves, k=K, alpha=w, beta=w, gamma=w, dataset_size=n)
    mu, logvar, weight = leaves
    elbo = fastvae.elbo(
        x, (mu, logvar), lambda z: z @ weight, likelihood="bernoulli", k=K, beta=w, kl="mc",
        generator=generator(5),
    )  # fmt: skip
    torch.testing.assert_close(bound, elbo, rtol=1e-12, atol=1e-12)
    gradients = (torch.autograd.grad(b, leaves) for b in (bound, elbo))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_the_size_of_the_data_set_changes_no_gradient():
    x, *leaves = inputs()
    one, many = (found(x, *leaves, dataset_size=n, terms=True) for n in (None, 700))
    moves = [1, D - 1, -D]
    for name, move in zip(PARTS, moves, strict=True):
        moved = getattr(many, name) - getattr(one, name)
        torch.testing.assert_close(
            moved, torch.full_like(moved, move * math.log(700)), rtol=1e-12, atol=1e-12
        )
    gradients = (torch.autograd.grad(t.bound.sum(), leaves) for t in (one, many))
    for got, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_terms_of_a_batch_of_all_data_equal_the_latents_report():
    x, mu, logvar, weight = (t.detach() for t in inputs())
    terms = found(x, mu, logvar, weight, terms=True)
    vae = fastvae.VAE(lambda x: (mu, logvar), nn.Linear(D, X).to(DEVICE), latent_dim=D, modules=[])
    report = fastvae.diagnostics.latents(vae, x, generator=generator(5))
    assert float(terms.mutual_information.mean()) == pytest.approx(report.mutual_information)
    assert float(terms.total_correlation.mean()) == pytest.approx(report.total_correlation)
    assert float(terms.dimension_kl.mean()) == pytest.approx(float(report.dimension_kl.sum()))


def test_a_report_is_the_same_whatever_the_batches():
    encoder = nn.Linear(X, 2 * D).to(DEVICE)
    vae = fastvae.VAE(encoder, nn.Linear(D, X).to(DEVICE))
    whole, parts = (
        fastvae.diagnostics.latents(vae, rand(B, X, seed=4), generator=generator(5), batch_size=size)
        for size in (B, 4)
    )
    for name in ("kl", *PARTS):
        torch.testing.assert_close(getattr(parts, name), getattr(whole, name))


@pytest.mark.parametrize("n", [None, 90])
@pytest.mark.parametrize("family", ["full", "low rank"])
def test_posteriors_with_covariances(family, n):
    """Marginals come from the covariance's diagonal; gradients reach the off-diagonal elements too."""
    x, mu, logvar, weight = inputs()
    if family == "full":
        factor = randn(B, D * (D + 1) // 2, seed=7, **WIDE).requires_grad_()
        q = FullNormal(mu, factor)
        scale = q._parts()[1]
        covariance = scale @ scale.mT
    else:
        factor = randn(B, D, 1, seed=7, **WIDE).requires_grad_()
        q = LowRankNormal(mu, logvar, factor)
        covariance = factor @ factor.mT + torch.diag_embed(logvar.exp())
    seed = fastvae.random.draw_seed(DEVICE, generator(5))
    z, _ = q.rsample_log_prob(1, seed)
    sampling = {} if n is None else {"sampling": "stratified", "dataset_size": n}
    terms = fastvae.beta_tc(
        x, q, lambda z: z @ weight, likelihood="bernoulli", generator=generator(5), terms=True, **sampling
    )
    log_weights = (
        (torch.full((B, B), 1 / B, **WIDE) if n is None else paper_weights(n).cpu()).log().to(DEVICE)
    )
    own = td.MultivariateNormal(mu, covariance)
    joint = torch.logsumexp(log_weights + own.log_prob(z[0][:, None]), 1)
    normal = td.Normal(mu, covariance.diagonal(dim1=1, dim2=2).sqrt())
    each = torch.logsumexp(log_weights[:, :, None] + normal.log_prob(z[0][:, None]), 1).sum(1)
    expected = own.log_prob(z[0]) - joint, joint - each, each - td.Normal(0.0, 1.0).log_prob(z[0]).sum(1)
    for got, part in zip(_each(terms)[2:], expected, strict=True):
        torch.testing.assert_close(got, part, rtol=1e-9, atol=1e-9)
    gradients = (
        torch.autograd.grad(t.sum(), (mu, factor), retain_graph=True)
        for t in (terms.total_correlation, expected[1])
    )
    for got, part in zip(*gradients, strict=True):
        torch.testing.assert_close(got, part, rtol=1e-8, atol=1e-8)


def test_options_of_other_objectives_are_accepted():
    """beta_tc takes reductions, weights of examples and terms, masks, contexts, spatial latents, priors."""
    x, mu, logvar, weight = inputs()
    each = found(x, mu, logvar, weight, reduction="none")
    torch.testing.assert_close(found(x, mu, logvar, weight), each.mean())
    torch.testing.assert_close(found(x, mu, logvar, weight, reduction="sum"), each.sum())
    for beta in (torch.tensor(6.0, device=DEVICE), torch.full((B,), 6.0, device=DEVICE)):
        torch.testing.assert_close(found(x, mu, logvar, weight, beta=beta, reduction="none"), each)
    mask = rand(B, X, seed=9) < 0.5
    masked = found(x, mu, logvar, weight, mask=mask, terms=True)
    torch.testing.assert_close(
        masked.total_correlation, found(x, mu, logvar, weight, terms=True).total_correlation
    )
    assert bool((masked.log_likelihood > found(x, mu, logvar, weight, terms=True).log_likelihood).all())
    context = randn(B, X, seed=10, **WIDE)
    moved = fastvae.beta_tc(
        x, (mu, logvar), lambda z, c: z @ weight + 0 * c, context=context, k=K, likelihood="bernoulli",
        generator=generator(5),
    )  # fmt: skip
    torch.testing.assert_close(moved, found(x, mu, logvar, weight, k=K))
    spatial = fastvae.beta_tc(
        x, (mu.unflatten(1, (1, 1, D)), logvar.unflatten(1, (1, 1, D))), lambda z: z.flatten(1) @ weight,
        likelihood="bernoulli", generator=generator(5),
    )  # fmt: skip
    torch.testing.assert_close(spatial, each.mean())
    prior = DiagonalNormal(*(nn.Parameter(torch.zeros(D, device=DEVICE, **WIDE)) for _ in range(2)))
    bound = found(x, mu, logvar, weight, prior=prior)
    torch.testing.assert_close(bound, each.mean())
    assert bool((torch.autograd.grad(bound, prior.mu)[0] != 0).all())


def test_beta_tc_of_a_vae():
    x, mu, logvar, weight = (t.detach() for t in inputs())
    decoder = nn.Linear(D, X, bias=False).to(DEVICE, torch.float64)
    decoder.weight.data = weight.T
    vae = fastvae.VAE(lambda x: (mu, logvar), decoder, likelihood="bernoulli", modules=[])
    for call in (vae.beta_tc, lambda x, **o: vae(x, objective="beta_tc", **o)):
        torch.testing.assert_close(
            call(x, beta=2.0, generator=generator(5)), found(x, mu, logvar, weight, beta=2.0)
        )


def test_compiled_and_differentiated_by_func():
    torch._dynamo.reset()
    x, mu, logvar, weight = (t.detach().float() for t in inputs())

    def bound(mu, logvar):
        return fastvae.beta_tc(x, (mu, logvar), lambda z: z @ weight, likelihood="bernoulli", k=K)

    def at_seed(function):
        torch.manual_seed(3)
        return function(mu, logvar)

    compiled = torch.compile(bound, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(at_seed(compiled), at_seed(bound))
    mu.requires_grad_()
    expected = torch.autograd.grad(at_seed(bound), mu)[0]
    torch.testing.assert_close(torch.autograd.grad(at_seed(compiled), mu)[0], expected)
    mu = mu.detach()
    torch.testing.assert_close(at_seed(torch.func.grad(bound)), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_equal_examples_have_no_information(dtype):
    """Equal examples have q(z) = q(z|x), also if z's rounding is as large as its deviation; report too."""
    mu = torch.full((2, D), 3.0, dtype=dtype, device=DEVICE)
    logvar = torch.full((2, D), -9.0, dtype=dtype, device=DEVICE)
    x, weight = rand(2, X, seed=4), randn(D, X, seed=3).to(dtype)
    terms = found(x, mu, logvar, weight, k=50, terms=True)
    # Float32 roundings of log densities of some tens.
    torch.testing.assert_close(terms.mutual_information, torch.zeros(2, device=DEVICE), rtol=0, atol=2e-5)
    torch.testing.assert_close(terms.total_correlation, torch.zeros(2, device=DEVICE), rtol=0, atol=2e-5)
    vae = fastvae.VAE(lambda x: (mu, logvar), nn.Linear(D, X).to(DEVICE, dtype), latent_dim=D, modules=[])
    assert fastvae.diagnostics.latents(vae, x).mutual_information == pytest.approx(0, abs=2e-5)


def test_an_empty_batch():
    q = torch.zeros(0, 2 * D, device=DEVICE, requires_grad=True)
    terms = fastvae.beta_tc(
        torch.zeros(0, X, device=DEVICE),
        q,
        lambda z: z @ z.new_ones(D, X),
        terms=True,
        likelihood="bernoulli",
        k=K,
    )
    assert all(t.shape == (0,) for t in _each(terms)) and terms.z.shape == (K, 0, D)
    terms.bound.sum().backward()
    assert q.grad.shape == q.shape


def _call(**options):
    x, mu, logvar, weight = inputs()
    options = {"likelihood": "bernoulli", "q": (mu, logvar), **options}
    return lambda: fastvae.beta_tc(x, options.pop("q"), lambda z: z @ weight, **options)


ROWS = torch.zeros(B, D, device=DEVICE, **WIDE)
WRONG = {
    "a q that is not normal": (_call(q=Laplace(ROWS, ROWS)), ValueError, "marginal.*q is Laplace"),
    "a flow's prior of each example": (
        _call(prior=Flow(lambda c: td.Independent(td.Normal(c.expand(-1, D), 1.0), 1), ROWS[:, :1])),
        ValueError,
        "needs one prior for all examples",
    ),
    "a prior of each example": (
        _call(prior=DiagonalNormal(ROWS, ROWS)),
        ValueError,
        "needs one prior for all examples",
    ),
    "a negative weight": (
        _call(gamma=-1.0),
        ValueError,
        "gamma must be finite and at least 0.*dimensions' KL",
    ),
    "weights of other rows": (_call(beta=ROWS), ValueError, r"beta has shape \[6, 3\].*total correlation"),
    "a data set without examples": (_call(dataset_size=0), ValueError, "dataset_size must be at least 1"),
    "another sampling": (
        _call(sampling="strata"),
        ValueError,
        "sampling='strata' is unknown; known: 'weighted', 'stratified'",
    ),
    "strata without the data set's size": (
        _call(sampling="stratified"),
        ValueError,
        r"needs dataset_size.*len\(dataset\)",
    ),
    "strata of a smaller data set": (
        _call(sampling="stratified", dataset_size=B - 1),
        ValueError,
        "dataset_size is 5, less than the 6",
    ),
    "strata of one example": (
        lambda: fastvae.beta_tc(
            ROWS[:1],
            (ROWS[:1], ROWS[:1]),
            lambda z: z,
            sampling="stratified",
            dataset_size=9,
            likelihood="bernoulli",
        ),
        ValueError,
        "at least two examples.*drop_last=True",
    ),
    "no samples": (_call(k=0), ValueError, "k must be at least 1"),
    "another reduction": (_call(reduction="max"), ValueError, "reduction='max' is unknown"),
    "an address below 0": (_call(row_offset=-1), ValueError, "did you mean shared_noise=True"),
}


@pytest.mark.parametrize("name", WRONG)
def test_mistakes(name):
    call, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        call()
