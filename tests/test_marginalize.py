"""Marginalised discrete latents, against models of known log p(x) and the papers' formulas."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import fastvae
from fastvae import ops
from fastvae.distributions import Distribution

from .conftest import DEVICE
from .models import LinearGaussian, evaluate_parts, generator, rand, randn
from .test_mathematics import log_weight_rounding

pytestmark = pytest.mark.usefixtures("one_thread")

B, C, D, X, K = 5, 4, 3, 7, 6


class Clusters:
    """Model with y of given probabilities and x|y from a linear-Gaussian model with an offset per y."""

    def __init__(self, dtype=torch.float64):
        self.models = [LinearGaussian(D, X, dtype=dtype) for _ in range(C)]
        self.offsets = 0.4 * randn(C, X, seed=5, dtype=torch.float64)
        for model, offset in zip(self.models, self.offsets, strict=True):
            model.offset = model.offset + offset
        self.log_prior = torch.log_softmax(randn(C, seed=6, dtype=torch.float64), 0)

    def sample(self, batch):
        """Draw x [B, X], cycling through the classes."""
        drawn = [model.sample(batch, seed=10 + y) for y, model in enumerate(self.models)]
        return torch.stack([drawn[b % C][b] for b in range(batch)])

    def log_px_of_class(self, x):
        """Return log p(x|y) [B, C]."""
        return torch.stack([model.log_px(x) for model in self.models], 1)

    def bound(self, x, y):
        """Return log p(x|y) [N], the weight of one draw from the exact p(z|x, y)."""
        first, offsets = self.models[0], (self.offsets - self.offsets[0]).to(x)
        q = first.posterior(x - y @ offsets)
        decoder = lambda z, y: first.decoder(z) + y @ offsets  # noqa: E731
        return fastvae.iwae(x, q, decoder, k=1, likelihood=first.likelihood, context=y, reduction="none")

    def tolerance(self, x):
        """Return the rounding error of a log weight and of the sum over y, a few operations of that size."""
        dtype = x.dtype
        of_weights = max(log_weight_rounding(m, x, m.posterior(x), 1, dtype) for m in self.models)
        size = float(self.log_px_of_class(x).abs().max() + self.log_prior.abs().max()) + math.log(C)
        return of_weights + (C + 8) * torch.finfo(dtype).eps * size


@pytest.fixture(scope="module")
def exact():
    clusters = Clusters()
    x = clusters.sample(B)
    joint = clusters.log_px_of_class(x) + clusters.log_prior
    return clusters, x, joint, clusters.tolerance(x)


# Against an exact model


@pytest.mark.parametrize("class_chunk", [None, 1, 3])
def test_without_a_classifier_the_bound_is_log_px(backend, exact, class_chunk):
    clusters, x, joint, tolerance = exact
    assert tolerance < 1e-10
    got = fastvae.marginalize(
        x, clusters.bound, log_prior=clusters.log_prior, class_chunk=class_chunk, terms=True
    )
    torch.testing.assert_close(got.bound, torch.logsumexp(joint, 1), rtol=0, atol=tolerance)
    responsibilities = torch.log_softmax(joint, 1)
    torch.testing.assert_close(got.log_responsibilities, responsibilities, rtol=0, atol=2 * tolerance)
    # No class dominates everywhere; otherwise the sum would be untested.
    assert float(responsibilities.exp().amax(1).min()) < 0.99


def test_the_bound_is_below_log_px_by_the_kl_of_the_classifier(backend, exact):
    clusters, x, joint, tolerance = exact
    log_posterior = torch.log_softmax(joint, 1)

    def of(log_q):
        return fastvae.marginalize(
            x, clusters.bound, log_q=log_q, log_prior=clusters.log_prior, reduction="none"
        )

    log_px = torch.logsumexp(joint, 1)
    torch.testing.assert_close(of(log_posterior), log_px, rtol=0, atol=2 * tolerance)
    log_q = randn(B, C, seed=7, dtype=torch.float64)
    gap = torch.distributions.kl_divergence(
        torch.distributions.Categorical(logits=log_q), torch.distributions.Categorical(logits=log_posterior)
    )
    assert float(gap.min()) > 1e-2
    torch.testing.assert_close(log_px - of(log_q), gap, rtol=0, atol=4 * tolerance)


def test_labels_give_the_joint(backend, exact):
    clusters, x, joint, tolerance = exact
    labels = torch.tensor([2, -1, 0, 3, -1], device=DEVICE)
    for log_q in (None, torch.log_softmax(joint, 1)):
        got = fastvae.marginalize(
            x,
            clusters.bound,
            log_prior=clusters.log_prior,
            log_q=log_q,
            labels=labels,
            reduction="none",
        )
        chosen = joint.gather(1, labels.clamp(0)[:, None])[:, 0]
        expected = torch.where(labels < 0, torch.logsumexp(joint, 1), chosen)
        torch.testing.assert_close(got, expected, rtol=0, atol=2 * tolerance)


def test_log_marginal_of_each_class(backend):
    """log_marginal per class works in float32, by importance sampling from inexact q."""
    clusters = Clusters(torch.float32)
    x = clusters.sample(B)
    first, offsets = clusters.models[0], (clusters.offsets - clusters.offsets[0]).float()
    estimates = []

    def log_px(x, y):
        q = first.posterior(x - y @ offsets, shift=0.2, stretch=0.3)
        decoder = lambda z, y: first.decoder(z) + y @ offsets  # noqa: E731
        estimates.append(
            fastvae.log_marginal(
                x, q, decoder, k=800, likelihood=first.likelihood, context=y, generator=generator(8)
            )
        )
        return estimates[-1].log_px

    log_prior = clusters.log_prior.float()
    got = fastvae.marginalize(x, log_px, log_prior=log_prior, terms=True)
    joint = clusters.log_px_of_class(x) + clusters.log_prior
    # The delta method: each class is weighted by its responsibility.
    weight = torch.softmax(joint, 1)
    stderr = (weight * estimates[0].log_px_stderr.reshape(B, C)).square().sum(1).sqrt()
    score = (got.bound - torch.logsumexp(joint, 1)) / stderr
    assert len(estimates) == 1 and float(score.abs().max()) < 5


def test_noise_of_the_analytic_kl_biases_the_bound_upwards():
    """Without a classifier, noise of the analytic KL biases the result above log p(x), as documented."""
    model, replicates = LinearGaussian(D, X), 4000
    x = model.sample(1).expand(replicates, X)

    def mean_excess(stretch, **options):
        def bound(x, y):
            q = model.posterior(x, stretch=stretch)
            return fastvae.elbo(x, q, model.decoder, likelihood=model.likelihood, reduction="none", **options)

        log_q = options.pop("log_q", None)
        excess = fastvae.marginalize(x, bound, classes=C, log_q=log_q, reduction="none") - model.log_px(x)
        return float(excess.mean()), float(excess.std()) / math.sqrt(replicates)

    # All classes are the same, so that log p(x) is that of each.
    mean, stderr = mean_excess(0.0, generator=generator(11))
    assert mean > 10 * stderr
    # A wider q, or the weights would equal p(x).
    mean, stderr = mean_excess(0.8, kl="mc", generator=generator(12))
    assert mean < -5 * stderr
    # With a classifier the result is linear in F.
    uniform = torch.zeros(replicates, C, dtype=torch.float64, device=DEVICE)
    mean, stderr = mean_excess(0.0, log_q=uniform, generator=generator(13))
    assert abs(mean) < 5 * stderr


# Against the formulas, in float64, where the bounds are a table


def table_of(values):
    """Return x, and a function of x and y that looks up the bounds [B, C]."""
    x = torch.arange(len(values), dtype=torch.float64, device=values.device)[:, None]
    return x, lambda x, y: values[x[:, 0].long(), y.argmax(1)]


def written_out(bounds, log_q, log_prior, labels, alpha):
    """Compute sums over y of probabilities, example by example; eqs. 6 to 9 of Kingma et al. 2014."""
    rows, classes = bounds.shape
    results = []
    for b in range(rows):
        prior = bounds.new_full((classes,), 1 / classes)
        if log_prior is not None:
            prior = torch.softmax(log_prior if log_prior.dim() == 1 else log_prior[b], 0)
        q = None if log_q is None else torch.softmax(log_q[b], 0)
        label = -1 if labels is None else int(labels[b])
        if label >= 0:  # −L(x, y), and eq. 9's term
            result = bounds[b, label] + prior[label].log()
            result = result + (alpha * q[label].log() if alpha else 0)
        elif q is None:
            result = (prior * bounds[b].exp()).sum().log()
        else:  # −U(x) = Σ q(y|x) (−L(x, y)) + H(q(y|x))
            result = (q * (bounds[b] + prior.log())).sum() - (q * q.log()).sum()
        results.append(result)
    return torch.stack(results)


@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("labelled", [False, True], ids=["unlabelled", "some labels"])
@pytest.mark.parametrize("log_prior", [None, "[C]", "[B, C]"])
@pytest.mark.parametrize("classifier", [False, True], ids=["best q", "classifier"])
def test_value_and_gradients_equal_the_formula(backend, classifier, log_prior, labelled, reduction):
    shape = {"[C]": (C,), "[B, C]": (B, C)}
    leaves = {"bounds": (3 * randn(B, C, seed=1, dtype=torch.float64)).requires_grad_()}
    if classifier:
        leaves["log_q"] = randn(B, C, seed=2, dtype=torch.float64).requires_grad_()
    if log_prior:
        leaves["log_prior"] = randn(*shape[log_prior], seed=3, dtype=torch.float64).requires_grad_()
    labels = torch.tensor([-1, 3, 0, -1, 2], device=DEVICE) if labelled else None
    alpha = 0.7 if classifier and labelled else 0.0
    x, bound = table_of(leaves["bounds"])
    given = {"log_q": leaves.get("log_q"), "log_prior": leaves.get("log_prior"), "labels": labels}
    got = fastvae.marginalize(x, bound, classes=C, alpha=alpha, reduction=reduction, **given)
    expected = written_out(leaves["bounds"], alpha=alpha, **given)
    expected = expected if reduction == "none" else getattr(expected, reduction)()
    # Numbers up to 20, some 10 operations per class, and B rows.
    bounds_of_error = {"rtol": 0, "atol": 20 * 10 * C * B * torch.finfo(torch.float64).eps}
    torch.testing.assert_close(got, expected, **bounds_of_error)
    weight = torch.linspace(0.5, 1.5, got.numel(), dtype=torch.float64, device=DEVICE).reshape(got.shape)
    grads, exact_grads = (
        torch.autograd.grad((v * weight).sum(), list(leaves.values()), allow_unused=False)
        for v in (got, expected)
    )
    for a, b in zip(grads, exact_grads, strict=True):
        torch.testing.assert_close(a, b, **bounds_of_error)


def test_alpha_may_be_a_tensor():
    bounds, log_q = randn(B, C, seed=1), randn(B, C, seed=2)
    labels = torch.tensor([-1, 3, 0, -1, 2], device=DEVICE)
    x, bound = table_of(bounds)
    alpha = torch.tensor(0.7, dtype=torch.float64, requires_grad=True)
    got = fastvae.marginalize(x, bound, log_q=log_q, labels=labels, alpha=alpha, reduction="sum")
    assert torch.equal(
        got.float(),
        fastvae.marginalize(x, bound, log_q=log_q, labels=labels, alpha=0.7, reduction="sum").float(),
    )
    got.backward()
    chosen = torch.log_softmax(log_q.double(), 1)[[1, 2, 4], [3, 0, 2]].sum()
    torch.testing.assert_close(alpha.grad, chosen, rtol=1e-5, atol=0)


def test_half_precision_is_summed_in_float32():
    """A half-precision classifier's output, as under autocast, is summed in float32."""
    bounds, log_q = 900 * rand(B, C, seed=1) - 1000, randn(B, C, seed=2).bfloat16()
    x, bound = table_of(bounds)
    got = fastvae.marginalize(x, bound, log_q=log_q, reduction="none")
    wide = fastvae.marginalize(x, lambda x, y: bound(x, y).double(), log_q=log_q.double(), reduction="none")
    assert got.dtype == torch.float32 and wide.dtype == torch.float64
    # Numbers up to 1000, each with some 8 roundings.
    torch.testing.assert_close(got.double(), wide, rtol=0, atol=8 * C * 1000 * torch.finfo(torch.float32).eps)


