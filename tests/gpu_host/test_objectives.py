"""Objectives on the card compute what they compute on the CPU: bounds, estimators, priors, whole steps."""

from __future__ import annotations

import copy
import threading

import pytest
import torch
from torch import nn

import fastvae
from fastvae.distributions import DiagonalNormal, FullNormal, Laplace, NormalMixture, VampPrior
from fastvae.objectives.bounds import CIWAE, IWAE, TVO, Jackknife, UStatistic

from .compared import DTYPES, B, D, H, U, X, assert_launched, assert_same, draw, simulated

# A number of samples that the bounds' groups divide.
K = 6


def _inputs(dtype=torch.float32):
    """Return x, mu, logvar and the decoder's weight."""
    x = (draw(B, X, seed=1) > 0).to(dtype)
    given = draw(B, D, seed=2), draw(B, D, seed=3), draw(X, D, seed=4, scale=0.3)
    return [x, *(t.to(dtype).requires_grad_() for t in given)]


def _decoder(weight):
    return lambda z: z.to(weight.dtype) @ weight.T


ELBOS = {
    "one sample": {},
    "samples": {"k": K, "reduction": "none"},
    "beta": {"beta": 0.3, "reduction": "sum"},
    "free bits": {"free_bits": 0.2},
    "free bits per example": {"free_bits": 0.2, "free_bits_per": "example"},
    "monte carlo": {"kl": "mc", "k": K},
    "terms": {"terms": True},
}


def _values(found):
    """Return the tensors of a result with or without terms."""
    return found if isinstance(found, torch.Tensor) else [v for v in vars(found).values() if v is not None]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", ELBOS.values(), ids=ELBOS)
def test_elbo(card, options, dtype):
    def elbo(x, mu, logvar, weight):
        decoder = _decoder(weight)
        return _values(fastvae.elbo(x, (mu, logvar), decoder, likelihood="bernoulli", **options))

    # Half-precision products round to other neighbours on another device's order of sums.
    assert_same("elbo", elbo, _inputs(dtype), magnified=16 if dtype.itemsize == 2 else 1)
    assert_launched(card, 4)


@pytest.mark.parametrize("k_chunk", [None, 2])
@pytest.mark.parametrize("estimator", ["iwae", "dreg", "stl"])
def test_iwae(card, estimator, k_chunk):
    def iwae(x, mu, logvar, weight):
        return fastvae.iwae(
            x,
            (mu, logvar),
            _decoder(weight),
            k=K,
            k_chunk=k_chunk,
            estimator=estimator,
            likelihood="bernoulli",
        )

    assert_same("iwae", iwae, _inputs(), magnified=16)
    assert_launched(card, 6)


BOUNDS = {
    "groups": IWAE(groups=3),
    "vr": IWAE(alpha=0.3, groups=2),
    "ciwae": CIWAE(beta=0.3),
    "u": UStatistic(m=3, permutations=2),
    "jackknife": Jackknife(),
    "tvo": TVO(betas=(0.0, 0.1, 0.5)),
}


@pytest.mark.parametrize("bound", BOUNDS.values(), ids=BOUNDS)
def test_bounds(card, bound):
    def value(x, mu, logvar, weight):
        return fastvae.bound(x, (mu, logvar), _decoder(weight), bound, k=K, likelihood="bernoulli")

    assert_same("bound", value, _inputs(), magnified=16)
    assert_launched(card, 3)


