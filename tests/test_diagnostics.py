"""Diagnostics of an evaluation, other than log p(x), from known log weights."""

from __future__ import annotations

import math
import warnings

import numpy as np
import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal, Distribution
from fastvae.estimation.pareto import pareto_khat
from fastvae.likelihoods import Gaussian, Likelihood

from .conftest import DEVICE
from .models import LinearGaussian, evaluate_parts, generator, randn

N, D, X = 23, 3, 7
QUIET = {"progress": False}


class Given(Likelihood):
    """Likelihood that takes log p(x|z) from a table, by draw and example (x's first pixel is its index)."""

    def __init__(self, table):
        super().__init__()
        self.register_buffer("table", table)
        self.drawn = 0

    def log_likelihood(self, x, parameters, samples, conditioning=None):
        start, self.drawn = self.drawn, self.drawn + samples
        return self.table[start : start + samples, x[:, 0].long()]


def _evaluate_table(table, **options):
    """Evaluate log weights [K, N] in one batch; q is the prior, so they are the log-likelihoods."""
    k, n = table.shape
    zeros = torch.zeros(n, D, dtype=table.dtype, device=DEVICE)
    x = torch.arange(n, device=DEVICE, dtype=table.dtype)[:, None]
    options = {"k": k, "batch_size": n, **QUIET, **options}
    return evaluate_parts(
        lambda x: (zeros[: len(x)], zeros[: len(x)]), nn.Identity(), x, likelihood=Given(table), **options
    )


@pytest.mark.parametrize("k_chunk", [None, 600])
def test_sums_of_float32_weights_are_kept_in_float64(k_chunk):
    """Sums of 20 000 weights, and means of log weights near −1000, are accurate to float64."""
    k, n = 20_000, 6
    table = (randn(k, n, seed=1) - 1000).float()
    result = _evaluate_table(table, k_chunk=k_chunk)
    wide = table.double().cpu()
    w = torch.softmax(wide, 0)
    expected = {
        "log_px": torch.logsumexp(wide, 0) - math.log(k),
        "elbo": wide.mean(0),
        "ess": 1 / w.square().sum(0),
        "log_px_stderr": ((w.square().sum(0) - 1 / k) * k / (k - 1)).sqrt(),
    }
    for name, value in expected.items():
        assert getattr(result, name).dtype == torch.float64
        torch.testing.assert_close(getattr(result, name), value, rtol=1e-12, atol=0)
    assert result.nll == pytest.approx(-float(expected["log_px"].mean()), rel=1e-14)


def test_converged_and_invalid_examples_stop_drawing():
    """Examples with infinite density, NaN or equal weights stop drawing; others continue."""

    class ByExample(Likelihood):
        """Likelihood that depends on the example's index, its first pixel, and on z."""

        def log_likelihood(self, x, parameters, samples, conditioning=None):
            z = parameters.reshape(samples, len(x), D)[..., 0]
            kinds = [
                0 * z,
                torch.where(z > 0, math.inf, z),
                torch.where(z > 0, math.nan, z),
                3 * z,
                z - math.inf,
            ]
            return torch.stack(kinds, 2).gather(2, x[:, :1].long().expand(samples, -1, 1))[..., 0]

    zeros = torch.zeros(5, D, dtype=torch.float64, device=DEVICE)
    x = torch.arange(5, device=DEVICE, dtype=torch.float64)[:, None]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = evaluate_parts(
            lambda x: (zeros, zeros), nn.Identity(), x, likelihood=ByExample(), k=800, tol=0.01, **QUIET
        )
    assert result.k.tolist() == [100, 100, 100, 800, 800]
    assert result.log_px[1] == math.inf and result.log_px[4] == -math.inf and bool(result.log_px[2].isnan())
    # Quantiles are taken over the examples with a finite ESS.
    assert all(math.isfinite(q) for q in result.ess_quantiles)


def test_every_point_of_the_curve_has_its_mean_and_error():
    k, n = 1000, 40
    table = 2 * randn(k, n, seed=3, dtype=torch.float64) + randn(n, seed=4, dtype=torch.float64)
    result = _evaluate_table(table)
    assert [point[0] for point in result.curve] == [1, 10, 100, 1000]
    for draws, nll, error in result.curve:
        bound = torch.logsumexp(table[:draws], 0) - math.log(draws)
        assert nll == pytest.approx(-float(bound.mean()), rel=1e-12)
        assert error == pytest.approx(float(bound.std()) / math.sqrt(n), rel=1e-12)
    assert result.stderr == result.curve[-1][2]
    assert len({error for *_, error in result.curve}) == 4


