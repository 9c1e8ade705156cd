"""
Which prior?
============

The best prior for the ELBO is the aggregate posterior, the mean of q(z|x) over the data. A prior that is
learned may come near it: a mixture of normals, or the VampPrior's mixture of posteriors of learned inputs.
"""

import torch
from matplotlib import pyplot
from sklearn.datasets import load_digits
from torch import nn

import fastvae
from fastvae.distributions import NormalMixture, VampPrior

torch.manual_seed(0)
x = torch.bernoulli(torch.tensor(load_digits().data / 16, dtype=torch.float32))
train, test = x[:1400], x[1400:]
EPOCHS, PARTS = 50, 20


def network(inputs, outputs):
    return nn.Sequential(
        nn.Linear(inputs, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, outputs)
    )


class PseudoInputs(nn.Module):
    """Learned inputs of the encoder, between 0 and 1, which start as training images."""

    def __init__(self):
        super().__init__()
        self.raw = nn.Parameter(torch.logit(train[:PARTS], eps=0.05))

    def forward(self):
        return self.raw.sigmoid()


def mixture(encoder):
    """Return a mixture of normals that starts near N(0, I)."""
    mu, logvar = 0.75**0.5 * torch.randn(PARTS, 2), torch.full((PARTS, 2), 0.25).log()
    return NormalMixture(*(nn.Parameter(t) for t in (mu, logvar, torch.zeros(PARTS))))


def vamp(encoder):
    """Return the mixture of q(z|u) over the pseudo-inputs u."""
    return VampPrior(encoder, PseudoInputs(), nn.Parameter(torch.zeros(PARTS)))


# %%
# Neither mixture has a KL in closed form, so that the ELBO takes its mean over the draws, ``kl="mc"``. The
# VampPrior shares the encoder with q: q = p costs nothing from the first step on, and without a warm-up of β
# the latents may stay unused.

models = {}
for name, prior_of in (("N(0, I)", None), ("mixture", mixture), ("VampPrior", vamp)):
    torch.manual_seed(1)
    encoder, decoder = network(64, 2 * 2), network(2, 64)
    prior = prior_of(encoder) if prior_of else None
    vae = fastvae.VAE(encoder, decoder, likelihood="bernoulli", prior=prior, latent_dim=2)
    beta = fastvae.schedules.linear(0.0, 1.0, EPOCHS // 2 if name == "VampPrior" else 1)
    optimizer = torch.optim.Adam(vae.parameters(), lr=3e-3)
    for epoch in range(EPOCHS):
        for batch in train[torch.randperm(len(train))].split(100):
            optimizer.zero_grad()
            (-vae.elbo(batch, kl="mc" if prior_of else "analytic", beta=beta(epoch + 1))).backward()
            optimizer.step()
    models[name] = vae

# %%
# ``diagnostics.latents`` splits the KL: what z says about x, and how far the aggregate posterior is from the
# prior. The second part is what a better prior can save, if the decoder stays as it is.

found = {}
for name, vae in models.items():
    found[name] = vae.evaluate(test, k=500, progress=False)
    parts = fastvae.diagnostics.latents(vae, train)
    print(
        f"{name:>9}: log p(x) {-found[name].nll:.2f} ± {found[name].stderr:.2f}, KL {parts.kl:.2f} = "
        f"{parts.mutual_information:.2f} (about x) + {parts.marginal_kl:.2f} (aggregate posterior to prior)"
    )
for name in ("mixture", "VampPrior"):
    better = found[name].log_px - found["N(0, I)"].log_px
    print(f"{name:>9}: {better.mean():+.2f} ± {better.std() / len(better) ** 0.5:.2f} nats to N(0, I)")

# %%
# In grey the density of each prior, in blue the means of q(z|x) of the test images, below samples. The
# learned priors follow the data, down to its holes, and the aggregate posterior is nearer to them. log p(x)
# does not gain from it here: with two latents a decoder adapts to N(0, I) as well, and the VampPrior is hard
# to train. With eight latents a mixture gains a little; :doc:`/latents` has the numbers for all priors.

figure, axes = pyplot.subplots(2, 3, figsize=(9.5, 5.2), height_ratios=(2.6, 1), layout="constrained")
for (above, below), (name, vae) in zip(axes.T, models.items(), strict=True):
    with torch.no_grad():
        mean = vae.encoder(test)[:, :2]
        low, high = mean.amin(0) - 0.5, mean.amax(0) + 0.5
        lines = (torch.linspace(*ends, 120) for ends in zip(low.tolist(), high.tolist(), strict=True))
        a, b = torch.meshgrid(*lines, indexing="xy")
        prior = fastvae.distributions.as_prior(vae.prior)
        log_p = prior.log_prob(torch.stack([a, b], -1).reshape(-1, 2)).reshape(120, 120)
    above.contourf(a, b, log_p.exp(), levels=12, cmap="Greys")
    above.scatter(*mean.T, s=6, color="#0072b2", alpha=0.7, linewidths=0)
    title = f"{name}: log p(x) {-found[name].nll:.2f}".replace("-", "−")
    above.set(title=title, xticks=[], yticks=[])
    samples = vae.sample(24, mean=True, generator=torch.Generator().manual_seed(2)).reshape(3, 8, 8, 8)
    framed = nn.functional.pad(samples, (1, 1, 1, 1), value=0.2)
    below.imshow(framed.permute(0, 2, 1, 3).reshape(30, 80), cmap="gray_r", vmin=0, vmax=1)
    below.set(xticks=[], yticks=[])
figure.suptitle("Learned priors follow the data; log p(x) does not gain from it here")
axes[0, 0].set_ylabel("prior (grey), means of q (blue)")
axes[1, 0].set_ylabel("samples")