PRIORS = {
    "diagonal": ([(D,), (D,)], DiagonalNormal),
    "of rows": ([(B, D), (B, D)], DiagonalNormal),
    "full": ([(D,), (D * (D + 1) // 2,)], FullNormal),
    "laplace": ([(D,), (D,)], Laplace),
    "mixture": ([(U, D), (U, D), (U,)], NormalMixture),
    "vamp": ([(2 * D, X), (U, X)], lambda weight, u: VampPrior(lambda u: u @ weight.T, u)),
}


@pytest.mark.parametrize("shapes, make", PRIORS.values(), ids=PRIORS)
def test_priors(card, shapes, make):
    def iwae(x, mu, logvar, weight, *parameters):
        prior = make(*parameters)
        return fastvae.iwae(x, (mu, logvar), _decoder(weight), k=K, prior=prior, likelihood="bernoulli")

    if make in (NormalMixture, DiagonalNormal) or make is PRIORS["vamp"][1]:
        # Modules make leaves of their parameters, whose gradients are left out.
        given = [draw(*s, seed=i, scale=0.4) for i, s in enumerate(shapes)]
    else:
        given = [draw(*s, seed=i, scale=0.4).requires_grad_() for i, s in enumerate(shapes)]
    assert_same("prior", iwae, [*_inputs(), *given], magnified=16)
    assert_launched(card, 2)


def test_other_objectives(card):
    def of(function, **options):
        def value(x, mu, logvar, weight):
            found = function(x, (mu, logvar), _decoder(weight), likelihood="bernoulli", **options)
            return _values(found) if function is fastvae.beta_tc else found

        return value

    assert_same("beta_tc", of(fastvae.beta_tc, dataset_size=100), _inputs())

    def log_weights(*inputs):
        return _values(of(fastvae.log_weights, k=K)(*inputs))

    assert_same("log_weights", log_weights, _inputs())

    def marginal(x, mu, logvar, weight):
        def bound(x, label):
            return fastvae.elbo(
                x, (mu.repeat(len(x) // B, 1), logvar.repeat(len(x) // B, 1)), _decoder(weight),
                likelihood="bernoulli", reduction="none",
            )  # fmt: skip

        return fastvae.marginalize(x, bound, classes=U)

    assert_same("marginalize", marginal, _inputs())

    def log_marginal(*inputs):
        with torch.no_grad():
            return of(fastvae.log_marginal, k=50, k_chunk=20)(*inputs).log_px

    assert_same("log_marginal", log_marginal, [t.detach() for t in _inputs()])
    assert_launched(card, 12)


def _vae(device, **options):
    torch.manual_seed(3)
    encoder = nn.Sequential(nn.Linear(X, H), nn.Tanh(), nn.Linear(H, 2 * D))
    decoder = nn.Sequential(nn.Linear(D, H), nn.Tanh(), nn.Linear(H, X))
    return fastvae.VAE(encoder, decoder, likelihood="bernoulli", **options).to(device)


def _trained(device, wrap=lambda step: step, steps=7, batches=(B,)):
    """Return the losses and the parameters of a few steps of Adam."""
    vae = _vae(device)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-2, capturable=device == "cuda")

    def step(x):
        optimizer.zero_grad()
        loss = -vae.iwae(x, k=K)
        loss.backward()
        optimizer.step()
        return loss.detach()

    step = wrap(step)
    torch.manual_seed(5)
    data = [(draw(n, X, seed=n) > 0).float().to(device) for n in batches]
    losses = [step(data[i % len(data)]) for i in range(steps)]
    return torch.stack(losses).cpu(), nn.utils.parameters_to_vector(vae.parameters()).detach().cpu()


def _assert_trained_alike(expected, actual):
    for e, a in zip(expected, actual, strict=True):
        torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)


def test_training(card):
    _assert_trained_alike(_trained("cpu"), _trained("cuda"))
    assert card is None or len(card) == 7 * 4


@simulated
def test_training_by_a_graph(card):
    """A replay computes with new noise and the new parameters; other shapes run eagerly."""
    expected = _trained("cpu", batches=(B, B + 2))
    _assert_trained_alike(expected, _trained("cuda", fastvae.graphed, batches=(B, B + 2)))
    # Nothing ran in the capture.
    assert len(card) == 7 * 4


@simulated
def test_training_compiled(card):
    torch._dynamo.reset()

    def compiled(step):
        # Its own random numbers are others than eager torch's.
        return torch.compile(step, options={"fallback_random": True})

    _assert_trained_alike(_trained("cpu"), _trained("cuda", compiled))
    names = {launch.name for launch in card}
    assert any(n.startswith("triton_") for n in names) and "log_prob_kernel" not in names


def test_evaluation(card):
    x = (draw(2 * B, X, seed=6) > 0).float()
    found = []
    for device in ("cpu", "cuda"):
        vae = _vae(device)
        torch.manual_seed(5)
        found.append(fastvae.evaluate(vae, x, k=20, k_chunk=6, batch_size=4, progress=False))
    cpu, card_ = found
    for name in ("log_px", "log_px_stderr", "elbo"):
        torch.testing.assert_close(getattr(card_, name), getattr(cpu, name), rtol=1e-5, atol=1e-5)
    assert abs(card_.nll - cpu.nll) < 1e-5
    assert_launched(card, 1)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_streams_devices_and_threads(card):
    """Values are those of the CPU wherever they are computed."""
    inputs = _inputs()
    generator = torch.Generator().manual_seed(3)

    def gradients(device, generator):
        x, *leaves = (t.detach().to(device) for t in inputs)
        mu, logvar, weight = (t.requires_grad_() for t in leaves)
        bound = fastvae.iwae(
            x, (mu, logvar), _decoder(weight), k=K, likelihood="bernoulli", generator=generator
        )
        return [g.cpu() for g in torch.autograd.grad(bound, (mu, logvar, weight))]

    expected, found, errors = gradients("cpu", generator), [], []

    def on(device, stream):
        try:
            with torch.cuda.device(device), torch.cuda.stream(stream):
                found.append(gradients(device, torch.Generator(device).manual_seed(3)))
        except BaseException as error:
            errors.append(error)

    places = [(device, torch.cuda.Stream(device)) for device in ("cuda:0", "cuda:1", "cuda:0")]
    for place in places:
        on(*place)
    threads = [threading.Thread(target=on, args=place) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors and len(found) == 6
    for grads in found:
        for e, a in zip(expected, grads, strict=True):
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5)
    assert {launch.device for launch in card} == {0, 1}
    assert {launch.stream for launch in card} == {stream.cuda_stream for _, stream in places}


def test_a_copy_of_a_model_moves_to_the_card(card):
    vae = _vae("cpu")
    moved = copy.deepcopy(vae).to("cuda")
    x = (draw(B, X, seed=1) > 0).float()
    torch.manual_seed(1)
    expected = vae.elbo(x)
    torch.manual_seed(1)
    torch.testing.assert_close(moved.elbo(x.to("cuda")).cpu(), expected, rtol=1e-5, atol=1e-5)
