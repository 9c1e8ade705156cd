"""Score the mutants of a sequence by differences of log p(x), whose noise they share.

The fitness of a mutant is log p(mutant) − log p(wild type), as in DeepSequence (Riesselman, Ingraham & Marks
2018). Each log p(x) has an error by its draws; with shared noise most of it is common to both, and cancels.
"""

import torch
from torch import nn
from torch.nn.functional import one_hot

import fastvae
from fastvae import likelihoods

SITES, LETTERS, LATENTS, SEQUENCES, MUTANTS = 40, 20, 8, 4000, 20


class Family(nn.Module):
    """Encoder of sequences [B, SITES] of letters."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Flatten(), nn.Linear(SITES * LETTERS, 200), nn.ReLU(), nn.Linear(200, 2 * LATENTS)
        )

    def forward(self, x):
        return self.layers(one_hot(x.long(), LETTERS).float())


def simulated(generator):
    """Return sequences of a family, whose letters depend on ten hidden traits."""
    traits = torch.randn(SEQUENCES, 10, generator=generator)
    logits = torch.tanh(traits @ torch.randn(10, 60, generator=generator)) @ (
        0.4 * torch.randn(60, SITES * LETTERS, generator=generator)
    )
    shares = logits.view(-1, LETTERS).softmax(1)
    return torch.multinomial(shares, 1, generator=generator).view(SEQUENCES, SITES)


def main():
    torch.manual_seed(0)
    data = simulated(torch.Generator().manual_seed(1))
    decoder = nn.Sequential(
        nn.Linear(LATENTS, 200), nn.ReLU(), nn.Linear(200, SITES * LETTERS), nn.Unflatten(1, (SITES, LETTERS))
    )
    vae = fastvae.VAE(Family(), decoder, likelihood=likelihoods.Categorical(axis=-1))
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in range(15):
        for x in data[torch.randperm(SEQUENCES)].split(100):
            optimizer.zero_grad()
            (-vae.elbo(x)).backward()
            optimizer.step()

    wild = data[:1]
    mutants = wild.repeat(MUTANTS, 1)
    sites = torch.randperm(SITES)[:MUTANTS]
    mutants[range(MUTANTS), sites] = (
        mutants[range(MUTANTS), sites] + 1 + torch.randint(0, 19, (MUTANTS,))
    ) % LETTERS
    sequences = torch.cat([wild, mutants])

    def evaluate(k, seed, **options):
        noise = torch.Generator().manual_seed(seed)
        return vae.evaluate(sequences, k=k, generator=noise, progress=False, **options)

    truth = evaluate(100_000, 0, shared_noise=True).delta(0)
    print(f"{MUTANTS} mutants; fitness from {truth.value[1:].min():.1f} to {truth.value[1:].max():.1f} nats")
    errors = {"independent": [], "shared": [], "expected of shared": []}
    for seed in range(1, 6):
        plain = evaluate(2000, seed)
        errors["independent"].append(plain.log_px[1:] - plain.log_px[0] - truth.value[1:])
        shared = evaluate(2000, seed, shared_noise=True).delta(0)
        errors["shared"].append(shared.value[1:] - truth.value[1:])
        errors["expected of shared"].append(shared.stderr[1:])
    print("rms error of the fitness at K = 2000, five seeds")
    for name, values in errors.items():
        print(f"  {name:<19} {torch.stack(values).square().mean().sqrt():.3f} nats")


if __name__ == "__main__":
    main()
