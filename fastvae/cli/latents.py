"""Posteriors and priors by name, for ``demo --posterior`` and ``--prior``, with the encoder's last layers."""

from __future__ import annotations

from collections.abc import Callable
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import fastvae
from fastvae.distributions import (
    DiagonalNormal,
    Distribution,
    Flow,
    FullNormal,
    HierarchicalPosterior,
    Hierarchy,
    Laplace,
    Level,
    LowRankNormal,
    Mixture,
    NormalMixture,
    StandardNormal,
    StudentT,
    VampPrior,
)

from ..distributions.closed_form import closed_kl

DIAGONAL, STANDARD, LADDER = "diagonal", "standard", "ladder"
PARTS, RANK, CONTEXT = 2, 2, 16  # posteriors: components, rank, width of a flow's context
COMPONENTS, PSEUDO_INPUTS = 30, 50  # priors
FLOW_HIDDEN = (32, 32)
WARM_UP = 0.3  # fraction of all steps
HIDDEN = 32  # width of a ladder's top-down layer


class Posterior(NamedTuple):
    """Posterior family of an encoder.

    Attributes:
        widths: widths of the encoder's last layers, by name.
        q: function of the layers' outputs, [B, width] each, that returns q(z|x); a module if it has
            parameters.
    """

    widths: dict[str, int]
    q: Callable[..., Any]


def _pair(mu: Tensor, logvar: Tensor) -> tuple[Tensor, Tensor]:
    return mu, logvar


def _softplus(mu: Tensor, raw: Tensor) -> DiagonalNormal:
    return DiagonalNormal(mu, raw, scale_form="softplus", floor=1e-4)


def _low_rank(mu: Tensor, logvar: Tensor, factor: Tensor) -> LowRankNormal:
    return LowRankNormal(mu, logvar, factor.unflatten(1, (-1, RANK)))


def _student_t(loc: Tensor, log_scale: Tensor, log_df: Tensor) -> StudentT:
    """Return Student's t with more than 1 degree of freedom, about 11 initially."""
    return StudentT(loc, log_scale, 1 + 10 * torch.exp(log_df))


def _mixture(mu: Tensor, logvar: Tensor, logits: Tensor) -> Mixture:
    parts = zip(mu.chunk(PARTS, 1), logvar.chunk(PARTS, 1), strict=True)
    return Mixture([DiagonalNormal(*part) for part in parts], logits)


