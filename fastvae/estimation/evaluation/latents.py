"""Statistics of the latents of a data set: active units, and the KL of each dimension."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ...distributions import Distribution
from ...distributions.closed_form import closed_kl
from ...distributions.words import known_mean
from .parts import Part

ACTIVE = 0.01  # variance of the posterior mean, Burda et al. 2016


def latent_statistics(q: Distribution, prior: Distribution) -> np.ndarray:
    """Return [3, D]: mean of the posterior means, sum of their squared deviations, sum of the KL.

    It is [2, D] if q has no analytic KL to this prior, and [2, 0] if q has no means [B, D].
    """
    means = known_mean(q)
    if means is None or means.dim() != 2:
        return np.zeros((2, 0))
    means = means.double()
    mean = means.mean(0)
    statistics = [mean, (means - mean).square().sum(0)]
    kl = closed_kl(q, prior)
    if kl is not None and kl.shape == means.shape:
        statistics.append(kl.double().sum(0))
    return torch.stack(statistics).cpu().numpy()


def latents_of(parts: list[Part]) -> tuple[int | None, Tensor | None]:
    """Combine the batches' statistics to active units and KL per dimension."""
    if not parts[0].latent.shape[1]:
        return None, None
    sizes = np.array([len(p) for p in parts], dtype=np.float64)[:, None]
    mean, deviations, *kl = np.stack([p.latent for p in parts], 1)  # each [parts, D]
    n = sizes.sum()
    common = (sizes * mean).sum(0) / n
    variance = (deviations + sizes * (mean - common) ** 2).sum(0) / max(n - 1, 1)
    active = None if np.isnan(variance).any() else int((variance > ACTIVE).sum())
    return active, torch.from_numpy(kl[0].sum(0) / n) if kl else None