@pytest.mark.parametrize("batch_size", [N, 5])
def test_kl_per_dim_uses_the_prior_of_the_model(batch_size):
    model = LinearGaussian(D, X)
    x = model.sample(N)
    prior = td.Normal(
        randn(D, seed=5, dtype=torch.float64), 0.5 + randn(D, seed=6, dtype=torch.float64).abs()
    )
    result = evaluate_parts(
        model.posterior, model.decoder, x, k=9, likelihood=model.likelihood, prior=prior,
        batch_size=batch_size, **QUIET,
    )  # fmt: skip
    mu, logvar = model.posterior(x)
    expected = td.kl_divergence(td.Normal(mu, torch.exp(0.5 * logvar)), prior).mean(0)
    torch.testing.assert_close(result.kl_per_dim, expected.cpu(), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("batch_size", [2, 3, 5])
def test_active_units_use_the_unbiased_variance(batch_size):
    """Variances are unbiased: over five examples, division by n would give less than the threshold.

    Batches do not matter.
    """
    unit = torch.tensor([-1.0, 1.0, 0.0, 0.0, 0.0], device=DEVICE, dtype=torch.float64)
    # Unbiased variances: 0.5 s^2 = 0.0101, 0.0099 and 0; divided by five, 0.0081 and less.
    scale = torch.tensor([math.sqrt(0.0202), math.sqrt(0.0198), 0.0], device=DEVICE, dtype=torch.float64)
    x = (7 + unit)[:, None]
    result = evaluate_parts(
        lambda x: ((x - 7) * scale + 100, torch.zeros(len(x), 3, dtype=x.dtype, device=DEVICE)),
        nn.Identity(), x.expand(5, 3), k=2, likelihood=Gaussian(1.0), batch_size=batch_size, **QUIET,
    )  # fmt: skip
    assert result.active_units == 1


def test_units_that_vary_only_between_batches_are_active():
    """A unit constant within each batch but not between them is active, with batches of unequal sizes."""
    levels = torch.tensor([0.0] * 5 + [0.5] * 2, device=DEVICE)
    x = levels[:, None].expand(7, D)
    options = {"k": 2, "likelihood": Gaussian(1.0), **QUIET}
    # Five times 0 and twice s have variance 0.238 s^2; about the mean of the batches' means, 0.292 s^2.
    less = x / 0.5 * math.sqrt(0.038)
    for batches, active in (([x[:5], x[5:]], D), ([x[:5], x[:2]], 0), ([less[:5], less[5:]], 0)):
        result = evaluate_parts(lambda x: (x, torch.zeros_like(x)), nn.Identity(), batches, **options)
        assert result.active_units == active


def test_a_tail_of_four_is_not_fitted():
    """k̂ is +inf if fewer than five draws lie above the rest, which underflows."""
    for above, finite in ((4, False), (5, True)):
        log_w = torch.full((100, 1), -900.0, dtype=torch.float64, device=DEVICE)
        log_w[:above, 0] = -torch.arange(above, dtype=torch.float64)
        found = float(pareto_khat(log_w))
        assert math.isfinite(found) if finite else found == math.inf
        result = _evaluate_table(log_w)
        assert float(result.khat[0]) == found


def test_defaults():
    """The defaults are 5000 draws, with a tolerance at most 100 000, and batches of 100."""
    sizes = []

    def encoder(x):
        sizes.append(len(x))
        return torch.zeros(len(x), 1, device=DEVICE), torch.zeros(len(x), 1, device=DEVICE)

    x = torch.linspace(0, 4, 101, device=DEVICE)[:, None]
    options = {"likelihood": Gaussian(1.0), **QUIET}
    assert set(evaluate_parts(encoder, nn.Identity(), x, **options).k.tolist()) == {5000}
    assert sizes == [100, 1]
    result = evaluate_parts(encoder, nn.Identity(), x[:1], tol=1e-9, **options)
    assert result.k.tolist() == [100_000]


def test_printed_results():
    model = LinearGaussian(D, X)
    x = model.sample(N)
    result = evaluate_parts(
        lambda x: model.posterior(x, 0.4, 0.3), model.decoder, x, k=500, likelihood=model.likelihood, **QUIET
    )
    gap = float((result.log_px - result.elbo).mean())
    assert gap > 0
    assert f"ELBO           {float(result.elbo.mean()):.2f} nats, {gap:.2f} below log p(x)" in str(result)
    assert f"bits           {result.bits_per_dim:.4f} per dimension, of {X}" in str(result)
    assert f"KL {float(result.kl_per_dim.sum()):.2f} nats" in str(result)
    assert f"median {float(result.khat.nanmedian()):.2f}; above 0.7 for" in str(result)
    few = evaluate_parts(model.posterior, model.decoder, x, k=20, likelihood=model.likelihood, **QUIET)
    assert "unknown; it takes 21 draws" in str(few)
    assert few.khat.isnan().all()
    one = evaluate_parts(model.posterior, model.decoder, x, k=1, likelihood=model.likelihood, **QUIET)
    assert "nan" not in str(one)
    assert "(one draw does not tell its error)" in str(one)
    x[0, 0] = math.nan
    options = {"likelihood": model.likelihood, **QUIET}
    with pytest.warns(RuntimeWarning, match="log p.x. is NaN for 1 of 1"):
        nothing = evaluate_parts(model.posterior, model.decoder, x[:1], k=30, **options)
    assert "Pareto k-hat   unknown\n" in str(nothing)
    x[0] = 1e30
    with pytest.warns(RuntimeWarning, match="log p.x. is -inf for 1 of 1"):
        zero = evaluate_parts(
            lambda x: model.posterior(torch.zeros_like(x)), model.decoder, x[:1], k=30,
            likelihood=fastvae.likelihoods.from_distribution(
                lambda z: td.Uniform(z[:, :1].expand(-1, X) - 1, z[:, :1].expand(-1, X) + 1, False)
            ), **QUIET,
        )  # fmt: skip
    assert "-inf           1 example, with weights that are all 0" in str(zero)
    # A share is printed as the same number everywhere.
    many = evaluate_parts(lambda x: model.posterior(x, 2.0, -2.0), model.decoder, x[1:], k=100, **options)
    share = f"above 0.7 for {100 * many.untrusted:.1f} % of the examples"
    assert many.untrusted > 0.1
    assert str(many).count(share) == 2


def test_unknown_quantities_are_omitted_from_the_file(tmp_path):
    """Unknown quantities are omitted from the file, and the rest is read without pickle."""

    class Bare(Distribution):
        def __init__(self, mu, logvar):
            super().__init__()
            self.inner = DiagonalNormal(mu, logvar)
            self.batch, self.device = self.inner.batch, self.inner.device

        def rsample_log_prob(self, samples, seed, **place):
            return self.inner.rsample_log_prob(samples, seed, **place)

    model = LinearGaussian(D, X)
    result = evaluate_parts(
        lambda x: Bare(*model.posterior(x)), model.decoder, model.sample(N), k=9, likelihood=model.likelihood,
        **QUIET,
    )  # fmt: skip
    assert result.active_units is None and result.kl_per_dim is None
    result.save(tmp_path / "result.npz")
    with np.load(tmp_path / "result.npz", allow_pickle=False) as saved:
        assert {"active_units", "kl_per_dim"}.isdisjoint(saved.files)
        for name in saved.files:
            assert saved[name].dtype != object
        assert np.array_equal(saved["khat"], result.khat.numpy(), equal_nan=True)


def test_read_only_arrays_are_accepted():
    model = LinearGaussian(D, X)
    x = model.sample(N)
    array = x.cpu().numpy().copy()
    array.flags.writeable = False
    run = lambda data, encoder: evaluate_parts(  # noqa: E731
        encoder, model.decoder, data, k=9, likelihood=model.likelihood, generator=generator(7), **QUIET
    )
    encoder = nn.Module()
    encoder.anchor = nn.Parameter(torch.zeros(1, device=DEVICE))
    encoder.forward = model.posterior
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        got = run(array, encoder)
    torch.testing.assert_close(got.log_px, run(x, encoder).log_px, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("entry", ["inference_gaps", "refine", "ais", "bdmc", "evaluate", "latents"])
def test_estimates_are_of_the_model_in_eval_mode(entry):
    """A model in training mode gives the numbers of eval mode, keeps its buffers, and stays in that mode."""
    torch.manual_seed(0)

    def norm(n, m, hidden):
        layers = [nn.Linear(n, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Dropout(0.3)]
        return nn.Sequential(*layers, nn.Linear(hidden, m))

    vae = fastvae.VAE(norm(7, 6, 11), norm(3, 7, 13), likelihood="bernoulli", latent_dim=3).to(DEVICE)
    x = torch.rand(5, 7, device=DEVICE).round()
    vae.elbo(x)  # the running statistics differ from those of a batch
    vae.decoder[1].eval()
    diagnostics = fastvae.diagnostics
    run = {
        "inference_gaps": lambda **o: diagnostics.inference_gaps(vae, x, k=80, **o).inference,
        "refine": lambda **o: vae.refine(x, **o).mu,
        "ais": lambda **o: vae.ais(x, k=4, steps=6, **o).log_px,
        "bdmc": lambda **o: vae.bdmc(n=6, k=4, steps=6, **o).lower,
        "evaluate": lambda **o: vae.evaluate(x, k=80, proposal="refined", progress=False, **o).log_px,
        "latents": lambda **o: torch.as_tensor(diagnostics.latents(vae, x, **o).kl),
    }[entry]
    state = {name: value.clone() for name, value in vae.state_dict().items()}
    modes = [module.training for module in vae.modules()]
    found = run(generator=torch.Generator(DEVICE).manual_seed(3))
    assert [module.training for module in vae.modules()] == modes
    assert all(torch.equal(value, state[name]) for name, value in vae.state_dict().items())
    vae.eval()
    assert torch.equal(found, run(generator=torch.Generator(DEVICE).manual_seed(3)))
