"""shared_noise=True: every example takes the noise of row 0, and differences know their error."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae import distributions, random

from .cases import DEVICE
from .models import LinearGaussian

B, D, X, K = 6, 5, 9, 7


def _seeded() -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(11)


def _families():
    """Return a function of (mu, logvar), [B, D] each, for each family of q that draws fastvae's noise."""
    tril = torch.zeros(D * (D + 1) // 2, device=DEVICE)
    return {
        "diagonal": lambda mu, logvar: (mu, logvar),
        "full": lambda mu, logvar: distributions.FullNormal(mu, tril.expand(len(mu), -1) - 0.5),
        "low rank": lambda mu, logvar: distributions.LowRankNormal(mu, logvar, 0.3 * mu[:, :, None]),
        "laplace": lambda mu, logvar: distributions.Laplace(mu, logvar),
        "student": lambda mu, logvar: distributions.StudentT(mu, logvar, torch.full_like(mu, 1.5)),
        "mixture": lambda mu, logvar: distributions.Mixture(
            [distributions.DiagonalNormal(mu, logvar), distributions.DiagonalNormal(-mu, logvar)],
            torch.zeros(len(mu), 2, device=DEVICE),
        ),
        "torch's": lambda mu, logvar: td.Independent(td.Normal(mu, logvar.exp()), 1),
    }


def _assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # On a GPU the program of another shape may round the transform of the same words differently.
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-5 if actual.is_cuda else 0)


@pytest.mark.parametrize("qmc", [False, True])
def test_all_rows_have_the_noise_of_row_0(backend, qmc):
    """Normals of B rows equal those of one, for any number of columns and samples, on every backend."""
    seed = torch.arange(3, device=DEVICE) if qmc else torch.tensor(5, device=DEVICE)
    for columns in (1, 6, 130, 700):
        shared = random.normal(seed, K, B, columns, sample_offset=2, row_offset=-1)
        one = random.normal(seed, K, 1, columns, sample_offset=2)
        _assert_equal(shared, one.expand(K, B, columns))
    shared = random.normal(seed, K, B, 6, row_offset=-1, level=2)
    _assert_equal(shared[:, 3], random.normal(seed, K, 1, 6, level=2)[:, 0])


@pytest.mark.parametrize("family", list(_families()))
@pytest.mark.parametrize("objective", ["iwae", "elbo", "mc", "dreg", "qmc", "chunks"])
def test_equal_examples_get_equal_bounds(backend, family, objective):
    """Copies of an example get the same bound and gradient, which without shared noise they do not."""
    torch.manual_seed(3)
    decoder = nn.Linear(D, X, device=DEVICE)
    x = torch.rand(1, X, device=DEVICE).round().repeat(B, 1)
    options = {
        "iwae": {"k": K},
        "elbo": {},
        "mc": {"kl": "mc", "k": 3},
        "dreg": {"k": K, "estimator": "dreg"},
        "qmc": {"k": K, "noise": "qmc"},
        "chunks": {"k": K, "k_chunk": 3},
    }[objective]
    if family == "mixture" and objective == "dreg":
        return  # refused for strata
    function = fastvae.elbo if objective in ("elbo", "mc") else fastvae.iwae

    def bound(shared: bool):
        mu, logvar = (torch.randn(1, D, device=DEVICE).repeat(B, 1).requires_grad_() for _ in range(2))
        q = _families()[family](mu, 0.1 * logvar)
        values = function(
            x, q, decoder, likelihood="bernoulli", reduction="none", shared_noise=shared, **options
        )
        return values, torch.autograd.grad(values.sum(), mu)[0]

    values, grads = bound(True)
    # A row's rounding may depend on its place in a tile or a product.
    for result in (values, grads):
        scale = 1 + result.abs().max().item()
        assert (result - result[0]).abs().max().item() <= 1e-5 * scale
    values, _ = bound(False)
    assert (values - values[0]).abs().max().item() > 1e-3


