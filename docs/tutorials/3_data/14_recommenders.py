"""
Recommenders
============

Which items a user clicks next, from those clicked so far. A multinomial VAE ranks all items at once
(Mult-VAE, Liang et al. 2018); RecVAE (Shenbin et al. 2020) adds a prior that depends on the user. The clicks
are simulated, so that the best possible ranking is known.
"""

import copy
import math
import warnings

import torch
from matplotlib import pyplot
from torch import nn
from torch.nn import functional

import fastvae

warnings.filterwarnings("ignore", "Sparse CSR tensor support")
USERS, TEST, ITEMS, CLICKS, SEEN, RANK = 3000, 500, 1000, 40, 32, 10
LATENT, BATCH = 64, 250
LIKELIHOOD = fastvae.likelihoods.Multinomial(coefficient=False)

# %%
# **The clicks** of a user: 40 of 1000 items, by popularity, a power law, and by a taste of rank ten. The
# models see 32 clicks of each test user and rank the other items, among them eight hidden clicks.


def generated_clicks():
    """Return clicked items [USERS, CLICKS], in random order, and log rates [USERS, ITEMS]."""
    popularity = -torch.arange(1.0, ITEMS + 1).log()
    rates = 0.7 * popularity + 0.8 * torch.randn(USERS, RANK) @ torch.randn(RANK, ITEMS)
    gumbel = -torch.empty(USERS, ITEMS).exponential_().log()
    clicked = (rates + gumbel).topk(CLICKS).indices
    return clicked.gather(1, torch.rand(clicked.shape).argsort(1)), rates


def sparse(items):
    """Return the CSR matrix [B, ITEMS] of the users' items [B, n]."""
    b, n = items.shape
    starts, columns = torch.arange(0, b * n + 1, n), items.sort().values.flatten()
    return torch.sparse_csr_tensor(starts, columns, torch.ones(b * n), (b, ITEMS), check_invariants=False)


torch.manual_seed(0)
items, rates = generated_clicks()
train, seen, hidden = items[TEST:], items[:TEST, :SEEN], items[:TEST, SEEN:]

# %%
# **Networks.** The matrix of clicks is sparse and stays so, in the encoder and in the likelihood.


class Encoder(nn.Module):
    """Encoder of a sparse matrix of clicks, with dropout of clicks in training."""

    def __init__(self, hidden=200):
        super().__init__()
        self.first = nn.EmbeddingBag(ITEMS, hidden, mode="sum", include_last_offset=True)
        self.last = nn.Sequential(nn.Tanh(), nn.Linear(hidden, 2 * LATENT))
        nn.init.normal_(self.first.weight, std=1 / math.sqrt(hidden))

    def forward(self, x):
        starts, counts = x.crow_indices(), x.crow_indices().diff()
        values = x.values() / counts.sqrt().repeat_interleave(counts)
        values = functional.dropout(values, 0.5, self.training)
        return self.last(self.first(x.col_indices(), starts, per_sample_weights=values))


def build_decoder(hidden=200):
    return nn.Sequential(nn.Linear(LATENT, hidden), nn.Tanh(), nn.Linear(hidden, ITEMS))


def epoch(loss, optimizer):
    for rows in torch.randperm(len(train)).split(BATCH):
        optimizer.zero_grad()
        loss(sparse(train[rows])).backward()
        optimizer.step()


# %%
# **Mult-VAE** is an ELBO with a small weight of the KL, which grows from 0.


def mult_vae_loss(encoder, decoder, x, *, beta):
    return -fastvae.elbo(x, encoder(x), decoder, likelihood=LIKELIHOOD, beta=beta)


