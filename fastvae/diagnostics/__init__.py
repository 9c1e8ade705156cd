"""What a model and its training are like: what the latents hold, how noisy gradients are."""

from .aggregate import Latents, latents
from .gradients import GradientMonitor, GradientSNR, gradient_snr

__all__ = ["GradientMonitor", "GradientSNR", "Latents", "gradient_snr", "latents"]
