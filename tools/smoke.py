"""``python -m tools.smoke``: quick checks of an installed fastvae, which needs torch and numpy alone.

The checkout is not searched, so ``fastvae`` is the installed wheel. Most checks compare with a formula in
plain PyTorch. ``python smoke.py`` runs this file anywhere. The exit status is 1 if a check fails.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in (ROOT, ROOT / "tools")]

import numpy as np
import torch
from torch import Tensor, nn
from torch import distributions as td
from torch.nn.functional import cross_entropy, logsigmoid, softplus

import fastvae
from fastvae import likelihoods, ops
from fastvae.core import backend

B, K, D, X = 6, 5, 3, 7  # rows, draws, latents, elements of an event
CHECKS: dict[str, Callable[[], None]] = {}


def check(function: Callable[[], None]) -> Callable[[], None]:
    CHECKS[function.__name__] = function
    return function


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-9) -> None:
    assert bool(torch.isfinite(found).all()), f"not finite: {found}"
    torch.testing.assert_close(found, expected.to(found.dtype), rtol=tolerance, atol=tolerance)


def normals(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def counts() -> Tensor:
    return torch.poisson(torch.full((B, X), 2.0, dtype=torch.float64))


def negative_binomial(log_mean: Tensor, log_theta: Tensor) -> td.Distribution:
    return td.NegativeBinomial(log_theta.exp(), logits=log_mean - log_theta)


def zero_inflated(x: Tensor, log_mean: Tensor, log_theta: Tensor, logit: Tensor) -> Tensor:
    counted = negative_binomial(log_mean, log_theta).log_prob(x) + logsigmoid(-logit)
    return torch.where(x == 0, torch.logaddexp(logsigmoid(logit), counted), counted)


def bins(x: Tensor, mean: Tensor, log_scale: Tensor, width: float | Tensor, low: float = 0.0) -> Tensor:
    """Return the log of a logistic's probability in the bin of x, of which the end ones are open."""
    above = torch.where(x >= 1, math.inf, (x + width / 2 - mean) / log_scale.exp())
    below = torch.where(x <= low, -math.inf, (x - width / 2 - mean) / log_scale.exp())
    return logsigmoid(above) + logsigmoid(-below) + (-(below - above).expm1()).log()


def softplus_gaussian(x: Tensor, mean: Tensor, raw: Tensor, log_floor: Tensor) -> Tensor:
    return td.Normal(mean, (softplus(raw) + log_floor.exp()).sqrt()).log_prob(x)


# Each likelihood's data, number of outputs and formula, element by element.
FORMULAS: dict[str, tuple[Callable[[], Tensor], int, Callable[..., Tensor]]] = {
    "bernoulli": (lambda: torch.rand(B, X).double(), 1, lambda x, a: x * a - softplus(a)),
    "beta": (
        lambda: 0.05 + 0.9 * torch.rand(B, X).double(),
        2,
        lambda x, a, b: td.Beta(a.exp(), b.exp()).log_prob(x),
    ),
    "continuous_bernoulli": (
        lambda: torch.rand(B, X).double(),
        1,
        # log normaliser log(l / (exp(l) - 1)), without cancelling
        lambda x, a: x * a + (a / a.expm1()).log(),
    ),
    "discretized_logistic": (
        lambda: torch.randint(256, (B, X)).double() / 255,
        3,
        lambda x, m, s, w: bins(x, m, s, w.exp()),
    ),
    "gaussian": (lambda: normals(B, X), 2, lambda x, m, v: td.Normal(m, (v / 2).exp()).log_prob(x)),
    "laplace": (lambda: normals(B, X), 2, lambda x, m, s: td.Laplace(m, s.exp()).log_prob(x)),
    "log_normal": (lambda: normals(B, X).exp(), 2, lambda x, m, s: td.LogNormal(m, s.exp()).log_prob(x)),
    "logistic": (
        lambda: normals(B, X),
        2,
        lambda x, m, s: logsigmoid((x - m) / s.exp()) + logsigmoid((m - x) / s.exp()) - s,
    ),
    "negative_binomial": (counts, 2, lambda x, m, t: negative_binomial(m, t).log_prob(x)),
    "poisson": (counts, 1, lambda x, a: td.Poisson(a.exp()).log_prob(x)),
    "softplus_gaussian": (lambda: normals(B, X), 3, softplus_gaussian),
    "student_t": (
        lambda: normals(B, X),
        3,
        lambda x, m, s, d: td.StudentT(d.exp(), m, s.exp()).log_prob(x),
    ),
    "zero_inflated_negative_binomial": (counts, 3, zero_inflated),
}

