"""
Single cells
============

Counts of genes in single cells: overdispersed, mostly zero, and proportional to how deeply a cell was
sequenced. The cells are simulated, so that the true log p(x) is known.
"""

import torch
from matplotlib import pyplot
from torch import nn

import fastvae

CELLS, GENES, TYPES, LATENTS, INVERSE_DISPERSION = 2500, 200, 5, 4, 2.0
NAMES = ("T cells", "B cells", "NK cells", "monocytes", "dendritic cells")

# %%
# **The truth.** Each type has a profile of expression; T and NK cells share half of theirs. An activity, one
# number per cell, moves some genes. The depth of sequencing varies by a factor of ten and more.

torch.manual_seed(0)
profile = 1.2 * torch.randn(TYPES, GENES) - 1.0
profile[2, : GENES // 2] = profile[0, : GENES // 2]
response = 0.6 * torch.randn(GENES) * (torch.rand(GENES) < 0.3)
shares = torch.tensor([0.35, 0.2, 0.15, 0.2, 0.1])
kind = torch.multinomial(shares, CELLS, replacement=True)
activity = torch.randn(CELLS, 1)
depth = torch.exp(0.6 * torch.randn(CELLS))
mean = depth[:, None] * torch.exp(profile[kind] + activity * response)
theta = torch.tensor(INVERSE_DISPERSION)
counts = torch.poisson(mean * torch.distributions.Gamma(theta, theta).sample(mean.shape))
train, test = slice(0, 2000), slice(2000, None)
print(f"{100 * (counts == 0).float().mean():.0f} % zeros")
print(f"counts of a cell: {counts.sum(1).min():.0f} to {counts.sum(1).max():.0f}")

# %%
# log p(x) of the generator itself: a sum over the types, and over a fine grid of activities.

grid = torch.linspace(-5, 5, 101)
log_weight = torch.log_softmax(-0.5 * grid**2, 0) + shares.log()[:, None]
log_mean = profile[:, None] + grid[:, None] * response  # [TYPES, 101, GENES]
log_joint = fastvae.ops.negative_binomial_log_prob(
    counts[test], log_mean.flatten(0, 1)[:, None] + depth[test, None].log(), theta.log()
)
truth = (log_joint + log_weight.flatten()[:, None]).logsumexp(0)
print(f"the truth: log p(x) {truth.mean():.2f}")

# %%
# **The models.** ``size_factor`` multiplies the mean of each cell: the counts' sum, relative to the average.
# Then z has to say nothing about the depth.

size = counts.sum(1) / counts.sum(1).mean()


class Encoder(nn.Module):
    """Encoder of log counts."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(GENES, 128), nn.ReLU(), nn.Linear(128, 2 * LATENTS))

    def forward(self, x):
        return self.body(x.log1p())


class Decoder(nn.Module):
    """Decoder of log means, and of dropout logits if they are asked for."""

    def __init__(self, dropout=False):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(LATENTS, 128), nn.ReLU(), nn.Linear(128, (1 + dropout) * GENES))

    def forward(self, z):
        out = self.body(z)
        return out.chunk(2, 1) if out.shape[1] > GENES else out


def fit(likelihood, sized=True, dropout=False):
    """Train a model, and evaluate it on the test cells."""
    torch.manual_seed(1)
    vae = fastvae.VAE(Encoder(), Decoder(dropout), likelihood=likelihood)
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    factors = size if sized else torch.ones_like(size)
    for _ in range(25):
        for rows in torch.randperm(2000).split(100):
            optimizer.zero_grad()
            (-vae.elbo(counts[rows], size_factor=factors[rows])).backward()
            optimizer.step()
    data = torch.utils.data.TensorDataset(counts[test], factors[test])
    result = vae.evaluate(
        data, k=500, prepare_batch=lambda b: {"x": b[0], "size_factor": b[1]}, progress=False
    )
    return vae, result


def negative_binomial():
    """Return a likelihood with one learned inverse dispersion for each gene."""
    return fastvae.likelihoods.NegativeBinomial(inverse_dispersion=torch.ones(GENES), learned=True)


def zero_inflated():
    return fastvae.likelihoods.ZeroInflatedNegativeBinomial(
        inverse_dispersion=torch.ones(GENES), learned=True
    )


models = {
    "Poisson": fit("poisson"),
    "negative binomial without size factors": fit(negative_binomial(), sized=False),
    "zero-inflated negative binomial": fit(zero_inflated(), dropout=True),
    "negative binomial": fit(negative_binomial()),
}
for name, (_, result) in models.items():
    print(f"{name}: log p(x) {-result.nll:.2f}, {(truth - result.log_px).mean():.2f} nats below the truth")

# %%
# A Poisson, whose variance is too small, costs the most, and then a z that must describe the depth, too. Zero
# inflation gains nothing, since the generator has none: many zeros alone do not call for it. (The truth knows
# each cell's depth; the models estimate it by the counts' sum, which is also a little information about x.)
#
# Left: the means of q(z|x), in the plane of their largest variance, with the type of each cell, which no
# model has seen.

vae, _ = models["negative binomial"]
with torch.no_grad():
    mu = vae.encoder(counts[test]).chunk(2, 1)[0]
plane = (mu - mu.mean(0)) @ torch.linalg.svd(mu - mu.mean(0), full_matrices=False)[2][:2].T
figure, (left, right) = pyplot.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
colors = ("#0072b2", "#e69f00", "#56b4e9", "#d55e00", "#009e73")
for i, (name, color) in enumerate(zip(NAMES, colors, strict=True)):
    mine = plane[kind[test] == i]
    left.scatter(*mine.T, s=9, color=color, alpha=0.6, linewidths=0)
    x, y = mine[:, 0].median(), mine[:, 1].quantile(0.98)
    left.text(x, y, name, color=color, fontweight="bold", ha="right" if i == 0 else "center", va="bottom")
left.set(xticks=[], yticks=[], title="Latents of test cells, by type (not seen in training)")
names = [
    name.replace(" without", "\nwithout").replace("zero-inflated ", "zero-inflated\n") for name in models
]
below = [float((truth - result.log_px).mean()) for _, result in models.values()]
bars = right.barh(names, below, color=["#bbbbbb"] * 3 + ["#0072b2"])
right.bar_label(bars, fmt="%.1f", padding=3)
right.set(title="log p(x) below the truth, nats", xticks=[], xlim=(0, 1.15 * max(below)))
right.spines[["top", "right", "bottom"]].set_visible(False)