class _FlowOfNormal(nn.Module):
    """Flow from N(mu, diag exp(logvar)), given mu, logvar and a context, concatenated.

    Without a mean and scale predicted directly by the encoder, a flow is slow to learn any dependence on x.
    The flow is affine, with two passes for any D, so that a draw costs little more than a density.
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

    def forward(self, *outputs: Tensor) -> Flow:
        return Flow(self.flow, torch.cat(outputs, 1))


class _Ladder(nn.Module):
    """Hierarchy of two levels, each with half of the latents.

    The lower level merges p(z_2|z_1) and the encoder's output, weighted by precision.
    """

    def __init__(self, upper: int, lower: int):
        super().__init__()
        down = nn.Sequential(nn.Linear(upper, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * lower))
        self.hierarchy = Hierarchy(
            [
                Level(upper, nn.Identity()),
                Level(lower, nn.Identity(), prior=down, merge="precision"),
            ]
        )

    def forward(self, upper: Tensor, lower: Tensor) -> HierarchicalPosterior:
        return self.hierarchy([upper, lower])  # type: ignore[no-any-return]


def _ladder(d: int) -> Posterior:
    upper, lower = d // 2, d - d // 2
    return Posterior({"upper": 2 * upper, "lower": 2 * lower}, _Ladder(upper, lower))


# Functions of the latent dimension that return the posterior.
POSTERIORS: dict[str, Callable[[int], Posterior]] = {
    DIAGONAL: lambda d: Posterior({"mu": d, "logvar": d}, _pair),
    "softplus": lambda d: Posterior({"mu": d, "raw": d}, _softplus),
    "full": lambda d: Posterior({"mu": d, "tril": d * (d + 1) // 2}, FullNormal),
    "low_rank": lambda d: Posterior({"mu": d, "logvar": d, "factor": d * RANK}, _low_rank),
    "laplace": lambda d: Posterior({"loc": d, "log_scale": d}, Laplace),
    "student_t": lambda d: Posterior({"loc": d, "log_scale": d, "log_df": d}, _student_t),
    "mixture": lambda d: Posterior({"mu": PARTS * d, "logvar": PARTS * d, "logits": PARTS}, _mixture),
    "flow": lambda d: Posterior({"mu": d, "logvar": d, "context": CONTEXT}, _Flow(d)),
    LADDER: _ladder,
}


def _learned(encoder: nn.Module, pixels: int, latent: int) -> DiagonalNormal:
    return DiagonalNormal(*(nn.Parameter(torch.zeros(latent)) for _ in range(2)))


def _normals(encoder: nn.Module, pixels: int, latent: int) -> NormalMixture:
    """Return a mixture that is initially about N(0, I): means of variance 3/4, components of variance 1/4."""
    mu = 0.75**0.5 * torch.randn(COMPONENTS, latent)
    logvar = torch.full((COMPONENTS, latent), 0.25).log()
    return NormalMixture(*(nn.Parameter(t) for t in (mu, logvar, torch.zeros(COMPONENTS))))


class PseudoInputs(nn.Module):
    """Learned inputs of the encoder [U, pixels], between 0 and the data's maximum."""

    most: Tensor

    def __init__(self, pixels: int):
        super().__init__()
        self.raw = nn.Parameter(torch.zeros(PSEUDO_INPUTS, pixels))
        self.register_buffer("most", torch.ones(()))

    def forward(self) -> Tensor:
        return self.most * torch.sigmoid(self.raw)

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Initialise at the first of these images, repeated if there are too few."""
        x = x[torch.arange(PSEUDO_INPUTS, device=x.device) % len(x)]
        self.most.copy_(x.amax())
        # A saturated sigmoid would have no gradient.
        self.raw.copy_(torch.logit(x / self.most, eps=0.05))


def _vamp(encoder: nn.Module, pixels: int, latent: int) -> VampPrior:
    return VampPrior(encoder, PseudoInputs(pixels), nn.Parameter(torch.zeros(PSEUDO_INPUTS)))


def _flow(encoder: nn.Module, pixels: int, latent: int) -> Flow:
    zuko = _zuko("--prior")
    return Flow(zuko.flows.NSF(latent, transforms=2, hidden_features=FLOW_HIDDEN))


# Functions of encoder, pixels and latent dimension that return the prior.
PRIORS: dict[str, Callable[[nn.Module, int, int], Distribution]] = {
    STANDARD: lambda encoder, pixels, latent: StandardNormal(),
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


def prior_of(posterior: str, prior: str, encoder: nn.Module, pixels: int, latent: int) -> Any:
    """Return the prior by name, or None if the posterior has a prior."""
    return None if posterior == LADDER else PRIORS[prior](encoder, pixels, latent)


def check(posterior: str, prior: str, latent: int) -> None:
    """Validate that posterior and prior are known and their requirements are met.

    Raises:
        ValueError: if not.
    """
    table: dict[str, Any]
    for option, name, table in (("--posterior", posterior, POSTERIORS), ("--prior", prior, PRIORS)):
        if name not in table:
            raise ValueError(f"{option} {name} is unknown; known: {', '.join(table)}")
        if name == "flow":
            _zuko(option)
    if posterior == LADDER and prior != STANDARD:
        raise ValueError(f"--posterior ladder brings its own prior; leave --prior {prior} out")
    if posterior == LADDER and latent < 2:
        raise ValueError(
            f"--posterior ladder has two levels of latents; --latent must be 2 or more, not {latent}"
        )


def start(model: fastvae.VAE, x: Tensor) -> None:
    """Initialise the pseudo-inputs of a VampPrior, if the model has one, with training data."""
    if isinstance(model.prior, VampPrior):
        model.prior.pseudo_inputs.start(x)


def beta_of(model: fastvae.VAE, steps: int) -> Callable[[int], Tensor] | None:
    """Return the schedule of the KL's weight for ELBO training, a function of the step; None for 1.

    The encoder of a VampPrior also defines the prior, so q = p costs nothing from the first step. Without a
    warm-up q may ignore x (Tomczak & Welling 2018 use one, too).
    """
    if not isinstance(model.prior, VampPrior):
        return None
    return fastvae.schedules.linear(0.0, 1.0, max(1, round(WARM_UP * steps)))


@torch.no_grad()
def elbo_options(model: fastvae.VAE, x: Tensor, samples: int = 1) -> dict[str, Any]:
    """Return options of the ELBO: the KL in closed form if known, and ``samples`` draws per stratum of q."""
    q = model.posterior(x)
    known = q.own_prior is not None or closed_kl(q, model.prior) is not None
    return {"kl": "analytic" if known else "mc", "k": samples * q.strata}