# The last output where it is a constant.
CONSTANTS = {"softplus_gaussian": -4.0, "discretized_logistic": -math.log(255)}


def of_likelihood(name: str) -> Callable[[], None]:
    def value_and_gradients() -> None:
        data, outputs, formula = FORMULAS[name]
        x, parameters = data(), [normals(K, B, X).requires_grad_() for _ in range(outputs)]
        upstream = normals(K, B)
        if name in CONSTANTS:
            parameters[2] = torch.full((), CONSTANTS[name], dtype=torch.float64)
        wanted = [p for p in parameters if p.requires_grad]
        found = getattr(ops, f"{name}_log_prob")(x, *parameters)
        expected = formula(x, *parameters).sum(-1)
        close(found, expected)
        for one, other in zip(
            torch.autograd.grad(found, wanted, upstream),
            torch.autograd.grad(expected, wanted, upstream),
            strict=True,
        ):
            close(one, other, 1e-7)

    value_and_gradients.__name__ = f"likelihood {name}"
    return value_and_gradients


for _name in FORMULAS:
    check(of_likelihood(_name))


@check
def every_op_of_a_likelihood_is_checked() -> None:
    composed = {"aggregate", "all_pairs", "linear", "mixture"}
    classes = {"categorical", "discretized_logistic_mixture", "multinomial"}
    named = {name.removesuffix("_log_prob") for name in ops.__all__ if name.endswith("_log_prob")}
    assert named == {*FORMULAS, *composed, *classes}, named ^ {*FORMULAS, *composed, *classes}


@check
def likelihood_categorical() -> None:
    x, logits = torch.randint(4, (B, X)), normals(B, 4, X)
    close(ops.categorical_log_prob(x, logits), -cross_entropy(logits, x, reduction="none").sum(1))


@check
def likelihood_multinomial() -> None:
    x, logits = counts(), normals(B, X)
    coefficients = torch.lgamma(x.sum(1) + 1) - torch.lgamma(x + 1).sum(1)
    close(ops.multinomial_log_prob(x, logits), coefficients + (x * logits.log_softmax(1)).sum(1), 1e-8)


@check
def likelihood_discretized_logistic_mixture() -> None:
    x = torch.randint(256, (B, 1, X)).double() / 127.5 - 1
    logits, location, log_scale = normals(B, 4, X), normals(B, 4, 1, X), normals(B, 4, 1, X)
    of_components = bins(x[:, None], location, log_scale, 2 / 255, low=-1.0)[:, :, 0]
    expected = (logits.log_softmax(1) + of_components).logsumexp(1).sum(1)
    close(ops.discretized_logistic_mixture_log_prob(x, logits, location, log_scale), expected, 1e-8)


class Model:
    """Data, an encoder's output and a decoder in float64, and the formula of a bound's log weights."""

    def __init__(self) -> None:
        self.x = torch.rand(B, X, dtype=torch.float64).round()
        self.mu, self.logvar = normals(B, D).requires_grad_(), normals(B, D).requires_grad_()
        self.decoder = nn.Linear(D, X).double()

    def options(self) -> dict[str, object]:
        return {"likelihood": "bernoulli", "generator": torch.Generator().manual_seed(3)}

    def log_weights(self, k: int) -> tuple[Tensor, Tensor]:
        """Return log p(x|z) and log p(z) - log q(z|x), each [K, B], of the draws of a generator of seed 3."""
        z, _ = ops.rsample_kl(self.mu, self.logvar, k=k, generator=torch.Generator().manual_seed(3))
        q = td.Normal(self.mu, (self.logvar / 2).exp())
        logits = self.decoder(z)
        ratio = (td.Normal(0.0, 1.0).log_prob(z) - q.log_prob(z)).sum(-1)
        return (self.x * logits - softplus(logits)).sum(-1), ratio

    def kl(self) -> Tensor:
        return 0.5 * (self.mu**2 + self.logvar.exp() - self.logvar - 1).sum(-1)

    def compare(self, found: Tensor, expected: Tensor) -> None:
        wanted = [self.mu, self.logvar, *self.decoder.parameters()]
        close(found, expected)
        for one, other in zip(
            torch.autograd.grad(found, wanted),
            torch.autograd.grad(expected, wanted, retain_graph=True),
            strict=True,
        ):
            close(one, other, 1e-8)


