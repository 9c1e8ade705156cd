"""Gaps between log p(x) and the ELBO: what the family of q costs, and what the encoder costs."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_count
from ..estimation.proposals import Refined
from ..inputs.modules import evaluating
from ..objectives.elbo import elbo
from ..vae import VAE

__all__ = ["InferenceGaps", "inference_gaps"]

# Draws per example of each ELBO.
_DRAWS = 256


class InferenceGaps(NamedTuple):
    """Gaps between log p(x) and the ELBO, in nats, [B] each.

    Attributes:
        approximation: log p(x) − ELBO of the best normal distribution: 0 if p(z|x) is normal.
        amortization: ELBO of the best normal distribution − ELBO of the encoder's q.
        log_px: estimate of log p(x).
        khat: Pareto k̂ of that estimate; above 0.7 it may be low, and the approximation gap too small.
    """

    approximation: Tensor
    amortization: Tensor
    log_px: Tensor
    khat: Tensor

    @property
    def inference(self) -> Tensor:
        """Sum of both gaps, log p(x) − ELBO, [B]."""
        return self.approximation + self.amortization

    def __str__(self) -> str:
        total, family, encoder = (
            float(v.mean()) for v in (self.inference, self.approximation, self.amortization)
        )
        return (
            f"log p(x) - ELBO: {total:.2f} nats, mean of {len(self.log_px)} examples\n"
            f"  approximation  {family:.2f}, by the family of q\n"
            f"  amortization   {encoder:.2f}, by the encoder"
        )


@torch.no_grad()
def inference_gaps(
    vae: VAE,
    x: Any,
    *,
    k: int = 2000,
    steps: int = 20,
    diagonal: bool = True,
    mask: Any = None,
    context: Any = None,
    generator: torch.Generator | None = None,
) -> InferenceGaps:
    r"""Split log p(x) − ELBO into the gap of the family of q and that of the encoder.

    .. math:: \log p(x) - L[q_φ] = \underbrace{\log p(x) - L[q^*]}_{\text{approximation}}
              + \underbrace{L[q^*] - L[q_φ]}_{\text{amortization}}

    :math:`q^*` is the normal distribution of the largest ELBO, found for each example by
    :meth:`fastvae.VAE.refine`, with the model in eval mode. A large approximation gap asks for a richer q, a
    large amortization gap for a larger encoder or longer training of it.

    Args:
        vae: the model.
        x: data [B, \*event]; a dict of such tensors for a Joint.
        k: draws per example for log p(x), from ``proposal="refined"``. Default 2000.
        steps: number of steps of the search for :math:`q^*`. Default 20.
        diagonal: search among diagonal covariances, the family of an encoder that returns mu and logvar;
            False for full covariances. Default True.
        mask: bool, [B, \*event] or [\*event], True for observed elements of x. Default: all are observed.
        context: conditioning input of encoder, decoder and prior. Default: none.
        generator: source of the noise. Default: torch's global random state.

    Returns:
        :class:`InferenceGaps`.

    Raises:
        RuntimeError: for a decoder that has no derivatives by z, in reverse and in forward mode.
        TypeError, ValueError: for invalid arguments.

    References:
        Cremer, Li & Duvenaud, Inference Suboptimality in Variational Autoencoders, 2018, section 3.

    Example:
        >>> import torch, fastvae
        >>> vae = fastvae.VAE(torch.nn.Linear(8, 4), torch.nn.Linear(2, 8), likelihood="bernoulli")
        >>> gaps = fastvae.diagnostics.inference_gaps(vae, torch.rand(16, 8).round(), k=500)
        >>> bool(gaps.amortization.mean() > 0)
        True
    """
    k = check_count("k", k, "the draws per example for log p(x)")
    given = {"mask": mask, "context": context}
    options = {"generator": generator, **given}
    posterior, decoder, likelihood, prior = vae.evaluated_parts()

    def bound(q: Any) -> Tensor:
        value: Tensor = elbo(
            x, q, decoder, likelihood=likelihood, prior=prior, k=_DRAWS, reduction="none", **options
        )
        return value.double()

    with evaluating([vae]):
        best = vae.refine(x, steps=steps, diagonal=diagonal, **options)
        found = vae.log_marginal(x, k=k, proposal=Refined(), **options)
        top, log_px = bound(best), found.log_px.double()
        return InferenceGaps(log_px - top, top - bound(posterior(x, context)), log_px, found.khat)
