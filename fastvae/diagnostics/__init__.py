"""Diagnostics: information in the latents, noise of gradients, tails of weights."""

from ..estimation.pareto import pareto_khat
from .aggregate import Latents, latents
from .gradients import GradientMonitor, GradientSNR, gradient_snr

__all__ = ["GradientMonitor", "GradientSNR", "Latents", "gradient_snr", "latents", "pareto_khat"]
