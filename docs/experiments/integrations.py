"""``python -m docs.experiments.integrations``: steps of other libraries, for the tables of docs/integrations.

A step is zero_grad, forward, loss, backward and Adam. Both versions run in turns on one thread; the table has
the median ratio of their CPU times, with the 20th and 80th percentile. The process keeps freed memory, so
that page faults are not what is compared. Value and gradient are compared in float32, for the same noise.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn import functional

import fastvae
from benchmarks.measure import keep_memory
from fastvae.likelihoods import Bernoulli, Gaussian, Laplace
from fastvae.random import draw_seed, normal

PIXELS = 784


@dataclass
class Case:
    """A loss of a module, by another library and by fastvae.

    Attributes:
        name: row of the table.
        module: the networks.
        before, after: loss of the module, by the other library and by fastvae.
        patch: name of the function by which the other library draws noise, and its replacement.
        constant: fastvae's loss less the other; None where they are not the same number.
    """

    name: str
    module: nn.Module
    before: Callable[[nn.Module], Tensor]
    after: Callable[[nn.Module], Tensor]
    patch: tuple[str, Callable[..., Tensor]]
    constant: float | None = 0.0


def fastvae_noise(k: int, batch: int, *latent: int) -> Tensor:
    """Draw the normals [K, B, ...] of fastvae's next draw."""
    return normal(draw_seed(), k, batch, math.prod(latent)).view(k, batch, *latent)


def pythae_cases() -> Iterator[Case]:
    from pythae import models

    x, shape = torch.rand(100, 1, 28, 28), (1, 28, 28)
    half_log_2pi = 0.5 * PIXELS * math.log(2 * math.pi)
    losses = ("bce", Bernoulli(probs=True), 0.0), ("mse", Gaussian(scale=1.0), half_log_2pi)
    for loss, likelihood, constant in losses:
        config = models.BetaVAEConfig(input_dim=shape, latent_dim=10, reconstruction_loss=loss, beta=2.0)
        options = {"likelihood": likelihood}
        yield Case(
            f"pythae BetaVAE, {loss}",
            models.BetaVAE(config),
            lambda m: m({"data": x}).loss,
            lambda m, o=options: -fastvae.elbo(x, m.encoder(x), m.decoder, beta=2.0, **o),
            ("torch.randn_like", lambda like: fastvae_noise(1, *like.shape)[0]),
            constant,
        )
    config = models.IWAEConfig(input_dim=shape, latent_dim=10, reconstruction_loss="bce", number_samples=10)
    yield Case(
        "pythae IWAE, bce, 10 draws",
        models.IWAE(config),
        lambda m: m({"data": x}).loss,
        lambda m: -fastvae.iwae(x, m.encoder(x), m.decoder, k=10, likelihood=Bernoulli(probs=True)),
        ("torch.randn_like", lambda like: fastvae_noise(10, 100, 10).transpose(0, 1)),
        None,
    )
    yield Case(
        "pythae get_nll, 2 images, 2000 draws",
        models.IWAE(config),
        lambda m: -torch.tensor(m.get_nll(x[:2], 2000, 100)),
        lambda m: (
            -fastvae.VAE(m.encoder, m.decoder, likelihood=Bernoulli(probs=True))
            .log_marginal(x[:2], k=2000)
            .log_px.mean()
        ),
        ("torch.randn_like", lambda like: fastvae_noise(1, *like.shape)[0]),
        None,
    )


def diffusers_cases() -> Iterator[Case]:
    from diffusers import AutoencoderKL

    x = torch.rand(4, 3, 32, 32) * 2 - 1
    module = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(32, 64), norm_num_groups=8, latent_channels=4, sample_size=32,
    )  # fmt: skip

    def before(m: nn.Module) -> Tensor:
        posterior = m.encode(x).latent_dist
        error = functional.l1_loss(m.decode(posterior.sample()).sample, x, reduction="none")
        return error.sum() / len(x) + 1e-6 * posterior.kl().mean()

    yield Case(
        "diffusers AutoencoderKL, L1",
        module,
        before,
        lambda m: -fastvae.elbo(x, m.encode(x), m.decode, likelihood=Laplace(scale=1.0), beta=1e-6),
        (
            "diffusers.models.autoencoders.vae.randn_tensor",
            lambda shape, **options: fastvae_noise(1, *shape)[0],
        ),
        x[0].numel() * math.log(2),
    )


