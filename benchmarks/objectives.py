"""Benchmarks of whole training steps, and of the evaluation of log p(x) by 5000 samples."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import torch
from torch import distributions as td
from torch import nn
from torch.nn import functional

import fastvae
from fastvae import ops
from fastvae.ops.reduce import BoundReduction, reduce

from .likelihood import eager_bernoulli
from .measure import COMPILE, CPU, FALLBACK, OURS, Place, Work, op_works
from .normal_diagonal import EXP, NORMAL, eps_of, posterior

PIXELS = 784


def works():
    yield from steps("ELBO step", 1, 128, (200, 200), 50, {})
    yield from steps("IWAE step", 50, 64, (200, 200), 50, {})
    yield from steps("IWAE step", 50, 64, (200,), 50, {"eager": 1.2, COMPILE: 1.2, FALLBACK: 1.2})
    yield from evaluation(5000, 16, (200,), 50, _log_marginal, (20, 50, 250))


def _mlp(*sizes):
    layers = []
    for n, m in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(n, m), nn.Tanh()]
    return nn.Sequential(*layers[:-1])


def model_of(hidden, latent):
    torch.manual_seed(0)
    encoder = _mlp(PIXELS, *hidden, 2 * latent)
    decoder = _mlp(latent, *reversed(hidden), PIXELS)
    return nn.ModuleDict({"encoder": encoder, "decoder": decoder})


def _name(hidden, latent):
    return "-".join(map(str, (PIXELS, *hidden, latent)))


def _products(hidden, latent):
    """Return multiply-adds of a pass of the encoder, and of the decoder, for one row."""
    sizes = (PIXELS, *hidden)
    between = sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))
    return between + 2 * sizes[-1] * latent, between + sizes[-1] * latent


# Each implementation's loss of a batch: minus the mean bound.


def _ours(model, x, k):
    q = model["encoder"](x).chunk(2, dim=1)
    if k == 1:
        return -fastvae.elbo(x, q, model["decoder"], likelihood="bernoulli")
    return -fastvae.iwae(x, q, model["decoder"], k=k, likelihood="bernoulli")


def _eager(model, x, k):
    mu, logvar = model["encoder"](x).chunk(2, dim=1)
    eps = torch.randn(k, *mu.shape, dtype=mu.dtype, device=mu.device)
    z = torch.addcmul(mu, torch.exp(0.5 * logvar), eps)
    logits = model["decoder"](z.flatten(0, 1)).unflatten(0, (k, -1))
    loss = functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
    log_px = -loss.sum(-1)
    if k == 1:
        return -(log_px.mean(0) - 0.5 * (mu.square() + logvar.exp() - 1 - logvar).sum(-1)).mean()
    log_w = log_px + 0.5 * ((eps.square() - z.square()).sum(-1) + logvar.sum(-1))
    return -(torch.logsumexp(log_w, 0) - math.log(k)).mean()


def _distributions(model, x, k):
    mu, logvar = model["encoder"](x).chunk(2, dim=1)
    q = td.Independent(td.Normal(mu, torch.exp(0.5 * logvar), validate_args=False), 1)
    p = td.Independent(td.Normal(torch.zeros_like(mu), torch.ones_like(mu), validate_args=False), 1)
    z = q.rsample((k,))
    logits = model["decoder"](z.flatten(0, 1)).unflatten(0, (k, -1))
    log_px = td.Independent(td.Bernoulli(logits=logits, validate_args=False), 1).log_prob(x)
    if k == 1:
        return -(log_px.mean(0) - td.kl_divergence(q, p)).mean()
    return -(torch.logsumexp(log_px + p.log_prob(z) - q.log_prob(z), 0) - math.log(k)).mean()


def _pyro(model, k):
    """Return a function of x that sets the gradients and returns the loss; None without Pyro."""
    try:
        import pyro
        import pyro.distributions as pd
        from pyro.infer import RenyiELBO, Trace_ELBO
    except ImportError:
        return None
    pyro.enable_validation(False)
    pyro.clear_param_store()
    latent = model["decoder"][0].in_features

    def generate(x):
        pyro.module("decoder", model["decoder"])
        with pyro.plate("batch", x.shape[0]):
            z = pyro.sample("z", pd.Normal(x.new_zeros(latent), x.new_ones(latent)).to_event(1))
            pyro.sample("x", pd.Bernoulli(logits=model["decoder"](z)).to_event(1), obs=x)

    def infer(x):
        pyro.module("encoder", model["encoder"])
        mu, logvar = model["encoder"](x).chunk(2, dim=1)
        with pyro.plate("batch", x.shape[0]):
            pyro.sample("z", pd.Normal(mu, torch.exp(0.5 * logvar)).to_event(1))

    if k == 1:
        objective = Trace_ELBO()
    else:
        objective = RenyiELBO(alpha=0, num_particles=k, vectorize_particles=True, max_plate_nesting=1)

    def loss(x):
        # Pyro sums over the batch.
        value = objective.loss_and_grads(generate, infer, x) / x.shape[0]
        for p in model.parameters():
            p.grad /= x.shape[0]
        return value

    return loss


def steps(group, k, batch, hidden, latent, target, place: Place = CPU):
    """Yield the work of a training step; with CUDA graphs, a whole step is also captured in one."""
    torch.manual_seed(0)
    x = torch.rand(batch, PIXELS).round().to(place.device)
    losses = {OURS: _ours, "eager": _eager, "torch.distributions": _distributions}
    losses = {name: place.cast(loss) for name, loss in losses.items()}

    def backward(function, model):
        def loss(x=x):
            value = function(model, x, k)
            value.backward()
            return value.detach()

        return loss

    functions = {}
    start = model_of(hidden, latent).to(place.device)

    def add(name, function):
        model = copy.deepcopy(start)
        functions[name] = model, backward(function, model)

    for name, loss in losses.items():
        add(name, loss)
    for version, options in place.versions.items():
        if version != FALLBACK:
            ours = version.replace(COMPILE, f"{OURS}, compiled")
            add(ours, place.host.compile(losses[OURS], **options))
        add(version, place.host.compile(losses["eager"], **options))
    graphs = [f"{name}, CUDA graph" for name in (OURS, "eager")] if place.graphs else []
    for name in graphs:
        add(name, losses[name.partition(",")[0]])
    model = copy.deepcopy(start)
    if place.dtype == torch.float32 and (pyro := _pyro(model, k)) is not None:
        functions["Pyro"] = model, lambda x=x: pyro(x)

    run, checks, sums = {}, {}, {}
    for name, (model, loss) in functions.items():
        capturable = {"capturable": True} if name in graphs and place.device.type == "cuda" else {}
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True, **capturable)

        def step(x=x, loss=loss, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            value = loss(x)
            optimizer.step()
            return value

        def check(name=name, model=model, loss=loss):
            sums[name] = _means(model, loss)
            _assert_same(sums[name], sums[OURS], 1e-5 if place.dtype == torch.float32 else 1e-3)

        run[name], checks[name] = step, check
    encoder, decoder = _products(hidden, latent)
    # Forward, and backward by inputs and by weights; the first layer's inputs need no gradient.
    operations = batch * (3 * encoder - PIXELS * hidden[0]) + k * batch * 3 * decoder
    case = f"{_name(hidden, latent)}, B={batch}{place.label}"
    yield Work(group, case, "step", run, checks, 0, operations, False, target, frozenset(graphs))
    torch._dynamo.reset()


def _means(model, loss, runs=8):
    """Return mean loss, standard error, and mean gradient of the decoder's last bias, the least noisy."""
    values, grads = [], []
    for _ in range(runs):
        model.zero_grad()
        # Pyro returns a number.
        values.append(torch.as_tensor(loss(), device="cpu"))
        grads.append(model["decoder"][-1].bias.grad.clone())
    values = torch.stack(values).double()
    return values.mean(), values.std() / runs**0.5, torch.stack(grads).mean(0)


