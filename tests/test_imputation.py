"""Missing elements, reconstructions and scores of elements: against exact models and plain formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae import likelihoods
from fastvae.core.nested import where_observed
from fastvae.distributions import Laplace, Mixture
from fastvae.likelihoods.read import as_likelihood

from .cases import DEVICE

B, D, X, K = 5, 3, 7, 60


class LinearGaussian:
    """Model z ~ N(0, I), x ~ N(W z + b, s²): p(x_m | x_o) is Gaussian; q is the exact p(z | x_o), widened."""

    def __init__(self, scale: float = 0.5, wide: float = 1.2):
        generator = torch.Generator().manual_seed(4)
        self.w = torch.randn(X, D, generator=generator).to(DEVICE)
        self.b = torch.randn(X, generator=generator).to(DEVICE)
        self.scale, self.wide = scale, wide

    def vae(self, mask: torch.Tensor) -> fastvae.VAE:
        def encode(x):
            precision = (
                torch.eye(D, device=DEVICE)
                + torch.einsum("bx,xi,xj->bij", mask.float(), self.w, self.w) / self.scale**2
            )
            mean = torch.linalg.solve(precision, ((x - self.b) * mask) @ self.w / self.scale**2)
            variance = torch.linalg.inv(precision).diagonal(dim1=1, dim2=2) * self.wide
            return mean, variance.log()

        def decode(z):
            return z @ self.w.T + self.b

        return fastvae.VAE(encode, decode, likelihood=likelihoods.Gaussian(scale=self.scale), modules=[])

    def conditional(self, x: torch.Tensor, mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return mean and covariance of the missing elements of one example."""
        total = self.w @ self.w.T + self.scale**2 * torch.eye(X, device=DEVICE)
        o, m = mask.nonzero()[:, 0], (~mask).nonzero()[:, 0]
        gain = torch.linalg.solve(total[o][:, o], total[o][:, m]).T
        return self.b[m] + gain @ (x[o] - self.b[o]), total[m][:, m] - gain @ total[o][:, m]


def _generator(seed: int = 0) -> torch.Generator:
    return torch.Generator(DEVICE).manual_seed(seed)


def _data() -> tuple[torch.Tensor, torch.Tensor]:
    mask = torch.rand(B, X, generator=_generator(1), device=DEVICE) > 0.4
    mask[:, 0], mask[:, 1] = True, False
    return torch.randn(B, X, generator=_generator(2), device=DEVICE), mask


def test_imputed_means_and_draws_are_those_of_the_exact_conditional():
    """Means within five standard errors; draws have the conditional's mean and covariance."""
    model, (x, mask) = LinearGaussian(), _data()
    hidden = torch.where(mask, x, math.nan)
    k, n = 20_000, 4_000
    found = model.vae(mask).impute(hidden, mask, k=k, draws=n, generator=_generator())
    assert torch.equal(found.mean[mask], x[mask])
    assert bool((found.draws == x)[:, mask].all())
    assert bool((found.ess > 0.2 * k).all()) and bool((found.khat < 0.7).all())
    for i in range(B):
        mean, covariance = model.conditional(x[i], mask[i])
        deviation = covariance.diagonal().sqrt()
        error = (found.mean[i, ~mask[i]] - mean).abs() / deviation
        assert float(error.max()) < 5 / math.sqrt(0.2 * k)
        drawn = found.draws[:, i, ~mask[i]]
        assert float(((drawn.mean(0) - mean).abs() / deviation).max()) < 5 / math.sqrt(n) + 0.03
        # A covariance of n draws has a relative error of at most √(2/n) of the deviations' product.
        scale = deviation[:, None] * deviation
        assert float(((torch.cov(drawn.T).reshape(scale.shape) - covariance).abs() / scale).max()) < 0.15


def test_chunks_change_nothing_but_rounding():
    model, (x, mask) = LinearGaussian(), _data()
    vae = model.vae(mask)
    whole, parts = (
        vae.impute(x, mask, k=K, draws=4, k_chunk=chunk, generator=_generator()) for chunk in (None, 7)
    )
    for a, b in zip(whole, parts, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("likelihood", "impossible"), [("bernoulli", -math.inf), ("poisson", 100.0)])
@pytest.mark.parametrize("k_chunk", [1, 3, 300])
def test_draws_of_weight_0_do_not_count(likelihood, impossible, k_chunk):
    """They may be a whole chunk, and their means infinite."""

    class Decoder(nn.Module):
        def forward(self, z):
            return torch.where(z[:, :1] > 0, impossible, torch.zeros(len(z), X, device=z.device))

    x, mask = torch.ones(B, X, device=DEVICE), torch.arange(X, device=DEVICE).expand(B, X) < X - 2
    model = fastvae.VAE(nn.Linear(X, 2 * D).to(DEVICE), Decoder(), likelihood=likelihood)
    found = model.impute(x, mask, k=300, k_chunk=k_chunk, generator=_generator())
    expected = 0.5 if likelihood == "bernoulli" else 1.0
    torch.testing.assert_close(found.mean[:, -2:], torch.full((B, 2), expected, device=DEVICE))