def train_mult_vae(epochs=30):
    encoder, decoder = Encoder(), build_decoder()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    beta = fastvae.schedules.linear(0.0, 0.2, epochs // 2)
    for e in range(epochs):
        epoch(lambda x, e=e: mult_vae_loss(encoder, decoder, x, beta=beta(e)), optimizer)
    return encoder, decoder


# %%
# **RecVAE**: a prior of your own is a class with a ``log_prob``; ``per_row`` says that it has a row for each
# user. The weight of the KL is a tensor here, by the number of a user's clicks. Encoder and decoder are
# trained in turns.


class Composite(fastvae.distributions.Distribution):
    """In each dimension a mixture of N(0, 1), the user's posterior of an epoch ago, and a wide normal."""

    per_row = True

    def __init__(self, old):
        mu, logvar = old.chunk(2, dim=1)
        zeros = torch.zeros_like(mu)
        mus, logvars = torch.stack([zeros, mu, zeros]), torch.stack([zeros, logvar, zeros + 10])
        shares = torch.tensor([0.15, 0.75, 0.1]).expand(*mu.shape, 3)
        components = torch.distributions.Normal(mus.movedim(0, 2), (0.5 * logvars).exp().movedim(0, 2))
        self.each = torch.distributions.MixtureSameFamily(torch.distributions.Categorical(shares), components)

    def log_prob(self, z):
        return self.each.log_prob(z).sum(-1)


def rec_vae_loss(encoder, decoder, old, x, gamma=0.005):
    with torch.no_grad():
        prior = Composite(old(x))
    beta = gamma * x.crow_indices().diff()
    return -fastvae.elbo(x, encoder(x), decoder, likelihood=LIKELIHOOD, prior=prior, kl="mc", beta=beta)


def train_rec_vae(epochs=9):
    encoder, decoder = Encoder(), nn.Linear(LATENT, ITEMS)
    old = copy.deepcopy(encoder).eval()
    for_encoder, for_decoder = (torch.optim.Adam(m.parameters(), lr=2e-3) for m in (encoder, decoder))

    def loss(x):
        return rec_vae_loss(encoder, decoder, old, x)

    for _ in range(epochs):
        for _ in range(3):
            epoch(loss, for_encoder)
        old.load_state_dict(encoder.state_dict())
        encoder.eval()  # no dropout
        epoch(loss, for_decoder)
        encoder.train()
    return encoder, decoder


# %%
# **Ranking**: the decoder's logits at the mean of q. For comparison popularity, which is the same for all
# users; EASE (Steck 2019), a linear model in closed form; and the rates that generated the clicks.


def ease(regularisation=300.0):
    """Return scores [TEST, ITEMS] of a linear model of each item given the others."""
    clicks = sparse(train).to_dense()
    inverse = torch.linalg.inv(clicks.T @ clicks + regularisation * torch.eye(ITEMS))
    weights = -inverse / inverse.diagonal()
    return sparse(seen).to_dense() @ weights.fill_diagonal_(0)


def recall(scores, n=20):
    """Return the mean share of the hidden items among the first n; the seen items do not count."""
    top = scores.scatter(1, seen, -math.inf).topk(n).indices
    return float((hidden[:, :, None] == top[:, None]).any(2).float().mean())


def ndcg(scores, seen, hidden, n=100):
    """Return nDCG@n of hidden items, of scores [B, ITEMS] in which seen items do not count."""
    top = scores.scatter(1, seen, -math.inf).topk(n).indices
    hits = (top[:, :, None] == hidden[:, None]).any(2)
    discounts = torch.arange(2.0, n + 2).log2().reciprocal()
    return float((hits * discounts).sum(1).mean() / discounts[: hidden.shape[1]].sum())


popularity = torch.bincount(train.flatten(), minlength=ITEMS).float().expand(TEST, ITEMS)
scores = {"popularity": popularity, "EASE, linear": ease(), "the true rates": rates[:TEST]}
for name, fit in (("Mult-VAE", train_mult_vae), ("RecVAE", train_rec_vae)):
    encoder, decoder = fit()
    with torch.no_grad():
        scores[name] = decoder(encoder.eval()(sparse(seen))[:, :LATENT])
found = {name: recall(score) for name, score in scores.items()}
for name, score in scores.items():
    print(f"{name}: recall@20 {found[name]:.3f}, nDCG@100 {ndcg(score, seen, hidden):.3f}")

# %%
# The true rates are the ceiling: clicks are random, and no ranking finds all of them.

names = sorted(found, key=found.get)
figure, axes = pyplot.subplots(figsize=(7, 3.2), layout="constrained")
bars = axes.barh(names, [100 * found[name] for name in names])
for bar, name in zip(bars, names, strict=True):
    bar.set_color("#0072b2" if "VAE" in name else "#009e73" if "true" in name else "#bbbbbb")
axes.bar_label(bars, fmt="%.0f %%", padding=3)
axes.set(title="Hidden clicks among the first 20 of 1000 items", xticks=[])
axes.margins(x=0.1)
axes.spines[["top", "right", "bottom"]].set_visible(False)