def _assert_same(ours, theirs, tolerance):
    difference = abs(float(ours[0] - theirs[0]))
    allowed = 6 * float((ours[1] ** 2 + theirs[1] ** 2).sqrt()) + tolerance * abs(float(ours[0]))
    assert difference <= allowed, f"the loss differs by {difference:.3g}, {allowed:.3g} allowed"
    cosine = float(functional.cosine_similarity(ours[2].flatten(), theirs[2].flatten(), dim=0))
    assert cosine > 0.99, f"the gradient's direction differs: a cosine of {cosine:.3g}"


def iwae_without_networks(k, b, d, pixels, target, place: Place = CPU, chunked=False):
    """Yield the works of the IWAE bound without the networks.

    z and the log-ratio come from (mu, logvar), and the bound from given logits; z gets an upstream gradient,
    as from a decoder. mu and logvar are the halves of an encoder's output if ``chunked``.
    """

    how = BoundReduction(1.0, "log_mean_exp", "none")

    def ours(x, mu, logvar, logits):
        z, log_ratio = ops.rsample_log_ratio(mu, logvar, k=k)
        return z, reduce("bernoulli", x, (logits.flatten(0, 1),), log_ratio, None, how)[0]

    def bound(x, logits, eps, z, logvar):
        log_w = eager_bernoulli(x, logits) + 0.5 * ((eps.square() - z.square()).sum(-1) + logvar.sum(-1))
        return torch.logsumexp(log_w, 0) - math.log(k)

    def eager(x, mu, logvar, logits):
        eps = place.randn(k, b, d)
        z = torch.addcmul(mu, torch.exp(0.5 * logvar), eps)
        return z, bound(x, logits, eps, z, logvar)

    def exact(outputs, x, mu, logvar, logits):
        eps = eps_of(outputs, mu, logvar)
        z = mu + torch.exp(0.5 * logvar) * eps
        return z, bound(x, logits, eps, z, logvar)

    def make():
        x = torch.rand(b, pixels, device=place.device).round().to(place.dtype)
        q = posterior(place, b, d, chunked)
        # A factor of 0.1, so that no single sample has all the weight.
        return x, *q, (0.1 * place.randn(k, b, pixels)).requires_grad_()

    size, n = place.dtype.itemsize, k * b * pixels
    forward = size * (b * pixels + 2 * b * d + n + k * b * d) + 4 * b
    yield from op_works(
        "IWAE without networks",
        f"{k}×{b}, {d} and {pixels}" + ", chunked" * chunked,
        make,
        {OURS: ours, "eager": eager},
        exact,
        sampling=True,
        elements=n,
        moved=(forward, 2 * forward + size * (n + 2 * b * d)),
        operations=(n * (EXP + 10) + k * b * d * NORMAL, n * (2 * EXP + 16) + 2 * k * b * d * NORMAL),
        target=target,
        place=place,
        # The noise is recovered from z; rounding that to eight bits moves a log weight of 50 latents by 0.1.
        tolerance=None if place.dtype == torch.float32 else 0.25,
    )


