"""Data and their companions: masks, size factors, contexts, example weights, several parts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import distributions as td
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal
from fastvae.likelihoods import (
    Gaussian,
    Joint,
    Likelihood,
    NegativeBinomial,
    Poisson,
    ZeroInflatedNegativeBinomial,
)
from fastvae.likelihoods.declared import DECLARED

from . import cases
from .conftest import DEVICE
from .models import evaluate_parts, generator, rand, randn

B, D, X, K = 5, 3, 7, 4
EVENT = (2, 3)


def zeros(*shape):
    return torch.zeros(*shape, device=DEVICE)


def a_q(seed=1, b=B):
    return randn(b, D, seed=seed), 0.3 * randn(b, D, seed=seed + 1)


class Outputs(nn.Module):
    """Decoder with as many outputs as a likelihood takes, each [N, *event]."""

    def __init__(self, likelihood, event, seed=3):
        super().__init__()
        self.number, self.event = cases.returned(likelihood), event
        width = self.number * math.prod(event)
        self.weight = nn.Parameter(0.3 * randn(D, width, seed=seed))

    def forward(self, z):
        outputs = (z @ self.weight).reshape(len(z), self.number, *self.event).unbind(1)
        return outputs[0] if self.number == 1 else outputs


def every(x, q, decoder, **options):
    """Return each objective's results and gradients, with the same noise."""
    parameters = [p for p in decoder.parameters()] if isinstance(decoder, nn.Module) else []
    results = {}
    for name, call in {
        "elbo": lambda **o: fastvae.elbo(x, q, decoder, k=3, **o),
        "iwae": lambda **o: fastvae.iwae(x, q, decoder, k=K, **o),
        "chunks": lambda **o: fastvae.iwae(x, q, decoder, k=K, k_chunk=3, estimator="dreg", **o),
    }.items():
        bound = call(generator=generator(5), reduction="none", **options)
        grads = torch.autograd.grad(bound.sum(), parameters) if parameters else ()
        results[name] = (bound.detach(), *grads)
    got = fastvae.log_marginal(x, q, decoder, k=9, k_chunk=4, generator=generator(5), **options)
    results["log_marginal"] = (got.log_px,)
    options.pop("prior", None)
    score = fastvae.reconstruction_log_prob(x, q, decoder, k=9, generator=generator(5), **options)
    results["reconstruction"] = (score,)
    return results


def assert_same(got, expected, rtol=2e-5, atol=2e-5):
    for name in expected:
        for one, other in zip(got[name], expected[name], strict=True):
            torch.testing.assert_close(one, other, rtol=rtol, atol=atol, msg=lambda m, n=name: f"{n}: {m}")


# Masks


@pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)
def test_masked_elements_have_no_effect(likelihood, backend):
    """Masked elements have no effect, whatever their values, and the gradients are finite."""
    x = cases.data(likelihood, B, *EVENT, seed=2)
    decoder = Outputs(likelihood, EVENT)
    mask = torch.tensor([[True, False, True], [False, True, True]], device=DEVICE)
    observed = mask.flatten()

    class Fewer(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = decoder

        def forward(self, z):
            outputs = self.inner(z)
            few = tuple(
                o.flatten(1)[:, observed] for o in ((outputs,) if torch.is_tensor(outputs) else outputs)
            )
            return few[0] if len(few) == 1 else few

    expected = every(x.flatten(1)[:, observed], a_q(), Fewer(), likelihood=likelihood)
    for bad in (math.nan, math.inf, -7.0):
        spoiled = torch.where(mask, x, torch.full((), bad, device=DEVICE))
        assert_same(every(spoiled, a_q(), decoder, likelihood=likelihood, mask=mask), expected)


@pytest.mark.parametrize("own", [False, True])
def test_masks_of_each_example(own):
    likelihood = "bernoulli"
    x, decoder = rand(B, X, seed=2).round(), Outputs("bernoulli", (X,))
    mask = rand(B, X, seed=3) < 0.6
    mask[0], mask[1] = True, False
    if own:
        likelihood = fastvae.likelihoods.from_distribution(lambda logits: td.Bernoulli(logits=logits))
    whole = every(x, a_q(), decoder, likelihood="bernoulli")
    got = every(x, a_q(), decoder, likelihood=likelihood, mask=mask)
    assert_same(
        {"log_marginal": (got["log_marginal"][0][:1],)}, {"log_marginal": (whole["log_marginal"][0][:1],)}
    )
    # Nothing was observed: log p is 0.
    assert float(got["reconstruction"][0][1]) == 0
    for row in range(2, B):
        seen = mask[row]
        q = tuple(v[row : row + 1] for v in a_q())
        expected = fastvae.log_marginal(
            x[row : row + 1, seen], q, lambda z, s=seen: decoder(z)[:, s], k=9, likelihood="bernoulli",
            generator=generator(5), row_offset=row,
        )  # fmt: skip
        torch.testing.assert_close(got["log_marginal"][0][row], expected.log_px[0], rtol=1e-5, atol=1e-5)


# Sizes


@pytest.mark.parametrize("likelihood", [n for n in cases.LIKELIHOODS if DECLARED[n].takes_size])
def test_size_factors_scale_the_mean(likelihood, backend):
    x = cases.data(likelihood, B, X, seed=2).round()
    decoder, size = Outputs(likelihood, (X,)), torch.tensor([0.5, 1.0, 3.0, 10.0, 2.0], device=DEVICE)

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = decoder

        def forward(self, z):
            outputs = self.inner(z)
            first, *others = (outputs,) if torch.is_tensor(outputs) else outputs
            first = first + size.log().repeat(len(z) // B)[:, None]
            return (first, *others) if others else first

    expected = every(x, a_q(), Scaled(), likelihood=likelihood)
    assert_same(every(x, a_q(), decoder, likelihood=likelihood, size_factor=size), expected)
    ones = size[:, None].int() * 0 + 1
    assert_same(every(x.int(), a_q(), decoder, likelihood=likelihood, size_factor=ones),
                every(x, a_q(), decoder, likelihood=likelihood))  # fmt: skip


# Contexts


def _conditional():
    labels = torch.arange(B, device=DEVICE) % 3
    table, weight = randn(3, D, seed=6), randn(D, X, seed=7)
    return labels, table, lambda z, y: (z + table[y]) @ weight


@pytest.mark.parametrize("kind", ["tensor", "dict"])
def test_contexts_stay_with_their_examples(kind):
    labels, table, decoder = _conditional()
    x, q = rand(B, X, seed=2).round(), a_q()
    rows = lambda z: labels.repeat(len(z) // B)  # noqa: E731
    expected = every(x, q, lambda z: decoder(z, rows(z)), likelihood="bernoulli")
    if kind == "tensor":
        got = every(x, q, decoder, likelihood="bernoulli", context=labels)
    else:
        context = {"label": labels, "unused": zeros(B, 2, 4)}
        got = every(x, q, lambda z, c: decoder(z, c["label"]), likelihood="bernoulli", context=context)
    assert_same(got, expected)


@pytest.mark.parametrize("returned", ["pair", "tensor", "DiagonalNormal", "torch", "Laplace"])
def test_a_conditional_prior(returned):
    labels, table, decoder = _conditional()
    x, q = rand(B, X, seed=2).round(), a_q()
    mu, logvar = table[labels], 0.1 * table[labels]
    prior = {
        "pair": lambda y: (table[y], 0.1 * table[y]),
        "tensor": lambda y: torch.cat([table[y], 0.1 * table[y]], 1),
        "DiagonalNormal": lambda y: DiagonalNormal(table[y], 0.1 * table[y]),
        "torch": lambda y: td.Normal(table[y], torch.exp(0.05 * table[y])),
        "Laplace": lambda y: td.Laplace(table[y], torch.exp(0.05 * table[y])),
    }[returned]
    fixed = td.Laplace(mu, torch.exp(0.5 * logvar)) if returned == "Laplace" else DiagonalNormal(mu, logvar)
    expected = every(x, q, decoder, likelihood="bernoulli", context=labels, prior=fixed)
    assert_same(every(x, q, decoder, likelihood="bernoulli", context=labels, prior=prior), expected)


def test_a_conditional_vae():
    """Encoder, decoder and prior receive the context; the VAE owns all networks and samples by label."""

    class Concatenated(nn.Linear):
        def forward(self, x, y):
            return super().forward(torch.cat([x, nn.functional.one_hot(y, 3).to(x.dtype)], 1))

    prior = nn.Embedding.from_pretrained(0.2 * randn(3, 2 * D, seed=8), freeze=False)
    vae = fastvae.VAE(
        Concatenated(X + 3, 2 * D), Concatenated(D + 3, X), likelihood="bernoulli", prior=prior, latent_dim=D
    ).to(DEVICE)
    assert any(p is prior.weight for p in vae.parameters())
    with torch.no_grad():
        vae.encoder.weight *= 0.3
    x, labels = rand(B, X, seed=2).round(), torch.arange(B, device=DEVICE) % 3
    vae.elbo(x, context=labels).backward()
    assert all(p.grad is not None and bool(p.grad.ne(0).any()) for p in vae.parameters())
    got = vae.iwae(x, K, context=labels, generator=generator(1))
    expected = fastvae.iwae(
        x, vae.encoder(x, labels), lambda z: vae.decoder(z, labels.repeat(K)), k=K, likelihood="bernoulli",
        prior=DiagonalNormal(*prior(labels).chunk(2, 1)), generator=generator(1),
    )  # fmt: skip
    torch.testing.assert_close(got, expected)
    assert vae.sample(B, context=labels).shape == (B, X)
    assert vae.reconstruct(x, context=labels).shape == (B, X)
    loader = [(x[:2], labels[:2]), (x[2:], labels[2:])]
    prepare_batch = lambda batch: {"x": batch[0], "context": batch[1]}  # noqa: E731
    result = vae.evaluate(loader, k=200, prepare_batch=prepare_batch, progress=False, generator=generator(3))
    again = vae.evaluate(
        [(x, labels)], k=200, k_chunk=7, prepare_batch=prepare_batch, progress=False, generator=generator(3)
    )
    torch.testing.assert_close(result.log_px, again.log_px)


def test_finished_examples_are_dropped_with_their_labels():
    scale, weight = torch.tensor([0.0, 0.3, 1.0], device=DEVICE), randn(D, X, seed=7)
    x, labels = rand(2 * B, X, seed=2).round(), torch.arange(2 * B, device=DEVICE) % 3

    def run(**options):
        return evaluate_parts(
            lambda x, y: (zeros(len(x), D), zeros(len(x), D)),
            lambda z, y: scale[y][:, None] * (z @ weight),
            [(x[:6], labels[:6]), (x[6:], labels[6:])],
            prepare_batch=lambda batch: {"x": batch[0], "context": batch[1]}, likelihood="bernoulli",
            generator=generator(3), progress=False, **options,
        )  # fmt: skip

    got, whole = run(tol=0.05, k=6400), run(k=6400)
    easy = (labels == 0).cpu()
    assert bool((got.k[easy] == 100).all()) and int(got.k[~easy].max()) > 100
    torch.testing.assert_close(got.log_px[easy], torch.full_like(got.log_px[easy], -X * math.log(2)))
    torch.testing.assert_close(got.log_px, whole.log_px, rtol=0, atol=0.5)


# Weights of examples


@pytest.mark.parametrize("objective", ["elbo", "iwae", "chunks"])
def test_examples_of_zero_weight_may_have_any_value(objective):
    """Examples of weight 0 are replaced before the encoder, and their bounds excluded."""
    x, decoder, weights = rand(B, X, seed=2).round(), Outputs("bernoulli", (X,)), rand(B, seed=4)
    encoder = nn.Linear(X, 2 * D).to(DEVICE)
    weights[1] = 0

    def gradients(x):
        x = torch.where(weights[:, None] > 0, x, 0)
        options = {"likelihood": "bernoulli", "reduction": "none", "generator": generator(5)}
        if objective == "elbo":
            bound = fastvae.elbo(x, encoder(x), decoder, **options)
        else:
            options["k_chunk"] = 3 if objective == "chunks" else None
            bound = fastvae.iwae(x, encoder(x), decoder, k=K, **options)
        total = (weights * bound).sum()
        return total, *torch.autograd.grad(total, [*encoder.parameters(), *decoder.parameters()])

    spoilt = x.clone()
    spoilt[1] = math.nan
    expected, got = gradients(x), gradients(spoilt)
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


# Several parts


def _parts():
    joint = Joint(pixels="bernoulli", genes=NegativeBinomial(2.0))
    x = {"pixels": rand(B, *EVENT, seed=2).round(), "genes": cases.data("poisson", B, X, seed=3).int()}
    pixels, genes = randn(D, 6, seed=4), 0.2 * randn(D, X, seed=5)
    return joint, x, lambda z: {"pixels": (z @ pixels).reshape(-1, *EVENT), "genes": z @ genes}


def test_a_joint_likelihood_is_the_sum_of_its_parts(backend):
    joint, x, decoder = _parts()
    z = randn(K * B, D, seed=8)
    parameters = decoder(z)
    logits, m = (parameters[n].reshape(K, B, -1) for n in ("pixels", "genes"))
    expected = td.Bernoulli(logits=logits).log_prob(x["pixels"].flatten(1)).sum(2)
    counts = td.NegativeBinomial(2.0, logits=m - math.log(2.0))
    expected = expected + counts.log_prob(x["genes"].to(m.dtype)).sum(2)
    torch.testing.assert_close(joint.log_likelihood(x, parameters, K), expected)
    results = every(x, a_q(), decoder, likelihood=joint)
    assert all(bool(v.isfinite().all()) for values in results.values() for v in values)
    assert {n: tuple(v.shape) for n, v in joint.mean(parameters).items()} == {
        "pixels": (K * B, *EVENT), "genes": (K * B, X),
    }  # fmt: skip
    assert set(joint.sample(parameters)) == {"pixels", "genes"}


def test_masks_and_size_factors_of_parts():
    joint, x, decoder = _parts()
    size = rand(B, seed=9) + 0.5
    without = every(
        x, a_q(), decoder, likelihood=joint, mask={"genes": zeros(B, X).bool()}, size_factor={"genes": size}
    )
    alone = every(x["pixels"], a_q(), lambda z: decoder(z)["pixels"], likelihood="bernoulli")
    assert_same(without, alone)
    sized = every(x, a_q(), decoder, likelihood=joint, size_factor={"genes": size})
    genes = every(
        x["genes"],
        a_q(),
        lambda z: decoder(z)["genes"],
        likelihood=NegativeBinomial(2.0),
        size_factor=size,
    )
    got = sized["elbo"][0] - alone["elbo"][0]
    kl = fastvae.elbo(
        x["pixels"], a_q(), lambda z: decoder(z)["pixels"], likelihood="bernoulli", terms=True
    ).kl
    torch.testing.assert_close(got, genes["elbo"][0] + kl, rtol=1e-4, atol=1e-4)


def test_data_sets_of_several_parts(tmp_path):
    """Data may be dicts of tensors or arrays, or dict batches; bits count all parts; checkpoints work."""
    joint, x, decoder = _parts()
    weight = randn(6 + X, 2 * D, seed=10)

    def encoder(x):
        assert all(t.is_floating_point() for t in x.values())
        return 0.1 * torch.cat([t.flatten(1).log1p() for t in x.values()], 1) @ weight

    def run(data, **options):
        options = {"k": 50, "progress": False, "generator": generator(2), **options}
        return evaluate_parts(encoder, decoder, data, likelihood=joint, **options)

    whole = run(x)
    arrays = {n: np.asarray(t.cpu()) for n, t in x.items()}
    batches = [{n: t[:2] for n, t in x.items()}, {n: t[2:] for n, t in x.items()}]
    file = tmp_path / "run.npz"
    for data, options in (
        (arrays, {}),
        (batches, {}),
        (x, {"batch_size": 2}),
        (batches, {"checkpoint": file}),
    ):
        if DEVICE.type == "cpu" or data is not arrays:
            torch.testing.assert_close(run(data, **options).log_px, whole.log_px)
    torch.testing.assert_close(run(batches, checkpoint=file).log_px, whole.log_px)
    other = [{**batches[0], "genes": batches[0]["genes"] + 1}, batches[1]]
    with pytest.raises(ValueError, match="was made with other data: batch 0 differs"):
        run(other, checkpoint=file)
    assert whole.bits_per_dim == pytest.approx(whole.nll / math.log(2) / (6 + X))
    vae = fastvae.VAE(encoder, decoder, likelihood=joint, latent_dim=D, modules=[])
    assert vae(x).shape == () and vae.sample(4)["genes"].shape == (4, X)
    assert vae.reconstruct(x)["pixels"].shape == (B, *EVENT)


# Users' likelihoods


def test_likelihoods_from_torch_distributions():
    """A family from torch.distributions, by arguments, names or one tensor, equals fastvae's likelihood."""
    x, decoder = cases.data("laplace", B, X, seed=2), Outputs("laplace", (X,))
    expected = every(x, a_q(), decoder, likelihood="laplace")
    of_two = fastvae.likelihoods.from_distribution(lambda m, s: td.Laplace(m, s.exp()))
    assert_same(every(x, a_q(), decoder, likelihood=of_two), expected)

    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = decoder

        def forward(self, z):
            location, log_scale = self.inner(z)
            return {"loc": location, "scale": log_scale.exp()}

    by_name = fastvae.likelihoods.from_distribution(td.Laplace)
    assert_same(every(x, a_q(), Named(), likelihood=by_name), expected)
    independent = fastvae.likelihoods.from_distribution(
        lambda m, s: td.Independent(td.Laplace(m, s.exp()), 1)
    )
    assert_same(every(x, a_q(), decoder, likelihood=independent), expected)
    vae = fastvae.VAE(lambda x: a_q(), decoder, likelihood=of_two, latent_dim=D, modules=[])
    assert vae.sample(4).shape == (4, X) and vae.reconstruct(x).shape == (B, X)
    drawn = [vae.sample(4, generator=generator(7)) for _ in range(2)]
    assert torch.equal(*drawn)


def test_outputs_may_have_an_axis_of_classes():
    """Outputs may have an axis that the data lack: logits [N, *event, C], integer x."""
    classes = 4
    weight = randn(D, X * classes, seed=3)
    decoder = lambda z: (z @ weight).reshape(-1, X, classes)  # noqa: E731
    x = torch.randint(classes, (B, X), device=DEVICE)
    own = fastvae.likelihoods.from_distribution(lambda logits: td.Categorical(logits=logits))
    z = randn(K * B, D, seed=4)
    got = own.log_likelihood(x, decoder(z), K)
    log_p = decoder(z).log_softmax(-1).reshape(K, B, X, classes)
    expected = log_p.gather(3, x.expand(K, B, X)[..., None])[..., 0].sum(2)
    torch.testing.assert_close(got, expected)
    assert fastvae.iwae(x, a_q(), decoder, k=K, likelihood=own).isfinite()


def test_a_custom_likelihood_with_learned_parameters():
    class Learned(Likelihood):
        def __init__(self):
            super().__init__()
            self.log_scale = nn.Parameter(torch.zeros(X))

        def log_prob(self, x, mean):
            return td.Normal(mean, self.log_scale.exp()).log_prob(x)

    likelihood = Learned().to(DEVICE)
    x, decoder = randn(B, X, seed=2), nn.Linear(D, X).to(DEVICE)
    fastvae.iwae(x, a_q(), decoder, k=K, k_chunk=3, likelihood=likelihood).backward()
    bounds = [
        fastvae.iwae(x, a_q(), decoder, k=K, likelihood=kind, generator=generator(3))
        for kind in (likelihood, Gaussian(torch.ones(X, device=DEVICE)))
    ]
    torch.testing.assert_close(*bounds)
    assert likelihood.log_scale.grad.shape == (X,)


# Draws of x


@pytest.mark.parametrize("likelihood", cases.LIKELIHOODS)
def test_scores_of_draws_have_mean_0(likelihood):
    """For draws from p(x|z), the scores by each output have mean 0, as has x minus its mean."""
    n = 40_000
    kind = DECLARED[likelihood]()
    outputs = [0.5 * randn(1, X, seed=11 + i, dtype=torch.float64) for i in range(cases.returned(likelihood))]
    if likelihood == "student_t":
        outputs[2] = outputs[2] + 1.8  # a variance
    wide = [o.expand(n, X).clone().requires_grad_() for o in outputs]
    given = wide[0] if len(wide) == 1 else tuple(wide)
    torch.manual_seed(3)
    x = kind.sample(given, generator=None).detach()
    assert x.shape == (n, X) and x.dtype == torch.float64
    scores = torch.autograd.grad(kind.log_prob(x, given).sum(), wide)
    for score in (*scores, x - kind.mean(given).detach()):
        error = score.std(0) / math.sqrt(n)
        assert bool((score.mean(0).abs() < 6 * error).all())  # six standard errors
    drawn = [kind.sample(given, generator=generator(4)) for _ in range(2)]
    assert torch.equal(*drawn)


def test_draws_with_fixed_parameters():
    location = randn(3000, X, seed=1)
    drawn = fastvae.likelihoods.Laplace(scale=0.01).sample(location) - location
    assert bool((drawn.abs().mean() - 0.01).abs() < 6e-4)
    counts = ZeroInflatedNegativeBinomial(5.0).sample((location, location + 30))
    assert not bool(counts.any())  # all are dropped
    half = Poisson().sample(torch.full((9, 9), 8.0, dtype=torch.bfloat16, device=DEVICE))
    assert half.dtype == torch.float32 and bool((half == half.round()).all())


# Error messages

POISSON = {"likelihood": "poisson"}
WRONG = {
    "a mask of numbers": (
        {"mask": torch.ones(B, X)}, TypeError, ["mask must be a tensor of bool", "float32", "mask.bool()"],
    ),
    "a mask of another shape": (
        {"mask": torch.ones(B, X + 1).bool()}, ValueError, ["mask has shape [5, 8]", "[5, 7]", "[7]"],
    ),
    "a size of another likelihood": (
        {"likelihood": "bernoulli", "size_factor": torch.ones(B)},
        TypeError,
        ["size_factor multiplies the mean of counts", "Bernoulli", "NegativeBinomial", "context="],
    ),
    "a size of other rows": (
        {**POISSON, "size_factor": torch.ones(B - 1)},
        ValueError,
        ["size_factor has shape [4]"],
    ),
    "a size of 0": (
        {**POISSON, "size_factor": torch.tensor([1.0, 2.0, 0.0, 1.0, 1.0])},
        ValueError,
        ["size_factor must be positive", "example 2 has 0", "leave it out"],
    ),
    "a number for a size": (
        {**POISSON, "size_factor": 3.0},
        TypeError,
        ["size_factor must be a tensor [B]", "float"],
    ),
    "a context of other rows": (
        {"context": torch.ones(B + 1)}, ValueError, ["context has shape [6] but q has 5 rows"],
    ),
    "a list for a context": ({"context": [1, 2]}, TypeError, ["context must be a tensor or a dict", "list"]),
    "a prior without a context": (
        {"prior": lambda c: c}, ValueError, ["prior is a function of the context", "pass context="],
    ),
    "a prior that returns anything": (
        {"prior": lambda c: 3, "context": torch.ones(B, 1)}, TypeError, ["prior, a function", "got int"],
    ),
    "a Joint for one tensor": (
        {"likelihood": Joint(a="poisson")}, TypeError, ["x must be a dict with 'a'", "a tensor [5,"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_wrong_use(case, monkeypatch):
    monkeypatch.setenv("FASTVAE_CHECK", "1")  # on a GPU data are checked on request only
    options, kind, words = WRONG[case]
    options = {n: v.to(DEVICE) if torch.is_tensor(v) else v for n, v in options.items()}
    x = zeros(B, X)
    decoder = lambda z, *context: zeros(len(z), X)  # noqa: E731
    for objective in (fastvae.elbo, fastvae.iwae, fastvae.log_weights, fastvae.log_marginal):
        more = {} if objective is fastvae.elbo else {"k": 2}
        with pytest.raises(kind) as raised:
            objective(x, a_q(), decoder, **{"likelihood": "poisson", **more, **options})
        for word in words:
            assert word in str(raised.value)


def test_a_decoder_without_a_context():
    with pytest.raises(TypeError) as raised:
        fastvae.elbo(zeros(B, X), a_q(), nn.Linear(D, X), likelihood="poisson", context=zeros(B, 1))
    if hasattr(raised.value, "add_note"):  # Python 3.11
        note = "with context= fastvae calls the decoder with it as the second argument"
        assert any(note in added for added in raised.value.__notes__)


def test_wrong_parts():
    joint, x, decoder = _parts()
    calls = {
        "x must be a dict with 'pixels', 'genes', the parts of Joint; 'genes' is missing": (
            {"pixels": x["pixels"]}, decoder, joint,
        ),
        "x must be a dict .*; 'more' is not one of them": ({**x, "more": x["genes"]}, decoder, joint),
        "the decoder's output must be a dict .*; got a tensor": (x, lambda z: zeros(len(z), X), joint),
        "the decoder's output must be a dict .*; 'genes' is missing, 'gene' is not one": (
            x, lambda z: {"pixels": zeros(len(z), *EVENT), "gene": zeros(len(z), X)}, joint,
        ),
        r"x is a dict, but a Bernoulli likelihood takes one tensor; .* use "
        r"fastvae.likelihoods.Joint\(pixels=": (
            x, decoder, "bernoulli",
        ),
        r"x\['genes'\] has shape \[4, 7\] but q has 5 rows": ({**x, "genes": x["genes"][1:]}, decoder, joint),
        r"x\['pixels'\] has dtype torch.int32": ({**x, "pixels": x["pixels"].int() * 255}, decoder,
                                                  Joint(pixels="gaussian", genes="poisson")),
    }  # fmt: skip
    for words, (data, f, likelihood) in calls.items():
        with pytest.raises((TypeError, ValueError), match=words):
            fastvae.iwae(data, a_q(), f, k=2, likelihood=likelihood)
    masks = {"parts \\['more'\\]": {"more": zeros(B, X).bool()}, "Tensor": zeros(B, X).bool()}
    for came, mask in masks.items():
        with pytest.raises(TypeError, match=f"mask must be a dict with masks of parts of x.*got {came}"):
            fastvae.iwae(x, a_q(), decoder, k=2, likelihood=joint, mask=mask)
    with pytest.raises(ValueError, match="Joint needs parts by name"):
        Joint()
    with pytest.raises(TypeError, match="constructor must be a function of the decoder's output"):
        fastvae.likelihoods.from_distribution(td.Normal(0.0, 1.0))
    own = fastvae.likelihoods.from_distribution(lambda logits: logits)
    with pytest.raises(
        TypeError, match=r"from_distribution returned a tensor \[10, 7\]; expected a torch.dist"
    ):
        fastvae.iwae(zeros(B, X), a_q(), lambda z: zeros(len(z), X), k=2, likelihood=own)
    with pytest.raises(TypeError, match="prepare_batch must return a dict with 'x'.*; got tuple"):
        evaluate_parts(
            lambda x: a_q(), lambda z: zeros(len(z), X), [zeros(B, X)], k=2, prepare_batch=lambda b: (b, b),
            progress=False,
        )  # fmt: skip
    with pytest.raises(TypeError, match="got unknown 'label'"):
        evaluate_parts(
            lambda x: a_q(), lambda z: zeros(len(z), X), [zeros(B, X)], k=2, progress=False,
            prepare_batch=lambda b: {"x": b, "label": b},
        )  # fmt: skip


COMPILED = {
    "mask": {"mask": True},
    "mask, in chunks": {"mask": True, "k_chunk": 2},
    "context": {"context": True},
    "conditional prior": {"context": True, "prior": lambda c: (c.expand(B, D), c.expand(B, D) * 0)},
    "size_factor": {"likelihood": "poisson", "size_factor": True},
    "own": {
        "likelihood": fastvae.likelihoods.from_distribution(lambda m: td.Normal(m, 1.0, validate_args=False))
    },
}


@pytest.mark.parametrize("case", COMPILED)
def test_under_torch_compile(case):
    """Compiles without graph breaks and gives the same numbers."""
    torch._dynamo.reset()
    options = {"likelihood": "bernoulli", **COMPILED[case]}
    given = {
        "mask": rand(B, X, seed=3) < 0.5,
        "context": randn(B, 1, seed=4),
        "size_factor": rand(B, seed=5) + 0.5,
    }
    options = {n: given.get(n, v) for n, v in options.items()}
    x, q, decoder = rand(B, X, seed=2).round(), a_q(), Outputs("bernoulli", (X,))
    f = (lambda z, c: decoder(z) + c) if "context" in options else decoder

    def step():
        return fastvae.iwae(x, q, f, k=K, **options)

    torch.manual_seed(7)
    expected = step()
    torch.manual_seed(7)
    got = torch.compile(step, fullgraph=True, backend="aot_eager")()
    torch.testing.assert_close(got, expected)
    grads = [torch.autograd.grad(v, decoder.parameters())[0] for v in (got, expected)]
    torch.testing.assert_close(*grads, rtol=1e-4, atol=1e-5)
