"""Distributions for the tests, where ``torch.distributions`` has none that keeps its digits in float64."""

import math

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution


class Logistic(Distribution):
    """Its density is σ(z) σ(-z) / s, of either outcome of a Bernoulli with logits z = (x - location) / s."""

    def __init__(self, location: Tensor, log_scale: Tensor):
        super().__init__(location.shape, validate_args=False)
        self.location, self.log_scale = location, log_scale

    @property
    def mean(self) -> Tensor:
        return self.location

    def log_prob(self, value: Tensor) -> Tensor:
        above = Bernoulli(logits=(value - self.location) / self.log_scale.exp())
        one: Tensor = torch.ones_like(value)
        return above.log_prob(one) + above.log_prob(0 * one) - self.log_scale  # type: ignore[no-any-return]


class StudentT(Distribution):
    """By differences of log Γ where these have digits left, else by the expansion of the ratio."""

    def __init__(self, location: Tensor, log_scale: Tensor, log_df: Tensor):
        super().__init__(location.shape, validate_args=False)
        self.location, self.log_scale, self.df = location, log_scale, log_df.exp()

    @property
    def mean(self) -> Tensor:
        return self.location

    def log_prob(self, value: Tensor) -> Tensor:
        z, z_large = (0.5 * self.df).clamp(max=16), (0.5 * self.df).clamp(min=16)
        gammas = torch.lgamma(z + 0.5) - torch.lgamma(z) - 0.5 * torch.log(z)
        u = 1 / z_large
        expansion = -u / 8 + u**3 / 192 - u**5 / 640 + 17 * u**7 / 14336 - 31 * u**9 / 18432
        gammas = torch.where(z < 16, gammas, expansion + 691 * u**11 / 180224)
        t = ((value - self.location) / self.log_scale.exp()) ** 2 / self.df
        return gammas - 0.5 * math.log(2 * math.pi) - self.log_scale - 0.5 * (self.df + 1) * torch.log1p(t)
