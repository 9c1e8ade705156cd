"""Recommenders of sparse clicks: Mult-VAE with a warm-up of β, and RecVAE, whose prior depends on the user.

``python docs/examples/recommender.py`` generates clicks of known structure, trains both on one thread, prints
nDCG@100 of clicks that they have not seen, and compares the time of a step with that of the replaced lines.
"""

import copy
import functools
import math
import time

import torch
from torch import nn
from torch.nn import functional

import fastvae

USERS, TEST, ITEMS, CLICKS, SEEN, RANK = 4000, 500, 2000, 40, 32, 10
LATENT, BATCH = 64, 250
LIKELIHOOD = fastvae.likelihoods.Multinomial(coefficient=False)


def generated_clicks():
    """Return clicked items [USERS, CLICKS], and log rates [USERS, ITEMS]: popularity, taste of low rank."""
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


class Encoder(nn.Module):
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


def mult_vae_loss(encoder, decoder, x, *, beta):
    return -fastvae.elbo(x, encoder(x), decoder, likelihood=LIKELIHOOD, beta=beta)


def replaced_lines(encoder, decoder, x, *, beta, noise=torch.randn_like):
    """Return the same loss as its authors write it."""
    mu, logvar = encoder(x).chunk(2, dim=1)
    z = mu + noise(mu) * torch.exp(0.5 * logvar)
    nll = -(functional.log_softmax(decoder(z), dim=1) * x.to_dense()).sum(1).mean()
    kl = -0.5 * (1 + logvar - mu.pow(2) - logvar.exp()).sum(1).mean()
    return nll + beta * kl


class Composite(fastvae.distributions.Distribution):
    """RecVAE's prior: in each dimension N(0, 1), the user's posterior of an epoch ago, and a wide normal."""

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
    beta = gamma * x.crow_indices().diff()  # by user
    q = encoder(x)
    return -fastvae.elbo(x, q, decoder, likelihood=LIKELIHOOD, prior=prior, kl="mc", beta=beta)


def epoch(items, loss, optimizer):
    for rows in torch.randperm(len(items)).split(BATCH):
        optimizer.zero_grad()
        loss(sparse(items[rows])).backward()
        optimizer.step()


def train_mult_vae(items, epochs=40):
    encoder, decoder = Encoder(), build_decoder()
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=2e-3)
    beta = fastvae.schedules.linear(0.0, 0.2, epochs // 2)
    for e in range(epochs):
        epoch(items, functools.partial(mult_vae_loss, encoder, decoder, beta=beta(e)), optimizer)
    return encoder, decoder


def train_rec_vae(items, epochs=12):
    encoder, decoder = Encoder(), nn.Linear(LATENT, ITEMS)
    old = copy.deepcopy(encoder).eval()
    loss = functools.partial(rec_vae_loss, encoder, decoder, old)
    for_encoder, for_decoder = (torch.optim.Adam(m.parameters(), lr=2e-3) for m in (encoder, decoder))
    for _ in range(epochs):
        for _ in range(3):
            epoch(items, loss, for_encoder)
        old.load_state_dict(encoder.state_dict())
        encoder.eval()  # no dropout
        epoch(items, loss, for_decoder)
        encoder.train()
    return encoder, decoder


def ndcg(scores, seen, hidden, n=100):
    """Return nDCG@n of hidden items, of scores [B, ITEMS] in which seen items do not count."""
    top = scores.scatter(1, seen, -math.inf).topk(n).indices
    hits = (top[:, :, None] == hidden[:, None]).any(2)
    discounts = torch.arange(2.0, n + 2).log2().reciprocal()
    return float((hits * discounts).sum(1).mean() / discounts[: hidden.shape[1]].sum())


def compare_times(items, seconds=5.0):
    """Print the CPU time of a step of the replaced lines by that of a step of fastvae, in turns."""
    steps = []
    for loss in (replaced_lines, mult_vae_loss):
        encoder, decoder = Encoder(), build_decoder()
        optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
        of_batch = functools.partial(loss, encoder, decoder, beta=0.2)
        steps.append(functools.partial(epoch, items[:BATCH], of_batch, optimizer))
    ratios, end = [], time.process_time() + seconds
    while time.process_time() < end:
        times = [time.process_time()]
        for step in steps:
            step()
            times.append(time.process_time())
        ratios.append((times[1] - times[0]) / (times[2] - times[1]))
    p20, p50, p80 = (float(q) for q in torch.tensor(ratios).quantile(torch.tensor([0.2, 0.5, 0.8])))
    print(f"a step's CPU time, replaced lines / fastvae: {p50:.2f} ({p20:.2f} to {p80:.2f})")


def main():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    items, rates = generated_clicks()
    train, seen, hidden = items[TEST:], items[:TEST, :SEEN], items[:TEST, SEEN:]
    popularity = torch.bincount(train.flatten(), minlength=ITEMS).float().expand(TEST, ITEMS)
    print(f"nDCG@100 of popularity: {ndcg(popularity, seen, hidden):.3f}")
    print(f"nDCG@100 of the true rates: {ndcg(rates[:TEST], seen, hidden):.3f}")
    for name, fit in (("Mult-VAE", train_mult_vae), ("RecVAE", train_rec_vae)):
        encoder, decoder = fit(train)
        with torch.no_grad():
            scores = decoder(encoder.eval()(sparse(seen))[:, :LATENT])
        print(f"nDCG@100 of {name}: {ndcg(scores, seen, hidden):.3f}")
    compare_times(train)


if __name__ == "__main__":
    main()
