"""
β, free bits, and latents that collapse
=======================================

A VAE may leave latents unused. What they carry is a matter of the objective: β weighs the KL, free bits
grant each latent a minimum, and a warm-up of β lets the latents form before the KL counts.
"""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn

import fastvae

torch.manual_seed(0)
x = torch.bernoulli(torch.tensor(load_digits().data / 16, dtype=torch.float32))
train, test = x[:1400], x[1400:]
EPOCHS, LATENTS = 40, 16


def train_vae(**options):
    """Train a model by the ELBO with these options, each a value or a schedule of the step."""
    torch.manual_seed(1)
    encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * LATENTS))
    decoder = nn.Sequential(nn.Linear(LATENTS, 128), nn.ReLU(), nn.Linear(128, 64))
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli")
    optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
    step = 0
    for _ in range(EPOCHS):
        for batch in train[torch.randperm(len(train))].split(100):
            now = {name: value(step) if callable(value) else value for name, value in options.items()}
            optimizer.zero_grad()
            (-vae.elbo(batch, **now)).backward()
            optimizer.step()
            step += 1
    return vae


# %%
# The same network by five objectives. ``evaluate`` reports log p(x), by which models that were trained
# differently can be compared, and the KL of each latent.

objectives = {
    "β = 4": {"beta": 4.0},
    "β = 1": {},
    "β warmed up": {"beta": fastvae.schedules.linear(0.0, 1.0, 280)},
    "free bits 0.3": {"free_bits": 0.3},
    "β = 0.25": {"beta": 0.25},
}
found = {
    name: train_vae(**options).evaluate(test, k=500, progress=False) for name, options in objectives.items()
}
for name, result in found.items():
    print(f"{name:>14}: log p(x) {-result.nll:.2f}, KL {float(result.kl_per_dim.sum()):.1f} nats")

# %%
# KL of each latent, sorted. A larger β leaves fewer of them; a smaller one keeps more, and pays for it in
# log p(x) if the KL is not worth its price.

figure, axes = pyplot.subplots(1, len(found), figsize=(11, 2.8), sharey=True, layout="constrained")
for place, (name, result) in zip(axes, found.items(), strict=True):
    kl = result.kl_per_dim.sort(descending=True).values
    place.bar(range(LATENTS), kl, color=["#0072b2" if v > 0.05 else "#cccccc" for v in kl])
    place.set(title=f"{name}\nlog p(x) {-result.nll:.2f}", xticks=[], xlabel="latents, sorted")
    place.spines[["top", "right"]].set_visible(False)
figure.suptitle("KL of each latent by objective: the larger β, the fewer latents are used")
axes[0].set_ylabel("KL, nats")
