"""
Can you trust log p(x)?
=======================

An importance-weighted estimate is as good as the distribution that it draws from. With two latents the
truth is a sum over a grid, and every estimate can be compared with it.
"""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn

import fastvae

torch.manual_seed(0)
x = torch.bernoulli(torch.tensor(load_digits().data / 16, dtype=torch.float32))
train, test = x[:1400], x[1400:1500]
encoder = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 2 * 2))
decoder = nn.Sequential(nn.Linear(2, 128), nn.ReLU(), nn.Linear(128, 64))
vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli")
optimizer = torch.optim.Adam(vae.parameters(), lr=2e-3)
for _ in range(40):
    for batch in train[torch.randperm(len(train))].split(100):
        optimizer.zero_grad()
        (-vae.elbo(batch)).backward()
        optimizer.step()

# %%
# The truth: log p(x) by a grid of both latents, with its own error bound. It needs neither encoder nor
# sampling.

truth = fastvae.audit.lattice(test, decoder, latent_dim=2, likelihood="bernoulli")
print(f"log p(x) {float(truth.log_px.mean()):.3f}, error below {float(truth.error.max()):.1e}")

# %%
# Estimates of 200 draws from q, from a proposal that adapts to the draws, and from one that is refined by
# gradients.

results = {}
for proposal in ("posterior", "adapted", "refined"):
    results[proposal] = vae.evaluate(test, k=200, proposal=proposal, progress=False)
    off = results[proposal].log_px - truth.log_px
    print(
        f"{proposal:>10}: mean error {float(off.mean()):+.3f}, rms {float(off.square().mean().sqrt()):.3f}, "
        f"k-hat above 0.7 for {100 * results[proposal].untrusted:.0f} % of the images"
    )

# %%
# Pareto k̂ tells, from the draws alone, where the estimate from q is off: the errors are on the right of
# 0.7.

figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 4), layout="constrained")
plain = results["posterior"]
left.axvline(0.7, color="#888", lw=1)
left.axhline(0, color="#888", lw=1)
left.scatter(plain.khat, plain.log_px - truth.log_px, s=14, color="#999999")
left.scatter(results["refined"].khat, results["refined"].log_px - truth.log_px, s=14, color="#0072b2")
left.text(0.66, 0.9, "draws from q", color="#666666", transform=left.transAxes, ha="right")
left.text(0.02, 0.9, "refined", color="#0072b2", fontweight="bold", transform=left.transAxes)
left.set(xlabel="Pareto k̂", ylabel="error of log p(x), nats", title="200 draws against the truth")

# The exact posterior of the image with the largest error, and q.
worst = int((plain.log_px - truth.log_px).abs().argmax())
with torch.no_grad():
    mu, logvar = encoder(test[worst : worst + 1]).chunk(2, dim=1)
    best = vae.refine(test[worst : worst + 1])
    span = 5 * best.variance.sqrt().max()
    axis = torch.linspace(-1, 1, 200)
    a, b = torch.meshgrid(mu[0, 0] + span * axis, mu[0, 1] + span * axis, indexing="xy")
    z = torch.stack([a, b], -1).reshape(-1, 2)
    target = test[worst].expand(len(z), -1)
    log_joint = -nn.functional.binary_cross_entropy_with_logits(decoder(z), target, reduction="none").sum(1)
    log_joint = (log_joint - 0.5 * z.square().sum(1)).reshape(200, 200)
right.contourf(a, b, (log_joint - log_joint.max()).exp(), levels=12, cmap="Greys")
angle = torch.linspace(0, 2 * torch.pi, 100)
circle = torch.stack([angle.cos(), angle.sin()])
ellipse = mu[0, :, None] + 2 * (0.5 * logvar[0, :, None]).exp() * circle
right.plot(*ellipse, color="#d55e00", lw=2)
right.text(*ellipse[:, 20], " q", color="#d55e00", fontweight="bold")
draws = best.sample(4000)[:, 0]
root = torch.linalg.cholesky(torch.cov(draws.T))
fitted = draws.mean(0)[:, None] + 2 * root @ circle
right.plot(*fitted, color="#0072b2", lw=2)
right.text(*fitted[:, 60], "refined ", color="#0072b2", fontweight="bold", ha="right")
right.set(title="The exact posterior of the worst image", xticks=[], yticks=[])
