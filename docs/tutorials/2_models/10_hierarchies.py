"""
Hierarchies of latents
======================

Latents in levels: the upper ones decide what the lower ones may be. Prior and posterior run from the top to
the bottom, and the objectives take a ``Hierarchy`` like any other posterior.
"""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn

import fastvae
from fastvae.distributions import Hierarchy, Level

torch.manual_seed(0)
x = torch.bernoulli(torch.tensor(load_digits().data / 16, dtype=torch.float32))
train, test = x[:1400], x[1400:]
TOP, BOTTOM = 2, 6


def network(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 64), nn.Tanh(), nn.Linear(64, outputs))


# %%
# The encoder computes features of x for each level; the levels turn them into q. The lower level's prior is a
# network of z₁. With ``merge="precision"`` its posterior is the product of that prior and of what the
# features say, as in the ladder VAE.


class Encoder(nn.Module):
    """Bottom-up features of x, and the top-down posterior."""

    def __init__(self):
        super().__init__()
        self.bottom, self.top = nn.Linear(64, 128), nn.Linear(128, 64)
        self.hierarchy = Hierarchy(
            [
                Level(TOP, nn.Linear(64, 2 * TOP)),
                Level(BOTTOM, nn.Linear(128, 2 * BOTTOM), prior=network(TOP, 2 * BOTTOM), merge="precision"),
            ]
        )

    def forward(self, x):
        lower = self.bottom(x).relu()
        return self.hierarchy([self.top(lower).relu(), lower])


def flat():
    """Return an encoder of as many latents in one level."""
    return nn.Sequential(
        nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 64), nn.ReLU(), nn.Linear(64, 2 * (TOP + BOTTOM))
    )


def train_vae(encoder):
    torch.manual_seed(1)
    decoder = nn.Sequential(nn.Linear(TOP + BOTTOM, 128), nn.ReLU(), nn.Linear(128, 64))
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", latent_dim=TOP + BOTTOM)
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    beta = fastvae.schedules.linear(0.0, 1.0, 20)
    for epoch in range(60):
        for batch in train[torch.randperm(len(train))].split(100):
            optimizer.zero_grad()
            (-vae.elbo(batch, k=2, beta=beta(epoch + 1))).backward()
            optimizer.step()
    return vae


# %%
# The model of two levels, and one of a single level with as many latents, by the same objective.

results = {}
for name, encoder in (("two levels", Encoder()), ("one level", flat())):
    vae = train_vae(encoder)
    results[name] = vae, vae.evaluate(test, k=500, progress=False)
    print(f"{name}: log p(x) {-results[name][1].nll:.2f} ± {results[name][1].stderr:.2f}")
vae, result = results["two levels"]
better = result.log_px - results["one level"][1].log_px
print(f"two levels to one: {better.mean():+.2f} ± {better.std() / len(better) ** 0.5:.2f} nats")

# %%
# These small images gain hardly anything in log p(x). What a hierarchy adds is control: each row has one z₁,
# and draws z₂ from p(z₂|z₁).

hierarchy = vae.encoder.hierarchy
rows, columns = 6, 10
generator = torch.Generator().manual_seed(5)
top, _ = hierarchy.split(hierarchy.sample(rows, generator=generator))
top = top.repeat_interleave(columns, 0)
with torch.no_grad():
    mu, logvar = hierarchy.levels[1].prior(top).chunk(2, 1)
    bottom = mu + (0.5 * logvar).exp() * torch.randn(mu.shape, generator=generator)
    varied = vae.decoder(torch.cat([top, bottom], 1)).sigmoid()
free = vae.sample(rows * columns, mean=True, generator=generator)

figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 3.5), layout="constrained")
figure.suptitle("Two levels: z₁ decides what z₂ may vary")
titles = ("z₁ and z₂ drawn", "each row: one z₁, ten draws of z₂")
for place, images, title in zip(axes, (free, varied), titles, strict=True):
    framed = nn.functional.pad(images.reshape(rows, columns, 8, 8), (1, 1, 1, 1), value=0.2)
    place.imshow(framed.permute(0, 2, 1, 3).reshape(10 * rows, 10 * columns), cmap="gray_r", vmin=0, vmax=1)
    place.set(xticks=[], yticks=[], title=title)
