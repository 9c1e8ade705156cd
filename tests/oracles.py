"""Independent distribution of x for each declared likelihood, accurate in float64, and extreme outputs."""

import math

import torch
from torch import Tensor, distributions
from torch.distributions import Bernoulli, Distribution, Normal


class Logistic(Distribution):
    """Logistic density σ(z) σ(-z) / s, from a Bernoulli's two outcomes at logits z = (x - location) / s."""

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
    """Student's t density by differences of log Γ up to ν/2 = 16, then by the ratio's expansion."""

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


class ContinuousBernoulli(Distribution):
    """Continuous Bernoulli by the series of sinh, of positive terms; in closed form for large |l|."""

    def __init__(self, logits: Tensor):
        super().__init__(logits.shape, validate_args=False)
        self.logits = logits

    def _sinhc(self) -> tuple[Tensor, Tensor]:
        """Return sinh(y) / y, y = l/2, and its derivative, for |y| up to 4."""
        y = (0.5 * self.logits).clamp(-4, 4)
        terms = [y ** (2 * n) / math.gamma(2 * n + 2) for n in range(25)]
        slopes = [2 * n * y ** (2 * n - 1) / math.gamma(2 * n + 2) for n in range(1, 25)]
        return torch.stack(terms).sum(0), torch.stack(slopes).sum(0)

    @property
    def mean(self) -> Tensor:
        series, slope = self._sinhc()
        large = self.logits.abs().clamp(min=8)
        far = 0.5 + self.logits.sign() * (1 / torch.expm1(large) - 1 / large + 0.5)
        return torch.where(self.logits.abs() < 8, 0.5 + 0.5 * slope / series, far)

    def log_prob(self, value: Tensor) -> Tensor:
        large = self.logits.abs().clamp(min=8)
        # x l, minus l where l > 0, in one factor.
        linear = torch.where(self.logits > 0, value - 1, value) * self.logits
        far = linear - torch.log(-torch.expm1(-large) / large)
        near = (value - 0.5) * self.logits - torch.log(self._sinhc()[0])
        return torch.where(self.logits.abs() < 8, near, far)


class Beta(Distribution):
    """Beta density in Loader's form: a φ(x n/a - 1) + b φ((1 - x) n/b - 1) with φ(t) = t - log(1 + t)."""

    def __init__(self, log_concentration1: Tensor, log_concentration0: Tensor):
        super().__init__(log_concentration1.shape, validate_args=False)
        self.logs = log_concentration1, log_concentration0

    @property
    def mean(self) -> Tensor:
        a, b = (c.exp() for c in self.logs)
        return a / (a + b)

    def log_prob(self, value: Tensor) -> Tensor:
        (log_a, a), (log_b, b) = ((c, c.exp()) for c in self.logs)
        n, log_n = a + b, torch.logaddexp(log_a, log_b)
        # Textbook derivative by x: terms of Loader's form would cancel in it.
        powers = [
            torch.expm1(c).detach() * log
            for c, log in zip(self.logs, (value.log(), torch.log1p(-value)), strict=True)
        ]
        by_value, value = powers[0] + powers[1], value.detach()
        deviance = self._deviance(value, a, n, torch.log(value) + log_n - log_a)
        deviance = deviance + self._deviance(1 - value, b, n, torch.log1p(-value) + log_n - log_b)
        gammas = self._excess(n, log_n) - self._excess(a, log_a) - self._excess(b, log_b)
        log_p = log_a + log_b - log_n + gammas - deviance - torch.log(value) - torch.log1p(-value)
        return log_p + (by_value - by_value.detach())

    @staticmethod
    def _deviance(x: Tensor, a: Tensor, n: Tensor, log_ratio: Tensor) -> Tensor:
        t = x * (n / a) - 1
        small = t.clamp(-0.1, 0.1)
        series = torch.stack([(-small) ** m / m for m in range(2, 18)]).sum(0)
        return torch.where(t.abs() < 0.1, a * series, x * n - a - a * log_ratio)

    @staticmethod
    def _excess(z: Tensor, log_z: Tensor) -> Tensor:
        """Return log z! - (z log z - z)."""
        small, large = z.clamp(max=16), z.clamp(min=16)
        exact = torch.lgamma(small + 1) - small * log_z.clamp(max=math.log(16)) + small
        u = 1 / large
        series = u / 12 - u**3 / 360 + u**5 / 1260 - u**7 / 1680 + u**9 / 1188
        return torch.where(z < 16, exact, 0.5 * torch.log(2 * math.pi * large) + series)