def _log_marginal(encoder, decoder, x, k):
    with torch.no_grad():
        q = encoder(x).chunk(2, dim=1)
        return fastvae.log_marginal(x, q, decoder, k=k, likelihood="bernoulli").log_px


def evaluated(encoder, decoder, x, k):
    """Return log p(x) of a data set."""
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", fuse=False)
    return fastvae.evaluate(vae, x, k=k, progress=False).log_px


def log_sum_by_hand(decoder, x, mu, logvar, chunk):
    """Return the logarithm of the sum of the weights of ``chunk`` draws, in plain PyTorch."""
    eps = torch.randn(chunk, *mu.shape, dtype=mu.dtype, device=mu.device)
    z = torch.addcmul(mu, torch.exp(0.5 * logvar), eps)
    logits = decoder(z.flatten(0, 1)).unflatten(0, (chunk, -1))
    log_ratio = 0.5 * logvar.sum(-1) + 0.5 * (eps.square() - z.square()).sum(-1)
    return torch.logsumexp(log_ratio + eager_bernoulli(x, logits), 0)


@torch.no_grad()
def log_marginal_by_hand(encoder, decoder, x, k, chunk, log_sum=log_sum_by_hand):
    """Return log p(x) by k draws, ``chunk`` at a time, in plain PyTorch."""
    parts = []
    for batch in x.split(100):
        mu, logvar = encoder(batch).chunk(2, dim=1)
        bounds = [log_sum(decoder, batch, mu, logvar, chunk) for _ in range(k // chunk)]
        parts.append(torch.logsumexp(torch.stack(bounds), 0) - math.log(k))
    return torch.cat(parts)


def evaluation(
    k: int,
    images: int,
    hidden: tuple[int, ...],
    latent: int,
    ours: Callable,
    chunks: tuple[int, ...],
    by_hand: int | None = None,
    place: Place = CPU,
):
    """Yield the work of estimating log p(x) of some images.

    Args:
        k: draws per image.
        images: number of images.
        hidden: widths of the hidden layers.
        latent: number of latents.
        ours: ``ours(encoder, decoder, x, k)`` returns log p(x).
        chunks: draws at a time in the hand-written loops.
        by_hand: number of images in these loops. Default: all.
        place: host and precision; with bfloat16, a loop is autocast to it too.
    """
    model = model_of(hidden, latent).eval()
    encoder, decoder = model["encoder"], model["decoder"]
    # Posteriors near the prior and faint images, so that K samples determine log p(x) accurately enough.
    with torch.no_grad():
        encoder[-1].weight *= 0.1
        decoder[-1].weight *= 0.1
    torch.manual_seed(1)
    x = torch.rand(images, PIXELS).round().to(place.device)
    model.to(place.device)
    part = x[:by_hand]

    def loop(chunk):
        return log_marginal_by_hand(encoder, decoder, part, k, chunk)

    def in_bfloat16(function, *arguments):
        with torch.no_grad(), torch.autocast(place.device.type, torch.bfloat16):
            return function(*arguments)

    run = {
        OURS: lambda: ours(encoder, decoder, x, k),
        f"{OURS}, bfloat16": lambda: in_bfloat16(ours, encoder, decoder, x, k),
    }
    for chunk in chunks:
        run[f"eager loop, chunks of {chunk}"] = lambda chunk=chunk: loop(chunk)
    if place.dtype == torch.bfloat16:
        run["eager loop, bfloat16"] = lambda: in_bfloat16(loop, chunks[0])
    loops = [name for name in run if name.startswith("eager")]
    if by_hand is None and (pythae := _pythae(model, hidden, latent)) is not None:
        run["pythae"] = lambda: pythae(x, k)
    means = {}
    # The error of 5000 draws of 16 images, or more if there are fewer.
    allowed = 0.05 * max(1, 5000 * 16 / (k * len(part))) ** 0.5

    def check(name):
        log_px = torch.as_tensor(run[name](), device="cpu").double()
        means[name] = float(log_px[:by_hand].mean() if log_px.dim() else log_px)
        error = abs(means[name] - means[OURS])
        assert error < allowed, f"log p(x) is {means[name]:.3f}, fastvae's {means[OURS]:.3f}"

    checks = {name: lambda name=name: check(name) for name in run}
    encoder_products, decoder_products = _products(hidden, latent)
    operations = images * (encoder_products + k * decoder_products)
    case = f"{_name(hidden, latent)}, K={k}, {images} images{place.label}"
    scaled = {} if by_hand is None else dict.fromkeys(loops, len(part) / images)
    yield Work("evaluation", case, "evaluation", run, checks, 0, operations, part=scaled)


def _pythae(model, hidden, latent):
    """Return a function of x and k that gives the mean of log p(x); None without pythae."""
    try:
        from pythae.models import VAE, VAEConfig
        from pythae.models.base.base_utils import ModelOutput
        from pythae.models.nn import BaseDecoder, BaseEncoder
    except ImportError:
        return None

    class Encoder(BaseEncoder):
        def __init__(self):
            super().__init__()
            self.net = model["encoder"]

        def forward(self, x):
            mu, logvar = self.net(x).chunk(2, dim=1)
            return ModelOutput(embedding=mu, log_covariance=logvar)

    class Decoder(BaseDecoder):
        def __init__(self):
            super().__init__()
            self.net = model["decoder"]

        def forward(self, z):
            return ModelOutput(reconstruction=torch.sigmoid(self.net(z)))

    config = VAEConfig(input_dim=(PIXELS,), latent_dim=latent, reconstruction_loss="bce")
    vae = VAE(config, encoder=Encoder(), decoder=Decoder()).eval()
    return torch.no_grad()(lambda x, k: vae.get_nll(x, n_samples=k, batch_size=100))