def test_row_0_has_the_noise_that_it_has_alone():
    """The first example's results do not change, and those of the others are theirs in row 0."""
    decoder, x = nn.Linear(D, X, device=DEVICE), torch.rand(B, X, device=DEVICE).round()
    mu, logvar = torch.randn(2, B, D, device=DEVICE)
    options = {"likelihood": "bernoulli", "k": 50}
    shared = fastvae.log_marginal(x, (mu, logvar), decoder, shared_noise=True, generator=_seeded(), **options)
    for i in range(B):
        row = slice(i, i + 1)
        q = mu[row], logvar[row]
        alone = fastvae.log_marginal(x[row], q, decoder, generator=_seeded(), **options)
        torch.testing.assert_close(shared.log_px[row], alone.log_px, rtol=1e-5, atol=1e-5)
    for function in (fastvae.log_weights, fastvae.beta_tc, fastvae.reconstruction_log_prob):
        function(x, (mu, logvar), decoder, k=4, likelihood="bernoulli", shared_noise=True)


def _model():
    torch.manual_seed(2)
    vae = fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), likelihood="bernoulli").to(DEVICE)
    wild = torch.rand(1, X, device=DEVICE).round()
    mutants = wild.repeat(X + 1, 1)
    mutants[range(1, X + 1), range(X)] = 1 - mutants[range(1, X + 1), range(X)]
    return vae, mutants


def _evaluate(vae, data, seed=0, **options):
    generator = torch.Generator(DEVICE).manual_seed(seed)
    options = {"k": 320, "shared_noise": True, "progress": False, **options}
    return vae.evaluate(data, generator=generator, **options)


@pytest.mark.parametrize("options", [{}, {"noise": "qmc"}, {"proposal": "defensive"}, {"tol": 0.05}])
def test_the_error_of_differences(options):
    """Over seeds, delta's standard error is the spread of its value, and below that of independent draws."""
    vae, mutants = _model()
    runs = [_evaluate(vae, mutants, seed, **options).delta(0) for seed in range(60)]
    values, stderr = (torch.stack([r[i] for r in runs])[:, 1:] for i in range(2))
    spread = values.std(0)
    # A variance of 60 values has a relative error of √(2/59) = 0.18; the mean over nine mutants less.
    ratio = (stderr.square().mean(0) / spread.square()).log().mean().exp().item()
    assert 0.6 < ratio < 1.7
    if not options:
        apart = torch.stack([_evaluate(vae, mutants, s, shared_noise=False).log_px for s in range(60)])
        assert spread.mean().item() < 0.6 * (apart[:, 1:] - apart[:, :1]).std(0).mean().item()


def test_the_error_of_the_mean_includes_the_covariance():
    """Errors of shared noise do not average out: mc_stderr is the spread over seeds of the NLL."""
    vae, mutants = _model()
    runs = [_evaluate(vae, mutants, seed) for seed in range(60)]
    spread = torch.tensor([r.nll for r in runs]).std().item()
    said = math.sqrt(sum(r.mc_stderr**2 for r in runs) / len(runs))
    assert 0.7 < said / spread < 1.4
    independent = float(runs[0].log_px_stderr.square().sum().sqrt()) / len(mutants)
    assert said > 1.3 * independent
    low, high = runs[0].nll_interval
    assert high - low >= 2 * runs[0].mc_stderr


def test_the_error_of_the_mean_of_nearly_equal_weights():
    """Groups of draws are compared with their coefficients, which differ for an adapted proposal."""
    model = LinearGaussian(2, 5)

    def encoder(x):
        mu, logvar = model.posterior(x)
        return mu, logvar + 0.003

    vae = fastvae.VAE(encoder, model.decoder, likelihood=model.likelihood, modules=[])
    x = model.sample(6)
    runs = [_evaluate(vae, x, seed, proposal="adapted") for seed in range(60)]
    spread = torch.tensor([r.nll for r in runs]).std().item()
    said = math.sqrt(sum(r.mc_stderr**2 for r in runs) / len(runs))
    assert 0.7 < said / spread < 1.4