def pyro_cases() -> Iterator[Case]:
    import pyro
    from pyro.infer import Trace_ELBO, TraceEnum_ELBO, TraceMeanField_ELBO

    from ..examples.pyro_models import M2, VAE

    x = torch.rand(200, PIXELS).round()
    patch = "torch.distributions.normal._standard_normal"

    def case(
        name: str, module: nn.Module, objective: Any, layout: Callable[..., Tensor], **options: Any
    ) -> Case:
        pyro.enable_validation(True)  # Pyro's default, here of both

        def before(m: nn.Module) -> Tensor:
            return objective.differentiable_loss(m.model, m.guide, x)

        replacement = patch, lambda shape, dtype, device: layout(shape)
        return Case(f"Pyro {name}", module, before, lambda m: -m.elbo(x, **options), replacement)

    def usual(shape: tuple[int, ...]) -> Tensor:
        return fastvae_noise(1, *shape)[0]

    def enumerated(shape: tuple[int, ...]) -> Tensor:
        classes, batch, latent = shape
        return fastvae_noise(1, batch * classes, latent).view(batch, classes, latent).transpose(0, 1)

    yield case("VAE, Trace_ELBO", VAE(), Trace_ELBO(), usual, kl="mc")
    yield case("VAE, TraceMeanField_ELBO", VAE(), TraceMeanField_ELBO(), usual)
    yield case("M2, TraceEnum_ELBO", M2(), TraceEnum_ELBO(max_plate_nesting=1), enumerated)


LIBRARIES = {"pythae": pythae_cases, "diffusers": diffusers_cases, "pyro": pyro_cases}


def apart(case: Case) -> tuple[str, str]:
    """Return the relative differences of value and gradient for the same noise."""
    losses = []
    for loss in (case.before, case.after):
        torch.manual_seed(7)
        with mock.patch(*case.patch):
            losses.append(loss(case.module))
    theirs, ours = losses
    value = "—"
    if case.constant is not None:
        value = f"{abs(float(ours.detach() - theirs.detach()) - case.constant) / float(ours.detach()):.0e}"
    if not theirs.requires_grad:
        return value, "—"
    parameters = list(case.module.parameters())
    a, b = (torch.cat([g.flatten() for g in torch.autograd.grad(f, parameters)]) for f in losses)
    return value, f"{float((a - b).norm() / a.norm()):.0e}"


def step_of(module: nn.Module, loss: Callable[[nn.Module], Tensor]) -> Callable[[], None]:
    optimizer = torch.optim.Adam(module.parameters(), lr=1e-4)

    def step() -> None:
        optimizer.zero_grad()
        value = loss(module)
        if value.requires_grad:
            value.backward()
            optimizer.step()

    return step


def compare(case: Case, seconds: float) -> tuple[Tensor, Tensor]:
    """Return milliseconds of CPU time of blocks of steps, before and after, in turns."""
    steps = [step_of(copy.deepcopy(case.module), loss) for loss in (case.before, case.after)]
    for step in steps:
        step()
    begin = time.process_time()
    steps[0]()
    block = max(1, round(0.1 / (time.process_time() - begin)))
    found: list[list[float]] = []
    end = time.process_time() + seconds
    while time.process_time() < end or len(found) < 5:
        row = []
        for step in steps:
            begin = time.process_time()
            for _ in range(block):
                step()
            row.append(1e3 * (time.process_time() - begin) / block)
        found.append(row)
    before, after = torch.tensor(found).T
    return before, after


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.experiments.integrations", description=__doc__)
    parser.add_argument("libraries", nargs="*", default=list(LIBRARIES), help=", ".join(LIBRARIES))
    parser.add_argument("--seconds", type=float, default=30.0, help="CPU time for each row; default 30")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    keep_memory()
    print("| step | value apart | gradient apart | before | after | before / after |")
    print("|---|---|---|---|---|---|")
    for library in arguments.libraries:
        for case in LIBRARIES[library]():
            value, gradient = apart(case)
            before, after = compare(case, arguments.seconds)
            low, middle, high = (before / after).quantile(torch.tensor([0.2, 0.5, 0.8])).tolist()
            times = f"{before.median():.2f} ms | {after.median():.2f} ms"
            print(
                f"| {case.name} | {value} | {gradient} | {times} | {middle:.2f} ({low:.2f} to {high:.2f}) |"
            )


if __name__ == "__main__":
    main()
