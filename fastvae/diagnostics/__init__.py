"""Diagnostics of a model and its training: information in the latents, noise of gradients."""

from .aggregate import Latents, latents
from .gradients import GradientMonitor, GradientSNR, gradient_snr

__all__ = ["GradientMonitor", "GradientSNR", "Latents", "gradient_snr", "latents"]