def test_delta_of_two_models_and_of_a_reference():
    vae, mutants = _model()
    other = fastvae.VAE(vae.encoder, nn.Linear(D, X).to(DEVICE), likelihood="bernoulli")
    first, second = _evaluate(vae, mutants), _evaluate(other, mutants)
    difference = first.delta(second)
    torch.testing.assert_close(difference.value, first.log_px - second.log_px)
    assert bool((difference.stderr > 0).all())
    alone = _evaluate(vae, mutants[:1])
    torch.testing.assert_close(first.delta(alone).value, first.delta(0).value, rtol=0, atol=1e-5)
    torch.testing.assert_close(first.delta(alone).stderr, first.delta(0).stderr, rtol=1e-3, atol=1e-5)
    assert float(first.delta(0).stderr[0]) == 0


def test_batches_chunks_and_files_change_nothing(tmp_path):
    vae, mutants = _model()
    whole = _evaluate(vae, mutants)
    parts = _evaluate(vae, mutants, batch_size=3, k_chunk=64, checkpoint=tmp_path / "run.npz")
    again = _evaluate(vae, mutants, batch_size=3, checkpoint=tmp_path / "run.npz")
    for other in (parts, again):
        torch.testing.assert_close(other.log_px, whole.log_px, rtol=0, atol=1e-5)
        torch.testing.assert_close(other.left_out, whole.left_out, rtol=0, atol=1e-5)
    with pytest.raises(ValueError, match="shared_noise"):
        _evaluate(vae, mutants, batch_size=3, checkpoint=tmp_path / "run.npz", shared_noise=False)
    whole.save(tmp_path / "result.npz")
    loaded = fastvae.Evaluation.load(tmp_path / "result.npz")
    assert torch.equal(loaded.delta(0).stderr, whole.delta(0).stderr)
    assert "the same for all" in str(loaded)


def test_few_draws():
    """Each draw is a group if there are fewer draws than groups; a single draw has no error."""
    vae, mutants = _model()
    few = _evaluate(vae, mutants, k=5)
    assert few.left_out.shape == (5, len(mutants)) and bool(few.delta(1).stderr.isfinite().all())
    one = _evaluate(vae, mutants, k=1)
    assert bool(one.delta(0).stderr.isnan().all())


def test_what_is_refused():
    vae, mutants = _model()
    q, decoder = torch.zeros(B, 2 * D, device=DEVICE), nn.Linear(D, X, device=DEVICE)
    x = torch.rand(B, X, device=DEVICE)
    with pytest.raises(ValueError, match="leave row_offset out"):
        fastvae.elbo(x, q, decoder, likelihood="bernoulli", row_offset=B, shared_noise=True)
    with pytest.raises(ValueError, match="did you mean shared_noise=True"):
        fastvae.iwae(x, q, decoder, likelihood="bernoulli", row_offset=-1)
    with pytest.raises(TypeError, match="shared_noise must be True or False, got 1"):
        fastvae.iwae(x, q, decoder, likelihood="bernoulli", shared_noise=1)
    gamma = td.Independent(td.Gamma(torch.ones(B, D, device=DEVICE), torch.ones(B, D, device=DEVICE)), 1)
    prior = td.Independent(td.Gamma(torch.ones(D, device=DEVICE), torch.ones(D, device=DEVICE)), 1)
    with pytest.raises(ValueError, match="shared_noise=True needs a q that is a function of fastvae's noise"):
        fastvae.elbo(x, gamma, decoder, likelihood="bernoulli", prior=prior, shared_noise=True)
    plain = _evaluate(vae, mutants, shared_noise=False)
    shared = _evaluate(vae, mutants)
    with pytest.raises(ValueError, match="this evaluation was not computed with shared_noise=True"):
        plain.delta(0)
    with pytest.raises(ValueError, match="reference was not computed"):
        shared.delta(plain)
    with pytest.raises(ValueError, match="has 2 examples; expected 1, or 10"):
        shared.delta(_evaluate(vae, mutants[:2]))
    with pytest.raises(ValueError, match="use the same noise="):
        shared.delta(_evaluate(vae, mutants, noise="qmc"))
    with pytest.raises(IndexError, match="reference is 10, but there are 10 examples"):
        shared.delta(10)
    with pytest.raises(TypeError, match="index of an example or another Evaluation, got str"):
        shared.delta("x")
