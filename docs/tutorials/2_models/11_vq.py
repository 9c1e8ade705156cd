"""
Discrete latents: a VQ-VAE
==========================

Each position of the encoder's output is replaced by the nearest code of a codebook. The codes of an image are
a few integers, which a second model can learn to draw.
"""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import embedding

import fastvae

torch.manual_seed(0)
x = torch.bernoulli(torch.tensor(load_digits().images / 16, dtype=torch.float32))[:, None]
train, test = x[:1400], x[1400:]
CODES, DIM = 16, 8

# %%
# Four positions, each with one of 16 codes: 16 bits for an image. ``restart`` replaces codes that were not
# used for that many steps.

encoder = nn.Sequential(
    nn.Conv2d(1, 32, 3, padding=1),
    nn.ReLU(),
    nn.Conv2d(32, 64, 4, stride=4),
    nn.ReLU(),
    nn.Conv2d(64, DIM, 1),
)
decoder = nn.Sequential(
    nn.Conv2d(DIM, 64, 3, padding=1),
    nn.ReLU(),
    nn.ConvTranspose2d(64, 32, 4, stride=4),
    nn.ReLU(),
    nn.Conv2d(32, 1, 3, padding=1),
)
vq = fastvae.quantize.VectorQuantizer(CODES, DIM, restart=50)
model = nn.ModuleList([encoder, vq, decoder])
optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
for _ in range(40):
    for batch in train[torch.randperm(len(train))].split(100):
        z_q, loss, _ = vq(encoder(batch))
        log_px = fastvae.ops.bernoulli_log_prob(batch, decoder(z_q))
        optimizer.zero_grad()
        (-log_px + loss).mean().backward()
        optimizer.step()

# %%
# The bound on log p(x) of a VQ-VAE: log p(x|z) of the codes that were chosen, and their log probability.
# Under the uniform prior, 4 log 16 nats.

model.eval()
with torch.no_grad():
    z_q, _, indices = vq(encoder(test))
    likelihood = fastvae.ops.bernoulli_log_prob(test, decoder(z_q))
    codes = vq.encode(encoder(train)).flatten(1)
uniform = likelihood + vq.log_prob(indices)
print(f"codes in use: {vq.perplexity(indices):.1f} of {CODES}")
print(f"reconstruction {likelihood.mean():.2f}, bound with a uniform prior {uniform.mean():.2f} nats")


# %%
# **A learned prior** of the codes, position by position, given those before.


class Prior(nn.Module):
    """Logits of each of four codes, given the codes before it."""

    def __init__(self):
        super().__init__()
        self.first = nn.Parameter(torch.zeros(CODES))
        self.rest = nn.ModuleList([nn.Linear(n * 16, CODES) for n in (1, 2, 3)])
        self.table = nn.Parameter(0.1 * torch.randn(4 * CODES, 16))

    def next(self, known):
        """Return logits [B, CODES] of the code after these [B, n]."""
        n = known.shape[1]
        if not n:
            return self.first.expand(len(known), -1)
        return self.rest[n - 1](embedding(known + CODES * torch.arange(n), self.table).flatten(1).tanh())

    def forward(self, codes):
        return torch.stack([self.next(codes[:, :n]) for n in range(4)], 2)  # [B, CODES, 4]


prior = Prior()
optimizer = torch.optim.Adam(prior.parameters(), lr=1e-2, weight_decay=1e-3)
for _ in range(10):
    for batch in codes[torch.randperm(len(codes))].split(100):
        optimizer.zero_grad()
        (-vq.log_prob(batch, prior(batch))).mean().backward()
        optimizer.step()
with torch.no_grad():
    learned = likelihood + vq.log_prob(indices.flatten(1), prior(indices.flatten(1)))
print(f"bound with the learned prior {learned.mean():.2f} nats")

# %%
# For comparison, a VAE with continuous latents. Its log p(x) is by importance sampling, the others are
# bounds, since a single choice of the codes counts.

flat = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * 8))
back = nn.Sequential(nn.Linear(8, 128), nn.ReLU(), nn.Linear(128, 64), nn.Unflatten(1, (1, 8, 8)))
vae = fastvae.VAE(flat, back, likelihood="bernoulli")
optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
for _ in range(40):
    for batch in train[torch.randperm(len(train))].split(100):
        optimizer.zero_grad()
        (-vae.elbo(batch)).backward()
        optimizer.step()
result = vae.evaluate(test, k=500, progress=False)
print(f"VAE: log p(x) {-result.nll:.2f} ± {result.stderr:.2f}, ELBO {result.elbo.mean():.2f}")

# %%
# Codes drawn at random often fit together badly, those of the learned prior less often. On images as small as
# these a continuous VAE is better; discrete codes pay where a strong prior of many positions can be trained.

count = 32
drawn = codes[:count, :0]
with torch.no_grad():
    for _ in range(4):
        following = torch.multinomial(prior.next(drawn).softmax(1), 1)
        drawn = torch.cat([drawn, following], 1)
    at_random = vq.sample(count, (2, 2))
    panels = {
        "reconstructions": decoder(z_q[:count]),
        f"codes at random: bound {uniform.mean():.1f}": decoder(vq.decode(at_random)),
        f"codes by the learned prior: bound {learned.mean():.1f}": decoder(
            vq.decode(drawn.unflatten(1, (2, 2)))
        ),
    }
figure, axes = pyplot.subplots(1, 3, figsize=(11, 2.7), layout="constrained")
figure.suptitle("Digits decoded from four codes each")
for place, (title, logits) in zip(axes, panels.items(), strict=True):
    framed = nn.functional.pad(logits.sigmoid().reshape(4, 8, 8, 8), (1, 1, 1, 1), value=0.2)
    place.imshow(framed.permute(0, 2, 1, 3).reshape(40, 80), cmap="gray_r", vmin=0, vmax=1)
    place.set(xticks=[], yticks=[])
    place.set_title(title.replace("-", "−"), fontsize="medium")
