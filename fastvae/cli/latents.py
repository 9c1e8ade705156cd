"""Posteriors and priors by name, for ``demo --posterior`` and ``--prior``: what an encoder's last layers
return, and what that is the parameters of.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastvae

from ..distributions import closed_kl

DIAGONAL, STANDARD = "diagonal", "standard"
PARTS, RANK, CONTEXT = 2, 2, 16  # of a posterior: components, directions, numbers that a flow is told of x
COMPONENTS, PSEUDO_INPUTS = 30, 50  # of a prior
FLOW_HIDDEN = (32, 32)


class Posterior(NamedTuple):
    """What an encoder returns.

    Attributes:
        widths: of its last layers, by name.
        q: their outputs, [B, width] each -> q(z|x); a module where it has parameters of its own.
    """

    widths: dict[str, int]
    q: Callable[..., Any]


def _pair(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return mu, logvar


def _low_rank(mu: Tensor, logvar: Tensor, factor: Tensor) -> fastvae.LowRankNormal:
    return fastvae.LowRankNormal(mu, logvar, factor.unflatten(1, (-1, RANK)))


def _student_t(loc: Tensor, log_scale: Tensor, log_df: Tensor) -> fastvae.StudentT:
    """Above 1 degree of freedom, about 11 at first."""
    return fastvae.StudentT(loc, log_scale, 1 + 10 * torch.exp(log_df))


def _mixture(mu: Tensor, logvar: Tensor, logits: Tensor) -> fastvae.Mixture:
    parts = zip(mu.chunk(PARTS, 1), logvar.chunk(PARTS, 1), strict=True)
    return fastvae.Mixture([fastvae.DiagonalNormal(*part) for part in parts], logits)


class _FlowOfNormal(nn.Module):
    """mu, logvar and what else is known of x, side by side -> a flow from N(mu, diag exp(logvar)).

    Without a mean and a scale that the encoder reaches directly, a flow takes long to notice x at all. It is
    affine, in two passes whatever D is, so that a draw costs little more than a density.
    """

    def __init__(self, latent: int):
        super().__init__()
        self.widths = [latent, latent, CONTEXT]
        self.flow = _zuko("--posterior").flows.MAF(
            latent, CONTEXT, transforms=2, hidden_features=FLOW_HIDDEN, passes=2
        )

    def forward(self, known: Tensor) -> Any:
        zuko = _zuko("--posterior")
        mu, logvar, context = known.split(self.widths, -1)
        base = zuko.distributions.DiagNormal(mu, torch.exp(0.5 * logvar))
        return zuko.distributions.NormalizingFlow(self.flow.transform(context), base)


class _Flow(nn.Module):
    def __init__(self, latent: int):
        super().__init__()
        self.flow = _FlowOfNormal(latent)

    def forward(self, *outputs: Tensor) -> fastvae.Flow:
        return fastvae.Flow(self.flow, torch.cat(outputs, 1))


# Latent dimensions -> posterior.
POSTERIORS: dict[str, Callable[[int], Posterior]] = {
    DIAGONAL: lambda d: Posterior({"mu": d, "logvar": d}, _pair),
    "full": lambda d: Posterior({"mu": d, "tril": d * (d + 1) // 2}, fastvae.FullNormal),
    "low_rank": lambda d: Posterior({"mu": d, "logvar": d, "factor": d * RANK}, _low_rank),
    "laplace": lambda d: Posterior({"loc": d, "log_scale": d}, fastvae.Laplace),
    "student_t": lambda d: Posterior({"loc": d, "log_scale": d, "log_df": d}, _student_t),
    "mixture": lambda d: Posterior({"mu": PARTS * d, "logvar": PARTS * d, "logits": PARTS}, _mixture),
    "flow": lambda d: Posterior({"mu": d, "logvar": d, "context": CONTEXT}, _Flow(d)),
}


def _learned(encoder: nn.Module, pixels: int, latent: int) -> fastvae.DiagonalNormal:
    return fastvae.DiagonalNormal(*(nn.Parameter(torch.zeros(latent)) for _ in range(2)))


def _normals(encoder: nn.Module, pixels: int, latent: int) -> fastvae.NormalMixture:
    """Together about N(0, I) at first: means of variance 3/4, components of 1/4."""
    mu = 0.75**0.5 * torch.randn(COMPONENTS, latent)
    logvar = torch.full((COMPONENTS, latent), 0.25).log()
    return fastvae.NormalMixture(*(nn.Parameter(t) for t in (mu, logvar, torch.zeros(COMPONENTS))))


class PseudoInputs(nn.Module):
    """Learned inputs of the encoder [U, pixels] between 0 and the most that the data has."""

    most: Tensor

    def __init__(self, pixels: int):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(PSEUDO_INPUTS, pixels))
        self.register_buffer("most", torch.ones(()))

    def forward(self) -> Tensor:
        return self.most * torch.sigmoid(self.raw)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """At the first of these images, which are used again where they are too few."""
        x = x[torch.arange(PSEUDO_INPUTS, device=x.device) % len(x)]
        self.most.copy_(x.amax())
        # Where the sigmoid saturates nothing would be learned.
        self.raw.copy_(torch.logit(x / self.most, eps=0.05))


def _vamp(encoder: nn.Module, pixels: int, latent: int) -> fastvae.VampPrior:
    return fastvae.VampPrior(encoder, PseudoInputs(pixels), nn.Parameter(torch.zeros(PSEUDO_INPUTS)))


def _flow(encoder: nn.Module, pixels: int, latent: int) -> fastvae.Flow:
    zuko = _zuko("--prior")
    return fastvae.Flow(zuko.flows.NSF(latent, transforms=2, hidden_features=FLOW_HIDDEN))


# Encoder, pixels, latent dimensions -> prior.
PRIORS: dict[str, Callable[[nn.Module, int, int], fastvae.Distribution]] = {
    STANDARD: lambda encoder, pixels, latent: fastvae.StandardNormal(),
    "learned": _learned,
    "mixture": _normals,
    "vamp": _vamp,
    "flow": _flow,
}


def _zuko(option: str) -> Any:
    if find_spec("zuko") is None:
        raise ValueError(f"{option} flow is one of zuko's, which cannot be imported; pip install zuko")
    import zuko

    return zuko


def check(posterior: str, prior: str) -> None:
    """Whether both are known, and what they need is there.

    Raises:
        ValueError: where not.
    """
    table: dict[str, Any]
    for option, name, table in (("--posterior", posterior, POSTERIORS), ("--prior", prior, PRIORS)):
        if name not in table:
            raise ValueError(f"{option} {name} is unknown; known: {', '.join(table)}")
        if name == "flow":
            _zuko(option)


def start(model: fastvae.VAE, x: Tensor) -> None:
    """Let what begins with training data begin with these."""
    if isinstance(model.prior, fastvae.VampPrior):
        model.prior.pseudo_inputs.start(x)


@torch.no_grad()
def elbo_options(model: fastvae.VAE, x: Tensor, samples: int = 1) -> dict[str, Any]:
    """How the ELBO is estimated: the KL in closed form where one is known, otherwise from the draws, and as
    many draws of each part of a posterior that has several.
    """
    q = model.posterior(x)
    known = closed_kl(q, model.prior) is not None
    return {"kl": "analytic" if known else "mc", "samples": samples * q.strata}