# Edges


@pytest.mark.parametrize("value", [-math.inf, math.nan, -1.0])
def test_a_class_of_zero_probability_under_q_is_ignored(backend, value):
    bounds, log_q = randn(B, C, seed=1, dtype=torch.float64), randn(B, C, seed=2, dtype=torch.float64)
    bounds[:, 1], log_q[:, 1] = value, -math.inf
    log_q[0, 2] = -2000.0  # a probability of 0 with a finite logarithm
    bounds.requires_grad_(), log_q.requires_grad_()
    x, bound = table_of(bounds)
    got = fastvae.marginalize(x, bound, log_q=log_q, reduction="none")
    got.sum().backward()
    kept = [0, 2, 3]
    q = torch.softmax(log_q[:, kept], 1)
    expected = (q * bounds[:, kept] - torch.special.xlogy(q, q)).sum(1) - math.log(C)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    assert bool(log_q.grad.isfinite().all())
    torch.testing.assert_close(bounds.grad[:, kept], q.detach(), rtol=0, atol=1e-14)
    assert not bounds.grad[:, 1].any() and not log_q.grad[:, 1].any()


def test_a_class_of_zero_prior_probability(backend):
    bounds = randn(B, C, seed=1, dtype=torch.float64).requires_grad_()
    log_prior = torch.tensor([0.0, -math.inf, 1.0, 0.5], dtype=torch.float64, device=DEVICE)
    log_prior.requires_grad_()
    x, bound = table_of(bounds)
    got = fastvae.marginalize(x, bound, log_prior=log_prior, reduction="none")
    kept = [0, 2, 3]
    expected = torch.logsumexp(bounds[:, kept] + torch.log_softmax(log_prior[kept], 0), 1)
    torch.testing.assert_close(got, expected, rtol=0, atol=1e-14)
    got.sum().backward()
    assert bool(log_prior.grad.isfinite().all()) and not bounds.grad[:, 1].any()
    # A q that gives it some probability has an infinite KL.
    log_q = torch.zeros(B, C, dtype=torch.float64, device=DEVICE)
    assert bool((fastvae.marginalize(x, bound, log_q=log_q, log_prior=log_prior) == -math.inf).all())


