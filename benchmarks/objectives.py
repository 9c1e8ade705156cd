"""Whole training steps, and the evaluation of log p(x) by 5000 samples."""

from __future__ import annotations

import copy
import math

import torch
from torch import distributions as td
from torch import nn
from torch.nn import functional

import fastvae

from .measure import COMPILE, FALLBACK, OURS, Work

PIXELS = 784


def works():
    yield from _steps("ELBO step", 1, 128, (200, 200), 50, {})
    yield from _steps("IWAE step", 50, 64, (200, 200), 50, {})
    yield from _steps("IWAE step", 50, 64, (200,), 50, {"eager": 1.2, COMPILE: 1.2, FALLBACK: 1.2})
    yield from _evaluation(5000, 16, (200,), 50)


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
    """Multiply-adds of a pass of the encoder, and of the decoder, for one row."""
    sizes = (PIXELS, *hidden)
    between = sum(a * b for a, b in zip(sizes, sizes[1:], strict=False))
    return between + 2 * sizes[-1] * latent, between + sizes[-1] * latent


# The loss of a batch, by each implementation: minus the mean bound.


def _ours(model, x, k):
    q = model["encoder"](x).chunk(2, dim=1)
    if k == 1:
        return -fastvae.elbo(x, q, model["decoder"], likelihood="bernoulli")
    return -fastvae.iwae(x, q, model["decoder"], k=k, likelihood="bernoulli")


def _eager(model, x, k):
    mu, logvar = model["encoder"](x).chunk(2, dim=1)
    eps = torch.randn(k, *mu.shape)
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
    """A function of x that leaves the gradients and returns the loss; None without Pyro."""
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


def _steps(group, k, batch, hidden, latent, target):
    torch.manual_seed(0)
    x = torch.rand(batch, PIXELS).round()
    losses = {OURS: _ours, "eager": _eager, "torch.distributions": _distributions}
    versions = {COMPILE: {}, FALLBACK: {"fallback_random": True}}

    def backward(function, model):
        def loss():
            value = function(model, x, k)
            value.backward()
            return value.detach()

        return loss

    functions = {}
    start = model_of(hidden, latent)
    for name, loss in losses.items():
        model = copy.deepcopy(start)
        functions[name] = model, backward(loss, model)
    for base, loss in ((f"{OURS}, compiled", _ours), (COMPILE, _eager), (FALLBACK, _eager)):
        model = copy.deepcopy(start)
        function = torch.compile(loss, dynamic=False, options=versions.get(base, {}))
        functions[base] = model, backward(function, model)
    model = copy.deepcopy(start)
    if (pyro := _pyro(model, k)) is not None:
        functions["Pyro"] = model, lambda: pyro(x)

    steps, checks, sums = {}, {}, {}
    for name, (model, loss) in functions.items():
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-4, fused=True)

        def step(loss=loss, optimizer=optimizer):
            optimizer.zero_grad(set_to_none=True)
            loss()
            optimizer.step()

        def check(name=name, model=model, loss=loss):
            sums[name] = _means(model, loss)
            _assert_same(sums[name], sums[OURS])

        steps[name], checks[name] = step, check
    encoder, decoder = _products(hidden, latent)
    # Forward, and backward by inputs and by weights; the first layers' inputs want no gradient.
    operations = batch * (3 * encoder - PIXELS * hidden[0]) + k * batch * 3 * decoder
    yield Work(
        group, f"{_name(hidden, latent)}, B={batch}", "step", steps, checks, 0, operations, False, target
    )
    torch._dynamo.reset()


def _means(model, loss, runs=8):
    """Mean loss, its standard error, and the mean gradient of the decoder's last bias, the least noisy."""
    values, grads = [], []
    for _ in range(runs):
        model.zero_grad()
        values.append(float(loss()))
        grads.append(model["decoder"][-1].bias.grad.clone())
    values = torch.tensor(values)
    return values.mean(), values.std() / runs**0.5, torch.stack(grads).mean(0)


def _assert_same(ours, theirs):
    difference = abs(float(ours[0] - theirs[0]))
    allowed = 6 * float((ours[1] ** 2 + theirs[1] ** 2).sqrt()) + 1e-5 * abs(float(ours[0]))
    assert difference <= allowed, f"the loss differs by {difference:.3g}, {allowed:.3g} allowed"
    cosine = float(functional.cosine_similarity(ours[2].flatten(), theirs[2].flatten(), dim=0))
    assert cosine > 0.99, f"the gradient's direction differs: a cosine of {cosine:.3g}"


def _evaluation(k, images, hidden, latent):
    model = model_of(hidden, latent).eval()
    encoder, decoder = model["encoder"], model["decoder"]
    # Posteriors near the prior and faint images, so that K samples determine log p(x) well enough to compare.
    with torch.no_grad():
        encoder[-1].weight *= 0.1
        decoder[-1].weight *= 0.1
    torch.manual_seed(1)
    x = torch.rand(images, PIXELS).round()

    @torch.no_grad()
    def ours():
        q = encoder(x).chunk(2, dim=1)
        return fastvae.log_marginal(x, q, decoder, k=k, likelihood="bernoulli").log_px

    @torch.no_grad()
    def loop(chunk):
        mu, logvar = encoder(x).chunk(2, dim=1)
        sigma, half = torch.exp(0.5 * logvar), 0.5 * logvar.sum(-1)
        parts = []
        for _ in range(k // chunk):
            eps = torch.randn(chunk, *mu.shape)
            z = torch.addcmul(mu, sigma, eps)
            logits = decoder(z.flatten(0, 1)).unflatten(0, (chunk, -1))
            loss = functional.binary_cross_entropy_with_logits(logits, x.expand_as(logits), reduction="none")
            log_w = half + 0.5 * (eps.square() - z.square()).sum(-1) - loss.sum(-1)
            parts.append(torch.logsumexp(log_w, 0))
        return torch.logsumexp(torch.stack(parts), 0) - math.log(k)

    @torch.no_grad()
    def ours_in_bfloat16():
        with torch.autocast("cpu", torch.bfloat16):
            return ours()

    run = {OURS: ours, f"{OURS}, bfloat16": ours_in_bfloat16}
    for chunk in (20, 50, 250):
        run[f"eager loop, chunks of {chunk}"] = lambda chunk=chunk: loop(chunk)
    if (pythae := _pythae(model, hidden, latent)) is not None:
        run["pythae"] = lambda: pythae(x, k)
    means = {}

    def check(name):
        means[name] = float(torch.as_tensor(run[name]()).mean())
        error = abs(means[name] - means[OURS])
        assert error < 0.05, f"log p(x) is {means[name]:.3f}, fastvae's {means[OURS]:.3f}"

    checks = {name: lambda name=name: check(name) for name in run}
    encoder_products, decoder_products = _products(hidden, latent)
    operations = images * (encoder_products + k * decoder_products)
    case = f"{_name(hidden, latent)}, K={k}, {images} images"
    yield Work("evaluation", case, "evaluation", run, checks, 0, operations)


def _pythae(model, hidden, latent):
    """A function of x and k: the mean of log p(x); None without pythae."""
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
