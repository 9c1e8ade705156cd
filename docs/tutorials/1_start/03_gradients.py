"""
ELBO, IWAE, DReG: which gradient reaches the encoder?
=====================================================

More samples tighten the bound, and drown the encoder's gradient in noise (Rainforth et al. 2018). The
doubly reparameterised estimator (Tucker et al. 2019) has the same expectation, and does not drown.
"""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn

import fastvae

torch.manual_seed(0)
x = torch.bernoulli(torch.tensor(load_digits().data / 16, dtype=torch.float32))
encoder = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 2 * 8))
decoder = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 64))
vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli")
optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
for _ in range(15):
    for batch in x[torch.randperm(len(x))].split(100):
        optimizer.zero_grad()
        (-vae.iwae(batch, k=5)).backward()
        optimizer.step()

# %%
# ``gradient_snr`` evaluates a bound again and again with fresh noise, at fixed parameters.

draws = (1, 4, 16, 64, 256)
batch = x[:20]
ratios = {name: [] for name in ("iwae", "dreg")}
for k in draws:
    for name, values in ratios.items():
        bound = lambda k=k, name=name: vae.iwae(batch, k=k, estimator=name)  # noqa: E731
        values.append(fastvae.diagnostics.gradient_snr(bound, vae, evaluations=200).snr["encoder"])
for name, values in ratios.items():
    print(name, " ".join(f"{v:.2f}" for v in values))

# %%
# The plain derivative falls like 1/√K until it is not distinguished from pure noise; the doubly
# reparameterised one keeps its signal (for a q near the posterior it rises like √K). So train with
# ``vae.iwae(x, k=50, estimator="dreg")``.

floor = fastvae.diagnostics.gradient_snr(lambda: vae.elbo(batch), vae, evaluations=200).floor
figure, axes = pyplot.subplots(figsize=(6, 4), layout="constrained")
axes.axhspan(axes.get_ylim()[0], floor, color="#eeeeee")
axes.loglog(draws, ratios["iwae"], "o-", color="#d55e00", lw=2)
axes.loglog(draws, ratios["dreg"], "o-", color="#0072b2", lw=2)
axes.loglog(draws, [ratios["iwae"][0] / k**0.5 for k in draws], ":", color="#888888")
axes.text(draws[-1], ratios["iwae"][-1], "  plain", color="#d55e00", fontweight="bold", va="center")
axes.text(draws[-1], ratios["dreg"][-1], "  DReG", color="#0072b2", fontweight="bold", va="center")
axes.text(1, 0.9 * floor, "pure noise", color="#666666", va="top")
axes.margins(x=0.2)
axes.set(
    xlabel="K", ylabel="signal-to-noise", ylim=(0.5 * floor, 1), title="The encoder's gradient; dotted: 1/√K"
)
axes.spines[["top", "right"]].set_visible(False)