def test_bounds_of_minus_infinity(backend):
    """Bounds of -inf, of examples without weight, have zero gradient, like the bound itself."""
    bounds = randn(B, C, seed=1)
    bounds[2] = -math.inf
    bounds.requires_grad_()
    x, bound = table_of(bounds)
    got = fastvae.marginalize(x, bound, classes=C, reduction="none")
    got[2:3].sum().backward(retain_graph=True)
    assert float(got[2].detach()) == -math.inf and bool(got[[0, 1, 3, 4]].isfinite().all())
    assert not bounds.grad.any()


@pytest.mark.parametrize("where", ["bounds", "log_q"])
def test_nan_stays_in_its_row(backend, where):
    values = {"bounds": randn(B, C, seed=1), "log_q": randn(B, C, seed=2)}
    values[where][2, 3] = math.nan
    x, bound = table_of(values["bounds"])
    labels = torch.tensor([-1, 2, -1, -1, 0], device=DEVICE)
    log_q = values["log_q"] if where == "log_q" else None
    for q in (values["log_q"], log_q):
        got = fastvae.marginalize(x, bound, classes=C, log_q=q, labels=labels, reduction="none")
        wrong = [2] if where == "bounds" or q is not None else []
        assert got.isnan().nonzero().flatten().tolist() == wrong


