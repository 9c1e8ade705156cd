"""``python -m docs.experiments.imputation``: MIWAE on tables of scikit-learn, for docs/published.md.

Half of the values are hidden at random, as in Mattei & Frellsen, MIWAE, 2019. Prints mean squared errors of
the hidden values, in units of their column's variance: mean and standard deviation over masks.
"""

from __future__ import annotations

import argparse
import csv
import warnings
from pathlib import Path

import torch
from sklearn import datasets
from sklearn.experimental import enable_iterative_imputer  # noqa: F401
from sklearn.impute import IterativeImputer, KNNImputer
from torch import Tensor, nn

import fastvae

RESULTS = Path(__file__).parents[1] / "published-imputation.csv"
LATENTS, HIDDEN, EPOCHS, BATCH, K = 10, 128, 300, 64, 20
TABLES = {"breast cancer": datasets.load_breast_cancer, "wine": datasets.load_wine}


class Decoder(nn.Module):
    """Means and log variances, which are bounded: a table can be fitted exactly."""

    def __init__(self, columns: int):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(LATENTS, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * columns))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor]:
        mean, logvar = self.body(z).chunk(2, 1)
        return mean, logvar.clamp(-4, 4)


def miwae(hidden: Tensor, mask: Tensor, epochs: int) -> Tensor:
    """Return the table [N, X] with its values where the mask is False imputed."""
    columns = hidden.shape[1]
    encoder = nn.Sequential(nn.Linear(columns, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 2 * LATENTS))
    vae = fastvae.VAE(encoder, Decoder(columns), likelihood="gaussian")
    seen = torch.where(mask, hidden, 0)
    optimizer = torch.optim.Adam(vae.parameters(), lr=1e-3)
    for _ in range(epochs):
        for rows in torch.randperm(len(seen)).split(BATCH):
            optimizer.zero_grad()
            (-vae.iwae(seen[rows], k=K, mask=mask[rows])).backward()
            optimizer.step()
    imputed: Tensor = vae.impute(seen, mask, k=2000).mean
    return imputed


def errors(x: Tensor, seed: int, epochs: int) -> dict[str, float]:
    """Return the mean squared error of each method for a mask."""
    torch.manual_seed(seed)
    mask = torch.rand_like(x) > 0.5
    hidden = torch.where(mask, x, torch.nan)
    array = hidden.numpy()
    found = {
        "mean": hidden.nanmean(0).expand_as(x),
        "ten neighbours": torch.tensor(KNNImputer(n_neighbors=10).fit_transform(array)),
        "iterative": torch.tensor(IterativeImputer(max_iter=10, random_state=seed).fit_transform(array)),
        "MIWAE": miwae(hidden, mask, epochs),
    }
    return {name: float((imputed - x)[~mask].square().mean()) for name, imputed in found.items()}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.experiments.imputation", description=__doc__)
    parser.add_argument("--seeds", type=int, default=5, help="masks for each table")
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--results", type=Path, default=RESULTS)
    options = parser.parse_args()
    warnings.filterwarnings("ignore", ".*Early stopping criterion")
    torch.set_num_threads(1)
    rows = []
    for table, load in TABLES.items():
        x = torch.tensor(load().data, dtype=torch.float32)
        x = (x - x.mean(0)) / x.std(0)
        found = [errors(x, seed, options.epochs) for seed in range(options.seeds)]
        for name in found[0]:
            values = torch.tensor([each[name] for each in found])
            spread = float(values.std()) if len(values) > 1 else float("nan")
            rows.append((table, name, len(values), f"{values.mean():.3f}", f"{spread:.3f}"))
            print(f"{table}, {name}: {values.mean():.3f} ± {spread:.3f}", flush=True)
    with options.results.open("w", newline="") as to:
        writer = csv.writer(to, lineterminator="\n")
        writer.writerow(("table", "method", "masks", "mean squared error", "standard deviation"))
        writer.writerows(rows)


if __name__ == "__main__":
    main()
