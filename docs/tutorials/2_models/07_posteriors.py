"""
Which posterior?
================

A posterior q(z|x) is what the encoder returns: two numbers for each latent, a full covariance, or a
mixture. Which one suits is seen on the exact posterior, which two latents allow to draw.
"""

import torch
from matplotlib import pyplot
from torch import nn

import fastvae

# %%
# Data with a hidden pair of states, of which only the product and the sum of squares are seen: posteriors
# with correlations, and with several modes.

torch.manual_seed(0)
state = torch.randn(3000, 2)
x = torch.stack([state[:, 0] * state[:, 1], state.square().sum(1)], 1) + 0.2 * torch.randn(3000, 2)
likelihood = fastvae.likelihoods.Gaussian(scale=0.2)


def truth(z):
    """Decode as nature does."""
    return torch.stack([z[:, 0] * z[:, 1], z.square().sum(1)], 1)


def trained(outputs, posterior):
    """Train an encoder against the true decoder, by IWAE with 16 samples."""
    torch.manual_seed(1)
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, outputs))
    optimizer = torch.optim.Adam(net.parameters(), lr=3e-3)
    for _ in range(400):
        batch = x[torch.randint(len(x), (200,))]
        optimizer.zero_grad()
        q = posterior(net(batch))
        (-fastvae.iwae(batch, q, truth, k=16, likelihood=likelihood)).backward()
        optimizer.step()
    return lambda batch: posterior(net(batch))


def full(h):
    """Read the mean and the lower triangle of a factor."""
    return fastvae.distributions.FullNormal(h[:, :2], h[:, 2:])


def mixture(h):
    """Read four diagonal normals, and their weights."""
    parts = [(h[:, 4 * c : 4 * c + 2], h[:, 4 * c + 2 : 4 * c + 4]) for c in range(4)]
    return fastvae.distributions.Mixture(parts, h[:, 16:])


families = {"diagonal": (4, lambda h: h), "full covariance": (5, full), "mixture of four": (20, mixture)}
encoders = {name: trained(*family) for name, family in families.items()}

# %%
# The bound by 16 samples, and log p(x) by many: the difference is what q costs.

test = x[:500]
exact = fastvae.audit.lattice(test, truth, latent_dim=2, likelihood=likelihood).log_px.mean()
print(f"{'log p(x)':>16}: {float(exact):.3f}")
for name, encoder in encoders.items():
    with torch.no_grad():
        bound = fastvae.iwae(test, encoder(test), truth, k=16, likelihood=likelihood)
    print(f"{name:>16}: {float(bound):.3f}")

# %%
# One example: the exact posterior in grey, with four modes, and draws from each q. With several samples
# the bound forgives a q that is too wide, and punishes one that misses a mode.

one = torch.tensor([[0.8, 2.2]])
axis = torch.linspace(-2.6, 2.6, 200)
a, b = torch.meshgrid(axis, axis, indexing="xy")
z = torch.stack([a, b], -1).reshape(-1, 2)
log_joint = -0.5 * ((one - truth(z)) / 0.2).square().sum(1) - 0.5 * z.square().sum(1)
figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.6), sharex=True, sharey=True, layout="constrained")
for place, (name, encoder) in zip(axes, encoders.items(), strict=True):
    place.contourf(a, b, (log_joint - log_joint.max()).exp().reshape(200, 200), levels=10, cmap="Greys")
    with torch.no_grad():
        q = fastvae.distributions.as_posterior(encoder(one))
        drawn, _ = q.rsample_log_prob(400, torch.tensor(1))
    place.scatter(*drawn[:, 0].T, s=6, color="#0072b2", alpha=0.6)
    place.set(title=name, xlim=(-2.6, 2.6), ylim=(-2.6, 2.6), xlabel="$z_1$")
figure.suptitle("The exact posterior of one example (grey), and draws from q (blue)")
axes[0].set_ylabel("$z_2$")
