"""Diagnostics: gaps of inference, information in the latents, noise of gradients, tails of weights."""

from ..estimation.pareto import pareto_khat
from .aggregate import Latents, latents
from .gradients import GradientMonitor, GradientSNR, gradient_snr
from .inference import InferenceGaps, inference_gaps

__all__ = [
    "GradientMonitor",
    "GradientSNR",
    "InferenceGaps",
    "Latents",
    "gradient_snr",
    "inference_gaps",
    "latents",
    "pareto_khat",
]