class DiscretizedLogistic(Distribution):
    """Discretised logistic on [0, 1]: σ(b) - σ(a) = σ(b) σ(-a) (1 - exp(a - b)) of the bin's edges a, b."""

    def __init__(self, mean: Tensor, log_scale: Tensor, log_bin_width: Tensor):
        super().__init__(mean.shape, validate_args=False)
        self.location, self.log_scale, self.log_bin_width = mean, log_scale, log_bin_width

    @property
    def mean(self) -> Tensor:
        edges = torch.exp(-self.log_bin_width.double()).round()
        level = torch.arange(int(edges.max()) + 1).reshape(-1, *[1] * edges.dim()).to(edges)
        wide = DiscretizedLogistic(self.location.double(), self.log_scale.double(), -edges.log())
        return ((level / edges) * wide.log_prob(level / edges).exp()).sum(0).to(self.location.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        log_s = self.log_scale.clamp(-60, 60)
        z = (value - self.location) * torch.exp(-log_s)
        half = 0.5 * torch.exp(self.log_bin_width - log_s)
        above, below = (torch.nn.functional.logsigmoid(v) for v in (z + half, half - z))
        inside = above + below + torch.log(-torch.expm1(-2 * half))
        # sinh(h) / (cosh(z) + cosh(h)) near the mean, where the gradients of both edges almost cancel.
        h, y = half.clamp(max=20), z.clamp(-1, 1)
        central = torch.log(torch.sinh(h) / (torch.cosh(y) + torch.cosh(h)))
        inside = torch.where((z.abs() < 1) & (half < 20), central, inside)
        return torch.where(value <= 0, above, torch.where(value >= 1, below, inside))


class SoftplusGaussian(Normal):
    """Torch's Normal with variance softplus(raw) + floor."""

    def __init__(self, mean: Tensor, raw: Tensor, log_floor: Tensor):
        variance = torch.logaddexp(raw, torch.zeros_like(raw)) + log_floor.exp()
        super().__init__(mean, variance.sqrt(), validate_args=False)


class NegativeBinomial:
    """Negative binomial by the textbook formula in float64.

    Ratios of gamma functions are computed without cancellation: 16 explicit factors, then Stirling's series.
    """

    def __init__(self, log_mean: Tensor, t: Tensor):
        self.log_mean, self.t = log_mean, t
        self.mean = torch.exp(log_mean)

    def log_prob(self, x: Tensor) -> Tensor:
        theta = torch.exp(self.t)
        top = theta + 16

        def series(z: Tensor) -> Tensor:
            return 1 / (12 * z) - 1 / (360 * z**3) + 1 / (1260 * z**5) - 1 / (1680 * z**7) + 1 / (1188 * z**9)

        factors = sum(torch.log1p(x / (theta + i)) for i in range(16))
        gammas = (top + x - 0.5) * torch.log1p(x / top) - x + (series(top + x) - series(top)) - factors
        gammas = gammas + x * torch.log1p(16 / theta)
        odds = torch.logaddexp(torch.zeros_like(self.t), self.log_mean - self.t)
        return gammas + x * self.log_mean - torch.lgamma(x + 1) - (x + theta) * odds


class ZeroInflated:
    """Exact log probabilities: counts of 0 sum over dropout and a sampled 0."""

    def __init__(self, log_mean: Tensor, t: Tensor, logit: Tensor):
        self.counts, self.logit = NegativeBinomial(log_mean, t), logit
        self.mean = self.counts.mean * torch.sigmoid(-logit)

    def log_prob(self, x: Tensor) -> Tensor:
        counted = self.counts.log_prob(x)
        log_alive = torch.nn.functional.logsigmoid(-self.logit)
        log_dead = torch.nn.functional.logsigmoid(self.logit)
        # If dropout is nearly certain, log-add-exp would round log p to 0.
        likely = self.logit > 1
        sure = torch.log1p(torch.sigmoid(-torch.where(likely, self.logit, 1.0)) * torch.expm1(counted))
        both = torch.logaddexp(log_dead, log_alive + counted)
        return torch.where(x == 0, torch.where(likely, sure, both), log_alive + counted)


ORACLES = {
    "bernoulli": lambda logits: Bernoulli(logits=logits, validate_args=False),
    "beta": Beta,
    "continuous_bernoulli": ContinuousBernoulli,
    "discretized_logistic": DiscretizedLogistic,
    "gaussian": lambda mean, logvar: Normal(mean, torch.exp(0.5 * logvar)),
    "laplace": lambda location, log_scale: distributions.Laplace(location, log_scale.exp()),
    "log_normal": lambda location, log_scale: distributions.LogNormal(location, log_scale.exp()),
    "logistic": Logistic,
    "negative_binomial": NegativeBinomial,
    "poisson": lambda log_rate: distributions.Poisson(log_rate.exp(), validate_args=False),
    "softplus_gaussian": SoftplusGaussian,
    "student_t": StudentT,
    "zero_inflated_negative_binomial": ZeroInflated,
}

# Extreme magnitudes of outputs, by name, in addition to the usual ones.
HAZARDS = {
    "bernoulli": {"logits": (100.0,)},
    "continuous_bernoulli": {"logits": (100.0,)},
    "negative_binomial": {"log_mean": (20.0,), "log_inverse_dispersion": (10.0,)},
    "poisson": {"log_rate": (20.0,)},
    "student_t": {"log_df": (8.0,)},
    "zero_inflated_negative_binomial": {
        "log_mean": (20.0,), "log_inverse_dispersion": (10.0,), "dropout_logit": (40.0,),
    },
}  # fmt: skip