def test_imputation_by_the_formula(backend):
    """The mean is the softmax of the log weights, times the decoder's means."""
    encoder, decoder = nn.Linear(X, 2 * D, device=DEVICE), nn.Linear(D, X, device=DEVICE)
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli")
    x, mask = _data()
    x = (x > 0).float()
    seen = torch.where(mask, x, 0.25)
    found = vae.impute(x, mask, k=K, fill=0.25, generator=_generator())
    kept = []

    def keeping(z):
        kept.append(decoder(z))
        return kept[-1]

    with torch.no_grad():
        parts = fastvae.log_weights(
            seen, encoder(seen), keeping, k=K, likelihood="bernoulli", mask=mask, generator=_generator()
        )
        weights = torch.softmax(parts.log_likelihood + parts.log_ratio, 0)
        mean = (weights[:, :, None] * kept[0].sigmoid().unflatten(0, (K, B))).sum(0)
    torch.testing.assert_close(found.mean, torch.where(mask, x, mean), rtol=1e-5, atol=1e-5)


def test_every_kind_of_data():
    """Counts, classes, parts of a Joint and shaped events; the observed elements are kept as they are."""
    x, mask = _data()
    counts = (3 * x.abs()).long()
    vae = fastvae.VAE(
        nn.Linear(X, 2 * D, device=DEVICE), nn.Linear(D, X, device=DEVICE), likelihood="poisson"
    )
    found = vae.impute(counts, mask, k=K, draws=3)
    assert torch.equal(found.mean[mask], counts[mask].float()) and found.draws.shape == (3, B, X)
    assert bool((found.draws == found.draws.round()).all())

    class Classes(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, 4 * X, device=DEVICE)

        def forward(self, z):
            return self.layer(z).unflatten(1, (4, X))

    vae = fastvae.VAE(nn.Linear(X, 2 * D, device=DEVICE), Classes(), likelihood="categorical")
    classes = counts.clamp(max=3)
    found = vae.impute(classes, mask, k=K, draws=2)
    assert bool((found.draws == classes)[:, mask].all()) and int(found.draws.max()) <= 3

    class Parts(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(D, X + 2, device=DEVICE)

        def forward(self, z):
            return {"pixels": self.layer(z)[:, :X], "label": self.layer(z)[:, X:]}

    class Encoder(nn.Linear):
        def forward(self, x):
            return super().forward(torch.cat([x["pixels"], x["label"]], 1))

    joint = likelihoods.Joint(pixels="bernoulli", label="bernoulli")
    vae = fastvae.VAE(Encoder(X + 2, 2 * D, device=DEVICE), Parts(), likelihood=joint)
    data = {"pixels": (x > 0).float(), "label": torch.ones(B, 2, device=DEVICE)}
    found = vae.impute(data, {"pixels": mask}, k=K, draws=2)
    assert torch.equal(found.mean["label"], data["label"])
    assert torch.equal(found.draws["label"], data["label"].expand(2, B, 2))
    assert torch.equal(found.mean["pixels"][mask], data["pixels"][mask])
    score = vae.reconstruction_log_prob(data, k=K, elementwise=True, mask={"pixels": mask})
    assert score["label"].shape == (B, 2) and bool((score["pixels"][~mask] == 0).all())
    assert vae.reconstruct(data, k=K)["label"].shape == (B, 2)

    vae = fastvae.VAE(
        nn.Sequential(nn.Flatten(), nn.Linear(12, 2 * D, device=DEVICE)),
        nn.Sequential(nn.Linear(D, 12, device=DEVICE), nn.Unflatten(1, (3, 4))),
        likelihood="bernoulli",
    )
    image = torch.rand(B, 3, 4, device=DEVICE).round()
    found = vae.impute(image, torch.rand(3, 4, device=DEVICE) > 0.5, k=K, draws=2)
    assert found.mean.shape == image.shape and found.draws.shape == (2, B, 3, 4)


def test_what_imputation_refuses():
    x, mask = _data()
    vae = LinearGaussian().vae(mask)
    with pytest.raises(TypeError, match="mask must be a tensor of bool"):
        vae.impute(x, mask.float(), k=K)
    with pytest.raises(ValueError, match="mask has shape"):
        vae.impute(x, mask[:, :2], k=K)
    with pytest.raises(ValueError, match="draws must be at least 1"):
        vae.impute(x, mask, k=K, draws=-1)
    unknown = torch.where(mask, x, 0)
    unknown[2, 0] = math.nan
    assert bool(vae.impute(unknown, mask, k=K).mean[2].isnan().any())
    with pytest.raises(ValueError, match=r"the weights of examples \[2\] are NaN"):
        vae.impute(unknown, mask, k=K, draws=2)
    vae = fastvae.VAE(
        nn.Linear(X, 2 * D, device=DEVICE), nn.Linear(D, X, device=DEVICE), likelihood="multinomial"
    )
    with pytest.raises(TypeError, match="the likelihood is a Multinomial"):
        vae.reconstruct(x.abs().round(), k=K)


@pytest.mark.parametrize(
    "q",
    [
        lambda zeros: (zeros, zeros),
        lambda zeros: Laplace(zeros, zeros),
        # Draws weighted by 1.5 and 0.5.
        lambda zeros: Mixture([(zeros, zeros), (zeros + 1, zeros)], torch.tensor([3.0, 1.0]).log()),
    ],
)
def test_the_mean_over_the_posterior(q):
    class Fixed(torch.nn.Module):
        def forward(self, x):
            return q(torch.zeros(len(x), 1))

    class Sign(torch.nn.Module):
        """Decoder: pixel 0 is likely for z > 0, unlikely for z < 0; pixel 1 has probability ½."""

        def forward(self, z):
            return torch.cat([2 * torch.sign(z), torch.zeros_like(z)], 1)

    model = fastvae.VAE(Fixed(), Sign(), likelihood="bernoulli", latent_dim=1)
    p = 1 / (1 + math.exp(-2))
    result = model.reconstruct(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), k=200_000)
    expected = torch.tensor([[p * p + (1 - p) ** 2, 0.5], [2 * p * (1 - p), 0.5]])
    assert torch.allclose(result, expected, atol=0.005)