@check
def draws_have_their_moments() -> None:
    mu, logvar = torch.full((4, 8), 0.5), torch.full((4, 8), -1.0)
    z, kl = ops.rsample_kl(mu, logvar, k=20000)
    close(z.mean(), torch.tensor(0.5), 0.01)
    close(z.var(), torch.tensor(math.exp(-1)), 0.01)
    close(kl, 0.5 * (mu**2 + logvar.exp() - logvar - 1).sum(-1), 1e-5)


@check
def draws_repeat_by_their_seed() -> None:
    mu, seed = torch.zeros(4, 8), torch.tensor(5)
    first, second = (ops.rsample_kl(mu, mu, k=3, seed=seed)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(first, ops.rsample_kl(mu, mu, k=3, seed=seed + 1)[0])
    tail = ops.rsample_kl(mu, mu, k=2, seed=seed, sample_offset=1)[0]
    assert torch.equal(first[1:], tail), "a chunk of the draws is the same draws"


@check
def elbo_and_its_gradients() -> None:
    model = Model()
    log_px, _ = model.log_weights(K)
    expected = (log_px.mean(0) - 0.7 * model.kl()).mean()
    model.compare(
        fastvae.elbo(model.x, (model.mu, model.logvar), model.decoder, k=K, beta=0.7, **model.options()),
        expected,
    )


@check
def iwae_and_its_gradients() -> None:
    model = Model()
    expected = (torch.logsumexp(sum(model.log_weights(K)), 0) - math.log(K)).mean()
    for k_chunk in (None, 2):
        found = fastvae.iwae(
            model.x, (model.mu, model.logvar), model.decoder, k=K, k_chunk=k_chunk, **model.options()
        )
        model.compare(found, expected)


@check
def iwae_by_doubly_reparametrised_gradients() -> None:
    model = Model()
    call = (model.x, (model.mu, model.logvar), model.decoder)
    plain, dreg = (fastvae.iwae(*call, k=K, estimator=name, **model.options()) for name in ("iwae", "dreg"))
    close(dreg, plain)
    one, other = (torch.autograd.grad(v, list(model.decoder.parameters())) for v in (plain, dreg))
    for a, b in zip(one, other, strict=True):  # the decoder's are the same
        close(a, b)


@check
def bounds() -> None:
    model = Model()
    log_w = sum(model.log_weights(K))
    call = (model.x, (model.mu, model.logvar), model.decoder)
    ciwae = 0.3 * log_w.mean(0) + 0.7 * (torch.logsumexp(log_w, 0) - math.log(K))
    model.compare(fastvae.bound(*call, fastvae.bounds.CIWAE(0.3), k=K, **model.options()), ciwae.mean())
    others = [
        fastvae.bounds.UStatistic(2, permutations=3),
        fastvae.bounds.Jackknife(),
        fastvae.bounds.TVO([0.0, 0.1]),
    ]
    for objective in others:
        found = fastvae.bound(*call, objective, k=6, **model.options())
        assert bool(torch.isfinite(found)) and found.item() < 0, objective


@check
def log_weights() -> None:
    model = Model()
    found = fastvae.log_weights(model.x, (model.mu, model.logvar), model.decoder, k=K, **model.options())
    log_px, ratio = model.log_weights(K)
    close(found.log_likelihood, log_px)
    close(found.log_ratio, ratio)


@check
def log_marginal() -> None:
    model = Model()
    expected = torch.logsumexp(sum(model.log_weights(500)), 0) - math.log(500)
    found = fastvae.log_marginal(
        model.x, (model.mu, model.logvar), model.decoder, k=500, k_chunk=64, **model.options()
    )
    close(found.log_px, expected.detach())


@check
def log_marginal_of_a_linear_gaussian_model_is_exact() -> None:
    decoder, x = nn.Linear(D, X).double(), normals(B, X)
    weight, scale = decoder.weight.detach(), 0.5
    precision = torch.eye(D).double() + weight.T @ weight / scale**2
    mean = torch.linalg.solve(precision, weight.T @ (x - decoder.bias.detach()).T / scale**2).T
    q = td.MultivariateNormal(mean, precision_matrix=precision)
    exact = td.MultivariateNormal(decoder.bias, weight @ weight.T + scale**2 * torch.eye(X).double())
    likelihood = likelihoods.Gaussian(scale=scale)
    found = fastvae.log_marginal(x, q, decoder, k=7, likelihood=likelihood)
    close(found.log_px, exact.log_prob(x).detach(), 1e-6)


@check
def beta_tc() -> None:
    """Check that with every weight 1 the decomposition is the ELBO."""
    model = Model()
    call = (model.x, (model.mu, model.logvar), model.decoder)
    terms = fastvae.beta_tc(*call, alpha=1.0, beta=1.0, gamma=1.0, terms=True, **model.options())
    parts = terms.mutual_information + terms.total_correlation + terms.dimension_kl
    log_px, ratio = model.log_weights(1)
    close(terms.bound, (log_px + ratio)[0], 1e-8)
    close(parts, -ratio[0], 1e-8)


@check
def sleep() -> None:
    encoder, decoder = nn.Linear(X, 2 * D), nn.Linear(D, X)
    value = fastvae.sleep(encoder, decoder, 16, latent_dim=D, likelihood="bernoulli")
    (-value).backward()
    assert encoder.weight.grad is not None and float(encoder.weight.grad.abs().sum()) > 0
    assert decoder.weight.grad is None


@check
def marginalize() -> None:
    per_class = normals(4)

    def bound(x: Tensor, y: Tensor) -> Tensor:
        return x[:, 0] + y.to(x.dtype) @ per_class

    x = normals(B, X)
    close(
        fastvae.marginalize(x, bound, classes=4),
        (x[:, 0] + torch.logsumexp(per_class, 0) - math.log(4)).mean(),
    )


@check
def log_mean_exp() -> None:
    log_w = (100 * normals(K, B)).requires_grad_()
    close(ops.log_mean_exp(log_w), torch.logsumexp(log_w, 0) - math.log(K))
    (found,) = torch.autograd.grad(ops.log_mean_exp(log_w).sum(), log_w)
    close(found, log_w.softmax(0))


@check
def mixtures_and_aggregate_posteriors() -> None:
    z, mu, logvar = normals(K, B, D), normals(4, D), normals(4, D)
    of_components = td.Normal(mu, (logvar / 2).exp()).log_prob(z[:, :, None])
    expected = of_components.sum(-1).logsumexp(-1) - math.log(4)
    close(ops.mixture_log_prob(z, mu, logvar), expected)
    joint, marginals = ops.aggregate_log_prob(z, mu, logvar)
    close(joint, expected)
    close(marginals, of_components.logsumexp(2) - math.log(4))


@check
def a_full_covariance() -> None:
    mu, tril = normals(B, D), normals(B, D * (D + 1) // 2)
    z, log_q = ops.rsample_tril(mu, tril, k=K)
    rows, columns = torch.tril_indices(D, D)
    lower = torch.zeros(B, D, D, dtype=torch.float64)
    lower[:, rows, columns] = torch.where(rows == columns, tril.exp(), tril)
    close(log_q, td.MultivariateNormal(mu, scale_tril=lower).log_prob(z))


@check
def a_linear_last_layer() -> None:
    x, h, layer = torch.rand(B, X).double().round(), normals(K, B, 8), nn.Linear(8, X).double()
    found = ops.linear_log_prob(x, h, layer.weight, layer.bias, likelihood="bernoulli")
    logits = layer(h)
    expected = (x * logits - softplus(logits)).sum(-1)
    close(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.sum(), list(layer.parameters())),
        torch.autograd.grad(expected.sum(), list(layer.parameters())),
        strict=True,
    ):
        close(one, other)
    body = nn.Sequential(nn.Linear(D, 8), nn.Tanh()).double()
    head = fastvae.FusedHead(body, layer)
    q = normals(B, 2 * D)
    values = []
    for decoder in (head, nn.Sequential(*body, layer)):
        generator = torch.Generator().manual_seed(1)
        values.append(fastvae.iwae(x, q, decoder, k=K, likelihood="bernoulli", generator=generator))
    close(*values)


@check
def all_pairs() -> None:
    x, logits = torch.rand(B, X).double(), normals(K, X)
    expected = (x * logits[:, None] - softplus(logits)[:, None]).sum(-1)
    close(ops.all_pairs_log_prob(x, logits, likelihood="bernoulli"), expected)


@check
def missing_data() -> None:
    x, logits, mask = torch.rand(B, X).double(), normals(B, X), torch.rand(B, X) < 0.6
    expected = ((x * logits - softplus(logits)) * mask).sum(-1)
    close(ops.bernoulli_log_prob(torch.where(mask, x, math.nan), logits, mask=mask), expected)


@check
def tables_and_several_parts() -> None:
    columns = likelihoods.Columns([("age", "gaussian"), ("smokes", "bernoulli"), ("city", "categorical", 4)])
    x = torch.stack([normals(B), torch.rand(B).round().double(), torch.randint(4, (B,)).double()], 1)
    output, q = normals(columns.width), torch.zeros(B, 2 * D, dtype=torch.float64)
    found = fastvae.elbo(x, q, lambda z: output.expand(len(z), -1), likelihood=columns, reduction="none")
    mean, logvar, logit, classes = output[0], output[1], output[2], output[3:].log_softmax(0)
    expected = td.Normal(mean, (logvar / 2).exp()).log_prob(x[:, 0]) + x[:, 1] * logit - softplus(logit)
    close(found, expected + classes[x[:, 2].long()])
    joint = likelihoods.Joint(a="poisson", b="bernoulli")
    parts = {"a": counts(), "b": torch.rand(B, 2).double()}
    zeros = {"a": torch.zeros(B, X).double(), "b": torch.zeros(B, 2).double()}
    found = fastvae.elbo(parts, q, lambda z: zeros, likelihood=joint, reduction="none")
    close(found, td.Poisson(1.0).log_prob(parts["a"]).sum(1) - 2 * math.log(2))


@check
def a_likelihood_of_ones_own() -> None:
    model = Model()
    own = likelihoods.from_distribution(lambda logits: td.Bernoulli(logits=logits))
    expected = (torch.logsumexp(sum(model.log_weights(K)), 0) - math.log(K)).mean()
    options = {**model.options(), "likelihood": own}
    model.compare(fastvae.iwae(model.x, (model.mu, model.logvar), model.decoder, k=K, **options), expected)


@check
def families_of_q_and_p() -> None:
    families = fastvae.distributions
    decoder, x = nn.Linear(D, X), torch.rand(B, X).round()
    mu, logvar = torch.randn(B, D, requires_grad=True), torch.randn(B, D)
    priors = [None, families.StudentT(torch.zeros(D), torch.zeros(D), 5.0), td.Laplace(torch.zeros(D), 1.0)]
    for prior in priors:
        for q in (families.Laplace(mu, logvar), td.Normal(mu, logvar.exp())):
            value = fastvae.iwae(x, q, decoder, k=K, likelihood="bernoulli", prior=prior)
            (gradient,) = torch.autograd.grad(value, mu)
            assert bool(torch.isfinite(gradient).all()) and float(gradient.abs().sum()) > 0, (q, prior)


def small_vae() -> fastvae.VAE:
    return fastvae.VAE(nn.Linear(X, 2 * D), nn.Linear(D, X), likelihood="bernoulli", latent_dim=D)


@check
def training_improves_the_bound() -> None:
    vae, x = small_vae(), (torch.arange(64)[:, None] // torch.arange(1, X + 1) % 2).float()
    optimizer = torch.optim.Adam(vae.parameters(), 0.05)
    values = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = -vae.iwae(x, k=K)
        loss.backward()
        optimizer.step()
        values.append(-float(loss.detach()))
    assert sum(values[-10:]) > sum(values[:10]) + 1, values


@check
def evaluate() -> None:
    vae, data = small_vae(), np.random.default_rng(0).random((20, X)).round().astype(np.float32)
    result = fastvae.evaluate(vae, data, k=200, batch_size=8, progress=False)
    log_px = fastvae.log_marginal(
        torch.from_numpy(data),
        vae.encoder(torch.from_numpy(data)),
        vae.decoder,
        k=4000,
        likelihood="bernoulli",
    ).log_px
    assert tuple(result.log_px.shape) == (20,)
    close(result.log_px.float(), log_px.float(), 0.2)
    assert str(result)


@check
def a_model_draws_and_reconstructs() -> None:
    vae, x = small_vae(), torch.rand(B, X).round()
    assert vae.sample(4).shape == (4, X) and vae.reconstruct(x).shape == (B, X)
    state = vae.state_dict()
    other = small_vae()
    other.load_state_dict(state)
    assert torch.equal(vae.reconstruct(x), other.reconstruct(x))


@check
def half_precision() -> None:
    x, logits = torch.rand(B, X).double(), normals(B, X)
    expected = (x * logits - softplus(logits)).sum(-1)
    for dtype in (torch.bfloat16, torch.float16):
        found = ops.bernoulli_log_prob(x.to(dtype), logits.to(dtype))
        assert found.dtype == torch.float32
        close(found, expected, 0.05)


@check
def errors_name_the_argument() -> None:
    for call, words in (
        (lambda: ops.bernoulli_log_prob(torch.full((2, 3), 2.0), torch.zeros(2, 3)), "must lie in [0, 1]"),
        (lambda: fastvae.iwae(torch.zeros(2, 3), torch.zeros(2, 4), nn.Linear(2, 3), k=0), "k"),
    ):
        try:
            call()
        except (TypeError, ValueError) as error:
            assert words in str(error), error
        else:
            raise AssertionError(f"no error with {words!r}")


@check
def the_reference_agrees() -> None:
    mu, logvar, seed = torch.randn(B, D), torch.randn(B, D), torch.tensor(3)
    found = ops.rsample_log_ratio(mu, logvar, k=K, seed=seed)
    with fastvae.use_backend("reference"):
        expected = ops.rsample_log_ratio(mu, logvar, k=K, seed=seed)
    for one, other in zip(found, expected, strict=True):
        close(one, other, 1e-5)


@check
def a_compiled_objective() -> None:
    x, q, decoder = torch.rand(B, X).round(), torch.randn(B, 2 * D), nn.Linear(D, X)

    def bound(x: Tensor, q: Tensor) -> Tensor:
        return fastvae.elbo(x, q, decoder, likelihood="bernoulli", k=K)

    # Without a compiler of C++, whether it is there or not.
    compiled = torch.compile(bound, backend="eager", fullgraph=True)
    torch.manual_seed(0)
    expected = bound(x, q)
    torch.manual_seed(0)
    close(compiled(x, q), expected, 1e-6)


def run_module(*arguments: str) -> str:
    """Run ``python -m fastvae`` of the same installation, in an empty folder."""
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [sys.executable, "-m", "fastvae", *arguments],
            cwd=folder, env=variables, capture_output=True, text=True, encoding="utf-8",
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


@check
def command_info() -> None:
    printed = run_module("info")
    assert fastvae.__version__ in printed and torch.__version__ in printed and "rsample_kl" in printed


@check
def command_version() -> None:
    from importlib import metadata

    assert metadata.version("fastvae") == fastvae.__version__
    assert fastvae.__version__ in run_module("--version")


@check
def typed() -> None:
    folder = Path(fastvae.__file__).parent
    assert (folder / "py.typed").is_file() and (folder / "ops" / "_declared.pyi").is_file()
    assert all(hasattr(fastvae, name) for name in fastvae.__all__)
    assert (folder / "kernels" / "normal_diagonal.py").is_file()


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m tools.smoke", description="Check an installed fastvae.")
    parser.add_argument(
        "--expect",
        choices=("pure", "binary"),
        help="fail unless the installed wheel is of this kind (default: either)",
    )
    options = parser.parse_args(arguments)
    folder = Path(fastvae.__file__).resolve().parent
    kind = "pure" if backend.LEFT_OUT else "binary"
    instructions = "plain PyTorch" if backend.LEFT_OUT else f"C++ {backend.extension().isa()}"
    print(
        f"fastvae {fastvae.__version__} ({kind}, {instructions}) from {folder}; torch {torch.__version__}, "
        f"numpy {np.__version__}, Python {platform.python_version()}"
    )
    if folder.parent == ROOT:
        sys.exit("smoke: this is the checkout; expected an installed wheel: `pip install fastvae-*.whl`")
    if options.expect not in (None, kind):
        sys.exit(f"smoke: this is the {kind} build; expected the {options.expect} one")
    # A warning of fastvae's is a failure, but for the announcement; torch may warn of itself.
    warnings.filterwarnings("error", module=r"fastvae(\.|$)")
    warnings.filterwarnings("error", "fastvae")
    warnings.filterwarnings("ignore", "fastvae: this is the pure-Python build")
    begin, failed = time.perf_counter(), 0
    for name, function in CHECKS.items():
        torch.manual_seed(0)
        try:
            function()
        except Exception:
            failed += 1
            print(f"FAILED {name.replace('_', ' ')}\n{traceback.format_exc()}")
    print(f"{time.perf_counter() - begin:.1f} s")
    print(f"{len(CHECKS) - failed} passed, {failed} failed")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
