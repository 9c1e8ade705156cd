"""
Which likelihood?
=================

The likelihood says what kind of number x is. Values of log p(x) can be compared if they are about the same
data: probabilities with probabilities, densities with densities on the same scale.
"""

import math

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn

import fastvae
from fastvae import likelihoods

# %%
# A pixel of scikit-learn's digits is the ink in a block of 4×4 dots: one of the levels 0 to 16. That can be
# read as a count, as a class, as a level on a scale, and as a number between 0 and 1.

torch.manual_seed(0)
levels = torch.tensor(load_digits().data, dtype=torch.float32)
noisy = ((levels + torch.rand_like(levels)) / 17).clamp(1e-4, 1 - 1e-4)  # densities need it, see below


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 128), nn.ReLU(), nn.Linear(128, outputs))


class Decoder(nn.Module):
    """Decoder of one or several parameters for each pixel, with these initial values."""

    def __init__(self, start, shape):
        super().__init__()
        self.body, self.shape = network(8, len(start) * math.prod(shape)), shape
        with torch.no_grad():
            self.body[-1].bias.view(len(start), -1).copy_(torch.tensor(start)[:, None])

    def forward(self, z):
        parts = self.body(z).unflatten(1, (-1, *self.shape)).unbind(1)
        return parts if len(parts) > 1 else parts[0]


class Encoder(nn.Module):
    """Encoder of x, divided by its largest value."""

    def __init__(self, most):
        super().__init__()
        self.body, self.most = network(64, 2 * 8), most

    def forward(self, x):
        return self.body(x / self.most)


def log_px(x, likelihood, start, shape=(64,)):
    """Train a model of x, and return log p(x) of the test images and its standard error."""
    torch.manual_seed(1)
    vae = fastvae.VAE(Encoder(x.max()), Decoder(start, shape), likelihood=likelihood)
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    for _ in range(20):
        for batch in x[:1400][torch.randperm(1400)].split(100):
            optimizer.zero_grad()
            (-vae.iwae(batch, k=3)).backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 100.0)
            optimizer.step()
    result = vae.evaluate(x[1400:], k=200, progress=False)
    return -result.nll, result.stderr


# %%
# **Probabilities.** Counts, classes and levels are discrete: log p(x) is the logarithm of a probability, at
# most 0. A Poisson's variance is its mean, a negative binomial's is larger.

found = {
    "Poisson, a count": log_px(levels, "poisson", (1.0,)),
    "negative binomial, a count": log_px(levels, "negative_binomial", (1.0, 0.0)),
    "categorical, a class": log_px(levels, likelihoods.Categorical(), (0.0,), (17, 64)),
    "discretized logistic, a level": log_px(
        levels / 16, likelihoods.DiscretizedLogistic(levels=17), (0.0, -1.0)
    ),
}

# %%
# **Densities** of numbers in (0, 1). They may be larger than 1, so that log p(x) may be positive, and grow
# without bound where a model puts its mass on the levels themselves. Uniform noise of a level's width
# prevents it. A squared error with σ = 1 is a Gaussian, too; its scale does not fit pixels between 0 and 1.

densities = {
    "Gaussian, σ = 1": log_px(noisy, likelihoods.Gaussian(scale=1.0), (0.5,)),
    "Gaussian, one σ learned": log_px(noisy, likelihoods.Gaussian(scale=0.3, learned=True), (0.5,)),
    "Gaussian, σ of each pixel": log_px(noisy, "gaussian", (0.5, -2.0)),
    "Beta": log_px(noisy, "beta", (0.0, 0.0)),
}

# %%
# **From a density to a probability.** Divided by 17, a density is that of the levels plus noise, and its mean
# logarithm over the noise is a lower bound on the log probability of the level (Theis et al. 2016). So the
# densities of 64 pixels join the comparison by subtracting 64 log 17.

for name, (value, error) in densities.items():
    print(f"{name:>30}: {value:8.2f} as a density")
    found[name] = value - 64 * math.log(17), error
for name, (value, error) in found.items():
    print(f"{name:>30}: {value:8.2f} ± {error:.2f} as a probability")

# %%
# **Neither.** ``"bernoulli"`` for pixels between 0 and 1 is a sum of cross-entropies, and
# ``"continuous_bernoulli"`` a density of numbers without noise, of which two values, 0 and 1, are frequent.
# Both train useful models; their numbers do not belong into this picture.

soft = log_px(levels / 16, "bernoulli", (0.0,))[0]
continuous = log_px(levels / 16, "continuous_bernoulli", (0.0,))[0]
print(f"not comparable: bernoulli {soft:.2f}, continuous_bernoulli {continuous:.2f}")

order = sorted(found, key=lambda name: found[name][0])
figure, axes = pyplot.subplots(figsize=(8, 4.2), layout="constrained")
worst, best = found[order[0]][0], found[order[-1]][0]
for i, name in enumerate(order):
    value, error = found[name]
    color = "#d55e00" if name in densities else "#0072b2"
    axes.plot([value - 2 * error, value + 2 * error], [i, i], color=color, lw=3, solid_capstyle="round")
    axes.plot(value, i, "o", color=color, ms=7)
    axes.text(best + 5, i, f"{value:.0f}".replace("-", "−"), va="center", ha="left", color=color)
axes.text(worst, 5.6, "probabilities", color="#0072b2", fontweight="bold")
axes.text(worst, 4.9, "densities, as probabilities", color="#d55e00", fontweight="bold")
axes.set_yticks(range(len(order)), order)
for label, name in zip(axes.get_yticklabels(), order, strict=True):
    label.set_color("#d55e00" if name in densities else "#0072b2")
axes.set(xlabel="log p(x) of a test image, nats", title="The same digits, one scale: further right is better")
axes.spines[["top", "right"]].set_visible(False)
