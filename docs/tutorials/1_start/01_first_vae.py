"""
A first VAE in thirty lines
===========================

Train a small model of scikit-learn's digits, look at its latents, and read what the evaluation says.
"""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn

import fastvae

torch.manual_seed(0)
digits = load_digits()
x = torch.bernoulli(torch.tensor(digits.data / 16, dtype=torch.float32))
train, test = x[:1400], x[1400:]

# %%
# The encoder returns mu and log variance side by side, the decoder the logits of the pixels.

encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * 2))
decoder = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 64))
vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli")

optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
for _ in range(60):
    for batch in train[torch.randperm(len(train))].split(100):
        optimizer.zero_grad()
        (-vae.iwae(batch, k=5)).backward()
        optimizer.step()

# %%
# The report states the negative log-likelihood with two errors, and how far to trust it.

result = vae.evaluate(test, k=1000, progress=False)
print(result)

# %%
# The encoder has seen no labels. The means of q(z|x) of the test images, coloured by class:

with torch.no_grad():
    mean = encoder(test)[:, :2]
figure, axes = pyplot.subplots(figsize=(6, 5), layout="constrained")
labels = digits.target[1400:]
colors = pyplot.get_cmap("tab10").colors
for digit in range(10):
    mine = mean[labels == digit]
    axes.scatter(*mine.T, s=12, color=colors[digit], alpha=0.5, linewidths=0)
    axes.text(*mine.median(0).values, str(digit), fontsize=15, fontweight="bold", color="black", ha="center")
axes.set(xlabel="$z_1$", ylabel="$z_2$", title="Means of q(z|x) of the test images, by digit")
axes.spines[["top", "right"]].set_visible(False)
