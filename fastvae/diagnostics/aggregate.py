"""Information about the data in a VAE's latents, by the aggregate posterior."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.checks import check_count
from ..distributions import Distribution, as_prior
from ..distributions.draws import sample_as_stored
from ..distributions.mixture import log_aggregate
from ..distributions.read import is_conditional
from ..distributions.words import known_mean
from ..estimation.evaluation.data import batches_of, data_of, place_of, unpacked
from ..inputs.modules import evaluating
from ..random import draw_seed
from ..vae import VAE

__all__ = ["Latents", "latents"]

# A unit is active if the variance of its posterior mean exceeds this, as in evaluate (Burda et al. 2016).
ACTIVE = 0.01


class Latents(NamedTuple):
    """Parts of E[KL(q(z|x) ‖ p(z))] over a data set, in nats, with standard errors over the draws.

    ``kl`` = ``mutual_information`` + ``marginal_kl``. Unknown parts are None.

    Attributes:
        kl: E[log q(z|x) − log p(z)].
        mutual_information: I(x; z) under q, E[log q(z|x) − log q(z)]; at most log N.
        marginal_kl: KL(q(z) ‖ p(z)), the divergence of the aggregate posterior from the prior.
        total_correlation: KL(q(z) ‖ Π_d q(z_d)), the dependence between dimensions.
        dimension_kl: KL(q(z_d) ‖ p(z_d)) [D], for a prior with independent dimensions; ``marginal_kl`` is
            the sum of these and the total correlation.
        active_units: number of dimensions whose posterior mean has a variance above 0.01 over the data.
        log_n: log N, the upper bound of the mutual information.
        stderr: standard errors of ``kl`` and its parts, by name.
    """

    kl: float
    mutual_information: float
    marginal_kl: float
    total_correlation: float | None
    dimension_kl: Tensor | None
    active_units: int | None
    log_n: float
    stderr: dict[str, float]

    def __str__(self) -> str:
        lines = [f"latents over {round(math.exp(self.log_n))} examples, in nats"]
        rows = [
            ("KL to the prior", "kl"),
            ("mutual information", "mutual_information"),
            ("KL of the aggregate", "marginal_kl"),
            ("total correlation", "total_correlation"),
        ]
        for title, name in rows:
            value = getattr(self, name)
            if value is not None:
                most = f" (at most log N = {self.log_n:.2f})" if name == "mutual_information" else ""
                lines.append(f"  {title:<20} {value:.3f} ± {self.stderr[name]:.3f}{most}")
        if self.active_units is not None:
            lines.append(f"  {'active units':<20} {self.active_units}")
        return "\n".join(lines)


@torch.no_grad()
def latents(
    vae: VAE,
    data: Any,
    *,
    examples: int = 2000,
    batch_size: int = 100,
    prepare_batch: Callable[[Any], Mapping[str, Any]] | None = None,
    generator: torch.Generator | None = None,
) -> Latents:
    r"""Decompose the KL to the prior over a data set by the aggregate posterior q(z).

    .. math:: \frac{1}{N} \sum_n \mathrm{KL}(q(z|x_n) \,\|\, p(z))
              = \underbrace{I_q(x; z)}_{\text{mutual information}} + \mathrm{KL}(q(z) \,\|\, p(z)), \quad
              q(z) = \frac{1}{N} \sum_n q(z|x_n)

    If the prior's dimensions are independent, :math:`\mathrm{KL}(q(z) \| p(z)) = \mathrm{KL}(q(z) \|
    \prod_d q(z_d)) + \sum_d \mathrm{KL}(q(z_d) \| p(z_d))`. Each part is a mean over one draw of z from the
    posteriors of some examples. The aggregate posterior is that of all N examples, and is streamed: it needs
    N means and variances, and no [N, N] tensor.

    Args:
        vae: the model; it is in eval mode during the call.
        data: data set, as in :func:`fastvae.evaluate`.
        examples: number of examples to draw z for, evenly spaced in the data. Default 2000.
        batch_size: examples per batch, for data not in batches. Default 100.
        prepare_batch: function of a batch that returns a dict with ``x`` and, optionally, ``context``, as in
            :func:`fastvae.evaluate`. Default: the batch is x.
        generator: source of the noise. Default: torch's global random state.

    Returns:
        :class:`Latents`. The total correlation and the KL of each dimension are known for normal
        posteriors.

    Raises:
        TypeError, ValueError: for invalid data, or data without a batch.

    References:
        Hoffman & Johnson, ELBO surgery, 2016; Chen et al., Isolating Sources of Disentanglement in VAEs,
        2018, eq. 2; Burda et al. 2016 for active units.

    Example:
        >>> import torch, fastvae
        >>> vae = fastvae.VAE(torch.nn.Linear(7, 6), torch.nn.Linear(3, 7), likelihood="bernoulli")
        >>> parts = fastvae.diagnostics.latents(vae, torch.rand(50, 7))
        >>> abs(parts.kl - parts.mutual_information - parts.marginal_kl) < 1e-4
        True
    """
    examples = check_count("examples", examples, "the examples that z is drawn for")
    batch_size = check_count("batch_size", batch_size, "the examples of a batch")
    if is_conditional(vae.prior):
        raise ValueError(
            "latents needs one prior for all examples, but the model's is a function of the context"
        )
    with evaluating([vae]):
        posteriors = list(_posteriors(vae, data, batch_size, prepare_batch))
        if not posteriors:
            raise ValueError("data has no batches: there is nothing to look at")
        prior = as_prior(vae.prior).prepared()
        count = sum(q.batch for q in posteriors)
        seed = draw_seed(posteriors[0].device, generator)
        taken = (
            torch.arange(min(examples, count), device=posteriors[0].device) * count // min(examples, count)
        )
        drawn, own, first = [], [], 0
        for q in posteriors:
            rows = taken[(taken >= first) & (taken < first + q.batch)] - first
            z, log_q = sample_as_stored(q, 1, seed, generator, row_offset=first)
            drawn.append(z[0, rows])
            own.append(log_q[0, rows])
            first += q.batch
        z, log_q = torch.cat(drawn), torch.cat(own).double()
        whole, each = log_aggregate(posteriors, z)
        whole = whole.double()
        log_p = prior.log_prob(z[None])[0].double()
        found = {
            "kl": log_q - log_p,
            "mutual_information": log_q - whole,
            "marginal_kl": whole - log_p,
        }
        dimension_kl = None
        if each is not None:
            each = each.double()
            found["total_correlation"] = whole - each.sum(1)
            dimensions = _dimensions(prior, z)
            dimension_kl = None if dimensions is None else (each - dimensions).mean(0)
        means = [known_mean(q) for q in posteriors]
        known = [m for m in means if m is not None]
        active = None
        if len(known) == len(means):
            active = int((torch.cat(known).double().var(0) > ACTIVE).sum())
    n = len(z)
    values = {name: float(v.mean()) for name, v in found.items()}
    stderr = {name: float(v.std() / math.sqrt(n)) if n > 1 else math.nan for name, v in found.items()}
    return Latents(
        values["kl"],
        values["mutual_information"],
        values["marginal_kl"],
        values.get("total_correlation"),
        dimension_kl,
        active,
        math.log(count),
        stderr,
    )


def _posteriors(
    vae: VAE, data: Any, batch_size: int, prepare_batch: Callable[[Any], Mapping[str, Any]] | None
) -> Any:
    """Yield q(z|x) of all batches."""
    device, dtype = place_of(vae.encoder, vae.decoder)
    axes = None
    for batch in batches_of(data, batch_size, "none"):
        given, conditioning = unpacked(batch, prepare_batch)
        x = data_of(given, axes, vae.likelihood)
        if isinstance(x, Tensor):
            axes = [x.dim()]
            x = x.to(device or x.device, dtype if x.is_floating_point() else None)
        if conditioning is not None and conditioning.context is not None:
            yield vae.posterior(x, conditioning.context)
        elif not isinstance(x, Tensor) or len(x):
            yield vae.posterior(x)


def _dimensions(prior: Distribution, z: Tensor) -> Tensor | None:
    """Compute log p(z_d) [N, D] of a prior with independent dimensions; None for any other prior."""
    d = prior.as_torch()
    if d is None or d.event_shape or len(d.batch_shape) > 1:
        return None
    return d.log_prob(z).double()