@pytest.mark.parametrize("classifier", [False, True])
def test_empty_batch(backend, classifier):
    parameter = torch.zeros(C, device=DEVICE, requires_grad=True)
    got = fastvae.marginalize(
        torch.zeros(0, X, device=DEVICE),
        lambda x, y: x.sum(1) + y @ parameter,
        log_q=torch.zeros(0, C, device=DEVICE) if classifier else None,
        classes=C,
        labels=torch.zeros(0, dtype=torch.int64, device=DEVICE),
        terms=True,
    )
    assert got.bound.shape == (0,) and got.log_responsibilities.shape == (0, C)
    got.bound.sum().backward()
    assert not parameter.grad.any()


def test_a_single_class_gives_the_bound_itself(backend):
    bounds = randn(B, 1, seed=1)
    x, bound = table_of(bounds)
    for log_q in (None, randn(B, 1, seed=2)):
        got = fastvae.marginalize(x, bound, classes=1, log_q=log_q, reduction="none")
        assert torch.equal(got, bounds[:, 0])


# Arguments of the function


@pytest.mark.parametrize("class_chunk, rows", [(None, [12]), (3, [9, 3]), (1, [3, 3, 3, 3]), (9, [12])])
def test_arguments_of_the_bound(class_chunk, rows):
    """The function gets one-hot rows, each example with its classes, or x itself class by class.

    Tensors in a dict are repeated alike.
    """
    x = {"x": rand(3, X, seed=1, dtype=torch.float64), "count": torch.tensor([5, 6, 7], device=DEVICE)}
    calls = []

    def bound(x, y):
        calls.append((x, y))
        return x["count"] * 10.0 + y.argmax(1)

    got = fastvae.marginalize(x, bound, classes=C, class_chunk=class_chunk, terms=True)
    assert [len(y) for _, y in calls] == rows
    for part, y in calls:
        assert y.dtype == torch.float64 and bool((y.sum(1) == 1).all()) and y.shape[1] == C
        assert torch.equal(part["x"], x["x"].repeat_interleave(len(y) // 3, 0))
        assert class_chunk != 1 or part["x"] is x["x"]
    values = 10.0 * x["count"][:, None] + torch.arange(C, device=DEVICE)
    torch.testing.assert_close(got.bound, torch.logsumexp(values.float(), 1) - math.log(C))
    torch.testing.assert_close(got.log_responsibilities, torch.log_softmax(values.float(), 1))


def test_classes_of_integer_data_have_the_default_dtype():
    x = torch.arange(B, device=DEVICE)
    seen = []
    fastvae.marginalize(x, lambda x, y: seen.append(y.dtype) or y[:, 0], classes=C)
    assert seen == [torch.get_default_dtype()]


def test_responsibilities_do_not_depend_on_the_labels():
    bounds, log_q = randn(B, C, seed=1), randn(B, C, seed=2)
    x, bound = table_of(bounds)
    labels = torch.tensor([0, 1, 2, 3, -1], device=DEVICE)
    got = fastvae.marginalize(x, bound, log_q=log_q, labels=labels, terms=True)
    assert torch.equal(got.log_responsibilities, torch.log_softmax(log_q, 1))
    got = fastvae.marginalize(x, bound, classes=C, labels=labels, terms=True)
    assert torch.equal(got.log_responsibilities, torch.log_softmax(bounds, 1))


class Net(nn.Sequential):
    """Network of its concatenated arguments."""

    def __init__(self, inputs: int, outputs: int, hidden: int = 16):
        super().__init__(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs))

    def forward(self, *parts):
        return super().forward(torch.cat(parts, 1))


class IgnoresClass(Net):
    """Decoder that ignores y."""

    def forward(self, z, y):
        return super().forward(z)


def m2(features=X, classes=C, latent=D, hidden=16):
    """Build the model M2 of Kingma et al.: encoder and decoder take y."""
    encoder = Net(features + classes, 2 * latent, hidden)
    decoder = Net(latent + classes, features, hidden)
    return fastvae.VAE(encoder, decoder, likelihood="bernoulli").to(DEVICE)


def gmvae(features=X, classes=C, latent=D, hidden=16):
    """Build a clustering model: encoder and prior take y."""
    encoder = Net(features + classes, 2 * latent, hidden)
    prior = nn.Linear(classes, 2 * latent)
    return fastvae.VAE(
        encoder,
        IgnoresClass(latent, features, hidden),
        likelihood="bernoulli",
        prior=lambda y: prior(y).chunk(2, 1),
        modules=[prior],
    ).to(DEVICE)


def test_a_shard_uses_the_noise_of_the_whole():
    vae, x = m2(), rand(B, X, seed=1)

    def of(x, first):
        def bound(x, y):
            return vae.elbo(x, context=y, reduction="none", generator=generator(3), row_offset=C * first)

        return fastvae.marginalize(x, bound, classes=C, reduction="none")

    whole = of(x, 0)
    parts = torch.cat([of(x[:2], 0), of(x[2:], 2)])
    # The networks' products have different sizes: a few roundings of numbers of about 10.
    torch.testing.assert_close(parts, whole, rtol=0, atol=100 * torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("classifier", [False, True], ids=["best q", "classifier"])
def test_compiled_in_one_graph(classifier):
    torch.manual_seed(0)
    vae, net = (m2 if classifier else gmvae)(), Net(X, C).to(DEVICE)
    x, labels = rand(B, X, seed=1), torch.tensor([-1, 3, 0, -1, 2], device=DEVICE)

    def step(x, labels):
        options = {"log_q": net(x), "alpha": 0.7} if classifier else {}
        return fastvae.marginalize(
            x, lambda x, y: vae.elbo(x, context=y, reduction="none"), classes=C, labels=labels, **options
        )

    parameters = [*vae.parameters(), *(net.parameters() if classifier else ())]
    results = []
    for function in (step, step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(1)
        value = function(x, labels)
        results.append((value, *torch.autograd.grad(value, parameters)))
    # The first call determines the latent dimension.
    for a, b in zip(results[1], results[2], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_a_compiled_label_out_of_range_is_nan():
    """A compiled call, which does not check labels, gives NaN for one out of range."""
    x, bound = table_of(randn(3, C, seed=1))

    def of(labels):
        return fastvae.marginalize(x, bound, classes=C, labels=labels, reduction="none")

    got = torch.compile(of, fullgraph=True, backend="aot_eager")(torch.tensor([C, -2, 1], device=DEVICE))
    assert got.isnan().tolist() == [True, True, False]


# The same model with a mixture as the prior of z


class Mixture(Distribution):
    """Mixture p(z) = Σ_y p(y) N(z; mu_y, σ_y²)."""

    def __init__(self, mu, logvar, logits):
        super().__init__()
        self.mu, self.logvar, self.logits = mu, logvar, logits

    def log_prob(self, z):
        return ops.mixture_log_prob(z, self.mu, self.logvar, self.logits)


@pytest.fixture(scope="module")
def mixture():
    """Build a model with one latent dimension, a nonlinear decoder, and log p(x) by quadrature."""
    mu = torch.tensor([[-2.0], [0.5], [1.5]], dtype=torch.float64, device=DEVICE)
    logvar = torch.tensor([[-1.0], [0.0], [-2.0]], dtype=torch.float64, device=DEVICE)
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=torch.float64, device=DEVICE)
    weight, offset = randn(1, X, seed=1, dtype=torch.float64), randn(X, seed=2, dtype=torch.float64)
    x = (rand(B, X, seed=3, dtype=torch.float64) < 0.5).double()

    def decoder(z, y=None):
        return torch.sin(2 * z) @ weight + offset

    prior = Mixture(mu, logvar, logits)
    # Smooth, and below 1e-40 at the ends: the trapezoidal rule is exact.
    z = torch.linspace(-12, 14, 20001, dtype=torch.float64, device=DEVICE)[:, None]
    log_joint = prior.log_prob(z[:, None])[:, 0] - torch.nn.functional.binary_cross_entropy_with_logits(
        decoder(z).expand(B, -1, -1), x[:, None].expand(B, len(z), X), reduction="none"
    ).sum(2)
    log_px = torch.logsumexp(log_joint, 1) + math.log(26 / 20000)
    q = torch.zeros(B, 1, dtype=torch.float64, device=DEVICE), torch.full_like(x[:, :1], 1.0)
    return x, q, decoder, prior, log_px


def test_the_mixture_prior_gives_the_same_log_px(mixture):
    """Summing y inside the prior of z or outside the integral over z gives the same log p(x)."""
    x, q, decoder, prior, log_px = mixture
    options = {"likelihood": "bernoulli", "k": 4000, "generator": generator(4)}
    inside = fastvae.log_marginal(x, q, decoder, prior=prior, **options)
    estimates = []

    def log_px_of_class(rows, y):
        q_of_rows = tuple(t.repeat_interleave(3, 0) for t in q)
        estimates.append(
            fastvae.log_marginal(
                rows,
                q_of_rows,
                decoder,
                context=y,
                prior=lambda y: (y @ prior.mu, y @ prior.logvar),
                **options,
            )
        )
        return estimates[-1].log_px

    outside = fastvae.marginalize(x, log_px_of_class, log_prior=prior.logits, terms=True)
    weight = outside.log_responsibilities.exp()
    stderr = (weight * estimates[0].log_px_stderr.reshape(B, 3)).square().sum(1).sqrt()
    for value, error in ((inside.log_px, inside.log_px_stderr), (outside.bound, stderr)):
        assert float(((value - log_px) / error).abs().max()) < 5
        assert float(error.max()) < 0.1


def test_the_mixture_prior_has_the_higher_elbo(mixture):
    """The mixture prior has the higher ELBO on the same draws, as log Σ p(y) exp is convex (Jensen)."""
    x, q, decoder, prior, _ = mixture
    options = {"likelihood": "bernoulli", "k": K, "kl": "mc", "reduction": "none"}
    inside = fastvae.elbo(x, q, decoder, prior=prior, generator=generator(5), **options)

    def bound(x, y):
        prior_of_class = lambda y: (y @ prior.mu, y @ prior.logvar)  # noqa: E731
        return fastvae.elbo(x, q, decoder, prior=prior_of_class, context=y, generator=generator(5), **options)

    summed = {"log_prior": prior.logits, "class_chunk": 1, "reduction": "none"}
    best = fastvae.marginalize(x, bound, **summed)
    other = fastvae.marginalize(x, bound, log_q=randn(B, 3, seed=6, dtype=torch.float64), **summed)
    assert bool((inside > best).all()) and bool((best > other).all())


def test_evaluate_of_each_class(mixture):
    """A data set is evaluated with each example once per class, then summed over classes."""
    x, q, decoder, prior, log_px = mixture
    encoder = lambda x, y: tuple(t[:1].expand(len(x), 1) for t in q)  # noqa: E731

    def log_px_of_class(x, y):
        result = evaluate_parts(
            encoder,
            decoder,
            torch.utils.data.TensorDataset(x, y),
            prepare_batch=lambda batch: {"x": batch[0], "context": batch[1]},
            k=4000,
            likelihood="bernoulli",
            prior=lambda y: (y @ prior.mu, y @ prior.logvar),
            progress=False,
            generator=generator(7),
        )
        errors.append(result.log_px_stderr)
        return result.log_px.to(x)

    errors = []
    got = fastvae.marginalize(x, log_px_of_class, log_prior=prior.logits, reduction="none")
    assert float((got - log_px).abs().max()) < 5 * float(errors[0].max())


# Trained


@pytest.fixture(scope="module")
def digits():
    data = pytest.importorskip("sklearn.datasets").load_digits()
    order = torch.randperm(len(data.data), generator=torch.Generator().manual_seed(0))
    x = torch.tensor(data.data, dtype=torch.float32)[order] / 16
    return x.to(DEVICE), torch.tensor(data.target)[order].to(DEVICE)


def _train(loss, parameters, steps):
    optimiser = torch.optim.Adam(parameters, 3e-3)
    values = []
    for _ in range(steps):
        optimiser.zero_grad()
        value = loss()
        value.backward()
        optimiser.step()
        values.append(float(value.detach()))
    return values


def test_m2_learns_digits_from_a_hundred_labels(digits):
    torch.manual_seed(0)
    x, target = digits
    labels = torch.where(torch.arange(len(x), device=DEVICE) < 100, target, -1)
    vae, classifier = m2(64, 10, 8, 64), Net(64, 10, 64).to(DEVICE)

    def loss():
        rows = torch.cat([torch.randint(100, (16,)), torch.randint(100, 1400, (48,))]).to(DEVICE)
        return -fastvae.marginalize(
            x[rows],
            lambda x, y: vae.elbo(x, context=y, reduction="none"),
            log_q=classifier(x[rows]),
            labels=labels[rows],
            alpha=20.0,
        )

    losses = _train(loss, [*vae.parameters(), *classifier.parameters()], 250)
    accuracy = float((classifier(x[1400:]).argmax(1) == target[1400:]).float().mean())
    assert accuracy > 0.7, accuracy  # of ten classes
    assert sum(losses[-20:]) < sum(losses[:20])


def test_clusters_of_digits(digits):
    torch.manual_seed(0)
    x, _ = digits
    vae = gmvae(64, 10, 8, 64)

    def bound(x, y):
        return vae.elbo(x, context=y, kl="mc", reduction="none")

    def loss():
        return -fastvae.marginalize(x[torch.randint(1400, (64,)).to(DEVICE)], bound, classes=10)

    losses = _train(loss, list(vae.parameters()), 150)
    assert sum(losses[-20:]) / 20 < sum(losses[:20]) / 20 - 5
    found = fastvae.marginalize(x[1400:], bound, classes=10, terms=True)
    total = found.log_responsibilities.exp().sum(1)
    torch.testing.assert_close(total, torch.ones_like(total))


# Wrong use


def _x():
    return rand(B, X, seed=1)


def _bound(x, y):
    return x.sum(1)


def _call(bound=_bound, x=None, **options):
    return lambda: fastvae.marginalize(_x() if x is None else x, bound, **{"classes": C, **options})


def _labels(*values, **options):
    return torch.tensor(values, device=DEVICE, **options)


WRONG = {
    "x no tensor": (_call(x=[1.0]), TypeError, ["x must be a tensor [B, ...]", "list"]),
    "x of no axes": (_call(x=torch.zeros(())), ValueError, ["x has the shape []"]),
    "parts of x": (
        _call(x={"x": torch.zeros(3, 2), "m": torch.zeros(4)}),
        ValueError,
        ["[3, 2], [4]", "same size in all"],
    ),
    "bound no function": (_call(torch.zeros(B)), TypeError, ["bound must be a function", "Tensor"]),
    "a reduced bound": (
        _call(lambda x, y: x.sum()),
        ValueError,
        ["bound returned a tensor of shape []", "5·4 bounds [20]", "reduction='none'"],
    ),
    "a bound of x's rows": (
        _call(lambda x, y: torch.zeros(B)),
        ValueError,
        ["bound returned a tensor of shape [5]", "5·4 bounds [20]"],
    ),
    "a bound of a call's rows": (
        _call(lambda x, y: torch.zeros(B, 1), class_chunk=1),
        ValueError,
        ["shape [5, 1]", "5·1 bounds [5]"],
    ),
    "a bound's terms": (
        _call(lambda x, y: fastvae.Terms(x, x, x, None, None)),
        TypeError,
        ["bound returned Terms", "such as its log_px or bound"],
    ),
    "a bound's estimates": (
        _call(lambda x, y: fastvae.audit.LatticeMarginal(x, x)),
        TypeError,
        ["bound returned LatticeMarginal", "such as its log_px or bound"],
    ),
    "a bound of integers": (_call(lambda x, y: y.argmax(1)), TypeError, ["torch.int64", "floating-point"]),
    "a bound elsewhere": (
        _call(lambda x, y: torch.zeros(len(x), device="meta")),
        ValueError,
        ["bound returned a tensor on meta"],
    ),
    "classes unknown": (_call(classes=None), ValueError, ["number of classes is not known"]),
    "classes no int": (_call(classes=4.0), TypeError, ["classes must be an int"]),
    "classes and log_q": (
        _call(log_q=torch.zeros(B, 3, device=DEVICE)),
        ValueError,
        ["4 by classes, 3 by log_q"],
    ),
    "no class": (_call(classes=None, log_q=torch.zeros(B, 0, device=DEVICE)), ValueError, ["at least one"]),
    "log_q of other rows": (
        _call(log_q=torch.zeros(3, C, device=DEVICE)),
        ValueError,
        ["log_q has shape [3, 4]", "[B, C] = [5, 4]"],
    ),
    "log_q of one axis": (_call(log_q=torch.zeros(C, device=DEVICE)), ValueError, ["log_q has shape [4]"]),
    "log_q of integers": (_call(log_q=_labels(1)), TypeError, ["log_q has dtype torch.int64"]),
    "log_q elsewhere": (_call(log_q=torch.zeros(B, C, device="meta")), ValueError, ["log_q is on meta"]),
    "log_prior of three axes": (
        _call(log_prior=torch.zeros(1, B, C, device=DEVICE)),
        ValueError,
        ["log_prior has shape [1, 5, 4]", "[C] or [B, C]"],
    ),
    "log_prior of other rows": (
        _call(log_prior=torch.zeros(1, C, device=DEVICE)),
        ValueError,
        ["log_prior has shape [1, 4]", "[5, 4]"],
    ),
    "labels of int32": (
        _call(labels=_labels(0, 1, 2, 3, 0, dtype=torch.int32)),
        TypeError,
        ["labels must be a tensor of int64", "torch.int32", "labels.long()"],
    ),
    "labels of a list": (_call(labels=[0, 1, 2, 3, 0]), TypeError, ["labels must be", "list"]),
    "labels one-hot": (
        _call(labels=torch.zeros(B, C, dtype=torch.int64, device=DEVICE)),
        ValueError,
        ["labels has shape [5, 4]", "argmax(1)"],
    ),
    "labels too large": (
        _call(labels=_labels(0, 1, 2, C, -1)),
        ValueError,
        ["labels must lie in 0 … 3", "example 3 has 4"],
    ),
    "labels too small": (_call(labels=_labels(0, 1, -2, 0, -1)), ValueError, ["example 2 has -2"]),
    "labels elsewhere": (
        _call(labels=torch.zeros(B, dtype=torch.int64, device="meta")),
        ValueError,
        ["labels is on meta"],
    ),
    "alpha without log_q": (
        _call(labels=_labels(0, 1, 2, 3, -1), alpha=1.0),
        ValueError,
        ["alpha is the weight of log q(y|x)", "needs log_q and labels"],
    ),
    "alpha without labels": (
        _call(log_q=torch.zeros(B, C, device=DEVICE), alpha=torch.tensor(0.5)),
        ValueError,
        ["needs log_q and labels"],
    ),
    "alpha negative": (_call(alpha=-1.0), ValueError, ["alpha must be finite and at least 0"]),
    "alpha no number": (_call(alpha="1"), TypeError, ["alpha must be a number"]),
    "class_chunk of none": (_call(class_chunk=0), ValueError, ["class_chunk must be at least 1"]),
    "reduction": (_call(reduction="avg"), ValueError, ["reduction='avg' is unknown"]),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case, monkeypatch):
    call, exception, fragments = WRONG[case]
    if DEVICE.type == "cuda":
        monkeypatch.setenv("FASTVAE_CHECK", "1")
    with pytest.raises(exception) as raised:
        call()
    assert type(raised.value) is exception
    for fragment in fragments:
        assert fragment in str(raised.value)