@pytest.mark.parametrize("likelihood", ["bernoulli", "poisson", "gaussian"])
@pytest.mark.parametrize("masked", [False, True])
def test_scores_of_elements_are_means_over_draws(likelihood, masked):
    """log of the mean over z of p(x_d|z), each element alone; an example's score is not their sum."""
    x, mask = _data()
    x = (2 * x.abs()).round() if likelihood != "bernoulli" else (x > 0).float()
    layers = [nn.Linear(D, X, device=DEVICE) for _ in range(2 if likelihood == "gaussian" else 1)]

    def decoder(z):
        outputs = tuple(layer(z) for layer in layers)
        return outputs if len(outputs) > 1 else outputs[0]

    q = torch.randn(2, B, D, device=DEVICE).unbind()
    kept = []

    def keeping(z):
        kept.append(decoder(z))
        return kept[-1]

    options = {"likelihood": likelihood, "mask": mask if masked else None}
    with torch.no_grad():
        fastvae.log_weights(x, q, keeping, k=K, generator=_generator(), **options)
        rows = x.repeat(K, 1)
        log_p = as_likelihood(likelihood).log_prob(rows, kept[0]).unflatten(0, (K, B))
        expected = torch.logsumexp(log_p, 0) - math.log(K)
        expected = torch.where(mask, expected, 0) if masked else expected
        for chunk in (None, 9):
            got = fastvae.reconstruction_log_prob(
                x, q, decoder, k=K, k_chunk=chunk, elementwise=True, generator=_generator(), **options
            )
            torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_an_element_score_finds_the_anomalous_pixel():
    model, (x, _) = LinearGaussian(scale=0.1, wide=1.0), _data()
    mask = torch.ones(B, X, dtype=torch.bool, device=DEVICE)
    vae = model.vae(mask)
    x = torch.randn(B, D, generator=_generator(3), device=DEVICE) @ model.w.T + model.b
    x[2, 4] += 3
    score = -vae.reconstruction_log_prob(x, k=500, elementwise=True)
    row, column = divmod(int(score.argmax()), X)
    assert row == 2 and int((-vae.reconstruction_log_prob(x, k=500)).argmax()) == 2
    assert column == 4


def test_element_scores_refused():
    x, q, decoder = torch.rand(B, X), torch.zeros(B, 2 * D), nn.Linear(D, X)

    class Summed(likelihoods.Likelihood):
        def log_prob(self, x, parameters):
            return -(x - parameters).square().sum(1)

    with pytest.raises(TypeError, match="needs log p of each element of x"):
        fastvae.reconstruction_log_prob(x, q, decoder, likelihood=Summed(), elementwise=True)
    with pytest.raises(ValueError, match="takes no size_factor"):
        fastvae.reconstruction_log_prob(
            x.round(), q, decoder, likelihood="poisson", elementwise=True, size_factor=torch.ones(B)
        )


