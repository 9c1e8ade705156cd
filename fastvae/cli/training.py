"""Training of the demo's models, and their results on the test images."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

import fastvae

from ..core.terminal import progress_bar
from . import latents
from .images import Images
from .models import build

BATCH = 100
LEARNING_RATE = 3e-3
# Fixed, so that runs with other seeds are evaluated with the same noise.
TEST_SEED = 21


class Run(NamedTuple):
    """Trained model, its bounds per epoch in nats per image, and its results per test image, each [N]."""

    name: str
    model: fastvae.VAE
    architecture: dict[str, Any]
    train_curve: list[float]
    test_curve: list[float]
    elbo: Tensor
    log_px: Tensor
    ess: Tensor


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Compute with ``count`` threads within a ``with`` block.

    Small matrices, such as those of the digits, gain little from a second thread, and wait long for it if
    another process occupies its core.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def train(
    name: str,
    k: int | None,
    images: Images,
    architecture: dict[str, Any],
    epochs: int,
    eval_k: int,
    seed: int,
    bound: Callable[..., Tensor] | None = None,
    progress: bool = True,
) -> Run:
    """Build and train a model with the ELBO, IWAE (if k is given) or ``bound``, and evaluate it."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = build(architecture).to(images.train.device)
    latents.start(model, images.train)
    return fit(name, k, images, model, architecture, epochs, eval_k, seed, bound, progress)


def fit(
    name: str,
    k: int | None,
    images: Images,
    model: fastvae.VAE,
    architecture: dict[str, Any],
    epochs: int,
    eval_k: int,
    seed: int,
    bound: Callable[..., Tensor] | None = None,
    progress: bool = True,
) -> Run:
    """Train this model, and evaluate it on the test images.

    ``bound`` takes (x, q, decoder) and the model's options, and replaces the ELBO or, with ``k``, IWAE.
    """
    device = images.train.device
    encoder, decoder = model.encoder, model.decoder
    optimizer = torch.optim.Adam(model.parameters(), lr=LEARNING_RATE)
    generator = torch.Generator(device).manual_seed(seed)
    options: dict[str, Any]
    options = {"likelihood": model.likelihood, "prior": model.prior, "generator": generator}
    if bound is None:
        options |= latents.elbo_options(model, images.train[:1]) if k is None else {"k": k}
    objective = bound or (fastvae.elbo if k is None else fastvae.iwae)

    train_curve, test_curve = [], []
    steps = math.ceil(len(images.train) / BATCH)
    beta = latents.beta_of(model, epochs * steps) if k is None and bound is None else None
    done = 0
    with progress_bar(progress, total=epochs * steps, desc=f"{name:8}", unit="step") as bar:
        for _ in range(epochs):
            total = torch.zeros((), device=device)
            order = torch.randperm(len(images.train), generator=generator, device=device)
            for rows in order.split(BATCH):
                x = images.draw(images.train[rows], generator)
                if beta is not None:
                    options["beta"] = beta(done)
                value = objective(x, encoder(x), decoder, **options)
                optimizer.zero_grad()
                (-value).backward()
                optimizer.step()
                total += value.detach() * len(x)
                bar.update()
                done += 1
                if done % 50 == 0:
                    bar.set_postfix(bound=f"{value.item():.2f}")
            train_curve.append(total.item() / len(images.train))
            test_curve.append(bound_on_test(model, images.test, k).mean().item())
            bar.set_postfix(train=f"{train_curve[-1]:.2f}", test=f"{test_curve[-1]:.2f}")

    noise = torch.Generator(device).manual_seed(TEST_SEED)
    result = model.evaluate(images.test, k=eval_k, batch_size=BATCH, progress=progress, generator=noise)
    elbo = bound_on_test(model, images.test, None, samples=100).cpu()
    return Run(name, model, architecture, train_curve, test_curve, elbo, result.log_px, result.ess)


@torch.no_grad()
def bound_on_test(model: fastvae.VAE, test: Tensor, k: int | None, samples: int = 1) -> Tensor:
    """Compute the ELBO, or the IWAE bound if k is given, of each test image [N], with fixed noise."""
    noise = torch.Generator(test.device).manual_seed(TEST_SEED)
    options: dict[str, Any] = {"reduction": "none", "generator": noise}
    return torch.cat(
        [
            model.elbo(x, **latents.elbo_options(model, x, samples), **options)
            if k is None
            else model.iwae(x, k, **options)
            for x in test.split(BATCH)
        ]
    )
