"""
A likelihood of your own
========================

Any density works, in plain PyTorch: subclass ``Likelihood`` with a ``log_prob``, or wrap a constructor of
``torch.distributions``. Every objective takes it, in chunks and evaluated.
"""

import torch
from matplotlib import pyplot
from torch import nn

import fastvae

torch.manual_seed(0)

# %%
# Angles: wind directions that depend on a hidden state. A Gaussian does not know that −π and π are the
# same.

state = torch.randn(2000, 1)
angles = torch.remainder(
    torch.cat([3 * state, 3 * state + 1.0, -2 * state], 1) + 0.3 * torch.randn(2000, 3), 2 * torch.pi
)
angles = angles - torch.pi
train, test = angles[:1600], angles[1600:]

von_mises = fastvae.likelihoods.from_distribution(
    lambda location, log_concentration: torch.distributions.VonMises(location, log_concentration.exp())
)


def network(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs)
    )


class Decoder(nn.Module):
    """Decoder of two parameters for each angle."""

    def __init__(self):
        super().__init__()
        self.body = network(2, 6)

    def forward(self, z):
        return self.body(z).chunk(2, dim=1)


class Encoder(nn.Module):
    """Encoder of sines and cosines."""

    def __init__(self):
        super().__init__()
        self.body = network(6, 4)

    def forward(self, x):
        return self.body(torch.cat([x.sin(), x.cos()], 1))


results = {}
for name, likelihood in (("Gaussian", "gaussian"), ("von Mises", von_mises)):
    torch.manual_seed(1)
    vae = fastvae.VAE(Encoder(), Decoder(), likelihood=likelihood)
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    for _ in range(25):
        for batch in train[torch.randperm(len(train))].split(100):
            optimizer.zero_grad()
            (-vae.iwae(batch, k=8)).backward()
            nn.utils.clip_grad_norm_(vae.parameters(), 5.0)
            optimizer.step()
    results[name] = vae, vae.evaluate(test, k=500, progress=False)
    print(f"{name:>9}: log p(x) {-results[name][1].nll:.2f} ± {results[name][1].stderr:.2f}")

# %%
# Both are densities on the same data, so that their log p(x) can be compared. Samples of two of the three
# angles show what the Gaussian gets wrong: draws beyond ±π.

figure, axes = pyplot.subplots(1, 3, figsize=(9, 3.2), sharex=True, sharey=True, layout="constrained")
panels = {"data": test, **{name: vae.sample(400).detach() for name, (vae, _) in results.items()}}
for place, (name, values) in zip(axes, panels.items(), strict=True):
    title = name if name == "data" else f"{name}, log p(x) {-results[name][1].nll:.2f}"
    place.scatter(values[:, 0], values[:, 1], s=5, color="#0072b2", alpha=0.5)
    place.axhspan(-torch.pi, torch.pi, color="#f2f2f2", zorder=0)
    place.set(title=title, xlim=(-6, 6), ylim=(-6, 6), xlabel="first angle")
figure.suptitle("Draws of two angles: a Gaussian draws beyond ±π, outside the grey band")
axes[0].set_ylabel("second angle")