def test_lines_and_traversals():
    encoder, decoder = nn.Linear(X, 2 * D, device=DEVICE), nn.Linear(D, X, device=DEVICE)
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli")
    first, last = torch.rand(2, B, X, device=DEVICE).unbind()
    line = vae.interpolate(first, last, steps=4)
    assert line.shape == (4, B, X)
    torch.testing.assert_close(line[0], vae.reconstruct(first))
    torch.testing.assert_close(line[-1], vae.reconstruct(last))
    with torch.no_grad():
        z = torch.lerp(encoder(first)[:, :D], encoder(last)[:, :D], 1 / 3)
        torch.testing.assert_close(line[1], decoder(z).sigmoid())
        z = encoder(first)[:, :D].clone()
        z[:, 1] = -2.0
        walked = vae.traverse(first, 1, [0.5, -2.0])
        torch.testing.assert_close(walked[1], decoder(z).sigmoid())
    assert walked.shape == (2, B, X)
    with pytest.raises(IndexError, match="latent is 3, but there are 3 latents"):
        vae.traverse(first, 3, [0.0])
    with pytest.raises(ValueError, match="steps must be at least 1"):
        vae.interpolate(first, last, steps=0)


def test_lines_of_conditional_models_with_shaped_latents():
    """The context is repeated for each point, and the decoder gets latents in their shape."""

    class Encoder(nn.Module):
        def forward(self, x, context):
            return torch.cat([x[:, :2], context[:, :, None, None].expand(-1, -1, 2, 2)], 1)

    class Decoder(nn.Module):
        def forward(self, z, context):
            return z.flatten(1) + context[:, :1]

    vae = fastvae.VAE(Encoder(), Decoder(), likelihood=likelihoods.Gaussian(scale=1.0))
    x, context = torch.randn(2, B, 2, 2, 2), torch.randn(B, 2)
    line = vae.interpolate(*x, steps=3, context=context)
    torch.testing.assert_close(line[1], (x.mean(0)[:, :2].flatten(1) + context[:, :1]))


@pytest.mark.parametrize(
    "dtype, fill", [(torch.uint8, 0.5), (torch.uint8, -1.0), (torch.int64, 0.5), (torch.bool, 2.0)]
)
def test_a_fill_that_integers_do_not_represent(dtype, fill):
    """Integers are cast where the fill would be truncated, and kept elsewhere."""
    x, mask = torch.ones(2, 3, dtype=dtype), torch.tensor([True, False, True]).expand(2, 3)
    filled = where_observed(x, mask, fill)
    assert filled.dtype == torch.get_default_dtype() and filled[0].tolist() == [1.0, fill, 1.0]
    assert where_observed(x, mask, 0.0).dtype == dtype


@pytest.mark.parametrize("k_chunk", [None, 7])
@pytest.mark.parametrize("likelihood", ["poisson", "joint", "columns", "own"])
def test_draws_come_from_the_z_that_were_weighted(likelihood, k_chunk):
    """Draws that torch makes depend on their chunk, whose size some likelihoods change after the first."""
    prior = td.Independent(td.Gamma(torch.full((1,), 0.5), torch.full((1,), 0.05)), 1)
    rates = torch.tensor([1.0, 4.0, 10.0, 30.0, 60.0])
    x = rates[:, None].expand(B, 3).round()
    mask = torch.tensor([True, True, False])

    class Own(likelihoods.Likelihood):
        def __init__(self):
            super().__init__()
            self.poisson = likelihoods.Poisson()

        def log_prob(self, x, parameters):
            return self.poisson.log_prob(x, parameters)

        def sample(self, parameters, generator=None):
            return self.poisson.sample(parameters, generator=generator)

        def mean(self, parameters):
            return self.poisson.mean(parameters)

    def encode(x):
        batch = len(x["a"]) if isinstance(x, dict) else len(x)
        return td.Independent(td.Gamma(torch.full((batch, 1), 0.5), torch.full((batch, 1), 0.05)), 1)

    kinds = {
        "poisson": "poisson",
        "joint": likelihoods.Joint(a="poisson"),
        "columns": likelihoods.Columns([(name, "poisson") for name in "abc"]),
        "own": Own(),
    }
    in_dict = likelihood == "joint"
    vae = fastvae.VAE(
        encode,
        lambda z: {"a": z.log().expand(-1, 3)} if in_dict else z.log().expand(-1, 3),
        likelihood=kinds[likelihood],
        prior=prior,
        modules=[],
    )
    given = ({"a": x}, {"a": mask}) if in_dict else (x, mask)
    found = vae.impute(*given, k=500, draws=400, k_chunk=k_chunk, generator=torch.Generator().manual_seed(3))
    mean, draws = (v["a"] if in_dict else v for v in (found.mean, found.draws))
    # A draw's standard deviation is 1.3 sqrt(rate), that of a mean of 400 a twentieth.
    assert (draws[:, :, 2].mean(0) - mean[:, 2]).abs().lt(0.4 * rates.sqrt()).all()
