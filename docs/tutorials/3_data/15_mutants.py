"""
Mutants of a protein
====================

A model of a family of sequences scores a mutant by log p(mutant) − log p(wild type), without a measurement of
any mutant (DeepSequence, Riesselman, Ingraham & Marks 2018). The alignment is simulated from known energies,
so that the scores can be compared with the truth.
"""

import torch
from matplotlib import pyplot
from torch import nn
from torch.nn.functional import one_hot

import fastvae
from fastvae import likelihoods

SITES, LETTERS, LATENTS, SEQUENCES, PAIRS = 30, 20, 8, 3000, 25

# %%
# **The family**: sequences of 30 sites and 20 letters, whose probability depends on each letter and, for 25
# pairs of sites, on both letters at once (a Potts model). Gibbs sampling draws 3000.

torch.manual_seed(0)
field = torch.randn(SITES, LETTERS)
coupling = torch.zeros(SITES, SITES, LETTERS, LETTERS)
for _ in range(PAIRS):
    i, j = torch.randperm(SITES)[:2]
    block = 1.5 * torch.randn(LETTERS, LETTERS)
    coupling[i, j] += block
    coupling[j, i] += block.T


def site_logits(x, i):
    """Return logits [N, LETTERS] of site i, given all others."""
    return field[i] + coupling[i][torch.arange(SITES), :, x].sum(1)


def log_p(x):
    """Return log p(x) of sequences [N, SITES], up to a constant."""
    pairs = coupling[torch.arange(SITES)[:, None], torch.arange(SITES), x[:, :, None], x[:, None]]
    return field[torch.arange(SITES), x].sum(1) + 0.5 * pairs.sum((1, 2))


data = torch.randint(LETTERS, (SEQUENCES, SITES))
for _ in range(12):
    for i in range(SITES):
        data[:, i] = torch.multinomial(site_logits(data, i).softmax(1), 1).flatten()
wild = data[log_p(data).argmax()][None]  # the most probable sequence of the alignment

# %%
# All single mutants of the wild type. Their true score is a difference of energies.

singles = wild.repeat(SITES * LETTERS, 1)
singles[torch.arange(len(singles)), torch.arange(SITES).repeat_interleave(LETTERS)] = torch.arange(
    LETTERS
).repeat(SITES)
singles = singles[(singles != wild).any(1)]
true = log_p(singles) - log_p(wild)

# %%
# **The model.** A categorical likelihood of each site, and a normal z. Sequences are integers; the encoder
# reads them as one-hot.


class Encoder(nn.Module):
    """Encoder of sequences [B, SITES] of letters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(SITES * LETTERS, 200), nn.ReLU(), nn.Linear(200, 2 * LATENTS)
        )

    def forward(self, x):
        return self.layers(one_hot(x.long(), LETTERS).float())


decoder = nn.Sequential(
    nn.Linear(LATENTS, 200), nn.ReLU(), nn.Linear(200, SITES * LETTERS), nn.Unflatten(1, (SITES, LETTERS))
)
vae = fastvae.VAE(Encoder(), decoder, likelihood=likelihoods.Categorical(axis=-1))
optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
for _ in range(20):
    for x in data[torch.randperm(SEQUENCES)].split(100):
        optimizer.zero_grad()
        (-vae.elbo(x)).backward()
        optimizer.step()

# %%
# **Scores.** ``shared_noise=True`` gives all sequences the same draws, so that most of their error cancels in
# the differences; ``delta`` returns these with their own standard error.

sequences = torch.cat([wild, singles])


def fitness(sequences, k, seed, shared_noise):
    """Return log p(x) less that of the first sequence, and its standard error."""
    noise = torch.Generator().manual_seed(seed)
    result = vae.evaluate(sequences, k=k, generator=noise, shared_noise=shared_noise, progress=False)
    if shared_noise:
        return tuple(value[1:] for value in result.delta(0))
    return result.log_px[1:] - result.log_px[0], None


print("spread of the scores of fifty mutants over ten seeds, 500 draws")
for shared_noise in (False, True):
    runs = [fitness(sequences[:51], 500, seed, shared_noise) for seed in range(10)]
    spread = torch.stack([run[0] for run in runs]).var(0).mean().sqrt()
    print(f"{'shared noise' if shared_noise else 'independent noise'}: {spread:.3f} nats")
expected = torch.stack([run[1] for run in runs]).square().mean().sqrt()
print(f"standard error with shared noise: {expected:.3f} nats")

# %%
# **Against the truth**, and against the usual baseline: the frequency of each letter at its site.

score, _ = fitness(sequences, 200, 0, True)
log_frequency = (one_hot(data, LETTERS).float().sum(0) + 1).log()
by_site = log_frequency[torch.arange(SITES), sequences].sum(1)
by_site = by_site[1:] - by_site[0]


def spearman(a, b):
    """Return the correlation of the ranks."""
    return float(torch.corrcoef(torch.stack([v.argsort().argsort().double() for v in (a, b)]))[0, 1])


found = {"frequency at the site": by_site, "VAE": score}
for name, values in found.items():
    print(f"{name}: Spearman {spearman(values, true):.2f}")

# %%
# Frequencies know nothing of the rest of the sequence. The VAE sees which letters go together, as far as a
# few latents can say; couplings of pairs, from which these data come, would be fitted best by a model of
# pairs.

figure, axes = pyplot.subplots(1, 2, figsize=(9, 4), sharey=True, layout="constrained")
for place, (name, values), color in zip(axes, found.items(), ("#888888", "#0072b2"), strict=True):
    place.scatter(values, true, s=9, color=color, alpha=0.6, linewidths=0)
    place.text(0.04, 0.92, f"Spearman {spearman(values, true):.2f}", color=color, fontweight="bold",
               transform=place.transAxes)  # fmt: skip
    place.set(title=name, xlabel="score of a mutant, nats")
    place.spines[["top", "right"]].set_visible(False)
figure.suptitle("Single mutants: the score of a model against the truth")
axes[0].set_ylabel("true log p(mutant) − log p(wild type)")
